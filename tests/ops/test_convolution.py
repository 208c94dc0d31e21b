"""conv2d equals lax.conv_general_dilated in value and in every derivative, in every lowering."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.ops import blocks, choice, forms, im2col, onednn, primitive
from cnnjax.ops.geometry import lax_conv2d, make_geometry

OURS = ("auto", "im2col", "onednn", "taps", "winograd")
TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 4e-2, "float16": 5e-3}


def reference(image, kernel, strides=(1, 1), padding="SAME", kernel_dilation=(1, 1), groups=1):
    if not isinstance(padding, str):
        # XLA:CPU is wrong where one end of an axis is cut and the other padded, gradients included.
        rows, columns = ((low, high, 0) for low, high in padding)
        zero = jnp.zeros((), image.dtype)
        image = lax.pad(image, zero, [(0, 0, 0), rows, columns, (0, 0, 0)])
        padding = "VALID"
    return lax.conv_general_dilated(
        image,
        kernel,
        strides,
        padding,
        rhs_dilation=kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def normal(seed, shape, dtype="float32"):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values).astype(dtype)


def assert_close(ours, theirs, dtype="float32"):
    """Relative to the largest value: a sum's rounding error follows its terms, not its result."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.abs(one - other).max(initial=0) <= TOLERANCE[dtype] * max(
            1.0, np.abs(other).max(initial=0)
        )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, image, kernel):
    """The value, and its vector-Jacobian products with a cotangent that has no symmetry."""

    def weighted(image, kernel):
        result = function(image, kernel)
        # By NumPy: compiled anew in each program, a cosine can differ in its last bit.
        cotangent = np.cos(np.arange(result.size)).reshape(result.shape)
        return jnp.sum(result * jnp.asarray(cotangent, result.dtype)), result

    gradients, result = jax.grad(weighted, (0, 1), has_aux=True)(image, kernel)
    return result, gradients


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    pads = st.tuples(*[st.tuples(st.integers(-1, 3), st.integers(0, 3))] * 2)
    return {
        "batch": draw(st.sampled_from((1, 2, 5, 16, 24))),
        "size": draw(st.tuples(st.integers(5, 12), st.integers(5, 12))),
        "window": draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        "groups": groups,
        "channels": groups * draw(st.sampled_from((1, 2, 11))),
        "features": groups * draw(st.integers(1, 4)),
        "strides": draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        "kernel_dilation": draw(st.sampled_from(((1, 1), (1, 1), (2, 1), (2, 3)))),
        "sharded": draw(st.booleans()),
        "padding": draw(st.one_of(st.sampled_from(("SAME", "VALID", "SAME_LOWER")), pads)),
    }


@st.composite
def minimal_filterings(draw):
    """What Winograd's form computes; the other forms leave its image sizes and paddings as free."""
    plain = {"window": (3, 3), "strides": (1, 1), "kernel_dilation": (1, 1), "groups": 1}
    channels = draw(st.sampled_from((1, 2, 11)))
    return {**draw(convolutions()), **plain, "channels": channels}


@pytest.mark.parametrize(
    ("size", "padding", "strides"),
    [
        (6, ((-1, 1), (0, 0)), (1, 1)),
        (6, ((0, 0), (-1, 1)), (1, 1)),
        (6, ((1, -1), (-2, 2)), (1, 1)),
        # The gradient of the image is cut by 3 - 2 columns at the left and padded at the right.
        (5, ((2, 2), (3, 1)), (1, 1)),
        # The last row and column are not read: the gradient of the kernel cuts them.
        (6, ((1, 0), (1, 0)), (3, 2)),
    ],
)
@pytest.mark.parametrize("name", choice.LOWERINGS)
def test_an_axis_cut_at_one_end_and_padded_at_the_other(name, size, padding, strides):
    image, kernel = normal(1, (1, size, size, 1)), normal(2, (3, 3, 1, 1))
    shared = {"padding": padding, "strides": strides}
    ours = functools.partial(ops.conv2d, lowering=name, **shared)
    theirs = functools.partial(reference, **shared)
    assert_close(
        value_and_gradients(ours, image, kernel), value_and_gradients(theirs, image, kernel)
    )


any_convolutions = st.one_of(convolutions(), minimal_filterings())


def check_against_lax(case, dtype):
    image = normal(1, (case["batch"], *case["size"], case["channels"]), dtype)
    kernel_shape = (*case["window"], case["channels"] // case["groups"], case["features"])
    kernel = normal(2, kernel_shape, dtype)
    shared = {name: case[name] for name in ("strides", "padding", "kernel_dilation")}
    theirs = functools.partial(reference, groups=case["groups"], **shared)
    expected = value_and_gradients(theirs, image, kernel)
    for lowering in OURS:
        ours = functools.partial(
            ops.conv2d, feature_group_count=case["groups"], lowering=lowering, **shared
        )
        with mock.patch.object(choice, "batch_may_be_sharded", lambda: case["sharded"]):
            assert_close(value_and_gradients(ours, image, kernel), expected, dtype)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(any_convolutions)
def test_equals_lax_in_float64(case):
    with jax.enable_x64(True):
        check_against_lax(case, "float64")


@settings(max_examples=4, deadline=None)
@given(any_convolutions)
def test_equals_lax_in_float32(case):
    check_against_lax(case, "float32")


@pytest.mark.exhaustive
@settings(max_examples=100, deadline=None)
@given(any_convolutions, st.sampled_from(("float64", "float32")))
def test_equals_lax_for_many_shapes(case, dtype):
    # A process may map memory so often: XLA aborts where the programs of a search for the smallest
    # failure are all kept.
    jax.clear_caches()
    with jax.enable_x64(True):
        check_against_lax(case, dtype)


PLAIN = {
    "batch": 16,
    "size": (9, 8),
    "window": (3, 3),
    "groups": 1,
    "channels": 4,
    "features": 6,
    "strides": (2, 2),
    "kernel_dilation": (1, 1),
    "padding": "SAME",
    "sharded": False,
}


@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_depthwise_at_strides_and_dilations(strides, dilation):
    """oneDNN's own dilated depthwise kernels write outside of their arrays, and may never end."""
    options = {"strides": strides, "kernel_dilation": dilation, "padding": ((4, 4), (9, 9))}
    image, kernel = normal(1, (2, 10, 5, 8)), normal(2, (5, 7, 1, 16))
    theirs = functools.partial(reference, groups=8, **options)
    ours = functools.partial(ops.conv2d, feature_group_count=8, lowering="onednn", **options)
    assert_close(
        value_and_gradients(ours, image, kernel), value_and_gradients(theirs, image, kernel)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_equals_lax_in_16_bits(dtype, strides):
    check_against_lax({**PLAIN, "strides": strides}, dtype)


def test_16_bit_products_are_accumulated_in_float32():
    # 4096 + 1 is not a float16: adding ones one by one in float16 would stop at 2048.
    image, kernel = jnp.ones((16, 1, 1, 4096), jnp.float16), jnp.ones((1, 1, 4096, 1), jnp.float16)
    for lowering in ops.LOWERINGS:
        assert float(ops.conv2d(image, kernel, lowering=lowering)[0, 0, 0, 0]) == 4096


def test_values_by_hand():
    image = jnp.arange(9.0).reshape(1, 3, 3, 1)
    kernel = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1)
    for lowering in ops.LOWERINGS:
        result = ops.conv2d(
            image, kernel, padding="VALID", bias=jnp.array([0.5]), lowering=lowering
        )
        # Top left: 0*1 + 1*2 + 3*3 + 4*4 = 27.
        np.testing.assert_allclose(result[0, :, :, 0], [[27.5, 37.5], [57.5, 67.5]])


def test_windows_that_do_not_fit_give_an_empty_result():
    image, kernel = jnp.ones((2, 3, 3, 1)), jnp.ones((5, 5, 1, 2))
    for lowering in ops.LOWERINGS:
        assert ops.conv2d(image, kernel, padding="VALID", lowering=lowering).shape == (2, 0, 0, 2)


@pytest.fixture
def arrays():
    with jax.enable_x64(True):
        yield normal(3, (16, 6, 7, 3), "float64"), normal(4, (3, 3, 3, 4), "float64")


CASES = [{}, {"strides": (2, 2)}, {"strides": (2, 1), "padding": "VALID"}]


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("lowering", OURS)
def test_forward_mode_and_higher_orders(arrays, lowering, options):
    tangents = (jnp.sin(arrays[0]), jnp.cos(arrays[1]))

    def derivatives(convolve):
        cube = lambda *arrays: jnp.sum(convolve(*arrays) ** 3)  # noqa: E731
        gradient = jax.grad(cube, (0, 1))
        mixed = lambda image: jnp.sum(jax.grad(cube, 1)(image, arrays[1]) ** 2)  # noqa: E731
        return {
            "jvp": jax.jvp(convolve, arrays, tangents),
            "hessian-vector product": jax.jvp(gradient, arrays, tangents),
            "gradient of gradient": jax.grad(mixed)(arrays[0]),
            "remat": jax.grad(jax.checkpoint(cube), (0, 1))(*arrays),
        }

    ours = functools.partial(ops.conv2d, lowering=lowering, **options)
    theirs = functools.partial(reference, **options)
    assert_close(
        jax.jit(lambda: derivatives(ours))(), jax.jit(lambda: derivatives(theirs))(), "float64"
    )


@pytest.mark.parametrize("lowering", OURS)
def test_vmap_over_either_argument(arrays, lowering):
    images, kernels = (jnp.stack([array, 2 - array, array**2]) for array in arrays)

    def mapped(convolve):
        run = functools.partial(value_and_gradients, convolve)
        return {
            "both": jax.vmap(run)(images, kernels),
            "images": jax.vmap(run, (0, None))(images, kernels[1]),
            "kernels": jax.vmap(run, (None, 0))(images[1], kernels),
        }

    ours = functools.partial(ops.conv2d, lowering=lowering)
    assert_close(*(jax.jit(lambda f=f: mapped(f))() for f in (ours, reference)), "float64")


@pytest.mark.parametrize("lowering", OURS)
def test_derivatives_agree_with_finite_differences(arrays, lowering):
    convolve = functools.partial(ops.conv2d, strides=(2, 2), lowering=lowering)
    wave = jax.jit(lambda *arrays: jnp.sin(convolve(*arrays)))
    check_grads(wave, arrays, order=1, eps=1e-5)


SHARDED = {
    "chosen": ("auto", {}, (128, 9, 9, 3), (3, 3, 3, 4)),
    "taps first": ("im2col", {}, (128, 9, 9, 3), (3, 3, 3, 4)),
    "channels last": ("im2col", {}, (512, 9, 9, 40), (3, 3, 40, 4)),
    "winograd": ("winograd", {}, (128, 9, 9, 3), (3, 3, 3, 4)),
    "depthwise": ("taps", {"feature_group_count": 4}, (16, 9, 9, 4), (3, 3, 1, 4)),
}


@pytest.mark.parametrize("case", SHARDED.values(), ids=SHARDED)
def test_a_batch_sharded_over_eight_devices_stays_where_it_is(case):
    lowering, options, image_shape, kernel_shape = case
    image, kernel = normal(5, image_shape), normal(6, kernel_shape)
    convolve = functools.partial(ops.conv2d, lowering=lowering, **options)
    run = functools.partial(value_and_gradients, convolve)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    program = jax.jit(run, in_shardings=(split, whole)).lower(image, kernel).compile()
    arrays = jax.device_put(image, split), jax.device_put(kernel, whole)
    assert_close(program(*arrays), run(image, kernel))
    # The one exchange that data parallelism needs: the sum of the kernel's gradient.
    exchanges = re.findall(
        r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text()
    )
    assert exchanges == ["all-reduce"]


@pytest.mark.parametrize("lowering", OURS)
def test_shard_map_and_pmap(lowering):
    image, kernel = normal(5, (128, 5, 5, 3)), normal(6, (3, 3, 3, 4))
    convolve = functools.partial(ops.conv2d, lowering=lowering)

    def kernel_gradient(image, kernel, convolve=convolve):
        return jax.grad(lambda kernel: jnp.sum(convolve(image, kernel) ** 2))(kernel)

    expected = kernel_gradient(image, kernel, reference)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    mapped = jax.shard_map(
        lambda image, kernel: lax.psum(kernel_gradient(image, kernel), "data"),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    assert_close(jax.jit(mapped)(image, kernel), expected)
    # With its check on, shard_map itself sums the gradient of what is the same on every device.
    checked = jax.shard_map(
        kernel_gradient,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    assert_close(jax.jit(checked)(image, kernel), expected)
    parts = jax.pmap(kernel_gradient, in_axes=(0, None))(image.reshape(8, 16, 5, 5, 3), kernel)
    assert_close(parts.sum(0), expected)


def test_scan_equals_a_python_loop_bit_for_bit(monkeypatch):
    monkeypatch.setattr(choice, "batch_may_be_sharded", lambda: False)
    image, kernel = normal(7, (16, 12, 12, 1)), normal(8, (5, 5, 1, 6))

    def step(kernel, _):
        loss, gradient = jax.value_and_grad(
            lambda kernel: jnp.mean(ops.conv2d(image, kernel, lowering="im2col") ** 2)
        )(kernel)
        return kernel - 0.01 * gradient, loss

    scanned, losses = jax.jit(lambda kernel: lax.scan(step, kernel, None, length=5))(kernel)
    looped, compiled = kernel, jax.jit(step)
    for loss in losses:
        looped, expected_loss = compiled(looped, None)
        assert loss == expected_loss
    np.testing.assert_array_equal(scanned, looped)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_row_blocks_change_nothing(monkeypatch, strides):
    image, kernel = normal(9, (16, 11, 10, 3)), normal(10, (3, 3, 3, 4))
    expected = value_and_gradients(functools.partial(reference, strides=strides), image, kernel)
    row_bytes = 16 * 10 * 9 * 3 * 4 // strides[1]
    for bound in (row_bytes // 2, 3 * row_bytes):
        monkeypatch.setattr(blocks, "MAX_PATCH_BYTES", bound)
        monkeypatch.setattr(blocks, "MAX_SAVED_PATCH_BYTES", bound)
        for convolve in (im2col.conv2d_taps_first, im2col.conv2d_channels_last):
            monkeypatch.setitem(forms.FORMS, "im2col", convolve)
            ours = lambda *arrays: ops.conv2d(*arrays, strides=strides, lowering="im2col")  # noqa: E731
            assert_close(value_and_gradients(ours, image, kernel), expected)


@pytest.mark.exhaustive
def test_memory_of_a_layer_of_resnet50_is_bounded():
    """Stage 1 of ResNet-50 at 224x224, batch 64, both ways: less than its patches alone."""
    image = jax.ShapeDtypeStruct((64, 56, 56, 64), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
    patch_bytes = 9 * image.size * 4
    assert patch_bytes > blocks.MAX_PATCH_BYTES
    for lowering in OURS:
        convolve = functools.partial(ops.conv2d, lowering=lowering)
        program = jax.jit(functools.partial(value_and_gradients, convolve)).lower(image, kernel)
        used = program.compile().memory_analysis().temp_size_in_bytes
        assert used < patch_bytes, (lowering, used, patch_bytes)


@pytest.mark.parametrize("sharded", [False, True])
def test_parts_of_a_batch_divide_it(monkeypatch, sharded):
    monkeypatch.setattr(choice, "batch_may_be_sharded", lambda: sharded)
    for batch in (1, 7, 48, 64, 100, 127, 250):
        for positions in (7 * 7, 32 * 32, 112 * 112):
            chunk = blocks.examples_in_product(batch, positions)
            wanted = max(8 if sharded else 1, blocks.PRODUCT_ROWS / positions)
            assert batch % chunk == 0
            assert chunk == batch or wanted / 2 <= chunk <= 2 * wanted


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("lowering", ["im2col", "winograd"])
def test_parts_of_a_batch_change_nothing(monkeypatch, lowering, sharded):
    monkeypatch.setattr(choice, "batch_may_be_sharded", lambda: sharded)
    monkeypatch.setattr(choice, "TAPS_FIRST_BYTES", 0)
    monkeypatch.setattr(blocks, "PRODUCT_ROWS", 8 * 7 * 7)
    image, kernel = normal(9, (48, 7, 7, 3)), normal(10, (3, 3, 3, 4))
    ours = functools.partial(ops.conv2d, lowering=lowering)
    assert "scan" in str(jax.make_jaxpr(ours)(image, kernel))
    assert_close(
        value_and_gradients(ours, image, kernel), value_and_gradients(reference, image, kernel)
    )


def test_conv_general_dilated_falls_back_to_lax():
    image, kernel = normal(11, (2, 5, 5, 3)), normal(12, (3, 3, 3, 4))
    layout = ("NHWC", "HWIO", "NHWC")
    pads = ((1, 1), (1, 1))
    plain = {"window_strides": (1, 1), "padding": pads, "dimension_numbers": layout}
    forms = {
        "plain": (image, kernel, plain),
        "transposed": (image, kernel, {**plain, "lhs_dilation": (2, 2)}),
        "batch groups": (image, kernel, {**plain, "batch_group_count": 2}),
        "channels first": (
            image.transpose(0, 3, 1, 2),
            kernel,
            {**plain, "dimension_numbers": ("NCHW", "HWIO", "NCHW")},
        ),
        "one dimension": (
            image[:, 0],
            kernel[0],
            {
                "window_strides": (2,),
                "padding": "VALID",
                "dimension_numbers": ("NHC", "HIO", "NHC"),
            },
        ),
        "wider result": (image, kernel, {**plain, "preferred_element_type": jnp.float32}),
    }
    with ops.lowering("im2col"):
        for image, kernel, options in forms.values():
            ours = ops.conv_general_dilated(image, kernel, **options)
            assert_close(ours, lax.conv_general_dilated(image, kernel, **options))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image": jnp.ones((5, 5, 3))}, r"shapes \(5, 5, 3\) and \(3, 3, 3, 4\)"),
        ({"image": jnp.ones((1, 5, 5, 2))}, r"has 2 channels.*takes 3"),
        ({"image": jnp.ones((1, 5, 5, 3), jnp.float16)}, "float16 and float32"),
        ({"padding": "FULL"}, "'SAME', 'SAME_LOWER', 'VALID'.*not 'FULL'"),
        ({"padding": 1}, "not 1"),
        ({"strides": 2}, "strides must be a pair such as"),
        ({"strides": (0, 1)}, "strides must be positive"),
        ({"kernel_dilation": (1, -1)}, "kernel_dilation must be positive"),
        ({"feature_group_count": 2}, "in each of 2 groups"),
        ({"lowering": "im2cool"}, "unknown lowering 'im2cool'.*did you mean im2col"),
    ],
)
def test_errors_say_what_is_wrong(change, text):
    arguments = {"image": jnp.ones((1, 5, 5, 3)), "kernel": jnp.ones((3, 3, 3, 4)), **change}
    with pytest.raises(UserError, match=text):
        ops.conv2d(**arguments)


@pytest.mark.skipif(not onednn.available("float32"), reason="needs oneDNN in jaxlib")
@pytest.mark.parametrize(
    ("strides", "dilation"), [((1, 1), (1, 1)), ((2, 3), (1, 1)), ((1, 2), (2, 3))]
)
def test_a_large_kernel_gradient_is_summed_over_blocks_of_rows(strides, dilation, monkeypatch):
    monkeypatch.setattr(onednn, "CACHED_BYTES", 6_000)
    image = jax.random.normal(jax.random.key(0), (2, 26, 13, 3))
    kernel = jnp.zeros((3, 2, 3, 16))
    geometry = make_geometry(image, kernel, strides, ((1, 2), (0, 1)), dilation, 1, None)
    size = geometry.output_size(image, kernel)
    cotangent = jax.random.normal(jax.random.key(1), (2, *size, 16))
    assert onednn._rows_at_a_time(size[0], 2 * size[1] * 16 * 4) < size[0]
    expected = jax.vjp(lambda kernel: lax_conv2d(image, kernel, geometry), kernel)[1](cotangent)[0]
    result = jax.jit(functools.partial(onednn.kernel_gradient, window=(3, 2), geometry=geometry))(
        image, cotangent
    )
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not onednn.available("float32"), reason="needs oneDNN in jaxlib")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("batch", "strides", "dilation"),
    [(12, (1, 1), (1, 1)), (12, (2, 3), (1, 1)), (13, (1, 2), (2, 3))],
)
def test_where_vectors_are_narrow_a_kernel_gradient_is_summed_over_examples(
    batch, strides, dilation, groups, monkeypatch
):
    monkeypatch.setattr(onednn, "wide_vectors", lambda: False)
    image = normal(0, (batch, 12, 11, 16 * groups))
    kernel = jnp.zeros((3, 2, 16, 8 * groups))
    geometry = make_geometry(image, kernel, strides, ((1, 2), (0, 1)), dilation, groups, None)
    cotangent = normal(1, (batch, *geometry.output_size(image, kernel), 8 * groups))
    assert onednn.examples_at_a_time(image, cotangent, (3, 2), geometry) == 4
    form = primitive.Form(choice.KERNEL, geometry, image.shape[1:3], (3, 2), "onednn")
    gradient = functools.partial(forms.by_name, form=form, name="onednn")
    with choice.whole_batch(True):
        result = jax.jit(gradient)(image, cotangent)
    expected = jax.vjp(lambda kernel: lax_conv2d(image, kernel, geometry), kernel)[1](cotangent)[0]
    assert_close(result, expected)


@pytest.mark.parametrize(
    ("batch", "size", "channels", "features", "expected"),
    [
        (64, 32, 64, 64, 4),  # Few together.
        (64, 4, 512, 512, 64),  # Not where the kernel, which is summed, is the larger.
        (61, 32, 64, 64, 4),  # A prime, whose last example is alone.
        (8, 14, 256, 256, 8),  # A small batch that the cache holds, and one that it does not.
        (8, 56, 64, 64, 2),
    ],
)
def test_examples_of_a_kernel_gradient(batch, size, channels, features, expected, monkeypatch):
    image, cotangent = (
        jax.ShapeDtypeStruct((batch, size, size, count), jnp.float32)
        for count in (channels, features)
    )
    kernel = jax.ShapeDtypeStruct((3, 3, channels, features), jnp.float32)
    geometry = make_geometry(image, kernel, (1, 1), "SAME", (1, 1), 1, None)
    for wide, examples in ((False, expected), (True, batch)):
        monkeypatch.setattr(onednn, "wide_vectors", lambda wide=wide: wide)
        assert onednn.examples_at_a_time(image, cotangent, (3, 3), geometry) == examples
