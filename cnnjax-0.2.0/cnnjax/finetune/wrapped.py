"""A model wrapped by a fine-tuning method, with the contract of any other model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from cnnjax.errors import UserError
from cnnjax.finetune import adapters, lora, partition
from cnnjax.finetune.methods import Method
from cnnjax.models.features import stage_features
from cnnjax.trees import from_named_leaves, named_leaves

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FineTuned:
    """A model of which a part is trained; `init` and `apply` are those of a Linen module.

    Its variables are `params` and `batch_stats` of what is trained, and `frozen` with the rest (see
    `cnnjax.finetune.partition`). So every step, evaluation and compile mode works with it.

    Attributes:
      model: a Linen module with the contract of `cnnjax.models`.
      method: what is trained.
    """

    model: nn.Module
    method: Method

    def init(self, key: jax.Array, image: jax.Array, *, train: bool = False) -> Variables:
        """Initializes the model, and splits it."""
        variables = self.model.init(key, image, train=train)
        return self.split(variables, key, image.shape[1:])

    def split(
        self, variables: Mapping[str, Any], key: jax.Array, image_shape: tuple[int, ...]
    ) -> Variables:
        """Returns the variables with which training starts.

        Args:
          variables: of the model: `params` and perhaps `batch_stats`.
          key: typed key, from which what the method adds is drawn.
          image_shape: `[height, width, channels]`.

        Raises:
          UserError: a pattern that matches nothing, or nothing to add to.
        """
        method = self.method
        parts = partition.split_variables(
            dict(variables), method.trainable, norm_statistics=method.norm_statistics
        )
        added: dict[str, Any] = {}
        if method.lora_ranks:
            added = lora.init_lora(parts["frozen"]["params"], method.lora_ranks, key)
        if method.adapter_width:
            height, width, channels = image_shape
            features = stage_features(self.model, (height, width, channels))
            added |= {adapters.NAME: adapters.init_adapters(features, method.adapter_width, key)}
        return parts | {"params": partition.join(parts["params"], added)}

    def apply(
        self, variables: Mapping[str, Any], *args: Any, mutable: Any = False, **kwargs: Any
    ) -> Any:
        """As `flax.linen.Module.apply`; of `batch_stats` only those that are trained come back."""
        whole = partition.join_variables(dict(variables))
        own_adapters = whole["params"].pop(adapters.NAME, {})
        whole["params"] = lora.merge_lora(whole["params"], self.method.lora_alpha)
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(partition.frozen_norms(variables["frozen"]["batch_stats"]))
            contexts.enter_context(adapters.adapted(own_adapters))
            result = self.model.apply(whole, *args, mutable=mutable, **kwargs)
        if mutable is False:
            return result
        output, updated = result
        if "batch_stats" in updated:
            leaves = named_leaves(updated["batch_stats"])
            live = {path: leaves[path] for path in named_leaves(variables["batch_stats"])}
            updated = {**updated, "batch_stats": from_named_leaves(live)}
        return output, updated

    def merge(self, variables: Mapping[str, Any]) -> Variables:
        """Returns variables with which the model itself computes the same.

        Raises:
          UserError: the method adds adapters, which no layer of the model could hold.
        """
        whole = partition.join_variables(dict(variables))
        if adapters.NAME in whole["params"]:
            raise UserError(
                "adapters cannot be merged into the model: use it as it is, with its adapters."
            )
        return whole | {"params": lora.merge_lora(whole["params"], self.method.lora_alpha)}
