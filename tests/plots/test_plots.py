"""Figures show the right numbers, have the right size, and cut nothing off."""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
from matplotlib.figure import Figure
from PIL import Image

from cnnjax import plots
from cnnjax.errors import UserError
from cnnjax.metrics import expected_calibration_error

DIGITS = [str(digit) for digit in range(10)]
CLOTHES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Collects the figures that are saved, and checks that none reaches over its own edge."""
    saved: list[Any] = []
    savefig = Figure.savefig

    def collect(figure: Figure, *arguments: Any, **options: Any) -> None:
        savefig(figure, *arguments, **options)
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.01
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", collect)
    yield saved


def pixels(path: Path) -> np.ndarray:
    array = np.asarray(Image.open(path).convert("RGB"))
    assert array.std() > 5
    return array


def curve(axes: Any, label: str) -> np.ndarray:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return np.stack([line.get_xdata(), line.get_ydata()], axis=1)


def predictions(count: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, count)
    logits = generator.normal(size=(count, num_classes))
    logits[np.arange(count), labels] += 2.0
    exponentials = np.exp(logits)
    return (exponentials / exponentials.sum(1, keepdims=True)).astype(np.float32), labels


def test_import_is_cheap_and_pyplot_is_never_loaded(tmp_path: Path) -> None:
    program = (
        "import sys, numpy, cnnjax.plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "cnnjax.plots.filters(numpy.ones((3, 3, 1, 2)), sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    path = tmp_path / "new directory" / "filters.png"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True)
    assert path.exists()


def test_learning_curves(tmp_path: Path, figures: list[Any]) -> None:
    records: list[dict[str, Any]] = []
    for step in range(10, 101, 10):
        records.append(
            {"step": step, "kind": "train", "loss": 1 / step, "accuracy": 0.9, "learning_rate": 0.1}
        )
    for step, accuracy in ((50, 0.97), (100, 0.95)):
        records.append({"step": step, "kind": "validation", "loss": 0.2, "accuracy": accuracy})
    records.append({"step": 100, "kind": "test", "loss": 0.3, "accuracy": 0.96})
    path = plots.learning_curves(records, tmp_path / "curves.png", steps_per_epoch=50)
    assert pixels(path).shape == (570, 1800, 3)
    loss, accuracy, rate = figures[0].axes
    expected = [(step / 50, 1 / step) for step in range(10, 101, 10)]
    np.testing.assert_allclose(curve(loss, "train"), expected)
    assert loss.get_yscale() == "log"
    assert curve(accuracy, "validation").tolist() == [[1.0, 0.97], [2.0, 0.95]]
    assert curve(accuracy, "best 97.00%").ravel().tolist() == [1.0, 0.97]
    assert curve(accuracy, "test 96.00%").tolist() == [[2.0, 0.96]]
    assert rate.lines[0].get_ydata().tolist() == [0.1] * 10
    assert {axes.get_xlabel() for axes in figures[0].axes} == {"epoch"}


def test_training_below_validation_stays_in_sight(tmp_path: Path, figures: list[Any]) -> None:
    records = [
        {"step": step, "kind": kind, "accuracy": accuracy}
        for step in (1, 2)
        for kind, accuracy in (("train", 0.9), ("validation", 0.99))
    ]
    plots.learning_curves(records, tmp_path / "curves.png")
    low, high = figures[0].axes[1].get_ylim()
    assert low < 0.9 < 0.99 < high <= 1.01


def test_interval_chart(tmp_path: Path, figures: list[Any]) -> None:
    path = plots.interval_chart(
        ["none", "L2"], [96.0, 97.5], [0.5, float("nan")], "accuracy", tmp_path / "chart.png"
    )
    assert path.exists()
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "L2"]
    (container,) = axes.containers
    assert container.lines[0].get_xdata().tolist() == [96.0, 97.5]
    first, second = container.lines[2][0].get_segments()
    assert first[:, 0].tolist() == [95.5, 96.5]
    assert second[:, 0].tolist() == [97.5, 97.5]


def test_learning_curves_of_unusual_runs(tmp_path: Path, figures: list[Any]) -> None:
    nan = float("nan")
    diverged = [
        {"step": 1, "kind": "train", "loss": 0.0, "accuracy": 0.1},
        {"step": 2, "kind": "train", "loss": nan, "accuracy": nan},
        {"step": 2, "kind": "validation", "loss": nan, "accuracy": nan},
    ]
    plots.learning_curves(diverged, tmp_path / "diverged.png")
    assert figures[0].axes[0].get_yscale() == "linear"
    assert figures[0].axes[0].get_xlabel() == "step"
    plots.learning_curves(
        [{"step": 1, "kind": "train", "learning_rate": 0.0}], tmp_path / "rate.png"
    )
    with_epochs = [{"step": 9, "kind": "test", "epoch": 3, "loss": 1.0}]
    plots.learning_curves(with_epochs, tmp_path / "epochs.png")
    assert figures[2].axes[0].get_xlabel() == "epoch"
    assert curve(figures[2].axes[0], "test 1").tolist() == [[3.0, 1.0]]


def test_a_long_curve_is_smoothed_by_its_running_mean(tmp_path: Path, figures: list[Any]) -> None:
    values = np.random.default_rng(0).uniform(0.5, 1.5, 200)
    records = [
        {"step": step, "kind": "train", "loss": value} for step, value in enumerate(values, start=1)
    ]
    plots.learning_curves(records, tmp_path / "long.png")
    smooth = curve(figures[0].axes[0], "train (mean of 4)")
    expected = [(step, values[step - 4 : step].mean()) for step in range(4, 201)]
    np.testing.assert_allclose(smooth, expected)


@pytest.mark.parametrize("names", [DIGITS, CLOTHES])
def test_confusion_matrix_writes_every_count(
    tmp_path: Path, figures: list[Any], names: list[str]
) -> None:
    confusion = np.diag(np.arange(90, 100))
    confusion[3, 5], confusion[5, 3] = 7, 1
    pixels(plots.confusion_matrix(confusion, names, tmp_path / "confusion.png"))
    axes = figures[0].axes[0]
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert written == {((i, i), str(90 + i)) for i in range(10)} | {((5, 3), "7"), ((3, 5), "1")}
    assert [label.get_text() for label in axes.get_xticklabels()] == names
    assert axes.get_title() == "8 wrong of 953  (accuracy 99.16%)"
    shares = axes.images[0].get_array()
    assert shares[3, 5] == pytest.approx(7 / 100)


def test_confusion_matrix_of_many_classes_lists_pairs(tmp_path: Path, figures: list[Any]) -> None:
    confusion = 10 * np.eye(100, dtype=int)
    confusion[7, 9], confusion[98, 1] = 4, 6
    names = [f"class {number}" for number in range(99)] + ["a name that is far too long"]
    path = plots.confusion_matrix(confusion, names, tmp_path / "confusion.png")
    assert max(pixels(path).shape) < 3200
    matrix, pairs = figures[0].axes[:2]
    assert not matrix.texts
    lines = [line.split() for line in pairs.texts[0].get_text().splitlines()[2:]]
    assert lines == [
        ["6", "class", "98", "as", "class", "1"],
        ["4", "class", "7", "as", "class", "9"],
    ]
    assert matrix.get_xticklabels()[99].get_text() == "a name that is fa…"


def test_confusion_matrix_of_a_thousand_classes_has_numbers_for_names(
    tmp_path: Path, figures: list[Any]
) -> None:
    names = [f"class {number}" for number in range(1000)]
    plots.confusion_matrix(np.eye(1000, dtype=int), names, tmp_path / "confusion.png")
    assert len(figures[0].axes[0].get_xticklabels()) < 20


def test_filters_of_one_channel_share_a_scale(tmp_path: Path, figures: list[Any]) -> None:
    kernel = np.random.default_rng(0).normal(size=(5, 5, 1, 6)).astype(np.float32)
    pixels(plots.filters(kernel, tmp_path / "filters.png"))
    image = figures[0].axes[0].images[0]
    mosaic = np.ma.filled(image.get_array(), np.nan)
    assert mosaic.shape == (11, 17)
    for index in range(6):
        top, left = index // 3 * 6, index % 3 * 6
        tile = mosaic[top : top + 5, left : left + 5]
        np.testing.assert_array_equal(tile, kernel[..., 0, index])
    assert np.isnan(mosaic[5]).all()
    limit = float(np.abs(kernel).max())
    assert image.get_clim() == (-limit, limit)


def test_filters_of_colors_and_of_many_channels(tmp_path: Path, figures: list[Any]) -> None:
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 4))
    plots.filters(kernel, tmp_path / "color.png")
    first = figures[0].axes[0].images[0].get_array()[:3, :3]
    expected = (kernel[..., 0] - kernel[..., 0].min()) / np.ptp(kernel[..., 0])
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    assert len(figures[0].axes) == 1
    kernel = np.random.default_rng(1).normal(size=(3, 3, 20, 70)).astype(np.float32)
    plots.filters(kernel, tmp_path / "many.png")
    axes = figures[1].axes[0]
    assert axes.get_title() == "64 of 70 filters of 3x3, 20 input channels (16 shown)"
    mosaic = axes.images[0].get_array()
    assert mosaic.shape == (16 * 4 - 1, 64 * 4 - 1)
    np.testing.assert_array_equal(mosaic[8:11, 4:7], kernel[:, :, 2, 1])
    plots.filters(np.zeros((3, 3, 1, 1)), tmp_path / "zero.png")


def test_image_grid(tmp_path: Path, figures: list[Any]) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (7, 8, 8, 1), dtype=np.uint8)
    pixels(plots.image_grid(images, [f"image {n}" for n in range(7)], tmp_path / "grid.png"))
    shown = [axes.images[0].get_array() for axes in figures[0].axes if axes.images]
    np.testing.assert_allclose(shown, images[..., 0] / 255, rtol=1e-6)
    assert [axes.get_title() for axes in figures[0].axes][:8] == [
        *[f"image {n}" for n in range(7)],
        "",
    ]
    normalized = np.array([-1.0, 0.0, 3.0, 1.0]).reshape(2, 2, 1, 1) * np.ones(3)
    plots.image_grid(normalized, (), tmp_path / "float.png")
    stretched = [axes.images[0].get_array()[..., 0].ravel().tolist() for axes in figures[1].axes]
    assert stretched == [[0.0, 0.25], [1.0, 0.5]]


def test_a_sheet_shows_every_pixel_of_every_image(tmp_path: Path, figures: list[Any]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 1), dtype=np.uint8)
    pixels(plots.image_sheet(images, tmp_path / "sheet.png", columns=3, heading="five images"))
    (axes,) = figures[0].axes
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert shown.shape == (2 * 5 - 1, 3 * 7 - 1)
    np.testing.assert_allclose(shown[5:, 7:13], images[4, ..., 0] / 255, rtol=1e-6)
    assert np.isnan(shown[4]).all() and np.isnan(shown[5:, 14:]).all()
    assert figures[0].get_suptitle() == "five images"


def test_worst_classified_are_in_order_of_loss(tmp_path: Path, figures: list[Any]) -> None:
    images = np.stack([np.full((4, 4, 1), value, np.uint8) for value in (10, 20, 30, 40)])
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.9998, 0.0002], [0.6, 0.4]])
    pixels(
        plots.worst_classified(
            images,
            [0, 0, 1, 0],
            probabilities,
            ["cat", "dog"],
            tmp_path / "worst.png",
            count=3,
        )
    )
    axes = [axes for axes in figures[0].axes if axes.images]
    assert [each.get_title() for each in axes] == [
        "true dog: <0.1%\npredicted cat: >99.9%",
        "true cat: 30.0%\npredicted dog: 70.0%",
        "true cat: 60.0%\n(right)",
    ]
    assert [round(each.images[0].get_array()[0, 0] * 255) for each in axes] == [30, 20, 40]
    assert figures[0].get_suptitle() == "highest loss of 4 images, 2 of them wrong"


@pytest.mark.parametrize("original_shape", [(60, 90, 3), (30, 20), (8, 50, 4)])
def test_prediction(tmp_path: Path, figures: list[Any], original_shape: tuple[int, ...]) -> None:
    original = np.random.default_rng(0).integers(0, 256, original_shape, dtype=np.uint8)
    probabilities = np.array([0.02, 0.7, 0.0, 0.28])
    network_input = np.linspace(0, 1, 16).reshape(4, 4, 1)
    path = plots.prediction(
        original, network_input, probabilities, CLOTHES[:4], tmp_path / "p.png", count=3
    )
    assert pixels(path).shape == (540, 1500, 3)
    axes = figures[0].axes[2]
    assert [bar.get_width() for bar in axes.patches] == [0.7, 0.28, 0.02]
    ticks = [label.get_text() for label in axes.get_yticklabels()]
    assert ticks == ["Trouser", "Dress", "T-shirt/top"]
    assert [text.get_text() for text in axes.texts] == ["70.0%", "28.0%", "2.0%"]
    height, width = original_shape[:2]
    assert figures[0].axes[0].get_title() == f"your image\n{width} x {height}"


def test_reliability_diagram(tmp_path: Path, figures: list[Any]) -> None:
    probabilities, labels = predictions(400, 4)
    path = plots.reliability_diagram(probabilities, labels, tmp_path / "reliability.png")
    assert pixels(path).shape == (900, 780, 3)
    axes, count_axes = figures[0].axes
    counts = np.array([bar.get_height() for bar in count_axes.patches])
    assert counts.sum() == 400
    dots = curve(axes, "mean confidence")
    error = (counts[counts > 0] / 400 * np.abs(dots[:, 0] - dots[:, 1])).sum()
    expected = float(expected_calibration_error(probabilities, labels))
    assert error == pytest.approx(expected, abs=1e-6)
    assert f"expected calibration error {expected:.2%}" in axes.get_title()


def test_roc_curves_agree_with_scikit_learn(tmp_path: Path, figures: list[Any]) -> None:
    probabilities, labels = predictions(300, 3)
    probabilities = probabilities.round(2)  # with ties
    path = plots.roc_curves(probabilities, labels, ["a", "b", "c"], tmp_path / "roc.png")
    assert pixels(path).shape == (720, 1140, 3)
    axes = figures[0].axes[0]
    for number, name in enumerate("abc"):
        false, true, _ = sklearn.metrics.roc_curve(
            labels == number, probabilities[:, number], drop_intermediate=False
        )
        area = sklearn.metrics.auc(false, true)
        drawn = curve(axes, f"{name}  {area:.4f}")
        np.testing.assert_allclose(drawn[:, 0], np.maximum(false, 0.5 / 300))
        np.testing.assert_allclose(drawn[:, 1], true)


def test_roc_curves_of_many_classes_name_the_worst(tmp_path: Path, figures: list[Any]) -> None:
    probabilities, labels = predictions(300, 20)
    labels[labels == 19] = 0
    plots.roc_curves(
        probabilities, labels, [f"c{number}" for number in range(20)], tmp_path / "roc.png"
    )
    axes = figures[0].axes[0]
    assert axes.get_legend().get_title().get_text() == "8 lowest areas of 19"
    areas = sorted(
        sklearn.metrics.roc_auc_score(labels == number, probabilities[:, number])
        for number in range(19)
    )
    named = [line.get_label().split() for line in axes.lines if line.get_label()[0] == "c"]
    assert [float(area) for name, area in named if name != "chance"] == pytest.approx(
        areas[:8], abs=1e-4
    )


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: plots.learning_curves([], path), "no metrics to draw"),
        (lambda path: plots.filters(np.zeros((3, 3)), path), r"four axes .* not \(3, 3\)"),
        (lambda path: plots.image_grid(np.zeros((2, 4, 4, 1)), ["a"], path), "1 titles for 2"),
        (lambda path: plots.image_grid(np.zeros((2, 4, 4)), (), path), r"not \[2, 4, 4\]"),
        (
            lambda path: plots.confusion_matrix(np.eye(3), ["a", "b"], path),
            "2 class names for 3 classes",
        ),
    ],
)
def test_misfits_are_explained(tmp_path: Path, draw: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(tmp_path / "never.png")
    assert not (tmp_path / "never.png").exists()


def test_class_maps_paint_what_is_not_background(tmp_path):
    from cnnjax.plots import overlays

    images = np.full((2, 4, 4, 1), 0.5, np.float32)
    classes = np.zeros((2, 4, 4), np.uint8)
    classes[0, 0, 0], classes[0, 0, 1] = 1, 255
    gray = overlays._rgb(images)
    painted = overlays._painted(gray, classes, np.array([[0, 0, 0], [1.0, 0, 0]]), 255, 0)
    np.testing.assert_allclose(painted[0, 0, 0], [0.875, 0.125, 0.125])
    np.testing.assert_allclose(painted[0, 0, 1], 0.875)
    np.testing.assert_array_equal(painted[1], gray[1])
    path = overlays.class_maps(images, classes, classes, ["ground", "cat"], tmp_path / "maps.png")
    assert path.stat().st_size > 1000


def test_class_maps_mark_wrong_pixels_that_count():
    from cnnjax.plots import overlays

    truth = np.array([[[0, 1], [2, 255]]], np.uint8)
    predicted = np.array([[[0, 2], [2, 0]]], np.uint8)
    errors = overlays._errors(np.ones((1, 2, 2, 3), np.float32), truth, predicted, 255)
    np.testing.assert_allclose(errors[0, 0, 1], overlays._WRONG)
    np.testing.assert_allclose(errors[0, [0, 1, 1], [0, 0, 1]], 0.5)
    assert overlays._fractions_wrong(truth, predicted, 255).tolist() == [1 / 3]


@pytest.mark.parametrize("count", [2, 10, 18, 40])
def test_class_colors_are_distinct_and_not_gray(count):
    from cnnjax.plots import overlays

    colors = overlays.class_colors(count)
    assert len({tuple(np.round(color, 3)) for color in colors}) == count
    assert (colors.max(axis=1) - colors.min(axis=1)).min() > 0.1


def test_class_maps_refuse_shapes_that_do_not_fit(tmp_path):
    from cnnjax import plots

    images, maps = np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 4), np.uint8)
    with pytest.raises(UserError, match="give one class a pixel of each image"):
        plots.class_maps(images, maps[:1], maps, ["a", "b"], tmp_path / "x.png")
    with pytest.raises(UserError, match="1 or 3 channels"):
        plots.class_maps(images[..., 0], maps, maps, ["a", "b"], tmp_path / "x.png")


def test_embedding_draws_the_first_two_principal_components_by_class(tmp_path, figures):
    generator = np.random.default_rng(0)
    # Two directions of great variance in 5 dimensions, by which the classes differ.
    labels = np.arange(90) % 3
    centers = np.array([[0, 0], [9, 0], [0, 6]])[labels]
    points = centers + generator.normal(size=(90, 2))
    features = points @ np.eye(5)[[1, 3]] + 0.01 * generator.normal(size=(90, 5))
    path = plots.embedding(features, labels, ["a", "b", "c"], tmp_path / "embedding.png")
    pixels(path)
    (axes,) = figures[0].axes
    drawn = {}
    for index, name in enumerate("abc"):
        color = curve_color(axes, name)
        (line,) = [x for x in axes.lines if len(x.get_xdata()) and x.get_color() == color]
        drawn[index] = np.stack([line.get_xdata(), line.get_ydata()], axis=1)
    centered = features - features.mean(0)
    _, singular, directions = np.linalg.svd(centered, full_matrices=False)
    for index, found in drawn.items():
        expected = centered[labels == index] @ directions[:2].T
        # A principal component has no sign.
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-6)
    share = singular[0] ** 2 / (singular**2).sum()
    assert axes.get_xlabel() == f"first principal component ({share:.0%})"


def curve_color(axes, label):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line.get_color()


@pytest.mark.parametrize("accuracy", [1.0, 0.9999999, 0.0, 0.5, float("nan"), 7.0])
@pytest.mark.parametrize("loss", [0.0, 0.3, float("inf")])
def test_curves_of_equal_values_have_an_axis(
    tmp_path: Path, figures: list[Any], accuracy: float, loss: float
) -> None:
    scores = {"loss": loss, "accuracy": accuracy, "learning_rate": 0.0}
    records = [{"step": step, "kind": "train", **scores} for step in (1, 2, 3)]
    records += [{"step": 3, "kind": kind, **scores} for kind in ("validation", "test")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.learning_curves(records, tmp_path / "curves.png", steps_per_epoch=3)
    low, high = figures[0].axes[1].get_ylim()
    assert low < high
    if accuracy == 1.0:
        assert low < 1 <= high < 1.01


@pytest.mark.parametrize("names", [("US$ a", "CA$ b"), ("$x^$", "b"), ("_a", "_b"), ("猫", "犬")])
def test_names_are_drawn_as_they_are(tmp_path: Path, figures: list[Any], names: Any) -> None:
    probabilities, labels = predictions(20, 2)
    images = np.zeros((20, 4, 4, 1))
    path = tmp_path / "figure.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.confusion_matrix(np.array([[9, 1], [2, 8]]), names, path)
        plots.roc_curves(probabilities, labels, names, path)
        plots.worst_classified(images, labels, probabilities, names, path)
        plots.image_grid(np.full((2, 4, 4, 1), 7.0), names, path)
        plots.interval_chart(names, [0.5, 0.6], [0.1, 0.1], "x", path)
        plots.accuracy_by_labels({name: [(1, 0.5, 0.1)] for name in names}, path)
    (legend,) = [axes.get_legend() for axes in figures[1].axes]
    shown = [text.get_text().replace("\\$", "$").strip() for text in legend.get_texts()]
    assert [text.split("  ")[0] for text in shown[:2]] == list(names)


def test_a_figure_that_fails_is_one_line(tmp_path: Path, capsys: Any) -> None:
    def fails(path: Path) -> None:
        path.write_bytes(b"half a picture")
        raise MemoryError("no room\nfor it")

    path = tmp_path / "figure.png"
    assert not plots.attempt(fails, path)
    assert capsys.readouterr().err == (
        f"warning: no figure {path} (MemoryError: no room for it); nothing else is lost\n"
    )
    assert not path.exists()
    # A file where its folder should be.
    path.write_text("")
    grid = np.zeros((1, 4, 4, 1))
    assert not plots.attempt(lambda where: plots.image_grid(grid, (), where), path / "x.png")
    assert capsys.readouterr().err.count("\n") == 1
    assert plots.attempt(lambda where: plots.image_grid(grid, (), where), tmp_path / "y" / "x.png")
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyboardInterrupt):
        plots.attempt(lambda where: (_ for _ in ()).throw(KeyboardInterrupt), path)


def test_class_names_are_drawn_literally(tmp_path: Path) -> None:
    # Between two dollar signs Matplotlib reads a formula, which this is not.
    names = ["$x_{$", "a$b", "\\$", "_c"]
    confusion = np.eye(4, dtype=int) * 3
    assert plots.confusion_matrix(confusion, names, tmp_path / "confusion.png").exists()
    probabilities = np.full((8, 4), 0.25)
    labels = np.arange(8) % 4
    assert plots.roc_curves(probabilities, labels, names, tmp_path / "roc.png").exists()
    images = np.zeros((8, 3, 3, 1), np.uint8)
    path = tmp_path / "worst.png"
    assert plots.worst_classified(images, labels, probabilities, names, path).exists()
    assert plots.image_grid(images[:4], names, tmp_path / "grid.png").exists()
    assert plots.prediction(images[0], images[0], probabilities[0], names, path).exists()
