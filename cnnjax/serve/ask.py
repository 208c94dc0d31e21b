"""One request for a model's answer, whatever way it came: the version, its images, its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cnnjax.serve.http.pictures import decode_all
from cnnjax.serve.protocol import Answer
from cnnjax.serve.repository import Repository


async def ask(
    repository: Repository,
    name: str,
    given: np.ndarray | Sequence[bytes],
    *,
    version: str = "",
    request_id: str,
    deadline_secs: float,
    most_pixels: int,
    note: Callable[[dict[str, Any]], None],
) -> tuple[np.ndarray, Answer]:
    """Returns the images that a model was given, and its answer.

    Args:
      repository: of models.
      name, version: of the model; without a version the rollout chooses.
      given: images `[images, height, width, channels]`, or contents of image files.
      request_id: of the request.
      deadline_secs: after which the answer is of no use.
      most_pixels: of an image file.
      note: is told model, version and number of images, for the log, before they are computed.

    Raises:
      Refused: why there is no answer.
    """
    version, found = repository.find(name, version, request_id)
    if isinstance(given, np.ndarray):
        images = given
    else:
        images = await decode_all(given, found.runtime, most_pixels=most_pixels)
    note({"model": name, "version": version, "images": len(images)})
    answer = await repository.infer(
        name, images, version=version, request_id=request_id, deadline_secs=deadline_secs
    )
    return images, answer
