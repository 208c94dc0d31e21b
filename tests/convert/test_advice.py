"""Errors about weights that do not fit end in commands, and the commands work."""

import dataclasses
import shlex

import numpy as np
import pytest
import tyro

from cnnjax import convert, models
from cnnjax.commands import convert as command
from cnnjax.convert import advice, identify
from cnnjax.errors import UserError
from cnnjax.run import load

DIGIT = (28, 28, 1)


def zeros(name, framework, *, num_classes, image_shape=None, **fields):
    """Weights of a network in a framework's names, all zero."""
    model = models.create(name, num_classes=num_classes, **fields)
    shape = image_shape or models.input_shape(name)
    table = convert.entries(model, shape, convert.find_names(model, framework))
    return {entry.name: np.zeros(entry.their_shape, np.float32) for entry in table}


def run_commands(text):
    """Runs each command in a text; returns the run directories that they wrote."""
    lines = [line.strip() for line in text.splitlines() if line.startswith("  cnnjax ")]
    outs = []
    for number, line in enumerate(lines):
        words = shlex.split(line)[2:]
        words[words.index("--out") + 1] += str(number)
        config = tyro.cli(command.Config, args=words)
        assert command.main(config) == 0
        outs.append(config.out)
    return outs


def failure(config):
    with pytest.raises(UserError) as caught:
        command.main(config)
    return str(caught.value)


def test_another_number_of_classes(tmp_path):
    path = tmp_path / "it's seven.npz"
    convert.write(path, zeros("lenet5", "pytorch", num_classes=7))
    said = failure(command.Config(source=path, out=tmp_path / "run", model="lenet5"))
    assert "head.weight is for 7 classes, the model for 10" in said
    assert "--num-classes 7" in said and "--new-head" in said
    seven, new = run_commands(said)
    assert load.load_trained(seven).card["num_outputs"] == 7
    assert load.load_trained(new).card["num_outputs"] == 10


def test_a_backbone_without_a_head(tmp_path):
    path = tmp_path / "backbone.npz"
    arrays = zeros("lenet5", "pytorch", num_classes=10)
    convert.write(path, {k: v for k, v in arrays.items() if not k.startswith("head.")})
    said = failure(command.Config(source=path, out=tmp_path / "run", model="lenet5", num_classes=3))
    assert "It has no head, as backbones have none. Initialize one:" in said
    (run,) = run_commands(said)
    assert load.load_trained(run).card["num_outputs"] == 3


def test_other_mistakes_are_not_about_heads(tmp_path):
    path = tmp_path / "weights.npz"
    arrays = zeros("lenet5", "pytorch", num_classes=7)
    convert.write(path, {**arrays, "more": np.zeros(3, np.float32)})
    said = failure(command.Config(source=path, out=tmp_path / "run", model="lenet5"))
    assert "2 problems" not in said.splitlines()[-1] and "  cnnjax" not in said


def test_a_file_of_another_network(tmp_path):
    path = tmp_path / "weights.npz"
    convert.write(path, zeros("squeezenet1_1", "torchvision", num_classes=9))
    for model in ("squeezenet1_0", "lenet5"):
        said = failure(command.Config(source=path, out=tmp_path / model, model=model))
        assert said.splitlines()[1] == "Its tensors fit squeezenet1_1 under torchvision's names:"
    (run,) = run_commands(said)
    assert load.load_trained(run).card["model"] == "squeezenet1_1"
    said = failure(command.Config(source=path, out=tmp_path / "run"))
    assert said.startswith("no model given")
    assert "--model squeezenet1_1 --framework torchvision --num-classes 9" in said


@pytest.mark.parametrize(
    ("name", "framework", "prefix", "num_classes"),
    [
        ("squeezenet1_1", "torchvision", "module.", 5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("shufflenet_v2_x0_5", "torchvision", "", 1000),
                ("mobilenet_v3_small", "torchvision", "model.", 12),
                ("resnet18_v2", "timm", "", 7),
                ("mobilenet_v1", "timm", "", 2),
            )
        ),
    ],
)
def test_networks_are_told_by_their_tensors(name, framework, prefix, num_classes):
    fields = {"activation": "relu6"} if name == "mobilenet_v1" else {}
    arrays = zeros(name, framework, num_classes=num_classes, **fields)
    arrays = {prefix + key: array for key, array in arrays.items()}
    assert list(identify.fitting(arrays)) == [identify.Fit(name, framework, num_classes)]
    head = (
        "fc.",
        "head.fc.",
        "classifier.1.",
        "classifier.3.",
        "classifier.weight",
        "classifier.b",
    )
    without = {k: v for k, v in arrays.items() if not k.removeprefix(prefix).startswith(head)}
    assert list(identify.fitting(without)) == [identify.Fit(name, framework, None)]
    model = models.create(name, num_classes=num_classes, **fields)
    known = convert.frameworks_for(model)
    found = identify.framework(arrays, model, models.input_shape(name), known[::-1])
    assert found == (framework, 1.0)


def test_tensors_of_no_network_are_not_told():
    assert not list(identify.fitting({"x.weight": np.zeros((3, 4), np.float32)}))
    assert not list(identify.fitting({}))


@pytest.mark.parametrize(
    ("name", "field", "tensors"),
    [("inception_v3", "auxiliary_head", 12), ("googlenet", "auxiliary_heads", 18)],
)
@pytest.mark.slow
def test_auxiliary_heads_are_dropped_with_one_note(name, field, tensors):
    arrays = zeros(name, "torchvision", num_classes=10, **{field: True})
    model = models.create(name, num_classes=10)
    notes = []
    convert.to_cnnjax(arrays, model, models.input_shape(name), note=notes.append)
    assert len(notes) == 1 and f"dropping the auxiliary heads ({tensors} tensors)" in notes[0]
    assert f"--model-arguments {field}=True" in notes[0]
    # With other images, too, whose size no auxiliary head takes.
    convert.to_cnnjax(arrays, model, (96, 96, 3), note=notes.append)
    with pytest.raises(UserError, match="left over: aux_other"):
        more = {**arrays, "aux_other.x": np.zeros(1, np.float32)}
        convert.to_cnnjax(more, model, models.input_shape(name), note=notes.append)
    kept = models.create(name, num_classes=10, **{field: True})
    found = convert.to_cnnjax(arrays, kept, models.input_shape(name), note=pytest.fail)
    assert [key for key in found["params"] if key.startswith("aux")]


def test_a_name_of_another_library_chooses_the_framework(tmp_path, capsys):
    path = tmp_path / "weights.npz"
    convert.write(
        path, zeros("mobilenet_v1", "timm", num_classes=3, activation="relu6", width=0.25)
    )
    config = command.Config(
        source=path,
        out=tmp_path / "run",
        model="mobilenetv1_100.ra4_e3600_r224_in1k",
        model_arguments=("width=0.25",),
        num_classes=3,
    )
    assert command.main(config) == 0
    said = capsys.readouterr().err
    assert "note: mobilenetv1_100.ra4_e3600_r224_in1k is timm's network, its weights ra4_" in said
    assert "prepared as for timm's default weights" in said
    (tmp_path / "run").rename(tmp_path / "first")
    config = dataclasses.replace(config, model="mobilenet_v1")
    assert command.main(config) == 0
    said = capsys.readouterr().err
    assert "note: mobilenet_v1 is timm's mobilenetv1_100, not keras/MobileNet." in said
    assert "note: timm's network has activation=relu6." in said
    card = load.load_trained(tmp_path / "run").card
    assert card["model"] == "mobilenet_v1"
    assert card["arguments"] == {"activation": "relu6", "width": 0.25}


def test_a_library_whose_names_are_not_known(tmp_path):
    path = tmp_path / "weights.npz"
    convert.write(path, {"features.0.weight": np.zeros((3, 4), np.float32)})
    config = command.Config(source=path, out=tmp_path / "run", model="timm/lenet5")
    said = failure(config)
    assert said.startswith("timm's names of the layers of LeNet5 are not known here")


def test_commands_keep_what_was_asked():
    config = command.Config(
        source="a b.pth", out="x", model="ResNet50", ignore=("aux.*", "x y"), new_head=True, seed=3
    )
    line = advice.command_line(config, num_classes=7)
    words = shlex.split(line)
    assert words[:3] == ["cnnjax", "convert", "a b.pth"]
    read = tyro.cli(command.Config, args=words[2:])
    assert (read.ignore, read.num_classes, read.new_head, read.seed) == (config.ignore, 7, True, 3)
