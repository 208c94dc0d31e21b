"""What a classifier's run was trained with, read back: its settings and its images."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cnnjax
from cnnjax.data.streamed import LabelledDataset
from cnnjax.errors import UserError
from cnnjax.run import classifier, record


def settings_of_run(directory: str | Path) -> classifier.Config:
    """Returns the settings of a run of any experiment, those that `Config` has."""
    settings = record.read_settings(Path(directory))
    known = {field.name for field in dataclasses.fields(classifier.Config)}
    return classifier.Config(**{name: settings[name] for name in known & set(settings)})


def data_of_run(directory: Path, *, dataset: str = "", data_dir: str = "") -> LabelledDataset:
    """Returns the images that a run of a classifier was trained on, as its settings prepare them.

    Args:
      directory: of the run.
      dataset: where its data are now, such as `folder:NEW`, if not where they were.
      data_dir: where tfds datasets are now, likewise.

    Raises:
      UserError: the data are not there, or `dataset` has others than the run's.
    """
    settings = settings_of_run(directory)
    found = classifier.read_data(
        dataclasses.replace(
            settings,
            dataset=dataset or settings.dataset,
            data_dir=data_dir or settings.data_dir,
        )
    )
    recorded = record.read_config(directory)
    saved, same = recorded.get("data_checksum"), found
    if few := recorded["settings"].get("labels_per_class"):
        same = cnnjax.data.few_labels(found, few, seed=settings.seed)  # type: ignore[arg-type]
    if dataset and saved and same.checksum != saved:
        raise UserError(
            f"the data of --dataset {dataset} are not those of {directory} (checksum "
            f"{same.checksum[:12]}, the run's {saved[:12]}): name where the run's own are now."
        )
    return found
