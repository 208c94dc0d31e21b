"""Sparse storage: every bit comes back, and it is smaller."""

import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import checkpoint
from cnnjax.checkpoint import packed
from cnnjax.errors import UserError


def leaves(sparsity, dtype=np.float32):
    generator = np.random.default_rng(0)
    values = generator.normal(size=(50, 40)).astype(dtype)
    values[generator.random(values.shape) < sparsity] = 0
    return values


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int8, np.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.999, 1.1])
def test_a_sparse_checkpoint_comes_back_bit_for_bit(dtype, sparsity, tmp_path):
    kernel = leaves(sparsity, dtype)
    if dtype == np.float32:
        kernel[0, :3] = [-0.0, np.nan, 1e-40]
    params = {"conv/1": {"kernel": kernel}, "bias": np.float32(3), "none": np.zeros((0, 2), dtype)}
    state = {"step": np.int32(7), "params": params, "batch_stats": {}, "ema": None}
    checkpoint.save(tmp_path, state, {"a": 1}, sparse=True)
    found = checkpoint.restore_items(tmp_path, ("params", "batch_stats", "ema"))
    assert found["step"] == 7 and found["batch_stats"] == {} and found["ema"] is None
    read = found["params"]["conv"]["1"]["kernel"]
    assert read.dtype == kernel.dtype and read.tobytes() == kernel.tobytes()
    assert found["params"]["bias"] == 3 and found["params"]["none"].shape == (0, 2)


def test_it_is_smaller_by_about_the_sparsity(tmp_path):
    sizes = {}
    for sparsity in (0.0, 0.5, 0.9):
        packed.write(tmp_path, {"kernel": leaves(sparsity)})
        sizes[sparsity] = (tmp_path / packed.NAME).stat().st_size
    assert sizes[0.9] < 0.2 * sizes[0.0] < sizes[0.5] < 0.65 * sizes[0.0]


def test_the_same_arrays_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        packed.write(tmp_path / name, {"kernel": leaves(0.9)})
    one, other = ((tmp_path / name / packed.NAME).read_bytes() for name in ("a", "b"))
    assert one == other


def test_the_places_are_stored_in_the_smaller_way():
    assert set(packed.packed("x", leaves(0.8))) == {"x|values", "x|bits"}
    assert set(packed.packed("x", leaves(0.99))) == {"x|values", "x|gaps"}
    assert set(packed.packed("x", leaves(0.0))) == {"x"}


def test_damage_is_found(tmp_path):
    state = {"step": np.int32(1), "params": {"kernel": leaves(0.9)}}
    path = checkpoint.save(tmp_path, state, {}, sparse=True) / "params" / packed.NAME
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    said = []
    with pytest.raises(UserError, match="none of its checkpoints is undamaged"):
        checkpoint.restore_items(tmp_path, ("params",), warn=said.append)
    assert "packed.npz was changed or cut short" in said[0]
