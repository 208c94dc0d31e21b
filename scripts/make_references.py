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
import re
import sys
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
    """A network of a library, the size of its images, and the modules whose outputs are kept."""

    library: str
    name: str
    size: int
    stages: str


def _torchvision(name: str, size: int, stages: str) -> Network:
    return Network("torchvision", name, size, stages)


def _timm(name: str, size: int, stages: str) -> Network:
    return Network("timm", name, size, stages)


# By the name of the model in cnnjax.
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
    "mobilenet_v1": _timm("mobilenetv1_100", 64, r"blocks\.\d"),
    "efficientnet_lite0": _timm("tf_efficientnet_lite0", 65, r"blocks\.\d"),
    "nfnet_f0": _timm("dm_nfnet_f0", 64, r"stages\.\d"),
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
    record(module, NETWORKS[name].stages, kept)
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
        if "StdConv" in type(part).__name__:
            # timm adds it to a kernel's variance; the authors of NFNet take a maximum instead.
            part.eps = 1e-14
    module = module.double().eval()
    state = module.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():
            tensor.copy_(torch.from_numpy(weights.weight(name, tuple(tensor.shape))))
    return module


def create(network: Network, *, num_classes: int) -> Any:
    """Returns a network of a library, as it is initialized there."""
    if network.library == "timm":
        import timm

        return timm.create_model(network.name, num_classes=num_classes)
    import torchvision

    options = {"init_weights": False} if network.name in AUXILIARY else {}
    return torchvision.models.get_model(network.name, num_classes=num_classes, **options)


def record(module: Any, pattern: str, kept: dict[str, np.ndarray]) -> None:
    """Keeps the outputs of the submodules whose names match."""

    def hook(name: str) -> Any:
        # A copy: an activation in place may follow.
        return lambda _, inputs, output: kept.__setitem__(name, output.detach().numpy().copy())

    for name, part in module.named_modules():
        if re.fullmatch(pattern, name):
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
    module = build(NETWORKS["shufflenet_v2_x0_5"])
    record(module, r"conv1\.0|stage\d|conv5\.1|stage2\.0\.branch2\.0", kept)
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
    "state_dicts_real": {
        "timm": """
            efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4
            efficientnet_b5 efficientnet_b6 efficientnet_b7 tf_efficientnet_lite0
            tf_efficientnet_lite1 tf_efficientnet_lite2 tf_efficientnet_lite3 tf_efficientnet_lite4
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


if __name__ == "__main__":
    main(sys.argv[1:])
