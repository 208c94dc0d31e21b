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
from typing import Annotated, Literal

import tyro

import cnnjax
from cnnjax.errors import UserError
from cnnjax.serve.guard.settings import Guarding
from cnnjax.serve.watch.settings import Watching, watch_of


@dataclasses.dataclass(frozen=True)
class Config(Watching, Guarding):
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

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""

    log: str = ""
    """A file for the log, one JSON object a line; by default standard error."""


def main(config: Config) -> int:
    """Serves until SIGTERM."""
    _require(grpc=bool(config.grpc_port))
    from cnnjax.serve import batcher, logs, measures, models, repository, runtime, server
    from cnnjax.serve.guard import settings

    sources = models.read_sources(config.run)
    options = runtime.Options(
        largest_batch=config.max_batch,
        image_sizes=read_sizes(config.sizes),
        prepare=config.prepare,
        explain=config.explain,
        base=config.base,
    )
    limits = batcher.Limits(config.delay_ms / 1e3, config.queue, config.concurrency)
    runtime.check_options(options)
    batcher.check_limits(limits)
    _check(config)
    counted = measures.Measures()
    policy = settings.policy_of(config, config.host, insecure=config.insecure, measures=counted)
    uvicorn_options = settings.uvicorn_options(config, policy)
    sock = server.listen(config.host, config.port)
    logs.write_to(config.log or None)
    cnnjax.devices.backend.start(devices=1)
    served = repository.Repository(sources, options, limits, measures=counted)
    watch = watch_of(config, sources, counted)
    asyncio.run(_serve(config, served, sock, policy, watch, uvicorn_options))
    return 0


async def _serve(config: Config, models, sock, policy, watch, uvicorn_options) -> None:
    """Builds the application and runs it."""
    from cnnjax.serve import server
    from cnnjax.serve.guard.asgi import guard
    from cnnjax.serve.http import web
    from cnnjax.serve.watch.routes import routes

    bounds = web.Bounds(body_bytes=round(config.max_body_mb * 2**20), deadline_secs=config.timeout)
    app = web.application(
        models,
        middleware=(guard(policy),),
        observers=(watch.observe,) if watch else (),
        routes=(routes(watch),) if watch else (),
        bounds=bounds,
        loads=False,
    )
    host, port = sock.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    listening = server.Listening(
        config.host, port, config.grpc_port, config.drain, uvicorn=uvicorn_options
    )
    scheme = "https" if config.tls_certificate else "http"

    def say() -> None:
        print(f"serving      {', '.join(models.models)} at {scheme}://{where}:{port}/", flush=True)

    async def start_grpc():
        from cnnjax.serve.guard.rpc import interceptor
        from cnnjax.serve.guard.transport import grpc_credentials
        from cnnjax.serve.rpc import service

        started, rpc_port = await service.start(
            models,
            f"{where}:{config.grpc_port}",
            interceptors=(interceptor(policy),),
            bounds=bounds,
            credentials=grpc_credentials(uvicorn_options),
        )
        print(f"gRPC         at {where}:{rpc_port}", flush=True)
        return started

    start = start_grpc if config.grpc_port else None
    await server.run(models, app, listening, sock, start_grpc=start, on_ready=say)


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
    if not 0 < config.timeout <= 86_400:
        raise UserError(f"--timeout {config.timeout:g}: give seconds above 0.")
    if not 0 < config.max_body_mb <= 4096:
        raise UserError(f"--max-body-mb {config.max_body_mb:g}: give 4096 or less, above 0.")
    if not 0 <= config.drain <= 3600:
        raise UserError(f"--drain {config.drain:g}: give 0 to 3600 seconds.")


def _require(*, grpc: bool) -> None:
    """Raises a UserError that names the packages that are needed and not installed."""
    import importlib.util

    needed = {
        "fastapi": "fastapi",
        "uvicorn": "uvicorn",
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
