"""A network as serialized StableHLO, by `jax.export`.

    exported = jax.export.deserialize(open("model.stablehlo", "rb").read())
    logits = exported.call(images)

JAX alone reads it back, without Flax and without this package, on each platform that it was made
for, for any number of images. Files can be read for six months at least by newer versions of JAX
(jax.export's guarantee of compatibility). The convolutions are StableHLO's own, which each
platform compiles as it does best.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cnnjax.errors import UserError, unknown_name
from cnnjax.export.program import Forward, Signature, Variables, portable

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def check_platforms(platforms: Sequence[str]) -> None:
    """Raises a UserError unless these are names of platforms, at least one."""
    for platform in platforms:
        if platform not in PLATFORMS:
            raise unknown_name("platform", platform, PLATFORMS)
    if not platforms:
        raise UserError(f"no platforms: give some of {', '.join(PLATFORMS)}.")


def make(
    forward: Forward,
    variables: Variables,
    signature: Signature,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> Any:
    """Returns the `jax.export.Exported`, of one argument: the images.

    Args:
      forward: `forward(variables, image) -> logits`, such as `forward_of(model)`.
      variables: its arrays; they are constants of the program.
      signature: of the images.
      platforms: that it can be run on.

    Raises:
      UserError: an unknown platform.
    """
    from jax import export

    check_platforms(platforms)

    def of_image(image: jax.Array) -> jax.Array:
        return forward(variables, image)

    with portable():
        return export.export(jax.jit(of_image), platforms=list(platforms))(signature.abstract())


def write(
    path: Path,
    forward: Forward,
    variables: Variables,
    signature: Signature,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> None:
    """Writes what `make` returns; arguments and errors as there."""
    exported = make(forward, variables, signature, platforms=platforms)
    path.write_bytes(exported.serialize())
