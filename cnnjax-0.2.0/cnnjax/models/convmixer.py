"""ConvMixer: patches, then depthwise and 1x1 convolutions at one resolution.

Trockman & Kolter 2022, "Patches Are All You Need?" (arXiv 2201.09792), section 2 and Table 1. The
first number of a name is the width, the second the depth.

Names: timm's `blocks.0.0.fn.0`, `.0.fn.2`, `.1` and `.3` are `stage1/block1/depthwise`, `norm1`,
`pointwise` and `norm2`; `stem.0` and `.2` are `stem/conv` and `stem/norm`.
"""

from __future__ import annotations

import functools

from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.images import require_image
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.rows import TIMM, row


class ConvMixerBlock(nn.Module):
    """Convolution of each channel, added to its input; 1x1 convolution (Figure 2).

    Behind each convolution the activation comes before the norm.
    """

    kernel_size: int
    layers: Factories

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layers, channels = self.layers, x.shape[-1]
        y = layers.conv(channels, self.kernel_size, groups=channels, name="depthwise")(x)
        x = x + layers.norm(name="norm1")(layers.activation(y))
        y = layers.conv(channels, 1, name="pointwise")(x)
        return layers.norm(name="norm2")(layers.activation(y))


class Patches(nn.Module):
    """A convolution whose stride is the side of its kernel; activation; norm."""

    features: int
    patch_size: int
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        layers, size = self.layers, self.patch_size
        x = layers.conv(self.features, size, size, valid=True, name="conv")(image)
        return layers.norm(name="norm")(layers.activation(x))


class ConvMixer(nn.Module):
    """ConvMixer: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    All blocks are one stage.

    Attributes:
      features: channels throughout.
      depth: number of blocks.
      kernel_size: of the depthwise convolutions.
      patch_size: side of the squares of pixels that the stem makes one of; 1 or 2 for images of 28
        to 64 pixels (section 3.1).
      num_classes: of the head; `None` returns the pooled features.
      dropout_rate: before the head.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image is smaller than a patch.
    """

    features: int
    depth: int
    kernel_size: int = 9
    patch_size: int = 7
    num_classes: int | None = 1000
    dropout_rate: float = 0.0
    layers: Layers = Layers(activation="gelu")

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "ConvMixer", minimum=self.patch_size)
        layers = self.layers.factories(train=train, conv_bias=True)
        x = Patches(self.features, self.patch_size, layers, name="stem")(image)
        block = functools.partial(ConvMixerBlock, self.kernel_size)
        x = blocks.run_stages(x, [[block] * self.depth], layers)
        return blocks.classify(x, self.num_classes, layers, dropout_rate=self.dropout_rate)


published = functools.partial(row, ConvMixer, source=TIMM)
wide = functools.partial(published, features=1536, depth=20)
large_patches = functools.partial(published, features=1024, depth=20, patch_size=14)
rectified = functools.partial(published, features=768, depth=32, kernel_size=7, activation="relu")

# parameters, running statistics, multiply-accumulates
ROWS = {
    "convmixer_1536_20": wide(51_625_960, 125_952, 51_099_168_768),
    "convmixer_1024_20_ks9_p14": large_patches(24_383_464, 83_968, 5_948_547_072),
    "convmixer_768_32": rectified(21_110_248, 99_840, 20_676_851_712),
}
