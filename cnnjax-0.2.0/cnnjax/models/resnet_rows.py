"""The published networks of `cnnjax.models.resnet.ResNet`."""

from __future__ import annotations

import functools

from cnnjax.models.resnet import ResNet
from cnnjax.models.rows import TIMM, TORCHVISION, also_called, row

published = functools.partial(row, ResNet, source=TORCHVISION)
resnet18 = functools.partial(published, block="basic", stage_sizes=(2, 2, 2, 2))
resnet34 = functools.partial(published, block="basic", stage_sizes=(3, 4, 6, 3))
resnet50 = functools.partial(published, stage_sizes=(3, 4, 6, 3))
resnet101 = functools.partial(published, stage_sizes=(3, 4, 23, 3))
resnet152 = functools.partial(published, stage_sizes=(3, 8, 36, 3))
cifar = functools.partial(
    row,
    ResNet,
    source="by hand, tests/models/test_resnet.py",
    image=(32, 32, 3),
    num_classes=10,
    block="basic",
    stem="cifar",
    stem_features=16,
)
option_a = functools.partial(cifar, features=16, shortcut="pad")
# Depth 28 is 6 * 4 + 4: three stages of four blocks (arXiv 1605.07146, Table 1).
wide = functools.partial(cifar, version="v2")
V1 = "v1.5 less 3 * 77,070,336: a stage's first convolution is at the lower resolution"

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "resnet18": resnet18(11_689_512, 9_600, 1_814_073_344),
    "resnet34": resnet34(21_797_672, 17_024, 3_663_761_408),
    "resnet50": resnet50(25_557_032, 53_120, 4_089_184_256),
    "resnet101": resnet101(44_549_160, 105_344, 7_801_405_440),
    "resnet152": resnet152(60_192_808, 151_424, 11_513_626_624),
    "resnet50_v1": resnet50(25_557_032, 53_120, 3_857_973_248, source=V1, version="v1"),
    "resnet101_v1": resnet101(44_549_160, 105_344, 7_570_194_432, source=V1, version="v1"),
    "resnet152_v1": resnet152(60_192_808, 151_424, 11_282_415_616, source=V1, version="v1"),
    "resnet18_v2": resnet18(
        11_687_720, 7_808, 1_814_073_344, source=TIMM, version="v2", also={"timm": "resnetv2_18"}
    ),
    "resnet34_v2": resnet34(
        21_795_880, 15_232, 3_663_761_408, source=TIMM, version="v2", also={"timm": "resnetv2_34"}
    ),
    "resnet50_v2": resnet50(
        25_549_352, 45_440, 4_089_184_256, source=TIMM, version="v2", also={"timm": "resnetv2_50"}
    ),
    "resnet101_v2": resnet101(
        44_541_480, 97_664, 7_801_405_440, source=TIMM, version="v2", also={"timm": "resnetv2_101"}
    ),
    "resnet152_v2": resnet152(
        60_185_128,
        143_744,
        11_513_626_624,
        source=TIMM,
        version="v2",
        also={"timm": "resnetv2_152"},
    ),
    "cifar_resnet20": option_a(269_722, 1_376, 40_551_040, stage_sizes=(3, 3, 3)),
    "cifar_resnet32": option_a(464_154, 2_272, 68_862_592, stage_sizes=(5, 5, 5)),
    "cifar_resnet44": option_a(658_586, 3_168, 97_174_144, stage_sizes=(7, 7, 7)),
    "cifar_resnet56": option_a(853_018, 4_064, 125_485_696, stage_sizes=(9, 9, 9)),
    "cifar_resnet110": option_a(1_727_962, 8_096, 252_887_680, stage_sizes=(18, 18, 18)),
    "wide_resnet28_10": wide(
        36_479_194, 17_952, 5_243_328_768, features=160, stage_sizes=(4, 4, 4)
    ),
    "wide_resnet16_8": wide(10_961_370, 7_200, 1_548_145_664, features=128, stage_sizes=(2, 2, 2)),
    "wide_resnet28_2": wide(1_467_610, 3_616, 214_353_152, features=32, stage_sizes=(4, 4, 4)),
    "wide_resnet40_2": wide(2_243_546, 5_408, 327_599_360, features=32, stage_sizes=(6, 6, 6)),
    "wide_resnet40_4": wide(8_949_210, 10_784, 1_298_582_016, features=64, stage_sizes=(6, 6, 6)),
    "wide_resnet50_2": resnet50(68_883_240, 68_224, 11_398_021_120, width_per_group=128),
    "wide_resnet101_2": resnet101(126_886_696, 137_856, 22_753_050_624, width_per_group=128),
    "resnext50_32x4d": resnet50(25_028_904, 68_224, 4_230_479_872, groups=32, width_per_group=4),
    "resnext101_32x4d": resnet101(44_177_704, 137_856, 7_969_996_800, groups=32, width_per_group=4),
    "resnext101_32x8d": resnet101(
        88_791_336, 202_880, 16_414_015_488, groups=32, width_per_group=8
    ),
    "resnext101_64x4d": resnet101(
        83_455_272, 202_880, 15_460_270_080, groups=64, width_per_group=4
    ),
    "se_resnet50": resnet50(
        28_088_024, 53_120, 4_091_699_200, source=TIMM, se_reduction=16, also={"timm": "seresnet50"}
    ),
}
KERAS = {"resnet{}": "ResNet{}", "resnet{}_v2": "ResNet{}V2"}
ROWS |= also_called(
    ROWS,
    "keras",
    {ours.format(n): theirs.format(n) for ours, theirs in KERAS.items() for n in (50, 101, 152)},
)
