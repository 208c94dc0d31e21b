"""A network's forward pass as a program of JAX's primitives, for any number of images."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cnnjax import ops
from cnnjax.compress.quantization import quantized, simulated
from cnnjax.errors import UserError

# The name of the first dimension in every format that names dimensions.
BATCH = "batch"
INPUT, OUTPUT = "image", "logits"

Variables = Mapping[str, Any]
Forward = Callable[[Variables, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Signature:
    """What goes into an exported file.

    Attributes:
      shape: of one image, `[height, width, channels]`.
      dtype: "float32", as the network expects them, or "uint8", as they are stored.
      batch: of images in a call; None for any number.
    """

    shape: tuple[int, int, int]
    dtype: str = "float32"
    batch: int | None = None

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Returns the input with a symbolic batch, or with the fixed one."""
        batch: Any = self.batch
        if batch is None:
            from jax import export

            (batch,) = export.symbolic_shape(BATCH)
        return jax.ShapeDtypeStruct((batch, *self.shape), jnp.dtype(self.dtype))

    def check(self, images: np.ndarray, what: str = "the images") -> None:
        """Raises a UserError unless a file of this signature takes such images.

        Args:
          images: `[batch, height, width, channels]`.
          what: they are, for the error.
        """
        if tuple(images.shape[1:]) != tuple(self.shape):
            raise UserError(
                f"{what} are {_times(images.shape[1:])}, and the network takes images of "
                f"{_times(self.shape)}: resize them, or name those of the run."
            )
        if str(images.dtype) != self.dtype:
            raise UserError(f"{what} are {images.dtype}, and the file takes {self.dtype}.")
        if self.batch not in (None, len(images)):
            raise UserError(
                f"{what} are {len(images)} at once, and the file was made for a batch of "
                f"{self.batch}: export it without --batch for any number."
            )


def forward_of(
    model: Any,
    normalize: Callable[[jax.Array], jax.Array] | None = None,
    *,
    integers: bool = False,
) -> Forward:
    """Returns `forward(variables, image) -> logits`, in evaluation mode and float32.

    Args:
      model: a Linen module with the contract of `cnnjax.models`, a `finetune.FineTuned`, or a
        `compress.Quantized`, whose layers then compute in float32 what their codes stand for.
      normalize: applied to the images first; None for images as the model expects them.
      integers: leaves a `compress.Quantized` its own sums, which no format here can hold.
    """

    if isinstance(model, quantized.Quantized) and not integers:
        model = simulated.simulated(model)

    def forward(variables: Variables, image: jax.Array) -> Any:
        image = image if normalize is None else normalize(image)
        outputs = model.apply(variables, image, train=False)
        if isinstance(outputs, Mapping):
            raise UserError(
                f"the network returns {', '.join(outputs)}: what is exported has one output, "
                "such as that of a classifier."
            )
        return outputs.astype(jnp.float32)

    return forward


@contextlib.contextmanager
def portable() -> Iterator[None]:
    """Within the context convolutions are traced as every platform and every converter knows them.

    The forms that `cnnjax.ops` chooses by shape and platform ask for the size of the batch, and
    some of them exist on one platform only.
    """
    with ops.lowering("lax"):
        yield


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced forward pass.

    Attributes:
      jaxpr: its primitives; the inputs are the leaves of the variables, then the images.
      leaves: the variables' arrays, in the order of the inputs.
      signature: of the images.
    """

    jaxpr: Any
    leaves: list[np.ndarray]
    signature: Signature


def traced(forward: Forward, variables: Variables, signature: Signature) -> Program:
    """Traces a forward pass; computes nothing.

    Raises:
      UserError: it cannot be traced for any number of images: it asks for their number.
    """
    leaves = jax.tree.leaves(variables)
    with portable():
        try:
            jaxpr = jax.make_jaxpr(forward)(variables, signature.abstract())
        except jax.errors.InconclusiveDimensionOperation as error:
            text = str(error).partition("\n")[0]
            raise UserError(
                f"the network's program depends on the number of images ({text}): fix it, such "
                "as by --batch 1."
            ) from None
    if len(jaxpr.out_avals) != 1:
        raise UserError(f"the network has {len(jaxpr.out_avals)} outputs: one is exported.")
    return Program(jaxpr, [np.asarray(leaf) for leaf in leaves], signature)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
