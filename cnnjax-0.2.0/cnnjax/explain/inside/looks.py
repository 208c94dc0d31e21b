"""All that is looked at in one network, for its page; each part is written as a picture as well."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn

from cnnjax import metrics, models, plots
from cnnjax.data.batches import evaluation_batches
from cnnjax.explain import taps
from cnnjax.explain.inside import (
    embedding,
    filters,
    influence_of_pixels,
    maximal,
    maximization,
    neurons,
    passes,
    views,
)
from cnnjax.explain.inside.receptive import ReceptiveField
from cnnjax.explain.markup import png
from cnnjax.plots.fields import FieldPicture

ARRANGEMENTS = {"PCA": "pca", "t-SNE": "tsne"}


@dataclasses.dataclass(frozen=True)
class Options:
    """How much is looked at: see the flags of `cnnjax show-network`."""

    channels: int = 8
    maps: int = 32
    top: int = 8
    steps: int = 128
    parametrization: str = "fourier"
    total_variation: float = 1.0
    batch_size: int = 100
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained classifier, and what of it is looked at.

    Attributes:
      model, variables: a Linen module with the contract of `cnnjax.models`, and its variables.
      image_shape: `(height, width, channels)`.
      normalize: of stored images, or those in [0, 1], to what the model expects.
      outputs: the name of each of its logits.
      class_names: its classes; one more than outputs if there is a single logit.
      layers: names -> shapes of the activations of one image, in the order of computation.
      fields: name -> receptive field, of these layers at least.
      out: directory of the pictures.
      options: how much is looked at.
      channel_order: "BGR" for weights that expect blue first.
    """

    model: nn.Module
    variables: Any
    image_shape: tuple[int, int, int]
    normalize: Callable[[Any], jax.Array]
    outputs: tuple[str, ...]
    class_names: tuple[str, ...]
    layers: dict[str, tuple[int, ...]]
    fields: dict[str, ReceptiveField]
    out: Path
    options: Options
    channel_order: str = "RGB"

    def write(self, name: str, pixels: np.ndarray) -> bytes:
        """Writes a picture, and returns the PNG."""
        content = png(np.ascontiguousarray(pixels))
        (self.out / f"{name.replace('/', '-')}.png").write_bytes(content)
        return content


class Found(NamedTuple):
    """What one pass over images found.

    Attributes:
      best: layer -> the images that its channels respond to most.
      statistics: layer -> what its neurons do.
    """

    best: dict[str, maximal.Maximal]
    statistics: dict[str, neurons.Neurons]


def search(network: Network, images: np.ndarray, *, stages: bool = True) -> Found:
    """Passes over images once, for all layers.

    Args:
      network: its layers are looked at.
      images: uint8 `[images, height, width, channels]`, as stored.
      stages: whether all stages are looked at as well, those that are no images too.
    """
    more = models.stage_names(network.model, network.image_shape) if stages else []
    names = list(dict.fromkeys([*more, *network.layers]))
    began = time.perf_counter()
    best, kept = passes.fold(
        network.model,
        network.variables,
        _batches(network, images),
        names,
        [maximal.highest(network.options.top), neurons.moments()],
        normalize=network.normalize,
    )
    found = Found(best, neurons.finished({name: kept[name] for name in names}))
    _tell(began, f"{len(images)} images searched, {len(names)} layers")
    return found


def layers(
    network: Network, shown: np.ndarray, names: Sequence[str], found: Found, searched: np.ndarray
) -> list[views.Layer]:
    """Returns what is shown of each layer.

    Args:
      network: its layers.
      shown: uint8 images whose feature maps are drawn.
      names: of these images.
      found: of `search`.
      searched: the images that were searched.
    """
    began = time.perf_counter()
    image = network.normalize(shown)
    tap = jax.jit(lambda variables: taps.tap(network.model, variables, image, network.layers)[1])
    maps = tap(network.variables)
    every = list(taps.layer_shapes(network.model, network.variables, image[:1]))
    kernels = filters.kernels(network.model, network.variables, network.image_shape)
    fields = _effective_fields(network, searched[: network.options.batch_size])
    _tell(began, "feature maps, filters, receptive fields")
    result = []
    for name, shape in network.layers.items():
        statistics = found.statistics[name]
        most = views.most_varying(statistics.deviation, network.options.maps)
        pictures = [
            (
                f"{len(most)} feature maps of {title}",
                network.write(
                    f"maps-{name}-{number}", views.feature_sheet(activation, most, columns=8)
                ),
            )
            for number, (title, activation) in enumerate(
                zip(names, np.asarray(maps[name], np.float32), strict=True)
            )
        ]
        side, field = fields[name]
        pictures.append((f"effective receptive field of the middle of {name}", field))
        pictures += _filters(network, kernels, filters.behind(kernels, every, name))
        facts = [
            f"output {' x '.join(map(str, shape[1:]))}",
            f"receptive field: {network.fields[name]}",
            f"effective receptive field: as many pixels as a square of {side:.1f} x {side:.1f}",
            ", ".join(f"{key} {text}" for key, text in statistics.cells().items()),
        ]
        channels = _channels(network, name, found, searched)
        result.append(views.Layer(name, facts, pictures, channels))
    return result


def made_for_classes(network: Network, numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    """Returns (name, PNG) of an image made for each of these outputs; none if without steps."""
    if not network.options.steps:
        return []
    began = time.perf_counter()
    images = _maximized(network, numbers, "")
    network.write("classes", views.sheet(images, 5))
    _tell(began, "images made for classes")
    return [
        (network.outputs[number], png(image)) for number, image in zip(numbers, images, strict=True)
    ]


def points(
    network: Network, images: np.ndarray, label: np.ndarray, class_names: Sequence[str]
) -> views.Points | None:
    """Returns images as points by what enters the network's head, and what is answered of them.

    Args:
      network: a classifier.
      images: uint8, as stored.
      label: of each, an index of `class_names`.
      class_names: of the dataset; where they are not the network's, no answer is wrong.

    Returns:
      The points; None, which is said, if there are too few images or no finite features.
    """
    if len(images) < embedding.FEWEST:
        print(f"no points: {len(images)} test images, {embedding.FEWEST} are needed")
        return None
    began = time.perf_counter()
    features = embedding.pooled_features(
        network.model,
        network.variables,
        _batches(network, images),
        normalize=network.normalize,
    )
    if not np.isfinite(features).all():
        print("no points: what enters the head is not finite")
        return None
    maps = {
        title: embedding.embed(features, method, seed=network.options.seed)
        for title, method in ARRANGEMENTS.items()
    }
    known = tuple(class_names) == network.class_names
    predicted = _predicted(network, images) if known else None
    wrong = None if predicted is None else predicted != label
    path = network.out / "points.png"
    plots.point_maps(maps, label, class_names, path, wrong=wrong)
    _tell(began, f"{len(images)} test images as points")
    return views.Points(maps, label, predicted, class_names, views.thumbnails(images))


def _tell(began: float, what: str) -> None:
    print(f"{what:44} {time.perf_counter() - began:6.1f} s", flush=True)


def _batches(network: Network, images: np.ndarray) -> Any:
    return evaluation_batches({"image": images}, min(network.options.batch_size, len(images)))


def _predicted(network: Network, images: np.ndarray) -> np.ndarray:
    @jax.jit
    def answer(variables: Any, image: jax.Array) -> jax.Array:
        logits: Any = network.model.apply(variables, network.normalize(image), train=False)
        return metrics.predicted_label(logits)

    return np.concatenate(
        [
            np.asarray(answer(network.variables, batch["image"]))[np.asarray(batch["mask"])]
            for batch in _batches(network, images)
        ]
    )


def _effective_fields(network: Network, images: np.ndarray) -> dict[str, tuple[float, bytes]]:
    """Returns side and picture of the effective receptive field of each layer's middle."""
    image = network.normalize(images)
    sides, drawn = {}, {}
    for name, (_, height, width, _) in network.layers.items():

        @jax.jit
        def field(variables: Any, name: str = name) -> jax.Array:
            return influence_of_pixels.effective_field(network.model, variables, image, name)

        effective = np.asarray(field(network.variables))
        sides[name] = influence_of_pixels.effective_size(effective)
        box = network.fields[name].box(height // 2, width // 2, network.image_shape)
        drawn[name] = FieldPicture(effective, box, f"effective {sides[name]:.1f} pixels")
    plots.effective_fields(drawn, network.out / "fields.png")
    result = {}
    for name in network.layers:
        path = network.out / f"field-{name.replace('/', '-')}.png"
        plots.effective_fields({name: drawn[name]}, path)
        result[name] = sides[name], path.read_bytes()
    return result


def _filters(
    network: Network, kernels: Mapping[str, filters.Kernel], layer: str
) -> list[tuple[str, bytes]]:
    if not layer:
        return []
    values, groups, reads_image = kernels[layer]
    kernel = np.asarray(values)
    in_color = reads_image and kernel.shape[2] == 3
    if in_color and network.channel_order == "BGR":
        kernel = kernel[:, :, ::-1]
    path = network.out / f"filters-{layer.replace('/', '-')}.png"
    plots.filters(kernel, path, groups=groups, in_color=in_color)
    kind = "depthwise, " if groups > 1 and kernel.shape[2] == 1 else ""
    caption = f"filters of {layer} ({kind}{' x '.join(map(str, kernel.shape))})"
    return [(caption, path.read_bytes())]


def _maximized(network: Network, numbers: Sequence[int], layer: str) -> np.ndarray:
    """Returns uint8 images `[numbers, height, width, channels]` made for channels or classes."""
    images, _ = maximization.maximize(
        jax.random.key(network.options.seed),
        network.model,
        network.variables,
        network.image_shape,
        numbers,
        layer=layer,
        normalize=network.normalize,
        parametrization=network.options.parametrization,
        steps=network.options.steps,
        total_variation=network.options.total_variation,
    )
    return np.round(255 * np.asarray(images)).astype(np.uint8)


def _channels(
    network: Network, layer: str, found: Found, searched: np.ndarray
) -> list[views.Channel]:
    """Returns the channels of a layer that vary most."""
    statistics, best = found.statistics[layer], found.best[layer]
    chosen = views.most_varying(statistics.deviation, network.options.channels)
    made: dict[int, np.ndarray] = {}
    if network.options.steps:
        began = time.perf_counter()
        images = _maximized(network, chosen, layer)
        made = dict(zip(chosen, images, strict=True))
        _tell(began, f"images made for channels of {layer}")
    width, field = network.layers[layer][2], network.fields[layer]
    crops = [views.crops(searched, best, channel, width, field) for channel in chosen]
    network.write(f"channels-{layer}", views.channel_sheet(crops, list(made.values())))
    result = []
    for channel, seen in zip(chosen, crops, strict=True):
        text = (
            f"largest {float(best.value[channel, 0]):.3g}, mean {statistics.mean[channel]:.3g}, "
            f"above 0 at {statistics.active[channel]:.1%}"
        )
        content = png(views.sheet(seen, network.options.top))
        own = png(made[channel]) if channel in made else None
        result.append(views.Channel(channel, text, content, own))
    return result
