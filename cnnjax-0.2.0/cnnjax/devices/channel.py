"""TCP connections between the processes of a run: who is there, what was sent, who is gone.

Process 0 listens at the coordinator's address until all others have reported, hands the address
over to JAX's own coordination service, and keeps the connections. Messages are JSON, one per line.
"""

import contextlib
import importlib.metadata
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import cnnjax
from cnnjax.errors import UserError

# The exit code of a process that lost another one: EX_TEMPFAIL of sysexits.h, "try again".
PEER_LOST_EXIT_CODE = 75
# How long a process goes on after it lost another one: an error that hit all of them at once is
# then told in its own words by each.
GRACE_SECS = 3.0
_RETRY_SECS = 0.2


class PeerLost(UserError):
    """Another process of the run ended; this one cannot go on without it."""


class Channel:
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
        self.changed = threading.Condition()
        self._sending = threading.Lock()
        for process, sock in sockets.items():
            sock.settimeout(None)
            threading.Thread(target=self._listen, args=(process, sock), daemon=True).start()

    def exchange(self, name: str, value: Any) -> list[Any]:
        value = json.loads(json.dumps(value))  # As the others get it: tuples become lists.
        with self.changed:
            number = self._rounds.get(name, 0)
            self._rounds[name] = number + 1
        key = f"{name}#{number}"
        if self.process_id == 0:
            self._give(key, 0, value)
        else:
            self._send(0, {"give": key, "value": value})
        with self.changed:
            self.changed.wait_for(lambda: key in self._results or self.lost)
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
        with self.changed:
            if self.lost or self._failing:
                return
            self.lost = text
            self.changed.notify_all()
        if self.process_id == 0:
            for process in self._sockets:
                self._send(process, {"lost": text})
        time.sleep(grace_secs)
        if not self._failing:
            self.end_alone()

    def end_alone(self) -> NoReturn:
        sys.stdout.flush()
        print(f"error: {self.lost}", file=sys.stderr, flush=True)
        os._exit(PEER_LOST_EXIT_CODE)

    def _give(self, key: str, process: int, value: Any) -> None:
        with self.changed:
            given = self._given.setdefault(key, {})
            given[process] = value
            if len(given) < self.num_processes:
                return
            values = [given[number] for number in range(self.num_processes)]
            del self._given[key]
            self._results[key] = values
            self.changed.notify_all()
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
                with self.changed:
                    self._results[message["all"]] = message["values"]
                    self.changed.notify_all()
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


def gather(
    coordinator: str, num_processes: int, deadline: float, timeout_secs: float
) -> dict[int, socket.socket]:
    """Waits, as process 0, for all others; returns their connections."""
    port = int(coordinator.rpartition(":")[2])
    arrived: dict[int, socket.socket] = {}
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
                raise _refused(arrived.values(), problem) from None
            if hello.get("cnnjax") is None:
                sock.close()  # Whatever it is, such as a port scanner, it is none of ours.
                continue
            misfit = _misfit(hello, num_processes, arrived)
            if misfit:
                raise _refused([*arrived.values(), sock], misfit)
            arrived[hello["process_id"]] = sock
    for sock in arrived.values():
        sock.sendall(_encoded({"welcome": True}))
    return arrived


def report(
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
    return {
        "cnnjax": cnnjax.__version__,
        **versions,
        "num_processes": num_processes,
        "process_id": process_id,
    }


def _misfit(
    hello: dict[str, Any], num_processes: int, arrived: dict[int, socket.socket]
) -> str | None:
    """Returns what is wrong with a process that reports, or None."""
    number = hello.get("process_id")
    if number in arrived or number == 0:
        return f"two processes were started as --process-id {number}: give each its own."
    mine = _hello(num_processes, 0)
    for name in ("num_processes", "cnnjax", "jax", "jaxlib"):
        if hello.get(name) != mine[name]:
            return (
                f"process {number} has {name} {hello.get(name)} and process 0 has {mine[name]}: "
                "start all processes with the same."
            )
    return None


def _refused(arrived: Iterable[socket.socket], problem: str) -> UserError:
    """Tells all processes that came what is wrong; returns the error for process 0."""
    for sock in arrived:
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
    # A host that vanishes closes no connection: the kernel asks it for a sign of life.
    limits = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
    for option, value in limits.items():
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
