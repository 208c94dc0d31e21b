"""An encoder with a projection head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models
from cnnjax.errors import UserError
from cnnjax.models.projection import Projected
from cnnjax.train.step import with_axis
from tests.train.test_compile import largest_difference

IMAGES = np.random.default_rng(0).uniform(size=(8, 28, 28, 1)).astype(np.float32)


def test_features_are_the_encoders_and_the_projection_is_an_mlp_of_them():
    encoder = models.create("lenet5", num_classes=None)
    model = Projected(encoder, width=7, features=5)
    variables = model.init(jax.random.key(0), IMAGES)
    outputs = model.apply(variables, IMAGES)
    params = variables["params"]
    features = encoder.apply({"params": params["encoder"]}, IMAGES)
    np.testing.assert_array_equal(outputs["features"], features)
    first, second = params["projection1"], params["projection2"]
    hidden = np.maximum(features @ first["kernel"] + first["bias"], 0)
    assert hidden.shape == (8, 7)
    expected = hidden @ second["kernel"] + second["bias"]
    np.testing.assert_allclose(outputs["projection"], expected, rtol=1e-4, atol=1e-5)


def test_the_encoders_parameters_are_those_of_the_classifier_without_its_head():
    encoder = models.create("cnn_32_64", num_classes=None, norm="batch")
    shapes = jax.eval_shape(Projected(encoder).init, jax.random.key(0), IMAGES)
    classifier = models.create("cnn_32_64", num_classes=10, norm="batch")
    expected = jax.eval_shape(classifier.init, jax.random.key(0), IMAGES)
    del expected["params"]["head"]
    assert {name: tree["encoder"] for name, tree in shapes.items()} == dict(expected)


def test_batch_norm_averages_over_the_devices():
    model = Projected(models.create("cnn_32_64", num_classes=None, norm="batch", widths=(4, 8)))
    variables = model.init(jax.random.key(0), IMAGES, train=False)
    mapped = with_axis(model, "data")
    assert mapped.encoder.layers.axis_name == "data"
    assert model.encoder.layers.axis_name is None

    def apply(model, images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    outputs, updated = apply(model, IMAGES)
    parts, parts_updated = jax.vmap(lambda x: apply(mapped, x), axis_name="data")(
        jnp.asarray(IMAGES).reshape(4, 2, 28, 28, 1)
    )
    joined = jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), parts)
    assert largest_difference(outputs, joined) < 1e-5
    assert largest_difference(updated, jax.tree.map(lambda x: x[0], parts_updated)) < 1e-5


def test_an_encoder_with_a_head_is_refused():
    model = Projected(models.create("lenet5", num_classes=10))
    with pytest.raises(UserError, match="LeNet5 ends in 10 logits: make it with num_classes=None"):
        model.init(jax.random.key(0), IMAGES)
