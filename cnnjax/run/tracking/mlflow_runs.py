"""A run at an MLflow server, or in a local store: `MLFLOW_TRACKING_URI`, or MLflow's own default.

What the store holds of a run is asked of it as the run is resumed: nothing is sent twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cnnjax.run.tracking import facts
from cnnjax.run.tracking.sent import Record, Sent, scalars

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "killed": "FAILED"}
# MLflow's limit of a batch, and of a parameter's text.
BATCH, MOST_CHARACTERS = 1000, 6000
# Its own client tries 7 times, for minutes; here the follower tries again.
HTTP = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MlflowRun:
    """An open run of MLflow. Arguments as for `cnnjax.run.tracking.follower.open_run`."""

    def __init__(self, directory: Path, sent: Sent, trainer_pid: int | None):
        for name, value in HTTP.items():
            os.environ.setdefault(name, value)
        import mlflow
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or sent.where or mlflow.get_tracking_uri()
        if uri != sent.where:
            # Another store knows nothing of the run.
            sent.key, sent.steps, sent.files = "", {}, []
        mlflow.set_tracking_uri(uri)
        self._client = MlflowClient(uri)
        described = facts.of_run(directory)
        settings = {name: str(v)[:MOST_CHARACTERS] for name, v in described.settings.items()}
        tags = {f"cnnjax.{name}": value for name, value in described.tags.items()}
        tags |= {f"version.{name}": value for name, value in described.versions.items()}
        if sent.key:
            self._key = sent.key
            self._client.update_run(self._key, status="RUNNING")
            there = self._client.get_run(self._key).data
            settings, changed = _changes(there.params, settings)
            tags |= changed
            sent.steps = self._last_steps(there.metrics)
        else:
            self._key = self._client.create_run(
                self._experiment(described.experiment), run_name=described.name
            ).info.run_id
        self._send_facts(settings, tags)
        sent.key, sent.where = self._key, uri
        sent.place = f"run {self._key} in {uri}"
        self._monitors = _monitors()

    def _experiment(self, name: str) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def _last_steps(self, names: Iterable[str]) -> dict[str, int]:
        """Returns the last step that the tracked run has of each kind of metrics."""
        found: dict[str, int] = {}
        for name in names:
            kind, _, metric = name.partition("/")
            if kind != "system" and metric and kind not in found:
                history = self._client.get_metric_history(self._key, name)
                found[kind] = max(each.step for each in history)
        return found

    def _send_facts(self, settings: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        params = [Param(name, value) for name, value in settings.items()]
        for start in range(0, max(len(params), 1), 100):
            self._client.log_batch(
                self._key,
                params=params[start : start + 100],
                tags=[RunTag(name, value) for name, value in tags.items()] if not start else [],
            )

    def log(self, records: list[Record]) -> None:
        """Sends records; those of a step and kind together, so that none is half there."""
        batch: list[tuple[str, float, int]] = []
        for record in records:
            values = scalars(record)
            if len(batch) + len(values) > BATCH:
                self._send(batch)
                batch = []
            batch += [(name, value, record["step"]) for name, value in values.items()]
        self._send(batch)

    def _send(self, batch: list[tuple[str, float, int]]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, step) for name, value, step in batch]
        self._client.log_batch(self._key, metrics=metrics)

    def sample(self, number: int) -> None:
        """Sends the load of processors, memory, disks and network; of NVIDIA GPUs too."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        self._send([(f"system/{name}", float(v), number) for name, v in values.items()])

    def figure(self, path: Path, step: int) -> None:
        """Sends a figure."""
        self._client.log_artifact(self._key, str(path), "figures")

    def file(self, path: Path) -> None:
        """Sends a file of the run."""
        self._client.log_artifact(self._key, str(path))

    def checkpoint(self, path: Path) -> None:
        """Keeps a step directory among the artifacts."""
        self._client.log_artifacts(self._key, str(path), f"checkpoints/{path.name}")

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Closes the run: `finished`, `stopped` or `killed`."""
        self._client.set_tag(self._key, "cnnjax.ended", summary.get("ended", status))
        self._client.set_terminated(self._key, STATUS[status])


def _changes(
    before: Mapping[str, str], settings: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Returns new settings, and as tags those that a resumed run has changed: MLflow's parameters
    are written once."""
    new = {name: value for name, value in settings.items() if name not in before}
    changed = {n: v for n, v in settings.items() if before.get(n, v) != v}
    return new, {f"resumed.{name}": value for name, value in changed.items()}


def _monitors() -> list[Any]:
    """Returns MLflow's readers of the system's load that work here; none without psutil."""
    found: list[Any] = []
    try:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        found += [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor

        found.append(GPUMonitor())
    except Exception:  # Without psutil, pynvml or a GPU: of several kinds.
        pass
    return found
