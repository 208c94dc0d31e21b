"""Losses: one value per example (or pixel), never reduced; and penalties on the parameters.

A loss takes `(logits, labels)` and drops the class axis, so `[batch, classes]` gives `[batch]`; any
number of leading axes does as well. The step takes the mean over the examples that count.
Everything is computed in float32 at least, whatever the dtype of the logits.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from cnnjax.errors import UserError, unknown_name
from cnnjax.traced import is_on, is_traced
from cnnjax.trees import mask_by_path

PyTree = Any
LossFunction = Callable[[jax.Array, jax.Array], jax.Array]


def softmax_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy of the softmax of the logits: `-sum_k target_k log softmax(logits)_k`.

    With label smoothing `a` the target becomes `(1 - a) target + a / classes` (Szegedy et al. 2016,
    "Rethinking the Inception Architecture for Computer Vision", section 7).

    >>> logits = jnp.array([[2.0, 0.0], [2.0, 0.0]])
    >>> [round(float(loss), 4) for loss in softmax_cross_entropy(logits, jnp.array([0, 1]))]
    [0.1269, 2.1269]

    Args:
      logits: float `[batch, classes]`, two classes or more.
      labels: integers `[batch]` in `[0, classes)`, or one-hot or soft labels `[batch, classes]`.
        A class number out of range gives NaN: under `jit` there is no way to raise.
      label_smoothing: the fraction of the target spread evenly over all classes, in `[0, 1)`.

    Returns:
      `[batch]`, float32, or float64 for float64 logits.

    Raises:
      UserError: shapes that do not go together, labels of shape `[batch]` that are no integers, a
        single logit, or `label_smoothing` outside `[0, 1)`.
    """
    logits, labels = at_least_float32(logits), jnp.asarray(labels)
    _check_class_logits(logits, labels)
    if not is_traced(label_smoothing) and not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing must be in [0, 1), not {label_smoothing}.")
    if labels.ndim < logits.ndim and not is_on(label_smoothing):
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:
        targets = optax.smooth_labels(_distribution(labels, logits), label_smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
    return _nan_where_out_of_range(losses, labels, logits)


def sigmoid_binary_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy of one logit: `-y log sigmoid(logit) - (1 - y) log(1 - sigmoid(logit))`.

    Args:
      logits: float `[batch]` or, as a classifier with `num_classes=1` returns them, `[batch, 1]`.
      labels: `[batch]` (or `[batch, 1]`), 0 or 1, or the probability of class 1.
      label_smoothing: `a` in `[0, 1)`; the target becomes `(1 - a) y + a / 2`.

    Returns:
      `[batch]`, float32, or float64 for float64 logits.

    Raises:
      UserError: more than one logit an example, other shapes that do not go together, or
        `label_smoothing` outside `[0, 1)`.
    """
    logits, labels = at_least_float32(logits), jnp.asarray(labels)
    if not is_traced(label_smoothing) and not 0 <= label_smoothing < 1:
        raise UserError(f"label_smoothing must be in [0, 1), not {label_smoothing}.")
    given = f"logits {list(logits.shape)} and labels {list(labels.shape)}"
    several = logits.ndim > 1 and logits.shape[-1] > 1
    logits, labels = _drop_single_column(logits, labels)
    if several or logits.shape != labels.shape:
        raise UserError(
            f"binary cross-entropy needs one logit and one label an example, not {given}: "
            "use a model with num_classes=1, or softmax_cross_entropy."
        )
    targets = labels.astype(logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    return optax.sigmoid_binary_cross_entropy(logits, targets)


def mean_squared_error(predictions: ArrayLike, targets: ArrayLike) -> jax.Array:
    """Mean over the last axis of `(prediction - target)^2`.

    Args:
      predictions: float `[batch, classes]`; or `[batch]` or `[batch, 1]` for one number an example.
      targets: of the shape of the predictions, or `[batch]`: class numbers, turned into one-hot
        rows where the predictions have classes; the wanted numbers where they have not.

    Returns:
      `[batch]`, float32, or float64 for float64 predictions.

    Raises:
      UserError: shapes that do not go together, or class numbers that are no integers.
    """
    predictions, targets = at_least_float32(predictions), jnp.asarray(targets)
    if predictions.ndim > 1 and predictions.shape[-1] > 1:
        _check_class_logits(predictions, targets)
        squares = optax.squared_error(predictions, _distribution(targets, predictions))
        return _nan_where_out_of_range(jnp.mean(squares, axis=-1), targets, predictions)
    given = f"predictions {list(predictions.shape)} and targets {list(targets.shape)}"
    predictions, targets = _drop_single_column(predictions, targets)
    if predictions.shape != targets.shape:
        raise UserError(f"mean squared error of {given}: give targets of the predictions' shape.")
    return optax.squared_error(predictions, targets.astype(predictions.dtype))


def lenet1998_map(logits: ArrayLike, labels: ArrayLike, *, rubbish: float = 0.1) -> jax.Array:
    """The maximum a posteriori criterion that LeNet-5 was trained with in 1998.

    LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", section II-C,
    equation (9), of one example whose right class is `D`:

        y_D + log(exp(-j) + sum_i exp(-y_i))

    where `y_i`, the squared distance to the code of class `i`, is what the output's RBF unit `i`
    computes (equation 7). As every classifier here returns logits, larger for likelier classes,
    this function takes `logits = -y`. It is softmax cross-entropy with one more class, "rubbish",
    whose logit is fixed at `-j`: classes much farther than `j` are pushed no farther. Without the
    second term a net whose codes are trained too would make all codes equal.

    Args:
      logits: float `[batch, classes]`, the negated distances.
      labels: integers `[batch]`, or one-hot or soft labels `[batch, classes]`.
      rubbish: `j`, positive; the paper gives no value.

    Returns:
      `[batch]`, float32, or float64 for float64 logits.

    Raises:
      UserError: as for `softmax_cross_entropy`, or `rubbish` is not positive.
    """
    if not rubbish > 0:
        raise UserError(
            f"rubbish must be positive, not {rubbish}: it is the distance j of eq. (9)."
        )
    logits, labels = at_least_float32(logits), jnp.asarray(labels)
    _check_class_logits(logits, labels)
    rubbish_logit = jnp.full_like(logits[..., :1], -rubbish)
    distribution = _distribution(labels, logits)
    losses = optax.softmax_cross_entropy(
        jnp.concatenate([logits, rubbish_logit], axis=-1),
        jnp.concatenate([distribution, jnp.zeros_like(rubbish_logit)], axis=-1),
    )
    return _nan_where_out_of_range(losses, labels, logits)


def l1_penalty(params: PyTree, patterns: Sequence[str] = (".*kernel",)) -> jax.Array:
    """Sum of the absolute values of the selected parameters, a scalar to add to the loss.

    Args:
      params: any pytree of parameters.
      patterns: regular expressions over whole paths (see `cnnjax.trees`); by default the kernels,
        so neither biases nor the scales of norms.

    Raises:
      UserError: a pattern matches nothing.
    """
    return _sum_over_selected(jnp.abs, params, patterns)


def l2_penalty(params: PyTree, patterns: Sequence[str] = (".*kernel",)) -> jax.Array:
    """Sum of the squares of the selected parameters, without a factor 1/2: its gradient is `2 w`.

    Added to the loss it acts through the gradient, so momentum and adaptive step sizes change its
    effect; the `weight_decay` of `cnnjax.optim` is the decoupled form, which they leave alone.

    Args:
      params: any pytree of parameters.
      patterns: as for `l1_penalty`.

    Raises:
      UserError: a pattern matches nothing.
    """
    return _sum_over_selected(jnp.square, params, patterns)


def one_vs_all_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, *, target_threshold: float = 0.2
) -> jax.Array:
    """Mean over the classes of the cross-entropy of each logit's sigmoid: is it this class or not.

    Wightman et al. 2021, "ResNet strikes back" (arXiv 2110.00476), section 2.2: of a mixed image
    all classes are present whose share is above `target_threshold`.

    Args:
      logits: float `[batch, classes]`, two classes or more.
      labels: integers `[batch]` in `[0, classes)`, or one-hot or soft labels `[batch, classes]`.
      target_threshold: the paper's choice is 0.2.

    Returns:
      `[batch]`, float32, or float64 for float64 logits.

    Raises:
      UserError: shapes that do not go together.
    """
    logits, labels = at_least_float32(logits), jnp.asarray(labels)
    _check_class_logits(logits, labels)
    targets = (_distribution(labels, logits) > target_threshold).astype(logits.dtype)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets).mean(-1)
    return _nan_where_out_of_range(losses, labels, logits)


def pixel_cross_entropy(
    logits: ArrayLike, class_map: ArrayLike, *, ignore: int = 255
) -> tuple[jax.Array, jax.Array]:
    """Softmax cross-entropy of every pixel, and which pixels count.

    Args:
      logits: float `[..., height, width, classes]`, two classes or more.
      class_map: integers `[..., height, width]` in `[0, classes)`, or `ignore`.
      ignore: marks pixels without a class: they have loss 0 and no gradient, whatever the logits.

    Returns:
      `(losses, counted)`: float32 at least and bool, both `[..., height, width]`.

    Raises:
      UserError: shapes that do not go together.
    """
    logits, class_map = jnp.asarray(logits), jnp.asarray(class_map)
    counted = class_map != ignore
    if counted.shape == logits.shape[:-1]:
        # Selected, not multiplied: the gradient of 0 times infinity is no number.
        logits = jnp.where(counted[..., None], logits, 0)
    losses = softmax_cross_entropy(logits, jnp.where(counted, class_map, 0).astype(jnp.int32))
    return jnp.where(counted, losses, 0), counted


def dice_loss(logits: ArrayLike, class_map: ArrayLike, *, ignore: int = 255) -> jax.Array:
    """One minus the mean over an image's classes of their soft Dice coefficient.

        D_k = 2 sum p_k t_k / (sum p_k^2 + sum t_k^2)

    over the pixels that count, `p_k` the probability of class `k`, `t_k` whether it is the class.
    Milletari, Navab and Ahmadi 2016, "V-Net" (arXiv 1606.04797), section 3, for several classes:
    the mean is over those that the image has.

    Args:
      logits: float `[..., height, width, classes]`, two classes or more.
      class_map: integers `[..., height, width]` in `[0, classes)`, or `ignore`.
      ignore: marks pixels without a class.

    Returns:
      `[...]`, float32 at least; 0 for an image without a pixel that counts.

    Raises:
      UserError: shapes that do not go together.
    """
    logits, class_map = at_least_float32(logits), jnp.asarray(class_map)
    if class_map.shape != logits.shape[:-1]:
        raise UserError(
            f"the Dice loss was given logits {list(logits.shape)} and a class map "
            f"{list(class_map.shape)}: give one class a pixel."
        )
    counted = (class_map != ignore)[..., None]
    probabilities = jnp.where(counted, jax.nn.softmax(jnp.where(counted, logits, 0)), 0)
    targets = jax.nn.one_hot(class_map, logits.shape[-1], dtype=logits.dtype) * counted
    pixels = (-3, -2)
    common = jnp.sum(probabilities * targets, axis=pixels)
    sizes = jnp.sum(probabilities**2 + targets**2, axis=pixels)
    present = jnp.any(targets > 0, axis=pixels)
    losses = jnp.where(present, 1 - 2 * common / jnp.where(present, sizes, 1), 0)
    return jnp.sum(losses, axis=-1) / jnp.maximum(jnp.sum(present, axis=-1), 1)


def weighted(loss_fn: LossFunction, class_weights: ArrayLike) -> LossFunction:
    """Returns the loss times the weight of the label's class; of a soft label, the mean weight.

    Args:
      loss_fn: `(logits, labels) -> [batch]`.
      class_weights: `[classes]`, such as `evaluation.label_quality.class_weights` returns.
    """
    weights = jnp.asarray(class_weights)

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        losses = loss_fn(logits, labels)
        if labels.ndim > losses.ndim:
            return losses * (labels @ weights)
        if jnp.issubdtype(labels.dtype, jnp.integer):
            return losses * weights[labels]
        # The probability of class 1 of two.
        return losses * (weights[0] + labels * (weights[1] - weights[0]))

    return loss


LOSSES: dict[str, Callable[..., jax.Array]] = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "sigmoid_binary_cross_entropy": sigmoid_binary_cross_entropy,
    "one_vs_all_cross_entropy": one_vs_all_cross_entropy,
    "mean_squared_error": mean_squared_error,
    "lenet1998_map": lenet1998_map,
}


def make_loss(name: str, **options: Any) -> LossFunction:
    """Returns the loss of that name with its keyword options bound: `(logits, labels) -> [batch]`.

    Example: `make_loss("softmax_cross_entropy", label_smoothing=0.1)`.

    Raises:
      UserError: an unknown name, or an option that this loss does not take.
    """
    if name not in LOSSES:
        raise unknown_name("loss", name, LOSSES)
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    for option, value in options.items():
        if not known:
            raise UserError(f"loss {name!r} takes no options, but was given {option}={value!r}.")
        if option not in known:
            raise unknown_name(f"option of loss {name!r}", option, known)
    return partial(LOSSES[name], **options)


def at_least_float32(values: ArrayLike) -> jax.Array:
    """Returns the values in float32, or in the wider dtype that they have."""
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _check_class_logits(logits: jax.Array, labels: jax.Array) -> None:
    given = f"logits {list(logits.shape)} and labels {list(labels.shape)} {labels.dtype}"
    if logits.ndim == 0 or logits.shape[-1] == 1:
        raise UserError(
            f"this loss needs two classes or more, but was given {given}: "
            "a model with one logit takes sigmoid_binary_cross_entropy."
        )
    if labels.shape == logits.shape:
        return
    if labels.shape != logits.shape[:-1]:
        raise UserError(
            f"labels must be class numbers {list(logits.shape[:-1])} or one row of classes each "
            f"{list(logits.shape)}, but this loss was given {given}."
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise UserError(f"class numbers must be integers, but this loss was given {given}.")


def _distribution(labels: jax.Array, logits: jax.Array) -> jax.Array:
    """Labels as one row of class weights each, in the dtype and shape of the logits."""
    if labels.ndim == logits.ndim:
        return labels.astype(logits.dtype)
    return jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)


def _nan_where_out_of_range(losses: jax.Array, labels: jax.Array, logits: jax.Array) -> jax.Array:
    if labels.ndim == logits.ndim:
        return losses
    # Not in the target: the gradient of an example that the mask leaves out must stay 0.
    valid = (labels >= 0) & (labels < logits.shape[-1])
    return jnp.where(valid, losses, jnp.nan)


def _drop_single_column(values: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Turns `[batch, 1]` into `[batch]`, and `[1]` into `[]` where the label is `[]`."""
    if values.ndim > 0 and values.shape[-1] == 1 and (values.ndim > 1 or labels.ndim == 0):
        values = values[..., 0]
    if labels.ndim == values.ndim + 1 and labels.shape[-1] == 1:
        labels = labels[..., 0]
    return values, labels


def _sum_over_selected(
    value: Callable[[jax.Array], jax.Array], params: PyTree, patterns: Sequence[str]
) -> jax.Array:
    selected = jax.tree.leaves(mask_by_path(params, patterns))
    terms = [
        jnp.sum(value(at_least_float32(leaf)))
        for leaf, chosen in zip(jax.tree.leaves(params), selected, strict=True)
        if chosen
    ]
    return sum(terms, start=jnp.zeros((), jnp.float32))
