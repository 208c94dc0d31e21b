"""Folders of hubs, Flax's trees, Orbax's directories, TensorFlow's checkpoints."""

import itertools
import json
import re

import flax.serialization
import jax
import numpy as np
import pytest
import weights

from cnnjax import convert, models
from cnnjax.commands import convert as command
from cnnjax.convert import flax_files, names_tensors
from cnnjax.errors import UserError
from cnnjax.run import load

DIGIT = (28, 28, 1)


def theirs(model, framework, image_shape):
    table = convert.entries(model, image_shape, convert.find_names(model, framework))
    return {entry.name: weights.weight(entry.name, entry.their_shape) for entry in table}


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.fixture(scope="module")
def lenet():
    return models.create("lenet5", num_classes=10)


@pytest.fixture(scope="module")
def variables(lenet):
    arrays = theirs(lenet, "pytorch", DIGIT)
    return convert.to_cnnjax(arrays, lenet, DIGIT, framework="pytorch")


@pytest.fixture(scope="module")
def mobilenet():
    model = models.create("mobilenetv1_100", num_classes=3)
    return theirs(model, "timm", (64, 64, 3))


CONFIG = {
    "architecture": "mobilenetv1_100",
    "num_classes": 3,
    "label_names": ["n01", "n02", "n03"],
    "label_descriptions": {"n01": "cat", "n02": "dog"},
    "model_args": {"drop_rate": 0.1, "in_chans": 3},
    "pretrained_cfg": {
        "tag": "ra4_e3600_r224_in1k",
        "input_size": [3, 64, 64],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.5, 0.5],
    },
}


def write_folder(folder, arrays, config=CONFIG):
    folder.mkdir()
    convert.write(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_hub_folder_needs_no_settings(tmp_path, mobilenet, capsys):
    folder = write_folder(tmp_path / "hub", mobilenet)
    assert command.main(command.Config(source=folder, out=tmp_path / "run")) == 0
    said = capsys.readouterr().err
    assert "timm/mobilenetv1_100.ra4_e3600_r224_in1k is timm's network" in said
    assert "leaving out model_args drop_rate=0.1." in said
    trained = load.load_trained(tmp_path / "run")
    card = trained.card
    assert (card["model"], card["arguments"]) == ("mobilenet_v1", {"activation": "relu6"})
    assert card["image_shape"] == [64, 64, 3]
    assert card["fit"] == "crop(share=0.9)"
    assert (card["mean"], card["std"]) == ([0.5] * 3, [0.25, 0.5, 0.5])
    assert card["class_names"] == ["cat", "dog", "n03"]
    kernel = trained.variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel.T, mobilenet["classifier.weight"])
    written = json.loads((tmp_path / "run/card.json").read_text())
    assert written["preprocessing"]["interpolation"] == "bicubic"


@pytest.mark.slow
def test_what_is_given_goes_before_what_a_folder_says(tmp_path, mobilenet):
    folder = write_folder(tmp_path / "hub", mobilenet)
    other = command.Config(
        source=folder, out=tmp_path / "other", num_classes=5, new_head=True, image_size=96
    )
    assert command.main(other) == 0
    card = load.load_trained(tmp_path / "other").card
    assert (card["num_outputs"], card["image_shape"]) == (5, [96, 96, 3])
    assert card["class_names"] == list("01234")


def test_configs_of_older_and_other_forms(tmp_path):
    flat = {**CONFIG, **CONFIG["pretrained_cfg"]}
    del flat["pretrained_cfg"]
    (tmp_path / "config.json").write_text(json.dumps(flat))
    found = convert.folders.describe(tmp_path)
    assert (found.model, found.num_classes) == ("timm/mobilenetv1_100.ra4_e3600_r224_in1k", 3)
    assert found.preprocessing["image_shape"] == [64, 64, 3]
    assert convert.preprocessing.fit(found.preprocessing) == "crop(share=0.9)"
    (tmp_path / "config.json").write_text(json.dumps({**flat, "crop_mode": "squash"}))
    assert convert.preprocessing.fit(convert.folders.describe(tmp_path).preprocessing) == "resize"
    odd = {"architecture": "x", "num_classes": "3", "mean": 1, "input_size": [3, 0], "tag": None}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    assert convert.folders.describe(tmp_path) == convert.folders.Described(model="timm/x")


def test_a_folder_of_many_files_and_an_index(tmp_path, mobilenet):
    folder = write_folder(tmp_path / "hub", mobilenet)
    (folder / "model.safetensors").unlink()
    names = sorted(mobilenet)
    parts = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    places = {name: file for file, names in parts.items() for name in names}
    index = folder / "model.safetensors.index.json"
    for file, names in parts.items():
        convert.write(folder / file, {name: mobilenet[name] for name in names})
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_same(convert.read(folder), mobilenet)
    for places, said in (
        ({"x": "../b.safetensors"}, "outside of the folder"),
        ({"x": "a.safetensors"}, "differ in"),
        ({"x": "absent.safetensors"}, "there is no file"),
        ({"x": 1}, "has no weight_map"),
        ([], "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match=said):
            convert.read(folder)
    index.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is no JSON"):
        convert.read(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["ResNetForImageClassification"]}, "names no architecture of timm"),
        ({"architecture": "resnet_unheard_of"}, "unknown model 'timm/resnet_unheard_of': did you"),
        ({**CONFIG, "num_classes": 4}, "classes: classifier.weight is for 3 classes"),
    ],
)
def test_folders_that_are_not_understood(tmp_path, mobilenet, config, said):
    folder = write_folder(tmp_path / "hub", mobilenet, config)
    with pytest.raises(UserError, match=said):
        command.main(command.Config(source=folder, out=tmp_path / "run"))


def test_a_folder_of_neither_weights_nor_a_run(tmp_path):
    with pytest.raises(UserError):
        command.main(command.Config(source=tmp_path, out=tmp_path / "x.npz"))
    with pytest.raises(UserError, match="it is a folder without weights"):
        convert.read(tmp_path)


def save_orbax(path, tree, kind):
    import orbax.checkpoint as ocp

    if kind == "standard":
        with ocp.StandardCheckpointer() as writer:
            writer.save(path, tree)
    elif kind == "pytree":
        with ocp.PyTreeCheckpointer() as writer:
            writer.save(path, tree)
    else:
        with ocp.CheckpointManager(path) as manager:
            manager.save(3, args=ocp.args.StandardSave(tree))


@pytest.mark.parametrize("kind", ["standard", "pytree", "manager"])
def test_orbax_directories(tmp_path, lenet, variables, kind):
    path = (tmp_path / "saved").absolute()
    tree = {"params": variables["params"], "step": np.zeros((), np.int32)}
    save_orbax(path, tree, kind)
    notes = []
    arrays = convert.read(path / "3" if kind == "manager" else path, note=notes.append)
    assert "leaving out what is neither params nor batch_stats: step." in notes[-1]
    found = convert.to_cnnjax(arrays, lenet, DIGIT, framework="flax", note=pytest.fail)
    assert_same(found, variables)


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda v: v, ""),
        (lambda v: v["params"], ""),
        (lambda v: {"step": 3, "params": v["params"], "opt_state": {"0": {}}}, "opt_state, step"),
        (lambda v: {"params": v, "step": 3}, ""),
        (lambda v: {"model": {"params": v["params"]}, "epoch": 3}, "under 'model'"),
    ],
)
def test_flax_msgpack_trees(tmp_path, lenet, variables, wrap, note):
    path, notes = tmp_path / "flax_model.msgpack", []
    plain = jax.tree.map(np.asarray, {"params": variables["params"]})
    path.write_bytes(flax.serialization.msgpack_serialize(wrap(plain)))
    arrays = convert.read(path, note=notes.append)
    assert (note in notes[0]) if note else not notes
    assert_same(convert.to_cnnjax(arrays, lenet, DIGIT, framework="flax"), variables)


def test_a_command_finds_that_the_names_are_ours(tmp_path, variables):
    path = tmp_path / "model.msgpack"
    tree = {"ema": {"params": variables["params"]}, "other": {"x": np.zeros(1, np.float32)}}
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    with pytest.raises(UserError, match=r"left over: other/x"):
        command.main(command.Config(source=path, out=tmp_path / "x", model="lenet5"))
    config = command.Config(source=path, out=tmp_path / "run", model="lenet5", entry="ema")
    assert command.main(config) == 0
    assert json.loads((tmp_path / "run/card.json").read_text())["framework"] == "flax"
    assert_same(load.load_trained(tmp_path / "run").variables["params"], variables["params"])


def test_npz_with_nested_names(tmp_path, lenet, variables):
    # As big_vision writes them: the paths of the tree, joined by slashes.
    flat = {
        f"params/{path}": leaf
        for path, leaf in flax_files.choose(variables, "", pytest.fail).items()
    }
    np.savez(tmp_path / "tree.npz", **flat)
    arrays = convert.read(tmp_path / "tree.npz", note=pytest.fail)
    assert_same(convert.to_cnnjax(arrays, lenet, DIGIT, framework="flax"), variables)
    np.savez(tmp_path / "opt.npz", **{f"opt/target/{name}": leaf for name, leaf in flat.items()})
    notes = []
    arrays = convert.read(tmp_path / "opt.npz", note=notes.append)
    assert "taking the variables under 'opt.target'" in notes[0]
    assert_same(convert.to_cnnjax(arrays, lenet, DIGIT, framework="flax"), variables)
    # Names without collections are left alone.
    plain = {"resnet/block1/unit01/a/conv2d/kernel": np.zeros(1, np.float32)}
    np.savez(tmp_path / "bit.npz", **plain)
    assert convert.read(tmp_path / "bit.npz").keys() == plain.keys()


def test_damaged_msgpack_is_refused(tmp_path, variables):
    path = tmp_path / "model.msgpack"
    content = flax.serialization.msgpack_serialize({"params": variables["params"]})
    generator = np.random.default_rng(0)
    for length in range(0, 400, 7):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="cannot read"):
            convert.read(path)
    for _ in range(100):
        damaged = bytearray(content)
        damaged[generator.integers(400)] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        try:
            convert.read(path, note=lambda text: None)
        except UserError as error:
            assert "cannot read" in str(error)
    for content in (b"\x91" * 100_000, b"\xdf\xff\xff\xff\xff", b"\xc1"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot read"):
            convert.read(path)


def slim_mobilenet_v1(width, classes):
    """Names and shapes as slim's mobilenet_v1.py makes its variables."""
    depths = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    depths = [max(int(depth * width), 8) for depth in depths]
    norm = ("beta", "gamma", "moving_mean", "moving_variance")

    def layer(scope, weights, shape, channels):
        yield f"MobilenetV1/{scope}/{weights}", shape
        yield from ((f"MobilenetV1/{scope}/BatchNorm/{each}", (channels,)) for each in norm)

    yield from layer("Conv2d_0", "weights", (3, 3, 3, depths[0]), depths[0])
    for number, (before, after) in enumerate(itertools.pairwise(depths), 1):
        scope = f"Conv2d_{number}"
        yield from layer(f"{scope}_depthwise", "depthwise_weights", (3, 3, before, 1), before)
        yield from layer(f"{scope}_pointwise", "weights", (1, 1, before, after), after)
    yield "MobilenetV1/Logits/Conv2d_1c_1x1/weights", (1, 1, depths[-1], classes)
    yield "MobilenetV1/Logits/Conv2d_1c_1x1/biases", (classes,)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["second", "first"])
def test_a_checkpoint_of_tf_slim(tmp_path, form, capsys):
    import tensorflow as tf

    arrays = {name: weights.weight(name, shape) for name, shape in slim_mobilenet_v1(0.25, 11)}
    more = {
        "global_step": np.array(5, np.int64),
        "MobilenetV1/Conv2d_0/weights/RMSProp": arrays["MobilenetV1/Conv2d_0/weights"],
        "MobilenetV1/Conv2d_0/weights/ExponentialMovingAverage": np.ones(3, np.float32),
    }
    names, tensors = zip(*(arrays | more).items(), strict=True)
    prefix = tmp_path / "model.ckpt"
    if form == "second":
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.constant(each) for each in tensors],
        )
        sources = [prefix, tmp_path / "model.ckpt.index", tmp_path]
    else:
        tf.raw_ops.Save(
            filename=str(prefix), tensor_names=names, data=[tf.constant(each) for each in tensors]
        )
        sources = [prefix]
    for source in sources:
        notes = []
        assert_same(convert.read(source, note=notes.append), arrays)
        assert "leaving out 3 of an optimizer, averages or counters" in notes[0]
    config = command.Config(
        source=sources[-1] if form == "first" else sources[1],
        out=tmp_path / "run",
        model="mobilenet_v1",
        model_arguments=("width=0.25",),
        num_classes=11,
        image_size=32,
    )
    assert command.main(config) == 0
    assert "dropping the prefix 'MobilenetV1/'" in capsys.readouterr().err
    trained = load.load_trained(tmp_path / "run")
    assert trained.card["arguments"]["activation"] == "relu6"
    assert (trained.card["mean"], trained.card["fit"]) == ([0.5] * 3, "crop(share=0.875)")
    head = arrays["MobilenetV1/Logits/Conv2d_1c_1x1/weights"][0, 0]
    np.testing.assert_array_equal(trained.variables["params"]["head"]["kernel"], head)
    for file in tmp_path.glob("model.ckpt*"):
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="cannot read"):
            convert.read(sources[0])
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2", "inception_v3"])
def test_slims_scopes_tell_the_kernels(name):
    more = {"auxiliary_head": True} if name == "inception_v3" else {}
    model = models.create(name, num_classes=1001, **more)
    names = convert.find_names(model, "tf_slim")
    model = models.with_fields(model, **names.requires)
    table = convert.entries(model, models.input_shape(name), names)
    kernels = {e.name: e.their_shape for e in table if e.name.endswith("weights")}
    # Two names of Mixed_6a say 1x1 of a 3x3 convolution.
    misnamed = [f"Mixed_6a/Branch_{branch}/Conv2d_1a_1x1/weights" for branch in (0, 1)]
    for kernel, shape in kernels.items():
        size = kernel.split("/")[-2].rpartition("_")[2]
        if re.fullmatch(r"\dx\d", size) and kernel not in misnamed:
            assert shape[:2] == tuple(map(int, size.split("x"))), kernel
        if kernel.endswith("depthwise_weights"):
            assert shape[3] == 1
    if name == "mobilenet_v1":
        wanted = {name.partition("/")[2]: shape for name, shape in slim_mobilenet_v1(1.0, 1001)}
        assert {entry.name: entry.their_shape for entry in table} == wanted
    if name == "inception_v3":
        # 94 convolutions with norms, 2 in the auxiliary head, and two logits; no scales.
        assert len(kernels) == 94 + 2 + 2
        assert not [entry for entry in table if entry.name.endswith("gamma")]


def test_slims_resnets_are_not_ours():
    with pytest.raises(UserError, match="tf_slim has no network that computes what this ResNet"):
        names_tensors.names_for(models.create("resnet50", num_classes=10), "tf_slim")
