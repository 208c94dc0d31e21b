"""Vision transformers: ViT, and DeiT, which is a ViT with another training and a second head.

- ViT: Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words" (arXiv 2010.11929), section 3.1 and
  Table 1. An image is cut into patches; a patch is a token; one more token, which belongs to no
  patch, ends as the image's features.
- S/16: Steiner et al. 2021, "How to train your ViT?" (arXiv 2106.10270).
- DeiT: Touvron et al. 2020, "Training data-efficient image transformers & distillation through
  attention" (arXiv 2012.12877), Table 1; distilled ones have a second token and a second head,
  which learn from a teacher (section 4), and their logits are the mean of both heads'.

A ViT has no stages. Here each quarter of its blocks is one, and what it sows is the map of its
patches `[batch, height, width, features]`.

Names: torchvision's `encoder.layers.encoder_layer_3.ln_1` is `stage2/block1/norm1`, its
`self_attention` is `attention`, `mlp.0` and `mlp.3` are `mlp/expand` and `mlp/project`; `conv_proj`
is `stem`, `encoder.ln` is `norm`, `heads.head` is `head`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax.models import blocks
from cnnjax.models.attention import TransformerBlock, truncated_normal
from cnnjax.models.images import require_image
from cnnjax.models.layers import Array, Factories, Layers
from cnnjax.models.rows import TIMM, row
from cnnjax.models.stages import stage_output

TOKENS = ("class_token", "distillation_token")


class TokenStage(blocks.Stage):
    """A stage of tokens, whose output is the map of the patches.

    Attributes:
      grid: rows and columns of patches; they are the last tokens.
    """

    grid: tuple[int, int] = (1, 1)

    def end(self, x: Array) -> Array:
        """Sows the patches as `[batch, height, width, features]`."""
        extra = x.shape[1] - self.grid[0] * self.grid[1]
        patches = x[:, extra:].reshape(x.shape[0], *self.grid, x.shape[-1])
        patches = stage_output(self, "output", patches).reshape(x[:, extra:].shape)
        return jnp.concatenate([x[:, :extra], patches], axis=1)


def resize_positions(positions: Array, side: int, grid: tuple[int, int]) -> Array:
    """Interpolates position embeddings to another grid of patches (arXiv 2010.11929, section 3.2).

    By cubic splines with a low-pass filter where the grid shrinks, as timm's
    `resample_abs_pos_embed` does. The tokens before the patches keep theirs.

    Args:
      positions: `[1, tokens, features]`, the last `side ** 2` tokens those of the patches.
      side: of the grid for which they were learned.
      grid: rows and columns of the grid that is wanted.

    Returns:
      `[1, tokens, features]`.
    """
    if grid == (side, side):
        return positions
    features = positions.shape[-1]
    extra = positions.shape[1] - side * side
    patches = positions[:, extra:].reshape(1, side, side, features)
    patches = jax.image.resize(patches, (1, *grid, features), "cubic", antialias=True)
    return jnp.concatenate([positions[:, :extra], patches.reshape(1, -1, features)], axis=1)


class Tokens(nn.Module):
    """Patches of an image, extra tokens before them, and their positions (equation 1).

    Call: `[batch, height, width, channels]` to `[batch, tokens, features]`.
    """

    patch_size: int
    features: int
    extra: Sequence[str]
    grid_size: int
    layers: Factories

    @nn.compact
    def __call__(self, image: Array) -> Array:
        layers, size = self.layers, self.patch_size
        patches = layers.conv(self.features, size, size, valid=True, name="conv")(image)
        batch, *grid, features = patches.shape
        extra = [self.param(name, truncated_normal, (1, 1, features)) for name in self.extra]
        count = len(extra) + self.grid_size**2
        positions = self.param("positions", truncated_normal, (1, count, features))
        positions = resize_positions(positions, self.grid_size, (grid[0], grid[1]))
        repeated = [jnp.broadcast_to(t.astype(patches.dtype), (batch, 1, features)) for t in extra]
        tokens = jnp.concatenate([*repeated, patches.reshape(batch, -1, features)], axis=1)
        return tokens + positions.astype(tokens.dtype)


class ViT(nn.Module):
    """Vision transformer: image `[batch, height, width, channels]` to logits `[batch, classes]`.

    Attributes:
      patch_size: pixels along a side of a patch.
      features: of a token.
      num_heads: of each attention.
      stage_sizes: blocks of each stage; only their sum matters for the logits.
      num_classes: of the head; `None` returns the features of the class token.
      hidden_features: of the dense layers in a block; 0 for four times `features`.
      grid_size: patches along a side of the images for which positions are learned; they are
        interpolated for others, see `resize_positions`.
      distilled: whether there is a second token and head, `head_distilled`, as in DeiT.
      dropout_rate: before the head.
      stochastic_depth_rate: of the last block; rises linearly from 0.
      layers: what all layers share; see `Layers`.

    Raises:
      UserError: a name among these is unknown, or the image is smaller than a patch.
    """

    patch_size: int
    features: int
    num_heads: int
    stage_sizes: Sequence[int] = (3, 3, 3, 3)
    num_classes: int | None = 1000
    hidden_features: int = 0
    grid_size: int = 14
    distilled: bool = False
    dropout_rate: float = 0.0
    stochastic_depth_rate: float = 0.0
    layers: Layers = Layers(norm="layer", activation="gelu", norm_epsilon=1e-6)

    @nn.compact
    def __call__(self, image: Array, *, train: bool = False) -> Array:
        require_image(image, "ViT", minimum=self.patch_size)
        layers = self.layers.factories(train=train, kernel_init=truncated_normal, conv_bias=True)
        extra = TOKENS if self.distilled else TOKENS[:1]
        tokens = Tokens(self.patch_size, self.features, extra, self.grid_size, layers, name="stem")(
            image
        )
        hidden = self.hidden_features or 4 * self.features
        block = functools.partial(TransformerBlock, self.num_heads, hidden)
        grid = (image.shape[1] // self.patch_size, image.shape[2] // self.patch_size)
        tokens = blocks.run_stages(
            tokens,
            [[block] * depth for depth in self.stage_sizes],
            layers,
            stochastic_depth_rate=self.stochastic_depth_rate,
            stage_class=functools.partial(TokenStage, grid=grid),
        )
        tokens = layers.norm(name="norm")(tokens[:, : len(extra)])
        classify = functools.partial(
            blocks.classify,
            num_classes=self.num_classes,
            layers=layers,
            dropout_rate=self.dropout_rate,
            kernel_init=truncated_normal,
        )
        if not self.distilled:
            return classify(tokens[:, 0])
        second = classify(tokens[:, 1], name="head_distilled")
        return (classify(tokens[:, 0]) + second) / 2


COUNTED = "torchvision's num_params; its layers' multiply-accumulates, counted"
vit = functools.partial(row, ViT, source=COUNTED)
counted = functools.partial(row, ViT, source=TIMM, patch_size=16)
base = functools.partial(vit, features=768, num_heads=12)
large = functools.partial(vit, features=1024, num_heads=16, stage_sizes=(6, 6, 6, 6))
huge = functools.partial(vit, features=1280, num_heads=16, stage_sizes=(8, 8, 8, 8))
deit_tiny = functools.partial(counted, features=192, num_heads=3)
deit_small = functools.partial(counted, features=384, num_heads=6)
deit_base = functools.partial(counted, features=768, num_heads=12)


def timm(name: str) -> dict[str, str]:
    """The library's name of a network of images of 224 pixels."""
    return {"timm": f"{name}_224"}


# parameters, running statistics, and multiply-accumulates without the products of queries with keys
# and of weights with values, which torchvision's _ops have
ROWS = {
    "vit_s_16": deit_small(22_050_664, 0, 4_241_218_560, also=timm("vit_small_patch16")),
    "vit_b_16": base(86_567_656, 0, 16_848_500_736, patch_size=16, also=timm("vit_base_patch16")),
    "vit_b_32": base(
        88_224_232, 0, 4_363_106_304, patch_size=32, grid_size=7, also=timm("vit_base_patch32")
    ),
    "vit_l_16": large(
        304_326_632, 0, 59_647_172_608, patch_size=16, also=timm("vit_large_patch16")
    ),
    "vit_l_32": large(
        306_535_400, 0, 15_254_659_072, patch_size=32, grid_size=7, also=timm("vit_large_patch32")
    ),
    "vit_h_14": huge(
        632_045_800, 0, 161_884_375_040, patch_size=14, grid_size=16, also=timm("vit_huge_patch14")
    ),
    "deit_tiny": deit_tiny(5_717_416, 0, 1_074_851_328, also=timm("deit_tiny_patch16")),
    "deit_small": deit_small(22_050_664, 0, 4_241_218_560, also=timm("deit_small_patch16")),
    "deit_base": deit_base(86_567_656, 0, 16_848_500_736, also=timm("deit_base_patch16")),
    "deit_tiny_distilled": deit_tiny(
        5_910_800,
        0,
        1_080_351_744,
        distilled=True,
        also=timm("deit_tiny_distilled_patch16"),
    ),
    "deit_small_distilled": deit_small(
        22_436_432,
        0,
        4_262_836_224,
        distilled=True,
        also=timm("deit_small_distilled_patch16"),
    ),
    "deit_base_distilled": deit_base(
        87_338_192,
        0,
        16_934_203_392,
        distilled=True,
        also=timm("deit_base_distilled_patch16"),
    ),
}
