"""Methods by name: what they select in every network, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import finetune, models, trees
from cnnjax.errors import UserError
from tests.finetune.small import SHAPE, initialized, small, tuned


def trained_paths(model, shape=SHAPE):
    form = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))
    return set(trees.named_leaves(form["params"]))


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("head", {"head/kernel", "head/bias"}),
        ("bitfit", {"norm1/bias", "norm2/bias", "head/kernel", "head/bias"}),
        ("norm", {*(f"norm{n}/{x}" for n in (1, 2) for x in ("scale", "bias"))}),
        ("last:1", {"conv2/kernel", "norm2/scale", "norm2/bias", "head/kernel", "head/bias"}),
        ("last:2", set(trees.named_leaves(initialized(small())["params"]))),
    ],
)
def test_what_a_method_trains(text, paths):
    assert trained_paths(tuned(text)) == paths | {"head/kernel", "head/bias"}


@pytest.mark.parametrize("text", ["lora(1, norms=True)", "adapter(1, norms=True)"])
def test_norms_are_trained_besides_and_then_follow_the_new_images(text):
    variables = initialized(tuned(text))
    norms = {f"norm{n}/{leaf}" for n in (1, 2) for leaf in ("scale", "bias")}
    assert norms <= set(trees.named_leaves(variables["params"]))
    live = {f"norm{n}/{leaf}" for n in (1, 2) for leaf in ("mean", "var")}
    assert set(trees.named_leaves(variables["batch_stats"])) == live
    # A network without any has none to train.
    plain = models.create("lenet5", num_classes=10)
    assert not any("norm" in path for path in finetune.make_method(text, plain, SHAPE).trainable)


def test_lora_takes_its_layers_and_its_alpha():
    changed = tuned("lora(2, layers=conv2/.*, alpha=3)")
    variables = initialized(changed)
    paths = set(trees.named_leaves(variables["params"]))
    assert {path for path in paths if "lora" in path} == {"conv2/lora_a", "conv2/lora_b"}
    variables["params"]["conv2"]["lora_b"] += 1.0
    change = changed.merge(variables)["params"]["conv2"]["kernel"]
    change -= variables["frozen"]["params"]["conv2"]["kernel"]
    sums = 3 / 2 * variables["params"]["conv2"]["lora_a"].sum(axis=1)
    np.testing.assert_allclose(
        change.reshape(len(sums), -1).T, [sums] * change.shape[-1], atol=1e-6
    )
    # What is given besides goes before the method's own.
    assert tuned("lora(2, alpha=3)", lora_alpha=5.0).method.lora_alpha == 5


def test_more_can_be_trained():
    assert "conv1/kernel" in trained_paths(tuned("head", also_train=["conv1/.*"]))


def test_groups_of_a_residual_network():
    model = models.create("convnext_tiny", num_classes=3)
    groups = dict(finetune.layer_groups(model, (64, 64, 3)))
    assert groups["stem"] == ("stem",)
    assert groups["stage2"] == ("downsample1", "stage2")
    assert groups["head"] == ("head", "norm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorra:2", "fine-tuning method 'lorra': did you mean lora"),
        ("last", r"'last': missing a required argument: 'stages'. Write it as last\(stages\)"),
        ("lora:zero", "'lora:zero': rank='zero': give a whole number"),
        ("adapter:0", "'adapter:0': units=0: give a whole number from 1 on"),
        ("lora(2, alpha=0)", r"'lora\(2, alpha=0\)': alpha=0: give a number above 0"),
        ("lora(2, layers=conv9/.*)", r"layers='conv9/.\*' is none of the kernels below the head"),
        ("lora(2, layers=.*bias)", r"below the head of SimpleCNN .conv1/kernel, conv2/kernel."),
        ("lora(2, layers='(')", r"layers='\(' is no regular expression: missing \)"),
        ("adapter(4, norms=3)", "norms=3: give True or False"),
        ("head:2", "'head:2': it takes no arguments. Write it as head"),
        ("last:3", "'last:3': SimpleCNN has 2 stages .stage1, stage2.: choose 1 to 2"),
    ],
)
def test_bad_methods_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        tuned(text)


def test_a_method_that_finds_nothing_to_train_is_refused():
    model = models.create("lenet5", num_classes=10)
    with pytest.raises(
        UserError, match=r"method norm trains parameters like .* but LeNet5 has none"
    ):
        finetune.make_method("norm", model, SHAPE)
    model = models.create("lenet5_1998", num_classes=10)
    with pytest.raises(
        UserError,
        match=r"method head trains .*'head\(_distilled\)\?/.\*', but LeNet5_1998 has none",
    ):
        finetune.make_method("head", model, (32, 32, 1))
    with pytest.raises(UserError, match="LoRA ranks are for the method lora, not for head"):
        tuned("head", lora_ranks=((".*", 2),))
