"""What quantizing each layer costs, and bits chosen for each by that.

All is computed by one compiled function: kernels are replaced by what their codes stand for, and
inputs are rounded where a flag says so. In float32 that is the integer network up to rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.compress.quantization import integers
from cnnjax.compress.quantization.network import Prepared
from cnnjax.compress.quantization.quantized import FLOATS, LayerPlan, stored_bytes
from cnnjax.errors import UserError
from cnnjax.evaluation.ensemble import class_logits
from cnnjax.models.interceptors import intercept_methods
from cnnjax.trees import count_parameters, from_named_leaves, named_leaves

Normalize = Callable[[Any], jax.Array]
CHOICES = (8, 4, 2)


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A prepared network of which any layers are quantized, compiled once.

    Attributes:
      prepared: the network.
      clip: of the weights, see `integers.weight_scale`.
      logits: `(params, flags, image) -> logits [batch, classes]`; flags say whose input is rounded.
      normalize: images -> what the model expects.
    """

    prepared: Prepared
    clip: str
    logits: Callable[[Any, Mapping[str, Any], jax.Array], jax.Array]
    normalize: Normalize

    def of(self, plans: Mapping[str, LayerPlan], image: Any) -> np.ndarray:
        """Returns the logits of the network with these layers quantized."""
        leaves = dict(named_leaves(self.prepared.variables["params"]))
        for path, plan in plans.items():
            name = f"{path}/kernel"
            leaves[name] = self._rounded(leaves[name], plan)
        flags = {
            path: np.float32(path in plans and plans[path].activations > 0)
            for path in self.prepared.plans
        }
        return np.asarray(self.logits(from_named_leaves(leaves), flags, self.normalize(image)))

    def accuracy(
        self, plans: Mapping[str, LayerPlan], images: Sequence[Any], labels: Sequence[Any]
    ) -> float:
        """Returns the fraction of images whose class is found with these layers quantized."""
        right = sum(
            int(np.sum(self.of(plans, batch).argmax(-1) == own))
            for batch, own in zip(images, labels, strict=True)
        )
        return right / sum(map(len, images))

    def _rounded(self, kernel: jax.Array, plan: LayerPlan) -> jax.Array:
        if isinstance(plan.weights, str):
            return kernel.astype(FLOATS[plan.weights]).astype(kernel.dtype)
        scale = integers.weight_scale(kernel, plan.weights, clip=self.clip)
        codes = integers.quantize_weight(kernel, scale, plan.weights)
        return integers.dequantize_weight(codes, scale)


def simulate(prepared: Prepared, *, clip: str, normalize: Normalize) -> Simulation:
    """Compiles a network of which any layers are quantized."""
    plans, scales = prepared.plans, prepared.input_scales
    wanted = {tuple(path.split("/")): path for path in scales}

    def logits(params: Any, flags: Mapping[str, jax.Array], image: jax.Array) -> jax.Array:
        def intercept(
            call: Callable[..., Any],
            args: tuple,
            kwargs: dict,
            context: nn.module.InterceptorContext,
        ) -> Any:
            path = wanted.get(context.module.path)
            if path is None or context.method_name != "__call__":
                return call(*args, **kwargs)
            x, plan = args[0], plans[path]
            q = integers.offsets(
                x, scales[path], plan.zero, plan.activations, symmetric=plan.symmetric
            )
            rounded = (q * scales[path]).astype(x.dtype)
            return call(jnp.where(flags[path] > 0, rounded, x), *args[1:], **kwargs)

        variables = {**prepared.variables, "params": params}
        with intercept_methods(intercept):
            return class_logits(prepared.model.apply(variables, image, train=False))

    return Simulation(prepared, clip, jax.jit(logits), normalize)


def one_at_a_time(
    simulation: Simulation, images: Sequence[Any], labels: Sequence[Any]
) -> dict[str, float]:
    """Returns the accuracy of the network with each layer alone quantized, by path."""
    return {
        path: simulation.accuracy({path: plan}, images, labels)
        for path, plan in simulation.prepared.plans.items()
    }


def divergences(
    simulation: Simulation, images: Sequence[Any], choices: Sequence[int] = CHOICES
) -> dict[str, dict[int, float]]:
    """Returns what each layer alone does to the class probabilities, at each number of bits.

    The number is the mean Kullback-Leibler divergence from the probabilities in float32; no label
    is needed.
    """
    plain = [_log_probabilities(simulation.of({}, batch)) for batch in images]
    count = sum(map(len, images))
    found: dict[str, dict[int, float]] = {}
    for path, plan in simulation.prepared.plans.items():
        found[path] = {}
        for bits in choices:
            plans = {path: dataclasses.replace(plan, weights=bits)}
            total = 0.0
            for batch, before in zip(images, plain, strict=True):
                after = _log_probabilities(simulation.of(plans, batch))
                total += float(np.sum(np.exp(before) * (before - after)))
            found[path][bits] = total / count
    return found


def mixtures(
    prepared: Prepared, costs: Mapping[str, Mapping[int, float]]
) -> list[dict[str, LayerPlan]]:
    """Returns mixtures of bits, from the largest to the smallest.

    Each lowers the bits of one layer of the one before it: of that which adds least divergence for
    a byte saved. Divergences of layers are added up, as if they were independent (Dong et al. 2020,
    arXiv 1911.03852, section 3.2, with another measure).
    """
    params = prepared.variables["params"]
    current = {
        path: dataclasses.replace(plan, weights=max(costs[path]))
        for path, plan in prepared.plans.items()
    }
    found = [current]
    while True:
        size, options = stored_bytes(params, current), []
        for path, plan in current.items():
            lower = [bits for bits in costs[path] if bits < plan.weights]  # type: ignore[operator]
            if not lower:
                continue
            bits = max(lower)
            changed = {**current, path: dataclasses.replace(plan, weights=bits)}
            saved = size - stored_bytes(params, changed)
            added = costs[path][bits] - costs[path][plan.weights]  # type: ignore[index]
            if saved > 0:
                options.append((max(added, 0.0) / saved, path, changed))
        if not options:
            return found
        current = min(options, key=lambda option: option[:2])[2]
        found.append(current)


def mixed_precision(
    simulation: Simulation,
    images: Sequence[Any],
    *,
    max_size: float = 0.0,
    max_drop: float = 0.0,
    validation: tuple[Sequence[Any], Sequence[Any]] = ((), ()),
) -> dict[str, LayerPlan]:
    """Returns bits for each layer, under a bound on size or on the loss of accuracy.

    Args:
      simulation: of the prepared network.
      images: batches on which divergences are measured.
      max_size: bytes of all parameters over those of float32.
      max_drop: points of accuracy on `validation`, of the smallest mixture on the way down that
        keeps it, found by bisection.
      validation: batches of images and of labels.

    Raises:
      UserError: no mixture is within the bound, or there are no validation images.
    """
    prepared = simulation.prepared
    params = prepared.variables["params"]
    whole = 4 * count_parameters(params)
    mixed = mixtures(prepared, divergences(simulation, images))
    if max_size:
        sizes = [stored_bytes(params, plans) / whole for plans in mixed]
        for plans, size in zip(mixed, sizes, strict=True):
            if size <= max_size:
                return plans
        raise UserError(
            f"max_size={max_size:g}: the smallest mixture of {CHOICES} bits takes {sizes[-1]:.3f} "
            "of the size in float32: give a larger bound."
        )
    if not sum(map(len, validation[0])):
        raise UserError("max_drop needs validation images: give max_size, or data with some.")
    least = simulation.accuracy({}, *validation) - max_drop / 100
    # Fractions of images are no exact decimals.
    fits = [False] * len(mixed)
    low, high = -1, len(mixed)
    while high - low > 1:
        middle = (low + high) // 2
        fits[middle] = simulation.accuracy(mixed[middle], *validation) >= least - 1e-9
        low, high = (middle, high) if fits[middle] else (low, middle)
    if low < 0:
        raise UserError(
            f"max_drop={max_drop:g}: {max(CHOICES)} bits everywhere lose more on the validation "
            "images: give a larger bound, or skip layers."
        )
    return mixed[low]


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
