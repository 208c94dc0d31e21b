"""A process that runs the trials of a search, one after another: JAX is started once.

    python -m cnnjax.search.worker EXPERIMENT PARENT [CORE ...]

Each line that it reads is a `workers.Request` as JSON. For each it answers with a line: the exit
code of the experiment.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError


def main() -> None:
    experiment, parent, *cores = sys.argv[1:]
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in cores})
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    # What is printed by the way is no answer.
    os.dup2(2, 1)
    module = importlib.import_module(experiment)
    for line in sys.stdin:
        code = _run(module, json.loads(line))
        answers.write(f"{code}\n")
        answers.flush()


_is_busy = False


def _stop(number: int, frame: Any) -> None:
    """Ends a trial that does not train yet or any more, and so cannot be asked to save."""
    if _is_busy:
        raise SystemExit(128 + number)


def end_with(parent: int) -> None:
    """Ends this process when the one that started it has ended, even if it was killed."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _run(module: Any, request: dict[str, Any]) -> int:
    """Runs the experiment as its command line does; what it prints goes to the file."""
    import jax

    from cnnjax.search import costs

    with open(request["log"], "a", encoding="utf-8") as file:
        for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
            stream.flush()
            os.dup2(file.fileno(), descriptor)
        global _is_busy
        _is_busy = True
        try:
            directory = Path(request["directory"])
            code = _launched(module, request["argv"])
            if code == 0 and request["costs"] and (directory / "summary.json").exists():
                costs.measure(directory, request["costs"])
            return code
        except UserError as error:
            print(f"error: {error}")
            return 2
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            _is_busy = False
            sys.stdout.flush()
            sys.stderr.flush()
            # A trial's compiled programs are of no use to the next one.
            jax.clear_caches()
            gc.collect()


def _launched(module: Any, argv: list[str]) -> int:
    """Runs the experiment; returns its exit code."""
    from cnnjax.run import settings

    try:
        settings.launch(module.Config, module.main, argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    main()
