"""Every public function of steps and augmentations under jit, vmap, eval_shape and grad."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax.augment import change, geometry, pixels, policy, sampling
from cnnjax.data.fields import Boxes, ClassMap, Image
from cnnjax.tasks.classification import classification
from cnnjax.train import predict, step
from cnnjax.train.predict import as_float, make_eval_step, make_predict
from cnnjax.train.state import create_state
from tests.transforms import Case, assert_covered, check_transforms, public_functions

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(0.1, 0.9, (3, 6, 6, 2)).astype(np.float32)
POINTS = GENERATOR.uniform(0.2, 4.8, (2, 6, 6)).astype(np.float32)
CLASSES = GENERATOR.integers(0, 2, (3, 6, 6)).astype(np.uint8)
BOXES = np.array([[1.1, 0.7, 3.2, 4.9]], np.float32)
LINEAR = np.array([[0.9, 0.2], [0.1, 0.8]], np.float32)
KEY = jax.random.key(0)


class Linear(nn.Module):
    """The smallest classifier with the contract of `cnnjax.models`; smooth, for its gradients."""

    @nn.compact
    def __call__(self, image, *, train):
        return nn.Dense(3, name="head")(image.reshape(image.shape[0], -1))


MODEL, OPTIMIZER = Linear(), optax.sgd(0.1, momentum=0.9)
VARIABLES = MODEL.init(KEY, IMAGES, train=False)
STATE = create_state(VARIABLES, OPTIMIZER, KEY, ema=True)
BATCH = {"image": IMAGES, "label": np.array([0, 2, 1], np.int32), "mask": np.array([1, 1, 0], bool)}
TRAIN_STEP = step.make_step(
    MODEL,
    OPTIMIZER,
    classification(3),
    schedule=optax.constant_schedule(0.1),
    augment=policy.make_augment("rotate:5,mixup:1", num_classes=3),
    ema_decay=0.9,
)
EVAL_STEP = make_eval_step(MODEL, classification(3))


def predict_images(variables, image):
    return make_predict(MODEL, classification(3))(variables, {"image": image})


def train_step(state, batch):
    """The step without the key that it returns unchanged: keys are not numbers to compare."""
    state, metrics = TRAIN_STEP(state, batch)
    return state.replace(key=None), metrics


def loss_after_a_step(params, image):
    state = STATE.replace(params=params)
    new_state, _ = TRAIN_STEP(state, BATCH | {"image": image})
    return EVAL_STEP({"params": new_state.params}, BATCH)["loss"][0]


STEP_CASES = [
    Case("as_float", as_float, (IMAGES,), (0,)),
    Case("as_float uint8", as_float, ((255 * IMAGES).astype(np.uint8),)),
    Case("make_step", train_step, (STATE, BATCH)),
    Case("make_step gradient", loss_after_a_step, (STATE.params, IMAGES), (0, 1)),
    Case("make_eval_step", EVAL_STEP, (VARIABLES, BATCH)),
    Case(
        "make_eval_step gradient",
        lambda params, image: EVAL_STEP({"params": params}, BATCH | {"image": image})["loss"][0],
        (VARIABLES["params"], IMAGES),
        (0, 1),
    ),
    Case("make_predict", predict_images, (VARIABLES, IMAGES), (0, 1)),
]


def of_image(name, function):
    """A case of one augmentation, differentiated with respect to the image."""
    return Case(name, function, (KEY, IMAGES[0]), (1,))


def all_of(move, image, classes, boxes):
    return move.image(image), move.class_map(classes, 255), move.boxes(boxes)


AUGMENT_CASES = [
    Case(
        "normalize",
        lambda image: pixels.normalize(image, (0.4, 0.5), (0.2, 0.3)),
        (IMAGES,),
        (0,),
        # It is linear, and computes in float32.
        eps=0.1,
    ),
    Case(
        "apply_per_image",
        lambda key, images: change.apply_per_image(key, images, geometry.random_flip()),
        (KEY, IMAGES),
        (1,),
    ),
    of_image("compose", change.compose(geometry.random_flip(), geometry.random_shift(1))),
    of_image("random_flip", geometry.random_flip()),
    of_image("random_shift", geometry.random_shift(2)),
    of_image("pad_and_crop", geometry.pad_and_crop(2)),
    of_image("random_resized_crop", geometry.random_resized_crop(0.3)),
    of_image("random_elastic", geometry.random_elastic(5.0, 2.0)),
    of_image("on_floats", change.on_floats(lambda key, image: image**2)),
    Case(
        "warp",
        lambda image, move: sampling.warp(image, jnp.array([[0.9, 0.2], [0.1, 0.8]]), move),
        (IMAGES[0], np.array([0.3, -0.4], np.float32)),
        (0, 1),
    ),
    Case(
        "apply_by_kind",
        lambda key, images, classes, boxes: change.apply_by_kind(
            key,
            {"image": images, "classes": classes, "boxes": boxes},
            change.compose(geometry.random_flip(), geometry.random_affine(10.0)),
            {"image": Image(), "classes": ClassMap(2), "boxes": Boxes(1)},
        ),
        (KEY, IMAGES, CLASSES, np.tile(BOXES, (3, 1, 1))),
    ),
    Case(
        "affine_move",
        lambda image, classes, boxes, move: all_of(
            geometry.affine_move((6, 6), LINEAR, move), image, classes, boxes
        ),
        (IMAGES[0], CLASSES[0], BOXES, np.array([0.3, -0.4], np.float32)),
    ),
    Case(
        "sampled_move",
        lambda image, classes, boxes, points: all_of(
            geometry.sampled_move(points[0], points[1]), image, classes, boxes
        ),
        (IMAGES[0], CLASSES[0], BOXES, POINTS),
    ),
    Case("sample_nearest", sampling.sample_nearest, (CLASSES[0], *POINTS)),
    Case(
        "places",
        lambda move: sampling.places((6, 6), LINEAR, move),
        (np.array([0.3, -0.4], np.float32),),
        (0,),
    ),
    Case(
        "warp_boxes",
        lambda boxes, move: sampling.warp_boxes(boxes, (6, 6), LINEAR, move),
        (BOXES, np.array([0.3, -0.4], np.float32)),
        (0, 1),
    ),
    Case("sampled_boxes", sampling.sampled_boxes, (BOXES, *POINTS)),
    Case("is_box", sampling.is_box, (BOXES,)),
    Case("clipped_boxes", lambda boxes: sampling.clipped_boxes(boxes, (6, 4)), (BOXES,)),
    Case("padded", lambda image: sampling.padded(image, 2, None), (IMAGES[0],), (0,)),
    of_image("random_affine", geometry.random_affine(20.0, (0.8, 1.2), 1.0, 10.0)),
    Case(
        "sample_bilinear",
        lambda image, points: sampling.sample_bilinear(image, points[0], points[1]),
        (IMAGES[0], POINTS),
        (0, 1),
    ),
]


# What other steps are made of too: the cases of `make_step` call each of them.
PARTS = (
    "image_keys",
    "positions",
    "changed",
    "make_apply",
    "finish_step",
    "with_axis",
    "float32_at_least",
    "predicted",
    "predicted_outputs",
)


# They check, or take and return functions; `compose` calls `chain`.
NOT_OF_ARRAYS = {
    "chain",
    "check_kinds",
    "check_magnitude",
    "check_probability",
    "size_of",
}


def test_no_public_function_is_left_out():
    steps = public_functions(step) | public_functions(predict)
    assert steps == {case.name.split(" ")[0] for case in STEP_CASES} | set(PARTS)
    for module in (change, geometry, pixels, sampling):
        functions = public_functions(module)
        cases = [case for case in AUGMENT_CASES if case.name.split(" ")[0] in functions]
        assert_covered(module, cases, exempt=NOT_OF_ARRAYS & functions)


@pytest.mark.parametrize("case", STEP_CASES + AUGMENT_CASES, ids=str)
def test_transforms(case):
    check_transforms(case)


def test_magnitudes_of_an_affine_map_have_gradients():
    def turned(angle):
        rows, columns = jnp.meshgrid(jnp.arange(6.0) - 2.5, jnp.arange(6.0) - 2.5, indexing="ij")
        y = jnp.cos(angle) * rows - jnp.sin(angle) * columns + 2.5
        x = jnp.sin(angle) * rows + jnp.cos(angle) * columns + 2.5
        return jnp.sum(sampling.sample_bilinear(jnp.asarray(IMAGES[0]), y, x) ** 2)

    assert jnp.isfinite(jax.grad(turned)(0.1))
    assert jax.grad(turned)(0.1) != 0
