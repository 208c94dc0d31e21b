"""Every network of the zoo can be fine-tuned in every way, by shapes alone: nothing is computed."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cnnjax import finetune, models, trees
from cnnjax.finetune.methods import BIASES, NORMS
from cnnjax.models import changed_stages
from cnnjax.models.grouped_norm import GroupedBatchNorm

NORM_LAYERS = (nn.BatchNorm, nn.LayerNorm, nn.GroupNorm, GroupedBatchNorm)
# The smallest of each class of network; the others differ in numbers of layers and channels.
ONE_OF_EACH = [
    "lenet5",
    "lenet5_1998",
    "cnn_5conv_2dense",
    "mlp",
    "alexnet",
    "alexnet_2012",
    "vgg11_bn",
    "googlenet",
    "inception_v3",
    "squeezenet1_1",
    "resnet18",
    "resnet18_v2",
    "se_resnet50",
    "eca_resnet26t",
    "cbam_resnet18",
    "bam_resnet50",
    "bit_resnet50x1",
    "sk_resnet18",
    "resnest14d",
    "res2net50_14w_8s",
    "xception",
    "bagnet9",
    "inception_v4",
    "inception_resnet_v2",
    "cifar_resnet20",
    "cifar_densenet_bc100",
    "mobilenet_v1",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "regnet_y_400mf",
    "convnext_tiny",
    "nfnet_f0",
    "unet",
]
QUICK = ("lenet5",)


def traced(model, shape):
    """Returns the form of the variables, the widths of stages, and the paths of norms."""
    widths, norms = {}, set()

    def note_stage(name, x):
        widths[name] = x.shape[-1]
        return x

    def note_norm(call, args, kwargs, context):
        if isinstance(context.module, NORM_LAYERS):
            norms.add("/".join(context.module.path))
        return call(*args, **kwargs)

    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    init = functools.partial(model.init, train=False)
    with nn.intercept_methods(note_norm), changed_stages(note_stage):
        form = jax.eval_shape(lambda x: init(jax.random.key(0), x), image)
    return form, widths, norms


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ONE_OF_EACH],
)
def test_network(name):
    """Groups, norms by name, factors for each kernel, an adapter behind each stage: all used."""
    shape, model = models.input_shape(name), models.create(name, num_classes=10)
    form, widths, norms = traced(model, shape)
    own = trees.named_leaves(form["params"])

    groups = finetune.layer_groups(model, shape)
    middle = [group.name for group in groups if group.name not in ("stem", "head")]
    assert middle == list(widths)
    assert sorted(layer for group in groups for layer in group.layers) == sorted(form["params"])
    by_name = {path for path in own if re.fullmatch(NORMS, path)}
    assert by_name == {path for path in own if path.rpartition("/")[0] in norms}
    biases = {path for path in own if re.fullmatch(BIASES, path)}
    assert biases == {path for path in own if path.rpartition("/")[2] == "bias"}

    head = tuple(path for path in own if path.startswith("head/"))
    method = finetune.Method(head, lora_ranks=((".*kernel", 4),), adapter_width=5)
    changed = finetune.FineTuned(model, method)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(lambda x: changed.init(jax.random.key(0), x), image)
    trained = trees.named_leaves(variables["params"])
    kernels = {path for path in own if path.endswith("/kernel")} - {"head/kernel"}
    factors = {path for path in trained if path.endswith("lora_a")}
    assert {path.replace("lora_a", "kernel") for path in factors} == kernels
    assert {
        stage: adapter["down"]["kernel"].shape
        for stage, adapter in variables["params"]["adapters"].items()
    } == {stage: (width, 5) for stage, width in widths.items()}

    apply = functools.partial(changed.apply, train=False)
    program = jax.make_jaxpr(apply)(variables, image).jaxpr
    logits = program.outvars[0].aval.shape
    assert (logits[0], logits[-1]) == (1, 10)
    used = {str(variable) for equation in program.eqns for variable in equation.invars}
    unused = [
        path
        for path, variable in zip(trees.named_leaves(variables), program.invars, strict=False)
        if str(variable) not in used
    ]
    assert [path for path in unused if "aux" not in path] == []

    del variables["params"]["adapters"]
    merged = jax.eval_shape(changed.merge, variables)
    shapes = {path: leaf.shape for path, leaf in trees.named_leaves(merged["params"]).items()}
    assert shapes == {path: leaf.shape for path, leaf in own.items()}
