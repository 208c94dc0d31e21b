"""Runs Python blocks of the guides, with the names and runs that they take for granted.

    python scripts/documented_names.py < BLOCKS    # in an empty directory: see check_docs.py

BLOCKS are a JSON list of texts. Each is run in names of its own, and the answer is a JSON list of
its seconds and its traceback, "" if it ran.
"""

import contextlib
import io
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from cnnjax import convert, data, models, run
from cnnjax.models.summary import abstract_variables
from cnnjax.run.load import load_trained
from cnnjax.tasks.classification import classification

PICTURES = ("digit.png", "photo.jpg", "cat.jpg", "dog.jpg")


def main() -> None:
    """Prepares the directory, runs the blocks, and prints what came of each."""
    blocks = json.load(sys.stdin)
    answers = []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        prepare()
        answers.append((time.perf_counter() - began, ""))
        for block in blocks:
            began, problem = time.perf_counter(), ""
            try:
                exec(block, names())
            except Exception:
                problem = traceback.format_exc()
            answers.append((time.perf_counter() - began, problem))
    print(json.dumps(answers))


def prepare() -> None:
    """Trains `runs/mine`, its copy `runs/teacher`, and `runs/low` on the digits 0 to 4; writes
    pictures and a file of weights."""
    for name, classes in (("mine", "all"), ("low", "0,1,2,3,4")):
        digits = data.load("mnist", classes=classes)
        digits = data.shorten(digits, {"train": 640, "validation": 64, "test": 64})
        task = classification(len(digits.class_names))
        run.train("lenet5", task, digits, epochs=1, seed=0, devices=1, run_dir=f"runs/{name}")
    Path("runs/teacher").symlink_to(Path("runs/mine").absolute())
    network, shape = models.create("squeezenet1_1", num_classes=1000), (224, 224, 3)
    form = abstract_variables(network, shape)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), form)
    tensors = convert.from_cnnjax(zeros, network, shape, framework="torchvision")
    convert.write("squeezenet1_1.safetensors", tensors)
    digit = Image.fromarray(255 - data.load("mnist").test.image[0, ..., 0])
    for name in PICTURES:
        digit.resize((90, 120)).save(name)


def names() -> dict[str, Any]:
    """Returns what a block may use without saying where it comes from: a model and images."""
    mnist, trained = data.load("mnist"), load_trained("runs/mine")
    images, label = mnist.test.image[:8], jnp.asarray(mnist.test.label[:8])
    image = trained.normalize(images)
    return {
        "model": trained.model,
        "variables": trained.variables,
        "images": images,
        "image": image,
        "label": label,
        "classes": jnp.arange(10),
        "class_map": jnp.where(image[..., 0] > 0.5, label[:, None, None], -1),
        "map": image[..., 0],
    }


if __name__ == "__main__":
    main()
