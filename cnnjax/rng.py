"""Randomness as a function of (seed, stream name, numbers), so that a resumed run replays it."""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax


def _stream_number(name: str) -> int:
    # `hash(str)` differs from process to process; CRC-32 is the same everywhere.
    return zlib.crc32(name.encode())


def stream_key(key_or_seed: "jax.Array | int", name: str, step: "jax.Array | int") -> "jax.Array":
    """Derives the typed key of one random stream at one step.

    >>> import jax
    >>> keys = [stream_key(0, "dropout", step) for step in (7, 7, 8)]
    >>> float(jax.random.uniform(keys[0])) == float(jax.random.uniform(keys[1]))
    True
    >>> float(jax.random.uniform(keys[0])) == float(jax.random.uniform(keys[2]))
    False

    Args:
      key_or_seed: a typed scalar key, or an integer seed.
      name: the stream, such as `"dropout"`: streams of different names are independent.
      step: integer, possibly traced: steps are independent too.

    Returns:
      A typed scalar key, the same for the same three arguments.
    """
    import jax

    key = jax.random.key(key_or_seed) if isinstance(key_or_seed, int) else key_or_seed
    return jax.random.fold_in(jax.random.fold_in(key, _stream_number(name)), step)


def example_keys(key: "jax.Array", examples: "jax.Array") -> "jax.Array":
    """Derives the typed key of each example, `[batch]`, from its position in the whole batch."""
    import jax

    return jax.vmap(jax.random.fold_in, (None, 0))(key, examples)


def draw(
    sample: Callable[..., "jax.Array"], key: "jax.Array", shape: Sequence[int], *arguments: Any
) -> "jax.Array":
    """Returns `sample(key, shape, *arguments)`, drawn as one row of numbers.

    They are the same. For a shape of several axes, such as an image's, XLA:CPU takes one to three
    seconds to compile each draw and twice as long to run it, for a row half a second.

    >>> import jax
    >>> key, shape = jax.random.key(0), (28, 28, 1)
    >>> bool((draw(jax.random.normal, key, shape) == jax.random.normal(key, shape)).all())
    True

    Args:
      sample: of `jax.random`, such as `jax.random.normal`.
      key: a typed scalar key.
      shape: of the result.
      arguments: others of `sample`, that it takes after the shape.
    """
    return sample(key, (math.prod(shape),), *arguments).reshape(shape)


def numpy_generator(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """Returns a NumPy generator that depends on (seed, name, numbers) alone, for the host."""
    entropy = np.random.SeedSequence([seed, _stream_number(name), *numbers])
    return np.random.Generator(np.random.Philox(entropy))
