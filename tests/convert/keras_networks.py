"""Writes networks of keras.applications with drawn weights, and what they compute; run by tests.

    python keras_networks.py DIRECTORY RESNET50:64 MOBILENET:64 ...

For each network, at that image size and 10 classes: `NAME.weights.h5`, `NAME.keras` and `NAME.npz`
with `image` (uint8, before Keras's `preprocess_input`), `logits` and the outputs of the layers
named behind the size. The directory holds `NAME.back.weights.h5`, whose weights are loaded then:
`NAME.back.npz` is what they compute. They are put into an archive on the pattern of `NAME.keras`,
too: what Keras loads from there must compute the same.
"""

import os
import sys
import zlib
from pathlib import Path

os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
import numpy as np
import tensorflow as tf

tf.config.set_visible_devices([], "GPU")
import keras  # noqa: E402

from cnnjax import convert  # noqa: E402


def main(directory: Path, *networks: str) -> None:
    for network in networks:
        name, size, *layers = network.split(":")
        shape = (int(size), int(size), 3)
        model = getattr(keras.applications, name)(
            weights=None, input_shape=shape, classes=10, classifier_activation=None
        )
        for layer in model.layers:
            draw(layer)
        model.save_weights(directory / f"{name}.weights.h5")
        model.save(directory / f"{name}.keras")
        if name == "MobileNetV2":
            model.save(directory / f"{name}.h5")
        write(directory / f"{name}.npz", model, shape, layers)
        back = directory / f"{name}.back.weights.h5"
        model.load_weights(back)
        write(directory / f"{name}.back.npz", model, shape, layers)
        # A weights file names the models within ConvNeXt by number, its archive by name.
        if name.startswith("ConvNeXt"):
            continue
        archive = directory / f"{name}.back.keras"
        convert.write(archive, convert.read(back), like=directory / f"{name}.keras")
        loaded = keras.models.load_model(archive)
        image = prepared(name, np.load(directory / f"{name}.back.npz")["image"])
        np.testing.assert_array_equal(loaded(image, training=False), model(image, training=False))


def prepared(name: str, image: np.ndarray) -> np.ndarray:
    """Images as the network takes them, by the `preprocess_input` of its own module."""
    module = sys.modules[getattr(keras.applications, name).__module__]
    return np.asarray(module.preprocess_input(image.astype(np.float32)))


def draw(layer: keras.layers.Layer) -> None:
    """Weights that keep the signal's size, and statistics and biases that are not the usual."""
    for part in getattr(layer, "layers", ()):
        draw(part)
    if getattr(layer, "layers", ()) or isinstance(layer, keras.layers.Normalization):
        return
    for number, variable in enumerate(layer.weights):
        if not np.issubdtype(np.dtype(variable.dtype), np.floating):
            continue
        generator = np.random.default_rng([zlib.crc32(layer.name.encode()), number])
        shape = tuple(variable.shape)
        if len(shape) > 1:
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            fan_in = np.prod(shape[:2] if depthwise else shape[:-1])
            value = generator.normal(0, np.sqrt(2 / fan_in), shape)
        elif variable.name in ("gamma", "moving_variance"):
            value = generator.uniform(0.5, 1.5, shape)
        else:
            value = generator.normal(0, 0.1, shape)
        variable.assign(value.astype(np.float32))


def write(path: Path, model: keras.Model, shape: tuple[int, ...], layers: list[str]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    outputs = [model.output, *(model.get_layer(layer).output for layer in layers)]
    taken = prepared(path.name.partition(".")[0], image)
    logits, *stages = keras.Model(model.input, outputs)(taken, training=False)
    kept = {layer: np.asarray(stage) for layer, stage in zip(layers, stages, strict=True)}
    np.savez(path, image=image, logits=np.asarray(logits), **kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
