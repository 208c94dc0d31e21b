"""Closed forms for models whose maps are known, and what holds for every method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from cnnjax import explain, models
from cnnjax.errors import UserError
from cnnjax.models import stage_output

KEY = jax.random.key(0)
IMAGE = jax.random.normal(jax.random.key(1), (2, 6, 5, 3))
LABEL = jnp.array([2, 0])


class Linear(nn.Module):
    """Logits that are linear in the image."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, image, *, train=False):
        return nn.Dense(self.num_classes, name="head")(image.reshape(len(image), -1))


class TwoLayers(nn.Module):
    """A convolution, ReLU, the mean of all pixels, a dense layer."""

    @nn.compact
    def __call__(self, image, *, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(image))
        x = stage_output(self, "stage1", x)
        return nn.Dense(3, name="head")(jnp.mean(x, (1, 2)))


LINEAR = Linear()
LINEAR_VARIABLES = LINEAR.init(KEY, IMAGE)
MODEL = TwoLayers()
VARIABLES = MODEL.init(KEY, IMAGE)
TARGET = explain.class_score(LABEL)


def of_classes():
    """The weight of each pixel of the linear model for the class of each image."""
    kernel = LINEAR_VARIABLES["params"]["head"]["kernel"]
    return kernel.T[LABEL].reshape(IMAGE.shape)


def test_gradient_of_a_linear_model_is_its_kernel():
    run = functools.partial(explain.gradient, LINEAR, LINEAR_VARIABLES, IMAGE, TARGET)
    np.testing.assert_allclose(run(channels="keep"), of_classes(), rtol=1e-6)
    np.testing.assert_allclose(run(channels="sum"), of_classes().sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(), jnp.abs(of_classes()).max(-1), rtol=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        explain.gradient_times_input,
        explain.integrated_gradients,
        functools.partial(explain.integrated_gradients, steps=1),
        functools.partial(
            explain.expected_gradients, KEY, references=jnp.zeros((1, *IMAGE.shape[1:])), samples=3
        ),
    ],
)
def test_contributions_to_a_linear_model_are_products(method):
    result = method(LINEAR, LINEAR_VARIABLES, IMAGE, TARGET)
    np.testing.assert_allclose(result, (IMAGE * of_classes()).sum(-1), rtol=1e-4, atol=1e-5)


def test_noise_does_not_change_the_gradient_of_a_linear_model():
    smooth = explain.smooth_grad(KEY, LINEAR, LINEAR_VARIABLES, IMAGE, TARGET, samples=4)
    np.testing.assert_allclose(
        smooth, explain.gradient(LINEAR, LINEAR_VARIABLES, IMAGE, TARGET), rtol=1e-5
    )


def test_occlusion_of_one_pixel_of_a_linear_model_is_its_contribution():
    run = functools.partial(explain.occlusion, LINEAR, LINEAR_VARIABLES, IMAGE, TARGET)
    expected = (IMAGE * of_classes()).sum(-1)
    np.testing.assert_allclose(run(window=1, stride=1), expected, rtol=1e-3, atol=1e-5)
    shifted = ((IMAGE - 0.5) * of_classes()).sum(-1)
    np.testing.assert_allclose(run(window=1, stride=1, baseline=0.5), shifted, rtol=1e-3, atol=1e-5)


def test_occlusion_averages_the_windows_that_hold_a_pixel():
    result = explain.occlusion(LINEAR, LINEAR_VARIABLES, IMAGE, TARGET, window=(2, 2), stride=1)
    product = np.asarray((IMAGE * of_classes()).sum(-1))
    windows = np.lib.stride_tricks.sliding_window_view(product, (2, 2), (1, 2)).sum((-1, -2))
    # The pixel (1, 2) is in four windows, the corner in one.
    np.testing.assert_allclose(result[:, 1, 2], windows[:, 0:2, 1:3].mean((1, 2)), rtol=1e-3)
    np.testing.assert_allclose(result[:, 0, 0], windows[:, 0, 0], rtol=1e-3)


def test_rise_finds_the_only_pixel_that_counts():
    """The expectation is the target given that the pixel is shown, which is half more for it."""
    kernel = jnp.zeros((6 * 5 * 3, 3)).at[(2 * 5 + 3) * 3, :].set(1.0)
    variables = {"params": {"head": {"kernel": kernel, "bias": jnp.zeros(3)}}}
    ones = jnp.ones_like(IMAGE)
    run = functools.partial(explain.rise, KEY, LINEAR, variables, ones, TARGET)
    result = run(samples=400, cells=5)
    place = np.unravel_index(np.argmax(result[0]), result[0].shape)
    assert abs(place[0] - 2) <= 1
    assert abs(place[1] - 3) <= 1


def test_grad_cam_by_hand():
    """Behind the stage only a mean and a dense layer follow: the weights are those of the class."""
    x = nn.relu(nn.Conv(4, (3, 3)).apply({"params": VARIABLES["params"]["conv"]}, IMAGE))
    weights = VARIABLES["params"]["head"]["kernel"].T[LABEL] / 30
    expected = jnp.einsum("bhwk,bk->bhw", x, weights)
    run = functools.partial(explain.grad_cam, MODEL, VARIABLES, IMAGE, TARGET)
    np.testing.assert_allclose(run(relu=False), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(run(), jnp.maximum(expected, 0), rtol=1e-4, atol=1e-6)
    positive = jnp.einsum("bhwk,bk->bhw", x, jnp.maximum(weights, 0))
    layer = explain.layer_cam(MODEL, VARIABLES, IMAGE, TARGET)
    np.testing.assert_allclose(layer, positive, rtol=1e-4, atol=1e-6)
    # Where all gradients of a channel are one number g, the share of each pixel is 1 / (2 + A g).
    shares = 1 / (2 + x.sum((1, 2)) * weights)
    plus = jnp.einsum("bhwk,bk->bhw", x, 30 * shares * jnp.maximum(weights, 0))
    result = explain.grad_cam_plus_plus(MODEL, VARIABLES, IMAGE, TARGET)
    np.testing.assert_allclose(result, jnp.maximum(plus, 0), rtol=1e-4, atol=1e-6)


def test_guided_backpropagation_by_hand():
    conv = nn.Conv(4, (3, 3))

    def before(image):
        return conv.apply({"params": VARIABLES["params"]["conv"]}, image)

    x, pullback = jax.vjp(before, IMAGE)
    weights = VARIABLES["params"]["head"]["kernel"].T[LABEL] / 30
    passed = jnp.where(x > 0, jnp.maximum(weights, 0)[:, None, None], 0)
    result = explain.guided_backpropagation(MODEL, VARIABLES, IMAGE, TARGET, channels="keep")
    np.testing.assert_allclose(result, pullback(passed)[0], rtol=1e-4, atol=1e-6)


def test_guided_backpropagation_needs_a_relu():
    with pytest.raises(UserError, match="no ReLU"):
        explain.guided_backpropagation(LINEAR, LINEAR_VARIABLES, IMAGE, TARGET)


@pytest.mark.slow
def test_guided_backpropagation_sees_what_is_fused():
    """On a CPU LeNet's convolution, activation and pool are one function."""
    model = models.create("lenet5", num_classes=10, activation="relu", pool="max")
    image = jax.random.normal(KEY, (2, 28, 28, 1))
    variables = model.init(KEY, image)
    run = functools.partial(explain.guided_backpropagation, model, variables, image)
    guided = run(explain.class_score(3), channels="keep")
    plain = explain.gradient(model, variables, image, explain.class_score(3), channels="keep")
    assert float(jnp.abs(guided - plain).max()) > 0.01


@pytest.mark.parametrize("layer", ["stage1", "conv"])
def test_an_offset_is_added_and_has_the_gradient_of_the_activation(layer):
    outputs, _ = explain.tap(MODEL, VARIABLES, IMAGE, [layer])
    np.testing.assert_allclose(outputs, MODEL.apply(VARIABLES, IMAGE), rtol=1e-6)
    with jax.enable_x64(True):
        variables, image = jax.tree.map(lambda x: x.astype(np.float64), (VARIABLES, IMAGE))
        arguments = MODEL, variables, image
        activations, gradients = explain.activations_and_gradients(*arguments, TARGET, [layer])
        step = 1e-6 * jax.random.normal(KEY, activations[layer].shape)
        plus, minus = (
            TARGET(explain.tap(*arguments, [layer], {layer: sign * step})[0]) for sign in (1, -1)
        )
        slope = jnp.sum(gradients[layer] * step, (1, 2, 3))
        np.testing.assert_allclose((plus - minus) / 2, slope, rtol=1e-6)


METHODS = {
    "gradient": explain.gradient,
    "integrated_gradients": functools.partial(explain.integrated_gradients, steps=3),
    "smooth_grad": functools.partial(explain.smooth_grad, KEY, samples=2),
    "guided_backpropagation": explain.guided_backpropagation,
    "grad_cam": explain.grad_cam,
    "grad_cam_plus_plus": explain.grad_cam_plus_plus,
    "layer_cam": explain.layer_cam,
    "score_cam": explain.score_cam,
    "occlusion": functools.partial(explain.occlusion, window=3, stride=2),
    "rise": functools.partial(explain.rise, KEY, samples=3, cells=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_all_classes_under_vmap_and_jit_are_one_by_one(name):
    method = METHODS[name]

    def of_class(label):
        return method(MODEL, VARIABLES, IMAGE, explain.class_score(label))

    together = jax.jit(jax.vmap(of_class))(jnp.arange(3))
    assert together.shape == (3, *IMAGE.shape[:3])
    for label in range(3):
        np.testing.assert_allclose(together[label], of_class(label), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_an_image_is_explained_alone(name):
    both = METHODS[name](MODEL, VARIABLES, IMAGE, explain.class_score(1))
    # The noise of the second image is another where it is the first.
    alone = METHODS[name](MODEL, VARIABLES, IMAGE[:1], explain.class_score(1))
    if name != "smooth_grad":
        np.testing.assert_allclose(both[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: explain.grad_cam(MODEL, VARIABLES, IMAGE, TARGET, layer="stage2"), "stage1"),
        (lambda: explain.grad_cam(MODEL, VARIABLES, IMAGE, TARGET, layer="head"), "no image"),
        (lambda: explain.grad_cam(LINEAR, LINEAR_VARIABLES, IMAGE, TARGET), "convolutions"),
        (lambda: explain.gradient(MODEL, VARIABLES, IMAGE, explain.class_score(3)), "no class 3"),
        (
            lambda: explain.gradient(
                MODEL, VARIABLES, IMAGE, explain.class_score(jnp.array([0, 7]))
            ),
            "no class 7: the network has 0 to 2",
        ),
        (
            lambda: explain.gradient(MODEL, VARIABLES, IMAGE, explain.class_score(jnp.arange(3))),
            "one for each of 2 images",
        ),
        (lambda: explain.gradient(MODEL, VARIABLES, IMAGE, explain.class_score(1.0)), "whole"),
        (
            lambda: explain.gradient(LINEAR, LINEAR_VARIABLES, IMAGE[:, 1:], TARGET),
            "does not take images of 5 x 5 x 3: its layer head",
        ),
        (
            lambda: explain.grad_cam(MODEL, VARIABLES, IMAGE[..., :1], TARGET),
            "does not take images of 6 x 5 x 1: its layer conv",
        ),
        (lambda: explain.gradient(MODEL, VARIABLES, IMAGE, lambda x: x), "one number"),
        (lambda: explain.gradient(MODEL, VARIABLES, IMAGE[0], TARGET), "batch, height"),
        (
            lambda: explain.gradient(MODEL, VARIABLES, IMAGE.astype(jnp.uint8), TARGET),
            "float",
        ),
        (lambda: explain.gradient(MODEL, VARIABLES, IMAGE, TARGET, channels="all"), "keep"),
        (lambda: explain.occlusion(MODEL, VARIABLES, IMAGE, TARGET, window=9), "larger"),
        (lambda: explain.occlusion(MODEL, VARIABLES, IMAGE, TARGET, stride=-1), "positive"),
        (lambda: explain.integrated_gradients(MODEL, VARIABLES, IMAGE, TARGET, steps=0), "steps"),
        (lambda: explain.rise(KEY, MODEL, VARIABLES, IMAGE, TARGET, kept=1.5), "kept"),
        (
            lambda: explain.expected_gradients(
                KEY, MODEL, VARIABLES, IMAGE, TARGET, references=jnp.zeros((1, 2, 2, 3))
            ),
            "references",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, text):
    with pytest.raises(UserError, match=text):
        call()


def test_classes_are_read_by_name_or_number():
    names = ["1", "3", "cat"]
    assert explain.targets.read_classes(["3", "cat", "0", "cat"], names) == [1, 2, 0]
    for word, text in (("7", "no class 7"), ("-1", "no class -1"), ("cot", "did you mean cat")):
        with pytest.raises(UserError, match=text):
            explain.targets.read_classes([word], names)


def test_references_may_be_numpys_and_any_number():
    references = np.asarray(jax.random.normal(KEY, (5, *IMAGE.shape[1:])), np.float64)

    @jax.jit
    def run(image):
        arguments = LINEAR, LINEAR_VARIABLES, image, TARGET
        return explain.expected_gradients(KEY, *arguments, references=references, samples=2000)

    expected = ((IMAGE - references.mean(0)) * of_classes()).sum(-1)
    np.testing.assert_allclose(run(IMAGE), expected, atol=0.15)


def test_targets():
    logits = jnp.array([[1.0, 3.0, 2.0], [4.0, 0.0, 5.0]])
    np.testing.assert_array_equal(explain.class_difference(1, 2)(logits), [1.0, -5.0])
    np.testing.assert_array_equal(explain.predicted_class(logits), [3.0, 5.0])
    np.testing.assert_array_equal(explain.class_score(0)(jnp.array([[2.0]])), [-2.0])
    maps = jnp.arange(24.0).reshape(2, 2, 2, 3)
    np.testing.assert_array_equal(explain.pixel_score(2, 1, 0)(maps), [8.0, 20.0])
    with pytest.raises(UserError, match="outside"):
        explain.pixel_score(2, 2, 0)(maps)
