"""Folders of weights as hubs keep them: `config.json` and a file of weights, or many and an index.

The config is timm's (`architecture`, `num_classes`, `pretrained_cfg`). It tells the model, its
classes and how images are prepared, so nothing of it has to be given.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.paths import read_text

CONFIG = "config.json"
# In the order of preference: safetensors are read without a pickle.
WEIGHTS = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "model.bin")
INDEX = ".index.json"

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Described:
    """What a folder says of its weights.

    Attributes:
      model: the library's name of the network, such as `timm/resnet50.a1_in1k`; "" unknown.
      num_classes: of its head; None unknown.
      preprocessing: as `convert.preprocessing.preprocessing` returns it.
      class_names: in order; () unknown.
      ignored: what it says and is not used here.
    """

    model: str = ""
    num_classes: int | None = None
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def weights_file(folder: Path) -> Path | None:
    """Returns the file of weights in a folder, or the index of several; None without any."""
    for name in WEIGHTS:
        for each in (folder / name, folder / f"{name}{INDEX}"):
            if each.is_file():
                return each
    return None


def read(folder: Path, read_file: Callable[[Path], Arrays]) -> Arrays:
    """Returns `{name: array}` of the folder's weights; `read_file` reads one file.

    Raises:
      UserError: there is no file of weights, or an index that does not fit its files.
    """
    found = weights_file(folder)
    if found is None:
        raise UserError(f"it is a folder without weights: it has none of {', '.join(WEIGHTS)}.")
    if not found.name.endswith(INDEX):
        return read_file(found)
    places = _json(found).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{found.name} has no weight_map.")
    arrays: Arrays = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise UserError(f"{found.name} refers to {file!r}, outside of the folder.")
        arrays |= read_file(folder / file)
    wrong = sorted(arrays.keys() ^ places.keys())
    if wrong:
        raise UserError(f"{found.name} and its files differ in {', '.join(wrong[:5])}.")
    return arrays


def is_timms(folder: Path) -> bool:
    """Whether a folder has a config.json of timm's."""
    path = folder / CONFIG
    return path.is_file() and isinstance(_json(path).get("architecture"), str)


def describe(folder: Path) -> Described:
    """Returns what a folder's config.json says; nothing where it has none.

    Raises:
      UserError: it cannot be read, or is of another library than timm.
    """
    if not (folder / CONFIG).is_file():
        return Described()
    config = _json(folder / CONFIG)
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        kind = config.get("architectures") or config.get("model_type") or "none"
        raise UserError(
            f"{folder / CONFIG} names no architecture of timm ({kind}): name the model with "
            "--model, and give the file of weights instead of the folder."
        )
    # Before timm 0.9 its fields stood at the top.
    details = config.get("pretrained_cfg")
    details = details if isinstance(details, dict) else config
    num_classes = config.get("num_classes", details.get("num_classes"))
    tag = details.get("tag") if "." not in architecture else None
    given = config.get("model_args")
    # The default, or said elsewhere in the file.
    usual = {"num_classes": num_classes, "in_chans": 3, "global_pool": "avg"}
    ignored = {
        key: value
        for key, value in (given if isinstance(given, dict) else {}).items()
        if key not in usual or usual[key] != value
    }
    return Described(
        model=f"timm/{architecture}" + (f".{tag}" if isinstance(tag, str) and tag else ""),
        num_classes=num_classes if type(num_classes) is int and num_classes > 0 else None,
        preprocessing=_preprocessing(details),
        class_names=_class_names(config, details),
        ignored=tuple(f"model_args {key}={value}" for key, value in ignored.items()),
    )


def _preprocessing(details: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: [float(value) for value in details[name]]
        for name in ("mean", "std")
        if _numbers(details.get(name))
    }
    size: Any = details.get("input_size")
    if _numbers(size) and len(size) == 3 and all(type(n) is int and n > 0 for n in size):
        # [channels, height, width]; timm resizes the shorter side to this over the crop.
        share = details.get("crop_pct")
        found["crop"] = size[-1]
        found["image_shape"] = [size[1], size[2], size[0]]
        # Other modes than the middle change the whole image.
        middle = details.get("crop_mode", "center") == "center"
        if middle and isinstance(share, int | float) and 0.01 < share <= 1:
            found["resize"] = int(size[-1] / share)
            # Not of the rounded side.
            found["share"] = float(share)
    if isinstance(details.get("interpolation"), str):
        found["interpolation"] = details["interpolation"]
    return found


def _numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(number, int | float) for number in value)
    )


def _class_names(config: Mapping[str, Any], details: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("label_names") or details.get("label_names")
    texts = config.get("label_descriptions") or details.get("label_descriptions") or {}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return ()
    described = texts if isinstance(texts, dict) else {}
    return tuple(str(described.get(name, name)) for name in names)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(str(path), path.name))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no JSON ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object.")
    return found
