"""What README.md and docs/*.md show: lines of a shell, and blocks of Python."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Programs of others: that the files that a line names are there is all that is checked of it.
ELSEWHERE = ("pip", "pytest", "ruff", "npm", "gcloud", "kubectl", "sbatch", "srun", "sphinx-build")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A line of a shell, or a block of Python, that a guide shows.

    Attributes:
      where: file and number of its first line.
      text: the line with its continuations joined, or the block.
    """

    where: str
    text: str


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was done with it: `how`, seconds, and what went wrong, "" if nothing did."""

    shown: Shown
    how: str
    seconds: float
    problem: str = ""


def guides() -> list[Path]:
    """Returns the files that are checked."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(path: Path) -> list[Shown]:
    """Returns the lines of a guide's blocks that begin with a known program, comments removed."""
    found = []
    for number, text in _code_lines(path.read_text(encoding="utf-8")):
        for part in _commands(text):
            found.append(Shown(f"{_name(path)}:{number}", part))
    return found


def flags_in_prose(path: Path) -> list[Shown]:
    """Returns the flags between backticks, outside of blocks: `--flag`, and those of commands."""
    found, fenced = [], False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.startswith("```")
        if fenced or line.startswith("    "):
            continue
        for code in re.findall(r"`((?:--|cnnjax |python )[^`]+)`", line):
            flags = re.findall(r"(?:^|(?<=[\s(\[]))--[a-z][\w-]*", code)
            found += [Shown(f"{_name(path)}:{number}", flag) for flag in flags]
    return found


def python_blocks(path: Path) -> list[Shown]:
    """Returns the fences of Python of a guide."""
    text = path.read_text(encoding="utf-8")
    return [
        Shown(f"{_name(path)}:{text[: match.start()].count(chr(10)) + 1}", match[1])
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def _commands(text: str) -> Iterator[str]:
    """Yields the parts of a line that are calls of programs that are known here."""
    text = re.sub(r"(^|\s)#.*", "", text).strip()
    text = re.sub(r"\s2?>>?\s*[\w./-]+$", "", text)  # Where its output goes.
    first = re.sub(r"^([A-Z_]+=\S+ )+", "", text)
    known = ("python ", "cnnjax ", "scripts/", ".ci/run", *(f"{name} " for name in ELSEWHERE))
    if not first.startswith(known) or first.startswith("python -c"):
        return
    if remote := re.search(r'--command="([^"]*)"', text):
        yield from _commands(remote[1].partition("&& ")[2] or remote[1])
        text = text[: remote.start()]
    for part in re.split(r"\s&&\s|;\s", text):
        # What its output goes through is no flag of its.
        part = re.split(r"\s\|\s", part)[0]
        yield part.strip().removesuffix("&").strip()


def _code_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields number and text of the lines of shell blocks, continuations joined."""
    fence, pending, start = "", "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"^(```+|~~~+)\s*(\S*)", line):
            fence = "" if fence else match[2] or "none"
            continue
        is_code = fence in ("bash", "sh", "shell", "console") or (
            not fence and line.startswith("    ")
        )
        if not is_code and not pending:
            continue
        start = start if pending else number
        pending += line.strip()
        if pending.endswith("\\"):
            pending = pending.removesuffix("\\").rstrip() + " "
            continue
        yield start, pending
        pending = ""


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
