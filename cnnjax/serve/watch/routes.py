"""The ways in and out of the watch over HTTP: labels that come back, and what has drifted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from cnnjax.errors import UserError
from cnnjax.serve.watch.observer import Watch

MOST_BYTES = 65_536
FEEDBACK = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "request_id": {"type": "string"},
                        "label": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                        "labels": {
                            "type": "array",
                            "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                        },
                        "predicted": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
                        "confidence": {"type": "number"},
                    },
                },
                "example": {"request_id": "4f1c", "label": "7"},
            }
        },
    }
}


def add_routes(app: Any, watch: Watch) -> None:
    """Adds `POST /v1/models/NAME:feedback` and `GET /v1/models/NAME:drift` to a FastAPI app."""

    @app.post("/v1/models/{name}:feedback", tags=["watch"], openapi_extra=FEEDBACK)
    async def feedback(request: Request, name: str) -> JSONResponse:
        """Takes the true label of an answer, and returns the accuracy so far."""
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return JSONResponse({"error": f"more than {MOST_BYTES} bytes"}, 413)
        try:
            content = json.loads(body)
            return JSONResponse(await asyncio.to_thread(watch.feedback, name, content))
        except KeyError as error:
            return JSONResponse({"error": error.args[0]}, 404)
        except (ValueError, RecursionError) as error:
            text = str(error) if isinstance(error, UserError) else "the body is no JSON"
            return JSONResponse({"error": text}, 400)

    @app.get("/v1/models/{name}:drift", tags=["watch"])
    async def drift(name: str) -> JSONResponse:
        """How far the newest images are from the reference, and which statistics have drifted."""
        try:
            return JSONResponse(await asyncio.to_thread(watch.describe, name))
        except KeyError as error:
            return JSONResponse({"error": error.args[0]}, 404)
