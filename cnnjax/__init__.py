"""cnnjax: convolutional networks as pure functions, in JAX and Flax Linen.

    data -> model -> task -> step -> loop -> checkpoint

Each of these is a room of pure functions, usable without the others. Nothing is imported before it
is used: `import cnnjax` costs nothing, `cnnjax.train.step` imports JAX, and TensorFlow, Matplotlib
and Orbax are imported by the functions that need them.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "augment",
        "checkpoint",
        "compress",
        "convert",
        "cost",
        "data",
        "devices",
        "distill",
        "errors",
        "evaluation",
        "explain",
        "export",
        "finetune",
        "losses",
        "metrics",
        "models",
        "notebook",
        "ops",
        "optim",
        "plots",
        "rng",
        "robust",
        "run",
        "schedules",
        "search",
        "spec",
        "studies",
        "tasks",
        "train",
        "trees",
    ),
)

__version__ = "0.2.0"

if TYPE_CHECKING:
    from cnnjax import augment as augment
    from cnnjax import checkpoint as checkpoint
    from cnnjax import compress as compress
    from cnnjax import convert as convert
    from cnnjax import cost as cost
    from cnnjax import data as data
    from cnnjax import devices as devices
    from cnnjax import distill as distill
    from cnnjax import errors as errors
    from cnnjax import evaluation as evaluation
    from cnnjax import explain as explain
    from cnnjax import export as export
    from cnnjax import finetune as finetune
    from cnnjax import losses as losses
    from cnnjax import metrics as metrics
    from cnnjax import models as models
    from cnnjax import notebook as notebook
    from cnnjax import ops as ops
    from cnnjax import optim as optim
    from cnnjax import plots as plots
    from cnnjax import rng as rng
    from cnnjax import robust as robust
    from cnnjax import run as run
    from cnnjax import schedules as schedules
    from cnnjax import search as search
    from cnnjax import spec as spec
    from cnnjax import studies as studies
    from cnnjax import tasks as tasks
    from cnnjax import train as train
    from cnnjax import trees as trees
