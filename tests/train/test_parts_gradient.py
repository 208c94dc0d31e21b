"""A batch in parts: the same objective as at once, by the stated definition, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import losses, models
from cnnjax.augment.change import apply_per_image
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated
from cnnjax.errors import UserError
from cnnjax.train import gradients
from tests.tiny import BatchNormNet, batch_of, random_arrays, setup
from tests.train.test_compile import largest_difference, trained

ARRAYS = random_arrays(64)


def dropout_net(**options):
    """Convolutions and dropout, without statistics of the batch."""
    return models.create(
        "cnn_32_64", num_classes=10, widths=(4, 8), dense_widths=(16,), dropout_rate=0.5, **options
    )


def augment(key, batch, first_index):
    def noise(key, image):
        return image + 0.1 * jax.random.normal(key, image.shape, image.dtype)

    return {**batch, "image": apply_per_image(key, batch["image"], noise, first_index)}


def test_parts_are_every_nth_example_in_order():
    batch = {"x": jnp.arange(12.0), "y": jnp.arange(24).reshape(12, 2)}

    def compute(seen, part):
        return {"sum": part["y"].sum(0)}, jnp.concatenate([seen[4:], part["x"]])

    sums, seen = gradients.in_parts(compute, jnp.zeros(12), batch, 3)
    np.testing.assert_array_equal(sums["sum"], batch["y"].sum(0))
    np.testing.assert_array_equal(seen, [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])


@pytest.mark.slow
def test_parts_equal_the_whole_batch_on_any_devices_in_float64():
    """With dropout, augmentation and a penalty, over 4 steps; no BatchNorm."""
    options = {"augment": augment, "penalty": losses.l2_penalty, "dtype": jnp.float64}
    with jax.enable_x64(True):
        whole = trained(dropout_net(), "jit", 1, 4, **options)
        for method, devices, parts in (
            ("jit", 1, 4),
            ("jit", 4, 2),
            ("pmap", 2, 4),
            ("scan", 4, 8),
        ):
            other = trained(dropout_net(), method, devices, 4, accumulate=parts, **options)
            assert largest_difference(whole, other) < 1e-10, (method, devices, parts)


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True])
def test_parts_equal_the_whole_batch_in_float32_whatever_is_masked(soft):
    batch = batch_of(ARRAYS, 0, 24) | {"mask": jnp.arange(24) % 5 != 0}
    if soft:
        batch["label"] = 0.9 * jax.nn.one_hot(batch["label"], 10) + 0.01
    state, make_step = setup(dropout_net(), ema_decay=0.9)
    _, make_parted = setup(dropout_net(), ema_decay=0.9, accumulate=6)
    (whole, metrics), (parted, parted_metrics) = (
        jax.jit(make())(state, batch) for make in (make_step, make_parted)
    )
    assert metrics["loss"][1] == parted_metrics["loss"][1] == 19
    assert metrics["accuracy"] == parted_metrics["accuracy"]
    whole, parted = (s.replace(key=None) for s in (whole, parted))
    assert largest_difference((whole, metrics), (parted, parted_metrics)) < 1e-5


@pytest.mark.slow
def test_batch_norm_is_sequential_as_defined():
    """Each part by its own statistics; the running ones updated part after part; one update."""
    with jax.enable_x64(True):
        state, make_step = setup(
            BatchNormNet(), dtype=jnp.float64, learning_rate=0.1, optimizer=optax.sgd(0.1),
            accumulate=4,
        )  # fmt: skip
        batch = batch_of(ARRAYS, 0, 16)
        new_state, metrics = jax.jit(make_step())(state, batch)

        def part_loss(params, batch_stats, part):
            logits, updated = BatchNormNet().apply(
                {"params": params, "batch_stats": batch_stats},
                batch["image"][part::4].astype(jnp.float64) / 255,
                train=True,
                mutable=["batch_stats"],
            )
            losses_ = losses.softmax_cross_entropy(logits, batch["label"][part::4])
            return losses_.sum() / 16, updated["batch_stats"]

        batch_stats = state.batch_stats
        total = jax.tree.map(jnp.zeros_like, state.params)
        loss = 0.0
        part_gradient = jax.jit(jax.value_and_grad(part_loss, has_aux=True), static_argnums=2)
        for part in range(4):
            (share, batch_stats), gradient = part_gradient(state.params, batch_stats, part)
            total = jax.tree.map(jnp.add, total, gradient)
            loss += share
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, total)
        assert largest_difference(params, new_state.params) < 1e-12
        assert largest_difference(batch_stats, new_state.batch_stats) < 1e-12
        assert metrics["loss"][0] / 16 == pytest.approx(float(loss), rel=1e-12)


@pytest.mark.slow
def test_batch_norm_in_parts_does_not_depend_on_the_devices():
    options = {"dtype": jnp.float64, "accumulate": 4}
    with jax.enable_x64(True):
        one = trained(BatchNormNet(), "jit", 1, 5, **options)
        for method, devices in (("jit", 8), ("pmap", 8), ("scan", 2)):
            many = trained(BatchNormNet(), method, devices, 5, **options)
            assert largest_difference(one, many) < 1e-10, (method, devices)


def compiled_step(accumulate, batch_size, num_devices=1):
    mesh = make_mesh(num_devices)
    state, make_step = setup(dropout_net(padding="SAME"), accumulate=accumulate)
    state = jax.device_put(state, replicated(mesh))
    batch = batch_of(random_arrays(batch_size), 0, batch_size)
    batch = jax.device_put(batch, batch_sharding(mesh))
    return jax.jit(make_step(), donate_argnums=0).lower(state, batch).compile()


@pytest.mark.slow
def test_parts_take_less_memory():
    whole, parted = (
        compiled_step(parts, 256).memory_analysis().temp_size_in_bytes for parts in (1, 8)
    )
    assert parted < whole / 3


@pytest.mark.slow
def test_parts_move_no_example_between_devices():
    text = compiled_step(4, 64, num_devices=8).as_text()
    assert "all-reduce" in text
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text


@pytest.mark.parametrize(
    ("batch_size", "parts", "devices", "message"),
    [
        (64, 0, 1, "accumulate 0: give 1"),
        (64, 3, 1, "batch size 64 over 1 device.* 64 examples each.* 3 equal parts: .*umulate 4"),
        (64, 16, 8, "batch size 64 over 8 device.* 8 examples .*accumulate 8, .*multiple of 128"),
    ],
)
def test_unequal_parts_are_refused(batch_size, parts, devices, message):
    with pytest.raises(UserError, match=message):
        gradients.check_parts(batch_size, parts, num_devices=devices)


def test_the_step_refuses_unequal_parts_too():
    state, make_step = setup(BatchNormNet(), accumulate=3)
    with pytest.raises(UserError, match="batch size 16"):
        jax.eval_shape(make_step(), state, batch_of(ARRAYS, 0, 16))
