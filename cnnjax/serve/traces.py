"""OpenTelemetry: a span for each request, sent by OTLP to a collector."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import cnnjax
from cnnjax.errors import UserError
from cnnjax.serve.rpc.messages import SERVICE

# Of gRPC: UNKNOWN, DEADLINE_EXCEEDED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE, DATA_LOSS are the
# server's failures; the others are their callers' (OpenTelemetry, conventions for gRPC).
SERVER_ERRORS = (2, 4, 12, 13, 14, 15)


class Tracing(NamedTuple):
    """Spans around requests, and their end.

    Attributes:
      http: a context manager around a request, of its ASGI scope.
      rpc: a context manager around a gRPC call, of the method's name and its metadata; it gives a
        dict of attributes, to which the call adds.
      end: sends what is left.
    """

    http: Callable[[Any], AbstractContextManager[None]]
    rpc: Callable[[str, dict[str, Any]], AbstractContextManager[dict[str, Any]]]
    end: Callable[[], None]


def tracing(endpoint: str, *, exporter: Any = None) -> Tracing:
    """Returns what makes a span of each request, over HTTP and gRPC.

    A request that carries a `traceparent` (W3C Trace Context) is a part of that trace. The span has
    the request's id, route or method, model, version and status, by the names of OpenTelemetry's
    conventions where these have one.

    Args:
      endpoint: the URL of an OTLP collector over HTTP, such as http://127.0.0.1:4318/v1/traces.
      exporter: of spans, instead of that of OTLP.

    Raises:
      UserError: OpenTelemetry is not installed, or the endpoint is no URL.
    """
    if importlib.util.find_spec("opentelemetry.sdk") is None:
        raise UserError("--traces needs opentelemetry-sdk: pip install 'cnnjax[serve]'.")
    if not endpoint.startswith(("http://", "https://")):
        raise UserError(f"--traces {endpoint}: give a URL, as http://127.0.0.1:4318/v1/traces.")
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if exporter is None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        exporter = OTLPSpanExporter(endpoint=endpoint)
    told = {"service.name": "cnnjax", "service.version": cnnjax.__version__}
    provider = TracerProvider(resource=Resource.create(told))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer, propagator = provider.get_tracer("cnnjax.serve"), TraceContextTextMapPropagator()
    kind = trace.SpanKind.SERVER

    @contextlib.contextmanager
    def http(scope: Any) -> Iterator[None]:
        sent = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        parent = propagator.extract(sent)
        with tracer.start_as_current_span(scope["method"], parent, kind=kind) as span:
            try:
                yield
            finally:
                route = getattr(scope.get("route"), "path", "other")
                span.update_name(f"{scope['method']} {route}")
                state = scope.get("state", {})
                about = {"http.route": route, "http.request.method": scope["method"]}
                about |= {"request.id": state.get("request_id", "")} | state.get("logged", {})
                about["http.response.status_code"] = status = state.get("status", 0)
                span.set_attributes(about)
                if status >= 500:
                    span.set_status(trace.StatusCode.ERROR)

    @contextlib.contextmanager
    def rpc(method: str, metadata: dict[str, Any]) -> Iterator[dict[str, Any]]:
        parent = propagator.extract({k: v for k, v in metadata.items() if isinstance(v, str)})
        about = {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": method}
        name = f"{SERVICE}/{method}"
        # How a call is refused is an exception of grpc's, and no failure.
        with tracer.start_as_current_span(
            name, parent, kind=kind, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield about
            finally:
                span.set_attributes(about)
                if about.get("rpc.grpc.status_code") in SERVER_ERRORS:
                    span.set_status(trace.StatusCode.ERROR)

    return Tracing(http, rpc, provider.shutdown)
