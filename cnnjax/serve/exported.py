"""A file of `cnnjax export` as a `Runtime`, computed by the runtime of its format."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.serve.runtime import Options, Runtime, Shape, buckets_up_to


def of_file(path: Path, kind: str, options: Options) -> Runtime:
    """Opens a file; nothing runs yet.

    Args:
      path: of the file.
      kind: its format, `onnx`, `tflite` or `stablehlo`.
      options: of batches and of preparation; `image_sizes` are left to `check_sizes`.

    Raises:
      UserError: the file is damaged, or does not say what it takes.
    """
    from cnnjax.export import runtimes

    try:
        about = read_about(path, kind)
        run = runtimes.opened(path, kind, threads=options.threads)
    except UserError:
        raise
    except Exception as error:  # Of many types, by the runtime.
        raise UserError(
            f"cannot open {path} ({type(error).__name__}: {str(error).splitlines()[0][:200]}): "
            "export it again."
        ) from None
    batch, shape, channels_first = _layout(about, path)
    names = tuple(map(str, about["class_names"]))
    fixed = batch if isinstance(batch, int) else None
    return Runtime(
        source=str(path),
        platform=kind,
        step=int(about.get("step", -1)),
        shapes=(shape,),
        dtype=about["input_dtype"],
        class_names=names,
        num_logits=1 if len(names) == 2 and _is_one_logit(run, about, fixed) else len(names),
        buckets=(fixed,) if fixed else buckets_up_to(options.largest_batch),
        call=_call(run, channels_first, is_locked=kind == "tflite"),
        prepare=_preparation(about, shape, options.prepare),
        parallel=kind != "tflite",
    )


def read_about(path: Path, kind: str) -> dict[str, Any]:
    """Returns what a file says of itself, as numbers, lists and text.

    Raises:
      UserError: it does not say which images it takes or which classes it knows.
    """
    from cnnjax.export import runtimes

    said: dict[str, Any] = {}
    for name, value in runtimes.about(path, kind).items():
        try:
            said[name] = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            said[name] = value
    missing = [name for name in ("class_names", "input_shape", "input_dtype") if name not in said]
    if missing:
        raise UserError(
            f"{path} does not say its {', '.join(missing)}: write it by cnnjax export, which does."
        )
    return said


def _layout(about: dict[str, Any], path: Path) -> tuple[int | str, Shape, bool]:
    """Returns the batch size or its name, `[height, width, channels]`, whether channels lead."""
    batch, *lengths = about["input_shape"]
    if len(lengths) != 3 or about["input_dtype"] not in ("uint8", "float32"):
        raise UserError(
            f"{path} takes {about['input_dtype']} {about['input_shape']}: images are uint8 or "
            "float32 [batch, height, width, channels]."
        )
    channels_first = "[batch, channels, height, width]" in about.get("input", "")
    a, b, c = lengths
    return batch, ((b, c, a) if channels_first else (a, b, c)), channels_first


def _is_one_logit(run: Callable, about: dict[str, Any], fixed: int | None) -> bool:
    shape = (fixed or 1, *about["input_shape"][1:])
    return run(np.zeros(shape, about["input_dtype"])).shape[-1] == 1


def _call(run: Callable, channels_first: bool, *, is_locked: bool) -> Callable:
    from scipy import special

    # LiteRT's interpreter holds its tensors: two threads would mix them up.
    lock = threading.Lock()

    def call(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if channels_first:
            images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        if is_locked:
            with lock:
                logits = run(images).astype(np.float32)
        else:
            logits = np.asarray(run(images)).astype(np.float32)
        if logits.shape[-1] == 1:
            return logits, special.expit(np.concatenate([-logits, logits], -1))
        return logits, special.softmax(logits, axis=-1)

    return call


def _preparation(about: dict[str, Any], shape: Shape, kind: str) -> Callable:
    """Returns what makes the file's input of an image file's pixels."""
    from cnnjax.run import load

    resizes = str(about.get("preprocess", "none")).startswith("resize")
    card = {
        "image_shape": shape,
        "fit": "resize" if resizes else about.get("fit", "pad"),
        "preprocess": about.get("filter", ""),
        "dataset": "mnist" if about.get("prepare") == "digit" else None,
    }
    card |= {name: about[name] for name in ("mean", "std", "channel_order") if name in about}
    trained = load.TrainedModel(None, {}, card, -1)
    prepare, _ = load.preparation(trained, kind)
    if about["input_dtype"] == "uint8":
        return prepare

    def normalized(image: np.ndarray) -> np.ndarray:
        return np.asarray(trained.normalize(prepare(image)[None])[0])

    return normalized
