"""Quantized networks: integer sums against NumPy, plans, reports, mixtures, other runtimes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import compress, models, ops
from cnnjax.compress.quantization import card, integers, quantized
from cnnjax.compress.quantization.mixed import divergences, mixtures
from cnnjax.compress.quantization.quantized import LayerPlan
from cnnjax.errors import UserError
from cnnjax.trees import named_leaves
from tests.tiny import BatchNormNet

RNG = np.random.default_rng(0)
SHAPE = (28, 28, 1)


def numpy_convolution(q, codes, strides, pads, groups):
    """The definition, in int32: sums over the window and the channels of the group."""
    q, codes = q.astype(np.int32), codes.astype(np.int32)
    padded = np.pad(q, [(0, 0), *pads, (0, 0)])
    height, width, per_group, features = codes.shape
    rows = (padded.shape[1] - height) // strides[0] + 1
    columns = (padded.shape[2] - width) // strides[1] + 1
    result = np.zeros((len(q), rows, columns, features), np.int32)
    for feature in range(features):
        start = feature // (features // groups) * per_group
        for row in range(rows):
            for column in range(columns):
                y, x = row * strides[0], column * strides[1]
                window = padded[:, y : y + height, x : x + width, start : start + per_group]
                product = window * codes[..., feature]
                result[:, row, column, feature] = product.sum((1, 2, 3), dtype=np.int32)
    return result


@pytest.mark.parametrize(
    ("groups", "strides", "channels", "features"),
    [(1, (1, 1), 3, 4), (1, (2, 2), 70, 2), (4, (1, 1), 4, 8), (2, (2, 1), 6, 4)],
)
def test_integer_convolutions_are_those_of_int32(groups, strides, channels, features):
    q = RNG.integers(-255, 256, size=(2, 7, 6, channels))
    codes = RNG.integers(-127, 128, size=(3, 3, channels // groups, features))
    bias = RNG.integers(-(2**20), 2**20, size=features)
    module = ops.Conv(
        features,
        (3, 3),
        strides=strides,
        padding=((1, 1), (0, 2)),
        feature_group_count=groups,
    )
    found = quantized.accumulate(
        module,
        jnp.asarray(q, jnp.float32),
        jnp.asarray(codes, jnp.float32),
        jnp.asarray(bias, jnp.int32),
        LayerPlan(8, 8),
    )
    wanted = numpy_convolution(q, codes, strides, ((1, 1), (0, 2)), groups) + bias
    assert np.array_equal(np.asarray(found, np.int64), wanted)


def test_sums_beyond_what_float32_holds_are_exact():
    # Odd sums above 2^24: every one of them would be rounded as a float32 sum.
    q = np.full((3, 3001), 255)
    q[1] -= RNG.integers(0, 200, 3001)
    codes = np.full((3001, 2), 127)
    codes[:, 1] = RNG.integers(-127, 128, 3001)
    module = nn.Dense(2)
    plan = LayerPlan(8, 8)
    whole = jnp.asarray(q, jnp.float32), jnp.asarray(codes, jnp.float32)
    sums = quantized.accumulate(module, *whole, None, plan)
    wanted = q.astype(np.int32) @ codes.astype(np.int32)
    assert wanted[0, 0] > 2**24
    # int32 goes to float32 once, at the end.
    assert np.array_equal(np.asarray(sums), wanted.astype(np.float32))


def test_a_quantized_layer_is_what_its_formula_says():
    module = ops.ConvPool(3, (3, 3), padding="VALID", activation=jnp.tanh, pool="average")
    kernel = RNG.normal(size=(3, 3, 2, 3)).astype(np.float32)
    bias = RNG.normal(size=3).astype(np.float32)
    x = RNG.uniform(-1, 2, size=(2, 8, 8, 2)).astype(np.float32)
    scale, zero = integers.activation_scale(-1, 2, 8)
    weight_scale = np.asarray(integers.weight_scale(jnp.asarray(kernel), 8))
    codes = np.asarray(integers.quantize_weight(kernel, weight_scale, 8))
    stored = {
        "kernel": codes,
        "kernel_scale": weight_scale,
        "input_scale": np.float32(scale),
        "bias": bias,
    }
    plan = LayerPlan(8, 8, zero)
    found = quantized.integer_layer(module, jnp.asarray(x), plan, stored)
    q = np.clip(np.round(x / np.float32(scale)) + zero, -128, 127) - zero
    product = np.float32(scale) * weight_scale
    sums = numpy_convolution(q, codes, (1, 1), ((0, 0), (0, 0)), 1)
    sums = (sums + np.round(bias / product)) * product
    wanted = np.tanh(sums).reshape(2, 3, 2, 3, 2, 3).mean((2, 4))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@functools.cache
def tiny():
    model = BatchNormNet()
    images = RNG.uniform(0, 1, size=(64, *SHAPE)).astype(np.float32)
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), images[:1])
    statistics = jax.tree.map(
        lambda leaf: leaf + 0.1 * jnp.arange(leaf.size), variables["batch_stats"]
    )
    return model, {**variables, "batch_stats": statistics}, images


@functools.cache
def quantize(text, images=True):
    model, variables, batch = tiny()
    scheme = compress.read_scheme(text)
    return compress.quantize(
        model, variables, SHAPE, scheme, images=[batch[:32], batch[32:]] if images else ()
    )


def logits(model, variables):
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False))
    return np.asarray(apply(variables, tiny()[2]))


@pytest.mark.slow
def test_eight_bits_change_little_and_four_more():
    model, variables, _ = tiny()
    plain = logits(model, variables)
    errors = []
    for text in ("int8", "integer(4, 4)"):
        result = quantize(text)
        errors.append(np.abs(logits(result.model, result.variables) - plain).max())
    assert errors[0] < 0.03 * np.abs(plain).max() < errors[1]


def test_the_report_names_every_layer():
    result = quantize("int8(skip=head)")
    rows = {row.path: row for row in result.rows}
    assert [*rows] == ["conv1", "conv2", "head"]
    assert rows["head"].note == "skipped as asked" and rows["head"].sqnr is None
    assert rows["conv1"].note == "conv1_norm folded" and rows["conv1"].sqnr > 30
    # 3x3 weights of 4 to 8 channels, a bias and a scale for each channel, the input's scale.
    assert rows["conv2"].bytes_after == 9 * 4 * 8 + 8 * 4 + 8 * 4 + 4
    table = compress.report_table(result.rows)
    assert "2 of 3 layers with parameters are quantized" in table and "conv1_norm folded" in table


@pytest.mark.slow
def test_weights_alone_need_no_images_and_take_a_quarter_or_less():
    model, variables, _ = tiny()
    kernels = sum(
        leaf.nbytes for path, leaf in named_leaves(variables["params"]).items() if "kernel" in path
    )
    for text, factor in (("int8(weights_only=true)", 4), ("int4", 8), ("bfloat16", 2)):
        result = quantize(text, images=False)
        stored = named_leaves(result.variables["params"])
        size = sum(leaf.nbytes for path, leaf in stored.items() if path.endswith("kernel"))
        assert size == kernels / factor
        largest = np.abs(logits(model, variables)).max()
        error = np.abs(logits(result.model, result.variables) - logits(model, variables)).max()
        assert error < (0.3 if text == "int4" else 0.03) * largest


@pytest.mark.slow
def test_a_corrected_bias_has_no_mean_error_left():
    text = "integer(3, 8, layers=head, clip=absmax, calibration=minmax)"
    plain, corrected = quantize(text), quantize(text.replace(")", ", correct_bias=true)"))
    wanted = logits(*tiny()[:2]).mean(0)
    before = np.abs(logits(plain.model, plain.variables).mean(0) - wanted).max()
    after = np.abs(logits(corrected.model, corrected.variables).mean(0) - wanted).max()
    assert after < 1e-3 < before


def test_derivatives_of_a_quantized_network_are_those_of_the_network():
    model, variables, images = tiny()
    result = quantize("int8")

    def of_logit(model, variables, image):
        return model.apply(variables, image, train=False)[:, 3].sum()

    def gradient(model, variables):
        return jax.jit(jax.grad(lambda image: of_logit(model, variables, image)))(images[:8])

    plain, codes = gradient(model, variables), gradient(result.model, result.variables)
    correlation = np.corrcoef(np.ravel(plain), np.ravel(codes))[0, 1]
    assert correlation > 0.9


def test_what_other_runtimes_are_given_computes_the_same():
    result = quantize("int8")
    found = compress.quantization_parameters(result.model, result.variables)
    head = found["head"]
    low, high = head["input_range"]
    assert head["kernel"].dtype == np.int8 and low <= 0 < high and head["folded"] is None
    assert found["conv1"]["folded"] == "conv1_norm"
    x = RNG.uniform(0, high, size=(5, 8)).astype(np.float32)
    codes = np.clip(np.round(x / head["input_scale"]) + head["input_zero"], -128, 127)
    sums = (codes - head["input_zero"]).astype(np.int32) @ head["kernel"].astype(np.int32)
    wanted = (sums + head["bias_codes"]) * (head["input_scale"] * head["kernel_scale"])
    plan = dict(result.model.layers)["head"]
    own = result.variables["params"]["head"]
    module = nn.Dense(10)
    np.testing.assert_allclose(
        quantized.integer_layer(module, jnp.asarray(x), plan, own), wanted, rtol=1e-5, atol=1e-6
    )


def test_dequantized_weights_are_within_half_a_step():
    result = quantize("int8")
    plain, variables = compress.dequantized(result.model, result.variables)
    folded, before = compress.fold_batch_norm(*tiny()[:2], SHAPE)
    scale = result.variables["params"]["conv2"]["kernel_scale"]
    error = np.abs(variables["params"]["conv2"]["kernel"] - before["params"]["conv2"]["kernel"])
    assert plain.folded == folded.folded and (error <= np.asarray(scale) / 2 * 1.001).all()


def test_the_card_builds_the_model_again():
    result = quantize("int8(symmetric=true, skip=conv1)")
    again = card.read_back(tiny()[0], {"quantize": card.describe(result.model)})
    assert again == result.model
    with pytest.raises(UserError, match="does not say how"):
        card.read_back(tiny()[0], {"quantize": {"layers": {}}})


@pytest.mark.slow
def test_a_trained_form_computes_what_its_codes_do():
    model, variables, images = tiny()
    prepared = compress.prepare(
        model, variables, SHAPE, compress.read_scheme("int8"), images=[images]
    )
    from cnnjax.compress.quantization import lsq

    steps = lsq.with_steps(prepared.variables["params"], prepared.plans, prepared.input_scales)
    fake = compress.FakeQuantized(model, prepared.model.folded, tuple(prepared.plans.items()))
    trained = {**prepared.variables, "params": steps}
    codes, stored = fake.quantized(trained)
    of_codes = logits(codes, stored)
    # A bias is rounded in the one alone: by half a unit of the sums.
    assert np.abs(logits(fake, trained) - of_codes).max() < 0.02 * np.abs(of_codes).max()
    fresh = jax.eval_shape(lambda: fake.init(jax.random.key(0), images[:1]))
    forms = {path: leaf.shape for path, leaf in named_leaves(fresh).items()}
    assert forms == {path: leaf.shape for path, leaf in named_leaves(trained).items()}


@pytest.mark.slow
def test_mixtures_get_smaller_one_layer_at_a_time_and_keep_their_bound():
    model, variables, images = tiny()
    scheme = compress.read_scheme("mixed(max_size=0.2)")
    prepared = compress.prepare(model, variables, SHAPE, scheme, images=[images])
    simulation = compress.simulate(prepared, clip="mse", normalize=jnp.asarray)
    costs = divergences(simulation, [images])
    assert all(cost[2] > cost[8] >= 0 for cost in costs.values())
    found = mixtures(prepared, costs)
    sizes = [compress.stored_bytes(prepared.variables["params"], plans) for plans in found]
    assert len(found) == 1 + 2 * 3 and sizes == sorted(sizes, reverse=True)
    whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(prepared.variables["params"]))
    bound = sizes[3] / whole
    plans = compress.mixed_precision(simulation, [images], max_size=bound)
    assert plans == found[3]
    result = compress.quantize(model, variables, SHAPE, scheme, images=[images], plans=plans)
    bits = {row.path: row.weights for row in result.rows}
    assert bits == {path: f"int{plan.weights}" for path, plan in plans.items()}
    with pytest.raises(UserError, match="the smallest mixture"):
        compress.mixed_precision(simulation, [images], max_size=0.01)
    labels = [simulation.of({}, images).argmax(-1)]
    kept = compress.mixed_precision(
        simulation, [images], max_drop=5.0, validation=([images], labels)
    )
    assert simulation.accuracy(kept, [images], labels) >= 0.95


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int7", "did you mean int"),
        ("int8(calibration=percentil)", "did you mean percentile"),
        ("integer(9)", "give 2 to 8 bits"),
        ("integer(8, 1)", "give 2 to 8 bits"),
        ("int8(samples=0)", "give 1 or more"),
        ("int8(sample=3)", "did you mean samples"),
        ("int8(clip=best)", "did you mean absmax"),
        ("mixed", "give one bound"),
        ("mixed(max_size=2)", "a fraction below 1"),
    ],
)
def test_schemes_that_are_wrong_are_told(text, words):
    with pytest.raises(UserError, match=words):
        compress.read_scheme(text)


def test_layers_and_images_that_do_not_fit_are_told():
    with pytest.raises(UserError, match=r"layer pattern.*'hea': did you mean head"):
        quantize("int8(skip=hea)")
    with pytest.raises(UserError, match="no layer is left"):
        quantize("int8(layers=head, skip=head)")
    with pytest.raises(UserError, match="no images to calibrate on"):
        quantize("int8", images=False)
    model, variables, images = tiny()
    with pytest.raises(UserError, match="are 14x28x1, but the network takes 28x28x1"):
        compress.quantize(
            model, variables, SHAPE, compress.read_scheme("int8"), images=[images[:, :14]]
        )


def test_codes_agree_with_qwix():
    qwix = pytest.importorskip("qwix")
    kernel = jnp.asarray(RNG.normal(size=(30, 7)), jnp.float32)
    scale = integers.weight_scale(kernel, 8)
    theirs = qwix.quantize(kernel, jnp.int8, channelwise_axes=[1])
    # Theirs divides by 127.5: a step finer, and codes up to 127 all the same.
    ratio = np.ravel(theirs.scale) / np.asarray(scale)
    assert np.ptp(ratio) < 1e-5
    again = integers.quantize_weight(kernel, jnp.ravel(theirs.scale), 8)
    apart = np.abs(np.asarray(again, int) - np.asarray(theirs.qvalue, int))
    # They multiply by the inverse of the scale.
    assert apart.max() <= 1 and apart.mean() < 0.02


@pytest.mark.slow
def test_sums_are_those_of_onnx_runtime():
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    zero, groups = -37, 2
    codes = RNG.integers(-128, 128, size=(2, 9, 9, 6))
    kernel = RNG.integers(-127, 128, size=(3, 3, 3, 8))
    node = onnx.helper.make_node(
        "ConvInteger", ["x", "w", "x_zero"], ["y"], group=groups, pads=[1, 1, 1, 1], strides=[2, 2]
    )
    constants = {
        "w": kernel.transpose(3, 2, 0, 1).astype(np.int8),
        "x_zero": np.asarray(zero + 128, np.uint8),
    }
    types = onnx.TensorProto
    graph = onnx.helper.make_graph(
        [node],
        "sums",
        [onnx.helper.make_tensor_value_info("x", types.UINT8, (2, 6, 9, 9))],
        [onnx.helper.make_tensor_value_info("y", types.INT32, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    shifted = (codes + 128).transpose(0, 3, 1, 2).astype(np.uint8)
    theirs = session.run(None, {"x": shifted})[0].transpose(0, 2, 3, 1)
    module = ops.Conv(
        8, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)), feature_group_count=groups
    )
    q = jnp.asarray(codes - zero, jnp.float32)
    ours = quantized.accumulate(module, q, jnp.asarray(kernel, jnp.float32), None, LayerPlan(8, 8))
    assert np.array_equal(np.asarray(ours), theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("convnext_v2_atto", marks=pytest.mark.exhaustive),
        "unet",
        "cnn_32_64_dense128_dropout",
    ],
)
def test_other_networks_are_quantized(name):
    shape = {"unet": (32, 32, 1)}.get(name, (32, 32, 3))
    model = models.create(name, num_classes=5)
    images = RNG.normal(size=(4, *shape)).astype(np.float32)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images)
    result = compress.quantize(
        model, variables, shape, compress.read_scheme("int8(calibration=minmax)"), images=[images]
    )
    plain = model.apply(variables, images, train=False)
    codes = result.model.apply(result.variables, images, train=False)
    signal, noise = np.sum(np.square(plain)), np.sum(np.square(plain - codes))
    assert 10 * np.log10(signal / noise) > 20
