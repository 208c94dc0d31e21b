"""What a run's network sees, on one page: its layers, its neurons, its test images as points.

    cnnjax show-network --run runs/mnist_lenet-20250101-120000
    cnnjax show-network --run runs/mine cat.jpg dog.jpg --layers stage2 stage3 --channels 8

Writes RUN/network/index.html, which opens without a server or network, and the same as pictures.
For each layer: feature maps of some images, its filters, its receptive field, and for the channels
that vary most the training images that they respond to most and an image made for them. For the
whole network: images made for classes, a table of neurons (dead, always on, effective rank), and
test images as points by PCA and t-SNE. See docs/inside.md.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import cnnjax
from cnnjax.errors import UserError, unknown_name
from cnnjax.run import files, load

# Of t-SNE: fewer images have no neighborhoods.
FEWEST_POINTS = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """Write a page of what a network sees."""

    run: str
    """The run directory."""

    images: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[IMAGE ...]")]
    ] = ()
    """Image files whose feature maps are drawn; by default the first test images of the run's
    dataset."""

    layers: tuple[str, ...] = ()
    """Stages or layers such as stage1/block2/conv1; by default all stages that are images."""

    channels: int = 8
    """Channels of each layer that are shown in detail, those that vary most."""

    maps: int = 32
    """Feature maps of each image and layer."""

    count: int = 3
    """Test images whose maps are drawn, where no files are given."""

    examples: int = 10_000
    """Training images that are searched for what channels respond to; 0 for none."""

    top: int = 8
    """Of them, those shown for each channel."""

    points: int = 1000
    """Test images that are shown as points; 0 for none."""

    steps: int = 128
    """Steps of each image that is made for a channel or class; 0 for none."""

    classes: tuple[str, ...] = ()
    """Classes that images are made for; by default the first ten."""

    parametrization: Literal["fourier", "pixel"] = "fourier"
    """Of the images that are made."""

    total_variation: float = 1.0
    """Weight of what makes them smooth."""

    batch_size: int = 100
    """Images that are looked at together."""

    dataset: str = ""
    """Where the run's data are now, such as folder:NEW; by default where they were. Of a converted
    run any images that it is to be looked at with."""

    prepare: Literal["auto", "image", "digit"] = "auto"
    """How image files are prepared: as for cnnjax predict."""

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""

    seed: int = 0
    """Of the images that are made, and of t-SNE."""

    out: str = ""
    """Directory for the page and the pictures; by default RUN/network."""


def main(config: Config) -> None:
    """Looks at the network, and writes the page."""
    from cnnjax.explain.inside import looks, neurons, page

    _check(config)
    files_read = [cnnjax.data.read_image(path) for path in config.images]
    cnnjax.devices.backend.start(devices=1)
    trained = load.load_classifier(config.run, base=config.base or None)
    layers, fields = _layers(trained, config.layers)
    card = trained.card
    classes = _classes(card["class_names"], config.classes, card["num_outputs"])
    dataset = _dataset(config, trained, needed=not files_read)
    out = Path(config.out or Path(config.run) / "network")
    files.make_directory(out, "the directory of the page", "--out")
    network = _network(config, trained, layers, fields, out)

    train, test = _examples(dataset, config)
    prepare, _ = load.preparation(trained, config.prepare)
    shown = [prepare(image) for image in files_read] or list(test.image[: config.count])
    names = [path.name for path in config.images] or [
        f"test image {number}" for number in range(len(shown))
    ]
    searched = train.image if len(train.image) else np.stack(shown)
    found = looks.search(network, searched, stages=not config.layers)
    print(neurons.table(found.statistics, len(searched)))
    views = looks.layers(network, np.stack(shown), names, found, searched)
    made = looks.made_for_classes(network, classes)
    points = None
    if dataset is not None and config.points:
        points = looks.points(network, test.image, test.label, tuple(dataset.class_names))
    written = page.write_page(
        out / "index.html",
        views,
        heading=f"{Path(config.run).resolve().name}: {trained.card['model']}",
        facts=_facts(config, len(train.image), len(searched)),
        classes=made,
        rows={name: each.cells() for name, each in found.statistics.items()},
        meaning=f"Over {len(searched)} images. {neurons.MEANING}",
        points=points,
    )
    print(f"{len(views)} layers, see {written}")


def _check(config: Config) -> None:
    least = {"channels": 1, "maps": 1, "count": 1, "top": 1, "batch_size": 1}
    least |= {"examples": 0, "points": 0, "steps": 0, "total_variation": 0}
    for name, number in least.items():
        if getattr(config, name) < number:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {getattr(config, name)}: give at least {number}.")
    if 0 < config.points < FEWEST_POINTS:
        raise UserError(f"--points {config.points}: give at least {FEWEST_POINTS}, or 0 for none.")


def _layers(trained: load.TrainedModel, asked: tuple[str, ...]) -> tuple[dict, dict]:
    """Returns shapes and receptive fields of the layers that are shown."""
    import jax

    from cnnjax.explain import taps
    from cnnjax.explain.inside import program, receptive

    model, variables = trained.model, trained.variables
    shape = tuple(trained.card["image_shape"])
    traced = program.trace(model, variables, shape)
    taps.check_layers(traced.shapes, asked)
    if not any(len(each) == 4 and each[1] * each[2] > 1 for each in traced.shapes.values()):
        raise UserError(
            f"{trained.card['model']} has no layer whose output is an image: there are no maps, "
            "filters or fields to show."
        )
    image: Any = jax.ShapeDtypeStruct((1, *shape), np.float32)
    wanted = set(asked or taps.maps(model, variables, image))
    fields = receptive.of_program(traced)
    return {name: traced.shapes[name] for name in traced.shapes if name in wanted}, fields


def _classes(names: list[str], asked: tuple[str, ...], num_outputs: int) -> list[int]:
    """Returns the numbers of the outputs that images are made for."""
    for name in asked:
        if name not in names:
            raise unknown_name("class", name, names)
    numbers = [names.index(name) for name in asked] or list(range(min(10, len(names))))
    if num_outputs == 1:  # Of two classes: the one logit is of the second.
        return [0]
    return numbers


def _dataset(config: Config, trained: load.TrainedModel, *, needed: bool) -> Any:
    """Returns the run's data, or those that a converted run is looked at with; None if there are
    none and image files are given."""
    from cnnjax.run import again, record

    shape = tuple(trained.card["image_shape"])
    try:
        is_known = "dataset" in record.read_config(Path(config.run))["settings"]
        if is_known or not config.dataset:
            dataset = again.data_of_run(Path(config.run), dataset=config.dataset)
        else:
            fit = trained.card.get("fit", "pad")
            dataset = cnnjax.data.open_dataset(config.dataset, image_size=shape[:2], fit=fit)
    except UserError as error:
        if config.dataset:
            raise
        if needed:
            raise UserError(f"{error} Or give image files.") from None
        print(f"only the given images are looked at: {error}")
        return None
    if tuple(dataset.image_shape) != shape:
        raise UserError(
            f"the images of {dataset.name} are {_by(dataset.image_shape)}, and the network's "
            f"{_by(shape)}: name others with --dataset."
        )
    return dataset


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _examples(dataset: Any, config: Config) -> tuple[Any, Any]:
    """Returns the training images that are searched and the test images, both as stored."""
    from cnnjax.data.dataset import Arrays
    from cnnjax.data.streamed import first_examples

    if dataset is None:
        none = Arrays(np.zeros(0, np.uint8), np.zeros(0, np.int32))
        return none, none
    count = max(config.points, 0 if config.images else config.count)
    return (
        first_examples(dataset, "train", config.examples),
        first_examples(dataset, "test", count),
    )


def _facts(config: Config, num_train: int, num_searched: int) -> list[str]:
    source = f"{num_train} training images" if num_train else f"the {num_searched} given images"
    made = f"Made images: {config.steps} steps of Adam, {config.parametrization} parametrization."
    return [
        f"What channels respond to was sought among {source}; a picture there is cut to what the "
        "unit sees, gray outside of the image. Shown are the channels that vary most.",
        *([made] if config.steps else []),
    ]


def _network(
    config: Config, trained: load.TrainedModel, layers: dict, fields: dict, out: Path
) -> Any:
    """Returns what `looks` looks at, and how."""
    from cnnjax.explain.inside import looks

    names = trained.card["class_names"]
    # Of two classes: the one logit is of the second.
    outputs = names[1:] if trained.card["num_outputs"] == 1 else names
    options = looks.Options(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(looks.Options)}
    )
    return looks.Network(
        trained.model,
        trained.variables,
        tuple(trained.card["image_shape"]),
        trained.normalize,
        tuple(outputs),
        tuple(names),
        layers,
        fields,
        out,
        options,
        trained.card.get("channel_order", "RGB"),
    )
