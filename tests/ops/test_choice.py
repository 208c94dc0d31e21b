"""Which lowering is compiled: argument before context before automatic choice."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from cnnjax import ops
from cnnjax.errors import UserError
from cnnjax.ops import choice, onednn, primitive
from cnnjax.ops.geometry import make_geometry


def primitives(function, *arrays):
    """The names of all primitives in the program of `function`, at any depth."""

    def names(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for inner in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")
            ):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from names(inner)

    return set(names(jax.make_jaxpr(function)(*arrays).jaxpr))


IMAGE, KERNEL = jnp.ones((16, 8, 8, 2)), jnp.ones((3, 3, 2, 4))
CONVOLUTION, PRODUCT, OURS = "conv_general_dilated", "dot_general", "cnnjax_convolution"


def lowered(function, *arrays, platform):
    """The program of `function` as XLA gets it for a platform, which need not be here."""
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def test_argument_before_context_before_choice():
    assert OURS in primitives(ops.conv2d, IMAGE, KERNEL)
    with ops.lowering("lax"):
        assert CONVOLUTION in primitives(ops.conv2d, IMAGE, KERNEL)
        with ops.lowering("auto"):
            assert OURS in primitives(ops.conv2d, IMAGE, KERNEL)
        argument = lambda *arrays: ops.conv2d(*arrays, lowering="im2col")  # noqa: E731
        assert CONVOLUTION not in primitives(argument, IMAGE, KERNEL)
    assert OURS in primitives(ops.conv2d, IMAGE, KERNEL)


def test_a_compiled_function_is_compiled_anew_in_another_context():
    traced = []

    @jax.jit
    def convolve(image, kernel):
        traced.append(choice.requested(None))
        return ops.conv2d(image, kernel)

    for name in ("auto", "lax", "lax", "im2col", "auto"):
        with ops.lowering(name):
            convolve(IMAGE, KERNEL)
    assert traced == ["auto", "lax", "im2col"]


def test_rematerialized_and_scanned_code_obeys_the_context():
    block = jax.checkpoint(lambda image: ops.conv2d(image, KERNEL[..., :2]))
    loop = lambda image: lax.scan(lambda x, _: (block(x), None), image, None, length=2)[0]  # noqa: E731
    for name, expected in (("lax", CONVOLUTION), ("im2col", PRODUCT), ("lax", CONVOLUTION)):
        with ops.lowering(name):
            found = primitives(loop, IMAGE)
        assert found & {CONVOLUTION, PRODUCT} == {expected}


def test_the_context_belongs_to_one_thread():
    seen = []
    with ops.lowering("lax"):
        thread = threading.Thread(target=lambda: seen.append(choice.requested(None)))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def both_gradients(image, kernel):
    return jax.grad(lambda *arrays: jnp.sum(ops.conv2d(*arrays) ** 2), (0, 1))(image, kernel)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_get_the_compilers_convolutions(platform):
    program = lowered(both_gradients, IMAGE, KERNEL, platform=platform)
    assert program.count("stablehlo.convolution") == 3
    assert "custom_call" not in program
    pooled = lowered(ops.conv2d_activation_max_pool, IMAGE, KERNEL, platform=platform)
    assert pooled.count("stablehlo.convolution") == 1
    assert pooled.count("stablehlo.reduce_window") == 1
    assert "dot_general" not in pooled


def test_no_convolution_is_left_to_the_compiler_on_the_cpu():
    image, kernel = jnp.ones((16, 8, 8, 64)), jnp.ones((3, 3, 64, 64))
    assert "stablehlo.convolution" not in lowered(ops.conv2d, image, kernel, platform="cpu")
    assert "stablehlo.convolution" not in lowered(both_gradients, image, kernel, platform="cpu")


def test_a_program_for_export_calls_nothing_that_other_machines_may_lack():
    exported = jax.export.export(jax.jit(both_gradients))(IMAGE, KERNEL)
    assert exported.platforms == ("cpu",)
    assert "custom_call" not in exported.mlir_module()
    for ours, theirs in zip(
        exported.call(IMAGE, KERNEL), both_gradients(IMAGE, KERNEL), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_batch_is_not_sharded_inside_shard_map_and_pmap():
    seen = []

    def program(values):
        seen.append(choice.batch_may_be_sharded())
        return values

    values = jnp.ones(jax.device_count())
    mesh = Mesh(np.array(jax.devices()), ("data",))
    data = PartitionSpec("data")
    jax.jit(program)(values)
    jax.jit(jax.shard_map(program, mesh=mesh, in_specs=data, out_specs=data))(values)
    jax.pmap(program)(values)
    assert seen == [True, False, False]


def test_unknown_lowering_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown lowering 'laxx'.*did you mean lax"):  # noqa: SIM117
        with ops.lowering("laxx"):
            pass


@pytest.mark.parametrize(("size", "window"), [(2, 3), (4, 5), (1, 3)])
def test_windows_larger_than_the_image_never_go_to_xlas_own(size, window):
    # XLA:CPU computes them at a hundredth of its rate: 207 instead of 2 ms.
    image, kernel = jnp.ones((32, size, size, 256)), jnp.ones((window, window, 256, 256))

    def layer(image, kernel):
        pooled = ops.conv2d_activation_max_pool(image, kernel, activation=jax.nn.relu)
        return ops.conv2d(image, kernel).sum() + pooled.sum()

    with choice.outside_loops():
        assert "stablehlo.convolution" not in lowered(layer, image, kernel, platform="cpu")
    fitting = jnp.ones((32, window, window, 256))
    with choice.outside_loops(), ops.lowering("lax"):
        assert "stablehlo.convolution" in lowered(layer, fitting, kernel, platform="cpu")


@pytest.mark.skipif(not onednn.available("float32"), reason="needs oneDNN in jaxlib")
@pytest.mark.parametrize(
    ("shape", "features", "names"),
    [  # Of the gradients of the image and of the kernel, and of the result.
        ((64, 32, 32, 64), 64, ("winograd", "onednn", "winograd")),
        ((8, 14, 14, 256), 256, ("winograd",) * 3),
        ((8, 28, 28, 128), 32, ("winograd", "onednn", "onednn")),
        ((1, 7, 7, 512), 512, ("onednn",) * 3),
        ((64, 3, 3, 256), 256, ("onednn",) * 3),
        ((32, 8, 8, 64), 64, ("onednn",) * 3),  # Not worth its compilation.
        ((64, 32, 32, 1), 32, ("onednn", "im2col", "onednn")),
    ],
)
def test_forms_where_vectors_are_narrow(shape, features, names, monkeypatch):
    monkeypatch.setattr(onednn, "wide_vectors", lambda: False)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, shape[3], features), jnp.float32)
    geometry = make_geometry(image, kernel, (1, 1), "SAME", (1, 1), 1, None)
    found = [
        choice.for_cpu(
            primitive.Form(of, geometry, shape[1:3], (3, 3), "auto"), image, kernel, own_kernels=own
        )
        for own in (True, False)
        for of in (choice.IMAGE, choice.KERNEL, choice.RESULT)
    ]
    assert tuple(found[:3]) == names
    assert "onednn" not in found[3:]
