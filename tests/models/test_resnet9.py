"""ResNet-9: its parts by hand. Exact sizes are in test_counts.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, ops
from cnnjax.errors import UserError
from tests.models.quick import quick_apply, quick_init

IMAGE = jax.random.normal(jax.random.key(1), (2, 17, 16, 3))


@pytest.fixture(scope="module")
def small():
    with ops.lowering("lax"):
        model = models.create("resnet9", num_classes=5, width=4)
        return model, quick_init(model, IMAGE)


def test_a_layer_with_a_silent_branch_hands_its_pooled_input_on(small):
    """Without kernels in the residual blocks the network is four convolutions."""
    model, variables = small
    params = jax.tree.map(jnp.asarray, variables["params"])
    for stage in (1, 3):
        name = f"layer{stage}_residual2_norm"
        params[name] = jax.tree.map(jnp.zeros_like, params[name])
    found = quick_apply(model, {**variables, "params": params}, IMAGE)

    x = IMAGE
    for name in ("prep", "layer1", "layer2", "layer3"):
        kernel = params[f"{name}_conv"]["kernel"]
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
        if name != "prep":
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jnp.maximum(x / jnp.sqrt(1 + 1e-5), 0)
    logits = x.max((1, 2)) @ params["head"]["kernel"] / 8
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)


def test_without_a_head_it_returns_the_pooled_features(small):
    model, variables = small
    features = quick_apply(models.with_fields(model, num_classes=None), variables, IMAGE)
    assert features.shape == (2, 8 * 4)
    logits = quick_apply(model, variables, IMAGE)
    np.testing.assert_allclose(
        logits, features @ variables["params"]["head"]["kernel"] / 8, rtol=1e-5
    )


def test_an_image_that_would_vanish_is_refused(small):
    with pytest.raises(UserError, match="8"):
        small[0].init(jax.random.key(0), jnp.zeros((1, 7, 8, 3)))
