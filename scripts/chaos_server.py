"""Starts experiments for `chaos.py` without paying for imports each time.

It imports everything once, then forks a process for each line such as
`{"module": "experiments.mnist_lenet", "argv": ["--smoke"], "log": "log.txt"}` and answers with its
number. A line `{"wait": number}` is answered with its exit status, negative for a signal. The
children are what `python -m experiments.mnist_lenet --smoke` is, from its first line on: JAX's
devices and threads start in them, and never here, where they would not survive a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

IMPORTED = (
    "jax",
    "flax",
    "optax",
    "orbax.checkpoint",
    "tyro",
    "matplotlib.pyplot",
    "tensorboardX.event_file_writer",
    "cnnjax.run.trainer",
    "cnnjax.models",
    "cnnjax.augment.geometry",
    "cnnjax.data.sources",
)


def main() -> None:
    os.environ.setdefault("MPLBACKEND", "Agg")
    warnings.filterwarnings("ignore", message="os.fork")
    for name in IMPORTED:
        importlib.import_module(name)
    channel = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                run(request)
        print(json.dumps(answer), file=channel, flush=True)


def run(request: dict[str, Any]) -> None:
    """Becomes the experiment, and ends with it."""
    with open(request["log"], "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    status: Any = 1
    try:
        from cnnjax.run import settings

        module = importlib.import_module(request["module"])
        sys.argv = [str(module.__file__), *request["argv"]]
        # `python -m` would have made it the main module, whose name runs find in its spec.
        settings.launch(module.Config, module.main, request["argv"])
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


if __name__ == "__main__":
    main()
