"""Kills trainings with SIGKILL at random moments, spoils files, resumes, and counts what is lost.

    python scripts/chaos.py                                 # 200 kills
    python scripts/chaos.py --kills 20 --experiments lenet
    python scripts/chaos.py --kills 20 --seed 1 --directory DIR  # again: goes on, adds to the tally

Each experiment (LeNet-5; a ResNet with BatchNorm) is trained once without kills, keeping every
checkpoint. Then it is trained again and again, killed at random moments of the whole run or, every
other time, in the middle of a save, and resumed by the same command line. After each kill it is
checked that

  - the newest checkpoint that had been there before the kill, or a newer one, is read undamaged;
  - each of its arrays has the bits that it has in the training without kills, at the same step;
  - the log has neither gaps nor doubles: it is the beginning of the one without kills.

After every fourth kill the newest checkpoint is spoiled, and the one before it must be used; and
debris is left behind. When a training reaches its end, all that it left must be the same. Exits
with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from chaos_damage import DAMAGES, leave_debris  # noqa: E402

from cnnjax import checkpoint  # noqa: E402
from cnnjax.checkpoint import directories  # noqa: E402
from cnnjax.errors import UserError  # noqa: E402
from cnnjax.paths import expand_flags  # noqa: E402
from cnnjax.run.verify_resume import compare_runs, compare_states  # noqa: E402

COMMON = ["--smoke", "--devices", "1", "--batch-size", "8", "--save-every-steps", "4"]
EXPERIMENTS = {
    "lenet": ("experiments.mnist_lenet", COMMON),
    "resnet": (
        "experiments.classify",
        [*COMMON, "--model", "cifar_resnet20", "--ema-decay", "0.9", "--optimizer", "momentum"],
    ),
}
DAMAGE_EVERY = 4
SPOILED = "spoiled"  # A file that marks what was damaged on purpose.
DIFFERENT_ON_PURPOSE = {"settings/keep_last"}  # The training without kills keeps all.
# A save that has begun is killed within this time: about as long as one takes.
SAVE_SECS = 0.15
# The longest that a training may take to its next save before something must be wrong.
PATIENCE_SECS = 900.0


class Server:
    """The process that starts experiments; see `chaos_server.py`."""

    def __init__(self, cache: Path):
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "chaos_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        )

    def start(self, experiment: str, run: Path, *extra: str) -> int:
        """Starts or resumes a training; returns the process's number."""
        module, argv = EXPERIMENTS[experiment]
        argv = [*argv, *extra, "--run-dir", str(run), "--resume", str(run)]
        return self._ask({"module": module, "argv": argv, "log": f"{run}.log"})

    def wait(self, number: int) -> int:
        """Returns the exit status of a process that it started, when there is one."""
        return self._ask({"wait": number})

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the process that starts experiments ended")
        return json.loads(answer)


class Tally(collections.Counter):
    """Counts by (experiment, what happened), kept in a file."""

    def __init__(self, path: Path):
        saved = json.loads(path.read_text()) if path.exists() else {}
        super().__init__({tuple(name.split(": ", 1)): n for name, n in saved.items()})
        self._path = path

    def save(self) -> None:
        text = json.dumps({": ".join(name): n for name, n in self.items()}, indent=1)
        self._path.write_text(text)

    def table(self) -> str:
        """Returns what happened, a line each, with a column for each experiment."""
        columns = [name for name in EXPERIMENTS if any(key[0] == name for key in self)]
        rows = sorted({key[1] for key in self})
        width = max([len(row) for row in rows], default=0)
        lines = [f"{'':{width}}" + "".join(f"{name:>10}" for name in columns)]
        lines += [
            f"{row:{width}}" + "".join(f"{self[name, row]:10}" for name in columns) for row in rows
        ]
        return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="over all experiments (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="NAME"
    )
    parser.add_argument("--directory", type=Path, help="keep the trainings and the tally there")
    options = parser.parse_args(expand_flags())
    with contextlib.ExitStack() as stack:
        directory = options.directory or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-"))
        )
        directory.mkdir(parents=True, exist_ok=True)
        server = Server(directory / "cache")
        stack.callback(server.close)
        tally = Tally(directory / "tally.json")
        problems = []
        for index, experiment in enumerate(options.experiments):
            share = len(range(index, options.kills, len(options.experiments)))
            generator = random.Random(f"{options.seed} {experiment}")
            problems += torment(server, experiment, directory, share, generator, tally)
    print(tally.table())
    for problem in problems:
        print(f"WRONG: {problem}")
    print(f"{len(problems)} problems" if problems else "nothing that was saved was lost")
    return 1 if problems else 0


def torment(
    server: Server,
    experiment: str,
    directory: Path,
    kills: int,
    generator: random.Random,
    tally: Tally,
) -> list[str]:
    """Kills an experiment N times; returns what was wrong."""
    straight, run = directory / f"{experiment}-straight", directory / f"{experiment}-killed"
    duration = train_straight(server, experiment, straight)
    problems: list[str] = []
    killed = 0
    while killed < kills:
        whole, started = not run.exists(), time.monotonic()
        number = server.start(experiment, run)
        confirmed = strike(number, run, duration, generator, in_save=killed % 2 == 1)
        status = server.wait(number)
        if status == -signal.SIGKILL:
            killed += 1
            kind = left_behind(run)
            tally[experiment, f"killed {kind}"] += 1
            found = check(straight, run, confirmed)
            if not found and killed % DAMAGE_EVERY == 0:
                found = spoil(straight, run, generator, experiment, tally)
            found = [f"{experiment}, kill {killed} ({kind}): {text}" for text in found]
        elif status == 0:
            tally[experiment, "trainings that reached their end"] += 1
            if whole:  # The machine is less busy than it was: later kills would miss too.
                duration = min(duration, time.monotonic() - started)
            found = [f"{experiment}, at its end: {text}" for text in differences(straight, run)]
        else:
            found = [f"{experiment} ended with exit status {status}: {last_line(run)}"]
        problems += found
        if found:
            print("\n".join(found), flush=True)
            shutil.move(run, f"{run}-wrong-{time.time_ns()}")
        elif status == 0:
            shutil.rmtree(run)
        tally.save()
    return problems + finish(server, experiment, straight, run, tally)


def train_straight(server: Server, experiment: str, straight: Path) -> float:
    """Trains without kills, unless that was done before; returns how many seconds it takes."""
    if not (straight / "summary.json").exists():
        shutil.rmtree(straight, ignore_errors=True)
        # Twice: the first time compiles, and what counts is how long the others take.
        for _ in range(2):
            shutil.rmtree(straight, ignore_errors=True)
            started = time.monotonic()
            status = server.wait(server.start(experiment, straight, "--keep-last", "0"))
            if status:
                raise SystemExit(f"{experiment} ended with status {status}: {last_line(straight)}")
        (straight / "duration.json").write_text(json.dumps(time.monotonic() - started))
    return json.loads((straight / "duration.json").read_text())


def strike(
    number: int, run: Path, duration: float, generator: random.Random, *, in_save: bool
) -> int:
    """Kills a process at a random moment; returns the newest step that was saved before, or -1."""
    checkpoints = run / "checkpoints"
    deadline = time.monotonic() + PATIENCE_SECS
    if in_save:
        saves, current = generator.randrange(1, 8), ""
        while saves and time.monotonic() < deadline and alive(number):
            writing = unfinished(checkpoints)
            if writing and writing != current:
                saves, current = saves - 1, writing
            time.sleep(0.0005)
        time.sleep(generator.uniform(0, SAVE_SECS))
    else:
        moment = time.monotonic() + generator.uniform(0, duration)
        while time.monotonic() < moment and alive(number):
            time.sleep(min(0.05, max(0.0, moment - time.monotonic())))
    confirmed = max(unspoiled(run), default=-1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(number, signal.SIGKILL)
    return confirmed


def check(straight: Path, run: Path, confirmed: int) -> list[str]:
    """Returns what is wrong with a killed run; `confirmed` is a step that must not be lost."""
    found = check_log(straight, run)
    steps = unspoiled(run)
    if max(steps, default=-1) < confirmed:
        found.append(f"the checkpoint of step {confirmed} is lost")
    for step in steps:
        found += damage(run, step) or state_differences(straight, run, step)
    return found


def spoil(
    straight: Path, run: Path, generator: random.Random, experiment: str, tally: Tally
) -> list[str]:
    """Damages the newest checkpoint and checks that the one before it is used, and is good."""
    leave_debris(run)
    tally[experiment, "debris left"] += 1
    steps = unspoiled(run)
    if len(steps) < 2:
        return []
    *_, before, newest = steps
    name = generator.choice(list(DAMAGES))
    (steps[newest] / SPOILED).touch()
    DAMAGES[name](steps[newest], generator)
    tally[experiment, f"spoiled: {name}"] += 1
    if not damage(run, newest):
        return [f"{name} in step {newest} was not noticed"]
    return damage(run, before) or state_differences(straight, run, before)


def unspoiled(run: Path) -> dict[int, Path]:
    """Returns the saved steps, but for those that `spoil` damaged."""
    found = directories.whole(run / "checkpoints")
    return {step: path for step, path in found.items() if not (path / SPOILED).exists()}


def damage(run: Path, step: int) -> list[str]:
    """Returns what is wrong with a checkpoint as such: nothing, or one line."""
    directory = run / "checkpoints"
    messages: list[str] = []
    try:
        names = checkpoint.item_names(directory, step=step, warn=messages.append)
        checkpoint.restore_items(directory, names, step=step, warn=messages.append)
        checkpoint.read_meta(directory, step=step, warn=messages.append)
    except UserError as error:
        return [*messages, str(error)][:1]
    return messages


def state_differences(straight: Path, run: Path, step: int) -> list[str]:
    return [
        f"{each.what} of step {step} differ, first {each.different[0]}"
        for each in compare_states(straight, step, run, step)
        if set(each.different) - DIFFERENT_ON_PURPOSE
    ]


def differences(straight: Path, run: Path) -> list[str]:
    return [
        f"{each.what} differ, first {each.different[0]}"
        for each in compare_runs(straight, run)
        if set(each.different) - DIFFERENT_ON_PURPOSE and each.what != "checkpoints kept"
    ]


def check_log(straight: Path, run: Path) -> list[str]:
    """What a killed run logged, but for a torn last line, must be how the straight's log begins."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if (straight / "metrics.jsonl").read_text().startswith(whole):
        return []
    return ["the log has a gap, a double or another line"]


def left_behind(run: Path) -> str:
    """Returns what a kill interrupted, judged by what lies there."""
    name = unfinished(run / "checkpoints")
    if not (run / "config.json").exists():
        return "before it wrote anything"
    if name:
        return "deleting a checkpoint" if "deleted" in name else "writing a checkpoint"
    if checkpoint.latest(run / "checkpoints") is None:
        return "before the first checkpoint"
    metrics = run / "metrics.jsonl"
    if metrics.exists() and '"test"' in metrics.read_text():
        return "after the training"
    return "between checkpoints"


def unfinished(checkpoints: Path) -> str:
    """Returns the name of a step that is being written or deleted, or ""."""
    try:
        return next((name for name in os.listdir(checkpoints) if name.startswith(".tmp-")), "")
    except OSError:
        return ""


def alive(number: int) -> bool:
    """Whether a process still runs; one that ended waits to be asked for its status."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def finish(server: Server, experiment: str, straight: Path, run: Path, tally: Tally) -> list[str]:
    """Lets the last training, if one is under way, reach its end, and compares it."""
    if not run.exists():
        return []
    status = server.wait(server.start(experiment, run))
    if status:
        return [f"{experiment} ended with exit status {status}: {last_line(run)}"]
    tally[experiment, "trainings that reached their end"] += 1
    tally.save()
    found = [f"{experiment}, at its end: {text}" for text in differences(straight, run)]
    if not found:
        shutil.rmtree(run)
    return found


def last_line(run: Path) -> str:
    lines = Path(f"{run}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


if __name__ == "__main__":
    sys.exit(main())
