"""A fine-tuned run: its initial variables, its metadata, and how it is read back.

Its checkpoints hold what was trained alone. The rest is read from the base again, which is known by
its checksum: with another base the run cannot be read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from cnnjax.errors import UserError
from cnnjax.finetune import adapters
from cnnjax.finetune.base import Base
from cnnjax.finetune.load import Loaded, load
from cnnjax.finetune.methods import Method
from cnnjax.finetune.wrapped import FineTuned
from cnnjax.trees import named_leaves

Variables = dict[str, Any]


def start(
    tuned: FineTuned, loaded: Loaded, image_shape: tuple[int, int, int], key: jax.Array
) -> Variables:
    """Returns the variables with which fine-tuning starts: see `FineTuned.split`.

    Raises:
      UserError: what the method does not train is new, and would stay as it was drawn.
    """
    variables = tuned.split(loaded.variables, key, image_shape)
    frozen = _frozen(variables)
    lost = [path for path in loaded.new if path in frozen]
    if lost:
        raise UserError(
            f"{', '.join(lost[:8])} would be reinitialized and never trained: train it too, or "
            "take it from the base."
        )
    return variables


def describe(
    tuned: FineTuned,
    variables: Variables,
    base: Base,
    *,
    new: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns what `model.json` records under `finetune`, for `read_back`.

    Args:
      tuned: the model.
      variables: what `start` returned.
      base: what it was loaded from.
      new, drop: as they were given to `load`.
    """
    return {
        "base": str(Path(base.source).absolute()),
        "base_checksum": base.checksum,
        "new": list(new),
        "drop": list(drop),
        "method": dataclasses.asdict(tuned.method),
        "frozen_leaves": len(_frozen(variables)),
    }


def needs_base(card: Mapping[str, Any]) -> bool:
    """Returns whether a run's checkpoints lack what its method left frozen."""
    return bool(card["finetune"]["frozen_leaves"])


def read_back(
    model: nn.Module,
    card: Mapping[str, Any],
    trained: Variables,
    base: Base | None,
) -> tuple[Any, Variables]:
    """Returns a fine-tuned model and its variables.

    Args:
      model: the model as its metadata describe it.
      card: `model.json` of the run.
      trained: `params` and `batch_stats` of its checkpoint.
      base: what it was fine-tuned from, see `needs_base`; None where it needs none.

    Returns:
      The model itself with whole variables, into which LoRA is merged; only a model with adapters
      stays a `FineTuned`.

    Raises:
      UserError: it is another base, or the checkpoint does not fit.
    """
    record = card["finetune"]
    method = dict(record["method"])
    for name in ("trainable", "lora_ranks"):  # JSON has no tuples.
        method[name] = tuple(tuple(x) if isinstance(x, list) else x for x in method[name])
    tuned = FineTuned(model, Method(**method))
    if base is None:
        return model, trained
    check_base(base.checksum, record["base_checksum"], base.source)
    height, width, channels = card["image_shape"]
    shape, key = (height, width, channels), jax.random.key(0)
    # What is drawn here is replaced by what was trained.
    loaded = load(base, model, shape, new=record["new"], drop=record["drop"], key=key)
    variables = replace_trained(start(tuned, loaded, shape, key), trained)
    if adapters.NAME in variables["params"]:
        return tuned, variables
    return model, tuned.merge(variables)


def _frozen(variables: Variables) -> set[str]:
    """Returns the paths of all frozen parameters and statistics."""
    frozen = variables["frozen"]
    return {*named_leaves(frozen["params"]), *named_leaves(frozen["batch_stats"])}


def replace_trained(variables: Variables, trained: Variables) -> Variables:
    """Returns the variables with other values of what is trained.

    Raises:
      UserError: `trained` are not the same leaves.
    """
    for name in ("params", "batch_stats"):
        here, there = named_leaves(variables[name]), named_leaves(trained.get(name, {}))
        if {p: x.shape for p, x in here.items()} != {p: x.shape for p, x in there.items()}:
            odd = sorted(set(here) ^ set(there)) or list(here)
            raise UserError(
                f"the checkpoint's {name} are not those that the method trains; they differ in "
                f"{', '.join(odd[:8])}: put model.json back as it was."
            )
    return {**variables, "params": trained["params"], "batch_stats": trained["batch_stats"]}


def check_base(checksum: str, wanted: str, source: str) -> None:
    """Raises a UserError unless a base is the one that was fine-tuned."""
    if checksum != wanted:
        raise UserError(
            f"the base {source} has other weights (checksum {checksum[:12]}) than the one that was "
            f"fine-tuned ({wanted[:12]}): name that one."
        )
