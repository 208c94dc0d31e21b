"""Variables in two parts: trainable, and frozen (unchanged bit for bit).

The trained part has the collections `params` and `batch_stats`; what is frozen of each is under
`frozen`, as `frozen/params` and `frozen/batch_stats`, each leaf under its path in the model.
Gradients, optimizer states and averages are made of `params`, so they exist for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn

from cnnjax.errors import unknown_name
from cnnjax.models.grouped_norm import GroupedBatchNorm
from cnnjax.models.interceptors import intercept_methods
from cnnjax.trees import from_named_leaves, mask_by_path, named_leaves

PyTree = Any
Variables = dict[str, Any]

NORM_STATISTICS = ("auto", "frozen", "batch")


def split(tree: PyTree, patterns: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits nested dicts into the leaves that a pattern matches, and the rest.

    Raises:
      UserError: a pattern that matches nothing.
    """
    leaves, mask = named_leaves(tree), named_leaves(mask_by_path(tree, patterns))
    selected = {path: leaf for path, leaf in leaves.items() if mask[path]}
    rest = {path: leaf for path, leaf in leaves.items() if not mask[path]}
    return from_named_leaves(selected), from_named_leaves(rest)


def join(*trees: PyTree) -> dict[str, Any]:
    """Returns the nested dicts with the leaves of all trees; of two at one path the later one."""
    leaves: dict[str, Any] = {}
    for tree in trees:
        leaves |= named_leaves(tree)
    return from_named_leaves(leaves)


def split_variables(
    variables: Variables, trainable: Sequence[str], *, norm_statistics: str = "auto"
) -> Variables:
    """Splits a model's variables into what is trained and what is frozen.

    Args:
      variables: `params` and, where the model has them, `batch_stats`.
      trainable: patterns over the paths of `params` (see `cnnjax.trees`).
      norm_statistics: which layers of BatchNorm keep their running statistics and normalize by
        them, in training too. `auto`: those of whose own parameters none is trained; `frozen`: all;
        `batch`: none, so that frozen layers follow the new images' statistics.

    Returns:
      `params`, `batch_stats` and `frozen`, as the module says; `join_variables` undoes it.

    Raises:
      UserError: a pattern that matches nothing, or an unknown choice.
    """
    if norm_statistics not in NORM_STATISTICS:
        raise unknown_name("choice of norm_statistics", norm_statistics, NORM_STATISTICS)
    trained, frozen = split(variables["params"], trainable)
    layers = {_layer(path) for path in named_leaves(trained)}
    statistics = named_leaves(variables.get("batch_stats", {}))
    live = {
        path: leaf
        for path, leaf in statistics.items()
        if norm_statistics == "batch" or (norm_statistics == "auto" and _layer(path) in layers)
    }
    kept = {path: leaf for path, leaf in statistics.items() if path not in live}
    return {
        "params": trained,
        "batch_stats": from_named_leaves(live),
        "frozen": {"params": frozen, "batch_stats": from_named_leaves(kept)},
    }


def join_variables(variables: Variables) -> Variables:
    """Returns the `params` and `batch_stats` of the model of which these are the parts."""
    frozen = variables["frozen"]
    return {name: join(frozen[name], variables.get(name, {})) for name in ("params", "batch_stats")}


def frozen_norms(statistics: PyTree) -> AbstractContextManager[None]:
    """Within the context, layers of BatchNorm with these statistics are in evaluation mode.

    They normalize by their running statistics and leave them as they are, whatever `train` is.

    Args:
      statistics: the frozen part of `batch_stats`; only its paths are used.
    """
    layers = {_layer(path) for path in named_leaves(statistics)}

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or "/".join(module.path) not in layers:
            return call(*args, **kwargs)
        evaluating = _evaluating(module)
        variables = {name: module.variables.get(name, {}) for name in ("params", "batch_stats")}
        return evaluating.apply(variables, args[0])

    return intercept_methods(intercept)


def _evaluating(module: Any) -> nn.Module:
    """Returns the layer in evaluation mode, bound to nothing."""
    if not isinstance(module, GroupedBatchNorm):
        return module.clone(use_running_average=True, axis_name=None, parent=None, name=None)
    fields = {name: getattr(module, name) for name in ("epsilon", "dtype", "use_scale")}
    return nn.BatchNorm(use_running_average=True, parent=None, **fields)


def _layer(path: str) -> str:
    return path.rpartition("/")[0]
