"""An ensemble of up to five networks on MNIST: the mean of their predicted probabilities.

Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty Estimation using
Deep Ensembles", NeurIPS 2017: members that differ by their seed alone. With `--snapshots` they are
instead the ends of the cycles of one run whose learning rate restarts: Huang et al., "Snapshot
Ensembles: Train 1, Get M for Free", ICLR 2017.

    python -m experiments.mnist_ensemble
    python -m experiments.mnist_ensemble --snapshots --epochs 60 --ema-decay 0
    python -m experiments.mnist_ensemble --resume RUN     # trains the members that are missing

Each member is a whole run, RUN/member-N, that validates on the same images as the others, so that
a temperature can be fitted for the ensemble; `RUN/evaluation.json` has scores, disagreement
and calibration. Any runs make an ensemble afterwards, of any networks:

    cnnjax evaluate --run runs/a runs/b runs/c --tta shift:1 --calibrate
"""

import dataclasses
import json
from pathlib import Path

import cnnjax
from cnnjax.commands import evaluate
from cnnjax.errors import UserError
from cnnjax.paths import read_text
from cnnjax.run import classifier, record, settings
from cnnjax.tasks import class_scores


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """Train the members of an ensemble on MNIST, and evaluate them together."""

    members: int = 5
    """The number of networks, with the seeds SEED, SEED + 1, ..."""

    snapshots: bool = False
    """Take the members from one run, at the end of each of N cycles of the learning rate."""

    tta: str = ""
    """Test-time augmentation: average over views of each image, such as shift:1."""

    model: str = "cnn_5conv_2dense"
    model_arguments: tuple[str, ...] = ("norm=batch",)
    epochs: int = 20
    learning_rate: float = 3e-3
    ema_decay: float = 0.999
    weight_decay: float = 0.05
    augment: str = "rotate:10,scale:0.1,translate:2,shear:10"


def main(config: Config) -> int:
    """Trains what is missing, evaluates the ensemble; returns the exit code."""
    if config.smoke:
        config = dataclasses.replace(config, members=2, epochs=2 if config.snapshots else 1)
    if config.members < 2:
        raise UserError(f"--members {config.members}: an ensemble has 2 or more.")
    if config.num_processes > 1:
        raise UserError("--num-processes: members train one after another, in one process.")
    if config.snapshots and (config.epochs % config.members or config.ema_decay):
        raise UserError(
            f"--snapshots of {config.members} cycles need --epochs that are a multiple of "
            f"{config.members} (not {config.epochs}), and --ema-decay 0: an average would mix the "
            "cycles."
        )
    cnnjax.run.trainer.start(dataclasses.replace(config, coordinator="off"))
    directory = Path(config.run_dir)
    cnnjax.run.files.make_directory(directory)
    with cnnjax.run.files.only_writer(directory):
        record.write_config(config, record.experiment_name(type(config)))
        names = []
        for member, own in _members(config, directory).items():
            code = classifier.train_part(own, member)
            if code or not (member / "summary.json").exists():
                return code
            names += _names(config, member)
        evaluate.main(
            evaluate.Config(
                run=tuple(names),
                data_dir=config.data_dir,
                tta=config.tta,
                calibrate=True,
                smoke=config.smoke,
                out=str(directory),
            )
        )
        _summarize(config, directory)
    return 0


def _members(config, directory):
    """Returns the settings of each run to train, by its directory."""
    data_seed = classifier.data_seed(config)
    own = classifier.settings_like(config, data_seed=data_seed, coordinator="off")
    if config.snapshots:
        # The end of every cycle is kept, and the last one is not replaced by the best.
        cycles = {"cycles": config.members, "warmup_epochs": 0.0, "keep_last": 0, "patience": 0}
        return {directory / "member-1": dataclasses.replace(own, **cycles)}
    return {
        directory / f"member-{number + 1}": dataclasses.replace(own, seed=config.seed + number)
        for number in range(config.members)
    }


def _names(config, directory):
    """Returns how `cnnjax.commands.evaluate` names the members that a finished run gives."""
    if not config.snapshots:
        return [str(directory)]
    step = json.loads(read_text(directory / "summary.json"))["step"]
    return [
        f"{directory}@{step * cycle // config.members}" for cycle in range(1, config.members + 1)
    ]


def _summarize(config, directory):
    """Writes the summary of the ensemble, whose presence says that it is finished."""
    report = json.loads(read_text(directory / "evaluation.json"))
    members = [
        json.loads(read_text(path)) for path in sorted(directory.glob("member-*/summary.json"))
    ]
    summary = {
        "experiment": record.experiment_name(type(config)),
        "model": f"{config.members} x {config.model}",
        "dataset": config.dataset,
        "test_accuracy": report["accuracy"],
        "test_loss": report["calibration"]["before"]["loss"],
        "test_loss_calibrated": report["calibration"]["after"]["loss"],
        "member_test_accuracies": report["ensemble"]["accuracies"],
        "disagreement": report["ensemble"]["disagreement"]["mean"],
        "parameters": config.members * members[0]["parameters"],
        "seconds": sum(member["seconds"] for member in members),
        "seed": config.seed,
        "epochs": config.epochs,
        "step": sum(member["step"] for member in members),
    }
    cnnjax.run.report.write_summary(directory, summary, class_scores.format_report(report))


if __name__ == "__main__":
    settings.launch(Config, main)
