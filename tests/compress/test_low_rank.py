"""Factors of layers: exact at full energy, the nearest of their rank below it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import compress, models, ops
from cnnjax.compress import low_rank
from cnnjax.errors import UserError
from cnnjax.models.reshaped import changes_of
from cnnjax.models.summary import summary


def low_rank_kernel(shape, ranks, seed=0):
    """A kernel `[height, width, in, out]` whose unfoldings have these ranks."""
    generator = np.random.default_rng(seed)
    height, width, inputs, outputs = shape
    core = generator.normal(size=(height, width, *ranks))
    left = generator.normal(size=(inputs, ranks[0]))
    right = generator.normal(size=(ranks[1], outputs))
    return np.einsum("hwrs,ir,so->hwio", core, left, right).astype(np.float32)


def test_the_rank_has_the_energy_that_is_asked():
    values = np.array([3.0, 2.0, 1.0])
    assert [low_rank.rank_of(values, energy) for energy in (0.5, 0.64, 0.65, 0.93, 1.0)] == [
        *(1, 1, 2, 3, 3)
    ]


def test_split_matrix_is_the_nearest_of_its_rank():
    matrix = np.random.default_rng(0).normal(size=(12, 8))
    factors = low_rank.split_matrix(matrix, 0.8)
    values = np.linalg.svd(matrix, compute_uv=False)
    rank = factors["reduce"].shape[1]
    error = np.linalg.norm(low_rank.product(factors) - matrix)
    # Eckart and Young: what is left is what was cut off.
    np.testing.assert_allclose(error, np.sqrt(np.square(values[rank:]).sum()), rtol=1e-6)
    np.testing.assert_allclose(
        np.square(factors["reduce"]).sum(0), np.square(factors["expand"]).sum(1), rtol=1e-6
    )


def test_tucker_finds_the_ranks_that_a_kernel_has():
    kernel = low_rank_kernel((3, 3, 10, 12), (4, 5))
    factors = low_rank.tucker2(kernel, 0.999999)
    assert factors["core"].shape == (3, 3, 4, 5)
    np.testing.assert_allclose(low_rank.product(factors), kernel, atol=1e-4)
    one_sided = low_rank.tucker2(kernel, 0.999999, both=False)
    assert one_sided["core"].shape == (3, 3, 10, 5)
    np.testing.assert_allclose(low_rank.product(one_sided), kernel, atol=1e-4)


@pytest.mark.parametrize("arguments", [{}, {"pooled": (False, True), "strides": (2, 1)}])
def test_a_factored_network_computes_what_its_kernels_say(arguments):
    shape = (16, 16, 3)
    model = models.create(
        "cnn_32_64", num_classes=5, widths=(12, 10), dense_widths=(20,), padding="SAME", **arguments
    )
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    params = jax.tree.map(np.array, variables["params"])
    params["conv2"]["kernel"] = low_rank_kernel((3, 3, 12, 10), (4, 3)) / 10
    params["conv1"]["bias"] += 0.3
    variables = {"params": params, "batch_stats": {}}
    smaller, new, report = compress.decompose(model, variables, shape, energy=0.9999)
    rows = {row.layer: row for row in report}
    assert rows["conv2"].ranks == (4, 3) and rows["conv2"].error < 0.02
    assert new["params"]["conv2"]["core"]["kernel"].shape == (3, 3, 4, 3)
    image = jax.random.normal(jax.random.key(1), (2, *shape))
    with ops.lowering("lax"):
        wanted = model.apply(variables, image, train=False)
        found = smaller.apply(new, image, train=False)
    np.testing.assert_allclose(found, wanted, atol=0.03 * float(jnp.abs(wanted).max()))
    macs = {row.path: row.macs for row in summary(smaller, shape).rows}
    parts = [macs[f"conv2/{name}"] for name in ("reduce", "core", "expand")]
    assert sum(parts) == rows["conv2"].new_macs < rows["conv2"].macs
    changes = changes_of(smaller)
    built = models.create(
        "cnn_32_64",
        num_classes=5,
        widths=(12, 10),
        dense_widths=(20,),
        padding="SAME",
        layer_changes=changes,
        **arguments,
    )
    forms = jax.eval_shape(lambda x: built.init(jax.random.key(0), x), image)["params"]
    assert jax.tree.map(np.shape, forms) == jax.tree.map(np.shape, new["params"])


def test_what_would_not_be_smaller_is_left_whole_and_said():
    shape = (28, 28, 1)
    model = models.create("lenet5", num_classes=10)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    with pytest.raises(UserError, match="would compute more"):
        compress.decompose(model, variables, shape, energy=1.0, layers="head|dense2")
    with pytest.raises(UserError, match="did you mean dense1"):
        compress.decompose(model, variables, shape, energy=0.9, layers="dense_1")
    with pytest.raises(UserError, match="above 0 and at most 1"):
        compress.decompose(model, variables, shape, energy=1.5)
