"""Classify your own image files with a trained run.

    cnnjax predict --run runs/mnist_lenet-20250101-120000 digit.png photo.jpg

An image is brought to the network's size as the training images were. A model that was trained on
MNIST takes it for a photograph of a handwritten digit, and prepares it as MNIST was made: dark on
light or light on dark is told by the border, the ink is cropped, scaled to 20x20 and centered by
its mass (see `cnnjax.data.digit_from_image`). `--prepare` decides otherwise. What was done is said,
and the picture that is written shows what the network saw. Each file has one of its own, also where
files of several folders have the same name.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import files, load


@dataclasses.dataclass(frozen=True)
class Config:
    """Print the likeliest classes of image files, and draw what the network saw."""

    run: str
    """The run directory."""

    images: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="IMAGE ...")]]
    """Image files of any size, color or gray, dark on light or light on dark."""

    prepare: Literal["auto", "image", "digit"] = "auto"
    """image: as the training images were; digit: from a picture of a digit, as MNIST was made;
    auto: digit for what was trained on MNIST, image otherwise."""

    top: int = 3
    """Number of classes to print."""

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""

    out: str = ""
    """Directory for the pictures; by default RUN/predictions."""


def main(config: Config) -> None:
    """Classifies each file."""
    import jax.numpy as jnp

    if not config.images:
        raise UserError("no image files given: name at least one, such as digit.png.")
    if config.top < 1:
        raise UserError(f"--top {config.top}: give 1 class or more.")
    data, plots = cnnjax.data, cnnjax.plots
    originals = [data.read_image(path) for path in config.images]
    cnnjax.devices.backend.start(devices=1)
    trained = load.load_classifier(config.run, base=config.base or None)
    class_names = trained.card["class_names"]
    prepare, how = load.preparation(trained, config.prepare)
    inputs = [prepare(original) for original in originals]
    print(f"prepared     {how}")
    task = cnnjax.tasks.classification.classification(len(class_names))
    predict = cnnjax.train.evaluate.compile_predict(
        cnnjax.train.predict.make_predict(trained.model, task, normalize=trained.normalize),
        cnnjax.devices.sharding.make_mesh(1),
    )
    out = Path(config.out or Path(config.run) / "predictions")
    files.make_directory(out, "the directory of pictures", "--out")

    pictures = [out / name for name in picture_names(config.images)]
    for path, original, image, picture in zip(
        config.images, originals, inputs, pictures, strict=True
    ):
        probabilities = np.asarray(
            predict(trained.variables, {"image": jnp.asarray(image[None])})[0]
        )
        likeliest = probabilities.argsort()[::-1][: config.top]
        answers = "  ".join(f"{class_names[i]} {probabilities[i]:.2%}" for i in likeliest)
        drawn = plots.attempt(
            functools.partial(plots.prediction, original, image, probabilities, class_names),
            picture,
        )
        print(f"{path}: {answers}" + (f"  (see {picture})" if drawn else ""))


def picture_names(paths: Sequence[Path]) -> list[str]:
    """Returns the name of each file's picture: its own and .png, numbered where there are more.

    The whole name, so that digit.png and digit.jpg get pictures of their own. Names that differ in
    case alone are one on some file systems.
    """
    names: list[str] = []
    used: set[str] = set()
    for path in paths:
        number, name = 1, f"{path.name}.png"
        while name.casefold() in used:
            number += 1
            name = f"{path.name}-{number}.png"
        used.add(name.casefold())
        names.append(name)
    return names
