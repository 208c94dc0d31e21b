"""A network as a TensorFlow SavedModel, by `jax.experimental.jax2tf`.

    call = tf.saved_model.load("model").signatures["serving_default"]
    logits = call(image=images)["logits"]

The folder holds the traced program for any number of images, and its weights as constants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnjax.data.decoding import tensorflow
from cnnjax.export.elementary import rewritten
from cnnjax.export.packages import quiet
from cnnjax.export.program import BATCH, INPUT, OUTPUT, Forward, Signature, Variables, portable


def module(forward: Forward, variables: Variables, signature: Signature) -> Any:
    """Returns a `tf.Module` with one function `serving_default` of `image`.

    Arguments as of `write`.
    """
    from jax.experimental import jax2tf

    tf = tensorflow()
    batch = BATCH if signature.batch is None else signature.batch
    shape = (batch, *signature.shape)

    def of_image(image: Any) -> Any:
        # TensorFlow traces when it likes to.
        with portable():
            return rewritten(lambda image: forward(variables, image))(image)

    call = jax2tf.convert(
        of_image,
        polymorphic_shapes=[f"({', '.join(map(str, shape))})"],
        with_gradient=False,
        native_serialization_platforms=("cpu", "cuda"),
    )
    entry = tf.TensorSpec((signature.batch, *signature.shape), signature.dtype, name=INPUT)
    held = tf.Module()
    held.serving_default = tf.function(
        lambda image: {OUTPUT: call(image)}, input_signature=[entry], autograph=False
    )
    return held


def write(path: Path, forward: Forward, variables: Variables, signature: Signature) -> None:
    """Writes a SavedModel.

    Args:
      path: of the folder.
      forward: `forward(variables, image) -> logits`, such as `forward_of(model)`.
      variables: its arrays.
      signature: of the images.
    """
    tf, held = tensorflow(), module(forward, variables, signature)
    with quiet():
        concrete = held.serving_default.get_concrete_function()
        tf.saved_model.save(held, str(path), signatures={"serving_default": concrete})
