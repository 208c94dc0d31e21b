"""Multi-process runs: processes connect, agree, and end together.

    processes.start("10.0.0.1:8476", num_processes=4, process_id=2)   # before any use of JAX

Afterwards `jax.devices()` are the devices of all processes, and a mesh over them makes one program
of them. What the processes agree on besides that (the run directory, a request to stop, what of a
checkpoint is written) goes over plain TCP connections of each process with process 0, kept open
for the whole run: no device takes part, so a background thread may wait while the step computes,
and when a process dies its connection breaks, which the others notice at once instead of hanging.

With one process every function here does its work on the spot.
"""

import atexit
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from cnnjax.devices.channel import GRACE_SECS, PEER_LOST_EXIT_CODE, Channel, gather, report
from cnnjax.errors import UserError

# For JAX's own watch, a second net below ours: on a machine that was suspended for a while no
# process has died, but JAX would end them all.
HEARTBEAT_TIMEOUT_SECS = 600
Result = TypeVar("Result")


def start(
    coordinator: str = "auto",
    num_processes: int = 0,
    process_id: int = -1,
    *,
    timeout_secs: float = 300.0,
) -> None:
    """Joins the processes of a run; returns when all are there. Call it before any use of JAX.

    Args:
      coordinator: `HOST:PORT`, where process 0 listens and all others can reach it; `off` for a
        run of one process; `auto` takes everything from the environment where the process is one of
        several of a SLURM step, an Open MPI launch, a TPU pod slice or an indexed Kubernetes Job
        (with the package `kubernetes`), and is `off` elsewhere.
      num_processes: how many processes the run has; with an address only.
      process_id: which of them this is, from 0; with an address only.
      timeout_secs: how long to wait for the others.

    Raises:
      UserError: parts are missing or do not fit together, the coordinator cannot be reached, or
        not all processes came in time. Each process that came gets an error of its own.
    """
    global _channel
    if _channel is not None:
        raise UserError("the processes are connected already: call processes.start once.")
    local_device_ids = None
    if coordinator in ("auto", "off"):
        if num_processes or process_id >= 0:
            raise UserError(
                f"num_processes {num_processes} and process_id {process_id} need an address: give "
                "--coordinator HOST:PORT too."
            )
        found = None if coordinator == "off" else _from_environment(timeout_secs)
        if found is None:
            return
        coordinator, num_processes, process_id, local_device_ids = found
    _check(coordinator, num_processes, process_id)
    if num_processes == 1:
        return
    deadline = time.monotonic() + timeout_secs
    if process_id == 0:
        sockets = gather(coordinator, num_processes, deadline, timeout_secs)
    else:
        sockets = {0: report(coordinator, num_processes, process_id, deadline, timeout_secs)}
    _channel = Channel(num_processes, process_id, sockets)
    _start_jax(coordinator, num_processes, process_id, local_device_ids, deadline)
    sys.excepthook = _end_by_exception
    atexit.register(_leave)


def connect_devices() -> None:
    """Connects the devices of all processes, while the processes are in step.

    On CPUs they otherwise connect in the first step, and a process that waits there for another,
    which still compiles, gives up after 30 s.
    """
    if _channel is None:
        return
    import jax
    import numpy as np

    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    exchange("devices", None)
    jax.block_until_ready(jax.jit(jax.numpy.sum)(put(np.ones(mesh.size, np.int32), spread)))


def count() -> int:
    """Returns the number of processes of the run."""
    return 1 if _channel is None else _channel.num_processes


def index() -> int:
    """Returns the number of this process, from 0."""
    return 0 if _channel is None else _channel.process_id


def is_first() -> bool:
    """Whether this process is the one that writes logs and figures and talks to the user."""
    return index() == 0


def say(text: str) -> None:
    """Prints a line, in the first process only."""
    if not is_first():
        return
    try:
        print(text, flush=True)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            error.filename = "the standard output"  # It is no file of the run that is full.
        raise


def exchange(name: str, value: Any) -> list[Any]:
    """Returns the values that all processes gave under this name, by process; waits for them.

    All must call it, in the same order for each name. Threads may call it with different names.

    Args:
      name: what is agreed on.
      value: what JSON can hold.

    Raises:
      PeerLost: a process ended before it gave its value.
    """
    return [value] if _channel is None else _channel.exchange(name, value)


def from_first(name: str, value: Any) -> Any:
    """Returns the value that process 0 gave; see `exchange`."""
    return exchange(name, value)[0]


def by_first(name: str, work: Callable[[], Result]) -> Result:
    """Returns in all processes what `work` returns in process 0, or raises its UserError.

    JSON must hold what it returns.
    """
    if _channel is None:
        return work()
    result, problem = None, None
    if is_first():
        try:
            result = work()
        except UserError as error:
            problem = str(error)
    result, problem = from_first(name, [result, problem])
    if problem is not None:
        raise UserError(problem)
    return result


def agreed(name: str, ask: Callable[[], str | None]) -> Callable[[], str | None]:
    """Returns a function that gives all processes the same answer to a question asked of each.

    It returns the first answer that is not None, by process, and must be called by all. With one
    process it is `ask`.
    """
    if _channel is None:
        return ask
    return lambda: next((answer for answer in exchange(name, ask()) if answer is not None), None)


def check_same(name: str, values: dict[str, Any]) -> None:
    """Raises a UserError that names the first entry in which a process differs from process 0."""
    everyone = exchange(name, values)
    for process, others in enumerate(everyone):
        for key, value in others.items():
            if value != everyone[0].get(key):
                raise UserError(
                    f"process {process} was started with {key} {value!r} and process 0 with "
                    f"{everyone[0].get(key)!r}: start all processes with the same settings."
                )


def end(code: int) -> NoReturn:
    """Ends this process. Code 0, or 128 and more, waits for the others; any other ends them too."""
    if _channel is not None and code == PEER_LOST_EXIT_CODE:
        _channel.end_alone()
    if _channel is None or code == 0 or code >= 128:
        _leave()
        sys.exit(code)
    _channel.fail()
    sys.stdout.flush()
    sys.stderr.flush()
    # An ordinary exit would wait for the others in JAX.
    os._exit(code)


def put(tree: Any, sharding: Any) -> Any:
    """Returns a tree of arrays placed as `sharding` says, over devices of several processes too.

    Unlike `jax.device_put` it also takes typed keys there, and no process waits for another.

    Args:
      tree: arrays (NumPy, JAX, typed keys), the same whole values in each process.
      sharding: one sharding, or a tree of them: a prefix of the tree's will do.
    """
    import jax

    return jax.tree.map(_put_leaf, tree, jax.tree.broadcast(sharding, tree))


def fetch(tree: Any) -> Any:
    """Returns a tree of arrays as NumPy, each whole; where processes hold parts, all must call."""
    import jax

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


_channel: Channel | None = None


def _put_leaf(leaf: Any, sharding: Any) -> Any:
    import jax
    import jax.numpy as jnp
    import numpy as np

    if sharding.is_fully_addressable or getattr(leaf, "sharding", None) == sharding:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put_leaf(np.asarray(jax.random.key_data(leaf)), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if not re.fullmatch(r"(\[[^\]]+\]|[^:]+):\d+", coordinator):
        raise UserError(
            f"coordinator {coordinator!r} is no address: give HOST:PORT of process 0, such as "
            "10.0.0.1:8476, or auto or off."
        )
    if num_processes < 1:
        raise UserError(
            f"num_processes is {num_processes}: say how many processes the run has, such as "
            "--num-processes 4."
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"process_id is {process_id}, but {num_processes} process(es) are numbered 0 to "
            f"{num_processes - 1}: give each its own --process-id."
        )


def _from_environment(timeout_secs: float) -> tuple[str, int, int, list[int] | None] | None:
    """Returns coordinator, number of processes, own number and own devices; None for a lone one."""
    cluster = _cluster_name()
    if cluster is None:
        return None
    advice = "give --coordinator HOST:PORT --num-processes N --process-id I, or --coordinator off."
    try:
        # Private, but the only way to what `jax.distributed.initialize` finds without starting it.
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout_secs)
        )
    except Exception as error:
        text = str(error).partition("\n")[0]
        raise UserError(
            f"cannot read this process's place in {cluster} ({text}): {advice}"
        ) from error
    coordinator, num_processes, process_id, local_device_ids = found
    if coordinator is None or num_processes is None or process_id is None:
        raise UserError(f"{cluster} does not tell this process's place in it: {advice}")
    ids = None if local_device_ids is None else list(local_device_ids)
    return coordinator, num_processes, process_id, ids


def _cluster_name() -> str | None:
    """Returns what launched this process as one of several, by signs that cost nothing to read."""
    environment = os.environ
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= set(environment):
        return "a SLURM step" if int(environment.get("SLURM_NTASKS", "1")) > 1 else None
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return "an Open MPI launch" if int(environment["OMPI_COMM_WORLD_SIZE"]) > 1 else None
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "a TPU pod slice"
    if importlib.util.find_spec("libtpu") and (
        Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    ):
        return "a TPU slice"
    in_job = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= set(environment)
    if in_job and importlib.util.find_spec("kubernetes"):
        return "a Kubernetes Job"
    return None


def _start_jax(
    coordinator: str,
    num_processes: int,
    process_id: int,
    local_device_ids: list[int] | None,
    deadline: float,
) -> None:
    import jax

    # Only CPUs ask for it: it is how their devices in different processes reach each other.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It takes SIGTERM for itself; `run.exits.stop_requests` and `agreed` do its work.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(30, int(deadline - time.monotonic())),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECS,
    )


def _leave() -> None:
    global _channel
    if _channel is None:
        return
    channel = _channel
    channel.leave()
    import jax

    jax.distributed.shutdown()
    _channel = None


def _end_by_exception(kind: type, error: BaseException, traceback: Any) -> None:
    """Ends a process by an uncaught exception: by one line if it comes of a lost process."""
    assert _channel is not None
    # What JAX raises when a connection breaks may be faster than our own notice of it.
    with _channel.changed:
        _channel.changed.wait_for(lambda: _channel is None or _channel.lost, timeout=GRACE_SECS)
    if _channel.lost:
        _channel.end_alone()
    sys.__excepthook__(kind, error, traceback)
    end(1)
