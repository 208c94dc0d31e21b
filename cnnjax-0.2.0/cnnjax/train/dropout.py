"""Dropout drawn per example, independent of the number of devices.

Flax draws one mask for the array it is given, so its numbers change when a batch is divided among
devices or into parts. Within `by_example` each example has a draw of its own, a function of the
stream's key, the layer and the example's position in the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax

from cnnjax.models.interceptors import intercept_methods


def by_example(examples: jax.Array) -> AbstractContextManager[None]:
    """Within the context, every `nn.Dropout` of a model draws for each example by its number.

    Args:
      examples: int32 `[batch]`, the position of each row within the whole batch.

    A layer whose input has another number of rows draws one mask, by the first number.
    """

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if not isinstance(layer, nn.Dropout) or context.method_name != "__call__":
            return call(*args, **kwargs)
        inputs, *more = args
        if not layer.has_rng(layer.rng_collection) or len(more) > 1 or "rng" in kwargs:
            return call(*args, **kwargs)
        key = layer.make_rng(layer.rng_collection)
        if inputs.shape[:1] != examples.shape:
            return call(*args, **kwargs, rng=jax.random.fold_in(key, examples[0]))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, examples)

        def drop(row: jax.Array, key: jax.Array) -> jax.Array:
            # With its axis of one example, so that `broadcast_dims` mean what they say.
            return call(row[None], *more, **kwargs, rng=key)[0]

        return jax.vmap(drop)(inputs, keys)

    return intercept_methods(intercept)
