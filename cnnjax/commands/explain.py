"""Which pixels a run's answers come from, on one page, and whether such maps can be believed.

    cnnjax explain --run runs/mnist_lenet-20250101-120000
    cnnjax explain --run runs/mine cat.jpg dog.jpg --methods "grad_cam,occlusion(window=16)"

Writes RUN/explain/index.html, which opens without a server or network: each image, its likeliest
classes and layers to click through, and a map for each method. Under it, and printed, stands what
the checks say of each method on the run's test images: see `cnnjax.explain.belief`.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import cnnjax
from cnnjax.commands import predict
from cnnjax.errors import UserError
from cnnjax.run import files, load

# Fewer images tell nothing of a method.
FEW = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Write a page of maps of what speaks for a network's answers."""

    run: str
    """The run directory."""

    images: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[IMAGE ...]")]
    ] = ()
    """Image files; by default the first test images of the run's dataset."""

    methods: str = (
        "gradient,smooth_grad,integrated_gradients,guided_backpropagation,grad_cam,layer_cam,"
        "occlusion"
    )
    """Methods, separated by commas, with options such as "occlusion(window=4)": also
    gradient_times_input, grad_cam_plus_plus, score_cam, rise."""

    layers: tuple[str, ...] = ()
    """Stages or layers for the class activation maps; by default all stages that are images."""

    top: int = 3
    """The likeliest classes of each image that are explained."""

    count: int = 8
    """Test images on the page, where no files are given."""

    check: int = 64
    """Test images for the checks; 0 for no checks."""

    dataset: str = ""
    """Where the run's data are now, such as folder:NEW; by default where they were."""

    prepare: Literal["auto", "image", "digit"] = "auto"
    """How image files are prepared: as for cnnjax predict."""

    base: str = ""
    """Where the base of a fine-tuned run is now; by default where it was."""

    seed: int = 0
    """Of the methods and checks that draw at random."""

    out: str = ""
    """Directory for the page and the pictures; by default RUN/explain."""


def main(config: Config) -> None:
    """Explains the images, checks the methods, and writes the page."""
    import jax

    from cnnjax.explain import belief, named, page, taps

    _check(config)
    methods = named.read(config.methods)
    files_read = [cnnjax.data.read_image(path) for path in config.images]
    cnnjax.devices.backend.start(devices=1)
    trained = load.load_classifier(config.run, base=config.base or None)
    prepare, _ = predict.preparation(trained, config.prepare)
    given = [prepare(image) for image in files_read]
    titles = [path.name for path in config.images]
    tested, labels = _test_images(config, needed=not given)
    if not given:
        given = list(tested[: config.count])
        names = trained.card["class_names"]
        titles = [
            f"test image {number}: {names[label]}"
            for number, label in enumerate(labels[: config.count])
        ]
    stored = np.stack(given)
    image = trained.normalize(stored)
    methods = _applicable(methods, trained, image, asked=config.methods != Config.methods)
    layers = config.layers or taps.maps(trained.model, trained.variables, image)
    for layer in config.layers:
        cnnjax.explain.tap(trained.model, trained.variables, image[:1], [layer])
    out = Path(config.out or Path(config.run) / "explain")
    files.make_directory(out, "the directory of the page", "--out")

    key = jax.random.key(config.seed)
    pictures = _explained(key, trained, methods, layers, stored, titles, config.top)
    beliefs, count = [], 0
    if config.check:
        shown = tested[: config.check] if len(tested) else stored
        count = len(shown)
        beliefs = belief.examine(
            key, trained.model, trained.variables, trained.normalize(shown), methods
        )
        print(belief.table(beliefs, count))
        if count < FEW:
            print(f"{count} of {FEW} images or more: the numbers say little of the methods")
    page.write_pictures(pictures, out)
    written = page.write_page(
        out / "index.html",
        pictures,
        heading=f"{Path(config.run).name}: {trained.card['model']}",
        facts=["Red speaks for the class, blue against it; each map has its own scale."],
        rows=[{"method": e.method, **e.cells(), "verdict": e.verdict} for e in beliefs],
        meaning=f"Over {count} images. {belief.MEANING}",
    )
    print(f"{len(pictures)} images, {len(methods)} methods, see {written}")


def _applicable(methods: Any, trained: load.TrainedModel, image: Any, *, asked: bool) -> list[Any]:
    """Returns the methods that the network allows; without some, if nobody asked for them."""
    from cnnjax.explain import named, rectifiers

    has_relus = rectifiers.has_relus(
        lambda image: trained.model.apply(trained.variables, image, train=False), image[:1]
    )
    unfit = [method.text for method in methods if method.name in named.OF_RELUS and not has_relus]
    if unfit and asked:
        raise UserError(
            f"--methods: {', '.join(unfit)} changes the derivative of ReLUs, and "
            f"{trained.card['model']} has none: leave it out."
        )
    if unfit:
        print(f"without {', '.join(unfit)}: {trained.card['model']} has no ReLU")
    return [method for method in methods if method.text not in unfit]


def _check(config: Config) -> None:
    for name, least in (("top", 1), ("count", 1), ("check", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: give at least {least}.")


def _test_images(config: Config, *, needed: bool) -> tuple[Any, Any]:
    """Returns stored test images and labels; none where image files are given and data are not."""
    from cnnjax.run import again

    count = max(config.check, 0 if config.images else config.count)
    if not count:
        return np.zeros(0), np.zeros(0)
    try:
        dataset = again.data_of_run(Path(config.run), dataset=config.dataset)
        if isinstance(dataset, cnnjax.data.StreamedDataset):
            raise UserError(
                f"{dataset.name} is streamed: give image files, or a --dataset that fits memory."
            )
    except UserError as error:
        if config.dataset:
            raise
        if needed:
            raise UserError(f"{error} Or give image files.") from None
        print(f"checks are made on the given images: {error}")
        return np.zeros(0), np.zeros(0)
    return dataset.test.image[:count], dataset.test.label[:count]


def _explained(
    key: Any,
    trained: load.TrainedModel,
    methods: Any,
    layers: Any,
    stored: np.ndarray,
    titles: list[str],
    top: int,
) -> list[Any]:
    """Returns a `page.Picture` for each image."""
    import jax
    import jax.numpy as jnp

    from cnnjax import explain
    from cnnjax.explain.page import Picture

    image, names = trained.normalize(stored), trained.card["class_names"]
    logits = jax.jit(trained.model.apply)(trained.variables, image)
    probabilities = np.asarray(cnnjax.metrics.probabilities(logits))
    order = (-probabilities).argsort(-1, kind="stable")[:, :top]
    maps: dict[tuple[str, str, int], np.ndarray] = {}
    for method in methods:
        for layer in layers if method.of_layer else [""]:

            def of_class(label: Any, method: Any = method, layer: str = layer) -> Any:
                target = explain.class_score(label)
                return method(key, trained.model, trained.variables, image, target, layer)

            # One forward pass for all classes, where the method needs no more.
            together = np.asarray(jax.jit(jax.vmap(of_class))(jnp.asarray(order.T)))
            for place, of_place in enumerate(together):
                maps[method.text, layer, place] = of_place
    return [
        Picture(
            title,
            stored[number],
            [(names[label], float(probabilities[number, label])) for label in order[number]],
            {which: of_all[number] for which, of_all in maps.items()},
        )
        for number, title in enumerate(titles)
    ]
