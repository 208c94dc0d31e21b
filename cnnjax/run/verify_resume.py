"""A run that is killed and resumed, and one that is not: do both end with the same bits?"""

import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cnnjax import checkpoint
from cnnjax.checkpoint.directories import UNFINISHED
from cnnjax.errors import UserError
from cnnjax.run.compare import compare_runs, format_comparisons

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
            return moment
        if process.returncode:
            raise _failed(command, process.returncode, errors)
        duration = time.monotonic() - started
        _unfinish(run)
    raise UserError(f"{run} ended before it could be killed, {MOST_TRIES} times: train longer.")


def _unfinish(run: Path) -> None:
    """Leaves a finished run as a kill just before its summary would have."""
    (run / "summary.json").unlink(missing_ok=True)
