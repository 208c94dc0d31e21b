"""A classifier of `cnnjax.models` on image classification data: its settings and its recipe."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import cnnjax
from cnnjax import spec
from cnnjax.augment.filters import filter_images
from cnnjax.errors import NotPreparedError, UserError
from cnnjax.run import listings, load
from cnnjax.run import settings as runs
from cnnjax.train import averaging


@dataclasses.dataclass(frozen=True)
class Config(runs.Settings):
    """Train a classifier: validates after each epoch, tests at the end, keeps everything."""

    experiment: ClassVar[str] = "experiments.classify"
    listings: ClassVar[dict[str, str]] = listings.CLASSIFIER

    model: str = "cnn_32_64"
    """A name that `cnnjax models` lists, perhaps with fields: 'lenet5(activation=tanh)'."""

    model_arguments: tuple[str, ...] = ()
    """More fields of the model, such as activation=tanh pool=average."""

    dataset: str = "mnist"
    """mnist (shipped), digits, tfds:NAME, or folder:PATH with one sub-folder a class."""

    classes: str = "all"
    """Which classes, such as 3,8: short for only(3,8). Two make a binary task: one logit."""

    image_size: int = 0
    """Height and width that the model gets: smaller images are padded, larger ones resized; 0
    leaves them as they are. --fit says otherwise."""

    fit: str = "pad"
    """How an image gets --image-size: pad; resize (stretched); or crop, the middle of it when it is
    scaled to 1 / share of the size, as ImageNet is tested."""

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

    loss: str = "auto"
    """By name; auto is cross-entropy: of a softmax, or of a sigmoid for one logit."""

    label_smoothing: float = 0.0
    """Share of each label's weight spread over all classes in training (softmax cross-entropy
    only); validation and test are of the labels as they are."""

    optimizer: str = "adam"
    """By name."""

    learning_rate: float = 1e-3
    """The peak of the schedule."""

    schedule: str = "cosine"
    """How the learning rate changes, such as cosine or 'cosine(cycles=3)'."""

    schedule_arguments: tuple[str, ...] = ()
    """More arguments of the schedule, such as 'boundaries=(0.5, 0.75)' factor=0.1."""

    cycles: int = 1
    """Restarts of the cosine schedule: so many equal cycles, such as for snapshot ensembles."""

    warmup_epochs: float = 1.0
    """Epochs in which the learning rate rises linearly from 0."""

    momentum: float = 0.9
    """Of momentum, nesterov and muon."""

    weight_decay: float = 0.0
    """Decoupled decay of the kernels, times the learning rate at each step."""

    l1: float = 0.0
    """Factor of the kernels' sum of absolute values, added to the loss."""

    l2: float = 0.0
    """Factor of the kernels' sum of squares, added to the loss."""

    clip_norm: float = 0.0
    """Largest global gradient norm; 0 does not clip."""

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

    preprocess: str = ""
    """A filter of all images, training and test, such as median:3."""

    augment: str = ""
    """Random changes of the training images, in order, such as crop:4,flip,rotate:15,mixup:0.2;
    crop:4 is short for crop(4). cnnjax show-batch draws what they do."""


def main(config: Config) -> int:
    """Trains and tests one network; returns the exit code."""
    start(config)
    return train(config)


def start(config: Config) -> None:
    """Connects the processes and devices; before any use of JAX.

    Raises:
      UserError: what the devices do not allow, and specs that name or give what there is not.
    """
    check_specs(config)
    cnnjax.devices.processes.start(
        config.coordinator,
        config.num_processes,
        config.process_id,
        timeout_secs=config.join_timeout_secs,
    )
    batch_size = config.batch_size // max(config.accumulate, 1)
    cnnjax.devices.backend.start(config.devices, config.mesh, batch_size=batch_size)


def check_specs(config: Config) -> None:
    """Refuses a spec that no function takes, before anything takes long; computes nothing."""
    cnnjax.schedules.read_schedule(config.schedule, config.schedule_arguments)
    if config.model:
        cnnjax.models.read_model(config.model, config.model_arguments)
    policy, filters = cnnjax.augment.policy, cnnjax.augment.filters
    spec.check(config.augment, policy.NAMES, policy.KIND)
    spec.check(config.preprocess, filters.FILTERS, "filter")
    cnnjax.data.image_files.parse_fit(config.fit)
    cnnjax.devices.sharding.parse_rules(config.sharding)


def train(config: Config) -> int:
    """Trains and tests one network, when all has started."""
    dataset = read_data(config)
    name, arguments = cnnjax.models.read_model(config.model, config.model_arguments)
    model, card = make_model(config, name, arguments, dataset)
    return cnnjax.run.trainer.train_classifier(config, make_recipe(config, dataset, model, card))


def read_data(config: Config):
    """Opens the dataset that the settings name; for a smoke run without it, makes images."""
    size = config.image_size or None
    try:
        dataset = cnnjax.data.open_dataset(
            config.dataset,
            pipeline=config.pipeline,
            data_dir=config.data_dir or None,
            classes=config.classes,
            validation=config.validation,
            seed=data_seed(config),
            image_size=size,
            fit=config.fit,
            smallest_area=config.crop_area,
        )
    except NotPreparedError as error:
        options = {"classes": config.classes, "image_size": size}
        dataset = made_instead(config.smoke, error, config.dataset, **options)
    if config.smoke:
        dataset = cnnjax.run.trainer.shrink(dataset)
    return cnnjax.evaluation.label_quality.prepare(
        dataset,
        train_examples=config.train_examples,
        label_noise=config.label_noise,
        exclude=config.exclude,
        balance=config.balance,
        seed=data_seed(config),
    )


def made_instead(smoke: bool, error: NotPreparedError, name: str, **options):
    """Returns made images for a smoke run (see `cnnjax.data.stand_in`); else raises the error."""
    if not smoke:
        raise error
    cnnjax.devices.processes.say(f"made images  in place of {name}: {error}")
    return cnnjax.data.stand_in(name, **options)


def settings_of_run(directory) -> Config:
    """Returns the settings of a run of any experiment, those that `Config` has."""
    settings = runs.read_config(Path(directory))["settings"]
    known = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: settings[name] for name in known & set(settings)})


def data_seed(config: Config) -> int:
    """Returns the seed that chooses the data."""
    return config.seed if config.data_seed < 0 else config.data_seed


def make_model(config: Config, name: str, arguments: dict, dataset):
    """Returns the model, not yet initialized, and the card by which it is built again."""
    num_outputs = 1 if dataset.num_classes == 2 else dataset.num_classes
    fields = load.computation(name, arguments, precision=config.precision, remat=config.remat)
    model = cnnjax.models.create(name, num_classes=num_outputs, **fields)
    return model, {
        "model": name,
        "num_outputs": num_outputs,
        "arguments": arguments,
        "preprocess": config.preprocess,
        "fit": config.fit,
    }


def make_recipe(
    config: Config,
    dataset,
    model,
    card: dict,
    *,
    wrap_optimizer=lambda optimizer, total_steps: optimizer,
    step_factory=None,
    updates_per_step=1,
    **start,
):
    """Returns what `train_classifier` needs.

    Args:
      config: the settings.
      dataset: what `read_data` returned.
      model, card: what `make_model` returned; a card with `mean` and `std` replaces the dataset's.
      wrap_optimizer: `(optimizer, total_steps) -> optimizer`.
      step_factory: what takes the arguments of `steps.make_train_step` in its place.
      updates_per_step: how often a step of that factory updates the parameters.
      **start: further fields of the recipe, and `pull` of the step.
    """

    image_filter = cnnjax.augment.make_filter(config.preprocess)

    def normalize(images):
        # The moments of a dataset on disk take seconds: not before all settings are checked.
        mean, std = (card.get(name) or getattr(dataset, name) for name in ("mean", "std"))
        order = card.get("channel_order", "RGB")
        images = filter_images(images, image_filter)
        return cnnjax.augment.normalize(images, mean, std, channel_order=order)

    num_outputs = card["num_outputs"]
    smoothing = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    loss_fn = _balanced(config, _loss(config, num_outputs, **smoothing), dataset)
    augment = cnnjax.augment.make_augment(config.augment, num_classes=num_outputs)
    if config.sam < 0:
        raise UserError(f"--sam {config.sam}: give a radius of 0 or more.")
    total_steps = cnnjax.run.trainer.total_steps(config, dataset)
    updates = total_steps * updates_per_step
    name, options = cnnjax.schedules.read_schedule(config.schedule, config.schedule_arguments)
    schedule = cnnjax.schedules.make_schedule(
        name,
        config.learning_rate,
        total_steps=updates,
        warmup_steps=round(updates * config.warmup_epochs / config.epochs),
        **({"cycles": config.cycles} if config.cycles != 1 else {}),
        **options,
    )
    optimizer = cnnjax.optim.make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm or None,
        max_norm=config.max_norm or None,
    )
    optimizer = wrap_optimizer(optimizer, total_steps)
    pull = start.pop("pull", None)
    step_factory = step_factory or cnnjax.train.step.make_train_step
    averages = _stochastic_average(config, total_steps // config.epochs)
    return cnnjax.run.recipe.Recipe(
        dataset=dataset,
        model=model,
        optimizer=optimizer,
        make_step=lambda axis_name: step_factory(
            model,
            optimizer,
            loss_fn,
            schedule=schedule,
            normalize=normalize,
            augment=augment,
            penalty=_penalty(config),
            pull=pull,
            ema_decay=config.ema_decay,
            averaging=averages,
            sam_radius=config.sam,
            accumulate=config.accumulate,
            axis_name=axis_name,
        ),
        # Of the labels as they are and all classes alike, whatever training weighs.
        loss_fn=_loss(config, num_outputs),
        normalize=normalize,
        card=card,
        ema=config.ema_decay > 0 or averages is not None,
        recalibrate_batches=config.recalibrate,
        precision=config.precision,
        **start,
    )


def _loss(config, num_outputs, **options):
    name = config.loss
    if name == "auto":
        name = "sigmoid_binary_cross_entropy" if num_outputs == 1 else "softmax_cross_entropy"
    return cnnjax.losses.make_loss(name, **options)


def _balanced(config, loss_fn, dataset):
    """Returns the training loss: weighted by class, where that is asked for."""
    if config.balance != "weights":
        return loss_fn
    if isinstance(dataset, cnnjax.data.StreamedDataset):
        raise UserError("--balance weights counts labels in memory: use --pipeline resident.")
    weights = cnnjax.evaluation.label_quality.class_weights(
        dataset.train.label, dataset.num_classes
    )
    return cnnjax.losses.weighted(loss_fn, weights)


def _stochastic_average(config, steps_per_epoch):
    """Returns the average of the ends of epochs, or None where it is not asked for."""
    first = config.swa_from_epoch
    if not first:
        return None
    if config.ema_decay:
        raise UserError("--swa-from-epoch and --ema-decay are two averages: give one.")
    if not 1 <= first <= config.epochs:
        raise UserError(
            f"--swa-from-epoch {first}: give an epoch from 1 to {config.epochs}, or more --epochs."
        )
    return averaging.stochastic(first * steps_per_epoch, steps_per_epoch)


def _penalty(config):
    """Returns `params -> scalar`, or None where there is none."""
    if not (config.l1 or config.l2):
        return None
    losses = cnnjax.losses
    return lambda params: (
        config.l1 * losses.l1_penalty(params) + config.l2 * losses.l2_penalty(params)
    )
