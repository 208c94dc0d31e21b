"""A quantized network as a run keeps it, and as another runtime needs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from cnnjax.compress.quantization import folding, integers
from cnnjax.compress.quantization.quantized import (
    FakeQuantized,
    LayerPlan,
    Quantized,
    bias_codes,
    codes_of,
    kernel_of,
    leaves_of,
)
from cnnjax.errors import UserError
from cnnjax.trees import from_named_leaves, named_leaves

Variables = dict[str, Any]
# Of `model.json`: how the parameters are stored and what computes with them.
CARD = "quantize"


def describe(model: Quantized | FakeQuantized) -> dict[str, Any]:
    """Returns what `model.json` records under `quantize`, for `read_back`."""
    return {
        "trained": isinstance(model, FakeQuantized),
        "folded": [list(pair) for pair in model.folded],
        "layers": {path: dataclasses.asdict(plan) for path, plan in model.layers},
    }


def read_back(model: nn.Module, card: Mapping[str, Any]) -> Quantized | FakeQuantized:
    """Returns the quantized form of a model that `model.json` describes.

    Raises:
      UserError: the metadata are not those of a quantized model.
    """
    record = card[CARD]
    try:
        plans = tuple((path, LayerPlan(**plan)) for path, plan in record["layers"].items())
        folded = tuple((layer, norm) for layer, norm in record["folded"])
        kind = FakeQuantized if record["trained"] else Quantized
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"model.json does not say how the model is quantized: put back what stood at {CARD}."
        ) from None
    return kind(model, folded, plans)


def quantization_parameters(model: Quantized, variables: Variables) -> dict[str, dict[str, Any]]:
    """Returns what another runtime needs to compute the same, by layer path.

    Args:
      model, variables: of a quantized run, as `cnnjax.run.load.load_trained` returns them.

    Returns:
      `{path: ...}`, in the order of computation, with

        `kernel`: int8 codes `[..., features]` (never packed), or float16 or bfloat16 weights;
        `kernel_scale`: float32 `[features]`; None where there are no codes;
        `kernel_zero`: 0;
        `bias`: float32 `[features]`, or None: of the layer after folding;
        `bias_codes`: int32 `[features]`, of scale `input_scale * kernel_scale`, or None;
        `weights`: bits, or the name of the float type;
        `activations`: bits of the input, 0 where it is not quantized;
        `input_scale`, `input_zero`: of the input: `x = input_scale * (code - input_zero)`;
        `input_range`: (low, high), the values of the smallest and the largest code;
        `folded`: path of the norm that is folded into it, or None.

      Scale, zero and range are None where the input is not quantized.
    """
    norms = dict(model.folded)
    found = {}
    for path, plan in model.layers:
        own = leaves_of(variables["params"], path)
        has_codes = not isinstance(plan.weights, str)
        entry: dict[str, Any] = {
            "kernel": np.asarray(codes_of(own, plan) if has_codes else own["kernel"]),
            "kernel_scale": np.asarray(own["kernel_scale"]) if has_codes else None,
            "kernel_zero": 0,
            "bias": np.asarray(own["bias"]) if "bias" in own else None,
            "bias_codes": None,
            "weights": plan.weights,
            "activations": plan.activations,
            "input_scale": None,
            "input_zero": None,
            "input_range": None,
            "folded": norms.get(path),
        }
        if plan.activations:
            scale = np.float32(own["input_scale"])
            codes = (
                integers.smallest(plan.activations, symmetric=plan.symmetric),
                integers.largest(plan.activations),
            )
            entry["input_scale"], entry["input_zero"] = scale, plan.zero
            entry["input_range"] = tuple(float(scale * (code - plan.zero)) for code in codes)
            if "bias" in own:
                product = own["input_scale"] * own["kernel_scale"]
                entry["bias_codes"] = np.asarray(bias_codes(own["bias"], product))
        found[path] = entry
    return found


def dequantized(model: Quantized, variables: Variables) -> tuple[folding.Folded, Variables]:
    """Returns the folded model in float32, with the weights that the codes stand for.

    Activations are not rounded in it.
    """
    leaves = dict(named_leaves(variables["params"]))
    for path, plan in model.layers:
        leaves[f"{path}/kernel"] = kernel_of(leaves_of(variables["params"], path), plan)
        for name in ("kernel_scale", "input_scale"):
            leaves.pop(f"{path}/{name}", None)
    folded = folding.Folded(model.model, model.folded)
    return folded, {**variables, "params": from_named_leaves(leaves)}
