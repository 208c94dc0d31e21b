"""Networks that no library has, in PyTorch, for `make_references`; modules have our names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class BagNetBlock(nn.Module):
    """A bottleneck without padding; the shortcut is cut to the branch's size."""

    def __init__(self, inputs: int, features: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        width = features // 4
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size, stride, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, features, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(features)
        self.downsample = None
        if stride != 1 or inputs != features:
            self.downsample = nn.Sequential()
            self.downsample.add_module("conv", nn.Conv2d(inputs, features, 1, stride, bias=False))
            self.downsample.add_module("norm", nn.BatchNorm2d(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, height, width]` to the same, perhaps smaller."""
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        y = self.norm3(self.conv3(y))
        x = x if self.downsample is None else self.downsample(x)
        return (x[:, :, : y.shape[2], : y.shape[3]] + y).relu()


class BagNet(nn.Module):
    """arXiv 1904.00760; the first block of the first stages has a 3x3 convolution."""

    def __init__(self, stages_with_3x3: int, num_classes: int) -> None:
        super().__init__()
        self.stem_conv1 = nn.Conv2d(3, 64, 1, bias=False)
        self.stem_conv2 = nn.Conv2d(64, 64, 3, bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        inputs = 64
        for stage, (depth, stride) in enumerate(((3, 2), (4, 2), (6, 2), (3, 1)), 1):
            blocks, features = nn.Sequential(), 128 * 2**stage
            for block in range(1, depth + 1):
                size = 3 if block == 1 and stage <= stages_with_3x3 else 1
                made = BagNetBlock(inputs, features, size, stride if block == 1 else 1)
                blocks.add_module(f"block{block}", made)
                inputs = features
            self.add_module(f"stage{stage}", blocks)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, classes]`."""
        x = self.stem_norm(self.stem_conv2(self.stem_conv1(image))).relu()
        for stage in range(1, 5):
            x = self.get_submodule(f"stage{stage}")(x)
        return self.head(x.mean((2, 3)))


NETWORKS: dict[str, Callable[[int], Any]] = {
    "bagnet9": lambda num_classes: BagNet(2, num_classes),
    "bagnet17": lambda num_classes: BagNet(3, num_classes),
    "bagnet33": lambda num_classes: BagNet(4, num_classes),
}
