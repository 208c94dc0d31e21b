"""Files of torch.save with objects in them: the tensors are read, and nothing is ever run."""

import contextlib
import io
import os
import pickle
import pickletools
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_writer
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import convert
from cnnjax.convert import pickles, torch_files
from cnnjax.errors import UserError

# Written by scripts/make_references.py with PyTorch 2.13.
REFERENCES = Path(__file__).parent / "references"
NAMES = [
    *("kept", "conv.weight", "conv.bias", "block.0.weight", "block.1.weight", "block.1.bias"),
    *("block.1.running_mean", "block.1.running_var", "block.1.num_batches_tracked"),
    *("head.weight", "head.bias"),
]


def read(name, entry=""):
    notes = []
    arrays = convert.read(REFERENCES / name, entry=entry, note=notes.append)
    return arrays, [note.removeprefix(f"{REFERENCES / name}: ") for note in notes]


def test_a_checkpoint_of_the_reference_scripts():
    arrays, notes = read("reference_script.pth")
    assert sorted(arrays) == sorted(NAMES)
    assert notes == [
        "taking the weights under 'model', not model_ema (--entry takes another).",
        "leaving out what takes code that is not run: argparse.Namespace, pathlib.PosixPath.",
    ]
    average, notes = read("reference_script.pth", "model_ema")
    assert sorted(average) == sorted(["n_averaged", *(f"module.{name}" for name in NAMES)])
    np.testing.assert_array_equal(average["module.conv.weight"], arrays["conv.weight"])
    np.testing.assert_array_equal(arrays["kept"], [0, 1, 2])
    assert len(notes) == 1


def test_a_checkpoint_of_timm():
    arrays, notes = read("timm_script.pth.tar")
    assert sorted(arrays) == sorted(f"module.{name}" for name in NAMES)
    assert notes[0].startswith("taking the weights under 'state_dict', not state_dict_ema")
    assert "torch.optim.sgd.SGD" in notes[1] and "numpy._core.multiarray.scalar" in notes[1]
    average, _ = read("timm_script.pth.tar", "state_dict_ema")
    assert sorted(average) == sorted(NAMES)


@pytest.mark.parametrize("name", ["module.pth", "module_before_1_6.pth"])
def test_a_whole_module(name):
    arrays, notes = read(name)
    # As its state_dict(): without the buffer that is not persistent.
    expected, _ = read("reference_script.pth")
    assert sorted(arrays) == sorted(NAMES)
    for key, array in expected.items():
        assert (arrays[key].shape, arrays[key].dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(arrays["kept"], [0, 1, 2])
    np.testing.assert_array_equal(arrays["block.1.running_var"], np.ones(4, np.float32))
    assert notes == [
        "taking the parameters and buffers of the saved object "
        "torch.nn.modules.container.Sequential."
    ]


def test_arrays_next_to_the_weights_are_none(tmp_path):
    history = np.arange(3, dtype=np.float32)
    state = {"w": np.ones(1, np.float32)}
    for content, entry in (
        ({"history": history, "net": state}, "net"),
        ({"history": history, "run": {"best": {"net": state}}}, "run.best.net"),
    ):
        path, notes = tmp_path / "weights.pth", []
        torch_writer.save(path, content)
        assert convert.read(path, note=notes.append).keys() == state.keys()
        assert f"taking the weights under '{entry}'." in notes[0]
    # A module is no array, but has some.
    parameters = b"}(" + text("w") + TENSOR + b"u"
    module = b"cm\nM\n)R}(" + text("_modules") + b"}" + text("_parameters") + parameters + b"ub"
    content = b"}(" + text("history") + TENSOR + text("model") + module + b"u."
    zipped(path, b"\x80\x02" + content)
    assert list(convert.read(path, note=lambda text: None)) == ["w"]


def test_a_whole_module_in_a_wrapper_and_one_of_torchscript():
    arrays, _ = read("module_parallel.pth")
    assert sorted(arrays) == sorted(f"module.{name}" for name in NAMES)
    plain, _ = read("module.pth")
    np.testing.assert_array_equal(arrays["module.head.weight"], plain["head.weight"])
    scripted, _ = read("module_scripted.pt")
    assert sorted(f"block.{name}" for name in scripted) == sorted(
        name for name in NAMES if name.startswith("block.")
    )
    np.testing.assert_array_equal(scripted["0.weight"], plain["block.0.weight"])


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_every_protocol(protocol):
    arrays, notes = read(f"protocol{protocol}.pth")
    np.testing.assert_array_equal(arrays["weight"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert notes == ["leaving out what is no tensor: set, bytes."]


def test_tensors_of_every_kind_with_data():
    for entry, dtype, expected in (
        ("parameter", np.float32, [0, 1, 2]),
        ("array", np.float32, [0, 1, 2]),
        ("subclass", np.float32, [0, 1, 2]),
        ("float8", ml_dtypes.float8_e4m3fn, [0, 1, 2]),
        ("unsigned", np.uint16, [1, 2, 3]),
        ("complex", np.complex64, [1 + 2j]),
    ):
        array = read("kinds.pth", entry)[0]["x"]
        assert array.dtype == dtype, entry
        np.testing.assert_array_equal(array.astype(np.complex64), expected)
    transposed = read("kinds.pth", "array")[0]["y"]
    np.testing.assert_array_equal(transposed, np.arange(6.0).reshape(2, 3).T)


@pytest.mark.parametrize("kind", ["quantized", "sparse", "nested", "meta"])
def test_tensors_that_take_code_are_refused_by_name(kind):
    said = {"meta": "without data"}.get(kind, kind)
    with pytest.raises(UserError, match=rf"its tensor x: it is made by torch.* \({said}\), which"):
        read("kinds.pth", kind)


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def zipped(path, program):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", np.ones(1, np.float32).tobytes())


def legacy(path, program):
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    parts = [*(pickle.dumps(each, protocol=2) for each in head), program]
    numbers = struct.pack("<q", 1) + np.ones(1, np.float32).tobytes()
    keys = ["0"] if b"storage" in program else []
    path.write_bytes(b"".join(parts) + pickle.dumps(keys, protocol=2) + numbers * len(keys))


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00K\x01\x85K\x01\x85\x89}tR"
)


def hostile(command):
    """Programs that run a command in Python's own unpickler, by every way that calls something."""
    text = b"X" + struct.pack("<I", len(command)) + command.encode()
    line = command.encode()
    short = b"\x8c" + bytes([len(command)]) + line
    return {
        "REDUCE": b"\x80\x02cos\nsystem\n" + text + b"\x85R",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93" + short + b"\x85R",
        "NEWOBJ": b"\x80\x02csubprocess\nPopen\n" + text + b"N\x86\x81",
        "NEWOBJ_EX": b"\x80\x04csubprocess\nPopen\n(" + short + b"t}\x92",
        "INST": b"(S'" + line + b"'\nios\nsystem\n",
        "OBJ": b"(cos\nsystem\nS'" + line + b"'\no",
        # `__setstate__` of a partial sets its function and arguments; then it is called.
        "BUILD": b"cfunctools\npartial\n(cbuiltins\nprint\ntR(cos\nsystem\n(" + text + b"t}}tb(tR",
        "attribute": b"cbuiltins\ngetattr\n(cos\n__dict__\nS'get'\ntR(S'system'\ntR("
        + text
        + b"tR",
        "eval": b'cbuiltins\neval\n(S\'__import__("os").system("' + line + b"\")'\ntR",
        "known": b"ccollections\nOrderedDict\n((cos\nsystem\n" + text + b"\x85R" + b"K\x01\x86ltR",
        "codecs": b"c_codecs\nencode\n(" + text + b"X\x05\x00\x00\x00rot13tR",
        "copyreg": b"ccopyreg\n_reconstructor\n(csubprocess\nPopen\ncbuiltins\nobject\nNtR",
        "persistent": b"cos\nsystem\n(" + text + b"tRQ",
        "extension": b"\x82\x01(" + text + b"tR",
    }


@pytest.mark.parametrize("write", [zipped, legacy])
@pytest.mark.parametrize("way", list(hostile("")))
def test_nothing_in_a_file_is_ever_run(tmp_path, monkeypatch, write, way):
    def refuse(*arguments, **keywords):
        raise AssertionError("something was run")

    mark = tmp_path / "mark"
    program = hostile(f"touch {mark}")[way]
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.setattr("subprocess.Popen", refuse)
    path = tmp_path / "weights.pth"
    # Alone, and next to a tensor, which is read if the rest is of no importance.
    write(path, program + b".")
    with pytest.raises(UserError, match="cannot read"):
        convert.read(path, note=lambda text: None)
    entries = b"}(X\x01\x00\x00\x00w" + TENSOR + b"X\x04\x00\x00\x00args" + program + b"u."
    write(path, entries)
    if way == "persistent":
        with pytest.raises(UserError, match="cannot read"):
            convert.read(path)
    else:
        notes = []
        arrays = convert.read(path, note=notes.append)
        np.testing.assert_array_equal(arrays["w"], np.ones(1, np.float32))
        assert "leaving out what is no tensor: args." in notes[0]
    assert not mark.exists()


def test_the_ways_are_ways(tmp_path):
    # Python's own unpickler does run these.
    for way in ("REDUCE", "STACK_GLOBAL", "INST", "OBJ", "eval", "BUILD"):
        mark = tmp_path / way
        pickle.loads(hostile(f"touch {mark}")[way] + b".")
        assert mark.exists(), way


def nested(opening, closing, depth):
    return b"\x80\x02" + opening * depth + b"N" + closing * depth + b"."


@pytest.mark.parametrize(
    "program",
    [
        nested(b"(", b"t", 50_000),
        nested(b"(", b"l", 50_000),
        # A tuple of tuples as a key: hashing recurses.
        b"\x80\x02}" + b"(" * 50_000 + b"N" + b"t" * 50_000 + b"Ns.",
        # A dictionary and a list in themselves.
        b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02cx\ny\n)R}q\x00X\x08\x00\x00\x00_modules}X\x01\x00\x00\x00acx\ny\n)Rq\x01h\x00bss"
        b"h\x00b.",
        # Fifty lists of two references to the one before: two to the fifty of them.
        b"\x80\x02]q\x00"
        + b"".join(b"]q%c(h%ch%ce" % (n, n - 1, n - 1) for n in range(1, 50))
        + b".",
        b"\x80\x02}(X\x05\x00\x00\x00model"
        + b"}X\x01\x00\x00\x00a" * 50_000
        + b"N"
        + b"s" * 50_000,
        b"\x80\x02T\xff\xff\xff\x7fabc.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        b"L" + b"9" * 100_000 + b"L\n.",
        b"p" + b"9" * 4000 + b"\n.",
        b"t.",
        b"(((((.",
        b"R.",
        b"",
    ],
    ids=range(16),
)
@pytest.mark.parametrize("write", [zipped, legacy])
def test_bombs_end_at_once(tmp_path, write, program):
    path = tmp_path / "weights.pth"
    write(path, program)
    with pytest.raises(UserError, match="cannot read"):
        convert.read(path, note=lambda text: None)


def test_shared_modules_without_end_are_refused(tmp_path):
    # Each holds the next twice.
    inner = b"cm\nM\n)R}X\x08\x00\x00\x00_modules}sbq\x00"
    program = b"\x80\x02" + inner
    for number in range(1, 40):
        children = b"}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cu" % (number - 1, number - 1)
        program += b"cm\nM\n)R}X\x08\x00\x00\x00_modules" + children + b"sbq%c" % number
    zipped(tmp_path / "weights.pth", program + b".")
    with pytest.raises(UserError, match="its modules hold each other without end"):
        convert.read(tmp_path / "weights.pth", note=lambda text: None)


def test_too_many_instructions_and_copies_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 100)
    zipped(tmp_path / "long.pth", b"\x80\x02]" + b"Na" * 100 + b".")
    with pytest.raises(UserError, match="more than 100 instructions"):
        convert.read(tmp_path / "long.pth")
    monkeypatch.undo()
    # Ten thousand tensors that are views of one storage, all different.
    storage = torch_files.Storage("0", np.dtype(np.float32), 10_000)
    reader = torch_files.Reader(None, [], lambda storage: bytes(40_000), "little", 40_000)
    with pytest.raises(UserError, match="more than 8 times the file's size"):
        for offset in range(5000):
            view = (storage, offset, (5000,), (1,))
            reader.array(pickles.Placeholder("torch._utils._rebuild_tensor_v2", view), "x")


def test_a_number_is_no_array_of_so_many_bytes(tmp_path):
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR"
    state = b"(K\x01K\x01\x85" + dtype + b"\x89\x8a\x06\x00\x00\x00\x00\x00\x10tb"
    made = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    zipped(tmp_path / "weights.pth", b"\x80\x04}X\x01\x00\x00\x00w" + made + state + b"s.")
    with pytest.raises(UserError, match="its tensor w: its bytes are none"):
        convert.read(tmp_path / "weights.pth")


FUZZED = ["module.pth", "module_before_1_6.pth", "tiny_before_1_6.pth", "reference_script.pth"]


@pytest.mark.parametrize("name", FUZZED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(tmp_path_factory, name, data):
    """Bits turned, bytes cut or put in: a UserError or arrays, never another exception."""
    content = bytearray((REFERENCES / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["turn", "set", "cut", "insert"])):
            case "turn":
                content[place] ^= 1 << data.draw(st.integers(0, 7))
            case "set":
                content[place] = data.draw(st.integers(0, 255))
            case "cut":
                del content[place : place + data.draw(st.integers(1, 20))]
            case "insert":
                content[place:place] = data.draw(st.binary(max_size=8))
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        convert.read(path, note=lambda text: None)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_random_programs_are_read_or_refused(tmp_path_factory, data):
    """Pickles of instructions in any order: the archive's checksum lets no damage reach them."""
    codes = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]
    argument = st.sampled_from([b"", b"\x00", b"\x01", b"a\nb\n", b"1\n", b"\x01\x00\x00\x00a"])
    part = st.tuples(st.sampled_from(codes), argument).map(b"".join)
    program = b"".join(data.draw(st.lists(part, max_size=30)))
    path = tmp_path_factory.mktemp("fuzz") / "weights.pth"
    zipped(path, program + b".")
    with pytest.raises(UserError):
        convert.read(path, note=lambda text: None)


def test_the_machine_builds_what_pickle_builds():
    content = {
        "a": [1, -2, 3.5, 2**40, "text", b"bytes", None, True, False],
        "b": (1, (2, (3, 4, 5, 6))),
        "c": {1, 2},
        "d": frozenset([3]),
        "e": {(1, "x"): {}},
        "f": bytearray(b"xy"),
    }
    for protocol in range(6):
        machine = pickles.Machine(lambda identity: None)
        found = machine.run(io.BytesIO(pickle.dumps(content, protocol)))
        assert found == content, protocol
        assert not [name for name in machine.unknown if not name.startswith("_codecs")]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dtype", ["f4", ">f8", "f2", "u1", "i8", "?"])
def test_arrays_of_numpy_are_read_in_every_protocol(protocol, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    for each in (array, array.T, array[:, :0], array[0, 0, ...]):
        machine = pickles.Machine(lambda identity: None)
        made = machine.run(io.BytesIO(pickle.dumps(each, protocol)))
        reader = torch_files.Reader(made, list(machine.unknown), bytes, "little", 1000)
        np.testing.assert_array_equal(reader.array(made), each)
        # As tensors on devices without storages are saved, such as a TPU's.
        kind = "torch._utils._rebuild_device_tensor_from_numpy"
        device = pickles.Placeholder(kind, (made, pickles.Global("torch.float32"), "xla:0", False))
        np.testing.assert_array_equal(reader.array(device), each)
        assert not reader.unknown


def test_the_default_is_the_first_of_the_usual_entries(tmp_path):
    state, other = {"w": np.ones(1, np.float32)}, {"w": np.zeros(1, np.float32)}
    for first, second in (("model", "model_ema"), ("state_dict", "model"), ("net", "ema")):
        notes, path = [], tmp_path / "weights.pth"
        torch_writer.save(path, {second: other, first: state, "teacher": other})
        np.testing.assert_array_equal(convert.read(path, note=notes.append)["w"], [1])
        assert notes == [
            f"{path}: taking the weights under '{first}', not {second}, teacher (--entry takes "
            "another)."
        ]


def many_copies(code):
    code.write(b"]q\x00(" + b"K\x00" * 200_000 + b"e0")
    for _ in range(3000):
        code.write(b"ctorch\nSize\nh\x00\x85R0")
    code.write(b"}")


def shared_key(code):
    code.write(b"K\x01q\x00")
    for level in range(4):
        code.write(b"(" + b"h" + bytes([level]) + (b"h" + bytes([level])) * 199 + b"t")
        code.write(b"q" + bytes([level + 1]))
    code.write(b"}h\x04K\x01s")


@pytest.mark.parametrize(
    ("build", "text"), [(many_copies, "copies more"), (shared_key, "key that is refused")]
)
def test_a_small_pickle_takes_no_unbounded_time(build, text):
    code = io.BytesIO()
    code.write(b"\x80\x02")
    build(code)
    code.write(b".")
    code.seek(0)
    with pytest.raises(UserError, match=text):
        pickles.Machine(lambda identity: None).run(code)
