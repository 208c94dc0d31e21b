"""The same search on a Ray cluster of node processes, one of which is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("optuna")

from cnnjax import commands
from cnnjax.errors import UserError
from cnnjax.search import cluster

SPACE = ["--space", "learning_rate=log(1e-3, 1e-1)", "batch_size=choice(32, 64)"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--engine", "rya"], "unknown --engine 'rya': did you mean ray"),
        (["--engine", "ray"], "name the cluster with --address HOST:PORT"),
        (["--address", "10.0.0.1:6379"], "is of a Ray cluster: add --engine ray"),
    ],
)
def test_what_is_no_engine(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["search", "experiments.digits_mlp", *SPACE, *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("address", ["10.0.0.1", ":6379", "head:port", "head:70000"])
def test_what_is_no_address(address):
    with pytest.raises(UserError, match="write HOST:PORT of the cluster's head"):
        cluster.check_reachable(address)


def test_an_address_where_nothing_listens():
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1 cannot be reached \(Connection refused\)"):
        cluster.check_reachable("127.0.0.1:1")


def test_a_node_that_does_not_see_the_directory_says_so(tmp_path):
    node = cluster.Node("experiments.digits_mlp", str(tmp_path / "nosuch"), "token", str(tmp_path))
    assert "put --out on a file system that all nodes share" in node.check()


@pytest.fixture
def three_nodes(tmp_path, monkeypatch):
    """Three nodes, each with room for one trial."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # A dead node is noticed within seconds.
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "1000")
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "2")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Ray has its workers give way to all else, which on a busy machine takes minutes.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    memory = {"object_store_memory": 100 * 1024**2}
    found = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **memory}
    )
    nodes = [found.add_node(num_cpus=1, **memory) for _ in range(2)]
    try:
        yield found, nodes
    finally:
        found.shutdown()


@pytest.mark.exhaustive
def test_a_search_ends_with_all_trials_though_a_node_is_killed(three_nodes, tmp_path):
    import optuna

    found, nodes = three_nodes
    out = tmp_path / "search"
    command = [sys.executable, "-m", "cnnjax", "search", "experiments.digits_mlp", *SPACE]
    command += ["--trials", "5", "--epochs", "25", "--out", str(out)]
    command += ["--engine", "ray", "--address", found.address]
    search = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Until three trials have saved.
    begun: set[str] = set()
    while len(begun) < 3 and search.poll() is None:
        time.sleep(0.2)
        begun = {path.parts[-3] for path in out.glob("trials/*/checkpoints/0*")}
    assert search.poll() is None, search.stdout.read()
    raylet = nodes[1].all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGKILL)
    printed, _ = search.communicate(timeout=400)
    assert search.returncode == 0, printed
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{out}/study.db")
    assert [(each.number, each.state.name) for each in study.trials] == [
        (number, "COMPLETE") for number in range(5)
    ]
    # The trial of the dead node went on from its checkpoint: it was started twice.
    restarted = [each.number for each in study.trials if each.user_attrs.get("restarts")]
    assert restarted
    for number in restarted:
        saved = json.loads((out / "trials" / f"{number:04}" / "config.json").read_text())
        assert saved["history"]
        log = (out / "trials" / f"{number:04}.log").read_text()
        assert "resum" in log, log
