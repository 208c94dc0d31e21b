"""The record of a run, `config.json`: which run a command line means, and what it may change.

config.json      settings, command, versions, devices, flags, commit, checksum of the data; the same
                 of earlier starts under `history`
model.json       what it takes to build the model again and to feed it
metrics.jsonl    one line a record; the same as TensorBoard events in tensorboard/
checkpoints/     see `cnnjax.checkpoint`
recalibrated/    BatchNorm's statistics of the tested step, where the run recomputed them
figures/         pictures
summary.json     final scores (its presence means that the run is finished); summary.md says
                 the same to people
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnjax.devices import processes
from cnnjax.errors import UserError
from cnnjax.run import cli, files
from cnnjax.run.files import read_json, write_json

if TYPE_CHECKING:
    from cnnjax.run.settings import Settings


SUMMARY = "summary.json"
# What runs did before there was a setting for it, where that is not the default.
EARLIER = {"stratify": False, "precision": "float32"}
# What a resumed run may change: how long it trains, where it computes and reads, what it keeps.
HOW_LONG = {"epochs", "stop_after_epochs", "patience"}
WHERE = {
    "resume",
    "run_dir",
    "dataset",
    "data_dir",
    "base",
    "teacher",
    "devices",
    "mesh",
    "sharding",
}
# Where else its record is kept: it makes no other run of it.
TRACKING = {"track", "track_checkpoints", "track_wait_secs"}
CHANGEABLE_ON_RESUME = HOW_LONG | WHERE | TRACKING | {"keep_last", "keep_best"}
# What says how this process was started, not what the run is: kept in no record.
LAUNCH_SETTINGS = (
    "resume",
    "plan",
    "profile",
    "coordinator",
    "num_processes",
    "process_id",
    "join_timeout_secs",
)


def resolve(config_type: type, experiment: str, argv: Sequence[str]) -> Any | None:
    """Returns the config to run with, or None when there is nothing left to do.

    Precedence:
      1. `--resume RUN`: RUN's own settings, then flags given with it, which may change only how
         long it trains, where it reads and computes and what it keeps; a finished run is left
         alone.
         With `--run-dir RUN` too, a RUN that was not started (or was killed before it wrote its
         config) is started: the same line then serves every start.
      2. `--run-dir RUN` where RUN is finished with the same settings: left alone.
      3. `--run-dir RUN` where RUN holds anything else: refused, nothing is written over.
      4. Otherwise a new run.

    Raises:
      UserError: the run to resume is not there, or it is of another experiment or other settings.
    """
    config = shortened(cli.parse(config_type, argv))
    if config.resume and config.run_dir:
        if Path(config.resume).absolute() != Path(config.run_dir).absolute():
            raise UserError(
                f"--resume {config.resume} and --run-dir {config.run_dir} are two directories: a "
                "resumed run stays where it is; drop --run-dir."
            )
        if not (Path(config.run_dir) / "config.json").exists():
            config = dataclasses.replace(config, resume="")
    if config.resume:
        default = saved_config(config_type, experiment, Path(config.resume))
        config = shortened(cli.parse(config_type, argv, default=default))
        _refuse_changes(default, config)
        finished = is_finished(config)
    else:
        finished = bool(config.run_dir) and _is_done_already(config, experiment)
    if finished:
        print(_finished(Path(config.resume or config.run_dir)))
        return None
    return place(config, experiment)


def saved_config(config_type: type, experiment: str, directory: Path) -> Any:
    """Returns the settings of a run of the experiment, as its class; a UserError for another's."""
    saved, recorded = read_config(directory), read_settings(directory)
    if saved["experiment"] != experiment:
        raise UserError(
            f"{directory} is a run of {saved['experiment']}, not of {experiment}: resume it "
            f"with python -m {saved['experiment']} --resume {directory}"
        )
    known = {field.name for field in dataclasses.fields(config_type)}
    gone = {k: v for k, v in recorded.items() if k not in known and v}
    if gone:
        raise UserError(
            f"{directory} was started by another version of cnnjax, with settings that this "
            f"one does not have ({', '.join(f'{k}={v}' for k, v in gone.items())}): resume it "
            f"with that version (`code` in its config.json)."
        )
    settings = {
        # JSON has no tuples.
        name: tuple(value) if isinstance(value, list) else value
        for name, value in recorded.items()
        if name in known
    }
    # It asked the earlier start to stop, not this one.
    return config_type(**settings | {"stop_after_epochs": 0})


def _is_done_already(config: Any, experiment: str) -> bool:
    """Whether --run-dir holds the finished run of these settings; a UserError for any other."""
    directory = Path(config.run_dir)
    if not (directory / "config.json").exists():
        if list((directory / "checkpoints").glob("0*/manifest.json")):
            raise UserError(
                f"{directory} holds checkpoints but no config.json: put the file back, or choose "
                "another --run-dir."
            )
        return False
    if not (directory / SUMMARY).exists():
        raise UserError(
            f"{directory} holds an unfinished run: continue it with --resume {directory}, or "
            "choose another --run-dir."
        )
    saved, other = read_config(directory), other_settings(config, directory)
    if saved["experiment"] != experiment or other:
        what = f"other settings ({', '.join(other)})" if other else saved["experiment"]
        raise UserError(f"{directory} holds a finished run with {what}: choose another --run-dir.")
    return True


def other_settings(config: Settings, directory: Path) -> list[str]:
    """Returns the names of settings that make the run of a directory another than that of `config`.

    Where it computes and lies, and what it keeps, makes no other run of it.
    """
    saved = read_config(directory)["settings"]
    given = as_json(recorded_settings(config) | filled_in(config, saved))
    compared = given.keys() - (CHANGEABLE_ON_RESUME - HOW_LONG - {"dataset"})
    # Settings that its version had not got.
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    before = as_json({**defaults, **EARLIER, **saved})
    return sorted(name for name in compared if before.get(name) != given[name])


def filled_in(config: Settings, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the saved values of settings that `config` leaves open: those that its class lists as
    `automatic`, and that have their defaults; and the precision, where the platform decides it."""
    names = getattr(type(config), "automatic", ())
    found = {
        field.name: saved.get(field.name)
        for field in dataclasses.fields(config)
        if field.name in names and getattr(config, field.name) == field.default
    }
    if config.precision == "auto":
        found["precision"] = saved.get("precision", EARLIER["precision"])
    return found


def is_finished(config: Settings) -> bool:
    """Whether the run to resume has ended, and nothing that is asked lets it train on.

    Raises:
      UserError: it is asked for more epochs, but its patience had ended it.
    """
    directory = Path(config.resume)
    if not (directory / SUMMARY).exists():
        return False
    saved = read_config(directory)["settings"]
    patience = saved.get("patience", 0)
    if (config.epochs, config.patience) == (saved.get("epochs", config.epochs), patience):
        return True
    summary = read_json(directory / SUMMARY, f"{directory} is damaged")
    if summary.get("ended") == "early stopping" and 0 < config.patience <= patience:
        raise UserError(
            f"{directory} was ended by --patience {patience} after {summary.get('epochs', 0):g} "
            f"epochs (the best was step {summary.get('step', '?')}): give a larger "
            "--patience, or --patience 0, to train on."
        )
    return False


def place(config: Any, experiment: str) -> Any:
    """Returns the config with its run directory filled in, one that no other process takes."""
    if config.resume:
        return dataclasses.replace(config, run_dir=config.resume)
    if config.run_dir:
        return config
    name = f"{experiment.rpartition('.')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
    return dataclasses.replace(config, run_dir=str(files.new_directory(Path("runs") / name)))


def experiment_name(config_type: type) -> str:
    """Returns the experiment of a config's class, such as `experiments.mnist_lenet`.

    That is the module that defines the class, or the one that its own attribute `experiment` names.
    """
    if "experiment" in vars(config_type):
        return vars(config_type)["experiment"]
    module = sys.modules[config_type.__module__]
    return module.__spec__.name if module.__spec__ else module.__name__


def read_config(directory: Path) -> dict[str, Any]:
    """Returns a run's `config.json`; a UserError if `directory` holds no readable one."""
    content = read_json(directory / "config.json", f"{directory} is not a run directory")
    if not isinstance(content.get("settings"), dict) or "experiment" not in content:
        raise UserError(f"{directory}/config.json is damaged: it has no settings or no experiment.")
    return content


def read_settings(directory: Path) -> dict[str, Any]:
    """Returns the settings of a run; those that its version had not got as they were then."""
    return EARLIER | read_config(directory)["settings"]


def write_config(config: Settings, experiment: str, **facts: Any) -> None:
    """Writes `config.json`, the manifest of the run; what earlier starts wrote is its `history`.

    There the summary of a finished run goes, too, which is now to train on.

    Args:
      config: the settings.
      experiment: the module that `resolve` checks.
      facts: what else is to be recorded.
    """
    from cnnjax.devices import environment

    path = Path(config.run_dir) / "config.json"
    summary = path.with_name(SUMMARY)
    history = []
    if path.exists():
        earlier = read_config(path.parent)
        if summary.exists():
            earlier["summary"] = read_json(summary, f"{path.parent} is damaged")
        history = [*earlier.pop("history", []), earlier]
    content = {
        "experiment": experiment,
        "settings": recorded_settings(config),
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **environment.describe(),
        **facts,
        "history": history,
    }
    write_json(path, content)
    # A run that trains on is no longer finished.
    summary.unlink(missing_ok=True)


def recorded_settings(config: Settings) -> dict[str, Any]:
    """Returns the settings that make the run what it is, however it is started."""
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in LAUNCH_SETTINGS}


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as a file gives them back: lists for tuples."""
    return json.loads(json.dumps(settings))


def check_settings(saved: Mapping[str, Any], config: Settings) -> None:
    """Raises a UserError unless a checkpoint was saved with the settings of `config`.

    `config.json` has no digest, and a person may have edited it; a checkpoint has one.
    """
    given = as_json(recorded_settings(config))
    for name in given:
        if name in saved and name not in CHANGEABLE_ON_RESUME and saved[name] != given[name]:
            raise UserError(
                f"{config.run_dir}/config.json says {name} {given[name]!r}, but its checkpoints "
                f"were saved with {saved[name]!r}: put that back, or start a new run."
            )


def shortened(config: Any) -> Any:
    """Returns the settings, of one epoch for a smoke run."""
    return dataclasses.replace(config, epochs=1) if config.smoke else config


def _refuse_changes(saved: Settings, given: Settings) -> None:
    for field in dataclasses.fields(saved):
        before, after = getattr(saved, field.name), getattr(given, field.name)
        changeable = CHANGEABLE_ON_RESUME | set(LAUNCH_SETTINGS)
        if before != after and field.name not in changeable:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(
                f"{flag} {after} differs from the resumed run's {before}: drop the flag, or start "
                "a new run."
            )


def _finished(directory: Path) -> str:
    summary = read_json(directory / SUMMARY, f"{directory} is damaged")
    monitor = summary.get("monitor", "accuracy")
    scores = {split: summary.get(f"{split}_{monitor}") for split in ("test", "best_validation")}
    split = "best_validation" if scores["test"] is None and scores["best_validation"] else "test"
    score = scores[split]
    score = f"{score:.4f}" if isinstance(score, float) else "unknown"
    more = "More --epochs"
    if summary.get("ended") == "early stopping":
        more = "It was ended by --patience. A larger one"
    return (
        f"{directory} is finished ({split.replace('_', ' ')} {monitor} {score}, see "
        f"{directory / 'summary.md'}); nothing to do. {more} with --resume continues it."
    )


def agree(config: Settings) -> Settings:
    """Returns the settings with the run directory of process 0; a UserError if others differ."""
    run_dir = processes.from_first("run directory", config.run_dir)
    config = dataclasses.replace(config, run_dir=run_dir)
    processes.check_same("settings", recorded_settings(config))
    return config
