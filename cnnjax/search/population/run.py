"""The run of a population: trains all members, validates, stops and copies, leaves a run of each.

`DIR/members/NUMBER` is an ordinary run directory; `DIR/checkpoints` has the states of all members
that still train, after each epoch, so that a population that was killed goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnnjax import checkpoint
from cnnjax import metrics as metrics_lib
from cnnjax.devices import backend
from cnnjax.run import files
from cnnjax.run.exits import INTERRUPT_EXIT_CODES, stop_requests
from cnnjax.run.logs import MetricsLog, ProgressBar
from cnnjax.search.population import member_runs, pbt, program, progress, stopping, training
from cnnjax.search.population import members as stacks
from cnnjax.search.population.prepare import Prepared
from cnnjax.search.population.progress import DIVERGED, FINISHED, STOPPED, WORST, Progress
from cnnjax.search.population.training import Placed, Programs
from cnnjax.search.space import Dimension, Value
from cnnjax.train.loop import passes_multiple

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Rules:
    """What ends or changes members before the last epoch.

    Attributes:
      pruner: of `stopping.read_pruner`.
      pbt: how members copy each other; None: they do not.
      dimensions: what copies explore.
      seed: of their draws.
      allows: chosen -> whether the constraints hold.
    """

    pruner: stopping.Halving | None = None
    pbt: pbt.Rule | None = None
    dimensions: Sequence[Dimension] = ()
    seed: int = 0
    allows: Callable[[Mapping[str, Value]], bool] = lambda chosen: True


def train(
    prepared: Prepared, programs: Programs, directory: Path, rules: Rules, *, resume: bool
) -> tuple[Progress, int]:
    """Trains the members to their ends; returns where they stand, and the exit code.

    That is 0, or 128 plus the number of the signal that stopped it: then it goes on with `resume`.
    """
    began, config = time.monotonic(), prepared.config
    with contextlib.ExitStack() as held:
        held.enter_context(files.only_writer(directory))
        done, placed = _start_or_resume(prepared, programs, directory, resume=resume)
        step = done.epoch * prepared.steps_per_epoch
        logs = {
            number: held.enter_context(
                MetricsLog(
                    Path(prepared.configs[number].run_dir), resume_step=step if resume else None
                )
            )
            for number in done.active
        }
        saver = held.enter_context(checkpoint.Saver(directory / "checkpoints", keep_last=2))
        bar = held.enter_context(_bar(prepared, done))
        asked = held.enter_context(stop_requests())
        before = done.seconds
        while done.active and done.epoch < config.epochs:
            trained = _epoch(prepared, programs, placed, done, logs, bar, asked)
            if trained is None:
                return done, INTERRUPT_EXIT_CODES[asked() or "SIGTERM"]
            seconds = before + time.monotonic() - began
            placed, lost = trained
            done = dataclasses.replace(done, epoch=done.epoch + 1, seconds=seconds)
            placed, done = _judged(prepared, programs, placed, done, lost, logs, rules, bar)
            left, done = _ended(prepared, programs, placed, done, logs)
            if left is not None:
                placed, done = _copied(prepared, programs, left, done, rules, bar)
                saver.save(_stored(placed, done.epoch, prepared), _notes(placed, done))
                # Python 3.11 cannot parse in two threads at a time, as settings are when a step is
                # traced; and an epoch of many members is long beside a save.
                saver.wait()
    return done, 0


def _start_or_resume(
    prepared: Prepared, programs: Programs, directory: Path, *, resume: bool
) -> tuple[Progress, Placed]:
    saved = directory / "checkpoints"
    if not (resume and checkpoint.steps(saved)):
        done = progress.start(prepared.members)
        placed = training.begin(programs, prepared.initial_states(), done.active)
        checkpoint.check_space(saved, 3 * checkpoint.state_bytes(placed.state))
        for number in done.active:
            member_runs.write_facts(prepared, number, done)
        return done, placed
    notes = checkpoint.read_meta(saved)
    done = progress.from_notes(notes["progress"])
    slots = np.asarray(notes["slots"])

    def wider(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((notes["width"], *leaf.shape), leaf.dtype)

    form = jax.tree.map(wider, prepared.state_form())
    forms = {"step": jax.ShapeDtypeStruct((), np.int32), "members": form}
    if notes["has_best"]:
        forms["best"] = form
    stored, _ = checkpoint.restore(saved, forms, step=notes["step"])
    checkpoint.clean(saved, after=notes["step"])
    layout = stacks.layout(len(done.active), programs.mesh.size, programs.width(len(done.active)))

    def on_devices(name: str) -> Any:
        return stacks.moved(stored[name], slots[layout.fill], programs.mesh)

    best = on_devices("best") if notes["has_best"] else None
    return done, Placed(done.active, layout, on_devices("members"), best)


def _stored(placed: Placed, epoch: int, prepared: Prepared) -> dict[str, Any]:
    step = np.int32(epoch * prepared.steps_per_epoch)
    stored = {"step": step, "members": placed.state}
    return stored if placed.best is None else stored | {"best": placed.best}


def _notes(placed: Placed, done: Progress) -> dict[str, Any]:
    return {
        "step": int(placed.state.step.max()),
        "slots": placed.layout.slots.tolist(),
        "width": placed.layout.width,
        "has_best": placed.best is not None,
        "progress": done.as_notes(),
    }


def _values(prepared: Prepared, done: Progress, numbers: Sequence[int]) -> list[PyTree]:
    return [prepared.values(number, done.chosen[number]) for number in numbers]


def _epoch(
    prepared: Prepared,
    programs: Programs,
    placed: Placed,
    done: Progress,
    logs: Mapping[int, MetricsLog],
    bar: ProgressBar,
    asked: Any,
) -> tuple[Placed, set[int]] | None:
    """Trains an epoch; returns the members and those that diverged, or None if asked to stop."""
    step, lost, state = done.epoch * prepared.steps_per_epoch, set[int](), placed.state
    values = _values(prepared, done, placed.numbers)
    for after, length, measured in training.train_epoch(programs, placed, values, done.epoch):
        if asked() is not None:
            return None
        state, step = after, step + length
        gone = stopping.diverged(measured)
        lost |= {number for number, bad in zip(placed.numbers, gone, strict=True) if bad}
        of_members = [
            metrics_lib.finalize(stopping.take_steps(measured, i)) for i in range(len(gone))
        ]
        for number, values_now in zip(placed.numbers, of_members, strict=True):
            if number not in lost:
                logs[number].write(step, "train", values_now)
        bar.update(
            step, _means([each for each, bad in zip(of_members, gone, strict=True) if not bad])
        )
    return dataclasses.replace(placed, state=state), lost


def _means(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean over members of each metric."""
    names = found[0] if found else ()
    return {name: float(np.mean([each[name] for each in found])) for name in names}


def _judged(
    prepared: Prepared,
    programs: Programs,
    placed: Placed,
    done: Progress,
    lost: set[int],
    logs: Mapping[int, MetricsLog],
    rules: Rules,
    bar: ProgressBar,
) -> tuple[Placed, Progress]:
    """Validates, and says which members end: `Progress.ended` names them, `active` still too."""
    config, epoch = prepared.config, done.epoch
    ended = dict(done.ended) | {number: (DIVERGED, epoch) for number in lost}
    spe, last = prepared.steps_per_epoch, epoch == config.epochs
    due = passes_multiple((epoch - 1) * spe, epoch * spe, config.validate_every_steps) or last
    if due and len(prepared.rows[0]["validation"]):
        name, lower = prepared.monitor
        with bar.paused():
            values = _values(prepared, done, placed.numbers)
            found = dict(
                zip(
                    placed.numbers,
                    training.scores(programs, placed, values, "validation"),
                    strict=True,
                )
            )
        kept = {number: each for number, each in found.items() if number not in lost}
        best, scores = dict(done.best), dict(done.scores)
        for number, each in kept.items():
            logs[number].write(epoch * spe, "validation", each)
            best[number] = best[number].after(epoch * spe, each[name], lower_is_better=lower)
            scores[number] = (*scores[number], (epoch, each[name]))
            if 0 < config.patience <= best[number].evaluations_since and not last:
                ended[number] = STOPPED, epoch
        if config.patience:
            better = [best[number].step == epoch * spe for number in placed.numbers]
            placed = training.with_best(programs, placed, better)
        on = {number: each[name] for number, each in kept.items() if number not in ended}
        if not last:
            ended |= {
                number: (WORST, epoch)
                for number in stopping.worst(on, rules.pruner, epoch, lower_is_better=lower)
            }
        if kept:
            listed = [each[name] for each in kept.values()]
            bar.message(
                f"epoch {epoch}: validation {name} {min(listed):.4f} to {max(listed):.4f}, mean "
                f"{np.mean(listed):.4f}, of {len(kept)} members"
            )
        done = dataclasses.replace(done, best=best, scores=scores)
    if last:
        ended |= {n: (FINISHED, epoch) for n in done.active if n not in ended}
    return placed, dataclasses.replace(done, ended=ended)


def _ended(
    prepared: Prepared,
    programs: Programs,
    placed: Placed,
    done: Progress,
    logs: Mapping[int, MetricsLog],
) -> tuple[Placed | None, Progress]:
    """Writes the runs of members that have ended, and keeps the others."""
    gone = [number for number in placed.numbers if number in done.ended]
    if not gone:
        return placed, done
    stay = [number for number in placed.numbers if number not in done.ended]
    whole = [number for number in gone if done.ended[number][0] in (FINISHED, STOPPED)]
    tests: dict[int, dict[str, float]] = {}
    if whole and prepared.config.test:
        alone = training.rearranged(programs, placed, whole, {})
        values = _values(prepared, done, whole)
        found = training.scores(programs, alone, values, "test", best=True)
        tests = dict(zip(whole, found, strict=True))
    for number in gone:
        if done.ended[number][0] != DIVERGED:
            member_runs.write(prepared, programs, placed, done, number, tests.get(number, {}), logs)
    left = training.rearranged(programs, placed, stay, {}) if stay else None
    return left, dataclasses.replace(done, active=tuple(stay))


def _copied(
    prepared: Prepared,
    programs: Programs,
    placed: Placed,
    done: Progress,
    rules: Rules,
    bar: ProgressBar,
) -> tuple[Placed, Progress]:
    """Population based training: the worst members copy the best, with settings near theirs."""
    rule, epoch = rules.pbt, done.epoch
    if rule is None or not rule.is_due(epoch, prepared.config.epochs):
        return placed, done
    latest = {number: done.scores[number][-1][1] for number in done.active if done.scores[number]}
    _, lower = prepared.monitor
    found = pbt.copies(
        latest,
        done.chosen,
        rules.dimensions,
        rule,
        seed=rules.seed,
        epoch=epoch,
        lower_is_better=lower,
        allows=rules.allows,
    )
    if not found:
        return placed, done
    sources = {each.member: each.source for each in found}
    placed = training.rearranged(programs, placed, placed.numbers, sources)
    chosen = dict(done.chosen) | {each.member: dict(each.chosen) for each in found}
    text = ", ".join(f"{each.member} copied {each.source}" for each in found)
    bar.message(f"epoch {epoch}: member {text}")
    copies = (*done.copies, *((epoch, each) for each in found))
    return placed, dataclasses.replace(done, chosen=chosen, copies=copies)


def _bar(prepared: Prepared, done: Progress) -> ProgressBar:
    spe = prepared.steps_per_epoch
    return ProgressBar(
        prepared.config.epochs * spe,
        spe,
        prepared.config.batch_size * len(done.active),
        done.epoch * spe,
        shown=("loss", "accuracy"),
    )


def describe(programs: Programs, num_members: int) -> str:
    """Says on what and how the members are computed."""
    how = {
        "loop": "members in turn",
        "unrolled": "members unrolled in each step",
        "vmap": "members as an axis",
    }[programs.way]
    how = f"{how} (--way {programs.way}"
    how += (
        ", the fastest known here)"
        if programs.way == program.choose_way("auto", programs.mesh, num_members)
        else ")"
    )
    devices = programs.mesh.size
    each = -(-num_members // devices)
    return f"{backend.describe()}; {devices} in use with up to {each} members each, {how}"
