"""What wrappers put around the names of weights: a prefix of all of them, and counters.

`torch.compile` writes `_orig_mod.`, DataParallel and averaged models `module.`, and a program whose
network is one attribute of another module that attribute's name: `model.`, `net.`, `backbone.`.
They nest. No list of them is kept: a prefix is what stands before the names that the model needs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np

from cnnjax.errors import UserError

MOST_NAMED = 3


def common_prefix(names: Collection[str], needed: Collection[str], separator: str = ".") -> str:
    """Returns what to remove from the beginning of `names` so that the `needed` ones are there.

    A prefix ends with `separator`. It is taken where all needed names follow it, or most of them
    and all names have it; "" where the names fit as they are, or no prefix makes them fit.

    Raises:
      UserError: all needed names follow each of several prefixes.
    """
    needed = set(needed)
    found = Counter({"": len(needed.intersection(names))})
    for name in names:
        parts = name.split(separator)
        for first in range(1, len(parts)):
            if separator.join(parts[first:]) in needed:
                found[separator.join(parts[:first]) + separator] += 1
    if found[""] == len(needed):
        return ""
    whole = [prefix for prefix, count in found.items() if count == len(needed)]
    if len(whole) > 1:
        raise UserError(
            f"all names follow each of the prefixes {' and '.join(whole)}, so it holds several "
            "networks: leave out all but one, such as by --ignore "
            f"'{whole[-1].replace('.', r'[.]')}.*'."
        )
    prefix, count = max(found.items(), key=lambda item: (item[1], -len(item[0])))
    everywhere = all(name.startswith(prefix) for name in names)
    if whole or (everywhere and 2 * count > len(needed) and count > found[""]):
        return prefix
    return ""


def without_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Returns the arrays under their names without the prefix; names without it stay."""
    renamed = {name.removeprefix(prefix): array for name, array in arrays.items()}
    if len(renamed) < len(arrays):
        twice = next(
            name for name in arrays if name.startswith(prefix) and name[len(prefix) :] in arrays
        )
        raise UserError(
            f"{twice} and {twice.removeprefix(prefix)} would have one name without the prefix "
            f"{prefix}: leave one of them out by --ignore."
        )
    return renamed


def is_counter(array: np.ndarray) -> bool:
    """Whether an array counts something, such as batches or averaged models: weights are floats."""
    return array.ndim == 0 and array.dtype.kind in "iu"


def listed(names: Collection[str]) -> str:
    """Returns some of the names' last parts in words, such as `num_batches_tracked (20 times)`."""
    counted = Counter(name.rpartition(".")[2] for name in names)
    texts = [f"{name} ({count} times)" if count > 1 else name for name, count in counted.items()]
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return ", ".join(texts[:MOST_NAMED]) + more
