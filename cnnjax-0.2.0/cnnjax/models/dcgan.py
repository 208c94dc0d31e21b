"""DCGAN: a generator of small images and a discriminator, both convolutional.

Radford, Metz and Chintala 2016, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks" (arXiv 1511.06434). Its section 3: strided convolutions in place of
pooling, batch norm everywhere but in the generator's output and the discriminator's input, no
hidden dense layers, ReLU and tanh in the generator, LeakyReLU in the discriminator. Its section 4:
slope 0.2, all weights from a normal distribution of standard deviation 0.02.

The paper enlarges 4x4x1024 to 64x64x3 in four stages; images of 28x28 take two, from 7x7. Kernels
are 4x4 where Fig. 1 has 5x5, as in the authors' later PyTorch code: a multiple of the stride, so
that each pixel gets as many taps (Odena et al. 2016, "Deconvolution and Checkerboard Artifacts").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.models.fields import with_fields
from cnnjax.models.images import require_image
from cnnjax.models.layers import Layers
from cnnjax.models.stages import stage_output

KERNEL_SIZE = (4, 4)
# Section 4; the scales of batch norm start around 1 in the authors' code.
normal_kernel = nn.initializers.normal(0.02)
leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.2)
# `(keys [batch], latent_size) -> [batch, latent_size]`, a key for each example.
Noise = Callable[[jax.Array, int], jax.Array]


def normal_scale(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Draws the scales of batch norm: mean 1, standard deviation 0.02."""
    return 1.0 + normal_kernel(key, shape, dtype)


def uniform_noise(keys: jax.Array, latent_size: int) -> jax.Array:
    """Draws float32 `[batch, latent_size]` uniform in [-1, 1), the paper's Z (Fig. 1)."""
    return jax.vmap(lambda key: jax.random.uniform(key, (latent_size,), jnp.float32, -1.0))(keys)


def normal_noise(keys: jax.Array, latent_size: int) -> jax.Array:
    """Draws float32 `[batch, latent_size]` from the standard normal distribution."""
    return jax.vmap(lambda key: jax.random.normal(key, (latent_size,), jnp.float32))(keys)


class Generator(nn.Module):
    """Noise -> dense -> `[height / 4, width / 4, widths[0]]` -> ... -> image, for two widths.

    Attributes:
      image_shape: (height, width, channels) of the images; sides are multiples of 2 to the power
        of the number of widths.
      latent_size: length of the noise vectors.
      widths: channels before each doubling of height and width.
      layers: what all layers share; see `Layers`.

    Call: `noise [batch, latent_size]` -> `[batch, height, width, channels]` in (-1, 1).
    """

    image_shape: tuple[int, int, int] = (28, 28, 1)
    latent_size: int = 100
    widths: Sequence[int] = (128, 64)
    layers: Layers = Layers(remat=None)

    @nn.compact
    def __call__(self, noise: jax.Array, *, train: bool = False) -> jax.Array:
        if noise.ndim != 2 or noise.shape[1] != self.latent_size:
            raise UserError(
                f"the generator takes noise [batch, {self.latent_size}], got {list(noise.shape)}."
            )
        layers = self.layers.factories(train=train)
        height, width = _smallest_size(self.image_shape, len(self.widths))
        layer: dict[str, Any] = {"kernel_init": normal_kernel, "dtype": layers.dtype}
        x = nn.Dense(height * width * self.widths[0], use_bias=False, name="project", **layer)(
            noise
        )
        x = x.reshape(-1, height, width, self.widths[0])
        x = layers.activation(layers.norm(name="project_norm", scale_init=normal_scale)(x))
        x = stage_output(self, "stage1", x)
        use_bias = self.layers.norm == "none"
        for index, features in enumerate(self.widths[1:], start=1):
            x = ops.ConvTranspose(
                features, KERNEL_SIZE, use_bias=use_bias, name=f"up{index}", **layer
            )(x)
            x = layers.activation(layers.norm(name=f"up{index}_norm", scale_init=normal_scale)(x))
            x = stage_output(self, f"stage{index + 1}", x)
        x = ops.ConvTranspose(self.image_shape[2], KERNEL_SIZE, name="output", **layer)(x)
        return jnp.tanh(x)


class Discriminator(nn.Module):
    """Convolutions of stride 2, each twice as wide, and one logit: is the image a real one?

    Attributes:
      num_classes: the logits; None returns the features before them.
      widths: channels of each convolution.
      layers: what all layers share; the first convolution has no normalization.

    Call: `image [batch, height, width, channels]` -> `[batch, num_classes]`.
    """

    num_classes: int | None = 1
    widths: Sequence[int] = (64, 128)
    layers: Layers = Layers(activation=leaky_relu, remat=None)

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        require_image(image, "Discriminator", minimum=2 ** len(self.widths))
        layers = self.layers.factories(train=train)
        layer: dict[str, Any] = {"kernel_init": normal_kernel, "dtype": layers.dtype}
        x = image
        for index, features in enumerate(self.widths, start=1):
            is_normed = index > 1 and self.layers.norm != "none"
            x = ops.Conv(
                features,
                KERNEL_SIZE,
                strides=(2, 2),
                use_bias=not is_normed,
                name=f"conv{index}",
                **layer,
            )(x)
            if is_normed:
                x = layers.norm(name=f"conv{index}_norm", scale_init=normal_scale)(x)
            x = layers.activation(x)
            x = stage_output(self, f"stage{index}", x)
        x = x.reshape(x.shape[0], -1)
        if self.num_classes is None:
            return x
        return nn.Dense(self.num_classes, name="head", **layer)(x)


class GAN(nn.Module):
    """A generator and a discriminator as one module: for initialization and evaluation.

    The parameters are those of the two under `generator` and `discriminator`, as
    `cnnjax.train.gan.make_gan_step` trains them.

    Call: a dict of `image [batch, height, width, channels]` in [-1, 1] and `noise [batch,
    latent_size]`, or images alone, with noise of zeros -> a dict of `sample [batch, height, width,
    channels]`, and the logits `[batch]` of the images (`real`) and of the samples (`fake`).
    """

    generator: nn.Module
    discriminator: nn.Module

    def __call__(
        self, inputs: Mapping[str, jax.Array] | jax.Array, *, train: bool = False
    ) -> dict[str, jax.Array]:
        if isinstance(inputs, Mapping):
            image, noise = inputs["image"], inputs["noise"]
        else:
            image = inputs
            noise = jnp.zeros((image.shape[0], self.generator.latent_size), image.dtype)
        sample = self.generator(noise, train=train)
        real = self.discriminator(image, train=train)
        fake = self.discriminator(sample, train=train)
        return {"sample": sample, "real": real[:, 0], "fake": fake[:, 0]}


def dcgan(
    image_shape: tuple[int, int, int] = (28, 28, 1),
    *,
    width: int = 64,
    num_stages: int = 2,
    latent_size: int = 100,
    **options: Any,
) -> GAN:
    """Returns a generator and its mirror image, the discriminator.

    Args:
      image_shape: (height, width, channels).
      width: channels at half the size of the image; each further halving doubles them.
      num_stages: the number of halvings.
      latent_size: length of the noise vectors.
      **options: fields of both, such as `norm` and `dtype`; see `Layers`.

    Raises:
      UserError: the image's sides do not halve so often, or there is no such field.
    """
    _smallest_size(image_shape, num_stages)
    widths = tuple(width * 2**stage for stage in range(num_stages))
    generator = Generator(image_shape, latent_size, widths[::-1])
    discriminator = Discriminator(widths=widths)
    return GAN(with_fields(generator, **options), with_fields(discriminator, **options))


def _smallest_size(image_shape: tuple[int, int, int], num_stages: int) -> tuple[int, int]:
    factor = 2**num_stages
    height, width, _ = image_shape
    if height % factor or width % factor:
        raise UserError(
            f"images of {height}x{width} pixels do not halve {num_stages} times: pad them to a "
            f"multiple of {factor}, such as {math.ceil(height / factor) * factor}x"
            f"{math.ceil(width / factor) * factor}."
        )
    return height // factor, width // factor
