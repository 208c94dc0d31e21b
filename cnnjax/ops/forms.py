"""The forms of a convolution and of its two gradients: what `primitive` is lowered to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from cnnjax.ops import choice, onednn
from cnnjax.ops.blocks import sum_over_examples
from cnnjax.ops.choice import IMAGE, KERNEL, RESULT
from cnnjax.ops.geometry import Geometry, lax_conv2d
from cnnjax.ops.im2col import conv2d_channels_last, conv2d_taps_first
from cnnjax.ops.taps import depthwise_taps
from cnnjax.ops.winograd import conv2d_winograd

if TYPE_CHECKING:
    from cnnjax.ops.primitive import Form

Convolution = Callable[[jax.Array, jax.Array, Geometry], jax.Array]


def by_name(first: jax.Array, second: jax.Array, *, form: Form, name: str) -> jax.Array:
    """Returns what `form` says in the form `name`, one that fits these shapes."""
    if name != "onednn":
        return _derivative(FORMS[name], first, second, form)
    if form.of == IMAGE:
        return onednn.image_gradient(first, second, form.image_size, form.geometry)
    if form.of == KERNEL:
        window, geometry = form.window, form.geometry
        chunk = onednn.examples_at_a_time(first, second, window, geometry)
        gradient = partial(onednn.kernel_gradient, window=window, geometry=geometry)
        return sum_over_examples(gradient, chunk, first, second)
    return onednn.convolution(first, second, form.geometry)


def im2col(image: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolution as a matrix product over patches in the layout that suits the shape."""
    if choice.taps_first(image, kernel, geometry):
        return conv2d_taps_first(image, kernel, geometry)
    return conv2d_channels_last(image, kernel, geometry)


FORMS: dict[str, Convolution] = {
    "im2col": im2col,
    "lax": lax_conv2d,
    "taps": depthwise_taps,
    "winograd": conv2d_winograd,
}


def _derivative(
    convolve: Convolution, first: jax.Array, second: jax.Array, form: Form
) -> jax.Array:
    geometry = form.geometry
    if form.of == RESULT:
        return convolve(first, second, geometry)
    # The convolution is linear in each, so that it does not matter where the derivative is taken;
    # the compiler leaves out what does not depend on the cotangent.
    if form.of == IMAGE:
        kernel, cotangent = first, second
        channels = kernel.shape[2] * geometry.feature_group_count
        shape: tuple[int, ...] = (cotangent.shape[0], *form.image_size, channels)
        linear = lambda image: convolve(image, kernel, geometry)  # noqa: E731
    else:
        image, cotangent = first, second
        inner = image.shape[3] // geometry.feature_group_count
        shape = (*form.window, inner, cotangent.shape[3])
        linear = lambda kernel: convolve(image, kernel, geometry)  # noqa: E731
    if convolve is lax_conv2d:
        operand = jax.ShapeDtypeStruct(shape, cotangent.dtype)
        return jax.linear_transpose(linear, operand)(cotangent)[0]
    _, pullback = jax.vjp(linear, jnp.zeros(shape, cotangent.dtype))
    return pullback(cotangent)[0]
