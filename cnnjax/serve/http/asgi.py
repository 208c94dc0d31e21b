"""What every HTTP request goes through: an id, a limit, a clock, a line in the log."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

from cnnjax.serve.logs import log
from cnnjax.serve.measures import Measures
from cnnjax.serve.refusals import Invalid, Refused, TooLarge

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Of nginx: the client closed the connection before the answer.
CLIENT_GONE = 499
# An answer that takes longer is worth a look at whether its client is still there.
PATIENCE_SECS = 0.05
# Routes that probes and scrapers call every few seconds are not in the log.
QUIET = ("/v2/health/live", "/v2/health/ready", "/metrics")
# The name of routes that take any method, to say which there are.
CATCH_ALL = "other_verbs"


class ClientGone(Refused):
    """The client closed its connection."""

    status, reason = CLIENT_GONE, "client_gone"


def request_id_of(sent: str | None) -> str:
    """Returns the id that a client sent, if it is letters, digits and `._:-`; or a new one."""
    return sent if sent and REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def header(scope: Scope, name: bytes) -> str | None:
    """Returns a request's header; None where it has none."""
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return None


class Recorded:
    """ASGI middleware that gives requests their ids, counts, times and logs them.

    The id is in `scope["state"]["request_id"]`, and in the header `X-Request-Id` of the answer.
    """

    def __init__(self, app: App, measures: Measures, traced: Callable | None = None) -> None:
        """Args: the application, the counters, and a context manager around each request."""
        self.app, self.measures, self.traced = app, measures, traced

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(header(scope, b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = 0, time.perf_counter()

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = scope["state"]["status"] = message["status"]
                headers = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            if self.traced is None:
                await self.app(scope, receive, sending)
            else:
                with self.traced(scope):
                    await self.app(scope, receive, sending)
        except asyncio.CancelledError:
            # uvicorn does so when what the server was given to end in is over.
            if not status:
                await respond_error(sending, 503, "the server is stopping: ask another.")
        except Exception as error:
            log("error", request_id=request_id, error=repr(error))
            if status:
                raise
            await respond_error(sending, 500, "the server failed: its log has the request's id.")
        finally:
            secs = time.perf_counter() - began
            self._record(scope, status or CLIENT_GONE, secs, request_id)

    def _record(self, scope: Scope, status: int, secs: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.measures.requests.labels("http", route, str(status)).inc()
        self.measures.latency.labels("http", route).observe(secs)
        if route in QUIET and status < 400:
            return
        log(
            "request",
            request_id=request_id,
            client=(scope.get("client") or [None])[0],
            method=scope["method"],
            path=scope["path"][:300],
            status=status,
            ms=round(secs * 1e3, 3),
            **scope["state"].get("logged", {}),
        )


async def respond_error(send: Any, status: int, text: str) -> None:
    """Sends an error as the protocol has it: `{"error": TEXT}`."""
    import json

    body = json.dumps({"error": text}).encode()
    sized = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    start = {"type": "http.response.start", "status": status, "headers": sized}
    await send(start)
    await send({"type": "http.response.body", "body": body})


async def read_body(request: Any, most_bytes: int, secs: float) -> bytes:
    """Returns the body of a request of Starlette's.

    Args:
      request: whose body has not been read.
      most_bytes: more are refused, by the header where it says so, before any are read.
      secs: in which it must have come.

    Raises:
      TooLarge: too many bytes.
      Invalid: it came too slowly, or the header is wrong.
      ClientGone: the client closed the connection.
    """
    told = request.headers.get("content-length", "0")
    if not (told.isascii() and told.isdigit()):
        raise Invalid("Content-Length is no number.")
    if int(told[:20]) > most_bytes:
        raise TooLarge(f"the body has {told[:20]} bytes, more than the {most_bytes} accepted.")
    parts, size = [], 0
    try:
        async with asyncio.timeout(secs):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone("the client closed the connection.")
                part = message.get("body", b"")
                size += len(part)
                if size > most_bytes:
                    raise TooLarge(f"the body has more than the {most_bytes} bytes accepted.")
                parts.append(part)
                if not message.get("more_body"):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError:
        raise Slow(f"the body did not come within {secs:g} s.") from None


class Slow(Refused):
    """The body did not come in time."""

    status, reason = 408, "slow"


async def unless_gone(request: Any, work: Coroutine[Any, Any, Any]) -> Any:
    """Returns what `work` returns; cancels it where the client closes the connection.

    Args:
      request: of Starlette's, whose body has been read.
      work: that takes its time.

    Raises:
      ClientGone: the client closed the connection.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    watching: asyncio.Task | None = None
    is_gone = False

    async def until_gone() -> None:
        nonlocal is_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    def watch() -> None:
        nonlocal watching
        watching = loop.create_task(until_gone())

    # Most answers are there before: no other task is made for them.
    timer = loop.call_later(PATIENCE_SECS, watch)
    try:
        return await work
    except asyncio.CancelledError:
        # Someone else may have asked for it, too.
        if is_gone and task.uncancel() == 0:
            raise ClientGone("the client closed the connection.") from None
        raise
    finally:
        timer.cancel()
        if watching is not None:
            watching.cancel()


@dataclasses.dataclass(frozen=True)
class Direct:
    """Routes whose POST requests go to their functions at once, past FastAPI.

    FastAPI describes the same routes, and answers their other methods; its middleware and its
    reading of parameters take a third of the time that a small request does.

    Attributes:
      routes: of Starlette's; the endpoint of each takes the request and the path's parameters.
    """

    routes: list[Any] = dataclasses.field(default_factory=list)

    def add(self, path: str, endpoint: Callable[..., Awaitable[Any]]) -> None:
        """Adds a path, with parameters in braces."""
        from starlette.routing import Route

        self.routes.append(Route(path, endpoint, methods=["POST"]))

    def before(self, app: App, refuse: Callable[[Any, Refused], Awaitable[Any]]) -> App:
        """Returns an application that answers these routes, and leaves the others to `app`.

        Args:
          app: for all else.
          refuse: the answer to a request that was refused.
        """
        from starlette.requests import Request
        from starlette.routing import Match

        async def asgi(scope: Scope, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["method"] == "POST":
                for route in self.routes:
                    match, found = route.matches(scope)
                    if match is Match.FULL:
                        scope.update(found, route=route)
                        request = Request(scope, receive, send)
                        try:
                            answer = await route.endpoint(request, **request.path_params)
                        except Refused as refused:
                            answer = await refuse(request, refused)
                        await answer(scope, receive, send)
                        return
            await app(scope, receive, send)

        return asgi


def verbs_of(app: Any, path: str) -> dict[str, str]:
    """Returns the verbs behind a path, such as `predict` of `/v1/models/{name}:predict`.

    Args:
      app: of FastAPI's.
      path: before the colon.

    Returns:
      The method of each.
    """
    found = {}
    for route in app.routes:
        before, colon, verb = getattr(route, "path", "").rpartition(":")
        if colon and before == path and route.name != CATCH_ALL:
            found[verb] = min(route.methods)
    return found


def allowed(app: Any, scope: Scope) -> list[str]:
    """Returns the methods that the path of a request takes; none for a path that is not there."""
    from starlette.routing import Match

    found: set[str] = set()
    for route in app.routes:
        if route.matches(scope)[0] == Match.NONE:
            continue
        if route.name == CATCH_ALL:
            break
        found |= route.methods
    return sorted(found | {"HEAD"} if "GET" in found else found)


def with_heads(app: App) -> App:
    """Returns an application that answers HEAD as GET, whose body the server does not send."""

    async def asgi(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await app(scope, receive, send)
            return
        scope["method"] = "GET"
        try:
            await app(scope, receive, send)
        finally:
            scope["method"] = "HEAD"

    return asgi
