"""Whole searches by the command line: killed, resumed, finished, refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("optuna")

SPACE = ["--space", "learning_rate=log(1e-3, 1e-1)", "batch_size=choice(32, 64)"]


def cnnjax(*argv):
    return subprocess.run(
        [sys.executable, "-m", "cnnjax", *argv], capture_output=True, text=True, check=False
    )


def states(directory):
    import optuna

    study = optuna.load_study(study_name=directory.name, storage=f"sqlite:///{directory}/study.db")
    return [(each.number, each.state.name, each.params) for each in study.trials]


@pytest.mark.slow
def test_a_killed_search_goes_on_with_its_trials(tmp_path):
    out = tmp_path / "search"
    command = [sys.executable, "-m", "cnnjax", "search", "experiments.digits_mlp", *SPACE]
    command += ["--trials", "4", "--epochs", "3", "--workers", "2", "--out", str(out)]
    command += ["--prune", "median(startup=2)"]
    search = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    # Until a trial has been validated.
    for _ in range(600):
        time.sleep(0.2)
        if list(out.glob("trials/*/checkpoints/0*")):
            break
    os.kill(search.pid, signal.SIGKILL)
    search.wait()
    begun = {number: params for number, _, params in states(out)}
    assert begun

    resumed = cnnjax("search", "--resume", str(out), "--workers", "2")
    assert resumed.returncode == 0, resumed.stderr
    found = states(out)
    assert [number for number, _, _ in found] == list(range(4))
    assert {state for _, state, _ in found} <= {"COMPLETE", "PRUNED"}
    assert {number: params for number, _, params in found}.items() >= begun.items()
    assert (out / "report" / "index.html").stat().st_size > 10_000

    # No trial has looked at the test set.
    for number in range(4):
        lines = (out / "trials" / f"{number:04}" / "metrics.jsonl").read_text().splitlines()
        assert {json.loads(line)["kind"] for line in lines} == {"train", "validation"}

    best = json.loads((out / "best.json").read_text())[0]
    finished = cnnjax("finish-search", "--search", str(out), "--seeds", "0", "1", "--epochs", "2")
    assert finished.returncode == 0, finished.stderr
    assert "Found minus default, paired over 2 seeds" in finished.stdout
    final = json.loads((out / "final.json").read_text())
    rate = final["flags"]["found"][final["flags"]["found"].index("--learning-rate") + 1]
    assert float(rate) == best["settings"]["learning_rate"]
    assert all(0 < score <= 1 for scores in final["scores"].values() for score in scores)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["experiments.nosuch"], "no experiment 'experiments.nosuch'"),
        (["cnnjax.spec"], "is no experiment"),
        ([], "name an experiment"),
        (["--resume", "nosuch"], "nosuch is not the directory of a search"),
        (
            ["experiments.digits_mlp", "--space", "learnin_rate=log(1,2)"],
            "did you mean learning_rate",
        ),
        (["experiments.digits_mlp", *SPACE, "--seed", "-1"], "--seed -1: give at least 0"),
        (["experiments.digits_mlp", *SPACE, "--sampler", "tpee"], "did you mean tpe"),
        (["experiments.digits_mlp", *SPACE, "--prune", "asha(fctor=2)"], "fctor"),
        (["experiments.digits_mlp", *SPACE, "--value", "frist"], "unknown --value"),
        (["experiments.digits_mlp", *SPACE, "--run-dir", "x"], "--run-dir is set by cnnjax search"),
        (["experiments.digits_mlp", *SPACE, "--epoch", "3"], "--epoch"),
        (["../experiments"], "no experiment '../experiments'"),
        (
            ["experiments.digits_mlp", *SPACE, "--batch-size", "64"],
            "--batch-size and --space batch",
        ),
        (["experiments.digits_mlp", *SPACE, "--epochs", "0"], "error: --epochs 0: give 1 or more"),
        (["experiments.digits_mlp", *SPACE, "--objective", "min()"], "write it as min(NAME)"),
        (["experiments.digits_mlp", *SPACE, "--sampler", "grid(points=10000000)"], "give 2 to"),
        (["experiments.digits_mlp", *SPACE, "--sampler", "grid(points=60000)"], "fewer points"),
        (["experiments.digits_mlp", *SPACE, "--timeout-secs", "nan"], "--timeout-secs nan"),
        (["experiments.digits_mlp", *SPACE, "--workers", "1000000"], "give at most 1000"),
        (["experiments.digits_mlp", *SPACE, "--where", "batch_size > 64"], "nothing that --space"),
        (["experiments.digits_mlp", *SPACE, "--space", "smoke=choice(True, False)"], "space smoke"),
        *(
            (["experiments.digits_mlp", *SPACE, "--space", text], message)
            for text, message in (
                ("optimizer=choice(adam, adm)", "--space optimizer=adm: unknown optimizer 'adm'"),
                ("model=choice(mlp, mpl)", "--space model=mpl: unknown model 'mpl'"),
                ("schedule=choice(cosine, cosin)", "--space schedule=cosin: unknown schedule"),
                ("augment=choice(flip, flop)", "--space augment=flop: unknown augmentation"),
                ("label_smoothing=uniform(0, 3)", "--space label_smoothing=3: --label-smoothing 3"),
                ("accumulate=int(-1, 2)", "--space accumulate=-1: --accumulate -1: give 1 or more"),
            )
        ),
    ],
)
def test_what_is_refused_before_anything_runs(argv, message, capsys, tmp_path, monkeypatch):
    from cnnjax import commands

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        commands.main(["search", *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("study.db"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "search.json is damaged: it has no argv"),
        ('{"argv": "--epochs 3"}', "search.json is damaged: argv is '--epochs 3'"),
        ("xxx", "cannot read"),
    ],
)
@pytest.mark.parametrize("argv", [["search", "--resume"], ["finish-search", "--search"]])
def test_a_damaged_record_is_one_line(argv, content, message, capsys, tmp_path):
    from cnnjax import commands

    (tmp_path / "search.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        commands.main([*argv, str(tmp_path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.fixture
def record(tmp_path):
    """The directory of a search without its study, with a trial."""
    from cnnjax.search.setup import KEPT, RECORD

    saved = dict.fromkeys(KEPT, "") | {
        **{"experiment": "experiments.digits_mlp", "argv": ["--epochs", "2"], "where": []},
        **{"space": ["learning_rate=log(1e-3, 1)"], "objective": [], "seed": 0, "value": "last"},
        **{"sampler": "random", "prune": "none", "trials": 2, "storage": "", "workers": 1},
        "objectives": [{"name": "accuracy", "is_minimized": False}],
    }
    (tmp_path / RECORD).write_text(json.dumps(saved))
    (tmp_path / "trials" / "0000").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "study.db is gone, which knows the trials of the search: put it back"),
        (["--trials=4"], "study.db is gone"),
        (["--trials=0"], "--trials 0: give at least 1"),
        (["--sampler", "grid"], "only --trials, --workers, --timeout-secs, --storage, --engine"),
        (["--where", "1 < 2"], "it goes on with its own experiment and settings"),
        (["--epochs", "3"], "it goes on with its own experiment and settings"),
        (["experiments.mnist_lenet"], "it goes on with its own experiment and settings"),
    ],
)
def test_how_a_search_does_not_go_on(flags, message, record, capsys):
    from cnnjax import commands

    with pytest.raises(SystemExit) as stop:
        commands.main(["search", "--resume", str(record), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0", "-1"], "--seeds -1: give 0 to"),
        (["--seeds", "4294967296"], "--seeds 4294967296: give 0 to"),
        (["--seeds", "1", "1"], "--seeds names a seed twice"),
        (["--learning-rate", "0.5"], "--learning-rate is what the search chose: drop it"),
        (["--epochs", "0"], "--epochs 0: give 1 or more"),
        (["--trial", "7"], "--trial 7 is not among the best of the search: give one of 0"),
        (["--epochs", "9"], "trial0000-seed0 is finished, with other settings (epochs"),
    ],
)
def test_what_a_search_cannot_be_finished_with(flags, message, record, capsys):
    from cnnjax import commands

    best = [{"trial": 0, "settings": {"learning_rate": 0.01}, "values": {"accuracy": 0.9}}]
    (record / "best.json").write_text(json.dumps(best))
    run = record / "final" / "trial0000-seed0"
    run.mkdir(parents=True)
    settings = {"epochs": 2, "learning_rate": 0.01, "seed": 0}
    found = {"experiment": "experiments.digits_mlp", "settings": settings}
    (run / "config.json").write_text(json.dumps(found))
    (run / "summary.json").write_text('{"test_accuracy": 0.9}')
    with pytest.raises(SystemExit) as stop:
        commands.main(["finish-search", "--search", str(record), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("content", ["xxx", "[]", '[{"a": 1}]', "3"])
def test_a_damaged_best_json_is_one_line(content, record, capsys):
    from cnnjax import commands

    (record / "best.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        commands.main(["finish-search", "--search", str(record)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "best.json is damaged" in error and error.count("\n") == 1


def test_a_final_run_that_is_stopped_hears_of_it_once_and_is_waited_for(tmp_path):
    child = (
        "import signal, sys, time\n"
        "heard = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: heard.append(1))\n"
        "open(sys.argv[1], 'w').close()\n"
        "while not heard: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "open(sys.argv[1], 'w').write(f'saved after {len(heard)}')\n"
        "sys.exit(143)\n"
    )
    parent = (
        "import sys\n"
        "from cnnjax.commands import finish_search\n"
        "sys.exit(finish_search._run([sys.executable, '-c', *sys.argv[1:]]))\n"
    )
    file = tmp_path / "child"
    running = subprocess.Popen(
        [sys.executable, "-c", parent, child, str(file)], start_new_session=True
    )
    for _ in range(600):
        time.sleep(0.05)
        if file.exists():
            break
    # As from a terminal: to the whole group.
    os.killpg(running.pid, signal.SIGTERM)
    assert running.wait(30) == 143 and file.read_text() == "saved after 1"


def test_a_search_goes_on_with_its_own_workers_unless_others_are_given(record):
    from cnnjax.commands.search import _parse, _resumed

    found, argv = _resumed(*_parse(["--resume", str(record)]))
    assert (found.workers, found.trials, found.sampler, argv) == (1, 2, "random", ["--epochs", "2"])
    found, _ = _resumed(*_parse(["--resume", str(record), "--workers=2", "--trials=7"]))
    assert (found.workers, found.trials) == (2, 7)


@pytest.mark.slow
def test_of_two_searches_that_start_together_the_second_is_refused(tmp_path):
    out = ["--out", str(tmp_path / "s"), "--trials", "1", "--workers", "1", "--epochs", "1"]
    command = [sys.executable, "-m", "cnnjax", "search", "experiments.digits_mlp", *out, "--space"]
    both = [
        subprocess.Popen(
            [*command, text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for text in ("learning_rate=log(1e-3, 1)", "weight_decay=uniform(0, 1)")
    ]
    ended = sorted((each.communicate()[1], each.wait()) for each in both)
    assert [code for _, code in ended] == [0, 2], ended
    assert "holds another search (space)" in ended[1][0]
    assert len(states(tmp_path / "s")) == 1


@pytest.mark.slow
def test_an_objective_that_is_never_reported_is_refused(tmp_path):
    found = cnnjax(
        *("search", "experiments.digits_mlp", *SPACE, "--objective", "acuracy"),
        *("--out", str(tmp_path / "s")),
    )
    assert found.returncode == 2
    assert "unknown --objective 'acuracy': did you mean accuracy" in found.stderr
    assert not (tmp_path / "s" / "search.json").exists()


@pytest.mark.slow
def test_cross_validation_compares_two_settings_on_the_same_folds(tmp_path):
    argv = ["cross-validate", "experiments.digits_mlp", "--folds", "2", "--epochs", "4"]
    found = cnnjax(*argv, "--against", "--learning-rate 1e-6", "--out", str(tmp_path / "folds"))
    assert found.returncode == 0, found.stderr
    assert "Second minus first, on the same folds: -" in found.stdout
    scores = json.loads((tmp_path / "folds" / "folds.json").read_text())["scores"]
    assert min(scores[""]) > 0.7 > 0.3 > max(scores["against"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["experiments.digits_mlp", "--folds", "1"], "--folds 1: give at least 2"),
        (["experiments.digits_mlp", "--fold", "1/5"], "--fold is set by cnnjax cross-validate"),
        (["experiments.dcgan_mnist"], "has no --fold"),
        (["experiments.digits_mlp", "--against", "--epoch 3"], "--epoch"),
        (["experiments.digits_mlp", "--against", "--learning-rate '0.1"], "No closing quotation"),
        (["experiments.digits_mlp", "--against", " "], "--against is blank"),
        (["experiments.digits_mlp", "--against", "--optimizer adm"], "unknown optimizer 'adm'"),
        (["experiments.digits_mlp", "--epochs", "0"], "--epochs 0: give 1 or more"),
    ],
)
def test_what_cannot_be_cross_validated(argv, message, capsys, tmp_path, monkeypatch):
    from cnnjax import commands

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        commands.main(["cross-validate", *argv])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
