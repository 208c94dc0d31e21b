"""A network that computes with integers, and one that is trained to: wrappers of any model.

A quantized layer computes

    accumulator = sum over the window of (q - zero) * codes  +  round(bias / (s * t))      int32
    output      = s * t * accumulator                                                     float32

`q` are the codes of its input (scale `s`, one zero point), `codes` those of its kernel (scale `t`
for each output channel): see `integers`. That is what LiteRT's and ONNX Runtime's integer kernels
compute, up to what they do with the output. What lies between layers (pools, activations, sums)
stays in float32.

The sums are exact. They are computed as float32 sums of whole numbers, in chunks of channels that
stay below 2^24, where float32 holds every whole number; the chunks are added as int32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import ops
from cnnjax.compress.quantization import integers, lsq
from cnnjax.compress.quantization.folding import Folded
from cnnjax.models.interceptors import intercept_methods
from cnnjax.trees import from_named_leaves, named_leaves

Array = jax.Array
Variables = dict[str, Any]
EXACT = 2**24
FLOATS = {"float16": jnp.float16, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How one layer is quantized.

    Attributes:
      weights: bits of its codes, or `float16` or `bfloat16`.
      activations: bits of its input's codes; 0 leaves the input as it is.
      zero: the input's zero point.
      symmetric: whether the smallest code of the input is left out.
    """

    weights: int | str
    activations: int = 0
    zero: int = 0
    symmetric: bool = False


@dataclasses.dataclass(frozen=True)
class Quantized(Folded):
    """A model whose layers compute with integers; `init` and `apply` are those of a Linen module.

    Its `params` have, of each planned layer, `kernel` as it is stored (int8, packed uint8, float16
    or bfloat16) with `kernel_scale [features]` beside codes, and `input_scale` where the input is
    quantized. Derivatives pass straight through all rounding.

    Attributes:
      layers: pairs (path, `LayerPlan`).
    """

    layers: tuple[tuple[str, LayerPlan], ...] = ()

    def init(self, key: Any, image: Array, *, train: bool = False) -> Variables:
        """Initializes the model and quantizes it; its inputs' scales suit standard normal ones."""
        variables = super().init(key, image, train=train)
        plans = dict(self.layers)
        scales = {
            path: jnp.float32(8 / (2**plan.activations - 1))
            for path, plan in plans.items()
            if plan.activations
        }
        return {**variables, "params": store(variables["params"], plans, scales)}

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`."""
        plans = dict(self.layers)
        params, stored = separated(variables["params"], plans)
        intercept = intercept_layers(
            lambda path, call, module, x: integer_layer(module, x, plans[path], stored[path]),
            {path for path, plan in plans.items() if plan.activations},
        )
        with intercept_methods(intercept):
            return super().apply({**variables, "params": params}, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class FakeQuantized(Folded):
    """A model that is trained to be a `Quantized` one; `init` and `apply` are those of a module.

    Kernels and inputs are rounded to what their codes stand for, in float32, with derivatives by
    `lsq`. Its `params` are float32: of each planned layer the kernel as it is trained,
    `kernel_log_step [features]` and, where its input is quantized, `input_log_step []`.

    Attributes:
      layers: pairs (path, `LayerPlan`), of bits alone.
    """

    layers: tuple[tuple[str, LayerPlan], ...] = ()

    def init(self, key: Any, image: Array, *, train: bool = False) -> Variables:
        """Initializes the model, and the steps by its weights, and for standard normal inputs."""
        variables = super().init(key, image, train=train)
        scales = {
            path: jnp.float32(8 / (2**plan.activations - 1))
            for path, plan in self.layers
            if plan.activations
        }
        params = lsq.with_steps(variables["params"], dict(self.layers), scales)
        return {**variables, "params": params}

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`."""
        plans = dict(self.layers)
        params, input_steps = lsq.rounded_kernels(variables["params"], plans)
        intercept = intercept_layers(
            lambda path, call, module, x: call(
                lsq.rounded_input(x, input_steps[path], plans[path])
            ),
            set(input_steps),
        )
        with intercept_methods(intercept):
            return super().apply({**variables, "params": params}, *args, **kwargs)

    def quantized(self, variables: Mapping[str, Any]) -> tuple[Quantized, Variables]:
        """Returns the integer model that this one was trained to be, and its variables."""
        params, kernel_scales, input_scales = lsq.without_steps(variables["params"])
        stored = store(params, dict(self.layers), input_scales, kernel_scales)
        model = Quantized(self.model, self.folded, self.layers)
        return model, {**variables, "params": stored}


def store(
    params: Any,
    plans: Mapping[str, LayerPlan],
    input_scales: Mapping[str, Any],
    kernel_scales: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns parameters as `Quantized` has them.

    Args:
      params: float32, of the (folded) model.
      plans: path -> how the layer is quantized.
      input_scales: path -> scale, of the layers whose inputs are quantized.
      kernel_scales: path -> scale of each output channel; None: that of the largest weight.
    """
    leaves = dict(named_leaves(params))
    for path, plan in plans.items():
        kernel = leaves[f"{path}/kernel"]
        if isinstance(plan.weights, str):
            leaves[f"{path}/kernel"] = jnp.asarray(kernel).astype(FLOATS[plan.weights])
            continue
        scale = None if kernel_scales is None else kernel_scales[path]
        if scale is None:
            scale = integers.weight_scale(kernel, plan.weights)
        codes = integers.quantize_weight(kernel, scale, plan.weights)
        leaves[f"{path}/kernel"] = integers.pack(codes, plan.weights)
        leaves[f"{path}/kernel_scale"] = jnp.asarray(scale, jnp.float32)
        if plan.activations:
            leaves[f"{path}/input_scale"] = jnp.asarray(input_scales[path], jnp.float32)
    return from_named_leaves(leaves)


def codes_of(stored: Mapping[str, Any], plan: LayerPlan) -> Array:
    """Returns the codes of a stored kernel, int8 `[..., features]`."""
    assert isinstance(plan.weights, int)
    return integers.unpack(stored["kernel"], plan.weights, stored["kernel_scale"].shape[0])


def kernel_of(stored: Mapping[str, Any], plan: LayerPlan) -> Array:
    """Returns the weights of a stored kernel, float32."""
    if isinstance(plan.weights, str):
        return stored["kernel"].astype(jnp.float32)
    return integers.dequantize_weight(codes_of(stored, plan), stored["kernel_scale"])


def separated(
    params: Any, plans: Mapping[str, LayerPlan]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns parameters that the folded model takes, and what is stored of each planned layer."""
    leaves = dict(named_leaves(params))
    stored: dict[str, dict[str, Any]] = {}
    for path, plan in plans.items():
        names = ("kernel", "kernel_scale", "input_scale", "bias")
        own = {name: leaves[f"{path}/{name}"] for name in names if f"{path}/{name}" in leaves}
        for name in ("kernel_scale", "input_scale"):
            leaves.pop(f"{path}/{name}", None)
        # Where the input is quantized the layer's own call is replaced, and this is not used.
        leaves[f"{path}/kernel"] = kernel_of(own, plan)
        stored[path] = own
    return from_named_leaves(leaves), stored


def intercept_layers(
    change: Callable[[str, Callable, nn.Module, Array], Array], paths: set[str]
) -> Any:
    """Returns an interceptor of the calls of layers.

    Args:
      change: (path, the layer's own call, the module, its input) -> its output.
      paths: of the layers.
    """
    wanted = {tuple(path.split("/")): path for path in paths}

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        path = wanted.get(context.module.path)
        if path is None or context.method_name != "__call__":
            return call(*args, **kwargs)
        return change(path, call, context.module, args[0])

    return intercept


def integer_layer(module: nn.Module, x: Array, plan: LayerPlan, stored: Mapping[str, Any]) -> Array:
    """Returns what a layer gives for `x`, computed as the module's docstring says.

    Args:
      module: a convolution, with or without pool, transposed or not, or a dense layer.
      x: its input, float `[batch, ..., channels]`.
      plan: how it is quantized.
      stored: its `kernel`, `kernel_scale`, `input_scale` and perhaps `bias`.
    """
    result = linear_output(module, x, stored, plan)
    if isinstance(module, ops.ConvPool):
        result = module.activation(result)
        pool = ops.max_pool if module.pool == "max" else ops.avg_pool
        result = pool(result, (2, 2), (2, 2))
    return result.astype(getattr(module, "dtype", None) or x.dtype)


def linear_output(
    module: nn.Module, x: Array, stored: Mapping[str, Any], plan: LayerPlan | None = None
) -> Array:
    """Returns a layer's sums and bias, before any activation and pool, float32.

    Args:
      module, x, stored: as for `integer_layer`.
      plan: how it is quantized; None: not at all.
    """
    if plan is None or not plan.activations:
        kernel = stored["kernel"] if plan is None else kernel_of(stored, plan)
        result = linear_function(module)(x.astype(jnp.float32), kernel.astype(jnp.float32))
        return result + stored["bias"] if "bias" in stored else result
    codes = codes_of(stored, plan).astype(jnp.float32)
    q = integers.offsets(
        x, stored["input_scale"], plan.zero, plan.activations, symmetric=plan.symmetric
    )
    scale = stored["input_scale"] * stored["kernel_scale"]
    bias = bias_codes(stored["bias"], scale) if "bias" in stored else None
    return accumulate(module, q, codes, bias, plan) * scale


def bias_codes(bias: Array, scale: Array) -> Array:
    """Returns a bias in units of the accumulator, int32, rounded half to even."""
    # What int32 holds, with room for the sums; float32 has no 2^31 - 1.
    return jnp.clip(jnp.round(bias.astype(jnp.float32) / scale), -(2.0**30), 2.0**30).astype(
        jnp.int32
    )


def accumulate(module: nn.Module, q: Array, codes: Array, bias: Array | None, plan: LayerPlan):
    """Returns the accumulator of a layer as float32; its sums are those of int32.

    Args:
      module: whose linear function is meant.
      q: whole numbers, `codes - zero` of the input.
      codes: whole numbers, of the kernel.
      bias: int32 `[features]`, or None.
      plan: its bits bound the sums.
    """
    linear = linear_function(module)
    groups = getattr(module, "feature_group_count", 1)
    assert isinstance(plan.weights, int)
    most = (2**plan.activations - 1) * integers.largest(plan.weights)
    taps = 1
    for size in codes.shape[:-2]:
        taps *= size
    chunk = max(1, EXACT // (taps * most))

    def sums(q: Array) -> Array:
        parts = range(0, codes.shape[-2], chunk)
        total: Any = sum(
            linear(_channels(q, groups, start, chunk), codes[..., start : start + chunk, :]).astype(
                jnp.int32
            )
            for start in parts
        )
        return (total if bias is None else total + bias).astype(jnp.float32)

    exact = jax.custom_jvp(sums)
    exact.defjvp(lambda primals, tangents: (sums(*primals), linear(tangents[0], codes)))
    return exact(q)


def _channels(q: Array, groups: int, start: int, count: int) -> Array:
    """Returns some of the channels of each group."""
    grouped = q.reshape(*q.shape[:-1], groups, q.shape[-1] // groups)
    return grouped[..., start : start + count].reshape(*q.shape[:-1], -1)


def linear_function(module: nn.Module) -> Callable[[Array, Array], Array]:
    """Returns `(x, kernel) -> output` of a layer without bias, activation and pool, in float32.

    Convolutions are matrix products or sums over taps: others, such as Winograd's, are not exact.
    """
    precision = jax.lax.Precision.HIGHEST

    def linear(x: Array, kernel: Array) -> Array:
        if isinstance(module, nn.Dense):
            return jnp.dot(x, kernel, precision=precision)
        if isinstance(module, ops.ConvPool):
            return ops.conv2d(
                x, kernel, padding=module.padding, precision=precision, lowering="im2col"
            )
        depthwise = 1 < getattr(module, "feature_group_count", 1) == x.shape[-1]
        with ops.lowering("taps" if depthwise else "im2col"):
            bare = module.clone(
                parent=None, name=None, use_bias=False, dtype=None, precision=precision
            )
            result: Any = bare.apply({"params": {"kernel": kernel}}, x)
            return result

    return linear


def weight_bits(weights: int | str) -> int:
    """Returns the bits that a weight takes on the disk."""
    return 16 if isinstance(weights, str) else integers.stored_bits(weights)


def stored_bytes(params: Any, plans: Mapping[str, LayerPlan]) -> int:
    """Returns the bytes that float parameters take with such plans."""
    total = 0
    for path, leaf in named_leaves(params).items():
        layer, _, name = path.rpartition("/")
        if name != "kernel" or layer not in plans:
            total += jnp.dtype(leaf.dtype).itemsize * leaf.size
            continue
        plan, features = plans[layer], leaf.shape[-1]
        total += leaf.size // features * math.ceil(features * weight_bits(plan.weights) / 8)
        total += 0 if isinstance(plan.weights, str) else 4 * features + 4 * bool(plan.activations)
    return int(total)


def leaves_of(params: Any, path: str) -> dict[str, Any]:
    """Returns the parameters of a layer by name."""
    tree = params
    for name in path.split("/"):
        tree = tree[name]
    return {name: leaf for name, leaf in tree.items() if not isinstance(leaf, Mapping)}
