"""The manifest of a saved step: its files and arrays, with a digest of each.

Storage formats do not notice most flipped bits, and a killed or full machine leaves half-written
files. So a step directory holds `manifest.json`, written last: a SHA-256 for each file, which tells
damage before anything is decoded, and for each array its shape, dtype and the SHA-256 of its
values, which tells that what was decoded is what was saved.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
NAME = "manifest.json"


class Damaged(Exception):
    """A step directory is not what was saved; the text says what is wrong with it."""


def array_digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's values in C order, as hexadecimal digits."""
    # Through bytes, because NumPy's extension types (bfloat16) do not export a buffer.
    values = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.sha256(values.data).hexdigest()


def write(step_directory: Path, content: dict[str, Any]) -> None:
    """Makes everything in `step_directory` durable, then writes and makes durable its manifest.

    Args:
      step_directory: holds every other file of the step already.
      content: JSON to record; the digests of the files and of the manifest itself are added.
    """
    files = {}
    for folder, _, names in os.walk(step_directory):
        for name in names:
            path = Path(folder, name)
            files[path.relative_to(step_directory).as_posix()] = _digest_and_sync(path)
        sync_directory(Path(folder))
    content = {"format": FORMAT, **content, "files": files}
    text = json.dumps({**content, "sha256": _text_digest(content)}, indent=1)
    with (step_directory / NAME).open("w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_directory(step_directory)


def read(step_directory: Path) -> dict[str, Any]:
    """Returns the content of a manifest, checked against its own digest.

    Raises:
      Damaged: there is none, it was changed, or its format is not the one this version reads.
    """
    try:
        content = json.loads((step_directory / NAME).read_text())
        digest = content.pop("sha256")
        file_format = content["format"]
    except FileNotFoundError:
        raise Damaged(f"it has no {NAME}, so it was never completed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{NAME} cannot be read ({type(error).__name__}: {error})") from None
    if file_format != FORMAT:
        raise Damaged(f"{NAME} has format {file_format!r}, and this version reads {FORMAT}")
    if digest != _text_digest(content):
        raise Damaged(f"{NAME} was changed after it was written")
    return content


def check_files(step_directory: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Checks the files of some entries of a step directory (folders or files) bit by bit.

    Raises:
      Damaged: a file is missing or was changed.
    """
    entries = set(names)
    for name, digest in manifest["files"].items():
        if name.partition("/")[0] not in entries:
            continue
        try:
            found = _digest(step_directory / name)
        except FileNotFoundError:
            raise Damaged(f"its file {name} is missing") from None
        except OSError as error:
            raise Damaged(f"its file {name} cannot be read ({error.strerror})") from None
        if found != digest:
            raise Damaged(f"its file {name} was changed or cut short")


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory survive a power cut."""
    if os.name == "nt":  # Windows cannot open directories.
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_and_sync(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
