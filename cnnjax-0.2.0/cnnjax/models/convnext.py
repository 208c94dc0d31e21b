"""ConvNeXt and ConvNeXt V2: a ResNet made over after the vision transformer.

- Liu et al. 2022, "A ConvNet for the 2020s" (arXiv 2201.03545), section 2 and appendix A.
- V2: Woo et al. 2023, "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders"
  (arXiv 2301.00808), section 3.2 and Table 7 (appendix): a response norm in place of the scale.

Names: torchvision's `features.1.0.block.0`, `.2`, `.3`, `.5` and `layer_scale` are
`stage1/block1/depthwise`, `norm`, `expand`, `project` and `layer_scale`; `features.2.0` and `.1`
are `downsample1/norm` and `/conv`; `features.0` is `stem`; `classifier.0` is `norm`, `.2` is
`head`. timm's `mlp.grn` is `response_norm`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models import blocks
from cnnjax.models.images import require_image, require_stem
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.rows import TIMM, TORCHVISION, also_called, row

truncated_normal = nn.initializers.truncated_normal(0.02)


class ResponseNorm(nn.Module):
    """Each channel times its share of the energy, added with a scale and a bias that start at 0.

    `x + scale * x * g / mean(g) + bias`, where `g` is the root of a channel's sum of squares over
    the image, and the mean is over channels (arXiv 2301.00808, section 3.2, algorithm 1).
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.zeros, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        energy = jnp.sum(jnp.square(wide), axis=(1, 2), keepdims=True)
        # The root's gradient at 0 is infinite.
        size = jnp.where(energy > 0, jnp.sqrt(jnp.where(energy > 0, energy, 1.0)), 0.0)
        share = size / (jnp.mean(size, axis=-1, keepdims=True) + self.epsilon)
        return x + (wide * (scale * share) + bias).astype(x.dtype)


class ConvNeXtBlock(nn.Module):
    """7x7 convolution of each channel, norm, two dense layers over channels, added scaled.

    The paper's Figure 4, right. `layer_scale` multiplies each channel of the branch; V2 has
    `ResponseNorm` between the dense layers instead.
    """

    layers: Factories
    layer_scale_init: float | None
    response_norm: bool = False
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, channels = self.layers, x.shape[-1]
        dense = functools.partial(ops.Dense, dtype=layers.dtype, kernel_init=truncated_normal)
        y = layers.conv(channels, 7, groups=channels, name="depthwise")(x)
        y = layers.norm(name="norm")(y)
        y = layers.activation(dense(4 * channels, name="expand")(y))
        if self.response_norm:
            y = ResponseNorm(name="response_norm")(y)
        y = dense(channels, name="project")(y)
        if self.layer_scale_init is not None:
            constant = nn.initializers.constant(self.layer_scale_init)
            scale = self.param("layer_scale", constant, (channels,))
            # Wide first: its gradient is summed in float32.
            y = y * jnp.broadcast_to(scale, y.shape).astype(y.dtype)
        return x + blocks.drop_branch(self, y)


class Downsample(nn.Module):
    """Norm, then a 2x2 convolution at stride 2 (section 2.6)."""

    features: int
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.layers.norm(name="norm")(x)
        return self.layers.conv(self.features, 2, 2, valid=True, name="conv")(x)


class Stem(nn.Module):
    """Convolution and norm: `"imagenet"` 4x4 at stride 4, `"cifar"` 3x3 at stride 1."""

    kind: str
    features: int
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        large = self.kind == "imagenet"
        size, strides = (4, 4) if large else (3, 1)
        x = self.layers.conv(self.features, size, strides, valid=large, name="conv")(image)
        return self.layers.norm(name="norm")(x)


class ConvNeXt(nn.Module):
    """ConvNeXt: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage.
      stage_features: channels of each stage.
      num_classes: of the head; `None` returns the pooled, normalized features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      layer_scale_init: first value of each block's scale (Table 5); None for no scale.
      response_norm: whether blocks have V2's `ResponseNorm`.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0 (Table 5).
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    stage_features: Sequence[int]
    num_classes: int | None = 1000
    stem: str = "imagenet"
    layer_scale_init: float | None = 1e-6
    response_norm: bool = False
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers(norm="layer", activation="gelu", norm_epsilon=1e-6)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        minimum = 2 ** (len(self.stage_sizes) - 1) * (4 if self.stem == "imagenet" else 1)
        require_image(image, "ConvNeXt", minimum=minimum)
        require_stem(self.stem)
        layers = self.layers.factories(train=train, kernel_init=truncated_normal, conv_bias=True)
        block = functools.partial(
            ConvNeXtBlock,
            layer_scale_init=self.layer_scale_init,
            response_norm=self.response_norm,
        )
        x = Stem(self.stem, self.stage_features[0], layers, name="stem")(image)

        def downsample(stage: int, x: Array) -> Array:
            return Downsample(self.stage_features[stage], layers, name=f"downsample{stage}")(x)

        x = blocks.run_stages(
            x,
            [[block] * n for n, _ in zip(self.stage_sizes, self.stage_features, strict=True)],
            layers,
            stochastic_depth_rate=self.stochastic_depth_rate,
            between=downsample,
        )
        return blocks.classify(
            layers.norm(name="norm")(jnp.mean(x, axis=(1, 2))),
            self.num_classes,
            layers,
            dropout_rate=self.dropout_rate,
            kernel_init=truncated_normal,
        )


published = functools.partial(row, ConvNeXt, source=TORCHVISION)
tiny = functools.partial(published, stage_sizes=(3, 3, 9, 3), stage_features=(96, 192, 384, 768))
deep = functools.partial(published, stage_sizes=(3, 3, 27, 3))
small = functools.partial(deep, stage_features=(96, 192, 384, 768))
base = functools.partial(deep, stage_features=(128, 256, 512, 1024))
large = functools.partial(deep, stage_features=(192, 384, 768, 1536))

second = functools.partial(row, ConvNeXt, source=TIMM, layer_scale_init=None, response_norm=True)
shallow = functools.partial(second, stage_sizes=(2, 2, 6, 2))
atto = functools.partial(shallow, stage_features=(40, 80, 160, 320))
femto = functools.partial(shallow, stage_features=(48, 96, 192, 384))
pico = functools.partial(shallow, stage_features=(64, 128, 256, 512))
nano = functools.partial(second, stage_sizes=(2, 2, 8, 2), stage_features=(80, 160, 320, 640))
v2_tiny = functools.partial(second, stage_sizes=(3, 3, 9, 3), stage_features=(96, 192, 384, 768))
v2_deep = functools.partial(second, stage_sizes=(3, 3, 27, 3))
v2_base = functools.partial(v2_deep, stage_features=(128, 256, 512, 1024))
v2_large = functools.partial(v2_deep, stage_features=(192, 384, 768, 1536))

# parameters, running statistics, multiply-accumulates, and the rate of Table 5
ROWS = {
    "convnext_tiny": tiny(28_589_128, 0, 4_455_531_264, stochastic_depth_rate=0.1),
    "convnext_small": small(50_223_688, 0, 8_683_712_256, stochastic_depth_rate=0.4),
    "convnext_base": base(88_591_464, 0, 15_354_729_472, stochastic_depth_rate=0.5),
    "convnext_large": large(197_767_336, 0, 34_361_433_600, stochastic_depth_rate=0.5),
    "convnext_v2_atto": atto(3_708_400, 0, 547_332_480, also={"timm": "convnextv2_atto"}),
    "convnext_v2_femto": femto(5_233_240, 0, 779_629_824, also={"timm": "convnextv2_femto"}),
    "convnext_v2_pico": pico(9_066_280, 0, 1_367_055_360, also={"timm": "convnextv2_pico"}),
    "convnext_v2_nano": nano(15_623_800, 0, 2_445_528_320, also={"timm": "convnextv2_nano"}),
    "convnext_v2_tiny": v2_tiny(28_635_496, 0, 4_455_531_264, also={"timm": "convnextv2_tiny"}),
    "convnext_v2_base": v2_base(88_717_800, 0, 15_354_729_472, also={"timm": "convnextv2_base"}),
    "convnext_v2_large": v2_large(
        197_956_840, 0, 34_361_433_600, also={"timm": "convnextv2_large"}
    ),
}
ROWS |= also_called(
    ROWS,
    "keras",
    {f"convnext_{size}": f"ConvNeXt{size.title()}" for size in ("tiny", "small", "base", "large")},
)
