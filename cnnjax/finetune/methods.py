"""What is trained of a model, by the name of a method or by patterns."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.finetune.groups import layer_groups
from cnnjax.finetune.lora import Ranks
from cnnjax.models.summary import abstract_variables
from cnnjax.trees import named_leaves

HEAD = "head/.*"
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


class _Target:
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

    @property
    def head(self) -> tuple[str, ...]:
        """The pattern of the head, if it has parameters."""
        return (HEAD,) if any(re.fullmatch(HEAD, path) for path in self.paths) else ()


def make_method(
    text: str,
    model: Any,
    image_shape: tuple[int, int, int],
    *,
    also_train: Sequence[str] = (),
    lora_ranks: Ranks = (),
    lora_alpha: float = 8.0,
    norm_statistics: str = "auto",
) -> Method:
    """Returns what a method trains of a model.

    Args:
      text: a key of `METHODS`, and behind a colon its number, where it has one: `last:2`.
      model: a Linen module with the contract of `cnnjax.models`.
      image_shape: `[height, width, channels]` of its images.
      also_train: patterns of more parameters to train.
      lora_ranks: for `lora`: pairs (pattern, rank) before the method's own, which is its number for
        every kernel that is not trained.
      lora_alpha, norm_statistics: see `Method`.

    Raises:
      UserError: an unknown method, a number that is missing, too much or out of range, or a model
        in which there is nothing for the method to train.
    """
    name, colon, number = text.partition(":")
    if name not in METHODS:
        raise unknown_name("fine-tuning method", name, METHODS)
    if lora_ranks and name != "lora":
        raise UserError(f"LoRA ranks are for the method lora, not for {text}: drop them.")
    count = _count(name, colon, number)
    method = METHODS[name](_Target(model, image_shape), count)
    ranks = (*lora_ranks, *method.lora_ranks)
    return dataclasses.replace(
        method,
        trainable=(*method.trainable, *also_train),
        norm_statistics=norm_statistics,
        lora_ranks=tuple((pattern, rank) for pattern, rank in ranks),
        lora_alpha=lora_alpha,
    )


def _full(target: _Target, count: int) -> Method:
    """Everything."""
    return Method()


def _head(target: _Target, count: int) -> Method:
    """The last dense layer alone: a linear probe."""
    return Method(trainable=target.patterns("head", HEAD))


def _last(target: _Target, count: int) -> Method:
    """The last so many stages, and all that comes behind them."""
    groups = layer_groups(target.model, target.image_shape)
    stages = [number for number, group in enumerate(groups) if group.name not in ("stem", "head")]
    if not 1 <= count <= len(stages):
        raise UserError(
            f"last:{count}: {target.name} has {len(stages)} stages "
            f"({', '.join(groups[number].name for number in stages)}): choose 1 to {len(stages)}."
        )
    return Method(trainable=tuple(group.pattern for group in groups[stages[-count] :]))


def _bitfit(target: _Target, count: int) -> Method:
    """Every bias, and the head.

    Ben Zaken et al. 2022, "BitFit" (arXiv 2106.10199), section 3.
    """
    return Method(trainable=target.patterns("bitfit", BIASES) + target.head)


def _norm(target: _Target, count: int) -> Method:
    """Scales and biases of the normalizations, and the head.

    Frankle et al. 2021, "Training BatchNorm and only BatchNorm" (arXiv 2003.00152).
    """
    return Method(trainable=target.patterns("norm", NORMS) + target.head)


def _lora(target: _Target, count: int) -> Method:
    """Low-rank changes of every kernel, of that rank, and the head."""
    return Method(trainable=target.head, lora_ranks=((KERNELS, count),))


def _adapter(target: _Target, count: int) -> Method:
    """A residual adapter of that width behind each stage, and the head."""
    return Method(trainable=target.head, adapter_width=count)


METHODS: dict[str, Callable[[_Target, int], Method]] = {
    "full": _full,
    "head": _head,
    "last": _last,
    "bitfit": _bitfit,
    "norm": _norm,
    "lora": _lora,
    "adapter": _adapter,
}
COUNTED = {"last": "stages", "lora": "rank", "adapter": "units"}


def _count(name: str, colon: str, number: str) -> int:
    """Returns the number behind the colon; 0 for a method that has none."""
    if name not in COUNTED:
        if colon:
            raise UserError(f"the method {name} has no number: write {name}, not {name}:{number}.")
        return 0
    if not number.isdecimal() or int(number) < 1:
        raise UserError(
            f"the method {name}{colon}{number} needs a number ({COUNTED[name]}): write {name}:2."
        )
    return int(number)
