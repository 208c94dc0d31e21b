"""Make the reference that `cnnjax serve` compares traffic with, for a run that has none.

    cnnjax serve-reference --run RUN
    cnnjax serve-reference --run RUN --window 1000
    cnnjax serve-reference --run RUN --check

Training leaves one, RUN/reference.npz, where there are 1,000 validation images or more: how they
and the network's answers look, and how far windows of clean images get from that. `--check` has it
watch the test images in random order, which must raise no alarm, and then images that are rotated,
inverted, darker or noisy, and says after how many it notices.
"""

import dataclasses
from pathlib import Path

import cnnjax
from cnnjax.errors import UserError
from cnnjax.paths import expand


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

    check: bool = False
    """Try it on the test images, clean and changed; exits with 1 if clean ones raise an alarm."""


def main(config: Config) -> int:
    """Runs the network on its validation images, and writes what it saw."""
    from cnnjax.evaluation.references import check_window
    from cnnjax.run import again, load, report

    check_window(config.window)
    directory = Path(expand(config.run))
    if (task := load.task_of(directory)) != "classification":
        raise UserError(f"{directory} is a run of the task {task}: references are of classifiers.")
    cnnjax.devices.backend.start(devices=1)
    dataset = again.data_of_run(directory, dataset=config.dataset, data_dir=config.data_dir)
    made = report.leave_reference(directory, dataset, window=config.window)
    print(
        f"reference    {made.examples:,} validation images, accuracy {made.accuracy:.4f}, "
        f"calibration error {made.calibration_error:.4f}"
    )
    for name, threshold in made.thresholds.items():
        print(f"  {name:20} drifts above {threshold:.3f} over {made.window} images")
    print(f"see          {directory / report.REFERENCE}")
    return _check(directory, dataset, made) if config.check else 0


def _check(directory: Path, dataset, made) -> int:
    """Prints what the reference says of the test images; 1 if it takes clean ones for others."""
    from cnnjax.data.streamed import first_examples, split_size
    from cnnjax.run import load, report
    from cnnjax.serve.watch.trial import try_reference

    size = split_size(dataset, "test")
    if size < 3 * made.window:
        raise UserError(f"--check needs {3 * made.window} test images, and there are {size}.")
    images = first_examples(dataset, "test", min(size, 10_000)).image
    answer = report.answer_of(load.load_classifier(directory))
    clean, *others = try_reference(made, answer, images)
    for found in (clean, *others):
        said = "no alarm" if found.after is None else f"noticed after {found.after:,}"
        which = f" ({', '.join(found.statistics)})" if found.statistics else ""
        print(f"  {found.name:22} {said} of {found.images:,} images{which}")
    return int(clean.after is not None)
