"""What a student is to have in common with its teacher: losses `[batch]` of two networks' arrays.

Each takes the student's array and the teacher's, and is 0 where they agree as the loss sees it. No
gradient flows into what the caller has stopped; here nothing is stopped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from cnnjax.evaluation.ensemble import class_logits
from cnnjax.losses import at_least_float32


def softened_divergence(student: jax.Array, teacher: jax.Array, *, temperature: float) -> jax.Array:
    """Returns `T^2 KL(softmax(teacher / T) || softmax(student / T))`.

    Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv
    1503.02531), section 2: the gradient is that of the cross-entropy with soft targets, and the
    factor keeps its size whatever the temperature. As the temperature grows it becomes half the
    mean squared difference of the logits, each set less its mean (their section 2.1).

    Args:
      student, teacher: logits `[batch, ..., classes]`; one logit counts for two classes.
      temperature: positive.

    Returns:
      `[batch, ...]`, float32 at least.
    """
    log_p, log_q = (
        jax.nn.log_softmax(class_logits(at_least_float32(x)) / temperature)
        for x in (teacher, student)
    )
    return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def hint_loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Returns half the mean squared difference of two outputs of one shape, `[batch]`.

    Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation (3), of the
    mean where they take the sum, so that the weight does not depend on the size of the layer.
    """
    difference = at_least_float32(student) - at_least_float32(teacher)
    return 0.5 * jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


def attention_map(features: jax.Array, *, power: float = 2.0) -> jax.Array:
    """Returns where a layer looks: the sum over its channels of `|activation|^power`.

    Zagoruyko and Komodakis 2017, "Paying More Attention to Attention" (arXiv 1612.03928), section
    3.1, `F_sum^p`.

    Args:
      features: `[batch, height, width, channels]`.

    Returns:
      `[batch, height, width]`.
    """
    return jnp.sum(jnp.abs(at_least_float32(features)) ** power, axis=-1)


def attention_loss(student: jax.Array, teacher: jax.Array, *, power: float = 2.0) -> jax.Array:
    """Returns half the mean squared difference of two attention maps, each of length 1: `[batch]`.

    Zagoruyko and Komodakis 2017, equation (2), squared and divided by the number of positions as
    in the weights of their section 4.1 and in their code. Maps of two sizes are compared at the
    smaller one, as their section 3.1 allows.

    Args:
      student, teacher: `[batch, height, width, channels]`, of any sizes and channels.
      power: `p` of `attention_map`.
    """
    maps = _of_one_size(*(attention_map(x, power=power)[..., None] for x in (student, teacher)))
    units = [_unit(each.reshape(each.shape[0], -1)) for each in maps]
    return 0.5 * jnp.mean(jnp.square(units[0] - units[1]), axis=-1)


def of_one_size(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns two outputs of which the larger image is averaged down to the size of the smaller."""
    return (
        _of_one_size(student, teacher) if student.ndim == teacher.ndim == 4 else (student, teacher)
    )


def distance_loss(
    student: jax.Array, teacher: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """Returns how far the distances between examples differ: `[batch]`, means over the others.

    Park et al. 2019, "Relational Knowledge Distillation" (arXiv 1904.05068), section 3.2.1: each
    network's distances are divided by their mean over the batch, and compared by the Huber loss.
    Neither the scale nor a rotation of the student's embeddings changes it.

    Args:
      student, teacher: embeddings `[batch, ...]`; their lengths may differ.
      counts: bool `[batch]`: False for examples that are nobody's other; None counts all.
    """
    pairs = _pairs(student.shape[0], counts)
    both = pairs * pairs.T
    scaled = []
    for x in (student, teacher):
        distances = _lengths(_differences(x))
        mean = jnp.sum(distances * both) / jnp.maximum(jnp.sum(both), 1)
        scaled.append(distances / jnp.where(mean > 0, mean, 1))
    return _mean_over(_huber(scaled[0] - scaled[1]), pairs)


def angle_loss(
    student: jax.Array, teacher: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    """Returns how far the angles between three examples differ: `[batch]`, by that at the vertex.

    Park et al. 2019, section 3.2.2: of the cosine of the angle that two others make seen from an
    example, by the Huber loss. Neither scale nor rotation nor a shift changes it.

    Arguments as for `distance_loss`. Takes memory of the cube of the batch.
    """
    pairs = _pairs(student.shape[0], counts)
    cosines = []
    for x in (student, teacher):
        directions = _unit(_differences(x))
        cosines.append(
            jnp.einsum("vad,vbd->vab", directions, directions, precision=jax.lax.Precision.HIGHEST)
        )
    # Two others, each of them another example than the one at the vertex.
    triples = pairs[:, :, None] * pairs[:, None, :] * (1 - jnp.eye(student.shape[0]))
    return _mean_over(_huber(cosines[0] - cosines[1]), triples)


def _of_one_size(student: jax.Array, teacher: jax.Array) -> tuple[jax.Array, jax.Array]:
    height, width = (min(a, b) for a, b in zip(student.shape[1:3], teacher.shape[1:3], strict=True))
    return _resized(student, height, width), _resized(teacher, height, width)


def _resized(x: jax.Array, height: int, width: int) -> jax.Array:
    if x.shape[1:3] == (height, width):
        return x
    return jax.image.resize(x, (x.shape[0], height, width, x.shape[3]), "linear", antialias=True)


def _pairs(batch: int, counts: jax.Array | None) -> jax.Array:
    """Returns 1 for each pair of an example and another that counts, else 0: `[batch, batch]`."""
    others = jnp.ones(batch) if counts is None else counts.astype(jnp.float32)
    return (1 - jnp.eye(batch)) * others[None, :]


def _differences(x: jax.Array) -> jax.Array:
    flat = at_least_float32(x).reshape(x.shape[0], -1)
    return flat[None, :, :] - flat[:, None, :]


def _lengths(vectors: jax.Array) -> jax.Array:
    """Lengths over the last axis; that of a zero vector is 0 without a gradient."""
    squares = jnp.sum(jnp.square(vectors), axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def _unit(vectors: jax.Array) -> jax.Array:
    lengths = _lengths(vectors)[..., None]
    return jnp.where(lengths > 0, vectors / jnp.where(lengths > 0, lengths, 1), 0)


def _huber(difference: jax.Array) -> jax.Array:
    size = jnp.abs(difference)
    return jnp.where(size <= 1, 0.5 * jnp.square(difference), size - 0.5)


def _mean_over(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Means over all axes but the first, by weights; 0 where there are none."""
    axes = tuple(range(1, values.ndim))
    return jnp.sum(values * weights, axis=axes) / jnp.maximum(jnp.sum(weights, axis=axes), 1)
