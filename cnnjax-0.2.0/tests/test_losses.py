"""Losses against hand computation, the papers' equations and each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cnnjax import losses
from cnnjax.errors import UserError
from cnnjax.tasks import nt_xent
from cnnjax.tasks.task import Forward
from tests.transforms import Case, assert_covered, check_transforms

LOGITS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32) * 2
LABELS = np.array([0, 3, 2, 2, 1, 0], np.int32)
PIXELS = np.random.default_rng(2).normal(size=(2, 3, 3, 4)).astype(np.float32)
MAP = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) % 4
VIEWS = np.random.default_rng(1).normal(size=(5, 2, 3)).astype(np.float32)
PARAMS = {
    "conv1": {"kernel": np.array([[1.0, -2.0]], np.float32), "bias": np.array([5.0], np.float32)},
    "norm": {"scale": np.array([7.0], np.float32)},
    "head": {"kernel": np.array([[3.0]], np.float32)},
}

CASES = [
    Case("softmax_cross_entropy", losses.softmax_cross_entropy, (LOGITS, LABELS), (0,)),
    Case(
        "softmax_cross_entropy soft",
        lambda logits, labels: losses.softmax_cross_entropy(logits, labels, label_smoothing=0.1),
        (LOGITS, np.abs(LOGITS) / np.abs(LOGITS).sum(1, keepdims=True)),
        (0, 1),
    ),
    Case(
        "sigmoid_binary_cross_entropy",
        losses.sigmoid_binary_cross_entropy,
        (LOGITS[:, :1], LABELS % 2),
        (0,),
    ),
    Case("one_vs_all_cross_entropy", losses.one_vs_all_cross_entropy, (LOGITS, LABELS), (0,)),
    Case("mean_squared_error", losses.mean_squared_error, (LOGITS, LABELS), (0,)),
    Case("lenet1998_map", losses.lenet1998_map, (-np.abs(LOGITS), LABELS), (0,)),
    Case("l1_penalty", losses.l1_penalty, (PARAMS,), (0,)),
    Case("l2_penalty", losses.l2_penalty, (PARAMS,), (0,)),
    Case(
        "weighted",
        losses.weighted(losses.softmax_cross_entropy, [1.0, 2.0, 0.5, 3.0]),
        (LOGITS, LABELS),
        (0,),
    ),
    Case(
        "nt_xent",
        lambda views, mask: nt_xent.nt_xent(views, temperature=0.5, mask=mask),
        (VIEWS, np.arange(5) != 2),
        (0,),
    ),
    Case(
        "nt_xent of a part",
        lambda part, whole, first: nt_xent.nt_xent(part, whole, temperature=0.5, first_index=first),
        (VIEWS[1:3], VIEWS, np.int32(1)),
        (0, 1),
    ),
    Case("pixel_cross_entropy", lambda x: losses.pixel_cross_entropy(x, MAP)[0], (PIXELS,), (0,)),
    Case("dice_loss", lambda x: losses.dice_loss(x, MAP), (PIXELS,), (0,)),
    Case("view_cosines", nt_xent.view_cosines, (VIEWS,)),
    Case("make_loss", losses.make_loss("lenet1998_map", rubbish=2.0), (LOGITS, LABELS), (0,)),
]


def test_every_public_function_has_a_case():
    of_views = {case.name for case in CASES if case.name.startswith(("nt_xent", "view_cosines"))}
    others = [case for case in CASES if case.name not in of_views]
    assert_covered(losses, others, exempt=("at_least_float32",))
    assert_covered(nt_xent, [case for case in CASES if case.name in of_views])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transforms(case):
    check_transforms(case)


def test_softmax_cross_entropy_by_hand():
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).astype(np.float32) + 3
    np.testing.assert_allclose(
        losses.softmax_cross_entropy(logits, np.array([0, 2])), -np.log([0.5, 0.7]), rtol=1e-6
    )
    # Label smoothing 0.3 over three classes: targets 0.8, 0.1, 0.1.
    by_hand = -(0.8 * np.log(0.5) + 0.1 * np.log(0.25) + 0.1 * np.log(0.25))
    smoothed = losses.softmax_cross_entropy(logits[:1], np.array([0]), label_smoothing=0.3)
    np.testing.assert_allclose(smoothed, [by_hand], rtol=1e-6)


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "mean_squared_error", "lenet1998_map"])
def test_integer_and_one_hot_labels_agree(name):
    loss = losses.LOSSES[name]
    one_hot = np.eye(4)[LABELS]
    np.testing.assert_allclose(loss(LOGITS, LABELS), loss(LOGITS, one_hot), rtol=1e-6)
    np.testing.assert_allclose(
        loss(LOGITS, LABELS), loss(LOGITS, one_hot.astype(np.int32)), rtol=1e-6
    )


@settings(max_examples=12, deadline=None)
@given(
    share=st.floats(0, 1, width=32),
    shift=st.floats(-50, 50, width=32),
    smoothing=st.floats(0, 0.875, width=32),
)
def test_softmax_cross_entropy_is_linear_in_targets_and_ignores_shifts(share, shift, smoothing):
    first, second = np.eye(4)[LABELS], np.eye(4)[LABELS[::-1]]

    def loss(targets, logits=LOGITS):
        value = losses.softmax_cross_entropy(logits, targets, label_smoothing=smoothing)
        return np.asarray(value)

    mixed = loss(share * first + (1 - share) * second)
    np.testing.assert_allclose(
        mixed, share * loss(first) + (1 - share) * loss(second), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        mixed, loss(share * first + (1 - share) * second, LOGITS + shift), rtol=1e-4, atol=1e-4
    )


def test_gradient_of_softmax_cross_entropy_is_probabilities_minus_target():
    gradient = jax.grad(lambda logits: losses.softmax_cross_entropy(logits, LABELS).sum())(LOGITS)
    np.testing.assert_allclose(gradient, jax.nn.softmax(LOGITS) - np.eye(4)[LABELS], atol=1e-6)


@settings(max_examples=12, deadline=None)
@given(logits=hnp.arrays(np.float32, 5, elements=st.floats(-100, 100, width=32)))
def test_one_logit_is_a_softmax_over_zero_and_itself(logits):
    labels = np.array([0, 1, 1, 0, 1])
    pair = np.stack([np.zeros_like(logits), logits], axis=1)
    expected = losses.softmax_cross_entropy(pair, labels)
    for given_logits in (logits, logits[:, None]):
        for given_labels in (labels, labels[:, None], labels.astype(bool)):
            value = losses.sigmoid_binary_cross_entropy(given_logits, given_labels)
            assert value.shape == (5,)
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_sigmoid_smoothing_is_softmax_smoothing_of_two_classes():
    pair = np.stack([np.zeros(6, np.float32), LOGITS[:, 0]], axis=1)
    np.testing.assert_allclose(
        losses.sigmoid_binary_cross_entropy(LOGITS[:, 0], LABELS % 2, label_smoothing=0.2),
        losses.softmax_cross_entropy(pair, LABELS % 2, label_smoothing=0.2),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_extreme_logits_stay_finite(name):
    binary = name == "sigmoid_binary_cross_entropy"
    logits = np.array([[1e4], [-1e4]] if binary else [[1e4, -1e4], [-1e4, 1e4]], np.float32)
    value, gradient = jax.value_and_grad(
        lambda logits: losses.LOSSES[name](logits, np.array([0, 0])).sum()
    )(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_low_precision_logits_are_computed_in_float32(name, dtype):
    logits = jnp.asarray(LOGITS[:, :1] if name.startswith("sigmoid") else LOGITS).astype(dtype)
    labels = LABELS % 2
    value = losses.LOSSES[name](logits, labels)
    assert value.dtype == jnp.float32
    np.testing.assert_array_equal(value, losses.LOSSES[name](logits.astype(jnp.float32), labels))


def test_mean_squared_error_by_hand():
    predictions = np.array([[1.0, 2.0, 3.0]], np.float32)
    # (0 + 4 + 9) / 3 for one-hot class 0; (1 + 4 + 0) / 3 for the targets 0, 0, 3.
    np.testing.assert_allclose(
        losses.mean_squared_error(predictions, np.array([0])), [13 / 3], rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.mean_squared_error(predictions, np.array([[0.0, 0.0, 3.0]])), [5 / 3], rtol=1e-6
    )
    for column in (np.array([3.0, 1.0]), np.array([[3.0], [1.0]])):
        np.testing.assert_allclose(
            losses.mean_squared_error(column.astype(np.float32), np.array([1, 1])), [4, 0]
        )


@settings(max_examples=15, deadline=None)
@given(
    distances=hnp.arrays(np.float32, (4, 10), elements=st.floats(0, 200, width=32)),
    rubbish=st.floats(0.0625, 50, width=32),
)
def test_lenet1998_map_is_equation_9(distances, rubbish):
    labels = np.array([0, 3, 9, 9])
    wide = distances.astype(np.float64)
    competition = np.logaddexp(-rubbish, np.logaddexp.reduce(-wide, axis=1))
    expected = wide[np.arange(4), labels] + competition
    value = losses.lenet1998_map(-distances, labels, rubbish=rubbish)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-4)
    assert (np.asarray(value) >= 0).all()


def test_lenet1998_map_without_rubbish_is_softmax_and_with_it_lets_far_classes_go():
    np.testing.assert_allclose(
        losses.lenet1998_map(LOGITS, LABELS, rubbish=1e3),
        losses.softmax_cross_entropy(LOGITS, LABELS),
        rtol=1e-6,
    )
    logits = -np.array([[2.0, 30.0]], np.float32)

    def pull(rubbish):
        def loss(logits):
            return losses.lenet1998_map(logits, np.array([0]), rubbish=rubbish).sum()

        return jax.grad(loss)(logits)

    # The right class is pulled nearer although the wrong one is far; softmax would be content.
    assert pull(0.1)[0, 0] < -0.8
    assert abs(pull(1e3)[0, 0]) < 1e-6
    assert abs(pull(0.1)[0, 1]) < 1e-6


def test_penalties_take_kernels_by_default_and_any_pattern():
    np.testing.assert_allclose(losses.l1_penalty(PARAMS), 6.0)
    np.testing.assert_allclose(losses.l2_penalty(PARAMS), 1 + 4 + 9)
    np.testing.assert_allclose(losses.l2_penalty(PARAMS, ["conv1/.*"]), 1 + 4 + 25)
    gradient = jax.grad(losses.l2_penalty)(PARAMS)
    np.testing.assert_array_equal(gradient["conv1"]["kernel"], 2 * PARAMS["conv1"]["kernel"])
    np.testing.assert_array_equal(gradient["conv1"]["bias"], [0.0])
    gradient = jax.grad(losses.l1_penalty)(PARAMS)
    np.testing.assert_array_equal(gradient["conv1"]["kernel"], [[1.0, -1.0]])


@pytest.mark.parametrize("name", ["softmax_cross_entropy", "mean_squared_error", "lenet1998_map"])
@pytest.mark.parametrize("label", [-1, 4])
def test_class_numbers_out_of_range_are_nan_and_harmless_when_masked(name, label):
    labels = np.array([0, label], np.int32)

    def masked_loss(logits):
        values = losses.LOSSES[name](logits, labels)
        return jnp.where(np.array([True, False]), values, 0.0).sum(), values

    gradient, values = jax.grad(masked_loss, has_aux=True)(LOGITS[:2])
    assert np.isfinite(values[0]) and np.isnan(values[1])
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[1], 0.0)


def test_dense_predictions_keep_their_axes():
    logits = np.broadcast_to(LOGITS[:, None, None], (6, 2, 3, 4))
    labels = np.broadcast_to(LABELS[:, None, None], (6, 2, 3))
    value = losses.softmax_cross_entropy(logits, labels)
    assert value.shape == (6, 2, 3)
    np.testing.assert_allclose(value[:, 1, 2], losses.softmax_cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: losses.softmax_cross_entropy(LOGITS, LABELS[:5]),
            r"class numbers \[6\].*labels \[5\]",
        ),
        (lambda: losses.softmax_cross_entropy(LOGITS, LABELS * 1.0), "must be integers.*float32"),
        (
            lambda: losses.softmax_cross_entropy(LOGITS[:, :1], LABELS),
            "sigmoid_binary_cross_entropy",
        ),
        (
            lambda: losses.softmax_cross_entropy(LOGITS, LABELS, label_smoothing=1.0),
            r"label_smoothing must be in \[0, 1\), not 1.0",
        ),
        (lambda: losses.sigmoid_binary_cross_entropy(LOGITS, LABELS), "num_classes=1"),
        (lambda: losses.sigmoid_binary_cross_entropy(LOGITS[:, :2], LABELS[:4]), "num_classes=1"),
        (lambda: losses.sigmoid_binary_cross_entropy(LOGITS, LOGITS), "num_classes=1"),
        (lambda: losses.mean_squared_error(LOGITS[:, 0], LABELS[:3]), r"\[6\] and targets \[3\]"),
        (lambda: losses.lenet1998_map(LOGITS, LABELS, rubbish=0.0), "rubbish must be positive"),
        (lambda: losses.l2_penalty(PARAMS, ["conv9/.*"]), "conv9"),
        (lambda: losses.make_loss("softmax_crossentropy"), "did you mean softmax_cross_entropy"),
        (
            lambda: losses.make_loss("softmax_cross_entropy", label_smooting=0.1),
            "did you mean label_smoothing",
        ),
        (lambda: losses.make_loss("mean_squared_error", rubbish=1.0), "takes no options"),
    ],
)
def test_bad_input_gets_one_clear_error(call, text):
    with pytest.raises(UserError, match=text) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_weighted_loss_is_the_loss_times_the_weight_of_the_label():
    weighted = losses.weighted(losses.softmax_cross_entropy, [2.0, 0.5, 1.0])
    logits, labels = jnp.asarray([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]), jnp.asarray([0, 1])
    plain = losses.softmax_cross_entropy(logits, labels)
    np.testing.assert_allclose(weighted(logits, labels), plain * jnp.asarray([2.0, 0.5]))
    soft = jnp.asarray([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    plain = losses.softmax_cross_entropy(logits, soft)
    np.testing.assert_allclose(weighted(logits, soft), plain * jnp.asarray([1.5, 0.5]))
    binary = losses.weighted(losses.sigmoid_binary_cross_entropy, [3.0, 1.0])
    one, label = jnp.asarray([[2.0], [2.0]]), jnp.asarray([0, 1])
    plain = losses.sigmoid_binary_cross_entropy(one, label)
    np.testing.assert_allclose(binary(one, label), plain * jnp.asarray([3.0, 1.0]))
    np.testing.assert_allclose(binary(one, label * 1.0), plain * jnp.asarray([3.0, 1.0]))


def test_one_vs_all_takes_each_class_above_the_threshold_for_present():
    logits = jnp.array([[2.0, -1.0, 0.5]])
    # -log sigmoid(x) = log(1 + exp(-x)) where the class is present, log(1 + exp(x)) where not.
    one = np.log1p(np.exp([-2.0, -1.0, 0.5])).mean()
    two = np.log1p(np.exp([-2.0, 1.0, 0.5])).mean()
    loss = losses.make_loss("one_vs_all_cross_entropy")
    np.testing.assert_allclose(loss(logits, jnp.array([0])), [one], rtol=1e-6)
    np.testing.assert_allclose(loss(logits, jnp.array([[0.9, 0.1, 0.0]])), [one], rtol=1e-6)
    np.testing.assert_allclose(loss(logits, jnp.array([[0.7, 0.3, 0.0]])), [two], rtol=1e-6)
    assert np.isnan(loss(logits, jnp.array([3]))[0])


def naive_nt_xent(views, temperature, counted):
    """Equation (1) of Chen et al. 2020, a term at a time; examples that do not count are left."""
    z = {(k, v): views[k, v] for k in np.flatnonzero(counted) for v in range(2)}

    def similarity(i, j):
        return z[i] @ z[j] / np.linalg.norm(z[i]) / np.linalg.norm(z[j]) / temperature

    values = np.full(views.shape[:2], np.nan)
    for k, v in z:
        others = sum(np.exp(similarity((k, v), other)) for other in z if other != (k, v))
        values[k, v] = -np.log(np.exp(similarity((k, v), (k, 1 - v))) / others)
    return values


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("absent", [(), (0, 3)])
def test_nt_xent_is_equation_1(temperature, absent):
    views = np.random.default_rng(2).normal(size=(6, 2, 4))
    counted = ~np.isin(np.arange(6), absent)
    expected = naive_nt_xent(views, temperature, counted)
    with jax.enable_x64(True):
        values = nt_xent.nt_xent(views, temperature=temperature, mask=counted)
    np.testing.assert_allclose(values[counted], expected[counted], rtol=1e-12)
    in_float32 = nt_xent.nt_xent(views.astype(np.float32), temperature=temperature, mask=counted)
    assert in_float32.dtype == jnp.float32
    np.testing.assert_allclose(in_float32[counted], expected[counted], rtol=1e-5)


def test_nt_xent_by_hand():
    # Two examples whose views agree and that are opposite to each other: of the three others one
    # has the cosine 1, two have -1.
    views = np.array([[[1.0, 0], [2, 0]], [[-3, 0], [-1, 0]]])
    expected = -np.log(np.exp(2.0) / (np.exp(2.0) + 2 * np.exp(-2.0)))
    np.testing.assert_allclose(nt_xent.nt_xent(views, temperature=0.5), expected, rtol=1e-5)


def test_nt_xent_of_16_bits_is_computed_in_32():
    views = jnp.asarray(VIEWS, jnp.bfloat16)
    values = nt_xent.nt_xent(views, temperature=0.1)
    np.testing.assert_array_equal(
        values, nt_xent.nt_xent(views.astype(jnp.float32), temperature=0.1)
    )


def test_nt_xent_does_not_depend_on_the_order_of_examples_or_views():
    order = np.array([3, 0, 4, 1, 2])
    values = nt_xent.nt_xent(VIEWS, temperature=0.2)
    np.testing.assert_allclose(
        nt_xent.nt_xent(VIEWS[order], temperature=0.2), values[order], rtol=1e-5
    )
    np.testing.assert_allclose(
        nt_xent.nt_xent(VIEWS[:, ::-1], temperature=0.2), values[:, ::-1], rtol=1e-5
    )


def test_nt_xent_of_parts_is_that_of_the_whole():
    values = nt_xent.nt_xent(VIEWS, temperature=0.2)
    for start, stop in ((0, 2), (2, 5)):
        part = nt_xent.nt_xent(VIEWS[start:stop], VIEWS, temperature=0.2, first_index=start)
        np.testing.assert_allclose(part, values[start:stop], rtol=1e-5)


def test_padding_neither_attracts_nor_repels():
    counted = np.array([True, True, False, True, False])

    def total(views):
        values = nt_xent.nt_xent(views, temperature=0.2, mask=counted)
        return jnp.sum(jnp.where(counted[:, None], values, 0.0))

    value, gradient = jax.value_and_grad(total)(jnp.asarray(VIEWS))
    alone, gradient_alone = jax.value_and_grad(
        lambda views: nt_xent.nt_xent(views, temperature=0.2).sum()
    )(jnp.asarray(VIEWS[counted]))
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    np.testing.assert_allclose(gradient[counted], gradient_alone, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(gradient[~counted], 0.0)


@pytest.mark.parametrize("counted", [[False] * 5, [True, False, False, False, False]])
def test_nt_xent_of_zeros_and_of_nothing_is_finite(counted):
    views = jnp.zeros((5, 2, 3))
    value, gradient = jax.value_and_grad(
        lambda views: nt_xent.nt_xent(views, temperature=0.2, mask=np.array(counted)).sum()
    )(views)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.parametrize("way", ["pmap", "shard_map"])
def test_nt_xent_over_devices_is_that_of_the_whole_batch(way):
    """Embeddings are gathered; losses and gradients are summed over 8 devices."""
    with jax.enable_x64(True):
        generator = np.random.default_rng(3)
        weights = jnp.asarray(generator.normal(size=(5, 4)))
        inputs = jnp.asarray(generator.normal(size=(24, 2, 5)))
        mask = jnp.arange(24) % 7 != 3

        def value_and_gradient(inputs, mask, axis_name=None):
            forward = Forward(lambda *_: None, weights, axis_name=axis_name)
            first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * len(inputs)

            def total(weights):
                views = jnp.tanh(inputs @ weights)
                values = nt_xent.nt_xent(
                    views,
                    forward.gather(views),
                    temperature=0.2,
                    first_index=first,
                    mask=forward.gather(mask),
                )
                return jnp.sum(jnp.where(mask[:, None], values, 0.0))

            result = jax.value_and_grad(total)(weights)
            return result if axis_name is None else jax.lax.psum(result, axis_name)

        def on_each(inputs, mask):
            return value_and_gradient(inputs, mask, "data")

        expected = value_and_gradient(inputs, mask)
        if way == "pmap":
            shards = inputs.reshape(8, 3, 2, 5), mask.reshape(8, 3)
            value, gradient = (x[0] for x in jax.pmap(on_each, axis_name="data")(*shards))
        else:
            mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            split = jax.sharding.PartitionSpec("data")
            whole = jax.sharding.PartitionSpec()
            mapped = jax.shard_map(
                on_each, mesh=mesh, in_specs=(split, split), out_specs=whole, check_vma=False
            )
            value, gradient = jax.jit(mapped)(inputs, mask)
        np.testing.assert_allclose(value, expected[0], rtol=1e-12)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("views", "options", "message"),
    [
        (VIEWS, {"temperature": 0.0}, "temperature 0.0 must be positive"),
        (VIEWS[:, :1], {"temperature": 1.0}, r"\[5, 1, 3\].*two embeddings"),
        (VIEWS[:, 0], {"temperature": 1.0}, r"two embeddings"),
    ],
)
def test_nt_xent_names_what_is_wrong(views, options, message):
    with pytest.raises(UserError, match=message):
        nt_xent.nt_xent(views, **options)
