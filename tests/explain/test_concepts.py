"""TCAV: directions that are known, scores by hand, chance, the command."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import linen as nn
from PIL import Image

from cnnjax.commands import concepts as command
from cnnjax.errors import UserError
from cnnjax.explain import concepts
from cnnjax.models import stage_output
from cnnjax.run import cli

GENERATOR = np.random.default_rng(0)


class Detector(nn.Module):
    """Logit 0 is the brightness of the left half, logit 1 minus it; stage1 is the image itself."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = stage_output(self, "stage1", image)
        left = jnp.mean(x[:, :, :2], (1, 2, 3))
        return jnp.stack([left, -left, jnp.zeros_like(left)], -1)


def images(count, seed, left=0.0):
    noise = np.random.default_rng(seed).normal(size=(count, 4, 4, 1)).astype(np.float32)
    noise[:, :, :2] += left
    return jnp.asarray(noise)


def test_the_direction_leads_to_the_concept_and_separates_held_out_images():
    shift = np.zeros(50)
    shift[3] = 4.0
    negative = GENERATOR.normal(size=(60, 50))
    vector = concepts.concept_vector(GENERATOR.normal(size=(60, 50)) + shift, negative)
    assert np.argmax(vector.direction) == 3
    assert np.linalg.norm(vector.direction) == pytest.approx(1)
    assert vector.accuracy > 0.9
    # Random against random is separated where it was fitted, and by chance where it was not.
    chance = [
        concepts.concept_vector(GENERATOR.normal(size=(30, 50)), negative, seed=seed).accuracy
        for seed in range(10)
    ]
    assert np.mean(chance) == pytest.approx(0.5, abs=0.12)


def test_the_span_of_few_images_holds_the_same_answer():
    from sklearn.linear_model import LogisticRegression

    x = GENERATOR.normal(size=(20, 70))
    y = np.arange(20) < 10
    vector = concepts.concept_vector(x[:10], x[10:], held_out=1e-9)
    kept = LogisticRegression(class_weight="balanced", max_iter=1000)
    # One image of each set is held out, whatever the fraction.
    generator = np.random.default_rng(0)
    held = [generator.permutation(rows)[0] for rows in (np.arange(10), np.arange(10, 20))]
    rest = np.setdiff1d(np.arange(20), held)
    kept.fit((x[rest] - x[rest].mean(0)) / x[rest].std(), y[rest])
    expected = kept.coef_[0] / np.linalg.norm(kept.coef_)
    np.testing.assert_allclose(vector.direction, expected, atol=1e-2)


def test_the_score_counts_the_images_whose_logit_rises():
    gradients = np.array([[1.0, 0.0], [2.0, -1.0], [-1.0, 5.0], [0.0, 1.0]])
    assert concepts.tcav_score(gradients, np.array([1.0, 0.0])) == 0.5
    assert concepts.tcav_score(gradients, np.array([-1.0, 0.0])) == 0.25
    model, image = Detector(), images(concepts.BATCH_SIZE + 3, 0)
    slopes = concepts.gradients(model, {}, image, 1, "stage1")
    expected = np.zeros((4, 4))
    expected[:, :2] = -1 / 8
    np.testing.assert_allclose(slopes, np.tile(expected.ravel(), (len(image), 1)), atol=1e-6)
    found = concepts.activations(model, {}, image, "stage1")
    np.testing.assert_array_equal(found, np.asarray(image).reshape(len(image), -1))


def test_the_p_value_is_scipys_times_the_tests():
    one, two = [0.9, 1.0, 0.8, 0.95], [0.5, 0.6, 0.4, 0.45]
    expected = scipy.stats.ttest_ind(one, two, equal_var=False).pvalue
    assert concepts.p_value(one, two) == pytest.approx(expected)
    assert concepts.p_value(one, two, tests=3) == pytest.approx(3 * expected)
    assert concepts.p_value(one, two, tests=10**9) == 1
    # Without any spread.
    assert concepts.p_value([1.0, 1.0], [1.0, 1.0]) == 1
    assert concepts.p_value([1.0, 1.0], [0.5, 0.5]) == 0


def test_a_concept_that_counts_is_found_and_one_that_does_not_is_not():
    model = Detector()
    right = np.zeros((40, 4, 4, 1), np.float32)
    right[:, :, 2:] = 2.0
    shown = {
        "left": images(40, 1, left=2.0),
        "right": images(40, 2) + right,
        "nothing": images(40, 3),
    }
    of_class = {0: images(20, 4), 1: images(20, 5), 2: images(20, 6)}
    arguments = model, {}, shown, images(200, 7), of_class, ["stage1"]
    found = {(each.concept, each.label): each for each in concepts.tcav(*arguments, repeats=25)}
    assert found["left", 0].verdict == "speaks for the class"
    assert found["left", 0].score == 1 and found["left", 0].p_value < 0.05
    assert found["left", 1].verdict == "speaks against the class"
    # A logit that is constant rises in no direction.
    assert found["left", 2].score == found["left", 2].random_score == 0
    assert not found["left", 2].is_significant
    assert found["right", 0].accuracy > 0.8
    assert not found["right", 0].is_significant
    assert found["nothing", 0].verdict == "the layer does not separate the concept"
    text = concepts.table(list(found.values()), ["a", "b", "c"])
    assert "accuracy" in text.splitlines()[1] and "speaks for" in text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: concepts.concept_vector(np.zeros((9, 3)), np.zeros((9, 4))), "one layer"),
        (lambda: concepts.concept_vector(np.ones((5, 3)), np.ones((9, 3))), "6 or more"),
        (lambda: concepts.concept_vector(np.ones((9, 3)), np.ones((9, 3))), "same for all"),
        (lambda: concepts.p_value([1.0], [0.5, 0.5]), "two scores"),
        (
            lambda: concepts.tcav(
                Detector(), {}, {"a": images(9, 0)}, images(9, 1), {0: images(2, 2)}, ["stage2"]
            ),
            "did you mean stage1",
        ),
        (
            lambda: concepts.tcav(
                Detector(), {}, {"a": images(9, 0)}, images(20, 1), {5: images(2, 2)}, ["stage1"]
            ),
            "no class 5",
        ),
        (
            lambda: concepts.tcav(
                Detector(), {}, {"a": images(9, 0)}, images(9, 1), {0: images(0, 2)}, ["stage1"]
            ),
            "no images of class 0",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, text):
    with pytest.raises(UserError, match=text):
        call()


@pytest.fixture
def folder(tmp_path):
    directory = tmp_path / "bright" / "deeper"
    directory.mkdir(parents=True)
    for number in range(8):
        pixels = GENERATOR.integers(100, 256, (28, 28), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{number}.png")
    return tmp_path / "bright"


def called(*argv):
    with pytest.raises(SystemExit) as stop:
        cli.run(command.Config, command.main, [str(argument) for argument in argv])
    return stop.value.code


@pytest.mark.slow
def test_the_command_writes_what_it_found(run, folder, capsys, tmp_path):
    flags = ["--run", run, "--concept", f"bright={folder}", "--prepare", "image"]
    flags += ["--classes", "3", "7", "--layers", "stage2", "--repeats", "3"]
    assert not called(*flags, "--count", "20", "--out", tmp_path / "out")
    assert "bright   stage2  3" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "concepts.json").read_text())
    assert written["images"] == {"bright": 8, "random": 200}
    assert [row["class"] for row in written["concepts"]] == ["3", "7"]
    # Bright noise is not like any digit.
    assert all(row["accuracy"] > 0.9 for row in written["concepts"])
    assert (tmp_path / "out" / "concepts.png").stat().st_size > 1000
    (tmp_path / "dark").mkdir()
    for number in range(16):
        noise = np.random.default_rng(number).integers(0, 60, (28, 28), np.uint8)
        Image.fromarray(noise).save(tmp_path / "dark" / f"{number}.png")
    random = ["--random", tmp_path / "dark", "--out", tmp_path / "other"]
    assert not called(*flags, *random)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ((), "no concept given"),
        (("--concept", "bright"), "NAME=FOLDER"),
        (("--concept", "a=nowhere"), "there is no directory 'nowhere'"),
        (("--concept", "a=FOLDER", "a=FOLDER"), "given twice"),
        (("--concept", "a=FOLDER", "--classes", "11"), "no class 11: the network has 0 to 9"),
        (("--concept", "a=FOLDER", "--classes", "cat"), "unknown class 'cat'"),
        (("--concept", "a=FOLDER", "--layers", "stage9"), "stage"),
        (("--concept", "a=FOLDER", "--repeats", "1"), "--repeats 1"),
        (("--concept", "a=FOLDER/deeper/none"), "no directory"),
        (("--concept", "a=FOLDER", "--random", "scripts"), "--random scripts has 0 images"),
    ],
)
def test_bad_flags_are_one_error(run, folder, flags, text, capsys):
    flags = [flag.replace("FOLDER", str(folder)) for flag in flags]
    capsys.readouterr()
    assert called("--run", run, *flags) == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()) == 1
