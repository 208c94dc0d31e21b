"""What a trained network costs: objectives beside its scores, measured where it was trained.

python -m cnnjax.search.costs RUN latency_ms macs
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.run import load
from cnnjax.run.files import read_json, write_json

FILE = "costs.json"
# Of a latency: calls that are not counted, and calls of which the median is taken.
WARM_UP, CALLS = 20, 201


def latency_ms(trained: load.TrainedModel) -> float:
    """Returns the median time of one image, from uint8 to outputs, in milliseconds.

    The compiled forward pass at batch size 1, normalization included, on the device that the
    process has; 20 calls warm up, 201 are timed, each until its result is there.
    """
    import jax
    import numpy as np

    from cnnjax import ops
    from cnnjax.train.predict import predicted

    def forward(variables: Any, image: Any) -> Any:
        with ops.outside_loops():
            return predicted(trained.model, variables, trained.normalize(image))

    image = np.random.default_rng(0).integers(0, 256, (1, *_shape(trained)), dtype=np.uint8)
    variables, image = jax.device_put((trained.variables, image))
    compiled = jax.jit(forward).lower(variables, image).compile()
    times = []
    for _ in range(WARM_UP + CALLS):
        began = time.perf_counter()
        jax.block_until_ready(compiled(variables, image))
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times[WARM_UP:])


def macs(trained: load.TrainedModel) -> float:
    """Returns the multiply-accumulates of convolutions and dense layers for one image."""
    from cnnjax import models

    return float(models.summary(trained.model, _shape(trained)).macs)


COSTS: dict[str, Callable[[load.TrainedModel], float]] = {"latency_ms": latency_ms, "macs": macs}


def measure(directory: Path, names: Sequence[str]) -> dict[str, float]:
    """Measures a finished run, and writes `costs.json` into its directory; once.

    Args:
      directory: of the run.
      names: of `COSTS`.

    Raises:
      UserError: an unknown cost, no readable run, or one whose network is built elsewhere.
    """
    for name in names:
        if name not in COSTS:
            raise unknown_name("cost", name, COSTS)
    known = measured(directory)
    if missing := [name for name in names if name not in known]:
        trained = load.load_trained(directory)
        known |= {name: COSTS[name](trained) for name in missing}
        write_json(directory / FILE, known)
    return known


def measured(directory: Path) -> dict[str, float]:
    """Returns what was measured of a run; {} for nothing."""
    path = directory / FILE
    return read_json(path, f"{directory} is damaged") if path.exists() else {}


def _shape(trained: load.TrainedModel) -> tuple[int, int, int]:
    if "image_shape" not in trained.card:
        raise UserError(
            f"the model.json of a run of {trained.card['model']} names no image_shape: its latency "
            "and multiply-accumulates cannot be measured; leave these objectives out"
        )
    height, width, channels = trained.card["image_shape"]
    return height, width, channels


if __name__ == "__main__":
    from cnnjax.run.exits import one_line_errors

    with one_line_errors():
        print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2:])))
