"""Check every command, link and Python block that README.md and docs/*.md show.

    python scripts/check_docs.py            # flags by the own parser of each; Python is run
    python scripts/check_docs.py --list             # every line, with what is done with it
    python scripts/check_docs.py --run              # also runs the commands, shortened; by hand
    python scripts/check_docs.py --run --only evaluate

A command is a line that begins with a known program, in an indented or fenced block. Without --run
it is given to the parser of what it names, so that a flag that is not there, or a value that it
does not take, fails. Python blocks (fences of `python`) are run in an empty directory in which
the runs that they name have been trained for seconds; one that imports a package that is missing
here is left out, and named. Links within this repository must lead to a file and a heading that are
there, in notebooks too. The exit code is 1 where anything fails.
"""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from documented import (
    ROOT,
    Outcome,
    Shown,
    flags_in_prose,
    guides,
    python_blocks,
    shell_lines,
)
from documented_links import check_link, linked_files, links
from documented_runs import run_blocks, run_lines

from cnnjax import commands
from cnnjax.errors import UserError
from cnnjax.paths import expand_flags
from cnnjax.run import cli
from cnnjax.run.exits import one_line_errors

# Flags that guides name of programs of others.
FLAGS_ELSEWHERE = ("--no-deps", "--requeue")
# What stands for a value, and a value that parsers take for it.
PLACEHOLDERS = {"N": "1", "...": "x"}


class _Parsed(BaseException):
    """Flags were read: no more is to be done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Checks all guides; returns 1 where anything fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="run the commands too, shortened")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this text")
    parser.add_argument("--list", action="store_true", help="print every line, not failures alone")
    options = parser.parse_args(expand_flags(argv))
    lines, flags, blocks = (
        [each for path in guides() for each in find(path) if options.only in each.text]
        for find in (shell_lines, flags_in_prose, python_blocks)
    )
    found_links = [
        link for path in linked_files() for link in links(path) if options.only in link.text
    ]
    if not (lines or flags or blocks or found_links):
        parser.error(f"--only {options.only!r}: no line of the guides has this text")
    outcomes = _shown_all((_timed(line, checked) for line in lines), options.list)
    known = known_flags()
    outcomes += _shown_all((_timed(flag, lambda it: _known(it, known)) for flag in flags), False)
    outcomes += _shown_all((_timed(link, check_link) for link in found_links), False)
    with tempfile.TemporaryDirectory(prefix="docs-") as directory:
        outcomes += _shown_all(run_blocks(blocks, Path(directory)), options.list)
        if options.run:
            outcomes += _shown_all(run_lines(lines, Path(directory)), True)
    failed = [outcome for outcome in outcomes if outcome.problem]
    counts = {how: sum(each.how == how for each in outcomes) for how in _hows(outcomes)}
    seconds = sum(each.seconds for each in outcomes)
    text = ", ".join(f"{count} {how}" for how, count in counts.items())
    print(f"{text}; {len(failed)} failed, {seconds:.0f} s")
    return 1 if failed else 0


def checked(line: Shown) -> str:
    """Gives a command to its own parser; returns what was done.

    Raises:
      UserError: no such command or file, or flags that it does not take.
    """
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(_chosen(line.text))]
    while words and (words[0] == "srun" or re.fullmatch(r"[A-Z_]+=.*", words[0])):
        words.pop(0)
    if words[:2] == ["python", "-m"] or words[:3] == ["python", "-u", "-m"]:
        module, *flags = words[words.index("-m") + 1 :]
        if module == "cnnjax":
            return _check_program(flags)
        if module.startswith("experiments."):
            return _check_experiment(module, flags)
        return "not ours"
    if words[0] == "cnnjax":
        return _check_program(words[1:])
    if words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
        return _check_script(words[1], words[2:])
    if words[0].endswith(("local.sh", "slurm.sbatch")) or words[0] == "sbatch":
        at = next(i for i, word in enumerate(words) if word.startswith("experiments."))
        _require(words[at - 1] if words[0] == "sbatch" else words[0])
        return _check_experiment(words[at], words[at + 1 :])
    for word in words:
        if re.fullmatch(r"(scripts|benchmarks|docs|tests)/[\w./]+", word):
            _require(word)
    return "not ours"


def known_flags() -> set[str]:
    """Returns every flag that some command, experiment, script or benchmark takes."""
    found = {"--help", "--version", *FLAGS_ELSEWHERE}
    settings = ("cnnjax/commands", "cnnjax/run", "cnnjax/studies", "experiments")
    for folder in (*settings, "cnnjax/serve", "cnnjax/serve/guard", "cnnjax/serve/watch"):
        for path in (ROOT / folder).glob("*.py"):
            # The fields of a Config become flags.
            for name in re.findall(r"^    (\w+): ", path.read_text(encoding="utf-8"), re.MULTILINE):
                flag = name.replace("_", "-")
                found |= {f"--{flag}", f"--no-{flag}"}
    for folder in ("cnnjax/commands", "scripts", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            names = re.findall(r'"--([a-z][\w-]*)"', path.read_text(encoding="utf-8"))
            found |= {f"--{each}" for name in names for each in (name, f"no-{name}")}
    return found


def _known(flag: Shown, known: set[str]) -> str:
    if flag.text not in known:
        raise UserError(f"no command has {flag.text}")
    return "flags in prose"


def _check_program(words: Sequence[str]) -> str:
    if not words or words[0].startswith("-"):
        return "parsed"
    name, *flags = words
    if name not in commands.COMMANDS:
        raise UserError(f"there is no command {name}")
    module = importlib.import_module(f"cnnjax.commands.{name.replace('-', '_')}")
    if hasattr(module, "Config"):
        cli.parse(module.Config, flags, program=f"cnnjax {name}")
        return "parsed"
    read = _read_by_argparse(lambda: module.main(flags))
    options, rest = read if isinstance(read, tuple) else (read, [])
    if experiment := getattr(options, "experiment", None):
        for more in ([], shlex.split(getattr(options, "against", ""))):
            _check_experiment(experiment, [*rest, *more])
    return "parsed"


def _check_experiment(module: str, flags: Sequence[str]) -> str:
    config_type = importlib.import_module(module).Config
    cli.parse(config_type, [flag for flag in flags if flag != "&"], program=f"python -m {module}")
    return "parsed"


def _check_script(path: str, flags: Sequence[str]) -> str:
    _require(path)
    module = _imported(path)
    given = sys.argv
    sys.argv = [path, *flags]
    try:
        _read_by_argparse(module.main)
    finally:
        sys.argv = given
    return "parsed"


def _imported(path: str) -> Any:
    """Returns a script as a module; its neighbors are found as when it is started."""
    folder = str((ROOT / path).parent)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(path.removesuffix(".py").replace("/", "."))
    finally:
        sys.path.remove(folder)


def _read_by_argparse(main: Any) -> Any:
    """Calls a program's `main` until it has read its flags, and returns what it read.

    Raises:
      UserError: it does not take them.
    """
    found: list[Any] = []

    def reading(original: Any) -> Any:
        def read(*arguments: Any, **named: Any) -> Any:
            found.append(original(*arguments, **named))
            raise _Parsed

        return read

    patched = [(argparse.ArgumentParser, "parse_args"), (commands.Parser, "parse_both")]
    originals = [getattr(owner, name) for owner, name in patched]
    printed = io.StringIO()
    try:
        for (owner, name), original in zip(patched, originals, strict=True):
            setattr(owner, name, reading(original))
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            main()
    except _Parsed:
        return found[-1]
    except SystemExit as stop:
        if not stop.code:
            return argparse.Namespace()  # After --help.
        text = printed.getvalue().strip().rpartition("\n")[2]
        raise UserError(text or "it does not take these flags") from None
    finally:
        for (owner, name), original in zip(patched, originals, strict=True):
            setattr(owner, name, original)
    raise UserError("it reads no flags")


def _require(path: str) -> None:
    if not (ROOT / path).exists():
        raise UserError(f"there is no {path}")


def _chosen(text: str) -> str:
    """Returns a line with its optional parts, and the first of each choice."""
    text = re.sub(r"\[(-[^\]]*)\]", r"\1", text)
    return re.sub(r"(?<=[ ])([\w.-]+)(\|[\w.-]+)+", r"\1", text)


def _timed(shown: Shown, check: Any) -> Outcome:
    began = time.perf_counter()
    try:
        how, problem = check(shown), ""
    except UserError as error:
        how, problem = "parsed", str(error)
    except Exception:
        how, problem = "parsed", traceback.format_exc()
    return Outcome(shown, how, time.perf_counter() - began, problem)


def _shown_all(outcomes: Iterator[Outcome], listed: bool) -> list[Outcome]:
    kept = []
    for outcome in outcomes:
        _show(outcome, listed)
        kept.append(outcome)
    return kept


def _show(outcome: Outcome, listed: bool) -> None:
    if outcome.problem or listed:
        first = outcome.shown.text.strip().partition("\n")[0]
        print(f"{outcome.how:8} {outcome.seconds:6.1f} s  {outcome.shown.where}: {first}")
    if outcome.problem:
        print(f"FAILED   {outcome.problem.strip()}", flush=True)


def _hows(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.how for outcome in outcomes))


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
