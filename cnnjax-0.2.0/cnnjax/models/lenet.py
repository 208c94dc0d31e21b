"""LeNet-5: the usual form, and the network of 1998.

LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition",
Proceedings of the IEEE 86(11), 1998. Section numbers below are that paper's.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models.images import pool_function, require_image
from cnnjax.models.layers import Activation, activation_function, kernel_initializer
from cnnjax.models.rows import row
from cnnjax.models.stages import stage_output


class LeNet5(nn.Module):
    """LeNet-5 as it is taught today: max pooling, ReLU, every map of C3 sees every map of S2.

    28x28x1 -> conv 5x5 (6), 24x24 -> pool, 12x12 -> conv 5x5 (16), 8x8 -> pool, 4x4 -> dense 120
    -> dense 84 -> head. 44,426 parameters at 28x28x1 and 10 classes (61,706 at 32x32x1).

    Kernels start from `kernel_initializer(activation)`, biases from zero; the head starts from
    variance 1/fan_in, so that the first logits are of order one.

    Attributes:
      num_classes: the logits; None returns the 84 features before them.
      activation: a name from `layers.ACTIVATIONS` or a function; LeCun's was a scaled tanh.
      pool: `max` or `average`.
      dtype: of the computation; None: that of image and parameters.

    Call: `image [batch, height, width, channels]`, at least 16x16 -> `[batch, num_classes]`.
    """

    num_classes: int | None = 10
    activation: str | Activation = "relu"
    pool: str = "max"
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        pool_function(self.pool)
        require_image(image, "LeNet5", minimum=16)
        activation = activation_function(self.activation)
        layer = {"kernel_init": kernel_initializer(self.activation), "dtype": self.dtype}
        x = image
        for index, width in enumerate((6, 16), start=1):
            x = ops.ConvPool(
                width,
                (5, 5),
                padding="VALID",
                activation=activation,
                pool=self.pool,
                name=f"conv{index}",
                **layer,
            )(x)
            x = stage_output(self, f"stage{index}", x)
        x = x.reshape(x.shape[0], -1)
        for index, width in enumerate((120, 84), start=1):
            x = activation(nn.Dense(width, name=f"dense{index}", **layer)(x))
            x = stage_output(self, f"stage{index + 2}", x)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, name="head", dtype=self.dtype)(x)


# Table I: for each of the sixteen maps of C3, the maps of S2 it is connected to.
C3_CONNECTIONS: tuple[tuple[int, ...], ...] = (
    (0, 1, 2),
    (1, 2, 3),
    (2, 3, 4),
    (3, 4, 5),
    (0, 4, 5),
    (0, 1, 5),
    (0, 1, 2, 3),
    (1, 2, 3, 4),
    (2, 3, 4, 5),
    (0, 3, 4, 5),
    (0, 1, 4, 5),
    (0, 1, 2, 5),
    (0, 1, 3, 4),
    (1, 2, 4, 5),
    (0, 2, 3, 5),
    (0, 1, 2, 3, 4, 5),
)

# The digits on a grid 7 wide and 12 high, drawn after Fig. 3: the target codes of section II.B.
DIGIT_BITMAPS = """
..###.. ...##.. .#####. #####.. .....#. ####### ..####. ####### .#####. .#####.
.#...#. ..###.. #.....# .....#. ....##. #...... .#..... ......# #.....# #.....#
#.....# .#.##.. ......# ......# ...#.#. #...... #...... ......# #.....# #.....#
#.....# ...##.. ......# ......# ..#..#. #...... #...... .....#. #.....# #.....#
#.....# ...##.. .....#. .....#. ..#..#. #####.. #.###.. .....#. .#...#. #.....#
#.....# ...##.. ....#.. ..###.. .#...#. .....#. ##...#. ....#.. ..###.. .#...##
#.....# ...##.. ...#... .....#. #....#. ......# #.....# ....#.. .#...#. ..###.#
#.....# ...##.. ..#.... ......# ####### ......# #.....# ...#... #.....# ......#
#.....# ...##.. .#..... ......# .....#. ......# #.....# ...#... #.....# ......#
#.....# ...##.. #...... ......# .....#. ......# #.....# ..#.... #.....# ......#
.#...#. ...##.. #...... .....#. .....#. .....#. .#...#. ..#.... #.....# .....#.
..###.. .#####. ####### #####.. .....#. #####.. ..###.. ..#.... .#####. .####..
"""


def digit_codes() -> np.ndarray:
    """Returns `DIGIT_BITMAPS` as float32 `[10, 84]`: +1 for ink, -1 for paper, row by row."""
    rows = [line.split() for line in DIGIT_BITMAPS.strip().splitlines()]
    ink = np.array([[[cell == "#" for cell in digit] for digit in row] for row in rows])
    return np.where(ink.transpose(1, 0, 2).reshape(10, 84), 1.0, -1.0).astype(np.float32)


def scaled_tanh(x: jax.Array) -> jax.Array:
    """The squashing function `A tanh(S a)`, A = 1.7159, S = 2/3 (equation 6 and appendix A).

    It maps +-1 to +-1, where its second derivative is largest, so units coded as +-1 are not
    driven into saturation.
    """
    return 1.7159 * jnp.tanh(x * (2.0 / 3.0))


def uniform_by_fan_in(fan_in: int | np.ndarray) -> Any:
    """The initializer of appendix A: uniform in +-2.4/F, F the number of a unit's inputs."""

    def initialize(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * jnp.asarray(2.4 / fan_in, dtype)

    return initialize


class Subsample(nn.Module):
    """S2 and S4 (section II.B): the sum over each 2x2 field times a coefficient plus a bias, a map.

    `[batch, height, width, channels] -> [batch, height // 2, width // 2, channels]`, no squashing.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        channels = image.shape[-1]
        coefficient = self.param("coefficient", uniform_by_fan_in(4), (channels,))
        bias = self.param("bias", uniform_by_fan_in(4), (channels,))
        image, coefficient, bias = nn.dtypes.promote_dtype(
            image, coefficient, bias, dtype=self.dtype
        )
        return 4.0 * ops.avg_pool(image, (2, 2), (2, 2)) * coefficient + bias


class ConnectedConv(nn.Module):
    """C3 (section II.B): a 5x5 convolution in which each map sees only its row of Table I.

    `kernel` is `[5, 5, 60]`, one 5x5 filter a connection in the order of `C3_CONNECTIONS`; `bias`
    is `[16]`. Padding is VALID.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        source = np.array([i for maps in C3_CONNECTIONS for i in maps])
        target = np.array([j for j, maps in enumerate(C3_CONNECTIONS) for _ in maps])
        fan_in = 25 * np.array([len(maps) for maps in C3_CONNECTIONS])
        kernel = self.param("kernel", uniform_by_fan_in(fan_in[target]), (5, 5, len(source)))
        bias = self.param("bias", uniform_by_fan_in(fan_in), (len(C3_CONNECTIONS),))
        image, kernel, bias = nn.dtypes.promote_dtype(image, kernel, bias, dtype=self.dtype)
        full = jnp.zeros((5, 5, 6, len(C3_CONNECTIONS)), kernel.dtype)
        full = full.at[:, :, source, target].set(kernel)
        return ops.conv2d(image, full, padding="VALID", bias=bias)


class CodeDistance(nn.Module):
    """The output layer (equation 7): minus the squared distance of the 84 features to each code.

    The codes are fixed, as in the paper's first training; there are no parameters.
    """

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        # Distances of hundreds need more than the 8 or 11 bits of a 16-bit number.
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        codes = jnp.asarray(digit_codes(), features.dtype)
        return -jnp.sum((features[:, None, :] - codes) ** 2, axis=-1)


class LeNet5_1998(nn.Module):
    """LeNet-5 of 1998, section II.B: 32x32 input, 60,000 trainable parameters.

    C1 156, S2 12, C3 1,516, S4 32, C5 48,120, F6 10,164. The output layer compares F6 with a drawn
    bitmap of each digit; its logits are minus equation 7's penalties, so that softmax
    cross-entropy is the discriminative criterion of equation 9 without its constant rubbish class.
    The paper scales images so that paper is -0.1 and ink 1.175 (mean about 0, variance about 1).

    Attributes:
      num_classes: 10, or None for the 84 features of F6.
      dtype: of the computation; None: that of image and parameters.

    Call: `image [batch, 32, 32, channels]` -> `[batch, 10]`.
    """

    num_classes: int | None = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "LeNet5_1998", exact=(32, 32))
        if self.num_classes not in (None, 10):
            raise UserError(
                f"LeNet5_1998 has one drawn code for each of ten digits: num_classes must be 10 or "
                f"None, got {self.num_classes}. LeNet5 takes any number."
            )
        x = scaled_tanh(self._conv(6, image, "c1"))
        x = scaled_tanh(Subsample(dtype=self.dtype, name="s2")(x))
        x = stage_output(self, "stage1", x)
        x = scaled_tanh(ConnectedConv(dtype=self.dtype, name="c3")(x))
        x = scaled_tanh(Subsample(dtype=self.dtype, name="s4")(x))
        x = stage_output(self, "stage2", x)
        x = scaled_tanh(self._conv(120, x, "c5"))
        x = x.reshape(x.shape[0], 120)
        x = stage_output(self, "stage3", x)
        init = uniform_by_fan_in(120)
        x = nn.Dense(84, kernel_init=init, bias_init=init, dtype=self.dtype, name="f6")(x)
        x = scaled_tanh(x)
        x = stage_output(self, "stage4", x)
        return x if self.num_classes is None else CodeDistance(name="head")(x)

    def _conv(self, width: int, image: jax.Array, name: str) -> jax.Array:
        init = uniform_by_fan_in(25 * image.shape[-1])
        return ops.Conv(
            width,
            (5, 5),
            padding="VALID",
            kernel_init=init,
            bias_init=init,
            dtype=self.dtype,
            name=name,
        )(image)


lenet = functools.partial(
    row, source="by hand, layer by layer, tests/models/test_lenet.py", num_classes=10
)

# parameters, running statistics, multiply-accumulates, and the image
ROWS = {
    "lenet5": lenet(LeNet5, 44_426, 0, 281_640, image=(28, 28, 1)),
    "lenet5_1998": lenet(LeNet5_1998, 60_000, 0, 325_680, image=(32, 32, 1)),
}
