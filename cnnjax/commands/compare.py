"""Is one network, or one setting, better than another? On the same examples, over the same seeds.

    cnnjax compare runs/a runs/b
    cnnjax compare --run runs/a-seed0 runs/a-seed1 runs/a-seed2 \\
        --against runs/b-seed0 runs/b-seed1 runs/b-seed2

Two runs are two networks: how many examples only one of them gets right (McNemar's exact test), and
the difference of accuracy and loss with its 95% interval by the bootstrap over the examples.

Several runs on each side are two settings: pairs of the same seed, Student's paired test, the 95%
interval, and how many seeds find a difference as large in four of five cases. Runs of other tasks
than classification are compared so, by the scores that they recorded.

Judged are the validation images, unless --split test asks for the test set. Both runs must have
held out the same ones. Writes comparison.json, and of two networks the images on which they differ.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnjax import commands
from cnnjax.errors import UserError, unknown_name

SPLITS = ("validation", "test")
# Images that are drawn for each of the two networks.
DRAWN = 20
# Examples that the two disagree on; fewer cannot have a p-value below 5%: 2 / 2^6 < 0.05.
FEWEST_DISCORDANT = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, prints and writes; returns the exit code."""
    options = _parse(argv)
    import cnnjax
    from cnnjax.run import files, load

    compared = cnnjax.studies.compared
    first, second = _sides(options)
    tasks = {load.task_of(each) for each in (*first, *second)}
    if len(tasks) > 1:
        raise UserError(f"these runs are of different tasks: {', '.join(sorted(tasks))}")
    pairs = compared.pairs_by_seed(first, second)
    place = compared.Place(
        options.split, options.dataset, options.data_dir, options.base, options.smoke
    )
    of_classifiers = tasks == {"classification"}
    if of_classifiers or len(pairs) == 1:
        for pair in pairs:
            compared.check_pair(*pair, place)
    out = Path(options.out or _default_out(first[0], second[0], options.split))
    files.make_directory(out, "the directory of the comparison", "--out")
    if of_classifiers:
        _check_whole([Path(each) for each in (*first, *second)])
    print(_heading(first, second, compared.settings_that_differ(*pairs[0])))
    if of_classifiers:
        cnnjax.devices.backend.start(devices=1)
        content = _of_classifiers(pairs, place, out)
    else:
        content = _of_recorded(pairs, options.split)
    record = {"first": first, "second": second, "split": options.split, **content}
    files.write_json(out / "comparison.json", record)
    print(f"wrote        {out / 'comparison.json'}")
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = commands.Parser(
        prog="cnnjax compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="two run directories")
    add("--run", nargs="+", action="extend", default=[], help="runs of the first setting")
    add("--against", nargs="+", action="extend", default=[], help="runs of the second setting")
    add(
        "--split",
        default="validation",
        help="validation (default) or test: what they are judged by",
    )
    add("--dataset", default="", help="where their data are now, or others with the same classes")
    add("--data-dir", default="", help="where tfds datasets are now")
    add("--base", default="", help="where the base of fine-tuned runs is now")
    add("--smoke", action="store_true", help="as few images as a smoke run has")
    add("--out", default="", help="directory (FIRST/comparison-SPLIT-SECOND)")
    options = parser.parse_args(argv)
    if options.split not in SPLITS:
        raise unknown_name("--split", options.split, SPLITS)
    return options


def _sides(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The runs of each side, each of which is a run directory."""
    from cnnjax.run import record

    first, second = [*options.runs, *options.run], list(options.against)
    if not second and len(first) == 2:
        first, second = first[:1], first[1:]
    if not first or not second:
        raise UserError(
            f"{len(first)} runs to compare: give two, or two sets with the same seeds, as "
            "--run A0 A1 A2 --against B0 B1 B2"
        )
    sides = [[str(Path(each)) for each in side] for side in (first, second)]
    if options.base and not Path(options.base).is_dir():
        raise UserError(f"--base {options.base}: there is no such directory")
    for directory in map(Path, (*sides[0], *sides[1])):
        record.read_config(directory)
    return sides[0], sides[1]


def _check_whole(runs: Sequence[Path]) -> None:
    """Raises UserError for a damaged run before the first of them computes."""
    from cnnjax import checkpoint
    from cnnjax.run.files import read_json

    for run in runs:
        if (run / "summary.json").exists():
            read_json(run / "summary.json", f"{run} is damaged: train it again")
        if not checkpoint.steps(run / "checkpoints"):
            raise UserError(f"{run} has no checkpoints: train it again, or leave it out")


def _default_out(first: str, second: str, split: str) -> str:
    return str(Path(first) / f"comparison-{split}-{Path(second).absolute().name}")


def _heading(first: list[str], second: list[str], different: dict[str, tuple[Any, Any]]) -> str:
    changes = "; ".join(f"{name} {one} / {other}" for name, (one, other) in different.items())
    return (
        f"first        {' '.join(first)}\nsecond       {' '.join(second)}\n"
        f"differ in    {changes or 'no setting but the seed and where they are'}"
    )


def _of_classifiers(pairs: list[tuple[str, str]], place: Any, out: Path) -> dict[str, Any]:
    """Compares the answers of each pair; returns what was found."""
    from cnnjax.studies import compared

    found = []
    for first, second in pairs:
        one, dataset = compared.answers(first, place)
        other, _ = compared.answers(second, place)
        found.append(compared.compare(one, other))
    print(f"on           {found[0]['examples']:,} {place.split} images of {dataset.name}\n")
    if len(pairs) == 1:
        print(_networks(found[0]))
        drawn = _draw(one, other, dataset, place.split, out)
        for path in drawn:
            print(f"drawn        {path}")
        return {"networks": found[0]}
    seeds = [compared.seed_of(first) for first, _ in pairs]
    scores = [(each["accuracy"]["first"], each["accuracy"]["second"]) for each in found]
    p_values = [each["p_value"] for each in found]
    print(_settings(seeds, scores, "accuracy", p_values))
    losses = [(each["loss"]["first"], each["loss"]["second"]) for each in found]
    print(_paired_line(losses, "loss"))
    return {"seeds": seeds, "networks": found, "settings": _paired(scores)}


def _of_recorded(pairs: list[tuple[str, str]], split: str) -> dict[str, Any]:
    """Compares the recorded scores of runs of any task over their seeds."""
    from cnnjax.studies import compared

    name, scores = compared.recorded_scores(pairs, split)
    seeds = [compared.seed_of(first) for first, _ in pairs]
    print(f"on           the {split} scores that the runs recorded\n")
    print(_settings(seeds, scores, name, None))
    return {"seeds": seeds, "score": name, "scores": scores, "settings": _paired(scores)}


def _networks(found: dict[str, Any]) -> str:
    """What is known of two networks, in lines."""
    lines = []
    for name, scale, unit in (("accuracy", 100, "%"), ("loss", 1, "")):
        each = found[name]
        low, high = (scale * bound for bound in each["interval"])
        digits = 2 if scale == 100 else 4
        lines.append(
            f"{name:<12} first {scale * each['first']:.{digits}f}{unit}, second "
            f"{scale * each['second']:.{digits}f}{unit}; second minus first "
            f"{scale * each['difference']:+.{digits}f}, 95% interval {low:+.{digits}f} to "
            f"{high:+.{digits}f} (bootstrap over images)"
        )
    only_first, only_second = found["only_first_right"], found["only_second_right"]
    p_value = found["p_value"]
    lines.append(
        f"McNemar      only the first is right on {only_first:,} images, only the second on "
        f"{only_second:,}: p = {p_value:.3g} (exact)"
    )
    if only_first + only_second < FEWEST_DISCORDANT:
        verdict = "they differ on too few images for any test to tell which is better"
    elif p_value >= 0.05:
        verdict = "these images do not tell which network is better"
    else:
        better = "second" if only_second > only_first else "first"
        verdict = f"the {better} network is better on such images"
    lines.append(
        f"so           {verdict}; whether its setting is takes several seeds: --run ... --against"
    )
    return "\n".join(lines)


def _settings(
    seeds: list[int], scores: list[tuple[float, float]], name: str, p_values: list[float] | None
) -> str:
    """What is known of two settings, as a table and lines."""
    from cnnjax.studies import tables

    scale, digits, unit = (100, 2, ", %") if name == "accuracy" else (1, 4, "")
    titles = ["seed", f"first, {name}{unit}", "second", "difference"]
    rows = [
        [
            str(seed),
            *(f"{scale * value:.{digits}f}" for value in pair),
            f"{scale * (pair[1] - pair[0]):+.{digits}f}",
        ]
        for seed, pair in zip(seeds, scores, strict=True)
    ]
    if p_values is not None:
        titles.append("McNemar's p")
        rows = [[*row, f"{p:.3g}"] for row, p in zip(rows, p_values, strict=True)]
    means = [tables.mean_interval([pair[side] for pair in scores]) for side in (0, 1)]
    shown = [f"{scale * mean:.{digits}f} ± {scale * half:.{digits}f}" for mean, half in means]
    rows.append(["mean ± 95%", *shown, "", *([""] if p_values is not None else [])])
    return f"{tables.table(titles, rows)}\n{_paired_line(scores, name)}"


def _paired_line(scores: list[tuple[float, float]], name: str) -> str:
    from cnnjax.studies import tables

    first, second = ([pair[side] for pair in scores] for side in (0, 1))
    return f"{name:<12} {tables.paired_text(first, second, 'Second minus first', name)}"


def _paired(scores: list[tuple[float, float]]) -> dict[str, Any]:
    from cnnjax.evaluation import comparison

    found = comparison.paired([one for one, _ in scores], [other for _, other in scores])
    return found._asdict()


def _draw(one: Any, other: Any, dataset: Any, split: str, out: Path) -> list[Path]:
    """Draws images that only one of the two gets right, those that it is surest of first."""
    import numpy as np

    from cnnjax import plots
    from cnnjax.run import report

    arrays: Any = getattr(dataset, split, None)
    if not hasattr(arrays, "image"):
        return []
    figures = {}
    for name, good, bad in (("only_first_right", one, other), ("only_second_right", other, one)):
        rows = np.flatnonzero(good.right & ~bad.right)
        rows = rows[np.argsort((good.losses - bad.losses)[rows], kind="stable")][:DRAWN]
        if len(rows):
            titles = [_title(one, other, int(row), dataset.class_names) for row in rows]
            images = arrays.image[rows]
            figures[name] = lambda path, images=images, titles=titles: plots.image_grid(
                images, titles, path
            )
    return report.draw_figures(out, figures)


def _title(one: Any, other: Any, row: int, class_names: Sequence[str]) -> str:
    lines = [f"is {class_names[one.label[row]]}"]
    for name, each in (("first", one), ("second", other)):
        chosen = int(each.log_probabilities[row].argmax())
        share = math.exp(each.log_probabilities[row, chosen])
        lines.append(f"{name} {class_names[chosen]} {share:.0%}")
    return "\n".join(lines)
