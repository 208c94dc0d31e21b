"""What a run was trained with, read back: its settings, its images, its recipe."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import cnnjax
from cnnjax.data.streamed import LabeledDataset
from cnnjax.errors import UserError
from cnnjax.run import classifier, load, record
from cnnjax.run.files import read_json
from cnnjax.run.recipe import Recipe


def settings_of_run(directory: str | Path) -> classifier.Config:
    """Returns the settings of a run of any experiment, those that `Config` has."""
    settings = record.read_settings(Path(directory))
    known = {field.name for field in dataclasses.fields(classifier.Config)}
    return classifier.Config(**{name: settings[name] for name in known & set(settings)})


def check_data_known(directory: str | Path) -> None:
    """Raises a UserError unless the settings of a run say what it was trained on."""
    saved = record.read_config(Path(directory))
    if "dataset" not in saved["settings"]:
        raise UserError(
            f"{directory} is a run of {saved['experiment']}, whose settings do not say what it was "
            "trained on: name it with --dataset."
        )


def data_of_run(directory: Path, *, dataset: str = "", data_dir: str = "") -> LabeledDataset:
    """Returns the images that a run of a classifier was trained on, as its settings prepare them.

    Args:
      directory: of the run.
      dataset: where its data are now, such as `folder:NEW`, if not where they were.
      data_dir: where tfds datasets are now, likewise.

    Raises:
      UserError: the data are not there, or `dataset` has others than the run's.
    """
    if not dataset:
        check_data_known(directory)
    settings = settings_of_run(directory)
    recorded = record.read_config(directory)
    if "dataset" not in recorded["settings"]:
        return _data_of_converted(directory, dataset, data_dir)
    found = classifier.read_data(
        dataclasses.replace(
            settings,
            dataset=dataset or settings.dataset,
            data_dir=data_dir or settings.data_dir,
        )
    )
    saved, same = recorded.get("data_checksum"), found
    if few := recorded["settings"].get("labels_per_class"):
        same = cnnjax.data.few_labels(found, few, seed=settings.seed)  # type: ignore[arg-type]
    # Other tasks record what they make of these images.
    is_classifier = load.task_of(directory) == "classification"
    if saved and is_classifier and same.checksum != saved:
        raise UserError(
            f"the data of {dataset or settings.dataset} are not those of {directory} (checksum "
            f"{same.checksum[:12]}, the run's {saved[:12]}): name where the run's own are now."
        )
    return found


def _data_of_converted(directory: Path, dataset: str, data_dir: str) -> LabeledDataset:
    """Opens images for a run whose settings do not prepare any, such as a converted one: they get
    the size of its network, as its metadata say."""
    card = read_json(directory / "model.json", f"{directory} has not trained a model yet")
    defaults = classifier.Config()
    found = cnnjax.data.open_dataset(
        dataset,
        pipeline=defaults.pipeline,
        data_dir=data_dir or None,
        validation=0,
        seed=defaults.seed,
        image_size=tuple(card["image_shape"][:2]),
        fit=card.get("fit", "pad"),
    )
    classifier.tell_notes(found)
    return found


def recipe_of_run(directory: str | Path) -> Recipe:
    """Returns what the experiment of a run trains, by the settings of the run.

    The experiment has a function `recipe(config) -> Recipe`, as those of other tasks than
    classification have.

    Raises:
      UserError: it has none, or cannot be imported from here.
    """
    name = record.read_config(Path(directory))["experiment"]
    if name == "cnnjax.run.train":
        raise UserError(
            f"{directory} was trained by {name}: its task and data are in the program that called "
            "it; see its summary.md, or cnnjax.train.evaluate."
        )
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{directory} is a run of {name}, which cannot be imported ({error}): start this from "
            "the directory that holds it."
        ) from None
    if not hasattr(module, "recipe"):
        raise UserError(
            f"{directory} is a run of {name}, which has no function `recipe(config)` that says "
            "what it trains: see its summary.md."
        )
    config = record.saved_config(module.Config, name, Path(directory))
    return module.recipe(dataclasses.replace(config, run_dir=str(directory)))
