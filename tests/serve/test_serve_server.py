"""Where a server listens, and what it says of requests to a collector."""

import asyncio
import socket

import pytest

from cnnjax.errors import UserError
from cnnjax.serve.server import check_host, event_loop, is_loopback, listen
from cnnjax.serve.workers import check_count
from tests.serve.made import images
from tests.serve.served import INFER, Served, body


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
    ],
)
def test_others_reach_a_server_only_if_it_is_told_so(host, is_local):
    assert is_loopback(host) == is_local
    check_host(host, guarded=True)
    if not is_local:
        with pytest.raises(UserError, match=f"--host {host}: others could reach it"):
            check_host(host, guarded=False)


def test_a_port_that_is_taken_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}: "):
            listen("127.0.0.1", port)
        with pytest.raises(UserError, match="choose another --grpc-port or --host"):
            listen("127.0.0.1", port, "--grpc-port")
    with pytest.raises(UserError, match="--port 70000"):
        listen("127.0.0.1", 70000)
    with pytest.raises(UserError, match=r"cannot listen at nowhere\.invalid:1"):
        listen("nowhere.invalid", 1)


@pytest.mark.parametrize("count", [0, 300])
def test_workers_out_of_range_are_one_line(count):
    with pytest.raises(UserError, match=f"--workers {count}: give 1 to 256"):
        check_count(count)


def test_a_request_is_a_span_of_its_callers_trace(monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from cnnjax.serve import application
    from cnnjax.serve.traces import tracing

    served, exporter = Served(monkeypatch), InMemorySpanExporter()
    spans = tracing("http://collector", exporter=exporter)
    served.app = application(served.repository, traced=spans.http, loads=False)
    parent = f"00-{'1' * 32}-{'2' * 16}-01"
    headers = {"traceparent": parent, "x-request-id": "a"}
    served.ask(("POST", INFER, {"json": body(images(1)), "headers": headers}))
    spans.end()
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v2/models/{name}/infer"
    assert format(span.context.trace_id, "032x") == "1" * 32
    assert format(span.parent.span_id, "016x") == "2" * 16
    told = {"request.id": "a", "model": "digits", "version": "1", "http.response.status_code": 200}
    assert told.items() <= dict(span.attributes).items()
    with pytest.raises(UserError, match="--traces here: give a URL"):
        tracing("here")


def test_it_runs_on_the_quick_event_loop_where_that_is_installed():
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=event_loop()) as runner:
        assert isinstance(runner.get_loop(), uvloop.Loop)
