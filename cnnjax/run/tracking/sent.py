"""What a tracker has been sent of a run, and what of the run's record is new to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError
from cnnjax.run import files
from cnnjax.run.logs import METRICS_FILE, read_metrics
from cnnjax.run.tracking import DIRECTORY

Record = dict[str, Any]


@dataclasses.dataclass
class Sent:
    """The state of a tracked run, kept in `tracking/NAME.json` of the run's directory.

    Attributes:
      key: the tracker's name of the run; "" before it has one.
      where: the tracker's store: an address, or a path.
      place: where a person finds the run, in words.
      steps: kind of metrics -> the last step that was sent.
      files: names of figures, tables and checkpoints that were sent.
      samples: of the system's metrics.
      clean: whether the process that sent it ended in order.
      done: whether all was sent of a run that had ended.
      error: the last failure, "" if the tracker has answered since.
    """

    key: str = ""
    where: str = ""
    place: str = ""
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)
    samples: int = 0
    clean: bool = True
    done: bool = False
    error: str = ""

    def new(self, records: Iterable[Record]) -> list[Record]:
        """Returns the records that were not sent: a resumed run writes some of them again."""
        return [each for each in records if each["step"] > self.steps.get(each["kind"], -1)]

    def note(self, records: Iterable[Record]) -> None:
        """Notes records as sent."""
        for each in records:
            self.steps[each["kind"]] = max(each["step"], self.steps.get(each["kind"], -1))


def path_of(run_directory: Path, tracker: str) -> Path:
    """Returns the file of a tracked run's state."""
    return run_directory / DIRECTORY / f"{tracker}.json"


def load(run_directory: Path, tracker: str) -> Sent:
    """Returns what was sent, nothing for a run that was not tracked yet.

    A file that a person or a broken disk has damaged is taken for none: all is sent again, as
    another tracked run.
    """
    path = path_of(run_directory, tracker)
    try:
        return Sent(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return Sent()


def save(run_directory: Path, tracker: str, sent: Sent) -> None:
    """Writes the state so that a kill leaves the old one or the new one."""
    files.write_json(path_of(run_directory, tracker), dataclasses.asdict(sent))


class Records:
    """Reads `metrics.jsonl` as it grows; only where the file has changed."""

    def __init__(self, run_directory: Path):
        self._directory = run_directory
        self._seen: tuple[int, int] | None = None

    def read(self) -> list[Record]:
        """Returns all records, or none if nothing was written since the last call."""
        try:
            status = (self._directory / METRICS_FILE).stat()
            seen = (status.st_ino, status.st_size)
            if seen == self._seen:
                return []
            records = read_metrics(self._directory)
        except (OSError, UserError):
            return []  # Not written yet, or being cut by a resumed run.
        self._seen = seen
        return records

    def forget(self) -> None:
        """Makes the next call read the file, changed or not."""
        self._seen = None


def scalars(record: Record) -> dict[str, float]:
    """Returns the numbers of a record under the names that trackers get: `train/loss`."""
    return {
        f"{record['kind']}/{name}": float(value)
        for name, value in record.items()
        if name not in ("step", "kind")
    }
