"""The network of airbench: CIFAR-10 at 94% in seconds.

Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498), section 3.1 and
its `airbench94`: a 2x2 convolution meant to whiten patches, three groups of two 3x3 convolutions
with pools after the first of each, no scales in the normalisation, small logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cnnjax import ops
from cnnjax.models.blocks import Activation, activation_function, uniform_fan_in
from cnnjax.models.layers import require_image
from cnnjax.models.norms import norm_layer
from cnnjax.models.stages import stage_output

# Three 2x2 pools after a 2x2 convolution.
MINIMUM_SIZE = 9


def partial_identity(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Initial kernel `[height, width, in, out]` whose first outputs are the inputs (section 3.3).

    The others are uniform within 1 / sqrt(fan in), PyTorch's default.
    """
    kernel = uniform_fan_in(key, shape, dtype)
    kept = min(shape[2], shape[3])
    identity = jnp.zeros((*shape[:3], kept), dtype)
    identity = identity.at[shape[0] // 2, shape[1] // 2].set(jnp.eye(shape[2], kept, dtype=dtype))
    return kernel.at[..., :kept].set(identity)


class Airbench94(nn.Module):
    """Image `[batch, height, width, channels]` to logits `[batch, num_classes]`.

    Attributes:
      num_classes: of the head; None returns the pooled features.
      widths: channels of the three groups.
      whitening_size: height and width of the first kernels; their number is twice that of the
        values in a patch.
      logits_scale: factor of the logits.
      norm: `batch`, `group`, `layer` or `none`; without scales.
      activation: a name of `blocks.ACTIVATIONS` or a function.
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      axis_name: the mapped axis over which BatchNorm averages, under `pmap` or `shard_map`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; None: that of image and parameters.

    Raises:
      UserError: an image of other dimensions, or smaller than 9 pixels.
    """

    num_classes: int | None = 10
    widths: Sequence[int] = (64, 256, 256)
    whitening_size: int = 2
    logits_scale: float = 1 / 9
    norm: str = "batch"
    activation: str | Activation = "gelu"
    norm_epsilon: float = 1e-12
    norm_momentum: float = 0.6
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "Airbench94", minimum=MINIMUM_SIZE)
        activation = activation_function(self.activation)
        norm = norm_layer(
            self.norm,
            train=train,
            dtype=self.dtype,
            axis_name=self.axis_name,
            group_size=self.norm_group_size,
            epsilon=self.norm_epsilon,
            momentum=self.norm_momentum,
            use_scale=False,
        )
        size = self.whitening_size
        x = ops.Conv(
            2 * size * size * image.shape[-1],
            (size, size),
            padding="VALID",
            kernel_init=uniform_fan_in,
            dtype=self.dtype,
            name="whiten",
        )(image)
        x = activation(x)
        for stage, width in enumerate(self.widths, 1):
            for number in (1, 2):
                name = f"stage{stage}_conv{number}"
                x = ops.Conv(
                    width,
                    (3, 3),
                    use_bias=self.norm == "none",
                    kernel_init=partial_identity,
                    dtype=self.dtype,
                    name=name,
                )(x)
                if number == 1:
                    x = ops.max_pool(x, (2, 2), (2, 2))
                x = activation(norm(name=f"{name}_norm")(x))
            x = stage_output(self, f"stage{stage}", x)
        x = jnp.max(x, axis=(1, 2))
        if self.num_classes is None:
            return x
        head = nn.Dense(
            self.num_classes,
            use_bias=False,
            kernel_init=uniform_fan_in,
            dtype=self.dtype,
            name="head",
        )
        return head(x) * self.logits_scale
