"""Load pretrained variables into a model; the caller names what is new and what is dropped."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.devices import backend
from cnnjax.errors import UserError
from cnnjax.finetune.base import Base
from cnnjax.models.summary import abstract_variables
from cnnjax.rng import stream_key
from cnnjax.trees import count_parameters, from_named_leaves, mask_by_path, named_leaves

Variables = dict[str, Any]
COLLECTIONS = ("params", "batch_stats")
MOST_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model's variables, and where each leaf comes from.

    Attributes:
      variables: `params` and `batch_stats` of the model, NumPy arrays with the model's dtypes.
      kept: paths of the leaves that are the base's, without their collection.
      new: of those that were drawn.
      dropped: of the base's leaves that the model does not have, or has in another form.
      checksum: of the base.
    """

    variables: Variables
    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    checksum: str


def load(
    base: Base,
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    new: Sequence[str] = (),
    drop: Sequence[str] = (),
    key: jax.Array,
) -> Loaded:
    """Puts pretrained variables into a model, leaf by leaf.

    Nothing is left at its initial value in silence: a leaf of the model is the base's, of the same
    path and shape, or a pattern of `new` matches it; a leaf of the base is used, or a pattern of
    `new` or `drop` matches it.

    Args:
      base: pretrained variables, such as `cnnjax.run.load.read_base` returns.
      model: a Linen module with the contract of `cnnjax.models`.
      image_shape: `[height, width, channels]` of its images.
      new: patterns of the model's leaves to reinitialize, such as `head/.*`; those of `params` and
        `batch_stats` alike (see `cnnjax.trees`).
      drop: patterns of the base's leaves to leave out.
      key: typed key of what is new.

    Raises:
      UserError: one error that lists all leaves that are missing, left over or of another form; a
        pattern that matches nothing.
    """
    image = jnp.zeros((1, *image_shape), jnp.float32)
    form = abstract_variables(model, image_shape)
    wanted = _leaves(form)
    found = _leaves(base.variables)
    is_new, is_dropped = mask_by_path(wanted, new), mask_by_path(found, drop)
    offered = {path: leaf for path, leaf in found.items() if not is_dropped[path]}

    drawn = [path for path in wanted if is_new[path]]
    kept = [path for path in wanted if not is_new[path]]
    replaced = {path for path in offered if _matches(path, new)}
    problems = {
        "missing in it": [path for path in kept if path not in offered],
        "of another form": [
            f"{path} ({_shape(offered[path])} in it, {_shape(wanted[path])} wanted)"
            for path in kept
            if path in offered and not _fits(offered[path], wanted[path])
        ],
        "only in it": [path for path in offered if path not in wanted and path not in replaced],
    }
    if any(problems.values()):
        raise UserError(_report(base, type(model).__name__, problems))
    values = {path: np.asarray(found[path]).astype(wanted[path].dtype) for path in kept}
    if drawn:
        values |= _draw(model, image, stream_key(key, "new", 0), drawn)
    return Loaded(
        {name: _part(form, name, values) for name in COLLECTIONS},
        tuple(kept),
        tuple(drawn),
        tuple(path for path in found if path not in kept),
        base.checksum,
    )


def format_loaded(loaded: Loaded) -> str:
    """Returns what was kept, new and dropped, as three lines of text."""
    leaves = _leaves(loaded.variables)
    lines = []
    for title, paths in (("kept", loaded.kept), ("new", loaded.new), ("dropped", loaded.dropped)):
        text = f"{len(paths)} leaves"
        if title != "dropped" and paths:
            text += f", {count_parameters([leaves[path] for path in paths]):,} numbers"
        if title != "kept" and paths:
            text += f": {_named(paths)}"
        lines.append(f"{title:<13}{text}")
    return "\n".join(lines)


def _leaves(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `{path: leaf}` of parameters and statistics, whose names differ in the last part."""
    return {
        path: leaf
        for name in COLLECTIONS
        for path, leaf in named_leaves(variables.get(name, {})).items()
    }


def _part(form: Variables, collection: str, values: Mapping[str, Any]) -> dict[str, Any]:
    paths = named_leaves(form.get(collection, {}))
    return from_named_leaves({path: values[path] for path in paths})


def _draw(model: Any, image: jax.Array, key: jax.Array, paths: Sequence[str]) -> dict[str, Any]:
    """Draws some leaves of a model; the compiler leaves out the drawing of all others."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        leaves = _leaves(model.init(key, image, train=False))
        return {path: leaves[path] for path in paths}

    return jax.device_get(backend.jit_once(init)(key))


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _fits(found: Any, wanted: Any) -> bool:
    floating = jnp.issubdtype(found.dtype, jnp.floating) == jnp.issubdtype(
        wanted.dtype, jnp.floating
    )
    return floating and tuple(found.shape) == tuple(wanted.shape)


def _shape(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)}[{','.join(map(str, leaf.shape))}]"


def _report(base: Base, model: str, problems: Mapping[str, Sequence[str]]) -> str:
    name = f"{base.source}, a {base.card['model']}," if base.card else base.source
    lists = [f"{title}: {_named(paths)}" for title, paths in problems.items() if paths]
    return (
        f"{name} does not fit {model} ({'; '.join(lists)}): choose another base or model, or list "
        "what is to be reinitialized (new) and what is to be left out (drop)."
    )


def _named(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return ", ".join(paths[:MOST_NAMED]) + more
