"""The formats by name, and what to write them with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError, unknown_name
from cnnjax.export.lite_codes import Written
from cnnjax.export.packages import require
from cnnjax.export.program import Forward, Signature, Variables

# Suffix of the file; a SavedModel is a folder.
SUFFIXES = {
    "onnx": ".onnx",
    "stablehlo": ".stablehlo",
    "tflite": ".tflite",
    "saved_model": "",
    "web": "",
}
PRECISIONS = {
    "onnx": ("float32",),
    "stablehlo": ("float32",),
    "tflite": ("float32", "float16", "int8"),
    "saved_model": ("float32",),
    "web": ("float32",),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is particular to one format.

    Attributes:
      precision: of `tflite`: float32, float16 (weights) or int8 (weights and activations).
      calibration: images for int8, as the file takes them, `[count, height, width, channels]`.
      codes: of int8 `tflite`: what `compress.quantization_parameters` returns, see `lite.write`.
      platforms: of `stablehlo`.
      channels_first: of `onnx`: whether it takes `[batch, channels, height, width]`.
      runtime: of `web`: where ONNX Runtime Web is, see `web.find_runtime`.
    """

    precision: str = "float32"
    calibration: np.ndarray | None = None
    codes: Mapping[str, Mapping[str, Any]] | None = None
    platforms: Sequence[str] = ("cpu", "cuda", "tpu")
    channels_first: bool = False
    runtime: str = ""


def kind_of(out: Path, kind: str = "") -> str:
    """Returns the format of a path, or the one that is asked for, if they fit.

    Raises:
      UserError: an unknown format, or a path with the suffix of another.
    """
    suffixes = {suffix: name for name, suffix in SUFFIXES.items() if suffix}
    if kind and kind not in SUFFIXES:
        raise unknown_name("format", kind, SUFFIXES)
    told = suffixes.get(out.suffix, "")
    if not kind:
        if not told:
            raise UserError(
                f"{out} has no suffix that tells the format: end it with "
                f"{', '.join(suffixes)}, or give --format "
                "saved_model or web for a folder."
            )
        return told
    if SUFFIXES[kind] and out.suffix != SUFFIXES[kind]:
        raise UserError(f"{out} is not a name for {kind}: end it with {SUFFIXES[kind]}.")
    if not SUFFIXES[kind] and told:
        raise UserError(
            f"{out} is a name for {told}, and {kind} is a folder: leave the suffix out."
        )
    return kind


def check(kind: str, options: Options) -> None:
    """Raises a UserError unless the format is installed and knows the options."""
    from cnnjax.export.stablehlo import check_platforms

    require(kind)
    check_platforms(options.platforms)
    if options.precision not in PRECISIONS[kind]:
        raise UserError(
            f"{kind} is written in {' or '.join(PRECISIONS[kind])}, not in "
            f"{options.precision}: tflite has float16 and int8. For integers in other formats "
            "quantize the run by cnnjax compress --quantize int8, and export what that makes."
        )
    if options.channels_first and kind != "onnx":
        raise UserError(f"{kind} takes images with the channels last: only onnx has both orders.")
    if kind == "web":
        from cnnjax.export import web

        web.find_runtime(options.runtime)
    elif options.runtime:
        raise UserError(f"--runtime {options.runtime}: {kind} is no page; leave it out.")


def write(
    path: Path,
    kind: str,
    forward: Forward,
    variables: Variables,
    signature: Signature,
    *,
    metadata: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> Written | None:
    """Writes a network in a format, and what it says of itself into or beside the file.

    Args:
      path: of the file, or of the folder of a SavedModel.
      kind: a key of `SUFFIXES`.
      forward: `forward(variables, image) -> logits`.
      variables: its arrays.
      signature: of the images.
      metadata: what the file says of itself: of ONNX in its `metadata_props`, else in `PATH.json`.
      options: see `Options`.

    Returns:
      With `options.codes`: which layers have them.

    Raises:
      UserError: what the format cannot hold.
    """
    from cnnjax.export import onnx_model, stablehlo

    options = options or Options()
    check(kind, options)
    if kind == "onnx":
        onnx_model.write(
            path,
            forward,
            variables,
            signature,
            metadata=metadata,
            channels_first=options.channels_first,
        )
        return None
    if kind == "web":
        from cnnjax.export import web

        web.write(
            path,
            forward,
            variables,
            signature,
            metadata=metadata or {},
            runtime=options.runtime,
        )
        return None
    written = None
    if kind == "stablehlo":
        stablehlo.write(path, forward, variables, signature, platforms=options.platforms)
    elif kind == "saved_model":
        from cnnjax.export import saved_model

        saved_model.write(path, forward, variables, signature)
    else:
        from cnnjax.export import lite

        written = lite.write(
            path,
            forward,
            variables,
            signature,
            precision=options.precision,
            calibration=options.calibration,
            codes=options.codes,
        )
    if metadata:
        beside(path).write_text(json.dumps(dict(metadata), indent=2, ensure_ascii=False) + "\n")
    return written


def beside(path: Path) -> Path:
    """Returns where the metadata of a file are that holds none itself."""
    return path.with_name(f"{path.name}.json")
