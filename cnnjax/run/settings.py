"""The settings that every run has, in groups, and the command line of an experiment."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from cnnjax.devices import processes
from cnnjax.run import exits, files, record
from cnnjax.run.help import listed


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

    validate_every_steps: int = 0
    """Where epochs are shorter than N steps, validate and save only at the end of the first epoch
    after every N; 0: after each epoch."""

    save_every_steps: int = 0
    """Save a checkpoint every N steps too, not only after validation."""

    keep_last: int = 2
    """Latest checkpoints to keep; 0 keeps all."""

    keep_best: int = 1
    """Best checkpoints to keep besides the latest, by --monitor."""

    monitor: str = ""
    """The validation score that says which weights are best, such as accuracy or loss (the lowest);
    by default the task's own."""

    patience: int = 0
    """Stop after N validations without a better score (see --monitor), and keep the best weights;
    0 does not."""

    test: bool = True
    """Score the test set at the end, and draw what it shows; --no-test leaves it untouched, for
    choices that are made on the validation scores."""

    track: tuple[str, ...] = ()
    """Trackers that follow the run besides TensorBoard: wandb, mlflow. None of them can stop it or
    change its results."""

    track_checkpoints: Literal["none", "tested", "all"] = "none"
    """Checkpoints that trackers keep: none, the one that was tested, or each as it is saved."""

    track_wait_secs: int = 30
    """How long to wait, at the end, until trackers have taken all."""

    smoke: bool = False
    """Shrink the run to seconds: one epoch over 1,024 images. Its scores mean nothing."""


@dataclasses.dataclass(frozen=True)
class Input:
    """Where data come from, and where they wait."""

    data_dir: str = ""
    """Where tfds datasets are; by default $TFDS_DATA_DIR or ~/tensorflow_datasets."""

    pipeline: Literal["auto", "resident", "stream"] = "auto"
    """Where training data are: resident on the device, or read as they are needed (stream; tfds
    datasets and folders from disk, so that they may be larger than memory). auto is resident where
    they fit."""


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

    profile: str = ""
    """Such as steps=10:20: record the steps after 10, up to 20, in RUN/profile for Perfetto and
    XProf, and print what took longest, by layer. No number of the run depends on it."""

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

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What layers compute in; parameters, statistics, losses and gradients are float32. auto is
    bfloat16 on TPUs and float32 elsewhere; a resumed run keeps what it was started in. float16
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
    experiment = record.experiment_name(config_type)
    with exits.one_line_errors():
        config = record.resolve(config_type, experiment, sys.argv[1:] if argv is None else argv)
        if config is None:
            processes.end(0)
        with files.writing_errors(Path(config.run_dir)):
            code = main(config) or 0
        processes.end(code)
