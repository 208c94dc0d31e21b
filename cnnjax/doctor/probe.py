"""Starts JAX and trains for a second on each device, in a process of its own.

That process may be ended by XLA (an unknown flag), by the system (an instruction that the processor
has not got) or wait for ever (a TPU that another process holds). It prints a line of JSON for each
stage, so that what it had reached is known, and what it said last.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STAGES = ("import jax", "start devices", "import cnnjax", "train")
# Kept of what the process said last.
TAIL_LINES, TAIL_CHARACTERS = 40, 4000
TRAIN_SECS, LEAST_STEPS, MOST_DEVICES = 1.0, 40, 16
BATCH_SIZE = 64


def run(*, train: bool, timeout_secs: float) -> dict[str, Any]:
    """Starts the process and returns what came of it.

    Keys: `stages` (name, seconds, and what each found), `failed`: the stage that was not reached,
    or None; `error`: its message; `exit_code`: negative for a signal, None for one that had to be
    ended after `timeout_secs`; `said`: the last lines of its standard error.
    """
    package = str(Path(__file__).parent.parent.parent)
    command = [sys.executable, "-c", _PROGRAM, package, "train" if train else "start"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        code: int | None
        try:
            code = process.wait(timeout_secs)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return read(texts[0], texts[1], code, train=train)


def read(printed: str, said: str, exit_code: int | None, *, train: bool = True) -> dict[str, Any]:
    """Returns what `run` does of what the process printed to its two outputs."""
    stages, error = [], None
    for line in printed.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # Of a library that prints, or cut short.
        if not isinstance(record, dict):
            continue
        if "error" in record:
            error = record["error"]
        elif record.get("stage") in STAGES:
            stages.append(record)
    wanted = STAGES if train else STAGES[:2]
    reached = {record["stage"] for record in stages}
    failed = next((name for name in wanted if name not in reached), None)
    tail = "\n".join(said.splitlines()[-TAIL_LINES:])[-TAIL_CHARACTERS:]
    return {
        "stages": stages,
        "failed": failed,
        "error": error,
        "exit_code": exit_code,
        "said": tail if failed else "",
    }


# The working directory and its files count, as for `python -m`.
_PROGRAM = """
import sys
package, what = sys.argv[1:]
sys.path.append(package)
from cnnjax.doctor import probe
probe.main(what == "train")
"""


def main(train: bool) -> None:
    """Is the process: prints each stage as it is reached, or the error at which it ended."""
    stages: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("import jax", _import_jax),
        ("start devices", _devices),
    ]
    if train:
        stages += [("import cnnjax", _import_cnnjax), ("train", _train)]
    for name, work in stages:
        began = time.monotonic()
        try:
            found = work()
        except BaseException as error:
            text = " ".join(str(error).split())
            print(json.dumps({"error": f"{type(error).__name__}: {text}"}), flush=True)
            raise
        seconds = round(time.monotonic() - began, 3)
        print(json.dumps({"stage": name, "seconds": seconds, **found}), flush=True)


def _import_jax() -> dict[str, Any]:
    import jax
    import jaxlib

    return {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "location": jax.__file__}


def _devices() -> dict[str, Any]:
    import jax

    devices = []
    for device in jax.local_devices():
        memory = device.memory_stats() or {}
        devices.append(
            {
                "id": device.id,
                "platform": device.platform,
                "kind": device.device_kind,
                "memory_bytes": memory.get("bytes_limit"),
            }
        )
    return {"backend": jax.default_backend(), "devices": devices}


def _import_cnnjax() -> dict[str, Any]:
    from cnnjax.models import lenet
    from cnnjax.train import step

    return {"modules": [lenet.__name__, step.__name__]}


def _train() -> dict[str, Any]:
    import jax

    return {"training": [_train_on(device) for device in jax.local_devices()[:MOST_DEVICES]]}


def _train_on(device: Any) -> dict[str, Any]:
    """Trains LeNet-5 on shipped digits for a second; says how fast, and whether it learns."""
    import jax
    import jax.numpy as jnp
    import optax

    from cnnjax import data, models
    from cnnjax.tasks.classification import classification
    from cnnjax.train.state import create_state
    from cnnjax.train.step import make_step

    with jax.default_device(device):
        model, optimizer = models.create("lenet5", num_classes=10), optax.adam(1e-3)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        state = create_state(variables, optimizer, jax.random.key(1))
        step = make_step(
            model, optimizer, classification(10), schedule=lambda step: jnp.float32(1e-3)
        )
        batches = data.ResidentPipeline(data.load("mnist").train, BATCH_SIZE, seed=0).batches(0)
        compiled = jax.jit(step)
        began = time.monotonic()
        state, metrics = jax.block_until_ready(compiled(state, next(batches)))
        compile_secs = time.monotonic() - began
        losses, began = [metrics["loss"]], time.monotonic()
        while len(losses) <= LEAST_STEPS or time.monotonic() - began < TRAIN_SECS:
            state, metrics = jax.block_until_ready(compiled(state, next(batches)))
            losses.append(metrics["loss"])
        seconds = time.monotonic() - began
    first, last = (float(sum(t / c for t, c in part) / 10) for part in (losses[:10], losses[-10:]))
    return {
        "device": f"{device.platform}:{device.id}",
        "compile_secs": round(compile_secs, 2),
        "images_per_sec": round(BATCH_SIZE * (len(losses) - 1) / seconds),
        "steps": len(losses),
        "first_loss": first,
        "last_loss": last,
    }
