"""Settings that several experiments share, in groups: data, optimization, regularization."""

import dataclasses

from cnnjax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class LabelledImages:
    """Which images a classifier is trained on, and how they are prepared."""

    dataset: str = "mnist"
    """mnist (shipped), digits, tfds:NAME, or folder:PATH with one sub-folder a class."""

    classes: str = "all"
    """all; some of them, such as 3,8; or even-odd. Two classes make a binary task: one logit."""

    image_size: int = 0
    """Height and width that the model gets: smaller images are padded, larger ones resized; 0
    leaves them as they are. --fit says otherwise."""

    fit: str = "pad"
    """How an image gets --image-size: pad; resize (stretched); or crop, the middle of it when it is
    scaled to 1 / 0.875 of the size, as ImageNet is tested (crop:0.95 with another share)."""

    crop_area: float = 0.0
    """Read of each training image a random part of at least this share of its area, stretched to
    --image-size: 0.08 is usual for ImageNet. Streamed datasets only; 0 reads whole images."""

    validation: float = 0.1
    """Share of the training images held out to validate on, or their number."""

    data_seed: int = -1
    """Seed that chooses them, --train-examples and --label-noise: runs that share it share their
    data. -1 takes --seed."""

    train_examples: int = 0
    """Train on so many of the training images only, drawn at random; 0 takes all."""

    label_noise: float = 0.0
    """Share of the training labels made wrong on purpose, such as 0.2."""

    exclude: str = ""
    """File with the index of a training image on each line: these are left out. See
    cnnjax.commands.inspect_labels."""

    balance: str = "none"
    """For classes of different size: weights (of the loss) or resample (repeat the rare ones)."""

    preprocess: str = ""
    """A filter of all images, training and test: median:3, mean:3 or gaussian:1.5."""


@dataclasses.dataclass(frozen=True)
class Optimization:
    """The optimizer and its learning rate."""

    optimizer: str = "adam"
    """sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw, lamb, lion or muon."""

    learning_rate: float = 1e-3
    """The peak of the schedule."""

    schedule: str = "cosine"
    """constant, step, exponential, cosine, polynomial or one_cycle."""

    schedule_arguments: tuple[str, ...] = ()
    """Arguments of the schedule, such as 'boundaries=(0.5, 0.75)' factor=0.1: cnnjax.schedules."""

    cycles: int = 1
    """Restarts of the cosine schedule: so many equal cycles, such as for snapshot ensembles."""

    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly from 0."""

    momentum: float = 0.9
    """Of momentum, nesterov and muon."""

    weight_decay: float = 0.0
    """Decoupled decay of the kernels, times the learning rate at each step."""

    clip_norm: float = 0.0
    """Largest global gradient norm; 0 does not clip."""


@dataclasses.dataclass(frozen=True)
class Regularization:
    """What works against overfitting, for any task."""

    l1: float = 0.0
    """Factor of the kernels' sum of absolute values, added to the loss."""

    l2: float = 0.0
    """Factor of the kernels' sum of squares, added to the loss."""

    max_norm: float = 0.0
    """Largest L2 norm of the weights into a unit or channel, kept after each update; 0 is none."""

    sam: float = 0.0
    """Radius of sharpness-aware minimization, such as 0.05; a step takes twice as long. 0 does not
    use it."""

    ema_decay: float = 0.0
    """Decay of the moving average of the parameters that is validated and tested; 0 keeps none."""

    swa_from_epoch: int = 0
    """Validate and test the mean of the parameters after this epoch and all later ones (stochastic
    weight averaging) instead of a moving average; 0 does not."""

    recalibrate: int = 0
    """Training batches on which BatchNorm's statistics are measured anew for each validation and
    for the test: averaged parameters need it. 0 takes the running ones."""

    augment: str = ""
    """Random changes of the training images, in order, such as crop:4,flip,rotate:15,mixup:0.2:
    names and numbers of cnnjax.augment.policy. cnnjax.commands.show_batch shows what they do."""


@dataclasses.dataclass(frozen=True)
class Training(Regularization, Optimization, Settings):
    """What a run of any task has: how long and where it trains, how it learns."""
