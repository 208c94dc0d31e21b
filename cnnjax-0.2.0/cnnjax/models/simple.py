"""Small networks of tutorials: a few convolutions, a few dense layers, or dense layers only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax

from cnnjax import ops
from cnnjax.models.blocks import classify
from cnnjax.models.images import pool_function, require_image
from cnnjax.models.layers import Activation, Factories, Layers, kernel_initializer
from cnnjax.models.rows import row
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
      pool: `max` or `average`.
      layers: what all layers share; norms stand between convolutions and their activations.

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
    pool: str = "max"
    layers: Layers = Layers(norm="none", remat=None)

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        pooled = tuple(self.pooled) or (True,) * len(self.widths)
        strides = tuple(self.strides) or (1,) * len(self.widths)
        pool_function(self.pool)
        require_image(image, "SimpleCNN", minimum=self._minimum_size(pooled, strides))
        layers = self.layers.factories(train=train)
        x = image
        table = zip(self.widths, pooled, strides, strict=True)
        for index, (width, pool, stride) in enumerate(table, start=1):
            x = self._convolution(x, width, pool, stride, index, layers)
            x = stage_output(self, f"stage{index}", x)
        x = x.reshape(x.shape[0], -1)
        return _dense_layers(self, x, self.layers, layers, len(self.widths) + 1)

    def _convolution(
        self, x: jax.Array, width: int, pool: bool, stride: int, index: int, layers: Factories
    ) -> jax.Array:
        layer = {
            "features": width,
            "kernel_size": (self.kernel_size, self.kernel_size),
            "padding": self.padding,
            "kernel_init": kernel_initializer(self.layers.activation),
            "dtype": layers.dtype,
            "name": f"conv{index}",
        }
        bare = self.layers.norm == "none"
        if pool and stride == 1 and bare:
            return ops.ConvPool(activation=layers.activation, pool=self.pool, **layer)(x)
        x = ops.Conv(strides=(stride, stride), use_bias=bare, **layer)(x)
        x = layers.activation(layers.norm(name=f"norm{index}")(x))
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
        shared = Layers(norm="none", activation=self.activation, dtype=self.dtype)
        layers = shared.factories(train=train)
        return _dense_layers(self, image.reshape(image.shape[0], -1), shared, layers, 1)


def _dense_layers(
    model: SimpleCNN | MLP, x: jax.Array, shared: Layers, layers: Factories, first_stage: int
) -> jax.Array:
    """Adds `dense1` ..., dropout and `head` to `model`; `x [batch, features]`."""
    init = kernel_initializer(shared.activation)
    for index, width in enumerate(model.dense_widths, start=1):
        if index > 1:
            x = nn.Dropout(model.dropout_rate)(x, deterministic=not layers.train)
        dense = nn.Dense(width, kernel_init=init, dtype=layers.dtype, name=f"dense{index}")
        x = layers.activation(dense(x))
        x = stage_output(model, f"stage{first_stage + index - 1}", x)
    return classify(
        x,
        model.num_classes,
        layers,
        dropout_rate=model.dropout_rate,
        kernel_init=nn.linear.default_kernel_init,
    )


digits = functools.partial(
    row, source="by hand, tests/models/test_simple.py", image=(28, 28, 1), num_classes=10
)

# parameters, running statistics, multiply-accumulates, and what differs
ROWS = {
    "cnn_32_64": digits(SimpleCNN, 34_826, 0, 2_440_960),
    "cnn_32_64_dense64": digits(SimpleCNN, 121_930, 0, 2_528_000, dense_widths=(64,)),
    "cnn_32_64_dense128_dropout": digits(
        SimpleCNN, 225_034, 0, 2_631_040, dense_widths=(128,), dropout_rate=0.5
    ),
    "cnn_32_dense64": digits(
        SimpleCNN, 462_410, 0, 1_239_040, image=(32, 32, 3), widths=(32,), dense_widths=(64,)
    ),
    "cnn_5conv_2dense": digits(
        SimpleCNN,
        287_722,
        0,
        22_050_560,
        widths=(32, 32, 64, 64, 128),
        pooled=(False, True, False, True, True),
        dense_widths=(128,),
        padding="SAME",
    ),
    # Wong, Rice and Kolter 2020, "Fast is better than free", section 5.1: strided convolutions.
    "cnn_strided_16_32": digits(
        SimpleCNN,
        166_406,
        0,
        609_384,
        source="by hand: 272 + 8,224 + 156,900 + 1,010; 50,176 + 401,408 + 156,800 + 1,000",
        widths=(16, 32),
        pooled=(False, False),
        kernel_size=4,
        strides=(2, 2),
        dense_widths=(100,),
        padding="SAME",
    ),
    "mlp": digits(MLP, 266_610, 0, 266_200),
    "dense_dropout": digits(
        MLP, 50_305, 0, 50_240, num_classes=1, dense_widths=(64,), dropout_rate=0.5
    ),
}
