"""Layer-wise learning rates, gradual unfreezing, and L2-SP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cnnjax.errors import UserError
from cnnjax.finetune.groups import Group, group_numbers
from cnnjax.trees import from_named_leaves, named_leaves

PyTree = Any
PRETRAINED = "pretrained"


def layer_wise_decay(
    optimizer: optax.GradientTransformation, groups: Sequence[Group], decay: float
) -> optax.GradientTransformation:
    """Multiplies the learning rate by `decay` for each group below the head.

    The head learns at the full rate, the last stage at `decay` times that, the one before at
    `decay ** 2`: Clark et al. 2020, "ELECTRA" (arXiv 2003.10555), appendix B; for convolutional
    networks Liu et al. 2022, "A ConvNet for the 2020s" (arXiv 2201.03545), appendix A.2. Decoupled
    weight decay is part of the update, so it shrinks with it.

    Args:
      optimizer: any whose updates are proportional to its learning rate.
      groups: of the model, from `cnnjax.finetune.layer_groups`.
      decay: in (0, 1]; 1 changes nothing.

    Raises:
      UserError: `decay` is out of its range.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer-wise decay is {decay}: it must be above 0 and at most 1.")

    def multiply(updates: PyTree, params: PyTree | None) -> PyTree:
        del params
        numbers = group_numbers(updates, groups)
        top = len(groups) - 1
        return jax.tree.map(lambda u, number: u * decay ** (top - number), updates, numbers)

    return optax.chain(optimizer, optax.stateless(multiply))


class UnfreezingState(NamedTuple):
    """Of `gradual_unfreezing`: the number of updates made, and the optimizer's own state."""

    num_updates: jax.Array
    inner: PyTree


def gradual_unfreezing(
    optimizer: optax.GradientTransformation, groups: Sequence[Group], steps_per_group: int
) -> optax.GradientTransformation:
    """Trains the top group alone at first, and one more from the top every `steps_per_group`.

    Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification" (arXiv
    1801.06146), section 3.3. Updates of groups whose turn has not come are left out, so their
    parameters stay the same bits. Their gradients are computed from the first step on, and move
    the optimizer's averages, which are then warm when the turn comes, and count towards a norm that
    is clipped: no time and no memory is saved. Running statistics of BatchNorm follow the images
    from the first step on.

    Args:
      optimizer: any.
      groups: of the model, from `cnnjax.finetune.layer_groups`; of what is trained only in part,
        those that have no trained parameters do not count.
      steps_per_group: optimizer updates between two groups.

    Raises:
      UserError: `steps_per_group` is not positive.
    """
    if steps_per_group < 1:
        raise UserError(f"gradual unfreezing every {steps_per_group} steps: use at least 1.")

    def init(params: PyTree) -> UnfreezingState:
        return UnfreezingState(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(
        gradient: PyTree, state: UnfreezingState, params: PyTree | None = None
    ) -> tuple[PyTree, UnfreezingState]:
        updates, inner = optimizer.update(gradient, state.inner, params)
        numbers = group_numbers(updates, groups)
        order = sorted(set(jax.tree.leaves(numbers)), reverse=True)

        def masked(leaf: jax.Array, number: int) -> jax.Array:
            begins = order.index(number) * steps_per_group
            # Minus zero, because adding plus zero would change a parameter that is minus zero.
            return jnp.where(state.num_updates >= begins, leaf, jnp.full_like(leaf, -0.0))

        updates = jax.tree.map(masked, updates, numbers)
        return updates, UnfreezingState(state.num_updates + 1, inner)

    return optax.GradientTransformation(init, update)


def remember_start(variables: PyTree, kept: Sequence[str]) -> PyTree:
    """Adds what `l2_sp` pulls to: the values with which the trained parameters start.

    Args:
      variables: of a `FineTuned` model.
      kept: paths of the leaves that come from the base, as in `Loaded.kept`.

    Returns:
      The variables with `frozen/pretrained`.

    Raises:
      UserError: no trained parameter comes from the base.
    """
    trained = named_leaves(variables["params"])
    start = {path: trained[path] for path in kept if path in trained}
    if not start:
        raise UserError(
            "L2-SP pulls trained parameters to the base's values, but none that is trained comes "
            "from the base: leave it out, or train more of the model."
        )
    frozen = variables["frozen"] | {PRETRAINED: from_named_leaves(start)}
    return {**variables, "frozen": frozen}


def l2_sp(strength: float, new_strength: float) -> Callable[[PyTree, PyTree], jax.Array]:
    """Returns the penalty `strength / 2 * |w - w0|^2 + new_strength / 2 * |v|^2`.

    Li et al. 2018, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks"
    (arXiv 1802.01483), section 3.2: `w` are the trained parameters that come from the base, where
    they were `w0`, and `v` the new ones.

    Args:
      strength: `alpha` of the paper.
      new_strength: `beta` of the paper.

    Returns:
      `(params, frozen) -> scalar`, the `pull` of `make_step`; `frozen` is that of
      `remember_start`.

    Raises:
      UserError: a strength that is negative or not finite.
    """
    for name, value in (("strength", strength), ("new_strength", new_strength)):
        if not 0 <= value < math.inf:
            raise UserError(f"L2-SP's {name} is {value}: it must be finite and not negative.")

    def pull(params: PyTree, frozen: PyTree) -> jax.Array:
        start = named_leaves(frozen[PRETRAINED])
        total = jnp.float32(0)
        for path, leaf in named_leaves(params).items():
            if path in start:
                total += strength / 2 * jnp.sum(jnp.square(leaf - start[path]))
            else:
                total += new_strength / 2 * jnp.sum(jnp.square(leaf))
        return total

    return pull
