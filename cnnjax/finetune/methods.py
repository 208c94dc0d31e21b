"""Which parameters are trained, by the name of a method or by patterns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from cnnjax import spec
from cnnjax.errors import UserError
from cnnjax.finetune.groups import layer_groups
from cnnjax.finetune.lora import Ranks
from cnnjax.models.summary import abstract_variables
from cnnjax.trees import named_leaves

# A distilled transformer has two.
HEAD = "head(_distilled)?/.*"
KERNELS = ".*kernel"
BIASES = "(.*/)?bias"
# By the name of the layer: every norm of `cnnjax.models` is called so, and so are those that Flax
# names.
NORMS = r"(.*/)?\w*[nN]orm_?\d*/(scale|bias)"


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained, and what is added to be trained.

    Attributes:
      trainable: patterns of the model's parameters that are trained; all others are frozen.
      norm_statistics: see `cnnjax.finetune.split_variables`.
      lora_ranks: pairs (pattern, rank) for frozen kernels; see `cnnjax.finetune.init_lora`.
      lora_alpha: the factors' product is multiplied by `lora_alpha / rank`.
      adapter_width: units of an adapter behind each stage; 0 adds none.
    """

    trainable: tuple[str, ...] = (".*",)
    norm_statistics: str = "auto"
    lora_ranks: Ranks = ()
    lora_alpha: float = 8.0
    adapter_width: int = 0


class Target:
    """The model that a method is for."""

    def __init__(self, model: Any, image_shape: tuple[int, int, int]):
        self.model, self.image_shape, self.name = model, image_shape, type(model).__name__
        self.paths = list(named_leaves(abstract_variables(model, image_shape)["params"]))

    def patterns(self, method: str, pattern: str) -> tuple[str, ...]:
        """Returns the pattern; a UserError if it matches nothing."""
        if not any(re.fullmatch(pattern, path) for path in self.paths):
            raise UserError(
                f"the method {method} trains parameters like {pattern!r}, but {self.name} has "
                "none: choose another method."
            )
        return (pattern,)

    def optional(self, pattern: str) -> tuple[str, ...]:
        """Returns the pattern if it matches anything."""
        return (pattern,) if any(re.fullmatch(pattern, path) for path in self.paths) else ()

    @property
    def head(self) -> tuple[str, ...]:
        """The pattern of the head, if it has parameters."""
        return self.optional(HEAD)


def make_method(
    text: str,
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    also_train: Sequence[str] = (),
    lora_ranks: Ranks = (),
    lora_alpha: float | None = None,
    norm_statistics: str = "auto",
) -> Method:
    """Returns what a method trains of a model.

    Args:
      text: a key of `METHODS`, with its arguments where it has any: `last:2`, `lora(8, alpha=16)`.
      model: a Linen module with the contract of `cnnjax.models`.
      image_shape: `[height, width, channels]` of its images.
      also_train: patterns of more parameters to train.
      lora_ranks: for `lora`: pairs (pattern, rank) before the method's own, which is its number for
        every kernel that is not trained.
      lora_alpha: see `Method`; None: the method's own.
      norm_statistics: see `Method`.

    Raises:
      UserError: an unknown method, a number that is missing, too much or out of range, or a model
        in which there is nothing for the method to train.
    """
    item = spec.parse_one(text, KIND)
    if lora_ranks and item.name != "lora":
        raise UserError(f"LoRA ranks are for the method lora, not for {text}: drop them.")
    method = spec.call(item, METHODS, KIND, target=Target(model, image_shape))
    ranks = (*lora_ranks, *method.lora_ranks)
    return dataclasses.replace(
        method,
        trainable=(*method.trainable, *also_train),
        norm_statistics=norm_statistics,
        lora_ranks=tuple((pattern, rank) for pattern, rank in ranks),
        lora_alpha=method.lora_alpha if lora_alpha is None else lora_alpha,
    )


def check_method(text: str) -> None:
    """Refuses a method that does not exist or does not take its arguments; needs no model."""
    spec.bind(spec.parse_one(text, KIND), METHODS, KIND, supplied=("target",))


def full(target: Target) -> Method:
    """Everything."""
    return Method()


def head(target: Target) -> Method:
    """The last dense layer alone: a linear probe."""
    return Method(trainable=target.patterns("head", HEAD))


def last(target: Target, stages: int) -> Method:
    """The last stages, and all that comes behind them."""
    groups = layer_groups(target.model, target.image_shape)
    known = [number for number, group in enumerate(groups) if group.name not in ("stem", "head")]
    if not 1 <= stages <= len(known):
        raise UserError(
            f"{target.name} has {len(known)} stages "
            f"({', '.join(groups[number].name for number in known)}): choose 1 to {len(known)}."
        )
    return Method(trainable=tuple(group.pattern for group in groups[known[-stages] :]))


def bitfit(target: Target) -> Method:
    """Every bias, and the head.

    Ben Zaken et al. 2022, "BitFit" (arXiv 2106.10199), section 3.
    """
    return Method(trainable=target.patterns("bitfit", BIASES) + target.head)


def norm(target: Target) -> Method:
    """Scales and biases of the normalizations, and the head.

    Frankle et al. 2021, "Training BatchNorm and only BatchNorm" (arXiv 2003.00152).
    """
    return Method(trainable=target.patterns("norm", NORMS) + target.head)


def lora(
    target: Target, rank: int, norms: bool = False, alpha: float = 8.0, layers: str = KERNELS
) -> Method:
    """Low-rank changes of kernels, and the head.

    Args:
      target: the model.
      rank: of the change.
      norms: scales and biases of the normalizations are trained too, where there are any, so that
        BatchNorm follows the new images' statistics.
      alpha: the change is multiplied by `alpha / rank`.
      layers: pattern of the kernels that are changed.
    """
    _check_count(rank=rank)
    if alpha <= 0:
        raise UserError(f"alpha={alpha:g}: give a number above 0")
    kernels = [
        path
        for path in target.paths
        if re.fullmatch(KERNELS, path) and not re.fullmatch(HEAD, path)
    ]
    try:
        found = any(re.fullmatch(layers, path) for path in kernels)
    except re.error as error:
        raise UserError(f"layers={layers!r} is no regular expression: {error}") from None
    if not found:
        raise UserError(
            f"layers={layers!r} is none of the kernels below the head of {target.name} "
            f"({', '.join(kernels[:4])}{', ...' if kernels[4:] else ''})"
        )
    trainable = target.head + (target.optional(NORMS) if norms else ())
    return Method(trainable=trainable, lora_ranks=((layers, rank),), lora_alpha=alpha)


def adapter(target: Target, units: int, norms: bool = False) -> Method:
    """A residual adapter of that width behind each stage, and the head.

    With `norms`, scales and biases of the normalizations too, where there are any, so that
    BatchNorm follows the new images' statistics.
    """
    _check_count(units=units)
    trainable = target.head + (target.optional(NORMS) if norms else ())
    return Method(trainable=trainable, adapter_width=units)


METHODS: dict[str, Callable[..., Method]] = {
    "full": full,
    "head": head,
    "last": last,
    "bitfit": bitfit,
    "norm": norm,
    "lora": lora,
    "adapter": adapter,
}
KIND = "fine-tuning method"


def _check_count(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count}: give a whole number from 1 on")
