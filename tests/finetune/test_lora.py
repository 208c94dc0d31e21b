"""LoRA: the model itself at first, then the model whose kernels are changed by a product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import finetune, models, trees
from cnnjax.errors import UserError
from cnnjax.models.simple import SimpleCNN
from tests.finetune.small import SHAPE, initialized, small, tuned
from tests.models.quick import quick_apply
from tests.models.test_families import IMAGE, MODELS, random_variables

PLAIN = {
    "lenet5_1998": (models.create("lenet5_1998", num_classes=10), (32, 32, 1)),
    "simple": (SimpleCNN(3, widths=(4, 6)), (12, 12, 1)),
    "squeezenet": (models.create("squeezenet1_1", num_classes=3, stem="cifar"), (32, 32, 3)),
    "vgg": (models.create("vgg11", num_classes=3, stem="cifar", dense_widths=(8,)), (32, 32, 3)),
    "alexnet": (models.create("alexnet", num_classes=3), (64, 64, 3)),
    "googlenet": (models.create("googlenet", num_classes=3, stem="cifar"), (32, 32, 3)),
    "inception_v3": (models.create("inception_v3", num_classes=3), (75, 75, 3)),
}
FAST = ("simple",)


def with_drawn_factors(variables):
    """Factors drawn at random, `lora_b` too, as they are after training."""
    generator = np.random.default_rng(1)

    def draw(path, leaf):
        is_factor = path[-1].key in ("lora_a", "lora_b")
        return jnp.asarray(generator.normal(0, 0.2, leaf.shape), leaf.dtype) if is_factor else leaf

    params = jax.tree_util.tree_map_with_path(draw, variables["params"])
    return {**variables, "params": params}


def every_network():
    for name, (model, shape) in PLAIN.items():
        yield name, model, jax.random.normal(jax.random.key(1), (2, *shape))
    for name, model in MODELS.items():
        yield name, model, IMAGE


def marks_of(name):
    """The second Inception takes ten seconds to compile, and has nothing that the first has not."""
    if name == "inception_v3":
        return pytest.mark.exhaustive
    return [] if name in FAST else pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "model", "image"),
    [pytest.param(*case, id=case[0], marks=marks_of(case[0])) for case in every_network()],
)
def test_merged_is_applied(name, model, image):
    """In every family, grouped, depthwise, standardized and connected convolutions included."""
    shape = image.shape[1:]
    method = finetune.make_method("lora:2", model, shape)
    changed = finetune.FineTuned(model, method)
    variables = changed.split(random_variables(model, image, 0.2), jax.random.key(2), shape)
    original = quick_apply(model, changed.merge(variables), image)
    # Near 0 a logit is a difference of larger numbers.
    close = {"rtol": 1e-6, "atol": 1e-6 * np.abs(original).max()}
    np.testing.assert_allclose(quick_apply(changed, variables, image), original, **close)

    drawn = with_drawn_factors(variables)
    applied = quick_apply(changed, drawn, image)
    merged = changed.merge(drawn)
    np.testing.assert_allclose(quick_apply(model, merged, image), applied, rtol=2e-4, atol=2e-5)
    assert np.max(np.abs(applied - original)) > 1e-3 * np.max(np.abs(original))
    own = jax.eval_shape(lambda: model.init(jax.random.key(0), image))
    assert jax.tree.map(jnp.shape, merged["params"]) == jax.tree.map(jnp.shape, own["params"])


def test_the_change_by_hand():
    kernel = np.arange(12.0).reshape(1, 2, 2, 3)
    a, b = np.array([[1.0], [2.0], [0.0], [-1.0]]), np.array([[1.0, 0.0, 10.0]])
    params = {"conv": {"kernel": kernel, "lora_a": a, "lora_b": b}}
    merged = finetune.merge_lora(params, alpha=3.0)
    expected = kernel.reshape(4, 3) + 3.0 * a * b
    np.testing.assert_allclose(merged["conv"]["kernel"], expected.reshape(kernel.shape))
    assert set(merged["conv"]) == {"kernel"}


def test_ranks_by_pattern_and_no_higher_than_the_matrix():
    params = initialized(small())["params"]
    ranks = (("conv1/.*", 100), ("conv2/kernel", 3), ("head/.*", 0))
    factors = finetune.init_lora(params, ranks, jax.random.key(0))
    assert set(factors) == {"conv1", "conv2"}
    assert factors["conv1"]["lora_a"].shape == (9, 4)
    assert factors["conv2"]["lora_a"].shape == (36, 3)
    assert not factors["conv2"]["lora_b"].any()
    # A kernel's draw does not depend on what else is drawn.
    alone = finetune.init_lora(params, (("conv2/.*", 3),), jax.random.key(0))
    np.testing.assert_array_equal(alone["conv2"]["lora_a"], factors["conv2"]["lora_a"])


def test_only_small_numbers_are_trained():
    variables = initialized(tuned("lora:1"))
    assert set(trees.named_leaves(variables["params"])) == {
        *(f"conv{n}/lora_{factor}" for n in (1, 2) for factor in "ab"),
        "head/bias",
        "head/kernel",
    }
    with pytest.raises(UserError, match=r"matches nothing.*'conv3/.\*'"):
        initialized(tuned("lora:1", lora_ranks=(("conv3/.*", 2),)))
    with pytest.raises(UserError, match=r"LoRA rank -1 of 'conv1/.\*' is negative"):
        initialized(tuned("lora:1", lora_ranks=(("conv1/.*", -1),)))
    with pytest.raises(UserError, match="change no kernel"):
        finetune.init_lora(variables["frozen"]["params"], ((".*", 0),), jax.random.key(0))


def test_ranks_are_read_from_words():
    assert finetune.parse_ranks(["stage4/.*=16", "a=b=2"]) == (("stage4/.*", 16), ("a=b", 2))
    with pytest.raises(UserError, match="LoRA rank 'stage4': write it as PATTERN=RANK"):
        finetune.parse_ranks(["stage4"])


@pytest.mark.slow
def test_the_whole_computes_as_the_model_with_merged_features():
    """What looks into a model looks into a fine-tuned one."""
    from cnnjax.models import features

    changed = tuned("lora:2")
    variables = with_drawn_factors(initialized(changed))
    image = jax.random.normal(jax.random.key(3), (2, *SHAPE))
    names = ["stage1", "stage2", "head"]
    found = features(changed, variables, image, names)
    expected = features(changed.model, changed.merge(variables), image, names)
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)
