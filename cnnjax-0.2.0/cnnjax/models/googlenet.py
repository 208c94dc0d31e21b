"""GoogLeNet (Inception v1) with batch normalization.

Szegedy et al., "Going Deeper with Convolutions", CVPR 2015 (arXiv 1409.4842), section 5 and table
1; batch normalization in place of the paper's response normalization, and 3x3 in place of the
paper's 5x5 convolutions, as torchvision has it (`large_kernel=5` gives the paper's).
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import ops
from cnnjax.models.blocks import ConvNorm, call_block, classify
from cnnjax.models.images import (
    adaptive_average_pool,
    max_pool_ceil,
    require_image,
    require_stem,
)
from cnnjax.models.layers import Factories, Layers
from cnnjax.models.rows import TORCHVISION, row
from cnnjax.models.stages import stage_output

# Table 1: (1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection) of each module, stage by stage.
MODULES: dict[int, dict[str, tuple[int, int, int, int, int, int]]] = {
    3: {
        "inception3a": (64, 96, 128, 16, 32, 32),
        "inception3b": (128, 128, 192, 32, 96, 64),
    },
    4: {
        "inception4a": (192, 96, 208, 16, 48, 64),
        "inception4b": (160, 112, 224, 24, 64, 64),
        "inception4c": (128, 128, 256, 24, 64, 64),
        "inception4d": (112, 144, 288, 32, 64, 64),
        "inception4e": (256, 160, 320, 32, 128, 128),
    },
    5: {
        "inception5a": (256, 160, 320, 32, 128, 128),
        "inception5b": (384, 192, 384, 48, 128, 128),
    },
}
AUXILIARY_AFTER = {"inception4a": "aux1", "inception4d": "aux2"}


class InceptionModule(nn.Module):
    """Four branches side by side (section 4, figure 2b): 1x1; 3x3; large kernel; pool and 1x1."""

    widths: tuple[int, int, int, int, int, int]
    large_kernel: int
    layers: Factories

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv_norm = functools.partial(ConvNorm, layers=self.layers)
        small, reduce3, middle, reduce5, large, projection = self.widths
        branch1 = conv_norm(small, 1, name="branch1")(x)
        branch2 = conv_norm(reduce3, 1, name="branch2_1")(x)
        branch2 = conv_norm(middle, 3, name="branch2_2")(branch2)
        branch3 = conv_norm(reduce5, 1, name="branch3_1")(x)
        branch3 = conv_norm(large, self.large_kernel, name="branch3_2")(branch3)
        pooled = ops.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
        branch4 = conv_norm(projection, 1, name="branch4")(pooled)
        return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


class AuxiliaryHead(nn.Module):
    """Average to 4x4, 1x1 convolution, dense 1024, dropout 0.7, dense (section 5)."""

    num_classes: int
    layers: Factories
    dropout_rate: float = 0.7

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.layers.dtype
        x = ConvNorm(128, 1, self.layers, name="conv")(adaptive_average_pool(x, 4))
        x = nn.relu(nn.Dense(1024, dtype=dtype, name="dense")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.dropout_rate, deterministic=not self.layers.train)(x)
        return nn.Dense(self.num_classes, dtype=dtype, name="head")(x)


class GoogLeNet(nn.Module):
    """GoogLeNet: 6,624,904 parameters at 1000 classes; 13,004,888 with its auxiliary heads.

    Attributes:
      num_classes: the logits; None returns the 1,024 features before them.
      auxiliary_heads: adds the two heads of section 5. In training their logits are sown into the
        collection `auxiliary_logits` as `aux1_logits` and `aux2_logits`; the paper adds their
        losses with weight 0.3. They do nothing in evaluation, and need `num_classes`.
      large_kernel: of the third branch: 3 as in torchvision, 5 as in the paper.
      stem: `imagenet`; or `cifar`, one 3x3 convolution at stride 1 without a pool.
      dropout_rate: before the head; random stream `dropout`. (The paper has 0.4.)
      layers: what all layers share; see `Layers`.

    Call: `image [batch, height, width, channels]` -> `[batch, num_classes]`.
    """

    num_classes: int | None = 1000
    auxiliary_heads: bool = False
    large_kernel: int = 3
    stem: str = "imagenet"
    dropout_rate: float = 0.2
    layers: Layers = Layers(norm_epsilon=1e-3)

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_stem(self.stem)
        require_image(image, "GoogLeNet", minimum=15)
        layers = self.layers.factories(train=train)
        x = self._stem(image, layers)
        for stage, modules in MODULES.items():
            for name, widths in modules.items():
                module = InceptionModule(widths, self.large_kernel, layers, name=name)
                x = call_block(module, x, layers)
                self._auxiliary(name, x, layers)
            x = stage_output(self, f"stage{stage}", x)
            if stage == 3:
                x = max_pool_ceil(x, 3, 2)
            elif stage == 4:
                x = max_pool_ceil(x, 2, 2)
        return classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)

    def _stem(self, image: jax.Array, layers: Factories) -> jax.Array:
        conv_norm = functools.partial(ConvNorm, layers=layers)
        if self.stem == "cifar":
            return stage_output(self, "stage1", conv_norm(192, 3, name="conv1")(image))
        x = max_pool_ceil(conv_norm(64, 7, strides=2, name="conv1")(image), 3, 2)
        x = stage_output(self, "stage1", x)
        x = conv_norm(64, 1, name="conv2")(x)
        x = max_pool_ceil(conv_norm(192, 3, name="conv3")(x), 3, 2)
        return stage_output(self, "stage2", x)

    def _auxiliary(self, module: str, x: jax.Array, layers: Factories) -> None:
        if not self.auxiliary_heads or self.num_classes is None or module not in AUXILIARY_AFTER:
            return
        if layers.train or self.is_initializing():
            name = AUXILIARY_AFTER[module]
            logits = AuxiliaryHead(self.num_classes, layers, name=name)(x)
            if not self.is_initializing():
                self.sow("auxiliary_logits", f"{name}_logits", logits)


ROWS = {"googlenet": row(GoogLeNet, 6_624_904, 14_560, 1_498_376_192, source=TORCHVISION)}
