"""All scores of a classifier in one table: accuracy, corruptions, FGSM, calibration.

Images are read once, a batch at a time: each batch is damaged in 19 ways at five severities and
classified, so that memory does not grow with the dataset. Draws depend on the seed and on the
place of an image, not on how the images are cut into batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import aligned, metrics, plots, rng, robust
from cnnjax.augment import apply_per_image, corruptions
from cnnjax.data.packaged.imagenet import TestImages
from cnnjax.devices.sharding import make_mesh
from cnnjax.errors import UserError
from cnnjax.evaluation import calibration, corruption_error, ensemble
from cnnjax.evaluation.corruption_error import Errors
from cnnjax.evaluation.ensemble import ModelLogits
from cnnjax.run import files
from cnnjax.train.evaluate import compile_predict, predict_all
from cnnjax.train.predict import as_float

# In units of 1 / 255.
EPSILONS = (1, 2, 4, 8, 16, 32, 64)
LARGEST_BATCH, SMALLEST_BATCH, BATCH_VALUES = 500, 16, 2**23
MEAN = "mean corruption error"
SEVERITIES = corruptions.SEVERITIES
Batches = Callable[[], Iterable[Mapping[str, Any]]]


class Subject(NamedTuple):
    """A classifier, or several as one: `(variables, image in [0, 1]) -> logits`."""

    logits_of: ModelLogits
    variables: Any


class Row(NamedTuple):
    """A row of the table: a score, by severity where it has them, and against a reference."""

    name: str
    value: float
    by_severity: tuple[float, ...] = ()
    relative_to: float | None = None
    relative: float | None = None


def batch_size(image_shape: Sequence[int]) -> int:
    """Returns how many images are classified at once."""
    fitting = BATCH_VALUES // math.prod(image_shape)
    return int(np.clip(fitting, SMALLEST_BATCH, LARGEST_BATCH))


def corrupted_errors(
    subjects: Sequence[Subject],
    batches: Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    names: Sequence[str] = corruptions.NAMES,
    tell: Callable[[int], None] = lambda count: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the errors of classifiers under corruptions.

    Args:
      subjects: which; all get the same damaged images.
      batches: of `image` (uint8, or float in [0, 1]), `label` and `mask`.
      seed: of the corruptions.
      names: which corruptions.
      tell: called with the number of images after each batch.

    Returns:
      Errors on images as they are, `[subjects]`, and under corruptions, `[subjects, corruptions,
      severities]`, in [0, 1].
    """
    wrong = [jax.jit(_wrong(subject.logits_of)) for subject in subjects]
    damage = [jax.jit(_all_severities(name, seed)) for name in names]
    clean = np.zeros(len(subjects), np.int64)
    counts = np.zeros((len(subjects), len(names), len(SEVERITIES)), np.int64)
    first = total = 0
    for batch in batches:
        image, label, mask = (np.asarray(batch[key]) for key in ("image", "label", "mask"))
        for index, subject in enumerate(subjects):
            clean[index] += int(wrong[index](subject.variables, image, label, mask))
        for place, function in enumerate(damage):
            for severity, damaged in enumerate(function(image, first)):
                for index, subject in enumerate(subjects):
                    found = wrong[index](subject.variables, damaged, label, mask)
                    counts[index, place, severity] += int(found)
        first, total = first + len(image), total + int(mask.sum())
        tell(total)
    return clean / total, counts / total


def _wrong(logits_of: ModelLogits) -> Callable[..., jax.Array]:
    def count(variables: Any, image: jax.Array, label: jax.Array, mask: jax.Array) -> jax.Array:
        predicted = metrics.predicted_label(logits_of(variables, as_float(image)))
        return jnp.sum((predicted != label) & mask)

    return count


def _all_severities(name: str, seed: int) -> Callable[..., list[jax.Array]]:
    """Returns `(images, first index) -> damaged images` at each severity, as bytes."""
    functions = [corruptions.corruption(name, severity) for severity in SEVERITIES]

    def damage(image: jax.Array, first: jax.Array) -> list[jax.Array]:
        stored = image
        if image.dtype != jnp.uint8:
            stored = jnp.round(255 * jnp.clip(image, 0, 1)).astype(jnp.uint8)
        return [
            apply_per_image(rng.stream_key(seed, f"corrupt {name}", severity), stored, each, first)
            for severity, each in zip(SEVERITIES, functions, strict=True)
        ]

    return damage


def fgsm_accuracies(subject: Subject, batches: Batches) -> dict[str, float]:
    """Returns the accuracy under FGSM, by attack, of `EPSILONS`."""
    attacks = [robust.make_attack("fgsm", epsilon / 255) for epsilon in EPSILONS]
    found = robust.robust_accuracies(subject.logits_of, subject.variables, batches, attacks)
    return dict(zip((f"FGSM {epsilon}/255" for epsilon in EPSILONS), found.values(), strict=True))


def calibration_scores(logits: Any, labels: Any, temperature: float = 1.0) -> dict[str, float]:
    """Returns expected calibration error, loss and Brier score of `softmax(logits / T)`.

    Args:
      logits: `[examples, classes]`, or log probabilities.
      labels: integers `[examples]`.
      temperature: T.
    """
    probabilities = calibration.apply_temperature(logits, temperature)
    error = metrics.expected_calibration_error(probabilities, labels)
    return {
        "expected calibration error": float(error),
        "negative log-likelihood": calibration.negative_log_likelihood(logits, labels, temperature),
        "Brier score": calibration.brier_score(probabilities, labels),
    }


def corruption_rows(errors: np.ndarray, clean: float, reference: Errors | None) -> list[Row]:
    """Returns a row for each corruption, and those of the means.

    Args:
      errors: `[19, severities]`.
      clean: the error on images as they are.
      reference: whose errors they are divided by.
    """
    means = dict(zip(corruptions.NAMES, errors.mean(1).tolist(), strict=True))
    own = Errors(clean, means)
    ratios = corruption_error.corruption_errors(own, reference) if reference else {}
    relative = corruption_error.relative_corruption_errors(own, reference) if reference else {}
    rows = [
        Row(name, mean, tuple(by_severity), ratios.get(name), relative.get(name))
        for (name, mean), by_severity in zip(means.items(), errors.tolist(), strict=True)
    ]
    counted = errors[: len(corruptions.COUNTED)]
    mean = Row(
        f"{MEAN} ({len(counted)})",
        corruption_error.mean_error(own),
        tuple(counted.mean(0).tolist()),
        corruption_error.mean_of_counted(ratios) if reference else None,
        corruption_error.mean_of_defined(relative) if reference else None,
    )
    return [*rows[: len(counted)], mean, *rows[len(counted) :]]


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Returns the rows as plain values, None where a score is not defined."""

    def plain(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return [
        {
            "name": row.name,
            "value": plain(row.value),
            "by_severity": list(row.by_severity),
            "corruption_error": plain(row.relative_to),
            "relative_corruption_error": plain(row.relative),
        }
        for row in rows
    ]


def markdown(rows: Sequence[Row]) -> str:
    """Returns the table as Markdown whose columns are aligned, to be read as it is."""
    with_reference = any(row.relative_to is not None for row in rows)
    heads = ["score", "value", *map(str, SEVERITIES), *(["CE", "relative CE"] * with_reference)]
    table = [heads, *(list(_cells(row, with_reference)) for row in rows)]
    head, *body = aligned.padded(table, "lr")
    first, *others = ("-" * (len(cell) - 1) for cell in head)
    rule = [f":{first}", *(f"{dashes}:" for dashes in others)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def _cells(row: Row, with_reference: bool) -> Iterator[str]:
    yield row.name
    yield f"{row.value:.4f}"
    yield from (f"{value:.4f}" for value in row.by_severity)
    yield from [""] * (len(SEVERITIES) - len(row.by_severity))
    if with_reference:
        for value in (row.relative_to, row.relative):
            defined = value is not None and math.isfinite(value)
            yield f"{value:.3f}" if defined else "-" if row.by_severity else ""


class Full(NamedTuple):
    """What `full` returns.

    Attributes:
      rows: of the table.
      errors: `[19, severities]` under corruptions.
      clean: the error on images as they are.
      temperature: fitted to held-out images, or None.
      seconds: by part.
      seed: of the corruptions.
    """

    rows: list[Row]
    errors: np.ndarray
    clean: float
    temperature: float | None
    seconds: dict[str, float]
    seed: int


def full(
    subject: Subject,
    batches: Batches,
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    held: tuple[np.ndarray, np.ndarray] | None = None,
    reference: Subject | Errors | None = None,
    seed: int = 0,
    tell: Callable[[int], None] = lambda count: None,
) -> Full:
    """Scores a classifier in every way.

    Args:
      subject: the classifier.
      batches: called for each pass over the images; see `corrupted_errors`.
      logits: of the images as they are, `[examples, classes]`, or log probabilities.
      labels: integers `[examples]`.
      held: logits and labels that a temperature is fitted to; None for no temperature.
      reference: another classifier of the same images, or published errors.
      seed: of the corruptions.
      tell: called with the number of images after each batch under corruptions.
    """
    start = time.perf_counter()
    subjects = [subject, *([reference] if isinstance(reference, Subject) else [])]
    clean, errors = corrupted_errors(subjects, batches(), seed=seed, tell=tell)
    known = reference if isinstance(reference, Errors) else None
    if len(subjects) > 1:
        means = dict(zip(corruptions.NAMES, errors[1].mean(1).tolist(), strict=True))
        known = Errors(float(clean[1]), means)
    middle = time.perf_counter()
    attacked = fgsm_accuracies(subject, batches)
    seconds = {"corruptions": middle - start, "FGSM": time.perf_counter() - middle}
    temperature = calibration.fit_temperature(*held) if held else None
    calibrated = calibration_scores(logits, labels)
    if temperature is not None:
        after = calibration_scores(logits, labels, temperature)
        calibrated |= {f"{name}, temperature {temperature:.3f}": v for name, v in after.items()}
    rows = [
        Row("accuracy", 1 - float(clean[0])),
        *(Row(f"accuracy under {name}", value) for name, value in attacked.items()),
        *(Row(name, value) for name, value in calibrated.items()),
        *corruption_rows(errors[0], float(clean[0]), known),
    ]
    return Full(rows, errors[0], float(clean[0]), temperature, seconds, seed)


def of_published(trained: Any, images: TestImages, *, seed: int = 0) -> Full:
    """Scores published weights of ImageNet's classes, against AlexNet's published errors.

    Args:
      trained: a `run.load.TrainedModel` with 1000 classes.
      images: of the same classes, or some of them: the others cannot be predicted.
      seed: of the corruptions.

    Raises:
      UserError: a dataset of which only the classes that have images count.
    """
    if images.only_present:
        raise UserError(
            f"--full of {images.name}: its errors count among the classes with images alone; take "
            "ImageNet itself."
        )
    whole = ensemble.model_logits(trained.model, trained.normalize)

    def logits_of(variables: Any, image: jax.Array) -> jax.Array:
        return whole(variables, image)[:, images.rows]

    size = batch_size(trained.card["image_shape"])
    predict = compile_predict(ensemble.log_probabilities(logits_of), make_mesh(1))
    logits, kept = predict_all(predict, trained.variables, images.batches(size))
    return full(
        Subject(logits_of, trained.variables),
        lambda: images.batches(size),
        logits,
        kept["label"],
        reference=corruption_error.published_reference(),
        seed=seed,
    )


def tell(
    found: Full, out: Path | None, title: str, reference: str = ""
) -> tuple[dict[str, Any], dict[str, Callable[[Path], Any]]]:
    """Prints the table, writes it, and returns its values and its figure.

    Args:
      found: of `full`.
      out: where `full.md` and `full.json` go, if anywhere.
      title: of `full.md`.
      reference: the run that errors were divided by; "" is AlexNet as published.
    """
    mean = next(row for row in found.rows if row.name.startswith(MEAN))
    against = reference or "AlexNet as published"
    told = [f"seed {found.seed}"]
    told += [f"{name} {seconds:.1f} s" for name, seconds in found.seconds.items()]
    if mean.relative_to is not None:
        counted = found.rows[found.rows.index(mean) - len(corruptions.COUNTED) :]
        defined = sum(math.isfinite(row.relative or math.nan) for row in counted[:15])
        told += [f"CE against {against}", f"relative CE of the {defined} under which it errs more"]
    table, line = markdown(found.rows), "; ".join(told)
    print(f"\n{table}\n{line}")
    values = {
        "rows": as_json(found.rows),
        "temperature": found.temperature,
        "seed": found.seed,
        "reference": against if mean.relative_to is not None else None,
        "seconds": found.seconds,
    }
    if out is not None:
        (out / "full.md").write_text(f"# {title}\n\n{table}\n\n{line}\n", encoding="utf-8")
        files.write_json(out / "full.json", values)

    def draw(path: Path) -> Path:
        names, counted = corruptions.NAMES, len(corruptions.COUNTED)
        return plots.corruption_errors(found.errors, names, found.clean, counted, path)

    return values, {"corruptions": draw}
