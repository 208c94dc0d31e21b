"""Pretrained variables, and the digest by which they are known."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np

from cnnjax.checkpoint import manifest
from cnnjax.trees import named_leaves

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Base:
    """Pretrained variables.

    Attributes:
      source: where they were read, for messages.
      variables: `params` and `batch_stats`, nested dicts of NumPy arrays.
      card: the content of `model.json` if they are those of a run (trained here or converted),
        else `{}`.
      checksum: of all of them; see `variables_checksum`.
    """

    source: str
    variables: Variables
    card: dict[str, Any]
    checksum: str


def variables_checksum(variables: Variables) -> str:
    """Returns the SHA-256 over every leaf's collection, path, dtype, shape and values."""
    digest = hashlib.sha256()
    for name in ("params", "batch_stats", "frozen"):
        for path, leaf in sorted(named_leaves(variables.get(name, {})).items()):
            leaf = np.asarray(leaf)
            values = manifest.array_digest(leaf)
            digest.update(f"{name}/{path} {leaf.dtype} {leaf.shape} {values}\n".encode())
    return digest.hexdigest()
