"""Records what PyTorch computes, for the tests of `cnnjax.convert` to compare with.

    python scripts/make_references.py                       # all of them
    python scripts/make_references.py resnet18 training     # some

Needs torch, torchvision and timm, which the tests do not need; cnnjax is not used. Weights are not
stored: `tests/convert/weights.py` draws them from their names, here and in the tests. Everything is
computed in float64. Each file records the versions.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import lzma
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
REFERENCES = ROOT / "tests" / "convert" / "references"
sys.path.insert(0, str(ROOT / "tests" / "convert"))
import weights  # type: ignore[import-not-found]  # noqa: E402

NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of a library, the size of its images, and the modules whose outputs are kept.

    `layout` is that of these outputs: `images` (channels first; of a list the last is kept),
    `channels_last`, or `tokens`, of which those of the patches are the last. `options` are
    arguments of the network there.
    """

    library: str
    name: str
    size: int
    stages: str
    layout: str = "images"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _torchvision(name: str, size: int, stages: str, layout: str = "images") -> Network:
    return Network("torchvision", name, size, stages, layout)


def _timm(name: str, size: int, stages: str, layout: str = "images", **options: Any) -> Network:
    return Network("timm", name, size, stages, layout, options)


# By the name of the model in cnnjax, and `@` with the library, where the tests would take another.
NETWORKS = {
    "alexnet": _torchvision("alexnet", 64, r"features\.(2|5|7|9|12)"),
    "vgg11": _torchvision("vgg11", 32, r"features\.(2|5|10|15|20)"),
    "vgg11_bn": _torchvision("vgg11_bn", 32, r"features\.(3|7|14|21|28)"),
    "googlenet": _torchvision("googlenet", 64, r"maxpool[12]|inception(3b|4e|5b)"),
    "inception_v3": _torchvision(
        "inception_v3", 75, r"Conv2d_2b_3x3|Conv2d_4a_3x3|Mixed_(5d|6e|7c)"
    ),
    "squeezenet1_0": _torchvision("squeezenet1_0", 64, r"features\.(1|5|10|12)"),
    "squeezenet1_1": _torchvision("squeezenet1_1", 64, r"features\.(1|4|7|12)"),
    "resnet18": _torchvision("resnet18", 64, r"layer\d"),
    "resnet50": _torchvision("resnet50", 64, r"layer\d"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d", 64, r"layer\d"),
    "densenet121": _torchvision("densenet121", 64, r"features\.denseblock\d"),
    "mobilenet_v2": _torchvision("mobilenet_v2", 64, r"features\.(1|3|6|10|13|16|17)"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small", 64, r"features\.(1|3|8|11)"),
    "mobilenet_v3_large": _torchvision("mobilenet_v3_large", 64, r"features\.(1|3|6|12|15)"),
    "shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5", 64, r"stage\d"),
    "efficientnet_b0": _torchvision("efficientnet_b0", 64, r"features\.[1-7]"),
    "regnet_x_400mf": _torchvision("regnet_x_400mf", 64, r"trunk_output\.block\d"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf", 64, r"trunk_output\.block\d"),
    "convnext_tiny": _torchvision("convnext_tiny", 64, r"features\.[1357]"),
    "se_resnet50": _timm("seresnet50", 64, r"layer\d"),
    "resnet18_v2": _timm("resnetv2_18", 64, r"stages\.\d"),
    "resnet50_v2": _timm("resnetv2_50", 64, r"stages\.\d"),
    "resnet10t": _timm("resnet10t", 64, r"layer\d"),
    "resnet26d": _timm("resnet26d", 64, r"layer\d"),
    "se_resnet18": _timm("seresnet18", 64, r"layer\d"),
    "eca_resnet26t": _timm("ecaresnet26t", 64, r"layer\d"),
    "resnet_rs50": _timm("resnetrs50", 64, r"layer\d"),
    "cbam_resnet18": _timm("cbam_resnet18", 64, r"layer\d"),
    "resnet18d_v2": _timm("resnetv2_18d", 64, r"stages\.\d"),
    "bit_resnet50x1": _timm("resnetv2_50x1_bit", 64, r"stages\.\d"),
    "sk_resnet18": _timm("skresnet18", 64, r"layer\d"),
    "sk_resnext50_32x4d": _timm("skresnext50_32x4d", 64, r"layer\d"),
    "resnest14d": _timm("resnest14d", 64, r"layer\d"),
    "resnest50d_1s4x24d": _timm("resnest50d_1s4x24d", 64, r"layer\d"),
    "resnest50d_4s2x40d": _timm("resnest50d_4s2x40d", 64, r"layer\d"),
    "res2net50_14w_8s": _timm("res2net50_14w_8s", 64, r"layer\d"),
    "res2next50": _timm("res2next50", 64, r"layer\d"),
    "xception": _timm("legacy_xception", 64, r"block(1|2|11|12)"),
    "inception_v4": _timm("inception_v4", 75, r"features\.(2|3|9|17|21)"),
    "inception_resnet_v2": _timm("inception_resnet_v2", 75, r"conv2d_(2b|4a|7b)|repeat|repeat_1"),
    "bagnet17": Network("own", "bagnet17", 64, ""),
    "mobilenet_v1": _timm("mobilenetv1_100", 64, r"blocks\.\d"),
    "efficientnet_lite0": _timm("tf_efficientnet_lite0", 65, r"blocks\.\d"),
    "nfnet_f0": _timm("dm_nfnet_f0", 64, r"stages\.\d"),
    "vit_b_32": _torchvision("vit_b_32", 224, r"encoder\.layers\.encoder_layer_\d+", "tokens"),
    # At another size than that of its positions, which are then interpolated.
    "deit_tiny_distilled": _timm(
        "deit_tiny_distilled_patch16_224", 64, r"blocks\.\d+", "tokens", dynamic_img_size=True
    ),
    "swin_t": _torchvision("swin_t", 64, r"features\.[1357]", "channels_last"),
    "swin_v2_t": _torchvision("swin_v2_t", 64, r"features\.[1357]", "channels_last"),
    "maxvit_t": _torchvision("maxvit_t", 224, r"blocks\.\d"),
    "darknet53": _timm("darknet53", 64, r"stages\.\d"),
    "cspdarknet53": _timm("cspdarknet53", 64, r"stages\.\d"),
    "cspresnext50": _timm("cspresnext50", 64, r"stages\.\d"),
    "dla34": _timm("dla34", 64, r"level\d"),
    "dla46x_c": _timm("dla46x_c", 64, r"level\d"),
    "dla102": _timm("dla102", 64, r"level\d"),
    "dpn68": _timm("dpn68", 64, r"features\.conv(2_3|3_4|4_12|5_3)"),
    "vovnet39a": _timm("vovnet39a", 64, r"stages\.\d"),
    "ese_vovnet19b_dw": _timm("ese_vovnet19b_dw", 64, r"stages\.\d"),
    "ese_vovnet39b": _timm("ese_vovnet39b", 64, r"stages\.\d"),
    "hrnet_w18_small": _timm("hrnet_w18_small", 64, r"layer1|stage\d"),
    "mnasnet0_5": _torchvision("mnasnet0_5", 64, r"layers\.([7-9]|1[0-3])"),
    "repvgg_a0": _timm("repvgg_a0", 64, r"stages\.\d"),
    "repvgg_b1g4": _timm("repvgg_b1g4", 64, r"stages\.\d"),
    "mobileone_s0": _timm("mobileone_s0", 64, r"stages\.\d"),
    "mobileone_s4": _timm("mobileone_s4", 64, r"stages\.\d"),
    "ghostnet_x1_0": _timm("ghostnet_100", 64, r"blocks\.[02468]"),
    "ghostnet_v2_x1_0": _timm("ghostnetv2_100", 96, r"blocks\.[02468]"),
    "mobilenet_v4_conv_small": _timm("mobilenetv4_conv_small", 64, r"blocks\.\d"),
    "mobilenet_v4_conv_medium": _timm("mobilenetv4_conv_medium", 64, r"blocks\.\d"),
    "convnext_v2_atto": _timm("convnextv2_atto", 64, r"stages\.\d"),
    "convmixer_1024_20_ks9_p14": _timm("convmixer_1024_20_ks9_p14", 56, "blocks"),
    "fastvit_t8": _timm("fastvit_t8", 64, r"stages\.\d"),
    "mnasnet0_5@timm": _timm("mnasnet_050", 64, r"blocks\.\d"),
    "mobilenet_v2@timm": _timm("mobilenetv2_100", 64, r"blocks\.\d"),
    "mobilenet_v3_large@timm": _timm("mobilenetv3_large_100", 64, r"blocks\.[01245]"),
    "mobilenet_v3_small@timm": _timm("mobilenetv3_small_100", 64, r"blocks\.[0134]"),
    "efficientnet_b0@timm": _timm("efficientnet_b0", 64, r"blocks\.\d"),
    "efficientnet_v2_s@timm": _timm("tf_efficientnetv2_s", 64, r"blocks\.\d"),
    "regnet_y_400mf@timm": _timm("regnety_004", 64, r"s\d"),
    "convnext_tiny@timm": _timm("convnext_tiny", 64, r"stages\.\d"),
    "efficientnet_v2_s": _torchvision("efficientnet_v2_s", 64, r"features\.[1-6]"),
}
# By the name of a network that timm builds by arguments only: the base and the arguments.
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    f"cbam_resnet{depth}": (f"resnet{depth}", {"block_args": {"attn_layer": "cbam"}})
    for depth in (18, 34, 50, 101)
}
# Input shapes of GoogLeNet's and Inception's auxiliary heads at the published sizes.
AUXILIARY = {
    "googlenet": {"aux1": (1, 512, 14, 14), "aux2": (1, 528, 14, 14)},
    "inception_v3": {"AuxLogits": (1, 768, 17, 17)},
}
# ResNet-18 in training mode: steps, batch, image size, and PyTorch's SGD.
TRAINING = {"num_steps": 20, "batch": 16, "size": 64, "num_classes": NUM_CLASSES}
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}


def main(arguments: list[str]) -> None:
    """Makes the references named, or all."""
    makers = {name: make_network for name in NETWORKS}
    makers |= {"training": make_training, "files": make_files, "check": make_check}
    makers |= dict.fromkeys(VARIANTS, make_state_dicts)
    for name in arguments or makers:
        makers[name](name)
        print(name, flush=True)


def make_network(name: str) -> None:
    """Logits and samples of the stages, in evaluation mode, of randomly drawn weights."""
    import torch

    module = build(NETWORKS[name])
    kept: dict[str, np.ndarray] = {}
    record(module, NETWORKS[name], kept)
    image = torch.from_numpy(weights.image(2, NETWORKS[name].size)).double()
    with torch.no_grad():
        logits = module(image)
        for aux, shape in AUXILIARY.get(name, {}).items():
            image = torch.from_numpy(weights.generator(aux).uniform(0, 1, shape))
            kept[aux] = getattr(module, aux)(image).numpy()
    stages = {stage: weights.samples(stage, array) for stage, array in kept.items()}
    save(f"{name}.npz", logits=logits.numpy().astype(np.float32), **stages)


def build(network: Network) -> Any:
    """Returns a network in float64 and evaluation mode, its weights drawn from their names."""
    import torch

    module = create(network, num_classes=NUM_CLASSES)
    for part in module.modules():
        if "ScaledStdConv" in type(part).__name__:
            # timm adds it to a kernel's variance; the authors of NFNet take a maximum instead.
            part.eps = 1e-14
    module = module.double().eval()
    state = module.state_dict()
    for name, tensor in state.items():
        # Swin's table of distances is no weight.
        if tensor.is_floating_point() and not name.endswith("relative_coords_table"):
            drawn = weights.weight(name, tuple(tensor.shape), network.name)
            tensor.copy_(torch.from_numpy(drawn))
    return module


def create(network: Network, *, num_classes: int) -> Any:
    """Returns a network of a library, as it is initialized there."""
    if network.library == "timm":
        import timm

        name, options = BUILT.get(network.name, (network.name, network.options))
        return timm.create_model(name, num_classes=num_classes, **options)
    if network.library == "own":
        import reference_networks

        return reference_networks.NETWORKS[network.name](num_classes)
    import torchvision

    options = {"init_weights": False} if network.name in AUXILIARY else {}
    return torchvision.models.get_model(network.name, num_classes=num_classes, **options)


def record(module: Any, network: Network, kept: dict[str, np.ndarray]) -> None:
    """Keeps the outputs of the submodules whose names match, as images, channels first."""

    def hook(name: str) -> Any:
        def keep(_: Any, inputs: Any, output: Any) -> None:
            array = (output[-1] if isinstance(output, list) else output).detach().numpy()
            if network.layout == "tokens":
                side = math.isqrt(array.shape[1])
                array = array[:, -side * side :].reshape(len(array), side, side, -1)
            # A copy: an activation in place may follow.
            kept[name] = (
                array if network.layout == "images" else array.transpose(0, 3, 1, 2)
            ).copy()

        return keep

    for name, part in module.named_modules():
        if re.fullmatch(network.stages, name):
            part.register_forward_hook(hook(name))


def make_training(name: str) -> None:
    """Losses and running statistics of ResNet-18 over some steps of SGD.

    In float64; for comparison the losses of PyTorch's own float32 too, which soon differ, because
    training amplifies rounding.
    """
    import torch

    losses, module = train(build(NETWORKS["resnet18"]))
    single, _ = train(build(NETWORKS["resnet18"]).float())
    statistics = {
        key: weights.samples(key, tensor.detach().numpy())
        for key, tensor in module.state_dict().items()
        if torch.is_floating_point(tensor)
    }
    settings = {key: np.array(value) for key, value in {**TRAINING, **SGD}.items()}
    save(f"{name}.npz", losses=losses, losses_float32=single, **statistics, **settings)


def train(module: Any) -> tuple[np.ndarray, Any]:
    """Returns the loss of each step, and the module after them."""
    import torch

    module.train()
    optimizer = torch.optim.SGD(module.parameters(), **SGD)
    losses = []
    for image, label in weights.training_batches(**TRAINING):
        logits = module(torch.from_numpy(image).to(next(module.parameters()).dtype))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(label))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses), module


def make_check(name: str) -> None:
    """What `--check` reads: an image and whole activations, in PyTorch's layout and names."""
    import torch

    kept: dict[str, np.ndarray] = {}
    network = NETWORKS["shufflenet_v2_x0_5"]
    parts = r"conv1\.0|stage\d|conv5\.1|stage2\.0\.branch2\.0"
    module = build(network)
    record(module, dataclasses.replace(network, stages=parts), kept)
    image = weights.image(1, 32)
    with torch.no_grad():
        logits = module(torch.from_numpy(image).double()).numpy()
    kept = {key: array.astype(np.float32) for key, array in kept.items()}
    save(f"{name}.npz", image=image, logits=logits.astype(np.float32), **kept)


def make_state_dicts(name: str) -> None:
    """Names and shapes of the tensors of a group's variants, at 1000 classes."""
    import torch

    found: dict[str, dict[str, list[int]]] = {}
    for library, variants in VARIANTS[name].items():
        for variant in variants.split():
            # RegNet computes its widths with tensors.
            place = "cpu" if variant.startswith("regnet") else "meta"
            with torch.device(place):
                state = create(Network(library, variant, 0, ""), num_classes=1000).state_dict()
            found[f"{library}/{variant}"] = {key: list(state[key].shape) for key in sorted(state)}
    content = lzma.compress(json.dumps(found, separators=(",", ":")).encode())
    save(f"{name}.npz", json=np.frombuffer(content, np.uint8))


# By group of families, as in `cnnjax.convert.tables`: one file of names and shapes each.
VARIANTS = {
    "state_dicts": {
        "torchvision": """
            alexnet vgg11 vgg13 vgg16 vgg19 vgg11_bn vgg13_bn vgg16_bn vgg19_bn googlenet
            inception_v3 squeezenet1_0 squeezenet1_1 resnet18 resnet34 resnet50 resnet101 resnet152
            wide_resnet50_2 wide_resnet101_2 resnext50_32x4d resnext101_32x8d densenet121
            densenet161 densenet169
            densenet201 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small shufflenet_v2_x0_5
            shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 efficientnet_b0 efficientnet_b1
            efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5 efficientnet_b6
            efficientnet_b7 regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf
            regnet_x_16gf regnet_x_32gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf
            regnet_y_8gf regnet_y_16gf regnet_y_32gf convnext_tiny convnext_small convnext_base
            convnext_large
        """,
        "timm": """
            resnet18 resnet34 resnet50 resnet101 resnet152 wide_resnet50_2 wide_resnet101_2
            resnext50_32x4d resnext101_32x4d resnext101_32x8d seresnet50 resnetv2_18 resnetv2_34
            resnetv2_50 resnetv2_101 resnetv2_152 densenet121 densenet161 densenet169 densenet201
            mobilenetv1_100 dm_nfnet_f0
        """,
    },
    "state_dicts_attention": {
        "torchvision": """
            vit_b_16 vit_b_32 vit_l_16 vit_l_32 vit_h_14 swin_t swin_s swin_b swin_v2_t swin_v2_s
            swin_v2_b maxvit_t regnet_y_128gf
        """,
        "timm": """
            vit_small_patch16_224 vit_base_patch16_224 vit_base_patch32_224 vit_large_patch16_224
            vit_large_patch32_224 vit_huge_patch14_224 deit_tiny_patch16_224
            deit_small_patch16_224 deit_base_patch16_224 deit_tiny_distilled_patch16_224
            deit_small_distilled_patch16_224 deit_base_distilled_patch16_224
        """,
    },
    "state_dicts_branched": {
        "timm": """
            darknet53 cspdarknet53 cspresnet50 cspresnext50 dla34 dla46_c dla46x_c dla60 dla60x
            dla60x_c dla102 dla102x dla169 dpn68 dpn92 dpn98 dpn131 dpn107 vovnet39a vovnet57a
            ese_vovnet19b_dw ese_vovnet39b hrnet_w18_small hrnet_w18_small_v2 hrnet_w18 hrnet_w30
            hrnet_w32 hrnet_w40 hrnet_w44 hrnet_w48 hrnet_w64
        """,
    },
    "state_dicts_residual": {
        "torchvision": """
            resnext101_64x4d
        """,
        "timm": """
            resnext101_64x4d
            resnet10t resnet14t resnet18d resnet26 resnet26d resnet26t resnet34d resnet50c resnet50d
            resnet50s resnet50t resnet101c resnet101d resnet101s resnet152c resnet152d resnet152s
            resnet200 resnet200d resnext50d_32x4d resnext101_32x16d resnext101_32x32d
            seresnet18 seresnet34 seresnet50t seresnet101 seresnet152 seresnet152d seresnet200d
            seresnet269d seresnext26d_32x4d seresnext26t_32x4d seresnext50_32x4d seresnext101_32x4d
            seresnext101_32x8d seresnext101d_32x8d seresnext101_64x4d
            ecaresnet26t ecaresnet50t ecaresnetlight ecaresnet50d ecaresnet101d ecaresnet200d
            ecaresnet269d ecaresnext26t_32x4d ecaresnext50t_32x4d
            resnetrs50 resnetrs101 resnetrs152 resnetrs200 resnetrs270 resnetrs350 resnetrs420
            cbam_resnet18 cbam_resnet34 cbam_resnet50 cbam_resnet101
            resnetv2_18d resnetv2_34d resnetv2_50d resnetv2_50d_gn resnetv2_50t resnetv2_101d
            resnetv2_152d
            resnetv2_50x1_bit resnetv2_50x3_bit resnetv2_101x1_bit resnetv2_101x3_bit
            resnetv2_152x2_bit resnetv2_152x4_bit
            skresnet18 skresnet34 skresnet50 skresnet50d skresnext50_32x4d
            resnest14d resnest26d resnest50d resnest50d_1s4x24d resnest50d_4s2x40d
            resnest101e resnest200e resnest269e
            res2net50_26w_4s res2net50_26w_6s res2net50_26w_8s res2net50_48w_2s res2net50_14w_8s
            res2net101_26w_4s res2next50 res2net50d res2net101d
            legacy_xception inception_v4 inception_resnet_v2
        """,
    },
    "state_dicts_mobile": {
        "torchvision": """
            mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 efficientnet_v2_s efficientnet_v2_m
            efficientnet_v2_l
        """,
        "timm": """
            repvgg_a0 repvgg_a1 repvgg_a2 repvgg_b0 repvgg_b1 repvgg_b1g4 repvgg_b2 repvgg_b2g4
            repvgg_b3 repvgg_b3g4 mobileone_s0 mobileone_s1 mobileone_s2 mobileone_s3 mobileone_s4
            ghostnet_100 ghostnetv2_100 ghostnetv2_130 ghostnetv2_160
            mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_conv_large
            convnextv2_atto convnextv2_femto convnextv2_pico convnextv2_nano convnextv2_tiny
            convnextv2_base convnextv2_large
            convmixer_768_32 convmixer_1024_20_ks9_p14 convmixer_1536_20
            fastvit_t8 fastvit_t12 fastvit_s12
            mnasnet_050 mnasnet_075 mnasnet_100
            mobilenetv2_100 mobilenetv3_large_100 mobilenetv3_small_100
            efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4
            tf_efficientnet_b5 tf_efficientnet_b6 tf_efficientnet_b7
            tf_efficientnetv2_s tf_efficientnetv2_m tf_efficientnetv2_l
            regnetx_004_tv regnetx_008 regnetx_016 regnetx_032 regnetx_080 regnetx_160 regnetx_320
            regnety_004 regnety_008_tv regnety_016 regnety_032 regnety_080_tv regnety_160
            regnety_320 convnext_tiny convnext_small convnext_base convnext_large
        """,
    },
    "state_dicts_lite": {
        "timm": """
            tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2 tf_efficientnet_lite3
            tf_efficientnet_lite4
        """,
    },
}


def save(file_name: str, **arrays: np.ndarray) -> None:
    """Writes a reference, and the versions of the libraries that computed it."""
    versions = {
        package: importlib.metadata.version(package)
        for package in ("torch", "torchvision", "timm", "numpy")
    }
    arrays["versions"] = np.array(str(versions))
    np.savez_compressed(REFERENCES / file_name, **arrays)  # type: ignore[arg-type]


def make_files(name: str) -> None:
    """Small files in each form of torch.save, old and new."""
    import torch

    del name
    weight = torch.arange(6.0).reshape(2, 3)
    state = {
        "weight": weight,
        "transposed": weight.T,
        "row": weight[1],
        "half": torch.tensor([0.5, -1.5], dtype=torch.float16),
        "bfloat16": torch.tensor([0.5, -1.5], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 4),
    }
    torch.save(state, REFERENCES / "tiny.pth")
    torch.save(state, REFERENCES / "tiny_before_1_6.pth", _use_new_zipfile_serialization=False)
    training = {
        "state_dict": {"module.weight": torch.nn.Parameter(weight)},
        "epoch": 3,
        "extra": {"ema": {"weight": weight}, "betas": (0.9, 0.999), "note": None},
    }
    torch.save(training, REFERENCES / "tiny_training.pth")
    make_training_files()
    make_module_files()


def tiny_module() -> Any:
    """A network of torch.nn's own modules, with a buffer that is kept and one that is not."""
    import torch

    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1, bias=False), torch.nn.BatchNorm2d(4))
    module = torch.nn.Sequential()
    module.add_module("conv", torch.nn.Conv2d(3, 4, 3))
    module.add_module("block", block)
    module.add_module("head", torch.nn.Linear(4, 2))
    module.register_buffer("kept", torch.arange(3.0))
    module.register_buffer("passing", torch.arange(5.0), persistent=False)
    return module


def make_training_files() -> None:
    """What torchvision's reference scripts and timm's train.py save, in small."""
    import argparse

    import torch

    module = tiny_module()
    average = torch.optim.swa_utils.AveragedModel(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    average.update_parameters(module)
    arguments = argparse.Namespace(lr=0.1, model="tiny", betas=(0.9, 0.999), data=Path("data"))
    torch.save(
        {
            "model": module.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": scheduler.state_dict(),
            "epoch": 3,
            "args": arguments,
            "scaler": {"scale": 65536.0},
            "model_ema": average.state_dict(),
        },
        REFERENCES / "reference_script.pth",
    )
    torch.save(
        {
            "epoch": 3,
            "arch": "tiny",
            "state_dict": {f"module.{k}": v for k, v in module.state_dict().items()},
            "optimizer": optimizer,
            "version": 2,
            "args": arguments,
            "metric": np.float64(76.5),
            "best": np.float32(77),
            "history": np.arange(3),
            "state_dict_ema": average.module.state_dict(),
        },
        REFERENCES / "timm_script.pth.tar",
    )


def make_module_files() -> None:
    """Whole modules in each form, every protocol, and tensors of other kinds."""
    import torch

    module = tiny_module()
    torch.save(module, REFERENCES / "module.pth")
    torch.save(module, REFERENCES / "module_before_1_6.pth", _use_new_zipfile_serialization=False)
    torch.save(
        {"model": torch.nn.DataParallel(module), "epoch": 1}, REFERENCES / "module_parallel.pth"
    )
    torch.jit.script(module.block).save(REFERENCES / "module_scripted.pt")
    state = {"weight": torch.arange(6.0).reshape(2, 3), "set": {1, 2}, "bytes": b"ab"}
    for protocol in (1, 2, 3, 4, 5):
        torch.save(state, REFERENCES / f"protocol{protocol}.pth", pickle_protocol=protocol)
    parameter: Any = torch.nn.Parameter(torch.arange(3.0))
    kind = type("Subclass", (torch.Tensor,), {"__module__": __name__})
    globals()["Subclass"] = kind  # Where pickle looks for it.
    parameter.extra = "attribute"
    quantized = torch.quantize_per_tensor(torch.arange(3.0), 0.1, 0, torch.qint8)
    torch.save(
        {
            "parameter": {"x": parameter},
            "array": {"x": np.arange(3, dtype=">f4"), "y": np.arange(6.0).reshape(2, 3).T},
            "subclass": {"x": torch.arange(3.0).as_subclass(kind)},
            "float8": {"x": torch.arange(3.0).to(torch.float8_e4m3fn)},
            "unsigned": {"x": torch.tensor([1, 2, 3], dtype=torch.uint16)},
            "complex": {"x": torch.tensor([1 + 2j])},
            "quantized": {"x": quantized, "y": torch.ones(1)},
            "sparse": {"x": torch.eye(2).to_sparse(), "y": torch.ones(1)},
            "nested": {"x": torch.nested.nested_tensor([torch.ones(1)]), "y": torch.ones(1)},
            "meta": {"x": torch.ones(1, device="meta"), "y": torch.ones(1)},
        },
        REFERENCES / "kinds.pth",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
