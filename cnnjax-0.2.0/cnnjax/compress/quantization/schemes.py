"""How a network is to be quantized, as one value and as a text: `int8(calibration=mse)`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

from cnnjax import spec
from cnnjax.compress.quantization import integers
from cnnjax.compress.quantization.calibration import make_calibration
from cnnjax.errors import UserError, unknown_name
from cnnjax.trees import mask_by_path

KIND = "quantization"
Patterns = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a network is quantized.

    Attributes:
      weights: bits of the weights' codes (2 to 8), or `float16` or `bfloat16`.
      activations: bits of the codes of layers' inputs; 0 leaves activations in float32.
      calibration: how their ranges are chosen, see `cnnjax.compress.quantization.calibration`.
      samples: training images that they are chosen on.
      symmetric: whether zero points are 0.
      clip: `absmax` or `mse`: see `integers.weight_scale`.
      fold: whether BatchNorm is folded first.
      equalize: whether ranges are equalized between layers: see `equalization`.
      correct_bias: whether biases make up for the mean error of each channel.
      layers: patterns of the layers that are quantized, over whole paths.
      skip: patterns of layers that are not.
      report: validation images on which each layer's effect is measured; 0 measures none.
      qat: whether the network is then trained with rounded weights and activations.
      epochs, learning_rate: of that training.
      max_size: of mixed precision: bytes of all parameters, as a fraction of those of float32.
      max_drop: of mixed precision: loss of validation accuracy, in points.
    """

    weights: int | str = 8
    activations: int = 8
    calibration: str = "percentile"
    samples: int = 512
    symmetric: bool = False
    clip: str = "absmax"
    fold: bool = True
    equalize: bool = False
    correct_bias: bool = False
    layers: Patterns = ".*"
    skip: Patterns = ()
    report: int = 1000
    qat: bool = False
    epochs: int = 1
    learning_rate: float = 1e-4
    max_size: float = 0.0
    max_drop: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.weights, int):
            integers.check_bits(self.weights, "weights")
        if self.activations:
            integers.check_bits(self.activations, "activations")
        if self.clip not in ("absmax", "mse"):
            raise unknown_name("clip", self.clip, ("absmax", "mse"))
        make_calibration(self.calibration)
        for name, least in (("samples", 1), ("report", 0), ("epochs", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: give {least} or more.")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate={self.learning_rate}: give a number above 0.")

    @property
    def is_mixed(self) -> bool:
        """Whether layers get bits of their own."""
        return bool(self.max_size or self.max_drop)

    @property
    def needs_images(self) -> bool:
        """Whether it cannot be done without images."""
        return bool(self.activations or self.correct_bias or self.qat or self.is_mixed)


def int8(
    calibration: str = "percentile",
    samples: int = 512,
    weights_only: bool = False,
    symmetric: bool = False,
    clip: str = "absmax",
    fold: bool = True,
    equalize: bool = False,
    correct_bias: bool = False,
    layers: Patterns = ".*",
    skip: Patterns = (),
    report: int = 1000,
    qat: bool = False,
    epochs: int = 1,
    learning_rate: float = 1e-4,
) -> Scheme:
    """Weights and activations of 8 bits."""
    options = dict(locals())
    activations = 0 if options.pop("weights_only") else 8
    return Scheme(weights=8, activations=activations, **options)


def int4(
    activations: int = 0,
    calibration: str = "percentile",
    samples: int = 512,
    symmetric: bool = False,
    clip: str = "mse",
    fold: bool = True,
    equalize: bool = False,
    correct_bias: bool = False,
    layers: Patterns = ".*",
    skip: Patterns = (),
    report: int = 1000,
    qat: bool = False,
    epochs: int = 1,
    learning_rate: float = 1e-4,
) -> Scheme:
    """Weights of 4 bits, two a byte; activations in float32 unless they are given bits."""
    return Scheme(weights=4, **locals())


def integer(
    weights: int = 8,
    activations: int = 8,
    calibration: str = "percentile",
    samples: int = 512,
    symmetric: bool = False,
    clip: str = "mse",
    fold: bool = True,
    equalize: bool = False,
    correct_bias: bool = False,
    layers: Patterns = ".*",
    skip: Patterns = (),
    report: int = 1000,
    qat: bool = False,
    epochs: int = 1,
    learning_rate: float = 1e-4,
) -> Scheme:
    """Weights and activations of 2 to 8 bits each; activations of 0 bits stay in float32."""
    return Scheme(**locals())


def mixed(
    max_size: float = 0.0,
    max_drop: float = 0.0,
    activations: int = 8,
    calibration: str = "percentile",
    samples: int = 512,
    symmetric: bool = False,
    fold: bool = True,
    equalize: bool = False,
    correct_bias: bool = False,
    layers: Patterns = ".*",
    skip: Patterns = (),
    report: int = 1000,
) -> Scheme:
    """Weights of 8, 4 or 2 bits, chosen for each layer by what they do to the outputs."""
    if bool(max_size) == bool(max_drop):
        raise UserError("give one bound, max_size (a fraction) or max_drop (points of accuracy).")
    if not (0 <= max_size < 1 and 0 <= max_drop < 100):
        raise UserError(
            f"max_size={max_size:g}, max_drop={max_drop:g}: give a fraction below 1, or points."
        )
    return Scheme(weights=8, clip="mse", **locals())


def float16(layers: Patterns = ".*", skip: Patterns = (), report: int = 1000) -> Scheme:
    """Weights as float16."""
    return Scheme(weights="float16", activations=0, fold=False, **locals())


def bfloat16(layers: Patterns = ".*", skip: Patterns = (), report: int = 1000) -> Scheme:
    """Weights as bfloat16."""
    return Scheme(weights="bfloat16", activations=0, fold=False, **locals())


SCHEMES: Mapping[str, Callable[..., Scheme]] = {
    function.__name__: function for function in (int8, int4, integer, mixed, float16, bfloat16)
}


def read_scheme(text: str) -> Scheme:
    """Reads a scheme such as `int8(calibration=percentile, samples=512)`; `true` is True.

    Raises:
      UserError: an unknown scheme, argument or calibration, or numbers out of range.
    """
    item = spec.parse_one(text, KIND, short=False)
    words = {"true": True, "false": False}
    keyword = {
        name: words.get(value.lower(), value) if isinstance(value, str) else value
        for name, value in item.keyword.items()
    }
    return spec.call(dataclasses.replace(item, keyword=keyword), SCHEMES, KIND)


def selected(paths: Iterable[str], layers: Patterns, skip: Patterns) -> tuple[set[str], set[str]]:
    """Returns the paths that are chosen, and those that are skipped of them.

    Raises:
      UserError: a pattern that matches no path, or none is left.
    """
    known = list(paths)
    chosen, skipped = (_matching(known, patterns) for patterns in (layers, skip))
    if not chosen - skipped:
        raise UserError(f"layers={layers}, skip={skip}: no layer is left to be quantized.")
    return chosen, skipped


def _matching(paths: list[str], patterns: Patterns) -> set[str]:
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    mask = mask_by_path(dict.fromkeys(paths, 0), wanted, kind="layer")
    return {path for path, is_chosen in mask.items() if is_chosen}
