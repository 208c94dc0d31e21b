"""The experiments on robustness, ensembles and labels, from their command lines."""

import importlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from cnnjax.commands import evaluate, inspect_labels
from cnnjax.errors import UserError
from cnnjax.run import classifier, cli, settings
from cnnjax.run import state as states
from experiments import classify, digits_mlp, mnist_adversarial, mnist_ensemble

SMOKE = ["--smoke", "--devices", "1"]
SCRIPTS = Path(__file__).parents[2] / "scripts"


def launch(module, *argv):
    """Runs an experiment's command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        settings.launch(module.Config, module.main, [str(argument) for argument in argv])
    return stop.value.code


def command(module, *argv):
    """Runs a command line that is no training run; returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        cli.run(module.Config, module.main, [str(argument) for argument in argv])
    return stop.value.code or 0


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two small networks on digits with a fifth of the labels wrong, on the same validation set."""
    root = tmp_path_factory.mktemp("runs")
    options = ["--devices", 1, "--epochs", 12, "--data-seed", 0, "--label-noise", 0.2]
    for seed in (0, 1):
        run = ["--run-dir", root / str(seed), "--seed", seed]
        assert launch(digits_mlp, *options, *run) == 0
    return root / "0", root / "1"


@pytest.mark.slow
def test_runs_are_evaluated_as_one_and_calibrated(two_runs, tmp_path, capsys):
    options = ["--tta", "shift:1", "--calibrate", "--out", tmp_path]
    assert command(evaluate, "--run", *two_runs, *options) == 0
    report = read(tmp_path / "evaluation.json")
    assert report["accuracy"] > 0.5
    assert report["ensemble"]["members"] == [str(run) for run in two_runs]
    assert 0 < report["ensemble"]["disagreement"]["mean"] < 0.5
    assert report["calibration"]["fitted_on"] == 162
    printed = capsys.readouterr().out
    assert "two members disagree" in printed and "temperature" in printed


@pytest.mark.slow
def test_a_run_is_evaluated_under_attack(two_runs, tmp_path, capsys):
    options = ["--attack", "fgsm:0.1", "pgd:0.1:5:2", "--check-masking", "--out", tmp_path]
    assert command(evaluate, "--run", two_runs[0], *options) == 0
    report = read(tmp_path / "evaluation.json")
    accuracies = report["robustness"]["accuracies"]
    assert max(accuracies.values()) < report["accuracy"]
    compared = report["robustness"]["masking"]["accuracies"]
    assert set(compared) == {"attack", "fgsm", "noise", "margin", "unbounded"}
    assert compared["attack"] == accuracies["pgd:0.1:5:2"]
    assert compared["unbounded"] < 0.1
    assert "signs of masked gradients" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_by_its_step_is_not_the_run_s_last(two_runs, tmp_path):
    steps = sorted(int(path.name) for path in (two_runs[0] / "checkpoints").glob("0*"))
    losses = []
    for name in (two_runs[0], f"{two_runs[0]}@{steps[0]}"):
        out = tmp_path / Path(name).name
        assert command(evaluate, "--run", name, "--calibrate", "--out", out) == 0
        losses.append(read(out / "evaluation.json")["calibration"]["before"]["loss"])
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_noise_in_the_images_costs_accuracy(two_runs, tmp_path):
    options = ["--corrupt", "salt_and_pepper:0.5", "--out", tmp_path]
    assert command(evaluate, "--run", two_runs[0], *options) == 0
    noisy = read(tmp_path / "evaluation.json")["accuracy"]
    assert noisy < read(two_runs[0] / "summary.json")["test_accuracy"] - 0.1


@pytest.mark.slow
def test_wrong_labels_are_found_and_left_out(two_runs, tmp_path, capsys):
    assert command(inspect_labels, "--run", *two_runs, "--out", tmp_path) == 0
    found = read(tmp_path / "detection.json")
    assert found["share"] == pytest.approx(0.2, abs=1e-3)
    assert found["recall"] > 0.5
    excluded = np.loadtxt(tmp_path / "exclude.txt", int)
    assert found["excluded"] == len(excluded) == len(set(excluded))
    ranking = (tmp_path / "ranking.csv").read_text().splitlines()
    assert ranking[0] == "index,label,predicted,score"
    assert len(ranking) == 1 + 1455
    assert (tmp_path / "suspicious.png").exists()
    cleaned = classify.Config(
        dataset="digits",
        data_seed=0,
        label_noise=0.2,
        exclude=str(tmp_path / "exclude.txt"),
    )
    assert len(classifier.read_data(cleaned).train.label) == 1455 - len(excluded)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--attack", "pdg:0.3"], "unknown attack 'pdg': did you mean pgd"),
        (["--attack", "pgd:0.3:3:1:0.001"], "on a linear model"),
        (["--check-masking"], "--check-masking needs an attack"),
        (["--tta", "turn"], "unknown view 'turn'"),
        (["--corrupt", "mixup:0.2"], "mixed images have no label"),
        (["--preprocess", "medium:3"], "unknown filter 'medium'"),
    ],
)
def test_bad_input_is_one_line(two_runs, argv, words, capsys):
    assert command(evaluate, "--run", two_runs[0], *argv) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_runs_that_validate_on_each_other_s_training_images_are_not_calibrated(
    two_runs, tmp_path, capsys
):
    other = tmp_path / "other"
    options = ["--devices", 1, "--epochs", 1, "--seed", 2, "--run-dir", other]
    assert launch(digits_mlp, *options) == 0
    assert command(evaluate, "--run", two_runs[0], other, "--calibrate") == 2
    assert "hold out different validation images" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("snapshots", [False, True])
def test_an_ensemble_trains_what_is_missing(tmp_path, snapshots):
    flags = ["--ema-decay", 0, "--snapshots"] if snapshots else []
    flags += ["--model", "lenet5", "--model-arguments", "activation=relu", "--run-dir", tmp_path]
    assert launch(mnist_ensemble, *SMOKE, *flags) == 0
    summary = read(tmp_path / "summary.json")
    assert len(summary["member_test_accuracies"]) == 2
    assert summary["test_accuracy"] == read(tmp_path / "evaluation.json")["accuracy"]
    first = (tmp_path / "member-1" / "metrics.jsonl").read_bytes()
    (tmp_path / "summary.json").unlink()
    if not snapshots:
        (tmp_path / "member-2" / "summary.json").unlink()
    assert launch(mnist_ensemble, "--resume", tmp_path) == 0
    assert read(tmp_path / "summary.json") == summary | {
        "seconds": pytest.approx(summary["seconds"], abs=120)
    }
    assert (tmp_path / "member-1" / "metrics.jsonl").read_bytes() == first


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"label_smoothing": 0.5}, {"balance": "weights", "exclude": "nines.txt"}]
)
def test_runs_are_judged_by_one_loss_whatever_training_weighs(tmp_path, monkeypatch, settings):
    """Else the test losses of two remedies could not be compared."""
    monkeypatch.chdir(tmp_path)
    labels = classifier.read_data(classify.Config(dataset="digits")).train.label
    Path("nines.txt").write_text("\n".join(map(str, np.flatnonzero(labels == 9)[:100])))
    config = classify.Config(dataset="digits", **settings)
    dataset = classifier.read_data(config)
    recipe = classifier.make_recipe(
        config, dataset, *classifier.make_model(config, "mlp", {}, dataset)
    )
    state = states.initial_state(recipe, seed=0)
    image, label = dataset.train.image[:32], dataset.train.label[:32]
    batch = {"image": image, "label": label, "mask": np.ones(32, bool)}
    _, metrics = recipe.make_step(None)(state, batch)
    logits = recipe.model.apply(state.variables(), recipe.normalize(image), train=False)
    by_hand = -jax.nn.log_softmax(logits)[np.arange(32), label]
    total, count = recipe.task.metrics(logits, batch)["loss"]
    assert float(total / count) == pytest.approx(float(by_hand.mean()), rel=1e-5)
    assert float(metrics["loss"][0]) / 32 != pytest.approx(float(by_hand.mean()), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fgsm_rs", "free"])
def test_adversarial_runs_measure_robustness_and_resume(tmp_path, method):
    attacks = ["--validation-attack", "pgd:0.3:3", "--test-attack", "pgd:0.3:3:2"]
    settings = ["--method", method, "--replays", 2, *attacks, "--run-dir", tmp_path]
    settings += ["--dataset", "digits", "--model", "mlp", "--validation", 100, "--epochs", 2]
    assert launch(mnist_adversarial, "--devices", 1, *settings, "--stop-after-epochs", 1) == 0
    assert launch(mnist_adversarial, "--resume", tmp_path) == 0
    summary = read(tmp_path / "summary.json")
    assert 0 <= summary["test_robust_accuracy"] <= summary["test_accuracy"]
    assert "best_validation_robust_accuracy" in summary


def test_a_negative_time_to_grow_is_one_clear_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch(mnist_adversarial, "--epsilon-warmup-epochs", -1) == 2
    assert "--epsilon-warmup-epochs -1.0: give 0 or more" in capsys.readouterr().err


def test_free_training_says_what_it_lacks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch(mnist_adversarial, "--method", "free", "--sam", 0.05) == 2
    assert "--method free has no --sam" in capsys.readouterr().err


@pytest.fixture
def seeds_table(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("seeds_table")
    sys.modules.pop("seeds_table", None)


def test_intervals_are_student_s(seeds_table):
    # Quantile of t at 97.5% with 4 degrees of freedom: 2.776; deviation of 1 ... 5: 1.5811.
    assert seeds_table.half_interval([1, 2, 3, 4, 5]) == pytest.approx(
        2.776 * 1.5811 / 5**0.5, 1e-3
    )
    assert np.isnan(seeds_table.half_interval([1.0]))


def test_rows_tell_shares_in_percent_and_paired_differences(seeds_table):
    first = {"accuracy": [0.5, 0.6, 0.7], "parameters": [10.0] * 3}
    second = {"accuracy": [0.6, 0.7, 0.8], "parameters": [20.0] * 3}
    assert seeds_table.titles(list(first), ["accuracy"], ["accuracy"], paired=True) == (
        "| experiment | accuracy, % | each seed | less the first | parameters |\n"
        "|---|---|---|---|---|"
    )
    one = seeds_table.row("a", first, ["accuracy"], first)
    assert one == "| `a` | 60.00 ± 10.00 | 50.00 60.00 70.00 |  | 10 |"
    two = seeds_table.row("b --c 1", second, ["accuracy"], first)
    assert "| 70.00 ± 10.00 | 60.00 70.00 80.00 | +10 ±" in two and two.endswith("| 20 |")


def test_lines_and_columns_that_cannot_be_are_told_before_any_run(seeds_table):
    check = seeds_table.check
    with pytest.raises(UserError, match="did you mean digits_mlp"):
        check(["digits_mlp", "digits_mpl"], [0], paired=False)
    with pytest.raises(UserError, match="has --seed, which this script gives"):
        check(["digits_mlp --seed 3"], [0], paired=False)
    with pytest.raises(UserError, match="--epochs"):
        check(["digits_mlp --epchs 3"], [0], paired=False)
    with pytest.raises(UserError, match="give two or more"):
        check(["digits_mlp"], [0, 0], paired=True)
    with pytest.raises(UserError, match="--seeds: 0 is given twice"):
        check(["digits_mlp"], [0, 1, 0], paired=True)
    with pytest.raises(UserError, match="--seeds -1: give 0 to 4,294,967,295"):
        check(["digits_mlp"], [-1], paired=False)
    summaries = [{"test_accuracy": 0.5, "seconds": 3, "model": "mlp"}]
    assert seeds_table.scores(summaries, "seconds") == [3.0]
    with pytest.raises(UserError, match="unknown column 'accurcy': did you mean accuracy"):
        seeds_table.scores(summaries, "accurcy")


def test_columns_that_no_run_has_are_told_before_the_long_runs(seeds_table, tmp_path, monkeypatch):
    started = []

    def run(line, seed, out):
        started.append((line, seed))
        return {"test_miou": 0.5, "test_loss": 1.0, "seconds": 3}

    monkeypatch.setattr(seeds_table, "run", run)
    # Scores of classifiers are known without a run.
    seeds_table.check_columns(["digits_mlp"], ["accuracy", "loss", "seconds"], [0], tmp_path)
    assert not started
    seeds_table.check_columns(["segment_digits --epochs 9"], ["miou"], [4, 5], tmp_path)
    assert started == [("segment_digits --epochs 9 --smoke", 4)]
    with pytest.raises(UserError, match="unknown column 'accuracy': choose from loss, miou"):
        seeds_table.check_columns(["segment_digits"], ["accuracy"], [0], tmp_path)
    finished = seeds_table.run_directory("digits_mlp", 1, tmp_path)
    finished.mkdir()
    (finished / "summary.json").write_text('{"test_accuracy": 1.0}')
    with pytest.raises(UserError, match="unknown column 'bogus'"):
        seeds_table.check_columns(["digits_mlp"], ["bogus"], [0, 1], tmp_path)
    # A run that is there was read instead of another.
    assert len(started) == 2


def test_long_lines_have_directories_of_their_own(seeds_table, tmp_path):
    long = "classify " + "--augment rotate:10 " * 30
    first, second = (seeds_table.run_directory(long + end, 0, tmp_path) for end in ("a", "b"))
    assert first != second
    assert len(first.name) < 200


def run_script(monkeypatch, name, *argv):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    importlib.import_module(name).main()


@pytest.mark.slow
def test_the_overfitting_study_makes_its_table_and_figure(tmp_path, monkeypatch):
    flags = "--smoke --devices 1 --dataset digits --model mlp --train-examples 200"
    argv = ["--seeds", 0, 1, "--methods", "L2", "mixup", "--flags", flags, "--out", tmp_path]
    run_script(monkeypatch, "overfitting_study", *argv)
    table = (tmp_path / "overfitting.md").read_text()
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == ["none", "L2", "mixup"]
    assert "nan" not in table
    assert (tmp_path / "overfitting.png").exists()
    assert len(list(tmp_path.glob("*/summary.json"))) == 6


def test_lines_of_the_pictures_study_can_be_run(seeds_table, tmp_path):
    study = importlib.import_module("pictures_study")
    for dataset in study.EPOCHS:
        lines = [study.line(method, dataset, tmp_path / "a b") for method in study.METHODS]
        assert len(set(lines)) == len(study.METHODS)
        seeds_table.check(lines, [0, 1], paired=True)


def test_flags_of_the_pictures_study_are_checked_before_anything_is_fetched(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--epchs"):
        run_script(monkeypatch, "pictures_study", "--flags", "--epchs 3", "--out", tmp_path / "new")
    with pytest.raises(UserError, match="--seeds: give two or more"):
        run_script(monkeypatch, "pictures_study", "--seeds", 3, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_pictures_study_makes_its_table_and_figure(tmp_path, monkeypatch):
    for number, split in enumerate(("train", "validation", "test")):
        for label, name in enumerate(("animals", "food")):
            folder = tmp_path / "tuxpaint" / split / name
            folder.mkdir(parents=True)
            pixels = np.random.default_rng([number, label]).integers(0, 255, (24, 40, 40, 3))
            for index, image in enumerate(pixels.astype(np.uint8)):
                Image.fromarray(image).save(folder / f"{index}.png")
    flags = "--smoke --devices 1 --model mlp --model-arguments dense_widths=(8,)"
    argv = ["--datasets", "tuxpaint", "--seeds", 0, 1, "--methods", "none", "--flags", flags]
    run_script(monkeypatch, "pictures_study", *argv, "--out", tmp_path)
    table = (tmp_path / "tuxpaint.md").read_text()
    assert "errors fewer than with none, %" in table and "nan" not in table
    assert [row.split("|")[1].strip() for row in table.splitlines()[2:]] == ["none"]
    assert (tmp_path / "tuxpaint.png").exists()


@pytest.mark.exhaustive
def test_the_noise_study_makes_its_tables_and_does_nothing_twice(tmp_path, monkeypatch):
    flags = "--smoke --devices 1 --dataset digits --model mlp"
    argv = ["--seeds", 0, "--shares", 0, 0.2, "--flags", flags, "--out", tmp_path]
    run_script(monkeypatch, "noise_study", *argv)
    tables = (tmp_path / "tables.md").read_text()
    for words in ("| cleaned |", "| el2n |", "| 20 |", "Cleaning recovers"):
        assert words in tables
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("it ran again"))
    run_script(monkeypatch, "noise_study", *argv)
    assert (tmp_path / "tables.md").read_text() == tables
