"""GoogLeNet (Inception v1) with batch normalisation.

Szegedy et al., "Going Deeper with Convolutions", CVPR 2015 (arXiv 1409.4842), section 5 and table
1; batch normalisation in place of the paper's response normalisation, and 3x3 in place of the
paper's 5x5 convolutions, as torchvision has it (`large_kernel=5` gives the paper's).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import ops
from cnnjax.models.blocks import (
    Activation,
    ConvNorm,
    Factory,
    activation_function,
    call_block,
    classify,
    layer_factories,
)
from cnnjax.models.layers import (
    adaptive_average_pool,
    max_pool_ceil,
    require_image,
    require_stem,
)
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
    conv_norm: Factory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        small, reduce3, middle, reduce5, large, projection = self.widths
        branch1 = self.conv_norm(small, 1, name="branch1")(x)
        branch2 = self.conv_norm(reduce3, 1, name="branch2_1")(x)
        branch2 = self.conv_norm(middle, 3, name="branch2_2")(branch2)
        branch3 = self.conv_norm(reduce5, 1, name="branch3_1")(x)
        branch3 = self.conv_norm(large, self.large_kernel, name="branch3_2")(branch3)
        pooled = ops.max_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)))
        branch4 = self.conv_norm(projection, 1, name="branch4")(pooled)
        return jnp.concatenate([branch1, branch2, branch3, branch4], axis=-1)


class AuxiliaryHead(nn.Module):
    """Average to 4x4, 1x1 convolution, dense 1024, dropout 0.7, dense (section 5)."""

    num_classes: int
    conv_norm: Factory
    dropout_rate: float = 0.7
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = self.conv_norm(128, 1, name="conv")(adaptive_average_pool(x, 4))
        x = nn.relu(nn.Dense(1024, dtype=self.dtype, name="dense")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


class GoogLeNet(nn.Module):
    """GoogLeNet: 6,624,904 parameters at 1000 classes; 13,004,888 with its auxiliary heads.

    Attributes:
      num_classes: the logits; None returns the 1,024 features before them.
      auxiliary_heads: adds the two heads of section 5. In training their logits are sown into the
        collection `auxiliary_logits` as `aux1_logits` and `aux2_logits`; the paper adds their
        losses with weight 0.3. They do nothing in evaluation, and need `num_classes`.
      large_kernel: of the third branch: 3 as in torchvision, 5 as in the paper.
      stem: `imagenet`; or `cifar`, one 3x3 convolution at stride 1 without a pool.
      norm: `batch`, `group`, `layer` or `none`.
      activation: a name from `blocks.ACTIVATIONS` or a function.
      dropout_rate: before the head; random stream `dropout`. (The paper has 0.4.)
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      axis_name: the mapped axis over which BatchNorm averages, under `pmap` or `shard_map`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; None: that of image and parameters.
      remat: whether activations within a block are computed again in the backward pass, not kept.

    Call: `image [batch, height, width, channels]` -> `[batch, num_classes]`.
    """

    num_classes: int | None = 1000
    auxiliary_heads: bool = False
    large_kernel: int = 3
    stem: str = "imagenet"
    norm: str = "batch"
    activation: str | Activation = "relu"
    dropout_rate: float = 0.2
    norm_epsilon: float = 1e-3
    norm_momentum: float = 0.9
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_stem(self.stem)
        require_image(image, "GoogLeNet", minimum=15)
        layers = layer_factories(
            self.norm,
            activation_function(self.activation),
            train=train,
            dtype=self.dtype,
            axis_name=self.axis_name,
            group_size=self.norm_group_size,
            epsilon=self.norm_epsilon,
            momentum=self.norm_momentum,
        )
        conv_norm = partial(ConvNorm, **layers)
        x = self._stem(image, conv_norm)
        for stage, modules in MODULES.items():
            for name, widths in modules.items():
                module = InceptionModule(widths, self.large_kernel, conv_norm, name=name)
                x = call_block(module, x, remat=self.remat and train)
                self._auxiliary(name, x, conv_norm, train)
            x = stage_output(self, f"stage{stage}", x)
            if stage == 3:
                x = max_pool_ceil(x, 3, 2)
            elif stage == 4:
                x = max_pool_ceil(x, 2, 2)
        return classify(
            jnp.mean(x, axis=(1, 2)),
            self.num_classes,
            train=train,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
        )

    def _stem(self, image: jax.Array, conv_norm: Factory) -> jax.Array:
        if self.stem == "cifar":
            x = conv_norm(192, 3, name="conv1")(image)
            x = stage_output(self, "stage1", x)
            return x
        x = max_pool_ceil(conv_norm(64, 7, strides=2, name="conv1")(image), 3, 2)
        x = stage_output(self, "stage1", x)
        x = conv_norm(64, 1, name="conv2")(x)
        x = max_pool_ceil(conv_norm(192, 3, name="conv3")(x), 3, 2)
        x = stage_output(self, "stage2", x)
        return x

    def _auxiliary(self, module: str, x: jax.Array, conv_norm: Factory, train: bool) -> None:
        if not self.auxiliary_heads or self.num_classes is None or module not in AUXILIARY_AFTER:
            return
        if train or self.is_initializing():
            name = AUXILIARY_AFTER[module]
            head = AuxiliaryHead(self.num_classes, conv_norm, dtype=self.dtype, name=name)
            logits = head(x, train=train)
            if not self.is_initializing():
                self.sow("auxiliary_logits", f"{name}_logits", logits)
