"""What is asked for and cannot be is said before any work: more images than there are, a base that
no run has."""

import json

import numpy as np
import pytest

from cnnjax import compress
from cnnjax.commands import export
from cnnjax.data.dataset import Arrays, Dataset
from cnnjax.errors import UserError
from cnnjax.run import load
from cnnjax.studies import quantized_runs


def digits(count):
    split = Arrays(np.zeros((count, 8, 8, 1), np.uint8), np.zeros(count, np.int32))
    return Dataset("few", ("a", "b"), split, split, split, mean=(0.0,), std=(1.0,))


def test_calibration_on_more_images_than_there_are_is_refused():
    many = compress.read_scheme("int8(samples=1000000000)")
    with pytest.raises(UserError, match=r"=1000000000: few has 20 training images .*at most"):
        quantized_runs.check_samples(digits(20), many)
    quantized_runs.check_samples(digits(20), compress.read_scheme("int8(samples=20)"))
    # The default number is as many as there are.
    quantized_runs.check_samples(digits(20), compress.read_scheme("int8"))
    chosen = quantized_runs.choose_images(digits(20), compress.read_scheme("int8"), 0, labeled=True)
    assert sum(map(len, chosen.calibration)) == 20


def test_an_export_is_calibrated_on_as_many_as_it_is_asked_for(monkeypatch):
    images = {"image": np.zeros((20, 8, 8, 1), np.uint8)}
    monkeypatch.setattr(export, "_splits", lambda config: (images, images))
    monkeypatch.setattr(export, "_image_shape", lambda trained: (8, 8, 1))
    monkeypatch.setattr(export, "_as_taken", lambda stored, trained, made: stored)

    def chosen(**settings):
        config = export.Config(run="r", out="o", precision="int8", **settings)
        return export._images(config, None, None, int8=True).calibration

    with pytest.raises(UserError, match="--calibration 1000000000: there are 20 training images"):
        chosen(calibration=10**9)
    assert len(chosen(calibration=19)) == 19
    assert len(chosen()) == 20


def write_run(directory, **card):
    directory.mkdir()
    config = {"experiment": "experiments.classify", "settings": {}}
    (directory / "config.json").write_text(json.dumps(config))
    card = {"model": "mlp", "num_outputs": 10, "arguments": {}} | card
    (directory / "model.json").write_text(json.dumps(card))
    return directory


def test_a_base_for_a_run_that_has_none_is_refused(tmp_path):
    plain = write_run(tmp_path / "plain")
    tuned = write_run(tmp_path / "tuned", finetune={"base": "gone"})
    with pytest.raises(UserError, match=r"--base elsewhere: .*plain was not fine-tuned.*leave it"):
        load.load_trained(plain, base="elsewhere")
    # One setting of several runs is for those of them that have a base.
    assert load.base_if_tuned(plain, "elsewhere") is None
    assert load.base_if_tuned(tuned, "elsewhere") == "elsewhere"
    assert load.base_if_tuned(tuned, "") is None
