"""Sizes that a file claims, checked first: a small file must not fill the memory."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from typing import Any

from cnnjax.errors import UserError

# Numbers of trained weights are hardly compressed; those of an initializer, all alike, may be.
MOST_EXPANDED = 200
# What is small is never refused.
ALWAYS_READ = 64 * 2**20
MOST_AXES = 64


def check_expansion(name: str, size: int, stored: int) -> None:
    """Raises UserError where `size` bytes are claimed of far fewer `stored` ones."""
    if size > max(ALWAYS_READ, MOST_EXPANDED * stored):
        raise UserError(
            f"{name} would be {size:,} bytes, and {stored:,} are stored: it is damaged or made to "
            "fill the memory."
        )


def check_archive(archive: zipfile.ZipFile) -> None:
    """Raises UserError where members of a zip archive, or all together, claim to be too large."""
    members = archive.infolist()
    for info in members:
        check_expansion(info.filename, info.file_size, info.compress_size)
    check_expansion(
        "it", sum(info.file_size for info in members), sum(info.compress_size for info in members)
    )


def checked_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """Returns a shape; raises ValueError unless its product is quickly computed."""
    if len(shape) > MOST_AXES or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise ValueError("a shape of impossible numbers")
    return tuple(shape)
