"""Generation: images like those of a dataset, judged by the Fréchet distance of their features.

A batch holds real images; each stands beside a sample made from noise of its own, which is the same
at every evaluation: a function of a key and of the example's place in the split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import metrics as metrics_lib
from cnnjax import plots
from cnnjax.data.fields import Image
from cnnjax.models.dcgan import Noise, uniform_noise
from cnnjax.rng import example_keys, stream_key
from cnnjax.tasks.task import Batch, Forward, Metrics, Report, Task, example_weights

PyTree = Any
# Of a sheet of samples.
ROWS = COLUMNS = 8


def make_generation(
    *,
    latent_size: int,
    normalize: Callable[[jax.Array], jax.Array],
    features: Callable[[jax.Array], jax.Array],
    distance: Callable[[np.ndarray, np.ndarray], float],
    key: jax.Array,
    noise: Noise = uniform_noise,
) -> Task:
    """Returns the task of a `cnnjax.models.dcgan.GAN`.

    It is trained by a step of its own, `cnnjax.train.gan.make_gan_step`; what is here is evaluated:
    the losses and accuracies of both networks on images held out, and at the end the distance.

    Args:
      latent_size: length of the noise vectors.
      normalize: images as stored -> what the discriminator gets, in [-1, 1].
      features: `image [batch, height, width, channels]` in [0, 1] -> `[batch, features]`.
      distance: of two arrays `[examples, features]`, such as that of `cnnjax.evaluation.frechet`.
      key: typed scalar key of the evaluation's noise.
      noise: `(keys [batch], latent_size) -> [batch, latent_size]`.
    """

    def apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[Any, PyTree]:
        real = normalize(batch["image"])
        z = noise(example_keys(stream_key(key, "noise", 0), batch["example"]), latent_size)
        inputs = {"image": real, "noise": z.astype(real.dtype)}
        outputs, batch_stats = forward(inputs, train=train)
        sample = as_pixels(outputs["sample"])
        keys = example_keys(stream_key(key, "noise image", 0), batch["example"])
        random = jax.vmap(lambda key: jax.random.uniform(key, sample.shape[1:], sample.dtype))(keys)
        images = {"real": as_pixels(real), "sample": sample, "noise": random}
        return {
            **outputs,
            "features": {name: features(image) for name, image in images.items()},
        }, batch_stats

    return Task(
        inputs={"image": Image()},
        apply=apply,
        loss=_loss,
        metrics=_metrics,
        predict=lambda outputs: {
            "sample": jnp.round(255 * as_pixels(outputs["sample"])).astype(jnp.uint8),
            "features": outputs["features"],
        },
        report=functools.partial(_report, distance),
        monitor=("loss", "min"),
        needs_whole_batch=True,
    )


def as_pixels(sample: jax.Array) -> jax.Array:
    """Maps the range of tanh to [0, 1]."""
    return (sample + 1.0) / 2.0


def save_sheet(samples: Any, path: Path) -> Path:
    """Draws the first samples `[examples, height, width, channels]`, uint8 or in [0, 1]."""
    return plots.image_sheet(np.asarray(samples)[: ROWS * COLUMNS], path, columns=COLUMNS)


def _loss(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The discriminator's: `-log D(x) - log(1 - D(G(z)))`."""
    values = jax.nn.softplus(-outputs["real"]) + jax.nn.softplus(outputs["fake"])
    return values, example_weights(batch, values)


def _metrics(outputs: Any, batch: Batch) -> Metrics:
    mask = batch["mask"]
    values, _ = _loss(outputs, batch)
    generator_loss = jax.nn.softplus(-outputs["fake"])
    return {
        "loss": metrics_lib.mean(values + generator_loss, mask),
        "discriminator_loss": metrics_lib.mean(values, mask),
        "generator_loss": metrics_lib.mean(generator_loss, mask),
        "real_accuracy": metrics_lib.mean(outputs["real"] > 0, mask),
        "fake_accuracy": metrics_lib.mean(outputs["fake"] < 0, mask),
    }


def _report(
    distance: Callable[[np.ndarray, np.ndarray], float],
    predictions: Mapping[str, Any],
    examples: Mapping[str, Any],
) -> Report:
    features = predictions["features"]
    real = np.asarray(features["real"])
    scores = {
        "frechet_distance": distance(np.asarray(features["sample"]), real),
        "frechet_distance_of_halves": distance(real[::2], real[1::2]),
        "frechet_distance_of_noise": distance(np.asarray(features["noise"]), real),
    }
    count = len(real)
    rows = {
        f"{count:,} samples": scores["frechet_distance"],
        "two halves of the images": scores["frechet_distance_of_halves"],
        "noise": scores["frechet_distance_of_noise"],
    }
    width = max(map(len, rows))
    text = "\n".join(
        [
            f"Fréchet distance of features to those of {count:,} images",
            *(f"  {name:<{width}}  {value:10.3f}" for name, value in rows.items()),
        ]
    )
    return Report(
        scores=scores,
        text=text,
        figures={
            "samples": functools.partial(save_sheet, predictions["sample"]),
            "images": functools.partial(save_sheet, examples["image"]),
        },
    )
