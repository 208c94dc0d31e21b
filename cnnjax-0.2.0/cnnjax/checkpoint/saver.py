"""Checkpoints: a training state and the host's progress, saved so that no kill loses them.

A run's `checkpoints/` holds a directory for each saved step:

    00001234/
      params/ batch_stats/ opt_state/ ema/   one Orbax directory for each item of the state
      progress/                              the same for its single arrays: step, key
      meta.json                              the caller's: data position, best value, config ...
      manifest.json                          digests, shapes and dtypes; written last

Each item is a tree of nested dicts of arrays, which plain Orbax reads too:
`orbax.checkpoint.StandardCheckpointer().restore(".../00001234/params")`. Empty items (`{}`, None)
are in the manifest only.

A step is written under a name that starts with `.tmp-`, made durable and renamed; it is deleted by
renaming first. So a kill at any moment leaves a whole step or none. Whatever happens to the files
later is found by their digests when they are read: a damaged step is skipped, with a message, for
the one before it. One run writes a directory at a time; any number may read it. In a run of several
processes all save together, each what only it holds (see `cnnjax.checkpoint.arrays`), and process 0
completes the step when all have written.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from cnnjax.checkpoint import arrays as storage
from cnnjax.checkpoint import directories, manifest
from cnnjax.checkpoint.arrays import PROGRESS, HostState
from cnnjax.devices import environment, processes
from cnnjax.errors import UserError, unknown_name
from cnnjax.trees import PyTree, named_leaves

Warn = Callable[[str], None]
Result = TypeVar("Result")


def save(
    directory: str | Path, state: PyTree, meta: Mapping[str, Any], *, sparse: bool = False
) -> Path:
    """Saves a state and returns when it is on the disk.

    Args:
      directory: where the steps are; created if needed.
      state: a dataclass or mapping of trees of arrays (any dtype; typed keys; one device or many)
        with an integer scalar `step`. Steps saved before under the same number are replaced.
      meta: what JSON can hold: read back as it is, but for tuples, which become lists.
      sparse: store of arrays that are mostly zero the other values and their places: see
        `cnnjax.checkpoint.packed`. They are read as all others.

    Returns:
      The directory of the step.

    Raises:
      UserError: `state` or `meta` cannot be saved, or the disk is full or not writable. Steps saved
        earlier are untouched.
    """
    copied = storage.copy_to_host(state)
    return _write_step(Path(directory), copied, _meta_text(meta), sparse=sparse)


class Saver:
    """Saves in the background, one step at a time, and deletes what need not be kept.

    `save` blocks only while the arrays are copied to the host (and while the save before it is
    still being written). What goes wrong in the background is raised by the next call of any
    method. Leave through `close` (or `with`): a process that just ends may lose the save under way.

    Attributes:
      directory: where the steps are.
      keep_last: number of latest steps to keep; None keeps all.
      keep_best: number of best steps to keep besides them.
      metric: the entry of `meta` that ranks steps; steps without it (or with NaN) are never best,
        and of equal ones the earliest is.
      lower_is_better: how `metric` ranks.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int | None = 2,
        keep_best: int = 1,
        metric: str | None = None,
        lower_is_better: bool = False,
    ):
        if keep_last is not None and keep_last < 1:
            raise UserError(f"keep_last is {keep_last}: keep at least 1, or None for all.")
        if keep_best < 0:
            raise UserError(f"keep_best is {keep_best}: it must be 0 or more.")
        self.directory = Path(directory)
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.metric = metric
        self.lower_is_better = lower_is_better
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, state: PyTree, meta: Mapping[str, Any]) -> None:
        """Copies `state` and `meta` and starts to write them; see `cnnjax.checkpoint.save`."""
        self.wait()
        self._thread = threading.Thread(
            target=self._write, args=(storage.copy_to_host(state), _meta_text(meta))
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last save is on the disk; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """The same as `wait`."""
        self.wait()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, state: HostState, meta: str) -> None:
        try:
            _write_step(self.directory, state, meta)
            self._delete_old(state.step)
        except Exception as error:
            if not threading.main_thread().is_alive():
                raise  # The program ended without `close`: nobody is left to tell.
            self._error = error

    def _delete_old(self, current: int) -> None:
        if self.keep_last is None or not processes.is_first():
            return
        # Later steps are from a future that this run did not come from: not ours to count.
        candidates = {
            s: path for s, path in directories.whole(self.directory).items() if s <= current
        }
        kept = sorted(candidates)[-self.keep_last :]
        if self.metric is not None:
            kept += _ranked(candidates, self.metric, self.lower_is_better)[: self.keep_best]
        for step, path in candidates.items():
            if step not in kept:
                directories.delete(path)


def steps(directory: str | Path) -> list[int]:
    """Returns the saved steps in rising order; damage is found only when they are read."""
    return list(directories.whole(Path(directory)))


def latest(directory: str | Path) -> int | None:
    """Returns the last saved step, or None."""
    return max(steps(directory), default=None)


def best(directory: str | Path, metric: str, *, lower_is_better: bool = False) -> int | None:
    """Returns the step whose meta has the best value of `metric`, or None if none has one."""
    return next(iter(_ranked(directories.whole(Path(directory)), metric, lower_is_better)), None)


def clean(directory: str | Path, *, after: int | None = None) -> list[str]:
    """Deletes what killed saves left behind; for the process that is about to write there.

    Args:
      directory: where the steps are; it need not exist.
      after: the step that the run resumes from. Later ones, which are damaged or belong to a future
        that will not come, are deleted too.

    Returns:
      The names of what was deleted.
    """
    directory = Path(directory)
    doomed = list(directory.glob(f"{directories.UNFINISHED}*"))
    whole = directories.whole(directory)
    for step, _, path in directories.listed(directory):
        if path != whole.get(step) or (after is not None and step > after):
            doomed.append(path)
    for path in doomed:
        directories.delete(path)
    return sorted(path.name for path in doomed)


def restore(
    directory: str | Path,
    abstract_state: PyTree,
    *,
    step: int | None = None,
    sharding: PyTree | None = None,
    warn: Warn = warnings.warn,
) -> tuple[PyTree, dict[str, Any]]:
    """Restores a state and its meta, exactly as saved, onto today's devices.

    Args:
      directory: where the steps are.
      abstract_state: a state of the structure, shapes and dtypes wanted: arrays or
        `jax.ShapeDtypeStruct`s (`jax.eval_shape` makes one). NumPy leaves are restored as NumPy.
      step: the step to restore; by default the newest that is undamaged.
      sharding: one sharding for all leaves, or a tree of them (a prefix of the state's will do). By
        default each leaf goes where the one in `abstract_state` is committed to, or else to the
        default device.
      warn: called with a line of text for each damaged step that is skipped, and for each change
        of versions, devices, flags or commit since the step was saved: what is restored is what
        was saved, but what is computed from it may differ.

    Returns:
      The state and its meta.

    Raises:
      UserError: there is no undamaged step (or the one asked for is damaged), or what was saved has
        other leaves, shapes or dtypes than `abstract_state`.
    """
    wanted = storage.items_of(abstract_state)
    tables = storage.tables_of(wanted)

    def read(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        content = manifest.read(path)
        storage.check_structure(f"checkpoint {path}", content["items"], tables)
        trees = {name: storage.read_item(path, content, name) for name in wanted if tables[name]}
        return trees, _read_meta(path, content), content

    trees, meta, content = directories.read_newest_together(Path(directory), step, warn, read)
    _warn_of_changes(content, warn)

    if sharding is not None:
        sharding = storage.items_of(jax.tree.broadcast(sharding, abstract_state))
    fields = {}
    for name, like in wanted.items():
        arrays, likes = named_leaves(trees.get(name)), named_leaves(like)
        places = jax.tree.leaves(sharding[name]) if sharding else [None] * len(likes)
        leaves = [
            storage.place(arrays[path], content["items"][name][path], leaf, place)
            for (path, leaf), place in zip(likes.items(), places, strict=True)
        ]
        fields[name] = jax.tree.unflatten(jax.tree.structure(like), leaves)
    fields |= fields.pop(PROGRESS)
    if isinstance(abstract_state, Mapping):
        return fields, meta
    return dataclasses.replace(abstract_state, **fields), meta


def restore_items(
    directory: str | Path,
    items: Iterable[str] = ("params", "batch_stats"),
    *,
    step: int | None = None,
    warn: Warn = warnings.warn,
) -> dict[str, Any]:
    """Reads some items of a saved state, knowing nothing of the rest, and touches no device.

    Args:
      directory: where the steps are.
      items: names of the state's fields that are trees.
      step: the step to read; by default the newest whose wanted items are undamaged.
      warn: called with a line of text for each damaged step that is skipped.

    Returns:
      `{item: tree}`: nested dicts of NumPy arrays (typed keys as their uint32 data), `{}` for an
      item without arrays and None for one that was None. Always with `progress`, and with `step`:
      the number of the step read.

    Raises:
      UserError: no such item, or no undamaged step.
    """
    names = (*items, PROGRESS)

    def read(path: Path) -> dict[str, Any]:
        content = manifest.read(path)
        for name in names:
            if name not in content["items"]:
                raise unknown_name(f"item of checkpoint {path}", name, content["items"])
        return {name: storage.read_item(path, content, name) for name in names}

    found = directories.read_newest(Path(directory), step, warn, read)
    return {**found, "step": int(found[PROGRESS]["step"])}


def read_meta(
    directory: str | Path, *, step: int | None = None, warn: Warn = warnings.warn
) -> dict[str, Any]:
    """Returns the meta of a step, by default the newest; arguments as for `restore_items`."""
    return directories.read_newest(
        Path(directory), step, warn, lambda path: _read_meta(path, manifest.read(path))
    )


def item_names(
    directory: str | Path, *, step: int | None = None, warn: Warn = warnings.warn
) -> list[str]:
    """Returns the items of a step, by default the newest; arguments as for `restore_items`."""
    return directories.read_newest(
        Path(directory), step, warn, lambda path: list(manifest.read(path)["items"])
    )


def check_space(directory: str | Path, bytes_needed: int) -> None:
    """Raises a UserError unless files can be written in `directory`, which is created, and fit.

    Call it before the first step; `bytes_needed` is `state_bytes(state)` for each step that will be
    kept, and one more that is written before an old one is deleted.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise UserError(
            f"cannot write checkpoints to {directory} ({error.strerror}): choose another directory."
        ) from None
    if free < bytes_needed:
        raise UserError(
            f"checkpoints in {directory} need {_megabytes(bytes_needed)}, and {_megabytes(free)} "
            "are free: free some space, choose another directory, or keep fewer steps."
        )


def state_bytes(state: PyTree) -> int:
    """Returns about how many bytes one saved step takes (arrays or `jax.ShapeDtypeStruct`s)."""
    # Compression gains nothing on trained weights; the allowance is for the small files.
    leaves = jax.tree.leaves(storage.items_of(state))
    return 2**20 + sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _write_step(directory: Path, state: HostState, meta: str, *, sparse: bool = False) -> Path:
    begun = []

    def fill(unfinished: Path) -> dict[str, Any]:
        storage.check_room(unfinished, state)
        begun.append(unfinished)
        items = storage.write_items(unfinished, state, sparse=sparse)
        (unfinished / "meta.json").write_text(meta + "\n")
        return {"environment": environment.describe(), "items": items}

    def create() -> str:
        try:
            return str(directories.create(directory, state.step, fill))
        finally:
            if not begun:
                storage.write_items(None, state)  # The others wait for where to write.

    if not processes.is_first():
        with contextlib.suppress(Exception):  # Process 0 tells what went wrong.
            storage.write_items(None, state)
    return Path(processes.by_first("save", create))


def _meta_text(meta: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(meta), indent=1)
    except (TypeError, ValueError) as error:
        raise UserError(f"meta cannot be saved as JSON: {error}; convert it first.") from None


def _read_meta(step_directory: Path, content: dict[str, Any]) -> dict[str, Any]:
    manifest.check_files(step_directory, content, ["meta.json"])
    return json.loads((step_directory / "meta.json").read_text())


def _ranked(paths: Mapping[int, Path], metric: str, lower_is_better: bool) -> list[int]:
    """Returns the steps that have the metric, best first and of equals the earliest first."""
    values = {}
    for step, path in paths.items():
        try:
            value = json.loads((path / "meta.json").read_text()).get(metric)
        except (OSError, ValueError):
            continue  # Damaged; said where it is read in earnest.
        if isinstance(value, int | float) and not math.isnan(value):
            values[step] = value
    sign = 1 if lower_is_better else -1
    return sorted(values, key=lambda step: (sign * values[step], step))


def _warn_of_changes(content: Mapping[str, Any], warn: Warn) -> None:
    if "environment" not in content:  # Saved before it was recorded.
        return
    for change in environment.changes(content["environment"], environment.describe()):
        warn(f"since the checkpoint was saved: {change}.")


def _megabytes(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"
