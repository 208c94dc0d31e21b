"""The losses of distillation by name, as a setting writes them: `logits(weight=0.9), attention`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax

from cnnjax import spec
from cnnjax.distill import losses
from cnnjax.errors import UserError

KIND = "distillation loss"
LOGITS = "logits"
Pairs = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of a distillation.

    Attributes:
      name: of the loss.
      weight: its factor.
      loss: `(student's array, teacher's array) -> [batch]`; of a whole batch's examples also
        `(..., counts)`.
      pairs: the names of a layer of the student and of the teacher, which the loss compares; of
        `logits` none, for it compares the outputs; of others none until they are chosen.
      of: what is compared: `outputs`, `images` (layers with height and width), `hints` (any layers,
        the student's projected), or `embeddings` (relations between the examples of a batch).
    """

    name: str
    weight: float
    loss: Callable[..., jax.Array]
    of: str
    pairs: Pairs = ()


def logits(temperature: float = 4.0, weight: float = 0.9) -> Term:
    """The teacher's softened probabilities: see `losses.softened_divergence`."""
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature={temperature:g}: give a positive number")
    loss = functools.partial(losses.softened_divergence, temperature=temperature)
    return _term(LOGITS, weight, loss, "outputs")


def features(weight: float = 1.0, layers: str | tuple[str, ...] = "") -> Term:
    """The teacher's layers, from projections of the student's: see `losses.hint_loss`."""
    return _term("features", weight, losses.hint_loss, "hints", layers)


def attention(
    weight: float = 1000.0, layers: str | tuple[str, ...] = "", power: float = 2.0
) -> Term:
    """Where the teacher's layers look: see `losses.attention_loss`.

    The weight is that of Zagoruyko and Komodakis 2017, section 4.1.
    """
    if not 0 < power < math.inf:
        raise UserError(f"power={power:g}: give a positive number")
    loss = functools.partial(losses.attention_loss, power=power)
    return _term("attention", weight, loss, "images", layers)


def rkd_distance(weight: float = 25.0, layers: str | tuple[str, ...] = "") -> Term:
    """Distances between the examples of a batch: see `losses.distance_loss`."""
    return _term("rkd_distance", weight, losses.distance_loss, "embeddings", layers)


def rkd_angle(weight: float = 50.0, layers: str | tuple[str, ...] = "") -> Term:
    """Angles between the examples of a batch: see `losses.angle_loss`."""
    return _term("rkd_angle", weight, losses.angle_loss, "embeddings", layers)


LOSSES: dict[str, Callable[..., Term]] = {
    LOGITS: logits,
    "features": features,
    "attention": attention,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
}


def read(text: str) -> tuple[Term, ...]:
    """Reads losses such as `logits(temperature=4), attention(layers=(conv1:stage1, conv2:stage2))`.

    A pair of layers is `STUDENT:TEACHER`, or one name for both; several stand in brackets.

    Raises:
      UserError: none, one that is unknown or given twice, or arguments that do not fit.
    """
    terms = tuple(spec.call(item, LOSSES, KIND) for item in spec.parse(text, KIND))
    if not terms:
        raise UserError(f"no {KIND} given: name one, such as {LOGITS}(temperature=4).")
    names = [term.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{KIND} {name} is given twice: give it once, with layers=(A:B, C:D) for several."
            )
    return terms


def label_weight(terms: tuple[Term, ...]) -> float:
    """Returns the weight of the labels where nobody says: with that of `logits` it makes 1.

    Hinton et al. 2015, section 2: a weighted average of two objectives.
    """
    weights = [term.weight for term in terms if term.name == LOGITS]
    return max(0.0, 1.0 - weights[0]) if weights else 1.0


def check_numbers(*, label_weight: float, generations: int) -> None:
    """Raises a UserError for a weight of labels that is neither -1 nor 0 or more, or generations
    below 0."""
    if label_weight != -1 and not 0 <= label_weight < math.inf:
        raise UserError(f"--label-weight {label_weight:g}: give 0 or more, or -1 for its default.")
    if generations < 0:
        raise UserError(f"--generations {generations}: give 0 or more.")


def _term(name: str, weight: float, loss: Any, of: str, layers: str | tuple[str, ...] = "") -> Term:
    if not 0 < weight < math.inf:
        raise UserError(f"weight={weight:g}: give a positive number")
    return Term(name, weight, loss, of, _read_pairs(layers))


def _read_pairs(layers: str | tuple[str, ...]) -> Pairs:
    if isinstance(layers, str):
        layers = tuple(layers.strip().removeprefix("(").removesuffix(")").split(","))
    pairs = []
    for word in (word.strip() for word in layers):
        student, colon, teacher = (part.strip() for part in word.partition(":"))
        if not word:
            continue
        if not student or (colon and not teacher) or ":" in teacher:
            raise UserError(f"layers={word!r}: write a pair as STUDENT:TEACHER")
        pairs.append((student, teacher or student))
    return tuple(pairs)
