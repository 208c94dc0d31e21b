"""Exported files, opened in the runtimes that others run them with.

    run = opened(Path("model.onnx"), "onnx", threads=1)
    logits = run(images)

Nothing of the network is taken from here: what a file computes is what its users will get.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data.decoding import tensorflow
from cnnjax.errors import unknown_name
from cnnjax.export.packages import quiet, require
from cnnjax.paths import read_text

# images `[batch, ...]` -> logits `[batch, classes]`.
Run = Callable[[np.ndarray], np.ndarray]


def opened(path: Path, kind: str, *, threads: int | None = None) -> Run:
    """Returns what a file computes, as a function of images.

    Args:
      path: of the file, or the folder of a SavedModel.
      kind: "onnx", "stablehlo", "tflite", "saved_model" or "web".
      threads: of the runtime; None: as many as it takes. `stablehlo` runs with JAX's.

    Raises:
      UserError: an unknown kind, or the runtime's package is not installed.
    """
    openers = {
        "onnx": _open_onnx,
        "stablehlo": _open_stablehlo,
        "tflite": _open_tflite,
        "saved_model": _open_saved_model,
        "web": _open_web,
    }
    if kind not in openers:
        raise unknown_name("format", kind, openers)
    require(kind, running=True)
    return openers[kind](path, threads)


def about(path: Path, kind: str) -> dict[str, str]:
    """Returns what an ONNX file says of itself, JSON where it is no text; of others `PATH.json`."""
    if kind not in ("onnx", "web"):
        from cnnjax.export.formats import beside

        return json.loads(read_text(beside(path), "description of the file"))
    import onnxruntime

    from cnnjax.export import web

    source = web.read_onnx(path) if kind == "web" else str(path)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    return dict(session.get_modelmeta().custom_metadata_map)


def _open_web(path: Path, threads: int | None) -> Run:
    from cnnjax.export import web

    return _onnx_run(web.read_onnx(path), threads)


def _open_onnx(path: Path, threads: int | None) -> Run:
    return _onnx_run(str(path), threads)


def _onnx_run(source: str | bytes, threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Only errors: a warning is no answer to a user.
    options.log_severity_level = 3
    # Without it, processors that lack VNNI add products of int8 in int16, which overflows.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda images: session.run(None, {entry.name: images})[0]


def _open_stablehlo(path: Path, threads: int | None) -> Run:
    import jax
    from jax import export

    exported = export.deserialize(bytearray(path.read_bytes()))
    call = jax.jit(exported.call)
    return lambda images: np.asarray(call(images))


def _open_tflite(path: Path, threads: int | None) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        reader = Interpreter(model_path=str(path), num_threads=threads or os.cpu_count())
    shape: list[int] = []

    def run(images: np.ndarray) -> np.ndarray:
        entry, result = reader.get_input_details()[0], reader.get_output_details()[0]
        if shape != list(images.shape):
            shape[:] = images.shape
            if list(entry["shape"]) != shape:
                reader.resize_tensor_input(entry["index"], shape)
            with quiet():
                reader.allocate_tensors()
        reader.set_tensor(entry["index"], _quantized(images, entry))
        reader.invoke()
        return _real(reader.get_tensor(result["index"]), result)

    return run


def _quantized(images: np.ndarray, entry: Any) -> np.ndarray:
    """Returns images as an int8 file takes them; those that it takes as they are, as they are."""
    scale, zero = entry["quantization"]
    if entry["dtype"] == images.dtype or not scale:
        return images
    limits = np.iinfo(entry["dtype"])
    steps = np.round(images / scale + zero)
    return np.clip(steps, limits.min, limits.max).astype(entry["dtype"])


def _real(values: np.ndarray, result: Any) -> np.ndarray:
    scale, zero = result["quantization"]
    if result["dtype"] == np.float32 or not scale:
        return values
    return (values.astype(np.float32) - zero) * np.float32(scale)


def _open_saved_model(path: Path, threads: int | None) -> Run:
    tf = tensorflow()
    with quiet():
        loaded = tf.saved_model.load(str(path))
    call = loaded.signatures["serving_default"]
    (name,) = call.structured_input_signature[1]

    def run(images: np.ndarray) -> np.ndarray:
        (logits,) = call(**{name: tf.constant(images)}).values()
        return logits.numpy()

    # The signature is a part of what was loaded, which must live on.
    run.loaded = loaded  # type: ignore[attr-defined]
    return run
