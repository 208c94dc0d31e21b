"""Recorded steps: which they are, that they change nothing, and the layers of their operations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnnjax import models
from cnnjax.cost import compiled, profile
from cnnjax.errors import UserError
from cnnjax.models.summary import abstract_variables
from cnnjax.run import checks, classifier
from cnnjax.train import profiling

PROGRAM = """HloModule jit_step

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %neg.1 = f32[4]{0} negate(%p), metadata={op_name="jit(step)/jvp(Net)/conv1/neg"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %plain = f32[4]{0} add(%x, %x), metadata={op_name="jit(step)/transpose(jvp(Net))/conv2/add"}
  %bare_fusion = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %copy.3 = f32[4]{0} copy(%plain)
  %call.1 = f32[4]{0} custom-call(%x), custom_call_target="__onednn$convolution", metadata={op_name="jit(step)/jvp(Net)/conv3/conv"}
  %other = f32[4]{0} add(%x, %x), metadata={op_name="jit(step)/augment/shift/add"}
  ROOT %loop = (f32[4]{0}) while(%x), condition=%c, body=%b, metadata={op_name="jit(step)/while"}
}
"""  # noqa: E501


def test_operations_have_the_layers_of_their_scopes():
    found = profile.operations(PROGRAM, "Net")
    assert found["plain"] == ("conv2", True, "add", "add")
    # Of what it calls, and of what it copies.
    assert found["bare_fusion"][:2] == ("conv1", False)
    assert found["copy.3"][:2] == ("conv2", True)
    # A call of a library, by its name.
    assert found["call.1"] == ("conv3", False, "conv", "__onednn$convolution")
    assert found["other"].place == profile.REST
    assert found["loop"].opcode == "while"


@pytest.mark.slow
def test_every_layer_of_a_training_step_is_found_forward_and_backward():
    model = models.create("lenet5", num_classes=10)
    image = jax.ShapeDtypeStruct((8, 28, 28, 1), jnp.float32)
    variables = abstract_variables(model, image.shape[1:])
    step, forms = compiled.training_step(model, variables, image, num_outputs=10)
    program = compiled.training(step, *forms)
    found = profile.operations(program.as_text(), "LeNet5").values()
    places = {each.place for each in found}
    for layer in ("conv1", "conv2", "dense1", "dense2", "head"):
        assert {f"{layer} forward", f"{layer} backward"} <= places


def made_trainer(log):
    """A trainer whose state counts steps; its metrics are the steps' numbers."""

    def train(state, first_step, chunks):
        step = first_step
        for length in chunks:
            log.append(length)
            steps = np.arange(step, step + length)
            step, state = step + length, state + length
            yield state, {"loss": (steps, np.ones(length))}

    return train


def profiled(monkeypatch, tmp_path, span, chunks, first_step=0):
    events, log = [], []
    monkeypatch.setattr(profiling, "_start", lambda directory: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    train = profiling.profiled(made_trainer(log), span, tmp_path, lambda: events.append("told"))
    yielded = [
        (state, metrics["loss"][0].tolist(), list(events))
        for state, metrics in train(first_step, first_step, iter(chunks))
    ]
    return yielded, log, events


@pytest.mark.parametrize(
    ("span", "chunks", "pieces"),
    [
        (range(3, 7), [5, 5], [3, 2, 2, 3]),
        (range(0, 5), [5, 5], [5, 5]),
        (range(6, 8), [5, 5], [5, 1, 2, 2]),
        (range(0, 10), [5, 5], [5, 5]),
        (range(2, 9), [4, 4, 4], [2, 2, 4, 1, 3]),
    ],
)
def test_chunks_are_cut_for_the_recorder_and_joined_again(
    span, chunks, pieces, monkeypatch, tmp_path
):
    yielded, log, events = profiled(monkeypatch, tmp_path, span, chunks)
    assert log == pieces and events == ["start", "stop", "told"]
    assert [len(steps) for _, steps, _ in yielded] == chunks
    assert [step for _, steps, _ in yielded for step in steps] == list(range(sum(chunks)))
    assert yielded[-1][0] == sum(chunks)


def test_a_resumed_run_counts_on_and_an_interrupted_one_ends_its_trace(monkeypatch, tmp_path):
    _, log, events = profiled(monkeypatch, tmp_path, range(12, 14), [5, 5], first_step=10)
    assert log == [2, 2, 1, 5] and events == ["start", "stop", "told"]
    _, _, events = profiled(monkeypatch, tmp_path, range(3, 50), [5, 5])
    assert events == ["start", "stop"]


@pytest.mark.parametrize("text", ["10:20", "steps=10", "steps=20:10", "steps=5:5", "steps=-1:2"])
def test_spans_that_are_none_are_refused_before_training(text):
    with pytest.raises(UserError, match=r"write steps=FIRST:LAST, such as steps=10:20"):
        checks.check_specs(classifier.Config(profile=text))
    with pytest.raises(UserError, match="this run makes the steps 4 to 16"):
        profiling.check(range(10, 20), 4, 16)


def test_a_folder_without_a_trace_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no trace"):
        profile.trace_file(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel", ["scan", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("jit", "pmap"))]
)
def test_a_recorded_run_prints_layers_and_keeps_its_bits(parallel, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = {
        **{"model": "lenet5", "dataset": "mnist", "smoke": True, "epochs": 1, "devices": 2},
        **{"parallel": parallel, "test": False},
    }
    classifier.main(classifier.Config(**common, run_dir="plain"))
    classifier.main(classifier.Config(**common, run_dir="recorded", profile="steps=3:9"))
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("plain", "recorded")]
    assert lines[0] == lines[1]
    out = capsys.readouterr().out
    assert "profile      steps 3 to 9, by operation" in out
    rows = out[out.index("ms/step") :].splitlines()[1:11]
    assert len(rows) == 10 and any("conv" in row for row in rows)
    folder = tmp_path / "recorded" / "profile" / "steps-3-9"
    found = json.loads((folder / "operations.json").read_text())
    assert found["steps"] == 6
    assert {"conv1 forward", "conv2 backward", "head forward"} <= found["layers"].keys()
    # Each device makes each step once.
    calls = {each["name"]: each["calls_per_step"] for each in found["operations"]}
    assert max(calls.values()) >= 2
    assert list(folder.rglob("*.xplane.pb")) and list(folder.rglob("perfetto_trace.json.gz"))
