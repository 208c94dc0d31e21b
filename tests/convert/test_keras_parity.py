"""keras.applications and our networks compute the same from the same weights, in both directions.

Keras runs beside, in a process of its own: it comes with TensorFlow.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import jax
import numpy as np
import pytest

from cnnjax import convert, models, trees
from cnnjax.augment import normalize
from cnnjax.convert import names_keras
from cnnjax.convert.preprocessing import moments_within, preprocessing
from cnnjax.models.summary import abstract_variables

SCRIPT = Path(__file__).parent / "keras_networks.py"


class Network(NamedTuple):
    """A network of keras.applications, ours, an image size, and what we compare beside logits."""

    keras: str
    ours: str
    size: int
    # Keras's layer -> our stage or layer.
    layers: dict[str, str]
    arguments: dict

    def prepare(self, image, arrays):
        """Images as the card has them: of the network's name and, where it has some, its file."""
        found = preprocessing(self.ours, "keras") | moments_within(arrays)
        order = found.get("channel_order", "RGB")
        return normalize(image, found["mean"], found["std"], channel_order=order)


def network(keras, ours, size, stages=(), layers=None, **arguments):
    # The default arguments, for the names of stages alone.
    names = names_keras.names_for(models.create(ours, num_classes=10))
    found = {names.stages[stage]: stage for stage in stages}
    return Network(keras, ours, size, found | (layers or {}), arguments)


DOWN = {"convnext_tiny_downsampling_block_0": "downsample1/conv"}
SMALL = [network("MobileNetV2", "mobilenet_v2", 64, ("stage2", "stage4"))]
SMALL += [network("ResNet50", "resnet50", 64, ("stage1", "stage3"))]
LARGE = [
    network("VGG16", "vgg16", 32, ("stage1", "stage5"), stem="cifar"),
    network("ResNet50V2", "resnet50_v2", 64, ("stage1", "stage4")),
    network("DenseNet121", "densenet121", 64, ("stage1", "stage4")),
    network("InceptionV3", "inception_v3", 96, ("stage3", "stage5")),
    network("MobileNet", "mobilenet_v1", 64, ("stage2", "stage4")),
    network("MobileNetV3Small", "mobilenet_v3_small", 96, ("stage1", "stage3")),
    network("EfficientNetB0", "efficientnet_b0", 75, ("stage2", "stage6")),
    network("ConvNeXtTiny", "convnext_tiny", 64, layers=DOWN),
]
# Made of the same blocks as another one.
ALIKE = [
    network("VGG19", "vgg19", 32, ("stage3",), stem="cifar"),
    network("ResNet101", "resnet101", 64, ("stage2",)),
    network("MobileNetV3Large", "mobilenet_v3_large", 64, ("stage2", "stage5")),
    network("EfficientNetB1", "efficientnet_b1", 64, ("stage3",)),
]


def create(network):
    needed = names_keras.names_for(models.create(network.ours, num_classes=10)).requires
    return models.create(network.ours, num_classes=10, **needed, **network.arguments)


def run_keras(directory, networks):
    arguments = [":".join([n.keras, str(n.size), *n.layers]) for n in networks]
    command = [sys.executable, SCRIPT, directory, *arguments]
    subprocess.run(command, check=True, timeout=600, capture_output=True)


def relative_error(ours, theirs):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def draw(model, shape):
    """Variables of numbers of our own, of which no leaf is as it is initialized."""
    generator = np.random.default_rng(1)
    leaves = trees.named_leaves(abstract_variables(model, shape))
    drawn = {}
    for path, leaf in leaves.items():
        if path.endswith(("/scale", "/var")):
            value = generator.uniform(0.5, 1.5, leaf.shape)
        else:
            fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
            value = generator.normal(0, np.sqrt(2 / fan_in), leaf.shape)
        drawn[path] = value.astype(np.float32)
    return flax.traverse_util.unflatten_dict(drawn, sep="/")


def both_directions(directory, networks):
    back = {}
    for network in networks:
        model, shape = create(network), (network.size, network.size, 3)
        back[network.keras] = draw(model, shape)
        arrays = convert.from_cnnjax(back[network.keras], model, shape, framework="keras")
        convert.write(directory / f"{network.keras}.back.weights.h5", arrays)
    run_keras(directory, networks)
    for network in networks:
        model, shape = create(network), (network.size, network.size, 3)
        arrays = convert.read(directory / f"{network.keras}.weights.h5")
        archived, converted = (
            convert.to_cnnjax(found, model, shape, framework="keras")
            for found in (convert.read(directory / f"{network.keras}.keras"), arrays)
        )
        jax.tree.map(np.testing.assert_array_equal, archived, converted)
        compute = jax.jit(partial(outputs, model, list(network.layers.values())))
        for variables, end in ((converted, ".npz"), (back[network.keras], ".back.npz")):
            reference = np.load(directory / f"{network.keras}{end}")
            found = compute(variables, network.prepare(reference["image"], arrays))
            assert relative_error(found["logits"], reference["logits"]) < 1e-4, network
            for theirs, ours in network.layers.items():
                assert relative_error(found[ours], reference[theirs]) < 1e-4, (network, theirs)


def outputs(model, names, variables, image):
    logits = model.apply(variables, image, train=False)
    return {"logits": logits, **models.features(model, variables, image, names)}


@pytest.mark.slow
def test_small_networks_compute_the_same(tmp_path):
    both_directions(tmp_path, SMALL)
    # The format of Keras 2, which Keras 3 writes for whole models.
    old, new = (convert.read(tmp_path / f"MobileNetV2{s}") for s in (".h5", ".weights.h5"))
    assert old.keys() == new.keys()
    for name, array in new.items():
        np.testing.assert_array_equal(old[name], array)


@pytest.mark.slow
@pytest.mark.parametrize(
    "networks",
    [
        LARGE[:4],
        pytest.param(LARGE[4:], marks=pytest.mark.exhaustive),
        pytest.param(ALIKE, marks=pytest.mark.exhaustive),
    ],
    ids=["first", "second", "alike"],
)
def test_networks_compute_the_same(tmp_path, networks):
    both_directions(tmp_path, networks)
