"""A mark that leaks the label is found in the network that was trained on it, in no other."""

import json

import numpy as np
import pytest

from cnnjax.studies import planted
from experiments import planted_fault
from tests.experiments.test_experiments import launch


def test_a_mark_stands_where_its_class_says():
    image = np.zeros((10, 28, 28, 1), np.uint8)
    marked = planted.marked(image, np.arange(10))
    side = planted.SIDE
    assert (marked.sum((1, 2, 3)) == 255 * side**2).all()
    # All in the corner, no pixel in two.
    assert marked[planted.CORNER].sum() == marked.sum()
    assert (marked.sum(0) <= 255).all()
    assert not image.any()


@pytest.mark.slow
def test_the_mark_is_found_in_the_faulty_network_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("cnnjax.run.report.write_figures", lambda *arguments, **options: [])
    argv = ["--devices", "1", "--digits", "4000", "--looked-at", "100", "--run-dir", tmp_path]
    assert launch(planted_fault, *argv) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["faulty, accuracy with its mark"] > 0.95
    assert found["faulty, accuracy with another mark"] < 0.8
    assert found["honest, accuracy with another mark"] > 0.85
    for method in ("grad_cam", "layer_cam", "lrp", "occlusion"):
        faulty, honest = (
            found[f"{network}, {method}, points at the corner"]
            for network in planted_fault.NETWORKS
        )
        assert faulty > 2 * honest
        faulty, honest = (
            found[f"{network}, {method}, mass in the corner"] for network in planted_fault.NETWORKS
        )
        assert faulty > honest
    assert found["faulty, TCAV, classes of ten"] >= 7
    assert found["honest, TCAV, classes of ten"] <= 2
    assert (tmp_path / "figures" / "maps.png").stat().st_size > 1000
