"""Small networks of tutorials: a few convolutions, a few dense layers, or dense layers only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from cnnjax import ops
from cnnjax.models.blocks import Activation, activation_function
from cnnjax.models.layers import kernel_initialiser, pool_function, require_image
from cnnjax.models.norms import norm_layer
from cnnjax.models.stages import stage_output


class SimpleCNN(nn.Module):
    """Convolutions, 2x2 pools after some of them, dense layers, head.

    Attributes:
      num_classes: the logits; None returns the features before the head.
      widths: channels of each convolution.
      pooled: for each convolution, whether a 2x2 pool follows; empty: after every one.
      kernel_size: height and width of every convolution's kernel.
      strides: for each convolution, its stride; empty: 1 for all.
      dense_widths: units of each dense layer before the head.
      dropout_rate: before the head and after each dense layer but the last; needs the random
        stream `dropout` in training.
      padding: `VALID`, as most tutorials have it, or `SAME`.
      norm: `batch`, `group`, `layer` or `none`, between each convolution and its activation.
      activation: a name from `blocks.ACTIVATIONS` or a function.
      pool: `max` or `average`.
      norm_epsilon, norm_momentum: of the normalisation; momentum as in Flax.
      axis_name: the mapped axis over which BatchNorm averages, under `pmap` or `shard_map`.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      dtype: of the computation; None: that of image and parameters.

    Call: `image [batch, height, width, channels]` -> `[batch, num_classes]`.
    """

    num_classes: int | None = 10
    widths: Sequence[int] = (32, 64)
    pooled: Sequence[bool] = ()
    kernel_size: int = 3
    strides: Sequence[int] = ()
    dense_widths: Sequence[int] = ()
    dropout_rate: float = 0.0
    padding: str = "VALID"
    norm: str = "none"
    activation: str | Activation = "relu"
    pool: str = "max"
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    axis_name: str | None = None
    norm_group_size: int = 0
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        pooled = tuple(self.pooled) or (True,) * len(self.widths)
        strides = tuple(self.strides) or (1,) * len(self.widths)
        pool_function(self.pool)
        require_image(image, "SimpleCNN", minimum=self._minimum_size(pooled, strides))
        x = image
        layers = zip(self.widths, pooled, strides, strict=True)
        for index, (width, pool, stride) in enumerate(layers, start=1):
            x = self._convolution(x, width, pool, stride, index, train)
            x = stage_output(self, f"stage{index}", x)
        x = x.reshape(x.shape[0], -1)
        return _dense_layers(self, x, len(self.widths) + 1, train)

    def _convolution(
        self, x: jax.Array, width: int, pool: bool, stride: int, index: int, train: bool
    ) -> jax.Array:
        activation = activation_function(self.activation)
        layer = {
            "features": width,
            "kernel_size": (self.kernel_size, self.kernel_size),
            "padding": self.padding,
            "kernel_init": kernel_initialiser(self.activation),
            "dtype": self.dtype,
            "name": f"conv{index}",
        }
        if pool and stride == 1 and self.norm == "none":
            return ops.ConvPool(activation=activation, pool=self.pool, **layer)(x)
        norm = norm_layer(
            self.norm,
            train=train,
            axis_name=self.axis_name,
            group_size=self.norm_group_size,
            epsilon=self.norm_epsilon,
            momentum=self.norm_momentum,
            dtype=self.dtype,
        )
        x = ops.Conv(strides=(stride, stride), use_bias=self.norm == "none", **layer)(x)
        x = activation(norm(name=f"norm{index}")(x))
        if pool:
            x = pool_function(self.pool)(x, (2, 2), (2, 2))
        return x

    def _minimum_size(self, pooled: tuple[bool, ...], strides: tuple[int, ...]) -> int:
        size = 1
        for pool, stride in zip(reversed(pooled), reversed(strides), strict=True):
            size = size * 2 if pool else size
            size = (size - 1) * stride + (self.kernel_size if self.padding == "VALID" else 1)
        return size


class MLP(nn.Module):
    """Dense layers on the flattened image, then the head.

    The fields are those of `SimpleCNN`. The default is the two-hidden-layer network 784-300-100-10
    of LeCun et al. 1998, section III.C ("Two-Hidden-Layer"), with ReLU.

    Call: `image [batch, height, width, channels]` -> `[batch, num_classes]`.
    """

    num_classes: int | None = 10
    dense_widths: Sequence[int] = (300, 100)
    dropout_rate: float = 0.0
    activation: str | Activation = "relu"
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "MLP")
        return _dense_layers(self, image.reshape(image.shape[0], -1), 1, train)


def _dense_layers(model: SimpleCNN | MLP, x: jax.Array, first_stage: int, train: bool) -> jax.Array:
    """Adds `dense1` ..., dropout and `head` to `model`; `x [batch, features]`."""
    widths = model.dense_widths
    activation = activation_function(model.activation)
    init = kernel_initialiser(model.activation)
    for index, width in enumerate(widths, start=1):
        dense = nn.Dense(width, kernel_init=init, dtype=model.dtype, name=f"dense{index}")
        x = activation(dense(x))
        x = stage_output(model, f"stage{first_stage + index - 1}", x)
        if index < len(widths):
            x = nn.Dropout(model.dropout_rate)(x, deterministic=not train)
    x = nn.Dropout(model.dropout_rate)(x, deterministic=not train)
    if model.num_classes is None:
        return x
    return nn.Dense(model.num_classes, dtype=model.dtype, name="head")(x)


CNN_32_64 = SimpleCNN
CNN_32_64_Dense64 = partial(SimpleCNN, dense_widths=(64,))
CNN_32_64_Dense128_Dropout = partial(SimpleCNN, dense_widths=(128,), dropout_rate=0.5)
CNN_32_Dense64 = partial(SimpleCNN, widths=(32,), dense_widths=(64,))
CNN_5Conv_2Dense = partial(
    SimpleCNN,
    widths=(32, 32, 64, 64, 128),
    pooled=(False, True, False, True, True),
    dense_widths=(128,),
    padding="SAME",
)
# Of Wong, Rice and Kolter 2020, "Fast is better than free", section 5.1: two strided convolutions.
CNN_Strided_16_32 = partial(
    SimpleCNN,
    widths=(16, 32),
    pooled=(False, False),
    kernel_size=4,
    strides=(2, 2),
    dense_widths=(100,),
    padding="SAME",
)
DenseDropout = partial(MLP, num_classes=1, dense_widths=(64,), dropout_rate=0.5)
