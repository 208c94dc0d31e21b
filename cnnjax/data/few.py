"""A few labeled examples of each class, as a training split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cnnjax.data.dataset import Arrays, Dataset
from cnnjax.errors import UserError
from cnnjax.rng import numpy_generator


def few_labels(dataset: object, per_class: int, *, seed: int) -> Dataset:
    """Returns the dataset with only `per_class` training examples of each class.

    Validation, test and the moments of the images stay as they are: images are not what is scarce.
    The examples of a class are the first of a shuffling that depends on the seed and the class
    alone, so that those of a smaller number are among those of a larger one.

    Args:
      dataset: in memory.
      per_class: how many examples of each class.
      seed: chooses them.

    Raises:
      UserError: `per_class` is not positive, a class has fewer examples, or the dataset is not in
        memory.
    """
    if not isinstance(dataset, Dataset):
        raise UserError(
            "labels are counted in memory, but this dataset is streamed from disk: use the "
            "pipeline 'resident'."
        )
    if per_class < 1:
        raise UserError(f"{per_class} labels per class: use at least 1.")
    chosen = []
    for label, name in enumerate(dataset.class_names):
        rows = np.flatnonzero(dataset.train.label == label)
        if per_class > len(rows):
            raise UserError(
                f"{per_class} labels per class asked for, but class {name} of {dataset.name} has "
                f"{len(rows)} training images: use at most as many as the smallest class has."
            )
        order = numpy_generator(seed, "few labels", label).permutation(len(rows))
        chosen.append(rows[order[:per_class]])
    # In the order in which they were: shuffling is the pipeline's.
    rows = np.sort(np.concatenate(chosen))
    return replace(dataset, train=Arrays(dataset.train.image[rows], dataset.train.label[rows]))
