"""The record of a run survives kills and resumes; the bar shows rates that are true."""

import io
import json
import math
import struct
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from cnnjax.errors import UserError
from cnnjax.run.logs import MetricsLog, ProgressBar, read_metrics


def write_run(directory: Path, last_step: int) -> None:
    with MetricsLog(directory) as log:
        for step in range(1, last_step + 1):
            log.write(step, "train", {"loss": 1 / step})
            if step % 2 == 0:
                log.write(step, "validation", {"accuracy": step / 10})


def events(directory: Path) -> list[Event]:
    """Reads event files as TensorBoard does: by name, each a series of length-prefixed records."""
    found = []
    for path in sorted(directory.glob("events*")):
        content, position = path.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            found.append(Event.FromString(content[position + 12 : position + 12 + length]))
            position += 12 + length + 4
    return found


def shown_by_tensorboard(directory: Path) -> list[tuple[int, str, float]]:
    """Applies TensorBoard's rule: a session start hides earlier events at its step and after."""
    points: list[tuple[int, str, float]] = []
    for event in events(directory):
        if event.HasField("session_log"):
            points = [point for point in points if point[0] < event.step]
        points += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return points


class FakeClock:
    def __init__(self) -> None:
        self.secs = 0.0

    def __call__(self) -> float:
        return self.secs


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_values_come_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(3, "train", {"loss": np.float32(0.5), "epoch": 2})
        log.write(3, "validation", {"accuracy": jnp.asarray([0.25])})
    assert read_metrics(tmp_path) == [
        {"step": 3, "kind": "train", "loss": 0.5, "epoch": 2},
        {"step": 3, "kind": "validation", "accuracy": 0.25},
    ]


def test_a_line_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, "train", {"loss": 1.0})
    assert len(read_metrics(tmp_path)) == 1
    log.close()
    log.close()


def test_values_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5}
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", values)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record == {"step": 1, "kind": "train", "a": "nan", "b": "inf", "c": "-inf", "d": 1.5}
    (restored,) = read_metrics(tmp_path)
    assert math.isnan(restored["a"])
    assert (restored["b"], restored["c"], restored["d"]) == (math.inf, -math.inf, 1.5)


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(killed=st.integers(0, 8), resumed=st.integers(0, 8), torn=st.integers(0, 30))
def test_resumed_log_equals_an_uninterrupted_one(
    killed: int, resumed: int, torn: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    resumed = min(killed, resumed)
    straight, broken = tmp_path_factory.mktemp("straight"), tmp_path_factory.mktemp("broken")
    write_run(straight, 8)
    write_run(broken, killed)
    torn_line = b'{"step": 9, "kind": "train", "loss": 0.1}'[:torn]
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write(torn_line)
    with MetricsLog(broken, resume_step=resumed) as log:
        for step in range(resumed + 1, 9):
            log.write(step, "train", {"loss": 1 / step})
            if step % 2 == 0:
                log.write(step, "validation", {"accuracy": step / 10})
    expected = (straight / "metrics.jsonl").read_bytes()
    assert (broken / "metrics.jsonl").read_bytes() == expected
    for kind in ("train", "validation"):
        shown = shown_by_tensorboard(broken / "tensorboard" / kind)
        assert shown == shown_by_tensorboard(straight / "tensorboard" / kind)
    assert [path.name for path in broken.iterdir() if path.name.endswith(".new")] == []


def test_resuming_hides_kinds_that_are_not_written_again(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(9, "test", {"accuracy": 0.5})
    MetricsLog(tmp_path, resume_step=4).close()
    assert read_metrics(tmp_path) == []
    assert shown_by_tensorboard(tmp_path / "tensorboard" / "test") == []


def test_nothing_to_cut_leaves_the_file_untouched(tmp_path: Path) -> None:
    write_run(tmp_path, 4)
    before = (tmp_path / "metrics.jsonl").stat()
    MetricsLog(tmp_path, resume_step=4).close()
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 2, 3]
    MetricsLog(tmp_path, resume_step=3).close()
    assert path.read_bytes() == whole


def test_torn_last_line_is_not_read(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 2]


def test_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:7], *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="line 2 of"):
        MetricsLog(tmp_path, resume_step=3)


def test_a_new_run_never_continues_another_by_accident(tmp_path: Path) -> None:
    write_run(tmp_path, 2)
    with pytest.raises(UserError, match="already holds the metrics of a run"):
        MetricsLog(tmp_path)
    assert len(read_metrics(tmp_path)) == 3


def test_mistakes_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics at"):
        read_metrics(tmp_path / "nowhere")
    with MetricsLog(tmp_path) as log:
        with pytest.raises(UserError, match=r"'loss' has shape \(2,\)"):
            log.write(1, "train", {"loss": np.zeros(2)})
        with pytest.raises(UserError, match="'valid': did you mean validation"):
            log.write(1, "valid", {"loss": 1.0})
        with pytest.raises(UserError, match="cannot be named 'step'"):
            log.write(1, "train", {"step": 2})
    assert read_metrics(tmp_path) == []


def test_lines_without_a_terminal() -> None:
    clock, stream = FakeClock(), io.StringIO()
    with ProgressBar(6, 3, 10, stream=stream, clock=clock) as bar:
        clock.secs = 100.0  # compilation and the first step
        bar.update(1, {"loss": 2.0})
        for step in range(2, 7):
            clock.secs += 1.0
            values = {"loss": (jnp.asarray(3.0), 6), "accuracy": 0.25, "gradient_norm": 7.0}
            bar.update(step, values)
            if step == 3:
                with bar.paused():
                    clock.secs += 6.0
                    bar.message("evaluated")
    # Five steps of ten images in five seconds, and six seconds of evaluation after two of them.
    assert stream.getvalue() == (
        "epoch 1/2  step 3/6  loss 0.5000  accuracy 0.2500  10 images/s  00:03 left\n"
        "evaluated\n"
        "epoch 2/2  step 6/6  loss 0.5000  accuracy 0.2500  10 images/s  00:00 left\n"
    )


def test_resumed_lines_go_on_from_the_step() -> None:
    clock, stream = FakeClock(), io.StringIO()
    bar = ProgressBar(40, 10, 8, first_step=25, stream=stream, clock=clock)
    for step in (26, 28, 30, 35, 40):
        clock.secs += 0.5
        bar.update(step, {"learning_rate": 1e-5})
    assert stream.getvalue().splitlines() == [
        "epoch 3/4  step 30/40  learning_rate 1.000e-05  32 images/s  00:03 left",
        "epoch 4/4  step 40/40  learning_rate 1.000e-05  56 images/s  00:00 left",
    ]


def test_values_are_fetched_only_when_shown() -> None:
    fetched = []

    class OnDevice:
        def __float__(self) -> float:
            fetched.append(True)
            return 1.0

    clock = FakeClock()
    bar = ProgressBar(1000, 1000, 1, stream=FakeTerminal(), enabled=True, clock=clock)
    for step in range(1, 1000):
        clock.secs += 0.001
        bar.update(step, {"loss": OnDevice()})
    assert 4 <= len(fetched) <= 7


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = FakeClock(), FakeTerminal()
    with ProgressBar(4, 2, 5, stream=stream, clock=clock) as bar:
        for step in range(1, 5):
            clock.secs += 0.5
            bar.update(step, {"loss": math.nan, "accuracy": 1.0})
        bar.message("saved")
    states = [state.rstrip() for state in stream.getvalue().split("\r")]
    assert any(state.startswith("epoch 1/2   0%|") and "compiling" in state for state in states)
    assert "10 img/s 00:01 left" in next(s for s in states if s.startswith("epoch 1/2  50%"))
    assert states[-1].startswith("epoch 2/2 100%|")
    assert "loss nan acc 1.000" in states[-1]
    assert "saved" in states


def test_bar_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock, stream = FakeClock(), FakeTerminal()
    bar = ProgressBar(43_000, 860, 64, stream=stream, clock=clock)
    for step in range(1, 3):
        clock.secs += 0.25
        bar.update(2_000 * step, {"loss": 0.0512, "accuracy": 0.984, "learning_rate": 0.00123})
    before, _, after = stream.getvalue().split("\r")[-1].split("|")
    assert (before, after) == (
        "epoch 5/50   9%",
        " loss 0.0512 acc 0.9840 lr 0.00123 512,000 img/s 00:05 left",
    )
    assert len(f"{before}|#|{after}") < 80


def test_silence() -> None:
    stream = FakeTerminal()
    with ProgressBar(2, 1, 1, stream=stream, enabled=False) as bar:
        bar.update(1, {"loss": 1.0})
        bar.message("unheard")
    assert stream.getvalue() == ""


def test_a_test_measured_again_after_a_kill_is_there_once(tmp_path: Path) -> None:
    """A run killed after its test, before its summary, measures it again at the same step."""
    write_run(tmp_path, 4)
    for _ in range(2):
        with MetricsLog(tmp_path, resume_step=4) as log:
            log.write(4, "test", {"accuracy": 0.5})
    assert [record["kind"] for record in read_metrics(tmp_path)].count("test") == 1
    assert shown_by_tensorboard(tmp_path / "tensorboard" / "test") == [(4, "accuracy", 0.5)]
    assert len(read_metrics(tmp_path)) == 7


def test_an_event_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, "train", {"loss": 0.5, "accuracy": 1.0})
    shown = shown_by_tensorboard(tmp_path / "tensorboard" / "train")
    assert shown == [(1, "loss", 0.5), (1, "accuracy", 1.0)]
    log.close()
