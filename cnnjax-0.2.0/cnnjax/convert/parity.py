"""Compare a converted model with the other framework's outputs, layer by layer."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cnnjax.convert.names import Names, entries
from cnnjax.errors import UserError, unknown_name
from cnnjax.models.features import features, stage_names

IMAGE, LOGITS = "image", "logits"


def read_reference(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a reference: an npz file with `image` and the activations that follow from it.

    Arrays of text, such as versions, are left out.

    Raises:
      UserError: the file is not there or damaged, or it has no `image` or nothing else.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError(f"there is no reference {path}.") from None
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read the reference {path}: {error}; it is no npz file.") from None
    reference = {name: array for name, array in arrays.items() if array.dtype.kind not in "US"}
    if IMAGE not in reference or len(reference) == 1:
        raise UserError(
            f"the reference {path} holds {', '.join(reference) or 'nothing'}: it must hold "
            f"{IMAGE}, and {LOGITS} or the outputs of modules under their names."
        )
    return reference


def compare(
    model: nn.Module,
    variables: Mapping[str, Any],
    reference: Mapping[str, np.ndarray],
    names: Names,
) -> dict[str, float]:
    """Returns `{name: relative error}` of each activation in the order of the reference.

    The order should be that of computation, as hooks keep it; `logits` are the last in any case.

    The relative error is the largest absolute difference over the largest absolute value of the
    reference. Infinite where ours is of another shape, or where either has numbers that are not
    finite.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and `batch_stats`.
      reference: `image`, normalized as the model expects it, `[batch, ...]` in the layout of the
        other framework; the output `logits`; and outputs of layers under the framework's names or
        ours, in its layout. All in evaluation mode.
      names: of the framework, as `cnnjax.convert.find_names` returns them.

    Raises:
      UserError: a name that is no layer's.
    """
    image = _our_layout(reference[IMAGE], names)
    ours = _our_names(model, image.shape[1:], names)
    wanted = {
        theirs: _ours(theirs, ours, names) for theirs in reference if theirs not in (IMAGE, LOGITS)
    }

    @jax.jit
    def run(variables: Any, image: jax.Array) -> dict[str, Any]:
        return {
            LOGITS: model.apply(variables, image, train=False),
            **features(model, variables, image, wanted.values()),
        }

    outputs = run(variables, image)
    if LOGITS in reference:
        wanted[LOGITS] = LOGITS
    return {
        theirs: relative_error(np.asarray(outputs[name]), _our_layout(reference[theirs], names))
        for theirs, name in wanted.items()
    }


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest absolute difference over the largest absolute value of `theirs`."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0.0)
    return float(difference / max(np.abs(theirs).max(initial=0.0), np.finfo(np.float32).tiny))


def first_divergence(errors: Mapping[str, float], tolerance: float) -> str | None:
    """Returns the first name whose error is above `tolerance`, or None."""
    return next((name for name, error in errors.items() if not error <= tolerance), None)


def _our_layout(array: np.ndarray, names: Names) -> np.ndarray:
    array = np.asarray(array)
    return array.transpose(0, 2, 3, 1) if names.channels_first and array.ndim == 4 else array


def _our_names(model: nn.Module, image_shape: Sequence[int], names: Names) -> dict[str, str]:
    """Returns `{their module or our name: our name}` of everything that can be compared."""
    height, width, channels = image_shape
    layers, modules = {}, {}
    for entry in entries(model, image_shape, names):
        layer = entry.path.partition("/")[2].rpartition("/")[0]
        if layer:
            layers[layer] = layer
            modules[entry.name.rpartition(names.separator)[0]] = layer
    stages = {stage: stage for stage in stage_names(model, (height, width, channels))}
    # Theirs last: where both use a name (ShuffleNet's stages are counted otherwise), it is theirs.
    return layers | stages | modules | {theirs: ours for ours, theirs in names.stages.items()}


def _ours(theirs: str, ours: Mapping[str, str], names: Names) -> str:
    if theirs not in ours:
        near = difflib.get_close_matches(theirs, ours)
        raise unknown_name("layer of the reference", theirs, {*names.stages.values(), *near})
    return ours[theirs]
