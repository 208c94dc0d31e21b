"""cnnjax: convolutional networks as pure functions, in JAX and Flax Linen.

    data -> model -> step -> loop -> checkpoint

Each of these is a module of pure functions, usable without the others. Nothing is imported before
it is used: `import cnnjax` costs nothing, `cnnjax.steps` imports JAX, and TensorFlow, Matplotlib
and Orbax are imported by the functions that need them.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "averaging",
    "backend",
    "calibration",
    "checkpoint",
    "convert",
    "data",
    "data_quality",
    "distributed",
    "dropout",
    "ensemble",
    "environment",
    "errors",
    "evaluate",
    "finetune",
    "gradients",
    "logs",
    "loop",
    "losses",
    "metrics",
    "models",
    "ops",
    "optim",
    "parallel",
    "plan",
    "plots",
    "precision",
    "recalibrate",
    "recipe",
    "replay",
    "report",
    "rng",
    "robust",
    "run_comparison",
    "run_directory",
    "runs",
    "schedules",
    "sharding",
    "starting",
    "state",
    "steps",
    "training",
    "trees",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_MODULES, "__version__"]
