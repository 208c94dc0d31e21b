"""BatchNorm's statistics for given parameters, recomputed on training images.

The running statistics of training belong to the parameters along the way. For averaged parameters
(see `cnnjax.train.averaging`) they are wrong: Izmailov et al. 2018 (arXiv 1803.05407), section 3.2.
They are noisy for the last ones too: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm" (arXiv
2105.07576), section 3.1, whose "precise BatchNorm" this is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cnnjax.devices import processes
from cnnjax.models.interceptors import intercept_methods

PyTree = Any
Statistics = Callable[[PyTree, jax.Array], PyTree]


def make_statistics(model: nn.Module, *, normalize: Callable[[jax.Array], jax.Array]) -> Statistics:
    """Returns `(variables, image [batch, height, width, channels]) -> batch_stats` of that batch.

    Each BatchNorm normalizes by the batch, and gives its mean and variance. Dropout and stochastic
    depth are off, as in evaluation, for which the statistics are. A BatchNorm that is told to use
    running averages gives those it has.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      normalize: stored images -> what the model expects.
    """

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        layer = context.module
        if isinstance(layer, nn.Dropout) and context.method_name == "__call__":
            return args[0]
        if hasattr(layer, "momentum"):
            # Running statistics without a past are those of the batch. A bound module is rebuilt
            # by every call of the model, so nobody else sees this.
            object.__setattr__(layer, "momentum", 0.0)
        return call(*args, **kwargs)

    def statistics(variables: PyTree, image: jax.Array) -> PyTree:
        with intercept_methods(intercept):
            _, updated = model.apply(
                variables, normalize(image), train=True, mutable=["batch_stats"]
            )
        return updated["batch_stats"]

    return statistics


def recalibrate(
    statistics: Statistics, variables: PyTree, batches: Iterable[Mapping[str, jax.Array]]
) -> PyTree:
    """Returns the statistics over all batches: `batch_stats` for `variables`.

    The mean is the mean over the batches; the variance is that of all examples together: the mean
    of the batches' variances plus the variance of their means.

    Args:
      statistics: what `make_statistics` returned, compiled or not.
      variables: `params` and `batch_stats`, as `model.apply` takes them.
      batches: with `image`; all of one size, none of it padding.
    """
    measured = [
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), processes.fetch(one))
        for one in (statistics(variables, batch["image"]) for batch in batches)
    ]

    def pooled(tree: Any, *path: str) -> Any:
        if "mean" not in tree or "var" not in tree:
            return {name: pooled(below, *path, name) for name, below in tree.items()}
        layers = [_at(each, path) for each in measured]
        means = np.stack([layer["mean"] for layer in layers])
        variances = np.stack([layer["var"] for layer in layers])
        return {"mean": means.mean(0), "var": variances.mean(0) + means.var(0)}

    result = pooled(measured[0])
    return jax.tree.map(
        lambda new, old: jnp.asarray(new, old.dtype), result, variables["batch_stats"]
    )


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
