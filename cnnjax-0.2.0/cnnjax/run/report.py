"""The outputs of a finished run: figures, `summary.json` and `summary.md`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax import plots
from cnnjax.run import files
from cnnjax.run.logs import read_metrics
from cnnjax.trees import named_leaves


def write_figures(
    directory: Path,
    params: Any,
    figures: Mapping[str, Callable[[Path], Any]],
    *,
    score: str,
    steps_per_epoch: int,
) -> list[Path]:
    """Draws a run's pictures into `directory / "figures"`; returns the paths of those there are.

    Args:
      directory: the run directory, with its metrics.
      params: the model's parameters; the first convolution's kernel is drawn, if there is one.
      figures: those of the task's report: name -> `draw(path)`.
      score: the monitored metric, drawn besides the loss.
      steps_per_epoch: the scale of the learning curves.
    """

    def curves(path: Path) -> None:
        records = read_metrics(directory)
        plots.learning_curves(records, path, score=score, steps_per_epoch=steps_per_epoch)

    drawn = {"learning_curves": curves, **figures}
    kernels = [leaf for leaf in named_leaves(params).values() if np.ndim(leaf) == 4]
    if kernels:
        drawn["filters"] = lambda path: plots.filters(np.asarray(kernels[0]), path)
    return draw_figures(directory / "figures", drawn)


def draw_figures(directory: Path, figures: Mapping[str, Callable[[Path], Any]]) -> list[Path]:
    """Draws each figure into a file of its name; returns the paths of those that did not fail."""
    paths = {name: directory / f"{name}.png" for name in figures}
    return [paths[name] for name, draw in figures.items() if plots.attempt(draw, paths[name])]


def write_summary(directory: Path, summary: dict[str, Any], scores: str) -> None:
    """Writes `summary.md`, then `summary.json`, whose presence says that the run is finished.

    Args:
      directory: the run directory.
      summary: at least `experiment`, `model`, `dataset`, `monitor` and, where it was tested, the
        test's score of that name, `parameters`, `seconds`, `seed` and `step`.
      scores: the table of scores by class, as text.
    """
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in summary.items())
    figures = "\n".join(
        f"![{path.stem}](figures/{path.name})"
        for path in sorted((directory / "figures").glob("*.png"))
    )
    text = (
        f"# {summary['experiment']}: {score_text(summary)}\n\n"
        f"| | |\n|---|---|\n{rows}\n\n```\n{scores}\n```\n\n{figures}\n"
    )
    (directory / "summary.md").write_text(text, encoding="utf-8")
    files.write_json(directory / "summary.json", summary)


def score_text(summary: Mapping[str, Any]) -> str:
    """Returns the score of a summary in words, such as `99.10% on the test set`."""
    name = summary.get("monitor", "accuracy")
    tested = summary.get(f"test_{name}")
    score = summary.get(f"best_validation_{name}") if tested is None else tested
    if score is None:
        return "not scored"
    text = f"{score:.2%}" if name == "accuracy" else f"{name} {score:.4f}"
    return f"{text} on the {'validation' if tested is None else 'test'} set"


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
