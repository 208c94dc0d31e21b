"""What happens to images within an exported file, and what a file says of itself.

Three choices, as text: `none` (float32 images as the network expects them), `normalize` (uint8
images of the network's size, as they are stored: filter, channel order, mean and deviation are in
the file) and `resize:HEIGHTxWIDTH` (uint8 images of that size, scaled to the network's as well).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cnnjax
from cnnjax.errors import UserError
from cnnjax.export.program import Signature

Change = Callable[[jax.Array], jax.Array]
CHOICES = ("none", "normalize", "resize:HEIGHTxWIDTH")
_RESIZE = re.compile(r"resize:(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What a file does to its images.

    Attributes:
      text: the choice, one of `CHOICES`.
      change: images as the file takes them -> as the network expects them; None for no change.
      signature: of the images that the file takes.
    """

    text: str
    change: Change | None
    signature: Signature


def parse(text: str) -> tuple[str, tuple[int, int] | None]:
    """Returns (kind, size of the images that come) of a choice.

    Raises:
      UserError: another text.
    """
    if text in ("none", "normalize"):
        return text, None
    found = _RESIZE.fullmatch(text)
    if found is None or "0" in found.groups():
        raise UserError(
            f"preprocessing {text!r}: choose from {', '.join(CHOICES)}, such as resize:480x640."
        )
    height, width = map(int, found.groups())
    return "resize", (height, width)


def make(
    text: str,
    normalize: Change,
    image_shape: Sequence[int],
    *,
    batch: int | None = None,
) -> Preprocessing:
    """Returns what a file does to its images.

    Args:
      text: one of `CHOICES`.
      normalize: stored images, uint8 `[batch, height, width, channels]` -> float32 as the network
        expects them, such as `TrainedModel.normalize`.
      image_shape: `[height, width, channels]` of the network.
      batch: the number of images in a call; None for any.

    Raises:
      UserError: another text.
    """
    kind, size = parse(text)
    height, width, channels = image_shape
    shape = (height, width, channels)
    if kind == "none":
        return Preprocessing(text, None, Signature(shape, "float32", batch))
    if size is None:
        return Preprocessing(text, normalize, Signature(shape, "uint8", batch))

    def resized(image: jax.Array) -> jax.Array:
        return normalize(resize(image, (height, width)))

    return Preprocessing(text, resized, Signature((*size, channels), "uint8", batch))


def resize(image: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Scales uint8 `[batch, height, width, channels]` to a size, as Pillow's BILINEAR does.

    Each pixel is a mean over a triangle as wide as it covers; two matrix products with constants.
    The result is rounded to uint8; Pillow rounds after each of its two passes, so that a pixel may
    differ by 1.
    """
    rows, columns = (
        jnp.asarray(triangles(length, wanted))
        for length, wanted in zip(image.shape[1:3], size, strict=True)
    )
    # The images first, the innermost of planes before the other axis: runtimes need fewer copies.
    highest = jax.lax.Precision.HIGHEST
    values = jnp.tensordot(image.astype(jnp.float32), columns, ((2,), (1,)), precision=highest)
    values = jnp.tensordot(values, rows, ((1,), (1,)), precision=highest)
    values = values.transpose(0, 3, 2, 1)  # They were batch, channels, columns, rows.
    return jnp.clip(jnp.round(values), 0, 255).astype(jnp.uint8)


def triangles(length: int, wanted: int) -> np.ndarray:
    """Returns the matrix `[wanted, length]` by which Pillow's BILINEAR scales one axis."""
    scale = length / wanted
    reach = max(scale, 1.0)
    centers = (np.arange(wanted) + 0.5) * scale
    distance = np.abs(np.arange(length) + 0.5 - centers[:, None]) / reach
    weights = np.maximum(1.0 - distance, 0.0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def metadata(card: Mapping[str, Any], preprocessing: Preprocessing, **more: Any) -> dict[str, Any]:
    """Returns what a file says of itself, as text, numbers and lists.

    Args:
      card: of the run, `model.json`.
      preprocessing: within the file.
      **more: such as the precision.
    """
    kept = ("model", "class_names", "image_shape", "mean", "std", "channel_order", "fit")
    said: dict[str, Any] = {name: card[name] for name in kept if name in card}
    if card.get("preprocess"):
        said["filter"] = card["preprocess"]
    signature = preprocessing.signature
    return said | {
        "preprocess": preprocessing.text,
        "input": _input(card, preprocessing),
        "input_shape": ["batch" if signature.batch is None else signature.batch, *signature.shape],
        "input_dtype": signature.dtype,
        "output": "logits; softmax gives probabilities, of one logit the sigmoid",
        "cnnjax_version": cnnjax.__version__,
        **more,
    }


def with_channels_first(said: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what `metadata` returned for a file that takes `[batch, channels, height, width]`."""
    batch, height, width, channels = said["input_shape"]
    order, other = "[batch, height, width, channels]", "[batch, channels, height, width]"
    return {
        **said,
        "input": said["input"].replace(order, other),
        "input_shape": [batch, channels, height, width],
    }


def _input(card: Mapping[str, Any], preprocessing: Preprocessing) -> str:
    colors = "gray" if preprocessing.signature.shape[-1] == 1 else "RGB"
    if preprocessing.text != "none":
        return f"uint8 [batch, height, width, channels], {colors}, 0 black and 255 white"
    if "mean" not in card:
        return f"float32 [batch, height, width, channels], {colors}, 0 black and 1 white"
    order = card.get("channel_order", "RGB") if colors == "RGB" else colors
    return (
        f"float32 [batch, height, width, channels], {order}, (x / 255 - mean) / std of pixels x "
        "from 0 to 255"
    )
