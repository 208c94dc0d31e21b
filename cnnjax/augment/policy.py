"""Augmentation by a short string, such as `crop:4,flip,rotate:15,randaugment:2:9,mixup:0.2`.

A policy is a list of changes in the order in which they are applied, in the grammar of
`cnnjax.spec`: `crop:4` is `crop(pixels=4)`. `CHANGES`, `AFFINE` and `MIXING` are the names, and a
change's arguments are those of its factory. `rotate`, `scale`, `translate` and `shear` next to each
other are one map, whose pixels are read once. Mixing comes last, wherever it stands: of several
ways to mix each example takes one, each as likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from cnnjax import spec
from cnnjax.augment import color, corrupt, geometry, mixup, randaugment
from cnnjax.augment.geometry import Augment
from cnnjax.errors import UserError
from cnnjax.rng import stream_key

Batch = dict[str, jax.Array]
BatchAugment = Callable[[jax.Array, Batch, jax.Array], Batch]


def rotate(degrees: float) -> dict[str, Any]:
    """Turns by an angle uniform within plus and minus `degrees`."""
    return _affine(rotation_degrees=degrees)


def scale(change: float) -> dict[str, Any]:
    """Grows or shrinks by a factor log-uniform between `1 / (1 + change)` and `1 + change`."""
    if not change >= 0:
        raise UserError(f"change={change}: give a magnitude of 0 or more")
    return _affine(scale=(1.0 / (1.0 + change), 1.0 + change))


def translate(pixels: float) -> dict[str, Any]:
    """Moves along each axis, uniformly within plus and minus `pixels`, between pixels too."""
    return _affine(translation_pixels=pixels)


def shear(degrees: float) -> dict[str, Any]:
    """Leans vertical lines by an angle uniform within plus and minus `degrees`."""
    return _affine(shear_degrees=degrees)


AFFINE: dict[str, Callable[..., dict[str, Any]]] = {
    "rotate": rotate,
    "scale": scale,
    "translate": translate,
    "shear": shear,
}
CHANGES: dict[str, Callable[..., Augment]] = {
    "flip": geometry.random_flip,
    "shift": geometry.random_shift,
    "crop": geometry.pad_and_crop,
    "resized_crop": geometry.random_resized_crop,
    "elastic": geometry.random_elastic,
    "brightness": color.random_brightness,
    "contrast": color.random_contrast,
    "saturation": color.random_saturation,
    "hue": color.random_hue,
    "noise": corrupt.random_noise,
    "salt_and_pepper": corrupt.salt_and_pepper,
    "blur": corrupt.random_blur,
    "median": corrupt.random_median,
    "erase": corrupt.random_erase,
    "cutout": corrupt.cutout,
    "randaugment": randaugment.rand_augment,
    "trivialaugment": randaugment.trivial_augment,
    "augmix": randaugment.augmix,
}
MIXING: dict[str, Callable[..., mixup.Weights]] = {"mixup": mixup.mixup, "cutmix": mixup.cutmix}
NAMES: spec.Registry = {**CHANGES, **AFFINE, **MIXING}
KIND = "augmentation"


class Policy(NamedTuple):
    """What a string means.

    Attributes:
      changes: of single images, in order.
      mixing: ways to mix a batch.
    """

    changes: tuple[Augment, ...]
    mixing: tuple[mixup.Weights, ...] = ()


def make_augment(
    policy: str | Policy | Sequence[Augment], *, num_classes: int
) -> BatchAugment | None:
    """Returns `(key, batch, first_index) -> batch`, for the step; None where nothing changes.

    The batch's images are float in [0, 1] (or uint8, where nothing is mixed). Every example draws
    from a key of its own, a function of `key` and its position in the whole batch.

    Args:
      policy: a string, what `parse_policy` returned, or functions of `cnnjax.augment`'s
        modules.
      num_classes: the logits of the model, for mixed labels; 1 for a binary task.

    Raises:
      UserError: as for `parse_policy`.
    """
    if isinstance(policy, str):
        policy = parse_policy(policy)
    elif not isinstance(policy, Policy):
        policy = Policy(tuple(policy))
    changes, mixing = policy
    if not changes and not mixing:
        return None
    change = geometry.compose(*changes)

    def augmented(key: jax.Array, batch: Batch, first_index: jax.Array) -> Batch:
        if changes:
            image = geometry.apply_per_image(key, batch["image"], change, first_index)
            batch = {**batch, "image": image}
        if mixing:
            mix_key = stream_key(key, "mix", 0)
            batch = mixup.mix_neighbors(
                mix_key, batch, mixing, num_classes=num_classes, first_index=first_index
            )
        return batch

    return augmented


def parse_policy(text: str) -> Policy:
    """Reads a policy, such as `crop:4,flip,mixup:0.2`; "" changes nothing.

    Raises:
      UserError: an unknown name, or arguments that its factory does not take.
    """
    changes: list[Augment] = []
    mixing: list[mixup.Weights] = []
    affine: dict[str, Any] = {}
    for item in spec.parse(text, KIND):
        made = spec.call(item, NAMES, KIND)
        if affine and (item.name not in AFFINE or affine.keys() & made.keys()):
            changes.append(geometry.random_affine(**affine))
            affine = {}
        if item.name in AFFINE:
            affine |= made
        else:
            (mixing if item.name in MIXING else changes).append(made)
    if affine:
        changes.append(geometry.random_affine(**affine))
    return Policy(tuple(changes), tuple(mixing))


def _affine(**arguments: Any) -> dict[str, Any]:
    """Returns the arguments, once `random_affine` has checked them."""
    geometry.random_affine(**arguments)
    return arguments
