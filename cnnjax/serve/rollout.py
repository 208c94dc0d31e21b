"""Which version of a model answers a request: weights, shadow, and the way back. Pure functions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from cnnjax.serve.refusals import Invalid, unknown


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How the traffic of a model is divided.

    Attributes:
      weights: version -> its fraction of the requests; they sum to 1.
      shadow: a version that gets all requests too, whose answers are compared and not sent; or "".
    """

    weights: Mapping[str, float]
    shadow: str = ""

    def said(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return {"weights": dict(self.weights), "shadow": self.shadow}


def all_to(version: str) -> Rollout:
    """Returns the rollout in which one version answers everything."""
    return Rollout({version: 1.0})


def choose(rollout: Rollout, request_id: str) -> str:
    """Returns the version that answers a request.

    It is a function of the request's id alone: a request that is tried again gets the same one.
    """
    if len(rollout.weights) == 1:
        return next(iter(rollout.weights))
    digest = hashlib.blake2b(request_id.encode(errors="replace"), digest_size=8).digest()
    place, total = int.from_bytes(digest) / 2**64, 0.0
    for version, weight in rollout.weights.items():
        total += weight
        if place < total:
            return version
    return max(rollout.weights, key=rollout.weights.__getitem__)


def read_rollout(content: Mapping[str, Any], versions: Iterable[str]) -> Rollout:
    """Returns the rollout that JSON describes, `{"weights": {"1": 0.9, "2": 0.1}, "shadow": "3"}`.

    Weights need not sum to 1; those of 0 are left out.

    Args:
      content: the JSON object.
      versions: that are loaded.

    Raises:
      Invalid, Unknown: what is wrong with it.
    """
    versions = sorted(versions)
    if extra := sorted(map(str, content.keys() - {"weights", "shadow"})):
        raise Invalid(f"a rollout has weights and shadow, and no {extra[0][:50]!r}.")
    weights, shadow = content.get("weights"), content.get("shadow", "")
    if not isinstance(weights, dict) or not isinstance(shadow, str):
        raise Invalid('give {"weights": {VERSION: FRACTION}, "shadow": VERSION}.')
    for version in (*weights, *([shadow] if shadow else [])):
        if version not in versions:
            raise unknown("version", version, versions)
    for version, weight in weights.items():
        if type(weight) not in (int, float) or not 0 <= weight <= 1e6:
            raise Invalid(f"the weight of version {version} is no number of 0 or more.")
    total = sum(weights.values())
    if not total:
        raise Invalid("no version has a weight above 0: give one.")
    if shadow and weights.get(shadow):
        raise Invalid(f"version {shadow} cannot both answer and be the shadow.")
    return Rollout({name: weight / total for name, weight in weights.items() if weight}, shadow)


@dataclasses.dataclass
class Compared:
    """Answers of a shadow beside those that were sent.

    Attributes:
      images: that both answered.
      agreed: of these, with the same likeliest class.
      largest_difference: of a probability.
      dropped: images that the shadow was too busy for, or failed at.
    """

    images: int = 0
    agreed: int = 0
    largest_difference: float = 0.0
    dropped: int = 0

    def add(self, sent: np.ndarray, shadow: np.ndarray) -> None:
        """Compares probabilities `[images, classes]`."""
        self.images += len(sent)
        self.agreed += int(np.sum(sent.argmax(-1) == shadow.argmax(-1)))
        difference = float(np.abs(sent - shadow).max())
        self.largest_difference = max(self.largest_difference, difference)

    def said(self) -> dict[str, Any]:
        """Returns it as JSON has it."""
        return dataclasses.asdict(self) | {
            "agreement": self.agreed / self.images if self.images else None
        }
