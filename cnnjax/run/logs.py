"""Logs of a run: a progress bar, metrics as JSON lines, TensorBoard events.

`metrics.jsonl` is the record of a run: one JSON object a line, in the order in which they were
written, the same after a resume as without one. TensorBoard shows the same numbers.

The bar is drawn by tqdm: unlike rich it needs no thread of its own besides the training loop, it is
already installed wherever TensorFlow Datasets is, and in a notebook it is a widget.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from cnnjax import notebook
from cnnjax.errors import UserError, unknown_name

KINDS = ("train", "validation", "test")
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"

# JSON has no numbers for these; strict readers refuse Python's own bare NaN and Infinity.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_REDRAW_SECS = 0.2
_RATE_WINDOW_SECS = 10.0
# The bar's text must fit into a terminal of 80 columns: name and format of what is shown there.
_BAR_NAMES = {"accuracy": ("acc", "#.4g"), "learning_rate": ("lr", "#.3g")}


class MetricsLog:
    """Appends metrics to `metrics.jsonl` and `tensorboard/` of a run directory.

    One line looks like `{"step": 430, "kind": "train", "loss": 0.0512, "accuracy": 0.984}`. Each
    is handed to the operating system before `write` returns, so that a killed process loses none,
    and so is its TensorBoard event. TensorBoard gets one directory a kind, so that the curves of
    training and validation share a chart.

    A resumed run passes the step of the checkpoint it resumes from: what the killed run wrote
    after that step is cut, because it is about to be written again. For a log without gaps, write
    the metrics of a step before saving the checkpoint of that step; those of kind `test`, which are
    measured when training has ended, after it: one at the resumed step is cut too.

    Args:
      run_directory: created if missing.
      resume_step: the number of steps already made; None for a new run.

    Raises:
      UserError: a new run where metrics of another run lie, or a damaged `metrics.jsonl`.
    """

    def __init__(self, run_directory: str | os.PathLike[str], resume_step: int | None = None):
        self._directory = Path(run_directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._resume_step = resume_step
        self._writers: dict[str, Any] = {}
        path = self._directory / METRICS_FILE
        if resume_step is not None:
            _cut_after(path, resume_step)
            for directory in sorted((self._directory / TENSORBOARD_DIRECTORY).glob("*/")):
                self._writer(directory.name)
        elif path.exists() and path.stat().st_size > 0:
            raise UserError(
                f"{path} already holds the metrics of a run: choose another run directory, "
                "or resume that run."
            )
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Records scalars of one kind at one step.

        Args:
          step: the number of optimizer updates made so far.
          kind: what the values were measured on: `train`, `validation` or `test`.
          values: name -> number or scalar array. A value that is not finite is stored as the text
            "nan", "inf" or "-inf".
        """
        if kind not in KINDS:
            raise unknown_name("kind of metrics", kind, KINDS)
        reserved = {"step", "kind"} & set(values)
        if reserved:
            raise UserError(f"a metric cannot be named {reserved.pop()!r}: rename it.")
        scalars = {name: _scalar(name, value) for name, value in values.items()}
        record = {"step": int(step), "kind": kind} | {
            name: value if math.isfinite(value) else str(value) for name, value in scalars.items()
        }
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=v) for name, v in scalars.items()]
        self._append(kind, Event(step=int(step), summary=Summary(value=points)))

    def close(self) -> None:
        """Flushes and closes the files; closing twice does no harm."""
        self._file.close()
        while self._writers:
            self._writers.popitem()[1].close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _writer(self, kind: str) -> Any:
        if kind not in self._writers:
            # Not its SummaryWriter: that queues events for a thread of its own. A kill would lose
            # what is queued, and on a full disk the thread dies and the queue blocks for ever.
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            directory = self._directory / TENSORBOARD_DIRECTORY / kind
            directory.mkdir(parents=True, exist_ok=True)
            # Its own names hold whole seconds only: a quick resume would overwrite a file.
            suffix = f".{time.time_ns()}"
            self._writers[kind] = EventsWriter(str(directory / "events"), filename_suffix=suffix)
            if self._resume_step is not None:
                # Hides what the killed run wrote at this step and after.
                first_hidden = self._resume_step + (kind != "test")
                start = SessionLog(status=SessionLog.START)
                self._append(kind, Event(step=first_hidden, session_log=start))
        return self._writers[kind]

    def _append(self, kind: str, event: Any) -> None:
        event.wall_time = time.time()
        writer = self._writer(kind)
        writer.write_event(event)
        writer.flush()


def read_metrics(run_directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a run in the order in which they were written.

    Each has `step`, `kind` and the metrics by name; values that are not finite come back as floats.
    A last line that was torn by a kill is left out.

    Raises:
      UserError: no metrics there, or a damaged line before the last one.
    """
    path = Path(run_directory) / METRICS_FILE
    if not path.exists():
        raise UserError(f"no metrics at {path}: is {run_directory} a run directory?")
    records, _ = _parse(path)
    return records


def _scalar(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1:
        raise UserError(f"metric {name!r} has shape {array.shape}: log one number per name.")
    number = array.reshape(()).item()
    return int(number) if isinstance(number, int) else float(number)


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the records and their lines without line ends; a torn last line is in neither."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for index, line in enumerate(lines):
        try:
            record = json.loads(line)
            record = {
                name: value if name == "kind" else _NON_FINITE.get(value, value)
                for name, value in record.items()
            }
            record["step"], record["kind"]
        except (ValueError, AttributeError, KeyError, TypeError):
            if index == len(lines) - 1:
                break
            raise UserError(
                f"line {index + 1} of {path} is damaged ({line[:40]!r}): remove it to go on."
            ) from None
        records.append(record)
    return records, lines[: len(records)]


def _cut_after(path: Path, step: int) -> None:
    """Removes what a run resumed at `step` writes again, and a torn last line, if there is any."""
    if not path.exists():
        return
    records, lines = _parse(path)
    kept = [
        line
        for record, line in zip(records, lines, strict=True)
        if record["step"] < step + (record["kind"] != "test")
    ]
    text = "".join(f"{line}\n" for line in kept)
    if text.encode() == path.read_bytes():
        return
    replacement = path.with_suffix(".jsonl.new")
    with replacement.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(replacement, path)


class ProgressBar:
    """Where a training run is: epoch, loss, accuracy, learning rate, images/s and time left.

    On a terminal it is one bar that is redrawn a few times a second, and so in a notebook that has
    ipywidgets; elsewhere (a file, a batch job) one plain line an epoch, without control characters.

    Values are fetched from the device only when they are shown, so an `update` a step does not
    keep the host from dispatching ahead. Rates leave out the first update, which compiles.
    Images/s is the mean over the last seconds without what happened inside `paused()`; the time
    left counts everything.

    Args:
      total_steps: number of steps of the whole run.
      steps_per_epoch: number of steps of an epoch.
      batch_size: number of images of a step, over all devices.
      first_step: number of steps made before this process began.
      stream: where to write; standard error when None.
      enabled: True for the bar, False for silence, None to choose the bar on a terminal and in a
        notebook, and lines elsewhere.
      shown: names of the values to show, in this order, where an update has them.
      clock: seconds, never going back.
    """

    def __init__(
        self,
        total_steps: int,
        steps_per_epoch: int,
        batch_size: int,
        first_step: int = 0,
        stream: TextIO | None = None,
        enabled: bool | None = None,
        *,
        shown: Sequence[str] = ("loss", "accuracy", "learning_rate"),
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._stream = sys.stderr if stream is None else stream
        self._silent = enabled is False
        self._shown = shown
        self._clock = clock
        self._paused_secs = 0.0
        self._epoch = first_step // steps_per_epoch
        self._last_draw_secs = -math.inf
        self._first: tuple[int, float] | None = None
        # Pairs (step, training seconds), the oldest about one rate window ago.
        self._history: deque[tuple[int, float]] = deque()
        self._bar = None
        is_widget = enabled is None and stream is None and notebook.draws_widgets()
        if enabled or is_widget or (enabled is None and _is_terminal(self._stream)):
            self._bar = _tqdm(is_widget)(
                total=total_steps,
                initial=first_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format=self._bar_format(first_step, "compiling"),
            )

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Reports that `step` steps are done in all.

        Args:
          step: number of optimizer updates made so far.
          values: name -> number, scalar array, or pair (sum, count) of these.
        """
        if self._silent:
            return
        epoch = step // self._steps_per_epoch
        ended = epoch > self._epoch or step >= self._total_steps
        first = self._first is None
        due = self._bar is not None and self._clock() - self._last_draw_secs >= _REDRAW_SECS
        if not (ended or first or due):
            return
        self._epoch = epoch
        # Fetching waits for the step itself, so that the clock is read when its work is done.
        fetched = {name: _number(values[name]) for name in self._shown if name in values}
        self._advance(step)
        if self._bar is not None:
            self._draw_bar(step, fetched)
        elif ended:
            self._print_line(step, fetched)

    def message(self, text: str) -> None:
        """Prints a line of its own, above the bar if there is one."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps what happens inside, such as evaluation and saving, out of images/s."""
        began = self._clock()
        try:
            yield
        finally:
            self._paused_secs += self._clock() - began

    def close(self) -> None:
        """Leaves the bar as it stands and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _advance(self, step: int) -> None:
        now = self._clock()
        self._last_draw_secs = now
        if self._first is None:
            self._first = (step, now)
        self._history.append((step, now - self._paused_secs))
        while len(self._history) > 2 and now - self._paused_secs - self._history[1][1] > (
            _RATE_WINDOW_SECS
        ):
            self._history.popleft()

    def _draw_bar(self, step: int, values: Mapping[str, float]) -> None:
        assert self._bar is not None
        texts = []
        for name, value in values.items():
            short_name, form = _BAR_NAMES.get(name, (name, "#.3g"))
            texts.append(f"{short_name} {value:{form}}")
        texts += self._rates(step, "img/s")
        self._bar.n = step
        self._bar.bar_format = self._bar_format(step, " ".join(texts))
        self._bar.refresh()

    def _print_line(self, step: int, values: Mapping[str, float]) -> None:
        texts = [self._epoch_text(step), f"step {step}/{self._total_steps}"]
        texts += [f"{name} {value:#.4g}" for name, value in values.items()]
        texts += self._rates(step, "images/s")
        print("  ".join(texts), file=self._stream, flush=True)

    def _rates(self, step: int, unit: str) -> list[str]:
        """Returns images/s and the time left, as texts, once there is something to measure."""
        if self._first is None or step <= self._first[0]:
            return []
        first_step, first_secs = self._first
        secs_left = (
            (self._last_draw_secs - first_secs) / (step - first_step) * (self._total_steps - step)
        )
        rates = []
        (old_step, old_secs), (_, new_secs) = self._history[0], self._history[-1]
        if new_secs > old_secs:
            images_per_sec = (step - old_step) * self._batch_size / (new_secs - old_secs)
            rates.append(f"{images_per_sec:,.0f} {unit}")
        return [*rates, f"{tqdm.format_interval(math.ceil(secs_left))} left"]

    def _bar_format(self, step: int, text: str) -> str:
        return f"{self._epoch_text(step)} {{percentage:3.0f}}%|{{bar}}| {text}"

    def _epoch_text(self, step: int) -> str:
        epochs = math.ceil(self._total_steps / self._steps_per_epoch)
        return f"epoch {max(1, math.ceil(step / self._steps_per_epoch))}/{epochs}"


def _tqdm(is_widget: bool) -> Any:
    if not is_widget:
        return tqdm
    from tqdm.notebook import tqdm as widget

    return widget


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _number(value: Any) -> float:
    if isinstance(value, tuple):
        total, count = (float(part) for part in value)
        return total / count if count else math.nan
    return float(value)
