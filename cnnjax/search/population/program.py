"""Many members in one compiled program, each of them the project's one training step.

A member's step is `step(values, state, batch) -> (state, metrics)`: that of `cnnjax.train.step`,
made of numbers that differ from member to member (`values`, a tree of scalars and small arrays,
traced). There are three ways to compute the steps of all:

* `loop`: the members in turn, each for a whole chunk of steps. One step is compiled.
* `unrolled`: one after another in each step. As many are compiled as a device has members.
* `vmap`: all at once. One is compiled, of arrays that have the members as an axis.

Over the mesh's axis `member` each device has members of its own, and none waits for another.
`benchmarks/population.py` measures the ways; `choose_way` holds what it found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cnnjax.data.pipelines import gather
from cnnjax.errors import UserError, unknown_name
from cnnjax.search.population.members import AXIS, Layout, take
from cnnjax.train.chunks import many_steps
from cnnjax.train.state import TrainState

PyTree = Any
MemberStep = Callable[[PyTree, TrainState, PyTree], tuple[TrainState, PyTree]]
MemberEval = Callable[[PyTree, PyTree, PyTree], PyTree]
WAYS = ("loop", "unrolled", "vmap")
# Unrolled members are compiled one by one: 8 of LeNet-5 in half a minute, 16 in more than one.
MOST_UNROLLED = 16


def choose_way(asked: str, mesh: Mesh, num_members: int) -> str:
    """Returns the way that is asked for; of `auto` the fastest known.

    On a CPU that is `loop`: small convolutions under `vmap` become grouped ones, for which it has
    no fast kernels, and unrolled ones take as long to compute and longer to compile. Elsewhere it
    is `vmap`, which fills a device that one small network leaves idle.

    Raises:
      UserError: an unknown way, or too many members to be unrolled.
    """
    if asked not in ("auto", *WAYS):
        raise unknown_name("way to compute a population", asked, ("auto", *WAYS))
    if asked == "unrolled" and num_members > MOST_UNROLLED * mesh.size:
        raise UserError(
            f"unrolled: {num_members} members would take long to compile; up to "
            f"{MOST_UNROLLED * mesh.size} are, on {mesh.size} device(s). Take loop or vmap."
        )
    if asked != "auto":
        return asked
    return "loop" if mesh.devices.flat[0].platform == "cpu" else "vmap"


def compile_train(
    step: MemberStep,
    state: TrainState,
    values: PyTree,
    arrays: PyTree,
    rows: jax.ShapeDtypeStruct,
    *,
    way: str,
    mesh: Mesh,
    compiler_options: dict[str, str | bool] | None = None,
) -> Callable[..., tuple[TrainState, PyTree]]:
    """Compiles a chunk of steps of all members.

    Args:
      step: of one member.
      state, values: of all members, stacked, as `members.place` puts them; or their forms.
      arrays: the examples that the members share, key -> `[examples, ...]`.
      rows: the form of `[slots, steps, batch]` int32: the examples of each step of each member.
      way: of `WAYS`.
      mesh: of `members.member_mesh`.
      compiler_options: XLA's.

    Returns:
      `train(state, values, arrays, rows, num_steps, counts) -> (state, metrics)`: makes `num_steps`
      of the steps of the first `counts[device]` slots of each device, and takes the memory of the
      state. Every metric is `[slots, steps, ...]`.
    """

    def turn(state: TrainState, values: PyTree, arrays: PyTree, rows: jax.Array, num: jax.Array):
        return many_steps(functools.partial(step, values))(state, arrays, rows, num)

    def in_turn(state, values, arrays, rows, num_steps, counts):
        first = jax.eval_shape(functools.partial(take, indices=0), (state, values, rows))
        _, forms = jax.eval_shape(
            lambda own: turn(own[0], own[1], arrays, own[2], num_steps), first
        )
        slots = rows.shape[0]
        metrics = jax.tree.map(lambda form: jnp.zeros((slots, *form.shape), form.dtype), forms)

        def body(i: jax.Array, carry: PyTree) -> PyTree:
            state, metrics = carry
            new = turn(_at(state, i), _at(values, i), arrays, rows[i], num_steps)
            return tuple(
                _put(old, each, i) for old, each in zip((state, metrics), new, strict=True)
            )

        return jax.lax.fori_loop(0, counts[0], body, (state, metrics))

    def together(state, values, arrays, rows, num_steps, counts):
        of_all = jax.vmap(step) if way == "vmap" else _unrolled(step)

        def all_steps(state: TrainState, batch: PyTree):
            return of_all(values, state, batch)

        batches = jax.vmap(gather, in_axes=(None, 0))
        by_step = rows.swapaxes(0, 1)
        state, metrics = many_steps(all_steps, batches)(state, arrays, by_step, num_steps)
        return state, jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), metrics)

    run = in_turn if way == "loop" else together
    own, whole = PartitionSpec(AXIS), PartitionSpec()
    divided = jax.shard_map(
        run, mesh=mesh, in_specs=(own, own, whole, own, whole, own), out_specs=own, check_vma=False
    )
    forms = _forms((state, values, rows), NamedSharding(mesh, own))
    state, values, rows = forms
    arrays, num_steps = _forms(
        (arrays, jax.ShapeDtypeStruct((), jnp.int32)), NamedSharding(mesh, whole)
    )
    counts = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=NamedSharding(mesh, own))
    lowered = jax.jit(divided, donate_argnums=0).lower(
        state, values, arrays, rows, num_steps, counts
    )
    return lowered.compile(compiler_options)


def make_evaluate(step: MemberEval, *, way: str, mesh: Mesh) -> Callable[..., PyTree]:
    """Returns the compiled evaluation of all members.

    Args:
      step: `(values, variables, batch) -> metrics`, of one member: the evaluation step of
        `cnnjax.train.predict`.
      way: of `WAYS`; `unrolled` evaluates in turn.
      mesh: as for `compile_train`.

    Returns:
      `evaluate(variables, values, arrays, rows, mask, counts)`: metrics `[slots, batches, ...]` of
      the examples `rows [slots, batches, batch]`, those of `mask` False left out.
    """

    def turn(variables: PyTree, values: PyTree, arrays: PyTree, rows: jax.Array, mask: jax.Array):
        def batch(each: tuple[jax.Array, jax.Array]) -> PyTree:
            return step(values, variables, {**gather(arrays, each[0]), "mask": each[1]})

        return jax.lax.map(batch, (rows, mask))

    def in_turn(variables, values, arrays, rows, mask, counts):
        own = (variables, values, rows, mask)

        def one(each: PyTree) -> PyTree:
            variables, values, rows, mask = each
            return turn(variables, values, arrays, rows, mask)

        forms = jax.eval_shape(one, jax.eval_shape(functools.partial(take, indices=0), own))
        slots = rows.shape[0]
        found = jax.tree.map(lambda form: jnp.zeros((slots, *form.shape), form.dtype), forms)
        return jax.lax.fori_loop(
            0, counts[0], lambda i, found: _put(found, one(_at(own, i)), i), found
        )

    def together(variables, values, arrays, rows, mask, counts):
        return jax.vmap(turn, in_axes=(0, 0, None, 0, 0))(variables, values, arrays, rows, mask)

    own, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            together if way == "vmap" else in_turn,
            mesh=mesh,
            in_specs=(own, own, whole, own, own, own),
            out_specs=own,
            check_vma=False,
        )
    )


def shared(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts arrays whole on each device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def divided(tree: PyTree, mesh: Mesh) -> PyTree:
    """Divides arrays `[slots, ...]` of the host among the devices of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def counts_of(layout: Layout, mesh: Mesh) -> jax.Array:
    """Returns the slots in use of each device, on it."""
    return divided(layout.counts, mesh)


def _unrolled(step: MemberStep) -> Callable[[PyTree, TrainState, PyTree], Any]:
    def of_all(values: PyTree, state: TrainState, batch: PyTree) -> Any:
        count = jax.tree.leaves(state)[0].shape[0]
        found = [step(*(take(tree, i) for tree in (values, state, batch))) for i in range(count)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return of_all


def _at(tree: PyTree, i: jax.Array) -> PyTree:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)


def _put(tree: PyTree, new: PyTree, i: jax.Array) -> PyTree:
    return jax.tree.map(
        lambda leaf, one: jax.lax.dynamic_update_index_in_dim(leaf, one, i, 0), tree, new
    )


def _forms(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
