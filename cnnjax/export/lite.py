"""A network as a LiteRT file (.tflite), for phones and small computers.

`jax.experimental.jax2tf` makes a TensorFlow function of it, of which TensorFlow's converter makes
the file: float32; float16 weights; or int8 weights per channel and int8 activations, whose ranges
are measured on calibration images (Jacob et al. 2018, arXiv 1712.05877).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.data.decoding import tensorflow
from cnnjax.errors import UserError
from cnnjax.export.lite_codes import Written, with_codes
from cnnjax.export.packages import quiet
from cnnjax.export.program import Forward, Signature, Variables

PRECISIONS = ("float32", "float16", "int8")


def write(
    path: Path,
    forward: Forward,
    variables: Variables,
    signature: Signature,
    *,
    precision: str = "float32",
    calibration: np.ndarray | None = None,
    codes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Written | None:
    """Writes a LiteRT file.

    Args:
      path: of the file.
      forward: `forward(variables, image) -> logits`, such as `forward_of(model)`.
      variables: its arrays.
      signature: of the images.
      precision: "float32", "float16" or "int8".
      calibration: for int8, `[count, ...]` of images as the file takes them.
      codes: for int8, the layers' own integers, of `compress.quantization_parameters`; `forward`
        then is the network with the weights that they stand for.

    Returns:
      Which layers have them, where there are codes.

    Raises:
      UserError: int8 without calibration images, or with images of another shape or type.
    """
    from cnnjax.export import saved_model

    if precision == "int8":
        if calibration is None or not len(calibration):
            raise UserError("int8 needs images to calibrate with: training images of the network.")
        signature_of_one = Signature(signature.shape, signature.dtype)
        signature_of_one.check(calibration, "the calibration images")
    with quiet():
        tf = tensorflow()
    held = saved_model.module(forward, variables, signature)
    with quiet():
        concrete = held.serving_default.get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([concrete], held)
    if precision != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if precision == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if precision == "int8":

        def examples() -> Iterator[list[np.ndarray]]:
            for image in calibration if calibration is not None else ():
                yield [np.repeat(image[None], signature.batch or 1, axis=0)]

        converter.representative_dataset = examples
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        kind = tf.uint8 if signature.dtype == "uint8" else tf.float32
        converter.inference_input_type = kind
        converter.inference_output_type = tf.float32
    try:
        with quiet():
            content = converter.convert()
    except Exception as error:  # Of several types; some are the converter's, some Python's own.
        lacking = re.search(r"operation '([\w.]+)'|'([\w.]+)' op is neither", str(error))
        what = f"the operation {lacking[1] or lacking[2]}" if lacking else str(error)[:200]
        raise UserError(
            f"TensorFlow's converter cannot write this network as .tflite in {precision}: "
            f"{' '.join(what.split())}. Export it as onnx, or in float32."
        ) from None
    written = None
    if codes is not None:
        content, written = with_codes(content, codes)
    path.write_bytes(content)
    return written
