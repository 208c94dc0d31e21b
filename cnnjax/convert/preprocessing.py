"""How the published weights of a framework want their images: moments, sizes, interpolation."""

from __future__ import annotations

from typing import Any

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
}
SIZES = {"torchvision": TORCHVISION, "timm": TIMM}
# GoogLeNet's and Inception's weights came from TensorFlow; torchvision's `transform_input` undoes
# ImageNet's moments for them.
HALVES = {
    "torchvision": ("googlenet", "inception_v3"),
    "timm": ("mobilenet_v1", *(name for name in TIMM if name.endswith("_v2"))),
}


def preprocessing(name: str, framework: str) -> dict[str, Any]:
    """Returns `mean` and `std`, and where known `resize`, `crop` and `interpolation`.

    Args:
      name: of a model of `cnnjax.models`.
      framework: `torchvision` or `timm`; `{}` is returned for others, which publish no weights.
    """
    if framework not in SIZES:
        return {}
    moments = HALF if name in HALVES[framework] else IMAGENET
    sizes = SIZES[framework].get(name, USUAL if framework == "torchvision" else None)
    if sizes is None:
        return dict(moments)
    return {**moments, "resize": sizes[0], "crop": sizes[1], "interpolation": sizes[2]}
