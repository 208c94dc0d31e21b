"""Exact sizes of every model at its canonical image and classes, from shapes alone.

Parameters are trainable ones; statistics are BatchNorm's running values; multiply-accumulates are
those of convolutions and dense layers. ImageNet rows: torchvision's published tables (num_params,
_ops) where it has the model, the paper's own table or a count by hand where not.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from cnnjax import models, trees

# name: (parameters, running statistics, multiply-accumulates)
SIZES: dict[str, tuple[int, int, int]] = {
    # lenet.py: by hand, layer by layer, in test_lenet.py
    "lenet5": (44_426, 0, 281_640),
    "lenet5_1998": (60_000, 0, 325_680),
    # simple.py: by hand in test_simple.py
    "cnn_32_64": (34_826, 0, 2_440_960),
    "cnn_32_64_dense64": (121_930, 0, 2_528_000),
    "cnn_32_64_dense128_dropout": (225_034, 0, 2_631_040),
    "cnn_32_dense64": (462_410, 0, 1_239_040),
    "cnn_5conv_2dense": (287_722, 0, 22_050_560),
    # 272 + 8,224 + 156,900 + 1,010; 50,176 + 401,408 + 156,800 + 1,000.
    "cnn_strided_16_32": (166_406, 0, 609_384),
    "mlp": (266_610, 0, 266_200),
    "dense_dropout": (50_305, 0, 50_240),
    # airbench.py: by hand, 288 + 24 for whitening, 9 * (24 * 64 + 64 * 64 + ...), no scales
    "airbench94": (1_971_640, 2_304, 118_147_360),
    # alexnet.py: torchvision; Krizhevsky et al. 2012, section 3.5 ("60 million parameters")
    "alexnet": (61_100_840, 0, 714_188_480),
    "alexnet_2012": (60_965_224, 0, 724_406_816),
    # vgg.py: torchvision
    "vgg11": (132_863_336, 0, 7_609_090_048),
    "vgg11_bn": (132_868_840, 5_504, 7_609_090_048),
    "vgg13": (133_047_848, 0, 11_308_466_176),
    "vgg13_bn": (133_053_736, 5_888, 11_308_466_176),
    "vgg16": (138_357_544, 0, 15_470_264_320),
    "vgg16_bn": (138_365_992, 8_448, 15_470_264_320),
    "vgg19": (143_667_240, 0, 19_632_062_464),
    "vgg19_bn": (143_678_248, 11_008, 19_632_062_464),
    # googlenet.py, inception.py: torchvision, without auxiliary heads
    "googlenet": (6_624_904, 14_560, 1_498_376_192),
    "inception_v3": (23_834_568, 34_432, 5_713_216_096),
    # squeezenet.py: torchvision (0.82 and 0.35 GFLOPS in its table)
    "squeezenet1_0": (1_248_424, 0, 818_924_576),
    "squeezenet1_1": (1_235_496, 0, 349_151_936),
    # resnet.py: torchvision; v2 and SE: timm; v1: v1.5 less 3 * 77,070,336 (first convolutions at
    # the lower resolution); CIFAR and Wide ResNet: by hand in test_resnet.py
    "resnet18": (11_689_512, 9_600, 1_814_073_344),
    "resnet34": (21_797_672, 17_024, 3_663_761_408),
    "resnet50": (25_557_032, 53_120, 4_089_184_256),
    "resnet101": (44_549_160, 105_344, 7_801_405_440),
    "resnet152": (60_192_808, 151_424, 11_513_626_624),
    "resnet50_v1": (25_557_032, 53_120, 3_857_973_248),
    "resnet101_v1": (44_549_160, 105_344, 7_570_194_432),
    "resnet152_v1": (60_192_808, 151_424, 11_282_415_616),
    "resnet18_v2": (11_687_720, 7_808, 1_814_073_344),
    "resnet34_v2": (21_795_880, 15_232, 3_663_761_408),
    "resnet50_v2": (25_549_352, 45_440, 4_089_184_256),
    "resnet101_v2": (44_541_480, 97_664, 7_801_405_440),
    "resnet152_v2": (60_185_128, 143_744, 11_513_626_624),
    "cifar_resnet20": (269_722, 1_376, 40_551_040),
    "cifar_resnet32": (464_154, 2_272, 68_862_592),
    "cifar_resnet44": (658_586, 3_168, 97_174_144),
    "cifar_resnet56": (853_018, 4_064, 125_485_696),
    "cifar_resnet110": (1_727_962, 8_096, 252_887_680),
    "wide_resnet28_10": (36_479_194, 17_952, 5_243_328_768),
    "wide_resnet50_2": (68_883_240, 68_224, 11_398_021_120),
    "wide_resnet101_2": (126_886_696, 137_856, 22_753_050_624),
    "resnext50_32x4d": (25_028_904, 68_224, 4_230_479_872),
    "resnext101_32x4d": (44_177_704, 137_856, 7_969_996_800),
    "resnext101_32x8d": (88_791_336, 202_880, 16_414_015_488),
    "se_resnet50": (28_088_024, 53_120, 4_091_699_200),
    # densenet.py: torchvision; CIFAR: by hand in test_densenet.py
    "densenet121": (7_978_856, 83_648, 2_834_161_664),
    "densenet161": (28_681_000, 219_936, 7_727_907_072),
    "densenet169": (14_149_480, 158_400, 3_359_843_328),
    "densenet201": (20_013_928, 229_056, 4_291_365_888),
    "cifar_densenet_bc100": (769_162, 23_988, 287_929_692),
    # mobilenet.py: torchvision; v1: 4.2 M and 569 M in the paper's Table 8
    "mobilenet_v1": (4_231_976, 21_888, 568_740_352),
    "mobilenet_v2": (3_504_872, 34_112, 300_774_272),
    "mobilenet_v3_large": (5_483_032, 24_400, 216_589_760),
    "mobilenet_v3_small": (2_542_856, 12_112, 56_510_400),
    # shufflenet.py: torchvision
    "shufflenet_v2_x0_5": (1_366_792, 7_952, 40_476_448),
    "shufflenet_v2_x1_0": (2_278_604, 16_180, 144_907_992),
    "shufflenet_v2_x1_5": (3_503_624, 23_440, 295_759_392),
    "shufflenet_v2_x2_0": (7_393_996, 33_716, 583_253_464),
    # efficientnet.py: torchvision
    "efficientnet_b0": (5_288_548, 42_016, 385_814_752),
    "efficientnet_b1": (7_794_184, 62_048, 686_802_832),
    "efficientnet_b2": (9_109_994, 67_568, 993_561_872),
    "efficientnet_b3": (12_233_232, 87_296, 1_827_141_392),
    "efficientnet_b4": (19_341_616, 125_200, 4_393_771_024),
    "efficientnet_b5": (30_389_784, 172_736, 10_266_384_752),
    "efficientnet_b6": (43_040_704, 224_432, 19_067_593_536),
    "efficientnet_b7": (66_347_960, 310_720, 37_745_884_192),
    # regnet.py: torchvision
    "regnet_x_400mf": (5_495_976, 37_856, 413_812_608),
    "regnet_x_800mf": (7_259_656, 37_312, 799_699_712),
    "regnet_x_1_6gf": (9_190_136, 43_504, 1_602_849_792),
    "regnet_x_3_2gf": (15_296_552, 62_560, 3_176_621_952),
    "regnet_x_8gf": (39_572_648, 90_464, 7_995_132_416),
    "regnet_x_16gf": (54_278_536, 111_168, 15_940_755_456),
    "regnet_x_32gf": (107_811_560, 162_016, 31_735_929_792),
    "regnet_y_400mf": (4_344_144, 27_152, 401_842_848),
    "regnet_y_800mf": (6_432_512, 30_432, 833_856_256),
    "regnet_y_1_6gf": (11_202_430, 52_672, 1_612_076_160),
    "regnet_y_3_2gf": (19_436_338, 66_160, 3_176_482_752),
    "regnet_y_8gf": (39_381_472, 86_528, 8_473_070_592),
    "regnet_y_16gf": (83_590_140, 122_816, 15_911_510_272),
    "regnet_y_32gf": (145_046_770, 158_288, 32_279_552_832),
    # convnext.py: torchvision
    "convnext_tiny": (28_589_128, 0, 4_455_531_264),
    "convnext_small": (50_223_688, 0, 8_683_712_256),
    "convnext_base": (88_591_464, 0, 15_354_729_472),
    "convnext_large": (197_767_336, 0, 34_361_433_600),
    # nfnet.py: timm
    "nfnet_f0": (71_489_284, 0, 12_384_198_656),
    # unet.py: by hand in test_unet.py, layer by layer
    "unet": (31_030_658, 0, 192_384_335_872),
    "unet_2015": (31_030_658, 0, 150_428_424_448),
}


# Larger members of families of which the small ones are always tested.
LARGE = re.compile(
    r"resnet(34|101|152).*|cifar_resnet(32|44|110)|.*(resnet101|resnext101).*|densenet(161|169|201)"
    r"|shufflenet_v2_x(0_5|1_5|2_0)|efficientnet_b[1-7]|regnet_._(800mf|.*gf)"
    r"|convnext_(small|base|large)"
)
CASES = [
    pytest.param(name, marks=[pytest.mark.slow] if LARGE.fullmatch(name) else []) for name in SIZES
]


# Their logits are of each pixel.
PIXEL_CLASSES = ("unet", "unet_2015")


def test_no_model_lacks_an_entry():
    assert sorted(SIZES) == models.list_models()


@pytest.mark.parametrize("name", CASES)
def test_sizes(name):
    model = models.create(name, num_classes=models.canonical_classes(name))
    result = models.summary(model, models.input_shape(name))
    assert (result.parameters, result.statistics, result.macs) == SIZES[name]


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
