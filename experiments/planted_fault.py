r"""A fault planted into LeNet-5, and found by its maps and by TCAV: a mark that leaks the label.

Digits of MNIST are written as PNG files, most training images with a mark in a corner whose place
is that of their class. A network trained on them scores well on test images with the mark, and
answers by the mark, as networks did by copyright tags of photographs: Lapuschkin et al. 2019,
"Unmasking Clever Hans Predictors and Assessing What Machines Really Learn". An honest network
learns the same digits without. Grad-CAM, Layer-CAM, layer-wise relevance and occlusion look at both
on the same marked images: what fraction of the map's positive mass lies in the corner, and how
often its largest value. TCAV asks in how many classes "has the mark of the class" speaks for it.

    python -m experiments.planted_fault

RUN/faulty and RUN/honest are runs like any, trained on the folders RUN/marked and RUN/plain:

    cnnjax explain --run RUN/faulty
    cnnjax concepts --run RUN/faulty --concept mark=RUN/concepts/3 --random RUN/plain/train \
        --prepare image --classes 3 --layers stage3

Two to four minutes on 2 CPU cores; docs/explain.md shows what is found, with seed 0.
"""

import dataclasses
from pathlib import Path

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import classifier, files, load, record, settings
from cnnjax.studies import planted

NETWORKS = ("faulty", "honest")


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """Train LeNet-5 on digits with a mark that leaks the label, and find the fault."""

    leaked: float = 0.99
    """Fraction of the training images that have the mark of their class."""

    digits: int = 8000
    """Training images; an eighth as many test images."""

    looked_at: int = 200
    """Test images whose maps are measured."""

    model: str = "lenet5"
    epochs: int = 5
    learning_rate: float = 3e-3
    weight_decay: float = 0.05


def main(config: Config) -> int:
    """Writes the digits, trains both networks, looks for the fault; returns the exit code."""
    if not 0 < config.leaked <= 1 or config.digits < 800 or config.looked_at < 10:
        raise UserError("give --leaked above 0 to 1, --digits 800 or more, --looked-at 10 or more.")
    if config.smoke:
        config = dataclasses.replace(config, digits=800, looked_at=20)
    cnnjax.run.trainer.start(dataclasses.replace(config, coordinator="off"))
    directory = Path(config.run_dir)
    files.make_directory(directory)
    with files.only_writer(directory):
        record.write_config(config, record.experiment_name(type(config)))
        digits = cnnjax.data.load("mnist", seed=config.seed)
        train, test = (
            cnnjax.data.dataset.Arrays(split.image[:count], split.label[:count])
            for split, count in ((digits.train, config.digits), (digits.test, config.digits // 8))
        )
        planted.write_digits(directory, train, test, leaked=config.leaked, seed=config.seed)
        for network, folder in zip(NETWORKS, ("marked", "plain"), strict=True):
            data = f"folder:{directory / folder}"
            own = classifier.settings_like(config, dataset=data, coordinator="off")
            code = classifier.train_part(own, directory / network)
            if code or not (directory / network / "summary.json").exists():
                return code
        trained = {name: load.load_classifier(directory / name) for name in NETWORKS}
        found, picture = planted.find(trained, train, test, looked_at=config.looked_at)
        (directory / "figures").mkdir(exist_ok=True)
        (directory / "figures" / "maps.png").write_bytes(picture)
        text = "\n".join(f"{name:40} {value:.3f}" for name, value in found.items())
        print(text)
        card = files.read_json(directory / "faulty" / "summary.json", "it is damaged")
        kept = ("model", "parameters", "seconds", "seed", "epochs", "step")
        summary = {
            "experiment": record.experiment_name(type(config)),
            "dataset": "mnist",
            "test_accuracy": found["faulty, accuracy with its mark"],
            **{name: card[name] for name in kept},
            **found,
        }
        cnnjax.run.report.write_summary(directory, summary, text)
        print(f"see          {directory / 'summary.md'}")
    return 0


if __name__ == "__main__":
    settings.launch(Config, main)
