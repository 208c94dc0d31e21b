"""Classify your own image files with a trained run.

    cnnjax predict --run runs/mnist_lenet-20250101-120000 digit.png photo.jpg

A model of 28x28 gray images takes its input for a handwritten digit and prepares it as MNIST was
made: dark on light or light on dark is told by the border, the ink is cropped, scaled to 20x20 and
centered by its mass (see `cnnjax.data.digit_from_image`). Every other model gets the image resized.
The picture that is written shows what the network saw.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import load


@dataclasses.dataclass(frozen=True)
class Config:
    """Print the likeliest classes of image files, and draw what the network saw."""

    run: str
    """The run directory."""

    images: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="IMAGE ...")]]
    """Image files of any size, color or gray, dark on light or light on dark."""

    top: int = 3
    """Number of classes to print."""

    out: str = ""
    """Directory for the pictures; by default RUN/predictions."""


def main(config: Config) -> None:
    """Classifies each file."""
    import jax.numpy as jnp

    if not config.images:
        raise UserError("no image files given: name at least one, such as digit.png.")
    data, plots = cnnjax.data, cnnjax.plots
    originals = [data.read_image(path) for path in config.images]
    cnnjax.devices.backend.start(devices=1)
    trained = load.load_classifier(config.run)
    shape, class_names = tuple(trained.card["image_shape"]), trained.card["class_names"]
    digits = shape == (28, 28, 1)
    fit = trained.card.get("fit", "resize")
    # What was padded in training was small; a photograph of its own is stretched.
    fit = "resize" if fit == "pad" else fit
    inputs = [
        data.digit_from_image(original) if digits else data.image_to_shape(original, shape, fit=fit)
        for original in originals
    ]
    task = cnnjax.tasks.classification.classification(len(class_names))
    predict = cnnjax.train.evaluate.compile_predict(
        cnnjax.train.predict.make_predict(trained.model, task, normalize=trained.normalize),
        cnnjax.devices.sharding.make_mesh(1),
    )
    out = Path(config.out or Path(config.run) / "predictions")
    out.mkdir(parents=True, exist_ok=True)

    for path, original, image in zip(config.images, originals, inputs, strict=True):
        probabilities = np.asarray(
            predict(trained.variables, {"image": jnp.asarray(image[None])})[0]
        )
        likeliest = probabilities.argsort()[::-1][: config.top]
        answers = "  ".join(f"{class_names[i]} {probabilities[i]:.2%}" for i in likeliest)
        # The whole name, so that digit.png and digit.jpg get pictures of their own.
        picture = out / f"{path.name}.png"
        plots.prediction(original, image, probabilities, class_names, picture)
        print(f"{path}: {answers}  (see {picture})")
