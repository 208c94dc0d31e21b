"""The outputs of a finished run: figures, `summary.json` and `summary.md`."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax import plots
from cnnjax.data.dataset import Arrays
from cnnjax.run import settings
from cnnjax.run.logs import read_metrics
from cnnjax.train import evaluate
from cnnjax.trees import named_leaves


def write_figures(
    directory: Path,
    params: Any,
    test: Arrays,
    probabilities: np.ndarray,
    class_names: tuple[str, ...],
    steps_per_epoch: int,
) -> list[Path]:
    """Draws a run's pictures into `directory / "figures"` and returns their paths.

    Args:
      directory: the run directory, with its metrics.
      params: the model's parameters; the first convolution's kernel is drawn, if there is one.
      test: the test images and labels.
      probabilities: `[test images, classes]`, the model's.
      class_names: one per class.
      steps_per_epoch: the scale of the learning curves.
    """
    curves = functools.partial(plots.learning_curves, steps_per_epoch=steps_per_epoch)
    paths = [
        _draw(directory, "learning_curves", curves, read_metrics(directory)),
        *write_evaluation_figures(directory, test, probabilities, class_names),
    ]
    kernels = [leaf for leaf in named_leaves(params).values() if np.ndim(leaf) == 4]
    if kernels:
        paths.append(_draw(directory, "filters", plots.filters, np.asarray(kernels[0])))
    return paths


def write_evaluation_figures(
    directory: Path, images: Arrays, probabilities: np.ndarray, class_names: tuple[str, ...]
) -> list[Path]:
    """Draws what needs predictions only: confusion, worst images, reliability, ROC curves."""
    label = images.label
    confusion = evaluate.confusion(probabilities, label)
    return [
        _draw(directory, "confusion_matrix", plots.confusion_matrix, confusion, class_names),
        _draw(
            directory,
            "worst_classified",
            plots.worst_classified,
            images.image,
            label,
            probabilities,
            class_names,
        ),
        _draw(directory, "reliability", plots.reliability_diagram, probabilities, label),
        _draw(directory, "roc_curves", plots.roc_curves, probabilities, label, class_names),
    ]


def write_summary(directory: Path, summary: dict[str, Any], scores: str) -> None:
    """Writes `summary.md`, then `summary.json`, whose presence says that the run is finished.

    Args:
      directory: the run directory.
      summary: at least `experiment`, `model`, `dataset`, `test_accuracy`, `parameters`, `seconds`,
        `seed` and `step`.
      scores: the table of scores by class, as text.
    """
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in summary.items())
    figures = "\n".join(
        f"![{path.stem}](figures/{path.name})"
        for path in sorted((directory / "figures").glob("*.png"))
    )
    text = (
        f"# {summary['experiment']}: {summary['test_accuracy']:.2%} on the test set\n\n"
        f"| | |\n|---|---|\n{rows}\n\n```\n{scores}\n```\n\n{figures}\n"
    )
    (directory / "summary.md").write_text(text)
    settings.write_json(directory / "summary.json", summary)


def _draw(directory: Path, name: str, plot: Any, *arguments: Any) -> Path:
    path = directory / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    plot(*arguments, path)
    return path


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
