"""Accuracy under attack: of one batch, inside a compiled step, and of a whole dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnnjax import metrics
from cnnjax.devices.sums import sum_over_devices
from cnnjax.evaluation.ensemble import ModelLogits, model_logits
from cnnjax.rng import example_keys, stream_key
from cnnjax.robust.named import Attack, make_attack, signs_of_masking
from cnnjax.tasks.task import Task
from cnnjax.train import evaluate
from cnnjax.train.predict import as_float, make_eval_step
from cnnjax.train.step import Batch, PyTree


def make_attack_step(
    logits_of: ModelLogits, attack: Attack, *, axis_name: str | None = None
) -> Callable[[PyTree, Batch], dict[str, metrics.Pair]]:
    """Returns `step(variables, batch) -> {"robust_accuracy": (sum, count)}`.

    An example counts as right if neither it nor any image that the attack visited is classified
    wrong. The random draws depend on an example's position in its batch.

    Args:
      logits_of: `(variables, image in [0, 1]) -> logits`: of one model, or of an ensemble.
      attack: what `parse_attack` returned.
      axis_name: the mapped axis under `pmap` or `shard_map`; None under `jit`.
    """

    def step(variables: PyTree, batch: Batch) -> dict[str, metrics.Pair]:
        image, label, mask = as_float(batch["image"]), batch["label"], batch.get("mask")
        device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
        positions = device * image.shape[0] + jnp.arange(image.shape[0])
        key = stream_key(0, "attack", 0)
        keys = example_keys(key, positions)

        def logits_fn(image: jax.Array) -> jax.Array:
            return logits_of(variables, image)

        found = attack(keys, logits_fn, image, label, mask)
        right = metrics.accuracy(logits_fn(found), label, mask)
        return sum_over_devices({"robust_accuracy": right}, axis_name)

    return step


def make_robust_eval_step(
    model: nn.Module,
    task: Task,
    attack: Attack,
    *,
    normalize: Callable[[jax.Array], jax.Array],
    axis_name: str | None = None,
) -> Callable[[PyTree, Batch], dict[str, Any]]:
    """Returns `make_eval_step` with one more metric, `robust_accuracy` under the attack."""
    plain = make_eval_step(model, task, normalize=normalize, axis_name=axis_name)
    attacked = make_attack_step(model_logits(model, normalize), attack, axis_name=axis_name)

    def eval_step(variables: PyTree, batch: Batch) -> dict[str, Any]:
        return plain(variables, batch) | attacked(variables, batch)

    return eval_step


def robust_accuracies(
    logits_of: ModelLogits,
    variables: PyTree,
    batches: Callable[[], Iterable[Mapping[str, jax.Array]]],
    attacks: Iterable[Attack],
) -> dict[str, float]:
    """Returns the accuracy on a dataset under each attack, by the attack's text.

    Args:
      logits_of: as for `make_attack_step`.
      variables: its first argument.
      batches: called for each attack; returns the batches of the dataset.
      attacks: what `parse_attack` returned.
    """
    accuracies = {}
    for attack in attacks:
        step = jax.jit(make_attack_step(logits_of, attack))
        accuracies[str(attack)] = evaluate.evaluate(step, variables, batches())["robust_accuracy"]
    return accuracies


def masking(
    logits_of: ModelLogits,
    variables: PyTree,
    batches: Callable[[], Iterable[Mapping[str, jax.Array]]],
    attack: Attack,
    *,
    num_classes: int,
    image_shape: tuple[int, ...],
) -> tuple[dict[str, float], list[str]]:
    """Returns the accuracies that `signs_of_masking` compares, and the signs that it finds."""
    everywhere = 1.0 if attack.norm == "linf" else math.sqrt(math.prod(image_shape))
    suffix = "" if attack.norm == "linf" else "_l2"
    steps = max(attack.num_steps, 20)
    # The largest box within an L2 ball, for what there is in L-infinity alone.
    linf_radius = attack.epsilon if attack.norm == "linf" else attack.epsilon / everywhere
    others = {
        "attack": attack,
        "fgsm": make_attack(f"fgsm{suffix}", attack.epsilon),
        "noise": make_attack("noise", linf_radius, tries=10),
        "margin": make_attack("pgd_margin", linf_radius, steps, attack.restarts),
        "unbounded": make_attack(f"pgd{suffix}", everywhere, 2 * steps),
    }
    by_text = robust_accuracies(logits_of, variables, batches, dict.fromkeys(others.values()))
    accuracies = {name: by_text[str(each)] for name, each in others.items()}
    return accuracies, signs_of_masking(accuracies, num_classes)
