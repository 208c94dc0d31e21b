"""Every network of torchvision and timm that the zoo has: names, shapes, outputs, training.

The references were recorded by scripts/make_references.py from those libraries; weights are drawn
from the same formula on both sides. Where they are installed, the same is tried live.
"""

import json
import lzma
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import weights

from cnnjax import convert, models
from cnnjax.convert import mapping
from cnnjax.models import googlenet, inception
from cnnjax.tasks.classification import classification
from cnnjax.train import state
from cnnjax.train.step import make_step
from tests.models.quick import quick_jit
from tests.models.test_counts import LARGE

REFERENCES = Path(__file__).parent / "references"
TOLERANCE = 1e-4


def name_there(framework, name):
    return models.MODELS[name].also.get(framework, name)


ARGUMENTS = {
    "googlenet": {"auxiliary_heads": True},
    "inception_v3": {"auxiliary_head": True},
    "mobilenet_v1": {"activation": "relu6"},
    "nfnet_f0": {"activation": "gelu_exact"},
    # timm's have PyTorch's epsilon.
    **{f"efficientnet_b{number}": {"norm_epsilon": 1e-5} for number in (5, 6, 7)},
}
# Too small for the auxiliary head, whose weights then stay out.
SIZES = {"vgg11": 32, "vgg11_bn": 32, "vit_b_32": 224, "maxvit_t": 224}
SIZES |= {"ghostnet_v2_x1_0": 96, "convmixer_1024_20_ks9_p14": 56, "efficientnet_lite0": 65}
SIZES |= dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet_v2"), 75)
# With drawn weights the rounding of float32 is amplified, in PyTorch as here: in float64 instead.
SENSITIVE = ("maxvit_t", "resnest50d_4s2x40d", "sk_resnext50_32x4d")
QUICK = ("squeezenet1_1", "resnet18_v2")
RECORDED = sorted(
    path.stem
    for path in REFERENCES.glob("*.npz")
    if path.stem not in ("check", "training") and not path.stem.startswith("state_dicts")
)


def state_dicts():
    """`{"torchvision/resnet18": {name: shape}}` of every variant, at 1000 classes."""
    found = {}
    for path in sorted(REFERENCES.glob("state_dicts*.npz")):
        with np.load(path) as archive:
            found |= json.loads(lzma.decompress(archive["json"].tobytes()))
    return found


STATE_DICTS = state_dicts()
COUNTERPARTS = [
    (framework, name)
    for name in models.list_models()
    for framework in ("torchvision", "timm")
    if f"{framework}/{name_there(framework, name)}" in STATE_DICTS
]
QUICK_COUNTERPARTS = {
    *(("torchvision", name) for name in ("vgg11_bn", "googlenet", "squeezenet1_0", "resnet18")),
    *(("timm", name) for name in ("resnet18_v2", "mobilenet_v1", "nfnet_f0")),
}


# Made of the same blocks as another one whose outputs are compared.
ALIKE = (
    "efficientnet_v2_s@timm",
    "ghostnet_v2_x1_0",
    "inception_resnet_v2",
    "mobileone_s0",
    "sk_resnext50_32x4d",
    "convnext_tiny@timm",
    "efficientnet_b0@timm",
    "mobilenet_v3_small@timm",
    "mobilenet_v4_conv_medium",
    "mobileone_s4",
    "darknet53",
    "dla34",
    "mobilenet_v3_large",
    "res2next50",
    "resnest50d_1s4x24d",
    "regnet_x_400mf",
    "resnet10t",
    "resnet18",
    "resnet50_v2",
    "squeezenet1_0",
    "vgg11",
    "vovnet39a",
)


def tier(name):
    return pytest.mark.exhaustive if LARGE.fullmatch(name) else pytest.mark.slow


def test_no_network_of_theirs_is_forgotten():
    covered = {f"{framework}/{name_there(framework, name)}" for framework, name in COUNTERPARTS}
    assert covered == set(STATE_DICTS)
    claimed = {
        name
        for name in models.list_models()
        if {"torchvision", "timm"}
        & set(convert.frameworks_for(models.create(name, num_classes=10)))
    }
    assert claimed == {name for _, name in COUNTERPARTS}


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        pytest.param(*pair, marks=[] if pair in QUICK_COUNTERPARTS else [tier(pair[1])])
        for pair in COUNTERPARTS
    ],
)
def test_names_and_shapes_are_theirs(framework, name):
    """Nothing is computed. That values survive both ways bit for bit is the layouts' own test."""
    model = models.create(name, num_classes=1000, **ARGUMENTS.get(name, {}))
    names = convert.find_names(model, framework)
    model = models.with_fields(model, **names.requires)
    table = convert.entries(model, models.input_shape(name), names)
    theirs = STATE_DICTS[f"{framework}/{name_there(framework, name)}"]
    wanted = {k: tuple(v) for k, v in theirs.items() if not re.fullmatch(names.ignored, k)}
    assert {entry.name: entry.their_shape for entry in table} == wanted
    arrays = {entry.name: np.empty((), np.float32) for entry in table}
    # What is written is what they have, the counters of batches too.
    without_weights = mapping._counters(arrays, names).keys() | names.constants.keys()
    assert arrays.keys() | without_weights == theirs.keys()


def build(name):
    """Returns a model of ten classes, its framework, the image shape and the drawn variables.

    The name may end in `@` and a framework, else it is the first that has the network.
    """
    name, _, framework = name.partition("@")
    size = SIZES.get(name, 64)
    arguments = {} if size == 75 else ARGUMENTS.get(name, {})
    model = models.create(name, num_classes=10, **arguments)
    framework = framework or convert.frameworks_for(model)[0]
    names = convert.find_names(model, framework)
    model = models.with_fields(model, **names.requires)
    table = convert.entries(model, (size, size, 3), names)
    there = name_there(framework, name)
    arrays = {entry.name: weights.weight(entry.name, entry.their_shape, there) for entry in table}
    variables = convert.to_cnnjax(arrays, model, (size, size, 3), framework=framework)
    return model, names, size, variables


@pytest.mark.parametrize(
    "name",
    [
        n
        if n in QUICK
        else pytest.param(n, marks=pytest.mark.exhaustive if n in ALIKE else pytest.mark.slow)
        for n in RECORDED
    ],
)
def test_outputs_are_theirs(name):
    model, names, size, variables = build(name)
    image = weights.image(2, size).transpose(0, 2, 3, 1)

    @quick_jit
    def run(variables, image):
        stages = models.features(model, variables, image, names.stages)
        return model.apply(variables, image, train=False), stages

    dtype = np.float64 if name in SENSITIVE else np.float32
    with jax.enable_x64(name in SENSITIVE):
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables)
        logits, stages = run(variables, image.astype(dtype))
    with np.load(REFERENCES / f"{name}.npz") as reference:
        for stage, output in stages.items():
            theirs = names.stages[stage]
            ours = weights.samples(theirs, output.transpose(0, 3, 1, 2))
            np.testing.assert_allclose(ours, reference[theirs], atol=TOLERANCE * ours[-1], rtol=0)
        largest = np.abs(reference["logits"]).max()
        np.testing.assert_allclose(logits, reference["logits"], atol=TOLERANCE * largest, rtol=0)


def auxiliary_heads():
    layers = models.Layers(norm_epsilon=1e-3).factories(train=False)
    first, second = (googlenet.AuxiliaryHead(10, layers) for _ in range(2))
    return [
        ("googlenet", "aux1", "aux1", first, (1, 512, 14, 14)),
        ("googlenet", "aux2", "aux2", second, (1, 528, 14, 14)),
        (
            "inception_v3",
            "aux",
            "AuxLogits",
            inception.AuxiliaryHead(10, layers),
            (1, 768, 17, 17),
        ),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ours", "theirs", "head", "shape"),
    auxiliary_heads(),
    ids=lambda x: str(x)[:9],
)
def test_auxiliary_heads_are_theirs(name, ours, theirs, head, shape):
    model = models.create(name, num_classes=10, **ARGUMENTS[name])
    image_shape = models.input_shape(name)
    table = convert.entries(model, image_shape, convert.find_names(model, "torchvision"))
    arrays = {entry.name: weights.weight(entry.name, entry.their_shape) for entry in table}
    variables = convert.to_cnnjax(arrays, model, image_shape)
    x = weights.generator(theirs).uniform(0, 1, shape).transpose(0, 2, 3, 1).astype(np.float32)
    own = {collection: tree[ours] for collection, tree in variables.items()}
    output = quick_jit(lambda own, x: head.apply(own, x))(own, x)
    with np.load(REFERENCES / f"{name}.npz") as reference:
        samples = weights.samples(theirs, output)
        np.testing.assert_allclose(samples, reference[theirs], atol=TOLERANCE * samples[-1], rtol=0)


@pytest.mark.slow
def test_training_follows_pytorch():
    """ResNet-18, the same batches, SGD with momentum and weight decay, in training mode.

    In float64, because training amplifies rounding: PyTorch's own losses in float32 leave those in
    float64 by up to a tenth within these twenty steps.
    """
    with np.load(REFERENCES / "training.npz") as archive:
        reference = dict(archive)
    assert np.abs(reference["losses_float32"] / reference["losses"] - 1).max() > 0.01
    settings = {key: int(reference[key]) for key in ("num_steps", "batch", "size", "num_classes")}
    # PyTorch adds the decay of every parameter to its gradient, before the momentum.
    optimizer = optax.chain(
        optax.add_decayed_weights(float(reference["weight_decay"])),
        optax.sgd(float(reference["lr"]), float(reference["momentum"])),
    )
    model = models.create("resnet18", num_classes=10, norm="batch_unbiased")
    image_shape = (settings["size"], settings["size"], 3)
    table = convert.entries(model, image_shape, convert.find_names(model, "torchvision"))
    arrays = {entry.name: weights.weight(entry.name, entry.their_shape) for entry in table}
    variables = convert.to_cnnjax(arrays, model, image_shape)
    train_step = make_step(model, optimizer, classification(10), schedule=lambda step: 0.0)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
        train_state = state.create_state(variables, optimizer, jax.random.key(0))
        step = jax.jit(train_step)
        for number, (image, label) in enumerate(weights.training_batches(**settings)):
            batch = {
                "image": jnp.asarray(image.transpose(0, 2, 3, 1), jnp.float64),
                "label": jnp.asarray(label, jnp.int32),
                "mask": jnp.ones(len(label), bool),
            }
            train_state, metrics = step(train_state, batch)
            loss, count = metrics["loss"]
            np.testing.assert_allclose(loss / count, reference["losses"][number], rtol=1e-6)
        after = convert.from_cnnjax(train_state.variables(), model, image_shape)
    compared = after.keys() & reference.keys()
    assert {name for name in after if "running" in name} <= compared
    for name in compared:
        ours = weights.samples(name, after[name])
        np.testing.assert_allclose(ours, reference[name], atol=1e-6 * ours[-1], rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v3_small", "resnet18_v2"])
def test_live_both_ways(name, tmp_path, monkeypatch):
    """From a file of torch.save to our outputs, and from our file into their network, strictly."""
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import make_references

    theirs = make_references.build(make_references.NETWORKS[name]).float()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    model, names, size, _ = build(name)
    image_shape, image = (size, size, 3), weights.image(2, size)
    variables = convert.to_cnnjax(
        convert.read(tmp_path / "theirs.pth"), model, image_shape, framework=names
    )
    ours = quick_jit(lambda v, x: model.apply(v, x))(variables, image.transpose(0, 2, 3, 1))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE * np.abs(expected).max(), rtol=0)

    convert.write(
        tmp_path / "ours.npz",
        convert.from_cnnjax(variables, model, image_shape, framework=names),
    )
    loaded = {k: torch.from_numpy(v) for k, v in convert.read(tmp_path / "ours.npz").items()}
    network = make_references.NETWORKS[name]
    fresh = make_references.create(network, num_classes=make_references.NUM_CLASSES).eval()
    fresh.load_state_dict(loaded, strict=True)
    with torch.no_grad():
        np.testing.assert_array_equal(fresh(torch.from_numpy(image)).numpy(), expected)
