"""Maps from what a target says of images of which parts are hidden: no gradients are needed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax.errors import UserError
from cnnjax.explain import taps
from cnnjax.explain.targets import Target


def occlusion(
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    window: int | tuple[int, int] = 0,
    stride: int | tuple[int, int] = 0,
    baseline: jax.Array | float = 0.0,
) -> jax.Array:
    """How much the target falls when a window that holds the pixel is hidden, on average.

    Zeiler and Fergus 2014 (arXiv 1311.2901), section 4.2.

    Args:
      model: a Linen module with the contract of `cnnjax.models`.
      variables: its `params` and, where it has them, `batch_stats`.
      image: float `[batch, height, width, channels]`, as the model expects it.
      target: of the outputs; see `targets`.
      window: height and width of what is hidden; 0: an eighth of the image, at least 2.
      stride: step of the window down and right; 0: half of it.
      baseline: what it is hidden by, in the units of `image`.

    Returns:
      `[batch, height, width]`.

    Raises:
      UserError: a window or stride that is not positive, or a window larger than the image; or the
        target refuses.
    """
    taps.check_image(image)
    size = image.shape[1:3]
    rows, columns = _pair("window", window, tuple(max(2, length // 8) for length in size))
    steps = _pair("stride", stride, (max(1, rows // 2), max(1, columns // 2)))
    if rows > size[0] or columns > size[1]:
        raise UserError(f"a window of {rows} x {columns} is larger than the image {size}.")
    starts = [
        range(0, length - part + step, step)
        for length, part, step in zip(size, (rows, columns), steps, strict=True)
    ]
    corners = np.array([(row, column) for row in starts[0] for column in starts[1]])
    down, right = jnp.arange(size[0])[:, None], jnp.arange(size[1])
    whole = taps.score(model, variables, image, target)

    def hide(
        sums: tuple[jax.Array, jax.Array], corner: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        row, column = corner
        hidden = (
            (down >= row) & (down < row + rows) & (right >= column) & (right < column + columns)
        )
        seen = jnp.where(hidden[..., None], jnp.asarray(baseline, image.dtype), image)
        loss = whole - taps.score(model, variables, seen, target)
        falls, counts = sums
        return (falls + loss[:, None, None] * hidden, counts + hidden), None

    zeros = jnp.zeros(image.shape[:3], whole.dtype), jnp.zeros(size, whole.dtype)
    (falls, counts), _ = jax.lax.scan(hide, zeros, jnp.asarray(corners))
    return falls / counts


def rise(
    key: jax.Array,
    model: nn.Module,
    variables: Any,
    image: jax.Array,
    target: Target,
    *,
    samples: int = 1000,
    cells: int = 7,
    kept: float = 0.5,
    baseline: float = 0.0,
) -> jax.Array:
    """The mean target over random soft masks, each pixel's by the masks that show it.

    Petsiuk, Das and Saenko 2018 (arXiv 1806.07421), equation 6; masks as in section 3.2: a grid of
    random cells, enlarged bilinearly by a cell more than the image and cut at a random place.

    Args:
      key: of the masks, which all images share.
      model, variables, image, target: as for `occlusion`.
      samples: number of masks, one after another.
      cells: of the grid, along each side.
      kept: probability that a cell is shown.
      baseline: value of a pixel that is not.

    Raises:
      UserError: numbers that are not positive or `kept` outside (0, 1); or the target refuses.
    """
    taps.check_image(image)
    if samples < 1 or cells < 1 or not 0 < kept < 1:
        raise UserError(
            f"samples={samples} and cells={cells} must be positive, kept={kept} between 0 and 1."
        )
    size = image.shape[1:3]
    cell = [-(-length // cells) for length in size]
    large = [(cells + 1) * length for length in cell]

    def draw(key: jax.Array) -> jax.Array:
        of_grid, of_place = jax.random.split(key)
        grid = jax.random.bernoulli(of_grid, kept, (cells, cells)).astype(image.dtype)
        soft = jax.image.resize(grid, large, "bilinear")
        start = jax.random.randint(of_place, (2,), 0, jnp.array(cell))
        return jax.lax.dynamic_slice(soft, start, size)

    def add(total: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        mask = draw(key)
        seen = baseline + mask[..., None] * (image - baseline)
        score = taps.score(model, variables, seen, target)
        return total + score[:, None, None] * mask, None

    total, _ = jax.lax.scan(
        add, jnp.zeros(image.shape[:3], image.dtype), jax.random.split(key, samples)
    )
    return total / (samples * kept)


def _pair(name: str, value: int | tuple[int, int], default: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    if (first, second) == (0, 0):
        first, second = default
    if first < 1 or second < 1:
        raise UserError(f"{name} must be positive, got {value}.")
    return first, second
