"""What must be decided before JAX starts: CPU devices and the compilation cache."""

import os
import sys
from collections.abc import Callable
from typing import Any

from cnnjax.devices import host, processes
from cnnjax.devices.sharding import count_devices
from cnnjax.errors import UserError

DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"
OPTIMIZATION_FLAG = "--xla_backend_optimization_level"
# XLA ends the process when one CPU device waits longer for another, 40 s by default: on a busy or
# suspended machine that happens.
PATIENCE_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
# Measured on 2 cores: a device per core is faster for small networks; large ones leave all but one
# idle (see `train.compile.choose_mesh`). Each holds the parameters and resident data, and a small
# part of a batch keeps no core busy.
MOST_CPU_DEVICES = 4
LEAST_PART = 16


def start(devices: int, mesh: str = "", *, batch_size: int = 1) -> int:
    """Sets the number of CPU devices and the compilation cache; returns the devices to use.

    JAX divides a CPU into "host devices" only if told so before its first use. An `XLA_FLAGS` that
    already names their number is obeyed.

    Args:
      devices: the number wanted, over all processes; 0 is all accelerators or, on a CPU, one a
        core, up to 4 a process, as far as they divide the batch into parts of 16 and more.
      mesh: such as `data=4,model=2`: names the number of devices too.
      batch_size: the examples that the devices share at a time.

    Raises:
      UserError: the mesh is not valid or contradicts the number of devices, or the processes of the
        run do not have that number of devices.
    """
    devices = count_devices(mesh, devices)
    num_processes = processes.count()
    if devices % num_processes:
        raise UserError(
            f"{devices} devices do not divide among {num_processes} processes: use a multiple."
        )
    flags = os.environ.get("XLA_FLAGS", "")
    if DEVICE_COUNT_FLAG not in flags:
        count = devices // num_processes or _cpu_devices(batch_size // num_processes)
        os.environ["XLA_FLAGS"] = f"{flags} {DEVICE_COUNT_FLAG}={count} {PATIENCE_FLAG}".strip()
    _check_fork()
    enable_compilation_cache()
    check_platform()
    import jax

    available = len(jax.devices())
    if num_processes > 1 and devices not in (0, available):
        raise UserError(
            f"{devices} devices asked for, but the {num_processes} processes have {available}, and "
            "each must use all of its own: drop --devices, or start as many processes as it takes."
        )
    processes.connect_devices()
    return devices or available


def _check_fork() -> None:
    """Raises a UserError in a process that was forked when JAX had started: it would wait for ever.

    JAX's threads are not copied with it. A process in which JAX has started and that has only one
    thread is such a one; where threads cannot be counted, nothing is checked.
    """
    if "jax" not in sys.modules:
        return
    from jax._src import xla_bridge

    try:
        started = xla_bridge.backends_are_initialized()
        alone = len(os.listdir("/proc/self/task")) == 1
    except (AttributeError, OSError):
        return
    if started and alone:
        raise UserError(
            "this process was forked when JAX had started, whose threads a fork does not copy: "
            "fork before JAX is used, or start processes by multiprocessing.get_context('spawn')."
        )


def check_platform(error: Exception | None = None) -> None:
    """Starts JAX; a UserError where it has not got the platform that it is told to use.

    Args:
      error: what JAX has raised, if it has: once some of its platforms are there, it says no more
        that others are not.
    """
    import jax

    if error is None or "nable to initialize backend" not in str(error):
        try:
            jax.devices()
            return
        except Exception as found:  # For a platform that it knows, jax 0.10 fails by an assertion.
            error = found
    given = os.environ.get("JAX_PLATFORMS")
    named = f"JAX_PLATFORMS={given}" if given else "the devices of this machine"
    text = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0]
    reason = text.rstrip(".") if isinstance(error, RuntimeError) else "it finds no such device"
    raise UserError(
        f"JAX cannot use {named} ({reason}): set JAX_PLATFORMS=cpu, or leave it out to take what "
        "there is; cnnjax doctor says more."
    ) from error


def compiler_options(*, remat: bool) -> dict[str, str | bool]:
    """Returns the `compiler_options` of `jit` with which rematerialized blocks save memory.

    `jax.checkpoint` puts a barrier between what the forward and the backward pass compute. XLA:CPU
    as of jax 0.10 removes it early, finds the same computation twice, and keeps the results of the
    first after all.
    """
    import jax

    if not remat or jax.default_backend() != "cpu":
        return {}
    return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def jit_once(function: Callable, **options: Any) -> Callable:
    """Returns `jax.jit(function)`, quickly compiled, for what runs once: to initialize a network.

    XLA:CPU as of jax 0.10 compiles each random draw for a kernel of four dimensions for one to two
    seconds at its third level of optimization, and for a fifth of that at its first; the values are
    the same bit for bit, and the time to draw them too. A level that `XLA_FLAGS` names is obeyed.

    Args:
      function: a function of arrays; as any with options of the compiler it cannot be called while
        another is traced.
      options: of `jax.jit`.
    """
    import jax

    named = OPTIMIZATION_FLAG in os.environ.get("XLA_FLAGS", "")
    if jax.default_backend() == "cpu" and not named:
        options["compiler_options"] = {OPTIMIZATION_FLAG.removeprefix("--"): 1}
    return jax.jit(function, **options)


def enable_compilation_cache() -> None:
    """Keeps compiled programs under `$XDG_CACHE_HOME`, by default `~/.cache`.

    Where that is no directory that can be written, none are kept.
    """
    import jax

    directory = host.compilation_cache()
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(directory, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def describe() -> str:
    """Returns one line on the devices in use, such as `2 x cpu (AMD EPYC, 2 cores)`."""
    import jax

    first = jax.devices()[0]
    kind = (
        f"{host.processor()}, {os.cpu_count()} cores"
        if first.platform == "cpu"
        else first.device_kind
    )
    where = f" in {processes.count()} processes" if processes.count() > 1 else ""
    return f"{len(jax.devices())} x {first.platform} ({kind}){where}"


def _cpu_devices(batch_size: int) -> int:
    most = max(1, min(host.usable_cores(), MOST_CPU_DEVICES, batch_size // LEAST_PART))
    return max(count for count in range(1, most + 1) if batch_size % count == 0)
