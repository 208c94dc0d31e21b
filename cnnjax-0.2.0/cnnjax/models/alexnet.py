"""AlexNet: the single tower that torchvision has, and the network of 2012.

Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
NeurIPS 2012; Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
arXiv 1404.5997, whose single tower torchvision follows.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import ops
from cnnjax.models.images import adaptive_average_pool, require_image, require_stem
from cnnjax.models.layers import Activation, activation_function, kernel_initializer
from cnnjax.models.rows import TORCHVISION, row
from cnnjax.models.stages import stage_output


class AlexNet(nn.Module):
    """AlexNet in one tower (arXiv 1404.5997, as torchvision has it): 61,100,840 parameters.

    Attributes:
      num_classes: the logits; None returns the 4,096 features before them.
      stem: `imagenet`, 11x11 at stride 4 and an average pool to 6x6 before the dense layers; or
        `cifar`, 3x3 at stride 1 and no average pool, for images of 28 to 64 pixels.
      activation: a name from `layers.ACTIVATIONS` or a function.
      dropout_rate: before each of the first two dense layers; random stream `dropout`.
      dtype: of the computation; None: that of image and parameters.

    Call: `image [batch, height, width, channels]` -> `[batch, num_classes]`.
    """

    num_classes: int | None = 1000
    stem: str = "imagenet"
    activation: str | Activation = "relu"
    dropout_rate: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_stem(self.stem)
        large = self.stem == "imagenet"
        require_image(image, "AlexNet", minimum=63 if large else 15)
        activation = activation_function(self.activation)
        layer = {"kernel_init": kernel_initializer(self.activation), "dtype": self.dtype}
        # features, kernel, stride, padding on each side, and whether a pool follows
        first = (64, 11, 4, 2, True) if large else (64, 3, 1, 1, True)
        rest = ((192, 5, 1, 2, True), (384, 3, 1, 1, False))
        last = ((256, 3, 1, 1, False), (256, 3, 1, 1, True))
        x = image
        for index, (width, kernel, stride, padding, pool) in enumerate((first, *rest, *last), 1):
            x = ops.Conv(
                width,
                (kernel, kernel),
                strides=(stride, stride),
                padding=[(padding, padding)] * 2,
                name=f"conv{index}",
                **layer,
            )(x)
            x = activation(x)
            if pool:
                x = ops.max_pool(x, (3, 3), (2, 2))
            x = stage_output(self, f"stage{index}", x)
        if large:
            x = adaptive_average_pool(x, 6)
        x = x.reshape(x.shape[0], -1)
        for index in (1, 2):
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
            x = activation(nn.Dense(4096, name=f"dense{index}", **layer)(x))
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def local_response_norm(
    image: jax.Array,
    *,
    size: int = 5,
    offset: float = 2.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
) -> jax.Array:
    """Divides by `(offset + alpha * sum of squares over `size` adjacent channels) ** beta`.

    Krizhevsky et al. 2012, section 3.3. (PyTorch and Caffe divide their alpha by `size`.)
    """
    dtype = jnp.promote_types(image.dtype, jnp.float32)
    squares = jax.lax.reduce_window(
        # Squares of float16 would overflow from 256 on.
        jnp.square(image.astype(dtype)),
        np.zeros((), dtype),  # A constant: JAX differentiates no window of a traced start.
        jax.lax.add,
        (1, 1, 1, size),
        (1, 1, 1, 1),
        ((0, 0), (0, 0), (0, 0), (size // 2, (size - 1) // 2)),
    )
    return image * ((offset + alpha * squares) ** -beta).astype(image.dtype)


class AlexNet2012(nn.Module):
    """AlexNet of 2012, sections 3.5 and 4.2: 60,965,224 parameters at 227x227x3.

    Convolutions 2, 4 and 5 see only their own half of the channels (the paper's two GPUs; groups
    here). Response normalization follows convolutions 1 and 2, before the pool. The paper says 224
    pixels; its sizes need 227 (55x55 after convolution 1). Kernels start from a Gaussian of
    deviation 0.01, biases of convolutions 2, 4 and 5 and of the dense layers from 1 (section 5).

    Attributes:
      num_classes: the logits; None returns the 4,096 features before them.
      dropout_rate: of the output of each of the first two dense layers; random stream `dropout`.
      dtype: of the computation; None: that of image and parameters.

    Call: `image [batch, height, width, channels]`, at least 67x67 -> `[batch, num_classes]`.
    """

    num_classes: int | None = 1000
    dropout_rate: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "AlexNet2012", minimum=67)
        kernel_init = nn.initializers.normal(0.01)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        # features, kernel, stride, padding on each side, groups, first bias
        table = (
            (96, 11, 4, 0, 1, zeros),
            (256, 5, 1, 2, 2, ones),
            (384, 3, 1, 1, 1, zeros),
            (384, 3, 1, 1, 2, ones),
            (256, 3, 1, 1, 2, ones),
        )
        x = image
        for index, (width, kernel, stride, padding, groups, bias_init) in enumerate(table, 1):
            x = ops.Conv(
                width,
                (kernel, kernel),
                strides=(stride, stride),
                padding=[(padding, padding)] * 2,
                feature_group_count=groups,
                kernel_init=kernel_init,
                bias_init=bias_init,
                dtype=self.dtype,
                name=f"conv{index}",
            )(x)
            x = nn.relu(x)
            if index in (1, 2):
                x = local_response_norm(x)
            if index in (1, 2, 5):
                x = ops.max_pool(x, (3, 3), (2, 2))
            x = stage_output(self, f"stage{index}", x)
        x = x.reshape(x.shape[0], -1)
        layer = {"kernel_init": kernel_init, "dtype": self.dtype}
        for index in (1, 2):
            x = nn.relu(nn.Dense(4096, bias_init=ones, name=f"dense{index}", **layer)(x))
            x = nn.Dropout(self.dropout_rate)(x, deterministic=not train)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, name="head", **layer)(x)


# parameters, running statistics, multiply-accumulates
ROWS = {
    "alexnet": row(AlexNet, 61_100_840, 0, 714_188_480, source=TORCHVISION),
    "alexnet_2012": row(
        AlexNet2012,
        60_965_224,
        0,
        724_406_816,
        source='counted; "60 million parameters" in section 3.5',
        image=(227, 227, 3),
    ),
}
