"""What the monitors show to Prometheus: one place for the names that rules and dashboard use."""

from __future__ import annotations

from typing import Any


class Gauges:
    """The gauges and counters of drift and of labels, in a registry of prometheus-client.

    With several worker processes each watches its own traffic, and the worst of them is shown.
    """

    def __init__(self, registry: Any):
        from prometheus_client import Counter, Gauge

        model = ("model", "version")

        def gauge(name: str, text: str, labels: tuple[str, ...], worst: Any) -> Any:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode=worst)

        self.drift = gauge(
            "cnnjax_drift_score",
            "Distance of the newest images from the reference, by statistic.",
            (*model, "statistic"),
            "livemax",
        )
        self.threshold = gauge(
            "cnnjax_drift_threshold",
            "Score above which a statistic has drifted.",
            (*model, "statistic"),
            "livemin",
        )
        self.window = gauge(
            "cnnjax_drift_window_images",
            "Images in the window, of those that fill it.",
            (*model, "kind"),
            "livemax",
        )
        self.accuracy = gauge(
            "cnnjax_labeled_accuracy", "Accuracy of the newest labeled answers.", model, "livemin"
        )
        self.calibration = gauge(
            "cnnjax_labeled_calibration_error",
            "Expected calibration error of the newest labeled answers.",
            model,
            "livemax",
        )
        self.reference_accuracy = gauge(
            "cnnjax_reference_accuracy", "Accuracy on the reference's images.", model, "livemax"
        )
        self.labels = Counter(
            "cnnjax_labels", "Labels that came back.", (*model, "result"), registry=registry
        )
        self.skipped = Counter(
            "cnnjax_drift_skipped_images", "Images not watched, for lack of time.", model,
            registry=registry,
        )  # fmt: skip
