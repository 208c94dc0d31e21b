"""FastViT without attention: a ConvNet in the form of a transformer, its branches folded away.

Vasu et al. 2023, "FastViT: A Fast Hybrid Vision Transformer using Structural Reparameterization"
(arXiv 2303.14189), section 3 and Table 2: T8, T12 and S12, which mix by convolutions in all stages.
As in the authors' code and timm, no activation follows the large kernels between the stages.
`reparametrize.reparametrize` gives the network without branches.

Names: timm's `stem.0` is `stem1`, `stages.1.downsample.proj.0` and `.1` are `downsample1/large` and
`downsample1/pointwise`; a block's `token_mixer` is `mixer`, its `mlp.conv`, `mlp.fc1` and `mlp.fc2`
are `depthwise`, `expand` and `project`; `final_conv` is `last`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image, strides_for
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.mobileone import MobileOneConv
from cnnjax.models.reparametrize import BranchedConv, BranchedMixer
from cnnjax.models.rows import TIMM, row

truncated_normal = nn.initializers.truncated_normal(0.02)


class FastViTBlock(nn.Module):
    """A mixer of pixels, then 7x7 of each channel and two dense layers, added scaled (Figure 2)."""

    mlp_ratio: float
    layer_scale_init: float
    deployed: bool
    layers: Factories
    stochastic_depth_rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, channels = self.layers, x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=layers.dtype, kernel_init=truncated_normal)
        x = BranchedMixer(3, self.layer_scale_init, layers, self.deployed, name="mixer")(x)
        y = blocks.ConvNorm(channels, 7, layers, groups=channels, linear=True, name="depthwise")(x)
        y = layers.activation(dense(int(self.mlp_ratio * channels), name="expand")(y))
        y = dense(channels, name="project")(y)
        constant = nn.initializers.constant(self.layer_scale_init)
        scale = self.param("layer_scale", constant, (channels,))
        return x + blocks.drop_branch(self, y * scale.astype(y.dtype))


class Downsample(nn.Module):
    """7x7 beside 3x3 for each channel at stride 2, then 1x1 beside the identity."""

    features: int
    deployed: bool
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = BranchedConv(
            self.features,
            (7, 3),
            self.layers,
            strides=2,
            groups=x.shape[-1],
            deployed=self.deployed,
            name="large",
        )(x)
        pointwise = MobileOneConv(
            self.features, 1, self.layers, deployed=self.deployed, name="pointwise"
        )
        return pointwise(x)


class FastViT(nn.Module):
    """FastViT: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      stage_sizes: blocks of each stage.
      stage_features: channels of each stage.
      mlp_ratio: channels between the dense layers of a block, per channel.
      last_ratio: channels behind the last convolution, per channel of the last stage.
      num_classes: of the head; `None` returns the pooled features.
      stem: `"imagenet"` for images of about 224 pixels, `"cifar"` for 28 to 64 pixels.
      layer_scale_init: first value of the scales of mixers and blocks.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      deployed: whether the branches are folded; see `reparametrize`.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image does not fit.
    """

    stage_sizes: Sequence[int]
    stage_features: Sequence[int]
    mlp_ratio: float = 3.0
    last_ratio: float = 2.0
    num_classes: int | None = 1000
    stem: str = "imagenet"
    layer_scale_init: float = 1e-5
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    deployed: bool = False
    layers: Layers = Layers(activation="gelu")

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "FastViT")
        layers = self.layers.factories(train=train)
        first, second = strides_for(self.stem, (2, 2))
        channels = self.stage_features[0]
        conv = functools.partial(MobileOneConv, layers=layers, deployed=self.deployed)
        x = conv(channels, 3, strides=first, name="stem1")(image)
        x = conv(channels, 3, strides=second, groups=channels, name="stem2")(x)
        x = conv(channels, 1, name="stem3")(x)
        block = functools.partial(
            FastViTBlock, self.mlp_ratio, self.layer_scale_init, self.deployed
        )

        def downsample(stage: int, x: Array) -> Array:
            features = self.stage_features[stage]
            return Downsample(features, self.deployed, layers, name=f"downsample{stage}")(x)

        x = blocks.run_stages(
            x,
            [[block] * n for n, _ in zip(self.stage_sizes, self.stage_features, strict=True)],
            layers,
            stochastic_depth_rate=self.stochastic_depth_rate,
            between=downsample,
        )
        last = int(self.last_ratio * x.shape[-1])
        x = conv(last, 3, groups=x.shape[-1], se=True, name="last")(x)
        return blocks.classify(
            x,
            self.num_classes,
            layers,
            dropout_rate=self.dropout_rate,
            kernel_init=truncated_normal,
        )


published = functools.partial(row, FastViT, source=TIMM, image=(256, 256, 3))
t8 = functools.partial(published, stage_sizes=(2, 2, 4, 2), stage_features=(48, 96, 192, 384))
t12 = functools.partial(published, stage_sizes=(2, 2, 6, 2), stage_features=(64, 128, 256, 512))
s12 = functools.partial(t12, mlp_ratio=4.0)

# parameters, running statistics, multiply-accumulates, all of the form for training
ROWS = {
    "fastvit_t8": t8(4_026_232, 27_264, 690_149_376),
    "fastvit_t12": t12(7_553_704, 41_472, 1_397_727_232),
    "fastvit_s12": s12(9_473_576, 41_472, 1_800_380_416),
}
