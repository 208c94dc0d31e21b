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
# The authors of DPN: pixels of 124, 117, 104, and a factor of 0.0167.
DPN = {"mean": [124 / 255, 117 / 255, 104 / 255], "std": [1 / (0.0167 * 255)] * 3}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}

# (shorter side after resizing, side of the crop, interpolation): torchvision 0.28, the transforms
# of each network's IMAGENET1K_V1 weights, where they are not the usual ones.
USUAL = (256, 224, "bilinear")
TORCHVISION = {
    "inception_v3": (342, 299, "bilinear"),
    "shufflenet_v2_x1_5": (232, 224, "bilinear"),
    "shufflenet_v2_x2_0": (232, 224, "bilinear"),
    "resnext101_64x4d": (232, 224, "bilinear"),
    "efficientnet_b0": (256, 224, "bicubic"),
    "efficientnet_b1": (256, 240, "bicubic"),
    "efficientnet_b2": (288, 288, "bicubic"),
    "efficientnet_b3": (320, 300, "bicubic"),
    "efficientnet_b4": (384, 380, "bicubic"),
    "efficientnet_b5": (456, 456, "bicubic"),
    "efficientnet_b6": (528, 528, "bicubic"),
    "efficientnet_b7": (600, 600, "bicubic"),
    "efficientnet_v2_s": (384, 384, "bilinear"),
    "efficientnet_v2_m": (480, 480, "bilinear"),
    "efficientnet_v2_l": (480, 480, "bicubic"),
    "mnasnet0_75": (232, 224, "bilinear"),
    "mnasnet1_3": (232, 224, "bilinear"),
    "convnext_tiny": (236, 224, "bilinear"),
    "convnext_small": (230, 224, "bilinear"),
    "convnext_base": (232, 224, "bilinear"),
    "convnext_large": (232, 224, "bilinear"),
    "vit_l_16": (242, 224, "bilinear"),
    # IMAGENET1K_SWAG_LINEAR_V1; there is no V1 of it.
    "vit_h_14": (224, 224, "bicubic"),
    "swin_t": (232, 224, "bicubic"),
    "swin_s": (246, 224, "bicubic"),
    "swin_b": (238, 224, "bicubic"),
    "swin_v2_t": (260, 256, "bicubic"),
    "swin_v2_s": (260, 256, "bicubic"),
    "swin_v2_b": (272, 256, "bicubic"),
    "maxvit_t": (224, 224, "bicubic"),
    # IMAGENET1K_SWAG_E2E_V1; there is no V1 of it.
    "regnet_y_128gf": (384, 384, "bicubic"),
}
# timm 1.0, the default configuration; its other networks have many.
TIMM = {
    "resnext101_64x4d": (235, 224, "bicubic"),
    "se_resnet50": (235, 224, "bicubic"),
    "resnet18_v2": (248, 224, "bicubic"),
    "resnet34_v2": (248, 224, "bicubic"),
    "resnet18d_v2": (248, 224, "bicubic"),
    "resnet34d_v2": (248, 224, "bicubic"),
    "resnet50d_v2": (256, 224, "bicubic"),
    "resnet50d_gn_v2": (235, 224, "bicubic"),
    "resnet50t_v2": (256, 224, "bicubic"),
    "resnet101d_v2": (256, 224, "bicubic"),
    "resnet152d_v2": (256, 224, "bicubic"),
    "resnet50_v2": (235, 224, "bicubic"),
    "resnet101_v2": (235, 224, "bicubic"),
    "resnet152_v2": (256, 224, "bicubic"),
    "resnet10t": (201, 176, "bicubic"),
    "resnet14t": (201, 176, "bicubic"),
    "resnet26": (256, 224, "bicubic"),
    "resnet200": (256, 224, "bicubic"),
    "resnet18d": (256, 224, "bicubic"),
    "resnet26d": (256, 224, "bicubic"),
    "resnet34d": (256, 224, "bicubic"),
    "resnet50d": (256, 224, "bicubic"),
    "resnet101d": (269, 256, "bicubic"),
    "resnet152d": (269, 256, "bicubic"),
    "resnet200d": (269, 256, "bicubic"),
    "resnet50c": (256, 224, "bicubic"),
    "resnet101c": (256, 224, "bicubic"),
    "resnet152c": (256, 224, "bicubic"),
    "resnet50s": (256, 224, "bicubic"),
    "resnet101s": (256, 224, "bicubic"),
    "resnet152s": (256, 224, "bicubic"),
    "resnet26t": (272, 256, "bicubic"),
    "resnet50t": (256, 224, "bicubic"),
    "resnext50d_32x4d": (256, 224, "bicubic"),
    "resnext101_32x16d": (256, 224, "bilinear"),
    "resnext101_32x32d": (256, 224, "bilinear"),
    "se_resnet18": (256, 224, "bicubic"),
    "se_resnet34": (256, 224, "bicubic"),
    "se_resnet101": (256, 224, "bicubic"),
    "se_resnet152": (256, 224, "bicubic"),
    "se_resnet50t": (256, 224, "bicubic"),
    "se_resnet152d": (269, 256, "bicubic"),
    "se_resnet200d": (292, 256, "bicubic"),
    "se_resnet269d": (292, 256, "bicubic"),
    "se_resnext26d_32x4d": (256, 224, "bicubic"),
    "se_resnext26t_32x4d": (256, 224, "bicubic"),
    "se_resnext50_32x4d": (256, 224, "bicubic"),
    "se_resnext101_32x4d": (256, 224, "bicubic"),
    "se_resnext101_32x8d": (235, 224, "bicubic"),
    "se_resnext101d_32x8d": (235, 224, "bicubic"),
    "se_resnext101_64x4d": (256, 224, "bicubic"),
    "eca_resnet26t": (292, 256, "bicubic"),
    "eca_resnet50t": (292, 256, "bicubic"),
    "eca_resnet_light": (256, 224, "bicubic"),
    "eca_resnet50d": (256, 224, "bicubic"),
    "eca_resnet101d": (256, 224, "bicubic"),
    "eca_resnet200d": (269, 256, "bicubic"),
    "eca_resnet269d": (336, 320, "bicubic"),
    "eca_resnext26t_32x4d": (256, 224, "bicubic"),
    "eca_resnext50t_32x4d": (256, 224, "bicubic"),
    "resnet_rs50": (175, 160, "bicubic"),
    "resnet_rs101": (204, 192, "bicubic"),
    "resnet_rs152": (256, 256, "bicubic"),
    "resnet_rs200": (256, 256, "bicubic"),
    "resnet_rs270": (256, 256, "bicubic"),
    "resnet_rs350": (288, 288, "bicubic"),
    "resnet_rs420": (320, 320, "bicubic"),
    "bit_resnet50x1": (256, 224, "bicubic"),
    "bit_resnet50x3": (448, 448, "bilinear"),
    "bit_resnet101x1": (448, 448, "bilinear"),
    "bit_resnet101x3": (448, 448, "bilinear"),
    "bit_resnet152x2": (256, 224, "bicubic"),
    "bit_resnet152x4": (480, 480, "bilinear"),
    "sk_resnet18": (256, 224, "bicubic"),
    "sk_resnet34": (256, 224, "bicubic"),
    "sk_resnet50": (256, 224, "bicubic"),
    "sk_resnet50d": (256, 224, "bicubic"),
    "sk_resnext50_32x4d": (256, 224, "bicubic"),
    "resnest14d": (256, 224, "bilinear"),
    "resnest26d": (256, 224, "bilinear"),
    "resnest50d": (256, 224, "bilinear"),
    "resnest50d_1s4x24d": (256, 224, "bicubic"),
    "resnest50d_4s2x40d": (256, 224, "bicubic"),
    "resnest101e": (292, 256, "bilinear"),
    "resnest200e": (352, 320, "bicubic"),
    "resnest269e": (448, 416, "bicubic"),
    "res2net50_26w_4s": (256, 224, "bilinear"),
    "res2net50_26w_6s": (256, 224, "bilinear"),
    "res2net50_26w_8s": (256, 224, "bilinear"),
    "res2net50_48w_2s": (256, 224, "bilinear"),
    "res2net50_14w_8s": (256, 224, "bilinear"),
    "res2net101_26w_4s": (256, 224, "bilinear"),
    "res2next50": (256, 224, "bilinear"),
    "res2net50d": (256, 224, "bilinear"),
    "res2net101d": (256, 224, "bilinear"),
    "xception": (333, 299, "bicubic"),
    "inception_v4": (341, 299, "bicubic"),
    "inception_resnet_v2": (333, 299, "bicubic"),
    "nfnet_f0": (213, 192, "bicubic"),
    **dict.fromkeys(
        ("vit_s_16", "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"),
        (248, 224, "bicubic"),
    ),
    **dict.fromkeys(
        (f"deit_{size}{form}" for size in ("tiny", "small", "base") for form in ("", "_distilled")),
        (248, 224, "bicubic"),
    ),
    "darknet53": (288, 256, "bicubic"),
    **dict.fromkeys(("cspdarknet53", "cspresnet50", "cspresnext50"), (288, 256, "bilinear")),
    **dict.fromkeys(
        ("dla34", "dla46_c", "dla46x_c", "dla60", "dla60x", "dla60x_c"), (256, 224, "bilinear")
    ),
    **dict.fromkeys(("dla102", "dla102x", "dla169"), (256, 224, "bilinear")),
    **dict.fromkeys(("dpn68", "dpn92", "dpn98", "dpn131", "dpn107"), (256, 224, "bicubic")),
    **dict.fromkeys(("vovnet39a", "vovnet57a"), (256, 224, "bicubic")),
    **dict.fromkeys(("ese_vovnet19b_dw", "ese_vovnet39b"), (256, 224, "bicubic")),
    **dict.fromkeys(("hrnet_w18_small", "hrnet_w18_small_v2"), (256, 224, "bicubic")),
    "hrnet_w18": (235, 224, "bilinear"),
    **dict.fromkeys(
        ("hrnet_w30", "hrnet_w32", "hrnet_w40", "hrnet_w44", "hrnet_w48", "hrnet_w64"),
        (256, 224, "bilinear"),
    ),
    "efficientnet_b1": (266, 240, "bicubic"),
    "efficientnet_b2": (292, 256, "bicubic"),
    "efficientnet_b3": (329, 288, "bicubic"),
    "efficientnet_b4": (365, 320, "bicubic"),
    "efficientnet_b5": (488, 456, "bicubic"),
    "efficientnet_b6": (560, 528, "bicubic"),
    "efficientnet_b7": (632, 600, "bicubic"),
    "efficientnet_v2_s": (300, 300, "bicubic"),
    "mobilenet_v4_conv_medium": (269, 256, "bicubic"),
    "mobilenet_v4_conv_large": (404, 384, "bicubic"),
    "efficientnet_lite0": (256, 224, "bicubic"),
    "efficientnet_lite1": (272, 240, "bicubic"),
    "efficientnet_lite2": (292, 260, "bicubic"),
    "efficientnet_lite3": (331, 300, "bilinear"),
    "efficientnet_lite4": (413, 380, "bilinear"),
}
# Sizes that several have.
TIMM_ALIKE = {
    (256, 224, "bicubic"): """
        mobilenet_v1 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small mobilenet_v4_conv_small
        mnasnet0_5 mnasnet0_75 mnasnet1_0 efficientnet_b0 ghostnet_x1_0 ghostnet_v2_x1_0
        ghostnet_v2_x1_3 ghostnet_v2_x1_6 convnext_base convnext_large
        convnext_v2_atto convnext_v2_femto convnext_v2_pico convnext_v2_nano convnext_v2_tiny
        convnext_v2_base convnext_v2_large
    """,
    (256, 224, "bilinear"): """
        repvgg_a0 repvgg_a1 repvgg_a2 repvgg_b0 repvgg_b1 repvgg_b1g4 repvgg_b2 repvgg_b2g4
        repvgg_b3 repvgg_b3g4 mobileone_s0
    """,
    (248, 224, "bilinear"): "mobileone_s1 mobileone_s2 mobileone_s3 mobileone_s4",
    (235, 224, "bicubic"): "regnet_y_3_2gf regnet_y_16gf convnext_tiny convnext_small",
    (233, 224, "bicubic"): "convmixer_768_32 convmixer_1024_20_ks9_p14 convmixer_1536_20",
    (232, 224, "bicubic"): """
        regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf
        regnet_x_32gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_8gf regnet_y_32gf
    """,
    (284, 256, "bicubic"): "fastvit_t8 fastvit_t12 fastvit_s12",
    (384, 384, "bicubic"): "efficientnet_v2_m efficientnet_v2_l",
}
TIMM |= {name: sizes for sizes, names in TIMM_ALIKE.items() for name in names.split()}
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
# ImageNet's moments for them. Those of EfficientNetV2 L came from there too.
HALVES = {
    "torchvision": ("googlenet", "inception_v3", "efficientnet_v2_l"),
    "timm": (
        *("mobilenet_v1", "xception", "inception_v4", "inception_resnet_v2", "efficientnet_b1"),
        *(name for name in TIMM if fnmatch.fnmatch(name, "resnet*_v2")),
        *(name for name in TIMM if fnmatch.fnmatch(name, "efficientnet_v2_?")),
        *(name for name in TIMM if name.startswith(("vit_", "bit_", "efficientnet_lite"))),
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
    """Returns `mean` and `std`, and where known `resize` or `share`, `crop` and `interpolation`.

    For Keras also the `mode` of its preprocessing, and `channel_order` where that is not RGB.

    Args:
      name: of a model of `cnnjax.models`, or `MODULE:NAME`.
      framework: `torchvision`, `timm`, `lukemelas`, `keras` or `tf_slim`; `{}` is returned for
        others, which publish no weights, and for networks that a framework has not got.
    """
    if name not in models.MODELS or not _publishes(framework, name):
        return {}
    if framework == "keras":
        for pattern, (mode, moments) in KERAS.items():
            if fnmatch.fnmatch(name, pattern):
                return {"mode": mode, **moments}
        return {}
    if framework == "tf_slim":
        # Its inception_preprocessing: the middle 87.5% of the image, from -1 to 1.
        side = models.input_shape(name)[0]
        return {**HALF, "share": 0.875, "crop": side, "interpolation": "bilinear"}
    moments = HALF if name in HALVES.get(framework, ()) else IMAGENET
    if name.startswith("dpn"):
        moments = DPN
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
    if "share" in published:
        return f"crop(share={published['share']:.6g})"
    if "resize" not in published:
        return "resize"
    return f"center(resize={published['resize']}, interpolation={published['interpolation']})"


def _publishes(framework: str, name: str) -> bool:
    model = models.create(name, num_classes=models.canonical_classes(name))
    return framework in mapping.frameworks_for(model) and framework in (*SIZES, "keras", "tf_slim")


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
