"""The device mesh, and how training arrays are sharded over it.

A mesh is written as axes with sizes, such as `data=4,model=2`:

- `data`: the batch is divided over it, everything else is copied.
- `fsdp`: the batch is divided over it, and so are parameters, their averages and the optimizer's
  state (Rajbhandari et al. 2020, arXiv 1910.02054, section 5, stage 3): a layer's kernel is
  gathered when it is used.
- `model`: kernels are divided over it by output channels or features, and with them the work of
  each layer (Krizhevsky 2014, arXiv 1404.5997, section 4; Shoeybi et al. 2019, arXiv 1909.08053).

Which dimension of which array an axis divides is one table of rules: pairs of a pattern over
parameter paths (see `cnnjax.trees`; the first that matches decides) and what to try in order, each
a pair (axis, dimension). A try fails, and the next is made, where the mesh has no such axis, the
array no such dimension, the axis does not divide it, or either is already in use. Whatever the
rules, training computes the same numbers up to rounding.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax import spec
from cnnjax.errors import UserError, unknown_name
from cnnjax.trees import from_named_leaves, label_by_path, named_leaves

PyTree = Any
Tries = Sequence[tuple[str, int]]
Rules = Sequence[tuple[str, Tries]]

BATCH_AXES = ("data", "fsdp")
PARAMETER_AXES = ("fsdp", "model")
# Kernels are `[height, width, in, out]` and `[in, out]`.
DEFAULT_RULES: Rules = (
    (".*kernel", (("model", -1), ("fsdp", -1), ("fsdp", -2))),
    (".*", (("fsdp", -1),)),
)
# Gathering an array costs a message however small it is, and these take no memory to speak of.
SMALL_BYTES = 16 * 2**10


def _mesh(*, data: int = 1, fsdp: int = 1, model: int = 1) -> dict[str, int]:
    """Divides the devices among these axes, in the order given; neighbors along the last."""
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size}: give a whole number of at least 1")
    return sizes


MESHES: spec.Registry = {"mesh": _mesh}


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `data=4,model=2` into `{"data": 4, "model": 2}`; "" into `{}`.

    In full it is written as `mesh(data=4, model=2)`.

    Raises:
      UserError: an unknown or doubled axis, or a size that is not a positive whole number.
    """
    item = spec.parse_one(text if "(" in text else f"mesh({text})", "mesh")
    sizes = spec.call(item, MESHES, "mesh")
    return {name: sizes[name] for name in item.keyword}


def count_devices(mesh: str, devices: int) -> int:
    """Returns how many devices the settings `mesh` and `devices` ask for; 0 where neither does.

    Raises:
      UserError: they contradict each other, or one of them is not valid.
    """
    if devices < 0:
        raise UserError(f"devices={devices}: give a positive number, or 0 for all.")
    if not mesh:
        return devices
    size = math.prod(parse_mesh(mesh).values())
    if devices not in (0, size):
        raise UserError(
            f"devices={devices} contradicts the mesh {mesh}, which takes {size}: give one of them."
        )
    return size


def make_mesh(axes: str | Mapping[str, int] | int | None = None) -> Mesh:
    """Returns the mesh over the first devices that JAX sees.

    Args:
      axes: such as `"data=4,model=2"`, or the same as a mapping; a number, or None for all devices,
        stands for the axis `data` alone. Neighbors along the last axis are neighboring devices.

    Returns:
      A mesh with Auto axes. It always has the axis `data`, if need be of size 1.

    Raises:
      UserError: not a mesh, or more devices than there are.
    """
    available = jax.devices()
    if not isinstance(axes, str | Mapping):
        sizes = {"data": axes or len(available)}
    else:
        text = axes if isinstance(axes, str) else ",".join(f"{k}={v}" for k, v in axes.items())
        sizes = parse_mesh(text) or {"data": len(available)}
    num_devices = math.prod(sizes.values())
    if num_devices > len(available):
        raise UserError(
            f"{num_devices} devices asked for by {_text(sizes)}, but JAX sees {len(available)} "
            f"{available[0].platform} device(s): ask for at most that many."
        )
    if jax.process_count() > 1 and num_devices < len(available):
        raise UserError(
            f"the mesh {_text(sizes)} takes {num_devices} of the {len(available)} devices of "
            f"{jax.process_count()} processes: each process needs its own, so use all of them."
        )
    sizes = sizes if "data" in sizes else {"data": 1, **sizes}
    # Auto axes: with Explicit ones, today's default of `jax.make_mesh`, Optax's losses fail.
    axis_types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        devices=available[:num_devices],
        axis_types=axis_types,
    )


def describe(mesh: Mesh) -> str:
    """Returns the mesh as it is written, such as `data=4,model=2`, without axes of size 1."""
    return _text({name: size for name, size in mesh.shape.items() if size > 1}) or "data=1"


def splits_parameters(mesh: Mesh) -> bool:
    """Whether the mesh has more than one device along an axis over which parameters are divided."""
    return any(mesh.shape.get(axis, 1) > 1 for axis in PARAMETER_AXES)


def num_batch_parts(mesh: Mesh) -> int:
    """Returns the number of parts into which the mesh divides a batch."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """Divides an array's first axis over the mesh's axes for the batch."""
    axes = tuple(axis for axis in mesh.axis_names if axis in BATCH_AXES)
    return PartitionSpec(axes if len(axes) > 1 else axes[0])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding that divides an array's first axis over the mesh's axes for the batch."""
    return NamedSharding(mesh, batch_spec(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that keeps a whole copy of an array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises a UserError unless the mesh can share a batch evenly."""
    parts = num_batch_parts(mesh)
    if batch_size % parts:
        nearest = max(1, round(batch_size / parts)) * parts
        over = f"{parts} devices" if parts == mesh.size else f"{parts} parts of {describe(mesh)}"
        raise UserError(
            f"batch size {batch_size} is not divisible by the {over}: "
            f"use {nearest}, or another number of devices."
        )


def _try(axis: str, dimension: int) -> tuple[str, int]:
    return axis, dimension


AXIS = "sharding axis"
TRIES: spec.Registry = {axis: functools.partial(_try, axis) for axis in PARAMETER_AXES}


def parse_rules(words: Sequence[str]) -> Rules:
    """Reads rules such as `head/kernel=fsdp:-2,model(-1)`; `PATTERN=` keeps whole copies.

    Raises:
      UserError: a word that is no such rule.
    """
    rules = []
    for word in words:
        *pattern, text = spec.split(word, "=", "sharding")
        if not pattern:
            raise UserError(
                f"sharding {word!r} has no pattern: write it as PATTERN=AXIS(DIMENSION),..., such "
                "as head/kernel=fsdp(-2),model(-1)."
            )
        tries = [spec.call(item, TRIES, AXIS) for item in spec.parse(text, AXIS)]
        rules.append(("=".join(pattern), tries))
    return rules


def state_shardings(state: PyTree, mesh: Mesh, rules: Rules = ()) -> PyTree:
    """Says where each array of a training state lies.

    Args:
      state: a `TrainState` of arrays or `jax.ShapeDtypeStruct`s. Frozen parameters lie as trained
        ones. A leaf of another field that ends in a parameter's path and has its shape lies as the
        parameter does: moments of optimizers and averages. All other leaves are copied to every
        device.
      mesh: the devices.
      rules: tried before `DEFAULT_RULES`, which leave parameters below 16 KiB whole.

    Returns:
      A tree of the state's structure with a `NamedSharding` for each leaf.

    Raises:
      UserError: a rule's pattern matches no parameter, or its axis is not one that may divide
        parameters.
    """
    for _, tries in rules:
        for axis, _ in tries:
            if axis not in PARAMETER_AXES:
                raise unknown_name("mesh axis for parameters", axis, PARAMETER_AXES)
    numbers = [(pattern, number) for number, (pattern, _) in enumerate(rules)]
    frozen = state.frozen.get("params", {})
    params = from_named_leaves(named_leaves(frozen) | named_leaves(state.params))
    matched = named_leaves(label_by_path(params, numbers, default=-1))
    specs = {}
    for path, leaf in named_leaves(params).items():
        if matched[path] >= 0:
            tries = rules[matched[path]][1]
        elif leaf.size * leaf.dtype.itemsize < SMALL_BYTES:
            tries = ()
        else:
            tries = _first_match(path)
        specs[path] = leaf.shape, _spec(leaf.shape, tries, mesh)

    def place(leaf_path: str, leaf: Any) -> NamedSharding:
        names = leaf_path.split("/")
        for start in range(len(names)):
            found = specs.get("/".join(names[start:]))
            if found and found[0] == leaf.shape:
                return NamedSharding(mesh, found[1])
        return replicated(mesh)

    leaves = [place(path, leaf) for path, leaf in named_leaves(state).items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def placed_form(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """Returns an array's shape and dtype with the sharding that it is to have."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_match(path: str) -> Tries:
    return next(tries for pattern, tries in DEFAULT_RULES if re.fullmatch(pattern, path))


def _spec(shape: tuple[int, ...], tries: Tries, mesh: Mesh) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    for axis, dimension in tries:
        size = mesh.shape.get(axis, 1)
        exists = -len(shape) <= dimension < len(shape)
        if size == 1 or axis in axes or not exists:
            continue
        if axes[dimension] is None and shape[dimension] % size == 0:
            axes[dimension] = axis
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def _text(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def summed_axis(mesh: Mesh) -> str | None:
    """Returns the name of the axis over which each device's step sums, if there is one."""
    return "data" if mesh.size > 1 and not splits_parameters(mesh) else None


def on_each_device(function: Callable, mesh: Mesh, in_specs: tuple) -> Callable:
    """Returns the function as each device's program for its part of the arguments.

    Its results are the same on each. Where the compiler divides the batch instead, and as far as
    tracing knows it may on one device too, no layout can be fixed: see `ops.once`.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False
    )


def placed_forms(tree: PyTree, mesh: Mesh) -> PyTree:
    """Shapes, dtypes and places of arrays; those that are not on the mesh go whole to each part."""

    def form(leaf: Any) -> jax.ShapeDtypeStruct:
        place = getattr(leaf, "sharding", None)
        if not isinstance(place, NamedSharding) or place.mesh != mesh:
            place = replicated(mesh)
        return placed_form(leaf, place)

    return jax.tree.map(form, tree)


def places(tree: PyTree) -> PyTree:
    """Returns the sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def bound_queue(results: PyTree, mesh: Mesh) -> None:
    """Waits for a step that spans CPU devices.

    Steps queued behind it would take the threads with which its devices wait for each other.
    """
    if mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(results)
