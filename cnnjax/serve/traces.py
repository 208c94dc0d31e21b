"""OpenTelemetry: a span for each request, sent by OTLP to a collector."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import cnnjax
from cnnjax.errors import UserError


def tracing(endpoint: str, *, exporter: Any = None) -> tuple[Callable, Callable[[], None]]:
    """Returns a context manager around each request, of its ASGI scope, and what ends the traces.

    A request that carries a `traceparent` (W3C Trace Context) is a part of that trace. The span has
    the request's id, route, model, version and status.

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

    @contextlib.contextmanager
    def traced(scope: Any) -> Iterator[None]:
        sent = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        parent = propagator.extract(sent)
        kind = trace.SpanKind.SERVER
        with tracer.start_as_current_span(scope["method"], parent, kind=kind) as span:
            try:
                yield
            finally:
                route = getattr(scope.get("route"), "path", "other")
                span.update_name(f"{scope['method']} {route}")
                state = scope.get("state", {})
                about = {"http.route": route, "http.request.method": scope["method"]}
                about |= {"request.id": state.get("request_id", "")} | state.get("logged", {})
                about["http.response.status_code"] = state.get("status", 0)
                span.set_attributes(about)

    return traced, provider.shutdown
