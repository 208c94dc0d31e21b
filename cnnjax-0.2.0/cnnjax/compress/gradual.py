"""Pruning as part of training: an Optax transformation that keeps masks, and a step that does.

    optimizer = prune_while_training(optimizer, Pruning("magnitude", 0.9), total_steps=1000)
    step = masked_step(make_step(model, optimizer, task, ...))

Masks, scores and the number of updates are part of the optimizer's state, so a run that is resumed
continues with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cnnjax.compress import masks as masking
from cnnjax.compress.masks import Masks
from cnnjax.errors import UserError
from cnnjax.train.state import TrainState
from cnnjax.train.step import TrainStep
from cnnjax.trees import from_named_leaves, named_leaves

PyTree = Any
CRITERIA = ("magnitude", "movement", "random")


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What is pruned while training, and when.

    Attributes:
      criterion: `magnitude`, `random`, or `movement`, which removes what training moves to zero.
      sparsity: the fraction of weights that is gone at the end.
      scope: `global` or `layer`.
      layers: pattern of the leaves that are pruned.
      start, end: fractions of training between which the sparsity rises.
      every_steps: steps between two changes of the masks.
      begin_sparsity: that of the start.
      rates: layer pattern -> sparsity of its own; such layers are left out of the scope.
      seed: of `random`.
    """

    criterion: str = "magnitude"
    sparsity: float = 0.5
    scope: str = "global"
    layers: str = ".*kernel"
    start: float = 0.0
    end: float = 0.6
    every_steps: int = 50
    begin_sparsity: float = 0.0
    rates: tuple[tuple[str, float], ...] = ()
    seed: int = 0


class PruningState(NamedTuple):
    """Of `prune_while_training`.

    Attributes:
      num_updates: made.
      inner: the optimizer's own state.
      masks: path -> which weights stay.
      scores: path -> of each weight, of movement pruning; else {}.
      dense: path -> all weights, also those that are masked, of movement pruning; else {}.
    """

    num_updates: jax.Array
    inner: PyTree
    masks: Masks
    scores: dict[str, jax.Array]
    dense: dict[str, jax.Array]


def cubic(step: jax.Array, begin: float, final: float, first: int, last: int) -> jax.Array:
    """Returns the sparsity at a step: fast at first, when much is redundant, and slower later.

    `final + (begin - final) * (1 - t)^3`, with t from 0 at step `first` to 1 at step `last`: Zhu &
    Gupta 2017, "To prune, or not to prune" (arXiv 1710.01878), equation 1.
    """
    t = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
    return jnp.where(step >= last, final, final + (begin - final) * (1 - t) ** 3)


def prune_while_training(
    optimizer: optax.GradientTransformation,
    pruning: Pruning,
    total_steps: int,
    *,
    masks: Masks | None = None,
) -> optax.GradientTransformation:
    """Returns the optimizer with masks whose sparsity rises by `cubic`; masked weights are 0.

    With `magnitude`, a weight that is gone stays gone: it has no gradient and no updates. With
    `movement` (Sanh et al. 2020, arXiv 2005.07683, section 3, by a straight-through gradient) the
    score of a weight is minus the sum over the steps of gradient times weight; weights that are
    masked wait at the value that they had, and come back when their score is among the highest.

    Args:
      optimizer: any; the outermost one is this.
      pruning: what and when.
      total_steps: updates of the whole training.
      masks: of the start, which then never change; None starts with all weights.

    Raises:
      UserError: a sparsity, fraction or criterion out of range; from `init`, a pattern that matches
        nothing.
    """
    check(pruning)
    first, last = round(pruning.start * total_steps), round(pruning.end * total_steps)
    is_movement = pruning.criterion == "movement"

    def init(params: PyTree) -> PruningState:
        leaves = masking.prunable(params, pruning.layers)
        kept = {path: jnp.ones(leaf.shape, bool) for path, leaf in leaves.items()}
        kept |= {path: jnp.array(mask) for path, mask in (masks or {}).items()}
        scores, dense = {}, {}
        if is_movement:
            scores = {path: jnp.zeros(leaf.shape) for path, leaf in leaves.items()}
            dense = {path: jnp.copy(leaf) for path, leaf in leaves.items()}
        return PruningState(jnp.zeros((), jnp.int32), optimizer.init(params), kept, scores, dense)

    def new_masks(state: PruningState, values: Mapping[str, jax.Array], params: PyTree) -> Masks:
        sparsity = cubic(
            state.num_updates + 1, pruning.begin_sparsity, pruning.sparsity, first, last
        )
        return chosen(pruning, values, sparsity, params)

    def update(
        gradient: PyTree, state: PruningState, params: PyTree | None = None
    ) -> tuple[PyTree, PruningState]:
        if params is None:
            raise ValueError("pruning needs the parameters")
        whole = _replaced(params, state.dense)
        scores = {
            path: score - named_leaves(gradient)[path] * state.dense[path]
            for path, score in state.scores.items()
        }
        own = masking.apply(gradient, state.masks)
        updates, inner = optimizer.update(own, state.inner, whole)
        # A weight that is masked waits: momentum and decay would move it too.
        updates = masking.apply(updates, state.masks)
        moved = named_leaves(optax.apply_updates(whole, updates))
        values = scores or masking.scores(
            pruning.criterion, {path: moved[path] for path in state.masks}, _key(pruning)
        )
        if not is_movement:
            # What is gone is below all that is there.
            values = {path: jnp.where(state.masks[path], v, -1.0) for path, v in values.items()}
        count = state.num_updates + 1
        due = (count % pruning.every_steps == 0) | (count == max(last, 1))
        due &= (count >= first) & (count <= max(last, 1)) & (masks is None)
        kept = jax.lax.cond(
            due, lambda: new_masks(state, values, params), lambda: dict(state.masks)
        )
        now = named_leaves(params)
        changed = dict(named_leaves(updates))
        for path, mask in kept.items():
            # The sum with a parameter is then zero, exactly, or what the weight was.
            changed[path] = jnp.where(mask, changed[path], -now[path])
            if is_movement:
                back = mask & ~state.masks[path]
                changed[path] = jnp.where(back, moved[path] - now[path], changed[path])
        dense = {path: moved[path] for path in state.dense}
        return _replaced(updates, changed), PruningState(count, inner, kept, scores, dense)

    return optax.GradientTransformation(init, update)


def chosen(
    pruning: Pruning, values: Mapping[str, jax.Array], sparsity: Any, params: PyTree
) -> Masks:
    """Returns the masks at a sparsity; layers with rates of their own have those, in proportion."""
    rates = masking.layer_rates(params, pruning.layers, dict(pruning.rates))
    share = sparsity / pruning.sparsity if pruning.sparsity else 0.0
    alone = {
        path: masking.keep_highest({path: values[path]}, share * rate)[path]
        for path, rate in rates.items()
    }
    rest = {path: value for path, value in values.items() if path not in rates}
    together = masking.keep_highest(rest, sparsity, scope=pruning.scope) if rest else {}
    return {path: alone[path] if path in alone else together[path] for path in values}


def at_once(pruning: Pruning, params: PyTree) -> Masks:
    """Returns the masks of the final sparsity for parameters as they are.

    Raises:
      UserError: as `prune_while_training`; movement pruning, which needs training.
    """
    check(pruning)
    if pruning.criterion == "movement":
        raise UserError("movement pruning scores weights by how training moves them: give epochs.")
    leaves = masking.prunable(params, pruning.layers)
    values = masking.scores(pruning.criterion, leaves, _key(pruning))
    return chosen(pruning, values, pruning.sparsity, params)


def masked_step(step: TrainStep) -> TrainStep:
    """Returns the step with the average of the parameters masked as they are themselves."""

    def masked(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        new, metrics = step(state, batch)
        kept = new.opt_state.masks
        sizes = sum(mask.size for mask in kept.values())
        left = sum(jnp.sum(mask, dtype=jnp.float32) for mask in kept.values())
        metrics = {**metrics, "sparsity": (1 - left / sizes, jnp.ones((), jnp.int32))}
        if new.ema is None:
            return new, metrics
        return dataclasses.replace(new, ema=masking.apply(new.ema, kept)), metrics

    return masked


def step_factory(make_step: Callable[..., TrainStep]) -> Callable[..., TrainStep]:
    """Returns a factory of steps whose averages are masked."""
    return lambda *args, **kwargs: masked_step(make_step(*args, **kwargs))


def check(pruning: Pruning) -> None:
    """Raises a UserError for values that are out of range."""
    masking.check_sparsity(pruning.sparsity)
    masking.check_sparsity(pruning.begin_sparsity)
    if not 0 <= pruning.start <= pruning.end <= 1:
        raise UserError(
            f"start={pruning.start:g} and end={pruning.end:g} are fractions of training: give "
            "0 <= start <= end <= 1."
        )
    if pruning.every_steps < 1:
        raise UserError(f"every_steps={pruning.every_steps}: give 1 or more.")
    if pruning.criterion not in CRITERIA or pruning.scope not in masking.SCOPES:
        raise UserError(
            f"criterion {pruning.criterion} and scope {pruning.scope}: choose from "
            f"{', '.join(CRITERIA)} and {', '.join(masking.SCOPES)}."
        )


def _key(pruning: Pruning) -> jax.Array:
    return jax.random.key(pruning.seed)


def _replaced(tree: PyTree, leaves: Mapping[str, Any]) -> PyTree:
    return from_named_leaves({**named_leaves(tree), **leaves})
