"""Which channels of a network can only be removed together, derived from its traced program.

A residual sum, a depthwise convolution, a normalization or a gate ties channels of several layers
to each other; concatenating, flattening and shuffling put them elsewhere. All this is read from the
operations of `model.apply`, so it holds for any network, and is no table of families. Dependency
graphs for pruning: Fang et al. 2023, "DepGraph" (arXiv 2301.12900).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import ops
from cnnjax.compress import program
from cnnjax.compress.labels import FIXED, Classes, Labels
from cnnjax.models.interceptors import intercept_methods
from cnnjax.models.summary import abstract_variables
from cnnjax.trees import from_named_leaves, named_leaves

PyTree = Any
# A leaf of the variables, such as `params/conv1/kernel`, and an axis of it.
Place = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Couplings:
    """The channels of a network in sets that are removed together.

    Attributes:
      channels: place -> the set that each entry of the axis belongs to; 0 for what stays.
      removable: the sets that may be removed, in the order of their layers.
    """

    channels: Mapping[Place, np.ndarray]
    removable: tuple[int, ...]

    @functools.cached_property
    def places(self) -> Mapping[int, tuple[tuple[Place, tuple[int, ...]], ...]]:
        """Set -> the places where it is, with the entries of each."""
        found: dict[int, list[tuple[Place, tuple[int, ...]]]] = {one: [] for one in self.removable}
        for place, sets in self.channels.items():
            entries = collections.defaultdict(list)
            for entry, one in enumerate(sets.tolist()):
                entries[one].append(entry)
            for one, where in entries.items():
                if one in found:
                    found[one].append((place, tuple(where)))
        return {one: tuple(where) for one, where in found.items()}

    def producers(self, one: int) -> list[tuple[Place, tuple[int, ...]]]:
        """Returns the kernels that compute a set of channels, with the entries of their outputs."""
        return [(place, entries) for place, entries in self.places[one] if self.is_output(place)]

    def is_output(self, place: Place) -> bool:
        """Whether a place is the outputs of a kernel: in Linen, the last of several axes."""
        path, axis = place
        return axis > 0 and (path, axis + 1) not in self.channels and axis == self._last[path]

    @functools.cached_property
    def _last(self) -> Mapping[str, int]:
        last: dict[str, int] = {}
        for path, axis in self.channels:
            last[path] = max(axis, last.get(path, 0))
        return last

    @functools.cached_property
    def layers(self) -> Mapping[tuple[Place, ...], tuple[int, ...]]:
        """The outputs of coupled kernels -> the sets of channels that they compute."""
        found: dict[tuple[Place, ...], list[int]] = {}
        for one in self.removable:
            kernels = tuple(sorted({place for place, _ in self.producers(one)}))
            found.setdefault(kernels, []).append(one)
        return {kernels: tuple(sets) for kernels, sets in found.items()}


def trace(model: Any, image_shape: Sequence[int]) -> Couplings:
    """Returns the couplings of a network for an image `[height, width, channels]`.

    Nothing is computed. What an operation that is not known touches stays as it is.
    """
    variables = abstract_variables(model, image_shape)
    leaves = named_leaves(variables)
    classes = Classes()
    inputs: dict[str, Labels] = {
        path: {axis: classes.new(size) for axis, size in enumerate(leaf.shape) if size > 1}
        for path, leaf in leaves.items()
    }
    used = _follow(model, variables, inputs, image_shape, classes, train=False)
    if not all(used.values()):  # Such as auxiliary heads, which only training asks.
        _follow(model, variables, inputs, image_shape, classes, train=True)
    channels = {
        (path, axis): classes.roots(numbers)
        for path, labels in inputs.items()
        for axis, numbers in labels.items()
    }
    computed: dict[int, None] = {}
    for (path, axis), sets in channels.items():
        if path.startswith("params/") and 0 < axis == len(leaves[path].shape) - 1:
            computed |= dict.fromkeys(sets.tolist())
    computed.pop(FIXED, None)
    return Couplings(channels, tuple(computed))


def _follow(
    model: Any,
    variables: PyTree,
    inputs: Mapping[str, Labels],
    image_shape: Sequence[int],
    classes: Classes,
    *,
    train: bool,
) -> dict[str, bool]:
    """Traces a model and follows its channels; returns which of its leaves the program reads."""

    def apply(variables: PyTree, image: jax.Array) -> Any:
        if not train:
            return model.apply(variables, image, train=False)
        rngs = {"dropout": jax.random.key(0)}
        return model.apply(variables, image, train=True, rngs=rngs, mutable=["batch_stats"])[0]

    image = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    with ops.lowering("lax"):
        closed = jax.make_jaxpr(apply)(variables, image)
    of_image = {3: np.zeros(image_shape[-1], np.int64)} if image_shape[-1] > 1 else {}
    for labels in program.follow(closed, [*inputs.values(), of_image], classes):
        for numbers in labels.values():
            classes.fix(numbers)
    read = {id(atom) for equation in closed.jaxpr.eqns for atom in equation.invars}
    return {
        path: id(variable) in read
        for path, variable in zip(inputs, closed.jaxpr.invars, strict=False)
    }


def kept_entries(couplings: Couplings, removed: set[int]) -> dict[Place, np.ndarray]:
    """Returns, of each place that loses channels, the entries that stay."""
    gone = np.array(sorted(removed), np.int64)
    kept = {place: ~np.isin(sets, gone) for place, sets in couplings.channels.items()}
    return {place: np.flatnonzero(stays) for place, stays in kept.items() if not stays.all()}


def masked(variables: PyTree, couplings: Couplings, removed: set[int]) -> PyTree:
    """Returns the variables with the parameters of these channels at zero; all shapes stay."""
    kept = kept_entries(couplings, removed)
    leaves = {path: np.array(leaf) for path, leaf in named_leaves(variables).items()}
    for (path, axis), entries in kept.items():
        if path.startswith("params/"):
            stays = np.zeros(leaves[path].shape[axis], bool)
            stays[entries] = True
            spread = [-1 if a == axis else 1 for a in range(leaves[path].ndim)]
            leaves[path] = np.where(stays.reshape(spread), leaves[path], 0).astype(
                leaves[path].dtype
            )
    return {**variables, **from_named_leaves(leaves)}


def without_channels(variables: PyTree, couplings: Couplings, removed: set[int]) -> PyTree:
    """Returns the variables without these channels."""
    leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(variables).items()}
    for (path, axis), entries in kept_entries(couplings, removed).items():
        leaves[path] = leaves[path].take(entries, axis)
    return {**variables, **from_named_leaves(leaves)}


def layer_of(path: str) -> str:
    """Returns the path of the layer that a leaf such as `params/conv1/kernel` belongs to."""
    return path.partition("/")[2].rpartition("/")[0]


class Call(NamedTuple):
    """A module as a network calls it: its shapes are `[batch, ..., channels]`, of one example."""

    module: nn.Module
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


def calls(model: Any, image_shape: Sequence[int]) -> dict[str, Call]:
    """Returns the modules that a network calls with an array, by path; computes nothing."""
    found: dict[str, Call] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        is_call = context.method_name == "__call__" and args and hasattr(args[0], "shape")
        if is_call and hasattr(output, "shape"):
            path = "/".join(context.module.path)
            found[path] = Call(context.module, args[0].shape, output.shape)
        return output

    with intercept_methods(note):
        abstract_variables(model, image_shape)
    return found
