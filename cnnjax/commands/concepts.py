"""Whether concepts that you show in images speak for a run's classes: TCAV (Kim et al. 2018).

    cnnjax concepts --run RUN --concept striped=images/striped dotted=images/dotted --classes zebra
    cnnjax concepts --run RUN --concept mark=marked --random plain --layers stage2 stage3

A concept is a folder of images of it, 50 or more. In each layer a linear classifier tells them from
random images (training images of the run, or those of --random); the score is the fraction of a
class's test images whose logit rises in its direction. Random sets say what a score is by chance: a
t-test, corrected for the number of tests. Writes RUN/concepts/concepts.json and concepts.png; see
docs/explain.md.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import files, load


@dataclasses.dataclass(frozen=True)
class Config:
    """Test whether concepts speak for a network's classes."""

    run: str
    """The run directory."""

    concept: tuple[str, ...] = ()
    """NAME=FOLDER for each concept: a folder of images of it, at any depth."""

    random: str = ""
    """A folder of random images, at any depth; by default training images of the run."""

    classes: tuple[str, ...] = ()
    """Classes by name or number; by default the first ten."""

    layers: tuple[str, ...] = ()
    """Stages or layers; by default all stages that are images."""

    count: int = 100
    """At most so many images of each class and concept; random images are ten times as many."""

    repeats: int = 20
    """Random counterparts of each concept."""

    dataset: str = ""
    """Where the run's data are now, such as folder:NEW; by default where they were."""

    prepare: Literal["auto", "image", "digit"] = "auto"
    """How image files are prepared: as for cnnjax predict."""

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""

    seed: int = 0
    """Chooses random images."""

    out: str = ""
    """Directory of the results; by default RUN/concepts."""


def main(config: Config) -> None:
    """Tests the concepts, prints and writes what was found."""
    import jax
    import jax.numpy as jnp

    from cnnjax.explain import concepts, taps, targets

    folders = _folders(config)
    cnnjax.devices.backend.start(devices=1)
    trained = load.load_classifier(config.run, base=config.base or None)
    names = trained.card["class_names"]
    classes = targets.read_classes(config.classes, names) or list(range(min(10, len(names))))
    shape = jax.ShapeDtypeStruct((1, *trained.card["image_shape"]), jnp.float32)
    layers = _layers(config.layers, taps, trained, shape)
    out = Path(config.out or Path(config.run) / "concepts")
    files.make_directory(out, "the directory of the results", "--out")
    prepare, _ = load.preparation(trained, config.prepare)
    shown = {
        name: np.stack([prepare(cnnjax.data.read_image(path)) for path in paths])
        for name, paths in folders.items()
    }
    random = shown.pop("", None)
    of_class, training = _data(config, trained, classes, needs_training=random is None)
    random = training if random is None else random
    found = concepts.tcav(
        trained.model,
        trained.variables,
        {name: trained.normalize(image) for name, image in shown.items()},
        trained.normalize(random),
        {label: trained.normalize(image) for label, image in of_class.items()},
        layers,
        repeats=config.repeats,
        seed=config.seed,
    )
    print(concepts.table(found, names))
    _write(out, config, found, names, shown, random)


def _layers(asked: Any, taps: Any, trained: load.TrainedModel, shape: Any) -> list[str]:
    if not asked:
        return taps.maps(trained.model, trained.variables, shape)
    shapes = taps.layer_shapes(trained.model, trained.variables, shape)
    taps.check_layers(shapes, asked, image=False)
    return list(dict.fromkeys(asked))


def _folders(config: Config) -> dict[str, list[Path]]:
    """Returns the files of each concept, and under "" those of --random, if given."""
    if not config.concept:
        raise UserError("no concept given: --concept NAME=FOLDER, a folder of images of it.")
    for name, least in (("count", 6), ("repeats", 2)):
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: give at least {least}.")
    given: dict[str, str] = {}
    for text in config.concept:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--concept {text}: write it as NAME=FOLDER.")
        if name in given:
            raise UserError(f"--concept {name} is given twice: name each once.")
        given[name] = folder
    if config.random:
        given[""] = config.random
    found = {}
    for name, folder in given.items():
        flag = f"--concept {name}={folder}" if name else f"--random {folder}"
        paths = cnnjax.data.directories.image_files(folder, flag)
        if len(paths) < 6:
            raise UserError(f"{flag} has {len(paths)} images: give 6 or more, better 50.")
        generator = np.random.default_rng(config.seed)
        limit = config.count if name else 10 * config.count
        chosen = np.sort(generator.permutation(len(paths))[:limit])
        found[name] = [paths[index] for index in chosen]
    return found


def _data(
    config: Config, trained: load.TrainedModel, classes: list[int], *, needs_training: bool
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Returns stored test images of each class, and random training images."""
    from cnnjax.run import again

    dataset: Any = again.data_of_run(Path(config.run), dataset=config.dataset)
    names = list(map(str, trained.card["class_names"]))
    if list(map(str, dataset.class_names)) != names:
        raise UserError(
            f"{dataset.name} has the classes {', '.join(dataset.class_names)}, but {config.run} "
            f"{', '.join(names[:10])}: choose a dataset with the same ones."
        )
    first = cnnjax.data.streamed.first_examples
    tested = first(dataset, "test")
    found = {label: tested.image[tested.label == label][: config.count] for label in classes}
    for label, image in found.items():
        if not len(image):
            raise UserError(
                f"{dataset.name} has no test images of class {names[label]}: leave it out."
            )
    if not needs_training:
        return found, np.zeros(0)
    training = first(dataset, "train").image
    generator = np.random.default_rng(config.seed)
    return found, training[np.sort(generator.permutation(len(training))[: 10 * config.count])]


def _write(
    out: Path, config: Config, found: Any, names: Any, shown: dict[str, Any], random: Any
) -> None:
    settings = dataclasses.asdict(config)
    counts = {name: len(image) for name, image in shown.items()} | {"random": len(random)}
    rows = [
        {
            **each._asdict(),
            "class": str(names[each.label]),
            "is_significant": each.is_significant,
            "verdict": each.verdict,
        }
        for each in found
    ]
    files.write_json(
        out / "concepts.json", {"settings": settings, "images": counts, "concepts": rows}
    )
    figure = out / "concepts.png"
    by_chance = [each.random_score for each in found]
    draw = functools.partial(
        cnnjax.plots.interval_chart,
        ["random images"]
        + [
            f"{each.concept}, {each.layer}, {names[each.label]}"
            + (" *" if each.is_significant else "")
            for each in found
        ],
        [float(np.mean(by_chance)), *(each.score for each in found)],
        [float(np.std(by_chance)), *(each.spread for each in found)],
        "TCAV score (* differs from random images)",
    )
    drawn = cnnjax.plots.attempt(draw, figure)
    print(f"see {out / 'concepts.json'}" + (f" and {figure}" if drawn else ""))
