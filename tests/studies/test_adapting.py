"""Methods of fine-tuning on one base: runs are kept, others are added, other settings refused."""

import json

import jax
import numpy as np
import pytest

from cnnjax import models
from cnnjax.data import load
from cnnjax.errors import UserError
from cnnjax.finetune.base import Base
from cnnjax.studies import adapting

FIELDS = {"widths": (4, 8), "dense_widths": (), "norm": "batch", "norm_momentum": 0.99}


@pytest.fixture(scope="module")
def base():
    model = models.create("cnn_32_64", num_classes=7, **FIELDS)
    variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 28, 28, 1), np.float32))
    card = {"model": "cnn_32_64", "arguments": FIELDS, "mean": [0.1], "std": [0.3]}
    return Base("somewhere", jax.device_get(variables), card, "checksum")


@pytest.fixture(scope="module")
def digits():
    return load("digits", image_size=28, classes="0,1,2")


def test_few_labels_are_repeated_until_they_are_as_many_as_the_most(digits):
    plan = adapting.Plan(labels=(2, 5))
    few, most = (adapting.repeated(digits, plan, labels, 0) for labels in plan.labels)
    assert len(few.label) == len(most.label) == 15
    np.testing.assert_array_equal(few.image[:6], few.image[6:12])
    assert len({image.tobytes() for image in few.image}) == 6
    assert {image.tobytes() for image in few.image} <= {image.tobytes() for image in most.image}


@pytest.mark.slow
def test_what_is_made_is_kept_and_what_is_asked_for_is_added(base, digits, tmp_path, capsys):
    plan = adapting.Plan(("scratch", "head"), (2, 4), (0, 1), steps=4, batch_size=4)
    text = adapting.compare(base, digits, plan, tmp_path)
    assert "| `head` |" in text and "old task" not in text
    assert (tmp_path / "adapting.md").read_text() == text
    assert (tmp_path / "adapting.png").exists()
    made = json.loads((tmp_path / "adapting.json").read_text())["trials"]
    assert len(made) == 8
    assert {trial["trained_parameters"] for trial in made if trial["method"] == "head"} == {
        5 * 5 * 8 * 3 + 3
    }

    capsys.readouterr()
    assert adapting.compare(base, digits, plan, tmp_path) == text
    assert not capsys.readouterr().out
    more = adapting.Plan(("head",), (2, 4), (0, 1, 2), steps=4, batch_size=4)
    adapting.compare(base, digits, more, tmp_path)
    assert capsys.readouterr().out.count("head") == 2
    again = json.loads((tmp_path / "adapting.json").read_text())["trials"]
    assert again[:8] == made
    other = adapting.Plan(("head",), (2, 4), (0,), steps=5, batch_size=4)
    with pytest.raises(UserError, match="results with other steps"):
        adapting.compare(base, digits, other, tmp_path)
