"""`--precision auto`: bfloat16 on TPUs, float32 elsewhere; a run keeps what it was started in."""

import json

import jax.numpy as jnp
import pytest

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import classifier, load, record, settings
from cnnjax.tasks.classification import classification
from cnnjax.train import precision
from experiments import classify

SMALL = ("--model", "mlp", "--dataset", "digits", "--smoke", "--devices", "1")


@pytest.fixture
def platform(monkeypatch):
    """Returns what makes the platform of the devices another one, as far as precision goes."""
    return lambda name: monkeypatch.setattr(precision, "started_platform", lambda: name)


def launch(*flags):
    with pytest.raises(SystemExit) as stop:
        settings.launch(classify.Config, classify.main, [*SMALL, *map(str, flags)])
    return stop.value.code


def recorded(directory):
    config, card = (
        json.loads((directory / name).read_text()) for name in ("config.json", "model.json")
    )
    return config["settings"]["precision"], card["precision"]


@pytest.mark.parametrize(("name", "meant"), [("tpu", "bfloat16"), ("gpu", "float32")])
def test_auto_is_what_the_platform_multiplies(name, meant, platform):
    platform(name)
    assert precision.of_platform("auto") == meant
    assert precision.of_platform("float16") == "float16"
    fields = load.computation("lenet5", {}, precision="auto")
    assert fields == ({"dtype": jnp.bfloat16} if meant == "bfloat16" else {})
    dataset = cnnjax.data.load("digits")
    card = classifier.make_model(classifier.Config(), "mlp", {}, dataset)[1]
    assert card["precision"] == meant
    # Named, a platform need not be there.
    assert load.precision_of("lenet5", {}, "auto", platform="tpu") == "bfloat16"


def test_auto_leaves_what_a_model_was_told(platform):
    platform("tpu")
    told = {"dtype": "float32"}
    assert load.computation("lenet5", told, precision="auto") == told
    with pytest.raises(UserError, match="contradict each other"):
        load.computation("lenet5", told, precision="bfloat16")


def test_a_run_from_before_the_setting_is_float32(tmp_path):
    content = {"experiment": "experiments.classify", "settings": {"model": "mlp"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    found = record.saved_config(classify.Config, "experiments.classify", tmp_path)
    assert found.precision == "float32"


@pytest.mark.slow
def test_a_run_keeps_the_precision_that_it_was_started_in(platform, tmp_path, capsys):
    platform("tpu")
    run = tmp_path / "run"
    assert launch("--run-dir", run) == 0
    assert "step by scan in bfloat16" in capsys.readouterr().out
    assert recorded(run) == ("bfloat16", "bfloat16")
    assert load.load_classifier(run).model.dtype == jnp.bfloat16
    platform("cpu")
    # The same line again means the same run, wherever it is given.
    assert launch("--run-dir", run) == 0
    assert "is finished" in capsys.readouterr().out
    resumed = record.resolve(classify.Config, "experiments.classify", ["--resume", str(run)])
    assert resumed is None
    assert launch("--resume", run, "--precision", "float32") == 2
    assert "--precision float32 differs from the resumed run's bfloat16" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_one_call_computes_in_the_precision_that_it_records(platform, tmp_path):
    platform("tpu")
    data = cnnjax.data.load("digits")
    call = {"epochs": 2, "devices": 1, "batch_size": 256, "test": False}
    stopped = cnnjax.run.train(
        "mlp", classification(10), data, run_dir=tmp_path / "a", stop_after_epochs=1, **call
    )
    assert stopped.model.dtype == jnp.bfloat16
    assert recorded(tmp_path / "a") == ("bfloat16", "bfloat16")
    platform("cpu")
    again = cnnjax.run.train(
        "mlp", classification(10), data, run_dir=tmp_path / "a", resume=True, **call
    )
    assert again.model.dtype == jnp.bfloat16
    plain = cnnjax.run.train(
        "mlp", classification(10), data, run_dir=tmp_path / "b", stop_after_epochs=1, **call
    )
    assert plain.model.dtype is None
    assert recorded(tmp_path / "b") == ("float32", "float32")
