"""Neurons, what they respond to, filters, embeddings and made images, by closed forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models, ops, plots
from cnnjax.data.batches import evaluation_batches
from cnnjax.errors import UserError
from cnnjax.explain import inside
from cnnjax.explain.inside import filters, maximal, maximization, neurons, receptive


class Net(nn.Module):
    """A convolution with a dead channel by construction, and a head."""

    dead: tuple = (1,)

    @nn.compact
    def __call__(self, image, *, train=False):
        x = ops.Conv(4, (3, 3), name="conv")(image)
        x = nn.relu(x - 100.0 * jnp.isin(jnp.arange(4), jnp.array(self.dead)))
        x = Named(name="end")(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x


@pytest.fixture(scope="module")
def small():
    model = Net()
    image = np.random.default_rng(0).normal(size=(23, 6, 5, 2)).astype(np.float32)
    return model, model.init(jax.random.key(0), image), image


def test_statistics_of_batches_are_those_of_all_images(small):
    model, variables, image = small
    batches = evaluation_batches({"image": image}, 5)
    found = inside.neuron_statistics(model, variables, batches, ["head", "end"])
    assert list(found) == ["head", "end"]
    _, whole = inside.passes.taps.tap(model, variables, image, ["end", "head"])
    for name, x in whole.items():
        rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        np.testing.assert_allclose(found[name].mean, rows.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].deviation, rows.std(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[name].active, (rows > 0).mean(0), rtol=1e-6)
        np.testing.assert_array_equal(found[name].always_on, (rows > 0).all(0))
        expected = neurons.effective_rank(np.cov(rows.T, bias=True))
        assert found[name].effective_rank == pytest.approx(expected, rel=1e-4)
    np.testing.assert_array_equal(found["end"].dead, [False, True, False, False])
    assert found["end"].cells()["dead"] == "25.0%"
    assert "25.0%" in neurons.table(found, 23).splitlines()[-1]


def test_a_dead_layer_is_found():
    model = Net(dead=(0, 1, 2, 3))
    image = np.ones((4, 6, 6, 1), np.float32)
    variables = model.init(jax.random.key(0), image)
    found = inside.neuron_statistics(model, variables, [{"image": jnp.asarray(image)}], ["end"])
    assert found["end"].dead.all() and found["end"].effective_rank == 0


def test_the_effective_rank_of_equal_directions_is_their_number():
    assert neurons.effective_rank(np.diag([2.0, 2, 2, 0])) == pytest.approx(3)
    assert neurons.effective_rank(np.ones((5, 5))) == pytest.approx(1)
    # Two values p and 1 - p: exp of their entropy.
    assert neurons.effective_rank(np.diag([0.9, 0.1])) == pytest.approx(
        np.exp(-0.9 * np.log(0.9) - 0.1 * np.log(0.1))
    )
    assert neurons.effective_rank(np.zeros((3, 3))) == 0


def test_the_best_images_are_those_of_a_sort_whatever_the_batches(small):
    model, variables, image = small
    _, found = inside.passes.taps.tap(model, variables, image, ["end"])
    flat = np.asarray(found["end"]).reshape(23, -1, 4)
    for size in (4, 23):
        batches = evaluation_batches({"image": image}, size)
        best = inside.maximal_images(model, variables, batches, ["end"], count=5)["end"]
        for channel in (0, 2, 3):
            order = np.argsort(-flat[..., channel].max(1), kind="stable")[:5]
            np.testing.assert_array_equal(best.image[channel], order)
            np.testing.assert_array_equal(best.position[channel], flat[order, :, channel].argmax(1))
            np.testing.assert_allclose(
                best.value[channel], flat[order, :, channel].max(1), rtol=1e-6
            )
    fewer = inside.maximal_images(
        model, variables, evaluation_batches({"image": image[:3]}, 8), ["end"], count=5
    )["end"]
    # Padding is no image.
    assert np.isfinite(np.asarray(fewer.value)).sum(1).tolist() == [3, 3, 3, 3]
    with pytest.raises(UserError, match="no images"):
        inside.maximal_images(model, variables, [], ["end"])
    with pytest.raises(UserError, match="at least 1"):
        inside.maximal_images(model, variables, [], ["end"], count=0)


def test_a_planted_pattern_is_what_its_channel_responds_to():
    """A kernel that is a cross finds the crosses, and the crop is the cross itself."""
    cross = np.zeros((3, 3), np.float32)
    cross[1] = cross[:, 1] = 1
    image = np.random.default_rng(1).uniform(0, 0.3, (8, 9, 9, 1)).astype(np.float32)
    image[5, 2:5, 6:9, 0] += cross
    model = nn.Conv(1, (3, 3), use_bias=False)

    class One(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            return ops.Conv(1, (3, 3), use_bias=False, name="conv")(image)

    model = One()
    variables = {"params": {"conv": {"kernel": cross[..., None, None] - 0.3}}}
    best = inside.maximal_images(model, variables, [{"image": jnp.asarray(image)}], ["conv"])
    field = inside.receptive_fields(model, variables, (9, 9, 1))["conv"]
    assert best["conv"].image[0, 0] == 5
    row, column = divmod(int(best["conv"].position[0, 0]), 9)
    assert (row, column) == (3, 7)
    crop = inside.crop(image[5], field, row, column)
    np.testing.assert_array_equal(crop, image[5, 2:5, 6:9])


def test_crops_are_of_one_size_and_gray_outside():
    side = receptive.Side(5.0, 2.0, 1.0, "")
    field = receptive.ReceptiveField(side, side)
    image = np.arange(100, dtype=np.uint8).reshape(10, 10, 1)
    corner = inside.crop(image, field, 0, 4)
    assert corner.shape == (5, 5, 1)
    assert (corner[0] == maximal.OUTSIDE).all() and (corner[:, 3:] == maximal.OUTSIDE).all()
    np.testing.assert_array_equal(corner[1:, :3], image[:4, 7:])
    wide = receptive.Side(40.0, 2.0, 1.0, "")
    whole = receptive.ReceptiveField(wide, receptive.Side(0, 0, 0, "a mean"))
    np.testing.assert_array_equal(inside.crop(image, whole, 3, 0), image)


def test_kernels_are_read_with_groups_and_what_they_read():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            x = ops.Conv(8, (3, 3), name="first")(image)
            x = ops.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
            x = ops.Conv(6, (1, 1), feature_group_count=2, name="grouped")(x)
            x = ops.Conv(3, (1, 1), name="point")(x)
            x = ops.Conv(3, (3, 3), name="last")(x)
            return Named(name="end")(nn.relu(x))

    model = Mixed()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    found = inside.kernels(model, variables, (8, 8, 3))
    assert list(found) == ["first", "depthwise", "grouped", "point", "last"]
    assert [kernel.groups for kernel in found.values()] == [1, 8, 2, 1, 1]
    assert [kernel.reads_image for kernel in found.values()] == [True, *[False] * 4]
    assert found["depthwise"].kernel.shape == (3, 3, 1, 8)
    np.testing.assert_array_equal(found["grouped"].kernel, variables["params"]["grouped"]["kernel"])
    layers = [*found, "end"]
    assert filters.behind(found, layers, "end") == "last"
    assert filters.behind(found, layers, "grouped") == "grouped"
    with pytest.raises(UserError, match="depthwise"):
        filters.behind(found, layers, "depthwize")
    mlp = models.create("mlp", num_classes=2)
    variables = mlp.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    with pytest.raises(UserError, match="no convolution"):
        inside.kernels(mlp, variables, (4, 4, 1))


def test_three_channels_of_a_group_are_no_colors(tmp_path, monkeypatch):
    drawn = {}

    def keep(tiles, columns):
        drawn["shape"], drawn["columns"] = tiles.shape, columns
        return np.zeros((4, 4))

    monkeypatch.setattr(plots.images, "mosaic", keep)
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 6))
    plots.filters(kernel, tmp_path / "a.png", groups=2)
    assert drawn == {"shape": (18, 3, 3), "columns": 6}
    plots.filters(kernel, tmp_path / "b.png", in_color=False)
    assert drawn["shape"] == (18, 3, 3)
    plots.filters(kernel, tmp_path / "c.png")
    assert drawn["shape"] == (6, 3, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("parametrization", maximization.PARAMETRIZATIONS)
def test_the_best_image_of_a_linear_unit_is_the_sign_of_its_weights(parametrization):
    """Without regularization and moves, within [0, 1]: white where the weight is positive."""

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            return nn.Dense(3, name="head")(image.reshape(len(image), -1))

    model = Linear()
    variables = model.init(jax.random.key(3), jnp.zeros((1, 6, 7, 1)))
    images, values = inside.maximize(
        jax.random.key(0),
        model,
        variables,
        (6, 7, 1),
        [2, 0],
        parametrization=parametrization,
        steps=300,
        learning_rate=0.3,
        jitter=0,
        rotation=0,
        scale=1,
    )
    kernel = np.asarray(variables["params"]["head"]["kernel"])[:, [2, 0]].T.reshape(2, 6, 7, 1)
    strong = np.abs(kernel) > 0.15
    np.testing.assert_array_equal((np.asarray(images) > 0.5)[strong], (kernel > 0)[strong])
    best = np.maximum(kernel, 0).sum((1, 2, 3))
    assert (np.asarray(values) > 0.85 * best).all() and (np.asarray(values) <= best + 1e-4).all()


@pytest.mark.slow
def test_regularizers_do_what_they_are_for():
    model = Net()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))

    def made(**options):
        images, _ = inside.maximize(
            jax.random.key(0),
            model,
            variables,
            (16, 16, 1),
            [3],
            layer="end",
            steps=30,
            parametrization="pixel",
            **options,
        )
        return np.asarray(images)[0, ..., 0]

    def roughness(image):
        return np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean()

    def finest(image):
        return np.abs(np.diff(image, 2, axis=0)).mean() + np.abs(np.diff(image, 2, axis=1)).mean()

    plain = made()
    assert roughness(made(total_variation=50.0)) < 0.5 * roughness(plain)
    assert finest(made(blur=2.0)) < 0.3 * finest(plain)
    assert np.square(made(l2=1000.0) - 0.5).mean() < 0.5 * np.square(plain - 0.5).mean()


def test_a_silent_channel_is_woken():
    """Where ReLU lets no derivative pass, the one that would raise its input does."""
    x = jnp.array([-1.0, -2.0, 3.0])
    _, pull = jax.vjp(maximization.redirected_relu, x)
    np.testing.assert_array_equal(pull(jnp.array([-1.0, 1.0, 0.0]))[0], [-1, 0, 0])
    np.testing.assert_array_equal(pull(jnp.array([-1.0, 1.0, 2.0]))[0], [0, 0, 2])


def test_bad_arguments_of_made_images_are_one_error(small):
    model, variables, _ = small
    arguments = jax.random.key(0), model, variables, (6, 5, 2)
    for options, text in (
        ({"channels": [4], "layer": "end"}, "end has no channel 4: it has 0 to 3"),
        ({"channels": [3]}, "the output has no channel 3"),
        ({"channels": []}, "no channel given"),
        ({"channels": [0], "layer": "ende"}, "end"),
        ({"channels": [0], "layer": "head", "unit": (0, 0)}, "head is no image"),
        ({"channels": [0], "layer": "end", "unit": (6, 0)}, r"no unit \(6, 0\)"),
        ({"channels": [0], "steps": 0}, "at least 1"),
        ({"channels": [0], "parametrization": "Fourier"}, "fourier"),
        ({"channels": [0], "scale": 0.5}, "scale=0.5"),
    ):
        with pytest.raises(UserError, match=text):
            inside.maximize(*arguments, **options)


def test_features_are_what_enters_the_head(small):
    model = models.create("lenet5", num_classes=10)
    image = np.random.default_rng(0).uniform(size=(7, 28, 28, 1)).astype(np.float32)
    variables = model.init(jax.random.key(0), image)
    batches = lambda: evaluation_batches({"image": image}, 3)  # noqa: E731
    features = inside.pooled_features(model, variables, batches())
    head = variables["params"]["head"]
    logits = features @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    np.testing.assert_allclose(logits, model.apply(variables, image), atol=1e-5)
    pooled = inside.pooled_features(model, variables, batches(), layer="stage2")
    _, found = inside.passes.taps.tap(model, variables, image, ["stage2"])
    np.testing.assert_allclose(pooled, np.asarray(found["stage2"]).mean((1, 2)), atol=1e-6)


def test_principal_components_keep_what_varies_most():
    draw = np.random.default_rng(0)
    plane = draw.normal(size=(40, 2)) * [5, 2]
    turn = np.linalg.qr(draw.normal(size=(9, 9)))[0][:2]
    points = inside.embed(plane @ turn + 3, "pca")
    # Distances within the plane are kept.
    between = np.linalg.norm(points[:, None] - points[None], axis=-1)
    expected = np.linalg.norm(plane[:, None] - plane[None], axis=-1)
    np.testing.assert_allclose(between, expected, atol=1e-8)
    assert inside.embed(draw.normal(size=(5, 1)), "pca").shape == (5, 2)
    with pytest.raises(UserError, match="tsne"):
        inside.embed(plane, "tnse")
    with pytest.raises(UserError, match="3 images"):
        inside.embed(plane[:3], "pca")
    with pytest.raises(UserError, match="not finite"):
        inside.embed(plane * np.nan, "pca")


@pytest.mark.slow
def test_neighbors_stay_neighbors_in_t_sne():
    draw = np.random.default_rng(0)
    centers = draw.normal(size=(3, 60)) * 20
    label = np.arange(60) % 3
    points = inside.embed(centers[label] + draw.normal(size=(60, 60)), "tsne")
    between = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(60)
    assert (label[between.argmin(1)] == label).all()
