"""Walks directories of images: what counts as one, what is passed over, how links are followed."""

from __future__ import annotations

import os
import pathlib

from cnnjax.errors import UserError
from cnnjax.paths import expand

IMAGE_SUFFIXES = (
    *(".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png"),
    *(".ppm", ".tif", ".tiff", ".webp"),
)
# What archives, systems and network disks leave beside the files of users.
_SYSTEM_NAMES = {
    *("__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "lost+found"),
    *("$recycle.bin", "recycler", "recycled", "system volume information"),
    *("network trash folder", "temporary items"),
}


def _listed(directory: pathlib.Path) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """(sub-directories, other entries) by name, but for hidden ones and those that systems leave.

    A link is what it links to.
    """
    try:
        with os.scandir(directory) as entries:
            shown = sorted(
                (each.name, os.path.isdir(each.path) if each.is_symlink() else each.is_dir())
                for each in entries
                if not each.name.startswith(".") and each.name.casefold() not in _SYSTEM_NAMES
            )
    except OSError as error:
        raise UserError(f"cannot read the directory {str(directory)!r}: {error.strerror}") from None
    return (
        [directory / name for name, is_directory in shown if is_directory],
        [directory / name for name, is_directory in shown if not is_directory],
    )


def subdirectories(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns the sub-directories that count; a UserError for a link that is broken."""
    found, others = _listed(directory)
    for child in others:
        if not child.suffix and os.path.islink(child) and not os.path.exists(child):
            raise UserError(
                f"{str(child)!r} is a broken link to {os.readlink(child)!r}: mend or remove it"
            )
    return found


def images(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns the image files of a directory itself; links whether broken or not."""
    return [child for child in _listed(directory)[1] if child.suffix.lower() in IMAGE_SUFFIXES]


def image_files(path: str | os.PathLike, what: str = "directory") -> list[pathlib.Path]:
    """Returns all image files below a directory, at any depth, by name.

    Args:
      path: the directory; `~` is the home directory.
      what: it is called in the error.

    Raises:
      UserError: there is no such directory, or it cannot be read.
    """
    directory = pathlib.Path(expand(path))
    if not directory.is_dir():
        raise UserError(f"{what}: there is no directory {str(directory)!r}: give one of images.")
    return files_below(directory)


def files_below(directory: pathlib.Path) -> list[pathlib.Path]:
    """Returns all image files of a class, by name; each real directory once, however it is linked.

    Raises:
      UserError: a link to what holds the directory itself, or a broken one.
    """
    parent = os.path.realpath(directory.parent)
    seen: set[str] = set()
    found: list[pathlib.Path] = []
    # A directory that is linked too is known by where it is.
    waiting, links = [directory], list[pathlib.Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop()
        real = os.path.realpath(here)
        if os.path.join(parent, "").startswith(os.path.join(real, "")):
            raise UserError(
                f"{str(here)!r} links to {real!r}, which holds the other classes too: remove the "
                "link"
            )
        if real in seen:
            continue
        seen.add(real)
        found += images(here)
        for child in subdirectories(here):
            (links if child.is_symlink() else waiting).append(child)
    return sorted(found)


def checked_image(path: str | os.PathLike) -> str:
    """Returns the name of an image file; `~` is the home directory.

    Raises:
      UserError: a directory, a pipe, a broken link, or nothing.
    """
    name = expand(path)
    if os.path.isdir(name):
        raise UserError(f"{name!r} is a directory: give an image file")
    if os.path.isfile(name):
        return name
    if os.path.exists(name):
        # To open a pipe would wait for ever.
        raise UserError(f"{name!r} is no file on a disk: give an image file")
    is_link = os.path.islink(name)
    why = f": the link to {os.readlink(name)!r} is broken" if is_link else ""
    raise UserError(f"no image file {name!r}{why}")
