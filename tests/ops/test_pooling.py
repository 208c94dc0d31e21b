"""Pools have Flax's values, and the first of equal maxima has the gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import ops
from cnnjax.errors import UserError

SLICED = "im2col"


def pools():
    return st.fixed_dictionaries(
        {
            "window": st.tuples(st.integers(1, 3), st.integers(1, 3)),
            "strides": st.one_of(st.none(), st.tuples(st.integers(1, 3), st.integers(1, 3))),
            "padding": st.sampled_from(("SAME", "VALID", ((1, 0), (0, 1)), ((1, 1), (1, 1)))),
        }
    )


def image_of(size, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, *size, 3)), jnp.float32)


@settings(max_examples=8, deadline=None)
@given(pools(), st.tuples(st.integers(4, 9), st.integers(4, 9)))
def test_max_pool_equals_flax_with_its_gradient(pool, size):
    image = image_of(size)

    def run(function):
        pooled = lambda image: function(image, pool["window"], pool["strides"], pool["padding"])  # noqa: E731
        weighted = lambda image: jnp.sum(jnp.sin(pooled(image)))  # noqa: E731
        return jax.jit(lambda image: (pooled(image), jax.grad(weighted)(image)))

    ours = run(functools.partial(ops.max_pool, lowering=SLICED))(image)
    for one, other in zip(ours, run(nn.max_pool)(image), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@settings(max_examples=5, deadline=None)
@given(pools(), st.booleans())
def test_avg_pool_equals_flax(pool, count_include_pad):
    image = image_of((7, 6))
    options = (pool["window"], pool["strides"], pool["padding"], count_include_pad)
    if not count_include_pad and pool["padding"] == ((1, 0), (0, 1)):
        return  # A window of 1x1 can then see nothing but padding: 0 / 0, in Flax too.
    ours = ops.avg_pool(image, *options)
    np.testing.assert_allclose(ours, nn.avg_pool(image, *options), rtol=1e-6, atol=1e-7)


def test_avg_pool_by_hand_with_and_without_padding_in_the_count():
    image = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    pool = functools.partial(ops.avg_pool, image, (2, 2), (2, 2), ((1, 1), (1, 1)))
    np.testing.assert_allclose(pool()[0, :, :, 0], [[0.25, 0.5], [0.75, 1.0]])
    np.testing.assert_allclose(pool(count_include_pad=False)[0, :, :, 0], [[1, 2], [3, 4]])


@pytest.mark.parametrize("lowering", ["auto", "lax", SLICED])
def test_the_first_of_equal_maxima_has_the_gradient(lowering):
    image = jnp.array([[1.0, 5.0, 2.0, 2.0], [5.0, 5.0, 2.0, 2.0]]).reshape(1, 2, 4, 1)
    pool = lambda image: jnp.sum(ops.max_pool(image, (2, 2), (2, 2), lowering=lowering))  # noqa: E731
    gradient = jax.grad(pool)(image)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0, 1, 1, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("lowering", ["lax", SLICED])
def test_padding_never_wins(lowering):
    image = -jnp.ones((1, 2, 2, 1))
    result = ops.max_pool(image, (3, 3), (2, 2), ((1, 1), (1, 1)), lowering=lowering)
    np.testing.assert_array_equal(result, [[[[-1.0]]]])


def test_forward_mode_second_order_and_vmap_of_max_pool():
    image = image_of((6, 6), seed=1)
    change = jnp.cos(image)

    def derivatives(pool):
        cube = lambda image: jnp.sum(pool(image, (2, 2), (2, 2)) ** 3)  # noqa: E731
        return (
            jax.jvp(cube, (image,), (change,)),
            jax.jvp(jax.grad(cube), (image,), (change,)),
            jax.vmap(jax.grad(cube))(jnp.stack([image, -image])),
        )

    ours, theirs = (
        jax.jit(functools.partial(derivatives, functools.partial(ops.max_pool, lowering=name)))()
        for name in (SLICED, "lax")
    )
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_integers_single_images_and_more_batch_axes():
    image = jnp.arange(2 * 3 * 4 * 4 * 2).reshape(2, 3, 4, 4, 2)
    for dtype in (jnp.int32, jnp.float32):
        pooled = ops.max_pool(image.astype(dtype), (2, 2), (2, 2))
        assert pooled.shape == (2, 3, 2, 2, 2)
        assert pooled.dtype == dtype
        single = ops.max_pool(image[1, 2].astype(dtype), (2, 2), (2, 2))
        np.testing.assert_array_equal(pooled[1, 2], single)


def test_nan_is_passed_on():
    image = jnp.zeros((1, 2, 2, 1)).at[0, 1, 0, 0].set(jnp.nan)
    assert jnp.isnan(ops.max_pool(image, (2, 2), lowering=SLICED)).all()


def test_errors_say_what_is_wrong():
    image = jnp.ones((1, 4, 4, 1))
    with pytest.raises(UserError, match="window must be a pair such as"):
        ops.max_pool(image, 2)
    with pytest.raises(UserError, match=r"strides must be positive, not \(0, 2\)"):
        ops.avg_pool(image, (2, 2), (0, 2))
    with pytest.raises(UserError, match="not 'SOME'"):
        ops.max_pool(image, (2, 2), padding="SOME")
    with pytest.raises(UserError, match=r"not shape \(4, 4\)"):
        ops.avg_pool(image[0, :, :, 0], (2, 2))
