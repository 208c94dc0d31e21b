"""The network of airbench: CIFAR-10 at 94% in seconds.

Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), section 3.1 and
its `airbench94`: a 2x2 convolution meant to whiten patches, three groups of two 3x3 convolutions
with pools after the first of each, no scales in the normalization, small logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models.blocks import uniform_fan_in
from cnnjax.models.images import require_image
from cnnjax.models.layers import Layers
from cnnjax.models.rows import row
from cnnjax.models.stages import stage_output

# Three 2x2 pools after a 2x2 convolution.
MINIMUM_SIZE = 9
WHITENING_EPSILON = 5e-4


def partial_identity(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Initial kernel `[height, width, in, out]` whose first outputs are the inputs (section 3.3).

    The others are uniform within 1 / sqrt(fan in), PyTorch's default.
    """
    kernel = uniform_fan_in(key, shape, dtype)
    kept = min(shape[2], shape[3])
    identity = jnp.zeros((*shape[:3], kept), dtype)
    identity = identity.at[shape[0] // 2, shape[1] // 2].set(jnp.eye(shape[2], kept, dtype=dtype))
    return kernel.at[..., :kept].set(identity)


def whitened(variables: Mapping[str, Any], images: jax.Array) -> dict[str, Any]:
    """Returns the variables with the whitening of normalized images.

    Args:
      variables: of a network whose first layer is called `whiten`, such as `airbench94`.
      images: `[batch, height, width, channels]`.

    Raises:
      UserError: there is no such layer.
    """
    params = variables["params"]
    if "whiten" not in params:
        raise UserError("whitening needs a network with a layer named whiten, such as airbench94.")
    kernel = whitening_kernel(images, params["whiten"]["kernel"].shape[0])
    whiten = {**params["whiten"], "kernel": kernel}
    return {**variables, "params": {**params, "whiten": whiten}}


def whitening_kernel(images: jax.Array, size: int) -> jax.Array:
    """Returns `[size, size, channels, 2 n]`: whitening directions of patches of n values, twice.

    Those of the largest variance first, then the negatives of all. Outputs of the first half have
    unit second moments and are uncorrelated over the patches of `images` `[batch, height, width,
    channels]`, but for the `WHITENING_EPSILON` that is added to the variances (section 3.2).
    """
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(images), (size, size), (1, 2))
    # [..., channels, rows, columns] as the kernel's [rows, columns, channels].
    patches = np.moveaxis(windows, 3, -1).reshape(-1, size * size * images.shape[-1])
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    directions = vectors[:, ::-1] / np.sqrt(values[::-1] + WHITENING_EPSILON)
    kernel = np.concatenate([directions, -directions], axis=1)
    return jnp.asarray(kernel.reshape(size, size, images.shape[-1], -1), jnp.float32)


class Airbench94(nn.Module):
    """Image `[batch, height, width, channels]` to logits `[batch, num_classes]`.

    Attributes:
      num_classes: of the head; None returns the pooled features.
      widths: channels of the three groups.
      whitening_size: height and width of the first kernels; their number is twice that of the
        values in a patch.
      logits_scale: factor of the logits.
      layers: what all layers share; norms are without scales.

    Raises:
      UserError: an image of other dimensions, or smaller than 9 pixels.
    """

    num_classes: int | None = 10
    widths: Sequence[int] = (64, 256, 256)
    whitening_size: int = 2
    logits_scale: float = 1 / 9
    layers: Layers = Layers(activation="gelu", norm_epsilon=1e-12, norm_momentum=0.6, remat=None)

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "Airbench94", minimum=MINIMUM_SIZE)
        layers = self.layers.factories(train=train, kernel_init=partial_identity, norm_scale=False)
        size = self.whitening_size
        x = layers.conv(
            2 * size * size * image.shape[-1],
            size,
            valid=True,
            use_bias=True,
            kernel_init=uniform_fan_in,
            name="whiten",
        )(image)
        x = layers.activation(x)
        for stage, width in enumerate(self.widths, 1):
            for number in (1, 2):
                name = f"stage{stage}_conv{number}"
                x = layers.conv(width, 3, name=name)(x)
                if number == 1:
                    x = ops.max_pool(x, (2, 2), (2, 2))
                x = layers.activation(layers.norm(name=f"{name}_norm")(x))
            x = stage_output(self, f"stage{stage}", x)
        x = jnp.max(x, axis=(1, 2))
        if self.num_classes is None:
            return x
        head = nn.Dense(
            self.num_classes,
            use_bias=False,
            kernel_init=uniform_fan_in,
            dtype=layers.dtype,
            name="head",
        )
        return head(x) * self.logits_scale


ROWS = {
    "airbench94": row(
        Airbench94,
        1_971_640,
        2_304,
        118_147_360,
        source="by hand: 288 + 24 for whitening, 9 * (24 * 64 + 64 * 64 + ...), no scales",
        image=(32, 32, 3),
        num_classes=10,
    )
}
