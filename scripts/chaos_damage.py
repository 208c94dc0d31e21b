"""Damage to files, done on purpose to the newest checkpoint of a run, for `chaos.py`."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"


def _files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


def truncate(step: Path, generator: random.Random) -> None:
    """Cuts a file short."""
    path = generator.choice(_files(step))
    os.truncate(path, generator.randrange(path.stat().st_size))


def flip_bit(step: Path, generator: random.Random) -> None:
    """Changes one bit of an array's file."""
    # In the manifest, a space may become another space: then nothing is damaged.
    path = generator.choice([path for path in _files(step) if path.name != MANIFEST])
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def delete_file(step: Path, generator: random.Random) -> None:
    generator.choice(_files(step)).unlink()


def delete_half(step: Path, generator: random.Random) -> None:
    """Deletes half of the files, as a killed `rm -r` does."""
    files = _files(step)
    for path in generator.sample(files, len(files) // 2):
        path.unlink()


def empty_manifest(step: Path, generator: random.Random) -> None:
    (step / MANIFEST).write_bytes(b"")


def unreadable(step: Path, generator: random.Random) -> None:
    """Puts a directory where a file was: nobody, root included, can read it."""
    path = generator.choice(_files(step))
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated file": truncate,
    "flipped bit": flip_bit,
    "deleted file": delete_file,
    "half deleted": delete_half,
    "empty manifest": empty_manifest,
    "unreadable file": unreadable,
}


def leave_debris(run: Path) -> None:
    """Adds what older kills may have left: half-written and half-deleted steps and files."""
    checkpoints = run / "checkpoints"
    unfinished = checkpoints / "00099998"
    # Debris of the kill before may still be there: the one after it can come before its cleaning.
    for step in sorted(set(checkpoints.glob("0*")) - {unfinished})[-1:]:
        for name in (".tmp-00099999", ".tmp-deleted-00000001"):
            shutil.copytree(step, checkpoints / name, dirs_exist_ok=True)
        shutil.copytree(step, unfinished, dirs_exist_ok=True)
        (unfinished / MANIFEST).unlink(missing_ok=True)
    (run / "metrics.jsonl.new").write_text('{"step": 1, "ki')
    (run / ".config.json.tmp").write_text("{")
