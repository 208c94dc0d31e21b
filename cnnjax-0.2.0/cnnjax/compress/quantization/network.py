"""A trained network in, a quantized one out, with what was done to each of its layers.

    scheme = compress.read_scheme("int8(calibration=percentile)")
    result = compress.quantize(model, variables, (28, 28, 1), scheme, images=batches)
    logits = result.model.apply(result.variables, image)
    print(compress.report_table(result.rows))

In this order: BatchNorm is folded, ranges are equalized between layers (where asked for), the
ranges of activations are calibrated, weights become codes, biases are corrected (where asked for).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.compress.quantization import (
    calibration,
    equalization,
    folding,
    integers,
    schemes,
    traced,
)
from cnnjax.compress.quantization.quantized import LayerPlan, Quantized, leaves_of, store
from cnnjax.compress.quantization.report import Row, rows_of, signal_to_noise
from cnnjax.compress.quantization.schemes import Scheme
from cnnjax.errors import UserError

Variables = dict[str, Any]
Normalize = Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A network that is ready to be quantized: folded, equalized, calibrated.

    Attributes:
      model: with its norms folded.
      variables: of the model, float32.
      program: its layers.
      plans: path -> how the layer is to be quantized.
      input_scales: path -> scale, of the layers whose inputs are quantized.
      skipped: path of every other layer with parameters -> why.
      notes: path -> what was done before quantizing.
    """

    model: folding.Folded
    variables: Variables
    program: traced.Program
    plans: dict[str, LayerPlan]
    input_scales: dict[str, float]
    skipped: dict[str, str]
    notes: dict[str, str]

    def kernel_scales(self, clip: str) -> dict[str, jax.Array | None]:
        """Returns the scale of each output channel of the planned layers."""
        return {
            path: _kernel_scale(self.variables["params"], path, plan, clip, self.input_scales)
            for path, plan in self.plans.items()
        }


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What `quantize` returns: `model` and `variables` to be applied, and `rows` to be read."""

    model: Quantized
    variables: Variables
    rows: tuple[Row, ...]
    prepared: Prepared


def quantize(
    model: nn.Module,
    variables: Variables,
    image_shape: Sequence[int],
    scheme: Scheme,
    *,
    images: Sequence[Any] = (),
    normalize: Normalize = jnp.asarray,
    plans: Mapping[str, LayerPlan] | None = None,
) -> Quantization:
    """Quantizes a trained network without training it further.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and `batch_stats`.
      image_shape: `[height, width, channels]`.
      scheme: how, but for what is measured with labels or trained.
      images: batches `[batch, height, width, channels]` to calibrate on; may be empty where nothing
        depends on them.
      normalize: images -> what the model expects.
      plans: other bits for layers than the scheme's, such as `mixed_precision` chose.

    Raises:
      UserError: a pattern that matches no layer, no images, or images of another shape.
    """
    prepared = prepare(
        model, variables, image_shape, scheme, images=images, normalize=normalize, plans=plans
    )
    return finish(prepared, scheme, images=images, normalize=normalize)


def prepare(
    model: nn.Module,
    variables: Variables,
    image_shape: Sequence[int],
    scheme: Scheme,
    *,
    images: Sequence[Any] = (),
    normalize: Normalize = jnp.asarray,
    plans: Mapping[str, LayerPlan] | None = None,
) -> Prepared:
    """Folds, equalizes and calibrates, and plans each layer; arguments as for `quantize`."""
    _check_images(images, image_shape, scheme)
    folded: folding.Folded = folding.Folded(model)
    if scheme.fold:
        folded, variables = folding.fold_batch_norm(model, variables, image_shape)
    program = traced.trace(folded, variables, image_shape)
    candidates = [path for path, layer in program.layers.items() if layer.has_kernel]
    if not candidates:
        raise UserError("the network has no convolution or dense layer to quantize.")
    chosen, skipped = schemes.selected(candidates, scheme.layers, scheme.skip)
    notes = {layer: f"{norm} folded" for layer, norm in folded.folded}
    if scheme.equalize:
        variables, pairs = equalization.equalize(folded, variables, image_shape)
        for first, second in pairs:
            notes[first] = "; ".join(filter(None, [notes.get(first), f"equalized with {second}"]))
    reasons = {
        path: _why_not(layer, path in skipped)
        for path, layer in program.layers.items()
        if path not in chosen - skipped
    }
    paths = [path for path in candidates if path in chosen - skipped]
    # Where a layer's input is quantized, its kernel has codes.
    planned = {path: LayerPlan(scheme.weights, scheme.activations) for path in paths}
    planned |= {path: plan for path, plan in (plans or {}).items() if path in planned}
    scales: dict[str, float] = {}
    inputs = [path for path, plan in planned.items() if plan.activations]
    if inputs:
        method = calibration.make_calibration(scheme.calibration)
        seen = calibration.observe(folded, variables, images, inputs, normalize=normalize)
        for path in inputs:
            bits = planned[path].activations
            low, high = method(seen[path], bits)
            scales[path], zero = integers.activation_scale(
                low, high, bits, symmetric=scheme.symmetric
            )
            planned[path] = dataclasses.replace(
                planned[path], zero=zero, symmetric=scheme.symmetric
            )
    return Prepared(folded, variables, program, planned, scales, reasons, notes)


def finish(
    prepared: Prepared,
    scheme: Scheme,
    *,
    images: Sequence[Any] = (),
    normalize: Normalize = jnp.asarray,
) -> Quantization:
    """Makes codes of a prepared network's weights, corrects biases, and measures each layer."""
    plans = prepared.plans
    model = Quantized(prepared.model.model, prepared.model.folded, tuple(plans.items()))
    stored = store(
        prepared.variables["params"],
        plans,
        prepared.input_scales,
        prepared.kernel_scales(scheme.clip),
    )
    variables = {**prepared.variables, "params": stored}
    if scheme.correct_bias:
        variables = equalization.correct_biases(prepared, model, variables, images, normalize)
    noise = signal_to_noise(prepared, variables, images, normalize) if images else {}
    return Quantization(model, variables, rows_of(prepared, variables, noise), prepared)


def _kernel_scale(
    params: Any, path: str, plan: LayerPlan, clip: str, input_scales: Mapping[str, float]
) -> jax.Array | None:
    if isinstance(plan.weights, str):
        return None
    own = leaves_of(params, path)
    scale = integers.weight_scale(own["kernel"], plan.weights, clip=clip)
    if "bias" in own and path in input_scales:
        # Of channels with tiny weights the bias would not fit int32 in units of the accumulator.
        scale = jnp.maximum(scale, jnp.abs(own["bias"]) / (input_scales[path] * 2.0**29))
    return scale


def _check_images(images: Sequence[Any], image_shape: Sequence[int], scheme: Scheme) -> None:
    if scheme.needs_images and not sum(map(len, images)):
        raise UserError("no images to calibrate on: activations have no known range without any.")
    for batch in images:
        if tuple(batch.shape[1:]) != tuple(image_shape):
            raise UserError(
                f"the calibration images are {_sizes(batch.shape[1:])}, but the network takes "
                f"{_sizes(image_shape)}: give images of that shape."
            )


def _sizes(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _why_not(layer: traced.Layer, skipped: bool) -> str:
    if skipped:
        return "skipped as asked"
    if layer.has_kernel:
        return "not among the layers asked for"
    if isinstance(layer.module, nn.BatchNorm):
        return "not behind a single layer: cannot be folded"
    if isinstance(layer.module, nn.Conv | nn.Dense):
        return f"{layer.kind} changes its kernel before it is used"
    return "no convolution or dense layer"
