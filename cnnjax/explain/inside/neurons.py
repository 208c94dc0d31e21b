"""What the neurons of a layer do over a dataset: dead, always on, how many of them say the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cnnjax import aligned
from cnnjax.explain import taps
from cnnjax.explain.inside import passes

MEANING = (
    "dead: channels that are above 0 for no image at no position; always on: at every one; "
    "active: mean fraction of positions above 0; mean: of all activations; effective rank: of the "
    "channels' covariance, exp of the entropy of its eigenvalues: directions that the layer uses."
)


class Moments(NamedTuple):
    """What is kept of a layer's activations: see `Neurons`.

    Attributes:
      number: positions of all images.
      mean: `[channels]`.
      products: sums of products of deviations from the mean, `[channels, channels]`.
      active: positions above 0, `[channels]`.
      largest, smallest: `[channels]`.
    """

    number: jax.Array
    mean: jax.Array
    products: jax.Array
    active: jax.Array
    largest: jax.Array
    smallest: jax.Array


class Neurons(NamedTuple):
    """The channels of one layer over all positions of all images.

    Attributes:
      mean, deviation: of each channel, `[channels]`.
      active: fraction of positions above 0, `[channels]`.
      dead: never above 0, bool `[channels]`.
      always_on: above 0 everywhere, bool `[channels]`.
      effective_rank: exp of the entropy of the covariance's eigenvalues (Roy and Vetterli 2007,
        "The effective rank", definition 1): 1 if all channels say the same, the number of
        channels if they are as strong and uncorrelated; 0 if none varies.
    """

    mean: np.ndarray
    deviation: np.ndarray
    active: np.ndarray
    dead: np.ndarray
    always_on: np.ndarray
    effective_rank: float

    def cells(self) -> dict[str, str]:
        """Returns the row of the table, by name."""
        return {
            "channels": str(len(self.mean)),
            "dead": f"{self.dead.mean():.1%}",
            "always on": f"{self.always_on.mean():.1%}",
            "active": f"{self.active.mean():.1%}",
            "mean": f"{self.mean.mean():.4g}",
            "effective rank": f"{self.effective_rank:.1f}",
        }


def neuron_statistics(
    model: nn.Module,
    variables: Any,
    batches: Iterable[dict[str, jax.Array]],
    layers: Sequence[str],
    *,
    normalize: Callable[[jax.Array], jax.Array] = lambda image: image,
) -> dict[str, Neurons]:
    """Returns what the channels of each layer do over all images; of images, all positions count.

    Arguments and errors as for `passes.fold`.
    """
    (kept,) = passes.fold(model, variables, batches, layers, [moments()], normalize=normalize)
    return finished({name: kept[name] for name in layers})


def moments() -> passes.Fold:
    """Returns the fold that keeps the `Moments` of each layer."""

    def start(shapes: passes.Shapes) -> dict[str, Moments]:
        return {
            name: Moments(
                jnp.zeros(()),
                jnp.zeros(shape[-1]),
                jnp.zeros((shape[-1], shape[-1])),
                jnp.zeros(shape[-1]),
                jnp.full(shape[-1], -jnp.inf),
                jnp.full(shape[-1], jnp.inf),
            )
            for name, shape in shapes.items()
        }

    def add(
        kept: dict[str, Moments], found: taps.Arrays, mask: jax.Array, first: jax.Array
    ) -> dict[str, Moments]:
        return {name: _merged(kept[name], found[name], mask) for name in kept}

    return passes.Fold(start, add)


def _merged(kept: Moments, x: jax.Array, mask: jax.Array) -> Moments:
    """Chan, Golub and LeVeque 1979: means and products of two parts give those of both."""
    x = passes.positions(x).astype(jnp.float32)
    weight = jnp.broadcast_to(mask[:, None], x.shape[:2]).reshape(-1, 1)
    x = x.reshape(-1, x.shape[-1])
    count = jnp.sum(weight.astype(jnp.float32))
    mean = jnp.sum(jnp.where(weight, x, 0), 0) / jnp.maximum(count, 1)
    deviation = jnp.where(weight, x - mean, 0)
    products = jnp.matmul(deviation.T, deviation, precision=jax.lax.Precision.HIGHEST)
    total = jnp.maximum(kept.number + count, 1)
    change = mean - kept.mean
    return Moments(
        kept.number + count,
        kept.mean + change * count / total,
        kept.products + products + jnp.outer(change, change) * kept.number * count / total,
        kept.active + jnp.sum(weight & (x > 0), 0),
        jnp.maximum(kept.largest, jnp.max(jnp.where(weight, x, -jnp.inf), 0)),
        jnp.minimum(kept.smallest, jnp.min(jnp.where(weight, x, jnp.inf), 0)),
    )


def finished(kept: dict[str, Moments]) -> dict[str, Neurons]:
    """Returns the statistics of what `moments` kept."""
    return {name: _finished(*map(np.asarray, each)) for name, each in kept.items()}


def _finished(
    count: np.ndarray,
    mean: np.ndarray,
    products: np.ndarray,
    active: np.ndarray,
    largest: np.ndarray,
    smallest: np.ndarray,
) -> Neurons:
    covariance = products.astype(np.float64) / max(float(count), 1.0)
    return Neurons(
        mean,
        np.sqrt(np.diag(covariance)),
        active / max(float(count), 1.0),
        largest <= 0,
        smallest > 0,
        effective_rank(covariance),
    )


def effective_rank(covariance: np.ndarray) -> float:
    """Returns exp of the entropy of the eigenvalues of a symmetric matrix, as shares of their sum.

    0 for a matrix of zeros, or one that is not finite.
    """
    if not np.isfinite(covariance).all():
        return 0.0
    values = np.maximum(np.linalg.eigvalsh(covariance), 0)
    if not values.sum() > 0:
        return 0.0
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-np.sum(share * np.log(share))))


def table(statistics: dict[str, Neurons], count: int) -> str:
    """Returns the lines that the command prints, under a heading that says what they mean."""
    rows = [{"layer": name, **each.cells()} for name, each in statistics.items()]
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join([f"Over {count} images. {MEANING}", *aligned.lines(cells, "lr")])
