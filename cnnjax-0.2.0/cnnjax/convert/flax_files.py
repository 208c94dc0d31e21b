"""Trees of variables as Flax programs save them: msgpack, Orbax directories, npz with nested names.

A tree's leaves get their paths as names, without the collection: `stage1/block1/conv1/kernel` is
`params/stage1/block1/conv1/kernel` of our own networks and of any in Linen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError

FRAMEWORK = "flax"
COLLECTIONS = ("params", "batch_stats")
# Where a training state keeps the variables, the first first.
ENTRIES = ("variables", "model", "state", "train_state", "target", "default", "opt/target")
# What directories of Orbax hold, by its versions and ways to save.
ORBAX_FILES = ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "checkpoint")
MOST_LEAVES, DEEPEST = 200_000, 64


def read_msgpack(path: Path) -> Any:
    """Returns the tree of a file by `flax.serialization.to_bytes`; `choose` takes its variables."""
    import flax.serialization

    return flax.serialization.msgpack_restore(path.read_bytes())


def is_orbax(path: Path) -> bool:
    """Whether a directory is a checkpoint of Orbax, or a step that holds one."""
    return any((path / name).exists() for name in ORBAX_FILES) or _item(path) != path


def read_orbax(path: Path) -> Any:
    """Returns the tree of arrays that a directory of Orbax holds; `choose` takes its variables."""
    import orbax.checkpoint as ocp

    def as_array(leaf: Any) -> Any:
        return ocp.RestoreArgs(restore_type=np.ndarray)

    item = _item(path).absolute()
    with ocp.PyTreeCheckpointer() as reader:
        found = reader.metadata(item)
        tree = getattr(found, "item_metadata", found)
        tree = getattr(tree, "tree", tree)
        arguments = _mapped(tree, as_array)
        return reader.restore(item, restore_args=arguments)


def _item(path: Path) -> Path:
    """Returns the directory with the arrays: that of a step's `default` or only item, or itself."""
    inner = [path / name for name in ("default", "state", "params", "items")]
    if not (path / "_METADATA").exists():
        inner += sorted(each for each in path.iterdir() if each.is_dir())
        for each in inner:
            if (each / "_METADATA").exists() or (each / "checkpoint").is_file():
                return each
    return path


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(tree, Mapping):
        return {key: _mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_mapped(value, function) for value in tree]
    return function(tree)


def nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the tree whose leaves' paths are the names, as big_vision writes them into an npz."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        if len(parents) > DEEPEST:
            raise UserError(f"{name[:40]}... is nested too deeply.")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise UserError(f"{name} is a leaf within a leaf.")
        inner[last] = array
    return tree


def has_collections(names: Any) -> bool:
    """Whether names are paths with their collections, such as `params/head/kernel`."""
    return any("params" in name.split("/")[:-1] for name in names)


def choose(tree: Any, entry: str, note: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Returns `{path: array}` of the variables within a tree, without their collections.

    Args:
      tree: nested dictionaries.
      entry: keys with dots between them, to what holds the variables or the parameters; "" finds
        them: `params`, and `batch_stats` beside it, at the top or within `ENTRIES`.
      note: called with a line of text for what is taken, and what is not.

    Raises:
      UserError: there are none.
    """
    for key in entry.split(".") if entry else ():
        if not isinstance(tree, Mapping) or key not in tree:
            keys = ", ".join(map(str, tree)) if isinstance(tree, Mapping) else "none"
            raise UserError(f"it has no entry {entry!r}; its keys are {keys}.")
        tree = tree[key]
    if not isinstance(tree, Mapping):
        raise UserError(f"it holds no tree of variables, but a {type(tree).__name__}.")
    variables = tree if entry and "params" not in tree else _variables(tree, note)
    if not any(collection in variables for collection in COLLECTIONS):
        variables = {"params": variables}
    left_out = [str(key) for key in variables if key not in COLLECTIONS]
    if left_out:
        note(f"leaving out what is neither params nor batch_stats: {', '.join(left_out)}.")
    found: dict[str, np.ndarray] = {}
    for collection in COLLECTIONS:
        part = variables.get(collection) or {}
        while isinstance(part, Mapping) and collection in part:
            part = part[collection]
        for name, leaf in _leaves(part):
            if name in found:
                raise UserError(f"{name} is in params and in batch_stats.")
            found[name] = np.asarray(leaf)
    return found


def _variables(tree: Mapping[str, Any], note: Callable[[str], None]) -> Mapping[str, Any]:
    if "params" in tree:
        params = tree["params"]
        # A training state whose params are all variables.
        return params if isinstance(params, Mapping) and "params" in params else tree
    for key in ENTRIES:
        inner: Any = tree
        for part in key.split("/"):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping):
            note(f"taking the variables under {key.replace('/', '.')!r}.")
            return _variables(inner, note)
    return tree


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    waiting: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    count = 0
    while waiting:
        path, thing = waiting.pop()
        count += 1
        if count > MOST_LEAVES or len(path) > DEEPEST:
            raise UserError("its tree is too large or too deep for one of variables.")
        if isinstance(thing, Mapping):
            waiting += [((*path, str(key)), each) for key, each in reversed([*thing.items()])]
        elif isinstance(thing, list | tuple):
            waiting += [((*path, str(n)), each) for n, each in reversed([*enumerate(thing)])]
        elif hasattr(thing, "dtype") and np.asarray(thing).dtype.kind in "fiubV":
            yield "/".join(path), thing
