"""GhostNet: the halves of a module, and the gate of v2, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models
from cnnjax.errors import UserError
from cnnjax.models import ghostnet
from cnnjax.models.layers import Layers
from tests.models.quick import quick_apply, quick_init

LAYERS = Layers(norm="none").factories(train=False)


def test_second_half_of_the_channels_is_made_from_the_first():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    module = ghostnet.GhostModule(8, LAYERS)
    variables = quick_init(module, x)
    output = quick_apply(module, variables, x)
    params = variables["params"]
    assert params["primary"]["conv"]["kernel"].shape == (1, 1, 3, 4)
    assert params["cheap"]["conv"]["kernel"].shape == (3, 3, 1, 4)
    first = np.maximum(np.asarray(x) @ np.asarray(params["primary"]["conv"]["kernel"])[0, 0], 0)
    np.testing.assert_allclose(output[..., :4], first, rtol=1e-5, atol=1e-5)
    kernel = np.asarray(params["cheap"]["conv"]["kernel"])[:, :, 0]
    # The pixel (1, 1), whose neighbors are all there.
    second = np.maximum((first[:, :3, :3] * kernel).sum((1, 2)), 0)
    np.testing.assert_allclose(output[:, 1, 1, 4:], second, rtol=1e-4, atol=1e-5)


def test_nearest_copies_pixels_as_pytorch_does():
    x = jnp.arange(3.0)[None, :, None, None]
    found = ghostnet.resize_nearest(x, 7, 2)[0, :, :, 0]
    np.testing.assert_array_equal(found.T, [[0, 0, 0, 1, 1, 2, 2]] * 2)


def test_images_leave_a_pixel_to_the_last_gate():
    model = models.create("ghostnet_v2_x1_0", num_classes=3)
    with pytest.raises(UserError, match="at least 33x33 pixels, got 32x32"):
        model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
