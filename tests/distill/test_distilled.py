"""A student with its teacher: layers, variables, task and step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import distill, finetune, losses, models
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated
from cnnjax.distill import layers
from cnnjax.distill.losses import distance_loss, softened_divergence
from cnnjax.errors import UserError
from cnnjax.models.summary import abstract_variables
from cnnjax.tasks.classification import classification
from cnnjax.tasks.segmentation import segmentation
from cnnjax.train.compile import compile_train
from cnnjax.train.state import create_state
from cnnjax.train.step import make_step
from tests.tiny import BatchNormNet, batch_of, random_arrays

SHAPE = (16, 16, 1)
NAMES = tuple("abcd")
ARRAYS = random_arrays(16, SHAPE, num_classes=4)
ALL = (
    "logits, features(layers=stage1:stage2), attention(layers=(stage1, stage2:stage1)), "
    "rkd_distance, rkd_angle"
)


def network(*widths, **fields):
    return models.create("cnn_32_64", num_classes=4, widths=widths, **fields)


def init(model, seed, shape=SHAPE):
    return model.init(jax.random.key(seed), jnp.zeros((1, *shape)), train=False)


def made(text=ALL, student=None, teacher=None, shape=SHAPE):
    """Returns a distilled model; nothing is computed."""
    teacher = teacher or network(6, 8, norm="batch")
    student = student or network(2, 3, norm="batch")
    variables = abstract_variables(teacher, shape)
    return distill.make(
        student, distill.Teacher(teacher, NAMES, shape), variables, distill.read(text)
    )


def pair(text=ALL, student=None, teacher=None, shape=SHAPE):
    """Returns a distilled model and its variables."""
    model = made(text, student, teacher, shape)
    variables = init(model.teacher.model, 1, shape)
    return model, model.start(jax.random.key(2), variables)


def step_of(model, variables, axis_name=None, optimizer=None, **options):
    optimizer = optimizer or optax.sgd(0.1)
    task = distill.distillation(classification(4), model.terms, **options)
    state = create_state(variables, optimizer, jax.random.key(3))
    return state, make_step(model, optimizer, task, schedule=lambda step: 0.1, axis_name=axis_name)


@pytest.mark.slow
def test_the_students_own_start_and_answers_are_those_without_a_teacher():
    model, variables = pair()
    alone = init(model.student, 2)
    own = distill.student_variables(variables)
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, dict(alone[name]), dict(own[name]))
    assert set(variables["params"]) - set(own["params"]) == {"projections"}
    assert set(variables["params"]["projections"]) == {"stage1-stage2"}
    image = jnp.asarray(ARRAYS.image[:3]) / 255.0
    np.testing.assert_array_equal(
        model.apply(variables, image), model.student.apply(alone, image, train=False)
    )


def test_the_loss_is_the_weighted_sum_by_hand():
    model, variables = pair("logits(temperature=2, weight=0.75), rkd_distance(weight=3)")
    state, step = step_of(model, variables)
    batch = batch_of(ARRAYS, 0, 8)
    _, metrics = jax.jit(step)(state, batch)
    image = batch["image"] / 255.0
    own = distill.student_variables(variables)
    (logits, _), found = layers.tapped(
        model.student, own, image, ["before_head"], train=True, mutable=["batch_stats"]
    )
    teacher, of_teacher = layers.tapped(
        model.teacher.model, variables["frozen"]["teacher"], image, ["before_head"]
    )
    soft = softened_divergence(logits, teacher, temperature=2.0)
    relation = distance_loss(found["before_head"], of_teacher["before_head"])
    labels = losses.softmax_cross_entropy(logits, batch["label"])
    by_hand = (0.25 * labels + 0.75 * soft + 3 * relation).mean()
    for name, value in (
        ("loss", by_hand),
        ("distill_logits", soft.mean()),
        ("distill_rkd_distance", relation.mean()),
    ):
        total, count = metrics[name]
        np.testing.assert_allclose(total / count, value, rtol=1e-4)


def test_the_teacher_is_an_argument_that_never_changes_and_gets_no_gradient():
    model, variables = pair()
    state, step = step_of(model, variables)
    text = jax.jit(step).lower(state, batch_of(ARRAYS, 0, 8)).as_text()
    kernel = variables["frozen"]["teacher"]["params"]["conv2"]["kernel"]
    size = "x".join(map(str, kernel.shape))
    # Its kernels are arguments; no constant is as large.
    assert f"tensor<{size}xf32>" in text.partition("{jax.result_info")[0]
    assert not [line for line in text.splitlines() if "constant dense<" in line and size in line]
    new, _ = jax.jit(step)(state, batch_of(ARRAYS, 0, 8))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, new.frozen)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, new.params)
    assert moved["projections"]["stage1-stage2"]["kernel"] and moved["conv1"]["kernel"]


@pytest.mark.slow
def test_without_weight_no_label_is_looked_at():
    model, variables = pair("logits(weight=1)")
    state, step = step_of(model, variables)
    batch = batch_of(ARRAYS, 0, 8)
    other = {**batch, "label": (batch["label"] + 1) % 4}
    states = [jax.jit(step)(state, each)[0] for each in (batch, other)]
    jax.tree.map(np.testing.assert_array_equal, states[0].params, states[1].params)
    assert distill.label_weight(distill.read("logits(weight=0.9)")) == pytest.approx(0.1)
    assert distill.label_weight(distill.read("attention")) == 1
    with pytest.raises(UserError, match="label weight -2"):
        distill.distillation(classification(4), model.terms, label_weight=-2)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["jit", "pmap"])
def test_four_devices_make_the_step_of_one(way):
    results = []
    for devices, how in ((1, "jit"), (4, way)):
        model, variables = pair()
        state, _ = step_of(model, variables)
        mesh = make_mesh(devices)
        places = {"sharding": batch_sharding(mesh), "replicated": replicated(mesh)}
        data = ResidentPipeline(ARRAYS, 16, seed=0, **places)
        train = compile_train(
            lambda axis_name: step_of(*pair(), axis_name)[1], state, data, method=how, mesh=mesh
        )
        state, metrics = next(iter(train(state, 0, [1])))
        results.append((jax.device_get(state.params), metrics))
    (one, metrics), (several, others) = results
    for name in ("loss", "distill_rkd_angle", "distill_attention"):
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), one, several)


def test_a_relation_needs_the_whole_batch():
    model = made("rkd_distance")
    task = distill.distillation(classification(4), model.terms)
    with pytest.raises(UserError, match="accumulate 2: the loss of this task needs all examples"):
        make_step(model, optax.sgd(0.1), task, schedule=lambda step: 0.1, accumulate=2)
    assert not distill.distillation(classification(4), distill.read("logits")).needs_whole_batch


def test_layers_are_chosen_by_the_size_of_their_images():
    sizes = models.create("cnn_32_64", num_classes=4, widths=(2, 3, 4))
    model = made("attention, features", sizes, network(6, 8), (28, 28, 1))
    assert [term.pairs for term in model.terms] == [
        (("stage1", "stage1"), ("stage2", "stage2")),
        (("stage2", "stage2"),),
    ]
    # A network without images is compared where its head begins.
    model = made("features", models.create("mlp", num_classes=4, dense_widths=(5,)))
    assert model.terms[0].pairs == (("before_head", "before_head"),)


@pytest.mark.slow
def test_a_teacher_may_be_fine_tuned_with_adapters():
    network_ = network(6, 8)
    method = finetune.make_method("adapter:2", network_, SHAPE)
    teacher = finetune.FineTuned(network_, method)
    model, variables = pair("logits, attention", teacher=teacher)
    state, step = step_of(model, variables)
    _, metrics = jax.jit(step)(state, batch_of(ARRAYS, 0, 8))
    assert np.isfinite(np.divide(*metrics["loss"]))
    plain = {name: variables["frozen"]["teacher"][name] for name in ("params", "batch_stats")}
    whole = finetune.variables_checksum(variables["frozen"]["teacher"])
    assert finetune.variables_checksum(plain) != whole


@pytest.mark.slow
def test_pixels_are_distilled_too():
    small, large = (
        models.create("unet", num_classes=4, widths=widths) for widths in ((2, 3), (4, 6))
    )
    model, variables = pair("logits, attention", small, large)
    task = distill.distillation(segmentation(4), model.terms)
    state = create_state(variables, optax.sgd(0.1), jax.random.key(0))
    step = jax.jit(make_step(model, optax.sgd(0.1), task, schedule=lambda step: 0.1))
    class_map = jnp.asarray(ARRAYS.image[:4, :, :, 0] % 4)
    batch = {"image": jnp.asarray(ARRAYS.image[:4]), "class_map": class_map}
    _, metrics = step(state, batch)
    assert metrics["distill_logits"][1] == 4 * 16 * 16
    assert np.isfinite(np.divide(*metrics["loss"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no distillation loss given"),
        ("logit", "unknown distillation loss 'logit': did you mean logits"),
        ("logits(temperature=0)", "temperature=0: give a positive number"),
        ("logits(temp=4)", "unknown argument 'temp': did you mean temperature"),
        ("attention(weight=-1)", "weight=-1: give a positive number"),
        ("attention(power=0)", "power=0: give a positive number"),
        ("logits,logits", "logits is given twice"),
        ("features(layers=a:b:c)", "write a pair as STUDENT:TEACHER"),
        ("features(layers=stage9)", "unknown layer of the student SimpleCNN 'stage9': did you"),
        ("features(layers=stage1:stge1)", "unknown layer of the teacher SimpleCNN 'stge1': did"),
        ("features(layers=stage1:before_head)", "an image cannot be compared with a vector"),
        ("attention(layers=before_head)", "compares images of several pixels"),
    ],
)
def test_bad_losses_are_one_line(text, message):
    with pytest.raises(UserError) as error:
        made(text)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_teacher_that_does_not_fit_is_one_line():
    terms = distill.read("logits")
    teacher = distill.Teacher(network(2), NAMES, SHAPE)
    distill.check_data(teacher, terms, SHAPE, NAMES)
    with pytest.raises(UserError, match="images are 28x28x1, and the teacher's are 16x16x1"):
        distill.check_data(teacher, terms, (28, 28, 1), NAMES)
    with pytest.raises(UserError, match=r"classes are 2 \(a, c\), and the teacher's are 4 \(a, b"):
        distill.check_data(teacher, terms, SHAPE, ("a", "c"))
    # Of layers a teacher of other classes may teach.
    distill.check_data(teacher, distill.read("attention"), SHAPE, ("a", "c"))
    student = models.create("cnn_32_64", num_classes=3, widths=(2,))
    with pytest.raises(UserError, match=r"student's outputs are \[3\], the teacher's \[4\]"):
        made("logits", student)
    with pytest.raises(UserError, match="no stage of MLP is one"):
        made("attention", models.create("mlp", num_classes=4, dense_widths=(5,)))
    blocks = models.create("resnet18", num_classes=4, stem="cifar", remat=True)
    with pytest.raises(UserError, match="--remat"):
        made("attention", blocks)


@pytest.mark.slow
def test_students_and_teachers_of_one_batch_norm_net():
    """A network that ends no stage is compared by the names of its layers."""
    teacher, student = BatchNormNet(num_classes=4), BatchNormNet(num_classes=4)
    model, variables = pair("features(layers=conv2_norm)", student, teacher)
    state, step = step_of(model, variables)
    new, _ = jax.jit(step)(state, batch_of(ARRAYS, 0, 8))
    assert bool((new.batch_stats["conv1_norm"]["mean"] != 0).any())
    assert dataclasses.is_dataclass(model)
