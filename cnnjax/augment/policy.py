"""Augmentation by a short string, such as `crop:4,flip,rotate:15,randaugment:2:9,mixup:0.2`.

A policy is a list of changes in the order in which they are applied, in the grammar of
`cnnjax.spec`: `crop:4` is `crop(pixels=4)`. `CHANGES`, `AFFINE` and `MIXING` are the names, and a
change's arguments are those of its factory. What moves pixels changes images, class maps and boxes
by one draw; all else changes images only. `rotate`, `scale`, `translate` and `shear` next to each
other are one map, whose pixels are read once. Mixing comes last, wherever it stands: of several
ways to mix each example takes one, each as likely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from cnnjax import spec
from cnnjax.augment import color, corrupt, corruptions, geometry, mixup, randaugment
from cnnjax.augment.change import (
    Augment,
    apply_by_kind,
    check_kinds,
    check_magnitude,
    compose,
)
from cnnjax.data.fields import Field, Image, Label
from cnnjax.errors import UserError
from cnnjax.rng import stream_key

Batch = dict[str, jax.Array]
BatchAugment = Callable[[jax.Array, Batch, jax.Array], Batch]


def rotate(degrees: float) -> dict[str, Any]:
    """Turns by an angle uniform within plus and minus `degrees`."""
    return _affine(rotation_degrees=degrees)


def scale(change: float) -> dict[str, Any]:
    """Grows or shrinks by a factor log-uniform between `1 / (1 + change)` and `1 + change`."""
    check_magnitude(change=change)
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
    "corruption": corruptions.corruption,
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
    policy: str | Policy | Sequence[Augment],
    *,
    num_classes: int,
    fields: Mapping[str, Field] | None = None,
) -> BatchAugment | None:
    """Returns `(key, batch, first_index) -> batch`, for the step; None where nothing changes.

    The batch's images are float in [0, 1] (or uint8, where nothing is mixed). Every example draws
    from a key of its own, a function of `key` and its position in the whole batch. By its draw
    geometric changes move all keys of the example whose field says how (`Field.moves`); other
    changes are of its images only.

    >>> import jax.numpy as jnp
    >>> augment = make_augment("flip(probability=1)", num_classes=2)
    >>> image = jnp.array([[[[0.0], [1.0]]]])
    >>> batch = {"image": image, "label": jnp.array([1]), "mask": jnp.array([True])}
    >>> augment(jax.random.key(0), batch, jnp.int32(0))["image"].ravel().tolist()
    [1.0, 0.0]

    Args:
      policy: a string, what `parse_policy` returned, or functions: those of `cnnjax.augment`'s
        modules and any of your own, see `cnnjax.augment.change`.
      num_classes: the logits of the model, for mixed labels; 1 for a binary task.
      fields: the keys of the batch that there are, besides `mask`; None: `image` and `label`.

    Raises:
      UserError: as for `parse_policy`; or if a change cannot be applied to one of the fields, as
        mixing to class maps and boxes.
    """
    if isinstance(policy, str):
        policy = parse_policy(policy)
    elif not isinstance(policy, Policy):
        policy = Policy(tuple(policy))
    changes, mixing = policy
    if not changes and not mixing:
        return None
    fields = {"image": Image(), "label": Label(num_classes)} if fields is None else dict(fields)
    check_kinds(changes, fields)
    if mixing:
        _check_mixed(fields)
    change = compose(*changes)

    def augmented(key: jax.Array, batch: Batch, first_index: jax.Array) -> Batch:
        if changes:
            batch = apply_by_kind(key, batch, change, fields, first_index)
        if mixing:
            mix_key = stream_key(key, "mix", 0)
            batch = mixup.mix_neighbors(
                mix_key, batch, mixing, num_classes=num_classes, first_index=first_index
            )
        return batch

    return augmented


def _check_mixed(fields: Mapping[str, Field]) -> None:
    """Raises a UserError unless mixed images have labels to be mixed with them, and no more."""
    for name, kind in (("image", Image), ("label", Label)):
        if not isinstance(fields.get(name), kind):
            raise UserError(
                f"mixing (mixup, cutmix) needs {name!r}, a field of {kind.__name__}, and the keys "
                f"are {', '.join(fields)}: leave it out."
            )
    for name, field in fields.items():
        if name not in ("image", "label"):
            raise UserError(
                f"mixing (mixup, cutmix) mixes 'image' and 'label', and cannot mix {name!r} "
                f"({type(field).__name__}) with them: leave it out."
            )


def parse_policy(text: str, values: Mapping[str, Any] | None = None) -> Policy:
    """Reads a policy, such as `crop:4,flip,mixup:0.2`; "" changes nothing.

    Args:
      text: the policy.
      values: word -> the number that it stands for, which may be traced: of `rotate:{angle}` the
        word is `{angle}`.

    Raises:
      UserError: an unknown name, or arguments that its factory does not take.
    """
    changes: list[Augment] = []
    mixing: list[mixup.Weights] = []
    affine: dict[str, Any] = {}
    for item in spec.parse(text, KIND):
        made = spec.call(spec.filled(item, values or {}), NAMES, KIND)
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
