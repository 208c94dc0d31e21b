"""The DCGAN's experiment: what a run leaves, and that its features are trained once."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from cnnjax.run.logs import read_metrics
from experiments import dcgan_mnist
from tests.experiments.test_experiments import launch, snapshot


@pytest.mark.slow
def test_a_smoke_run_trains_samples_and_scores_and_its_features_serve_another(tmp_path, capsys):
    flags = ["--smoke", "--devices", "2", "--epochs", "1"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert launch(dcgan_mnist, *flags, "--run-dir", first) == 0
    summary = json.loads((first / "summary.json").read_text())
    distances = [summary[f"test_frechet_distance{of}"] for of in ("_of_halves", "", "_of_noise")]
    assert distances[0] > 0 and np.isfinite(distances).all()
    assert summary["monitor"] == "frechet_distance"
    assert f"{distances[1]:.4f}" in (first / "summary.md").read_text()
    (sheet,) = (first / "samples").iterdir()
    assert sheet.name == "step-000016.png" and np.asarray(Image.open(sheet)).std() > 5
    figures = {path.stem for path in (first / "figures").iterdir()}
    assert {"samples", "images", "learning_curves"} <= figures
    kinds = {record["kind"] for record in read_metrics(first)}
    assert kinds == {"train", "validation", "test"}

    # Features that are there are left alone.
    shutil.copytree(first / "features", second / "features")
    features = snapshot(second / "features")
    flags += ["--ema-decay", "0.9"]
    assert launch(dcgan_mnist, *flags, "--run-dir", second) == 0
    assert snapshot(second / "features") == features
    again = json.loads((second / "summary.json").read_text())
    # Of real images and noise alone.
    for of in ("_of_halves", "_of_noise"):
        name = f"test_frechet_distance{of}"
        assert again[name] == pytest.approx(summary[name], rel=1e-4)
    capsys.readouterr()
    assert launch(dcgan_mnist, "--resume", second) == 0
    assert "is finished (test frechet_distance" in capsys.readouterr().out


def test_what_the_step_does_not_know_is_refused(capsys):
    for flags in (["--precision", "float16"], ["--accumulate", "2"], ["--remat"]):
        assert launch(dcgan_mnist, *flags, "--smoke") == 2
        assert "float16, --accumulate or --remat" in capsys.readouterr().err
