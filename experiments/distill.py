"""Distill a trained classifier into another network of any family, or into itself.

    python -m experiments.distill --teacher RUN --model lenet5 \\
        --losses "logits(temperature=4, weight=0.9), attention(layers=(conv1:stage2))"
    python -m experiments.distill --model lenet5 --generations 3        # born-again networks

`--teacher` is any run of a classifier: trained, fine-tuned or converted. The student gets its
images, with their size and normalization. The run is one like any other, of the student alone.
docs/distill.md has the losses with their sources, and by how much each improves accuracy on MNIST.
"""

import dataclasses
from pathlib import Path
from typing import ClassVar

import jax

import cnnjax
from cnnjax import distill
from cnnjax.errors import UserError
from cnnjax.run import classifier, load, settings
from cnnjax.run.help import listed


@dataclasses.dataclass(frozen=True)
class Config(classifier.Config):
    """Train a classifier that learns of a trained one: of its outputs, layers or relations."""

    listings: ClassVar[dict[str, str]] = listed("losses")
    # Left open, they are those of the teacher.
    automatic: ClassVar = ("image_size", "fit", "preprocess")

    teacher: str = ""
    """Directory of the teacher's run. With --generations or --smoke and no teacher, the student's
    own network is trained first, on the labels alone, in RUN/teacher."""

    model: str = "lenet5"
    """The student: a name that `cnnjax models` lists, or MODULE:NAME of a file of your own."""

    losses: str = "logits(temperature=4, weight=0.9)"
    """What the student is to have in common with the teacher."""

    label_weight: float = -1.0
    """Weight of the labels' own loss; -1: 1 less the weight of logits. With 0 no label counts."""

    generations: int = 0
    """Distill N times in a row, each time a network that is initialized anew: the first learns of
    the teacher, each other of the one before. RUN is the last, RUN/generation1 the first. 0: once,
    and of --teacher."""

    epochs: int = 12
    learning_rate: float = 3e-3


def main(config: Config) -> int:
    """Trains the teacher if there is none, and each generation; returns the exit code."""
    distill.read(config.losses)
    distill.check_numbers(label_weight=config.label_weight, generations=config.generations)
    if not (config.teacher or config.generations or config.smoke):
        raise UserError(
            "no teacher given: name a run with --teacher, or make the network its own teacher with "
            "--generations 1."
        )
    cnnjax.run.trainer.start(config)
    last = max(1, config.generations)
    teacher = config.teacher or str(Path(config.run_dir) / "teacher")
    for number in range(0 if not config.teacher else 1, last):
        directory = Path(config.run_dir) / (f"generation{number}" if number else "teacher")
        # Of the same data from other initial parameters; the last has the seed that was given.
        seeds = {"seed": config.seed + last - number, "data_seed": classifier.data_seed(config)}
        if code := _earlier(config, directory, teacher if number else "", **seeds):
            return code
        teacher = str(directory)
    return distilled(config, teacher)


def distilled(config: Config, directory: str) -> int:
    """Trains one student of the teacher in the directory; returns the exit code."""
    terms, trained = distill.read(config.losses), load.load_classifier(directory)
    teacher = distill.teacher_of(trained)
    config = dataclasses.replace(config, **_images_of(trained.card, config))
    name, arguments = cnnjax.models.read_model(config.model, config.model_arguments)
    dataset = classifier.read_data(config)
    distill.check_data(teacher, terms, dataset.image_shape, dataset.class_names)
    student, card = classifier.make_model(config, name, arguments, dataset)
    model = distill.make(student, teacher, trained.variables, terms)
    checksum = cnnjax.finetune.variables_checksum(trained.variables)
    record = {"teacher": str(Path(directory).absolute()), "teacher_checksum": checksum}
    card |= distill.normalization(trained.card) | {"distill": record | {"losses": config.losses}}
    weight = None if config.label_weight == -1 else config.label_weight

    def step_factory(model, optimizer, task, **options):
        task = distill.distillation(task, model.terms, label_weight=weight)
        return cnnjax.train.step.make_step(model, optimizer, task, **options)

    key = cnnjax.rng.stream_key(jax.random.key(config.seed), "init", 0)
    recipe = classifier.make_recipe(
        config,
        dataset,
        model,
        card,
        step_factory=step_factory,
        variables=jax.device_get(model.start(key, trained.variables)),
        teacher_checksum=checksum,
    )
    lines = distill.layers.described(model.terms, *model.outlines(trained.variables))
    cnnjax.devices.processes.say(f"teacher      {directory}, a {trained.card['model']}\n{lines}")
    return cnnjax.run.trainer.train(config, recipe)


def _images_of(card, config):
    """Returns the settings of images that are the teacher's; refuses others."""
    height, width, _ = card["image_shape"]
    found = {name: card.get(name, getattr(Config, name)) for name in ("fit", "preprocess")}
    found["image_size"] = height if height == width else 0
    for name, value in found.items():
        if getattr(config, name) not in (getattr(Config, name), value):
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {getattr(config, name)}: the teacher's is {value or 'none'}, and both see "
                "the same images; leave it out."
            )
    return found


def _earlier(config, directory, teacher, **seeds):
    """Trains a generation before the last, where that is not done; returns the exit code."""
    changes = {"stop_after_epochs": 0, "plan": False, **seeds}
    if not teacher:
        return classifier.train_part(classifier.settings_like(config, **changes), directory)
    if (directory / "summary.json").exists():
        return 0
    changes |= {"run_dir": str(directory), "teacher": teacher, "generations": 0}
    changes["resume"] = str(directory) if (directory / "config.json").exists() else ""
    return distilled(dataclasses.replace(config, **changes), teacher)


if __name__ == "__main__":
    settings.launch(Config, main)
