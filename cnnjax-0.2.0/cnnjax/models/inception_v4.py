"""Inception v4.

Szegedy et al. 2017, "Inception-v4, Inception-ResNet and the Impact of Residual Connections on
Learning" (arXiv 1602.07261), Figures 3 to 9, in the released form, which timm has. Average pools
leave out the zeros around the image.

Names: timm's `features.6` to `features.21` are `inception_a1` and so on, its `branch1.0` is
`branch1_0`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models.blocks import ConvNorm, call_block, classify
from cnnjax.models.images import require_image
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.rows import TIMM, row
from cnnjax.models.stages import stage_output


class Unit(NamedTuple):
    """A convolution of a branch, see `ConvNorm`; at stride 2 it has no padding."""

    features: int
    kernel_size: int | tuple[int, int]
    strides: int = 1
    valid: bool = False


class Fork(NamedTuple):
    """Two convolutions of one image, their outputs joined."""

    a: Unit
    b: Unit


# What else a branch is made of: 3x3 pools.
MEAN, MAXIMUM = "mean", "maximum"
Branch = Sequence[Unit | str | Fork]


class Branches(nn.Module):
    """Branches beside each other, their outputs joined.

    Attributes:
      branches: of each the convolutions, forks and pools, one after another. The third part of
        branch 1, pools counted, is `branch1_2`, or `branch1_2a` and `branch1_2b` where it is a
        fork; the only part of a branch is `branch1`.
    """

    branches: Sequence[Branch]
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        outputs = [self._branch(x, number, branch) for number, branch in enumerate(self.branches)]
        return jnp.concatenate(outputs, axis=-1)

    def _branch(self, x: Array, number: int, branch: Branch) -> Array:
        for place, part in enumerate(branch):
            name = f"branch{number}_{place}" if len(branch) > 1 else f"branch{number}"
            if isinstance(part, Unit):
                x = self._unit(x, part, name)
            elif isinstance(part, Fork):
                ends = [self._unit(x, part.a, f"{name}a"), self._unit(x, part.b, f"{name}b")]
                x = jnp.concatenate(ends, axis=-1)
            elif part == MEAN:
                x = ops.avg_pool(x, (3, 3), (1, 1), ((1, 1), (1, 1)), count_include_pad=False)
            else:
                x = ops.max_pool(x, (3, 3), (2, 2))
        return x

    def _unit(self, x: Array, unit: Unit, name: str) -> Array:
        valid = unit.valid or unit.strides > 1
        return ConvNorm(
            unit.features, unit.kernel_size, self.layers, unit.strides, valid=valid, name=name
        )(x)


STEM_4A = (
    (Unit(64, 1), Unit(96, 3, valid=True)),
    (Unit(64, 1), Unit(64, (1, 7)), Unit(64, (7, 1)), Unit(96, 3, valid=True)),
)
INCEPTION_A = (
    (Unit(96, 1),),
    (Unit(64, 1), Unit(96, 3)),
    (Unit(64, 1), Unit(96, 3), Unit(96, 3)),
    (MEAN, Unit(96, 1)),
)
REDUCTION_A = ((Unit(384, 3, 2),), (Unit(192, 1), Unit(224, 3), Unit(256, 3, 2)), (MAXIMUM,))
INCEPTION_B = (
    (Unit(384, 1),),
    (Unit(192, 1), Unit(224, (1, 7)), Unit(256, (7, 1))),
    (Unit(192, 1), Unit(192, (7, 1)), Unit(224, (1, 7)), Unit(224, (7, 1)), Unit(256, (1, 7))),
    (MEAN, Unit(128, 1)),
)
REDUCTION_B = (
    (Unit(192, 1), Unit(192, 3, 2)),
    (Unit(256, 1), Unit(256, (1, 7)), Unit(320, (7, 1)), Unit(320, 3, 2)),
    (MAXIMUM,),
)
BOTH_WAYS = Fork(Unit(256, (1, 3)), Unit(256, (3, 1)))
INCEPTION_C = (
    (Unit(256, 1),),
    (Unit(384, 1), BOTH_WAYS),
    (Unit(384, 1), Unit(448, (3, 1)), Unit(512, (1, 3)), BOTH_WAYS),
    (MEAN, Unit(256, 1)),
)


class InceptionV4(nn.Module):
    """Inception v4: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      num_classes: of the head; `None` returns the 1,536 features before it.
      dropout_rate: before the head; the paper keeps 0.8 (Figure 9).
      layers: what all layers share; see `Layers`.

    Images are at least 75x75; it was published for 299x299.
    """

    num_classes: int | None = 1000
    dropout_rate: float = 0.2
    layers: Layers = Layers(norm_epsilon=1e-3)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "InceptionV4", minimum=75)
        layers = self.layers.factories(train=train)

        def module(branches: Sequence[Branch], x: Array, name: str) -> Array:
            return call_block(Branches(branches, layers, name=name), x, layers)

        unit = functools.partial(ConvNorm, layers=layers)
        x = unit(32, 3, strides=2, valid=True, name="conv1")(image)
        x = unit(32, 3, valid=True, name="conv2")(x)
        x = stage_output(self, "stage1", unit(64, 3, name="conv3")(x))
        conv = unit(96, 3, strides=2, valid=True, name="conv4")(x)
        x = jnp.concatenate([ops.max_pool(x, (3, 3), (2, 2)), conv], axis=-1)
        x = stage_output(self, "stage2", x)
        x = module(STEM_4A, x, "mixed_4a")
        conv = unit(192, 3, strides=2, valid=True, name="conv5")(x)
        x = jnp.concatenate([conv, ops.max_pool(x, (3, 3), (2, 2))], axis=-1)
        for number in range(1, 5):
            x = module(INCEPTION_A, x, f"inception_a{number}")
        x = stage_output(self, "stage3", x)
        x = module(REDUCTION_A, x, "reduction_a")
        for number in range(1, 8):
            x = module(INCEPTION_B, x, f"inception_b{number}")
        x = stage_output(self, "stage4", x)
        x = module(REDUCTION_B, x, "reduction_b")
        for number in range(1, 4):
            x = module(INCEPTION_C, x, f"inception_c{number}")
        x = stage_output(self, "stage5", x)
        return classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


ROWS = {
    "inception_v4": row(
        InceptionV4, 42_679_816, 63_168, 12_253_974_624, source=TIMM, image=(299, 299, 3)
    ),
}
