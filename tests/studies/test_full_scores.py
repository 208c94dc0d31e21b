"""All scores in one table: the same however the images are batched, and from the command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import commands, data
from cnnjax.augment import corruptions
from cnnjax.evaluation.corruption_error import Errors
from cnnjax.run import classifier, settings
from cnnjax.studies import full_scores
from cnnjax.studies.full_scores import Row, Subject

NAMES = ("contrast", "gaussian_noise")


def brightness_of(variables, image):
    """Class 1 where the image is brighter than the threshold."""
    return (jnp.mean(image, (1, 2)) - variables) * 100


SUBJECT = Subject(brightness_of, 0.13)


def digits(size, count=30):
    image = data.load("mnist").test.image[:count]
    label = (image.mean((1, 2, 3)) / 255 > 0.13).astype(np.int32)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        padding = size - len(label[rows])
        mask = np.arange(size) < len(label[rows])
        yield {
            "image": np.pad(image[rows], ((0, padding), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(label[rows], (0, padding)),
            "mask": mask,
        }


@pytest.mark.slow
def test_errors_do_not_depend_on_the_batches_and_draws_do_on_the_seed():
    blind = Subject(lambda variables, image: -jnp.ones((len(image), 1)), None)
    clean, errors = full_scores.corrupted_errors([SUBJECT, blind], digits(30), names=NAMES)
    assert clean[0] == 0
    again = full_scores.corrupted_errors([SUBJECT], digits(8), names=NAMES)[1]
    np.testing.assert_array_equal(again[0], errors[0])
    # Contrast keeps the mean but for rounding: hardly any answer changes. Noise brightens digits.
    assert errors[0, 0].max() <= 0.1
    assert errors[0, 1, 4] > errors[0, 1, 0]
    # A network that does not look errs as often under each.
    assert (errors[1] == clean[1]).all()
    other = full_scores.corrupted_errors([SUBJECT], digits(30), names=NAMES, seed=1)[1]
    assert other.shape == (1, 2, 5)


def test_rows_hold_the_means_and_the_ratios():
    errors = np.full((19, 5), 0.2)
    errors[0] = [0.1, 0.2, 0.3, 0.4, 0.5]
    reference = Errors(0.1, dict.fromkeys(corruptions.NAMES, 0.4))
    rows = full_scores.corruption_rows(errors, 0.1, reference)
    assert [row.name for row in rows[:2]] == ["gaussian_noise", "shot_noise"]
    assert (rows[0].value, rows[0].relative_to) == pytest.approx((0.3, 0.75))
    assert rows[0].relative == pytest.approx(0.2 / 0.3)
    mean = rows[15]
    assert mean.name == "mean corruption error (15)"
    assert mean.value == pytest.approx((0.3 + 14 * 0.2) / 15)
    assert mean.relative_to == pytest.approx((0.75 + 14 * 0.5) / 15)
    assert len(rows) == 20
    alone = full_scores.corruption_rows(errors, 0.1, None)
    assert alone[15].relative_to is None


def test_the_table_is_aligned_markdown():
    rows = [Row("accuracy", 0.99), Row("fog", 0.25, (0.1, 0.2, 0.3, 0.3, 0.35), 0.5, float("nan"))]
    lines = full_scores.markdown(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split("|")[1].strip() == "score"
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        *("fog", "0.2500", "0.1000", "0.2000", "0.3000", "0.3000", "0.3500", "0.500", "-")
    ]
    json.dumps(full_scores.as_json(rows), allow_nan=False)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--reference", "x"], "--reference is for --full"),
        (["--full", "--corrupt", "noise:0.1"], "leave --corrupt out"),
    ],
)
def test_mistakes(flags, text, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["evaluate", "--run", "x", *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_command_writes_one_table(tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["--model", "cnn_strided_16_32", "--devices", "1", "--smoke", "--run-dir", str(run)]
    with pytest.raises(SystemExit) as stop:
        settings.launch(classifier.Config, classifier.main, argv)
    assert not stop.value.code
    assert (run / "figures" / "worst_explained.png").exists()
    with pytest.raises(SystemExit) as stop:
        commands.main(["evaluate", "--run", str(run), "--full", "--smoke", "--reference", str(run)])
    assert not stop.value.code
    out = run / "evaluation-test"
    table = (out / "full.md").read_text()
    assert table.split("\n\n")[1] in capsys.readouterr().out
    values = json.loads((out / "full.json").read_text())
    rows = {row["name"]: row for row in values["rows"]}
    assert len([name for name in rows if name in corruptions.NAMES]) == 19
    # Against itself.
    assert rows["mean corruption error (15)"]["corruption_error"] == pytest.approx(1.0)
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert rows["accuracy"]["value"] == pytest.approx(evaluation["accuracy"])
    assert evaluation["full"]["rows"] == values["rows"]
    assert (out / "figures" / "corruptions.png").exists()
    assert (out / "figures" / "worst_explained.png").exists()
