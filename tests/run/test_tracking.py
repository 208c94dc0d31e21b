"""What trackers are sent, and what they cannot do to a run: one made here, then the real two."""

import dataclasses
import http.server
import importlib.util
import json
import os
import signal
import socketserver
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnnjax.errors import UserError
from cnnjax.run import checks, classifier, logs, verify_resume
from cnnjax.run.files import write_json
from cnnjax.run.tracking import follower, followers
from cnnjax.run.tracking import sent as states
from cnnjax.run.tracking.sent import Records, Sent

ROOT = Path(__file__).parent.parent.parent
# Training of a second whose epochs can be told apart.
SHORT = ("experiments.digits_mlp", "--epochs", "2", "--devices", "1")


def made_run(directory, *steps):
    """A run's record as far as followers read it."""
    directory.mkdir(exist_ok=True)
    settings = {"epochs": 2, "track": ["wandb", "mlflow"], "mesh": ""}
    write_json(directory / "config.json", {"experiment": "experiments.x", "settings": settings})
    with logs.MetricsLog(directory) as log:
        for step in steps:
            log.write(step, "train", {"loss": 1 / step})
    return directory


class MadeTracker:
    """Keeps what it is sent; fails at the calls whose numbers are in `fails`."""

    def __init__(self, fails=()):
        self.fails, self.calls, self.log_of, self.ends, self.kept = set(fails), 0, [], [], []

    def _call(self):
        self.calls += 1
        if self.calls in self.fails:
            raise ConnectionError("no route\nto host")

    def log(self, records):
        self._call()
        self.log_of += [(each["kind"], each["step"]) for each in records]

    def sample(self, number):
        self._call()

    def figure(self, path, step):
        self.kept.append(path.name)

    def file(self, path):
        self.kept.append(path.name)

    def checkpoint(self, path):
        self.kept.append(path.name)

    def finish(self, status, summary):
        self._call()
        self.ends.append(status)


def followed(monkeypatch, tracker, directory, **options):
    monkeypatch.setattr(follower, "open_run", lambda *arguments: tracker)
    monkeypatch.setattr(follower, "FIRST_PAUSE_SECS", 0.01)
    return follower.follow(
        "mlflow", directory, **{"checkpoints": "none", "ended": lambda: "stopped", **options}
    )


@given(st.lists(st.tuples(st.sampled_from(["train", "test"]), st.integers(0, 9)), max_size=20))
def test_no_record_is_new_twice(pairs):
    sent, seen = Sent(), []
    for kind, step in pairs:
        new = sent.new([{"kind": kind, "step": step}])
        sent.note(new)
        seen += [(each["kind"], each["step"]) for each in new]
    assert len(seen) == len(set(seen))
    for kind in ("train", "test"):
        steps = [step for each, step in seen if each == kind]
        assert steps == sorted(steps)


@pytest.mark.parametrize("fails", [(), (1,), (1, 2), (2,), (3,), (1, 3, 5)])
def test_a_tracker_that_fails_is_asked_again_and_gets_each_record_once(
    fails, tmp_path, monkeypatch
):
    directory = made_run(tmp_path / "run", 1, 2, 3)
    tracker = MadeTracker(fails)
    sent = followed(monkeypatch, tracker, directory)
    assert tracker.log_of == [("train", 1), ("train", 2), ("train", 3)]
    assert tracker.ends == ["stopped"] and {"config.json", "metrics.jsonl"} <= set(tracker.kept)
    assert sent == states.load(directory, "mlflow")
    assert sent.done and sent.clean and not sent.error


def test_a_resumed_run_sends_what_is_new(tmp_path, monkeypatch):
    directory = made_run(tmp_path / "run", 1, 2, 3)
    followed(monkeypatch, MadeTracker(), directory)
    with logs.MetricsLog(directory, resume_step=2) as log:
        for step in (3, 4):
            log.write(step, "train", {"loss": 0.5})
    tracker = MadeTracker()
    followed(monkeypatch, tracker, directory)
    assert tracker.log_of == [("train", 4)]


def test_an_impatient_follower_raises_what_the_tracker_raised(tmp_path, monkeypatch):
    directory = made_run(tmp_path / "run", 1)
    with pytest.raises(ConnectionError):
        followed(monkeypatch, MadeTracker([1]), directory, patient=False)


def test_whole_checkpoints_are_kept_once(tmp_path, monkeypatch):
    directory = made_run(tmp_path / "run", 1)
    for name in ("00000001", "00000002"):
        (directory / "checkpoints" / name).mkdir(parents=True)
    (directory / "checkpoints" / "00000002" / "manifest.json").touch()
    tracker = MadeTracker()
    followed(monkeypatch, tracker, directory, checkpoints="all")
    assert [name for name in tracker.kept if name[0] == "0"] == ["00000002"]
    again = MadeTracker()
    followed(monkeypatch, again, directory, checkpoints="all")
    assert not [name for name in again.kept if name[0] == "0"]


def test_records_are_read_when_the_file_has_changed(tmp_path):
    directory = tmp_path / "run"
    records = Records(directory)
    assert records.read() == []
    with logs.MetricsLog(directory) as log:
        log.write(1, "train", {"loss": float("nan")})
        (found,) = records.read()
        assert found["step"] == 1 and str(states.scalars(found)) == "{'train/loss': nan}"
        assert records.read() == []
        log.write(2, "train", {"loss": 1})
    assert len(records.read()) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"no": 1}', "\x00"])
def test_a_damaged_state_is_taken_for_none(text, tmp_path):
    states.path_of(tmp_path, "wandb").parent.mkdir()
    states.path_of(tmp_path, "wandb").write_text(text)
    assert states.load(tmp_path, "wandb") == Sent()


def test_unknown_and_missing_trackers_are_refused_before_training(monkeypatch):
    config = classifier.Config()
    with pytest.raises(UserError, match=r"unknown tracker 'wandbb': did you mean wandb\?"):
        checks.check_specs(dataclasses.replace(config, track=("wandbb",)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs a package: pip install 'cnnjax\[mlflow\]'"):
        checks.check_specs(dataclasses.replace(config, track=("mlflow",)))
    with pytest.raises(UserError, match="--track-wait-secs -1: give 0"):
        checks.check_specs(dataclasses.replace(config, track_wait_secs=-1))


def test_one_follower_at_a_time(tmp_path):
    with (
        follower.only_follower(tmp_path, "mlflow", wait=True),
        pytest.raises(UserError, match="is being sent to mlflow already"),
        follower.only_follower(tmp_path, "mlflow", wait=False),
    ):
        pass


def test_a_follower_that_cannot_start_is_a_note(tmp_path, monkeypatch, capsys):
    (tmp_path / "tracking").touch()
    with followers.following(("mlflow",), tmp_path, checkpoints="none", wait_secs=1):
        pass
    assert "note         mlflow does not follow this run: " in capsys.readouterr().out


# The real ones.


def environment(**variables):
    dropped = ("WANDB_", "MLFLOW_", "XLA_FLAGS")
    kept = {name: v for name, v in os.environ.items() if not name.startswith(dropped)}
    return kept | {"PYTHONPATH": str(ROOT), "HOME": "/nonexistent"} | variables


def train(tmp_path, *flags, **variables):
    return subprocess.run(
        [sys.executable, "-m", *map(str, (*SHORT, *flags))],
        cwd=tmp_path, env=environment(**variables), capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def same_bits(first, second):
    """Whether two runs left the same arrays, metrics and scores; their settings name trackers."""
    compared = verify_resume.compare_runs(first, second)
    assert len(compared) > 4
    return not [each for each in compared if each.different and "meta" not in each.what]


def own_processes(directory):
    """The processes that have this directory in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(directory).encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def offline_records(path):
    """Yields the records of a W&B run file, with W&B's own protobufs: blocks of LevelDB's log."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_history(directory):
    """Returns step -> metrics of all offline folders of a run, and what else they hold."""
    rows, others = {}, []
    for path in sorted((directory / "tracking" / "wandb").glob("offline-run-*/run-*.wandb")):
        for record in offline_records(path):
            if record.WhichOneof("record_type") != "history":
                others.append(record)
                continue
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            rows.setdefault(int(items["_step"]), {}).update(items)
    return rows, others


def recorded(directory):
    """Returns step -> the metrics of `metrics.jsonl` under the trackers' names."""
    rows = {}
    for record in logs.read_metrics(directory):
        rows.setdefault(record["step"], {}).update(states.scalars(record))
    return rows


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing tracks."""
    directory = tmp_path_factory.mktemp("straight")
    assert train(directory, "--run-dir", "run").returncode == 0
    return directory / "run"


@pytest.mark.slow
def test_a_killed_run_goes_on_as_the_same_tracked_run_with_the_same_bits(tmp_path, straight):
    for package in ("wandb", "mlflow", "sqlalchemy", "psutil"):
        pytest.importorskip(package)
    tracked = tmp_path / "tracked"
    flags = ("--track", "wandb", "mlflow", "--track-checkpoints", "tested")
    process = subprocess.Popen(
        [sys.executable, "-m", *SHORT, "--run-dir", str(tracked), *flags],
        cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (steps := sorted((tracked / "checkpoints").glob("[0-9]*/manifest.json"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert steps and not (tracked / "summary.json").exists()
    done = train(tmp_path, "--resume", tracked, *flags, "--track-wait-secs", "120")
    assert done.returncode == 0, done.stderr
    assert same_bits(tracked, straight)
    assert not own_processes(tracked)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("experiments.digits_mlp")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "tracked" and run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "2" and run.data.params["track"] == "wandb mlflow"
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    expected = recorded(tracked)
    for name in {name for row in expected.values() for name in row}:
        history = client.get_metric_history(run.info.run_id, name)
        rows = {step: row[name] for step, row in expected.items() if name in row}
        assert sorted((each.step, each.value) for each in history) == sorted(rows.items())
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    (*_, last) = sorted((tracked / "checkpoints").glob("[0-9]*"))
    names = json.loads((last / "manifest.json").read_text())["files"]
    assert all((artifacts / "checkpoints" / last.name / name).exists() for name in names)
    assert (artifacts / "figures" / "learning_curves.png").exists()

    rows, others = wandb_history(tracked)
    assert {step: {n: rows[step][n] for n in row} for step, row in expected.items()} == expected
    runs = [each.run for each in others if each.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {states.load(tracked, "wandb").key}
    names = {item.key for run in runs for item in run.config.update}
    assert {"epochs", "learning_rate", "versions"} <= names
    kinds = {each.WhichOneof("record_type") for each in others}
    assert {"stats", "artifact", "summary", "files"} <= kinds or {"request"} <= kinds
    listed = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(tracked / "tracking" / "wandb")],
        env=environment(), cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr


class Silent(socketserver.BaseRequestHandler):
    """Takes a connection and never answers."""

    def handle(self):
        time.sleep(60)


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers 500 to everything."""

    def do_GET(self):
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("handler", [Silent, pytest.param(Failing, marks=pytest.mark.exhaustive)])
def test_a_server_that_hangs_or_fails_stops_nothing_and_is_served_later(
    handler, tmp_path, straight
):
    for package in ("wandb", "mlflow", "sqlalchemy"):
        pytest.importorskip(package)
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    run = tmp_path / "run"
    variables = {
        "MLFLOW_TRACKING_URI": address,
        **{"WANDB_BASE_URL": address, "WANDB_MODE": "online", "WANDB_API_KEY": 40 * "a"},
    }
    flags = ("--run-dir", run, "--track", "wandb", "mlflow", "--track-wait-secs", "3")
    done = train(tmp_path, *flags, **variables)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert same_bits(run, straight)
    for name in ("wandb", "mlflow"):
        assert f"note         {name} has not taken all of this run (" in done.stdout
        assert f"sent by cnnjax track --run {run} --track {name}" in done.stdout
    assert not own_processes(run)
    later = subprocess.run(
        [sys.executable, "-m", "cnnjax", "track", "--run", str(run), "--track", "wandb", "mlflow"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert later.returncode == 0, later.stderr
    assert later.stdout.count("test to step ") == 2
    assert states.load(run, "mlflow").done and states.load(run, "wandb").done


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_line(tmp_path):
    pytest.importorskip("mlflow")
    directory = made_run(tmp_path / "run", 1)
    done = subprocess.run(
        [sys.executable, "-m", "cnnjax", "track", "--run", str(directory), "--track", "mlflow"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(MLFLOW_TRACKING_URI="http://127.0.0.1:9"),
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: mlflow fails (MlflowException: ") and "check its address" in line
