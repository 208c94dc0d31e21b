"""Variants of `cnnjax.models.resnet.ResNet` that timm has.

- C, D: He et al. 2019 (arXiv 1812.01187), section 4.2. S and T are timm's: S is C with a stem twice
  as wide, T is D with 24 channels in the stem's first convolution.
- SE-ResNet and SE-ResNeXt: Hu et al. 2018 (arXiv 1709.01507); a gate is at least 8 channels wide.
- ECA-ResNet: Wang et al. 2020 (arXiv 1910.03151).
- ResNet-RS: Bello et al. 2021 (arXiv 2103.07579), Table 11, at the images of the published weights.
- CBAM-ResNet: Woo et al. 2018 (arXiv 1807.06521). BAM-ResNet: Park et al. 2018 (arXiv 1807.06514).
- BiT: Kolesnikov et al. 2020 (arXiv 1912.11370), at the images of the published weights.
"""

from __future__ import annotations

import functools
from typing import Any

from cnnjax.models.resnet import ResNet
from cnnjax.models.rows import TIMM, row

bottleneck = functools.partial(row, ResNet, source=TIMM)
basic = functools.partial(bottleneck, block="basic")
resnet10 = functools.partial(basic, stage_sizes=(1, 1, 1, 1))
resnet14 = functools.partial(bottleneck, stage_sizes=(1, 1, 1, 1))
resnet18 = functools.partial(basic, stage_sizes=(2, 2, 2, 2))
resnet26 = functools.partial(bottleneck, stage_sizes=(2, 2, 2, 2))
resnet34 = functools.partial(basic, stage_sizes=(3, 4, 6, 3))
resnet50 = functools.partial(bottleneck, stage_sizes=(3, 4, 6, 3))
resnet101 = functools.partial(bottleneck, stage_sizes=(3, 4, 23, 3))
resnet152 = functools.partial(bottleneck, stage_sizes=(3, 8, 36, 3))
resnet200 = functools.partial(bottleneck, stage_sizes=(3, 24, 36, 3))
resnet269 = functools.partial(bottleneck, stage_sizes=(3, 30, 48, 8))
resnet_light = functools.partial(bottleneck, stage_sizes=(1, 1, 11, 3), shortcut="average")

C: dict[str, Any] = {"stem_widths": (32, 32)}
D: dict[str, Any] = {"stem_widths": (32, 32), "shortcut": "average"}
S: dict[str, Any] = {"stem_widths": (64, 64), "stem_features": 128}
T: dict[str, Any] = {"stem_widths": (24, 32), "shortcut": "average"}
V2_D: dict[str, Any] = {**D, "version": "v2"}
RS: dict[str, Any] = {**D, "stem_pool": "conv", "se_reduction": 4}
BIT: dict[str, Any] = {
    "version": "v2",
    "stem_pool": "max_of_zeros",
    "weight_standardization": True,
    "norm": "group",
}

# parameters, running statistics, multiply-accumulates, and what differs
PLAIN = {
    "resnet10t": resnet10(5_435_488, 5_872, 698_688_000, image=(176, 176, 3), **T),
    "resnet14t": resnet14(10_081_632, 19_440, 1_067_618_816, image=(176, 176, 3), **T),
    "resnet26": resnet26(15_995_176, 30_848, 2_342_256_640),
    "resnet200": resnet200(64_673_832, 176_000, 15_007_481_856),
    "resnet18d": resnet18(11_708_744, 9_728, 2_053_713_920, **D),
    "resnet26d": resnet26(16_014_408, 30_976, 2_581_897_216, **D),
    "resnet34d": resnet34(21_816_904, 17_152, 3_903_401_984, **D),
    "resnet50d": resnet50(25_576_264, 53_248, 4_328_824_832, **D),
    "resnet101d": resnet101(44_568_392, 105_472, 10_501_963_776, image=(256, 256, 3), **D),
    "resnet152d": resnet152(60_212_040, 151_552, 15_350_579_200, image=(256, 256, 3), **D),
    "resnet200d": resnet200(64_693_064, 176_128, 19_913_981_952, image=(256, 256, 3), **D),
    "resnet50c": resnet50(25_576_264, 53_248, 4_328_824_832, **C),
    "resnet101c": resnet101(44_568_392, 105_472, 8_041_046_016, **C),
    "resnet152c": resnet152(60_212_040, 151_552, 11_753_267_200, **C),
    "resnet50s": resnet50(25_680_808, 53_504, 5_444_337_664, **S),
    "resnet101s": resnet101(44_672_936, 105_728, 9_156_558_848, **S),
    "resnet152s": resnet152(60_316_584, 151_808, 12_868_780_032, **S),
    "resnet26t": resnet26(16_011_872, 30_960, 3_330_359_296, image=(256, 256, 3), **T),
    "resnet50t": resnet50(25_573_728, 53_232, 4_297_213_952, **T),
    "resnext50d_32x4d": resnet50(
        25_048_136, 68_352, 4_470_120_448, groups=32, width_per_group=4, **D
    ),
    "resnext101_32x16d": resnet101(
        194_026_792, 332_928, 36_163_289_088, groups=32, width_per_group=16
    ),
    "resnext101_32x32d": resnet101(
        468_530_472, 593_024, 87_106_781_184, groups=32, width_per_group=32
    ),
}
PRE_ACTIVATION = {
    "resnet18d_v2": resnet18(
        11_706_952, 7_936, 2_053_713_920, **V2_D, also={"timm": "resnetv2_18d"}
    ),
    "resnet34d_v2": resnet34(
        21_815_112, 15_360, 3_903_401_984, **V2_D, also={"timm": "resnetv2_34d"}
    ),
    "resnet50d_v2": resnet50(
        25_568_584, 45_568, 4_328_824_832, **V2_D, also={"timm": "resnetv2_50d"}
    ),
    "resnet50d_gn_v2": resnet50(
        25_568_584, 0, 4_328_824_832, norm="group", **V2_D, also={"timm": "resnetv2_50d_gn"}
    ),
    "resnet50t_v2": resnet50(
        25_566_048, 45_552, 4_297_213_952, version="v2", **T, also={"timm": "resnetv2_50t"}
    ),
    "resnet101d_v2": resnet101(
        44_560_712, 97_792, 8_041_046_016, **V2_D, also={"timm": "resnetv2_101d"}
    ),
    "resnet152d_v2": resnet152(
        60_204_360, 143_872, 11_753_267_200, **V2_D, also={"timm": "resnetv2_152d"}
    ),
}
SQUEEZE_EXCITE = {
    "se_resnet18": resnet18(
        11_779_624, 9_600, 1_814_161_408, se_reduction=16, also={"timm": "seresnet18"}
    ),
    "se_resnet34": resnet34(
        21_960_416, 17_024, 3_663_920_128, se_reduction=16, also={"timm": "seresnet34"}
    ),
    "se_resnet101": resnet101(
        49_326_872, 105_344, 7_806_148_608, se_reduction=16, also={"timm": "seresnet101"}
    ),
    "se_resnet152": resnet152(
        66_821_848, 151_424, 11_520_204_800, se_reduction=16, also={"timm": "seresnet152"}
    ),
    "se_resnet50t": resnet50(
        28_104_720, 53_232, 4_299_728_896, se_reduction=16, **T, also={"timm": "seresnet50t"}
    ),
    "se_resnet152d": resnet152(
        66_841_080,
        151_552,
        15_357_157_376,
        image=(256, 256, 3),
        se_reduction=16,
        **D,
        also={"timm": "seresnet152d"},
    ),
    "se_resnet200d": resnet200(
        71_855_096,
        176_128,
        19_921_084_416,
        image=(256, 256, 3),
        se_reduction=16,
        **D,
        also={"timm": "seresnet200d"},
    ),
    "se_resnet269d": resnet269(
        113_672_760,
        252_928,
        26_485_366_784,
        image=(256, 256, 3),
        se_reduction=16,
        **D,
        also={"timm": "seresnet269d"},
    ),
    "se_resnext26d_32x4d": resnet26(
        16_809_512,
        38_656,
        2_711_740_416,
        se_reduction=16,
        groups=32,
        width_per_group=4,
        **D,
        also={"timm": "seresnext26d_32x4d"},
    ),
    "se_resnext26t_32x4d": resnet26(
        16_806_976,
        38_640,
        2_680_129_536,
        se_reduction=16,
        groups=32,
        width_per_group=4,
        **T,
        also={"timm": "seresnext26t_32x4d"},
    ),
    "se_resnext50_32x4d": resnet50(
        27_559_896,
        68_224,
        4_232_994_816,
        se_reduction=16,
        groups=32,
        width_per_group=4,
        also={"timm": "seresnext50_32x4d"},
    ),
    "se_resnext101_32x4d": resnet101(
        48_955_416,
        137_856,
        7_974_739_968,
        se_reduction=16,
        groups=32,
        width_per_group=4,
        also={"timm": "seresnext101_32x4d"},
    ),
    "se_resnext101_32x8d": resnet101(
        93_569_048,
        202_880,
        16_418_758_656,
        se_reduction=16,
        groups=32,
        width_per_group=8,
        also={"timm": "seresnext101_32x8d"},
    ),
    "se_resnext101d_32x8d": resnet101(
        93_588_280,
        203_008,
        16_658_399_232,
        se_reduction=16,
        groups=32,
        width_per_group=8,
        **D,
        also={"timm": "seresnext101d_32x8d"},
    ),
    "se_resnext101_64x4d": resnet101(
        88_232_984,
        202_880,
        15_465_013_248,
        se_reduction=16,
        groups=64,
        width_per_group=4,
        also={"timm": "seresnext101_64x4d"},
    ),
}
EFFICIENT_ATTENTION = {
    "eca_resnet26t": resnet26(
        16_011_916,
        30_960,
        3_330_405_888,
        image=(256, 256, 3),
        attention="eca",
        **T,
        also={"timm": "ecaresnet26t"},
    ),
    "eca_resnet50t": resnet50(
        25_573_814,
        53_232,
        5_612_148_480,
        image=(256, 256, 3),
        attention="eca",
        **T,
        also={"timm": "ecaresnet50t"},
    ),
    "eca_resnet_light": resnet_light(
        30_162_046, 62_336, 4_089_287_424, attention="eca", also={"timm": "ecaresnetlight"}
    ),
    "eca_resnet50d": resnet50(
        25_576_350, 53_248, 4_328_912_640, attention="eca", **D, also={"timm": "ecaresnet50d"}
    ),
    "eca_resnet101d": resnet101(
        44_568_563, 105_472, 8_041_220_864, attention="eca", **D, also={"timm": "ecaresnet101d"}
    ),
    "eca_resnet200d": resnet200(
        64_693_400,
        176_128,
        19_914_274_560,
        image=(256, 256, 3),
        attention="eca",
        **D,
        also={"timm": "ecaresnet200d"},
    ),
    "eca_resnet269d": resnet269(
        102_093_077,
        252_928,
        41_364_716_288,
        image=(320, 320, 3),
        attention="eca",
        **D,
        also={"timm": "ecaresnet269d"},
    ),
    "eca_resnext26t_32x4d": resnet26(
        15_406_220,
        38_640,
        2_678_783_488,
        attention="eca",
        groups=32,
        width_per_group=4,
        **T,
        also={"timm": "ecaresnext26t_32x4d"},
    ),
    "eca_resnext50t_32x4d": resnet50(
        25_045_686,
        68_336,
        4_438_597_376,
        attention="eca",
        groups=32,
        width_per_group=4,
        **T,
        also={"timm": "ecaresnext50t_32x4d"},
    ),
}
RESNET_RS = {
    "resnet_rs50": resnet50(
        35_691_912, 53_376, 2_278_629_376, image=(160, 160, 3), **RS, also={"timm": "resnetrs50"}
    ),
    "resnet_rs101": resnet101(
        63_618_696, 105_600, 6_012_157_952, image=(192, 192, 3), **RS, also={"timm": "resnetrs101"}
    ),
    "resnet_rs152": resnet152(
        86_621_576, 151_680, 15_527_886_848, image=(256, 256, 3), **RS, also={"timm": "resnetrs152"}
    ),
    "resnet_rs200": resnet200(
        93_209_992, 176_256, 20_093_386_752, image=(256, 256, 3), **RS, also={"timm": "resnetrs200"}
    ),
    "resnet_rs270": bottleneck(
        129_861_448,
        243_072,
        26_950_189_056,
        image=(256, 256, 3),
        stage_sizes=(4, 29, 53, 4),
        **RS,
        also={"timm": "resnetrs270"},
    ),
    "resnet_rs350": bottleneck(
        163_956_168,
        312_192,
        43_493_793_792,
        image=(288, 288, 3),
        stage_sizes=(4, 36, 72, 4),
        **RS,
        also={"timm": "resnetrs350"},
    ),
    "resnet_rs420": bottleneck(
        191_891_656,
        370_560,
        63_942_344_704,
        image=(320, 320, 3),
        stage_sizes=(4, 44, 87, 4),
        **RS,
        also={"timm": "resnetrs420"},
    ),
}
BLOCK_ATTENTION = {
    "cbam_resnet18": resnet18(11_777_352, 9_616, 1_815_063_764, attention="cbam"),
    "cbam_resnet34": resnet34(21_956_456, 17_056, 3_665_434_742, attention="cbam"),
    "cbam_resnet50": resnet50(28_073_576, 53_152, 4_095_573_110, attention="cbam"),
    "cbam_resnet101": resnet101(49_295_628, 105_410, 7_812_577_278, attention="cbam"),
    "bam_resnet50": resnet50(
        25_915_099,
        54_016,
        4_171_331_328,
        source="by hand, tests/models/test_gates.py",
        attention="bam",
    ),
}
BIG_TRANSFER = {
    "bit_resnet50x1": resnet50(
        25_549_352, 0, 4_089_184_256, **BIT, also={"timm": "resnetv2_50x1_bit"}
    ),
    "bit_resnet50x3": resnet50(
        217_319_080,
        0,
        144_310_714_368,
        image=(448, 448, 3),
        features=192,
        stem_features=192,
        **BIT,
        also={"timm": "resnetv2_50x3_bit"},
    ),
    "bit_resnet101x1": resnet101(
        44_541_480,
        0,
        31_199_477_760,
        image=(448, 448, 3),
        **BIT,
        also={"timm": "resnetv2_101x1_bit"},
    ),
    "bit_resnet101x3": resnet101(
        387_934_888,
        0,
        277_950_676_992,
        image=(448, 448, 3),
        features=192,
        stem_features=192,
        **BIT,
        also={"timm": "resnetv2_101x3_bit"},
    ),
    "bit_resnet152x2": resnet152(
        236_335_208,
        0,
        45_814_382_592,
        features=128,
        stem_features=128,
        **BIT,
        also={"timm": "resnetv2_152x2_bit"},
    ),
    "bit_resnet152x4": resnet152(
        936_533_224,
        0,
        839_254_016_000,
        image=(480, 480, 3),
        features=256,
        stem_features=256,
        **BIT,
        also={"timm": "resnetv2_152x4_bit"},
    ),
}
ROWS = {
    **PLAIN,
    **PRE_ACTIVATION,
    **SQUEEZE_EXCITE,
    **EFFICIENT_ATTENTION,
    **RESNET_RS,
    **BLOCK_ATTENTION,
    **BIG_TRANSFER,
}
