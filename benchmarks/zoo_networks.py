"""The networks of `zoo.py` by family, each as a workload, and which of them have a peer in PyTorch.

Where `peers.py` has written a network in PyTorch, that is the peer; else torchvision's of the same
name.
"""

from __future__ import annotations

import fnmatch

from workloads import WORKLOADS, Workload

from cnnjax import models
from cnnjax.errors import unknown_name

# A small and a large member of each family where there are two.
FAMILIES = {
    "lenet": ("lenet5",),
    "cnn": ("cnn_32_64_dense64",),
    "alexnet": ("alexnet",),
    "vgg": ("vgg11_bn", "vgg16"),
    "squeezenet": ("squeezenet1_0", "squeezenet1_1"),
    "googlenet": ("googlenet",),
    "inception": ("inception_v3",),
    "resnet": ("resnet18_cifar", "resnet18", "resnet50"),
    "resnext": ("resnext50_32x4d",),
    "wide_resnet": ("wide_resnet50_2",),
    "densenet": ("densenet121", "densenet169"),
    "mobilenet_v2": ("mobilenet_v2",),
    "mobilenet_v3": ("mobilenet_v3_small", "mobilenet_v3_large"),
    "shufflenet": ("shufflenet_v2_x0_5", "shufflenet_v2_x2_0"),
    "efficientnet": ("efficientnet_b0", "efficientnet_b2"),
    "regnet_x": ("regnet_x_400mf", "regnet_x_3_2gf"),
    "regnet_y": ("regnet_y_400mf", "regnet_y_3_2gf"),
    "convnext": ("convnext_tiny", "convnext_small"),
    "mnasnet": ("mnasnet0_5", "mnasnet1_0"),
    "efficientnet_v2": ("efficientnet_v2_s",),
    "vit": ("vit_b_32", "vit_b_16"),
    "swin": ("swin_t",),
    "swin_v2": ("swin_v2_t",),
    "maxvit": ("maxvit_t",),
}
# Workloads that are not a model as published.
OTHERS = {"resnet18_cifar": WORKLOADS["resnet18"]}
# torchvision's names among ours, and those that `peers.py` has written.
PEERS = (
    "lenet5",
    "cnn_32_64_dense64",
    "resnet18_cifar",
    *("alexnet", "googlenet", "inception_v3", "mobilenet_v2", "resnet18", "resnet34", "resnet50"),
    *("vgg*", "squeezenet*", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d"),
    *("resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2", "densenet*", "mobilenet_v3_*"),
    *("shufflenet_v2_*", "efficientnet_b*", "efficientnet_v2_*", "regnet_*", "convnext_[tsbl]*"),
    *("mnasnet*", "vit_[blh]_*", "swin_*", "maxvit_t"),
)
SMALL_IMAGE, SMALL_IMAGE_BATCH, BATCH = 64, 64, 8

DEFAULT = tuple(name for members in FAMILIES.values() for name in members)


def names() -> list[str]:
    """Returns all that can be measured."""
    return [*OTHERS, *models.MODELS]


def without_peer() -> list[str]:
    """Returns the networks that PyTorch and torchvision lack."""
    return [name for name in names() if not has_peer(name)]


def has_peer(name: str) -> bool:
    """Whether there is the same network in PyTorch."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in PEERS)


def family(name: str) -> str:
    """Returns the family under which the ratios of a network are averaged."""
    for key, members in FAMILIES.items():
        if name in members:
            return key
    module = models.MODELS[name].network.__module__.rpartition(".")[2]
    # Several families share the files of MobileNet, RegNet and ResNet.
    return max((key for key in FAMILIES if name.startswith(key)), key=len, default=module)


def workload(name: str) -> Workload:
    """Returns a network with its published images and classes.

    Raises:
      UserError: there is none of that name.
    """
    if name in OTHERS:
        return OTHERS[name]
    if name not in models.MODELS:
        raise unknown_name("network", name, names())
    height, width, channels = models.input_shape(name)
    batch = SMALL_IMAGE_BATCH if max(height, width) <= SMALL_IMAGE else BATCH
    return Workload(
        name, {}, (height, width, channels), models.canonical_classes(name), batch, batch
    )
