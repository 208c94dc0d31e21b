"""Methods by name: what they select in every network, and what they refuse."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cnnjax import finetune, models, trees
from cnnjax.errors import UserError
from cnnjax.finetune.methods import NORMS
from cnnjax.models.grouped_norm import GroupedBatchNorm
from tests.finetune.small import SHAPE, initialised, small, tuned

NORM_LAYERS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, GroupedBatchNorm)
# One of each kind of network, those that are quick to trace.
QUICK = ["lenet5", "resnet18", "squeezenet1_1"]


def trained_paths(model, shape=SHAPE):
    form = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))
    return set(trees.named_leaves(form["params"]))


def of_zoo(name):
    """A network with every layer, at its canonical size."""
    return models.create(name, num_classes=3 if name != "lenet5_1998" else 10)


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("head", {"head/kernel", "head/bias"}),
        ("bitfit", {"norm1/bias", "norm2/bias", "head/kernel", "head/bias"}),
        ("norm", {*(f"norm{n}/{x}" for n in (1, 2) for x in ("scale", "bias"))}),
        ("last:1", {"conv2/kernel", "norm2/scale", "norm2/bias", "head/kernel", "head/bias"}),
        ("last:2", set(trees.named_leaves(initialised(small())["params"]))),
    ],
)
def test_what_a_method_trains(text, paths):
    assert trained_paths(tuned(text)) == paths | {"head/kernel", "head/bias"}


def test_more_can_be_trained():
    assert "conv1/kernel" in trained_paths(tuned("head", also_train=["conv1/.*"]))


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in models.MODELS
    ],
)
def test_groups_and_norms_of_every_network(name):
    """Every parameter is in one group, in order; norms by name are the norms by kind."""
    model, shape = of_zoo(name), models.input_shape(name)
    norms = set()

    def note(call, args, kwargs, context):
        if isinstance(context.module, NORM_LAYERS):
            norms.add("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
        form = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    paths = trees.named_leaves(form["params"])
    selected = {path for path in paths if re.fullmatch(NORMS, path)}
    assert selected == {path for path in paths if path.rpartition("/")[0] in norms}

    groups = finetune.layer_groups(model, shape)
    names = [group.name for group in groups]
    assert names == [
        *(["stem"] if "stem" in names else []),
        *models.stage_names(model, shape),
        *(["head"] if "head" in names else []),
    ]
    assert sorted(layer for group in groups for layer in group.layers) == sorted(form["params"])


def test_groups_of_a_residual_network():
    model = models.create("densenet121", num_classes=3)
    groups = dict(finetune.layer_groups(model, (224, 224, 3)))
    assert groups["stem"] == ("stem",)
    assert groups["stage2"] == ("stage2", "transition1")
    assert groups["head"] == ("head", "norm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorra:2", "fine-tuning method 'lorra': did you mean lora"),
        ("last", "last needs a number .stages.: write last:2"),
        ("lora:zero", "lora:zero needs a number .rank."),
        ("adapter:0", "adapter:0 needs a number .units."),
        ("head:2", "head has no number: write head, not head:2"),
        ("last:3", "last:3: SimpleCNN has 2 stages .stage1, stage2.: choose 1 to 2"),
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
        UserError, match=r"method head trains .*'head/.\*', but LeNet5_1998 has none"
    ):
        finetune.make_method("head", model, (32, 32, 1))
    with pytest.raises(UserError, match="LoRA ranks are for the method lora, not for head"):
        tuned("head", lora_ranks=((".*", 2),))
