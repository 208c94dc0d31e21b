"""Weights as training programs save them: prefixes, counters, containers, suffixes."""

import jax
import numpy as np
import pytest
import torch_writer
import weights

from cnnjax import convert, models
from cnnjax.commands import convert as command
from cnnjax.convert import prefixes
from cnnjax.errors import UserError
from cnnjax.run import load

DIGIT = (28, 28, 1)
# torch.compile, DataParallel, swa_utils.AveragedModel, Lightning, and any attribute of a module.
PREFIXES = ["_orig_mod.", "module.", "model.", "net.", "backbone.", "encoder_q."]
NESTED = ["module._orig_mod.model.", "_orig_mod.module.", "module.module.", "a.b.c.d."]


@pytest.fixture(scope="module")
def lenet():
    return models.create("lenet5", num_classes=10)


@pytest.fixture(scope="module")
def theirs(lenet):
    table = convert.entries(lenet, DIGIT, convert.find_names(lenet, "pytorch"))
    return {entry.name: weights.weight(entry.name, entry.their_shape) for entry in table}


def to_lenet(arrays, lenet, **options):
    notes = []
    options = {"framework": "pytorch", "note": notes.append, **options}
    return convert.to_cnnjax(arrays, lenet, DIGIT, **options), notes


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("prefix", PREFIXES + NESTED)
def test_a_prefix_of_all_names_is_dropped_and_said(theirs, lenet, prefix):
    plain, notes = to_lenet(theirs, lenet)
    assert not notes
    wrapped, notes = to_lenet({prefix + name: array for name, array in theirs.items()}, lenet)
    assert_same(wrapped, plain)
    assert notes == [f"dropping the prefix '{prefix}' of the names."]


def test_counters_are_dropped_and_said(theirs, lenet):
    # As swa_utils.AveragedModel of a compiled network saves: its counter is outside the prefix.
    wrapped = {f"module._orig_mod.{name}": array for name, array in theirs.items()}
    for name in ("n_averaged", "module._orig_mod.norm.num_batches_tracked", "model_ema.updates"):
        wrapped[name] = np.array(7)
    found, notes = to_lenet(wrapped, lenet)
    assert_same(found, to_lenet(theirs, lenet)[0])
    assert notes[0] == (
        "dropping what counts and is no weight: n_averaged, num_batches_tracked, updates."
    )
    # An array of integers is not a counter, and neither is a number with a fraction.
    for array in (np.array([1, 2]), np.array(0.5, np.float32)):
        with pytest.raises(UserError, match="left over: n_averaged"):
            to_lenet(wrapped | {"n_averaged": array}, lenet)


def test_what_a_prefix_leaves_is_reported_under_the_names_without_it(theirs, lenet):
    wrapped = {f"net.{name}": array for name, array in theirs.items()}
    wrapped["net.head.weight"] = wrapped["net.head.weight"][:3]
    wrapped["criterion.weight"] = np.ones(3, np.float32)
    with pytest.raises(UserError) as caught:
        to_lenet(wrapped, lenet)
    assert "classes: head.weight is for 3 classes, the model for 10" in str(caught.value)
    assert "left over: criterion.weight [3]" in str(caught.value)
    assert "net." not in str(caught.value)
    # One of them is missing: the others tell the prefix.
    del wrapped["net.conv2.bias"], wrapped["criterion.weight"]
    with pytest.raises(UserError, match=r"2 problems:[^!]*missing: conv2\.bias"):
        to_lenet(wrapped, lenet)


def test_patterns_to_ignore_are_of_names_with_the_prefix_or_without(theirs, lenet):
    wrapped = {f"net.{name}": array for name, array in (theirs | {"aux.w": np.ones(2)}).items()}
    for pattern in (r"aux\..*", r"net\.aux\..*"):
        assert_same(to_lenet(wrapped, lenet, ignore=[pattern])[0], to_lenet(theirs, lenet)[0])
    with pytest.raises(UserError, match="matches nothing"):
        to_lenet(wrapped, lenet, ignore=["auxx"])


def test_two_networks_in_one_file_are_told_apart_by_the_user(theirs, lenet):
    both = {f"student.{name}": array for name, array in theirs.items()}
    both |= {f"teacher.{name}": 2 * array for name, array in theirs.items()}
    with pytest.raises(UserError, match=r"student\. and teacher\..*--ignore 'teacher\[\.\]\.\*'"):
        to_lenet(both, lenet)
    found, _ = to_lenet(both, lenet, ignore=["teacher[.].*"])
    assert_same(found, to_lenet(theirs, lenet)[0])


def test_names_that_fit_are_left_alone(theirs, lenet):
    more = theirs | {f"ema.{name}": array for name, array in theirs.items()}
    with pytest.raises(UserError, match=r"left over: ema\.conv1\.weight"):
        to_lenet(more, lenet)
    # Half of the names have another prefix than the others.
    mixed = {
        ("a." if index % 2 else "b.") + name: array
        for index, (name, array) in enumerate(theirs.items())
    }
    with pytest.raises(UserError, match=r"missing: conv1\.weight[^!]*left over: a\.conv1\.weight"):
        to_lenet(mixed, lenet)
    with pytest.raises(UserError, match=r"a\.x and x would have one name.*--ignore"):
        prefixes.without_prefix({"x": np.ones(1), "a.x": np.ones(1)}, "a.")


def test_a_new_head_and_a_prefix(theirs, lenet):
    wrapped = {f"model.{name}": array for name, array in theirs.items()}
    other = lenet.clone(num_classes=3)
    found, _ = to_lenet(wrapped, other, new_head_key=jax.random.key(0))
    assert found["params"]["head"]["kernel"].shape == (84, 3)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".PTH"])
def test_suffixes_of_pytorch(tmp_path, theirs, suffix):
    path = tmp_path / f"weights{suffix}"
    torch_writer.save(path, theirs)
    assert_same(convert.read(path, note=pytest.fail), theirs)


@pytest.mark.parametrize(
    "entry", ["state_dict", "model_state_dict", "model", "ema", "net", "model.state_dict", "a.b.c"]
)
def test_containers(tmp_path, theirs, entry):
    content: dict = theirs
    for key in reversed(entry.split(".")):
        content = {
            key: content,
            "epoch": 3,
            "best": np.array(0.9, np.float32).item(),
            "optimizer": {"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": []},
            "scheduler_state": {"last": np.ones(2, np.float32)},
        }
    path, notes = tmp_path / "run.ckpt", []
    torch_writer.save(path, content)
    assert_same(convert.read(path, note=notes.append), theirs)
    assert notes == [f"{path}: taking the weights under '{entry}'."]


def test_averages_next_to_the_weights_are_for_the_user_to_choose(tmp_path, theirs):
    path, notes = tmp_path / "run.pth.tar", []
    average = {name: 2 * array for name, array in theirs.items()}
    torch_writer.save(path, {"state_dict": theirs, "ema": average})
    assert_same(convert.read(path, note=notes.append), theirs)
    assert notes == [
        f"{path}: taking the weights under 'state_dict', not ema (--entry takes another)."
    ]
    assert_same(convert.read(path, entry="ema", note=pytest.fail), average)
    torch_writer.save(path, {"teacher": theirs, "student": average})
    with pytest.raises(UserError, match=r"under teacher and student: choose one.*--entry"):
        convert.read(path)


def test_numbers_among_the_weights_are_left_out_and_said(tmp_path, theirs):
    path, notes = tmp_path / "run.pt", []
    torch_writer.save(path, theirs | {"epoch": 3, "norm._extra_state": None})
    assert_same(convert.read(path, note=notes.append), theirs)
    assert notes == [f"{path}: leaving out what is no tensor: epoch, norm._extra_state."]


def test_a_file_of_our_own_network_needs_no_framework(tmp_path, theirs, capsys):
    path, out = tmp_path / "swa.pth.tar", tmp_path / "run"
    wrapped = {f"module.{name}": array for name, array in theirs.items()}
    torch_writer.save(path, {"state_dict": wrapped | {"n_averaged": np.array(2)}, "epoch": 1})
    assert command.main(command.Config(source=path, out=out, model="lenet5")) == 0
    notes = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in notes] == ["note"] * 3
    trained = load.load_trained(out)
    assert trained.card["mean"] == [0.0] and trained.card["std"] == [1.0]
    np.testing.assert_array_equal(
        trained.variables["params"]["head"]["kernel"], theirs["head.weight"].T
    )
    exported = tmp_path / "back.npz"
    assert command.main(command.Config(source=out, out=exported)) == 0
    assert convert.read(exported).keys() == theirs.keys()


def test_a_framework_without_the_network_is_what_is_wrong(tmp_path):
    # Not --mean, of which three were complained about that nobody gave.
    (tmp_path / "weights.npz").touch()
    config = command.Config(
        source=tmp_path / "weights.npz", out=tmp_path / "x", model="lenet5", framework="torchvision"
    )
    with pytest.raises(UserError, match="torchvision has no network like this LeNet5"):
        command.main(config)
    assert convert.preprocessing.preprocessing("lenet5", "torchvision") == {}
    assert convert.preprocessing.preprocessing("my_networks:tiny", "torchvision") == {}
