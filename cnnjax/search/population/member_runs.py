"""What each member of a population leaves: an ordinary run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from cnnjax import checkpoint
from cnnjax.run import files, record, report, writer
from cnnjax.run.finish import summarize
from cnnjax.run.logs import MetricsLog
from cnnjax.search.population import training, varied
from cnnjax.search.population.prepare import Prepared
from cnnjax.search.population.progress import Progress
from cnnjax.search.population.training import Placed, Programs
from cnnjax.train.state import TrainState


def write_facts(prepared: Prepared, number: int, done: Progress) -> None:
    """Writes a member's `config.json` and `model.json`: of its settings now."""
    config = config_now(prepared, number, done)
    directory = Path(config.run_dir)
    files.make_directory(directory, "the run of a member", "--out")
    copied = [epoch for epoch, each in done.copies if each.member == number]
    record.write_config(
        config,
        prepared.experiment,
        data_checksum=prepared.checksums[number],
        population={"member": number, "copied_after_epochs": copied},
    )
    files.write_json(directory / "model.json", prepared.card(number))


def config_now(prepared: Prepared, number: int, done: Progress) -> Any:
    """Returns the settings of a member's run as they are now, when it may have copied others."""
    member = dataclasses.replace(prepared.members[number], chosen=done.chosen[number])
    own = varied.config_of(prepared.config, member)
    return dataclasses.replace(own, run_dir=prepared.configs[number].run_dir)


def write(
    prepared: Prepared,
    programs: Programs,
    placed: Placed,
    done: Progress,
    number: int,
    test: Mapping[str, float],
    logs: Mapping[int, MetricsLog],
) -> None:
    """Writes checkpoint, test scores and summary of a member, as its own run would."""
    if any(each.member == number for _, each in done.copies):
        write_facts(prepared, number, done)
    config, recipe = (
        config_now(prepared, number, done),
        prepared.recipe(number, done.chosen[number]),
    )
    best, scores = done.best[number], dict(done.scores[number])
    last = _as_alone(recipe, training.member(programs, placed, number))
    kept = last
    if prepared.config.patience and best.value is not None:
        kept = _as_alone(recipe, training.member(programs, placed, number, best=True))
    directory, spe = Path(config.run_dir), prepared.steps_per_epoch
    checkpoint.clean(directory / "checkpoints", after=0)
    for state in {int(each.step): each for each in (kept, last)}.values():
        notes = writer.checkpoint_notes(
            config,
            recipe,
            step=int(state.step),
            best=best,
            seconds=done.seconds,
            monitored=scores.get(int(state.step) // spe),
            data_checksum=prepared.checksums[number],
        )
        checkpoint.save(directory / "checkpoints", state, notes)
    if test:
        logs[number].write(int(last.step), "test", test)
    summary = summarize(
        config,
        prepared.experiment,
        recipe,
        prepared.card(number),
        state=kept,
        last_step=int(last.step),
        best=best,
        ended=done.ended[number][0],
        test=test,
        seconds=done.seconds,
    )
    text = f"Member {number} of a population: cnnjax evaluate --run {directory} scores it by class."
    report.write_summary(directory, summary, text)


def _as_alone(recipe: Any, state: TrainState) -> TrainState:
    """Returns a member's state with the structure that its own run's state has.

    Its optimizer may have a part less, such as the decay of 0, which has no arrays.
    """
    alone = jax.eval_shape(recipe.optimizer.init, state.params)
    leaves = jax.tree.leaves(state.opt_state)
    return dataclasses.replace(
        state, opt_state=jax.tree.unflatten(jax.tree.structure(alone), leaves)
    )
