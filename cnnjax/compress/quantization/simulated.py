"""A quantized network in float32 arithmetic: what its codes stand for, rounded where it rounds.

Other runtimes have kernels of their own for integers, which they find by this form: the input of a
quantized layer goes through `integers.round_to_codes`, its kernel through
`integers.dequantize_weight`. Its answers are those of `Quantized` up to the rounding of float32
sums, which moves a code by one where a value lies at the middle between two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from cnnjax.compress.quantization import integers
from cnnjax.compress.quantization.folding import Folded
from cnnjax.compress.quantization.quantized import (
    Quantized,
    bias_codes,
    intercept_layers,
    separated,
)
from cnnjax.models.interceptors import intercept_methods
from cnnjax.trees import from_named_leaves, named_leaves


@dataclasses.dataclass(frozen=True)
class Simulated(Quantized):
    """A `Quantized` model in float32; it takes the same variables."""

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`."""
        plans = dict(self.layers)
        params, stored = separated(variables["params"], plans)
        leaves = dict(named_leaves(params))
        rounds = {path: plan for path, plan in plans.items() if plan.activations}
        for path in rounds:
            if "bias" in stored[path]:
                scale = stored[path]["input_scale"] * stored[path]["kernel_scale"]
                leaves[f"{path}/bias"] = bias_codes(stored[path]["bias"], scale) * scale

        def rounded(path: str, call: Any, module: Any, x: Any) -> Any:
            plan = rounds[path]
            codes = (
                plan.zero,
                integers.smallest(plan.activations, symmetric=plan.symmetric),
                integers.largest(plan.activations),
            )
            scale = stored[path]["input_scale"]
            return call(
                integers.round_to_codes(x.astype(jnp.float32), scale, *map(jnp.float32, codes))
            )

        with intercept_methods(intercept_layers(rounded, set(rounds))):
            held = {**variables, "params": from_named_leaves(leaves)}
            return Folded.apply(self, held, *args, **kwargs)


def simulated(model: Quantized) -> Simulated:
    """Returns a quantized model in float32 arithmetic."""
    return Simulated(model.model, model.folded, model.layers)
