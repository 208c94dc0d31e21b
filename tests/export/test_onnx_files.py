"""ONNX and StableHLO files answer as the network does, at any batch, in their own runtimes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from cnnjax import export, models, ops
from cnnjax.errors import UserError
from cnnjax.export import onnx_model, program, stablehlo
from cnnjax.export.onnx_graph import rewrites

ort = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")

DIGITS = (28, 28, 1)


def drawn(model, shape, seed=0):
    """Variables of ordinary sizes, statistics included."""
    empty = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))
    generator = np.random.default_rng(seed)

    def leaf(path, found):
        name = jax.tree_util.keystr(path)
        if "var" in name or "scale" in name:
            return generator.uniform(0.5, 1.5, found.shape).astype(np.float32)
        spread = np.sqrt(1.5 / max(1, np.prod(found.shape[:-1]))) if "kernel" in name else 0.1
        return (spread * generator.normal(size=found.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, empty)


def images(shape, count, seed=1):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def session(model):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    content = model.SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def exported(function, shape, **arguments):
    """Returns (model, operators) of a function of images, without variables."""
    forward = lambda variables, image: function(image)  # noqa: E731
    made = onnx_model.make(forward, {}, export.Signature(shape), **arguments)
    return made, [node.op_type for node in made.graph.node]


def assert_same(function, shape, count=3, tolerance=1e-5):
    made, operators = exported(function, shape)
    image = images(shape, count)
    (found,) = session(made).run(None, {"image": image})
    expected = np.asarray(function(jnp.asarray(image)))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)
    return operators


def test_lenet_answers_alike_at_any_batch():
    model = models.create("lenet5", num_classes=10)
    variables = drawn(model, DIGITS)
    made = onnx_model.make(export.forward_of(model), variables, export.Signature(DIGITS))
    operators = [node.op_type for node in made.graph.node]
    # As PyTorch's file has it: biases within, and the flattening's order within the weights.
    layers = ["Conv", "Relu", "MaxPool"]
    assert operators == [
        *("Reshape", *layers, *layers, "Reshape"),
        *("Gemm", "Relu", "Gemm", "Relu", "Gemm"),
    ]
    entry = made.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in entry] == ["batch", 28, 28, 1]
    assert made.opset_import[0].version == 17
    run = session(made)
    for count in (1, 3, 64):
        image = images(DIGITS, count, seed=count)
        (found,) = run.run(None, {"image": image})
        expected = np.asarray(model.apply(variables, image))
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_stablehlo_is_read_by_jax_alone_and_holds_convolutions():
    pytest.importorskip("flatbuffers")
    model = models.create("lenet5", num_classes=10)
    variables = drawn(model, DIGITS)
    made = stablehlo.make(export.forward_of(model), variables, export.Signature(DIGITS))
    assert made.platforms == ("cpu", "cuda", "tpu")
    # Each of the three has its own, as JAX compiles them.
    assert made.mlir_module().count("stablehlo.convolution") == 2 * 3
    again = jax_export.deserialize(made.serialize())
    for count in (1, 5):
        image = images(DIGITS, count)
        expected = np.asarray(model.apply(variables, image))
        np.testing.assert_allclose(again.call(image), expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_and_relu6_leave_convolutions_alone():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            x = nn.Conv(6, (3, 3), strides=2, use_bias=False)(image)
            x = nn.relu6(nn.BatchNorm(use_running_average=True)(x))
            x = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3)(x)
            x = x + nn.relu(nn.BatchNorm(use_running_average=True)(x))
            return nn.Dense(5)(x.mean((1, 2)))

    model, shape = Net(), (16, 12, 3)
    variables = drawn(model, shape)
    made = onnx_model.make(export.forward_of(model), variables, export.Signature(shape))
    operators = [node.op_type for node in made.graph.node]
    # What the second convolution gives is read twice, so that its BatchNorm stays.
    assert operators == [
        *("Transpose", "Conv", "Clip", "Conv", "BatchNormalization", "Relu", "Add"),
        *("GlobalAveragePool", "Reshape", "Gemm"),
    ]
    image = images(shape, 4)
    (found,) = session(made).run(None, {"image": image})
    expected = np.asarray(model.apply(variables, image))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "move"), [(1, "Reshape"), (3, "Transpose")])
def test_pixels_are_normalized_plane_by_plane(channels, move):
    # ONNX Runtime takes 40 ns a pixel to broadcast along an innermost axis of 1 or 3.
    shape, mean = (12, 10, channels), np.arange(1, channels + 1, dtype=np.float32) / 10
    kernel = images((3, 3, channels), 4).transpose(1, 2, 3, 0)

    def forward(variables, image):
        return ops.conv2d((image.astype(jnp.float32) / 255 - mean) * 4, kernel)

    made = onnx_model.make(forward, {}, export.Signature(shape, "uint8"))
    operators = [node.op_type for node in made.graph.node]
    assert operators[:2] == [move, "Cast"]
    assert operators.count("Transpose") == (1 if channels == 1 else 2)  # The last is the result's.
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    (found,) = session(made).run(None, {"image": pixels})
    np.testing.assert_allclose(found, forward({}, pixels), rtol=1e-4, atol=1e-4)


def test_files_with_channels_first_take_what_pytorch_takes():
    model = models.create("lenet5", num_classes=10)
    variables = drawn(model, DIGITS)
    made = onnx_model.make(
        export.forward_of(model), variables, export.Signature(DIGITS), channels_first=True
    )
    image = images(DIGITS, 2)
    (found,) = session(made).run(None, {"image": image.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found, model.apply(variables, image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (lambda x: jax.nn.softmax(x.reshape(x.shape[0], -1)), "Softmax"),
        (lambda x: nn.gelu(x, approximate=False), "Erf"),
        (nn.hard_swish, "HardSigmoid"),
        (nn.leaky_relu, "LeakyRelu"),
        (lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False), "AveragePool"),
        (lambda x: ops.max_pool(x, (3, 3), (2, 2), "SAME"), "MaxPool"),
        (lambda x: x.reshape(*x.shape[:3], 3, 2).swapaxes(3, 4).reshape(x.shape), "Transpose"),
        (lambda x: x[:, ::2, 1::3], "Slice"),
        (lambda x: jnp.take(x, jnp.array([3, 0, 3]), axis=2), "Gather"),
        (lambda x: x[:, ::-1, :, ::-1], "Slice"),
        (lambda x: jnp.concatenate([x, jnp.ones((x.shape[0], 2, 10, 6))], 1), "Expand"),
        (lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 3)), constant_values=2.0), "Pad"),
        (lambda x: jnp.pad(x, ((0, 0), (1, 1), (2, 0), (0, 0)), mode="edge"), "Concat"),
        (lambda x: jnp.maximum((x * 9).astype(jnp.int8), 3).astype(jnp.float32), "Max"),
        (lambda x: jnp.einsum("bhwc,bkwc->bhkw", x, x[:, :4]), "MatMul"),
        (lambda x: jax.image.resize(x, (x.shape[0], 16, 20, 6), "bilinear"), "MatMul"),
        (lambda x: jnp.argmax(x, -1).astype(jnp.float32), "ArgMax"),
        (lambda x: jnp.where(x > 0.2, jnp.cumsum(x, 2), jnp.round(x)), "Where"),
        (lambda x: jax.nn.standardize(x, axis=-1), "ReduceMean"),
        (lambda x: jnp.max(x, 1) - x.min((1,)) ** 3, "ReduceMax"),
        (lambda x: x.mean((1, 2), keepdims=True) * x, "ReduceMean"),
    ],
)
def test_functions_become_their_operators(function, operator):
    with ops.lowering("lax"):
        assert operator in assert_same(function, (8, 10, 6))


@pytest.mark.parametrize(
    ("strides", "padding", "dilation"),
    [((2, 2), "SAME", 1), ((3, 2), "VALID", 1), ((1, 1), "SAME", 2), ((2, 2), ((0, 3), (4, 1)), 1)],
)
def test_transposed_convolutions(strides, padding, dilation):
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3, 6, 4)), jnp.float32)

    def function(x):
        return jax.lax.conv_transpose(
            x, kernel, strides, padding, rhs_dilation=(dilation, dilation)
        )

    operators = assert_same(function, (7, 5, 6), tolerance=1e-4)
    assert ("ConvTranspose" in operators) == (strides != (1, 1))


def test_what_has_no_rule_is_named_with_its_layer():
    class Sorting(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.sort(x, axis=-1)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            return Sorting(name="second")(nn.Dense(4, name="first")(image.mean((1, 2))))

    model = Net()
    with pytest.raises(UserError, match=r"no rule for the operation sort.* in layer Net/second"):
        onnx_model.make(export.forward_of(model), drawn(model, DIGITS), export.Signature(DIGITS))


def test_a_program_that_asks_for_the_batch_says_how_it_can_be_exported():
    def forward(variables, image):
        return image.mean((1, 2, 3)) * (1.0 if image.shape[0] > 2 else 2.0)

    with pytest.raises(UserError, match=r"depends on the number of images.*--batch 1"):
        program.traced(forward, {}, export.Signature(DIGITS))
    fixed = onnx_model.make(forward, {}, export.Signature(DIGITS, batch=2))
    assert fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2


def test_a_signature_refuses_other_images():
    signature = export.Signature(DIGITS, batch=2)
    with pytest.raises(UserError, match=r"are 32x32x3, and the network takes images of 28x28x1"):
        signature.check(np.zeros((2, 32, 32, 3), np.float32))
    with pytest.raises(UserError, match=r"are uint8, and the file takes float32"):
        signature.check(np.zeros((2, 28, 28, 1), np.uint8))
    with pytest.raises(UserError, match=r"are 3 at once, and the file was made for a batch of 2"):
        signature.check(np.zeros((3, 28, 28, 1), np.float32))


@pytest.mark.slow
def test_rewrites_do_not_change_what_is_computed(monkeypatch):
    model, shape = models.create("mobilenet_v3_small", num_classes=7), (32, 32, 3)
    variables, image = drawn(model, shape), images(shape, 2)
    forward, signature = export.forward_of(model), export.Signature(shape)
    made = onnx_model.make(forward, variables, signature)
    monkeypatch.setattr(rewrites, "simplify", rewrites.prune)
    plain = onnx_model.make(forward, variables, signature)
    assert len(made.graph.node) < 0.5 * len(plain.graph.node)
    (found,), (before,) = (session(each).run(None, {"image": image}) for each in (made, plain))
    np.testing.assert_allclose(found, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
