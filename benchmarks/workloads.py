"""What `peers.py` and `zoo.py` measure, with whom, on which data; imports no framework."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnnjax.errors import UserError

LEARNING_RATE = 0.01
MOMENTUM = 0.9
MODES = ("train", "infer")
PRECISIONS = ("float32", "tf32", "bf16")
# Enough different batches that no cache holds them all, few enough for any memory.
SYNTHETIC_BATCHES = 8

Images = np.ndarray
Labels = np.ndarray
# Number of steps -> the last loss (0.0 for inference), returned when the device has finished.
Run = Callable[[int], float]


class Workload(NamedTuple):
    """One network and the batches that it sees; `arguments` are those of `cnnjax.models.create`."""

    model: str
    arguments: dict[str, Any]
    image_shape: tuple[int, int, int]
    num_classes: int
    cpu_batch_size: int
    gpu_batch_size: int


WORKLOADS = {
    "lenet5": Workload("lenet5", {}, (28, 28, 1), 10, 64, 64),
    "cnn_32_64_dense64": Workload("cnn_32_64_dense64", {}, (28, 28, 1), 10, 64, 64),
    "resnet18": Workload("resnet18", {"stem": "cifar"}, (32, 32, 3), 10, 64, 64),
    "resnet18_batch128": Workload("resnet18", {"stem": "cifar"}, (32, 32, 3), 10, 128, 128),
    "resnet50": Workload("resnet50", {}, (224, 224, 3), 1000, 8, 128),
}


class Contender(NamedTuple):
    """One way to run the workloads: who runs it, the package it needs, its modes, what it is."""

    module: str
    package: str
    modes: tuple[str, ...]
    meaning: str


CONTENDERS = {
    "cnnjax": Contender("peer_jax", "jax", MODES, "cnnjax as its experiments run: an epoch a call"),
    "cnnjax-one": Contender("peer_jax", "jax", MODES, "the same on one device"),
    "cnnjax-jit": Contender("peer_jax", "jax", MODES, "a step a call, one device"),
    "cnnjax-lax": Contender(
        "peer_jax", "jax", MODES, "a step a call, one device, XLA's own convolutions and pools"
    ),
    "flax-loop": Contender(
        "peer_jax", "flax", MODES, "plain Flax (nn.Conv, nn.max_pool), a step a jitted call"
    ),
    "flax-scan": Contender(
        "peer_jax", "flax", MODES[:1], "plain Flax, all steps in one compiled loop"
    ),
    "torch": Contender(
        "peer_torch", "torch", MODES, "PyTorch eager, the best memory format and thread count"
    ),
    "torch-compile": Contender("peer_torch", "torch", MODES, "torch.compile of the model"),
    "keras-jax": Contender(
        "peer_keras", "keras", MODES, "Keras 3 on JAX: fit or train_on_batch, the faster"
    ),
    "keras-tensorflow": Contender(
        "peer_keras", "tensorflow", MODES, "Keras 3 on TensorFlow, likewise"
    ),
}

# Each measures single layers of a workload's network: the modes are those of `operations.py`.
OPERATION_CONTENDERS = {
    "cnnjax-operations": Contender("operations_jax", "jax", (), "a jitted call of one layer"),
    "torch-operations": Contender("operations_torch", "torch", (), "an eager call of one layer"),
}


class Task(NamedTuple):
    """What one worker is asked to measure."""

    workload: Workload
    contender: str
    precision: str
    device: str
    batch_size: int


class Program(NamedTuple):
    """A contender, ready to be prepared for a mode.

    Attributes:
      num_parameters: trainable numbers.
      platform: "cpu" or "gpu": where it will run.
      versions: package -> version.
      variants: mode -> name -> a function that prepares (compiles) a run; the fastest is measured.
      compiled_secs: seconds that the compiler has taken so far; None where nothing is compiled.
    """

    num_parameters: int
    platform: str
    versions: dict[str, str]
    variants: Mapping[str, dict[str, Callable[[], Run]]]
    compiled_secs: Callable[[], float] | None = None


def check_numbers(options: argparse.Namespace) -> None:
    """Raises a UserError for rounds or examples below 1, and for times that are not positive."""
    for flag, value in (("--rounds", options.rounds), ("--batch-size", options.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: give 1 or more")
    for flag, value in (("--seconds", options.seconds), ("--patience", options.patience)):
        if not value > 0:
            raise UserError(f"{flag} {value:g}: give a positive number")


def check_directories(*paths: Path | None) -> None:
    """Raises a UserError for a file to be written in a directory that is not there."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise UserError(f"{path}: there is no directory {path.parent}")


def load_data(workload: Workload, batch_size: int) -> tuple[Images, Labels]:
    """Returns uint8 `[n, height, width, channels]` and int32 `[n]`, n a multiple of the batch.

    The training images of MNIST where their shape fits, else noise: a step's time does not depend
    on what the images show.
    """
    if workload.image_shape == (28, 28, 1):
        from cnnjax.data import mnist

        image, label = mnist.read()["train"]
        size = len(label) // batch_size * batch_size
        return image[:size], label[:size]
    generator = np.random.default_rng(0)
    size = SYNTHETIC_BATCHES * batch_size
    image = generator.integers(0, 256, (size, *workload.image_shape), np.uint8)
    return image, generator.integers(0, workload.num_classes, size, np.int32)


def standardize(image: Images) -> Images:
    """Returns float32 images of mean 0 and deviation 1: what the peers are fed."""
    center, deviation = image.mean(dtype=np.float64), image.std(dtype=np.float64)
    result = image.astype(np.float32)
    result -= np.float32(center)
    result /= np.float32(deviation)
    return result
