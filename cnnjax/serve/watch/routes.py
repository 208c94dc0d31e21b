"""The ways in and out of the watch over HTTP: labels that come back, and what has drifted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cnnjax.errors import UserError
from cnnjax.serve import protocol
from cnnjax.serve.http import asgi, described
from cnnjax.serve.refusals import Invalid, Refused
from cnnjax.serve.watch.observer import Watch

MOST_BYTES, BODY_SECS = 65_536, 20.0
# The watch hears of an answer a moment after the client has it.
TRIES, TRY_SECS = 5, 0.1
_LABEL = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
FEEDBACK: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "request_id": {"type": "string"},
                        "label": _LABEL,
                        "labels": {"type": "array", "items": _LABEL},
                        "predicted": _LABEL,
                        "confidence": {"type": "number"},
                    },
                },
                "example": {"request_id": "4f1c", "label": "7"},
            }
        },
    }
}


class NotWatched(Refused):
    """No such model is watched, or no such answer waits for its label."""

    status, reason = 404, "unknown"


def routes(watch: Watch) -> Callable[[FastAPI], None]:
    """Returns what adds `POST /v1/models/NAME:feedback` and `GET /v1/models/NAME:drift`."""

    def add(app: FastAPI) -> None:
        @app.post(
            "/v1/models/{name}:feedback",
            tags=["watch"],
            responses=described.answers(described.Labeled),
            openapi_extra=FEEDBACK,
        )
        async def feedback(request: Request, name: str) -> JSONResponse:
            """Takes the true label of an answer, and returns the accuracy so far."""
            content = protocol.read_json(await asgi.read_body(request, MOST_BYTES, BODY_SECS))
            found = await _asked(watch.feedback, name, content, tries=TRIES)
            return JSONResponse(found)

        @app.get(
            "/v1/models/{name}:drift",
            tags=["watch"],
            responses=described.answers(described.Drift),
        )
        async def drift(name: str) -> JSONResponse:
            """How far the newest images are from the reference, and what has drifted."""
            return JSONResponse(await _asked(watch.describe, name))

    return add


async def _asked(
    ask: Callable[..., dict[str, Any]], *arguments: Any, tries: int = 1
) -> dict[str, Any]:
    for left in reversed(range(tries)):
        try:
            return await asyncio.to_thread(ask, *arguments)
        except KeyError as error:
            if not left:
                raise NotWatched(error.args[0]) from None
            await asyncio.sleep(TRY_SECS)
        except UserError as error:
            raise Invalid(str(error)) from None
    raise AssertionError("one of the tries returned or raised")
