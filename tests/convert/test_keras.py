"""Keras's names and files without Keras: every network of keras.applications, and bad files."""

import io
import json
import zipfile

import h5py
import jax
import numpy as np
import pytest

from cnnjax import convert, models
from cnnjax.commands import convert as command
from cnnjax.convert import keras_files, names_keras
from cnnjax.convert.preprocessing import moments_within, preprocessing
from cnnjax.errors import UserError
from cnnjax.models.summary import abstract_variables
from cnnjax.run.load import TrainedModel
from tests.models.test_counts import LARGE

# Trainable and other weights of keras.applications' networks at 1000 classes: `count_params()` of
# Keras 3.15, without EfficientNet's seven numbers of its normalization of images.
PUBLISHED = {
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "resnet50": 25_636_712,
    "resnet101": 44_707_176,
    "resnet152": 60_419_944,
    "resnet50_v2": 25_613_800,
    "resnet101_v2": 44_675_560,
    "resnet152_v2": 60_380_648,
    "densenet121": 8_062_504,
    "densenet169": 14_307_880,
    "densenet201": 20_242_984,
    "inception_v3": 23_851_784,
    "mobilenet_v1": 4_253_864,
    "mobilenet_v2": 3_538_984,
    "mobilenet_v3_small": 2_554_968,
    "mobilenet_v3_large": 5_507_432,
    "efficientnet_b0": 5_330_564,
    "efficientnet_b1": 7_856_232,
    "efficientnet_b2": 9_177_562,
    "efficientnet_b3": 12_320_528,
    "efficientnet_b4": 19_466_816,
    "efficientnet_b5": 30_562_520,
    "efficientnet_b6": 43_265_136,
    "efficientnet_b7": 66_658_680,
    "convnext_tiny": 28_589_128,
    "convnext_small": 50_223_688,
    "convnext_base": 88_591_464,
    "convnext_large": 197_767_336,
}
IMAGE = (32, 32, 3)


def keras_model(name, num_classes=10, **arguments):
    needed = names_keras.names_for(models.create(name, num_classes=num_classes)).requires
    return models.create(name, num_classes=num_classes, **{**needed, **arguments})


QUICK = ("vgg16", "mobilenet_v1", "mobilenet_v2", "resnet50", "resnet50_v2")


@pytest.mark.parametrize(
    "name",
    [
        n
        if n in QUICK
        else pytest.param(
            n, marks=pytest.mark.exhaustive if LARGE.fullmatch(n) else pytest.mark.slow
        )
        for n in PUBLISHED
    ],
)
def test_every_network_has_the_weights_of_keras(name):
    model, shape = keras_model(name, num_classes=1000), models.input_shape(name)
    names = convert.find_names(model, "keras")
    table = convert.entries(model, shape, names)
    assert sum(np.prod(entry.their_shape, dtype=int) for entry in table) == PUBLISHED[name]
    # Each layer has a place in the file, and each of ours is listed.
    layers = {entry.name.rpartition("/")[0] for entry in table}
    assert layers | {name.rpartition("/")[0] for name in names.constants} == set(names.layers)
    assert set(names.stages) <= set(models.stage_names(model, shape))


@pytest.fixture(scope="module")
def small():
    return keras_model("mobilenet_v1", width=0.25)


@pytest.fixture(scope="module")
def variables(small):
    generator = np.random.default_rng(0)
    shapes = abstract_variables(small, IMAGE)
    return jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype("f"), shapes)


@pytest.fixture
def file(tmp_path, small, variables):
    path = tmp_path / "small.weights.h5"
    convert.write(path, convert.from_cnnjax(variables, small, IMAGE, framework="keras"))
    return path


def load(path, model):
    return convert.to_cnnjax(convert.read(path), model, IMAGE, framework="keras")


def test_what_is_written_is_read(file, small, variables):
    jax.tree.map(np.testing.assert_array_equal, load(file, small), dict(variables))
    with h5py.File(file) as written:
        # As Keras places them: by class, counted; variables by number.
        assert written["layers/depthwise_conv2d_12/vars/0"].shape == (3, 3, 256, 1)
        assert written["layers/batch_normalization/vars"].attrs["name"] == "conv1_bn"
        assert list(written["layers/batch_normalization/vars"]) == ["0", "1", "2", "3"]
        assert written["layers/conv2d_14/vars/0"].shape == (1, 1, 256, 10)


def test_networks_within_networks_and_numbers_that_keras_went_on_with(tmp_path):
    names = ["base/stem/kernel", "base/stem/bias", "base/conv2d_7/kernel", "dense_3/kernel"]
    arrays = {
        name: np.full((2,) * (1 if name.endswith("bias") else 2 if "dense" in name else 4), i, "f")
        for i, name in enumerate(names)
    }
    path = tmp_path / "nested.weights.h5"
    convert.write(path, arrays)
    with h5py.File(path) as written:
        assert list(written["layers"]) == ["dense", "sequential"]
        assert list(written["layers/sequential/layers"]) == ["conv2d", "conv2d_1"]
        written = None
    with h5py.File(path, "a") as written:
        written["layers/sequential"].create_group("vars").attrs["name"] = "base"
    found = convert.read(path)
    renamed = {"base/conv2d_7/kernel": "base/conv2d/kernel", "dense_3/kernel": "dense/kernel"}
    assert found.keys() == {renamed.get(name, name) for name in names}
    for name in names:
        np.testing.assert_array_equal(found[renamed.get(name, name)], arrays[name])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {}, "keras has no network like this ResNet: .*ResNet-50 to 152"),
        ("resnet50", {"stem": "cifar"}, "keras has no network like this ResNet"),
        ("squeezenet1_0", {}, "keras has no network like this SqueezeNet"),
        (
            "resnet50",
            {},
            r"keras's ResNet has version=v1, conv_bias=True, norm_epsilon=1.001e-05, and this "
            r"model version=v1.5, conv_bias=False, norm_epsilon=1e-05: build it with version=v1,",
        ),
        ("mobilenet_v3_small", {}, "has padding=same, and this model padding=symmetric"),
    ],
)
def test_other_networks_are_refused(name, arguments, message):
    model = models.create(name, num_classes=10, **arguments)
    with pytest.raises(UserError, match=message):
        convert.to_cnnjax({}, model, IMAGE, framework="keras")


def test_another_network_and_another_number_of_classes(file):
    with pytest.raises(UserError, match=r"of this DenseNet, (?s:.*)missing: predictions/kernel"):
        load(file, keras_model("densenet121"))
    with pytest.raises(UserError, match=r"classes: conv_preds/kernel is for 10 .* the model for 3"):
        load(file, keras_model("mobilenet_v1", num_classes=3, width=0.25))


def test_missing_statistics_are_named(file, small):
    with h5py.File(file, "a") as edited:
        del edited["layers/batch_normalization_1/vars/2"]
        del edited["layers/batch_normalization_1/vars/3"]
    message = r"2 problems:\n  missing: conv_dw_1_bn/moving_mean \[8\], the running statistics of a"
    with pytest.raises(UserError, match=message):
        load(file, small)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_truncated_files_are_refused(tmp_path, file, share, suffix):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".keras":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(file, keras_files.ARCHIVED)
        assert convert.read(path).keys() == convert.read(file).keys()
        content = path.read_bytes()
    else:
        content = file.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=f"cannot read .*cut{suffix}: .*\\."):
        convert.read(path)


def test_links_and_other_groups_are_refused(tmp_path, file):
    with h5py.File(file, "a") as edited:
        del edited["layers/conv2d/vars/0"]
        edited["layers/conv2d/vars/0"] = h5py.ExternalLink("/etc/passwd", "x")
    with pytest.raises(UserError, match="vars holds no 0 of its own: it is damaged or a link"):
        convert.read(file)
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other.create_group("weights")
    with pytest.raises(UserError, match="its groups are weights: neither Keras 3's"):
        convert.read(tmp_path / "other.h5")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(UserError, match=r"it has no model\.weights\.h5"):
        convert.read(tmp_path / "other.keras")


@pytest.fixture
def template(tmp_path, small, variables):
    """A `.keras` file of the same network with zeros in it, compiled, its numbers gone on with."""
    path = tmp_path / "template.keras"
    zeros = jax.tree.map(np.zeros_like, variables)
    weights = tmp_path / "zeros.weights.h5"
    convert.write(weights, convert.from_cnnjax(zeros, small, IMAGE, framework="keras"))
    with h5py.File(weights, "a") as edited:
        edited.create_group("optimizer/vars")["0"] = np.ones(3)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", '{"keras_version": "3.15.0"}')
        archive.writestr("config.json", '{"class_name": "Functional", "compile_config": {"x": 1}}')
        archive.write(weights, keras_files.ARCHIVED)
    return path


def test_an_archive_has_the_templates_architecture_and_our_weights(
    tmp_path, template, small, variables
):
    arrays = convert.from_cnnjax(variables, small, IMAGE, framework="keras")
    path = tmp_path / "ours.keras"
    convert.write(path, dict(reversed(arrays.items())), {"producer": "a test"}, like=template)
    jax.tree.map(np.testing.assert_array_equal, load(path, small), dict(variables))
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["metadata.json", "config.json", keras_files.ARCHIVED]
        assert json.loads(archive.read("config.json")) == {
            "class_name": "Functional",
            "compile_config": None,
        }
        with h5py.File(io.BytesIO(archive.read(keras_files.ARCHIVED))) as written:
            assert list(written) == ["layers"]
            assert written.attrs["producer"] == "a test"


def test_an_archive_needs_a_template_that_fits(tmp_path, template, small, variables):
    arrays = convert.from_cnnjax(variables, small, IMAGE, framework="keras")
    out = tmp_path / "ours.keras"
    for path, like in ((out, None), (tmp_path / "x.npz", template)):
        with pytest.raises(UserError, match=r"like is for \.keras files, which hold the archit"):
            convert.write(path, arrays, like=like)
    message = (
        r"2 problems:\n  conv_preds/kernel is \[1, 1, 256, 3\], the template's \[1, 1, 256, 10\]\n"
        r"  the template's conv_preds/bias is missing"
    )
    changed = {**arrays, "conv_preds/kernel": np.zeros((1, 1, 256, 3), np.float32)}
    del changed["conv_preds/bias"]
    with pytest.raises(UserError, match=message):
        convert.write(out, changed, like=template)
    (tmp_path / "cut.keras").write_bytes(template.read_bytes()[:1000])
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    for name, said in (
        ("absent.keras", "there is no file"),
        ("cut.keras", "cannot read .*cut"),
        ("other.keras", r"it has no model\.weights\.h5"),
        ("zeros.weights.h5", r"it is no \.keras file"),
    ):
        with pytest.raises(UserError, match=said):
            convert.write(out, arrays, like=tmp_path / name)
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Of a pixel of 10 red, 20 green and 30 blue: keras.applications.imagenet_utils.
        ("resnet50", [30 - 103.939, 20 - 116.779, 10 - 123.68]),
        ("vgg19", [30 - 103.939, 20 - 116.779, 10 - 123.68]),
        ("resnet50_v2", [10 / 127.5 - 1, 20 / 127.5 - 1, 30 / 127.5 - 1]),
        ("mobilenet_v3_small", [10 / 127.5 - 1, 20 / 127.5 - 1, 30 / 127.5 - 1]),
        (
            "densenet121",
            [(10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225],
        ),
    ],
)
def test_images_are_prepared_as_keras_does(name, expected):
    found = preprocessing(name, "keras")
    trained = TrainedModel(None, {}, found, 0)
    pixel = np.array([10, 20, 30], np.uint8).reshape(1, 1, 1, 3)
    np.testing.assert_allclose(trained.normalize(pixel)[0, 0, 0], expected, rtol=1e-5)


def test_every_network_of_keras_has_a_preprocessing():
    assert all(preprocessing(name, "keras")["mode"] for name in PUBLISHED)
    assert preprocessing("shufflenet_v2_x0_5", "keras") == {}


def test_the_command_makes_a_run_and_an_archive_of_it(tmp_path, file, template):
    run, out = tmp_path / "run", tmp_path / "back.keras"
    settings = {"model": "mobilenet_v1", "model_arguments": ("width=0.25",), "num_classes": 10}
    settings |= {"framework": "keras", "image_size": 32}
    assert command.main(command.Config(file, run, **settings)) == 0
    card = json.loads((run / "card.json").read_text())
    # keras.applications.mobilenet.preprocess_input: from -1 to 1.
    assert card["preprocessing"] == {
        "mode": "tf",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "channel_order": "RGB",
        "image_shape": [32, 32, 3],
    }
    command.main(command.Config(run, out, framework="keras", like=str(template)))
    back, arrays = convert.read(out), convert.read(file)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    with pytest.raises(UserError, match=r"--like is for writing a \.keras file of a run"):
        command.main(command.Config(file, tmp_path / "x", like=str(template), **settings))


def test_efficientnets_own_moments():
    layer = {"normalization/mean": np.float32([0.5, 0.25, 0]), "normalization/count": np.int64(0)}
    fresh = moments_within({**layer, "normalization/variance": np.float32([4, 1, 0.25])})
    assert fresh == {"mean": [0.5, 0.25, 0], "std": [2, 1, 0.5]}
    # The published "variance" is the deviation: a further layer divides by its root once more.
    published = moments_within(
        {**layer, "normalization/variance": np.float32([0.229, 0.224, 0.225])}
    )
    np.testing.assert_allclose(published["std"], [0.229, 0.224, 0.225], rtol=1e-6)
    assert moments_within({"conv/kernel": np.zeros(3)}) == {}
    back = names_keras.normalization(layer, fresh["mean"], fresh["std"])
    np.testing.assert_array_equal(back["normalization/variance"], [4, 1, 0.25])
    assert names_keras.normalization({}, [0.0], [1.0]) == {}


def test_names_of_other_frameworks_are_not_written(tmp_path):
    with pytest.raises(UserError, match=r"a layer without name has fc\.weight.*framework='keras'"):
        convert.write(tmp_path / "x.weights.h5", {"fc.weight": np.zeros(2)})
    assert not list(tmp_path.iterdir())
