"""A study in a real PostgreSQL server, which the test starts, with four workers at once."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("optuna")
pytest.importorskip("psycopg")

SPACE = ["--space", "learning_rate=log(1e-3, 1e-1)", "batch_size=choice(32, 64)"]


def programs():
    """Where initdb and pg_ctl are: Debian has them off the path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb")
    return Path(found).parent if found else folders[-1] if folders else None


@pytest.fixture
def server():
    """Yields the URL of a database of a server of its own."""
    folder = programs()
    if folder is None:
        pytest.skip("PostgreSQL is not installed")
    # The server refuses root: it runs as its package's user then.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    user = "postgres" if as_user else getpass.getuser()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        if as_user:
            shutil.chown(name, "postgres")

        def call(*command):
            subprocess.run([*as_user, *command], check=True, stdout=subprocess.DEVNULL, cwd=name)

        data = f"{name}/data"
        call(folder / "initdb", "-D", data, "-A", "trust", "-U", user, "--no-sync")
        options = f"-p {port} -k {name} -h 127.0.0.1 -c fsync=off"
        call(folder / "pg_ctl", "-D", data, "-w", "-l", f"{name}/log", "-o", options, "start")
        try:
            yield f"postgresql://{user}@127.0.0.1:{port}/postgres"
        finally:
            call(folder / "pg_ctl", "-D", data, "-m", "immediate", "stop")


@pytest.mark.exhaustive
def test_searches_that_start_together_make_the_tables_once(server):
    code = (
        "import sys, psycopg, optuna; from cnnjax.search.study import open_storage; "
        "optuna.storages.RDBStorage('sqlite://'); print(flush=True); "
        "sys.stdin.readline(); open_storage(sys.argv[1])"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, server], text=True, **pipes) for _ in range(4)
    ]
    for each in processes:
        each.stdout.readline()
    for each in processes:
        each.stdin.write("\n")
        each.stdin.flush()
    errors = [each.communicate(timeout=200)[1] for each in processes]
    assert [each.returncode for each in processes] == [0] * 4, errors


@pytest.mark.exhaustive
def test_two_searches_of_two_workers_share_a_study(server, tmp_path):
    import optuna

    from cnnjax.search.study import open_storage

    out = tmp_path / "search"
    command = [sys.executable, "-m", "cnnjax", "search", "experiments.digits_mlp", *SPACE]
    command += ["--epochs", "2", "--workers", "2", "--trials", "9"]
    command += ["--storage", server, "--out", str(out)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    both = [subprocess.Popen(command, **output) for _ in range(2)]
    printed = [each.communicate(timeout=400)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], printed
    study = optuna.load_study(study_name="search", storage=open_storage(server))
    counted = [each for each in study.trials if "skipped" not in each.user_attrs]
    assert len(counted) == 9 and {each.state.name for each in counted} == {"COMPLETE"}
    # Each trial was run by one of them, and both ran some.
    ran = [
        {line.split()[1] for line in text.splitlines() if line.startswith("trial ")}
        for text in printed
    ]
    assert not ran[0] & ran[1] and len(ran[0] | ran[1]) == 9 and all(ran)
    assert {len(list(out.glob("trials/*/summary.json")))} == {9}


def test_a_server_that_is_not_there_is_said(tmp_path):
    from cnnjax.errors import UserError
    from cnnjax.search.study import open_study

    url = "postgresql://me:secret@127.0.0.1:1/nosuch"
    with pytest.raises(UserError, match=r"the storage .*me@127.0.0.1:1/nosuch cannot be used") as e:
        open_study("s", url, directions=["maximize"], sampler=None, pruner=None, what={})
    assert "secret" not in str(e.value) and "\n" not in str(e.value)
