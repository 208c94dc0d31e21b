"""Train any classifier of `cnnjax.models` on any image classification data.

    python -m experiments.classify --model cnn_32_64 --dataset tfds:fashion_mnist
    python -m experiments.classify --model dense_dropout --classes 3,8
    python -m experiments.classify --model cnn_32x32 --dataset folder:photos --image-size 32

The experiments named after a network are this one with that network's settings.
"""

import dataclasses

import cnnjax
from cnnjax import cli, runs


@dataclasses.dataclass(frozen=True)
class Config(runs.Settings):
    """Train a classifier: validates after each epoch, tests at the end, keeps everything."""

    model: str = "cnn_32_64"
    """A name that `python -m cnnjax.models` lists."""

    model_arguments: tuple[str, ...] = ()
    """Fields of the model, such as activation=tanh pool=average."""

    dataset: str = "mnist"
    """mnist (shipped), tfds:NAME, or folder:PATH with one sub-folder a class."""

    classes: str = "all"
    """all; some of them, such as 3,8; or even-odd. Two classes make a binary task: one logit."""

    image_size: int = 0
    """Height and width that the model gets: smaller images are padded, larger ones resized; 0
    leaves them as they are."""

    validation: float = 0.1
    """Share of the training images held out to validate on."""

    loss: str = "auto"
    """auto (cross-entropy: softmax, or sigmoid for one logit), softmax_cross_entropy,
    sigmoid_binary_cross_entropy, mean_squared_error or lenet1998_map."""

    label_smoothing: float = 0.0
    """Share of each label's weight spread over all classes (softmax cross-entropy only)."""

    optimizer: str = "adam"
    """sgd, momentum, nesterov, adagrad, rmsprop, adam, adamw, lamb, lion or muon."""

    learning_rate: float = 1e-3
    """The peak of the schedule."""

    schedule: str = "cosine"
    """constant, step, exponential, cosine, polynomial or one_cycle."""

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

    ema_decay: float = 0.0
    """Decay of the moving average of the parameters that is validated and tested; 0 keeps none."""

    rotation: float = 0.0
    """Augmentation: largest rotation in degrees, either way."""

    scaling: float = 0.0
    """Augmentation: largest relative change of size, such as 0.1."""

    translation: float = 0.0
    """Augmentation: largest shift in pixels along each axis."""

    shear: float = 0.0
    """Augmentation: largest horizontal shear in degrees."""

    flip: bool = False
    """Augmentation: mirror half of the images left to right."""


def main(config: Config) -> int:
    """Trains and tests one network; returns the exit code."""
    start(config)
    return train(config)


def start(config: Config) -> None:
    """Connects the processes and devices; before any use of JAX."""
    cnnjax.distributed.start(
        config.coordinator,
        config.num_processes,
        config.process_id,
        timeout_secs=config.join_timeout_secs,
    )
    cnnjax.backend.start(config.devices, config.mesh)


def train(config: Config) -> int:
    """Trains and tests one network, when all has started."""
    dataset = read_data(config)
    arguments = cli.key_values(config.model_arguments)
    model, card = make_model(config, config.model, arguments, dataset)
    return cnnjax.training.train_classifier(config, make_recipe(config, dataset, model, card))


def read_data(config: Config):
    """Opens the dataset that the settings name."""
    dataset = cnnjax.data.open_dataset(
        config.dataset,
        pipeline=config.pipeline,
        data_dir=config.data_dir or None,
        classes=config.classes,
        validation=config.validation,
        seed=config.seed,
        image_size=config.image_size or None,
    )
    return cnnjax.training.shrink(dataset) if config.smoke else dataset


def make_model(config: Config, name: str, arguments: dict, dataset):
    """Returns the model, not yet initialised, and the card by which it is built again."""
    num_outputs = 1 if dataset.num_classes == 2 else dataset.num_classes
    fields = runs.computation(name, arguments, precision=config.precision, remat=config.remat)
    model = cnnjax.models.create(name, num_classes=num_outputs, **fields)
    return model, {"model": name, "num_outputs": num_outputs, "arguments": arguments}


def make_recipe(
    config: Config,
    dataset,
    model,
    card: dict,
    *,
    wrap_optimizer=lambda optimizer, total_steps: optimizer,
    **start,
):
    """Returns what `train_classifier` needs.

    Args:
      config: the settings.
      dataset: what `read_data` returned.
      model, card: what `make_model` returned; a card with `mean` and `std` replaces the dataset's.
      wrap_optimizer: `(optimizer, total_steps) -> optimizer`.
      **start: `variables` and `base_checksum` of the recipe, and `pull` of the step.
    """

    def normalise(images):
        # The moments of a dataset on disk take seconds: not before all settings are checked.
        mean, std = (card.get(name) or getattr(dataset, name) for name in ("mean", "std"))
        return cnnjax.data.normalise(images, mean, std)

    loss_fn = _loss(config, card["num_outputs"])
    total_steps = cnnjax.training.total_steps(config, dataset)
    schedule = cnnjax.schedules.make_schedule(
        config.schedule,
        config.learning_rate,
        total_steps=total_steps,
        warmup_steps=round(total_steps * config.warmup_epochs / config.epochs),
    )
    optimizer = cnnjax.optim.make_optimizer(
        config.optimizer,
        schedule,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm or None,
    )
    optimizer = wrap_optimizer(optimizer, total_steps)
    pull = start.pop("pull", None)
    return cnnjax.recipe.Recipe(
        dataset=dataset,
        model=model,
        optimizer=optimizer,
        make_step=lambda axis_name: cnnjax.steps.make_train_step(
            model,
            optimizer,
            loss_fn,
            schedule=schedule,
            normalise=normalise,
            augment=_augmentation(config),
            penalty=_penalty(config),
            pull=pull,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            axis_name=axis_name,
        ),
        loss_fn=loss_fn,
        normalise=normalise,
        card=card,
        ema=config.ema_decay > 0,
        precision=config.precision,
        **start,
    )


def _loss(config, num_outputs):
    name = config.loss
    if name == "auto":
        name = "sigmoid_binary_cross_entropy" if num_outputs == 1 else "softmax_cross_entropy"
    options = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
    return cnnjax.losses.make_loss(name, **options)


def _augmentation(config):
    """Returns `(key, images, first_index) -> images`, or None where nothing is to be changed."""
    magnitudes = (config.rotation, config.scaling, config.translation, config.shear)
    functions = []
    if any(magnitudes):
        affine = cnnjax.data.random_affine(
            rotation_degrees=config.rotation,
            scale=(1 / (1 + config.scaling), 1 + config.scaling),
            translation_pixels=config.translation,
            shear_degrees=config.shear,
        )
        functions.append(affine)
    if config.flip:
        functions.append(cnnjax.data.random_flip())
    if not functions:
        return None
    function = cnnjax.data.compose(*functions)
    return lambda key, images, first: cnnjax.data.apply_per_image(key, images, function, first)


def _penalty(config):
    """Returns `params -> scalar`, or None where there is none."""
    if not (config.l1 or config.l2):
        return None
    losses = cnnjax.losses
    return lambda params: (
        config.l1 * losses.l1_penalty(params) + config.l2 * losses.l2_penalty(params)
    )


if __name__ == "__main__":
    runs.launch(Config, main)
