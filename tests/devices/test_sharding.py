"""Meshes as they are written, and where on them the arrays of a state lie."""

import os

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec

from cnnjax import checkpoint, models, optim, schedules
from cnnjax.devices import backend, sharding
from cnnjax.errors import UserError
from cnnjax.run import record
from cnnjax.train.state import create_state
from cnnjax.trees import named_leaves


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dta=8", "mesh 'mesh(dta=8)': unknown argument 'dta': did you mean data?"),
        ("data=4,data=2", "mesh 'mesh(data=4,data=2)': data is given twice: drop one"),
        ("data=0", "data=0: give a whole number of at least 1"),
        ("model=-2", "model=-2: give a whole number of at least 1"),
        ("fsdp=two", "fsdp='two': give a whole number"),
        ("data", "too many positional arguments. Write it as mesh(data=1, fsdp=1, model=1)"),
        ("data=8,model=2", "16 devices asked for by data=8,model=2, but JAX sees 8 cpu"),
    ],
)
def test_bad_meshes_are_refused_in_one_line(text, problem):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(text)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mesh_may_not_contradict_the_devices_nor_the_batch():
    assert sharding.count_devices("data=4,model=2", 0) == 8
    assert sharding.count_devices("data=4,model=2", 8) == 8
    assert sharding.count_devices("", 3) == 3
    with pytest.raises(UserError, match="devices=4 contradicts the mesh data=8, which takes 8"):
        sharding.count_devices("data=8", 4)
    with pytest.raises(UserError, match="devices=-1: give a positive number"):
        sharding.count_devices("", -1)
    with pytest.raises(UserError, match="devices=2 contradicts the mesh fsdp=4"):
        backend.start(2, "fsdp=4")
    mesh = sharding.make_mesh("data=2,fsdp=2,model=2")
    sharding.check_batch_size(4, mesh)
    with pytest.raises(UserError, match=r"30 .* by the 4 parts of data=2,fsdp=2,model=2: use 32"):
        sharding.check_batch_size(30, mesh)


@pytest.mark.parametrize(
    ("cores", "batch_size", "devices"),
    [
        (2, 64, 2),
        (8, 64, 4),
        (8, 48, 3),
        (16, 100, 4),
        (4, 30, 1),
        (4, 33, 1),
        (1, 64, 1),
        (8, 1, 1),
    ],
)
def test_a_cpu_is_divided_by_its_cores_into_parts_of_enough_examples(
    monkeypatch, cores, batch_size, devices
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr("jax.devices", lambda: [])
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    monkeypatch.setattr(backend, "enable_compilation_cache", lambda: None)
    backend.start(0, batch_size=batch_size)
    assert f"{backend.DEVICE_COUNT_FLAG}={devices} " in os.environ["XLA_FLAGS"]


def test_meshes_are_made_and_described_as_written():
    mesh = sharding.make_mesh("model=2,data=4")
    assert dict(mesh.shape) == {"model": 2, "data": 4}
    assert sharding.describe(mesh) == "model=2,data=4"
    assert sharding.num_batch_parts(mesh) == 4
    assert sharding.batch_spec(mesh) == PartitionSpec("data")
    assert dict(sharding.make_mesh({"fsdp": 4}).shape) == {"data": 1, "fsdp": 4}
    assert sharding.describe(sharding.make_mesh("fsdp=4")) == "fsdp=4"
    assert sharding.describe(sharding.make_mesh(1)) == "data=1"
    assert dict(sharding.make_mesh().shape) == dict(sharding.make_mesh("").shape) == {"data": 8}


def lenet_state(optimizer="adamw"):
    model = models.create("lenet5", num_classes=10)
    built = optim.make_optimizer(optimizer, schedules.make_schedule("constant", 0.1, total_steps=9))

    def make():
        variables = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
        return create_state(variables, built, jax.random.key(1), ema=True)

    return make


def specs(state, mesh, rules=()):
    places = sharding.state_shardings(state, mesh, rules)
    return {path: place.spec for path, place in named_leaves(places).items()}


WHOLE = PartitionSpec()


def test_default_rules_divide_large_kernels_and_whatever_follows_them():
    state = jax.eval_shape(lenet_state())
    found = specs(state, sharding.make_mesh("fsdp=4,model=2"))
    both = PartitionSpec("fsdp", "model")
    shapes = {path: leaf.shape for path, leaf in named_leaves(state.params).items()}
    assert shapes["dense1/kernel"] == (256, 120)
    assert found["params/dense1/kernel"] == found["ema/dense1/kernel"] == both
    moments = [path for path in found if path.endswith("dense1/kernel")]
    assert len(moments) == 4  # Parameter, average and the two moments of AdamW.
    assert {found[path] for path in moments} == {both}
    # 1 x 5 x 5 x 6 values are below the limit, and the key and the step are no parameters.
    assert {found[path] for path in found if "conv1" in path} == {WHOLE}
    assert found["step"] == found["key"] == WHOLE
    alone = specs(state, sharding.make_mesh("fsdp=8"))
    assert alone["params/dense1/kernel"] == PartitionSpec(None, "fsdp")
    # 84 outputs do not divide by 8, 120 inputs do.
    assert shapes["dense2/kernel"] == (120, 84)
    assert alone["params/dense2/kernel"] == PartitionSpec("fsdp", None)
    assert set(specs(state, sharding.make_mesh("data=8")).values()) == {WHOLE}


def test_rules_of_the_user_come_first_whatever_the_size():
    state = jax.eval_shape(lenet_state("momentum"))
    mesh = sharding.make_mesh("fsdp=4,model=2")
    rules = sharding.parse_rules(["head/kernel=model:-1,fsdp:0", "dense1/.*="])
    found = specs(state, mesh, rules)
    assert found["params/head/kernel"] == found["ema/head/kernel"] == PartitionSpec("fsdp", "model")
    assert found["params/dense1/kernel"] == WHOLE
    assert found["params/dense2/kernel"] == PartitionSpec("fsdp", "model")


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("hed/kernel=fsdp:-1", "did you mean head/kernel"),
        ("head/kernel=data:-1", "unknown sharding axis 'data'"),
        ("head/kernel", "sharding 'head/kernel' has no pattern: write it as PATTERN=AXIS"),
        ("head/kernel=fsdp", "sharding axis 'fsdp': missing a required argument: 'dimension'"),
    ],
)
def test_bad_rules_are_refused(rule, problem):
    state = jax.eval_shape(lenet_state("sgd"))
    with pytest.raises(UserError, match=problem):
        specs(state, sharding.make_mesh("fsdp=8"), sharding.parse_rules([rule]))


def test_two_parameters_of_one_name_are_told_apart():
    params = {"fc": {"kernel": jnp.zeros((8, 16))}, "stage": {"fc": {"kernel": jnp.zeros((8, 16))}}}
    state = create_state({"params": params}, optax.adam(0.1), jax.random.key(0))
    rules = [("stage/fc/kernel", [("fsdp", 0)]), ("fc/kernel", [("fsdp", 1)])]
    found = specs(state, sharding.make_mesh("fsdp=8"), rules)
    assert found["opt_state/0/mu/stage/fc/kernel"] == PartitionSpec("fsdp", None)
    assert found["opt_state/0/mu/fc/kernel"] == PartitionSpec(None, "fsdp")


@pytest.mark.slow
def test_a_checkpoint_moves_to_any_mesh(tmp_path):
    state = jax.jit(lenet_state())()
    mesh = sharding.make_mesh("data=8")
    checkpoint.save(tmp_path, jax.device_put(state, sharding.state_shardings(state, mesh)), {})
    for axes in ("data=4,model=2", "fsdp=8", "data=1"):
        mesh = sharding.make_mesh(axes)
        places = sharding.state_shardings(state, mesh)
        form = jax.tree.map(sharding.placed_form, jax.eval_shape(lambda: state), places)
        restored, _ = checkpoint.restore(tmp_path, form)
        other, _ = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state), sharding=places)
        for found in (restored, other):
            same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state, jax.device_get(found))
            assert all(jax.tree.leaves(same))
            there = jax.tree.map(
                lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), found, places
            )
            assert all(jax.tree.leaves(there))
        # From the divided parameters back to disk, and whole again.
        checkpoint.save(tmp_path / axes, restored, {})
        back, _ = checkpoint.restore(tmp_path / axes, state)
        same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), state, back)
        assert all(jax.tree.leaves(same))


def test_where_a_run_computes_may_change_when_it_is_resumed():
    assert {"mesh", "devices", "sharding"} <= record.CHANGEABLE_ON_RESUME
