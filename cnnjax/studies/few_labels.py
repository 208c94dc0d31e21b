"""What fine-tuning gains with few labels: every method against training from scratch.

`experiments.mnist_finetune` and `experiments.fashion_finetune` are this study on their tasks. A
base is trained once, in RUN/base; each method then adapts it to k labeled images of each class,
chosen by the seed, in the same number of steps. What is done is kept: the same command continues.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

import cnnjax
from cnnjax import finetune
from cnnjax.data.dataset import Arrays, Dataset, hold_out
from cnnjax.errors import NotPreparedError, UserError, unknown_name
from cnnjax.run import classifier, cli, files, record
from cnnjax.studies import trials
from cnnjax.studies.few_label_study import Study, compare, make_model, sweep

METHODS = (
    "scratch",
    "full",
    "layer-decay",
    "gradual",
    "l2-sp",
    "head",
    "last:2",
    "bitfit",
    "norm",
    "lora:2",
    "adapter:4",
)
# With fewer test images than this, half of all images are for testing.
SMALL_TEST = 1000


@dataclasses.dataclass(frozen=True)
class Transfer:
    """From where to where.

    Attributes:
      source, source_classes: the dataset and classes of the base.
      target, target_classes: those that it is adapted to, resized to the base's images.
      rates: the learning rate of each method, as a sweep found it.
    """

    source: str
    target: str
    source_classes: str = "all"
    target_classes: str = "all"
    rates: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare ways of fine-tuning with few labels."""

    task: str
    """Which of the experiment's tasks."""

    run_dir: str = ""
    """Where results go, and are continued; by default runs/EXPERIMENT-TASK."""

    data_dir: str = ""
    """Where tfds datasets are; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""

    model: str = "cnn_32_64"
    """A name that `cnnjax models` lists."""

    model_arguments: tuple[str, ...] = (
        "widths=(16,32,64)",
        "dense_widths=(64,)",
        "padding=SAME",
        "norm=batch",
    )
    """Fields of the model."""

    base_epochs: int = 6
    """Epochs in which the base is trained."""

    base_augment: str = "rotate:10,scale:0.1,translate:2,shear:10"
    """Changes of the base's training images, as --augment of experiments.classify."""

    methods: tuple[str, ...] = METHODS
    """scratch, layer-decay, gradual, l2-sp, or what --method of experiments.finetune takes."""

    labels: tuple[int, ...] = (1, 5, 10, 50)
    """Labeled images of each class."""

    seeds: int = 5
    """Seeds 0 to that number choose the images, draw what is new, and shuffle."""

    steps: int = 300
    """Updates of each run."""

    batch_size: int = 25
    """Images a step; fewer where there are fewer."""

    rates: tuple[str, ...] = ()
    """METHOD=RATE, in place of the learning rates that the sweep found."""

    norm_statistics: Literal["auto", "frozen", "batch"] = "auto"
    """Layers of BatchNorm that keep their running statistics: auto, frozen or batch."""

    forgetting: bool = True
    """Test on the first task again, with the old head, after each run."""

    sweep: bool = False
    """Try learning rates on the validation split instead, for every method and for scratch alike,
    with 10 labels per class and 3 seeds."""

    sweep_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """The learning rates that --sweep tries."""

    smoke: bool = False
    """Shrink everything to seconds: few images, steps and methods. The scores mean nothing."""


def launch(config_type: type, tasks: dict[str, Transfer], name: str) -> None:
    """The command line of an experiment on such tasks."""
    cli.run(config_type, lambda config: main(config, tasks, name))


def main(config: Config, tasks: dict[str, Transfer], name: str) -> int:
    """Makes the runs that are missing, then the tables and the figure; returns the exit code."""
    config = _checked(config, tasks)
    task = tasks[config.task]
    directory = Path(config.run_dir or f"runs/{name}-{config.task}")
    cnnjax.devices.backend.start(devices=1)
    source = _open(config, task.source, task.source_classes)
    target = _target(config, task, source.image_shape[:2])
    # What cannot be done is refused before the base is trained.
    for method in config.methods:
        name, arguments = cnnjax.models.read_model(config.model, config.model_arguments)
        model = make_model(name, arguments, target)
        finetune.make_method(trials.find_way(method).method, model, target.image_shape)
    for labels in config.labels:
        cnnjax.data.few_labels(target, labels, seed=0)
    files.make_directory(directory)
    with files.only_writer(directory), files.writing_errors(directory):
        code = _train_base(config, task, directory / "base")
        if code:
            return code
        study = Study(config, task, directory, source, target)
        if config.sweep:
            sweep(study)
        else:
            compare(study)
    return 0


def _checked(config: Config, tasks: dict[str, Transfer]) -> Config:
    """Returns the settings, smaller for a smoke run; a UserError for those of no use."""
    if config.task not in tasks:
        raise unknown_name("task", config.task, tasks)
    for name in ("seeds", "steps", "batch_size", "base_epochs"):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(config, name)}: give at least 1.")
    for name in ("methods", "labels", "sweep_rates"):
        if not getattr(config, name):
            raise UserError(f"--{name.replace('_', '-')}: name at least one.")
    for method in config.methods:
        if finetune.defaults.kind(method) not in trials.known_ways():
            raise unknown_name("fine-tuning method", method, trials.known_ways())
    for rate in config.sweep_rates:
        if not 0 < rate < float("inf"):
            raise UserError(f"--sweep-rates {rate:g}: give rates above 0.")
    for word in config.rates:
        method, equals, number = word.rpartition("=")
        try:
            good = bool(equals) and 0 < float(number) < float("inf")
        except ValueError:
            good = False
        if not good or method not in config.methods:
            raise UserError(f"--rates {word}: write it as METHOD=RATE, of one of --methods.")
    if config.smoke:
        small = tuple(m for m in ("scratch", "head", "lora:2") if m in config.methods)
        config = dataclasses.replace(
            config,
            methods=small or config.methods[:1],
            labels=config.labels[:2],
            seeds=min(2, config.seeds),
            steps=min(5, config.steps),
            base_epochs=1,
        )
    return config


def _open(config: Config, name: str, classes: str, **options: Any) -> Dataset:
    """Reads a dataset into memory; for a smoke run without it, makes images."""
    data_dir = config.data_dir or None
    try:
        dataset = cnnjax.data.load(name, data_dir=data_dir, classes=classes, **options)
    except NotPreparedError as error:
        made = {"classes": classes, "image_size": options.get("image_size")}
        dataset = classifier.made_instead(config.smoke, error, name, **made)
    classifier.tell_notes(dataset)
    if not config.smoke:
        return dataset
    small = cnnjax.run.trainer.shrink(dataset)
    assert isinstance(small, Dataset)
    return small


def _target(config: Config, task: Transfer, image_size: tuple[int, int]) -> Dataset:
    """Reads the dataset to adapt to; a small one is divided so that it has more to test on."""
    size = {"image_size": image_size, "fit": "resize"}
    dataset = _open(config, task.target, task.target_classes, **size)
    if config.smoke or len(dataset.test.label) >= SMALL_TEST:
        return dataset
    parts = [dataset.train, dataset.validation, dataset.test]
    whole = Arrays(*(np.concatenate([part[i] for part in parts]) for i in range(2)))
    train, test = hold_out(whole, 0.5, cnnjax.rng.numpy_generator(0, "half for testing"))
    generator = cnnjax.rng.numpy_generator(0, "validation split")
    train, validation = hold_out(train, 0.2, generator)
    return dataclasses.replace(dataset, train=train, validation=validation, test=test)


def _train_base(config: Config, task: Transfer, directory: Path) -> int:
    """Trains the base, unless it is there; returns the exit code."""
    settings = classifier.Config(
        model=config.model,
        model_arguments=config.model_arguments,
        dataset=task.source,
        classes=task.source_classes,
        data_dir=config.data_dir,
        epochs=config.base_epochs,
        augment=config.base_augment,
        ema_decay=0.999,
        run_dir=str(directory),
        resume=str(directory) if (directory / "config.json").exists() else "",
        devices=1,
        smoke=config.smoke,
    )
    if not (directory / "summary.json").exists():
        return classifier.train(settings)
    saved = record.read_config(directory)["settings"]
    for name in ("model", "model_arguments", "dataset", "classes", "epochs", "augment", "smoke"):
        given = getattr(settings, name)
        if saved[name] != (list(given) if isinstance(given, tuple) else given):
            raise UserError(
                f"{directory} was trained with {name} {saved[name]!r}, not {given!r}: choose "
                "another --run-dir."
            )
    return 0
