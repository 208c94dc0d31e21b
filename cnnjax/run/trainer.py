"""The whole line of a run: mesh, pipeline, state, compiled steps, loop, report.

An experiment decides data, task, model, optimizer and step; this module connects them in the
order in which a reader would. Whoever wants another order calls the same functions.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from cnnjax import checkpoint
from cnnjax.data.pipelines import Pipeline, ResidentPipeline
from cnnjax.data.streamed import (
    AnyDataset,
    D,
    shorten,
    split_size,
    training_pipeline,
)
from cnnjax.devices import backend, processes, sharding
from cnnjax.devices.sharding import batch_sharding, check_batch_size, replicated, state_shardings
from cnnjax.errors import UserError
from cnnjax.models.summary import format_summary, summary
from cnnjax.run import files, resume, settings
from cnnjax.run.cli import INTERRUPT_EXIT_CODES
from cnnjax.run.finish import check_monitor, finish, monitored, split_scores
from cnnjax.run.groups import check_specs
from cnnjax.run.logs import MetricsLog, ProgressBar
from cnnjax.run.recipe import Recipe, compile_eval_steps, first_input, new_state, state_form
from cnnjax.train import batch_stats, loop, memory
from cnnjax.train.compile import Train, choose_mesh, choose_method, compile_train
from cnnjax.train.gradients import check_parts
from cnnjax.train.state import TrainState

PyTree = Any
# Training metrics are averaged over a twentieth of an epoch: fine enough for a curve and a bar.
LOGS_PER_EPOCH = 20


def start(config: settings.Settings) -> None:
    """Checks the specs, then connects the processes and devices; before any use of JAX."""
    check_specs(config)
    processes.start(
        config.coordinator,
        config.num_processes,
        config.process_id,
        timeout_secs=config.join_timeout_secs,
    )
    batch_size = config.batch_size // max(config.accumulate, 1)
    backend.start(config.devices, config.mesh, batch_size=batch_size)


def train(config: settings.Settings, recipe: Recipe) -> int:
    """Trains, validates after each epoch, tests at the end, and fills the run directory.

    Returns:
      The exit code: 0, or 128 plus the number of the signal that interrupted training.
    """
    with contextlib.ExitStack() as held:
        return _train(config, recipe, held)


def _train(config: settings.Settings, recipe: Recipe, held: contextlib.ExitStack) -> int:
    started = time.monotonic()
    experiment = settings.experiment_name(type(config))
    config = resume.agree(settings.place(config, experiment))
    directory = Path(config.run_dir)
    sharding.count_devices(config.mesh, config.devices)
    _, shape = first_input(recipe.dataset)
    sizes = summary(recipe.model, shape)  # type: ignore[arg-type]
    mesh = choose_mesh(config.mesh or config.devices, config.batch_size * sizes.macs)
    rules = sharding.parse_rules(config.sharding)
    resume.check_retention(config, recipe.dataset)
    data = _pipeline(recipe.dataset, config, mesh)
    method = choose_method(config.parallel, data, mesh)
    how: dict[str, Any] = {
        "method": method,
        "mesh": mesh,
        "compiler_options": backend.compiler_options(remat=config.remat),
    }
    if config.plan:
        form = state_form(recipe, config.seed, mesh, rules)
        memory.show(recipe.make_step, form, data, **how)
        return 0
    state = new_state(recipe, config.seed, mesh, rules)
    variables_of = _scored_variables(recipe, state, data)
    resume.share_directory(directory)
    if processes.is_first():
        held.enter_context(files.only_writer(directory))
    state, notes = resume.start_or_resume(directory, config, _checksums(recipe), state)
    state = processes.put(state, state_shardings(state, mesh, rules))
    if processes.is_first():
        _record_facts(config, experiment, recipe)
    _print_header(config, recipe.dataset, mesh, data, method)
    processes.say(format_summary(sizes))

    compiling = time.monotonic()
    trainer = compile_train(recipe.make_step, state, data, **how)
    eval_steps = compile_eval_steps(recipe, mesh)
    if split_size(recipe.dataset, "validation"):
        step, variables = eval_steps["validation"], jax.eval_shape(TrainState.variables, state)
        check_monitor(config, recipe, step, variables, data.batch_shapes)
    processes.exchange("compiled", None)
    processes.say(f"compiled     in {time.monotonic() - compiling:.1f} s")

    def elapsed() -> float:
        return notes.get("seconds", 0.0) + time.monotonic() - started

    def validate(state: TrainState) -> dict[str, float]:
        return split_scores(
            eval_steps["validation"], variables_of(state), recipe, "validation", mesh
        )

    with files.stop_requests() as asked:
        stop_requested = processes.agreed("stop", asked)
        outcome = _fit(
            config,
            recipe,
            state,
            trainer,
            data.steps_per_epoch,
            validate if split_size(recipe.dataset, "validation") else None,
            notes,
            elapsed,
            stop_requested,
        )
        if outcome.reason == "interrupted":
            processes.say(f"stopped; continue with --resume {directory}")
            return INTERRUPT_EXIT_CODES[stop_requested() or "SIGTERM"]
    unfinished = int(outcome.state.step) < config.epochs * data.steps_per_epoch
    if unfinished and outcome.reason == "finished":
        processes.say(f"stopped as asked; continue with --resume {directory}")
        return 0
    test_step = eval_steps["test"]
    finish(config, experiment, recipe, outcome, variables_of, test_step, mesh, elapsed)
    return 0


def shrink(dataset: D) -> D:
    """Returns data for a run of seconds that takes every path a long one takes."""
    return shorten(dataset, {"train": 1024, "validation": 256, "test": 256})


def _checksums(recipe: Recipe) -> dict[str, str]:
    """Returns what a checkpoint must agree with to be resumed."""
    return {"data_checksum": recipe.dataset.checksum, "base_checksum": recipe.base_checksum}


def _pipeline(dataset: AnyDataset, config: settings.Settings, mesh: Mesh) -> Pipeline:
    check_batch_size(config.batch_size, mesh)
    check_parts(config.batch_size, config.accumulate, num_devices=sharding.num_batch_parts(mesh))
    return training_pipeline(
        dataset,
        config.batch_size,
        seed=config.seed,
        stream=config.pipeline == "stream",
        sharding=batch_sharding(mesh),
        replicated=replicated(mesh),
    )


def _scored_variables(
    recipe: Recipe, state: TrainState, data: Pipeline
) -> Callable[[TrainState], PyTree]:
    """Returns `state -> variables` that are validated, tested and kept."""
    num_batches = recipe.recalibrate_batches
    if num_batches < 0:
        raise UserError(f"--recalibrate {num_batches}: give 0 or more batches.")
    if not num_batches:
        return lambda state: state.variables()
    if not state.batch_stats:
        raise UserError(
            f"--recalibrate {num_batches}: {type(recipe.model).__name__} has no BatchNorm, whose "
            "statistics could be measured; leave it out."
        )
    statistics = jax.jit(batch_stats.make_statistics(recipe.model, normalize=recipe.normalize))

    def variables_of(state: TrainState) -> PyTree:
        variables = state.variables()
        batches = itertools.islice(data.batches(0), num_batches)
        measured = batch_stats.recalibrate(statistics, variables, batches)
        places = jax.tree.map(lambda leaf: leaf.sharding, variables["batch_stats"])
        return {**variables, "batch_stats": processes.put(measured, places)}

    return variables_of


def _fit(
    config: settings.Settings,
    recipe: Recipe,
    state: TrainState,
    train: Train,
    steps_per_epoch: int,
    validate: Callable[[TrainState], dict[str, float]] | None,
    notes: dict[str, Any],
    elapsed: Callable[[], float],
    stop_requested: Callable[[], str | None],
) -> loop.Outcome:
    directory, first_step = Path(config.run_dir), int(state.step)
    last_epoch = min(config.epochs, config.stop_after_epochs or config.epochs)
    bar = ProgressBar(
        config.epochs * steps_per_epoch,
        steps_per_epoch,
        config.batch_size,
        first_step,
        enabled=None if processes.is_first() else False,
    )
    log = None
    if processes.is_first():
        log = MetricsLog(directory, resume_step=first_step if config.resume else None)
    monitor, lower_is_better = monitored(config, recipe)
    saver = _saver(config, lower_is_better)
    validated: dict[int, float] = {}

    def record(step: int, kind: str, values: dict[str, float]) -> None:
        if log is not None:
            log.write(step, kind, values)
        if kind == "validation":
            validated[step] = values[monitor]
        if kind == "train":
            bar.update(step, values)
        else:
            scores = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            bar.message(f"epoch {step / steps_per_epoch:g}: {kind} {scores}")

    def save(state: TrainState, best: loop.Best) -> None:
        step = int(state.step)
        meta = {
            "step": step,
            "epoch": step // steps_per_epoch,
            "step_in_epoch": step % steps_per_epoch,
            "best": dataclasses.asdict(best),
            "seconds": elapsed(),
            **_checksums(recipe),
            "settings": settings.recorded_settings(config),
        }
        if step in validated:
            meta["monitored"] = validated[step]
        with bar.paused():
            saver.save(state, meta)

    def evaluate_paused(state: TrainState) -> dict[str, float]:
        assert validate is not None
        with bar.paused():
            values = validate(state)
            if recipe.after_validation is not None and processes.is_first():
                recipe.after_validation(directory, state)
        return values

    with log or contextlib.nullcontext(), bar, saver:
        return loop.fit(
            state,
            train,
            first_step=first_step,
            last_step=last_epoch * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            log_every_steps=-(-steps_per_epoch // LOGS_PER_EPOCH),
            record=record,
            evaluate=evaluate_paused if validate else None,
            save=save,
            save_every_steps=config.save_every_steps or None,
            monitor=monitor,
            lower_is_better=lower_is_better,
            patience=config.patience,
            best=loop.Best(**notes.get("best", {})),
            should_stop=lambda: stop_requested() is not None,
        )


def _saver(config: settings.Run, lower_is_better: bool) -> checkpoint.Saver:
    return checkpoint.Saver(
        Path(config.run_dir) / "checkpoints",
        keep_last=config.keep_last or None,
        keep_best=config.keep_best,
        metric="monitored",
        lower_is_better=lower_is_better,
    )


def _record_facts(config: settings.Settings, experiment: str, recipe: Recipe) -> None:
    dataset, directory = recipe.dataset, Path(config.run_dir)
    card = {
        "task": recipe.task.name,
        "dataset": dataset.name,
        "parameters_averaged": recipe.ema,
        "precision": recipe.precision,
        **recipe.metadata(),
    }
    settings.write_config(config, experiment, data_checksum=dataset.checksum)
    settings.write_json(directory / "model.json", card)


def _print_header(
    config: settings.Settings,
    dataset: AnyDataset,
    mesh: Mesh,
    data: Pipeline,
    method: str,
) -> None:
    splits = ", ".join(
        f"{split_size(dataset, split):,} {name}" if split_size(dataset, split) else f"no {name}"
        for name, split in (("training", "train"), ("validation", "validation"), ("test", "test"))
    )
    kept = "resident" if isinstance(data, ResidentPipeline) else "streamed"
    processes.say(
        f"run          {config.run_dir}\n"
        f"devices      {backend.describe()}; {sharding.describe(mesh)} in use, step by {method}\n"
        f"data         {dataset.name}, {kept}: {splits} {dataset.description}"
    )
