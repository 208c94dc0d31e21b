"""NT-Xent: the loss of contrastive learning, over the embeddings of the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cnnjax.errors import UserError
from cnnjax.losses import at_least_float32


def nt_xent(
    views: ArrayLike,
    all_views: ArrayLike | None = None,
    *,
    temperature: float,
    first_index: ArrayLike = 0,
    mask: ArrayLike | None = None,
) -> jax.Array:
    """Normalized temperature-scaled cross-entropy: which of all embeddings is the other view?

    Chen et al. 2020 (arXiv 2002.05709), equation (1), for each embedding `i` whose other view of
    the same example is `j`:

        -log(exp(sim(i, j) / temperature) / sum_{k != i} exp(sim(i, k) / temperature))

    where `sim` is the cosine and `k` runs over both views of all examples.

    Args:
      views: float `[batch, 2, features]`: two views of each example.
      all_views: `[whole, 2, features]`: those of the whole batch, of which `views` are the rows
        from `first_index` on; None where `views` are all.
      temperature: positive.
      first_index: see `all_views`.
      mask: bool `[whole]`; an example that is False is nobody's `k`, and what its own values are
        means nothing.

    Returns:
      `[batch, 2]`, float32, or float64 for float64 embeddings.

    Raises:
      UserError: `temperature` is not positive, or shapes that do not go together.
    """
    if not temperature > 0:
        raise UserError(f"temperature {temperature} must be positive.")
    cosines, positive = view_cosines(views, all_views, first_index=first_index, mask=mask)
    return optax.softmax_cross_entropy_with_integer_labels(cosines / temperature, positive)


def view_cosines(
    views: ArrayLike,
    all_views: ArrayLike | None = None,
    *,
    first_index: ArrayLike = 0,
    mask: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compares each embedding with all others.

    Arguments as for `nt_xent`.

    Returns:
      Cosines `[batch, 2, 2 * whole]`, minus infinity for the embedding itself and for examples
      that are masked, but for the other view; and the column of the other view, int32
      `[batch, 2]`. The columns are the rows of `all_views`, two each.
    """
    views = at_least_float32(views)
    all_views = views if all_views is None else at_least_float32(all_views)
    if views.ndim != 3 or views.shape[1:] != (2, all_views.shape[-1]) or all_views.ndim != 3:
        raise UserError(
            f"views {list(views.shape)} among {list(all_views.shape)}: give two embeddings an "
            "example, [batch, 2, features]."
        )
    whole = all_views.shape[0]
    # A product in fewer bits would be off by several percent after division by the temperature.
    cosines = jnp.einsum(
        "bvf,wuf->bvwu", _unit(views), _unit(all_views), precision=jax.lax.Precision.HIGHEST
    ).reshape(*views.shape[:2], 2 * whole)
    row = first_index + jnp.arange(views.shape[0], dtype=jnp.int32)[:, None]
    itself, other = 2 * row + jnp.arange(2), 2 * row + jnp.array([1, 0])
    column = jnp.arange(2 * whole)
    counts = jnp.ones(whole, bool) if mask is None else jnp.asarray(mask)
    # The other view counts for padding too: a sum of nothing would have no gradient.
    compared = jnp.repeat(counts, 2) | (column == other[..., None])
    compared &= column != itself[..., None]
    return jnp.where(compared, cosines, -jnp.inf), jnp.asarray(other, jnp.int32)


def _unit(vectors: jax.Array) -> jax.Array:
    """Divides by the length; what is shorter than 1e-12 becomes zero, without a gradient."""
    squares = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    long = squares > 1e-24
    return jnp.where(long, vectors * jax.lax.rsqrt(jnp.where(long, squares, 1)), 0)
