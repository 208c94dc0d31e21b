"""Files: what is written is read, what is damaged or more than arrays is refused in one line."""

import io
import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax import convert
from cnnjax.errors import UserError

REFERENCES = Path(__file__).parent / "references"
DTYPES = [np.float64, np.float32, np.float16, np.int64, np.int32, np.int8, np.uint8, np.bool_]


def some_arrays():
    generator = np.random.default_rng(0)
    shapes = {"a.weight": (2, 3, 1), "b": (), "c.bias": (0,), "d": (5,)}
    return {
        f"{name}.{np.dtype(dtype).name}": generator.integers(0, 2, shape).astype(dtype)
        for name, shape in shapes.items()
        for dtype in DTYPES
    }


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        np.testing.assert_array_equal(array, second[name])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"deep/weights{suffix}"
    convert.write(path, some_arrays(), {"from": "a test"})
    assert_same(convert.read(path), some_arrays())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_safetensors_keep_bfloat16_and_metadata(tmp_path):
    path = tmp_path / "weights.safetensors"
    array = np.array([1.5, -2.0, np.inf], ml_dtypes.bfloat16)
    convert.write(path, {"x": array}, {"license": "none"})
    assert_same(convert.read(path), {"x": array})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    # The format's own description: little-endian length, JSON, then the bytes at their offsets.
    header = json.loads(content[8 : 8 + length])
    assert header["__metadata__"] == {"license": "none"}
    assert header["x"] == {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}
    with pytest.raises(UserError, match=r"npz keeps no bfloat16 \(x\)"):
        convert.write(tmp_path / "weights.npz", {"x": array})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    convert.write(path, {"x": np.zeros(3, np.float32)})
    before = path.read_bytes()
    with pytest.raises(UserError, match="safetensors has no dtype complex64"):
        convert.write(path, {"x": np.zeros(3, np.complex64)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@settings(max_examples=30)
@given(share=st.floats(0, 0.999), suffix=st.sampled_from([".npz", ".safetensors"]))
def test_every_truncation_is_noticed(tmp_path_factory, share, suffix):
    path = tmp_path_factory.mktemp("cut") / f"weights{suffix}"
    convert.write(path, some_arrays())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=f"cannot read .*weights{suffix}: .*\\."):
        convert.read(path)


@pytest.mark.parametrize("name", ["tiny.pth", "tiny_before_1_6.pth"])
def test_pytorch_files(name):
    # Written by scripts/make_references.py.
    arrays = convert.read(REFERENCES / name)
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_same(
        arrays,
        {
            "weight": weight,
            "transposed": weight.T,
            "row": weight[1],
            "half": np.array([0.5, -1.5], np.float16),
            "bfloat16": np.array([0.5, -1.5], ml_dtypes.bfloat16),
            "count": np.array(7, np.int64),
            "flags": np.array([True, False]),
            "empty": np.zeros((0, 4), np.float32),
        },
    )


@pytest.mark.parametrize("name", ["tiny.pth", "tiny_before_1_6.pth"])
def test_every_truncation_of_a_pytorch_file_is_noticed(tmp_path, name):
    content = (REFERENCES / name).read_bytes()
    path = tmp_path / name
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="cannot read"):
            convert.read(path)


def torch_zip(path, content):
    """A file as torch.save writes it around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", "3\n")


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


class Plain:
    pass


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"weight": Code()}, r"(__builtin__|builtins)\.exec is refused, because nothing in a file"),
        ({"weight": Plain()}, r"its keys are weight; .*Plain is refused"),
        ({"weight": io.StringIO}, r"it is no dictionary of arrays \(its keys are weight\)"),
        ([1, 2], "it is no dictionary of arrays"),
        ({}, "it is no dictionary of arrays"),
    ],
)
def test_a_pickle_of_anything_else_is_refused_by_name(tmp_path, content, named):
    path = tmp_path / "weights.pth"
    torch_zip(path, content)
    with pytest.raises(UserError, match=named):
        convert.read(path)


def test_a_bare_pickle_with_code_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match=r"no file of torch\.save"):
        convert.read(path)


def test_entries_are_found_and_said():
    notes = []
    arrays = convert.read(REFERENCES / "tiny_training.pth", note=notes.append)
    # Prefixes are dropped where it is known which names are needed.
    assert list(arrays) == ["module.weight"]
    assert len(notes) == 1 and "taking the weights under 'state_dict', not extra.ema" in notes[0]
    notes.clear()
    other = convert.read(REFERENCES / "tiny_training.pth", entry="extra.ema", note=notes.append)
    assert (list(other), notes) == (["weight"], [])
    with pytest.raises(UserError, match=r"no entry 'ema'; its keys are state_dict, epoch, extra"):
        convert.read(REFERENCES / "tiny_training.pth", entry="ema")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("absent.npz", None, "there is no file"),
        ("weights.txt", b"", "its suffix tells no format; choose from .safetensors, .npz"),
        ("weights.safetensors", b"", "cut short"),
        ("weights.npz", b"", "no npz file"),
        ("weights.pth", b"", "no file of torch.save, or it is cut short"),
        ("weights.safetensors", b"<html>not found</html>", "no safetensors file"),
        ("weights.npz", b"<html>not found</html>", "no npz file"),
        ("weights.pth", b"<html>not found</html>", "no file of torch.save"),
    ],
)
def test_wrong_files(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        convert.read(path)


def test_npz_of_objects_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, x=np.array([Code()], object))
    with pytest.raises(UserError, match=r"damaged, cut short or of another format.*allow_pickle"):
        convert.read(path)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ('{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "x is not where"),
        ('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "x is not where"),
        ('{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', "no safetensors header"),
        ('{"x": 1}', "no safetensors header"),
        ('{"x": {}, "x": {}}', "two entries have the same name"),
        ("{}", "8 bytes belong to no tensor"),
    ],
)
def test_a_safetensors_header_that_lies(tmp_path, header, said):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(UserError, match=said):
        convert.read(path)


def test_published_sizes_become_the_middle_crop():
    from cnnjax.convert import preprocessing

    assert preprocessing.fit(preprocessing.preprocessing("resnet50", "torchvision")) == (
        "center(resize=256, interpolation=bilinear)"
    )
    assert preprocessing.fit(preprocessing.preprocessing("efficientnet_b2", "torchvision")) == (
        "center(resize=288, interpolation=bicubic)"
    )
    assert preprocessing.fit(preprocessing.preprocessing("resnet50", "keras")) == "resize"
    assert preprocessing.fit({}) == "resize"


def bomb_npz(path):
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (2**25,)}
        )
        for _ in range(128):
            file.write(bytes(2**20))


def bomb_safetensors(path):
    shape = [10**4000] * 50
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    text = json.dumps(header, default=str).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))


def bomb_h5(path):
    with h5py.File(path, "w") as file:
        layer = file.create_group("layers/dense/vars")
        layer.attrs["name"] = "dense"
        data = layer.create_dataset("0", (2**14, 2**13), "f4", chunks=(16, 16))
        data[:16, :16] = 1


def endless_h5(path):
    with h5py.File(path, "w") as file:
        inner = file.create_group("g0")
        for level in range(1, 40):
            outer = file.create_group(f"g{level}")
            for name in ("a", "b"):
                outer.create_group(name)["layers"] = inner
            inner = outer
        file["layers"] = inner


@pytest.mark.parametrize(
    ("name", "make", "text"),
    [
        ("a.npz", bomb_npz, "fill the memory"),
        ("a.safetensors", bomb_safetensors, "impossible numbers"),
        ("a.weights.h5", bomb_h5, "fill the memory"),
        ("b.weights.h5", endless_h5, "nested more than"),
    ],
)
def test_a_small_file_does_not_fill_the_memory(name, make, text, tmp_path):
    sys.set_int_max_str_digits(0)
    make(tmp_path / name)
    with pytest.raises(UserError, match=text):
        convert.read(tmp_path / name)


def test_a_file_that_lacks_what_it_should_be_is_one_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("params/a", b"no array")
    with h5py.File(tmp_path / "a.weights.h5", "w") as file:
        file.create_group("layers/dense/vars/0")
        file["layers/dense/vars"].attrs["name"] = "dense"
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["model_config"] = "[]"
        file.attrs["layer_names"] = np.array([], "S1")
    for name in ("a.npz", "a.weights.h5", "a.h5"):
        with pytest.raises(UserError, match="cannot read"):
            convert.read(tmp_path / name)
