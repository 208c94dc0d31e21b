"""Draw what a training step sees: the images as stored, and as the augmentation makes them.

    cnnjax show-batch --dataset mnist --augment elastic:34,cutmix:1 --step 5
    cnnjax show-batch --run runs/mnist_lenet-20250101-120000 --step 1000

Images are a function of (seed, step, place in the batch), so those of any step can be recomputed
without repeating the run. `cnnjax.augment.policy` lists the names that `--augment` knows.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

import cnnjax
from cnnjax import plots
from cnnjax.errors import UserError
from cnnjax.run import files, record
from cnnjax.run.help import listed


@dataclasses.dataclass(frozen=True)
class Config:
    """Draw the images of one training step, before and after augmentation."""

    listings: ClassVar[dict[str, str]] = listed("augment", "fit")

    run: str = ""
    """A run directory: its data, seed, batch size and augmentation are taken."""

    dataset: str = "mnist"
    """mnist (shipped), digits, tfds:NAME, or folder:PATH with one sub-folder per class; with --run,
    where the run's data are now, if not where they were."""

    augment: str = ""
    """The augmentation, such as crop:4,flip,rotate:15,mixup:0.2."""

    seed: int = 0
    """The run's."""

    step: int = 0
    """The number of steps made before the one to draw."""

    batch_size: int = 64
    """The run's."""

    count: int = 36
    """How many images of the batch to draw, from the first."""

    classes: str = "all"
    """As for experiments.classify."""

    image_size: int = 0
    """As for experiments.classify."""

    fit: str = "pad"
    """As for experiments.classify."""

    crop_area: float = 0.0
    """As for experiments.classify."""

    validation: float = 0.1
    """As for experiments.classify."""

    stratify: bool = True
    """As for experiments.classify."""

    drop_duplicates: bool = False
    """As for experiments.classify."""

    pipeline: Literal["auto", "resident", "stream"] = "auto"
    """As for experiments.classify."""

    data_dir: str = ""
    """Where tfds datasets are; by default the run's own."""

    run_dir: str = ""
    """Where to write the pictures; by default the run's figures/, or runs/show_batch."""

    smoke: bool = False
    """Draw from the first 1,024 images only."""


# What decides which images a step sees.
OF_THE_RUN = (
    "dataset",
    "augment",
    "seed",
    "batch_size",
    "classes",
    "image_size",
    "fit",
    "crop_area",
    "validation",
    "stratify",
    "drop_duplicates",
    "pipeline",
    "smoke",
)


def main(config: Config) -> None:
    """Draws one batch."""
    from cnnjax.run import again, classifier
    from cnnjax.train import replay

    if config.count < 1:
        raise UserError(f"--count {config.count}: give 1 image or more.")
    cnnjax.devices.backend.start(devices=1)
    if config.run:
        moved = "" if config.dataset == Config.dataset else config.dataset
        config = _of_run(config)
        # As all of the run's settings prepare them, those too that have no flag here.
        dataset = again.data_of_run(Path(config.run), dataset=moved, data_dir=config.data_dir)
    else:
        shared = {name: getattr(config, name) for name in (*OF_THE_RUN, "data_dir")}
        dataset = classifier.read_data(classifier.Config(**shared))
    num_outputs = 1 if dataset.num_classes == 2 else dataset.num_classes
    augment = cnnjax.augment.make_augment(config.augment, num_classes=num_outputs)
    stored = replay.stored_batch(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        step=config.step,
        stream=config.pipeline == "stream",
    )
    seen = replay.augmented_batch(stored, augment, seed=config.seed, step=config.step)
    default = Path(config.run) / "figures" if config.run else Path("runs") / "show_batch"
    directory = Path(config.run_dir or default)
    files.make_directory(directory, "the directory of pictures")
    for name, batch in (("stored", stored), ("seen", seen)):
        path = directory / f"step-{config.step}-{name}.png"
        titles = [_title(label, dataset.class_names) for label in np.asarray(batch["label"])]
        images = np.asarray(batch["image"])
        plots.image_grid(images[: config.count], titles[: config.count], path)
        print(f"wrote {path}")


def _of_run(config: Config) -> Config:
    """Returns the config with what decides about the images as the run has it."""
    settings = record.read_settings(Path(config.run))
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    for name in OF_THE_RUN:
        given = getattr(config, name)
        # Data are told by their checksum, wherever they are.
        if name != "dataset" and given not in (defaults[name], settings.get(name, defaults[name])):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {given} is not the run's {settings[name]}: drop the flag, or --run."
            )
    known = {name: settings[name] for name in OF_THE_RUN if name in settings}
    data_dir = config.data_dir or settings.get("data_dir", "")
    return dataclasses.replace(config, **known, data_dir=data_dir)


def _title(label: np.ndarray, class_names: tuple[str, ...]) -> str:
    """The class; of a mixed label each class with its weight."""
    if label.ndim == 0 and label.dtype.kind == "f":
        label = np.array([1.0 - label, label])
    if label.ndim == 0:
        return class_names[int(label)]
    shares = [(share, index) for index, share in enumerate(label) if share >= 0.005]
    if len(shares) == 1:
        return class_names[shares[0][1]]
    return "\n".join(f"{share:.0%} {class_names[index]}" for share, index in sorted(shares)[::-1])
