"""Trained and frozen parts: nothing is lost between them, and what is frozen never moves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import finetune, models, ops, optim, trees
from cnnjax.errors import UserError
from cnnjax.models.norms import norm_layer
from cnnjax.tasks.classification import classification
from cnnjax.train.state import create_state
from cnnjax.train.step import make_step
from tests.finetune.small import METHODS, SHAPE, initialized, small, tuned
from tests.models.quick import quick_jit
from tests.tiny import batch_of, random_arrays

FAST = ("lora:2",)


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def trained(model, variables, num_steps=3, **options):
    """Trains with weight decay and an average of the parameters; returns the state."""
    optimizer = optim.make_optimizer("adamw", 0.01, weight_decay=0.1)
    state = create_state(variables, optimizer, jax.random.key(1), ema=True)
    step = quick_jit(
        make_step(
            model,
            optimizer,
            classification(10),
            schedule=optax.constant_schedule(0.01),
            ema_decay=0.9,
            **options,
        )
    )
    batch = batch_of(random_arrays(16), 0, 16)
    for _ in range(num_steps):
        state, _ = step(state, batch)
    return state


def test_splitting_and_joining_is_the_identity():
    variables = initialized(small())
    parts = finetune.split_variables(variables, ["head/.*", "norm2/.*"])
    assert set(parts["params"]) >= {"head"}
    assert_same(finetune.join_variables(parts), variables)


@pytest.mark.parametrize(
    ("choice", "live"), [("auto", {"norm2"}), ("frozen", set()), ("batch", {"norm1", "norm2"})]
)
def test_statistics_follow_their_layer_or_the_choice(choice, live):
    variables = initialized(small())
    parts = finetune.split_variables(variables, ["norm2/.*"], norm_statistics=choice)
    assert set(parts["batch_stats"]) == live
    assert set(parts["frozen"]["batch_stats"]) == {"norm1", "norm2"} - live


@pytest.mark.parametrize(
    "text",
    [text if text in FAST else pytest.param(text, marks=pytest.mark.slow) for text in METHODS],
)
def test_frozen_leaves_keep_their_bits_and_all_others_move(text):
    model = tuned(text)
    variables = initialized(model)
    state = trained(model, variables)
    assert_same(state.frozen, variables["frozen"])
    before, after = (trees.named_leaves(tree) for tree in (variables["params"], state.params))
    still = [path for path in before if np.array_equal(before[path], after[path])]
    assert still == []
    assert set(trees.named_leaves(state.ema)) == set(before)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trees.count_parameters(state.params)


def test_frozen_norms_normalize_by_their_running_statistics_in_training():
    model = tuned("head")
    variables = initialized(model)
    image = jax.random.normal(jax.random.key(2), (4, *SHAPE))
    training, updated = model.apply(variables, image, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(training, model.apply(variables, image, train=False))
    assert updated["batch_stats"] == {}


@pytest.mark.parametrize("norm", ["batch", "batch_unbiased", "grouped"])
def test_every_batch_norm_can_be_frozen(norm):
    group_size = 2 if norm == "grouped" else 0
    kind = "batch" if norm == "grouped" else norm

    def layer(train):
        return norm_layer(kind, train=train, group_size=group_size, epsilon=0.1)(name=None)

    x = 3 + 2 * jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    variables = layer(False).init(jax.random.key(1), x)
    variables["batch_stats"]["mean"] += 0.5
    variables["params"]["scale"] *= 2.0

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            made = norm_layer(kind, train=train, group_size=group_size, epsilon=0.1)
            return made(name="norm")(x)

    inside = {name: {"norm": tree} for name, tree in variables.items()}
    with finetune.frozen_norms(inside["batch_stats"]):
        y, updated = Net().apply(inside, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(y, 2 * (x - 0.5) / np.sqrt(1 + 0.1), rtol=1e-6)
    assert_same(updated["batch_stats"], inside["batch_stats"])


@pytest.mark.slow
def test_frozen_norms_leave_others_to_the_batch():
    model = tuned("last:1")
    variables = initialized(model)
    image = jax.random.normal(jax.random.key(2), (4, *SHAPE))
    _, updated = model.apply(variables, image, train=True, mutable=["batch_stats"])
    assert set(updated["batch_stats"]) == {"norm2"}
    assert not np.array_equal(
        updated["batch_stats"]["norm2"]["mean"], variables["batch_stats"]["norm2"]["mean"]
    )


def test_unknown_choices_and_patterns_name_the_nearest():
    variables = initialized(small())
    with pytest.raises(UserError, match="norm_statistics 'frozn': did you mean frozen"):
        finetune.split_variables(variables, [".*"], norm_statistics="frozn")
    with pytest.raises(
        UserError, match=r"matches nothing.*'heads/kernel': did you mean head/kernel"
    ):
        finetune.split_variables(variables, ["heads/kernel"])


def test_a_new_leaf_that_would_stay_as_drawn_is_refused():
    model = small()
    base = finetune.Base("base", jax.device_get(initialized(model)), {}, "")
    key = jax.random.key(0)
    loaded = finetune.load(base, model, SHAPE, new=("conv1/.*",), key=key)
    with pytest.raises(UserError, match="conv1/kernel would be reinitialized and never trained"):
        finetune.start(tuned("head"), loaded, SHAPE, key)


def flops(text, model, shape):
    """Floating-point operations of a training step's program, its convolutions XLA's own."""
    tuned_model = finetune.FineTuned(model, finetune.make_method(text, model, shape))
    optimizer = optax.sgd(0.1)

    def initial(key):
        image = jnp.zeros((1, *shape))
        return create_state(tuned_model.init(key, image), optimizer, jax.random.key(0))

    step = make_step(tuned_model, optimizer, classification(10), schedule=lambda step: 0.1)
    batch = {
        "image": jax.ShapeDtypeStruct((2, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((2,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((2,), bool),
    }
    state = jax.eval_shape(initial, jax.random.key(0))
    # Calls of a library have no operations that XLA counts.
    with ops.lowering("lax"):
        return jax.jit(step).lower(state, batch).cost_analysis()["flops"]


@pytest.mark.slow
def test_no_gradient_is_computed_below_the_first_trained_layer():
    model = models.create("resnet18", num_classes=10, stem="cifar")
    head, last, full = (flops(text, model, (32, 32, 3)) for text in ("head", "last:1", "full"))
    # Forward alone, against forward, gradients by activations and gradients by kernels.
    assert head < 0.36 * full
    assert head < last < 0.6 * full
