"""The HTTP side: an ASGI application of a repository, by FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

import cnnjax
from cnnjax.serve import protocol
from cnnjax.serve.ask import ask
from cnnjax.serve.http import asgi, described
from cnnjax.serve.http.pictures import MOST_PIXELS
from cnnjax.serve.measures import Measures, watch_compilations, watch_memory
from cnnjax.serve.refusals import Invalid, Refused
from cnnjax.serve.repository import Observer, Repository

# Bodies of more bytes are read on a thread: JSON takes 10 ms a MiB.
LARGE_BODY = 262_144
EXTENSIONS = ("binary_tensor_data", "model_repository", "timeout")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a request may cost.

    Attributes:
      body_bytes: of a request.
      pixels: of an image file, by its header.
      images: in a request.
      body_secs: in which a body must have come.
      deadline_secs: for an answer, where the client names none.
    """

    body_bytes: int = 16 * 2**20
    pixels: int = MOST_PIXELS
    images: int = 1024
    body_secs: float = 20.0
    deadline_secs: float = 30.0


def application(
    repository: Repository,
    *,
    middleware: Sequence[Callable[[asgi.App], asgi.App]] = (),
    observers: Sequence[Observer] = (),
    routes: Sequence[Callable[[FastAPI], None]] = (),
    bounds: Bounds | None = None,
    traced: Callable | None = None,
    loads: bool = True,
) -> asgi.App:
    """Returns the ASGI application that serves a repository.

    Args:
      repository: of models.
      middleware: functions of an ASGI application to another, the outermost first. They see the
        request's id in `scope["state"]["request_id"]`, and may add to the line in the log by the
        dict `scope["state"]["logged"]`.
      observers: called with (model, version, images, logits, request id) after each answer, on a
        thread of their own.
      routes: functions that add routes of their own, which come before the others.
      bounds: see `Bounds`.
      traced: a context manager around each request, of its scope; see `traces`.
      loads: whether the models are loaded when the application starts, and closed when it stops;
        otherwise that is up to the caller.
    """
    from cnnjax.serve.http import simple

    repository.add_observers(observers)
    bounds = bounds or Bounds()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        watch_compilations(repository.measures.compiled.inc)
        task = asyncio.create_task(repository.start()) if loads else None
        yield
        if task is not None:
            task.cancel()
            await repository.close()

    app = FastAPI(
        title="cnnjax",
        version=cnnjax.__version__,
        description=described.SUMMARY,
        lifespan=lifespan,
        generate_unique_id_function=lambda route: route.name,
        docs_url=None,
        redoc_url=None,
    )
    direct = asgi.Direct()
    add_health(app, repository)
    add_models(app, direct, repository, bounds)
    add_repository(app, repository)
    # Before the others: what is called `{name}` there takes any text.
    for add in routes:
        add(app)
    simple.add_routes(app, direct, repository, bounds)
    refused = add_errors(app, repository.measures)
    plain = app.openapi
    app.openapi = lambda: described.with_requests(plain())  # type: ignore[method-assign]
    inner = direct.before(asgi.with_heads(app), refused)
    for wrap in reversed(middleware):
        inner = wrap(inner)
    return asgi.Recorded(inner, repository.measures, traced)


def add_health(app: FastAPI, repository: Repository) -> None:
    """Adds the health of the server, its metadata, and its metrics."""

    @app.get("/v2/health/live", tags=["health"], responses=described.answers(described.Live))
    async def live() -> Response:
        """Whether the server answers."""
        return JSONResponse({"live": True})

    @app.get("/v2/health/ready", tags=["health"], responses=described.readiness(described.Ready))
    async def ready() -> Response:
        """Whether every model is loaded and warm, and the server is not stopping."""
        is_ready = repository.ready
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/v2", tags=["health"], responses=described.answers(described.Server))
    async def server() -> Response:
        """The name, version and extensions of the server."""
        said = {"name": "cnnjax", "version": cnnjax.__version__, "extensions": list(EXTENSIONS)}
        return JSONResponse(said)

    @app.get("/metrics", tags=["health"], response_class=Response)
    async def metrics() -> Response:
        """The numbers that Prometheus reads."""
        watch_memory(repository.measures)
        repository.count_queues()
        content, kind = await asyncio.to_thread(repository.measures.text)
        return Response(content, media_type=kind)


def add_models(app: FastAPI, direct: asgi.Direct, repository: Repository, bounds: Bounds) -> None:
    """Adds metadata, readiness and inference of models."""

    async def metadata(name: str, version: str = "") -> Response:
        """The versions and tensors of a model."""
        return JSONResponse(model_metadata(repository, name, version))

    async def ready(name: str, version: str = "") -> Response:
        """Whether a model answers."""
        is_ready = repository.is_ready(name, version)
        return JSONResponse({"name": name, "ready": is_ready}, 200 if is_ready else 503)

    async def infer(request: Request, name: str, version: str = "") -> Response:
        """The model's answer to a tensor of images."""
        body = await asgi.read_body(request, bounds.body_bytes, bounds.body_secs)
        length = request.headers.get(protocol.HEADER_LENGTH)
        read = functools.partial(protocol.read_request, body, length, largest=bounds.images)
        asked = await asyncio.to_thread(read) if len(body) > LARGE_BODY else read()
        answer = await asgi.unless_gone(request, _answer(request, name, version, asked))
        content, json_bytes = protocol.response(answer, asked)
        if json_bytes is None:
            return Response(content, media_type="application/json")
        headers = {protocol.HEADER_LENGTH: str(json_bytes)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def _answer(
        request: Request, name: str, version: str, asked: protocol.Request
    ) -> protocol.Answer:
        _, answer = await ask(
            repository,
            name,
            asked.given,
            version=version,
            request_id=request.state.request_id,
            deadline_secs=asked.deadline_secs or bounds.deadline_secs,
            most_pixels=bounds.pixels,
            note=functools.partial(setattr, request.state, "logged"),
        )
        return answer

    for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        direct.add(f"{path}/infer", infer)
        kind = "_version" if "version" in path else ""
        for suffix, function, method, answers, more in (
            ("", metadata, "GET", described.answers(described.Metadata), {}),
            ("/ready", ready, "GET", described.readiness(described.ModelReady), {}),
            ("/infer", infer, "POST", described.answers(described.Answer), described.INFER),
        ):
            app.add_api_route(
                path + suffix,
                function,
                methods=[method],
                operation_id=f"model_{function.__name__}{kind}",
                responses=answers,
                openapi_extra=more,
                tags=["models"],
            )


def add_repository(app: FastAPI, repository: Repository) -> None:
    """Adds the index of models, loading and unloading."""

    @app.post(
        "/v2/repository/index", tags=["repository"], responses=described.answers(described.Index)
    )
    async def index(request: Request) -> Response:
        """Every version of every model, with its state."""
        body = await asgi.read_body(request, 65_536, 20.0)
        only_ready = protocol.read_json(body).get("ready", False) if body.strip() else False
        return JSONResponse(repository.index(only_ready=only_ready is True))

    @app.post(
        "/v2/repository/models/{name}/load",
        tags=["repository"],
        responses=described.answers(described.Nothing),
    )
    async def load(request: Request, name: str) -> Response:
        """Loads a model anew from where it comes from; the old one answers until then."""
        await _no_parameters(request)
        await repository.change("load", name)
        return JSONResponse({})

    @app.post(
        "/v2/repository/models/{name}/unload",
        tags=["repository"],
        responses=described.answers(described.Nothing),
    )
    async def unload(request: Request, name: str) -> Response:
        """Stops answering for a model, when what was accepted has been answered."""
        await _no_parameters(request)
        await repository.change("unload", name)
        return JSONResponse({})


async def _no_parameters(request: Request) -> None:
    """Refuses files and settings within a request: models come from where the server was told."""
    body = await asgi.read_body(request, 65_536, 20.0)
    if not body.strip():
        return
    parameters = protocol.read_json(body).get("parameters") or {}
    if not isinstance(parameters, dict) or parameters.keys() - {"unload_dependents"}:
        raise Invalid("parameters are not taken: a model is loaded from where the server was told.")


def model_metadata(repository: Repository, name: str, version: str = "") -> dict[str, Any]:
    """Returns the metadata of a model, of the version asked for or the one that answers."""
    version, found = repository.find(name, version)
    versions = sorted(repository.models[name].loaded)
    return protocol.metadata(name, versions, found.runtime)


def add_errors(
    app: FastAPI, measures: Measures
) -> Callable[[Request, Refused], Awaitable[Response]]:
    """Says every error as the protocol does: `{"error": TEXT}`; returns what says a refusal."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        measures.refused.labels(error.reason).inc()
        # For the audit log.
        request.state.refused = error.reason
        headers = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        return JSONResponse({"error": error.text}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def known(request: Request, error: HTTPException) -> Response:
        where, headers = request.url.path[:200], error.headers
        text = f"{request.method} {where}: {error.detail}"
        if error.status_code == 405:
            methods = asgi.allowed(app, request.scope)
            headers = {"Allow": ", ".join(methods)}
            if request.method == "OPTIONS":
                return Response(None, 204, headers)
            text = f"{request.method} {where}: send {' or '.join(methods)}."
        return JSONResponse({"error": text}, error.status_code, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": f"invalid request: {str(error.errors())[:300]}"}, 400)

    return refused
