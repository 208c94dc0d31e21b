"""Exact sizes of every model at its canonical image and classes, from shapes alone.

The numbers and their sources are the rows of the models' files.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from cnnjax import models, trees

# Larger members of families of which the small ones are always tested.
LARGE = re.compile(
    r"resnet(34|101|152).*|cifar_resnet(32|44|110)|.*(resnet101|resnext101).*|densenet(161|169|201)"
    r"|shufflenet_v2_x(0_5|1_5|2_0)|efficientnet_(b[1-7]|lite[1-4])|regnet_._(800mf|.*gf)"
    r"|convnext_(small|base|large)"
)
CASES = [
    pytest.param(name, marks=[pytest.mark.exhaustive] if LARGE.fullmatch(name) else [])
    for name in models.list_models()
]


# Their logits are of each pixel.
PIXEL_CLASSES = ("unet", "unet_2015")


@pytest.mark.parametrize("name", CASES)
def test_sizes(name):
    models.check_sizes(name)


@pytest.mark.parametrize(
    ("name", "heads", "parameters", "statistics"),
    [
        ("googlenet", "auxiliary_heads", 13_004_888, 15_072),
        ("inception_v3", "auxiliary_head", 27_161_264, 36_224),
    ],
)
def test_sizes_with_auxiliary_heads(name, heads, parameters, statistics):
    model = models.create(name, num_classes=1000, **{heads: True})
    result = models.summary(model, models.input_shape(name))
    assert (result.parameters, result.statistics) == (parameters, statistics)


@pytest.mark.parametrize("name", CASES)
def test_contract(name):
    """Init without `train`, logits and features of the right shape, a head, stages sown."""
    classes = models.canonical_classes(name)
    image = jnp.zeros((2, *models.input_shape(name)))
    model = models.create(name, num_classes=classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    apply = functools.partial(model.apply, mutable=["intermediates"])
    logits, state = jax.eval_shape(apply, variables, image)
    assert (logits.shape[0], logits.shape[-1]) == (2, classes)
    assert logits.ndim == (4 if name in PIXEL_CLASSES else 2)
    stages = trees.named_leaves(state["intermediates"])
    assert stages
    assert all(output.shape[0] == 2 for output in stages.values())

    headless = models.create(name, num_classes=None)
    without_head = {path: leaf for path, leaf in variables["params"].items() if path != "head"}
    features = jax.eval_shape(headless.apply, variables | {"params": without_head}, image)
    if "head" in variables["params"]:
        assert features.shape[-1] == variables["params"]["head"]["kernel"].shape[0]
