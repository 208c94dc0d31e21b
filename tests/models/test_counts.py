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
    r"|convnext_(small|base|large)|vit_(b|l|h)_.*|deit_.*|swin_(s|b|v2_.)"
    r"|(csp)?darknet53|cspresnext50|dla(34|46x|60|102|169).*|dpn(92|98|131|107)"
    r"|vovnet(39|57)a|ese_vovnet39b|hrnet_w(18_small_v2|18|30|32|40|44|48|64)"
    r"|resnet(14t|26.*|50[cdst].*|200d?)|resnext\w+_(64x4d|32x16d|32x32d)|resnext50d_32x4d"
    r"|wide_resnet(28_2|40_.)|(?!se_resnet(18|50)$|eca_resnet26t$)(se|eca)_res\w+"
    r"|resnet_rs(?!50)\d+|cbam_resnet(34|50|101)|(?!bit_resnet50x1$)bit_\w+"
    r"|sk_resnet(34|50.?)|sk_resnext\w+|resnest(?!14d)\w+|res2net(?!50_14w_8s)\w+|res2next50"
    r"|bagnet(17|33)|inception_resnet_v2"
    r"|mnasnet0_75|mnasnet1_.|efficientnet_v2_."
    r"|repvgg_(a[12]|b.*)|mobileone_s[0234]|ghostnet_v2_.*|mobilenet_v4_conv_(medium|large)"
    r"|convnext_v2_[^a].*|convmixer_(768|1536).*|fastvit_.12"
)
# The smallest of the families that came second: CI takes them.
SECOND = re.compile(
    r"(vit|swin|maxvit|darknet|csp|dla|dpn|vovnet|ese|hrnet|res2ne|resnest|sk|xception|bagnet|cbam"
    r"|bam|eca|bit|resnet_rs|resnet10t|se_resnet18|resnet18d|ghostnet|mobileone|repvgg|convmixer"
    r"|mobilenet_v4|convnext_v2|fastvit|mnasnet|efficientnet_lite|inception_(v4|resnet)).*"
)


def tier(name):
    if LARGE.fullmatch(name):
        return [pytest.mark.exhaustive]
    return [pytest.mark.slow] if SECOND.fullmatch(name) else []


CASES = [pytest.param(name, marks=tier(name)) for name in models.list_models()]


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
