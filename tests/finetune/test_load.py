"""Loading: each leaf is kept, or is new or dropped because the caller says so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import checkpoint, finetune, models, trees
from cnnjax.devices import sharding
from cnnjax.devices.sharding import make_mesh, state_shardings
from cnnjax.errors import UserError
from cnnjax.models.simple import SimpleCNN
from cnnjax.run import files, load
from cnnjax.train.state import create_state
from tests.finetune.small import METHODS, SHAPE, initialized, small
from tests.models.test_families import IMAGE, MODELS, random_variables
from tests.tiny import setup

KEY = jax.random.key(7)


def base_of(network, **card):
    variables = jax.device_get(initialized(network))
    return finetune.Base("runs/base", variables, card, finetune.variables_checksum(variables))


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_all_is_kept_where_all_fits():
    base = base_of(small())
    loaded = finetune.load(base, small(), SHAPE, key=KEY)
    assert_same(loaded.variables, base.variables)
    assert (loaded.new, loaded.dropped, loaded.checksum) == ((), (), base.checksum)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_family_takes_another_head(name):
    """From 3 classes to 5, to features alone, and from these to one logit."""
    shape = IMAGE.shape[1:]
    for old, count in ((3, 5), (3, None), (None, 1)):
        before, after = (MODELS[name].copy(num_classes=number) for number in (old, count))
        variables = jax.device_get(random_variables(before))
        base = finetune.Base("base", variables, {}, "")
        new = ("head/.*",) if count else ()
        drop = () if count else ("head/.*",)
        loaded = finetune.load(base, after, shape, new=new, drop=drop, key=KEY)
        form = jax.eval_shape(lambda model=after: model.init(KEY, IMAGE))
        assert jax.tree.map(jnp.shape, loaded.variables["params"]) == jax.tree.map(
            jnp.shape, form["params"]
        )
        kept = trees.named_leaves(variables["params"])
        for path, leaf in trees.named_leaves(loaded.variables["params"]).items():
            if not path.startswith("head/"):
                np.testing.assert_array_equal(leaf, kept[path])
        heads_before = {"head/kernel", "head/bias"} if before.num_classes else set()
        assert set(loaded.dropped) == heads_before
        assert set(loaded.new) == ({"head/kernel", "head/bias"} if count else set())


def test_a_new_head_is_drawn_as_the_model_draws_it():
    loaded = finetune.load(base_of(small()), small(3), SHAPE, new=("head/.*",), key=KEY)
    kernel = loaded.variables["params"]["head"]["kernel"]
    assert kernel.shape == (150, 3)
    # LeCun's initializer: variance 1 / fan-in.
    np.testing.assert_allclose(kernel.std(), 150**-0.5, rtol=0.15)
    other = finetune.load(
        base_of(small()), small(3), SHAPE, new=("head/.*",), key=jax.random.key(8)
    )
    assert not np.array_equal(kernel, other.variables["params"]["head"]["kernel"])
    text = finetune.format_loaded(loaded).splitlines()
    assert text[0].startswith("kept         10 leaves, ")
    assert text[1] == "new          2 leaves, 453 numbers: head/bias, head/kernel"
    assert text[2] == "dropped      2 leaves: head/bias, head/kernel"


def test_a_head_of_another_size_is_never_new_in_silence():
    with pytest.raises(UserError) as error:
        finetune.load(base_of(small(), model="cnn_32_64"), small(3), SHAPE, key=KEY)
    text = str(error.value)
    assert text.startswith("runs/base, a cnn_32_64, does not fit SimpleCNN")
    assert "head/kernel (float32[150,10] in it, float32[150,3] wanted)" in text
    assert "head/bias (float32[10] in it, float32[3] wanted)" in text
    assert "new" in text and "\n" not in text


def test_a_base_of_another_architecture_is_one_error():
    other = SimpleCNN(10, widths=(4, 6), dense_widths=(5,))
    with pytest.raises(UserError) as error:
        finetune.load(base_of(other), small(), SHAPE, new=("head/.*",), key=KEY)
    text = str(error.value)
    assert "missing in it: norm1/bias, norm1/scale" in text
    assert "only in it: conv1/bias, conv2/bias, dense1/bias, dense1/kernel" in text
    assert "\n" not in text


def test_what_the_model_lacks_is_dropped_by_name_only():
    deep = small().clone(dense_widths=(5,))
    base = base_of(deep)
    with pytest.raises(UserError, match="only in it: dense1/bias, dense1/kernel"):
        finetune.load(base, small(), SHAPE, new=("head/.*",), key=KEY)
    loaded = finetune.load(base, small(), SHAPE, new=("head/.*",), drop=("dense1/.*",), key=KEY)
    assert loaded.dropped == ("dense1/bias", "dense1/kernel", "head/bias", "head/kernel")
    for name in ("new", "drop"):
        with pytest.raises(UserError, match=r"matches nothing.*'haed/\.\*'"):
            finetune.load(base, deep, SHAPE, key=KEY, **{name: ("haed/.*",)})


def test_numbers_of_another_kind_are_refused_and_of_another_width_cast():
    base = base_of(small())
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base.variables)
    loaded = finetune.load(dataclasses.replace(base, variables=half), small(), SHAPE, key=KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.variables)} == {np.dtype(np.float32)}
    base.variables["params"]["head"]["bias"] = np.zeros(10, np.int32)
    with pytest.raises(UserError, match=r"head/bias \(int32\[10\] in it, float32\[10\] wanted\)"):
        finetune.load(base, small(), SHAPE, key=KEY)


def saved_state(directory, *, ema):
    """A state on eight devices, divided, as one step of a run's checkpoints."""
    options = {"ema_decay": 0.9} if ema else {}
    state, _ = setup(small(), **options)
    if ema:
        state = state.replace(ema=jax.tree.map(lambda leaf: leaf + 1, state.params))
    mesh = make_mesh("fsdp=8")
    state = jax.device_put(state, state_shardings(state, mesh, sharding.DEFAULT_RULES))
    return state, checkpoint.save(directory, state, {"epoch": 1})


@pytest.mark.parametrize("ema", [pytest.param(False, marks=pytest.mark.slow), True])
def test_checkpoints_of_eight_devices_are_read_without_any(tmp_path, ema):
    """A directory of checkpoints, and one step of it; the average where there is one."""
    state, step = saved_state(tmp_path / "checkpoints", ema=ema)
    for source in (tmp_path / "checkpoints", step):
        base = load.read_base(source)
        assert_same(base.variables, jax.device_get(state.variables()))
        assert {type(leaf) for leaf in jax.tree.leaves(base.variables)} == {np.ndarray}
    other = jax.tree.map(lambda leaf: leaf + 0, base.variables)
    assert finetune.variables_checksum(other) == base.checksum
    other["batch_stats"]["norm1"]["mean"][0] += 1e-6
    assert finetune.variables_checksum(other) != base.checksum


def test_what_orbax_saved_is_read(tmp_path):
    """By others: a tree with params and more, of which no more is read; and parameters alone."""
    import orbax.checkpoint as ocp

    state = create_state(initialized(small()), optax.adam(1e-3), KEY)
    variables = jax.device_get(state.variables())
    tree = {"opt_state": jax.tree.leaves(state.opt_state), **variables}
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "whole", tree)
        saver.save(tmp_path / "params", variables["params"])
    assert_same(load.read_base(tmp_path / "whole").variables, variables)
    params = load.read_base(tmp_path / "params").variables
    assert_same(params["params"], variables["params"])
    assert params["batch_stats"] == {}


def test_no_base_is_one_error(tmp_path):
    with pytest.raises(UserError, match=r"no directory .*nowhere to fine-tune from: .*convert"):
        load.read_base(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is no run \(it has no model.json\)"):
        load.read_base(tmp_path)
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(UserError, match="Orbax cannot read"):
        load.read_base(tmp_path)


def run_of(tmp_path, text):
    """A base as a run, and a run that fine-tunes it; returns both and the state that was saved."""
    name, arguments = "cnn_32_64", {"widths": [4, 6], "norm": "batch"}
    base_model = models.create(name, num_classes=10, **arguments)
    card = {"model": name, "num_outputs": 10, "arguments": arguments, "image_shape": SHAPE}
    base_state, _ = setup(base_model)
    for directory in (tmp_path / "base", tmp_path / text):
        files.write_json(directory / "config.json", {"experiment": "any", "settings": {}})
    files.write_json(tmp_path / "base" / "model.json", card)
    checkpoint.save(tmp_path / "base" / "checkpoints", base_state, {})

    base = load.read_base(tmp_path / "base")
    model = models.create(name, num_classes=3, **arguments)
    tuned = finetune.FineTuned(model, finetune.make_method(text, model, SHAPE))
    loaded = finetune.load(base, model, SHAPE, new=("head/.*",), key=KEY)
    variables = finetune.start(tuned, loaded, SHAPE, KEY)
    record = finetune.describe(tuned, variables, base, new=("head/.*",))
    files.write_json(tmp_path / text / "model.json", {**card, "num_outputs": 3, "finetune": record})
    variables["params"] = jax.tree.map(lambda leaf: leaf + np.float32(0.25), variables["params"])
    state = create_state(variables, optax.sgd(0.1), KEY)
    checkpoint.save(tmp_path / text / "checkpoints", state, {})
    return tuned, state


@pytest.mark.parametrize(
    "text",
    ["lora:2", *(pytest.param(text, marks=pytest.mark.slow) for text in METHODS[:-2]), "adapter:2"],
)
def test_a_run_holds_what_was_trained_and_finds_the_rest(tmp_path, text):
    tuned, state = run_of(tmp_path, text)
    items = checkpoint.restore_items(tmp_path / text / "checkpoints", ["params", "batch_stats"])
    assert_same(items["params"], jax.device_get(state.params))
    assert "frozen" not in checkpoint.item_names(tmp_path / text / "checkpoints")
    trained = load.load_trained(tmp_path / text)
    image = jax.random.normal(KEY, (2, *SHAPE))
    expected = tuned.apply(state.variables(), image, train=False)
    found = trained.model.apply(trained.variables, image, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert isinstance(trained.model, finetune.FineTuned) == (text == "adapter:2")
    if text == "lora:2":  # It is a base in its turn.
        assert load.read_base(tmp_path / text).card["num_outputs"] == 3


def test_another_base_is_refused_and_a_moved_one_is_found(tmp_path):
    run_of(tmp_path, "lora:2")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"there is no directory .*base to fine-tune from"):
        load.load_trained(tmp_path / "lora:2")
    load.load_trained(tmp_path / "lora:2", base=tmp_path / "moved")
    state, _ = setup(models.create("cnn_32_64", num_classes=10, widths=[4, 6], norm="batch"))
    params = jax.tree.map(lambda leaf: leaf + 1e-3, state.params)
    checkpoint.save(tmp_path / "moved" / "checkpoints", state.replace(params=params), {})
    with pytest.raises(UserError, match=r"base .*moved has other weights .* than the one that was"):
        load.load_trained(tmp_path / "lora:2", base=tmp_path / "moved")


def test_a_run_with_adapters_is_no_base(tmp_path):
    run_of(tmp_path, "adapter:2")
    with pytest.raises(UserError, match=r"is a model with adapters: fine-tune from .*base"):
        load.read_base(tmp_path / "adapter:2")
