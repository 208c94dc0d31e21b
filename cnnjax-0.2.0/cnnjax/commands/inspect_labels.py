"""Rank a run's training images by how likely their labels are wrong, and draw the worst.

    cnnjax inspect-labels --run runs/a
    cnnjax inspect-labels --run runs/a runs/b runs/c --score el2n
    python -m experiments.classify --exclude runs/a/labels/exclude.txt

Networks learn what examples have in common before they learn wrong labels by heart: take runs of a
few epochs, or regularized ones. Several runs on the same training images are averaged. It writes
`ranking.csv` (every image, the most suspicious first), `exclude.txt` (indices for `--exclude`) and
`suspicious.png`. Where the labels were made wrong on purpose (`--label-noise`) it also says how
many of the wrong ones it finds.
"""

import csv
import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

import cnnjax
from cnnjax.data.dataset import Arrays
from cnnjax.errors import UserError
from cnnjax.run import files, load

BATCH_SIZE = 500


@dataclasses.dataclass(frozen=True)
class Config:
    """Rank training images by suspicion; write the ranking, a list to exclude, and a picture."""

    run: tuple[str, ...]
    """Run directories with the same training images; their scores are averaged."""

    score: Literal["loss", "margin", "el2n"] = "loss"
    """Cross-entropy of the label, margin by which another class is likelier, or length of the
    error (Paul et al. 2021)."""

    count: int = 0
    """Images to exclude; 0 takes all of which the runs together find another class likeliest."""

    top: int = 25
    """Images to draw."""

    dataset: str = ""
    """Where the runs' data are now, such as folder:NEW; by default where they were."""

    data_dir: str = ""
    """Where tfds datasets are; by default the run's own."""

    out: str = ""
    """Where to write; by default RUN/labels of the first run."""


def main(config: Config) -> None:
    """Ranks the training images of one run or several."""
    from cnnjax.evaluation import label_quality

    if not config.run:
        raise UserError("no run given: name one, such as --run runs/mine.")
    out = Path(config.out or Path(config.run[0]) / "labels")
    cnnjax.devices.backend.start(devices=1)
    members = [load.load_classifier(run) for run in config.run]
    files.make_directory(out, "the directory of rankings", "--out")
    truth, train = _training_data(config, config.run[0])
    for run in config.run[1:]:
        _, other = _training_data(config, run)
        if not all(np.array_equal(a, b) for a, b in zip(train, other, strict=True)):
            raise UserError(
                f"{run} was trained on other images than {config.run[0]}: rank them one by one."
            )
    if not 0 <= config.count < len(train.label):
        raise UserError(
            f"--count {config.count}: give 0, or fewer than the {len(train.label)} training images."
        )
    probabilities = [_predict(member, train) for member in members]
    order, scores = label_quality.rank(config.score, probabilities, train.label)
    predicted = np.mean(probabilities, axis=0).argmax(axis=1)
    count = config.count or int(np.sum(predicted != train.label))
    excluded = np.sort(order[:count])

    _write(out, order, scores, train.label, predicted, excluded)
    names = members[0].card["class_names"]
    worst = order[: config.top]
    titles = [
        f"{index}: {names[train.label[index]]}\npredicted {names[predicted[index]]}"
        for index in worst
    ]
    cnnjax.plots.attempt(
        lambda path: cnnjax.plots.image_grid(train.image[worst], titles, path),
        out / "suspicious.png",
    )
    print(
        f"{len(order):,} training images ranked by {config.score}; {count:,} to exclude, in "
        f"{out / 'exclude.txt'}"
    )
    is_wrong = train.label != truth
    if is_wrong.any():
        found = label_quality.detection(order, is_wrong)
        hit = float(is_wrong[excluded].mean()) if count else float("nan")
        found |= {
            "excluded": count,
            "precision_of_excluded": hit,
            "recall_of_excluded": float(is_wrong[excluded].sum() / is_wrong.sum()),
        }
        files.write_json(out / "detection.json", found)
        print(
            f"{found['share']:.1%} of the labels are wrong on purpose: the ranking finds "
            f"{found['recall']:.1%} of them at 90% precision (average precision "
            f"{found['average_precision']:.4f}); of those to exclude {hit:.1%} are wrong, which is "
            f"{found['recall_of_excluded']:.1%} of all wrong ones"
        )


def _training_data(config, run):
    """Returns the labels as they were, and the images and labels that a run may exclude from."""
    from cnnjax.run import again, classifier

    if config.dataset:
        again.data_of_run(Path(run), dataset=config.dataset, data_dir=config.data_dir)
    settings = again.settings_of_run(run)
    whole = dataclasses.replace(
        settings,
        exclude="",
        balance="none",
        pipeline="resident",
        dataset=config.dataset or settings.dataset,
        data_dir=config.data_dir or settings.data_dir,
    )
    noisy = classifier.read_data(whole)
    clean = classifier.read_data(dataclasses.replace(whole, label_noise=0.0))
    return clean.train.label, noisy.train


def _predict(member, train: Arrays):
    predict = cnnjax.train.evaluate.compile_predict(
        cnnjax.train.predict.make_predict(
            member.model,
            cnnjax.tasks.classification.classification(len(member.card["class_names"])),
            normalize=member.normalize,
        ),
        cnnjax.devices.sharding.make_mesh(1),
    )
    batches = cnnjax.data.evaluation_batches(train, BATCH_SIZE)
    return cnnjax.train.evaluate.predict_all(predict, member.variables, batches)[0]


def _write(out, order, scores, labels, predicted, excluded):
    with (out / "ranking.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["index", "label", "predicted", "score"])
        for index in order:
            table.writerow([index, labels[index], predicted[index], f"{scores[index]:.6g}"])
    (out / "exclude.txt").write_text("".join(f"{index}\n" for index in excluded), encoding="utf-8")
