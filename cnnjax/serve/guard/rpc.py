"""The guard around a gRPC server: an interceptor with the same policy as HTTP has."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from cnnjax.serve.guard import requests
from cnnjax.serve.guard.audit import event
from cnnjax.serve.guard.policy import Policy, admit
from cnnjax.serve.guard.refusal import Refused


def interceptor(policy: Policy) -> Any:
    """Returns a `grpc.aio.ServerInterceptor` that lets in what the policy allows.

    The key is in the metadata as in HTTP's headers: `authorization` or `x-api-key`. Every method of
    the Open Inference Protocol has one request and one response, and so has gRPC's health check.
    """
    import grpc

    class Guard(grpc.aio.ServerInterceptor):
        async def intercept_service(self, continuation: Any, details: Any) -> Any:
            handler = await continuation(details)
            if handler is None or handler.unary_unary is None:
                return handler
            answer = _checked(policy, handler.unary_unary, details)
            return grpc.unary_unary_rpc_method_handler(
                answer,
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )

    return Guard()


def server_options() -> list[tuple[str, int]]:
    """Returns the options of a gRPC server that bound what a stranger costs (bytes, ms)."""
    return [
        ("grpc.max_metadata_size", requests.MAX_HEADER_BYTES),
        # Clients that send nothing else may not keep a connection busy with pings.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def _checked(policy: Policy, answer: Any, details: Any) -> Any:
    import grpc

    method, metadata = details.method, _pairs(details.invocation_metadata)
    needed, request_id = requests.needed_role_of_call(method), requests.request_id(metadata)

    async def checked(request: Any, context: Any) -> Any:
        began, identity, reason, who = time.monotonic(), None, "", ""
        status: Any = "OK"
        try:
            requests.check_headers(metadata)
            for field in ("model_name", "name"):
                if isinstance(name := getattr(request, field, ""), str) and name:
                    requests.check_model_name(name)
            credential = requests.credential(metadata)
            identity = await asyncio.to_thread(admit, policy, credential, needed)
            return await answer(request, context)
        except Refused as refused:
            reason, who, status = refused.reason, refused.who, refused.code
            if refused.retry_after is not None:
                wait = str(max(1, round(refused.retry_after)))
                context.set_trailing_metadata((("retry-after", wait),))
            await context.abort(getattr(grpc.StatusCode, refused.code), refused.text)
        except BaseException:
            status = "ERROR"
            raise
        finally:
            if reason:
                policy.count_refused(reason)
            if needed != requests.OPEN or reason:
                name = getattr(request, "model_name", "") or getattr(request, "name", "")
                code = getattr(context, "code", lambda: None)()
                policy.write(
                    event(
                        "grpc",
                        request_id=request_id,
                        client=context.peer(),
                        status=getattr(code, "name", None) or status,
                        reason=reason,
                        failed=status != "OK",
                        who=identity.name if identity else who,
                        role=identity.role if identity else "",
                        action=method,
                        model=str(name),
                        secs=time.monotonic() - began,
                    )
                )

    return checked


def _pairs(metadata: Any) -> list[tuple[bytes, bytes]]:
    return [
        (key.encode(), value if isinstance(value, bytes) else value.encode())
        for key, value in metadata or ()
        if not key.endswith("-bin")
    ]
