"""The networks, by name and by constructor.

    model = create("lenet5", num_classes=10)
    variables = model.init(jax.random.key(0), image)
    logits = model.apply(variables, image, train=False)

Every model is a Linen module from `image [batch, height, width, channels]` to logits
`[batch, num_classes]`, or `[batch, height, width, num_classes]` of each pixel. Its last Dense is
named `head`; `num_classes=None` returns what would enter it. `train` is keyword-only; dropout draws
from the random stream `dropout`; models with BatchNorm keep `batch_stats` and take `axis_name` for
statistics over a mapped axis. Each stage's output is passed through `stage_output`, which sows it
into `intermediates`: `features` returns it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from cnnjax.errors import UserError, unknown_name
from cnnjax.models import (
    airbench,
    alexnet,
    convnext,
    densenet,
    efficientnet,
    googlenet,
    inception,
    lenet,
    mobilenet,
    nfnet,
    regnet,
    resnet,
    shufflenet,
    simple,
    squeezenet,
    unet,
    vgg,
)
from cnnjax.models.features import features, stage_names
from cnnjax.models.stages import changed_stages, stage_output
from cnnjax.models.summary import Summary, format_summary, summary

__all__ = [
    "MODELS",
    "Summary",
    "canonical_classes",
    "changed_stages",
    "create",
    "features",
    "format_summary",
    "input_shape",
    "list_models",
    "model_fields",
    "presets",
    "stage_names",
    "stage_output",
    "summary",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    # lenet.py
    "lenet5": lenet.LeNet5,
    "lenet5_1998": lenet.LeNet5_1998,
    # simple.py
    "cnn_32_64": simple.CNN_32_64,
    "cnn_32_64_dense64": simple.CNN_32_64_Dense64,
    "cnn_32_64_dense128_dropout": simple.CNN_32_64_Dense128_Dropout,
    "cnn_32_dense64": simple.CNN_32_Dense64,
    "cnn_5conv_2dense": simple.CNN_5Conv_2Dense,
    "cnn_strided_16_32": simple.CNN_Strided_16_32,
    "mlp": simple.MLP,
    "dense_dropout": simple.DenseDropout,
    # airbench.py
    "airbench94": airbench.Airbench94,
    # alexnet.py
    "alexnet": alexnet.AlexNet,
    "alexnet_2012": alexnet.AlexNet2012,
    # vgg.py
    "vgg11": vgg.VGG11,
    "vgg11_bn": vgg.VGG11BN,
    "vgg13": vgg.VGG13,
    "vgg13_bn": vgg.VGG13BN,
    "vgg16": vgg.VGG16,
    "vgg16_bn": vgg.VGG16BN,
    "vgg19": vgg.VGG19,
    "vgg19_bn": vgg.VGG19BN,
    # googlenet.py
    "googlenet": googlenet.GoogLeNet,
    # inception.py
    "inception_v3": inception.InceptionV3,
    # squeezenet.py
    "squeezenet1_0": squeezenet.SqueezeNet10,
    "squeezenet1_1": squeezenet.SqueezeNet11,
    # resnet.py
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
    "resnet50_v1": resnet.resnet50_v1,
    "resnet101_v1": resnet.resnet101_v1,
    "resnet152_v1": resnet.resnet152_v1,
    "resnet18_v2": resnet.resnet18_v2,
    "resnet34_v2": resnet.resnet34_v2,
    "resnet50_v2": resnet.resnet50_v2,
    "resnet101_v2": resnet.resnet101_v2,
    "resnet152_v2": resnet.resnet152_v2,
    "cifar_resnet20": resnet.cifar_resnet20,
    "cifar_resnet32": resnet.cifar_resnet32,
    "cifar_resnet44": resnet.cifar_resnet44,
    "cifar_resnet56": resnet.cifar_resnet56,
    "cifar_resnet110": resnet.cifar_resnet110,
    "wide_resnet28_10": resnet.wide_resnet28_10,
    "wide_resnet50_2": resnet.wide_resnet50_2,
    "wide_resnet101_2": resnet.wide_resnet101_2,
    "resnext50_32x4d": resnet.resnext50_32x4d,
    "resnext101_32x4d": resnet.resnext101_32x4d,
    "resnext101_32x8d": resnet.resnext101_32x8d,
    "se_resnet50": resnet.se_resnet50,
    # densenet.py
    "densenet121": densenet.densenet121,
    "densenet161": densenet.densenet161,
    "densenet169": densenet.densenet169,
    "densenet201": densenet.densenet201,
    "cifar_densenet_bc100": densenet.cifar_densenet_bc100,
    # mobilenet.py
    "mobilenet_v1": mobilenet.mobilenet_v1,
    "mobilenet_v2": mobilenet.mobilenet_v2,
    "mobilenet_v3_large": mobilenet.mobilenet_v3_large,
    "mobilenet_v3_small": mobilenet.mobilenet_v3_small,
    # shufflenet.py
    "shufflenet_v2_x0_5": shufflenet.shufflenet_v2_x0_5,
    "shufflenet_v2_x1_0": shufflenet.shufflenet_v2_x1_0,
    "shufflenet_v2_x1_5": shufflenet.shufflenet_v2_x1_5,
    "shufflenet_v2_x2_0": shufflenet.shufflenet_v2_x2_0,
    # efficientnet.py
    "efficientnet_b0": efficientnet.efficientnet_b0,
    "efficientnet_b1": efficientnet.efficientnet_b1,
    "efficientnet_b2": efficientnet.efficientnet_b2,
    "efficientnet_b3": efficientnet.efficientnet_b3,
    "efficientnet_b4": efficientnet.efficientnet_b4,
    "efficientnet_b5": efficientnet.efficientnet_b5,
    "efficientnet_b6": efficientnet.efficientnet_b6,
    "efficientnet_b7": efficientnet.efficientnet_b7,
    # regnet.py
    "regnet_x_400mf": regnet.regnet_x_400mf,
    "regnet_x_800mf": regnet.regnet_x_800mf,
    "regnet_x_1_6gf": regnet.regnet_x_1_6gf,
    "regnet_x_3_2gf": regnet.regnet_x_3_2gf,
    "regnet_x_8gf": regnet.regnet_x_8gf,
    "regnet_x_16gf": regnet.regnet_x_16gf,
    "regnet_x_32gf": regnet.regnet_x_32gf,
    "regnet_y_400mf": regnet.regnet_y_400mf,
    "regnet_y_800mf": regnet.regnet_y_800mf,
    "regnet_y_1_6gf": regnet.regnet_y_1_6gf,
    "regnet_y_3_2gf": regnet.regnet_y_3_2gf,
    "regnet_y_8gf": regnet.regnet_y_8gf,
    "regnet_y_16gf": regnet.regnet_y_16gf,
    "regnet_y_32gf": regnet.regnet_y_32gf,
    # convnext.py
    "convnext_tiny": convnext.convnext_tiny,
    "convnext_small": convnext.convnext_small,
    "convnext_base": convnext.convnext_base,
    "convnext_large": convnext.convnext_large,
    # nfnet.py
    "nfnet_f0": nfnet.nfnet_f0,
    # unet.py
    "unet": unet.UNet,
    "unet_2015": unet.UNet2015,
}

# Canonical input [height, width, channels] and classes of the models that are not for ImageNet at
# 224x224x3 and 1000 classes.
CANONICAL: dict[str, tuple[tuple[int, int, int], int]] = {
    # lenet.py
    "lenet5": ((28, 28, 1), 10),
    "lenet5_1998": ((32, 32, 1), 10),
    # simple.py
    "cnn_32_64": ((28, 28, 1), 10),
    "cnn_32_64_dense64": ((28, 28, 1), 10),
    "cnn_32_64_dense128_dropout": ((28, 28, 1), 10),
    "cnn_32_dense64": ((32, 32, 3), 10),
    "cnn_5conv_2dense": ((28, 28, 1), 10),
    "cnn_strided_16_32": ((28, 28, 1), 10),
    "mlp": ((28, 28, 1), 10),
    "dense_dropout": ((28, 28, 1), 1),
    # airbench.py
    "airbench94": ((32, 32, 3), 10),
    # alexnet.py
    "alexnet_2012": ((227, 227, 3), 1000),
    # inception.py
    "inception_v3": ((299, 299, 3), 1000),
    # resnet.py
    "cifar_resnet20": ((32, 32, 3), 10),
    "cifar_resnet32": ((32, 32, 3), 10),
    "cifar_resnet44": ((32, 32, 3), 10),
    "cifar_resnet56": ((32, 32, 3), 10),
    "cifar_resnet110": ((32, 32, 3), 10),
    "wide_resnet28_10": ((32, 32, 3), 10),
    # densenet.py
    "cifar_densenet_bc100": ((32, 32, 3), 10),
    # efficientnet.py
    "efficientnet_b1": ((240, 240, 3), 1000),
    "efficientnet_b2": ((260, 260, 3), 1000),
    "efficientnet_b3": ((300, 300, 3), 1000),
    "efficientnet_b4": ((380, 380, 3), 1000),
    "efficientnet_b5": ((456, 456, 3), 1000),
    "efficientnet_b6": ((528, 528, 3), 1000),
    "efficientnet_b7": ((600, 600, 3), 1000),
    # nfnet.py
    "nfnet_f0": ((256, 256, 3), 1000),
    # unet.py
    "unet": ((512, 512, 1), 2),
    "unet_2015": ((572, 572, 1), 2),
}
IMAGENET: tuple[tuple[int, int, int], int] = ((224, 224, 3), 1000)


def create(name: str, *, num_classes: int | None, **overrides: Any) -> nn.Module:
    """Returns the model called `name`, not yet initialised.

    Args:
      name: a key of `MODELS`.
      num_classes: the logits (1 for a binary classifier), or None for the features before them.
      **overrides: fields of the model that differ from its defaults, such as `dtype`.

    Raises:
      UserError: unknown model or field, a value of another kind than the field's default, or
        `num_classes` below 1.
    """
    constructor = _constructor(name)
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise UserError(f"num_classes must be a whole number from 1 on or None, got {num_classes}.")
    fields = model_fields(name)
    for field, value in overrides.items():
        if field not in fields:
            raise unknown_name(f"argument of model {name}", field, fields)
        if not _fits(value, fields[field]):
            raise UserError(
                f"argument {field} of model {name} is {value!r}: it must be of the kind of its "
                f"default, {fields[field]!r}."
            )
    return constructor(num_classes=num_classes, **overrides)


def _fits(value: Any, default: Any) -> bool:
    """Whether `value` is of the kind of `default`: truth value, number, name or sequence."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and (isinstance(default, bool) or default is None)
    if isinstance(default, int):
        return isinstance(value, int)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, str):
        return isinstance(value, str) or callable(value)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple)
    return True


def list_models(pattern: str = "*") -> list[str]:
    """Returns the sorted names that match a shell pattern such as `vgg*_bn`; maybe none."""
    return sorted(fnmatch.filter(MODELS, pattern))


def input_shape(name: str) -> tuple[int, int, int]:
    """Returns the canonical image `[height, width, channels]` of a model.

    Raises:
      UserError: unknown model.
    """
    _constructor(name)
    return CANONICAL.get(name, IMAGENET)[0]


def canonical_classes(name: str) -> int:
    """Returns the number of classes with which a model was published.

    Raises:
      UserError: unknown model.
    """
    _constructor(name)
    return CANONICAL.get(name, IMAGENET)[1]


def model_fields(name: str) -> dict[str, Any]:
    """Returns the arguments that `create(name)` takes beside `num_classes`, with their defaults.

    Raises:
      UserError: unknown model.
    """
    constructor = _constructor(name)
    while isinstance(constructor, functools.partial):
        constructor = constructor.func
    fields = {field.name: field.default for field in dataclasses.fields(constructor)}  # type: ignore[arg-type]
    fields.update(presets(name))
    return {field: fields[field] for field in fields if field not in _NOT_OVERRIDDEN}


def presets(name: str) -> dict[str, Any]:
    """Returns the arguments by which a model differs from the defaults of its class.

    Raises:
      UserError: unknown model.
    """
    constructor = _constructor(name)
    preset: dict[str, Any] = {}
    while isinstance(constructor, functools.partial):
        preset = constructor.keywords | preset
        constructor = constructor.func
    return preset


_NOT_OVERRIDDEN = ("num_classes", "parent", "name")


def _constructor(name: str) -> Callable[..., nn.Module]:
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    return MODELS[name]
