"""An open-loop load generator for HTTP/1.1: requests leave when they are due, answers or not.

    python benchmarks/load.py http://127.0.0.1:8080/v1/models/digits:predict --body digit.png \
        --clients 8 --secs 5

Without --rate every client sends its next request when it has the answer to the last: the
throughput that the server has (closed loop). With it, requests are due at random times (a Poisson
process) at that rate; each is sent by the first connection that is free, and its latency counts
from when it was due, so that a server that stalls pays for what waited meanwhile (coordinated
omission).
"""

import argparse
import asyncio
import dataclasses
import json
import random
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

# After which a request counts as lost.
PATIENCE_SECS = 60.0


@dataclasses.dataclass
class Measured:
    """What one run of the generator saw; latencies in seconds of what was answered with 200."""

    latencies: list[float]
    statuses: dict[int, int]
    secs: float

    @property
    def rate(self) -> float:
        """Requests that were answered with 200, per second."""
        return len(self.latencies) / self.secs

    def percentile(self, share: float) -> float:
        """Returns the latency in milliseconds that this share of requests is within."""
        ordered = sorted(self.latencies)
        if not ordered:
            return float("nan")
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def request_of(url: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Returns the bytes of a POST request."""
    parts = urlsplit(url)
    lines = [f"POST {parts.path}{'?' * bool(parts.query)}{parts.query} HTTP/1.1"]
    lines += [f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connection:
    """One connection that is kept: `ask` returns the status of an answer."""

    def __init__(self, url: str) -> None:
        """Args: the URL, whose host and port are connected to."""
        parts = urlsplit(url)
        self.host, self.port = parts.hostname, parts.port or 80
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> int:
        """Sends a request and reads the whole answer; 0 where the connection breaks, or hangs."""
        try:
            async with asyncio.timeout(PATIENCE_SECS):
                return await self._ask(request)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            self.close()
            return 0

    async def _ask(self, request: bytes) -> int:
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        assert self.reader is not None
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        if b"\r\ntransfer-encoding: chunked" in head:
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                await self.reader.readexactly(size + 2)
            await self.reader.readexactly(2)
        else:
            length = head.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0]
            await self.reader.readexactly(int(length))
        return int(head[9:12])

    def close(self) -> None:
        """Closes the connection; the next request opens another."""
        if self.writer is not None:
            self.writer.close()
        self.reader = self.writer = None


async def closed_loop(url: str, request: bytes, clients: int, secs: float) -> Measured:
    """Each client sends its next request when it has an answer."""
    latencies: list[float] = []
    statuses: dict[int, int] = {}
    end = time.perf_counter() + secs

    async def client() -> None:
        connection = Connection(url)
        while (began := time.perf_counter()) < end:
            status = await connection.ask(request)
            statuses[status] = statuses.get(status, 0) + 1
            if status == 200:
                latencies.append(time.perf_counter() - began)
        connection.close()

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Measured(latencies, statuses, time.perf_counter() - began)


async def open_loop(
    url: str, request: bytes, clients: int, secs: float, rate: float, seed: int = 0
) -> Measured:
    """Requests are due at random times at a rate; connections take them as they are free."""
    latencies: list[float] = []
    statuses: dict[int, int] = {}
    due: asyncio.Queue[float | None] = asyncio.Queue()
    draws = random.Random(seed)

    async def client() -> None:
        connection = Connection(url)
        while (when := await due.get()) is not None:
            status = await connection.ask(request)
            statuses[status] = statuses.get(status, 0) + 1
            if status == 200:
                latencies.append(time.perf_counter() - when)
        connection.close()

    began = when = time.perf_counter()
    clients_ = [asyncio.create_task(client()) for _ in range(clients)]
    while when < began + secs:
        when += draws.expovariate(rate)
        await asyncio.sleep(max(0.0, when - time.perf_counter()))
        due.put_nowait(when)
    for _ in clients_:
        due.put_nowait(None)
    await asyncio.gather(*clients_)
    return Measured(latencies, statuses, time.perf_counter() - began)


async def measure(
    url: str, request: bytes, clients: int, secs: float, rate: float = 0.0
) -> dict[str, float | dict]:
    """Returns throughput, latencies in ms and statuses: of a closed loop, or an open one at `rate`.

    The first second counts for none of these; `before` is how many requests it sent.
    """
    before = await closed_loop(url, request, clients, min(1.0, secs))
    if rate:
        found = await open_loop(url, request, clients, secs, rate)
    else:
        found = await closed_loop(url, request, clients, secs)
    return {
        "throughput": found.rate,
        "p50": found.percentile(0.5),
        "p99": found.percentile(0.99),
        "statuses": {str(status): count for status, count in found.statuses.items()},
        "before": sum(before.statuses.values()),
    }


def run(coroutine):
    """Runs a coroutine on uvloop where that is installed."""
    try:
        import uvloop

        return uvloop.run(coroutine)
    except ImportError:
        return asyncio.run(coroutine)


def main(argv: list[str]) -> None:
    """Measures one URL and prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--body", type=Path, required=True, help="file that is sent")
    parser.add_argument("--header", action="append", default=[], help="NAME:VALUE")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--secs", type=float, default=5.0)
    parser.add_argument(
        "--rate", type=float, default=0.0, help="requests per second of an open loop"
    )
    options = parser.parse_args(argv)
    headers = dict(each.split(":", 1) for each in options.header)
    request = request_of(options.url, options.body.read_bytes(), headers)
    found = run(measure(options.url, request, options.clients, options.secs, options.rate))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
