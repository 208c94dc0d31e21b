"""Generation: images like those of a dataset, judged by the Fréchet distance of their features.

Beside each real image of an evaluation stands a sample, made from noise that belongs to the image's
place in its split: every evaluation, on any number of devices, sees the same noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import metrics as metrics_lib
from cnnjax import plots
from cnnjax.data.dataset import ArrayDataset, Dataset, Split, columns, num_examples
from cnnjax.data.fields import Field, Image, wrong
from cnnjax.models.dcgan import Noise, uniform_noise
from cnnjax.rng import draw, example_keys, stream_key
from cnnjax.tasks.frechet import frechet_distance, from_products, moments, products
from cnnjax.tasks.task import Batch, Forward, Metrics, Report, Task, example_weights

PyTree = Any
# Of a sheet of samples.
ROWS = COLUMNS = 8


@dataclasses.dataclass(frozen=True)
class Place(Field):
    """The place of an example in its split: int32 `[examples]`."""

    is_input: ClassVar[bool] = True

    def check(self, name: str, array: np.ndarray) -> None:
        if array.dtype != np.int32 or array.ndim != 1:
            raise wrong(name, array, "int32 [n]")


FIELDS: dict[str, Field] = {"image": Image(), "place": Place()}


def with_places(dataset: Dataset) -> ArrayDataset:
    """Returns the images of a dataset, each with its place in its split."""

    def placed(split: Split) -> dict[str, np.ndarray]:
        places = np.arange(num_examples(split), dtype=np.int32)
        return {"image": columns(split)["image"], "place": places}

    splits = {name: placed(getattr(dataset, name)) for name in ("train", "validation", "test")}
    return ArrayDataset(dataset.name, FIELDS, **splits)


def generation(
    *,
    latent_size: int,
    features: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    noise: Noise = uniform_noise,
) -> Task:
    """Returns the task of a `cnnjax.models.dcgan.GAN`.

    It is trained by a step of its own, `cnnjax.train.gan.make_gan_step`. What is here is evaluated:
    losses and accuracies of both networks, and the Fréchet distances to the features of the images
    of as many samples (`frechet_distance`), of images of noise (`frechet_distance_of_noise`), and
    of each half of the images to the other (`frechet_distance_of_halves`). The halves are the
    examples at even and at odd places.

    Args:
      latent_size: length of the noise vectors.
      features: `image [batch, height, width, channels]` in [0, 1] -> `[batch, features]`.
      key: typed scalar key of the evaluation's noise.
      noise: `(keys [batch], latent_size) -> [batch, latent_size]`.
    """

    def apply(forward: Forward, batch: Batch, *, train: bool) -> tuple[Any, PyTree]:
        image = batch["image"]
        z, pixels = evaluation_noise(key, batch["place"], image.shape[1:], latent_size, noise)
        inputs = {"image": image, "noise": z.astype(image.dtype)}
        outputs, batch_stats = forward(inputs, train=train)
        shown = {"real": as_pixels(image), "sample": as_pixels(outputs["sample"]), "noise": pixels}
        return {**outputs, "features": jax.tree.map(features, shown)}, batch_stats

    return Task(
        inputs=FIELDS,
        apply=apply,
        loss=discriminator_loss,
        metrics=measure,
        predict=lambda outputs: {
            "sample": as_bytes(outputs["sample"]),
            "features": outputs["features"],
        },
        report=report,
        monitor=("frechet_distance", "min"),
        needs_whole_batch=True,
        name="generation",
        scores=lambda totals: distances(
            {name: from_products(totals[name]) for name in ("sample", "noise", "even", "odd")},
            from_products(totals["even"] + totals["odd"]),
        ),
    )


def evaluation_noise(
    key: jax.Array, places: jax.Array, image_shape: tuple[int, ...], latent_size: int, noise: Noise
) -> tuple[jax.Array, jax.Array]:
    """Returns noise vectors `[batch, latent_size]`, and images of noise in [0, 1]."""
    keys = example_keys(stream_key(key, "image of noise", 0), places)
    pixels = jax.vmap(lambda key: draw(jax.random.uniform, key, image_shape, jnp.float32))(keys)
    return noise(example_keys(stream_key(key, "noise", 0), places), latent_size), pixels


def as_pixels(image: jax.Array) -> jax.Array:
    """Maps [-1, 1], the range of tanh, to [0, 1]."""
    return (image + 1.0) / 2.0


def as_bytes(image: jax.Array) -> jax.Array:
    """Maps [-1, 1] to uint8."""
    return jnp.round(255.0 * as_pixels(image)).astype(jnp.uint8)


def discriminator_loss(outputs: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns `-log D(x) - log(1 - D(G(z)))`, and the weights."""
    values = jax.nn.softplus(-outputs["real"]) + jax.nn.softplus(outputs["fake"])
    return values, example_weights(batch, values)


def measure(outputs: Any, batch: Batch) -> Metrics:
    """Returns the pairs that `make_gan_step` returns too, and the products of the features."""
    mask = batch["mask"]
    values, _ = discriminator_loss(outputs, batch)
    generator_loss = jax.nn.softplus(-outputs["fake"])
    is_even = batch["place"] % 2 == 0
    features = outputs["features"]
    return {
        "loss": metrics_lib.mean(values + generator_loss, mask),
        "discriminator_loss": metrics_lib.mean(values, mask),
        "generator_loss": metrics_lib.mean(generator_loss, mask),
        "real_accuracy": metrics_lib.mean(outputs["real"] > 0, mask),
        "fake_accuracy": metrics_lib.mean(outputs["fake"] < 0, mask),
        "sample": products(features["sample"], mask),
        "noise": products(features["noise"], mask),
        "even": products(features["real"], mask & is_even),
        "odd": products(features["real"], mask & ~is_even),
    }


def distances(found: Mapping[str, Any], real: Any) -> dict[str, float]:
    """Returns the three distances, of the moments of each set of features."""
    return {
        "frechet_distance": frechet_distance(found["sample"], real),
        "frechet_distance_of_halves": frechet_distance(found["even"], found["odd"]),
        "frechet_distance_of_noise": frechet_distance(found["noise"], real),
    }


def report(predictions: Mapping[str, Any], examples: Mapping[str, Any]) -> Report:
    """Returns the distances, a table of them, and sheets of samples and of images.

    Args:
      predictions: `sample [examples, height, width, channels]` and `features` of each set.
      examples: `image` of the first of them.
    """
    real = predictions["features"]["real"]
    sets = {name: predictions["features"][name] for name in ("sample", "noise")}
    halves = {"even": real[::2], "odd": real[1::2]}
    found = {name: moments(each) for name, each in (sets | halves).items()}
    scores = distances(found, moments(real))
    lines = [
        f"{name:<26}{scores[score]:>10.3f}"
        for name, score in (
            ("one half of the images", "frechet_distance_of_halves"),
            (f"{len(real):,} samples", "frechet_distance"),
            (f"{len(real):,} images of noise", "frechet_distance_of_noise"),
        )
    ]
    return Report(
        scores=scores,
        text="\n".join([f"Fréchet distance to the features of {len(real):,} images", "", *lines]),
        figures={
            "samples": functools.partial(save_sheet, predictions["sample"]),
            "images": functools.partial(save_sheet, examples["image"]),
        },
    )


def save_sheet(images: Any, path: Path, heading: str = "") -> Path:
    """Draws the first of `images [images, height, width, channels]`, uint8 or in [0, 1]."""
    shown = np.asarray(images)[: ROWS * COLUMNS]
    return plots.image_sheet(shown, path, columns=COLUMNS, heading=heading)


def make_draw(
    generator: Any, *, key: jax.Array, noise: Noise = uniform_noise
) -> Callable[[Path, Any], None]:
    """Returns `(directory, state) -> None`, which draws the state's samples into `samples/`.

    They are the first samples of an evaluation with this key: at each step of the same noise.
    """

    @jax.jit
    def sample(variables: PyTree) -> jax.Array:
        keys = example_keys(stream_key(key, "noise", 0), jnp.arange(ROWS * COLUMNS))
        own = {name: tree["generator"] for name, tree in variables.items() if "generator" in tree}
        return as_bytes(generator.apply(own, noise(keys, generator.latent_size), train=False))

    def draw(directory: Path, state: Any) -> None:
        step = int(state.step)
        path = directory / "samples" / f"step-{step:06d}.png"
        variables = jax.device_get(state.variables())
        plots.attempt(
            lambda path: save_sheet(sample(variables), path, f"after {step:,} steps"), path
        )

    return draw
