"""A training state as named items on the host, and each item as an Orbax directory.

An item is one field of the state: a tree, stored as nested dicts of arrays under the names that
`cnnjax.trees` gives its leaves. Fields that are single arrays (step, key) share the item
`progress`. Typed keys are stored as their uint32 data. Orbax stores neither empty trees nor arrays
without elements: these are in the manifest only.

Arrays of which every process has a whole copy are written by process 0. Arrays that are spread over
processes are written by Orbax in all of them, from copies in the memory of their hosts, without
being gathered anywhere; their digests are those of the parts.
"""

import contextlib
import dataclasses
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.checkpoint import manifest, packed
from cnnjax.checkpoint.manifest import Damaged
from cnnjax.devices import processes
from cnnjax.errors import UserError
from cnnjax.trees import PyTree, named_leaves

PROGRESS = "progress"
# path -> how the leaf is stored: `shape` and `dtype` of the array, `key_impl` if it is a typed key.
Table = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class HostState:
    """A copy of a state that no device and no later step can change.

    Attributes:
      step: the number of the step.
      contents: for each item its nested dicts of arrays and its table; (None, None) for None. They
        are NumPy arrays, but for those of which several processes hold parts.
    """

    step: int
    contents: dict[str, tuple[PyTree, Table | None]]

    @property
    def is_spread(self) -> bool:
        """Whether several processes hold parts of an array, so that all must write."""
        return any(map(_is_spread, jax.tree.leaves([tree for tree, _ in self.contents.values()])))


def items_of(state: PyTree) -> dict[str, PyTree]:
    """Returns `{item: tree or None}`, of a state or of anything that has its structure."""
    if dataclasses.is_dataclass(state):
        # Flax marks fields that are no arrays, such as functions, as no part of the tree; we mark
        # those that are not to be saved.
        marks = ("pytree_node", "saved")
        kept = [f for f in dataclasses.fields(state) if all(f.metadata.get(m, True) for m in marks)]
        fields = {field.name: getattr(state, field.name) for field in kept}
    else:
        fields = dict(state)
    if PROGRESS in fields:
        raise UserError(f"a state's field cannot be named {PROGRESS!r}: rename it.")
    single = {name: value for name, value in fields.items() if jax.tree_util.all_leaves([value])}
    trees = {name: value for name, value in fields.items() if name not in single}
    return {**trees, PROGRESS: single}


def tables_of(items: dict[str, PyTree]) -> dict[str, Table | None]:
    """Returns how each item's leaves (arrays or `jax.ShapeDtypeStruct`s) are stored.

    Raises:
      UserError: a leaf is no array, or two have the same path.
    """
    tables: dict[str, Table | None] = {}
    for name, item in items.items():
        leaves = named_leaves(item)
        if len(leaves) != len(jax.tree.leaves(item)):
            raise UserError(f"two leaves of the state's {name} have the same path: rename one.")
        tables[name] = None if item is None else {p: _stored(p, x) for p, x in leaves.items()}
    return tables


def copy_to_host(state: PyTree) -> HostState:
    """Copies a state to the host; device arrays may be sharded or replicated in any way.

    Raises:
      UserError: a leaf is no array, or there is no scalar `step`.
    """
    items = items_of(state)
    tables = tables_of(items)
    if "step" not in items[PROGRESS]:
        raise UserError("the state has no field `step` (an integer scalar): it cannot be saved.")
    for leaf in jax.tree.leaves(items):
        if isinstance(leaf, jax.Array) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf.copy_to_host_async()  # All transfers run at once; the copies below wait for each.
    copies: dict[str, Any] = {
        name: None if item is None else _nested(item) for name, item in items.items()
    }
    step = int(copies[PROGRESS]["step"])
    return HostState(step, {name: (copies[name], tables[name]) for name in items})


def write_items(
    directory: Path | None, state: HostState, *, sparse: bool = False
) -> dict[str, Table | None]:
    """Writes each item of a state to an Orbax directory of its own.

    Args:
      directory: where; where arrays are spread over processes all call this, process 0 says where
        (None: it cannot), and each writes the parts that it holds.
      state: what `copy_to_host` returned.
      sparse: write items as `cnnjax.checkpoint.packed` does, not by Orbax.

    Returns:
      The tables, with a digest a leaf: of the array as `sha256`, or of each of its `parts`.
    """
    is_spread = state.is_spread
    if is_spread:
        place = None if directory is None else str(directory.absolute())
        place = processes.from_first("write into", place)
        directory = None if place is None else Path(place)
    if directory is None:
        return {}
    items: dict[str, Table | None] = {}
    problem = None
    try:
        for name, (tree, table) in state.contents.items():
            where = directory / name
            items[name] = None if table is None else write_item(where, tree, table, sparse=sparse)
    except Exception as error:
        if not is_spread:
            raise
        problem = error
    return _with_parts_of_all(items, problem) if is_spread else items


def write_item(directory: Path, tree: PyTree, table: Table, *, sparse: bool = False) -> Table:
    """Writes what this process has of an item; returns its table with the digests of that."""
    import orbax.checkpoint as ocp

    leaves = named_leaves(tree)
    stored = _without_empty(tree)
    together = any(map(_is_spread, leaves.values()))
    if sparse and leaves and not together:
        if processes.is_first():
            packed.write(directory, leaves)
    elif stored and (together or processes.is_first()):
        logging.getLogger("absl").addFilter(_is_not_raised_too)
        with contextlib.closing(_checkpointer(together=together)) as writer:
            writer.save(directory.absolute(), args=ocp.args.StandardSave(stored))
        if processes.is_first():
            # It would make Orbax refuse to read the item anywhere else.
            (directory / "_sharding").unlink(missing_ok=True)
    digests = {
        path: {"parts": _digests_of_parts(leaf)}
        if _is_spread(leaf)
        else {"sha256": manifest.array_digest(leaf)}
        for path, leaf in leaves.items()
    }
    return {path: {**row, **digests[path]} for path, row in table.items()}


def _digests_of_parts(leaf: jax.Array) -> list[dict[str, Any]]:
    """Returns the place and digest of each part that this process is the first to hold."""
    return [
        {
            "index": [
                part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True)
            ],
            "sha256": manifest.array_digest(np.asarray(shard.data)),
        }
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


def _with_parts_of_all(
    items: dict[str, Table | None], problem: Exception | None
) -> dict[str, Table | None]:
    """Adds what the other processes have written, or raises what went wrong in one of them."""
    text = None if problem is None else f"{type(problem).__name__}: {problem}"
    reports = processes.exchange("written", {"items": items, "problem": text})
    if problem is not None:
        raise problem
    for process, report in enumerate(reports):
        if report["problem"] is not None:
            raise OSError(f"process {process} cannot write its part: {report['problem']}")
    for name, table in items.items():
        for path, row in (table or {}).items():
            if "parts" in row:
                row["parts"] = [
                    part for report in reports for part in report["items"][name][path]["parts"]
                ]
    return items


def check_room(directory: Path, state: HostState) -> None:
    """Raises the OSError of a full disk if a state cannot fit: Orbax finds out in many words."""
    size = sum(leaf.nbytes for tree, _ in state.contents.values() for leaf in jax.tree.leaves(tree))
    # Trained float32 weights compress by about 7%, and never by this much.
    if shutil.disk_usage(directory).free < 0.8 * size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_not_raised_too(record: logging.LogRecord) -> bool:
    """False for the tracebacks that Orbax logs of what it then raises: who called it tells it."""
    return not (record.filename == "future.py" and "raised an exception" in str(record.msg))


def read_item(step_directory: Path, content: dict[str, Any], name: str) -> PyTree:
    """Returns an item as nested dicts of NumPy arrays, or None if it was None.

    Args:
      step_directory: the directory of the step.
      content: its manifest.
      name: the item.

    Raises:
      Damaged: what is read is not what was saved.
    """

    table = content["items"][name]
    if table is None:
        return None
    manifest.check_files(step_directory, content, [name])
    empty = {path: row for path, row in table.items() if 0 in row["shape"]}
    tree: dict[str, Any] = {}
    if (file := step_directory / name / packed.NAME).exists():
        for path, array in packed.read(file, table).items():
            _insert(tree, path.split("/"), array)
    elif len(empty) < len(table):
        try:
            with contextlib.closing(_checkpointer()) as reader:
                tree = reader.restore((step_directory / name).absolute())
        except Exception as error:  # Of many types, none of them documented.
            text = str(error).partition("\n")[0]
            raise Damaged(
                f"Orbax cannot read its {name} ({type(error).__name__}: {text})"
            ) from None
    for path, row in empty.items():
        _insert(tree, path.split("/"), np.zeros(row["shape"], jnp.dtype(row["dtype"])))

    leaves = named_leaves(tree)
    for path, row in table.items():
        leaf = leaves.get(path)
        if leaf is None:
            raise Damaged(f"its array {name}/{path} is missing")
        form = (list(leaf.shape), str(leaf.dtype))
        if form != (row["shape"], row["dtype"]) or not _has_digests(leaf, row):
            raise Damaged(f"its array {name}/{path} is not the one that was saved")
    return tree


def check_structure(
    source: str, saved: dict[str, Table | None], wanted: dict[str, Table | None]
) -> None:
    """Checks that a saved state has the leaves, shapes and dtypes of the state wanted.

    Args:
      source: what was saved, for the message.
      saved: the tables of the manifest.
      wanted: the tables of the state to restore.

    Raises:
      UserError: names what is missing, extra and different.
    """
    there, here = _forms(saved), _forms(wanted)
    different = [
        f"{path} ({there[path]} in it, {here[path]} wanted)"
        for path in here
        if path in there and there[path] != here[path]
    ]
    problems = [
        _listed("Missing in it", [path for path in here if path not in there]),
        _listed("Only in it", [path for path in there if path not in here]),
        _listed("Different", different),
    ]
    if any(problems):
        raise UserError(
            f"{source} is of another model or optimizer. {' '.join(filter(None, problems))} "
            "Restore it with the settings it was saved with."
        )


def place(array: np.ndarray, row: dict[str, Any], like: Any, sharding: Any) -> Any:
    """Returns a stored array in the form of `like`: typed key or array, host or device.

    Args:
      array: as stored.
      row: its row of the table.
      like: the leaf of the abstract state.
      sharding: where it goes; None for where `like` is committed to, or else the default device.
    """
    if isinstance(like, np.ndarray):
        return array
    if sharding is None and getattr(like, "committed", True):
        sharding = getattr(like, "sharding", None)
    if "key_impl" in row:
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=row["key_impl"])
        return key if sharding is None else processes.put(key, sharding)
    leaf = jnp.asarray(array) if sharding is None else processes.put(array, sharding)
    if leaf.dtype != array.dtype:
        raise UserError(
            f"a leaf saved as {array.dtype} cannot be restored to a device: enable jax_enable_x64."
        )
    return leaf


def _checkpointer(*, together: bool = False) -> Any:
    """Returns Orbax for this process alone, or for all.

    Told nothing, Orbax lets processes wait for each other on the devices, in the middle of whatever
    step they compute; told which processes take part, it uses JAX's coordination service.
    """
    import orbax.checkpoint as ocp

    options = ocp.options.MultiprocessingOptions()
    if processes.count() > 1:
        me = processes.index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=0 if together else me,
            active_processes=set(range(processes.count())) if together else {me},
            barrier_sync_key_prefix="all" if together else f"process{me}",
        )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _stored(path: str, leaf: Any) -> dict[str, Any]:
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise UserError(
            f"the state's leaf {path!r} is a {type(leaf).__name__}: make it an array (jnp.asarray)."
        )
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    impl: list[str] = []

    def data(key: jax.Array) -> jax.Array:
        impl.append(str(jax.random.key_impl(key)))
        return jax.random.key_data(key)

    # Abstractly, because `leaf` may be a ShapeDtypeStruct.
    form = jax.eval_shape(data, leaf)
    return {"shape": list(form.shape), "dtype": str(form.dtype), "key_impl": impl[0]}


def _is_spread(leaf: Any) -> bool:
    """Whether several processes hold different parts of an array."""
    is_array = isinstance(leaf, jax.Array)
    return is_array and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _has_digests(array: np.ndarray, row: dict[str, Any]) -> bool:
    """Whether an array as read has the digests of its row."""
    if "parts" not in row:
        return manifest.array_digest(array) == row["sha256"]
    size = 0
    for part in row["parts"]:
        values = array[tuple(slice(start, stop) for start, stop in part["index"])]
        if manifest.array_digest(values) != part["sha256"]:
            return False
        size += values.size
    return size == array.size


def _host_copy(leaf: Any) -> np.ndarray | jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    # A copy in every case: a view would keep a step on the CPU from reusing the donated buffer, and
    # a NumPy leaf may be changed by its owner.
    if _is_spread(leaf):
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("pinned_host"))
    return np.array(leaf, order="C")


def _nested(tree: PyTree) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        names = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
        _insert(nested, names, _host_copy(leaf))
    return nested


def _insert(tree: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        tree = tree.setdefault(name, {})
    tree[names[-1]] = value


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in tree.items():
        value = _without_empty(value) if isinstance(value, dict) else value
        if value if isinstance(value, dict) else value.size:
            kept[name] = value
    return kept


def _forms(tables: dict[str, Table | None]) -> dict[str, str]:
    forms = {}
    for name, table in tables.items():
        for path, row in (table or {}).items():
            shape = ",".join(map(str, row["shape"]))
            key = f" key of {row['key_impl']}" if "key_impl" in row else ""
            forms[f"{name}/{path}"] = f"{row['dtype']}[{shape}]{key}"
    return forms


def _listed(title: str, names: list[str], most: int = 8) -> str:
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{title}: {', '.join(names[:most])}{more}."
