"""ResNet-9: the residual network that was the fastest on CIFAR-10 in 2018.

Page 2018, "How to Train Your ResNet" (myrtle.ai), parts 3 and 4: three layers that halve the image,
a residual block of two convolutions after the first and after the third of them, logits scaled
by 1/8; on DAWNBench 94% in 79 s of one V100.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models.images import require_image
from cnnjax.models.layers import Factories, Layers
from cnnjax.models.rows import row
from cnnjax.models.stages import stage_output

# Three 2x2 pools.
MINIMUM_SIZE = 8


class ResNet9(nn.Module):
    """Image `[batch, height, width, channels]` to logits `[batch, num_classes]`.

    Attributes:
      num_classes: of the head; None returns the pooled features.
      width: channels of the first convolution; the layers have 2, 4 and 8 times as many.
      logits_scale: factor of the logits.
      layers: what all layers share.

    Raises:
      UserError: an image of other dimensions, or smaller than 8 pixels.
    """

    num_classes: int | None = 10
    width: int = 64
    logits_scale: float = 1 / 8
    layers: Layers = Layers(remat=None)

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "ResNet9", minimum=MINIMUM_SIZE)
        layers = self.layers.factories(train=train)
        x = conv_block(layers, self.width, "prep")(image)
        for stage in (1, 2, 3):
            width = self.width * 2**stage
            x = conv_block(layers, width, f"layer{stage}", pool=True)(x)
            if stage in (1, 3):
                branch = conv_block(layers, width, f"layer{stage}_residual1")(x)
                x = x + conv_block(layers, width, f"layer{stage}_residual2")(branch)
            x = stage_output(self, f"layer{stage}", x)
        x = jnp.max(x, axis=(1, 2))
        if self.num_classes is None:
            return x
        head = nn.Dense(self.num_classes, use_bias=False, dtype=layers.dtype, name="head")
        return head(x) * self.logits_scale


def conv_block(
    layers: Factories, width: int, name: str, *, pool: bool = False
) -> Callable[[jax.Array], jax.Array]:
    """Returns a convolution of 3x3, a pool of 2x2 if asked, normalization, activation.

    Page pools last (part 3) and then, for speed, before the normalization (part 8), whose
    statistics are those of the pooled values then.
    """

    def apply(x: jax.Array) -> jax.Array:
        x = layers.conv(width, 3, name=f"{name}_conv")(x)
        if pool:
            x = ops.max_pool(x, (2, 2), (2, 2))
        return layers.activation(layers.norm(name=f"{name}_norm")(x))

    return apply


ROWS = {
    "resnet9": row(
        ResNet9,
        6_573_120,
        4_480,
        379_261_952,
        source="by hand: 9 * (3 * 64 + 64 * 128 + 2 * 128^2 + ...) and 2 * 35 * 64 of norms",
        image=(32, 32, 3),
        num_classes=10,
    )
}
