"""cnnjax's single layers for `zoo.py --operations`: found in a network, each jitted alone.

Layers with parameters are found by intercepting the calls of modules, and timed as the module that
the network has. What lies between them (activations, pools, sums, concatenations) is found in the
network's jaxpr and timed as the function that networks call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend.core import jaxprs_in_params
from operations import OnDemand, Operation, read_mode
from workloads import MODES, Images, Labels, Program, Run, Task, Workload

from cnnjax import models, ops
from cnnjax.models.blocks import SqueezeExcite, StochasticDepth
from cnnjax.models.interceptors import intercept_methods
from cnnjax.models.layers import ACTIVATIONS
from cnnjax.models.summary import abstract_variables
from cnnjax.ops.geometry import explicit_pads

FUNCTIONS: dict[str, Callable[..., Any]] = {**ACTIVATIONS, "hard_sigmoid": nn.hard_sigmoid}
# The name by which equations within a recorded layer are told from those between layers.
RECORDED = "recorded_layer"


def build(task: Task, image: Images, label: Labels) -> Program:
    """Returns the program whose modes are the operations of `mode_of`."""
    del image, label
    jax.config.update("jax_enable_compilation_cache", False)
    layers = {mode: collect(task.workload, task.batch_size, mode)[1] for mode in MODES}

    def variants(text: str) -> dict[str, Callable[[], Run]]:
        operation, mode = read_mode(text)
        layer = layers[mode].get(operation.key)
        return {"jit": functools.partial(prepare, operation, mode, layer)}

    return Program(0, jax.devices()[0].platform, {"jax": jax.__version__}, OnDemand(variants))


def collect(
    workload: Workload, batch_size: int, mode: str
) -> tuple[dict[str, tuple[Operation, int]], dict[str, nn.Module]]:
    """Finds the distinct operations of a network; computes nothing.

    Returns:
      ({key: (operation, how often the network calls it)}, {key: its module}), the second without
      the operations that are functions.
    """
    model = models.create(workload.model, num_classes=workload.num_classes, **workload.arguments)
    variables = abstract_variables(model, workload.image_shape)
    found: dict[str, tuple[Operation, int]] = {}
    modules: dict[str, nn.Module] = {}

    def add(operation: Operation, module: nn.Module | None = None) -> None:
        found[operation.key] = operation, found.get(operation.key, (operation, 0))[1] + 1
        if module is not None:
            modules[operation.key] = module.clone(parent=None, name=None)

    def forward(variables: Any, image: jax.Array, key: jax.Array) -> Any:
        with _recording(image, add):
            return model.apply(
                variables,
                image,
                train=mode == "train",
                mutable=["batch_stats", "intermediates"],
                rngs={"dropout": key},
            )

    image = jax.ShapeDtypeStruct((batch_size, *workload.image_shape), jnp.float32)
    with ops.lowering("lax"):  # In which a pool is one equation.
        jaxpr = jax.make_jaxpr(forward)(variables, image, jax.random.key(0)).jaxpr
    for operation in _between_layers(jaxpr):
        add(operation)
    return found, modules


@contextlib.contextmanager
def _recording(image: jax.Array, add: Callable[..., None]) -> Iterator[None]:
    """Within the context, calls `add` with each layer and its module."""
    inside = 0

    def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        nonlocal inside
        hidden = isinstance(context.module, nn.Dropout | StochasticDepth)
        described = _describe(context.module, *args) if args and not inside else None
        if context.method_name != "__call__" or (described is None and not hidden):
            return call(*args, **kwargs)
        if described is not None and not hidden:
            kind, settings = described
            shape = tuple(args[0].shape)
            add(Operation(kind, (shape,), settings, args[0] is image), context.module)
        inside += 1
        try:
            with jax.named_scope(RECORDED):
                return call(*args, **kwargs)
        finally:
            inside -= 1

    with intercept_methods(record):
        yield


def _describe(module: nn.Module, x: Any, *_: Any) -> tuple[str, dict[str, Any]] | None:
    """Returns the kind and settings of a layer that is timed, or None."""
    names = [each.__name__ for each in type(module).__mro__]
    if isinstance(module, nn.Conv | ops.ConvPool):
        size = _pair(module.kernel_size)
        padding: Any = module.padding
        strides = _pair(getattr(module, "strides", 1))
        dilation = _pair(getattr(module, "kernel_dilation", 1))
        reach = [(taps - 1) * step + 1 for taps, step in zip(size, dilation, strict=True)]
        settings: dict[str, Any] = {
            "kernel": size,
            "features": module.features,
            "strides": strides,
            "pads": explicit_pads(x.shape[1:3], reach, strides, padding),
            "dilation": dilation,
            "groups": getattr(module, "feature_group_count", 1),
            "bias": module.use_bias,
        }
        if isinstance(module, ops.ConvPool):
            pooled = {"activation": _name(module.activation), "pool": module.pool}
            return "convolution and pool", settings | pooled
        return "convolution", settings
    if isinstance(module, nn.Dense):
        return "dense", {"features": module.features, "bias": module.use_bias}
    if isinstance(module, SqueezeExcite):
        gates = {"activation": _name(module.activation), "gate": _name(module.gate)}
        return "squeeze-excite", {"features": module.reduced_features} | gates
    if any("BatchNorm" in name for name in names):
        return "batch norm", {}
    if any("LayerNorm" in name for name in names):
        return "layer norm", {}
    return None


def _pair(value: Any) -> tuple[int, int]:
    if value is None or isinstance(value, int):
        return (value or 1, value or 1)
    return tuple(value) if len(value) == 2 else (value[0], value[0])


def _name(function: Any) -> str:
    names = [name for name, each in FUNCTIONS.items() if each is function]
    return names[0] if names else getattr(function, "__name__", str(function))


def _between_layers(jaxpr: Any) -> Iterator[Operation]:
    """Yields what a jaxpr computes outside of recorded layers."""
    broadcast: set[Any] = set()
    for equation in jaxpr.eqns:
        if RECORDED in str(equation.source_info.name_stack):
            continue
        primitive = equation.primitive.name
        if primitive == "broadcast_in_dim":
            broadcast.update(equation.outvars)
        variables = {each for each in equation.invars if not hasattr(each, "val")}
        shapes = tuple(
            tuple(each.aval.shape)
            for each in equation.invars
            if not hasattr(each, "val") and each not in broadcast and len(each.aval.shape) > 1
        )
        operation = _function(equation, shapes, scaled=bool(broadcast & variables))
        if operation is not None:
            yield operation
            continue
        for inner in jaxprs_in_params(equation.params):
            yield from _between_layers(inner)


def _function(equation: Any, shapes: Any, *, scaled: bool) -> Operation | None:
    """Returns the operation that one equation is, if it is one that is timed."""
    primitive, params = equation.primitive.name, equation.params
    if not shapes:
        return None
    if primitive in ("jit", "pjit") and params["name"] in FUNCTIONS:
        return Operation("activation", shapes[:1], {"activation": params["name"]})
    if primitive in ("tanh", "logistic"):
        name = "tanh" if primitive == "tanh" else "sigmoid"
        return Operation("activation", shapes[:1], {"activation": name})
    if len(shapes[0]) != 4:
        # A channel shuffle splits the channels into groups and swaps the two axes.
        swaps = primitive == "transpose" and tuple(params["permutation"]) == (0, 1, 2, 4, 3)
        if not swaps:
            return None
        *position, groups, channels = shapes[0]
        return Operation("channel shuffle", ((*position, groups * channels),), {"parts": groups})
    if primitive == "concatenate" and params["dimension"] == 3:
        return Operation("concatenation", shapes, {})
    if primitive == "add" and len(shapes) == 2 and shapes[0] == shapes[1]:
        return Operation("sum", shapes, {})
    if primitive == "mul" and len(shapes) == 1 and scaled:
        return Operation("scale", shapes, {})
    if primitive == "reduce_sum" and tuple(params["axes"]) == (1, 2):
        return Operation("global average pool", shapes, {})
    if primitive in ("reduce_window_max", "reduce_window_sum"):
        settings = {
            "window": params["window_dimensions"][1:3],
            "strides": params["window_strides"][1:3],
            "pads": params["padding"][1:3],
        }
        return Operation("max pool" if "max" in primitive else "average pool", shapes, settings)
    return None


def prepare(operation: Operation, mode: str, layer: nn.Module | None) -> Run:
    """Returns the run of a jitted layer, in training with its gradients.

    In training a random cotangent is pulled back to the parameters and, unless the layer is the
    first, to its inputs; the layer's output is a result too, as other layers need it.
    """
    generator = np.random.default_rng(0)

    def draw(form: Any) -> jax.Array:
        return jnp.asarray(generator.standard_normal(form.shape, np.float32))

    inputs = [draw(jax.ShapeDtypeStruct(shape, jnp.float32)) for shape in operation.shapes]
    params, apply = _apply(operation, mode, layer, inputs)
    cotangent = draw(jax.eval_shape(apply, params, *inputs)[0])

    def both(params: Any, cotangent: jax.Array, *inputs: jax.Array) -> Any:
        if operation.first:
            output, pull, updated = jax.vjp(
                lambda params: apply(params, *inputs), params, has_aux=True
            )
        else:
            output, pull, updated = jax.vjp(apply, params, *inputs, has_aux=True)
        return output, updated, pull(cotangent)

    step = jax.jit(both) if mode == "train" else jax.jit(apply)
    arguments = (params, cotangent, *inputs) if mode == "train" else (params, *inputs)

    def run(num_steps: int) -> float:
        for _ in range(num_steps):
            jax.block_until_ready(step(*arguments))
        return 0.0

    return run


def _apply(
    operation: Operation, mode: str, layer: nn.Module | None, inputs: list[jax.Array]
) -> tuple[Any, Callable[..., tuple[Any, Any]]]:
    """Returns parameters and the function `(params, *inputs) -> (output, updated statistics)`."""
    if layer is None:
        if operation.kind == "scale":
            return jnp.ones(inputs[0].shape[-1]), lambda scale, x: (x * scale, ())
        function = _plain_function(operation)
        return (), lambda params, *inputs: (function(*inputs), ())
    variables = jax.jit(layer.init)(jax.random.key(0), *inputs)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def apply(params: Any, *inputs: jax.Array) -> tuple[Any, Any]:
        if mode == "infer":
            return layer.apply({"params": params, **rest}, *inputs), ()
        return layer.apply({"params": params, **rest}, *inputs, mutable=list(rest))

    return variables.get("params", {}), apply


def _plain_function(operation: Operation) -> Callable[..., jax.Array]:
    settings = operation.settings
    if operation.kind == "activation":
        return FUNCTIONS[settings["activation"]]
    if operation.kind == "channel shuffle":
        return lambda x: jnp.swapaxes(
            x.reshape(*x.shape[:-1], settings["parts"], -1), -1, -2
        ).reshape(x.shape)
    if operation.kind in ("max pool", "average pool"):
        pool = ops.max_pool if operation.kind == "max pool" else ops.avg_pool
        window, strides = tuple(settings["window"]), tuple(settings["strides"])
        return lambda x: pool(x, window, strides, settings["pads"])
    functions: dict[str, Callable[..., jax.Array]] = {
        "concatenation": lambda *inputs: jnp.concatenate(inputs, axis=-1),
        "sum": lambda first, second: first + second,
        "global average pool": lambda x: jnp.mean(x, axis=(1, 2)),
    }
    return functions[operation.kind]
