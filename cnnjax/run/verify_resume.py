"""Does a run that is killed and resumed end as one that is not? Try it on your own experiment.

    cnnjax verify-resume experiments.mnist_lenet --smoke
    cnnjax verify-resume experiments.classify --kills 3 --kill-seed 7 \\
        --model cnn_32_64 --epochs 2 --save-every-steps 100

Trains once straight. Trains again, killed with SIGKILL at a random moment of the time that the
straight run took (imports, compilation, saving, evaluation and the end included) and started again
by the same command line, with `--resume`. Then compares every array of the last checkpoints bit by
bit, their meta, every line of metrics, and the summaries without their seconds.

Exits with 0 if all is the same, 1 if anything differs, and 2 if it could not be tried.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cnnjax import checkpoint
from cnnjax.checkpoint.directories import UNFINISHED
from cnnjax.errors import UserError
from cnnjax.run.compare import compare_runs, format_comparisons

# A start that is given this many moments and ends before each of them cannot be killed.
MOST_TRIES = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, kills, resumes and compares; returns the exit code."""
    options, experiment_argv = _parse(sys.argv[1:] if argv is None else argv)
    if options.directory is None:
        with tempfile.TemporaryDirectory(prefix="verify-resume-") as temporary:
            return verify(options, experiment_argv, Path(temporary))
    directory = Path(options.directory)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--directory {directory} is not empty: choose another.")
    return verify(options, experiment_argv, directory)


def verify(options: argparse.Namespace, experiment_argv: list[str], directory: Path) -> int:
    """Does what the module says, with the runs in `directory`."""
    straight, killed = directory / "straight", directory / "killed"
    started = time.monotonic()
    _run_to_end(options.experiment, experiment_argv, straight)
    duration = time.monotonic() - started
    print(f"straight     {duration:.1f} s", flush=True)

    generator = random.Random(options.kill_seed)
    for _ in range(options.kills):
        moment = _kill_once(options.experiment, experiment_argv, killed, generator, duration)
        print(f"killed       after {moment:.1f} s: {where(killed)}", flush=True)
    started = time.monotonic()
    _run_to_end(options.experiment, experiment_argv, killed)
    print(f"resumed      {time.monotonic() - started:.1f} s\n", flush=True)

    comparisons = compare_runs(straight, killed)
    print(format_comparisons(comparisons))
    different = [each for each in comparisons if each.different]
    if different:
        print(f"\nDIFFERENT: {different[0].what}, first {different[0].different[0]}")
        return 1
    print("\nSAME: the killed run ended with the same bits as the straight one")
    return 0


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


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="cnnjax verify-resume",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other flags are the experiment's.",
    )
    parser.add_argument("experiment", help="a module, such as experiments.mnist_lenet")
    parser.add_argument("--kills", type=int, default=1, help="kills in a row (1)")
    parser.add_argument("--kill-seed", type=int, default=0, help="draws the moments (0)")
    parser.add_argument("--directory", help="keep both runs there (a temporary directory)")
    options, rest = parser.parse_known_args(argv)
    if options.kills < 1:
        raise UserError(f"--kills {options.kills}: use 1 or more.")
    for flag in rest:
        if flag.partition("=")[0] in ("--run-dir", "--resume", "--stop-after-epochs"):
            raise UserError(f"{flag} is set by verify_resume: drop it.")
    return options, rest


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
