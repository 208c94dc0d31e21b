"""SqueezeNet: AlexNet's accuracy with fifty times fewer parameters.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model
size", 2016 (arXiv 1602.07360), section 3 and table 1 (version 1.0); version 1.1, of the authors'
repository, computes 2.4 times less. Pools as in torchvision (windows may hang over the edge).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax.models.blocks import call_block
from cnnjax.models.images import max_pool_ceil, require_image, require_stem
from cnnjax.models.layers import Factories, Layers, kernel_initializer
from cnnjax.models.rows import TORCHVISION, row
from cnnjax.models.stages import stage_output


class Fire(nn.Module):
    """Squeeze to few channels by 1x1, expand by 1x1 and by 3x3 side by side (section 3.2)."""

    squeeze: int
    expand: int
    layers: Factories

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self._unit(self.squeeze, 1, "squeeze", x)
        small = self._unit(self.expand, 1, "expand1x1", x)
        large = self._unit(self.expand, 3, "expand3x3", x)
        return jnp.concatenate([small, large], axis=-1)

    def _unit(self, features: int, kernel_size: int, name: str, x: jax.Array) -> jax.Array:
        x = self.layers.conv(features, kernel_size, name=name)(x)
        return self.layers.activation(self.layers.norm(name=f"{name}_norm")(x))


class SqueezeNet(nn.Module):
    """SqueezeNet; its head is a Dense at each position (a 1x1 convolution), then ReLU and a mean.

    Attributes:
      stem_features, stem_kernel: of the first convolution, at stride 2 without padding.
      fires: (squeeze, expand) of each fire module `fire2` ... `fire9`.
      pools_before: numbers of the fire modules that a pool precedes.
      num_classes: the logits; None returns what enters the head,
        `[batch, height, width, 2 * expand]`.
      stem: `imagenet`; or `cifar`, a 3x3 convolution at stride 1 and no pool before `fire2`.
      dropout_rate: before the head; random stream `dropout`.
      layers: what all layers share; see `Layers`.

    Call: `image [batch, height, width, channels]` -> `[batch, num_classes]`.
    """

    stem_features: int
    stem_kernel: int
    pools_before: Sequence[int]
    fires: Sequence[tuple[int, int]] = (
        (16, 64),
        (16, 64),
        (32, 128),
        (32, 128),
        (48, 192),
        (48, 192),
        (64, 256),
        (64, 256),
    )
    num_classes: int | None = 1000
    stem: str = "imagenet"
    dropout_rate: float = 0.5
    layers: Layers = Layers(norm="none")

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_stem(self.stem)
        large = self.stem == "imagenet"
        require_image(image, "SqueezeNet", minimum=21 if large else 8)
        layers = self.layers.factories(
            train=train, kernel_init=kernel_initializer(self.layers.activation)
        )
        x = layers.conv(
            self.stem_features,
            self.stem_kernel if large else 3,
            2 if large else 1,
            valid=large,
            name="conv1",
        )(image)
        x = layers.activation(layers.norm(name="norm1")(x))
        x = stage_output(self, "stage1", x)
        stage = 1
        for number, (squeeze, expand) in enumerate(self.fires, start=2):
            if number in self.pools_before and (large or number > 2):
                x = max_pool_ceil(x, 3, 2)
            x = call_block(Fire(squeeze, expand, layers, name=f"fire{number}"), x, layers)
            if number + 1 in self.pools_before or number == len(self.fires) + 1:
                stage += 1
                x = stage_output(self, f"stage{stage}", x)
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        if self.num_classes is None:
            return x
        init = nn.initializers.normal(0.01)
        head = nn.Dense(self.num_classes, kernel_init=init, dtype=layers.dtype, name="head")
        return jnp.mean(layers.activation(head(x)), axis=(1, 2))


squeezenet1_0 = partial(row, SqueezeNet, source=TORCHVISION, stem_features=96, stem_kernel=7)
squeezenet1_1 = partial(row, SqueezeNet, source=TORCHVISION, stem_features=64, stem_kernel=3)

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "squeezenet1_0": squeezenet1_0(1_248_424, 0, 818_924_576, pools_before=(2, 5, 9)),
    "squeezenet1_1": squeezenet1_1(1_235_496, 0, 349_151_936, pools_before=(2, 4, 6)),
}
