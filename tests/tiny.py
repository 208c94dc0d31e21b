"""A network and data small enough to train within a test."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from cnnjax.data.dataset import Arrays, Dataset
from cnnjax.models.norms import norm_layer
from cnnjax.ops import Conv
from cnnjax.tasks.classification import classification
from cnnjax.train import step
from cnnjax.train.state import create_state


class BatchNormNet(nn.Module):
    """Two convolutions, each with BatchNorm, and a head."""

    num_classes: int = 10
    axis_name: str | None = None
    norm_group_size: int = 0

    @nn.compact
    def __call__(self, image, *, train):
        x = image
        for name, width, strides in (("conv1", 4, 2), ("conv2", 8, 2)):
            x = Conv(width, (3, 3), (strides, strides), use_bias=False, name=name)(x)
            x = norm_layer(
                "batch", train=train, axis_name=self.axis_name, group_size=self.norm_group_size
            )(name=f"{name}_norm")(x)
            x = nn.relu(x)
        return nn.Dense(self.num_classes, name="head")(x.mean((1, 2)))


def random_arrays(num_examples, shape=(28, 28, 1), num_classes=10, seed=0):
    """Images of noise around a pattern for each class, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    patterns = generator.integers(0, 256, (num_classes, *shape))
    label = generator.integers(0, num_classes, num_examples)
    noise = generator.integers(0, 256, (num_examples, *shape))
    image = (patterns[label] + noise) // 2
    return Arrays(image.astype(np.uint8), label.astype(np.int32))


def setup(model, *, dtype=jnp.float32, learning_rate=0.05, optimizer=None, **step_options):
    """Returns (state, make_step) for a model under SGD with momentum, in `dtype` throughout."""
    optimizer = optimizer or optax.sgd(learning_rate, momentum=0.9)
    image = jnp.zeros((1, 28, 28, 1), jnp.float32)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), image)
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    state = create_state(variables, optimizer, jax.random.key(1), ema="ema_decay" in step_options)

    def normalize(image):
        # In `dtype` from the start; images that were augmented are in [0, 1] already.
        return image.astype(dtype) / (255 if image.dtype == jnp.uint8 else 1)

    def make_step(axis_name=None):
        return step.make_step(
            model,
            optimizer,
            classification(10),
            schedule=optax.constant_schedule(learning_rate),
            normalize=normalize,
            axis_name=axis_name,
            **step_options,
        )

    return state, make_step


def batch_of(arrays, start, size):
    """Returns rows `start : start + size` as a batch without padding."""
    rows = slice(start, start + size)
    return {
        "image": jnp.asarray(arrays.image[rows]),
        "label": jnp.asarray(arrays.label[rows]),
        "mask": jnp.ones(size, bool),
    }


def made_dataset(num_training=256, shape=(28, 28, 1), mean=0.5):
    """Returns made images for training, and 64 each for validation and test."""
    train, validation, test = (random_arrays(size, shape) for size in (num_training, 64, 64))
    names = tuple(map(str, range(10)))
    return Dataset("made", names, train, validation, test, mean=(mean,), std=(0.3,))


def use_made_data(monkeypatch):
    """Has runs train on 256 made images, whatever dataset they name, and draw no figures."""
    dataset = made_dataset()
    monkeypatch.setattr("cnnjax.data.load", lambda *a, **k: dataset, raising=False)
    monkeypatch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])
