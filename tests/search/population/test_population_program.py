"""Every member computes what it computes alone, in each way, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnnjax.errors import UserError
from cnnjax.optim import make_optimizer
from cnnjax.search.population import members, program
from cnnjax.tasks.classification import classification
from cnnjax.train.predict import make_eval_step
from cnnjax.train.state import create_state
from cnnjax.train.step import make_step

STEPS, BATCH, COUNT = 3, 4, 2


class Net(nn.Module):
    convolves: bool = False

    @nn.compact
    def __call__(self, image, *, train=False):
        x = image
        if self.convolves:
            x = nn.relu(nn.Conv(2, (3, 3), param_dtype=jnp.float64, name="conv")(x))
        x = x.mean((1, 2)) if self.convolves else x.reshape(len(x), -1)
        return nn.Dense(5, param_dtype=jnp.float64, name="head")(x)


def net(kind):
    return Net(convolves=kind == "own")


def as_float64(image):
    return image.astype(jnp.float64) / 255.0


def step_of(values, kind):
    """The step of a member: a name of `cnnjax.optim`, or an optimizer of the researcher's own."""
    rate = values["learning_rate"]
    if kind == "named":
        optimizer = make_optimizer("adam", rate, weight_decay=values["weight_decay"])
    else:
        optimizer = optax.chain(optax.trace(values["weight_decay"]), optax.sgd(rate))
    step = make_step(
        net(kind), optimizer, classification(5), schedule=lambda step: rate, normalize=as_float64
    )
    return optimizer, step


def initial(values, seed, kind):
    optimizer, _ = step_of(values, kind)
    variables = net(kind).init(jax.random.key(seed), jnp.zeros((1, 6, 6, 1)))
    return create_state(variables, optimizer, jax.random.key(100 + seed))


def data():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 255, (20, 6, 6, 1), np.uint8)
    label = generator.integers(0, 5, 20).astype(np.int32)
    rows = generator.integers(0, 20, (COUNT, STEPS, BATCH)).astype(np.int32)
    return {"image": image, "label": label}, rows


VALUES = [
    {"learning_rate": np.float64(rate), "weight_decay": np.float64(decay)}
    for rate, decay in ((1e-2, 0.0), (3e-2, 0.1))
]


def alone(kind):
    """Each member's state and losses, of its own step with plain numbers."""
    arrays, rows = data()
    found = []
    for seed, (values, own) in enumerate(zip(VALUES, rows, strict=True)):
        plain = {name: float(value) for name, value in values.items()}
        state, losses = initial(plain, seed, kind), []
        step = jax.jit(step_of(plain, kind)[1])
        for places in own:
            batch = {name: jnp.asarray(array[places]) for name, array in arrays.items()}
            state, metrics = step(state, {**batch, "mask": jnp.ones(BATCH, bool)})
            losses.append(metrics["loss"][0])
        found.append((state, np.array(losses)))
    return found


@pytest.mark.parametrize(
    ("way", "devices", "kind"),
    [
        ("loop", 2, "named"),
        ("vmap", 1, "named"),
        pytest.param("unrolled", 2, "own", marks=pytest.mark.slow),
        pytest.param("vmap", 2, "own", marks=pytest.mark.slow),
    ],
)
def test_every_member_equals_its_solo_run(way, devices, kind):
    with jax.enable_x64(True):
        arrays, rows = data()
        mesh = members.member_mesh(devices, COUNT)
        layout = members.layout(COUNT, devices)
        # Traced, as in the step: of a plain 0 the optimizer would have no decay at all.
        begin = jax.jit(initial, static_argnums=(1, 2))
        states = [begin(values, seed, kind) for seed, values in enumerate(VALUES)]
        state = members.place(members.stack(states), layout, mesh)
        values = members.place(members.stack(VALUES), layout, mesh)
        rows = rows[layout.fill]
        train = program.compile_train(
            lambda values, state, batch: step_of(values, kind)[1](state, batch),
            state,
            values,
            arrays,
            jax.ShapeDtypeStruct(rows.shape, np.int32),
            way=way,
            mesh=mesh,
        )
        counts = program.counts_of(layout, mesh)
        state, metrics = train(
            state,
            values,
            program.shared(arrays, mesh),
            program.divided(rows, mesh),
            program.shared(np.int32(STEPS), mesh),
            counts,
        )
        for slot, (own, losses) in zip(layout.slots, alone(kind), strict=True):
            np.testing.assert_allclose(metrics["loss"][0][slot], losses, rtol=1e-12)
            leaves = (jax.tree.leaves((each.params, each.step)) for each in (state, own))
            for one, other in zip(*leaves, strict=True):
                assert one.dtype == other.dtype
                np.testing.assert_allclose(np.asarray(one)[slot], other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "devices"), [("loop", 2), ("vmap", 1)])
def test_every_member_is_evaluated_on_its_own_examples(way, devices):
    with jax.enable_x64(True):
        arrays, rows = data()
        mesh = members.member_mesh(devices, COUNT)
        layout = members.layout(COUNT, devices)
        begin = jax.jit(initial, static_argnums=(1, 2))
        states = [begin(values, seed, "own") for seed, values in enumerate(VALUES)]
        rows, mask = rows[layout.fill], np.ones((COUNT, STEPS, BATCH), bool)
        mask[:, -1, -1] = False

        def evaluated(values, variables, batch):
            step = make_eval_step(net("own"), classification(5), normalize=as_float64)
            return step(variables, batch)

        evaluate = program.make_evaluate(evaluated, way=way, mesh=mesh)
        scores = evaluate(
            members.place(members.stack([state.variables() for state in states]), layout, mesh),
            members.place(members.stack(VALUES), layout, mesh),
            program.shared(arrays, mesh),
            *(program.divided(each, mesh) for each in (rows, mask)),
            program.counts_of(layout, mesh),
        )
        for state, slot in zip(states, layout.slots, strict=True):
            batch = {name: array[rows[slot, -1]] for name, array in arrays.items()}
            own = evaluated(None, state.variables(), {**batch, "mask": mask[slot, -1]})
            np.testing.assert_allclose(scores["loss"][0][slot, -1], own["loss"][0], rtol=1e-12)
            assert scores["accuracy"][1][slot, -1] == BATCH - 1


def test_what_is_not_in_use_is_not_computed():
    """Of a device with fewer members than slots the rest stay as they were."""
    arrays, rows = data()
    rows = np.stack([*rows, rows[0]])
    mesh = members.member_mesh(1, 3)
    layout = members.layout(2, 1, 3)

    def step(values, state, batch):
        return state + values * batch["label"].sum(), {"loss": (state, state)}

    state = jnp.arange(3.0)
    forms = (jax.ShapeDtypeStruct((3,), jnp.float32),) * 2
    train = program.compile_train(
        step,
        *forms,
        arrays,
        jax.ShapeDtypeStruct(rows.shape, np.int32),
        way="loop",
        mesh=mesh,
    )
    after, metrics = train(
        program.divided(state, mesh),
        program.divided(jnp.ones(3), mesh),
        program.shared(arrays, mesh),
        program.divided(rows, mesh),
        program.shared(np.int32(2), mesh),
        program.counts_of(layout, mesh),
    )
    sums = arrays["label"][rows].sum(-1)
    expected = [sums[0, :2].sum(), 1 + sums[1, :2].sum(), 2.0]
    np.testing.assert_allclose(after, expected)
    assert metrics["loss"][0].shape == (3, STEPS) and not metrics["loss"][0][2].any()


def test_ways_are_chosen_by_platform_and_refused_by_name():
    mesh = members.member_mesh(1, 4)
    assert program.choose_way("auto", mesh, 4) == "loop"
    assert program.choose_way("vmap", mesh, 4) == "vmap"
    with pytest.raises(UserError, match="unknown way to compute a population 'lop'"):
        program.choose_way("lop", mesh, 4)
    with pytest.raises(UserError, match="unrolled: 17 members would take long to compile"):
        program.choose_way("unrolled", mesh, 17)
