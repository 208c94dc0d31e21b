"""Evaluate a trained run: scores by class, calibration, figures.

python -m experiments.evaluate --run runs/mnist_lenet-20250101-120000
"""

import dataclasses
from pathlib import Path
from typing import Literal

import cnnjax
from cnnjax import cli, runs
from cnnjax.errors import UserError

BATCH_SIZE = 500


@dataclasses.dataclass(frozen=True)
class Config:
    """Print accuracy, precision, recall, F1, ROC AUC and calibration of a run; draw its figures."""

    run: str
    """The run directory."""

    split: Literal["test", "validation", "train"] = "test"
    """What to evaluate on."""

    dataset: str = ""
    """Another dataset with the same classes; by default the run's own."""

    data_dir: str = ""
    """Where tfds datasets are; by default the run's own."""

    out: str = ""
    """Where to write evaluation.json and the figures; by default RUN/evaluation-SPLIT."""


def main(config: Config) -> None:
    """Evaluates one run."""
    cnnjax.backend.start(devices=1)
    trained = runs.load_trained(config.run)
    card = trained.card
    settings = runs.read_config(Path(config.run))["settings"]
    dataset = cnnjax.data.open_dataset(
        config.dataset or settings["dataset"],
        pipeline=settings.get("pipeline", "auto"),
        data_dir=config.data_dir or settings["data_dir"] or None,
        classes=settings["classes"],
        validation=settings["validation"],
        seed=settings["seed"],
        image_size=tuple(card["image_shape"][:2]),
    )
    if list(dataset.class_names) != card["class_names"]:
        raise UserError(
            f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but the model was "
            f"trained on {', '.join(card['class_names'])}: choose a dataset with the same ones."
        )
    if list(dataset.image_shape) != card["image_shape"]:
        raise UserError(
            f"{dataset.name} has images of {dataset.image_shape}, but the model takes "
            f"{tuple(card['image_shape'])}: choose a dataset with images of that shape."
        )

    mesh = cnnjax.parallel.make_mesh(1)
    predict = cnnjax.parallel.compile_predict(
        cnnjax.steps.make_predict(trained.model, normalise=trained.normalise), mesh
    )
    batches = cnnjax.data.split_batches(dataset, config.split, BATCH_SIZE)
    probabilities, labels = cnnjax.evaluate.predict_all(predict, trained.variables, batches)
    report = cnnjax.evaluate.report(probabilities, labels, dataset.class_names)
    print(
        f"{config.run}, step {trained.step}, on {len(labels):,} {config.split} images of "
        f"{dataset.name}"
    )
    print(cnnjax.evaluate.format_report(report))

    out = Path(config.out or Path(config.run) / f"evaluation-{config.split}")
    runs.write_json(out / "evaluation.json", report)
    shown = cnnjax.data.first_examples(dataset, config.split)
    figures = cnnjax.report.write_evaluation_figures(
        out, shown, probabilities[: len(shown.label)], dataset.class_names
    )
    print(f"wrote {out / 'evaluation.json'} and {len(figures)} figures in {out / 'figures'}")


if __name__ == "__main__":
    cli.run(Config, main)
