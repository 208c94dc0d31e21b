"""Keras 3 for `peers.py`, on JAX or TensorFlow, as its users run it, fed from NumPy arrays."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

from peer_jax import MATMUL_PRECISION
from workloads import (
    LEARNING_RATE,
    MOMENTUM,
    Images,
    Labels,
    Program,
    Run,
    Task,
    standardize,
)


def build(task: Task, image: Images, label: Labels) -> Program:
    """Returns the program of `keras-jax` or `keras-tensorflow`."""
    name = task.contender.removeprefix("keras-")
    os.environ["KERAS_BACKEND"] = name
    import keras

    platform, version = (_set_up_jax if name == "jax" else _set_up_tensorflow)(task)
    if task.precision == "bf16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    keras.utils.set_random_seed(0)
    floats = standardize(image)
    workload = task.workload

    def model() -> Any:
        result = keras_model(workload.model, workload.image_shape, workload.num_classes)
        result.compile(
            optimizer=keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        return result

    size = task.batch_size
    return Program(
        num_parameters=sum(math.prod(weight.shape) for weight in model().trainable_weights),
        platform=platform,
        versions={"keras": keras.__version__, name: version},
        variants={
            "train": {
                "fit": lambda: _whole(model().fit, size, floats, label),
                "train_on_batch": lambda: _by_batch(model().train_on_batch, size, floats, label),
            },
            "infer": {
                "predict": lambda: _whole(model().predict, size, floats),
                "predict_on_batch": lambda: _by_batch(model().predict_on_batch, size, floats),
            },
        },
    )


def _set_up_jax(task: Task) -> tuple[str, str]:
    """Sets precision and caches; returns platform and version."""
    import jax

    if task.device == "gpu":
        jax.config.update("jax_default_matmul_precision", MATMUL_PRECISION[task.precision])
    jax.config.update("jax_enable_compilation_cache", False)
    return jax.devices()[0].platform, jax.__version__


def _set_up_tensorflow(task: Task) -> tuple[str, str]:
    """Sets the precision; returns platform and version."""
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(task.precision == "tf32")
    has_gpu = bool(tf.config.list_physical_devices("GPU"))
    return "gpu" if has_gpu else "cpu", tf.__version__


def _whole(method: Any, batch_size: int, *arrays: Any) -> Run:
    """Steps by `fit` or `predict`: one call for as many steps as there are data."""
    most_steps = len(arrays[0]) // batch_size

    def run(num_steps: int) -> float:
        while num_steps:
            part = min(num_steps, most_steps)
            num_steps -= part
            result = method(
                *(array[: part * batch_size] for array in arrays), batch_size=batch_size, verbose=0
            )
        return float(result.history["loss"][-1]) if hasattr(result, "history") else 0.0

    return run


def _by_batch(method: Any, batch_size: int, *arrays: Any) -> Run:
    """Steps by `train_on_batch` or `predict_on_batch`: one call per step."""
    starts = itertools.cycle(range(0, len(arrays[0]), batch_size))

    def run(num_steps: int) -> float:
        for start in itertools.islice(starts, num_steps):
            result = method(*(array[start : start + batch_size] for array in arrays))
        return float(result) if len(arrays) == 2 else 0.0

    return run


def keras_model(name: str, image_shape: tuple[int, int, int], num_classes: int) -> Any:
    """Returns the network with as many parameters as `cnnjax.models` has.

    Strided convolutions are padded by Keras's own "same", which places the window differently
    from PyTorch's padding but does the same work.
    """
    import keras
    from keras import layers

    def small(x: Any, widths: tuple[int, ...], window: int, dense: tuple[int, ...]) -> Any:
        for width in widths:
            x = layers.MaxPooling2D(2)(layers.Conv2D(width, window, activation="relu")(x))
        x = layers.Flatten()(x)
        for width in dense:
            x = layers.Dense(width, activation="relu")(x)
        return x

    def conv_norm(x: Any, width: int, window: int, stride: int = 1) -> Any:
        x = layers.Conv2D(width, window, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    def block(x: Any, width: int, stride: int, bottleneck: bool) -> Any:
        if bottleneck:
            y = layers.ReLU()(conv_norm(x, width, 1))
            y = layers.ReLU()(conv_norm(y, width, 3, stride))
            y = conv_norm(y, 4 * width, 1)
        else:
            y = layers.ReLU()(conv_norm(x, width, 3, stride))
            y = conv_norm(y, width, 3)
        if x.shape != y.shape:
            x = conv_norm(x, y.shape[-1], 1, stride)
        return layers.ReLU()(layers.Add()([x, y]))

    def resnet(x: Any, stage_sizes: tuple[int, ...], bottleneck: bool, small_images: bool) -> Any:
        x = layers.ReLU()(conv_norm(x, 64, 3 if small_images else 7, 1 if small_images else 2))
        if not small_images:
            x = layers.MaxPooling2D(3, 2, padding="same")(x)
        for stage, depth in enumerate(stage_sizes):
            for index in range(depth):
                x = block(x, 64 * 2**stage, 2 if stage and not index else 1, bottleneck)
        return layers.GlobalAveragePooling2D()(x)

    image = keras.Input(image_shape)
    features = {
        "lenet5": lambda: small(image, (6, 16), 5, (120, 84)),
        "cnn_32_64_dense64": lambda: small(image, (32, 64), 3, (64,)),
        "resnet18": lambda: resnet(image, (2, 2, 2, 2), bottleneck=False, small_images=True),
        "resnet50": lambda: resnet(image, (3, 4, 6, 3), bottleneck=True, small_images=False),
    }[name]()
    return keras.Model(image, layers.Dense(num_classes, dtype="float32")(features))
