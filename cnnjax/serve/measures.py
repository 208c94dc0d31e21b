"""What Prometheus reads at /metrics: one family of numbers per line of `Measures`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cnnjax.serve.batcher import Computed

SECS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Measures:
    """The counters, histograms and gauges of one server, in a registry of its own."""

    def __init__(self, registry: Any = None) -> None:
        """Args: a `prometheus_client.CollectorRegistry`; None for a new one."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = registry or CollectorRegistry()

        def of(kind: Any, name: str, text: str, labels: Iterable[str] = (), **more: Any) -> Any:
            return kind(f"cnnjax_{name}", text, labels, registry=self.registry, **more)

        model = ("model", "version")
        self.requests = of(
            Counter, "requests_total", "Requests answered.", ("protocol", "route", "status")
        )
        self.refused = of(Counter, "refused_total", "Requests refused.", ("reason",))
        self.log_lost = of(Counter, "log_lines_lost_total", "Log lines not written.")
        self.audit_lost = of(Counter, "audit_lines_lost_total", "Audit lines not written.")
        self.latency = of(
            Histogram, "request_seconds", "Time to answer.", ("protocol", "route"), buckets=SECS
        )
        self.images = of(Counter, "images_total", "Images classified.", model)
        self.batch_size = of(Histogram, "batch_images", "Images a batch.", model, buckets=SIZES)
        self.batch_secs = of(Histogram, "batch_seconds", "Time a batch.", model, buckets=SECS)
        self.waited = of(Histogram, "queue_seconds", "Time in the queue.", model, buckets=SECS)
        self.failed = of(Counter, "batches_failed_total", "Batches that raised.", model)
        self.queued = of(
            Gauge, "queue_images", "Images waiting.", model, multiprocess_mode="livesum"
        )
        self.loads = of(Counter, "model_loads_total", "Loads of a model.", ("model", "result"))
        self.load_secs = of(
            Gauge, "model_load_seconds", "Time of the last load.", model, multiprocess_mode="max"
        )
        self.ready = of(Gauge, "ready", "1: ready.", (), multiprocess_mode="livemin")
        self.memory = of(
            Gauge, "device_memory_bytes", "In use.", ("device",), multiprocess_mode="livesum"
        )
        self.compiled = of(Counter, "compilations_total", "Programs compiled since the start.")
        self.shadowed = of(
            Counter, "shadow_images_total", "Images of shadow traffic.", (*model, "result")
        )
        self.observed = of(
            Counter, "observations_total", "Answers given to observers.", ("result",)
        )

    def count_batch(self, model: str, version: str, computed: Computed) -> None:
        """Counts a batch that is done."""
        labels = (model, version)
        if computed.failed:
            self.failed.labels(*labels).inc()
            return
        self.images.labels(*labels).inc(computed.images)
        self.batch_size.labels(*labels).observe(computed.images)
        self.batch_secs.labels(*labels).observe(computed.secs)
        waited = self.waited.labels(*labels)
        for secs in computed.waited_secs:
            waited.observe(secs)

    def text(self) -> tuple[bytes, str]:
        """Returns what is exposed, and its content type; of all workers where there are several."""
        import os

        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        registry = self.registry
        if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
            from prometheus_client import CollectorRegistry, multiprocess

            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST


def watch_memory(measures: Measures) -> None:
    """Sets the memory in use on each device; on a CPU that of this process."""
    import jax

    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        used = stats.get("bytes_in_use", resident_bytes())
        measures.memory.labels(f"{device.platform}:{device.id}").set(used)


def resident_bytes() -> int:
    """Returns the memory of this process; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()


def watch_compilations(count: Callable[[], None]) -> None:
    """Calls `count` for each program that JAX compiles in this process from now on."""
    import jax

    def heard(event: str, duration_secs: float, **details: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            count()

    jax.monitoring.register_event_duration_secs_listener(heard)
