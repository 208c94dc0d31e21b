"""Optimizers by name: one Optax chain, with clipping, decoupled weight decay and freezing by path.

    gradient -> clip -> direction of the optimizer -> + weight decay * kernels
             -> times minus the learning rate -> within the largest norm

Each optimizer is a function of its own hyperparameters that returns the direction alone, before
the learning rate; `make_optimizer` puts the rest around it, the same for all of them.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cnnjax.errors import UserError, unknown_name
from cnnjax.traced import is_on
from cnnjax.trees import from_named_leaves, label_by_path, mask_by_path, named_leaves

PyTree = Any
Schedule = Callable[[jax.Array], jax.Array]


def make_optimizer(
    name: str,
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    weight_decay_patterns: Sequence[str] = (".*kernel",),
    clip_norm: float | None = None,
    max_norm: float | None = None,
    max_norm_patterns: Sequence[str] = (".*kernel",),
    freeze: Sequence[str] = (),
    **options: Any,
) -> optax.GradientTransformation:
    """Returns the optimizer of that name.

    Patterns are regular expressions over whole paths such as `stage1/block2/conv1/kernel` (see
    `cnnjax.trees`); they are checked when the optimizer's `init` sees the parameters.

    >>> optimizer = make_optimizer("sgd", 0.5, weight_decay=0.1)
    >>> params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    >>> gradient = {"kernel": jnp.array([1.0]), "bias": jnp.array([1.0])}
    >>> updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    >>> {name: round(float(update[0]), 2) for name, update in updates.items()}
    {'bias': -0.5, 'kernel': -0.6}

    Args:
      name: a key of `OPTIMIZERS`.
      learning_rate: a number, or a schedule: optimizer update -> learning rate.
      momentum: of `momentum`, `nesterov` and `muon`, in [0, 1); the others do not read it.
      weight_decay: `d`: each update subtracts `learning_rate * d * parameter` from the selected
        parameters (decoupled: Loshchilov and Hutter 2019, "Decoupled Weight Decay
        Regularization", with the learning rate as the factor, as in PyTorch's AdamW). In `lamb` the
        decay is part of the direction whose norm the trust ratio sets. `adam` and `adamw` are one
        optimizer; the second name is there for those who look for it.
      weight_decay_patterns: what decays; by default the kernels, so neither biases nor norms.
      clip_norm: gradients of a larger global L2 norm are scaled down to it; None does not clip.
      max_norm: after each update, the weights into a unit or channel of the selected parameters are
        scaled down to this L2 norm where theirs is larger, see `limit_norm`; None does not.
      max_norm_patterns: what is limited; by default the kernels.
      freeze: patterns of the parameters to leave as they are, bit for bit. They have no moments,
        and their gradients do not count towards the norm that is clipped.
      **options: hyperparameters of this optimizer, such as `beta2=0.99`; see its function.

    Returns:
      An Optax transformation whose `update` needs the parameters. The state is a pytree of arrays
      whose structure never changes.

    Raises:
      UserError: an unknown name or option, or a value out of its range; from `init`, a pattern that
        matches nothing, or patterns that leave nothing to train.
    """
    _check(learning_rate, momentum, weight_decay, clip_norm, max_norm)
    direction = _direction(name, momentum, options)

    def chain(params: PyTree) -> optax.GradientTransformation:
        """The whole chain for parameters of these paths."""
        parts = [direction]
        if clip_norm is not None:
            parts.insert(0, optax.clip_by_global_norm(clip_norm))
        if is_on(weight_decay):
            decayed = mask_by_path(params, weight_decay_patterns)
            parts.append(optax.add_decayed_weights(weight_decay, mask=decayed))
        if name == "lamb":
            parts.append(optax.scale_by_trust_ratio())
        parts.append(optax.scale_by_learning_rate(learning_rate))
        if max_norm is not None:
            limited = mask_by_path(params, max_norm_patterns)
            parts.append(optax.masked(limit_norm(max_norm), limited))
        optimizer = optax.chain(*parts)
        return _freeze(optimizer, params, freeze) if freeze else optimizer

    def init(params: PyTree) -> PyTree:
        return chain(params).init(params)

    def update(
        gradient: PyTree, state: PyTree, params: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        return chain(gradient).update(gradient, state, params)

    return optax.GradientTransformation(init, update)


class LookaheadState(NamedTuple):
    """Of `lookahead`: the number of updates made, the optimizer's state, the slow parameters."""

    num_updates: jax.Array
    inner: PyTree
    slow: PyTree


def lookahead(
    optimizer: optax.GradientTransformation,
    decay: Callable[[jax.Array], jax.Array | float],
    every_updates: int,
    last_update: int | None = None,
) -> optax.GradientTransformation:
    """Pulls the parameters back to a slow average of themselves every few updates.

    Zhang et al. 2019, "Lookahead Optimizer: k steps forward, 1 step back" (arXiv 1907.08610),
    algorithm 1: after every `every_updates` updates the slow parameters become
    `decay * slow + (1 - decay) * fast`, and the fast ones become the slow ones. The paper's alpha
    is `1 - decay`.

    Args:
      optimizer: of the fast parameters.
      decay: number of updates made -> decay, in [0, 1].
      every_updates: the paper's k, 1 or more.
      last_update: the number of updates after which the parameters become the slow ones; None
        leaves them.

    Raises:
      UserError: `every_updates` below 1.
    """
    if every_updates < 1:
        raise UserError(f"every_updates={every_updates}: give 1 or more")

    def init(params: PyTree) -> LookaheadState:
        # Copies, because a step may take the memory of both.
        slow = jax.tree.map(jnp.copy, params)
        return LookaheadState(jnp.zeros((), jnp.int32), optimizer.init(params), slow)

    def update(
        gradient: PyTree, state: LookaheadState, params: PyTree | None = None
    ) -> tuple[PyTree, LookaheadState]:
        updates, inner = optimizer.update(gradient, state.inner, params)
        count = state.num_updates + 1
        is_last = count == (-1 if last_update is None else last_update)
        due = (count % every_updates == 0) | is_last
        kept = jnp.where(is_last, 1.0, decay(count))

        def slow_after(slow: jax.Array, param: jax.Array, update: jax.Array) -> jax.Array:
            return jnp.where(due, slow + (1.0 - kept) * (param + update - slow), slow)

        slow = jax.tree.map(slow_after, state.slow, params, updates)
        updates = jax.tree.map(
            lambda slow, param, update: jnp.where(due, slow - param, update), slow, params, updates
        )
        return updates, LookaheadState(count, inner, slow)

    return optax.GradientTransformation(init, update)


class CountState(NamedTuple):
    """Of `scale_by_path`: the number of updates made."""

    num_updates: jax.Array


def scale_by_path(
    factor: Callable[[str, jax.Array], jax.Array | float],
) -> optax.GradientTransformation:
    """Multiplies each update by a factor of its own.

    Args:
      factor: (path of a parameter, number of updates made before) -> factor.
    """

    def update(
        updates: PyTree, state: CountState, params: PyTree | None = None
    ) -> tuple[PyTree, CountState]:
        del params
        scaled = {
            path: leaf * factor(path, state.num_updates)
            for path, leaf in named_leaves(updates).items()
        }
        return from_named_leaves(scaled), CountState(state.num_updates + 1)

    return optax.GradientTransformation(lambda params: CountState(jnp.zeros((), jnp.int32)), update)


def limit_norm(largest: float) -> optax.GradientTransformation:
    """Changes each update so that no unit's weights have a larger L2 norm after it.

    The max-norm constraint of Srebro and Shraibman 2005 ("Rank, Trace-Norm and Max-Norm"), as used
    with dropout by Srivastava et al. 2014 ("Dropout", section 5.1, with norms of 3 to 4): what is
    larger is projected onto the ball. A unit's weights are those along all axes of a kernel but the
    last one, `[height, width, in, out]` or `[in, out]`.
    """

    def limited(update: jax.Array, param: jax.Array) -> jax.Array:
        moved = param + update
        norm = jnp.sqrt(
            jnp.sum(jnp.square(moved), axis=tuple(range(moved.ndim - 1)), keepdims=True)
        )
        scale = largest / jnp.maximum(norm, largest)
        return jnp.where(norm > largest, moved * scale - param, update)

    def apply(updates: PyTree, params: PyTree | None) -> PyTree:
        return jax.tree.map(limited, updates, params)

    return optax.stateless(apply)


def _sgd() -> optax.GradientTransformation:
    """Direction: the gradient."""
    return optax.identity()


def _momentum(momentum: float = 0.9) -> optax.GradientTransformation:
    """Direction: `m <- gradient + momentum * m` (Polyak 1964)."""
    return optax.trace(momentum)


def _nesterov(momentum: float = 0.9) -> optax.GradientTransformation:
    """Direction: `gradient + momentum * m`, of the `m` just updated as in `momentum`.

    Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """
    return optax.trace(momentum, nesterov=True)


def _adagrad(
    initial_accumulator: float = 0.1, epsilon: float = 1e-7
) -> optax.GradientTransformation:
    """Direction: `gradient / sqrt(s + epsilon)`, `s` the sum of squared gradients so far.

    Duchi et al. 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization". `s` starts at `initial_accumulator`.
    """
    return optax.scale_by_rss(initial_accumulator, epsilon)


def _rmsprop(decay: float = 0.9, epsilon: float = 1e-8) -> optax.GradientTransformation:
    """Direction: `gradient / (sqrt(v) + epsilon)`, `v <- decay * v + (1 - decay) * gradient^2`.

    Tieleman and Hinton 2012, "Lecture 6.5 - rmsprop". `v` starts at 0.
    """
    return optax.scale_by_rms(decay, epsilon, eps_in_sqrt=False)


def _adam(
    beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8
) -> optax.GradientTransformation:
    """Direction: `m' / (sqrt(v') + epsilon)`, the moving averages without their bias.

    Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1.
    """
    return optax.scale_by_adam(beta1, beta2, epsilon)


def _lamb(
    beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-6
) -> optax.GradientTransformation:
    """Direction: Adam's, plus weight decay, at the norm of the parameter itself, leaf by leaf.

    You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    algorithm 2. The norm is set after weight decay, by `make_optimizer`; a leaf that is all zero
    moves as with Adam.
    """
    return optax.scale_by_adam(beta1, beta2, epsilon)


def _lion(beta1: float = 0.9, beta2: float = 0.99) -> optax.GradientTransformation:
    """Direction: the sign of `beta1 * m + (1 - beta1) * gradient`; `m` averages with `beta2`.

    Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2. Its learning
    rate should be 3 to 10 times smaller than Adam's, its weight decay as much larger.
    """
    return optax.scale_by_lion(beta1, beta2)


def _muon(
    momentum: float = 0.9,
    newton_schulz_steps: int = 5,
    update_rms: float = 0.2,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Direction: Nesterov momentum of each hidden kernel, made near-orthogonal.

    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". A kernel
    `[height, width, in, out]` counts as the matrix `[height * width * in, out]`. Biases, norms and
    the layer named `head` follow Adam with `beta1`, `beta2`, `epsilon`. Kernels are scaled to the
    root mean square `update_rms` that Adam's updates have (Liu et al. 2025, "Muon is Scalable for
    LLM Training", section 2.2), so that one learning rate of Adam's size serves both.
    """
    hidden = optax.chain(
        optax.contrib.scale_by_muon(
            beta=momentum,
            ns_steps=newton_schulz_steps,
            weight_dimension_numbers=lambda tree: jax.tree.map(_as_matrix, tree),
        ),
        optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda update: update * update_rms * math.sqrt(max(_matrix_shape(update))), updates
            )
        ),
    )
    return optax.partition({"muon": hidden, "adam": _adam(beta1, beta2, epsilon)}, _muon_labels)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "nesterov": _nesterov,
    "adagrad": _adagrad,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adam,
    "lamb": _lamb,
    "lion": _lion,
    "muon": _muon,
}


def _muon_labels(tree: PyTree) -> PyTree:
    def label(path: tuple, leaf: jax.Array) -> str:
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        hidden = names[-1] == "kernel" and leaf.ndim >= 2 and "head" not in names
        return "muon" if hidden else "adam"

    return jax.tree_util.tree_map_with_path(label, tree)


def _as_matrix(kernel: jax.Array) -> optax.contrib.MuonDimensionNumbers:
    last = kernel.ndim - 1
    return optax.contrib.MuonDimensionNumbers(tuple(range(last)), (last,))


def _matrix_shape(kernel: jax.Array) -> tuple[int, int]:
    return math.prod(kernel.shape[:-1]), kernel.shape[-1]


def _direction(name: str, momentum: float, options: dict[str, Any]) -> optax.GradientTransformation:
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    own = set(inspect.signature(OPTIMIZERS[name]).parameters)
    for option, value in options.items():
        if not own - {"momentum"}:
            raise UserError(
                f"optimizer {name!r} has no further options, but was given {option}={value!r}."
            )
        if option not in own:
            raise unknown_name(f"option of optimizer {name!r}", option, own)
    if "momentum" in own:
        options = {"momentum": momentum, **options}
    return OPTIMIZERS[name](**options)


def _freeze(
    optimizer: optax.GradientTransformation, params: PyTree, patterns: Sequence[str]
) -> optax.GradientTransformation:
    labels = label_by_path(params, [(pattern, "frozen") for pattern in patterns], "trained")
    if "trained" not in jax.tree.leaves(labels):
        raise UserError(f"freeze={tuple(patterns)} leaves nothing to train: freeze less.")
    # Minus zero, because adding plus zero would change the bits of a parameter that is minus zero.
    nothing = optax.stateless(
        lambda updates, _: jax.tree.map(lambda update: jnp.full_like(update, -0.0), updates)
    )
    return optax.partition({"trained": optimizer, "frozen": nothing}, labels)


def _check(
    learning_rate: float | Schedule,
    momentum: float,
    weight_decay: float,
    clip_norm: float | None,
    max_norm: float | None,
) -> None:
    not_negative = "must be finite and not negative"

    def is_size(value: Any) -> bool:
        return 0 <= value < math.inf

    def is_positive(value: Any) -> bool:
        return value > 0

    rules: list[tuple[str, Any, Callable[[Any], bool], str]] = [
        ("momentum", momentum, lambda value: 0 <= value < 1, "must be in [0, 1)"),
        ("weight_decay", weight_decay, is_size, not_negative),
        ("learning_rate", learning_rate, is_size, not_negative),
        ("clip_norm", clip_norm, is_positive, "must be positive"),
        ("max_norm", max_norm, is_positive, "must be positive"),
    ]
    for name, value, allows, rule in rules:
        # Arrays may be traced, as when `vmap` sweeps them, and schedules have checked themselves.
        if isinstance(value, int | float) and not allows(value):
            raise UserError(f"{name} {rule}; it is {value}.")
