"""PyTorch's single layers for `zoo.py --operations`: eager, in both memory formats.

With one thread and with all: small layers gain nothing by threads, and beside other work a thread
that waits for another makes a call of microseconds take milliseconds.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from operations import OnDemand, Operation, read_mode
from torch import nn
from torch.nn import functional
from workloads import Images, Labels, Program, Run, Task

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "leaky_relu": functional.leaky_relu,
    "elu": functional.elu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "hard_swish": functional.hardswish,
    "hard_sigmoid": functional.hardsigmoid,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
# Those that act on the last axis: torchvision's networks keep the channels there for them.
CHANNELS_LAST_AXIS = ("dense", "layer norm")


def build(task: Task, image: Images, label: Labels) -> Program:
    """Returns the program whose modes are the operations of `mode_of`."""
    del task, image, label
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = sorted({1, cores or 1}, reverse=True)

    def variants(text: str) -> dict[str, Callable[[], Run]]:
        operation, mode = read_mode(text)
        plain = operation.kind in CHANNELS_LAST_AXIS or len(operation.shapes[0]) != 4
        return {
            f"{name}, {threads} thread{'s' * (threads > 1)}": functools.partial(
                prepare, operation, mode, layout, threads
            )
            for name, layout in LAYOUTS.items()
            for threads in counts
            if not plain or name == "contiguous"
        }

    return Program(0, "cpu", {"torch": torch.__version__}, OnDemand(variants))


def prepare(operation: Operation, mode: str, layout: torch.memory_format, threads: int = 1) -> Run:
    """Returns the run of a layer, in training with its gradients."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    train = mode == "train"
    module: Any = make_module(operation)
    image = len(operation.shapes[0]) == 4 and operation.kind not in CHANNELS_LAST_AXIS
    if image:
        module = module.to(memory_format=layout)
    module.train(train)
    inputs = []
    for shape in operation.shapes:
        value = torch.randn(shape)
        if image:
            value = value.permute(0, 3, 1, 2).contiguous(memory_format=layout)
        inputs.append(value.requires_grad_(train and not operation.first))
    if not train:
        return functools.partial(_infer, module, inputs, threads)
    with torch.no_grad():
        cotangent = torch.randn_like(module(*inputs))
    wanted = [*module.parameters(), *(value for value in inputs if value.requires_grad)]

    def run(num_steps: int) -> float:
        torch.set_num_threads(threads)
        for _ in range(num_steps):
            torch.autograd.grad(module(*inputs), wanted, cotangent)
        return 0.0

    return run


def _infer(module: nn.Module, inputs: list[Any], threads: int, num_steps: int) -> float:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        for _ in range(num_steps):
            module(*inputs)
    return 0.0


class Function(nn.Module):
    """A function of its inputs as a module; `scale` adds a parameter for each channel."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(*inputs)


class Scale(nn.Module):
    """Multiplies each channel by a parameter."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Any) -> Any:
        return x * self.weight


class SqueezeExcite(nn.Module):
    """torchvision's: mean, 1x1 convolution, activation, 1x1 convolution, gate, product."""

    def __init__(self, channels: int, reduced: int, activation: str, gate: str):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)
        self.activation, self.gate = ACTIVATIONS[activation], ACTIVATIONS[gate]

    def forward(self, x: Any) -> Any:
        means = functional.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.fc2(self.activation(self.fc1(means))))


def make_module(operation: Operation) -> nn.Module:
    """Returns PyTorch's layer for an operation."""
    settings, kind = operation.settings, operation.kind
    channels = operation.shapes[0][-1]
    if kind in ("convolution", "convolution and pool"):
        return _convolution(operation)
    if kind in ("max pool", "average pool"):
        return _pool(operation)
    if kind == "squeeze-excite":
        return SqueezeExcite(
            channels, settings["features"], settings["activation"], settings["gate"]
        )
    if kind == "activation":
        return Function(ACTIVATIONS[settings["activation"]])
    if kind == "channel shuffle":
        return nn.ChannelShuffle(settings["parts"])
    makers: dict[str, Callable[[], nn.Module]] = {
        "batch norm": lambda: nn.BatchNorm2d(channels),
        "layer norm": lambda: nn.LayerNorm(channels),
        "dense": lambda: nn.Linear(channels, settings["features"], settings["bias"]),
        "scale": lambda: Scale(channels),
        "concatenation": lambda: Function(lambda *inputs: torch.cat(inputs, 1)),
        "sum": lambda: Function(torch.add),
        "global average pool": lambda: Function(lambda x: x.mean((2, 3))),
    }
    return makers[kind]()


def _margins(pads: Any) -> tuple[list[nn.Module], tuple[int, int]]:
    """Returns a layer that pads, if the pads are not symmetric, and the pads that remain."""
    (top, bottom), (left, right) = pads
    if top == bottom and left == right:
        return [], (top, left)
    return [nn.ZeroPad2d((left, right, top, bottom))], (0, 0)


def _convolution(operation: Operation) -> nn.Module:
    settings = operation.settings
    before, padding = _margins(settings["pads"])
    conv = nn.Conv2d(
        operation.shapes[0][-1],
        settings["features"],
        tuple(settings["kernel"]),
        tuple(settings["strides"]),
        padding,
        tuple(settings["dilation"]),
        settings["groups"],
        settings["bias"],
    )
    after: list[nn.Module] = []
    if operation.kind == "convolution and pool":
        pool = nn.MaxPool2d(2) if settings["pool"] == "max" else nn.AvgPool2d(2)
        after = [Function(ACTIVATIONS[settings["activation"]]), pool]
    layers = [*before, conv, *after]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _pool(operation: Operation) -> nn.Module:
    settings = operation.settings
    before, padding = _margins(settings["pads"])
    maker = nn.MaxPool2d if operation.kind == "max pool" else nn.AvgPool2d
    pool = maker(tuple(settings["window"]), tuple(settings["strides"]), padding)
    return nn.Sequential(*before, pool)
