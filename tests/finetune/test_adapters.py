"""Adapters: nothing at first, then a small network behind each stage of any model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import finetune, trees
from cnnjax.errors import UserError
from cnnjax.models import changed_stages, features
from tests.finetune.small import SHAPE, initialized, tuned
from tests.tiny import BatchNormNet


@pytest.mark.slow
def test_the_adapted_model_is_the_model_at_first():
    model = tuned("adapter:3")
    variables = initialized(model)
    image = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    own = finetune.join_variables(variables)
    del own["params"]["adapters"]
    np.testing.assert_array_equal(model.apply(variables, image), model.model.apply(own, image))


def test_an_adapter_by_hand():
    model = tuned("adapter:1")
    variables = initialized(model)
    image = jax.random.normal(jax.random.key(1), (2, *SHAPE))
    before = features(model, variables, image, "stage1")["stage1"]
    adapter = variables["params"]["adapters"]["stage1"]
    adapter["down"] = {"kernel": jnp.array([[1.0], [0.0], [-1.0], [0.5]]), "bias": jnp.array([0.1])}
    adapter["up"] = {"kernel": jnp.array([[1.0, 2.0, 0.0, -1.0]]), "bias": jnp.full(4, 0.25)}
    hidden = before[..., 0] - before[..., 2] + before[..., 3] / 2 + 0.1
    hidden = np.where(hidden > 0, hidden, 0.1 * hidden)
    expected = before + hidden[..., None] * np.array([1.0, 2.0, 0.0, -1.0]) + 0.25
    after = features(model, variables, image, "stage1")["stage1"]
    np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)


def test_adapters_train_with_the_head_and_are_not_merged():
    model = tuned("adapter:3")
    variables = initialized(model)
    paths = set(trees.named_leaves(variables["params"]))
    assert paths == {
        *(f"adapters/stage{n}/{m}/{x}" for n in (1, 2) for m in ("down", "up") for x in LEAVES),
        *(f"head/{x}" for x in LEAVES),
    }
    with pytest.raises(UserError, match="adapters cannot be merged"):
        model.merge(variables)


LEAVES = ("kernel", "bias")


@pytest.mark.slow
def test_two_changes_of_stages_act_one_after_the_other():
    model = tuned("adapter:1")
    variables = initialized(model)
    image = jax.random.normal(jax.random.key(1), (1, *SHAPE))
    plain = features(model, variables, image, "stage2")["stage2"]
    with changed_stages(lambda stage, x: x if stage == "stage1" else -x):
        changed = features(model, variables, image, "stage2")["stage2"]
    np.testing.assert_array_equal(changed, -plain)


def test_a_model_without_stages_says_how_to_have_some():
    with pytest.raises(UserError, match="no stages to put adapters behind: end them with"):
        initialized(finetune.FineTuned(BatchNormNet(), finetune.Method(adapter_width=2)))
    with pytest.raises(UserError, match="adapter width 0: use at least one unit"):
        finetune.init_adapters({"stage1": 4}, 0, jax.random.key(0))
