"""Structured pruning: which channels to remove, and the smaller network without them."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import ops
from cnnjax.compress import couplings as coupled
from cnnjax.compress.couplings import Couplings, Place
from cnnjax.errors import UserError
from cnnjax.models.reshaped import WIDTHS, Changes, changes_of, reshaped
from cnnjax.models.summary import abstract_variables, summary
from cnnjax.trees import named_leaves

PyTree = Any
# A layer keeps at least this fraction of its channels, and one: less would cut the network in two.
LEAST_KEPT = 0.1
# Logits of the smaller network and of the masked one agree to this, relative to the largest.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Smaller:
    """A network without some of its channels.

    Attributes:
      model, variables: of the smaller network.
      masked: variables of the network as it was, with the removed channels at zero.
      difference: the largest difference of the two networks' logits on random images, relative to
        the largest logit.
    """

    model: nn.Module
    variables: PyTree
    masked: PyTree
    difference: float


def norm_scores(couplings: Couplings, variables: PyTree, order: int) -> dict[int, float]:
    """Scores channels by the L1 or L2 norm of their kernels (Li et al. 2017, arXiv 1608.08710).

    The norms of a layer are relative to their root mean square, so that layers can be compared;
    where several layers are coupled, their mean is taken.
    """
    totals: dict[int, list[float]] = {one: [] for one in couplings.removable}
    for place, sets in couplings.channels.items():
        path, axis = place
        if not (path.startswith("params/") and couplings.is_output(place)):
            continue
        kernel = np.abs(np.asarray(named_leaves(variables)[path], np.float64))
        others = tuple(a for a in range(kernel.ndim) if a != axis)
        norms = kernel.sum(others) if order == 1 else np.sqrt(np.square(kernel).sum(others))
        norms = norms / max(np.sqrt(np.mean(np.square(norms))), np.finfo(float).tiny)
        for one, norm in zip(sets.tolist(), norms.tolist(), strict=True):
            if one in totals:
                totals[one].append(norm)
    return {one: float(np.mean(norms)) for one, norms in totals.items()}


def scale_scores(couplings: Couplings, variables: PyTree) -> dict[int, float]:
    """Scores channels by the scale of their normalization (Liu et al. 2017, arXiv 1708.06519).

    Channels that no scale belongs to are not scored, and stay.

    Raises:
      UserError: there are no such scales.
    """
    found: dict[int, list[float]] = {}
    leaves, removable = named_leaves(variables), set(couplings.removable)
    for (path, _), sets in couplings.channels.items():
        if path.startswith("params/") and path.endswith("/scale"):
            for one, scale in zip(sets.tolist(), np.abs(leaves[path]).tolist(), strict=True):
                if one in removable:
                    found.setdefault(one, []).append(scale)
    if not found:
        raise UserError(
            "norm=batchnorm scores channels by the scales of their normalizations, and no channel "
            "here has one: give norm=l2 or norm=taylor."
        )
    return {one: float(np.mean(scales)) for one, scales in found.items()}


def taylor_scores(
    couplings: Couplings, variables: PyTree, gradients: Sequence[PyTree]
) -> dict[int, float]:
    """Scores channels by the square of the first-order change of the loss without them.

    `(sum of gradient * parameter)^2` over a channel's kernels, biases and scales, the mean over
    batches: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning" (arXiv
    1906.10771), equation 8.

    Args:
      couplings: of the network.
      variables: of it.
      gradients: of the loss with respect to `params`, one for each batch.
    """
    total = dict.fromkeys(couplings.removable, 0.0)
    leaves = named_leaves(variables["params"])
    for gradient in gradients:
        change = dict.fromkeys(couplings.removable, 0.0)
        of_batch = named_leaves(gradient)
        for (path, axis), sets in couplings.channels.items():
            name = path.removeprefix("params/")
            if name not in leaves or not (
                leaves[name].ndim == 1 or couplings.is_output((path, axis))
            ):
                continue
            product = np.asarray(leaves[name], np.float64) * np.asarray(of_batch[name])
            sums = product.sum(tuple(a for a in range(product.ndim) if a != axis))
            for one, value in zip(sets.tolist(), sums.tolist(), strict=True):
                if one in change:
                    change[one] += value
        for one, value in change.items():
            total[one] += value**2 / len(gradients)
    return total


def random_scores(couplings: Couplings, key: jax.Array) -> dict[int, float]:
    """Scores channels at random: what any other score must improve on."""
    values = jax.random.uniform(key, (len(couplings.removable),))
    return dict(zip(couplings.removable, np.asarray(values).tolist(), strict=True))


class Budget:
    """Multiply-accumulates and parameters of a network as channels are removed from it."""

    def __init__(self, model: Any, image_shape: tuple[int, int, int], couplings: Couplings):
        self._couplings = couplings
        leaves = named_leaves(abstract_variables(model, image_shape))
        self.shapes = {path: list(leaf.shape) for path, leaf in leaves.items()}
        kernels = {coupled.layer_of(path): path for path in leaves if path.endswith("/kernel")}
        self._positions: dict[str, int] = {}
        for row in summary(model, image_shape).rows:
            if row.macs:
                path = kernels[row.path]
                self._positions[path] = row.macs // int(np.prod(self.shapes[path]))
        self.full = {path: list(shape) for path, shape in self.shapes.items()}
        self._least = {
            place: max(1, int(np.ceil(LEAST_KEPT * self.full[place[0]][place[1]])))
            for place in couplings.channels
        }

    @property
    def macs(self) -> int:
        """Multiply-accumulates of what is left."""
        return sum(
            int(np.prod(self.shapes[path])) * number for path, number in self._positions.items()
        )

    @property
    def parameters(self) -> int:
        """Parameters of what is left."""
        of_params = (s for path, s in self.shapes.items() if path.startswith("params/"))
        return sum(int(np.prod(shape)) for shape in of_params)

    def remove(self, *sets: int) -> bool:
        """Removes sets of channels, all or none; False where a layer would have too few left."""
        going: collections.Counter[Place] = collections.Counter()
        for one in sets:
            for place, entries in self._couplings.places[one]:
                going[place] += len(entries)
        for (path, axis), count in going.items():
            if self.shapes[path][axis] - count < self._least[path, axis]:
                return False
        for (path, axis), count in going.items():
            self.shapes[path][axis] -= count
        return True

    def restore(self) -> None:
        """Puts everything back."""
        self.shapes = {path: list(shape) for path, shape in self.full.items()}


def choose(
    couplings: Couplings,
    budget: Budget,
    scores: Mapping[int, float],
    *,
    macs: float,
    scope: str = "global",
    rates: Mapping[str, float] | None = None,
    multiple: int = 1,
) -> set[int]:
    """Returns the channels to remove until a fraction of the multiply-accumulates is left.

    Args:
      couplings, budget: of the network.
      scores: of the channels; the lowest go first.
      macs: the fraction that may stay, in (0, 1).
      scope: `global`, by score over all layers; `layer`, the same fraction of each layer's.
      rates: layer -> how much it bears, in place of the same of each; for the scope `layer`.
      multiple: of the channels that stay in a layer that loses some.

    Raises:
      UserError: the network cannot be made so small.
    """
    target = macs * budget.macs
    ranks = scores if scope == "global" else _by_layer(couplings, scores, rates or {})
    removed: set[int] = set()
    for sets in _in_order(couplings, ranks, multiple):
        if budget.macs <= target:
            break
        if budget.remove(*sets):
            removed.update(sets)
    left = budget.macs
    budget.restore()
    full = budget.macs
    if left > target:
        kept, remedy = (
            (f", a multiple of {multiple}", "more, or a smaller multiple")
            if multiple > 1
            else ("", "more")
        )
        raise UserError(
            f"macs={macs:g}: with every channel gone that can be (each layer keeps "
            f"{LEAST_KEPT:.0%} of its own{kept}), {left / full:.1%} of the multiply-accumulates "
            f"stay: give {remedy}."
        )
    return removed


def _in_order(
    couplings: Couplings, ranks: Mapping[int, float], multiple: int
) -> list[tuple[int, ...]]:
    """Returns channels from the lowest rank on, as many together as leave a multiple in a layer."""
    together: list[tuple[float, tuple[int, ...]]] = []
    for kernels, sets in couplings.layers.items():
        own = sorted((one for one in sets if one in ranks), key=lambda one: (ranks[one], one))
        # In grouped convolutions a set is several entries.
        entries = max(np.count_nonzero(couplings.channels[each] == sets[0]) for each in kernels)
        size = multiple // math.gcd(multiple, int(entries))
        start = 0
        for end in range(len(sets) % size or size, len(own) + 1, size):
            part = tuple(own[start:end])
            together.append((statistics.fmean(ranks[one] for one in part), part))
            start = end
    return [part for _, part in sorted(together)]


def _by_layer(
    couplings: Couplings, scores: Mapping[int, float], rates: Mapping[str, float]
) -> dict[int, float]:
    """Returns ranks by which channels go of each layer in proportion to its rate."""
    ranked: dict[int, float] = {}
    for kernels, sets in couplings.layers.items():
        own = sorted((one for one in sets if one in scores), key=lambda one: (scores[one], one))
        found = [rates[layer] for layer in map(_layer, kernels) if layer in rates]
        rate = min(found, default=1.0)
        if rate > 0:
            ranked |= {one: place / len(own) / rate for place, one in enumerate(own, start=1)}
    return ranked


def _layer(place: Place) -> str:
    return coupled.layer_of(place[0])


def remove(
    model: nn.Module,
    variables: PyTree,
    image_shape: tuple[int, int, int],
    couplings: Couplings,
    removed: set[int],
) -> Smaller:
    """Returns the network without some channels, when it was seen to compute the same.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: `params` and `batch_stats`.
      image_shape: `[height, width, channels]`.
      couplings: what `trace` returned for it.
      removed: sets of channels of it.

    Raises:
      UserError: the network's code is written for its widths: then it cannot be made narrower, or
        computes something else.
    """
    masked = coupled.masked(variables, couplings, removed)
    smaller = coupled.without_channels(variables, couplings, removed)
    narrow = reshaped(model, _widths(model, smaller, image_shape))
    difference = largest_difference(model, masked, narrow, smaller, image_shape)
    if not difference <= TOLERANCE:
        raise UserError(
            f"{type(model).__name__} without these channels computes something else (logits differ "
            f"by {difference:.1e} of the largest): what it computes follows from its widths; prune "
            "single weights instead."
        )
    return Smaller(narrow, smaller, masked, difference)


def _widths(model: nn.Module, smaller: PyTree, image_shape: tuple[int, int, int]) -> Changes:
    """Returns the changes of layers with which a model has variables of these shapes."""
    wanted = {path: leaf.shape for path, leaf in named_leaves(smaller).items()}
    layers = coupled.calls(model, image_shape)
    name = type(model.network if changes_of(model) else model).__name__  # type: ignore[attr-defined]
    changes: dict[str, dict[str, Any]] = {}
    for _ in range(2):
        # Widths that the code derives from those of the input follow in the second round.
        try:
            form = abstract_variables(reshaped(model, changes), image_shape)
        except (UserError, TypeError, ValueError, AssertionError) as error:
            text = str(error).partition("\n")[0]
            raise _not_narrower(name, text) from None
        found = {path: leaf.shape for path, leaf in named_leaves(form).items()}
        if found == wanted:
            return changes
        for path, shape in wanted.items():
            layer = coupled.layer_of(path)
            if path.endswith("/kernel") and shape[-1:] != found.get(path, ())[-1:]:
                changes[layer] = _width(layers[layer].module, shape, layer)
    try:
        form = abstract_variables(reshaped(model, changes), image_shape)
    except (UserError, TypeError, ValueError, AssertionError) as error:
        raise _not_narrower(name, str(error).partition("\n")[0]) from None
    found = {path: leaf.shape for path, leaf in named_leaves(form).items()}
    for path, shape in wanted.items():
        if found.get(path) != shape:
            raise _not_narrower(name, f"{path} has the form {found.get(path)}, not {shape}")
    return changes


def _width(layer: nn.Module, shape: Sequence[int], path: str) -> dict[str, Any]:
    if not hasattr(layer, WIDTHS[0]):
        raise UserError(
            f"{path} is a {type(layer).__name__}, which has no `features`: its "
            "channels cannot be removed; prune single weights instead."
        )
    change = {WIDTHS[0]: int(shape[-1])}
    groups = getattr(layer, WIDTHS[1], 1)
    # Of one channel each, groups are as many as channels.
    if groups > 1 and shape[-2] == 1:
        whole = layer.features  # type: ignore[attr-defined]
        change[WIDTHS[1]] = int(shape[-1]) // (whole // groups)
    return change


def _not_narrower(name: str, text: str) -> UserError:
    return UserError(
        f"{name} cannot lose these channels, because its code is written for its widths ({text}): "
        "prune single weights instead, or channels of other layers."
    )


def largest_difference(
    model: Any, masked: PyTree, narrow: Any, smaller: PyTree, image_shape: tuple[int, int, int]
) -> float:
    """Returns by how much the logits of two networks differ, relative to the largest of the first.

    Both see the same random images `[height, width, channels]`.
    """
    image = jax.random.normal(jax.random.key(0), (2, *image_shape), jnp.float32)

    def logits(network: Any, variables: PyTree) -> np.ndarray:
        with ops.lowering("lax"):  # The quickest to compile.
            apply = jax.jit(lambda variables, image: network.apply(variables, image, train=False))
            return np.asarray(apply(variables, image))

    one, other = logits(model, masked), logits(narrow, smaller)
    if one.shape != other.shape:
        return float("inf")
    return float(np.max(np.abs(one - other)) / max(np.max(np.abs(one)), 1e-30))
