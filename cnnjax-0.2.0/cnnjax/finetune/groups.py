"""A model's layers in groups, from the image to the logits: stem, stages, head."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from cnnjax.finetune.adapters import NAME as ADAPTERS
from cnnjax.models.interceptors import intercept_methods
from cnnjax.models.stages import changed_stages
from cnnjax.models.summary import abstract_variables
from cnnjax.trees import label_by_path, named_leaves

PyTree = Any


class Group(NamedTuple):
    """Layers that are frozen together.

    Attributes:
      name: `stem`, the name of a stage, or `head`.
      layers: the model's layers and modules in it, by their first name, such as `stage2`.
    """

    name: str
    layers: tuple[str, ...]

    @property
    def pattern(self) -> str:
        """Matches the paths of the group's parameters (see `cnnjax.trees`)."""
        return f"({'|'.join(map(re.escape, self.layers))})(/.*)?"


def layer_groups(model: Any, image_shape: tuple[int, int, int]) -> list[Group]:
    """Returns the groups of a model, in the order of computation; computes nothing.

    A layer belongs to the stage whose output comes next. Layers before a first stage that is a
    module of its own are the `stem`; all that comes behind the last stage is the `head`.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      image_shape: `[height, width, channels]`.
    """
    stages: list[str] = []
    # The number of stages that had ended when a layer was first called.
    begun: dict[str, int] = {}

    def note(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        if context.module.path:
            begun.setdefault(context.module.path[0], len(stages))
        return call(*args, **kwargs)

    def end(name: str, x: jax.Array) -> jax.Array:
        stages.append(name)
        return x

    with intercept_methods(note), changed_stages(end):
        params = abstract_variables(model, image_shape)["params"]
    order = sorted(params, key=lambda name: begun.get(name, len(stages)))
    members = [[n for n in order if begun.get(n, len(stages)) == i] for i in range(len(stages) + 1)]
    groups = [
        Group(name, tuple(layers)) for name, layers in zip([*stages, "head"], members, strict=True)
    ]
    if stages and stages[0] in groups[0].layers and len(groups[0].layers) > 1:
        stem = tuple(name for name in groups[0].layers if name != stages[0])
        groups[:1] = [Group("stem", stem), Group(stages[0], (stages[0],))]
    return [group for group in groups if group.layers]


def group_numbers(params: PyTree, groups: Sequence[Group]) -> PyTree:
    """Replaces each leaf by the number of its group; an adapter is of the group of its stage.

    Args:
      params: parameters, or some of them.
      groups: what `layer_groups` returned for their model.
    """
    rules = []
    paths = list(named_leaves(params))
    for number, group in enumerate(groups):
        pattern = rf"{group.pattern}|{ADAPTERS}/{re.escape(group.name)}/.*"
        # Of parameters that are trained only in part, groups may be missing.
        if any(re.fullmatch(pattern, path) for path in paths):
            rules.append((pattern, number))
    return label_by_path(params, rules)
