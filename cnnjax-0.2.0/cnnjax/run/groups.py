"""Settings that several experiments share, in groups: data, optimization, regularization."""

import dataclasses
from typing import ClassVar

from cnnjax.run.help import listed
from cnnjax.run.settings import Settings


@dataclasses.dataclass(frozen=True)
class LabeledImages:
    """Which images a classifier is trained on, and how they are prepared."""

    listings: ClassVar[dict[str, str]] = listed("classes", "fit", "preprocess")

    dataset: str = "mnist"
    """mnist (shipped), digits, tfds:NAME, or folder:PATH with one sub-folder per class."""

    classes: str = "all"
    """Which classes, such as 3,8: short for only(3,8). Two make a binary task: one logit."""

    image_size: int = 0
    """Height and width that the model gets: smaller images are padded, larger ones resized; 0
    leaves them as they are. --fit says otherwise."""

    fit: str = "pad"
    """How an image gets --image-size: pad; resize (stretched); or crop, the middle of it when it is
    scaled to 1 / fraction of the size, as ImageNet is tested."""

    crop_area: float = 0.0
    """Read of each training image a random part of at least this fraction of its area, stretched to
    --image-size: 0.08 is usual for ImageNet. Streamed datasets only; 0 reads whole images."""

    validation: float = 0.1
    """Fraction of the training images held out to validate on, or their number; data that have a
    validation split keep it."""

    fold: str = ""
    """Validate on a part of the training images instead, such as 2/5: the second of five. See
    cnnjax cross-validate."""

    stratify: bool = True
    """Hold out of each class in proportion (folders, and tfds datasets in memory)."""

    drop_duplicates: bool = False
    """Of a folder: train without the files that are, byte for byte, in validation or test too."""

    data_seed: int = -1
    """Seed that chooses them, --train-examples, --label-noise and what --balance repeats: runs that
    share it share their data. -1 takes --seed."""

    train_examples: int = 0
    """Train on N of the training images only, drawn at random; 0 takes all."""

    label_noise: float = 0.0
    """Fraction of the training labels made wrong on purpose, such as 0.2."""

    exclude: str = ""
    """File with the index of a training image on each line: these are left out. See
    `cnnjax inspect-labels`."""

    balance: str = "none"
    """For classes of different size: weights (of the loss) or resample (repeat the rare ones)."""

    preprocess: str = ""
    """A filter of all images, training and test, such as median:3."""


@dataclasses.dataclass(frozen=True)
class Optimization:
    """The optimizer and its learning rate."""

    listings: ClassVar[dict[str, str]] = listed("optimizer", "schedule")

    optimizer: str = "adam"
    """What makes updates of gradients, by name."""

    learning_rate: float = 1e-3
    """The peak of the schedule."""

    schedule: str = "cosine"
    """How the learning rate changes, such as cosine or 'cosine(cycles=3)'."""

    schedule_arguments: tuple[str, ...] = ()
    """More arguments of the schedule, such as 'boundaries=(0.5, 0.75)' factor=0.1."""

    cycles: int = 1
    """Restarts of the cosine schedule: N equal cycles, such as for snapshot ensembles."""

    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly from 0."""

    momentum: float = 0.9
    """Of momentum, nesterov and muon."""

    weight_decay: float = 0.0
    """Decoupled decay of the kernels, times the learning rate at each step; in lamb also times its
    trust ratio."""

    clip_norm: float = 0.0
    """Largest global gradient norm; 0 does not clip."""


@dataclasses.dataclass(frozen=True)
class Regularization:
    """What works against overfitting, for any task."""

    listings: ClassVar[dict[str, str]] = listed("augment")

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
    """Training batches on which BatchNorm's statistics are recomputed for each validation and
    for the test: averaged parameters need it. 0 takes the running ones."""

    augment: str = ""
    """Random changes of the training images, in order, such as crop:4,flip,rotate:15,mixup:0.2;
    crop:4 is short for crop(4). cnnjax show-batch draws what they do."""


@dataclasses.dataclass(frozen=True)
class Training(Regularization, Optimization, Settings):
    """What a run of any task has: how long and where it trains, how it learns."""
