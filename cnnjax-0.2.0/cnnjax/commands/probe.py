"""What few labels suffice for on a run's features, beside training the same network from scratch.

    cnnjax probe --run runs/simclr_mnist-20250101-120000
    cnnjax probe --run runs/a --labels 1 --seeds 10

A linear probe of the frozen features that enter the head, training from scratch with and without
the run's augmentation, and fine-tuning, all on the same few images. What RUN/probe-LABELS.json
holds is not made again.
"""

import dataclasses
from pathlib import Path

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import files, load, record


@dataclasses.dataclass(frozen=True)
class Config:
    """Print what a linear classifier of a run's features reaches with few labels."""

    run: str
    """The run directory."""

    dataset: str = ""
    """Where the run's data are now, such as folder:NEW; by default where they were."""

    labels: int = 10
    """Labeled images of each class."""

    seeds: int = 5
    """Number of seeds, from 0 on, which choose the images, draw what is new, and shuffle."""

    steps: int = 500
    """Updates of each training from scratch or fine-tuning."""

    batch_size: int = 50
    """Images per step; fewer where there are fewer."""

    smoke: bool = False
    """Two seeds and few steps. The scores mean nothing."""


def main(config: Config) -> None:
    """Compares the ways, and writes what they reach into the run."""
    from cnnjax.run import again

    if config.smoke:
        config = dataclasses.replace(config, seeds=2, steps=5)
    for name in ("labels", "seeds", "steps", "batch_size"):
        if getattr(config, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(config, name)}: give at least 1.")
    cnnjax.devices.backend.start(devices=1)
    directory = Path(config.run)
    record.read_config(directory)
    files.make_directory(directory, "the run", "--run")
    trained, base = load.load_trained(directory), load.read_base(directory)
    of_run = again.settings_of_run(directory)
    dataset = again.data_of_run(directory, dataset=config.dataset)
    if not isinstance(dataset, cnnjax.data.Dataset):
        raise UserError(f"{dataset.name} is streamed: probe a run whose data fit in memory.")
    augment = cnnjax.augment.make_augment(of_run.augment, num_classes=dataset.num_classes)
    budget = cnnjax.studies.probing.Budget(config.steps, config.batch_size, augment)
    settings = dataclasses.asdict(config) | {"run": "", "checksum": base.checksum}
    del settings["dataset"]  # Wherever they are, they are the run's.
    path = directory / f"probe-{config.labels}.json"
    results = files.read_json(path, f"{path} is damaged") if path.exists() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "accuracy": {}}
    found = results["accuracy"]
    missing = [way for way in cnnjax.studies.probing.WAYS if way not in found]
    for way, accuracies in cnnjax.studies.probing.compare(
        trained,
        base,
        dataset,
        budget,
        labels=config.labels,
        seeds=range(config.seeds),
        ways=missing,
    ):
        found[way] = accuracies
        files.write_json(path, results)
    text = cnnjax.studies.probing.markdown(
        found, labels=config.labels, test_examples=len(dataset.test.label)
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nsee          {path.with_suffix('.md')}")
