"""What makes the speedrun fast, each part against its definition."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import models, optim
from cnnjax.errors import UserError
from experiments import cifar10_speedrun as speedrun
from tests.experiments.test_experiments import launch

IMAGES = np.random.default_rng(0).normal(size=(40, 12, 12, 3)).cumsum(1).astype(np.float32)


def test_whitened_patches_are_uncorrelated_and_of_unit_size():
    kernel = models.airbench.whitening_kernel(jnp.asarray(IMAGES), 2)
    assert kernel.shape == (2, 2, 3, 24)
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
    out = jax.lax.conv_general_dilated(
        IMAGES, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    flat = np.asarray(out)[..., :12].reshape(-1, 12)
    np.testing.assert_allclose(flat.T @ flat / len(flat), np.eye(12), atol=0.01)


def test_convolutions_start_by_handing_their_input_on():
    x = jnp.asarray(IMAGES)
    kernel = models.airbench.partial_identity(jax.random.key(0), (3, 3, 3, 8))
    out = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(out[..., :3], x, rtol=1e-5, atol=1e-5)
    assert np.abs(kernel[..., 3:]).max() <= 1 / np.sqrt(27) + 1e-6
    assert len(np.unique(np.asarray(kernel[..., 3:]))) > 100


def test_each_image_is_mirrored_in_every_second_epoch_and_half_of_them_in_the_first():
    images = np.random.default_rng(1).integers(0, 256, (200, 6, 6, 3), dtype=np.uint8)

    class State:
        step = 0

    seen = []
    for epoch in range(3):
        State.step = jnp.int32(7 * epoch + 3)
        step = speedrun.alternating_flip(lambda state, batch: batch["image"], 7)
        seen.append(np.asarray(step(State, {"image": jnp.asarray(images)})))
    mirrored = [(epoch == images[:, :, ::-1]).all((1, 2, 3)) for epoch in seen]
    as_is = [(epoch == images).all((1, 2, 3)) for epoch in seen]
    assert all((a | b).all() for a, b in zip(mirrored, as_is, strict=True))
    np.testing.assert_array_equal(mirrored[0], ~mirrored[1])
    np.testing.assert_array_equal(mirrored[0], mirrored[2])
    assert 70 < mirrored[0].sum() < 130


def test_rates_by_layer():
    updates = {
        "whiten": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
        "stage1_conv1": {"kernel": jnp.ones(2)},
        "stage1_conv1_norm": {"bias": jnp.ones(2)},
    }
    rates = speedrun.rates_by_layer(whitening_bias_updates=1)
    state = rates.init(updates)
    first, state = rates.update(updates, state)
    second, _ = rates.update(updates, state)
    for scaled, bias in ((first, 1.0), (second, 0.0)):
        found = jax.tree.map(lambda leaf: float(leaf[0]), scaled)
        assert found["whiten"] == {"kernel": 0.0, "bias": bias}
        assert found["stage1_conv1"]["kernel"] == 1.0
        assert found["stage1_conv1_norm"]["bias"] == 64.0


def test_lookahead_follows_its_definition():
    optimizer = optim.lookahead(optax.sgd(1.0), lambda count: 0.25, 2, last_update=5)
    params = {"w": jnp.zeros(())}
    state = optimizer.init(params)
    found = []
    for _ in range(5):
        updates, state = optimizer.update({"w": -jnp.ones(())}, state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(params["w"]))
    # 1, then 0.75 * 2 = 1.5; 2.5, then 0.25 * 1.5 + 0.75 * 3.5 = 3; and back to it at the end.
    np.testing.assert_allclose(found, [1, 1.5, 2.5, 3, 3], rtol=1e-6)
    with pytest.raises(UserError, match="every_updates=0"):
        optim.lookahead(optax.sgd(1.0), lambda count: 0.5, 0)


@pytest.mark.slow
def test_a_smoke_run_keeps_its_whitening(tmp_path, capsys):
    from cnnjax.run import load

    flags = ["--smoke", "--devices", 1, "--data-dir", tmp_path / "data"]
    assert launch(speedrun, *flags, "--run-dir", tmp_path / "run") == 0
    assert "synthetic    images in place of tfds:cifar10" in capsys.readouterr().out
    kernel = np.asarray(load.load_trained(tmp_path / "run").variables["params"]["whiten"]["kernel"])
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["parameters"], summary["step"]) == (1_971_640, 8)
