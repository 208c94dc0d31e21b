"""Grad-CAM at the last stage of every network of the zoo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import explain, models
from cnnjax.errors import UserError
from cnnjax.models.summary import abstract_variables
from tests.models.quick import quick_init, quick_jit

WITHOUT_CONVOLUTIONS = {"mlp", "dense_dropout"}
OF_PIXELS = {"unet", "unet_2015"}
BY_SIZE = sorted(models.MODELS, key=lambda name: models.MODELS[name].macs or 0)
# The smallest network of each class.
FIRST = list({models.MODELS[name].network: name for name in reversed(BY_SIZE)}.values())
RUN = ("lenet5", "cnn_strided_16_32", "cifar_resnet20")
TAKES_LONGER = {"cifar_resnet20"}
QUICK = ("airbench94", "squeezenet1_1")


def grad_cam(name):
    """Returns `(variables, image) -> map`, and the image's shape."""
    model = models.create(name, num_classes=models.canonical_classes(name))
    target = explain.pixel_score(1, 0, 0) if name in OF_PIXELS else explain.class_score(1)
    return model, lambda variables, image: explain.grad_cam(
        model, variables, image, target, relu=False
    )


def check(name):
    """Traces it; nothing is computed."""
    model, explained = grad_cam(name)
    image = jax.ShapeDtypeStruct((2, *models.input_shape(name)), jnp.float32)
    variables = abstract_variables(model, image.shape[1:])
    if name in WITHOUT_CONVOLUTIONS:
        with pytest.raises(UserError, match="no layer whose output is an image"):
            jax.eval_shape(explained, variables, image)
    else:
        assert jax.eval_shape(explained, variables, image).shape == image.shape[:3]


@pytest.mark.parametrize("name", [*QUICK, *sorted(WITHOUT_CONVOLUTIONS)])
def test_the_last_stage_is_explained(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FIRST if name not in QUICK + RUN])
def test_the_last_stage_of_a_network_of_each_class_is_explained(name):
    check(name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in BY_SIZE if name not in (*FIRST, *QUICK, *RUN)])
def test_the_last_stage_of_all_others_is_explained(name):
    check(name)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in TAKES_LONGER)) for name in RUN],
)
def test_small_networks_are_explained_by_numbers(name):
    model, explained = grad_cam(name)
    image = jax.random.normal(jax.random.key(0), (2, *models.input_shape(name)))
    map_ = np.asarray(quick_jit(explained)(quick_init(model, image), image))
    assert map_.shape == image.shape[:3]
    assert np.isfinite(map_).all()
    # Another image has another map, and no map is the same everywhere.
    assert map_.std() > 0
    assert np.abs(map_[0] - map_[1]).max() > 0
