"""Cross-validate an experiment: each part of the training images validates once.

    cnnjax cross-validate experiments.digits_mlp --folds 5 --repeats 2
    cnnjax cross-validate experiments.digits_mlp --folds 5 --against '--learning-rate 0.01' \\
        --epochs 20

For data that are too few to hold a part of them out. Each class is divided evenly among the folds;
each repeat divides anew. The test set is left alone. The interval and the test allow for what folds
share (Nadeau & Bengio 2003). Runs that are finished are not run again.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from cnnjax import commands
from cnnjax.errors import UserError

OWN_FLAGS = (
    *("--run-dir", "--resume", "--stop-after-epochs", "--test", "--no-test", "--fold"),
    *("--data-seed", "--validation"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains every fold, prints and writes the table; returns the exit code."""
    options, flags = _parse(argv)
    from cnnjax.run.files import make_directory, write_json

    out = Path(options.out or f"runs/cross-validate-{options.experiment.rpartition('.')[2]}")
    lines = {"": flags}
    if options.against:
        lines["against"] = [*flags, *_words(options.against)]
    _check(options.experiment, lines)
    make_directory(out, "the directory of the folds", "--out")
    places = [(repeat, fold) for repeat in range(options.repeats) for fold in range(options.folds)]
    scores: dict[str, list[float]] = {name: [] for name in lines}
    monitor = ""
    for repeat, fold in places:
        for name, line in lines.items():
            own = [*line, "--fold", f"{fold + 1}/{options.folds}", "--data-seed", str(repeat)]
            directory = out / f"{name or 'folds'}-repeat{repeat}-fold{fold + 1}"
            monitor, score = _score(options.experiment, own, directory)
            scores[name].append(score)
            print(f"{directory}: validation {monitor} {score:.4f}", flush=True)
    text = table(options.experiment, monitor, lines, scores, options.folds)
    (out / "folds.md").write_text(text, encoding="utf-8")
    write_json(out / "folds.json", {"monitor": monitor, "places": places, "scores": scores})
    print(text, end="")
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = commands.Parser(
        prog="cnnjax cross-validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other flags are the experiment's.",
    )
    parser.add_argument("experiment", help="a module, such as experiments.digits_mlp")
    parser.add_argument("--folds", type=int, default=5, help="parts (5)")
    parser.add_argument("--repeats", type=int, default=1, help="divisions into parts (1)")
    parser.add_argument("--against", default="", help="further flags of a second setting")
    parser.add_argument("--out", default="", help="directory (runs/cross-validate-EXPERIMENT)")
    options, rest = parser.parse_both(argv, OWN_FLAGS)
    parser.parse_both([options.experiment, *_words(options.against)], OWN_FLAGS)
    for name, least in (("folds", 2), ("repeats", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)}: give at least {least}.")
    return options, rest


def _words(against: str) -> list[str]:
    try:
        words = shlex.split(against)
    except ValueError as error:
        raise UserError(f"--against {against!r} cannot be read: {error}") from None
    if against and not words:
        raise UserError("--against is blank: give further flags, such as '--learning-rate 0.01'")
    return words


def _check(experiment: str, lines: dict[str, list[str]]) -> None:
    """Raises UserError unless the experiment is one whose data have folds, with such flags."""
    from cnnjax.commands.search import experiment_module
    from cnnjax.run import checks, cli

    module = experiment_module(experiment)
    if "fold" not in getattr(module.Config, "__dataclass_fields__", {}):
        raise UserError(f"{experiment} has no --fold: its data are not divided into parts")
    for line in lines.values():
        checks.check_specs(cli.parse(module.Config, line))


def _score(experiment: str, flags: Sequence[str], directory: Path) -> tuple[str, float]:
    """Trains one fold, unless it is finished; returns what is monitored, of the last validation."""
    from cnnjax.run.files import read_json
    from cnnjax.search.plan import run_module, validations

    own = ["--no-test", "--run-dir", str(directory), "--resume", str(directory)]
    run_module(experiment, [*flags, *own], f"{directory} failed")
    monitor = read_json(directory / "summary.json", f"{directory} is damaged")["monitor"]
    return monitor, validations(directory, monitor)[-1]


def table(
    experiment: str,
    monitor: str,
    lines: dict[str, list[str]],
    scores: dict[str, list[float]],
    folds: int,
) -> str:
    """Sets the settings as a Markdown table, and says whether they differ."""
    from cnnjax.evaluation.comparison import resampled

    scale, unit = (100, ", %") if monitor == "accuracy" else (1, "")
    rows = []
    for name, line in lines.items():
        mean = resampled(scores[name], held_share=1 / folds)
        each = " ".join(f"{scale * score:.2f}" for score in scores[name])
        command = shlex.join(["python", "-m", experiment, *line])
        interval = f"{scale * mean.difference:.2f} ± {scale * mean.half_interval:.2f}"
        rows.append(f"| `{command}` | {interval} | {each} |")
    text = (
        f"| settings | validation {monitor}{unit} (mean ± half of the 95% interval) | each fold |\n"
        "|---|---|---|\n" + "\n".join(rows) + "\n"
    )
    if "against" not in scores:
        return text
    result = resampled(scores[""], scores["against"], held_share=1 / folds)
    return text + (
        f"\nSecond minus first, on the same folds: {scale * result.difference:+.3f} ± "
        f"{scale * result.half_interval:.3f}, p = {result.p_value:.3g}.\n"
    )
