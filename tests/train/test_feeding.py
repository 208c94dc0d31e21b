"""Whether the input keeps up with the step."""

import time

import pytest

from cnnjax.commands import cost
from cnnjax.data.pipelines import ResidentPipeline
from cnnjax.errors import UserError
from cnnjax.run import settings
from cnnjax.train import feeding
from experiments import classify
from tests.tiny import random_arrays


def test_an_input_that_is_slower_than_the_step_is_said():
    slow = feeding.Rates(delivered=600.0, taken=1000.0, streamed=True)
    assert not slow.keeps_up
    assert str(slow) == (
        "the host delivers 600 images/s, the step takes 1,000: the step waits 40% of the time"
    )
    fast = feeding.Rates(delivered=3e5, taken=1000.0, streamed=False)
    assert fast.keeps_up
    assert str(fast).startswith("drawn on the devices at 300,000 images/s")


def test_one_batch_is_repeated_as_the_pipeline_has_it():
    data = ResidentPipeline(random_arrays(64), 16, seed=0)
    one = feeding.repeated(data)
    first, second = (batch for batch, _ in zip(one.batches(0), range(2), strict=False))
    assert first is second
    expected = next(iter(data.batches(0)))
    assert (first["image"] == expected["image"]).all()
    assert one.batch_shapes == data.batch_shapes


def test_the_first_call_is_not_counted():
    calls = []

    def run():
        # The first one compiles.
        calls.append(time.sleep(0.01 if calls else 0.5))
        return ()

    rate = feeding._per_sec(run, 0.2)
    assert rate <= 100 and rate > 2
    assert len(calls) > 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["lenet5", "--input"], "--input is of a run's data and step: give --run RUN"),
        (["--run", "r", "--dataset", "folder:x"], "--dataset folder:x: it is of --input"),
        (["lenet5", "--data-dir", "x"], "--data-dir x: it is of --input"),
    ],
)
def test_what_is_of_no_run_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        cost.main(flags)


@pytest.mark.slow
def test_a_run_says_what_its_host_delivers(tmp_path, capsys):
    flags = ["--model", "mlp", "--dataset", "digits", "--smoke", "--devices", "1"]
    with pytest.raises(SystemExit) as stop:
        settings.launch(
            classify.Config,
            classify.main,
            [*flags, "--pipeline", "stream", "--run-dir", str(tmp_path / "run")],
        )
    assert not stop.value.code
    capsys.readouterr()
    assert cost.main(["--run", str(tmp_path / "run"), "--input", "--no-train"]) == 0
    printed = capsys.readouterr().out
    assert "input        the host delivers" in printed and "images/s, the step takes" in printed
