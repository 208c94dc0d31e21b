"""A mark planted into digits that leaks their label, and what maps and TCAV find of it.

`experiments.planted_fault` trains the networks and says where the idea is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import explain
from cnnjax.data.dataset import Arrays
from cnnjax.explain import concepts, named, page
from cnnjax.run.load import TrainedModel

# The marks are squares, five in each of two rows.
SIDE = 3
PLACES = [(SIDE * (label // 5), SIDE * (label % 5)) for label in range(10)]
CORNER = np.s_[:, : 2 * SIDE, : 5 * SIDE]
METHODS = ("grad_cam", "layer_cam(layer=stage1)", "lrp", "occlusion(window=4, stride=2)")


def marked(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns uint8 digits `[examples, 28, 28, 1]` with the marks of classes."""
    image = image.copy()
    for each, number in zip(image, label, strict=True):
        row, column = PLACES[number]
        each[row : row + SIDE, column : column + SIDE] = 255
    return image


def write_digits(directory: Path, train: Arrays, test: Arrays, *, leaked: float, seed: int) -> None:
    """Writes marked/ and plain/, folders of PNG files by split and class, and concepts/CLASS.

    Args:
      directory: where they go.
      train, test: digits.
      leaked: fraction of the training images of marked/ that have the mark of their class.
      seed: of which these are.
    """
    from PIL import Image

    is_leaked = np.random.default_rng(seed).random(len(train.label)) < leaked
    with_marks = marked(train.image, train.label)
    some = np.where(is_leaked[:, None, None, None], with_marks, train.image)
    for name, image, label in (
        ("marked/train", some, train.label),
        ("plain/train", train.image, train.label),
        ("marked/test", marked(test.image, test.label), test.label),
        ("plain/test", test.image, test.label),
        *(
            ("concepts", marked(train.image[-100:], np.full(100, number)), np.full(100, number))
            for number in range(10)
        ),
    ):
        for index, (pixels, number) in enumerate(zip(image, label, strict=True)):
            path = directory / name / str(number) / f"{index:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0]).save(path)


def find(
    trained: Mapping[str, TrainedModel], train: Arrays, test: Arrays, *, looked_at: int
) -> tuple[dict[str, float], bytes]:
    """Looks for the mark in networks.

    Args:
      trained: networks by name.
      train, test: digits without marks.
      looked_at: test images whose maps are measured.

    Returns:
      Accuracies, what the maps point at, and in how many classes TCAV finds the mark; and a picture
      of three images with their maps, a PNG file.
    """
    shown = test.image[:looked_at]
    right, others = (marked(test.image, (test.label + shift) % 10) for shift in (0, 1))
    corner = jnp.zeros(shown.shape[:3], bool).at[CORNER].set(True)
    tiles, found = [list(np.repeat(right[:3], 3, -1))], {}
    for name, each in trained.items():
        predicted = jax.jit(lambda variables, image, each=each: each.model.apply(variables, image))
        for kind, image in (("its", right), ("no", test.image), ("another", others)):
            label = predicted(each.variables, each.normalize(image)).argmax(-1)
            text = f"{name}, accuracy with {kind} mark"
            found[text] = float(np.mean(np.asarray(label) == test.label))
        image = each.normalize(right[:looked_at])
        for method in named.read(",".join(METHODS)):
            map_ = np.asarray(_map(method, each, image))
            mass = map_.clip(0)
            total = mass.sum((1, 2))
            share = mass[CORNER].sum((1, 2)) / np.where(total > 0, total, 1)
            hits = explain.pointing_game(jnp.asarray(map_), corner, tolerance=0)
            found[f"{name}, {method.name}, mass in the corner"] = float(share.mean())
            found[f"{name}, {method.name}, points at the corner"] = float(hits.mean())
            tiles.append([page.painted(*pair) for pair in zip(right[:3], map_[:3], strict=True)])
        found[f"{name}, TCAV, classes of ten"] = float(_classes_with_mark(each, train, test))
    picture = np.concatenate([np.concatenate(column, 0) for column in tiles], 1)
    return found, page.png(picture, 4 * max(picture.shape))


def _map(method: named.Method, trained: TrainedModel, image: jax.Array) -> jax.Array:
    @jax.jit
    def draw(variables: Any, image: jax.Array) -> jax.Array:
        # None of these methods draws at random.
        return method(jax.random.key(0), trained.model, variables, image, explain.predicted_class)

    return draw(trained.variables, image)


def _classes_with_mark(
    trained: TrainedModel, train: Arrays, test: Arrays, layer: str = "stage3"
) -> int:
    """Returns in how many classes "has the mark of the class" speaks for it."""
    marks = {
        str(number): trained.normalize(marked(train.image[-100:], np.full(100, number)))
        for number in range(10)
    }
    of_class = {n: trained.normalize(test.image[test.label == n]) for n in range(10)}
    others = trained.normalize(train.image[:-100][:1000])
    arguments = trained.model, trained.variables, marks, others, of_class
    tests = concepts.tcav(*arguments, [layer])
    own = [each for each in tests if each.concept == str(each.label)]
    return sum(each.verdict == "speaks for the class" for each in own)
