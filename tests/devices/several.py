"""What tests run in each of several processes: `python -m tests.devices.several TASK OUT`."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from cnnjax import checkpoint, models
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.data.streaming import stream_arrays
from cnnjax.devices import processes
from cnnjax.devices.sharding import batch_sharding, make_mesh, replicated
from cnnjax.models.resnet import ResNet
from cnnjax.train.compile import compile_train
from tests.tiny import random_arrays, setup

MODELS = {
    "lenet5": lambda: models.create("lenet5", num_classes=10),
    "resnet": lambda: ResNet(
        (1,), block="basic", num_classes=10, stem="cifar", stem_features=4, features=4
    ),
}
STEPS = {"float64": 30, "float32": 5}


def trained(name, dtype, *, stream=False):
    """Trains over all devices; returns parameters, statistics and the loss of each step, by name.

    The first half of the data is used by one process as by several.
    """
    mesh = make_mesh()
    sharding = batch_sharding(mesh)
    arrays = random_arrays(512)
    if stream:
        data = stream_arrays(arrays, 32, seed=3, sharding=sharding)
    else:
        data = ResidentPipeline(arrays, 32, seed=3, sharding=sharding, replicated=replicated(mesh))
    with jax.enable_x64(dtype == "float64"):
        state, make_step = setup(MODELS[name](), dtype=jnp.dtype(dtype))
        state = processes.put(state, replicated(mesh))
        train = compile_train(make_step, state, data, method="jit", mesh=mesh)
        state, metrics = next(train(state, 0, [STEPS[dtype]]))
        leaves = jax.tree_util.tree_flatten_with_path((state.params, state.batch_stats))[0]
        result = {jax.tree_util.keystr(path): processes.fetch(leaf) for path, leaf in leaves}
    return result | {"loss": metrics["loss"][0] / metrics["loss"][1]}


def sharded_state():
    """A state of which every device holds a part, a whole copy, or one of two halves."""
    mesh = jax.make_mesh(
        (2, jax.device_count() // 2),
        ("model", "data"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )

    def spread(*axes):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    generator = np.random.default_rng(5)
    values = {
        "whole": (generator.normal(size=(3, 5)).astype(np.float32), spread()),
        "rows": (generator.normal(size=(16, 4)), spread(("model", "data"))),
        "halves": (generator.integers(0, 99, (6, 8)).astype(np.int8), spread(None, "model")),
        "blocks": (generator.normal(size=(8, 4)).astype(jnp.bfloat16), spread("data", "model")),
    }
    with jax.enable_x64(True):
        params = {name: processes.put(*value) for name, value in values.items()}
    key = processes.put(jax.random.key(7), spread())
    return {"step": jnp.int32(3), "params": params, "key": key}


def save(out):
    """Saves in the background while the devices exchange numbers."""
    state = sharded_state()
    total = jax.jit(lambda x: jnp.sum(x.astype(jnp.float32)))
    with checkpoint.Saver(out) as saver:
        for step in (3, 4):
            saver.save(state | {"step": jnp.int32(step)}, {"position": step})
            for _ in range(100):
                jax.block_until_ready(total(state["params"]["rows"]))


def restore(out):
    """Restores what other processes saved, and compares it with what was saved."""
    with jax.enable_x64(True):
        state = sharded_state()
        restored, meta = checkpoint.restore(out, state)
        assert (int(restored["step"]), meta["position"]) == (4, 4)
        for name, leaf in state["params"].items():
            found = restored["params"][name]
            assert (found.dtype, found.sharding) == (leaf.dtype, leaf.sharding), name
            np.testing.assert_array_equal(processes.fetch(found), processes.fetch(leaf))
        keys = [jax.random.key_data(each["key"]) for each in (state, restored)]
        np.testing.assert_array_equal(*keys)


def agree(out):
    """What processes tell each other."""
    me, count = processes.index(), processes.count()
    assert processes.exchange("squares", [me, me**2]) == [[n, n**2] for n in range(count)]
    assert processes.from_first("name", f"run {me}") == "run 0"
    stop = processes.agreed("stop", lambda: "SIGTERM" if me == count - 1 else None)
    assert stop() == "SIGTERM"
    total = jax.jit(jnp.sum)(processes.put(np.arange(8.0), sharded_state()["key"].sharding))
    assert float(total) == 28
    assert jax.device_count() == count * jax.local_device_count()


@dataclasses.dataclass(frozen=True)
class Config:
    task: tyro.conf.Positional[str]
    out: tyro.conf.Positional[Path]
    coordinator: str = "auto"
    num_processes: int = 0
    process_id: int = -1


def main(config):
    processes.start(config.coordinator, config.num_processes, config.process_id, timeout_secs=120)
    if config.task == "train":
        for name in MODELS:
            for dtype in STEPS:
                result = trained(name, dtype)
                if processes.is_first():
                    np.savez(config.out / f"{name}-{dtype}.npz", **result)
        streamed = trained("resnet", "float32", stream=True)
        for name, leaf in streamed.items():
            np.testing.assert_array_equal(leaf, result[name])
    else:
        {"agree": agree, "save": save, "restore": restore}[config.task](config.out)
    processes.end(0)


if __name__ == "__main__":
    main(tyro.cli(Config))
