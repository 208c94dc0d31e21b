"""What a repository holds: where versions of models come from, and which are loaded."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cnnjax.errors import UserError
from cnnjax.paths import expand
from cnnjax.serve import rollout as rollouts
from cnnjax.serve.batcher import Batcher
from cnnjax.serve.refusals import Invalid
from cnnjax.serve.runtime import Runtime, check_source

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a version of a model comes from; requests name it, and never its path."""

    name: str
    version: str
    path: str


@dataclasses.dataclass
class Loaded:
    """A version that answers."""

    runtime: Runtime
    batcher: Batcher
    since: float


@dataclasses.dataclass
class Model:
    """A name with its versions: where they come from, which are loaded, who answers."""

    sources: dict[str, Source]
    loaded: dict[str, Loaded] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    rollout: rollouts.Rollout | None = None
    previous: rollouts.Rollout | None = None
    compared: rollouts.Compared = dataclasses.field(default_factory=rollouts.Compared)


def read_sources(texts: Sequence[str]) -> list[Source]:
    """Returns the sources that `PATH`, `NAME=PATH` and `NAME:VERSION=PATH` name.

    A name that comes again without a version gets the next number.

    Raises:
      UserError: a name, version or path that cannot be used, or a pair that comes twice.
    """
    if not texts:
        raise UserError("no model given: name a run directory or an exported file by --run.")
    sources: list[Source] = []
    for text in texts:
        name, equals, path = text.partition("=")
        if equals and "/" in name and not Path(expand(text)).exists():
            raise UserError(
                f"--run {text}: there is no such path, and {name!r} is no name of a model: use "
                "letters, digits, - _ and ., as in NAME=PATH or NAME:VERSION=PATH."
            )
        if not equals or "/" in name:
            name, path = Path(text).resolve().name, text
            name = name.removesuffix(Path(name).suffix) if Path(text).is_file() else name
        name, _, version = name.partition(":")
        taken = {each.version for each in sources if each.name == name}
        version = version or str(len(taken) + 1)
        for word, what in ((name, "name of a model"), (version, "version")):
            if not NAME.fullmatch(word):
                raise UserError(
                    f"--run {text}: {word!r} is no {what}: use letters, digits, - _ and ., as in "
                    "NAME=PATH or NAME:VERSION=PATH."
                )
        if version in taken:
            raise UserError(f"--run {text}: {name} has a version {version}: name another.")
        if not path:
            raise UserError(f"--run {text}: give a run directory or a file after the =.")
        check_source(path)
        sources.append(Source(name, version, path))
    return sources


def check_images(images: np.ndarray, runtime: Runtime) -> None:
    """Raises `Invalid` unless the images have the dtype and one of the shapes of a model."""
    if images.dtype != runtime.dtype:
        raise Invalid(f"the images are {images.dtype}, and the model takes {runtime.dtype}.")
    if images.shape[1:] not in runtime.shapes:
        taken = " or ".join(str(list(shape)) for shape in runtime.shapes)
        raise Invalid(f"an image has shape {list(images.shape[1:])}, and the model takes {taken}.")
