"""Optimizers: first steps by hand formula, selection by path, and convergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import optim, schedules
from cnnjax.errors import UserError
from tests.transforms import Case, assert_covered, check_transforms

NAMES = sorted(optim.OPTIMIZERS)
RANDOM = np.random.default_rng(0)


def _normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


PARAMS = {
    "conv1": {"kernel": _normal(3, 3, 2, 4), "bias": _normal(4)},
    "norm": {"scale": _normal(4), "bias": _normal(4)},
    "dense": {"kernel": _normal(4, 6), "bias": _normal(6)},
    "head": {"kernel": _normal(6, 3), "bias": _normal(3)},
}
GRADIENT = jax.tree.map(lambda leaf: _normal(*leaf.shape), PARAMS)


def _two_updates(name, gradient, params, **arguments):
    """The sum of two updates, the second with a gradient half as large."""
    optimizer = optim.make_optimizer(name, 0.1, weight_decay=0.01, clip_norm=1.0, **arguments)
    state = optimizer.init(params)
    first, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, first)
    second, state = optimizer.update(jax.tree.map(lambda g: g / 2, gradient), state, params)
    return jax.tree.map(jnp.add, first, second)


def _looked_ahead(gradient, params):
    optimizer = optim.lookahead(optax.sgd(0.1), lambda count: 0.5, 1)
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def _scaled_by_path(gradient):
    scaled = optim.scale_by_path(lambda path, count: 2.0 if path == "kernel" else count * 0.5)
    return scaled.update(gradient, scaled.init(gradient))[0]


CASES = [
    Case(
        f"make_optimizer {name}",
        functools.partial(_two_updates, name, freeze=["norm/scale"]),
        tuple({name: tree[name] for name in ("dense", "norm")} for tree in (GRADIENT, PARAMS)),
        # The directions are Optax's; two stand for the chain around them.
        (0, 1) if name in ("momentum", "adam") else (),
    )
    for name in NAMES
] + [
    Case(
        "limit_norm",
        lambda update, params: optim.limit_norm(2.0).update(update, optax.EmptyState(), params)[0],
        (GRADIENT["dense"], PARAMS["dense"]),
        (0, 1),
    ),
    Case("scale_by_path", _scaled_by_path, (GRADIENT["dense"],), (0,)),
    Case("lookahead", _looked_ahead, (GRADIENT["dense"], PARAMS["dense"]), (0, 1)),
]


def test_every_public_function_has_a_case():
    assert_covered(optim, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transforms(case):
    check_transforms(case)


def _steps(name, gradients, learning_rate=0.1, **options):
    """Updates one leaf `kernel` by each of the gradients; returns its values, from the start on."""
    params = {"kernel": jnp.asarray(W0, jnp.float32)}
    optimizer = optim.make_optimizer(name, learning_rate, **options)
    state = optimizer.init(params)
    values = [np.asarray(params["kernel"])]
    for gradient in gradients:
        gradient = {"kernel": jnp.asarray(gradient, jnp.float32)}
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        values.append(np.asarray(params["kernel"]))
    return values


W0 = np.array([2.0, -3.0])
G1, G2 = np.array([0.5, -1.0]), np.array([-0.25, 2.0])


def _adam_by_hand(beta1=0.9, beta2=0.999, epsilon=1e-8):
    m, v = (1 - beta1) * G1, (1 - beta2) * G1**2
    first = m / (1 - beta1) / (np.sqrt(v / (1 - beta2)) + epsilon)
    m, v = beta1 * m + (1 - beta1) * G2, beta2 * v + (1 - beta2) * G2**2
    second = m / (1 - beta1**2) / (np.sqrt(v / (1 - beta2**2)) + epsilon)
    return first, second


def _directions_by_hand(name):
    if name == "sgd":
        return G1, G2
    if name == "momentum":
        return G1, G2 + 0.9 * G1
    if name == "nesterov":
        return G1 + 0.9 * G1, G2 + 0.9 * (G2 + 0.9 * G1)
    if name == "adagrad":
        return G1 / np.sqrt(0.1 + G1**2 + 1e-7), G2 / np.sqrt(0.1 + G1**2 + G2**2 + 1e-7)
    if name == "rmsprop":
        v1 = 0.1 * G1**2
        return G1 / (np.sqrt(v1) + 1e-8), G2 / (np.sqrt(0.9 * v1 + 0.1 * G2**2) + 1e-8)
    if name == "lion":
        return np.sign(0.1 * G1), np.sign(0.9 * 0.01 * G1 + 0.1 * G2)
    return _adam_by_hand()


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize(
    "name", ["sgd", "momentum", "nesterov", "adagrad", "rmsprop", "lion", "adam", "adamw"]
)
def test_two_steps_by_hand_with_decoupled_decay(name, weight_decay):
    values = _steps(name, [G1, G2], weight_decay=weight_decay)
    first, second = _directions_by_hand(name)
    w1 = W0 - 0.1 * (first + weight_decay * W0)
    w2 = w1 - 0.1 * (second + weight_decay * w1)
    np.testing.assert_allclose(values[1], w1, rtol=1e-5)
    np.testing.assert_allclose(values[2], w2, rtol=1e-5)


def test_lamb_moves_each_leaf_by_its_own_norm_decay_included():
    values = _steps("lamb", [G1, G2], weight_decay=0.01)
    w = W0
    for step, direction in enumerate(_adam_by_hand(epsilon=1e-6), 1):
        direction = direction + 0.01 * w
        w = w - 0.1 * np.linalg.norm(w) / np.linalg.norm(direction) * direction
        np.testing.assert_allclose(values[step], w, rtol=1e-5)
    moved = np.linalg.norm(values[1] - values[0])
    np.testing.assert_allclose(moved, 0.1 * np.linalg.norm(W0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 2, 5), (30, 4), (4, 30)])
def test_muon_makes_hidden_kernels_near_orthogonal_and_as_large_as_adams_updates(shape):
    gradient = {"conv": {"kernel": _normal(*shape)}}
    optimizer = optim.make_optimizer("muon", 1.0)
    updates, _ = optimizer.update(gradient, optimizer.init(gradient), gradient)
    matrix = -np.asarray(updates["conv"]["kernel"]).reshape(-1, shape[-1])
    singular = np.linalg.svd(matrix / (0.2 * np.sqrt(max(matrix.shape))), compute_uv=False)
    # The quintic iteration of Jordan et al. leaves singular values near 1, not at 1.
    assert (singular > 0.6).all() and (singular < 1.3).all()
    # Same singular vectors as the gradient: the polar factor is the nearest orthogonal matrix.
    u, _, vt = np.linalg.svd(gradient["conv"]["kernel"].reshape(matrix.shape), full_matrices=False)
    cosine = np.sum(matrix * (u @ vt)) / np.linalg.norm(matrix) / np.linalg.norm(u @ vt)
    assert cosine > 0.97


def test_muon_leaves_head_biases_and_norms_to_adam():
    for optimizer_name in ("muon", "adam"):
        optimizer = optim.make_optimizer(optimizer_name, 0.1)
        updates, _ = optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS)
        if optimizer_name == "muon":
            by_muon = updates
    for layer in PARAMS:
        for name in PARAMS[layer]:
            same = np.allclose(by_muon[layer][name], updates[layer][name], rtol=1e-6)
            assert same != (layer in ("conv1", "dense") and name == "kernel"), (layer, name)


@pytest.mark.parametrize("name", NAMES)
def test_converges_on_a_quadratic(name):
    target = jax.tree.map(lambda leaf: leaf * 0.5 + 0.2, PARAMS)

    def distance(params):
        return optax.tree.norm(optax.tree.sub(params, target), squared=True)

    peak = {"adagrad": 1.0, "lamb": 0.05, "sgd": 0.1, "momentum": 0.03, "nesterov": 0.03}
    schedule = schedules.cosine(peak.get(name, 0.1), total_steps=300)
    optimizer = optim.make_optimizer(name, schedule)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(distance)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=300)[0][0]

    assert distance(train(PARAMS)) < 1e-3 * distance(PARAMS)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_touches_kernels_only(name):
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    optimizer = optim.make_optimizer(name, 0.1, weight_decay=0.5)
    updates, _ = optimizer.update(nothing, optimizer.init(PARAMS), PARAMS)
    for layer in PARAMS.values():
        for leaf in layer:
            assert leaf in ("kernel", "bias", "scale")
    for layer, leaves in updates.items():
        for leaf, update in leaves.items():
            if leaf == "kernel":
                # LAMB sets the length of the whole update, but not its direction.
                factor = 0.1 if name == "lamb" else 0.05
                np.testing.assert_allclose(update, -factor * PARAMS[layer][leaf], rtol=1e-5)
            else:
                np.testing.assert_array_equal(update, 0.0)


def test_weight_decay_follows_given_patterns():
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    optimizer = optim.make_optimizer(
        "sgd", 1.0, weight_decay=0.5, weight_decay_patterns=["norm/.*", "head/bias"]
    )
    updates, _ = optimizer.update(nothing, optimizer.init(PARAMS), PARAMS)
    moved = {
        f"{layer}/{leaf}"
        for layer, leaves in updates.items()
        for leaf, update in leaves.items()
        if np.any(update)
    }
    assert moved == {"norm/scale", "norm/bias", "head/bias"}


@pytest.mark.parametrize("name", NAMES)
def test_frozen_leaves_stay_bit_for_bit_and_have_no_moments(name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    # Minus zero plus zero is plus zero: the bits must survive that too.
    params["conv1"]["kernel"] = params["conv1"]["kernel"].at[0, 0, 0, 0].set(-0.0)
    freeze = ["conv1/.*", "norm/scale"]
    optimizer = optim.make_optimizer(name, 0.1, weight_decay=0.1, clip_norm=1.0, freeze=freeze)
    state = optimizer.init(params)
    gradient = jax.tree.map(jnp.asarray, GRADIENT)
    gradient["conv1"]["bias"] = jnp.full(4, jnp.nan)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    trained = params
    for _ in range(4):
        trained, state = step(trained, state)
    for layer, leaf in (("conv1", "kernel"), ("conv1", "bias"), ("norm", "scale")):
        bits = [np.asarray(tree[layer][leaf]).view(np.uint32) for tree in (trained, params)]
        np.testing.assert_array_equal(*bits)
    for layer, leaf in (("norm", "bias"), ("dense", "kernel"), ("head", "kernel")):
        assert np.all(np.isfinite(trained[layer][leaf]))
        assert np.all(np.asarray(trained[layer][leaf]) != np.asarray(params[layer][leaf]))
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (3, 3, 2, 4) not in shapes


def test_weight_decay_when_all_kernels_are_frozen():
    optimizer = optim.make_optimizer("adam", 0.1, weight_decay=0.1, freeze=[".*kernel"])
    updates, _ = optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["head"]["kernel"], 0.0)
    assert np.all(np.asarray(updates["head"]["bias"]) != 0)


def test_clipping_scales_the_global_norm_down_and_never_up():
    norm = float(optax.tree.norm(GRADIENT))
    for clip_norm, factor in ((norm / 4, 0.25), (norm * 4, 1.0)):
        optimizer = optim.make_optimizer("sgd", 1.0, clip_norm=clip_norm)
        updates, _ = optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS)
        jax.tree.map(
            lambda update, gradient, factor=factor: np.testing.assert_allclose(
                update, -factor * gradient, rtol=1e-5
            ),
            updates,
            GRADIENT,
        )


def test_options_reach_the_optimizer():
    first, second = _adam_by_hand(beta1=0.5, beta2=0.9, epsilon=0.1)
    values = _steps("adam", [G1, G2], beta1=0.5, beta2=0.9, epsilon=0.1)
    np.testing.assert_allclose(values[2], W0 - 0.1 * (first + second), rtol=1e-5)
    np.testing.assert_allclose(
        _steps("momentum", [G1, G2], momentum=0.5)[2], W0 - 0.1 * (G1 + G2 + 0.5 * G1), rtol=1e-6
    )
    # Adam does not read `momentum`.
    np.testing.assert_array_equal(
        _steps("adam", [G1, G2], momentum=0.5)[2], _steps("adam", [G1, G2])[2]
    )


@pytest.mark.parametrize("name", NAMES)
def test_state_keeps_its_structure_and_can_be_planned_without_arrays(name):
    optimizer = optim.make_optimizer(
        name, schedules.cosine(0.1, total_steps=9), weight_decay=0.1, freeze=["norm/.*"]
    )
    abstract_params = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    planned = jax.eval_shape(optimizer.init, abstract_params)
    state = optimizer.init(PARAMS)
    _, updated = jax.jit(optimizer.update)(GRADIENT, state, PARAMS)
    for other in (state, updated):
        assert jax.tree.structure(other) == jax.tree.structure(planned)
        for leaf, plan in zip(jax.tree.leaves(other), jax.tree.leaves(planned), strict=True):
            assert leaf.shape == plan.shape and leaf.dtype == plan.dtype
            assert isinstance(leaf, jax.Array)


def test_a_sweep_over_learning_rates_is_a_vmap():
    def first_update(learning_rate):
        optimizer = optim.make_optimizer("sgd", learning_rate)
        return optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS)[0]["head"]["bias"]

    rates = jnp.asarray([0.1, 0.2])
    np.testing.assert_allclose(
        jax.vmap(first_update)(rates), -rates[:, None] * GRADIENT["head"]["bias"], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": "adm"}, "unknown optimizer 'adm': did you mean adam"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and not negative; it is -1.0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); it is 1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative; it is -0.1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"beta3": 0.9}, "option of optimizer 'adam'.*did you mean beta"),
        ({"name": "sgd", "beta1": 0.9}, "'sgd' has no further options, but was given beta1=0.9"),
        ({"freeze": ["hed/.*"]}, "hed"),
        ({"freeze": [".*"]}, "leaves nothing to train"),
        ({"weight_decay": 0.1, "weight_decay_patterns": ["stem/.*"]}, "stem"),
    ],
)
def test_bad_values_get_one_clear_error(arguments, text):
    with pytest.raises(UserError, match=text) as error:
        optim.make_optimizer(**({"name": "adam", "learning_rate": 0.1} | arguments)).init(PARAMS)
    assert "\n" not in str(error.value)


def test_max_norm_projects_the_weights_into_each_unit():
    """Against the projection by hand, for a dense kernel and for one of a convolution."""
    generator = np.random.default_rng(0)
    shapes = {"dense/kernel": (6, 4), "conv/kernel": (3, 3, 2, 5), "dense/bias": (4,)}
    params: dict = {"dense": {}, "conv": {}}
    for path, shape in shapes.items():
        layer, name = path.split("/")
        params[layer][name] = jnp.asarray(generator.normal(size=shape) * 2, jnp.float32)
    gradient = jax.tree.map(lambda leaf: 0.5 * jnp.ones_like(leaf), params)
    optimizer = optim.make_optimizer("sgd", 0.1, max_norm=3.0)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    found = optax.apply_updates(params, updates)
    for path, shape in shapes.items():
        layer, name = path.split("/")
        moved = np.asarray(params[layer][name]) - 0.05
        if name == "kernel":
            units = moved.reshape(-1, shape[-1])
            norms = np.linalg.norm(units, axis=0)
            assert (norms > 3).any()
            moved = (units * np.minimum(1, 3.0 / norms)).reshape(shape)
        np.testing.assert_allclose(found[layer][name], moved, rtol=1e-5, atol=1e-6)


def test_max_norm_goes_with_freezing_and_patterns():
    params = {name: {"kernel": jnp.full((4, 2), 5.0)} for name in ("first", "head")}
    options = {"max_norm": 1.0, "max_norm_patterns": ("head/kernel",)}
    for freeze, expected in (((), 5.0), (("first/.*",), 5.0)):
        optimizer = optim.make_optimizer("sgd", 0.0, freeze=freeze, **options)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        found = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(found["first"]["kernel"], expected)
        np.testing.assert_allclose(found["head"]["kernel"], 0.5, rtol=1e-6)
    with pytest.raises(UserError, match=r"max_norm must be positive; it is -1\.0"):
        optim.make_optimizer("sgd", 0.1, max_norm=-1.0)
