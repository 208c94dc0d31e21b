"""Train many members of one experiment as one program: seeds, and settings that are numbers.

    cnnjax population experiments.mnist_lenet --seeds 16
    cnnjax population experiments.mnist_lenet --seeds 5 --space 'learning_rate=choice(1e-3, 3e-3)'
    cnnjax population experiments.mnist_lenet --augment 'rotate:{angle}' \\
        --space 'angle=uniform(0, 20)' --members 9 --prune 'halving(factor=3)'
    cnnjax population experiments.mnist_lenet --train-examples 100 --space 'data_seed=choice(0, 1)'
    cnnjax population experiments.mnist_lenet --members 8 --pbt \\
        --space 'learning_rate=log(1e-4, 1e-1)' 'weight_decay=log(1e-3, 1)'
    cnnjax population --resume runs/population-mnist_lenet-20260101-120000

Each member is the experiment with its seed and its settings, and leaves an ordinary run directory,
in `members/`. What varies are floats, such as `learning_rate`, `weight_decay` or a number of
--augment, and what chooses data: `data_seed`, `label_noise`, `fold`. Choices are crossed with each
other and with the seeds; of ranges --members settings are drawn. With --pbt (population based
training) the worst members copy the best after each epoch and explore settings near theirs; all of
them have the same images then.
"""

import argparse
import dataclasses
import functools
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnjax import commands
from cnnjax.commands.search import experiment_module
from cnnjax.errors import UserError

OWN_FLAGS = ("--run-dir", "--resume", "--seed")
# What a population is; --way and --devices may be others when it goes on.
KEPT = (
    "experiment",
    "space",
    "where",
    "seeds",
    "first_seed",
    "members",
    "prune",
    "pbt",
    "draw_seed",
)
TYPES: dict[str, type] = {
    **dict.fromkeys(("space", "where", "argv"), list),
    **dict.fromkeys(("experiment", "prune", "pbt", "way"), str),
    **dict.fromkeys(("seeds", "first_seed", "members", "draw_seed"), int),
}
RECORD = "population.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns 0, or 130 or 143 for a population that was stopped."""
    options, flags = _parse(argv)
    if options.resume:
        options, flags = _resumed(options, flags)
    _check_numbers(options)
    # Not before: these import JAX, which --help does without.
    from cnnjax.run import cli, files, record

    module = experiment_module(options.experiment)
    config = record.shortened(cli.parse(module.Config, flags))
    if options.pbt and getattr(config, "data_seed", 0) < 0:
        # A member that copies another has learned what that was trained on: it would be validated
        # on some of it, if their validation images differed.
        config = dataclasses.replace(config, data_seed=options.first_seed)
    members, rules = _members(options, module, config)
    directory = _directory(options)
    _start_devices(config.devices, len(members))
    from cnnjax.search.population import prepare, program, progress, report, run, training
    from cnnjax.search.population.members import member_mesh

    mesh = member_mesh(config.devices, len(members))
    way = program.choose_way(options.way, mesh, len(members))
    prepared = prepare.prepare(module, config, members, directory / "members")
    if rules.pbt is not None and not len(prepared.rows[0]["validation"]):
        raise UserError("--pbt compares members by validation: hold images out by --validation.")
    files.make_directory(directory, "the directory of the population", "--out")
    with files.writing_errors(directory):
        if not options.resume:
            _write_record(directory, options, flags)
        programs = training.Programs(prepared, mesh, way)
        print(f"directory    {directory}\ndevices      {run.describe(programs, len(members))}")
        print(f"members      {len(members)}: {_said(options, members)}", flush=True)
        done, code = run.train(prepared, programs, directory, rules, resume=bool(options.resume))
        if code:
            print(f"stopped; continue with cnnjax population --resume {directory}")
            return code
        print(report.write(prepared, done, directory))
    if not any(why in (progress.FINISHED, progress.STOPPED) for why, _ in done.ended.values()):
        raise UserError(
            "all members diverged: lower the learning rates, lengthen the warmup or clip the "
            f"gradient; see {directory / 'population.md'}."
        )
    print(report.best_line(prepared, done))
    print(f"seconds      {done.seconds:.1f}\nsee          {directory / 'population.md'}")
    return 0


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = commands.Parser(
        prog="cnnjax population",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All other flags are the experiment's, the same for each member; --devices are "
        "those that members are divided among.",
    )
    add = parser.add_argument
    add("experiment", nargs="?", help="a module, such as experiments.mnist_lenet")
    add("--seeds", type=int, default=1, help="seeds of each setting (1)")
    add("--first-seed", type=int, default=0, help="the first of them (0)")
    add(
        "--space",
        nargs="+",
        action="extend",
        default=[],
        help="what varies: SETTING=DOMAIN ..., as of search",
    )
    add("--where", nargs="+", action="extend", default=[], help="constraints, as of search")
    add("--members", type=int, default=0, help="settings that are drawn of ranges; with --pbt all")
    add("--draw-seed", type=int, default=0, help="seed of what is drawn (0)")
    add("--prune", default="none", help="none (default), or halving(min_epochs=1, factor=3)")
    add(
        "--pbt",
        nargs="?",
        const="pbt",
        default="",
        help="copy and explore: pbt(every_epochs=1, fraction=0.2, resample=0.25)",
    )
    add("--way", default="auto", help="auto, loop, unrolled or vmap: how members are computed")
    add("--out", default="", help="directory (runs/population-EXPERIMENT-DATE-TIME)")
    add("--resume", default="", help="go on with the population in this directory")
    options, rest = parser.parse_both(argv, OWN_FLAGS)
    options.given = list(argv or [])
    return options, rest


def _resumed(options: argparse.Namespace, rest: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the first start."""
    from cnnjax.run.files import read_json
    from cnnjax.search.setup import check_types

    directory = Path(options.resume)
    saved = read_json(directory / RECORD, f"{directory} is not the directory of a population")
    if (directory / "members.json").exists():
        raise UserError(f"{directory} is finished: see {directory / 'population.md'}.")
    words = [word.partition("=")[0] for word in options.given if word.startswith("--")]
    other = [word for word in words if word not in ("--resume", "--way")]
    if options.experiment or other:
        raise UserError(
            f"--resume {directory}: it goes on with its own experiment and settings; only --way "
            "may be given."
        )
    check_types(directory / RECORD, saved, TYPES)
    kept = {name: saved[name] for name in KEPT}
    way = options.way if "--way" in words else saved["way"]
    found = argparse.Namespace(**{**vars(options), **kept, "way": way, "out": str(directory)})
    return found, list(saved["argv"])


def _check_numbers(options: argparse.Namespace) -> None:
    if not options.experiment:
        raise UserError("name an experiment, such as experiments.mnist_lenet, or --resume one.")
    least = {"seeds": 1, "first_seed": 0, "members": 0, "draw_seed": 0}
    for name, number in least.items():
        flag = "--" + name.replace("_", "-")
        if getattr(options, name) < number:
            raise UserError(f"{flag} {getattr(options, name)}: give at least {number}.")
    if "--members" in options.given and options.members < 1:
        raise UserError("--members 0: a population has at least 1.")
    if options.first_seed + max(options.seeds, options.members) > 2**32:
        raise UserError(f"--first-seed {options.first_seed}: seeds are below 2**32.")


def _members(options: argparse.Namespace, module: Any, config: Any) -> tuple[list[Any], Any]:
    """Returns the members, and what ends or changes them early."""
    from cnnjax import spec
    from cnnjax.rng import numpy_generator
    from cnnjax.search.population import pbt, stopping, varied
    from cnnjax.search.population.run import Rules
    from cnnjax.search.space import Range, draw_allowed, read_space

    settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    space = None
    if not options.space and (word := re.search(r"\{(\w+)\}", getattr(config, "augment", ""))):
        raise UserError(
            f"--augment has {word[0]}: say by --space where it lies, such as "
            f"'{word[1]}=uniform(0, 20)'."
        )
    if options.space or options.where or any("{" in str(each) for each in settings.values()):
        space = read_space(options.space, module.Config, settings, options.where)
    pruner = stopping.read_pruner(options.prune)
    dimensions = () if space is None else space.dimensions
    ranges = [each.name for each in dimensions if isinstance(each.domain, Range)]
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    if not options.pbt:
        if ranges and not options.members:
            raise UserError(f"--space {ranges[0]}: say by --members how many settings are drawn.")
        if options.members and not ranges:
            raise UserError(
                f"--members {options.members}: nothing is drawn of a range; give --seeds, or "
                "--space with one, such as 'learning_rate=log(1e-4, 1e-1)'."
            )
        drawn = varied.draw_members(
            space,
            seeds=seeds,
            draws=options.members or 1,
            seed=options.draw_seed,
            settings=settings,
        )
        return drawn, Rules(pruner=pruner)
    rule = spec.call(spec.parse_one(options.pbt, "pbt"), pbt.RULES, "pbt")
    _check_pbt(options, config, dimensions)
    assert space is not None  # It has dimensions.
    varied.check_alone(dimensions)
    if options.members > varied.MOST_MEMBERS:
        raise UserError(f"--members {options.members}: give at most {varied.MOST_MEMBERS}.")
    drawn = []
    for number in range(options.members):
        generator = numpy_generator(options.draw_seed + number, "population")
        chosen = draw_allowed(space, settings, generator)
        drawn.append(varied.Member(number, options.first_seed + number, chosen))
    allows = functools.partial(space.allows_choice, settings)
    return drawn, Rules(pbt=rule, dimensions=dimensions, seed=options.draw_seed, allows=allows)


def _check_pbt(options: argparse.Namespace, config: Any, dimensions: Sequence[Any]) -> None:
    from cnnjax.search.population.varied import OF_DATA

    for flag, wrong in (
        ("--seeds", options.seeds != 1),
        ("--prune", options.prune != "none"),
        ("--patience", bool(config.patience)),
        ("--validate-every-steps", bool(config.validate_every_steps)),
    ):
        if wrong:
            raise UserError(f"--pbt with {flag}: members copy each other to the end; drop one.")
    if not dimensions:
        raise UserError(
            "--pbt explores settings: give some by --space, such as "
            "'learning_rate=log(1e-4, 1e-1)'."
        )
    if options.members < 2:
        raise UserError(f"--members {options.members}: with --pbt give 2 or more.")
    for each in dimensions:
        if each.name in OF_DATA:
            raise UserError(f"--space {each.name}: members keep their data with --pbt; drop it.")


def _directory(options: argparse.Namespace) -> Path:
    name = options.experiment.rpartition(".")[2]
    out = options.out or f"runs/population-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory = Path(out)
    if not options.resume and (directory / RECORD).exists():
        raise UserError(f"{directory} holds a population: give another --out, or --resume it.")
    is_new = not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))
    if not options.resume and not is_new:
        raise UserError(f"--out {directory} holds other files: name a new directory.")
    return directory


def _start_devices(devices: int, num_members: int) -> None:
    """Makes a CPU's cores devices, as many as there are members for."""
    from cnnjax.devices import backend

    if devices > num_members:
        raise UserError(
            f"--devices {devices} for {num_members} members: each device has at least one, so "
            f"give at most {num_members}."
        )
    backend.start(devices, batch_size=backend.LEAST_PART * num_members)


def _write_record(directory: Path, options: argparse.Namespace, flags: Sequence[str]) -> None:
    from cnnjax.run.files import write_json

    kept = {name: getattr(options, name) for name in KEPT}
    write_json(directory / RECORD, {**kept, "way": options.way, "argv": list(flags)})


def _said(options: argparse.Namespace, members: Sequence[Any]) -> str:
    seeds = sorted({each.seed for each in members})
    settings = len({tuple(each.chosen.items()) for each in members})
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    ends = f", {options.prune}" if options.prune != "none" else ""
    ends += f", {options.pbt}" if options.pbt else ""
    return f"{settings} setting(s), seed(s) {several}{ends}"
