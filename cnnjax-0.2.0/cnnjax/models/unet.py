"""U-Net: a class for each pixel, from a contracting path and an expanding one with its skips.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation",
MICCAI 2015 (arXiv 1505.04597), section 2 and figure 1. As published (`unet_2015`) no convolution
pads, so that the map of classes is smaller than the image: 388x388 of 572x572. The padded variant
(`unet`), which most use since, gives a class to each pixel of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models.blocks import call_block
from cnnjax.models.images import require_image
from cnnjax.models.layers import Factories, Layers
from cnnjax.models.rows import row
from cnnjax.models.stages import stage_output

# Section 3: Gaussian of standard deviation sqrt(2 / fan-in), after He et al. 2015.
he_normal_fan_in = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with its norm and activation.

    Attributes:
      features: channels of both.
      layers: makes convolutions and norms.
      padded: whether the convolutions pad.
    """

    features: int
    layers: Factories
    padded: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for number in (1, 2):
            conv = self.layers.conv(self.features, 3, valid=not self.padded, name=f"conv{number}")
            x = self.layers.activation(self.layers.norm(name=f"norm{number}")(conv(x)))
        return stage_output(self, "output", x)


class UNet(nn.Module):
    """U-Net: level `n` computes at 1 / 2^(n-1) of the resolution, on the way down and up again.

    The way up doubles the resolution by a 2x2 transposed convolution, appends the channels to those
    that the way down had at that level (their middle, where convolutions do not pad), and convolves
    both. Stages are `down1` ... `down5`, `up4` ... `up1`.

    Attributes:
      num_classes: logits of each pixel; None returns what enters the head.
      widths: channels of each level.
      padded: whether convolutions pad, so that the output is as large as the image.
      dropout_rate: at the end of the contracting path (section 3.1), on its two lowest levels;
        random stream `dropout`.
      layers: what all layers share.

    Call: `image [batch, height, width, channels]` -> `[batch, height, width, num_classes]`; height
    and width must be such that each pool gets even ones.
    """

    num_classes: int | None = 2
    widths: Sequence[int] = (64, 128, 256, 512, 1024)
    padded: bool = True
    dropout_rate: float = 0.0
    layers: Layers = Layers(norm="none")

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "U-Net")
        for side in image.shape[1:3]:
            require_side(side, len(self.widths), self.padded)
        layers = self.layers.factories(train=train, kernel_init=he_normal_fan_in)
        double_conv = partial(DoubleConv, layers=layers, padded=self.padded)
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)

        x, skips = image, []
        for level, width in enumerate(self.widths, 1):
            x = ops.max_pool(x, (2, 2), (2, 2)) if level > 1 else x
            x = call_block(double_conv(width, name=f"down{level}"), x, layers)
            x = dropout(x) if level >= len(self.widths) - 1 else x
            skips.append(x)
        for level in range(len(self.widths) - 1, 0, -1):
            width = self.widths[level - 1]
            up = ops.ConvTranspose(
                width,
                (2, 2),
                turned=True,
                kernel_init=up_init,
                dtype=layers.dtype,
                name=f"up{level}_transposed",
            )
            x = up(x)
            x = jnp.concatenate([middle(skips[level - 1], x.shape[1:3]), x], axis=-1)
            x = call_block(double_conv(width, name=f"up{level}"), x, layers)
        if self.num_classes is None:
            return x
        # The paper's last 1x1 convolution.
        init = he_normal_fan_in
        return nn.Dense(self.num_classes, kernel_init=init, dtype=layers.dtype, name="head")(x)


def up_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """He's initializer for the way up: each output sees one tap of the kernel, not four."""
    return (
        he_normal_fan_in(key, (shape[2], 4 * shape[3]), dtype)
        .reshape(shape[2], 2, 2, shape[3])
        .transpose(1, 2, 0, 3)
    )


def middle(image: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Returns the middle `size` (height, width) of an image (figure 1: "copy and crop")."""
    top, left = ((old - new) // 2 for old, new in zip(image.shape[1:3], size, strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def output_side(side: int, levels: int, *, padded: bool) -> int | None:
    """Returns the side of the output for an image's, or None where a pool would get an odd one."""
    lost = 0 if padded else 4
    sides = [side - lost]
    for _ in range(levels - 1):
        if sides[-1] % 2 or sides[-1] <= 0:
            return None
        sides.append(sides[-1] // 2 - lost)
    result = sides[-1]
    for _ in range(levels - 1):
        result = 2 * result - lost
    return result if result > 0 else None


def require_side(side: int, levels: int, padded: bool) -> None:
    """Raises a UserError, which names the next valid side, for an image that cannot be halved."""
    if output_side(side, levels, padded=padded) is not None:
        return
    larger = side
    while output_side(larger, levels, padded=padded) is None:
        larger += 1
    raise UserError(
        f"a U-Net of {levels} levels takes no image with a side of {side} pixels, which its pools "
        f"cannot halve: pad it to {larger}."
    )


unet = partial(
    row,
    UNet,
    source="Ronneberger et al. 2015, by hand in tests/models/test_unet.py",
    image=(572, 572, 1),
    num_classes=2,
)

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "unet": unet(31_030_658, 0, 192_384_335_872, image=(512, 512, 1)),
    "unet_2015": unet(31_030_658, 0, 150_428_424_448, padded=False, dropout_rate=0.5),
}
