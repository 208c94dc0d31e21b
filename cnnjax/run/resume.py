"""Start or resume a run: what is checked, agreed on and restored before the first step."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from cnnjax import checkpoint
from cnnjax.checkpoint import directories
from cnnjax.data.streamed import AnyDataset, split_size
from cnnjax.devices import processes
from cnnjax.errors import UserError
from cnnjax.run import files, settings
from cnnjax.train.state import TrainState


def agree(config: settings.Settings) -> settings.Settings:
    """Returns the settings with the run directory of process 0; a UserError if others differ."""
    run_dir = processes.from_first("run directory", config.run_dir)
    config = dataclasses.replace(config, run_dir=run_dir)
    processes.check_same("settings", settings.recorded_settings(config))
    return config


def check_retention(config: settings.Settings, dataset: AnyDataset) -> None:
    """Raises a UserError unless what is asked to be kept can be, and early stopping can work."""
    for name in ("keep_last", "keep_best", "patience", "save_every_steps"):
        if getattr(config, name) < 0:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(config, name)} is negative: use 0 or more.")
    if config.patience and not config.keep_best:
        raise UserError("--patience keeps the best weights: use --keep-best 1 or more.")
    if config.patience and not split_size(dataset, "validation"):
        raise UserError(
            f"patience {config.patience} stops by the validation {config.monitor or 'score'}, but "
            f"{dataset.name} has no validation images: hold some out, or use patience 0."
        )


def share_directory(directory: Path) -> None:
    """Makes the run directory; a UserError if it cannot be written or a process does not see it."""
    if processes.is_first():
        files.make_directory(directory)
    processes.exchange("run directory made", None)
    if not directory.is_dir():
        raise UserError(
            f"process {processes.index()} does not see the run directory {directory} that "
            "process 0 made: put --run-dir on a file system that all processes share."
        )


def start_or_resume(
    directory: Path, config: settings.Settings, checksums: dict[str, str], state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the run's newest good state and its notes, or the given state and no notes.

    Args:
      directory: of the run.
      config: the settings.
      checksums: `data_checksum` and `base_checksum`: of the dataset, and of the weights that the
        run fine-tunes ("" where it trains from scratch).
      state: of step 0; its frozen arrays stay as they are.

    Raises:
      UserError: the disk is too small, all checkpoints are damaged, or they were saved with other
        data, another base or other settings.
    """
    checkpoints = directory / "checkpoints"
    # One more than is kept: a step is written before an old one is deleted.
    kept = (config.keep_last or 2) + config.keep_best
    checkpoint.check_space(checkpoints, (kept + 1) * checkpoint.state_bytes(state))
    if config.resume:
        # Before the checkpoint, of which other data would only say that its shapes do not fit.
        _check_same(checksums | _recorded_checksum(directory), checksums, directory)
    # A damaged step counts: to start again instead, and delete it, is for the user to decide.
    found = bool(config.resume) and bool(directories.listed(checkpoints))
    if not processes.from_first("resume", found):
        _clean(checkpoints)
        if config.resume:
            processes.say(f"resumed      {directory} at step 0: it had saved no checkpoint yet")
        return state, {}
    state, notes = checkpoint.restore(checkpoints, state, warn=_warn)
    _check_same(notes, checksums, directory)
    settings.check_settings(notes["settings"], config)
    _clean(checkpoints, after=int(state.step))
    processes.say(f"resumed      {directory} at step {int(state.step)}")
    return state, notes


def _recorded_checksum(directory: Path) -> dict[str, Any]:
    """Returns the checksum of the data that the run was started with, if it is known."""
    if not (directory / "config.json").exists():
        return {}
    checksum = settings.read_config(directory).get("data_checksum")
    return {"data_checksum": checksum} if checksum else {}


def _check_same(notes: dict[str, Any], checksums: dict[str, str], directory: Path) -> None:
    for name, what, remedy in (
        ("data_checksum", "data are", "dataset and --data-dir"),
        ("base_checksum", "base's weights are", "--base"),
    ):
        saved, given = notes.get(name, ""), checksums[name]
        if saved != given:
            raise UserError(
                f"the {what} not those of {directory} (checksum {given[:12]}, the run's "
                f"{saved[:12]}): resume with the same {remedy}."
            )


def _clean(checkpoints: Path, after: int | None = None) -> None:
    processes.exchange("before cleaning", None)
    if processes.is_first():
        checkpoint.clean(checkpoints, after=after)


def _warn(text: str) -> None:
    if processes.is_first():
        print(f"warning: {text}", file=sys.stderr)
