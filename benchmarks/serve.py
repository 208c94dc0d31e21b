"""Load: a run served here and by LitServe, MLServer and Ray Serve, images as PNG and as tensors.

    python benchmarks/serve.py --run runs/mnist_lenet
    python benchmarks/serve.py --run runs/mnist_lenet --secs 0.5 --clients 1 64 --network ''

The first takes about 20 minutes with all peers, the second 5.

Each server takes its turn, its processes stopped by signal while another is measured. `batching
off` is one image at a time. Throughput is of a closed loop; p50 and p99 are of an open loop, from
when a request was due (see `load.py`), at the same rate: 80% of what both cnnjax and the best peer
answer, or 80% of its own for a server that is slower. CPU is the time of the server's processes per
request of the closed loop, which other work on the machine disturbs less. The generator shares the
machine's cores with the server.

Then each server gets twice what it has answered at most (`above capacity`). What is not 200 is
counted in every row: 429, other errors, and requests that were lost: a connection that broke, or no
answer within a minute. The exit code is 1 where cnnjax loses a request, refuses one below its
capacity, or answers one above it with anything but 200 and 429.

--network serves a second network with random weights. A peer is left out where it is not
installed; `--litserve-python`, `--mlserver-python` and `--ray-python` name Pythons that have them,
and what cnnjax needs:

    python -m venv mlserver && mlserver/bin/pip install mlserver 'uvloop<0.22' .
    python -m venv peers && peers/bin/pip install litserve 'ray[serve]' '.[serve]'
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import serve_contenders as contenders
from serve_processes import Server

OWN = "cnnjax"
ERRORS = ("429", "other", "lost")
# (network, kind of request, clients, server) -> what each round measured.
Rows = dict[tuple[str, str, int, str], list[dict[str, Any]]]


def errors_of(*found: dict[str, Any]) -> dict[str, int]:
    """Returns how many requests were sent, and how many got 429, another error, or no answer."""
    counts = dict.fromkeys(("sent", *ERRORS), 0)
    for statuses in (each["statuses"] for each in found):
        for status, count in statuses.items():
            counts["sent"] += count
            if status != "200":
                counts[{"429": "429", "0": "lost"}.get(status, "other")] += count
    return counts


def _is_own(server: Server) -> bool:
    return server.name.startswith(OWN)


def compare(
    servers: Sequence[Server], network: str, kind: str, clients: int, secs: float, rows: Rows
) -> None:
    """Measures every server's throughput, and then its latency at a rate that it can answer."""
    full = [server.measure(kind, clients, secs) for server in servers]
    own, peers = (
        [most["throughput"] for server, most in zip(servers, full, strict=True) if of(server)]
        for of in (_is_own, lambda server: not _is_own(server))
    )
    common = min(max(own), max(peers, default=max(own)))
    for server, most in zip(servers, full, strict=True):
        # What is slower than these two would only fill its queue.
        rate = 0.8 * min(common, most["throughput"])
        steady = server.measure(kind, clients, secs, rate)
        found = {"p50": steady["p50"], "p99": steady["p99"], "rate": rate}
        found |= {"throughput": most["throughput"], "cpu_ms": most["cpu_ms"]}
        found |= errors_of(most, steady)
        rows.setdefault((network, kind, clients, server.name), []).append(found)
        print(f"{network} {server.name} {kind} {clients}: {json.dumps(found)}", flush=True)


def overload(
    servers: Sequence[Server], network: str, kind: str, clients: int, secs: float, rows: Rows
) -> None:
    """Sends every server twice its largest throughput that was measured, by many connections."""
    for server in servers:
        most = max(
            each["throughput"]
            for (net, _, _, name), rounds in rows.items()
            if (net, name) == (network, server.name)
            for each in rounds
        )
        # Long enough for this server's queue to fill.
        needed = min(10.0, 2 * clients / most) if _is_own(server) else 0.0
        found = server.measure(kind, clients, max(secs, needed), 2 * most)
        found |= {"rate": 2 * most} | errors_of(found)
        rows.setdefault((network, "above capacity", clients, server.name), []).append(found)
        print(f"{network} {server.name} above capacity: {json.dumps(found)}", flush=True)


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Returns the medians of what rounds have measured, and the sums of what they have counted."""
    columns = [key for key in rounds[0] if key not in ("statuses", "sent", *ERRORS)]
    found = {key: statistics.median(each[key] for each in rounds) for key in columns}
    return found | {key: sum(each[key] for each in rounds) for key in ("sent", *ERRORS)}


def best_peer(rows: Rows, network: str, kind: str, clients: int) -> tuple[str, dict[str, float]]:
    """Returns the other server that answers most, batching or not; no name where there is none."""
    peers = {
        name: medians(rounds)
        for (net, what, count, name), rounds in rows.items()
        if (net, what, count) == (network, kind, clients) and not name.startswith(OWN)
    }
    if not peers:
        return "", {}
    name = max(peers, key=lambda each: peers[each]["throughput"])
    return name, peers[name]


def table(rows: Rows) -> str:
    """Returns all rows as a table in Markdown."""
    lines = [
        "| network | request | clients | server | requests/s | of the best peer | CPU ms | at rate "
        "| p50 ms | p99 ms | sent | 429 | other errors | lost |",
        "|" + "---|" * 14,
    ]
    for (network, kind, clients, name), rounds in sorted(rows.items()):
        found = medians(rounds)
        _, best = best_peer(rows, network, kind, clients)
        ratio = f"{found['throughput'] / best['throughput']:.2f}" if best else ""
        lines.append(
            f"| {network} | {kind} | {clients} | {name} | {found['throughput']:.0f} | {ratio} "
            f"| {found['cpu_ms']:.2f} | {found['rate']:.0f} | {found['p50']:.1f} "
            f"| {found['p99']:.1f} | {found['sent']:.0f} "
            f"| {found['429']:.0f} | {found['other']:.0f} | {found['lost']:.0f} |"
        )
    return "\n".join(lines)


def summary(rows: Rows) -> str:
    """Returns this server, batching, beside the best peer of each row, as a table in Markdown."""
    lines = [
        "| network | request | clients | best peer | its requests/s | cnnjax | ratio "
        "| its p99 ms | cnnjax | ratio |",
        "|" + "---|" * 10,
    ]
    for (network, kind, clients, name), rounds in sorted(rows.items()):
        peer, best = best_peer(rows, network, kind, clients)
        if name != OWN or not peer or kind == "above capacity":
            continue
        own = medians(rounds)
        lines.append(
            f"| {network} | {kind} | {clients} | {peer} | {best['throughput']:.0f} "
            f"| {own['throughput']:.0f} | {own['throughput'] / best['throughput']:.2f} "
            f"| {best['p99']:.1f} | {own['p99']:.1f} | {own['p99'] / best['p99']:.2f} |"
        )
    return "\n".join(lines)


def problems(rows: Rows) -> list[str]:
    """Returns what this server did that it must not do, one line each."""
    found = []
    for (network, kind, clients, name), rounds in sorted(rows.items()):
        if not name.startswith(OWN):
            continue
        counts = medians(rounds)
        wrong = ("other", "lost") if kind == "above capacity" else ERRORS
        if any(counts[each] for each in wrong):
            told = ", ".join(f"{each} {counts[each]:.0f}" for each in wrong if counts[each])
            found.append(f"{name}, {network}, {kind}, {clients} clients: {told}")
    return found


def measure_network(
    run: str,
    network: str,
    options: argparse.Namespace,
    peers: Sequence[contenders.Peer],
    rows: Rows,
    *,
    is_large: bool = False,
) -> None:
    """Starts every server with a network, measures all, and ends them.

    A large one gets PNG alone, by a few clients, in smaller batches.
    """
    clients = options.network_clients if is_large else options.clients
    kinds = options.requests[:1] if is_large else options.requests
    secs = options.secs * (2 if is_large else 1)
    batch = 8 if is_large else 32
    with tempfile.TemporaryDirectory() as folder:
        servers = contenders.start_all(run, peers, batch, Path(folder), options.queue)
        try:
            for _ in range(options.rounds):
                for count in clients:
                    for kind in kinds:
                        compare(servers, network, kind, count, secs, rows)
                if not is_large:
                    kind = options.requests[-1]
                    overload(servers, network, kind, 2 * options.queue, secs, rows)
        finally:
            for server in servers:
                server.close()


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns what the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="a run directory of a classifier")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--secs", type=float, default=4.0, help="of each loop")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--requests", nargs="+", default=["png", "tensor"])
    parser.add_argument("--queue", type=int, default=256, help="of cnnjax: images that may wait")
    parser.add_argument("--network", default="resnet18", help="with random weights; '' for none")
    parser.add_argument("--network-clients", type=int, nargs="+", default=[8])
    for package in ("litserve", "mlserver", "ray"):
        parser.add_argument(f"--{package}-python", default=sys.executable, metavar="PYTHON")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every contender and prints the tables; 1 where cnnjax failed a request."""
    options = read_options(argv)
    pythons = (options.litserve_python, options.mlserver_python, options.ray_python)
    peers = contenders.peers_of(*pythons)
    rows: Rows = {}
    before = os.getloadavg()
    measure_network(options.run, Path(options.run).name, options, peers, rows)
    if options.network:
        with tempfile.TemporaryDirectory() as folder:
            run = contenders.random_run(options.network, Path(folder))
            measure_network(run, options.network, options, peers, rows, is_large=True)
    print(f"load averages {before} before, {os.getloadavg()} after, on {os.cpu_count()} cores\n")
    print(f"{table(rows)}\n\n{summary(rows)}\n")
    wrong = problems(rows)
    print("\n".join(wrong) or "nothing lost, no error below capacity, and above it only 429")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
