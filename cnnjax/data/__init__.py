"""Datasets as NumPy arrays, batches as pure functions of (seed, step), augmentation per image.

Nothing is imported before it is used: `import cnnjax.data` costs nothing, `load("mnist")` needs
NumPy alone, `pipelines` and `augment` import JAX, and TensorFlow is imported by the functions that
read tfds datasets or stream, with every accelerator hidden from it.
"""

import importlib
from typing import Any

_MODULE_OF = {
    "apply_per_image": "augment",
    "compose": "augment",
    "normalise": "augment",
    "random_affine": "augment",
    "random_flip": "augment",
    "make_augment": "policy",
    "make_filter": "filters",
    "Arrays": "dataset",
    "Dataset": "dataset",
    "few_labels": "few",
    "stand_in": "made",
    "load": "sources",
    "gather": "pipelines",
    "evaluation_batches": "pipelines",
    "Pipeline": "pipelines",
    "ResidentPipeline": "pipelines",
    "StreamingPipeline": "streaming",
    "stream_arrays": "streaming",
    "stream_tfds": "streaming",
    "stream_tfds_evaluation": "streaming",
    "StreamedDataset": "streamed",
    "first_examples": "streamed",
    "open_dataset": "streamed",
    "shorten": "streamed",
    "split_batches": "streamed",
    "split_size": "streamed",
    "training_pipeline": "streamed",
    "digit_from_image": "image_files",
    "image_to_shape": "image_files",
    "read_image": "image_files",
}
_MODULES = (
    "augment",
    "automatic",
    "colour",
    "corrupt",
    "dataset",
    "decoding",
    "few",
    "filters",
    "folder",
    "image_files",
    "made",
    "mix",
    "mnist",
    "pipelines",
    "policy",
    "sources",
    "streamed",
    "streaming",
    "tfds_source",
    "tfds_splits",
)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_MODULES, *_MODULE_OF]
