"""Train what a search found with several seeds, beside the experiment's defaults, and test both.

    cnnjax finish-search --search runs/search-mnist_lenet-20260101-120000 --epochs 12

This is where the test set is looked at, once: the search itself judges by validation. Both settings
train with the same seeds; the difference is tested in pairs. Runs that are finished are not run
again, so the command can be repeated after a kill.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnjax import commands
from cnnjax.errors import UserError
from cnnjax.paths import read_text
from cnnjax.run.exits import INTERRUPT_EXIT_CODES, stop_requests

OWN_FLAGS = ("--run-dir", "--resume", "--stop-after-epochs", "--seed", "--test", "--no-test")
POLL_SECS = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, tests, compares and prints; returns the exit code."""
    options, extra = _parse(argv)
    from cnnjax.run.files import write_json
    from cnnjax.search.setup import read_record

    directory = Path(options.search)
    saved = read_record(directory)
    found, metric = _chosen(_best(directory), options.trial), score_name(saved)
    _check_extra(found["settings"], extra)
    lines = {"found": _flags(saved, found["settings"], extra), "default": [*saved["argv"], *extra]}
    names = {"found": f"trial{found['trial']:04}", "default": "default"}
    runs = {
        name: [(seed, directory / "final" / f"{names[name]}-seed{seed}") for seed in options.seeds]
        for name in lines
    }
    for name, flags in lines.items():
        for seed, run in runs[name]:
            _check_run(saved, flags, seed, run)
    scores = {
        name: [_score(saved, flags, seed, run) for seed, run in runs[name]]
        for name, flags in lines.items()
    }
    text = table(saved["experiment"], metric, lines, scores, options.seeds)
    (directory / "final.md").write_text(text, encoding="utf-8")
    write_json(
        directory / "final.json",
        {"metric": f"test_{metric}", "seeds": options.seeds, "flags": lines, "scores": scores},
    )
    print(text, end="")
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = commands.Parser(
        prog="cnnjax finish-search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other flags are the experiment's, for both settings, such as more --epochs.",
    )
    parser.add_argument("--search", required=True, help="the directory of the search")
    parser.add_argument("--trial", type=int, help="of several that are best, this one (the first)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    options, rest = parser.parse_both(argv, OWN_FLAGS)
    if len(set(options.seeds)) < len(options.seeds):
        raise UserError("--seeds names a seed twice: drop one")
    for seed in options.seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds {seed}: give 0 to {2**32 - 1:,}")
    return options, rest


def _best(directory: Path) -> list[dict[str, Any]]:
    """Returns what `best.json` says; UserError where it is not there or damaged."""
    path = directory / "best.json"
    if not path.exists():
        raise UserError(f"{directory} has no best.json: no trial of it has ended")
    try:
        found = json.loads(read_text(path))
        if not found or any({"trial", "settings"} - set(each) for each in found):
            raise ValueError("it names no trial with settings")
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): cnnjax search --resume {directory} writes it again"
        ) from None
    return found


def _chosen(best: list[dict[str, Any]], number: int | None) -> dict[str, Any]:
    if number is None:
        return best[0]
    for each in best:
        if each["trial"] == number:
            return each
    known = ", ".join(str(each["trial"]) for each in best)
    raise UserError(f"--trial {number} is not among the best of the search: give one of {known}")


def _check_extra(chosen: Mapping[str, Any], extra: Sequence[str]) -> None:
    """Raises UserError where a flag is of what the search chose."""
    from cnnjax.search.plan import flag_given

    for name in chosen:
        if flag := flag_given(name, extra):
            raise UserError(f"{flag} is what the search chose: drop it")


def _check_run(saved: Mapping[str, Any], flags: Sequence[str], seed: int, directory: Path) -> None:
    """Raises UserError for flags that no run takes, and where another run is finished there."""
    import importlib

    from cnnjax.run import checks, cli, record
    from cnnjax.run.settings import Settings

    own = [*flags, "--seed", str(seed), "--run-dir", str(directory)]
    config = cli.parse(importlib.import_module(saved["experiment"]).Config, own)
    if not isinstance(config, Settings):
        return
    checks.check_specs(config)
    if not (directory / "summary.json").exists():
        return
    other = record.other_settings(record.shortened(config), directory)
    if other:
        raise UserError(
            f"{directory} is finished, with other settings ({', '.join(other)}): give the flags "
            f"that it was trained with, or move {directory.parent} away"
        )


def _flags(saved: dict[str, Any], chosen: dict[str, Any], extra: Sequence[str]) -> list[str]:
    """The experiment's flags of a trial's settings."""
    import dataclasses
    import importlib

    from cnnjax.run import cli
    from cnnjax.search.plan import chosen_flags

    fixed = [*saved["argv"], *extra]
    config_type = importlib.import_module(saved["experiment"]).Config
    config = cli.parse(config_type, fixed)
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return [*fixed, *chosen_flags(settings, chosen)]


def score_name(saved: dict[str, Any]) -> str:
    """Returns the first objective of a search that runs are tested for.

    Raises:
      UserError: there is none.
    """
    from cnnjax.search.plan import COSTS, OF_SUMMARY

    names = [each["name"] for each in saved["objectives"]]
    found = [name for name in names if name not in (*OF_SUMMARY, *COSTS)]
    if not found:
        raise UserError(f"no objective of this search is tested: {', '.join(names)} are costs")
    return found[0]


def _score(saved: dict[str, Any], flags: Sequence[str], seed: int, directory: Path) -> float:
    """Trains one seed, unless it is finished; returns its test score."""
    from cnnjax.run.files import read_json

    name = score_name(saved)
    if not (directory / "summary.json").exists():
        command = [sys.executable, "-m", saved["experiment"], *flags, "--seed", str(seed)]
        command += ["--run-dir", str(directory), "--resume", str(directory)]
        code = _run(command)
        if code in INTERRUPT_EXIT_CODES.values():
            print("stopped; repeat the command to go on", file=sys.stderr)
            sys.exit(code)
        if code:
            raise UserError(f"{directory} failed; what it printed is above")
    summary = read_json(directory / "summary.json", f"{directory} is damaged")
    if f"test_{name}" not in summary:
        raise UserError(f"runs of {saved['experiment']} are not tested for {name}")
    return float(summary[f"test_{name}"])


def _run(command: Sequence[str]) -> int:
    """Runs a program to its end, also where it is asked to save and stop; returns its exit code."""
    # In a session of its own it hears of a signal once: a second would not let it save.
    own: dict[str, Any] = {"stdout": sys.stderr, "start_new_session": True}
    with stop_requests() as asked, subprocess.Popen(command, **own) as program:
        told = False
        while program.poll() is None:
            time.sleep(POLL_SECS)
            if not told and (name := asked()):
                program.send_signal(signal.Signals[name])
                told = True
    # It may have ended well all the same.
    return INTERRUPT_EXIT_CODES[name] if (name := asked()) else program.returncode


def table(
    experiment: str,
    name: str,
    lines: dict[str, list[str]],
    scores: dict[str, list[float]],
    seeds: Sequence[int],
) -> str:
    """Sets both settings as a Markdown table, and says whether they differ."""
    import shlex

    from cnnjax.studies.tables import mean_interval, paired_text

    scale, unit = (100, ", %") if name == "accuracy" else (1, "")
    rows = []
    for setting, values in scores.items():
        mean, half = mean_interval(values)
        each = " ".join(f"{scale * value:.2f}" for value in values)
        spread = f" ± {scale * half:.2f}" if len(values) > 1 else ""
        rows.append(
            f"| {setting} | {scale * mean:.2f}{spread} | {each} | "
            f"`{shlex.join(['python', '-m', experiment, *lines[setting]])}` |"
        )
    text = (
        f"| setting | test {name}{unit} (mean ± half of the 95% interval) | each seed | command |\n"
        "|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    if len(seeds) < 2:
        return text
    line = paired_text(scores["default"], scores["found"], "Found minus default", name)
    return f"{text}\n{line}\n"
