"""A run directory: what is in it, how a run starts, resumes and stops, and how it is read back.

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

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from cnnjax.devices import processes
from cnnjax.errors import UserError
from cnnjax.run import cli, files
from cnnjax.run.files import read_json, write_json
from cnnjax.run.listings import listed

# What a resumed run may change: how long it trains, where it computes and reads, what it keeps.
HOW_LONG = {"epochs", "stop_after_epochs"}
WHERE = {"resume", "run_dir", "dataset", "data_dir", "base", "devices", "mesh", "sharding"}
CHANGEABLE_ON_RESUME = HOW_LONG | WHERE | {"keep_last", "keep_best"}
# What says how this process was started, not what the run is: kept in no record.
LAUNCH_SETTINGS = (
    "resume",
    "plan",
    "coordinator",
    "num_processes",
    "process_id",
    "join_timeout_secs",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """How long a run trains, what it keeps, and where."""

    seed: int = 0
    """Seed of initialization, data order, augmentation and dropout, and of every other draw that
    has no seed of its own."""

    epochs: int = 10
    """Passes over the training data; the learning rate schedule spans all of them."""

    batch_size: int = 64
    """Examples per step, over all devices."""

    run_dir: str = ""
    """Directory of the run; by default runs/EXPERIMENT-DATE-TIME."""

    resume: str = ""
    """Continue the run in this directory, with its settings. Flags given with it may change how
    long it trains, where it reads and computes, and what it keeps; others must agree. With the same
    directory as --run-dir: start it if it was not started yet."""

    stop_after_epochs: int = 0
    """Stop after N epochs, to be resumed later; 0 does not. The schedule is unchanged."""

    save_every_steps: int = 0
    """Save a checkpoint every N steps too, not only after each epoch."""

    keep_last: int = 2
    """Latest checkpoints to keep; 0 keeps all."""

    keep_best: int = 1
    """Best checkpoints to keep besides the latest, by --monitor."""

    monitor: str = ""
    """The validation score that says which weights are best, such as accuracy or loss (the lowest);
    by default the task's own."""

    patience: int = 0
    """Stop after N epochs without a better validation score (see --monitor), and keep the
    best weights."""

    smoke: bool = False
    """Shrink the run to seconds: one epoch over 1,024 images. Its scores mean nothing."""


@dataclasses.dataclass(frozen=True)
class Input:
    """Where data come from, and where they wait."""

    data_dir: str = ""
    """Where tfds datasets are; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""

    pipeline: Literal["auto", "resident", "stream"] = "auto"
    """Where training data are: resident on the device, or read as they are needed (stream; tfds
    datasets from disk, so that they may be larger than memory). auto is resident where they fit."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a run computes on, and how."""

    listings: ClassVar[dict[str, str]] = listed("mesh", "sharding")

    parallel: Literal["auto", "jit", "pmap", "scan"] = "auto"
    """How the step is compiled: jit over a mesh, pmap, or many steps in one call (scan)."""

    devices: int = 0
    """Devices to use; 0: all accelerators or, on a CPU, one per core up to 4, as far as they divide
    the batch into parts of 16 examples and more, and one for a large network."""

    mesh: str = ""
    """Axes of devices, such as data=4,model=2: data divides the batch, fsdp the batch and the
    parameters, model the kernels by their outputs. By default all --devices are along data."""

    sharding: tuple[str, ...] = ()
    """Which dimension of which parameters an axis of the mesh divides, before the default rules:
    PATTERN=AXIS:DIMENSION,..., such as head/kernel=model:-1, or PATTERN= for whole copies."""

    plan: bool = False
    """Print what a step takes of each device's memory, as the compiler says, and stop."""

    coordinator: str = "auto"
    """Address that all processes connect to: HOST:PORT of process 0; auto, as SLURM, TPU pods or
    Open MPI say; or off."""

    num_processes: int = 0
    """Processes of the run, each started with the same command; with --coordinator HOST:PORT."""

    process_id: int = -1
    """Which of them this is, from 0; with --coordinator HOST:PORT."""

    join_timeout_secs: int = 300
    """How long to wait for the other processes."""

    accumulate: int = 1
    """Compute each batch in N microbatches, one after another: less memory, the same updates but
    for BatchNorm, which normalizes each microbatch by its own statistics and updates the running
    ones after each."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What layers compute in; parameters, statistics, losses and gradients are float32. float16
    scales the loss, and skips steps whose gradient overflows."""

    remat: bool = False
    """Compute the activations within each block again in the backward pass instead of keeping
    them: less memory, up to a third more time."""


@dataclasses.dataclass(frozen=True)
class Settings(Devices, Input, Run):
    """The settings that mean the same in every experiment, in groups.

    A function takes the group that it uses; only the outermost take all.
    """


def launch(
    config_type: type, main: Callable[[Any], int | None], argv: Sequence[str] | None = None
) -> None:
    """The command line of an experiment: parses, resolves `--resume`, calls `main`, exits."""
    experiment = experiment_name(config_type)
    with cli.one_line_errors():
        config = resolve(config_type, experiment, sys.argv[1:] if argv is None else argv)
        if config is None:
            processes.end(0)
        with files.writing_errors(Path(config.run_dir)):
            code = main(config) or 0
        processes.end(code)


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
    config = _shortened(cli.parse(config_type, argv))
    if config.resume and config.run_dir:
        if Path(config.resume).absolute() != Path(config.run_dir).absolute():
            raise UserError(
                f"--resume {config.resume} and --run-dir {config.run_dir} are two directories: a "
                "resumed run stays where it is; drop --run-dir."
            )
        if not (Path(config.run_dir) / "config.json").exists():
            config = dataclasses.replace(config, resume="")
    if config.resume:
        directory = Path(config.resume)
        saved = read_config(directory)
        if saved["experiment"] != experiment:
            raise UserError(
                f"{directory} is a run of {saved['experiment']}, not of {experiment}: resume it "
                f"with python -m {saved['experiment']} --resume {directory}"
            )
        known = {field.name for field in dataclasses.fields(config_type)}
        settings = {k: v for k, v in saved["settings"].items() if k in known}
        gone = {k: v for k, v in saved["settings"].items() if k not in known and v}
        if gone:
            raise UserError(
                f"{directory} was started by another version of cnnjax, with settings that this "
                f"one does not have ({', '.join(f'{k}={v}' for k, v in gone.items())}): resume it "
                f"with that version (`code` in its config.json)."
            )
        default = config_type(
            # JSON has no tuples.
            **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        )
        # It asked the earlier start to stop, not this one.
        default = dataclasses.replace(default, stop_after_epochs=0)
        config = _shortened(cli.parse(config_type, argv, default=default))
        _refuse_changes(default, config)
        if (directory / "summary.json").exists() and config.epochs == default.epochs:
            print(_finished(directory))
            return None
    elif config.run_dir and (Path(config.run_dir) / "config.json").exists():
        directory = Path(config.run_dir)
        if not (directory / "summary.json").exists():
            raise UserError(
                f"{directory} holds an unfinished run: continue it with --resume {directory}, or "
                "choose another --run-dir."
            )
        saved = read_config(directory)
        settings = as_json(recorded_settings(config))
        if saved["experiment"] != experiment or saved["settings"] != settings:
            raise UserError(
                f"{directory} holds a finished run with other settings: choose another --run-dir."
            )
        print(_finished(directory))
        return None
    elif config.run_dir and list((Path(config.run_dir) / "checkpoints").glob("0*/manifest.json")):
        raise UserError(
            f"{config.run_dir} holds checkpoints but no config.json: put the file back, or choose "
            "another --run-dir."
        )
    return place(config, experiment)


def place(config: Any, experiment: str) -> Any:
    """Returns the config with its run directory filled in."""
    if config.resume:
        return dataclasses.replace(config, run_dir=config.resume)
    if config.run_dir:
        return config
    name = f"{experiment.rpartition('.')[2]}-{time.strftime('%Y%m%d-%H%M%S')}"
    return dataclasses.replace(config, run_dir=str(_unused(Path("runs") / name)))


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
    return read_json(directory / "config.json", f"{directory} is not a run directory")


def write_config(config: Settings, experiment: str, **facts: Any) -> None:
    """Writes `config.json`, the manifest of the run; what earlier starts wrote is its `history`.

    Args:
      config: the settings.
      experiment: the module that `resolve` checks.
      facts: what else is to be recorded.
    """
    from cnnjax.devices import environment

    path = Path(config.run_dir) / "config.json"
    history = []
    if path.exists():
        earlier = read_config(path.parent)
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


def recorded_settings(config: Settings) -> dict[str, Any]:
    """Returns the settings that make the run what it is, however it is started."""
    settings = dataclasses.asdict(config)
    return {name: value for name, value in settings.items() if name not in LAUNCH_SETTINGS}


def as_json(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings as a file gives them back: lists for tuples."""
    return json.loads(json.dumps(settings))


def _shortened(config: Any) -> Any:
    return dataclasses.replace(config, epochs=1) if config.smoke else config


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
    summary = read_json(directory / "summary.json", f"{directory} is damaged")
    monitor = summary.get("monitor", "accuracy")
    return (
        f"{directory} is finished (test {monitor} {summary[f'test_{monitor}']:.4f}, see "
        f"{directory / 'summary.md'}); nothing to do. More --epochs with --resume continues it."
    )


def _unused(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
