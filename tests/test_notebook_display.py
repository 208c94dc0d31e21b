"""What runs, tables and progress bars are in a notebook, with and without optional packages."""

import base64
import importlib.util
import io
import json

import pytest

from cnnjax import notebook
from cnnjax.errors import UserError
from cnnjax.run.load import TrainedModel
from cnnjax.run.logs import ProgressBar
from cnnjax.run.training import Trained

ROWS = [{"step": 1000, "loss": 0.123456}, {"step": 2000, "accuracy": 0.5}]


def without(monkeypatch, *packages):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in packages else found(name)
    )


def test_rows_are_a_data_frame_where_pandas_is_there():
    pandas = pytest.importorskip("pandas")
    frame = notebook.table(ROWS)
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["step", "loss", "accuracy"]
    assert frame["step"].tolist() == [1000, 2000] and frame["loss"].isna().tolist() == [False, True]


def test_rows_are_a_table_without_pandas(monkeypatch):
    without(monkeypatch, "pandas")
    table = notebook.table(iter(ROWS))
    assert table == ROWS
    text = table._repr_html_()
    assert text.count("<tr>") == 3 and "<th>accuracy</th>" in text
    assert "<td>1,000</td><td>0.1235</td><td></td>" in text


def test_a_table_of_nothing_has_no_rows(monkeypatch):
    without(monkeypatch, "pandas")
    assert notebook.table([]) == []
    assert "<td>" not in notebook.table([])._repr_html_()


def test_a_card_escapes_names_and_holds_its_pictures(tmp_path):
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"pixels")
    text = notebook.card("<b>", {"a&b": "<script>"}, [picture, tmp_path / "missing.png"])
    assert "&lt;b&gt;" in text and "a&amp;b" in text and "<script>" not in text
    assert text.count("<img") == 1 and base64.b64encode(b"pixels").decode() in text


def run_directory(tmp_path):
    records = [
        {"step": 1, "kind": "train", "loss": 2.0},
        {"step": 2, "kind": "validation", "loss": 1.5, "accuracy": 0.5},
        {"step": 2, "kind": "test", "loss": 1.25, "accuracy": 0.75},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in records))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "learning_curves.png").write_bytes(b"curves")
    return tmp_path


def test_a_trained_run_shows_its_score_metrics_and_figures(tmp_path, monkeypatch):
    without(monkeypatch, "pandas")
    summary = {"model": "lenet5", "test_accuracy": 0.9934, "parameters": 44426, "seed": 0}
    trained = Trained(run_directory(tmp_path), summary, None, {"params": {}})
    assert repr(trained) == f"Trained({tmp_path}: 99.34% on the test set)"
    text = trained._repr_html_()
    assert "99.34% on the test set" in text and "44,426" in text and "<img" in text
    assert trained.metrics() == [{"step": 2, "loss": 1.5, "accuracy": 0.5}]
    assert trained.metrics("test") == [{"step": 2, "loss": 1.25, "accuracy": 0.75}]
    assert trained.figure("learning_curves").read_bytes() == b"curves"
    with pytest.raises(UserError, match=r"unknown figure of .* did you mean learning_curves"):
        trained.figure("learning_curve")
    with pytest.raises(UserError, match=r"unknown kind of metrics 'valid': did you mean"):
        trained.metrics("valid")


def test_a_stopped_run_says_so(tmp_path):
    trained = Trained(run_directory(tmp_path), {}, None, {"params": {}})
    assert "stopped, not tested yet" in repr(trained)
    assert "stopped, not tested yet" in trained._repr_html_()


def test_a_model_that_was_read_back_names_its_classes():
    import numpy as np

    names = [f"class{number}" for number in range(12)]
    card = {"model": "lenet5", "image_shape": [28, 28, 1], "class_names": names}
    variables = {"params": {"head": {"kernel": np.zeros((84, 12))}}}
    model = TrainedModel(None, variables, card, 120)
    assert repr(model) == "TrainedModel(lenet5 at step 120)"
    text = model._repr_html_()
    assert "1,008" in text and "28 x 28 x 1" in text
    assert "12: class0" in text and "class9, ..." in text and "class10" not in text


def test_tests_are_no_notebook():
    assert not notebook.kernel_runs() and not notebook.draws_widgets()


def test_progress_in_a_notebook_is_a_widget(monkeypatch, capsys):
    pytest.importorskip("ipywidgets")
    tqdm = pytest.importorskip("tqdm.notebook").tqdm
    monkeypatch.setattr(notebook, "kernel_runs", lambda: True)
    with ProgressBar(4, 2, 64) as bar:
        bar.update(1, {"loss": 2.5})
        assert isinstance(bar._bar, tqdm)
        bar.update(4, {"loss": (3.0, 2)})
    left, middle, right = (part.value for part in bar._bar.container.children)
    assert middle == 4
    # Its spaces are as wide as a digit.
    assert "epoch 2/2" in left.replace("\u2007", " ")
    assert "loss 1.5" in right.replace("\u2007", " ")
    # A stream that is named gets lines, in a notebook too.
    stream = io.StringIO()
    with ProgressBar(2, 2, 64, stream=stream) as lines:
        lines.update(2, {"loss": 1.0})
    assert "epoch 1/1  step 2/2" in stream.getvalue()


@pytest.mark.parametrize("asked", [False, True])
def test_progress_in_a_notebook_without_widgets_is_lines(asked, monkeypatch, capsys):
    if asked:
        monkeypatch.setenv("CNNJAX_PROGRESS", "lines")
    else:
        without(monkeypatch, "ipywidgets")
    monkeypatch.setattr(notebook, "kernel_runs", lambda: True)
    with ProgressBar(2, 2, 64) as bar:
        bar.update(2, {"loss": 1.0})
    assert "epoch 1/1  step 2/2  loss 1.000" in capsys.readouterr().err
