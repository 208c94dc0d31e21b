"""Serve trained runs and exported files by the Open Inference Protocol, over HTTP and gRPC.

    cnnjax serve --run runs/mnist_lenet-20250101-120000
    curl -F image=@digit.png http://127.0.0.1:8080/v1/models/mnist_lenet-20250101-120000:predict

http://127.0.0.1:8080/ is a page where one drops an image. Models have the name of their directory
or file, or the one that is given: --run digits=RUN --run digits=NEWER_RUN are two versions of
`digits`, of which the first answers until a rollout says otherwise. Each is compiled for batches of
1, 2, 4 and so on before the server says that it is ready. SIGTERM answers what was accepted, and
ends with 0. See docs/serve.md.
"""

import asyncio
import dataclasses
import json
import os
import signal
import socket
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cnnjax.errors import UserError
from cnnjax.serve.guard.settings import Guarding
from cnnjax.serve.on_ray import Scaling
from cnnjax.serve.watch.settings import Watching


@dataclasses.dataclass(frozen=True)
class Config(Scaling, Watching, Guarding):
    """Serve runs and exported files."""

    run: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A run directory, or a file of cnnjax export: PATH, NAME=PATH or NAME:VERSION=PATH; again for
    more models and versions."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one, and needs keys or --insecure."""

    port: int = 8080
    """Of HTTP; 0 for any that is free."""

    grpc_port: int = 0
    """Of gRPC; 0 for none."""

    insecure: bool = False
    """Listen at addresses that others reach, without keys."""

    max_batch: int = 32
    """Images that are computed at once; the largest of the sizes that are compiled."""

    delay_ms: float = 0.0
    """How long an image waits for others while nothing is computed."""

    queue: int = 256
    """Images of a version that may wait; more are refused with 429."""

    concurrency: int = 1
    """Batches of a version that are computed at the same time."""

    sizes: str = ""
    """More image sizes that are compiled, for networks that take several: 256x256,320x320."""

    prepare: Literal["auto", "image", "digit"] = "auto"
    """How image files are prepared: as for cnnjax predict."""

    explain: bool = True
    """Compile Grad-CAM, too, which the page shows."""

    timeout: float = 30.0
    """Seconds after which a request without a deadline of its own fails with 504."""

    max_body_mb: float = 16.0
    """MiB of a request; larger ones are refused with 413."""

    drain: float = 0.0
    """Seconds for which a stopping server says that it is not ready before it closes its port."""

    grace: float = 30.0
    """Seconds in which a stopping server answers what it has accepted."""

    keep_alive: float = 20.0
    """Seconds for which an idle connection is kept; longer than a load balancer in front does."""

    threads: int = 0
    """Of the runtime of an exported file; 0 for as many as it takes."""

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""

    workers: int = 1
    """Processes that share the port; one that dies is started again."""

    reload_secs: float = 0.0
    """Look for newer checkpoints and files this often, and load them; 0 for never."""

    traces: str = ""
    """URL of an OpenTelemetry collector (OTLP over HTTP), such as http://127.0.0.1:4318/v1/traces;
    empty for none."""

    log: str = ""
    """A file for the log, one JSON object a line; by default standard error."""


def main(config: Config) -> int:
    """Serves until SIGTERM."""
    from cnnjax.serve import on_ray, server, workers

    _check(config)
    if config.ray:
        return on_ray.run(config, build)
    sock = server.listen(config.host, config.port)
    if config.grpc_port:
        # gRPC opens it itself, when the models are loaded.
        server.listen(config.host, config.grpc_port, "--grpc-port").close()
    if config.workers > 1:
        return asyncio.run(workers.supervise(config.workers, sock, dataclasses.asdict(config)))
    return _run(config, sock)


def work(told: str) -> int:
    """Is one of several workers.

    Args:
      told: JSON of its `place` and of the command's `settings`, as `workers.supervise` writes it.
    """
    from cnnjax.run import exits
    from cnnjax.serve.workers import Place

    content = json.loads(told)
    place = Place(**content["place"])
    with exits.one_line_errors():
        config = Config(**content["settings"])
        return _run(config, socket.socket(fileno=place.socket_fd), place)


def _run(config: Config, sock: socket.socket, place=None) -> int:
    from cnnjax.serve import logs, runtime, server

    logs.write_to(config.log or None)
    logs.take_over()
    runtime.start_jax()
    with asyncio.Runner(loop_factory=server.event_loop()) as runner:
        runner.run(_serve(config, sock, place))
    return 0


def build(config: Config):
    """Returns the guarded and watched application, its repository, policy, bounds and tracing.

    The models are not loaded yet: that is the caller's part.
    """
    from cnnjax.serve import logs, models, repository
    from cnnjax.serve.guard.asgi import guard
    from cnnjax.serve.guard.settings import policy_of
    from cnnjax.serve.http import web
    from cnnjax.serve.watch.routes import routes
    from cnnjax.serve.watch.settings import watch_of

    sources = models.read_sources(config.run)
    served = repository.Repository(sources, _options(config), _limits(config))
    logs.count_lost(served.measures.log_lost.inc)
    bounds = web.Bounds(body_bytes=round(config.max_body_mb * 2**20), deadline_secs=config.timeout)
    policy = policy_of(config, config.host, insecure=config.insecure, measures=served.measures)
    watch = watch_of(config, sources, served.measures)
    tracing = _tracing(config)
    app = web.application(
        served,
        middleware=(guard(policy),),
        observers=(watch.observe,) if watch else (),
        routes=(routes(watch),) if watch else (),
        bounds=bounds,
        traced=tracing and tracing.http,
        loads=False,
    )
    return app, served, policy, bounds, tracing


async def _serve(config: Config, sock: socket.socket, place) -> None:
    """Builds the application and runs it."""
    from cnnjax.serve import renewal, server, workers
    from cnnjax.serve.guard.rpc import interceptor
    from cnnjax.serve.guard.settings import uvicorn_options
    from cnnjax.serve.guard.transport import grpc_credentials

    app, served, policy, bounds, tracing = build(config)
    uvicorn = uvicorn_options(config, policy)
    host, port = sock.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    running = []
    if config.reload_secs:
        running.append(lambda: renewal.renew(served, config.reload_secs))
    if place is not None:
        running.append(lambda: _with_others(place, served))

    async def start_grpc():
        from cnnjax.serve.rpc import service

        address = f"{where}:{config.grpc_port}"
        shares = place is not None
        started, rpc_port = await service.start(
            served,
            address,
            interceptors=(interceptor(policy),),
            bounds=bounds,
            credentials=grpc_credentials(uvicorn),
            shares_port=shares,
            traced=tracing and tracing.rpc,
        )
        if place is None or not place.number:
            print(f"gRPC         at {where}:{rpc_port}", flush=True)
        return started

    def say() -> None:
        if place is not None:
            workers.say_ready(place.folder)
            if place.number:
                return
        scheme = "https" if config.tls_certificate else "http"
        print(f"serving      {', '.join(served.models)} at {scheme}://{where}:{port}/", flush=True)

    await server.run(
        served,
        app,
        server.Listening(config.drain, config.grace, config.keep_alive, uvicorn),
        sock,
        start_grpc=start_grpc if config.grpc_port else None,
        on_ready=say,
        while_running=running,
        loads_first=place is not None,
    )
    if tracing:
        tracing.end()


async def _with_others(place, served) -> None:
    """Makes the changes that any worker is asked for; stops where the parent has died."""
    from cnnjax.serve import workers

    await served.share(Path(place.folder))
    await workers.until_orphaned(place.alive_fd)
    os.kill(os.getpid(), signal.SIGTERM)


def _options(config: Config):
    from cnnjax.serve.runtime import Options

    return Options(
        largest_batch=config.max_batch,
        image_sizes=read_sizes(config.sizes),
        prepare=config.prepare,
        explain=config.explain,
        base=config.base,
        threads=config.threads or None,
    )


def _limits(config: Config):
    from cnnjax.serve.batcher import Limits

    return Limits(config.delay_ms / 1e3, config.queue, config.concurrency)


def _tracing(config: Config):
    from cnnjax.serve import traces

    return traces.tracing(config.traces) if config.traces else None


def read_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Returns the (height, width) pairs of `256x256,320x320`.

    Raises:
      UserError: another text.
    """
    sizes = []
    for each in filter(None, (part.strip() for part in text.split(","))):
        height, _, width = each.partition("x")
        if not (height.isdecimal() and width.isdecimal()):
            raise UserError(f"--sizes {text}: give HEIGHTxWIDTH, such as 256x256,320x320.")
        sizes.append((int(height), int(width)))
    return tuple(sizes)


def _check(config: Config) -> None:
    """Raises a UserError for what cannot be served, before anything is loaded."""
    _require(grpc=bool(config.grpc_port))
    from cnnjax.serve import batcher, models, on_ray, runtime, workers
    from cnnjax.serve.guard.settings import check_guard
    from cnnjax.serve.watch.settings import check_references

    sources = models.read_sources(config.run)
    check_references(config, sources)
    runtime.check_options(_options(config))
    for source in sources:
        runtime.check_sizes(source.path, _options(config))
    batcher.check_limits(_limits(config))
    workers.check_count(config.workers)
    for name, least, most in (
        ("timeout", 0.001, 86_400),
        ("max_body_mb", 0.001, 4096),
        ("drain", 0, 3600),
        ("grace", 0, 3600),
        ("keep_alive", 1, 3600),
        ("threads", 0, 1024),
        ("reload_secs", 0, 86_400),
        ("grpc_port", 0, 65_535),
    ):
        value = getattr(config, name)
        if not least <= value <= most:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {value:g}: give {least:g} to {most:g}.")
    if tracing := _tracing(config):
        tracing.end()
    check_guard(config, config.host, insecure=config.insecure)
    if config.ray:
        on_ray.check(config)


def _require(*, grpc: bool) -> None:
    """Raises a UserError that names the packages that are needed and not installed."""
    import importlib.util

    needed = {
        "fastapi": "fastapi",
        "uvicorn": "uvicorn",
        "httptools": "httptools",
        "jwt": "pyjwt[crypto]",
        "prometheus_client": "prometheus-client",
        "python_multipart": "python-multipart",
    }
    needed |= {"grpc": "grpcio", "google.protobuf": "protobuf"} if grpc else {}
    absent = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if absent:
        raise UserError(
            f"to serve, the packages {', '.join(absent)} are needed: pip install 'cnnjax[serve]'."
        )
