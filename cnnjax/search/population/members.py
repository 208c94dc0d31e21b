"""Trees of the members of a population, stacked: the first axis of every leaf is the member.

What a mesh of several devices holds lies in slots: as many for each device, of which the first are
in use. `Layout` says which member lies where, so that members that have ended take no time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.errors import UserError
from cnnjax.trees import named_leaves

PyTree = Any
AXIS = "member"


def stack(members: Sequence[PyTree]) -> PyTree:
    """Returns the trees as one, every leaf `[members, ...]`.

    Raises:
      UserError: there are none, or two differ in structure, shapes or dtypes.
    """
    if not members:
        raise UserError("a population of 0 members: give at least 1.")
    first = _forms(members[0])
    for number, each in enumerate(members[1:], 1):
        forms = _forms(each)
        structures = {str(jax.tree.structure(tree)) for tree in (members[0], each)}
        if forms != first or len(structures) > 1:
            names = [name for name in {**first, **forms} if first.get(name) != forms.get(name)]
            what = "in structure"
            if names:
                found = [_shown(known.get(names[0])) for known in (first, forms)]
                what = f"at {names[0]}: {found[0]} and {found[1]}"
            raise UserError(
                f"members 0 and {number} differ {what}: the members of one program have the same "
                "arrays. Make their states under jax.jit, of traced numbers, or train such "
                "settings apart, as cnnjax search does."
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def take(stacked: PyTree, indices: Any) -> PyTree:
    """Returns the members of these numbers: an array of them stacked, one number as it is alone."""
    return jax.tree.map(lambda leaf: leaf[indices], stacked)


def _forms(tree: PyTree) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {name: (jnp.shape(leaf), leaf.dtype) for name, leaf in named_leaves(tree).items()}


def _shown(form: tuple[tuple[int, ...], Any] | None) -> str:
    return "nothing" if form is None else f"{form[1]} {list(form[0])}"


def member_mesh(devices: int, num_members: int) -> Mesh:
    """Returns a mesh whose axis `member` divides the members among devices.

    Args:
      devices: how many; 0: all that JAX sees, as far as there are members for them.
      num_members: of the population.

    Raises:
      UserError: no members, more devices than members, or than there are.
    """
    available = jax.devices()
    if num_members < 1:
        raise UserError(f"a population of {num_members} members: give at least 1.")
    if devices < 0:
        raise UserError(f"{devices} devices: give a positive number, or 0 for all.")
    if devices > num_members:
        raise UserError(
            f"{devices} devices for {num_members} members: each device has at least one, so give "
            f"at most {num_members} devices."
        )
    if devices > len(available):
        raise UserError(
            f"{devices} devices asked for, but JAX sees {len(available)} "
            f"{available[0].platform} device(s): ask for at most that many."
        )
    count = devices or min(len(available), num_members)
    types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((count,), (AXIS,), devices=available[:count], axis_types=types)


class Layout(NamedTuple):
    """Where members lie.

    Attributes:
      slots: int `[members]`: the slot of each.
      width: slots in all, as many on each device.
      counts: int32 `[devices]`: the slots in use of each device, its first ones.
    """

    slots: np.ndarray
    width: int
    counts: np.ndarray

    @property
    def fill(self) -> np.ndarray:
        """Int `[width]`: for each slot its member; for one that is not in use any."""
        filled = np.zeros(self.width, np.int32)
        filled[self.slots] = np.arange(len(self.slots))
        return filled


def layout(num_members: int, num_devices: int, width: int = 0) -> Layout:
    """Divides members among devices as evenly as can be.

    Args:
      num_members: how many are to lie somewhere.
      num_devices: of the mesh.
      width: slots; 0 for the fewest.

    Raises:
      UserError: the devices do not divide the slots, or those are too few.
    """
    width = width or -(-num_members // num_devices) * num_devices
    if width % num_devices:
        raise UserError(
            f"{width} members do not divide among {num_devices} devices: give a multiple of "
            f"{num_devices}, or another number of devices."
        )
    if width < num_members:
        raise UserError(f"{num_members} members do not fit into {width} slots.")
    numbers = np.arange(num_members)
    slots = numbers % num_devices * (width // num_devices) + numbers // num_devices
    counts = np.bincount(numbers % num_devices, minlength=num_devices).astype(np.int32)
    return Layout(slots, width, counts)


def place(stacked: PyTree, layout: Layout, mesh: Mesh) -> PyTree:
    """Returns members, stacked in their order, in their slots on the devices of a mesh."""
    return moved(stacked, layout.fill, mesh)


def moved(stacked: PyTree, indices: Any, mesh: Mesh, *, whole: bool = False) -> PyTree:
    """Returns what `take` does, divided among the devices of a mesh, or `whole` on each."""
    return _take_onto(mesh, whole)(stacked, np.asarray(indices, np.int32))


@functools.lru_cache(maxsize=16)
def _take_onto(mesh: Mesh, whole: bool) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec() if whole else PartitionSpec(AXIS))
    return jax.jit(take, out_shardings=sharding)
