"""The outputs of a model's stages: every model passes them through `stage_output`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax

StageFunction = Callable[[str, jax.Array], jax.Array]
_change: contextvars.ContextVar[StageFunction | None] = contextvars.ContextVar(
    "change", default=None
)


def stage_output(module: nn.Module, name: str, x: jax.Array) -> jax.Array:
    """Ends a stage of a model: sows its output into `intermediates`, and returns it.

    Args:
      module: the one that calls; within a module that is a stage itself, `name` is `output`: Flax
        keeps a module's name from its parent.
      name: of the stage.
      x: `[batch, ..., features]`.

    Returns:
      `x`, or what `changed_stages` makes of it; that is what is sown.
    """
    change = _change.get()
    if change is not None:
        x = change(stage_name("/".join((*module.path, name))), x)
    module.sow("intermediates", name, x)
    return x


def stage_name(path: str) -> str:
    """Returns the name of the stage whose output is sown at `path`."""
    return path.removesuffix("/output")


@contextlib.contextmanager
def changed_stages(change: StageFunction) -> Iterator[None]:
    """Within the context, models go on with `change(name, output)` behind each of their stages.

    Of two contexts the inner one changes first.
    """
    outer = _change.get()
    both = change if outer is None else lambda name, x: outer(name, change(name, x))
    token = _change.set(both)
    try:
        yield
    finally:
        _change.reset(token)


@contextlib.contextmanager
def unchanged_stages() -> Iterator[None]:
    """Within the context, no `changed_stages` around it counts."""
    token = _change.set(None)
    try:
        yield
    finally:
        _change.reset(token)
