"""`cnnjax convert`: files to runs and back, checks layer by layer, one-line errors."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import weights

from cnnjax import convert, models
from cnnjax.commands import convert as command
from cnnjax.convert import parity
from cnnjax.convert.preprocessing import preprocessing
from cnnjax.errors import UserError
from cnnjax.run import load

CHECK = Path(__file__).parent / "references" / "check.npz"
NAME, IMAGE, DIGIT = "shufflenet_v2_x0_5", (32, 32, 3), (28, 28, 1)


def theirs(model, framework="torchvision", image_shape=IMAGE):
    table = convert.entries(model, image_shape, convert.find_names(model, framework))
    return {entry.name: weights.weight(entry.name, entry.their_shape) for entry in table}


@pytest.fixture(scope="module")
def model():
    return models.create(NAME, num_classes=10)


@pytest.fixture(scope="module")
def lenet():
    return models.create("lenet5", num_classes=10)


@pytest.fixture(scope="module")
def source(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "weights.safetensors"
    convert.write(path, theirs(model))
    return path


def config(source, out, **settings):
    settings = {"model": NAME, "num_classes": 10, "image_size": 32, **settings}
    return command.Config(source=Path(source), out=Path(out), **settings)


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "converted"
    assert command.main(config(source, out, check=str(CHECK))) == 0
    return out


@pytest.mark.slow
def test_a_run_says_where_its_weights_came_from(converted, source):
    card = json.loads((converted / "card.json").read_text())
    assert card["source"] == str(source)
    import hashlib

    assert card["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert card["model"] == {"model": NAME, "num_outputs": 10, "arguments": {}}
    assert card["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    # PyTorch's own outputs, recorded by scripts/make_references.py, in the order of computation.
    errors = card["parity"]["relative_errors"]
    assert list(errors) == [
        *("conv1.0", "stage2.0.branch2.0", "stage2", "stage3", "stage4", "conv5.1", "logits")
    ]
    assert max(errors.values()) < 1e-5


def test_a_run_is_read_as_one_that_was_trained(converted, model):
    trained = load.load_trained(converted)
    expected = convert.to_cnnjax(theirs(model), model, IMAGE)
    jax.tree.map(np.testing.assert_array_equal, trained.variables, expected)
    assert trained.model == model
    assert trained.card["image_shape"] == [32, 32, 3]
    assert len(trained.card["class_names"]) == 10


def test_an_image_is_classified(converted, tmp_path, capsys):
    from PIL import Image

    from cnnjax.commands import predict

    picture = tmp_path / "gray.png"
    Image.new("RGB", (40, 30), (100, 100, 100)).save(picture)
    predict.main(predict.Config(run=str(converted), images=(picture,), out=str(tmp_path)))
    assert "gray.png: " in capsys.readouterr().out


def test_a_run_becomes_a_file_with_the_same_tensors(converted, source, tmp_path):
    out = tmp_path / "back.safetensors"
    exported = command.Config(source=converted, out=out)
    assert command.main(exported) == 0
    arrays, back = convert.read(source), convert.read(out)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
    assert {name.rpartition(".")[2] for name in back.keys() - arrays.keys()} == {
        "num_batches_tracked"
    }
    with pytest.raises(UserError, match=r"is a run, which knows its own settings: drop --model\."):
        command.main(config(converted, out))


@pytest.mark.slow
def test_the_first_layer_that_diverges_is_named(model, tmp_path, capsys):
    arrays = theirs(model)
    arrays["stage3.1.branch2.0.weight"] = arrays["stage3.1.branch2.0.weight"] * 1.01
    path, out = tmp_path / "weights.npz", tmp_path / "run"
    convert.write(path, arrays)
    with pytest.raises(UserError, match=r"stage3 is the first output that diverges.*check\.npz"):
        command.main(config(path, out, check=str(CHECK)))
    assert not out.exists()
    assert "stage2                                   relative error" in capsys.readouterr().out


def test_comparison_by_our_own_names(lenet):
    names = convert.find_names(lenet, "pytorch")
    variables = convert.to_cnnjax(
        theirs(lenet, "pytorch", DIGIT), lenet, DIGIT, framework="pytorch"
    )
    image = weights.image(2, 28, 1)
    outputs = models.features(
        lenet, variables, image.transpose(0, 2, 3, 1), ["stage2", "dense1", "head"]
    )
    reference = {
        "image": image,
        "stage2": np.asarray(outputs["stage2"]).transpose(0, 3, 1, 2),
        "dense1": np.asarray(outputs["dense1"]) * 1.5,
        "logits": np.asarray(outputs["head"]),
    }
    errors = parity.compare(lenet, variables, reference, names)
    assert list(errors) == ["stage2", "dense1", "logits"]
    assert errors["dense1"] == pytest.approx(1 / 3, rel=1e-5)
    assert max(errors["stage2"], errors["logits"]) < 1e-6
    with pytest.raises(UserError, match=r"layer of the reference 'dense9': did you mean dense"):
        parity.compare(lenet, variables, {**reference, "dense9": image}, names)


def test_relative_error_is_of_the_largest_value():
    theirs = np.array([1.0, -4.0])
    assert parity.relative_error(np.array([1.0, -3.0]), theirs) == 0.25
    assert parity.relative_error(np.array([np.nan, -4.0]), theirs) == np.inf
    assert parity.relative_error(np.zeros((2, 1)), theirs) == np.inf
    # Not a number is above every tolerance.
    assert parity.first_divergence({"a": float("nan")}, 1.0) == "a"


def test_a_new_head_for_other_classes(lenet, tmp_path):
    arrays = theirs(lenet, "pytorch", DIGIT)
    convert.write(tmp_path / "weights.npz", arrays)
    names = tmp_path / "names.txt"
    # As some editors write it: a byte-order mark, lines ended by two characters.
    names.write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\nnewt\r\n")
    settings = {"model": "lenet5", "framework": "pytorch", "image_size": 0, "num_classes": 3}
    command.main(
        config(
            tmp_path / "weights.npz",
            tmp_path / "run",
            new_head=True,
            class_names=str(names),
            **settings,
        )
    )
    trained = load.load_trained(tmp_path / "run")
    assert trained.variables["params"]["head"]["kernel"].shape == (84, 3)
    assert trained.card["class_names"] == ["cat", "dog", "newt"]
    np.testing.assert_array_equal(
        trained.variables["params"]["dense2"]["kernel"].T, arrays["dense2.weight"]
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": ""}, "no model given"),
        ({"model": "shufflenet"}, "unknown model 'shufflenet': did you mean shufflenet_v2"),
        ({"framework": "torch"}, "unknown framework 'torch'"),
        ({"num_classes": 1000}, r"fc\.weight is for 10 classes, the model for 1000"),
        ({"class_names": "absent.txt"}, "cannot read the list of --class-names 'absent.txt'"),
        ({"mean": (0.5, 0.5)}, "--mean is 0.5 0.5: give one number, or one for each of the 3"),
        ({"std": (0.0,)}, r"--std is 0\.0: .*above 0"),
        ({"check": "absent.npz"}, r"there is no reference absent\.npz"),
        ({"entry": "model"}, "entry='model' is for PyTorch's and Flax's files"),
        ({"model": "resnet18"}, r"the weights are not torchvision's of this ResNet, \d+ problems"),
        ({"model_arguments": ("activation=gelu",)}, "ShuffleNetV2 has activation=relu, and this"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(source, tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        command.main(config(source, tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_over(source, converted):
    with pytest.raises(UserError, match="exists and is not empty"):
        command.main(config(source, converted))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
def test_a_reference_that_is_none(tmp_path, content):
    path = tmp_path / "reference.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the reference"):
        parity.read_reference(path)
    np.savez(path, logits=np.zeros(3))
    with pytest.raises(UserError, match="holds logits: it must hold image"):
        parity.read_reference(path)


@pytest.mark.parametrize(
    ("name", "framework", "expected"),
    [
        # torchvision: models.get_model_weights(name).IMAGENET1K_V1.transforms.
        ("resnet50", "torchvision", (0.485, 256, 224, "bilinear")),
        ("inception_v3", "torchvision", (0.5, 342, 299, "bilinear")),
        ("efficientnet_b4", "torchvision", (0.485, 384, 380, "bicubic")),
        # timm.create_model(name).pretrained_cfg: of the side over its crop_pct.
        ("resnet50_v2", "timm", (0.5, 235, 224, "bicubic")),
        ("efficientnet_v2_s", "timm", (0.5, 300, 300, "bicubic")),
        ("mobilenet_v2", "timm", (0.485, 256, 224, "bicubic")),
        ("regnet_y_8gf", "timm", (0.485, 232, 224, "bicubic")),
        ("mobileone_s1", "timm", (0.485, 248, 224, "bilinear")),
        ("resnet50", "timm", (0.485, None, None, None)),
        ("mobilenet_v2", "tf_slim", (0.5, None, 224, "bilinear")),
        ("lenet5", "pytorch", (None, None, None, None)),
    ],
)
def test_preprocessing_of_published_weights(name, framework, expected):
    found = preprocessing(name, framework)
    mean = found.get("mean", [None])[0]
    assert (mean, *(found.get(key) for key in ("resize", "crop", "interpolation"))) == expected
