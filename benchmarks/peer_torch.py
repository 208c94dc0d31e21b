"""PyTorch for `peers.py`: eager and compiled, in both memory formats, float32 batches ready."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

from workloads import (
    LEARNING_RATE,
    MODES,
    MOMENTUM,
    WORKLOADS,
    Images,
    Labels,
    Program,
    Run,
    Task,
    Workload,
    standardize,
)

# Networks for larger images are never faster with fewer threads.
SMALL_IMAGE = 64


def build(task: Task, image: Images, label: Labels) -> Program:
    """Returns the program of `torch` or `torch-compile`."""
    # Times of compilation are those of a first run.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    import torch

    device = "cuda" if task.device == "gpu" and torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = task.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = task.precision == "tf32"
        torch.backends.cudnn.benchmark = True
    floats = standardize(image)
    model = make_model(task.workload)
    variants: dict[str, dict[str, Callable[[], Run]]] = {mode: {} for mode in MODES}
    for mode in MODES:
        for layout, (name, setting) in itertools.product(
            ("contiguous", "channels-last"), _settings(task, device).items()
        ):
            variants[mode][f"{layout}, {name}"] = functools.partial(
                _prepare, task, mode, device, layout, setting, floats, label
            )
    return Program(
        num_parameters=sum(weight.numel() for weight in model.parameters()),
        platform="gpu" if device == "cuda" else "cpu",
        versions={"torch": torch.__version__},
        variants=variants,
    )


def _settings(task: Task, device: str) -> dict[str, dict[str, Any]]:
    """What is tried besides the memory format: thread counts; on a GPU the compiler's modes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    compiled = task.contender == "torch-compile"
    if device == "cuda":
        modes = ("default", "reduce-overhead") if compiled else (None,)
        return {mode or "eager": {"threads": cores, "compile_mode": mode} for mode in modes}
    counts = {1, max(1, cores // 2), cores}
    if max(task.workload.image_shape) > SMALL_IMAGE:
        counts = {cores}
    if compiled:
        # Compiling takes minutes for large networks, and one thread serves small ones only.
        counts = {1, cores} if task.workload.image_shape == (28, 28, 1) else {cores}
    return {
        f"{threads} thread{'s' * (threads > 1)}": {
            "threads": threads,
            "compile_mode": "default" if compiled else None,
        }
        for threads in sorted(counts)
    }


def _prepare(
    task: Task,
    mode: str,
    device: str,
    layout: str,
    setting: dict[str, Any],
    floats: Images,
    label: Labels,
) -> Run:
    import torch
    from torch.nn import functional

    torch.set_num_threads(setting["threads"])
    torch.manual_seed(0)
    memory_format = torch.contiguous_format if layout == "contiguous" else torch.channels_last
    model = make_model(task.workload)
    model = model.to(device, memory_format=memory_format).train(mode == "train")
    # The batches are cut beforehand: what is timed is the step.
    images = torch.from_numpy(floats).permute(0, 3, 1, 2).to(device, memory_format=memory_format)
    labels = torch.from_numpy(label).long().to(device)
    batches = itertools.cycle(
        zip(images.split(task.batch_size), labels.split(task.batch_size), strict=True)
    )
    forward: Any = model
    if setting["compile_mode"] is not None:
        # All variants compile the same classes; beyond the limit they would silently run eagerly.
        torch._dynamo.config.recompile_limit = 64
        forward = torch.compile(model, mode=setting["compile_mode"])
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)

    def precision() -> Any:
        if task.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(device, torch.bfloat16)

    def train(num_steps: int) -> float:
        torch.set_num_threads(setting["threads"])
        for _ in range(num_steps):
            image, label = next(batches)
            with precision():
                loss = functional.cross_entropy(forward(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def infer(num_steps: int) -> float:
        torch.set_num_threads(setting["threads"])
        with torch.inference_mode(), precision():
            for _ in range(num_steps):
                forward(next(batches)[0])
        if device == "cuda":
            torch.cuda.synchronize()
        return 0.0

    return train if mode == "train" else infer


def make_model(workload: Workload) -> Any:
    """Returns the network of `torch_model` if it fits the workload, else torchvision's.

    Raises ModuleNotFoundError without torchvision.
    """
    own = WORKLOADS.get(workload.model)
    if own is not None and own.image_shape == workload.image_shape:
        return torch_model(workload.model, workload.num_classes)
    return torchvision_model(workload.model, workload.num_classes)


def torchvision_model(name: str, num_classes: int) -> Any:
    """Returns torchvision's network of that name, without weights and auxiliary heads."""
    import torch

    library: Any = torch.library
    register = library.register_fake

    def register_others(operator: str, *arguments: Any, **options: Any) -> Any:
        # torchvision's operators, of which no network has any, may be compiled for another torch.
        if operator.startswith("torchvision::"):
            return lambda function: function
        return register(operator, *arguments, **options)

    library.register_fake = register_others
    try:
        from torchvision import models
    finally:
        library.register_fake = register
    # With auxiliary heads these two return several outputs.
    heads = {"googlenet": {"aux_logits": False}, "inception_v3": {"aux_logits": False}}
    options = heads.get(name, {})
    if options:
        options = options | {"init_weights": False}
    return models.get_model(name, weights=None, num_classes=num_classes, **options)


def torch_model(name: str, num_classes: int) -> Any:
    """Returns the network with as many parameters as `cnnjax.models` has, layer by layer."""
    from torch import nn

    def small(widths: tuple[int, ...], window: int, flat: int, dense: tuple[int, ...]) -> Any:
        layers: list[Any] = []
        channels = 1
        for width in widths:
            layers += [nn.Conv2d(channels, width, window), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        layers.append(nn.Flatten())
        for width in dense:
            layers += [nn.Linear(flat, width), nn.ReLU()]
            flat = width
        return nn.Sequential(*layers, nn.Linear(flat, num_classes))

    def conv_norm(channels: int, width: int, window: int, stride: int = 1) -> list[Any]:
        conv = nn.Conv2d(channels, width, window, stride, window // 2, bias=False)
        return [conv, nn.BatchNorm2d(width)]

    class Block(nn.Module):
        """Basic or bottleneck block (arXiv 1512.03385; the stride in the 3x3 convolution)."""

        def __init__(self, channels: int, width: int, stride: int, bottleneck: bool):
            super().__init__()
            features = 4 * width if bottleneck else width
            relu = nn.ReLU(inplace=True)
            if bottleneck:
                branch = [*conv_norm(channels, width, 1), relu]
                branch += [*conv_norm(width, width, 3, stride), relu]
                branch += conv_norm(width, features, 1)
            else:
                branch = [*conv_norm(channels, width, 3, stride), relu, *conv_norm(width, width, 3)]
            self.branch = nn.Sequential(*branch)
            same = stride == 1 and channels == features
            shortcut = [] if same else conv_norm(channels, features, 1, stride)
            self.shortcut = nn.Sequential(*shortcut)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            return self.relu(self.branch(x) + self.shortcut(x))

    def resnet(stage_sizes: tuple[int, ...], bottleneck: bool, small_images: bool) -> Any:
        layers = conv_norm(3, 64, 3 if small_images else 7, 1 if small_images else 2)
        layers.append(nn.ReLU(inplace=True))
        if not small_images:
            layers.append(nn.MaxPool2d(3, 2, 1))
        channels = 64
        for stage, depth in enumerate(stage_sizes):
            for index in range(depth):
                width = 64 * 2**stage
                layers.append(Block(channels, width, 2 if stage and not index else 1, bottleneck))
                channels = 4 * width if bottleneck else width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
        return nn.Sequential(*layers)

    return {
        "lenet5": lambda: small((6, 16), 5, 256, (120, 84)),
        "cnn_32_64_dense64": lambda: small((32, 64), 3, 1600, (64,)),
        "resnet18": lambda: resnet((2, 2, 2, 2), bottleneck=False, small_images=True),
        "resnet50": lambda: resnet((3, 4, 6, 3), bottleneck=True, small_images=False),
    }[name]()
