"""Checkpoints come back bit for bit, and no kill, full disk or bad file loses what was saved."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax import checkpoint
from cnnjax.checkpoint import arrays, directories
from cnnjax.devices import environment
from cnnjax.errors import UserError
from cnnjax.train.state import create_state
from tests import disks

ROOT = Path(__file__).parents[2]


def make_state(step=0, seed=0, *, optimizer=None, ema=True, width=4) -> Any:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "stem": {"kernel": jax.random.normal(keys[0], (3, 3, 1, width)), "bias": jnp.zeros(width)},
        "head": {"kernel": jax.random.normal(keys[1], (width, 10)), "bias": jnp.full(10, -0.0)},
    }
    batch_stats = {"norm": {"mean": jax.random.normal(keys[2], (width,)), "var": jnp.ones(width)}}
    state: Any = create_state(
        {"params": params, "batch_stats": batch_stats},
        optimizer or optax.adamw(1e-3),
        jax.random.key(seed + 7),
        ema=ema,
    )
    return state.replace(step=jnp.int32(step))


def bits(tree):
    """Structure, and for each leaf its dtype, shape and bytes."""

    def leaf_bits(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(leaf.dtype), leaf.shape, np.array(jax.random.key_data(leaf)).tobytes()
        return str(leaf.dtype), leaf.shape, np.array(leaf).tobytes()

    return jax.tree.structure(tree), [leaf_bits(leaf) for leaf in jax.tree.leaves(tree)]


def data_files(step_directory: Path) -> list[Path]:
    return sorted(p for p in step_directory.rglob("*") if p.is_file() and p.stat().st_size)


def flip_bit(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    states = {step: make_state(step, seed=step) for step in (1, 2)}
    for step, state in states.items():
        checkpoint.save(directory, state, {"position": step})
    return directory, states


@pytest.fixture
def saved(saved_once, tmp_path):
    """Steps 1 and 2 in a directory of the test's own; returns it and their states."""
    directory, states = saved_once
    return Path(shutil.copytree(directory, tmp_path / "checkpoints")), states


# Round trips


def _updated(optimizer):
    """A state after two updates, so that moments and counts are not at their initial values."""
    state = make_state(optimizer=optimizer)

    @jax.jit
    def update(params, opt_state):
        updates, opt_state = optimizer.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = update(*update(state.params, state.opt_state))
    return state.replace(params=params, opt_state=opt_state)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1),
        optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
        optax.chain(
            optax.clip_by_global_norm(1.0),
            optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 3).gradient_transformation(),
        ),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
        optax.contrib.muon(1e-3),
        optax.partition(
            {"train": optax.adam(1e-3), "freeze": optax.set_to_zero()},
            {"stem": "freeze", "head": "train"},
        ),
        optax.add_noise(0.1, 0.5, jax.random.key(3)),
    ],
    ids=["sgd", "adamw", "multi-steps", "injected", "muon", "partition", "noise"],
)
def test_every_optimizer_state_round_trips_bit_for_bit(tmp_path, optimizer):
    state = _updated(optimizer)
    meta = {"epoch": 3, "best": 0.9912345678901234, "config": {"seed": 1, "names": ["a", None]}}
    path = checkpoint.save(tmp_path, state, meta)
    restored, restored_meta = checkpoint.restore(tmp_path, jax.eval_shape(lambda: state))
    assert bits(restored) == bits(state)
    assert restored_meta == meta
    assert json.loads((path / "meta.json").read_text()) == meta


def test_optional_parts_may_be_missing(tmp_path):
    state = make_state(ema=False, optimizer=optax.sgd(0.1)).replace(batch_stats={})
    checkpoint.save(tmp_path, state, {})
    restored, _ = checkpoint.restore(tmp_path, state)
    assert restored.ema is None and restored.batch_stats == {}
    assert bits(restored) == bits(state)
    assert checkpoint.restore_items(tmp_path, ("batch_stats", "ema"))["ema"] is None


def test_dtypes_keys_and_special_values_round_trip(tmp_path):
    values = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 1.1], np.float32)
    leaves = {
        "float32": jnp.asarray(values),
        "bfloat16": jnp.asarray(values, jnp.bfloat16),
        "float16": jnp.asarray(values, jnp.float16),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
        "bool": jnp.array([True, False]),
        "uint8": jnp.arange(4, dtype=jnp.uint8),
        "complex64": jnp.array([1 + 2j]),
        "scalar": jnp.float32(0.1),
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "rbg": jax.random.split(jax.random.key(1, impl="rbg"), 2),
        "float64": np.array([0.1]),  # On the host; it must not pass through a float32 device.
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "a.b c": {"0": jnp.ones(2), "1": [jnp.zeros(1), (jnp.ones(1),)]},
    }
    state = {"step": jnp.int32(5), "leaves": leaves}
    checkpoint.save(tmp_path, state, {})
    restored, _ = checkpoint.restore(tmp_path, state)
    assert bits(restored) == bits(state)
    assert isinstance(restored["leaves"]["float64"], np.ndarray)
    items = checkpoint.restore_items(tmp_path, ("leaves",))
    assert items["step"] == 5
    assert items["leaves"]["empty"].shape == (0, 3)
    assert items["leaves"]["bfloat16"].dtype == jnp.bfloat16


def test_fields_that_are_no_arrays_are_kept_from_the_abstract_state(tmp_path):
    @flax.struct.dataclass
    class State:
        step: jax.Array
        params: dict
        apply: object = flax.struct.field(pytree_node=False)

    checkpoint.save(tmp_path, State(jnp.int32(1), {"a": jnp.ones(2)}, apply=min), {})
    restored, _ = checkpoint.restore(tmp_path, State(jnp.int32(0), {"a": jnp.zeros(2)}, apply=max))
    assert restored.apply is max
    np.testing.assert_array_equal(restored.params["a"], [1, 1])


def test_restored_random_streams_continue(tmp_path):
    state = make_state(3)
    checkpoint.save(tmp_path, state, {})
    restored, _ = checkpoint.restore(tmp_path, state)
    draw = [jax.random.normal(jax.random.fold_in(s.key, s.step), (4,)) for s in (state, restored)]
    np.testing.assert_array_equal(*draw)


def test_plain_orbax_reads_each_item(saved):
    import orbax.checkpoint as ocp

    directory, states = saved
    restored = ocp.StandardCheckpointer().restore(directory / "00000002" / "params")
    assert bits(restored) == bits(jax.device_get(states[2].params))
    progress = ocp.StandardCheckpointer().restore(directory / "00000002" / "progress")
    assert progress["step"] == 2
    adam = ocp.StandardCheckpointer().restore(directory / "00000002" / "opt_state")
    assert bits(adam["0"]["mu"]) == bits(jax.device_get(states[2].opt_state[0].mu))


def test_items_are_read_without_a_state(saved):
    directory, states = saved
    items = checkpoint.restore_items(directory, ("params", "batch_stats", "ema"))
    assert items["step"] == 2
    assert bits(items["params"]) == bits(jax.device_get(states[2].params))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(items["params"]))
    assert checkpoint.restore_items(directory, step=1)["step"] == 1
    with pytest.raises(UserError, match=r"unknown item .*'parms': did you mean params"):
        checkpoint.restore_items(directory, ("parms",))


def test_items_not_wanted_are_not_read(saved):
    directory, _ = saved
    shutil.rmtree(directory / "00000002" / "opt_state")
    assert checkpoint.restore_items(directory)["step"] == 2


# Devices


def test_saved_on_eight_devices_restored_on_one_and_back(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    sharded = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    alone = make_state(1, width=8, optimizer=optax.sgd(0.1, momentum=0.9))
    spread = jax.device_put(alone, replicated)
    kernel = jax.device_put(alone.params["head"]["kernel"], sharded)
    spread = spread.replace(params={**spread.params, "head": {**spread.params["head"]}})
    spread.params["head"]["kernel"] = kernel
    checkpoint.save(tmp_path, spread, {})

    one, _ = checkpoint.restore(tmp_path, alone)
    assert bits(one) == bits(alone)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(one))
    eight, _ = checkpoint.restore(tmp_path, alone, sharding=replicated)
    assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(eight.params))
    assert bits(eight) == bits(alone)
    like, _ = checkpoint.restore(tmp_path, spread)
    assert like.params["head"]["kernel"].sharding == sharded
    by_tree = jax.tree.map(lambda _: replicated, alone).replace(batch_stats=sharded)
    mixed, _ = checkpoint.restore(tmp_path, alone, sharding=by_tree)
    assert mixed.batch_stats["norm"]["var"].sharding == sharded
    assert mixed.params["stem"]["bias"].sharding == replicated


def test_restored_state_can_be_used_with_a_mesh_unless_it_was_committed(saved):
    directory, states = saved
    restored, _ = checkpoint.restore(directory, states[2])
    assert not restored.params["head"]["kernel"].committed
    placed = jax.device_put(states[2], jax.devices()[3])
    restored, _ = checkpoint.restore(directory, placed)
    assert restored.params["head"]["kernel"].devices() == {jax.devices()[3]}


# Damage


@pytest.mark.parametrize("seed", range(12))
def test_one_flipped_bit_in_any_file_is_seen(saved, seed):
    directory, states = saved
    generator = random.Random(seed)
    victim = generator.choice(data_files(directory / "00000002"))
    flip_bit(victim, generator)
    messages = []
    restored, meta = checkpoint.restore(directory, states[1], warn=messages.append)
    if victim.name == "manifest.json" and not messages:
        # A space of the manifest became another one: its content is what it was.
        assert bits(restored) == bits(states[2])
        return
    assert bits(restored) == bits(states[1]) and meta == {"position": 1}
    assert len(messages) == 1 and "00000002" in messages[0]
    assert victim.name in messages[0]


def _truncate(path):
    victim = next(p for p in data_files(path / "opt_state") if p.parent.name == "d")
    os.truncate(victim, victim.stat().st_size // 2)


def _empty(path):
    shutil.rmtree(path)
    path.mkdir()


def _set_format(path):
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**content, "format": 99}))


def _forge_digest(path):
    """The files are whole and the manifest is too, but they are not of the same arrays."""
    from cnnjax.checkpoint import manifest

    content = manifest.read(path)
    content["items"]["params"]["head/bias"]["sha256"] = "0" * 64
    (path / "manifest.json").unlink()
    manifest.write(path, {name: content[name] for name in ("environment", "items")})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "its file opt_state/.* was changed or cut short"),
        (_empty, "it has no manifest.json, so it was never completed"),
        (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text(""), "manifest.json cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json cannot be read"),
        (lambda path: shutil.rmtree(path / "params"), "its file params/.* is missing"),
        (lambda path: (path / "meta.json").write_text("{}"), "its file meta.json was changed"),
        (_set_format, "manifest.json has format 99, and this version reads 1"),
        (_forge_digest, "its array params/head/bias is not the one that was saved"),
    ],
)
def test_damaged_steps_are_skipped_by_name(saved, damage, message):
    directory, states = saved
    damage(directory / "00000002")
    messages = []
    restored, _ = checkpoint.restore(directory, states[1], warn=messages.append)
    assert bits(restored) == bits(states[1])
    assert len(messages) == 1
    with pytest.warns(UserWarning, match=rf"skipping checkpoint .*00000002: {message}"):
        checkpoint.restore(directory, states[1])
    with (
        pytest.warns(UserWarning, match=message),
        pytest.raises(UserError, match="no checkpoint of step 2 is undamaged"),
    ):
        checkpoint.restore(directory, states[1], step=2)


def test_when_nothing_is_left_it_says_so(saved, tmp_path):
    directory, states = saved
    for step in (1, 2):
        _truncate(directory / f"{step:08d}")
    messages = []
    with pytest.raises(UserError, match="none of its checkpoints is undamaged"):
        checkpoint.restore(directory, states[1], warn=messages.append)
    assert len(messages) == 2
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.restore(tmp_path / "nowhere", states[1])
    with pytest.raises(UserError, match="no checkpoint of step 7: choose from 1, 2"):
        checkpoint.restore(directory, states[1], step=7)


def test_another_architecture_is_an_error_and_not_damage(saved):
    directory, states = saved
    state = states[2]
    other = {
        "stem": {"kernel": jnp.zeros((5, 5, 1, 4)), "bias": jnp.zeros(4, jnp.bfloat16)},
        "top": {"kernel": jnp.zeros((4, 10)), "bias": jnp.zeros(10)},
    }
    messages = []
    with pytest.raises(UserError) as raised:
        checkpoint.restore(directory, state.replace(params=other), warn=messages.append)
    text = str(raised.value)
    assert messages == []
    assert "Missing in it: params/top/bias, params/top/kernel." in text
    assert "Only in it: params/head/bias, params/head/kernel." in text
    assert "params/stem/kernel (float32[3,3,1,4] in it, float32[5,5,1,4] wanted)" in text
    assert "params/stem/bias (float32[4] in it, bfloat16[4] wanted)" in text
    assert "\n" not in text
    with pytest.raises(UserError, match=r"Only in it: opt_state/0/count, .* and 5 more\."):
        checkpoint.restore(
            directory, state.replace(ema=None, opt_state=optax.sgd(0.1).init(state.params))
        )
    with pytest.raises(UserError, match=r"uint32\[2\] key of threefry2x32 in it, uint32\[4\] key"):
        checkpoint.restore(directory, state.replace(key=jax.random.key(0, impl="rbg")))
    with pytest.raises(UserError, match=r"progress/key \(uint32\[2\] .* in it, uint32\[3,2\] "):
        checkpoint.restore(directory, state.replace(key=jax.random.split(state.key, 3)))


def test_each_change_since_a_step_was_saved_is_one_line(saved, monkeypatch):
    directory, states = saved
    now = environment.describe()
    later = {**now, "versions": {**now["versions"], "jax": "9.9"}, "devices": "4 x tpu (v9)"}
    monkeypatch.setattr(environment, "describe", lambda: later)
    messages = []
    restored, _ = checkpoint.restore(directory, states[2], warn=messages.append)
    assert messages == [
        f"since the checkpoint was saved: jax {jax.__version__} -> 9.9: compiled code may round "
        "differently: bits may differ.",
        f"since the checkpoint was saved: devices {now['devices']} -> 4 x tpu (v9): sums are made "
        "in another order: bits may differ.",
    ]
    assert bits(restored) == bits(states[2])


# Bad input


@pytest.mark.parametrize(
    ("state", "meta", "message"),
    [
        ({"step": jnp.int32(0), "a": {"b": 1.5}}, {}, "leaf 'b' is a float"),
        ({"a": {"b": jnp.ones(1)}}, {}, "no field `step`"),
        ({"step": jnp.int32(0), "progress": {}}, {}, "cannot be named 'progress'"),
        (
            {"step": jnp.int32(0), "a": {"b/c": jnp.ones(1), "b": {"c": jnp.ones(1)}}},
            {},
            "two leaves of the state's a have the same path",
        ),
        ({"step": jnp.int32(0)}, {"x": jnp.ones(1)}, "meta cannot be saved as JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(tmp_path, state, meta, message):
    with pytest.raises(UserError, match=message):
        checkpoint.save(tmp_path / "new", state, meta)
    with checkpoint.Saver(tmp_path / "new") as saver, pytest.raises(UserError, match=message):
        saver.save(state, meta)
    assert not (tmp_path / "new").exists()


def test_retention_settings_are_checked(tmp_path):
    with pytest.raises(UserError, match="keep_last is 0"):
        checkpoint.Saver(tmp_path, keep_last=0)
    with pytest.raises(UserError, match="keep_best is -1"):
        checkpoint.Saver(tmp_path, keep_best=-1)


# Saving in the background, keeping and deleting

SMALL = {"step": jnp.int32(0), "params": {"a": jnp.ones(3)}}


def save_small(directory, values, *, first=1, **retention):
    with checkpoint.Saver(directory, **retention) as saver:
        for step, value in enumerate(values, first):
            meta = {} if value is None else {"accuracy": value}
            saver.save({**SMALL, "step": jnp.int32(step)}, meta)


def test_the_last_and_the_best_steps_are_kept(tmp_path):
    values = [0.5, 0.9, None, 0.9, 0.1, float("nan"), 0.3]
    save_small(tmp_path / "max", values, metric="accuracy", keep_last=2, keep_best=1)
    assert checkpoint.steps(tmp_path / "max") == [2, 6, 7]
    assert checkpoint.latest(tmp_path / "max") == 7
    assert checkpoint.best(tmp_path / "max", "accuracy") == 2
    save_small(
        tmp_path / "min", values, metric="accuracy", keep_last=1, keep_best=2, lower_is_better=True
    )
    assert checkpoint.steps(tmp_path / "min") == [5, 7]
    assert checkpoint.best(tmp_path / "min", "accuracy", lower_is_better=True) == 5
    assert checkpoint.best(tmp_path / "min", "recall") is None
    save_small(tmp_path / "all", values[:3], keep_last=None)
    assert checkpoint.steps(tmp_path / "all") == [1, 2, 3]
    assert (
        checkpoint.steps(tmp_path / "none") == [] and checkpoint.latest(tmp_path / "none") is None
    )


def test_a_resumed_saver_knows_the_best_of_before(tmp_path):
    save_small(tmp_path, [0.9, 0.1], metric="accuracy", keep_last=1)
    save_small(tmp_path, [0.2, 0.3], first=3, metric="accuracy", keep_last=1)
    assert checkpoint.steps(tmp_path) == [1, 4]


def test_a_run_that_went_back_does_not_lose_its_new_steps_to_old_later_ones(tmp_path):
    save_small(tmp_path, [None] * 3, first=8, keep_last=3)
    _truncate_all(tmp_path / "00000009")
    _truncate_all(tmp_path / "00000010")
    restored, _ = checkpoint.restore(tmp_path, SMALL, warn=lambda _: None)
    assert restored["step"] == 8
    save_small(tmp_path, [None], first=9, keep_last=1)
    assert checkpoint.restore(tmp_path, SMALL, warn=lambda _: None)[0]["step"] == 9
    assert checkpoint.clean(tmp_path, after=9) == ["00000010"]
    assert checkpoint.steps(tmp_path) == [9]


def _truncate_all(path):
    for file in data_files(path):
        os.truncate(file, 1)


def test_a_step_saved_again_replaces_the_first(tmp_path):
    checkpoint.save(tmp_path, SMALL, {"try": 1})
    path = checkpoint.save(tmp_path, SMALL, {"try": 2})
    assert checkpoint.read_meta(tmp_path) == {"try": 2}
    assert [p for p in tmp_path.iterdir()] == [path]
    save_small(tmp_path, [None], first=0)
    assert checkpoint.steps(tmp_path) == [0]
    assert checkpoint.read_meta(tmp_path, step=0) == {}


def test_the_copy_is_made_before_save_returns(tmp_path, monkeypatch):
    """The next step may reuse the buffers, and the loop may change its meta."""
    go = threading.Event()
    write_item = arrays.write_item
    monkeypatch.setattr(arrays, "write_item", lambda *a, **k: go.wait(10) and write_item(*a, **k))
    host = np.arange(3)
    state = {"step": jnp.int32(1), "params": {"a": jnp.arange(1e5)}, "position": {"order": host}}
    meta = {"position": [1]}
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with checkpoint.Saver(tmp_path) as saver:
        saver.save(state, meta)
        jax.block_until_ready(advance(state))
        host[:] = -1
        meta["position"].append(2)
        assert checkpoint.steps(tmp_path) == []
        go.set()
    items = checkpoint.restore_items(tmp_path, ("params", "position"))
    np.testing.assert_array_equal(items["params"]["a"], np.arange(1e5))
    np.testing.assert_array_equal(items["position"]["order"], np.arange(3))
    assert items["step"] == 1 and checkpoint.read_meta(tmp_path) == {"position": [1]}


def test_background_errors_are_raised_by_the_next_call(tmp_path, monkeypatch):
    def broken(*_, **options):
        raise RuntimeError("the writer broke")

    saver = checkpoint.Saver(tmp_path)
    saver.save(SMALL, {})
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "write_item", broken)
        saver.save({**SMALL, "step": jnp.int32(1)}, {})
        with pytest.raises(RuntimeError, match="the writer broke"):
            saver.save({**SMALL, "step": jnp.int32(2)}, {})
        saver.save({**SMALL, "step": jnp.int32(3)}, {})
        with pytest.raises(RuntimeError, match="the writer broke"):
            saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["00000000"]
    saver.save({**SMALL, "step": jnp.int32(4)}, {})
    saver.close()
    assert checkpoint.steps(tmp_path) == [0, 4]


def test_clean_deletes_what_kills_leave_and_nothing_else(saved):
    directory, states = saved
    (directory / ".tmp-00000003" / "params").mkdir(parents=True)
    (directory / ".tmp-deleted-00000001" / "params").mkdir(parents=True)
    (directory / "00000004").mkdir()
    (directory / "notes").mkdir()
    assert checkpoint.steps(directory) == [1, 2]
    assert checkpoint.clean(directory) == [
        ".tmp-00000003",
        ".tmp-deleted-00000001",
        "00000004",
    ]
    assert sorted(path.name for path in directory.iterdir()) == ["00000001", "00000002", "notes"]
    assert checkpoint.clean(directory / "nowhere") == []
    assert bits(checkpoint.restore(directory, states[1])[0]) == bits(states[2])


def test_deleting_takes_the_step_from_the_list_before_its_first_file(saved, monkeypatch):
    directory, states = saved
    killed = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            directories.delete(directory / "00000002")
    assert checkpoint.steps(directory) == [1]
    messages = []
    restored, _ = checkpoint.restore(directory, states[1], warn=messages.append)
    assert bits(restored) == bits(states[1]) and messages == []


# Full disks


def test_space_is_checked_before_the_first_step(tmp_path):
    state = make_state()
    expected = sum(x.nbytes for x in jax.tree.leaves(state.replace(key=jnp.zeros(2, jnp.uint32))))
    assert checkpoint.state_bytes(state) == expected + 2**20
    assert checkpoint.state_bytes(jax.eval_shape(lambda: state)) == expected + 2**20
    checkpoint.check_space(tmp_path / "new" / "checkpoints", 1)
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    with pytest.raises(UserError, match=r"need 1,000,000,000.0 MB, and .* MB are free"):
        checkpoint.check_space(tmp_path, 10**15)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*file"):
        checkpoint.check_space(tmp_path / "file", 1)
    with pytest.raises(UserError, match=r"cannot write checkpoints to .*file/checkpoints"):
        checkpoint.check_space(tmp_path / "file" / "checkpoints", 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    with disks.mounted(tmp_path / "disk", "size=2m") as disk:
        yield disk


def test_a_full_disk_keeps_the_earlier_steps_and_leaves_nothing(small_disk):
    directory = small_disk / "checkpoints"
    noise = jax.random.normal(jax.random.key(0), (300_000,))  # 1.1 MB, compressed
    states = [{"step": jnp.int32(s), "params": {"a": noise + s}} for s in (1, 2, 3)]
    saver = checkpoint.Saver(directory, keep_last=None)
    saver.save(states[0], {})
    saver.wait()
    before = shutil.disk_usage(small_disk).free
    for state in states[1:]:
        saver.save(state, {})
        with pytest.raises(
            UserError, match=r"cannot save step . in .* \(No space left on device\)"
        ):
            saver.wait()
    assert shutil.disk_usage(small_disk).free == before
    assert bits(checkpoint.restore(directory, states[0])[0]) == bits(states[0])
    saver.save({**SMALL, "step": jnp.int32(2)}, {})
    saver.close()
    assert checkpoint.steps(directory) == [1, 2]


def test_a_file_size_limit_is_one_clear_error(tmp_path):
    checkpoint.save(tmp_path, SMALL, {})
    noise = np.random.default_rng(0).bytes(200_000).hex()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(UserError, match=r"cannot save step 1 in .* \(File too large\)"):
            checkpoint.save(tmp_path, {**SMALL, "step": jnp.int32(1)}, {"noise": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["00000000"]


# Kills

SAVE_FOREVER = """
import sys, jax.numpy as jnp
from cnnjax import checkpoint
first, directory = int(sys.argv[1]), sys.argv[2]
checkpoint.clean(directory)
with checkpoint.Saver(directory, keep_last=2, metric="m") as saver:
    for step in range(first, 10**6):
        params = {f"layer{i}": jnp.full((50, i + 1), step, jnp.float32) for i in range(4)}
        saver.save({"step": jnp.int32(step), "params": params, "ema": params}, {"m": -step % 5})
        saver.wait()
        print(step, flush=True)
"""


def _kill_and_check(directory: Path, kills: int, generator: random.Random) -> None:
    announced = 0
    messages: list[str] = []
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(announced + 1), str(directory)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        time.sleep(generator.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().split()
        process.wait()
        announced = max(announced, *(int(line) for line in lines if line.strip()))

        found = checkpoint.restore_items(directory, ("params", "ema"), warn=messages.append)
        assert messages == []
        assert found["step"] >= announced
        announced = found["step"]
        for leaf in jax.tree.leaves((found["params"], found["ema"])):
            np.testing.assert_array_equal(leaf, found["step"])
        for step in checkpoint.steps(directory):
            assert checkpoint.restore_items(directory, ("params",), step=step)["step"] == step


def test_killed_while_saving_the_last_announced_step_is_there(tmp_path):
    _kill_and_check(tmp_path, 2, random.Random(0))


@pytest.mark.exhaustive
def test_killed_often_while_saving(tmp_path):
    _kill_and_check(tmp_path, 30, random.Random(1))


def test_a_program_that_forgets_to_close_is_told_what_it_lost(tmp_path):
    code = (
        "import sys, jax.numpy as jnp; from cnnjax import checkpoint; "
        "checkpoint.Saver(sys.argv[1]).save({'step': jnp.int32(1), 'p': {'a': jnp.ones(1)}}, {})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert checkpoint.steps(tmp_path) == [1] or "Error" in ended.stderr
