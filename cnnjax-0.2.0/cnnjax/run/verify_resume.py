"""A run that is killed and resumed, and one that is not: do both end with the same bits?"""

import dataclasses
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax import checkpoint
from cnnjax.checkpoint.directories import UNFINISHED
from cnnjax.errors import UserError
from cnnjax.run.logs import METRICS_FILE
from cnnjax.trees import named_leaves

# A start that is given this many moments and ends before each of them cannot be killed.
MOST_TRIES = 20


def verify(
    experiment: str, argv: Sequence[str], directory: Path, *, kills: int = 1, kill_seed: int = 0
) -> bool:
    """Trains straight, trains with kills, compares and prints; returns whether both are the same.

    Args:
      experiment: a module, such as experiments.mnist_lenet.
      argv: its flags, without --run-dir, --resume and --stop-after-epochs.
      directory: where the runs `straight` and `killed` go; empty or not there.
      kills: the number of kills in a row.
      kill_seed: draws their moments.

    Raises:
      UserError: a training failed, or ended before it could be killed.
    """
    straight, killed = directory / "straight", directory / "killed"
    started = time.monotonic()
    _run_to_end(experiment, argv, straight)
    duration = time.monotonic() - started
    print(f"straight     {duration:.1f} s", flush=True)

    generator = random.Random(kill_seed)
    for _ in range(kills):
        moment = _kill_once(experiment, argv, killed, generator, duration)
        print(f"killed       after {moment:.1f} s: {where(killed)}", flush=True)
    started = time.monotonic()
    _run_to_end(experiment, argv, killed)
    print(f"resumed      {time.monotonic() - started:.1f} s\n", flush=True)

    comparisons = compare_runs(straight, killed)
    print(format_comparisons(comparisons))
    different = [each for each in comparisons if each.different]
    if different:
        print(f"\nDIFFERENT: {different[0].what}, first {different[0].different[0]}")
        return False
    print("\nSAME: the killed run ended with the same bits as the straight one")
    return True


def command_line(experiment: str, argv: Sequence[str], run: Path) -> list[str]:
    """Returns the line that starts a run where it is not started, and else resumes it."""
    return [sys.executable, "-m", experiment, *argv, "--run-dir", str(run), "--resume", str(run)]


def where(run: Path) -> str:
    """Returns how far a killed run had come, in words."""
    if not (run / "config.json").exists():
        return "before it had written anything"
    if (run / "summary.json").exists():
        return "when it had finished"
    checkpoints = run / "checkpoints"
    unfinished = [path.name for path in checkpoints.glob(f"{UNFINISHED}*")]
    step = checkpoint.latest(checkpoints)
    text = "before its first checkpoint" if step is None else f"checkpoint of step {step}"
    return f"{text}, in the middle of a save" if unfinished else text


def _run_to_end(experiment: str, argv: Sequence[str], run: Path) -> None:
    command = command_line(experiment, argv, run)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise _failed(command, done.returncode, done.stderr)


def _failed(command: Sequence[str], status: int, errors: str) -> UserError:
    said = errors.strip().splitlines() or ["it said nothing"]
    return UserError(
        f"python {' '.join(command[1:])} ended with exit status {status}: "
        f"{said[-1].removeprefix('error: ')}"
    )


def _kill_once(
    experiment: str, argv: Sequence[str], run: Path, generator: random.Random, duration: float
) -> float:
    """Starts or resumes a run, kills it at a random moment, and returns which, in seconds.

    A resumed run has less to do than `duration`. One that ends before the moment is tried again,
    within the time that it took, as if it had been killed just before it wrote its summary.
    """
    for _ in range(MOST_TRIES):
        moment = generator.uniform(0, duration)
        command = command_line(experiment, argv, run)
        started = time.monotonic()
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            _, errors = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            if not (run / "summary.json").exists():
                return moment
            process.returncode = 0
        if process.returncode:
            raise _failed(command, process.returncode, errors)
        duration = time.monotonic() - started
        _unfinish(run)
    raise UserError(f"{run} ended before it could be killed, {MOST_TRIES} times: train longer.")


def _unfinish(run: Path) -> None:
    """Leaves a finished run as a kill just before its summary would have."""
    (run / "summary.json").unlink(missing_ok=True)


# What differs between two runs of the same training: when, where and how often they were started.
NOT_COMPARED = {"seconds", "run_dir", "resume"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What became of comparing one kind of thing.

    Attributes:
      what: its name.
      compared: how many were there, in either run.
      different: the names of those that differ, in order; a missing one differs.
    """

    what: str
    compared: int
    different: tuple[str, ...]


def compare_runs(first: Path, second: Path) -> list[Comparison]:
    """Compares what two finished or unfinished runs left behind.

    Raises:
      UserError: one of them has no readable checkpoint or no metrics.
    """
    kept = [
        dict.fromkeys(map(str, checkpoint.steps(run / "checkpoints"))) for run in (first, second)
    ]
    return [
        _compared("checkpoints kept", kept[0], kept[1]),
        *compare_states(first, None, second, None),
        _compared("lines of metrics", _lines(first), _lines(second)),
        _compared("entries of the summary", _summary(first), _summary(second)),
    ]


def compare_states(
    first: Path, first_step: int | None, second: Path, second_step: int | None
) -> list[Comparison]:
    """Compares a checkpoint of each of two runs, by default the newest good one: every leaf of each
    item, and the meta.
    """
    states = [_leaves(first, first_step), _leaves(second, second_step)]
    metas = [_meta(first, first_step), _meta(second, second_step)]
    items = dict.fromkeys(name.partition("/")[0] for state in states for name in state)
    found = []
    for item in items:
        parts = [{k: v for k, v in state.items() if k.startswith(f"{item}/")} for state in states]
        found.append(_compared(f"arrays of {item}", parts[0], parts[1], _same_bits))
    return [*found, _compared("entries of the meta", metas[0], metas[1])]


def format_comparisons(comparisons: list[Comparison]) -> str:
    """Returns a table, one line a kind, with the first difference named."""
    width = max(len(each.what) for each in comparisons)
    lines = [f"{'compared':{width}}  number  different  first difference"]
    for each in comparisons:
        first = each.different[0] if each.different else ""
        lines.append(
            f"{each.what:{width}}  {each.compared:6}  {len(each.different):9}  {first}".rstrip()
        )
    return "\n".join(lines)


def _compared(
    what: str,
    first: dict[str, Any],
    second: dict[str, Any],
    same: Callable[[Any, Any], bool] = lambda a, b: a == b,
) -> Comparison:
    names = list(dict.fromkeys([*first, *second]))
    different = tuple(
        name
        for name in names
        if name not in first or name not in second or not same(first[name], second[name])
    )
    return Comparison(what, len(names), different)


def _same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    forms = [(each.shape, each.dtype, np.asarray(each).tobytes()) for each in (first, second)]
    return forms[0] == forms[1]


def _leaves(run: Path, step: int | None) -> dict[str, np.ndarray]:
    directory = run / "checkpoints"
    names = checkpoint.item_names(directory, step=step)
    items = checkpoint.restore_items(directory, names, step=step)
    return {
        f"{name}/{path}": leaf for name in names for path, leaf in named_leaves(items[name]).items()
    }


def _meta(run: Path, step: int | None) -> dict[str, str]:
    meta = checkpoint.read_meta(run / "checkpoints", step=step)
    settings = meta.pop("settings", {})
    entries = meta | {f"settings/{name}": value for name, value in settings.items()}
    return _texts(entries)


def _summary(run: Path) -> dict[str, str]:
    path = run / "summary.json"
    return _texts(json.loads(path.read_text())) if path.exists() else {}


def _texts(entries: dict[str, Any]) -> dict[str, str]:
    return {
        name: json.dumps(value)
        for name, value in entries.items()
        if name.rpartition("/")[2] not in NOT_COMPARED
    }


def _lines(run: Path) -> dict[str, str]:
    path = run / METRICS_FILE
    if not path.exists():
        raise UserError(f"no metrics at {path}: is {run} a run directory?")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return {f"line {number}: {_name(line)}": line for number, line in enumerate(lines, 1)}


def _name(line: str) -> str:
    try:
        record = json.loads(line)
        return f"{record['kind']} at step {record['step']}"
    except (ValueError, KeyError, TypeError):
        return line[:40]
