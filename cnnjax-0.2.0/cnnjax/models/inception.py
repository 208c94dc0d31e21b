"""Inception v3.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016 (arXiv
1512.00567), section 6 and table 1, in the released form that torchvision has (its names too). The
module classes are called after that code: A at 35x35, C at 17x17, E at 8x8; B and D halve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import ops
from cnnjax.models.blocks import ConvNorm, call_block, classify
from cnnjax.models.images import require_image
from cnnjax.models.layers import PADDINGS, Factories, Factory, Layers, check_name
from cnnjax.models.rows import TORCHVISION, also_called, row
from cnnjax.models.stages import stage_output


def _average(padding: str) -> Callable[[jax.Array], jax.Array]:
    """3x3 means at stride 1, in which the zeros around the image count with `symmetric` padding."""
    return partial(
        ops.avg_pool,
        window=(3, 3),
        strides=(1, 1),
        padding=((1, 1), (1, 1)),
        count_include_pad=padding == "symmetric",
    )


class InceptionA(nn.Module):
    """35x35 (figure 5): 1x1; 5x5; two 3x3; pool."""

    pool_features: int
    unit: Factory
    average: Factory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = self.unit
        branch1x1 = unit(64, 1, name="branch1x1")(x)
        branch5x5 = unit(48, 1, name="branch5x5_1")(x)
        branch5x5 = unit(64, 5, name="branch5x5_2")(branch5x5)
        branch3x3dbl = unit(64, 1, name="branch3x3dbl_1")(x)
        branch3x3dbl = unit(96, 3, name="branch3x3dbl_2")(branch3x3dbl)
        branch3x3dbl = unit(96, 3, name="branch3x3dbl_3")(branch3x3dbl)
        branch_pool = unit(self.pool_features, (1, 1), name="branch_pool")(self.average(x))
        return jnp.concatenate([branch1x1, branch5x5, branch3x3dbl, branch_pool], axis=-1)


class InceptionB(nn.Module):
    """35x35 to 17x17 (figure 10): strided 3x3; two 3x3, the last strided; max pool."""

    unit: Factory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = self.unit
        branch3x3 = unit(384, 3, strides=2, valid=True, name="branch3x3")(x)
        branch3x3dbl = unit(64, 1, name="branch3x3dbl_1")(x)
        branch3x3dbl = unit(96, 3, name="branch3x3dbl_2")(branch3x3dbl)
        branch3x3dbl = unit(96, 3, strides=2, valid=True, name="branch3x3dbl_3")(branch3x3dbl)
        branch_pool = ops.max_pool(x, (3, 3), (2, 2))
        return jnp.concatenate([branch3x3, branch3x3dbl, branch_pool], axis=-1)


class InceptionC(nn.Module):
    """17x17 (figure 6): 1x1; 7x7 as 1x7 and 7x1; two 7x7 likewise; pool."""

    width: int
    unit: Factory
    average: Factory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit, width = self.unit, self.width
        branch1x1 = unit(192, 1, name="branch1x1")(x)
        branch7x7 = unit(width, 1, name="branch7x7_1")(x)
        branch7x7 = unit(width, (1, 7), name="branch7x7_2")(branch7x7)
        branch7x7 = unit(192, (7, 1), name="branch7x7_3")(branch7x7)
        branch7x7dbl = unit(width, 1, name="branch7x7dbl_1")(x)
        branch7x7dbl = unit(width, (7, 1), name="branch7x7dbl_2")(branch7x7dbl)
        branch7x7dbl = unit(width, (1, 7), name="branch7x7dbl_3")(branch7x7dbl)
        branch7x7dbl = unit(width, (7, 1), name="branch7x7dbl_4")(branch7x7dbl)
        branch7x7dbl = unit(192, (1, 7), name="branch7x7dbl_5")(branch7x7dbl)
        branch_pool = unit(192, 1, name="branch_pool")(self.average(x))
        return jnp.concatenate([branch1x1, branch7x7, branch7x7dbl, branch_pool], axis=-1)


class InceptionD(nn.Module):
    """17x17 to 8x8: strided 3x3; 7x7 and strided 3x3; max pool."""

    unit: Factory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = self.unit
        branch3x3 = unit(192, 1, name="branch3x3_1")(x)
        branch3x3 = unit(320, 3, strides=2, valid=True, name="branch3x3_2")(branch3x3)
        branch7x7x3 = unit(192, 1, name="branch7x7x3_1")(x)
        branch7x7x3 = unit(192, (1, 7), name="branch7x7x3_2")(branch7x7x3)
        branch7x7x3 = unit(192, (7, 1), name="branch7x7x3_3")(branch7x7x3)
        branch7x7x3 = unit(192, 3, strides=2, valid=True, name="branch7x7x3_4")(branch7x7x3)
        branch_pool = ops.max_pool(x, (3, 3), (2, 2))
        return jnp.concatenate([branch3x3, branch7x7x3, branch_pool], axis=-1)


class InceptionE(nn.Module):
    """8x8 (figure 7): 1x1; 1x3 beside 3x1; 3x3 before 1x3 beside 3x1; pool."""

    unit: Factory
    average: Factory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        unit = self.unit
        branch1x1 = unit(320, 1, name="branch1x1")(x)
        branch3x3 = unit(384, 1, name="branch3x3_1")(x)
        branch3x3 = [
            unit(384, (1, 3), name="branch3x3_2a")(branch3x3),
            unit(384, (3, 1), name="branch3x3_2b")(branch3x3),
        ]
        branch3x3dbl = unit(448, 1, name="branch3x3dbl_1")(x)
        branch3x3dbl = unit(384, 3, name="branch3x3dbl_2")(branch3x3dbl)
        branch3x3dbl = [
            unit(384, (1, 3), name="branch3x3dbl_3a")(branch3x3dbl),
            unit(384, (3, 1), name="branch3x3dbl_3b")(branch3x3dbl),
        ]
        branch_pool = unit(192, 1, name="branch_pool")(self.average(x))
        return jnp.concatenate([branch1x1, *branch3x3, *branch3x3dbl, branch_pool], axis=-1)


class AuxiliaryHead(nn.Module):
    """5x5 means at stride 3, 1x1 to 128, 5x5 to 768, mean, dense (section 4)."""

    num_classes: int
    layers: Factories

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ops.avg_pool(x, (5, 5), (3, 3))
        x = ConvNorm(128, 1, self.layers, name="conv0")(x)
        x = ConvNorm(768, 5, self.layers, valid=True, name="conv1")(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.layers.dtype, name="head")(x)


class InceptionV3(nn.Module):
    """Inception v3: 23,834,568 parameters at 1000 classes; 27,161,264 with its auxiliary head.

    Attributes:
      num_classes: the logits; None returns the 2,048 features before them.
      auxiliary_head: adds the head of section 4. In training its logits are sown into the
        collection `auxiliary_logits` as `aux_logits` (torchvision weighs its loss 0.4). It does
        nothing in evaluation, and needs `num_classes` and images of at least 299x299.
      dropout_rate: before the head; random stream `dropout`.
      padding: `symmetric`: the modules' average pools count the zeros around the image, as in
        torchvision; `same`: they do not, as in Keras.
      norm_scale: whether the norms have scales; Keras's have none.
      layers: what all layers share; see `Layers`.

    Call: `image [batch, height, width, channels]`, at least 75x75, published for 299x299
    -> `[batch, num_classes]`.
    """

    num_classes: int | None = 1000
    auxiliary_head: bool = False
    dropout_rate: float = 0.5
    padding: str = "symmetric"
    norm_scale: bool = True
    layers: Layers = Layers(norm_epsilon=1e-3)

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "InceptionV3", minimum=299 if self.auxiliary_head else 75)
        check_name("padding", self.padding, PADDINGS)
        layers = self.layers.factories(train=train, norm_scale=self.norm_scale)
        unit, average = partial(ConvNorm, layers=layers), _average(self.padding)
        block = partial(call_block, layers=layers)
        x = unit(32, 3, strides=2, valid=True, name="conv2d_1a")(image)
        x = unit(32, 3, valid=True, name="conv2d_2a")(x)
        x = unit(64, 3, name="conv2d_2b")(x)
        x = stage_output(self, "stage1", x)
        x = ops.max_pool(x, (3, 3), (2, 2))
        x = unit(80, 1, name="conv2d_3b")(x)
        x = unit(192, 3, valid=True, name="conv2d_4a")(x)
        x = stage_output(self, "stage2", x)
        x = ops.max_pool(x, (3, 3), (2, 2))
        for name, pool_features in (("mixed_5b", 32), ("mixed_5c", 64), ("mixed_5d", 64)):
            x = block(InceptionA(pool_features, unit, average, name=name), x)
        x = stage_output(self, "stage3", x)
        x = block(InceptionB(unit, name="mixed_6a"), x)
        for name, width in zip(("b", "c", "d", "e"), (128, 160, 160, 192), strict=True):
            x = block(InceptionC(width, unit, average, name=f"mixed_6{name}"), x)
        x = stage_output(self, "stage4", x)
        self._auxiliary(x, layers)
        x = block(InceptionD(unit, name="mixed_7a"), x)
        x = block(InceptionE(unit, average, name="mixed_7b"), x)
        x = block(InceptionE(unit, average, name="mixed_7c"), x)
        x = stage_output(self, "stage5", x)
        return classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)

    def _auxiliary(self, x: jax.Array, layers: Factories) -> None:
        if not self.auxiliary_head or self.num_classes is None:
            return
        if layers.train or self.is_initializing():
            logits = AuxiliaryHead(self.num_classes, layers, name="aux")(x)
            if not self.is_initializing():
                self.sow("auxiliary_logits", "aux_logits", logits)


ROWS = {
    "inception_v3": row(
        InceptionV3, 23_834_568, 34_432, 5_713_216_096, source=TORCHVISION, image=(299, 299, 3)
    )
}
ROWS |= also_called(ROWS, "keras", {"inception_v3": "InceptionV3"})
