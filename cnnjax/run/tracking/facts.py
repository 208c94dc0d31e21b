"""A run as its directory describes it to a tracker."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cnnjax.run import record
from cnnjax.run.files import read_json
from cnnjax.run.logs import METRICS_FILE

# Files that say what the run was and did; those that are there are sent as it ends.
FILES = ("config.json", "model.json", METRICS_FILE, "summary.md", "summary.json")


class Facts(NamedTuple):
    """What is said of a run as it starts.

    Attributes:
      name: its directory's.
      experiment: its module.
      settings: by name; texts, numbers and booleans.
      versions, tags: by name, as text.
    """

    name: str
    experiment: str
    settings: dict[str, Any]
    versions: dict[str, str]
    tags: dict[str, str]


def of_run(directory: Path) -> Facts:
    """Returns the facts of a run; a UserError if `directory` holds none."""
    config = record.read_config(directory)
    settings = {
        name: " ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in record.read_settings(directory).items()
    }
    card = {}
    if (directory / "model.json").exists():
        card = read_json(directory / "model.json", f"{directory} is damaged")
    code = (config.get("code") or {}).get("cnnjax") or {}
    tags = {
        "experiment": config["experiment"],
        "model": card.get("model", ""),
        "dataset": card.get("dataset", ""),
        "data_checksum": config.get("data_checksum", ""),
        "devices": config.get("devices", ""),
        "started": config.get("started", ""),
        "commit": code.get("commit", ""),
        "flags": " ".join(f"{k}={v}" for k, v in config.get("flags", {}).items()),
        "run_directory": str(directory.absolute()),
    }
    return Facts(
        name=directory.absolute().name,
        experiment=config["experiment"],
        settings=settings,
        versions=config.get("versions", {}),
        tags={name: str(value) for name, value in tags.items() if value},
    )


def summary(directory: Path) -> dict[str, Any]:
    """Returns the content of `summary.json`, {} for a run that is not finished."""
    path = directory / record.SUMMARY
    return read_json(path, f"{directory} is damaged") if path.exists() else {}


def checkpoints(directory: Path, which: str) -> list[Path]:
    """Returns the step directories that are to be kept at a tracker: none, the tested one, or all.

    Only whole ones, with their manifest.
    """
    if which == "none":
        return []
    steps = sorted(path.parent for path in (directory / "checkpoints").glob("[0-9]*/manifest.json"))
    if which == "all":
        return steps
    tested = summary(directory).get("step")
    return [path for path in steps if int(path.name.partition(".")[0]) == tested]
