"""The load generator counts what it is answered, and its open loop pays for what waits."""

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "load.py"


@pytest.fixture(scope="module")
def load():
    spec = importlib.util.spec_from_file_location("benchmarks_load", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measured(answers, measure):
    """Returns what `measure(url)` finds of a server that gives these (status, secs) in turn."""
    number = 0

    async def serve(reader, writer):
        nonlocal number
        while head := await reader.readuntil(b"\r\n\r\n"):
            await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
            status, secs = answers[number % len(answers)]
            number += 1
            await asyncio.sleep(secs)
            writer.write(f"HTTP/1.1 {status} X\r\nX-content-length: 9\r\n".encode())
            writer.write(b"Content-Length: 2\r\n\r\nok")

    async def quietly(reader, writer):
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    async def main():
        server = await asyncio.start_server(quietly, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        found = await measure(f"http://127.0.0.1:{port}/a?b=1")
        server.close()
        return found

    return asyncio.run(main())


def test_statuses_are_counted_and_only_answers_have_latencies(load):
    request = load.request_of("http://h/a?b=1", b"body", {"X-A": "1"})
    assert request.startswith(b"POST /a?b=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nX-A: 1\r\n")
    found = measured([(200, 0.0), (429, 0.0)], lambda url: load.closed_loop(url, request, 2, 0.2))
    assert set(found.statuses) == {200, 429}
    assert len(found.latencies) == found.statuses[200] and found.rate > 1


def test_latencies_count_from_when_a_request_was_due(load):
    # One connection, 0.02 s an answer, 100 due a second: each waits for all before it.
    found = measured(
        [(200, 0.02)],
        lambda url: load.open_loop(
            url, b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 1, 0.4, 100
        ),
    )
    assert found.percentile(0.99) > 5 * 20


def test_percentiles_are_of_the_ordered_latencies(load):
    found = load.Measured([0.001 * number for number in range(100, 0, -1)], {}, 1.0)
    assert found.percentile(0.5) == pytest.approx(51) and found.percentile(0.99) == pytest.approx(
        100
    )
