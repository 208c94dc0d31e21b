"""Weights of another framework to the variables of a model, and back, one tensor for one leaf."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import trees
from cnnjax.convert import flax_files, names_keras, names_tensors, names_torch, prefixes
from cnnjax.convert.names import Entry, Names, entries
from cnnjax.devices import backend
from cnnjax.errors import UserError, unknown_name
from cnnjax.models.fields import with_fields

Arrays = dict[str, np.ndarray]

FRAMEWORKS = (*names_torch.FRAMEWORKS, names_keras.FRAMEWORK, *names_tensors.FRAMEWORKS)
# A path of a head's leaf, without its collection; auxiliary heads too.
HEAD = r"(?:.*/)?head(?:_distilled)?/\w+"
MOST_LINES = 50
# Fields of models whose auxiliary heads published weights have.
AUXILIARY = ("auxiliary_heads", "auxiliary_head")


class Mismatch(UserError):
    """Weights that do not fit a model.

    Attributes:
      classes: that the file's head is for, where nothing else is wrong; else None.
      no_head: whether the head is missing, and nothing else is wrong.
    """

    classes: int | None = None
    no_head: bool = False


def find_names(model: nn.Module, framework: str | Names) -> Names:
    """Returns the names of a framework for a model; a table of your own is returned as it is.

    Raises:
      UserError: unknown framework, or it has no such network.
    """
    if isinstance(framework, Names):
        return framework
    if framework == names_keras.FRAMEWORK:
        return names_keras.names_for(model)
    if framework in names_tensors.FRAMEWORKS:
        return names_tensors.names_for(model, framework)
    if framework in FRAMEWORKS:
        return names_torch.names_for(model, framework)
    raise unknown_name("framework", framework, FRAMEWORKS)


def frameworks_for(model: nn.Module) -> list[str]:
    """Returns the frameworks that have the network of `model`, perhaps with other arguments."""
    others = [names_keras.FRAMEWORK] if names_keras.has(model) else []
    others += [names_tensors.SLIM_FRAMEWORK] if names_tensors.has(model) else []
    return [*names_torch.frameworks_for(model), *others, flax_files.FRAMEWORK]


def to_cnnjax(
    arrays: Mapping[str, np.ndarray],
    model: nn.Module,
    image_shape: Sequence[int],
    *,
    framework: str | Names = "torchvision",
    ignore: Sequence[str] = (),
    new_head_key: jax.Array | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> dict[str, Any]:
    """Returns the variables of `model` that hold another framework's weights.

    Every tensor is used once and every leaf is filled once, shapes and all. A prefix of all names,
    such as a wrapper's `module.`, is dropped (see `prefixes`), and so are counters: integers that
    the model has no place for. Padding, epsilons and momentum are the model's own fields, whose
    defaults are those of the framework's network; the order in which a framework flattens images
    is part of the layout.

    Args:
      arrays: `{name: array}` in the framework's layout, as `cnnjax.convert.read` returns; floating
        point of any width.
      model: a Linen module with the contract of `cnnjax.models`.
      image_shape: `[height, width, channels]` of its images.
      framework: `torchvision`, `timm` or `pytorch` (see `cnnjax.convert.names_torch`), `keras` (see
        `cnnjax.convert.names_keras`), `tf_slim` or `flax` (see `cnnjax.convert.names_tensors`), or
        a table.
      ignore: regular expressions of tensor names that are left out on purpose.
      new_head_key: draw the heads from this key, and leave out those of `arrays`: for another
        number of classes.
      note: called with a line of text when a prefix or counters are dropped, or auxiliary heads
        that the model could have and has not.

    Returns:
      `{"params": ..., "batch_stats": ...}` of NumPy arrays with the model's dtypes; `batch_stats`
      is `{}` where the model has none.

    Raises:
      Mismatch: one error that lists every tensor that is missing, left over, or of another shape
        or kind.
      UserError: a pattern of `ignore` that matches nothing, or the framework has no such network.
    """
    names = find_names(model, framework)
    table = entries(model, image_shape, names)
    wanted = [entry for entry in table if new_head_key is None or not is_head(entry)]
    arrays = _unwrapped(arrays, names, wanted, ignore, note)
    left_out: set[str] = set()
    if new_head_key is not None:
        left_out |= {entry.name for entry in _with_heads(model, image_shape, names, table)}
        left_out -= {entry.name for entry in wanted}
    arrays = {k: v for k, v in arrays.items() if k not in left_out}
    arrays = _without_auxiliary(arrays, model, image_shape, names, wanted, note)
    problems = _problems(arrays, wanted)
    if problems:
        error = Mismatch(_report(problems, names.framework, type(model).__name__))
        error.classes, error.no_head = _of_heads(arrays, wanted)
        raise error
    leaves = {
        entry.path: entry.layout.to_ours(arrays[entry.name], entry.shape).astype(entry.dtype)
        for entry in wanted
    }
    if new_head_key is not None:
        leaves |= _new_heads(model, image_shape, new_head_key)
    return {"params": {}, "batch_stats": {}} | trees.from_named_leaves(leaves)


def from_cnnjax(
    variables: Mapping[str, Any],
    model: nn.Module,
    image_shape: Sequence[int],
    *,
    framework: str | Names = "torchvision",
) -> Arrays:
    """Returns `{name: array}` with the names and layouts of another framework.

    Args:
      variables: `params` and, where the model has them, `batch_stats`.
      model, image_shape, framework: as for `to_cnnjax`.

    Raises:
      UserError: the variables are not those of the model, or the framework has no such network.
    """
    names = find_names(model, framework)
    table = entries(model, image_shape, names)
    leaves = trees.named_leaves(dict(variables))
    problems = [f"missing leaf {entry.path}" for entry in table if entry.path not in leaves] + [
        f"leaf {path} is not one of the model's" for path in leaves.keys() - _paths(table)
    ]
    for entry in table:
        if entry.path in leaves and tuple(leaves[entry.path].shape) != entry.shape:
            shape = tuple(leaves[entry.path].shape)
            problems.append(f"leaf {entry.path} has shape {shape}, the model's has {entry.shape}")
    if problems:
        raise UserError(_report(sorted(problems), names.framework, type(model).__name__))
    arrays = {entry.name: entry.layout.to_theirs(np.asarray(leaves[entry.path])) for entry in table}
    arrays |= _counters(arrays, names)
    arrays |= {name: value(image_shape[-1]) for name, value in names.constants.items()}
    if names.layers:
        places = {layer: place for place, layer in enumerate(names.layers)}
        order = sorted(arrays, key=lambda name: places[name.rpartition(names.separator)[0]])
        arrays = {name: arrays[name] for name in order}
    return arrays


def is_head(entry: Entry) -> bool:
    """Whether an entry belongs to the last layer, whose size is the number of classes."""
    return re.fullmatch(HEAD, entry.path.partition("/")[2]) is not None


def _paths(table: Sequence[Entry]) -> set[str]:
    return {entry.path for entry in table}


def _unwrapped(
    arrays: Mapping[str, np.ndarray],
    names: Names,
    wanted: Sequence[Entry],
    ignore: Sequence[str],
    note: Callable[[str], None],
) -> Arrays:
    """Returns the arrays without what is left out, and their names without a common prefix.

    A pattern of `ignore` may be of a name with the prefix or without it: messages have the latter.
    """
    unmatched = set(ignore)
    needed = {entry.name for entry in wanted}

    def without_ignored(arrays: Mapping[str, np.ndarray]) -> Arrays:
        matched = {pattern: _matching(pattern, arrays) for pattern in ignore}
        unmatched.difference_update(pattern for pattern, found in matched.items() if found)
        left_out: set[str] = set().union(*matched.values())
        return {name: array for name, array in arrays.items() if name not in left_out}

    kept = without_ignored(arrays)
    counters = [
        name for name in kept if name not in needed and prefixes.is_counter(np.asarray(kept[name]))
    ]
    if counters:
        note(f"dropping what counts and is no weight: {prefixes.listed(counters)}.")
    kept = {name: array for name, array in kept.items() if name not in counters}
    prefix = prefixes.common_prefix(kept, needed, names.separator)
    if prefix:
        note(f"dropping the prefix {prefix!r} of the names.")
        kept = without_ignored(prefixes.without_prefix(kept, prefix))
    kept = {name: array for name, array in kept.items() if not re.fullmatch(names.ignored, name)}
    for pattern in ignore:
        if pattern in unmatched:
            raise unknown_name("pattern of tensors to ignore (it matches nothing)", pattern, kept)
    return kept


def _without_auxiliary(
    arrays: Arrays,
    model: nn.Module,
    image_shape: Sequence[int],
    names: Names,
    wanted: Sequence[Entry],
    note: Callable[[str], None],
) -> Arrays:
    """Returns the arrays without those of auxiliary heads that the model is built without."""
    field = next((name for name in AUXILIARY if getattr(model, name, None) is False), "")
    extra = arrays.keys() - {entry.name for entry in wanted}
    if not field or not extra or getattr(model, "num_classes", None) is None:
        return arrays
    # They need images of the published size.
    shape = (*(max(side, 299) for side in image_shape[:2]), image_shape[-1])
    try:
        whole = entries(with_fields(model, **{field: True}), shape, names)
    except UserError:
        return arrays
    heads = extra & {entry.name for entry in whole}
    if heads:
        note(
            f"dropping the auxiliary heads ({len(heads)} tensors), which act in training alone: "
            f"build the model with {field}=True to keep them (--model-arguments {field}=True)."
        )
    return {name: array for name, array in arrays.items() if name not in heads}


def _of_heads(arrays: Arrays, wanted: Sequence[Entry]) -> tuple[int | None, bool]:
    """Returns the classes of the file's heads, and whether it has none, if all else is right."""
    heads = [entry for entry in wanted if is_head(entry)]
    others = [entry for entry in wanted if not is_head(entry)]
    names = {entry.name for entry in heads}
    if not heads or _problems({k: v for k, v in arrays.items() if k not in names}, others):
        return None, False
    return classes_of(arrays, wanted), not any(entry.name in arrays for entry in heads)


def classes_of(arrays: Mapping[str, np.ndarray], table: Sequence[Entry]) -> int | None:
    """Returns for how many classes the heads among the arrays are; None if some are missing."""
    heads = [entry for entry in table if is_head(entry)]
    sizes = {
        size
        for entry in heads
        if entry.name in arrays
        for size in arrays[entry.name].shape
        if entry.layout.their_shape((*entry.shape[:-1], size)) == arrays[entry.name].shape
    }
    whole = all(entry.name in arrays for entry in heads)
    return sizes.pop() if whole and len(sizes) == 1 else None


def _matching(pattern: str, names: Mapping[str, Any]) -> set[str]:
    try:
        return {name for name in names if re.fullmatch(pattern, name)}
    except re.error as error:
        raise UserError(f"ignore={pattern!r} is no regular expression: {error}.") from None


def _with_heads(
    model: nn.Module, image_shape: Sequence[int], names: Names, table: list[Entry]
) -> list[Entry]:
    """Returns the entries of the heads, which a model without classes has not got."""
    if getattr(model, "num_classes", 1) is None:
        table = entries(model.clone(num_classes=1), image_shape, names)
    return [entry for entry in table if is_head(entry)]


def _new_heads(model: nn.Module, image_shape: Sequence[int], key: jax.Array) -> dict[str, Any]:
    def initialize(key: jax.Array) -> dict[str, jax.Array]:
        variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
        leaves = trees.named_leaves(variables)
        return {k: v for k, v in leaves.items() if re.fullmatch(HEAD, k.partition("/")[2])}

    # Compiled, so that the rest of the network is not computed.
    return {path: np.asarray(leaf) for path, leaf in backend.jit_once(initialize)(key).items()}


def _problems(arrays: Mapping[str, np.ndarray], table: Sequence[Entry]) -> list[str]:
    """Returns a line for each tensor that is missing, left over, or not as it should be."""
    # Weights before statistics: where both are wrong, they tell more.
    table = sorted(table, key=lambda entry: entry.path.startswith("batch_stats"))
    by_name = {entry.name: entry for entry in table}
    missing = [_missing(entry) for entry in table if entry.name not in arrays]
    extra = [
        f"left over: {name} {list(array.shape)}, which the model has no place for"
        for name, array in arrays.items()
        if name not in by_name
    ]
    wrong = []
    for name, entry in by_name.items():
        array = arrays.get(name)
        if array is None:
            continue
        if tuple(array.shape) != entry.their_shape:
            wrong.append(_wrong_shape(entry, tuple(array.shape)))
        elif not jnp.issubdtype(array.dtype, np.floating):
            wrong.append(f"dtype: {name} is {array.dtype}, not floating point")
    return [*wrong, *missing, *extra]


def _missing(entry: Entry) -> str:
    kind = "the running statistics of a BatchNorm" if entry.path.startswith("batch_stats") else ""
    return (
        f"missing: {entry.name} {list(entry.their_shape)}, {kind or 'the weights'} of {entry.path}"
    )


def _wrong_shape(entry: Entry, shape: tuple[int, ...]) -> str:
    wanted = entry.their_shape
    line = f"shape: {entry.name} is {list(shape)}, wanted {list(wanted)}"
    features, here = entry.shape[:-1], entry.shape[-1]
    fitting = [size for size in shape if entry.layout.their_shape((*features, size)) == shape]
    if is_head(entry) and fitting:
        return (
            f"classes: {entry.name} is for {fitting[0]} classes, the model for {here}: build "
            f"the model with num_classes={fitting[0]}, or ask for a new head"
        )
    if sorted(shape) == sorted(wanted):
        line += ": the same sizes in another order, so it is transposed"
    return line


def _report(problems: Sequence[str], framework: str, model: str) -> str:
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = list(problems[:MOST_LINES])
    if len(problems) > MOST_LINES:
        lines.append(f"and {len(problems) - MOST_LINES} more")
    listed = "".join(f"\n  {line}" for line in lines)
    return f"the weights are not {framework}'s of this {model}, {count}:{listed}"


def _counters(arrays: Arrays, names: Names) -> Arrays:
    """Returns the integer zeros that the framework keeps with its running statistics."""
    if names.counters is None:
        return {}
    leaf, counter = (f"{names.separator}{name}" for name in names.counters)
    return {
        name.removesuffix(leaf) + counter: np.zeros((), np.int64)
        for name in arrays
        if name.endswith(leaf)
    }
