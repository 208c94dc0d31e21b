"""One training step and what it is made of, its compile modes, and the loop around it.

    state -> predict -> step -> compile -> loop -> evaluate

Each module is usable without the others: `step` makes pure functions of arrays, `compile` turns
them into trainers over a mesh, `loop.fit` decides when to log, validate, save and stop.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "averaging",
        "batch_stats",
        "chunks",
        "compile",
        "dropout",
        "evaluate",
        "feeding",
        "gan",
        "gradients",
        "loop",
        "mapped",
        "memory",
        "precision",
        "predict",
        "replay",
        "state",
        "step",
    ),
)

if TYPE_CHECKING:
    from cnnjax.train import averaging as averaging
    from cnnjax.train import batch_stats as batch_stats
    from cnnjax.train import chunks as chunks
    from cnnjax.train import compile as compile
    from cnnjax.train import dropout as dropout
    from cnnjax.train import evaluate as evaluate
    from cnnjax.train import feeding as feeding
    from cnnjax.train import gan as gan
    from cnnjax.train import gradients as gradients
    from cnnjax.train import loop as loop
    from cnnjax.train import mapped as mapped
    from cnnjax.train import memory as memory
    from cnnjax.train import precision as precision
    from cnnjax.train import predict as predict
    from cnnjax.train import replay as replay
    from cnnjax.train import state as state
    from cnnjax.train import step as step
