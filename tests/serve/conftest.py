"""A LeNet-5 of random weights, as a run that serves."""

import numpy as np
import pytest

from cnnjax import convert, models
from cnnjax.commands import convert as convert_command


def make_run(folder, seed=0, scale=0.1):
    """Writes a run of random weights, made of a file, and returns its directory."""
    lenet = models.create("lenet5", num_classes=10)
    table = convert.entries(lenet, (28, 28, 1), convert.find_names(lenet, "pytorch"))
    draw = np.random.default_rng(seed).normal
    arrays = {entry.name: scale * draw(size=entry.their_shape).astype("f") for entry in table}
    folder.mkdir(parents=True, exist_ok=True)
    convert.write(folder / "weights.npz", arrays)
    config = convert_command.Config(folder / "weights.npz", folder / "lenet", model="lenet5")
    convert_command.main(config)
    return folder / "lenet"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The directory of the run."""
    return make_run(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def other_run(tmp_path_factory):
    """A run of other weights."""
    return make_run(tmp_path_factory.mktemp("served"), seed=1)
