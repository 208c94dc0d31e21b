"""Every method under every compile mode, and resumed in the middle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import checkpoint
from tests.finetune.small import METHODS, initialized, tuned
from tests.tiny import batch_of, random_arrays, setup
from tests.train.test_compile import largest_difference, trained

WAYS = [("pmap", "data=8"), ("scan", "data=8"), ("jit", "fsdp=4,model=2")]


@pytest.mark.slow
@pytest.mark.parametrize("text", METHODS)
def test_every_way_trains_the_same_and_freezes_the_same(text):
    model = tuned(text)
    options = {"dtype": jnp.float32, "ema_decay": 0.9}
    reference = trained(model, "jit", 1, 3, **options)
    start = initialized(model)["frozen"]
    for method, axes in WAYS:
        state, metrics = trained(model, method, axes, 3, **options)
        assert largest_difference(reference, (state, metrics)) < 1e-4, (method, axes)
        jax.tree.map(np.testing.assert_array_equal, state.frozen, reference[0].frozen)
        assert jax.tree.structure(state.frozen) == jax.tree.structure(start)


@pytest.mark.parametrize(
    "text",
    [text if text == "lora:2" else pytest.param(text, marks=pytest.mark.slow) for text in METHODS],
)
def test_a_restored_state_goes_on_with_the_same_bits(tmp_path, text):
    model = tuned(text)
    state, make_step = setup(model, ema_decay=0.9)
    step = jax.jit(make_step())
    batches = [batch_of(random_arrays(32), start, 8) for start in (0, 8, 16, 24)]
    straight = state
    for batch in batches:
        straight, _ = step(straight, batch)
    half = state
    for batch in batches[:2]:
        half, _ = step(half, batch)
    path = checkpoint.save(tmp_path, half, {})
    assert not (path / "frozen").exists()
    assert checkpoint.state_bytes(half) == checkpoint.state_bytes(half.replace(frozen={}))
    resumed, _ = checkpoint.restore(tmp_path, state)
    for batch in batches[2:]:
        resumed, _ = step(resumed, batch)
    jax.tree.map(
        np.testing.assert_array_equal, resumed.replace(key=None), straight.replace(key=None)
    )
