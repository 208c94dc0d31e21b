"""Which pixels a run's answers come from, on one page, and whether such maps can be believed.

    cnnjax explain --run runs/mnist_lenet-20250101-120000
    cnnjax explain --run runs/mine cat.jpg dog.jpg --methods "grad_cam,occlusion(window=16)"

Writes RUN/explain/index.html, which opens without a server or network: each image, its likeliest
classes and layers to click through, and a map for each method. Under it, and printed, stands what
the checks say of each method on the run's test images: see `cnnjax.explain.belief`. Two more are
asked for:

    cnnjax explain --run runs/mine --randomized-labels runs/same_network_on_permuted_labels
    cnnjax explain --run runs/mine --independent
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

import cnnjax
from cnnjax.errors import UserError
from cnnjax.run import files, load

# Fewer images tell nothing of a method.
FEW = 16
# Training images that expected gradients compare with.
REFERENCES = 100


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
    gradient_times_input, expected_gradients, lrp, grad_cam_plus_plus, score_cam, rise."""

    classes: tuple[str, ...] = ()
    """Classes that are explained, by name or number; by default the likeliest of each image."""

    layers: tuple[str, ...] = ()
    """Stages or layers for the class activation maps; by default all stages that are images."""

    top: int = 3
    """The likeliest classes of each image that are explained."""

    count: int = 8
    """Test images on the page, where no files are given."""

    check: int = 64
    """Test images for the checks; 0 for no checks."""

    randomized_labels: str = ""
    """A run of the same network trained on permuted labels (of ten classes --label-noise 0.9): a
    column says how alike its maps are."""

    independent: bool = False
    """Also compare maps where one layer alone has random weights, layer by layer."""

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

    from cnnjax.explain import belief, named, page, targets

    _check(config)
    methods = named.read(config.methods)
    cnnjax.devices.backend.start(devices=1)
    trained = load.load_classifier(config.run, base=config.base or None)
    classes = targets.read_classes(config.classes, trained.card["class_names"])
    permuted = _permuted(config, trained)
    # Of shapes alone, before anything is read.
    methods, layers = _fitting(config, methods, trained)
    files_read = [cnnjax.data.read_image(path) for path in config.images]
    prepare, _ = load.preparation(trained, config.prepare)
    given = [prepare(image) for image in files_read]
    titles = [path.name for path in config.images]
    dataset = _dataset(config, methods, trained)
    tested = _test_images(config, dataset)
    if not given:
        given = list(tested.image[: config.count])
        titles = [
            f"test image {number}: {dataset.class_names[label]}"
            for number, label in enumerate(tested.label[: config.count])
        ]
    if dataset is not None:
        methods = named.with_references(methods, _references(dataset, methods, trained))
    stored = np.stack(given)
    out = Path(config.out or Path(config.run) / "explain")
    files.make_directory(out, "the directory of the page", "--out")

    key = jax.random.key(config.seed)
    pictures = _explained(key, trained, methods, layers, stored, titles, classes or config.top)
    complete = [
        belief.completeness(method, trained.model, trained.variables, trained.normalize(stored))
        for method in methods
        if method.name == "integrated_gradients"
    ]
    beliefs, count = [], 0
    if config.check:
        shown = tested.image[: config.check] if len(tested.image) else stored
        count = len(shown)
        beliefs = belief.examine(
            *(key, trained.model, trained.variables, trained.normalize(shown), methods),
            permuted=permuted,
            independent=config.independent,
        )
        print(belief.table(beliefs, count))
        if config.independent:
            print(belief.layer_table(beliefs))
        if count < FEW:
            print(f"{count} of {FEW} images or more: the numbers say little of the methods")
    for each in complete:
        print(each.text)
    page.write_pictures(pictures, out)
    colors = "Red speaks for the class, blue against it; each map has its own scale."
    written = page.write_page(
        out / "index.html",
        pictures,
        heading=f"{Path(config.run).name}: {trained.card['model']}",
        facts=[colors, *(each.text for each in complete)],
        tables=_tables(beliefs, count) if beliefs else [],
    )
    print(f"{len(pictures)} images, {len(methods)} methods, see {written}")


def _tables(beliefs: Any, count: int) -> list[Any]:
    """Returns the tables of the page."""
    from cnnjax.explain import belief, page

    rows = [{"method": each.method, **each.cells(), "verdict": each.verdict} for each in beliefs]
    meaning = f"Over {count} images. {belief.meaning(beliefs)}"
    tables = [page.Table("Can they be believed?", meaning, rows)]
    if by_layer := belief.layer_rows(beliefs):
        tables += [page.Table("Layer by layer", belief.LAYERS_MEANING, by_layer)]
    return tables


def _permuted(config: Config, trained: load.TrainedModel) -> Any:
    """Returns the variables of the run of permuted labels, which must be of the same network."""
    from cnnjax.explain import belief

    if not config.randomized_labels:
        return None
    other = load.load_classifier(config.randomized_labels)
    for name in ("model", "num_outputs", "image_shape"):
        if other.card[name] != trained.card[name]:
            raise UserError(
                f"--randomized-labels {config.randomized_labels} is of another network ({name} "
                f"{other.card[name]}, not {trained.card[name]}): train the same one on permuted "
                "labels, of ten classes by --label-noise 0.9."
            )
    belief.check_same_network(trained.variables, other.variables)
    return other.variables


def _fitting(config: Config, methods: Any, trained: load.TrainedModel) -> tuple[Any, Any]:
    """Returns the methods and layers that the network allows; nothing is computed.

    Of methods that nobody asked for, those that do not fit are left out with a line.
    """
    import jax
    import jax.numpy as jnp

    from cnnjax.explain import named, rectifiers, relevance, taps

    model, variables, name = trained.model, trained.variables, trained.card["model"]
    image = jax.ShapeDtypeStruct((1, *trained.card["image_shape"]), jnp.float32)
    layers = taps.image_layers(model, variables, image, config.layers)
    unfit: dict[str, str] = {}
    for method in methods:
        if method.name in named.OF_RELUS and not rectifiers.has_relus(
            lambda image: model.apply(variables, image, train=False), image
        ):
            unfit[method.text] = f"{name} has no ReLU, whose derivative it changes"
        if own := method.options.get("layer"):
            taps.image_layers(model, variables, image, [own])
        if method.of_layer and not layers:
            unfit[method.text] = f"{name} has no layer whose output is an image"
        if method.name in named.OF_RULES:
            try:
                relevance.check_network(model, variables, image)
            except UserError as error:
                unfit[method.text] = str(error).partition(". ")[0]
    if unfit and config.methods != Config.methods:
        text = "; ".join(f"{method}: {why}" for method, why in unfit.items())
        raise UserError(f"--methods: {text}. Leave it out.")
    for method, why in unfit.items():
        print(f"without {method}: {why}")
    return [method for method in methods if method.text not in unfit], layers


def _check(config: Config) -> None:
    for name, least in (("top", 1), ("count", 1), ("check", 0)):
        if getattr(config, name) < least:
            raise UserError(f"--{name} {getattr(config, name)}: give at least {least}.")


def _dataset(config: Config, methods: Any, trained: load.TrainedModel) -> Any:
    """Returns the run's data; None where nothing needs them, or only the checks of given images."""
    from cnnjax.explain import named
    from cnnjax.run import again

    compared = [method.text for method in methods if method.name in named.OF_REFERENCES]
    if config.images and not config.check and not compared:
        return None
    try:
        dataset = again.data_of_run(Path(config.run), dataset=config.dataset)
    except UserError as error:
        if config.dataset:
            raise
        if compared:
            raise UserError(
                f"{compared[0]} compares with training images: {error} Or leave it out."
            ) from None
        if not config.images:
            raise UserError(f"{error} Or give image files.") from None
        print(f"checks are made on the given images: {error}")
        return None
    if list(dataset.image_shape) != list(trained.card["image_shape"]):
        raise UserError(
            f"{dataset.name} has images of {tuple(dataset.image_shape)}, and {config.run} takes "
            f"{tuple(trained.card['image_shape'])}: name a dataset of such images by --dataset."
        )
    return dataset


def _test_images(config: Config, dataset: Any) -> Any:
    """Returns as many stored test images and labels as are shown or checked."""
    count = max(config.check, 0 if config.images else config.count)
    if dataset is None or not count:
        return cnnjax.data.dataset.Arrays(np.zeros(0, np.uint8), np.zeros(0, np.int32))
    found = cnnjax.data.streamed.first_examples(dataset, "test", count)
    if not len(found.image) and not config.images:
        raise UserError(f"{dataset.name} has no test images: give image files.")
    return found


def _references(dataset: Any, methods: Any, trained: load.TrainedModel) -> Any:
    """Returns training images, as the model expects them, where a method compares with some."""
    from cnnjax.explain import named

    if not any(method.name in named.OF_REFERENCES for method in methods):
        return None
    found = cnnjax.data.streamed.spread_examples(dataset, "train", REFERENCES)
    return trained.normalize(found.image)


def _explained(
    key: Any,
    trained: load.TrainedModel,
    methods: Any,
    layers: Any,
    stored: np.ndarray,
    titles: list[str],
    shown: list[int] | int,
) -> list[Any]:
    """Returns a `page.Picture` for each image, of these classes or of so many likeliest ones."""
    import jax
    import jax.numpy as jnp

    from cnnjax import explain
    from cnnjax.explain.page import Picture

    image, names = trained.normalize(stored), trained.card["class_names"]
    logits = jax.jit(trained.model.apply)(trained.variables, image)
    probabilities = np.asarray(cnnjax.metrics.probabilities(logits))
    order = (-probabilities).argsort(-1, kind="stable")
    if isinstance(shown, int):
        order = order[:, :shown]
    else:
        order = np.broadcast_to(np.array(shown), (len(stored), len(shown)))
    maps: dict[tuple[str, str, int], np.ndarray] = {}
    for method in methods:
        for layer in layers if method.of_layer else [""]:

            def of_classes(
                variables: Any,
                image: Any,
                labels: Any,
                method: Any = method,
                layer: str = layer,
            ) -> Any:
                def of_class(label: Any) -> Any:
                    target = explain.class_score(label)
                    return method(key, trained.model, variables, image, target, layer)

                # One forward pass for all classes, where the method needs no more.
                return jax.vmap(of_class)(labels)

            labels = jnp.asarray(order.T)
            together = np.asarray(jax.jit(of_classes)(trained.variables, image, labels))
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
