"""The convolution as one JAX primitive, whose form is chosen once the platform is known.

Tracing cannot know where a program will run: it may be lowered for a GPU on a laptop. So the choice
is made by the rules with which JAX lowers a primitive, one for the CPU and one for all else.

The primitive is the scalar product of convolution(image, kernel) with a cotangent, which is linear
in each of the three. Its derivative with respect to the cotangent is the convolution, with respect
to the image and to the kernel are their gradients: `of` says which. Each of the three is linear in
the two others, and its transposes are again two of the three; so all derivatives of any order are
of this primitive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from cnnjax.ops import choice, forms
from cnnjax.ops.choice import IMAGE, KERNEL, RESULT
from cnnjax.ops.geometry import Geometry


class Form(NamedTuple):
    """All that is known of a convolution and its gradients before their arrays.

    Attributes:
      of: which of image, kernel and cotangent the derivative is with respect to.
      geometry: of the convolution.
      image_size: height and width of the image.
      window: height and width of the kernel.
      lowering: "auto", "once", or "onednn" wherever that can be.
      lanes: for each axis that `vmap` has put in front, the outermost first, whether image, kernel
        and cotangent have it.
    """

    of: int
    geometry: Geometry
    image_size: tuple[int, int]
    window: tuple[int, int]
    lowering: str = "auto"
    lanes: tuple[tuple[bool, ...], ...] = ()

    def operands(self) -> tuple[int, int]:
        """Returns which two of image, kernel and cotangent it takes."""
        first, second = (slot for slot in (IMAGE, KERNEL, RESULT) if slot != self.of)
        return first, second


convolution_p = Primitive("cnnjax_convolution")


def convolution(
    image: jax.Array, kernel: jax.Array, geometry: Geometry, lowering: str = "auto"
) -> jax.Array:
    """Returns the convolution NHWC x HWIO -> NHWC, its form chosen when it is lowered."""
    (height, width), (rows, columns) = image.shape[1:3], kernel.shape[:2]
    form = Form(RESULT, geometry, (height, width), (rows, columns), lowering)
    return _bind(image, kernel, form)


def _bind(first: jax.Array, second: jax.Array, form: Form) -> jax.Array:
    if jax.sharding.get_abstract_mesh().manual_axes:
        first, second = _varying_alike(first, second)
    return convolution_p.bind(first, second, form=form)


def _varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Returns the arrays, each varying over all axes of the mesh that one of them varies over."""
    axes = [_varying_axes(array) for array in arrays]
    all_axes = frozenset().union(*axes)
    return [
        jax.lax.pcast(array, tuple(all_axes - mine), to="varying") if all_axes - mine else array
        for array, mine in zip(arrays, axes, strict=True)
    ]


def _varying_axes(array: jax.Array) -> frozenset[Any]:
    aval: Any = jax.typeof(array)
    return frozenset(aval.manual_axis_type.varying)


def _mapped(function: Callable[..., jax.Array], form: Form) -> Callable[..., jax.Array]:
    """Returns `function` of two operands under a `vmap` for each of the lanes."""
    for lane in reversed(form.lanes):
        axes = tuple(0 if lane[slot] else None for slot in form.operands())
        function = jax.vmap(function, axes)
    return function


def _by_lax(first: jax.Array, second: jax.Array, form: Form) -> jax.Array:
    return _mapped(functools.partial(forms.by_name, form=form, name="lax"), form)(first, second)


def _abstract(first: Any, second: Any, *, form: Form) -> Any:
    closed = jax.make_jaxpr(functools.partial(_by_lax, form=form))(first, second)
    # A transpose that JAX makes forgets over which axes of a mesh its argument varies.
    return closed.out_avals[0].update(manual_axis_type=first.manual_axis_type)


@functools.partial(jax.jit, static_argnames="form")
def _eagerly(first: jax.Array, second: jax.Array, form: Form) -> jax.Array:
    return convolution_p.bind(first, second, form=form)


convolution_p.def_impl(lambda first, second, *, form: _eagerly(first, second, form))
convolution_p.def_abstract_eval(_abstract)


def _transpose_rule(
    cotangent: Any, first: Any, second: Any, *, form: Form
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns the cotangent of the operand that is not known: the derivative with respect to it."""
    slots = form.operands()
    unknown = 0 if ad.is_undefined_primal(first) else 1
    if isinstance(cotangent, ad.Zero):
        return None, None
    arrays = {form.of: cotangent, slots[1 - unknown]: second if unknown == 0 else first}
    lanes = tuple(
        tuple(has or slot == slots[unknown] for slot, has in enumerate(lane)) for lane in form.lanes
    )
    new = form._replace(of=slots[unknown], lanes=lanes)
    one, other = (arrays[slot] for slot in new.operands())
    result = _bind(one, other, new)
    # What one array gave to all lanes gets the sum of theirs.
    shared = [axis for axis, lane in enumerate(form.lanes) if not lane[slots[unknown]]]
    result = jnp.sum(result, shared) if shared else result
    return (result, None) if unknown == 0 else (None, result)


def _jvp_rule(primals: Any, tangents: Any, *, form: Form) -> tuple[jax.Array, Any]:
    (first, second), (change, other) = primals, tangents
    terms = []
    if not isinstance(change, ad.Zero):
        terms.append(_bind(change, second, form))
    if not isinstance(other, ad.Zero):
        terms.append(_bind(first, other, form))
    return _bind(first, second, form), functools.reduce(jnp.add, terms)


ad.primitive_jvps[convolution_p] = _jvp_rule
ad.primitive_transposes[convolution_p] = _transpose_rule


def _batching_rule(
    operands: Sequence[jax.Array], axes: Sequence[int | None], *, form: Form
) -> tuple[jax.Array, int]:
    mapped = {slot: axis is not None for slot, axis in zip(form.operands(), axes, strict=True)}
    front = [
        array if axis is None else jnp.moveaxis(array, axis, 0)
        for array, axis in zip(operands, axes, strict=True)
    ]
    if form.of != KERNEL and not mapped[KERNEL] and not form.lanes:
        # More examples: the lanes join the batch.
        index = form.operands().index(IMAGE if form.of == RESULT else RESULT)
        lanes, batch = front[index].shape[:2]
        front[index] = front[index].reshape(lanes * batch, *front[index].shape[2:])
        result = _bind(front[0], front[1], form)
        return result.reshape(lanes, batch, *result.shape[1:]), 0
    lane = tuple(slot == form.of or mapped[slot] for slot in (IMAGE, KERNEL, RESULT))
    return _bind(front[0], front[1], form._replace(lanes=(lane, *form.lanes))), 0


batching.primitive_batchers[convolution_p] = _batching_rule


@functools.partial(jax.jit, static_argnames=("form", "name", "whole_batch"))
def _in_form(
    first: jax.Array, second: jax.Array, *, form: Form, name: str, whole_batch: bool
) -> jax.Array:
    # Compiled once for all convolutions of one shape, and so traced once.
    with choice.whole_batch(whole_batch):
        function = functools.partial(forms.by_name, form=form, name=name)
        return _mapped(function, form)(first, second)


def _lower_for_cpu(ctx: Any, first: Any, second: Any, *, form: Form) -> Any:
    whole_batch = choice.batch_is_whole(ctx.module_context.axis_context)
    portable = ctx.module_context.lowering_parameters.for_export
    avals = dict(zip(form.operands(), ctx.avals_in, strict=True)) | {form.of: ctx.avals_out[0]}
    image, kernel = (
        jax.ShapeDtypeStruct(avals[slot].shape[-4:], avals[slot].dtype) for slot in (IMAGE, KERNEL)
    )
    own_kernels = whole_batch and not portable and not form.lanes
    name = choice.for_cpu(form, image, kernel, own_kernels=own_kernels)
    function = functools.partial(_in_form, form=form, name=name, whole_batch=whole_batch)
    return _lower(ctx, first, second, function=function)


def _lower_elsewhere(ctx: Any, first: Any, second: Any, *, form: Form) -> Any:
    return _lower(ctx, first, second, function=functools.partial(_by_lax, form=form))


def _lower(ctx: Any, first: Any, second: Any, *, function: Callable[..., jax.Array]) -> Any:
    # What varies over the devices of a `shard_map` has been settled: were it known here, JAX would
    # sum the derivatives of what does not.
    avals = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    ctx = ctx.replace(avals_in=avals)
    return mlir.lower_fun(function, multiple_results=False)(ctx, first, second)


mlir.register_lowering(convolution_p, _lower_elsewhere)
mlir.register_lowering(convolution_p, _lower_for_cpu, platform="cpu")
