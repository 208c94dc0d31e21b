"""From names and shapes to variables and back: strict, both ways, and all problems at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnjax import convert, models, trees
from cnnjax.convert import layouts
from cnnjax.errors import UserError

IMAGE = (32, 32, 3)


@pytest.fixture(scope="module")
def small():
    return models.create("resnet18", num_classes=10, stem_features=4, features=4)


def theirs(model, image_shape=IMAGE, framework="torchvision"):
    """Every tensor that the framework has for the model, each of other numbers."""
    generator = np.random.default_rng(0)
    table = convert.entries(model, image_shape, convert.find_names(model, framework))
    return {entry.name: generator.normal(size=entry.their_shape).astype("f") for entry in table}


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (layouts.OIHW, (3, 2, 4, 5)),
        (layouts.DENSE, (4, 5)),
        (layouts.DENSE_AS_1X1, (4, 5)),
        (layouts.CHANNEL_11, (4,)),
        (layouts.CHANNEL_111, (4,)),
        (layouts.flattened(3), (12, 5)),
        (layouts.unchanged(0), ()),
        (layouts.unchanged(1), (4,)),
    ],
)
def test_layouts_are_undone_bit_for_bit(layout, shape):
    array = np.random.default_rng(0).normal(size=shape)
    there = layout.to_theirs(array)
    assert there.shape == layout.their_shape(shape)
    assert there.flags.c_contiguous
    np.testing.assert_array_equal(layout.to_ours(there, shape), array)


@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    channels=st.integers(1, 4),
    seed=st.integers(),
)
def test_a_dense_layer_behind_a_flattened_image(height, width, channels, seed):
    # PyTorch: torch.nn.Linear on x.flatten(1) of x [batch, channels, height, width].
    generator = np.random.default_rng(abs(seed))
    image = generator.normal(size=(2, height, width, channels))
    kernel = generator.normal(size=(height * width * channels, 3))
    weight = layouts.flattened(channels).to_theirs(kernel)
    there = image.transpose(0, 3, 1, 2).reshape(2, -1) @ weight.T
    np.testing.assert_allclose(there, image.reshape(2, -1) @ kernel, atol=1e-12)


def test_a_model_is_filled_and_read_back_bit_for_bit(small):
    arrays = theirs(small)
    variables = convert.to_cnnjax(arrays, small, IMAGE)
    expected = jax.eval_shape(small.init, jax.random.key(0), jnp.zeros((1, *IMAGE)))
    assert jax.tree.structure(variables) == jax.tree.structure(dict(expected))
    kernel = variables["params"]["stage2"]["block1"]["conv1"]["kernel"]
    # PyTorch's [out, in, height, width]
    np.testing.assert_array_equal(kernel, arrays["layer2.0.conv1.weight"].transpose(2, 3, 1, 0))
    back = convert.from_cnnjax(variables, small, IMAGE)
    counters = {name for name in back if name.endswith("num_batches_tracked")}
    assert back.keys() - counters == arrays.keys()
    assert len(counters) == 20
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_widths_become_the_models(small, dtype):
    arrays = {k: v.astype(jnp.dtype(dtype)) for k, v in theirs(small).items()}
    variables = convert.to_cnnjax(arrays, small, IMAGE)
    bias = variables["params"]["head"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, arrays["fc.bias"].astype(np.float32))


def test_all_problems_are_reported_together(small):
    arrays = theirs(small)
    arrays["layer1.0.conv2.weight"] = arrays["layer1.0.conv2.weight"].T[:, :, :1]
    arrays["layer2.0.conv1.weight"] = arrays["layer2.0.conv1.weight"].transpose(2, 3, 1, 0)
    del arrays["layer3.1.bn2.weight"]
    arrays["bn1.bias"] = arrays["bn1.bias"].astype(int)
    arrays["extra"] = np.zeros((2, 3))
    with pytest.raises(UserError) as caught:
        convert.to_cnnjax(arrays, small, IMAGE)
    text = str(caught.value)
    assert "torchvision's of this ResNet, 5 problems:" in text
    assert "shape: layer1.0.conv2.weight is [3, 3, 1, 4], wanted [4, 4, 3, 3]\n" in text
    assert "is [3, 3, 4, 8], wanted [8, 4, 3, 3]: the same sizes in another order, so it is" in text
    assert "missing: layer3.1.bn2.weight [16], the weights of params/stage3/block2/norm2" in text
    assert "dtype: bn1.bias is int64, not floating point" in text
    assert "left over: extra [2, 3]" in text
    assert len(text.splitlines()) == 6


def test_missing_running_statistics_are_an_error(small):
    arrays = {k: v for k, v in theirs(small).items() if "running" not in k}
    with pytest.raises(UserError, match=r"40 problems.*\n.*running statistics of a BatchNorm"):
        convert.to_cnnjax(arrays, small, IMAGE)


def test_another_number_of_classes(small):
    arrays = theirs(small)
    other = small.clone(num_classes=3)
    with pytest.raises(UserError, match=r"fc\.weight is for 10 classes, the model for 3.*new head"):
        convert.to_cnnjax(arrays, other, IMAGE)
    variables = convert.to_cnnjax(arrays, other, IMAGE, new_head_key=jax.random.key(1))
    head = variables["params"]["head"]
    assert head["kernel"].shape == (32, 3)
    # PyTorch's initializer, which the heads here have too: uniform within 1 / sqrt(fan-in).
    assert 0.5 * 32**-0.5 < np.abs(head["kernel"]).max() < 32**-0.5
    np.testing.assert_array_equal(head["bias"], np.zeros(3))
    whole = convert.to_cnnjax(arrays, small, IMAGE)
    np.testing.assert_array_equal(
        variables["params"]["stem"]["conv"]["kernel"], whole["params"]["stem"]["conv"]["kernel"]
    )


def test_a_model_without_head_leaves_the_head_out_only_when_asked(small):
    arrays = theirs(small)
    features = small.clone(num_classes=None)
    with pytest.raises(UserError, match=r"left over: fc\.weight"):
        convert.to_cnnjax(arrays, features, IMAGE)
    variables = convert.to_cnnjax(arrays, features, IMAGE, new_head_key=jax.random.key(0))
    assert "head" not in variables["params"]
    convert.to_cnnjax(arrays, features, IMAGE, ignore=[r"fc\..*"])


def test_ignored_tensors_are_listed_by_the_caller(small):
    arrays = theirs(small) | {"aux.weight": np.zeros(3)}
    convert.to_cnnjax(arrays, small, IMAGE, ignore=[r"aux\..*"])
    with pytest.raises(UserError, match=r"matches nothing.*'auxx.*': did you mean aux\.weight"):
        convert.to_cnnjax(arrays, small, IMAGE, ignore=["auxx.weight"])
    with pytest.raises(UserError, match="no regular expression"):
        convert.to_cnnjax(arrays, small, IMAGE, ignore=["("])


def test_variables_of_another_model_are_refused(small):
    variables = convert.to_cnnjax(theirs(small), small, IMAGE)
    variables["params"]["head"]["kernel"] = np.zeros((32, 5), np.float32)
    del variables["batch_stats"]["stem"]
    variables["params"]["more"] = np.zeros(())
    with pytest.raises(UserError) as caught:
        convert.from_cnnjax(variables, small, IMAGE)
    assert "4 problems" in str(caught.value)
    assert "leaf params/head/kernel has shape (32, 5), the model's has (32, 10)" in str(
        caught.value
    )
    assert "missing leaf batch_stats/stem/norm/mean" in str(caught.value)
    assert "leaf params/more is not one of the model's" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "framework", "said"),
    [
        ("resnet50_v1", "torchvision", "torchvision has no network like this ResNet.*pytorch"),
        ("se_resnet50", "torchvision", "choose the framework timm or pytorch"),
        ("lenet5", "timm", "timm has no network like this LeNet5"),
        ("lenet5", "torchvison", "unknown framework 'torchvison': did you mean torchvision"),
    ],
)
def test_frameworks_without_the_network(name, framework, said):
    model = models.create(name, num_classes=10)
    with pytest.raises(UserError, match=said):
        convert.to_cnnjax({}, model, models.input_shape(name), framework=framework)


def test_our_own_names_in_the_manner_of_pytorch():
    model = models.create("lenet5", num_classes=10)
    arrays = theirs(model, (28, 28, 1), "pytorch")
    assert {name: array.shape for name, array in arrays.items()} == {
        "conv1.weight": (6, 1, 5, 5),
        "conv1.bias": (6,),
        "conv2.weight": (16, 6, 5, 5),
        "conv2.bias": (16,),
        "dense1.weight": (120, 256),
        "dense1.bias": (120,),
        "dense2.weight": (84, 120),
        "dense2.bias": (84,),
        "head.weight": (10, 84),
        "head.bias": (10,),
    }
    variables = convert.to_cnnjax(arrays, model, (28, 28, 1), framework="pytorch")
    # Row 5 of the image's 16 channels of 4x4 cells: channel 2, cell (1, 3), is 16 * (4 + 3) + 2.
    np.testing.assert_array_equal(
        variables["params"]["dense1"]["kernel"][16 * (4 * 1 + 3) + 2],
        arrays["dense1.weight"].reshape(120, 16, 4, 4)[:, 2, 1, 3],
    )


def test_a_table_of_your_own():
    import flax.linen as nn

    class Mine(nn.Module):
        @nn.compact
        def __call__(self, image, *, train=False):
            x = nn.Conv(4, (3, 3), name="first")(image)
            return nn.Dense(2, name="head")(jnp.mean(x, axis=(1, 2)))

    names = convert.Names(
        framework="my checkpoint",
        rules=((r"first", "backbone.0"), (r"head/kernel", "W"), (r"head/bias", "b")),
        leaves={"kernel": "w"},
        by_rank={("kernel", 4): layouts.OIHW},
    )
    arrays = theirs(Mine(), IMAGE, names)
    assert {k: v.shape for k, v in arrays.items()} == {
        "backbone.0.w": (4, 3, 3, 3),
        "backbone.0.bias": (4,),
        "W": (4, 2),
        "b": (2,),
    }
    variables = convert.to_cnnjax(arrays, Mine(), IMAGE, framework=names)
    assert trees.count_parameters(variables) == 4 * 27 + 4 + 8 + 2
    with pytest.raises(UserError, match="both be my checkpoint's b: mend the rules"):
        twice = convert.Names("my checkpoint", (("first", "b"), (".*/(kernel|bias)", "b")), {})
        convert.entries(Mine(), IMAGE, twice)
