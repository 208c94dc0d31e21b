"""Soaks a server: a steady load for long, and whether its memory stays as it is.

    cnnjax serve --run lenet=RUN --port 8080 &
    python scripts/serve_soak.py --process $! --model lenet --minutes 30

It measures for some seconds how many single images per second the server answers, then sends a
fraction of that (80% by default) at fixed times, whether or not answers have come. It ends with 1
if memory grew by more than 2% from the first fifth after the warm-up to the last, or if anything
but 200 and 429 was answered. It asks only this machine.
"""

import argparse
import asyncio
import collections
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from cnnjax.data import load

MEASURE_SECS, SAMPLE_SECS, CLIENTS = 10.0, 5.0, 16
# Caches and allocators fill up at first.
WARM_FRACTION = 0.2


def memory_mib(process: int) -> float:
    """Returns the resident memory of a process and of those that it started."""
    own = [process]
    for each in own:
        tasks = Path(f"/proc/{each}/task")
        own += [
            int(child)
            for task in tasks.iterdir()
            for child in (task / "children").read_text(encoding="ascii").split()
        ]
    pages = sum(int(Path(f"/proc/{each}/statm").read_bytes().split()[1]) for each in own)
    return pages * 4096 / 2**20


def body_of(image: np.ndarray) -> dict:
    """Returns a request of the Open Inference Protocol for one image."""
    tensor = {
        "name": "image",
        "shape": [1, *image.shape],
        "datatype": "UINT8",
        "data": image.ravel().tolist(),
    }
    return {"inputs": [tensor]}


async def send(client, path: str, body: dict, counts: collections.Counter, times) -> None:
    """Sends a request; counts its status, and keeps its time."""
    import httpx

    began = time.perf_counter()
    try:
        status = str((await client.post(path, json=body)).status_code)
    except httpx.HTTPError as error:
        status = type(error).__name__
    counts[status] += 1
    times.append(time.perf_counter() - began)


async def capacity(client, path: str, bodies: list[dict]) -> float:
    """Returns requests per second that some clients get answered who each wait for theirs."""
    counts: collections.Counter = collections.Counter()
    end = time.perf_counter() + MEASURE_SECS

    async def ask(number: int) -> None:
        while time.perf_counter() < end:
            await send(client, path, bodies[number % len(bodies)], counts, [])

    await asyncio.gather(*(ask(number) for number in range(CLIENTS)))
    return counts["200"] / MEASURE_SECS


async def soak(client, path: str, bodies: list[dict], args, rate: float):
    """Sends at fixed times; returns counts, times, and (seconds, MiB) samples of memory."""
    counts: collections.Counter = collections.Counter()
    times: collections.deque = collections.deque(maxlen=100_000)
    samples: list[tuple[float, float]] = []
    tasks: set[asyncio.Task] = set()
    began, sent = time.perf_counter(), 0
    while (now := time.perf_counter() - began) < args.minutes * 60:
        while sent < now * rate and len(tasks) < 1024:
            body = bodies[sent % len(bodies)]
            task = asyncio.create_task(send(client, path, body, counts, times))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        if now > len(samples) * SAMPLE_SECS:
            samples.append((now, memory_mib(args.process)))
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    return counts, times, samples


def growth(samples: list[tuple[float, float]]) -> float:
    """Returns how much larger the last fifth is than the first after the warm-up, by the means."""
    sizes = [size for _, size in samples][int(WARM_FRACTION * len(samples)) :]
    fifth = max(1, len(sizes) // 5)
    return statistics.mean(sizes[-fifth:]) / statistics.mean(sizes[:fifth]) - 1


async def run(args) -> int:
    """Measures, soaks, and prints what came of it."""
    import httpx

    images = load("mnist").test.image[:500]
    bodies = [body_of(image) for image in images]
    path = f"/v2/models/{args.model}/infer"
    headers = {"authorization": f"Bearer {args.key}"} if args.key else {}
    limits = httpx.Limits(max_connections=256)
    url = f"http://127.0.0.1:{args.port}"
    async with httpx.AsyncClient(
        base_url=url, headers=headers, limits=limits, timeout=60
    ) as client:
        most = await capacity(client, path, bodies)
        rate = args.load * most
        print(f"capacity     {most:.0f} images/s; soaking with {rate:.0f} images/s", flush=True)
        counts, times, samples = await soak(client, path, bodies, args, rate)
    for seconds, size in samples[:: max(1, len(samples) // 10)]:
        print(f"  {seconds:6.0f} s  {size:8.1f} MiB")
    grew = growth(samples)
    p50, p99 = np.quantile(times, [0.5, 0.99]) * 1e3
    print(f"answered     {dict(counts)}; p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    print(f"memory       {grew:+.2%} from the first fifth after the warm-up to the last")
    return int(grew > 0.02 or bool(counts.keys() - {"200", "429"}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--process", type=int, required=True, help="of the server")
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8080, help="of the server, on this machine")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--load", type=float, default=0.8, help="fraction of its capacity")
    parser.add_argument("--key", default="")
    args = parser.parse_args()
    if not Path(f"/proc/{args.process}").exists():
        parser.error(f"--process {args.process}: there is no such process")
    return asyncio.run(run(args))


if __name__ == "__main__":
    sys.exit(main())
