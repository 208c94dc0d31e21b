"""Variables of a checkpoint that TensorFlow wrote, read by TensorFlow."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from cnnjax.errors import UserError

# What an optimizer and averages keep besides each variable, and what is no number.
SLOTS = re.compile(
    r".*/(Momentum|RMSProp(_1)?|Adam(_1)?|Adagrad|Ftrl(_1)?|ExponentialMovingAverage"
    r"|\.OPTIMIZER_SLOT/.*)|(save_counter|.*optimizer.*)/.*|.*global_step|_CHECKPOINTABLE_.*"
)
# The magic number at the end of LevelDB's tables.
TABLE_END = 0xDB4775248B80FB57.to_bytes(8, "little")
VARIABLE = "/.ATTRIBUTES/VARIABLE_VALUE"


def prefix_of(path: Path) -> Path | None:
    """Returns the prefix of a checkpoint's files; None for other paths.

    Args:
      path: the prefix, or one of the files, or the folder that holds them.

    Raises:
      UserError: a folder holds several.
    """
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) > 1:
            names = ", ".join(each.name for each in found)
            raise UserError(f"{path} holds several checkpoints ({names}): name one of them.")
        path = found[0] if found else path
    prefix = re.sub(r"\.(index|data-\d{5}-of-\d{5}|meta)$", "", str(path))
    return Path(prefix) if os.path.isfile(f"{prefix}.index") else None


def is_first_format(path: Path) -> bool:
    """Whether a file is a checkpoint in TensorFlow's first format, a table of its own."""
    with path.open("rb") as file:
        file.seek(max(os.path.getsize(path) - len(TABLE_END), 0))
        return file.read() == TABLE_END


def read_variables(prefix: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns `{name: array}` of a checkpoint's variables, and the names of those left out.

    Args:
      prefix: of its files, such as `model.ckpt` of `model.ckpt.index`; or a file in TensorFlow's
        first format.

    Raises:
      UserError: it is damaged.
    """
    # Of its start TensorFlow says much that helps nobody here.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(str(prefix))
        types = reader.get_variable_to_dtype_map()
        left_out = sorted(
            name for name, dtype in types.items() if SLOTS.fullmatch(name) or dtype == tf.string
        )
        arrays = {
            name.removesuffix(VARIABLE): np.asarray(reader.get_tensor(name))
            for name in sorted(types.keys() - set(left_out))
        }
    except (tf.errors.OpError, RuntimeError, ValueError, TypeError) as error:
        text = str(error).partition("\n")[0]
        raise UserError(
            f"TensorFlow cannot read it ({text}): it is damaged or cut short."
        ) from None
    return arrays, left_out
