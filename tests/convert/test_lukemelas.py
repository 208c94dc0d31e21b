"""The names of the PyTorch port of EfficientNet, which packages of weights have."""

import math

import pytest

from cnnjax import convert, models
from cnnjax.errors import UserError


def table(name, **arguments):
    model = models.create(name, num_classes=1000, **arguments)
    names = convert.find_names(model, "lukemelas")
    return {
        entry.name: entry.their_shape
        for entry in convert.entries(model, models.input_shape(name), names)
    }


def test_names_are_those_of_the_package_of_lite0():
    """All 296 tensors of `efficientnet-lite0-57934424.pth`: 247, and 49 counters of batches."""
    found = table("efficientnet_lite0")
    assert len(found) == 247
    assert sum(name.endswith("running_mean") for name in found) == 49
    assert sum(map(math.prod, found.values())) == 4_652_008 + 42_016
    expected = {
        "_conv_stem.weight": (32, 3, 3, 3),
        "_bn0.running_var": (32,),
        "_blocks.0._depthwise_conv.weight": (32, 1, 3, 3),
        "_blocks.0._bn2.bias": (16,),
        "_blocks.1._expand_conv.weight": (96, 16, 1, 1),
        "_blocks.1._bn0.weight": (96,),
        "_blocks.15._project_conv.weight": (320, 1152, 1, 1),
        "_conv_head.weight": (1280, 320, 1, 1),
        "_bn1.running_mean": (1280,),
        "_fc.weight": (1000, 1280),
    }
    assert {name: found[name] for name in expected} == expected


def test_gates_have_names_too():
    found = table("efficientnet_b0", padding="same", norm_epsilon=1e-3)
    assert found["_blocks.1._se_reduce.weight"] == (4, 96, 1, 1)
    assert found["_blocks.1._se_expand.bias"] == (96,)


def test_weights_of_tensorflow_need_its_padding_and_epsilon():
    with pytest.raises(UserError, match=r"build it with padding=same, norm_epsilon=0\.001"):
        table("efficientnet_b0")


def test_stages_end_at_the_last_block_of_each():
    model = models.create("efficientnet_lite0", num_classes=1000)
    stages = convert.find_names(model, "lukemelas").stages
    assert list(stages.values()) == [f"_blocks.{n}" for n in (0, 2, 4, 7, 10, 14, 15)]


def test_images_are_prepared_as_the_authors_do():
    published = convert.preprocessing.preprocessing("efficientnet_lite0", "lukemelas")
    assert (published["resize"], published["crop"]) == (256, 224)
    assert [round(255 * value, 6) for value in published["mean"]] == [127] * 3
    assert [round(255 * value, 6) for value in published["std"]] == [128] * 3
