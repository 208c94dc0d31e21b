"""Preprocessing of each framework's published weights: moments, channel order, sizes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import numpy as np

from cnnjax import models
from cnnjax.convert import mapping

# Moments of ImageNet's training images, in units where white is 1.
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

# (shorter side after resizing, side of the crop, interpolation): torchvision 0.28, the transforms
# of each network's IMAGENET1K_V1 weights, where they are not the usual ones.
USUAL = (256, 224, "bilinear")
TORCHVISION = {
    "inception_v3": (342, 299, "bilinear"),
    "shufflenet_v2_x1_5": (232, 224, "bilinear"),
    "shufflenet_v2_x2_0": (232, 224, "bilinear"),
    "efficientnet_b0": (256, 224, "bicubic"),
    "efficientnet_b1": (256, 240, "bicubic"),
    "efficientnet_b2": (288, 288, "bicubic"),
    "efficientnet_b3": (320, 300, "bicubic"),
    "efficientnet_b4": (384, 380, "bicubic"),
    "efficientnet_b5": (456, 456, "bicubic"),
    "efficientnet_b6": (528, 528, "bicubic"),
    "efficientnet_b7": (600, 600, "bicubic"),
    "convnext_tiny": (236, 224, "bilinear"),
    "convnext_small": (230, 224, "bilinear"),
    "convnext_base": (232, 224, "bilinear"),
    "convnext_large": (232, 224, "bilinear"),
}
# timm 1.0, the default configuration; its other networks have many.
TIMM = {
    "se_resnet50": (235, 224, "bicubic"),
    "resnet18_v2": (248, 224, "bicubic"),
    "resnet34_v2": (248, 224, "bicubic"),
    "resnet50_v2": (235, 224, "bicubic"),
    "resnet101_v2": (235, 224, "bicubic"),
    "resnet152_v2": (256, 224, "bicubic"),
    "mobilenet_v1": (256, 224, "bicubic"),
    "nfnet_f0": (213, 192, "bicubic"),
    "efficientnet_b0": (256, 224, "bicubic"),
    "efficientnet_b1": (266, 240, "bicubic"),
    "efficientnet_b2": (292, 256, "bicubic"),
    "efficientnet_b3": (329, 288, "bicubic"),
    "efficientnet_b4": (365, 320, "bicubic"),
    "efficientnet_b5": (448, 448, "bicubic"),
    "efficientnet_lite0": (256, 224, "bicubic"),
    "efficientnet_lite1": (272, 240, "bicubic"),
    "efficientnet_lite2": (292, 260, "bicubic"),
    "efficientnet_lite3": (331, 300, "bilinear"),
    "efficientnet_lite4": (413, 380, "bilinear"),
}
# The port has the weights of EfficientNet's authors, who cut the middle out of images that are
# larger by 32 pixels (their preprocessing.py, CROP_PADDING).
_SIDES = {"b": (224, 240, 260, 300, 380, 456, 528, 600), "lite": (224, 240, 260, 280, 300)}
LUKEMELAS = {
    f"efficientnet_{kind}{number}": (side + 32, side, "bicubic")
    for kind, sides in _SIDES.items()
    for number, side in enumerate(sides)
}
SIZES = {"torchvision": TORCHVISION, "timm": TIMM, "lukemelas": LUKEMELAS}
# GoogLeNet's and Inception's weights came from TensorFlow; torchvision's `transform_input` undoes
# ImageNet's moments for them.
HALVES = {
    "torchvision": ("googlenet", "inception_v3"),
    "timm": (
        *("mobilenet_v1", "efficientnet_b1"),
        *(name for name in TIMM if name.endswith("_v2") or "lite" in name),
    ),
}
# EfficientNet-Lite's authors take 127 off pixels from 0 to 255, and divide by 128.
LITE = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}

# Caffe's: the mean pixel of ImageNet is taken off, blue first, and nothing is divided.
CAFFE: dict[str, Any] = {
    "mean": [103.939 / 255, 116.779 / 255, 123.68 / 255],
    "std": [1 / 255] * 3,
    "channel_order": "BGR",
}
# keras.applications 3.15: what `preprocess_input` of each network's module does, under the name of
# the mode in its imagenet_utils. EfficientNet, MobileNet v3 and ConvNeXt have a `preprocess_input`
# that does nothing, and do the same within the network. The first pattern that fits counts.
KERAS: dict[str, tuple[str, dict[str, Any]]] = {
    "vgg*": ("caffe", CAFFE),
    "resnet*_v2": ("tf", HALF),
    "resnet*": ("caffe", CAFFE),
    "inception_v3": ("tf", HALF),
    "mobilenet_v[12]": ("tf", HALF),
    "mobilenet_v3_*": ("within the network", HALF),
    "densenet*": ("torch", IMAGENET),
    "efficientnet_*": ("within the network", IMAGENET),
    "convnext_*": ("within the network", IMAGENET),
}


def preprocessing(name: str, framework: str) -> dict[str, Any]:
    """Returns `mean` and `std`, and where known `resize`, `crop` and `interpolation`.

    For Keras also the `mode` of its preprocessing, and `channel_order` where that is not RGB.

    Args:
      name: of a model of `cnnjax.models`, or `MODULE:NAME`.
      framework: `torchvision`, `timm`, `lukemelas` or `keras`; `{}` is returned for others, which
        publish no weights, and for networks that a framework has not got.
    """
    if name not in models.MODELS or not _publishes(framework, name):
        return {}
    if framework == "keras":
        for pattern, (mode, moments) in KERAS.items():
            if fnmatch.fnmatch(name, pattern):
                return {"mode": mode, **moments}
        return {}
    moments = HALF if name in HALVES.get(framework, ()) else IMAGENET
    if framework == "lukemelas" and "lite" in name:
        moments = LITE
    sizes = SIZES[framework].get(name, USUAL if framework == "torchvision" else None)
    if sizes is None:
        return dict(moments)
    return {**moments, "resize": sizes[0], "crop": sizes[1], "interpolation": sizes[2]}


def fit(published: Mapping[str, Any]) -> str:
    """Returns how images get the size, as `cnnjax.data.image_files.fit_image` takes it.

    That is as the weights were tested where `preprocessing` knows the sizes; else it is stretched.
    """
    if "resize" not in published:
        return "resize"
    return f"center(resize={published['resize']}, interpolation={published['interpolation']})"


def _publishes(framework: str, name: str) -> bool:
    model = models.create(name, num_classes=models.canonical_classes(name))
    return framework in mapping.frameworks_for(model) and framework in (*SIZES, "keras")


def moments_within(arrays: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Returns the `mean` and `std` that a file of Keras's EfficientNet holds; `{}` without any.

    The network divides images by 255, takes off the mean and divides by the root of the variance.
    In the published weights the variance is ImageNet's deviation, and a further layer divides by
    its root again (keras.applications, efficientnet.py).
    """
    if not {"normalization/mean", "normalization/variance"} <= arrays.keys():
        return {}
    mean, variance = (
        np.asarray(arrays[f"normalization/{name}"], np.float64).reshape(-1)
        for name in ("mean", "variance")
    )
    published = variance.shape == (3,) and np.allclose(variance, IMAGENET["std"], rtol=1e-3)
    return {"mean": mean.tolist(), "std": (variance if published else np.sqrt(variance)).tolist()}
