"""A classifier of `cnnjax.models` on image classification data: its settings and its recipe."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import cnnjax
from cnnjax.errors import NotPreparedError
from cnnjax.run import load, record
from cnnjax.run.groups import LabeledImages, Training
from cnnjax.run.help import listed

if TYPE_CHECKING:
    from cnnjax.run.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Config(Training, LabeledImages):
    """Train a classifier: validates after each epoch, tests at the end, keeps everything."""

    experiment: ClassVar[str] = "experiments.classify"
    listings: ClassVar[dict[str, str]] = listed("loss")

    model: str = "cnn_32_64"
    """A name that `cnnjax models` lists, or MODULE:NAME of a file of your own; perhaps with fields:
    'lenet5(activation=tanh)'."""

    model_arguments: tuple[str, ...] = ()
    """More fields of the model, such as activation=tanh pool=average."""

    loss: str = "auto"
    """By name; auto is cross-entropy: of a softmax, or of a sigmoid for one logit."""

    label_smoothing: float = 0.0
    """Fraction of each label's weight spread over all classes in training, of softmax and sigmoid
    cross-entropy (other losses refuse it); validation and test are of the labels as they are."""

    monitor: Literal["accuracy", "loss"] = "accuracy"  # type: ignore[assignment]
    """The validation score that says which weights are best: highest accuracy, or lowest loss."""


def main(config: Config) -> int:
    """Trains and tests one network; returns the exit code."""
    cnnjax.run.trainer.start(config)
    return train(config)


def train(config: Config) -> int:
    """Trains and tests one network, when all has started."""
    name, arguments = cnnjax.models.read_model(config.model, config.model_arguments)
    dataset = read_data(config)
    model, card = make_model(config, name, arguments, dataset)
    return cnnjax.run.trainer.train(config, make_recipe(config, dataset, model, card))


def settings_like(config: Training, **changes) -> Config:
    """Returns the settings of a classifier that are those of another config, with changes."""
    names = [field.name for field in dataclasses.fields(Config) if hasattr(config, field.name)]
    return Config(**{name: getattr(config, name) for name in names} | changes)


def train_part(config: Config, directory: Path) -> int:
    """Starts, continues or leaves alone a run that is part of another, when all has started.

    Args:
      config: the part's settings, but for its directory.
      directory: the part's own.

    Returns:
      The exit code.
    """
    if (directory / record.SUMMARY).exists():
        return 0
    resume = str(directory) if (directory / "config.json").exists() else ""
    return train(dataclasses.replace(config, run_dir=str(directory), resume=resume))


def read_data(config: Config):
    """Opens the dataset that the settings name; for a smoke run without it, synthetic images."""
    size = config.image_size or None
    try:
        dataset = cnnjax.data.open_dataset(
            config.dataset,
            pipeline=config.pipeline,
            data_dir=config.data_dir or None,
            classes=config.classes,
            validation=config.validation,
            fold=config.fold,
            seed=data_seed(config),
            image_size=size,
            fit=config.fit,
            smallest_area=config.crop_area,
            stratify=config.stratify,
            drop_duplicates=config.drop_duplicates,
        )
    except NotPreparedError as error:
        options = {"classes": config.classes, "image_size": size}
        dataset = made_instead(config.smoke, error, config.dataset, **options)
    tell_notes(dataset)
    train_examples = config.train_examples
    if config.smoke:
        dataset = cnnjax.run.trainer.shrink(dataset)
        train_examples = min(train_examples, cnnjax.data.split_size(dataset, "train"))
    return cnnjax.evaluation.label_quality.prepare(
        dataset,
        train_examples=train_examples,
        label_noise=config.label_noise,
        exclude=config.exclude,
        balance=config.balance,
        seed=data_seed(config),
    )


def tell_notes(dataset) -> None:
    """Prints what a person should know of the dataset's splits."""
    for note in dataset.notes:
        cnnjax.devices.processes.say(f"note         {note}")


def made_instead(smoke: bool, error: NotPreparedError, name: str, **options):
    """Returns synthetic images for a smoke run (`cnnjax.data.stand_in`); else raises the error."""
    if not smoke:
        raise error
    cnnjax.devices.processes.say(f"synthetic    images in place of {name}: {error}")
    return cnnjax.data.stand_in(name, **options)


def data_seed(config: Config) -> int:
    """Returns the seed that chooses the data."""
    return config.seed if config.data_seed < 0 else config.data_seed


def make_model(config: Config, name: str, arguments: dict, dataset):
    """Returns the model, not yet initialized, and the metadata by which it is built again."""
    num_outputs = 1 if dataset.num_classes == 2 else dataset.num_classes
    fields = load.computation(name, arguments, precision=config.precision, remat=config.remat)
    model = cnnjax.models.create(name, num_classes=num_outputs, **fields)
    return model, {
        "model": name,
        "num_outputs": num_outputs,
        "arguments": arguments,
        "preprocess": config.preprocess,
        "fit": config.fit,
        "precision": load.precision_of(name, arguments, config.precision),
    }


def make_recipe(config: Config, dataset, model, card: dict, **others) -> "Recipe":
    """Returns what `trainer.train` needs.

    Args:
      config: the settings.
      dataset: what `read_data` returned.
      model, card: what `make_model` returned; `mean` and `std` in it replace the dataset's.
      **others: see `run.recipe.make_recipe`.
    """
    image_filter = cnnjax.augment.make_filter(config.preprocess)

    def moments():
        # Those of a dataset on disk take seconds: not before all settings are checked.
        return {name: card.get(name) or getattr(dataset, name) for name in ("mean", "std")}

    def normalize(images, mean, std):
        order = card.get("channel_order", "RGB")
        images = cnnjax.augment.filters.filter_images(images, image_filter)
        return cnnjax.augment.normalize(images, mean, std, channel_order=order)

    def metadata():
        shown = {"image_shape": dataset.image_shape, "class_names": dataset.class_names}
        return {**shown, **moments(), **card}

    from cnnjax.traced import is_on

    num_outputs, is_smoothed = card["num_outputs"], is_on(config.label_smoothing)
    smoothing = {"label_smoothing": config.label_smoothing} if is_smoothed else {}
    task = cnnjax.tasks.classification.classification(
        dataset.num_classes,
        # Of the labels as they are and all classes alike, whatever training weighs.
        loss=_loss(config.loss, num_outputs),
        training_loss=cnnjax.evaluation.label_quality.balanced_loss(
            config.balance, _loss(config.loss, num_outputs, **smoothing), dataset
        ),
        class_names=dataset.class_names,
    )
    if config.precision == cnnjax.train.precision.AUTO:
        # The model is made: its metadata say how. Older ones, and converted networks, are float32.
        config = dataclasses.replace(config, precision=card.get("precision", "float32"))
    return cnnjax.run.recipe.make_recipe(
        config,
        dataset,
        task,
        model,
        normalize=normalize,
        moments=moments,
        metadata=metadata,
        augment=cnnjax.augment.make_augment(config.augment, num_classes=num_outputs),
        **others,
    )


def _loss(name, num_outputs, **options):
    if name == "auto":
        name = "sigmoid_binary_cross_entropy" if num_outputs == 1 else "softmax_cross_entropy"
    return cnnjax.losses.make_loss(name, **options)
