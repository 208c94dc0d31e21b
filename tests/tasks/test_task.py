"""Tasks of one's own: what the step owes any of them, and a whole run of a new one.

`angle` is a toy task in one place: to tell how an image is turned. Nothing of the package knows it.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cnnjax
from cnnjax import metrics, models
from cnnjax.data import ArrayDataset
from cnnjax.data.fields import ClassMap, Image, Label, Scalar
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated, state_shardings
from cnnjax.errors import UserError
from cnnjax.tasks.classification import classification
from cnnjax.tasks.task import Report, Task, example_weights
from cnnjax.train.evaluate import evaluate
from cnnjax.train.predict import make_eval_step
from cnnjax.train.state import create_state
from cnnjax.train.step import make_step


class Linear(nn.Module):
    """One number an image, from its pixels."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(1, name="head")(x.reshape(x.shape[0], -1))[:, 0]


class PerPixel(nn.Module):
    """Logits `[batch, height, width, 3]` by a 1x1 convolution."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(3, name="head")(x)


def angle_task():
    def apply(forward, batch, *, train):
        return forward(batch["image"], train=train)

    def loss(outputs, batch):
        values = (outputs - batch["angle"]) ** 2
        return values, example_weights(batch, values)

    def measure(outputs, batch):
        error = jnp.abs(outputs - batch["angle"])
        return {
            "loss": metrics.mean(error**2, batch.get("mask")),
            "error": metrics.mean(error, batch.get("mask")),
        }

    def report(predictions, examples):
        worst = float(np.max(np.abs(predictions - examples["angle"])))
        return Report({"worst": worst}, f"largest error {worst:.3f}", {"scatter": draw})

    def draw(path):
        path.write_bytes(b"drawn")

    return Task(
        inputs={"image": Image(), "angle": Scalar()},
        apply=apply,
        loss=loss,
        metrics=measure,
        predict=lambda outputs: outputs,
        report=report,
        monitor=("error", "min"),
    )


def pixel_task(ignore=255):
    """Classes of pixels, each weighing as much as its class number says, or nothing."""

    def apply(forward, batch, *, train):
        return forward(batch["image"], train=train)

    def loss(logits, batch):
        known = batch["class_map"] != ignore
        label = jnp.where(known, batch["class_map"], 0).astype(jnp.int32)
        values = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        weights = jnp.where(known & example_weights(batch, values), 1.0 + label, 0.0)
        return values, weights

    return Task(
        inputs={"image": Image(), "class_map": ClassMap(3)},
        apply=apply,
        loss=loss,
        metrics=lambda outputs, batch: {"loss": metrics.mean(*loss(outputs, batch))},
        predict=lambda logits: jnp.argmax(logits, axis=-1),
        report=lambda predictions, examples: Report({}, "", {}),
        monitor=("loss", "min"),
    )


def pixel_batch(count=16):
    """Images whose pixels are known in ever fewer places from one example to the next."""
    generator = np.random.default_rng(0)
    class_map = generator.integers(0, 3, (count, 4, 4)).astype(np.uint8)
    class_map[np.arange(count)[:, None, None] + np.arange(16).reshape(4, 4) > count] = 255
    return {
        "image": generator.normal(size=(count, 4, 4, 2)).astype(np.float32),
        "class_map": class_map,
        "mask": np.arange(count) != 3,
    }


def pixel_state(optimizer):
    variables = PerPixel().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))
    return create_state(variables, optimizer, jax.random.key(1))


def stepped(axis_name=None, **options):
    optimizer = optax.sgd(1.0)
    return make_step(
        PerPixel(),
        optimizer,
        pixel_task(),
        schedule=lambda step: 1.0,
        axis_name=axis_name,
        **options,
    )


def weighted_mean_gradient(params, batch):
    """The mean over the weights of the whole batch, written out."""

    def total(params):
        logits = batch["image"] @ params["head"]["kernel"] + params["head"]["bias"]
        weights, losses = 0.0, 0.0
        for example in range(len(batch["image"])):
            for y in range(4):
                for x in range(4):
                    label = int(batch["class_map"][example, y, x])
                    if batch["mask"][example] and label != 255:
                        row = logits[example, y, x]
                        losses += (1 + label) * (jax.nn.logsumexp(row) - row[label])
                        weights += 1 + label
        return losses / weights

    return jax.grad(total)(params)


def test_the_mean_is_over_the_weights_of_the_whole_batch():
    state, batch = pixel_state(optax.sgd(1.0)), pixel_batch()
    expected = weighted_mean_gradient(state.params, batch)
    new_state, metrics_of_step = jax.jit(stepped())(state, batch)
    updated = jax.tree.map(lambda p, g: p - g, state.params, expected)
    for new, by_hand in zip(
        jax.tree.leaves(new_state.params), jax.tree.leaves(updated), strict=True
    ):
        np.testing.assert_allclose(new, by_hand, rtol=1e-5, atol=1e-6)
    _, weight = metrics_of_step["loss"]
    known = (batch["class_map"] != 255) & batch["mask"][:, None, None]
    assert float(weight) == np.sum((1.0 + batch["class_map"])[known])


@pytest.mark.parametrize(
    ("devices", "options"), [(8, {}), (1, {"accumulate": 4}), (8, {"accumulate": 2})]
)
def test_devices_and_microbatches_change_nothing_but_rounding(devices, options):
    """Each device and each microbatch has another sum of weights."""
    state, batch = pixel_state(optax.sgd(1.0)), pixel_batch()
    expected, _ = jax.jit(stepped())(state, batch)
    if devices == 1:
        found, _ = jax.jit(stepped(**options))(state, batch)
    else:
        found, _ = jax.pmap(stepped("data", **options), axis_name="data")(
            jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), state),
            jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch),
        )
        found = jax.tree.map(lambda leaf: leaf[0], found)
    for one, other in zip(
        jax.tree.leaves(expected.params), jax.tree.leaves(found.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_batch_without_a_mask_counts_whole():
    state, batch = pixel_state(optax.sgd(1.0)), pixel_batch()
    masked = batch | {"mask": np.ones(16, bool)}
    del batch["mask"]
    step = jax.jit(stepped())
    for one, other in zip(
        jax.tree.leaves(step(state, batch)[1]), jax.tree.leaves(step(state, masked)[1]), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_ignored_pixels_teach_nothing_whatever_stands_there():
    state, batch = pixel_state(optax.sgd(1.0)), pixel_batch()
    image = np.where((batch["class_map"] == 255)[..., None], 1e4, batch["image"])
    step = jax.jit(stepped())
    expected, _ = step(state, batch)
    found, _ = step(state, batch | {"image": image.astype(np.float32)})
    jax.tree.map(np.testing.assert_array_equal, expected.params, found.params)


def test_a_task_that_needs_the_whole_batch_refuses_microbatches():
    task = dataclasses.replace(pixel_task(), needs_whole_batch=True)
    with pytest.raises(UserError, match="accumulate 2: the loss of this task needs all examples"):
        make_step(PerPixel(), optax.sgd(1.0), task, schedule=lambda step: 1.0, accumulate=2)


def test_forward_gathers_the_whole_batch_and_gradients_find_their_way_back():
    """A loss over all pairs of the batch: 8 devices give the gradient of one."""

    def apply(forward, batch, *, train):
        own, batch_stats = forward(batch["image"], train=train)
        return {"own": own, "all": forward.gather(own)}, batch_stats

    def loss(outputs, batch):
        values = jnp.mean((outputs["own"][:, None] * outputs["all"][None] - 1) ** 2, axis=1)
        return values, example_weights(batch, values)

    task = dataclasses.replace(
        angle_task(), apply=apply, loss=loss, metrics=lambda *_: {}, needs_whole_batch=True
    )
    variables = Linear().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))
    optimizer = optax.sgd(1.0)
    state = create_state(variables, optimizer, jax.random.key(1))
    batch = {"image": pixel_batch()["image"], "mask": np.ones(16, bool)}

    def make(axis_name=None):
        return make_step(Linear(), optimizer, task, schedule=lambda step: 1.0, axis_name=axis_name)

    expected, _ = jax.jit(make())(state, batch)
    found, _ = jax.pmap(make("data"), axis_name="data")(
        jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state),
        jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch),
    )
    kernel = found.params["head"]["kernel"][0]
    np.testing.assert_allclose(expected.params["head"]["kernel"], kernel, rtol=1e-5, atol=1e-6)


def test_a_teacher_is_applied_with_other_parameters_and_is_not_trained():
    def apply(forward, batch, *, train):
        student, batch_stats = forward(batch["image"], train=train)
        teacher, _ = forward(batch["image"], train=False, params=forward.average)
        return {"student": student, "teacher": teacher}, batch_stats

    def loss(outputs, batch):
        values = (outputs["student"] - outputs["teacher"]) ** 2
        return values, example_weights(batch, values)

    task = dataclasses.replace(angle_task(), apply=apply, loss=loss, metrics=lambda *_: {})
    variables = Linear().init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))
    optimizer = optax.sgd(0.1)
    state = create_state(variables, optimizer, jax.random.key(1), ema=True)
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1.0, state.ema))
    step = make_step(Linear(), optimizer, task, schedule=lambda step: 0.1, ema_decay=1.0)
    new_state, found = jax.jit(step)(state, {"image": pixel_batch()["image"]})
    image = pixel_batch()["image"].reshape(16, -1)
    # The difference of the outputs is the pixels' sum and the bias; the student moves towards it.
    difference = -(image.sum(axis=1) + 1.0)
    gradient = 2 * (difference[:, None] * image).mean(axis=0)
    moved = state.params["head"]["kernel"][:, 0] - 0.1 * gradient
    np.testing.assert_allclose(new_state.params["head"]["kernel"][:, 0], moved, rtol=1e-4)
    assert float(found["loss"][0]) == pytest.approx(float(np.sum(difference**2)), rel=1e-4)


def angles(count, seed):
    """Bright on the left, bright on the right, or between."""
    generator = np.random.default_rng(seed)
    angle = generator.uniform(-1, 1, count).astype(np.float32)
    ramp = np.linspace(-1, 1, 8)[None, None, :, None] * angle[:, None, None, None]
    image = np.broadcast_to(127.5 + 100 * ramp, (count, 8, 8, 1))
    return {"image": np.round(image).astype(np.uint8), "angle": angle}


def angle_data():
    return cnnjax.data.ArrayDataset(
        "angles",
        {"image": Image(), "angle": Scalar()},
        train=angles(256, 0),
        validation=angles(64, 1),
        test=angles(70, 2),
    )


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["resident", "stream"])
def test_a_task_of_ones_own_runs_from_start_to_report(tmp_path, pipeline):
    trained = cnnjax.run.train(
        Linear(),
        angle_task(),
        angle_data(),
        "adam",
        learning_rate=0.05,
        epochs=10,
        batch_size=16,
        pipeline=pipeline,
        run_dir=str(tmp_path / "run"),
    )
    assert trained.summary["monitor"] == "error"
    assert trained.summary["test_error"] < 0.1
    assert trained.summary["test_examples"] == 70
    assert (trained.directory / "figures" / "scatter.png").read_bytes() == b"drawn"
    assert "largest error" in (trained.directory / "summary.md").read_text()
    step = make_eval_step(trained.model, angle_task())
    batches = cnnjax.data.split_batches(angle_data(), "test", 32)
    found = evaluate(jax.jit(step), trained.variables, batches)
    assert found["error"] == pytest.approx(trained.summary["test_error"], rel=1e-5)


@pytest.mark.slow
def test_a_run_from_python_goes_on_where_it_was_stopped(tmp_path):
    def train(directory, **options):
        return cnnjax.run.train(
            Linear(),
            angle_task(),
            angle_data(),
            optax.adam(0.01),
            epochs=3,
            batch_size=16,
            run_dir=str(tmp_path / directory),
            **options,
        )

    straight = train("straight")
    assert train("stopped", stop_after_epochs=1).summary == {}
    resumed = train("stopped", resume=True)
    jax.tree.map(np.testing.assert_array_equal, straight.variables, resumed.variables)
    assert train("stopped", resume=True).summary == resumed.summary
    with pytest.raises(UserError, match="holds a run already: give resume=True"):
        train("stopped")
    with pytest.raises(UserError, match="epochs"):
        cnnjax.run.train(Linear(), angle_task(), angle_data(), epoch=3)
    with pytest.raises(UserError, match="batch_size 32 differs from the 16 of the run"):
        cnnjax.run.train(
            Linear(),
            angle_task(),
            angle_data(),
            optax.adam(0.01),
            epochs=3,
            batch_size=32,
            resume=True,
            run_dir=str(tmp_path / "stopped"),
        )


def test_a_score_that_is_not_there_cannot_be_monitored(tmp_path):
    with pytest.raises(UserError, match="--monitor 'eror': did you mean error"):
        cnnjax.run.train(
            Linear(), angle_task(), angle_data(), monitor="eror", run_dir=str(tmp_path / "run")
        )


def test_examples_are_checked_against_their_fields():
    good = angles(8, 0)

    def dataset(**changes):
        train = {**good, **changes}
        return cnnjax.data.ArrayDataset("angles", angle_task().inputs, train, good, good)

    with pytest.raises(UserError, match="angle of the train split of angles is float64"):
        dataset(angle=good["angle"].astype(np.float64))
    with pytest.raises(UserError, match="different numbers of examples \\(image 8, angle 7\\)"):
        dataset(angle=good["angle"][:7])
    with pytest.raises(UserError, match="image of the train split of angles is int64"):
        dataset(image=good["image"].astype(np.int64))
    with pytest.raises(UserError, match=r"runs from 0 to 3: it must lie in 0\.\.2"):
        Label(3).check("label", np.arange(4, dtype=np.int32))
    with pytest.raises(UserError, match=r"must lie in 0\.\.2"):
        ClassMap(3).check("map", np.full((1, 2, 2), 7, np.uint8))
    ClassMap(3).check("map", np.full((1, 2, 2), 255, np.uint8))


def test_one_step_on_a_mesh_that_divides_parameters_is_that_of_one_device():
    state, batch = pixel_state(optax.sgd(1.0)), pixel_batch()
    expected, _ = jax.jit(stepped())(state, batch)
    mesh = make_mesh("data=4,model=2")
    places = state_shardings(state, mesh, ())
    step = jax.jit(stepped(), out_shardings=(places, replicated(mesh)))
    found, _ = step(jax.device_put(state, places), jax.device_put(batch, batch_sharding(mesh)))
    for one, other in zip(
        jax.tree.leaves(expected.params), jax.tree.leaves(found.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_learned_from_is_refused_before_training(tmp_path):
    image = np.zeros((8, 4, 4, 1), np.float32)
    fields = {"image": Image(), "label": Label(3)}
    label = np.arange(8, dtype=np.int32) % 3
    split = {"image": image, "label": label}

    def dataset(**changes):
        return ArrayDataset("made", fields, split, split, split | changes)

    with pytest.raises(UserError, match="image of the test split of made has values from 0 to 255"):
        dataset(image=image + np.float32(255) * (label == 0)[:, None, None, None])
    with pytest.raises(UserError, match=r"\[4, 4, 1\] in train and float32 \[5, 4, 1\] in test"):
        dataset(image=np.zeros((8, 5, 4, 1), np.float32))
    with pytest.raises(UserError, match="has no key that a model gets"):
        ArrayDataset("made", {"label": Label(3)}, split, split, split)
    how = {"epochs": 1, "batch_size": 4, "devices": 1, "run_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=r"label is .*num_classes=3.* and .*num_classes=5"):
        cnnjax.run.train("mlp", classification(5), dataset(), **how)
    with pytest.raises(UserError, match="the model has 2 outputs, the task 3 classes"):
        cnnjax.run.train(models.create("mlp", num_classes=2), classification(3), dataset(), **how)
    with pytest.raises(UserError, match="and an optimizer's name"):
        cnnjax.run.train("mlp", classification(3), dataset(), None, **how)


def test_a_batch_that_counts_nothing_teaches_nothing():
    """Its mean is over no weight: no number is NaN, and no parameter moves."""
    model = models.create("mlp", num_classes=3)
    batch = {
        "image": np.ones((4, 4, 4, 1), np.float32),
        "label": np.zeros(4, np.int32),
        "mask": np.zeros(4, bool),
    }
    variables = model.init(jax.random.key(0), batch["image"], train=False)
    state = create_state(variables, optax.sgd(0.1), jax.random.key(1))
    step = make_step(model, optax.sgd(0.1), classification(3), schedule=lambda step: 0.1)
    after, metrics = jax.jit(step)(state, batch)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    assert [float(part) for part in metrics["loss"]] == [0, 0]
