"""Datasets as NumPy arrays, batches as pure functions of (seed, step).

Nothing is imported before it is used: `import cnnjax.data` costs nothing, `load("mnist")` needs
NumPy alone, `pipelines` and `augment` import JAX, and TensorFlow is imported by the functions that
read tfds datasets or stream, with every accelerator hidden from it.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "batches",
        "dataset",
        "decoding",
        "directories",
        "fields",
        "file_stream",
        "folder",
        "held_out",
        "image_files",
        "mnist",
        "on_disk",
        "pipelines",
        "scenes",
        "sources",
        "streamed",
        "streaming",
        "synthetic",
        "tfds_fields",
        "tfds_source",
        "tfds_splits",
    ),
    {
        "dataset": (
            "ArrayDataset",
            "Arrays",
            "Dataset",
            "few_labels",
        ),
        "batches": ("evaluation_batches",),
        "mnist": ("digit_from_image",),
        "synthetic": ("stand_in",),
        "tfds_fields": ("load_features",),
        "scenes": ("digit_scenes", "scene_splits"),
        "sources": ("load",),
        "pipelines": (
            "gather",
            "Pipeline",
            "ResidentPipeline",
        ),
        "streaming": (
            "StreamingPipeline",
            "stream_arrays",
            "stream_tfds",
            "stream_tfds_evaluation",
        ),
        "streamed": (
            "StreamedDataset",
            "example_inputs",
            "first_examples",
            "open_dataset",
            "shorten",
            "split_batches",
            "split_size",
            "training_pipeline",
        ),
        "image_files": (
            "image_to_shape",
            "read_image",
        ),
    },
)

if TYPE_CHECKING:
    from cnnjax.data import batches as batches
    from cnnjax.data import dataset as dataset
    from cnnjax.data import decoding as decoding
    from cnnjax.data import directories as directories
    from cnnjax.data import fields as fields
    from cnnjax.data import file_stream as file_stream
    from cnnjax.data import folder as folder
    from cnnjax.data import held_out as held_out
    from cnnjax.data import image_files as image_files
    from cnnjax.data import mnist as mnist
    from cnnjax.data import on_disk as on_disk
    from cnnjax.data import pipelines as pipelines
    from cnnjax.data import scenes as scenes
    from cnnjax.data import sources as sources
    from cnnjax.data import streamed as streamed
    from cnnjax.data import streaming as streaming
    from cnnjax.data import synthetic as synthetic
    from cnnjax.data import tfds_fields as tfds_fields
    from cnnjax.data import tfds_source as tfds_source
    from cnnjax.data import tfds_splits as tfds_splits
    from cnnjax.data.batches import evaluation_batches as evaluation_batches
    from cnnjax.data.dataset import ArrayDataset as ArrayDataset
    from cnnjax.data.dataset import Arrays as Arrays
    from cnnjax.data.dataset import Dataset as Dataset
    from cnnjax.data.dataset import few_labels as few_labels
    from cnnjax.data.image_files import image_to_shape as image_to_shape
    from cnnjax.data.image_files import read_image as read_image
    from cnnjax.data.mnist import digit_from_image as digit_from_image
    from cnnjax.data.pipelines import Pipeline as Pipeline
    from cnnjax.data.pipelines import ResidentPipeline as ResidentPipeline
    from cnnjax.data.pipelines import gather as gather
    from cnnjax.data.scenes import digit_scenes as digit_scenes
    from cnnjax.data.scenes import scene_splits as scene_splits
    from cnnjax.data.sources import load as load
    from cnnjax.data.streamed import StreamedDataset as StreamedDataset
    from cnnjax.data.streamed import example_inputs as example_inputs
    from cnnjax.data.streamed import first_examples as first_examples
    from cnnjax.data.streamed import open_dataset as open_dataset
    from cnnjax.data.streamed import shorten as shorten
    from cnnjax.data.streamed import split_batches as split_batches
    from cnnjax.data.streamed import split_size as split_size
    from cnnjax.data.streamed import training_pipeline as training_pipeline
    from cnnjax.data.streaming import StreamingPipeline as StreamingPipeline
    from cnnjax.data.streaming import stream_arrays as stream_arrays
    from cnnjax.data.streaming import stream_tfds as stream_tfds
    from cnnjax.data.streaming import stream_tfds_evaluation as stream_tfds_evaluation
    from cnnjax.data.synthetic import stand_in as stand_in
    from cnnjax.data.tfds_fields import load_features as load_features
