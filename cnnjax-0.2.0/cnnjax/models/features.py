"""Intermediate outputs of a model, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax

from cnnjax import trees
from cnnjax.errors import unknown_name
from cnnjax.models.interceptors import intercept_methods
from cnnjax.models.stages import changed_stages, stage_name
from cnnjax.models.summary import abstract_variables


def features(
    model: nn.Module, variables: Any, images: jax.Array, names: str | Iterable[str]
) -> dict[str, jax.Array]:
    """Returns the named intermediate outputs of `model` in evaluation mode.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      images: `[batch, height, width, channels]`, as the model expects them.
      names: of stages (see `stage_names`), or paths of layers such as `stage1/block2/conv1`; one
        or several. Under a stage's name is what the model sows, the stage's end with activation
        and pool; under a layer's path is what that layer returns.

    Returns:
      `{name: output}`. Under `jit` the compiler drops what no name asks for.

    Raises:
      UserError: a name that is neither a stage nor a layer.
    """
    sown, layers = _outputs(model, variables, images)
    available = layers | sown
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in available:
            raise unknown_name("stage or layer", name, available)
    return {name: available[name] for name in wanted}


def stage_names(model: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Returns the names of the stages that `model` sows, in the order of computation.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      image_shape: `[height, width, channels]`; nothing is computed on it.
    """
    return list(stage_features(model, image_shape))


def stage_features(model: Any, image_shape: tuple[int, int, int]) -> dict[str, int]:
    """Returns the number of features behind each stage of a model, in the order of computation.

    Arguments as for `stage_names`; nothing is computed.
    """
    found: dict[str, int] = {}

    def note(name: str, x: jax.Array) -> jax.Array:
        found[name] = x.shape[-1]
        return x

    with changed_stages(note):
        abstract_variables(model, image_shape)
    return found


def _outputs(
    model: nn.Module, variables: Any, images: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns what the model sows and what each of its layers returns, each by path."""
    layers: dict[str, jax.Array] = {}

    def record(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        output = call(*args, **kwargs)
        path = context.module.path
        if path and context.method_name == "__call__":
            layers["/".join(path)] = output
        return output

    with intercept_methods(record):
        _, state = model.apply(variables, images, train=False, mutable=["intermediates"])
    # `sow` appends to a tuple, hence the last part of the path; a stage that is a module of its own
    # sows `output` within, because Flax keeps a module's name from its parent.
    sown = {
        stage_name(path.rsplit("/", 1)[0]): value
        for path, value in trees.named_leaves(state.get("intermediates", {})).items()
    }
    return sown, layers
