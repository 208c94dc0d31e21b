"""Step directories: atomic creation, atomic deletion, and names.

Steps are named by their number, `00001234`. One that is saved again gets a new name, `00001234.1`,
so that the old one stays until the new one is whole. What is not whole has a name that starts with
`.tmp-`, and a step without a manifest is never counted.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cnnjax.checkpoint import manifest
from cnnjax.devices import processes
from cnnjax.errors import UserError

Result = TypeVar("Result")
UNFINISHED = ".tmp-"
_STEP_NAME = re.compile(r"(\d{8,})(?:\.(\d+))?")


def create(directory: Path, step: int, fill: Callable[[Path], dict[str, Any]]) -> Path:
    """Creates the directory of a step, durably, and deletes earlier ones of the same number.

    Args:
      directory: where the steps are; created if needed.
      step: its number.
      fill: writes the step's files into the directory it is given, and returns what its manifest
        records together with the digests of the files.

    Returns:
      The path of the new directory.

    Raises:
      UserError: the disk is full or cannot be written. Nothing of the new step stays.
    """
    target = _unused_path(directory, step)
    unfinished = directory / f"{UNFINISHED}{target.name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir()
        manifest.write(unfinished, fill(unfinished))
        os.replace(unfinished, target)
        manifest.sync_directory(directory)
        manifest.sync_directory(directory.parent)
    except BaseException as error:
        # A full disk stays full if what was begun stays.
        shutil.rmtree(unfinished, ignore_errors=True)
        problem = _writing_problem(error)
        if problem is None:
            raise
        raise UserError(
            f"cannot save step {step} in {directory} ({problem}): free some space or choose "
            "another directory. The steps saved before are untouched."
        ) from error
    for number, _, path in listed(directory):
        if number == step and path != target:
            delete(path)
    return target


def listed(directory: Path) -> list[tuple[int, int, Path]]:
    """Returns (step, attempt, path) of all step directories, whole or not, in rising order."""
    found = []
    for path in directory.glob("*"):
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), int(match[2] or 0), path))
    return sorted(found)


def whole(directory: Path) -> dict[int, Path]:
    """Returns `{step: path}` of the last attempt at each step, of those that have a manifest."""
    return {step: path for step, _, path in listed(directory) if (path / manifest.NAME).exists()}


def read_newest(
    directory: Path, step: int | None, warn: Callable[[str], None], read: Callable[[Path], Result]
) -> Result:
    """Returns what `read` makes of the step asked for, or of the newest that it can read."""
    found = [(number, path) for number, _, path in reversed(listed(directory))]
    if not found:
        raise UserError(f"{directory} holds no checkpoint.")
    if step is not None and step not in [number for number, _ in found]:
        saved = ", ".join(str(number) for number, _ in reversed(found))
        raise UserError(f"{directory} holds no checkpoint of step {step}: choose from {saved}.")
    for number, path in found:
        if step in (None, number):
            try:
                return read(path)
            except manifest.Damaged as damage:
                warn(f"skipping checkpoint {path}: {damage}.")
    which = "none of its checkpoints" if step is None else f"no checkpoint of step {step}"
    raise UserError(f"{directory}: {which} is undamaged; choose another step or start again.")


def read_newest_together(
    directory: Path, step: int | None, warn: Callable[[str], None], read: Callable[[Path], Result]
) -> Result:
    """As `read_newest`, but all processes of the run read the step that the first one found."""
    found: list[Result] = []

    def find() -> str:
        path, result = read_newest(directory, step, warn, lambda path: (path, read(path)))
        found.append(result)
        return str(path)

    path = Path(processes.by_first("restore", find))
    if found:
        return found[0]
    try:
        return read(path)
    except manifest.Damaged as damage:
        raise UserError(
            f"process {processes.index()} cannot read checkpoint {path}, which process 0 can: "
            f"{damage}. Put the run directory on a file system that all processes share."
        ) from None


def delete(path: Path) -> None:
    """Deletes a step, or what is left of one."""
    if not path.name.startswith(UNFINISHED):
        # Renaming takes the step out of the list at once; deleting takes one file after another.
        doomed = path.with_name(f"{UNFINISHED}deleted-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        path = path.rename(doomed)
    # What cannot be deleted now (a reader has it open) is deleted by the next run that writes here.
    shutil.rmtree(path, ignore_errors=True)


def _unused_path(directory: Path, step: int) -> Path:
    attempts = [attempt for number, attempt, _ in listed(directory) if number == step]
    name = f"{step:08d}" + (f".{max(attempts) + 1}" if attempts else "")
    return directory / name


def _writing_problem(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore's errors come through Orbax as ValueError, with the status in the text.
    full = "RESOURCE_EXHAUSTED" in str(error) or os.strerror(errno.ENOSPC) in str(error)
    return os.strerror(errno.ENOSPC) if full else None
