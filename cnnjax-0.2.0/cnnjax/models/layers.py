"""What all layers of a network share, as one value, and the layers that it makes."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from flax import linen as nn

from cnnjax import ops
from cnnjax.errors import unknown_name
from cnnjax.models.norms import norm_layer

Array = jax.Array
Factory = Callable[..., Any]
Activation = Callable[[Array], Array]

# He et al. 2015 (arXiv 1502.01852), section 2.2, in the fan-out form that torchvision uses.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit, `x` times the normal distribution function of `x`, exactly.

    Hendrycks & Gimpel 2016 (arXiv 1606.08415), section 2. By `erf`, as PyTorch computes it; that of
    Flax is by `erfc`, whose relative error is smaller where the result is near zero, and takes
    twice the time on a CPU.
    """
    return x * (0.5 * (1 + jax.lax.erf(x * x.dtype.type(math.sqrt(0.5)))))


ACTIVATIONS: dict[str, Activation] = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "leaky_relu": nn.leaky_relu,
    "elu": nn.elu,
    "gelu": gelu,
    "silu": nn.silu,
    "hard_swish": nn.hard_swish,
    "tanh": nn.tanh,
    "sigmoid": nn.sigmoid,
}
PADDINGS = ("symmetric", "same")


@dataclasses.dataclass(frozen=True)
class Layers:
    """Hyperparameters that all layers of a network share: its field `layers`.

    Attributes:
      norm: `"batch"`, `"batch_unbiased"`, `"group"`, `"layer"` or `"none"`: see `norm_layer`.
      activation: a name of `ACTIVATIONS` or a function.
      norm_epsilon, norm_momentum: of the normalization; momentum as in Flax, 1 minus PyTorch's.
      norm_group_size: examples that share statistics of batch norm; 0 for the whole batch.
      axis_name: mapped axis for the statistics of batch norm; None outside `pmap`.
      dtype: of the computation; None is that of image and parameters, which are float32.
      remat: whether activations within a block are recomputed in the backward pass instead of kept;
        None in a network without blocks, which then has no such argument.
    """

    norm: str = "batch"
    activation: str | Activation = "relu"
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    norm_group_size: int = 0
    axis_name: str | None = None
    dtype: Any = None
    remat: bool | None = False

    def factories(
        self,
        *,
        train: bool,
        kernel_init: Any = he_normal_fan_out,
        padding: str = "symmetric",
        conv_bias: bool = False,
        norm_scale: bool = True,
    ) -> Factories:
        """Returns what makes the layers of one pass through the network.

        Args:
          train: batch norm takes the batch's statistics, dropout acts, `remat` recomputes.
          kernel_init, padding: of convolutions, see `conv_layer`.
          conv_bias: whether convolutions have a bias also where a normalization follows.
          norm_scale: whether normalizations have scales.

        Raises:
          UserError: an unknown norm or activation.
        """
        return Factories(
            conv=functools.partial(
                conv_layer,
                dtype=self.dtype,
                use_bias=conv_bias or self.norm == "none",
                padding=padding,
                kernel_init=kernel_init,
            ),
            norm=norm_layer(
                self.norm,
                train=train,
                dtype=self.dtype,
                axis_name=self.axis_name,
                group_size=self.norm_group_size,
                epsilon=self.norm_epsilon,
                momentum=self.norm_momentum,
                use_scale=norm_scale,
            ),
            activation=activation_function(self.activation),
            train=train,
            dtype=self.dtype,
            remat=bool(self.remat) and train,
        )


@dataclasses.dataclass(frozen=True)
class Factories:
    """Makes the layers of one pass; a network hands it to its blocks as their field `layers`.

        layers.conv(features, kernel_size, strides, groups=..., name=...)(x)
        layers.norm(name=..., scale_init=...)(x)
        layers.activation(x)

    So no block knows which normalization, activation, dtype or device axis it runs with.
    """

    conv: Factory
    norm: Factory
    activation: Activation
    train: bool
    dtype: Any = None
    remat: bool = False


def conv_layer(
    features: int,
    kernel_size: int | tuple[int, int],
    strides: int = 1,
    *,
    groups: int = 1,
    use_bias: bool = False,
    padding: str = "symmetric",
    valid: bool = False,
    dilation: int = 1,
    layer: type[nn.Conv] = ops.Conv,
    dtype: Any = None,
    kernel_init: Any = he_normal_fan_out,
    name: str,
) -> nn.Module:
    """Convolution of a `kernel_size` (square, or height and width), named `name`.

    `padding="symmetric"`, PyTorch's convention, pads by `kernel_size // 2` on every side at every
    stride. `"same"`, TensorFlow's and Keras's, pads no more than it must: at stride 2 one pixel
    less at the top and left of images with even sides. Weights of the one compute other numbers
    with the other. `valid` leaves the padding out. `dilation` is the distance between neighboring
    taps of the kernel, `layer` the class.

    Raises:
      UserError: `padding` is neither.
    """
    check_name("padding", padding, PADDINGS)
    size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    margins: Any = [(side // 2 * dilation, side // 2 * dilation) for side in size]
    if valid:
        margins = "VALID"
    elif padding == "same" and strides > 1:
        margins = "SAME"
    return layer(
        features,
        size,
        strides=(strides, strides),
        padding=margins,
        kernel_dilation=(dilation, dilation),
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


def kernel_initializer(activation: str | Activation) -> Callable[..., Array]:
    """Returns the initializer that keeps the variance of the signal through `activation`.

    Truncated normal of variance 1/fan_in (LeCun et al. 1998, "Efficient BackProp", section 4.6)
    for tanh and sigmoid, which are close to linear at the start, and 2/fan_in (He et al. 2015,
    equation 10) for the rectifiers, which halve the second moment.
    """
    if activation in ("tanh", "sigmoid", nn.tanh, nn.sigmoid):
        return nn.initializers.lecun_normal()
    return nn.initializers.he_normal()


def activation_function(activation: str | Activation) -> Activation:
    """Returns the function of that name; a function is returned as it is."""
    if callable(activation):
        return activation
    check_name("activation", activation, ACTIVATIONS)
    return ACTIVATIONS[activation]


def check_name(kind: str, name: str, valid: Iterable[str]) -> None:
    """Raises UserError unless `name` is among the `valid` ones."""
    if name not in valid:
        raise unknown_name(kind, name, valid)
