"""Several processes as one run: they find each other, agree, and end together.

    distributed.start("10.0.0.1:8476", num_processes=4, process_id=2)   # before any use of JAX

Afterwards `jax.devices()` are the devices of all processes, and a mesh over them makes one program
of them. What the processes agree on beside that (the run directory, a request to stop, what of a
checkpoint is written) goes over plain TCP connections of each process with process 0, kept open
for the whole run: no device takes part, so a background thread may wait while the step computes,
and when a process dies its connection breaks, which the others notice at once instead of hanging.

With one process every function here does its work on the spot.
"""

import atexit
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from cnnjax.errors import UserError

# The exit code of a process that lost another one: EX_TEMPFAIL of sysexits.h, "try again".
PEER_LOST_EXIT_CODE = 75
# How long a process goes on after it lost another one: an error that hit all of them at once is
# then told in its own words by each.
GRACE_SECS = 3.0
# A host that vanishes closes no connection: it is asked for a sign of life, by the kernel after
# 30 s of silence and by JAX; this is JAX's limit.
HEARTBEAT_TIMEOUT_SECS = 100
_RETRY_SECS = 0.2


class PeerLost(UserError):
    """Another process of the run ended; this one cannot go on without it."""


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
        raise UserError("the processes are connected already: call distributed.start once.")
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
        sockets = _gather(coordinator, num_processes, deadline, timeout_secs)
    else:
        sockets = {0: _report(coordinator, num_processes, process_id, deadline, timeout_secs)}
    _channel = _Channel(num_processes, process_id, sockets)
    _start_jax(coordinator, num_processes, process_id, local_device_ids, deadline)
    sys.excepthook = _end_by_exception
    atexit.register(_leave)


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
    if is_first():
        print(text, flush=True)


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
    if _channel is not None and _channel.lost:
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


class _Channel:
    """The open connections: of process 0 with each other process, of the others with process 0."""

    def __init__(self, num_processes: int, process_id: int, sockets: dict[int, socket.socket]):
        self.num_processes = num_processes
        self.process_id = process_id
        self.lost: str | None = None
        self._failing = False
        self._peers = {process: _peer_name(sock) for process, sock in sockets.items()}
        self._sockets = sockets
        self._left: set[int] = set()
        self._rounds: dict[str, int] = {}
        # (name and round) -> process -> value, at process 0; -> all values, at all.
        self._given: dict[str, dict[int, Any]] = {}
        self._results: dict[str, list[Any]] = {}
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        for process, sock in sockets.items():
            sock.settimeout(None)
            threading.Thread(target=self._listen, args=(process, sock), daemon=True).start()

    def exchange(self, name: str, value: Any) -> list[Any]:
        value = json.loads(json.dumps(value))  # As the others get it: tuples become lists.
        with self._changed:
            number = self._rounds.get(name, 0)
            self._rounds[name] = number + 1
        key = f"{name}#{number}"
        if self.process_id == 0:
            self._give(key, 0, value)
        else:
            self._send(0, {"give": key, "value": value})
        with self._changed:
            self._changed.wait_for(lambda: key in self._results or self.lost)
            if key not in self._results:
                raise PeerLost(str(self.lost))
            return self._results.pop(key)

    def leave(self) -> None:
        """Tells the others that what ends now has done its work."""
        for process in self._sockets:
            self._send(process, {"bye": True})

    def fail(self) -> None:
        """Tells the others that this process ends by an error of its own."""
        self._failing = True
        for process in self._sockets:
            self._send(process, {"failed": self.process_id})
        if self.process_id == 0:
            # JAX aborts the others, with many words, as soon as this process is gone.
            time.sleep(GRACE_SECS + 1)

    def lose(self, text: str, grace_secs: float = GRACE_SECS) -> None:
        with self._changed:
            if self.lost or self._failing:
                return
            self.lost = text
            self._changed.notify_all()
        if self.process_id == 0:
            for process in self._sockets:
                self._send(process, {"lost": text})
        time.sleep(grace_secs)
        self.end_alone()

    def end_alone(self) -> NoReturn:
        sys.stdout.flush()
        print(f"error: {self.lost}", file=sys.stderr, flush=True)
        os._exit(PEER_LOST_EXIT_CODE)

    def _give(self, key: str, process: int, value: Any) -> None:
        with self._changed:
            given = self._given.setdefault(key, {})
            given[process] = value
            if len(given) < self.num_processes:
                return
            values = [given[number] for number in range(self.num_processes)]
            del self._given[key]
            self._results[key] = values
            self._changed.notify_all()
        for other in self._sockets:
            self._send(other, {"all": key, "values": values})

    def _send(self, process: int, message: dict[str, Any]) -> None:
        # A broken connection is noticed by whoever listens to it.
        with self._sending, contextlib.suppress(OSError):
            self._sockets[process].sendall(_encoded(message))

    def _listen(self, process: int, sock: socket.socket) -> None:
        for message in _messages(sock):
            if "give" in message:
                self._give(message["give"], process, message["value"])
            elif "all" in message:
                with self._changed:
                    self._results[message["all"]] = message["values"]
                    self._changed.notify_all()
            elif "bye" in message:
                self._left.add(process)
            elif "lost" in message:
                self.lose(message["lost"])
            elif "failed" in message:
                self.lose(self._lost_text(message["failed"], "stopped because of an error"))
        if process not in self._left:
            # Without process 0 JAX aborts at once, with many words: ours must come first.
            grace_secs = 0.0 if process == 0 else GRACE_SECS
            self.lose(self._lost_text(process, "ended unexpectedly"), grace_secs)

    def _lost_text(self, process: int, how: str) -> str:
        where = f" at {self._peers[process]}" if process in self._peers else ""
        return (
            f"process {process} of {self.num_processes}{where} {how}, so process "
            f"{self.process_id} cannot go on: see what it printed, then start all processes again "
            "with --resume."
        )


_channel: _Channel | None = None


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
    # It takes SIGTERM for itself; `runs.stop_requests` and `agreed` do its work.
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


def _gather(
    coordinator: str, num_processes: int, deadline: float, timeout_secs: float
) -> dict[int, socket.socket]:
    """Waits, as process 0, for all others; returns their connections."""
    port = int(coordinator.rpartition(":")[2])
    arrived: dict[int, socket.socket] = {}
    strangers: list[socket.socket] = []
    with _listener(port, coordinator) as listener:
        while len(arrived) < num_processes - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock, _ = listener.accept()
                _keep_alive(sock)
                sock.settimeout(10.0)
                hello = next(_messages(sock), {})
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = [str(n) for n in range(1, num_processes) if n not in arrived]
                problem = (
                    f"{len(arrived) + 1} of {num_processes} processes came to {coordinator} within "
                    f"{timeout_secs:g} s, process {', '.join(missing)} did not: check that each "
                    "was started, with this address, --num-processes and its own --process-id."
                )
                raise _refused(arrived, strangers, problem) from None
            if hello.get("cnnjax") is None:
                sock.close()  # Whatever it is, such as a port scanner, it is none of ours.
                continue
            problem = _misfit(hello, num_processes, arrived)
            if problem:
                raise _refused(arrived, [sock], problem)
            arrived[hello["process_id"]] = sock
    for sock in arrived.values():
        sock.sendall(_encoded({"welcome": True}))
    return arrived


def _report(
    coordinator: str, num_processes: int, process_id: int, deadline: float, timeout_secs: float
) -> socket.socket:
    """Tells process 0 that this one is there, and waits for its word that all are."""
    host, _, port = coordinator.rpartition(":")
    problem = "no answer"
    while time.monotonic() < deadline:
        try:
            sock = socket.create_connection(
                (host.strip("[]"), int(port)), max(0.1, deadline - time.monotonic())
            )
            break
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(_RETRY_SECS)
    else:
        raise UserError(
            f"process {process_id} could not reach the coordinator {coordinator} within "
            f"{timeout_secs:g} s ({problem}): check that process 0 is running on that host, that "
            "the address is the same for all processes, and that no firewall is in between."
        )
    _keep_alive(sock)
    sock.sendall(_encoded(_hello(num_processes, process_id)))
    # Process 0 may have started later than this one, and then waits longer.
    sock.settimeout(2 * timeout_secs + 10)
    answer = next(_messages(sock), {})
    if "welcome" in answer:
        return sock
    raise UserError(
        answer.get("refused")
        or f"the coordinator {coordinator} ended while process {process_id} waited for the other "
        "processes: see what process 0 printed, and check that the port is its own."
    )


def _hello(num_processes: int, process_id: int) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    from cnnjax import __version__

    return {
        "cnnjax": __version__,
        **versions,
        "num_processes": num_processes,
        "process_id": process_id,
    }


def _misfit(
    hello: dict[str, Any], num_processes: int, arrived: dict[int, socket.socket]
) -> str | None:
    """Returns what is wrong with a process that reports, or None."""
    number = hello["process_id"]
    if number in arrived or number == 0:
        return f"two processes were started as --process-id {number}: give each its own."
    mine = _hello(num_processes, 0)
    for name in ("num_processes", "cnnjax", "jax", "jaxlib"):
        if hello[name] != mine[name]:
            return (
                f"process {number} has {name} {hello[name]} and process 0 has {mine[name]}: "
                "start all processes with the same."
            )
    return None


def _refused(
    arrived: dict[int, socket.socket], others: list[socket.socket], problem: str
) -> UserError:
    """Tells all processes that came what is wrong; returns the error for process 0."""
    for sock in (*arrived.values(), *others):
        with contextlib.suppress(OSError):
            sock.sendall(_encoded({"refused": problem}))
        sock.close()
    return UserError(problem)


def _listener(port: int, coordinator: str) -> socket.socket:
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(
            ("", port), family=family, backlog=1024, dualstack_ipv6=both, reuse_port=False
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at the coordinator {coordinator} ({error.strerror}): choose "
            "a free port, the same for all processes."
        ) from None


def _keep_alive(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _encoded(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _messages(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """Yields what arrives until the connection ends, however it ends."""
    rest = b""
    while True:
        while b"\n" in rest:
            line, _, rest = rest.partition(b"\n")
            try:
                message = json.loads(line)
            except ValueError:
                return
            if not isinstance(message, dict):
                return
            yield message
        try:
            part = sock.recv(1 << 16)
        except OSError:
            return
        if not part:
            return
        rest += part


def _peer_name(sock: socket.socket) -> str:
    try:
        return str(sock.getpeername()[0]).removeprefix("::ffff:")
    except OSError:
        return "an unknown host"


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
    with _channel._changed:
        _channel._changed.wait_for(lambda: _channel is None or _channel.lost, timeout=GRACE_SECS)
    if _channel.lost:
        _channel.end_alone()
    sys.__excepthook__(kind, error, traceback)
    end(1)
