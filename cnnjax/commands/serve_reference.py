"""Make the reference that `cnnjax serve` compares traffic with, for a run that has none.

    cnnjax serve-reference --run RUN
    cnnjax serve-reference --run RUN --window 1000

Training leaves one, RUN/reference.npz, where there are 1,000 validation images or more: how they
and the network's answers look, and how far windows of clean images get from that.
"""

import dataclasses
from pathlib import Path

import cnnjax
from cnnjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Config:
    """Make the reference that a server compares the traffic of a run with."""

    run: str
    """The run directory, which gets reference.npz."""

    dataset: str = ""
    """Where the run's data are now, such as folder:NEW; by default where they were."""

    data_dir: str = ""
    """Where tfds datasets are now; by default where they were."""

    window: int = 500
    """Number of images that are compared at a time."""


def main(config: Config) -> None:
    """Runs the network on its validation images, and writes what it saw."""
    from cnnjax.evaluation.references import check_window
    from cnnjax.run import again, load, reference

    check_window(config.window)
    directory = Path(config.run)
    if (task := load.task_of(directory)) != "classification":
        raise UserError(f"{directory} is a run of the task {task}: references are of classifiers.")
    cnnjax.devices.backend.start(devices=1)
    dataset = again.data_of_run(directory, dataset=config.dataset, data_dir=config.data_dir)
    made = reference.leave_reference(directory, dataset, window=config.window)
    print(
        f"reference    {made.examples:,} validation images, accuracy {made.accuracy:.4f}, "
        f"calibration error {made.calibration_error:.4f}"
    )
    for name, threshold in made.thresholds.items():
        print(f"  {name:20} drifts above {threshold:.3f} over {made.window} images")
    print(f"see          {directory / reference.NAME}")
