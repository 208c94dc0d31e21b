"""The whole line of a run: mesh, pipeline, state, compiled steps, loop, report.

An experiment decides data, task, model, optimizer and step; this module connects them in the
order in which a reader would. Whoever wants another order calls the same functions.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from cnnjax.cost import profile
from cnnjax.data.pipelines import Pipeline
from cnnjax.data.streamed import AnyDataset, D, shorten, split_size, training_pipeline
from cnnjax.devices import backend, processes, sharding
from cnnjax.models.summary import format_summary, summary
from cnnjax.run import checks, files, record, scoring, writer
from cnnjax.run import state as states
from cnnjax.run.exits import INTERRUPT_EXIT_CODES, stop_requests
from cnnjax.run.finish import finish
from cnnjax.run.recipe import Recipe
from cnnjax.run.settings import Settings
from cnnjax.run.tracking import followers
from cnnjax.train import loop, memory, profiling
from cnnjax.train.compile import Train, choose_mesh, choose_method, start_compiling
from cnnjax.train.gradients import check_parts
from cnnjax.train.precision import AUTO
from cnnjax.train.state import TrainState

# Training metrics are averaged over a twentieth of an epoch: fine enough for a curve and a bar.
LOGS_PER_EPOCH = 20


def start(config: Settings) -> None:
    """Checks the specs, then connects the processes and devices; before any use of JAX."""
    checks.check_specs(config)
    processes.start(
        config.coordinator,
        config.num_processes,
        config.process_id,
        timeout_secs=config.join_timeout_secs,
    )
    batch_size = config.batch_size // max(config.accumulate, 1)
    backend.start(config.devices, config.mesh, batch_size=batch_size)


def train(config: Settings, recipe: Recipe) -> int:
    """Trains, validates after each epoch, tests at the end, and fills the run directory.

    Returns:
      The exit code: 0, or 128 plus the number of the signal that interrupted training.
    """
    with contextlib.ExitStack() as held:
        return _train(config, recipe, held)


def _train(config: Settings, recipe: Recipe, held: contextlib.ExitStack) -> int:
    started = time.monotonic()
    experiment = record.experiment_name(type(config))
    if config.precision == AUTO:
        decided: Any = recipe.precision
        config = dataclasses.replace(config, precision=decided)
    config = record.agree(record.place(config, experiment))
    directory, dataset = Path(config.run_dir), recipe.dataset
    sharding.count_devices(config.mesh, config.devices)
    _, shape = states.first_input(dataset)
    sizes = summary(recipe.model, shape)  # type: ignore[arg-type]
    mesh = choose_mesh(config.mesh or config.devices, config.batch_size * sizes.macs)
    rules = sharding.parse_rules(config.sharding)
    checks.check_retention(config, dataset)
    data = make_pipeline(dataset, config, mesh)
    if config.profile:
        # Of a resumed run once more, when its first step is known.
        last_step = config.epochs * data.steps_per_epoch
        profiling.check(profiling.parse(config.profile), 0, last_step)
    method = choose_method(config.parallel, data, mesh)
    how: dict[str, Any] = {
        "method": method,
        "mesh": mesh,
        "compiler_options": backend.compiler_options(remat=config.remat),
    }
    form = states.state_form(recipe, config.seed, mesh, rules)
    if config.plan:
        memory.show(recipe.step_maker(), form, data, **how)
        return 0
    compiling = time.monotonic()
    programs: list[Any] = []
    compiled_steps = start_compiling(
        recipe.step_maker(), form, data, compiled_program=programs.append, **how
    )
    state = states.new_state(recipe, config.seed, mesh, rules)
    variables_of = scoring.scored_variables(recipe, state, data)
    files.share_directory(directory)
    if processes.is_first():
        held.enter_context(files.only_writer(directory))
    state, notes = states.start_or_resume(directory, config, recipe.checksums(), state)
    checks.check_length(config, int(state.step), data.steps_per_epoch)
    state = processes.put(state, sharding.state_shardings(state, mesh, rules))
    if processes.is_first():
        writer.record_facts(config, experiment, recipe)
    held.enter_context(
        followers.following(
            config.track,
            directory,
            checkpoints=config.track_checkpoints,
            wait_secs=config.track_wait_secs,
        )
    )
    writer.print_header(config, dataset, mesh, data, method)
    processes.say(format_summary(sizes))

    steps = _profiled(config, recipe, compiled_steps(), programs, data, int(state.step))
    scores = scoring.make_scoring(recipe, mesh, variables_of)
    if split_size(dataset, "validation"):
        scoring.check_monitor(config, scores, state, data.batch_shapes)
    processes.exchange("compiled", None)
    processes.say(f"compiled     in {time.monotonic() - compiling:.1f} s")

    def elapsed() -> float:
        return notes.get("seconds", 0.0) + time.monotonic() - started

    best = loop.Best(**notes.get("best", {}))
    with stop_requests() as asked:
        stop_requested = processes.agreed("stop", asked)
        outcome = _fit(config, scores, state, steps, data, best, elapsed, stop_requested)
        if outcome.reason == "interrupted":
            processes.say(f"stopped; continue with --resume {directory}")
            return INTERRUPT_EXIT_CODES[stop_requested() or "SIGTERM"]
    unfinished = int(outcome.state.step) < config.epochs * data.steps_per_epoch
    if unfinished and outcome.reason == "finished":
        processes.say(f"stopped as asked; continue with --resume {directory}")
        return 0
    finish(config, experiment, scores, outcome, elapsed)
    return 0


def _profiled(
    config: Settings,
    recipe: Recipe,
    steps: Train,
    programs: list[Any],
    data: Pipeline,
    first_step: int,
) -> Train:
    """Returns the trainer, which records the steps that are asked for, in the first process."""
    if not (config.profile and processes.is_first()):
        return steps
    span = profiling.parse(config.profile)
    directory = Path(config.run_dir) / "profile" / f"steps-{span.start}-{span.stop}"

    def tell() -> None:
        root, text = type(recipe.model).__name__, programs[0].as_text()
        processes.say(
            f"profile      steps {span.start} to {span.stop}, by operation\n"
            + profile.report(directory, text, len(span), root)
        )

    profiling.check(span, first_step, config.epochs * data.steps_per_epoch)
    return profiling.profiled(steps, span, directory, tell)


def _fit(
    config: Settings,
    scores: scoring.Scoring,
    state: TrainState,
    steps: Train,
    data: Pipeline,
    best: loop.Best,
    elapsed: Callable[[], float],
    stop_requested: Callable[[], str | None],
) -> loop.Outcome:
    recipe, first_step, steps_per_epoch = scores.recipe, int(state.step), data.steps_per_epoch
    last_epoch = min(config.epochs, config.stop_after_epochs or config.epochs)
    monitor, lower_is_better = scoring.monitored(config, recipe)
    written = writer.RunWriter(
        config,
        recipe,
        first_step=first_step,
        steps_per_epoch=steps_per_epoch,
        monitor=monitor,
        lower_is_better=lower_is_better,
        elapsed=elapsed,
    )

    def validate(state: TrainState) -> dict[str, float]:
        with written.paused():
            values = scores.of(scores.variables_of(state), "validation")
            if recipe.after_validation is not None and processes.is_first():
                recipe.after_validation(Path(config.run_dir), state)
        return values

    with written:
        return loop.fit(
            state,
            steps,
            first_step=first_step,
            last_step=last_epoch * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            log_every_steps=-(-steps_per_epoch // LOGS_PER_EPOCH),
            record=written.record,
            evaluate=validate if split_size(recipe.dataset, "validation") else None,
            evaluate_every_steps=config.validate_every_steps,
            save=written.save,
            save_every_steps=config.save_every_steps or None,
            monitor=monitor,
            lower_is_better=lower_is_better,
            patience=config.patience,
            best=best,
            should_stop=lambda: stop_requested() is not None,
        )


def shrink(dataset: D) -> D:
    """Returns data for a run of seconds that takes every path a long one takes."""
    return shorten(dataset, {"train": 1024, "validation": 256, "test": 256})


def make_pipeline(dataset: AnyDataset, config: Settings, mesh: Mesh) -> Pipeline:
    """Returns the run's training data, batch by batch on the mesh, as its settings say."""
    sharding.check_batch_size(config.batch_size, mesh)
    check_parts(config.batch_size, config.accumulate, num_devices=sharding.num_batch_parts(mesh))
    return training_pipeline(
        dataset,
        config.batch_size,
        seed=config.seed,
        stream=config.pipeline == "stream",
        sharding=sharding.batch_sharding(mesh),
        replicated=sharding.replicated(mesh),
    )
