"""A server in this process: its sockets, its start, its end.

SIGTERM and SIGINT drain: the server says that it is not ready, takes no new connections, answers
what it has accepted, and ends with 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from cnnjax.errors import UserError
from cnnjax.serve.http.asgi import App
from cnnjax.serve.logs import log
from cnnjax.serve.repository import Repository

# Python's own is 0.005.
SWITCH_SECS = 0.0005


@dataclasses.dataclass(frozen=True)
class Listening:
    """How a server listens, and stops.

    Attributes:
      drain_secs: how long a stopping server says that it is not ready before it closes its sockets.
      grace_secs: in which what has been accepted must be answered then.
      keep_alive_secs: how long an idle connection is kept.
      uvicorn: more settings of uvicorn's, such as `ssl_certfile`.
    """

    drain_secs: float = 0.0
    grace_secs: float = 30.0
    keep_alive_secs: float = 20.0
    uvicorn: dict[str, Any] = dataclasses.field(default_factory=dict)


@functools.lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, *, guarded: bool) -> None:
    """Raises a UserError for a host that others reach, unless requests need a key.

    Args:
      host: to listen at.
      guarded: whether requests need a key, or the user said that they do not.
    """
    if not guarded and not is_loopback(host):
        raise UserError(
            f"--host {host}: others could reach it, and no key is asked for: give --keys FILE (see "
            "cnnjax serve-key), --jwt-jwks or --tls-client-ca, or --insecure where something else "
            "guards it."
        )


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """Returns a socket that listens; `flag` is what names the port.

    Raises:
      UserError: another program has the port, or there is no such address.
    """
    if not 0 <= port < 65536:
        raise UserError(f"{flag} {port}: give 0 to 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # By name: asyncio sends small packets at once only where it sees that this is TCP.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)
        found.set_inheritable(True)
    except OSError as error:
        found.close()
        raise UserError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; choose another {flag} or "
            "--host."
        ) from None
    return found


def event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Returns what makes event loops of uvloop's, which are quicker; None where it is missing."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def run(
    repository: Repository,
    app: App,
    listening: Listening,
    sock: socket.socket,
    *,
    start_grpc: Callable[[], Any] | None = None,
    on_ready: Callable[[], None] | None = None,
    while_running: Sequence[Callable[[], Coroutine[Any, Any, None]]] = (),
    loads_first: bool = False,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
      repository: whose models are loaded while the server already says that it lives.
      app: of `application(repository, loads=False)`.
      listening: see `Listening`.
      sock: of `listen`.
      start_grpc: returns a coroutine of the gRPC server, started.
      on_ready: called when every model is warm.
      while_running: functions whose coroutines run from then on, and are cancelled at the end.
      loads_first: whether connections wait until then, as they do where other processes take them.

    Raises:
      UserError: a model cannot be loaded.
    """
    import uvicorn

    # Threads compute while this one reads requests: neither may keep the other waiting for 5 ms.
    sys.setswitchinterval(SWITCH_SECS)

    class Server(uvicorn.Server):
        """uvicorn's, without its signals: it would end by them."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=round(listening.keep_alive_secs),
        timeout_graceful_shutdown=round(listening.grace_secs),
        **listening.uvicorn,
    )
    server = Server(config)
    loop = asyncio.get_running_loop()
    stops: list[str] = []

    def stop(name: str) -> None:
        stops.append(name)
        if len(stops) > 1:
            os._exit(1)
        log("stopping", signal=name)
        repository.drain()
        loop.call_later(listening.drain_secs, setattr, server, "should_exit", True)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, signal.Signals(number).name)
    if loads_first:
        await repository.start()
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    grpc_server, running = None, []
    try:
        loading = asyncio.create_task(repository.start())
        await asyncio.wait({loading, serving}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            if start_grpc is not None:
                grpc_server = await start_grpc()
            log("ready", models=repository.index())
            if on_ready is not None:
                on_ready()
            running = [asyncio.create_task(each()) for each in while_running]
        await serving
    finally:
        server.should_exit = True
        for task in running:
            task.cancel()
        if grpc_server is not None:
            await grpc_server.stop(listening.grace_secs)
        await asyncio.gather(serving, return_exceptions=True)
        await repository.close()
        log("stopped")
