"""Operations and bytes against closed forms; what the compiler says; budgets."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from cnnjax import commands, models
from cnnjax.cost import budget, compiled, operations, roofline
from cnnjax.cost.operations import LayerCost, layer_costs
from cnnjax.cost.scopes import layer_of
from cnnjax.errors import UserError
from cnnjax.models.summary import abstract_variables, summary

# A network of each kind: chains, residual, depthwise, branches, dense connections, attention.
FAMILIES = ("lenet5", "cnn_32_64", "mlp", "mobilenet_v2", "squeezenet1_1", "vit_b_32")
F32 = jnp.float32


def form(*shape):
    return jax.ShapeDtypeStruct(shape, F32)


def costs_of(name, batch_size=1):
    shape, classes = models.input_shape(name), models.canonical_classes(name)
    model = models.create(name, num_classes=classes)
    variables = abstract_variables(model, shape)
    costs = layer_costs(
        lambda v, image: model.apply(v, image, train=False), variables, form(batch_size, *shape)
    )
    return costs, summary(model, shape), variables


# From a batch of 16 on a CPU has forms of its own for small convolutions.
@pytest.mark.parametrize("batch_size", [3, 64])
@pytest.mark.parametrize("name", FAMILIES[:3])
def test_products_are_twice_the_closed_form_of_the_summary(name, batch_size):
    costs, closed, _ = costs_of(name, batch_size)
    by_layer = {each.layer: each for each in costs}
    for row in closed.rows:
        # A convolution's pooling is counted with it, among the other operations.
        assert by_layer[row.path].products == 2 * batch_size * row.macs
    assert sum(each.products for each in costs) == 2 * batch_size * closed.macs


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES[3:])
def test_products_of_larger_networks_are_those_of_the_summary(name):
    costs, closed, _ = costs_of(name)
    products = sum(each.products for each in costs)
    if name.startswith("vit"):
        # Attention multiplies activations: 2 products of [tokens, tokens, width] in each block.
        tokens, width, blocks = (224 // 32) ** 2 + 1, 768, 12
        assert products == 2 * (closed.macs + blocks * 2 * tokens**2 * width)
    else:
        assert products == 2 * closed.macs


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_has_costs(name):
    costs, closed, _ = costs_of(name)
    assert sum(each.products for each in costs) >= 2 * closed.macs * 0.999
    assert all(each.bytes >= 0 for each in costs)


def test_a_dense_layer_by_hand():
    def dense(kernel, bias, x):
        with jax.named_scope("Net/dense"):
            return jnp.tanh(x @ kernel + bias)

    (cost,) = layer_costs(dense, form(5, 7), form(7), form(3, 5))
    # 3 x 7 results of 5 products each, a bias and a tanh.
    assert cost == LayerCost("dense", 2 * 3 * 7 * 5, 2 * 3 * 7, 4 * (35 + 7 + 15), 4 * 21)
    assert cost.intensity == pytest.approx((210 + 42) / (4 * 78))


def test_a_loop_counts_as_often_as_it_runs_and_a_condition_as_its_dearest_branch():
    def loop(x):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=7)[0]

    assert operations.total(layer_costs(loop, form(4, 4)))[0] == 7 * 2 * 4**3

    def condition(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x, lambda x: x + 1, x)

    costs = layer_costs(condition, jax.ShapeDtypeStruct((), jnp.bool_), form(4, 4))
    assert operations.total(costs)[0] == 2 * 4**3


def test_gradients_of_a_convolution_cost_as_much_as_the_convolution():
    from cnnjax import ops

    def loss(kernel, image):
        return ops.conv2d(image, kernel, strides=(2, 2), padding="SAME").sum()

    image, kernel = form(2, 9, 9, 3), form(3, 3, 3, 4)
    forward = sum(each.products for each in layer_costs(loss, kernel, image))
    both = jax.grad(loss, argnums=(0, 1))
    assert forward == 2 * (2 * 5 * 5 * 4) * 27
    assert sum(each.products for each in layer_costs(both, kernel, image)) in (
        *(2 * forward, 3 * forward),
    )


@pytest.mark.parametrize(
    ("scope", "layer", "backward"),
    [
        ("LeNet5/conv1", "conv1", False),
        ("LeNet5", "", False),
        ("", "", False),
        ("SimpleCNN/SimpleCNN._convolution/conv1", "conv1", False),
        ("jit(step)/jvp(ResNet)/stage1/block1/conv1", "stage1/block1/conv1", False),
        ("jit(step)/transpose(jvp(ResNet))/stage1/block1", "stage1/block1", True),
        ("jit(run)/while/body/closed_call/jvp(Net)/conv/jit(relu)", "conv", False),
    ],
)
def test_scopes_name_layers(scope, layer, backward):
    assert layer_of(scope) == (layer, backward)


def test_the_least_time_is_that_of_the_slower_of_the_two():
    peaks = roofline.Roofline(1e9, 1e8, "given")
    assert peaks.ridge == 10
    assert peaks.seconds(LayerCost("a", 2 * 10**9, 0, 10**6, 0)) == 2.0
    assert peaks.bound(LayerCost("a", 2 * 10**9, 0, 10**6, 0)) == "compute"
    assert peaks.seconds(LayerCost("b", 10**6, 0, 10**8, 10**8)) == 2.0
    assert peaks.bound(LayerCost("b", 10**6, 0, 10**8, 10**8)) == "memory"


def test_the_compiler_counts_arguments_exactly():
    program = jax.jit(lambda x, y: x @ y).lower(form(64, 32), form(32, 16)).compile()
    cost = compiled.read(program)
    assert (cost.arguments, cost.outputs) == (4 * (64 * 32 + 32 * 16), 4 * 64 * 16)
    assert cost.operations == pytest.approx(2 * 64 * 32 * 16, rel=0.1)
    assert cost.peak >= cost.arguments + cost.outputs
    assert compiled.seconds(program, (form(64, 32), form(32, 16)), budget_secs=0.01) > 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("flops=1.5M", {"flops": 1.5e6}),
        ("flops=2e6,params=5K", {"flops": 2e6, "params": 5e3}),
        ("memory=64MiB, flops=3g", {"memory": 64 * 2**20, "flops": 3e9}),
        ("memory=1KB", {"memory": 1000}),
    ],
)
def test_budgets_are_read(text, found):
    assert budget.parse(text, ("flops", "params", "memory"), "--budget") == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flop=1", "unknown name in --budget 'flop': did you mean flops?"),
        ("flops", "--budget flops: write NAME=NUMBER, such as flops=1.5M"),
        ("flops=-1", "write NAME=NUMBER"),
        ("flops=0", "give a number above 0"),
        ("flops=1,flops=2", "names flops twice"),
        (",", "names nothing: give some of flops"),
        ("flops=1X", "write NAME=NUMBER"),
    ],
)
def test_budgets_that_are_none_are_refused(text, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        budget.parse(text, ("flops",), "--budget")


def test_what_is_over_a_budget_is_said():
    assert budget.exceeded({"flops": 100}, {"flops": 100}) == []
    assert budget.exceeded({"flops": 100, "params": 1}, {"flops": 150, "params": 1}) == [
        "flops 150 is over the budget of 100 (by 50.0%)"
    ]


def call(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        commands.main(["cost", *argv])
    printed = capsys.readouterr()
    return stop.value.code, printed.out, printed.err


DEVICE = ("--device", "flops=1T,bandwidth=1T")


def test_the_command_prints_costs_and_holds_a_budget(capsys):
    given = ("lenet5", "--budget", "flops=600K,macs=281641,params=44426", *DEVICE, "--no-train")
    code, out, _ = call(capsys, *given)
    assert code == 0 and "budget       flops=600K" in out
    assert "576,018 FLOP (281,640 multiply-accumulates)" in out and "44,426" in out
    code, out, _ = call(capsys, *given[:2], "params=44425,flops=1G", *DEVICE, "--no-train")
    assert code == 1
    assert "over budget  params 44,426 is over the budget of 44,425 (by 0.0%)" in out


@pytest.mark.slow
def test_the_command_measures_and_compiles_training(capsys):
    code, out, _ = call(capsys, "cnn_32_64", "--json", "--batch-size", "4")
    found = json.loads(out)
    assert code == 0 and found["train_memory"] > found["memory"] > 4 * found["params"]
    # Forward, and both gradients of all layers but the first, whose image needs none.
    first = found["layers"][0]["products"]
    products = 2 * 4 * found["macs"]
    assert 3 * products - first < found["train_flops"] < 1.3 * (3 * products)
    assert found["measured_secs"] > 0 and found["roofline"]["source"] == "measured, float32"
    assert math.isclose(found["flops"] * 4, sum(each["operations"] for each in found["layers"]))
    flags = ("--num-classes", "1", "--budget", "train_memory=1K", *DEVICE)
    code, out, _ = call(capsys, "cnn_32_64", *flags)
    assert code == 1 and "over budget  train_memory" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "give a model, such as cnnjax cost lenet5, or --run RUN"),
        (("lenet5", "--run", "x"), "lenet5 and --run x: give one of the two"),
        (("lenet55",), "unknown model 'lenet55': did you mean lenet5"),
        (("lenet5", "--batch-size", "0"), "--batch-size 0: give 1 or more"),
        (("lenet5", "--device", "flops=1T"), "--device flops: give both"),
        (("lenet5", "--budget", "flip=1"), "unknown name in --budget 'flip'"),
        (("lenet5", "--budget", "train_memory=1", "--no-train"), "drop one"),
        (("--run", "absent"), "absent is not a run directory"),
        (("lenet5", "--precision", "float64"), "unknown precision 'float64'"),
        (("lenet5", "--optimizer", "adm", *DEVICE), "unknown optimizer 'adm': did you mean adam"),
        (("lenet5", "--image-shape", "2", "2", "1", *DEVICE), "images of at least 16x16 pixels"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    code, _, err = call(capsys, *argv)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_a_network_with_logits_of_pixels_is_trained_to_segment():
    model = models.create("unet", num_classes=3, widths=(4, 8))
    image = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)
    variables = abstract_variables(model, (16, 16, 1))
    step, (state, batch) = compiled.training_step(model, variables, image, num_outputs=3)
    assert batch["class_map"].shape == (2, 16, 16)
    _, metrics = jax.eval_shape(step, state, batch)
    assert {"loss", "pixel_accuracy"} <= set(metrics)
