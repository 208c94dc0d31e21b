"""The outputs of a finished run: figures, `summary.json`, `summary.md` and `reference.npz`."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax import plots
from cnnjax.data.streamed import LabeledDataset, split_batches, split_size
from cnnjax.errors import UserError
from cnnjax.evaluation import references
from cnnjax.evaluation.drift import Reference
from cnnjax.run import files, load
from cnnjax.run.logs import read_metrics
from cnnjax.trees import named_leaves

# What a server compares its traffic with.
REFERENCE = "reference.npz"
BATCH_SIZE, MOST_EXAMPLES = 250, 10_000
Answer = Callable[[Any], tuple[np.ndarray, np.ndarray]]


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
    figures = "\n".join(f"![{path.stem}](figures/{path.name})" for path in files.figures(directory))
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


def answer_of(trained: load.TrainedModel) -> Answer:
    """Returns `images [batch, height, width, channels] -> (logits [batch, classes], embeddings
    [batch, features])`, compiled once for each batch size; embeddings are what enters the head."""
    import jax

    @jax.jit
    def answer(variables: Any, images: Any) -> tuple[Any, Any]:
        logits = trained.model.apply(variables, trained.normalize(images), train=False)
        features = dataclasses.replace(trained, variables=variables).features
        embeddings = features(images)
        return logits, embeddings.reshape(len(embeddings), -1)

    def answered(images: Any) -> tuple[np.ndarray, np.ndarray]:
        logits, embeddings = answer(trained.variables, np.asarray(images))
        return np.asarray(logits, np.float32), np.asarray(embeddings, np.float32)

    return answered


def leave_reference(
    directory: str | Path, dataset: LabeledDataset, *, window: int = references.WINDOW
) -> Reference:
    """Makes the reference of a trained classifier, of images that it was not trained on.

    Args:
      directory: of the run, which gets the file `reference.npz`.
      dataset: whose validation split is taken, at most 10,000 images of it.
      window: number of images that are compared at a time.

    Raises:
      UserError: no classifier, too few images, or the file cannot be written.
    """
    size = split_size(dataset, "validation")
    if size < references.LEAST_EXAMPLES:
        raise UserError(
            f"a reference needs {references.LEAST_EXAMPLES:,} validation images, and "
            f"{dataset.name} has {size:,}: train with a larger --validation."
        )
    trained = load.load_classifier(directory)
    answer = answer_of(trained)
    parts: list[tuple[np.ndarray, ...]] = []
    batches = split_batches(dataset, "validation", BATCH_SIZE)
    for batch in itertools.islice(batches, -(-MOST_EXAMPLES // BATCH_SIZE)):
        mask = np.asarray(batch["mask"])
        found = (batch["image"], *answer(batch["image"]), batch["label"])
        parts.append(tuple(np.asarray(each)[mask] for each in found))
    images, logits, embeddings, labels = map(np.concatenate, zip(*parts, strict=True))
    reference = references.make_reference(
        images, logits, embeddings, labels, window=window, step=trained.step
    )
    path = Path(directory) / REFERENCE
    try:
        references.save_reference(path, reference)
    except OSError as error:
        raise UserError(f"cannot write the reference {path}: {error.strerror}") from None
    return reference
