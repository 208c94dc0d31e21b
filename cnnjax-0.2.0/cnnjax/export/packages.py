"""What each format needs installed, told before any work begins."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator

from cnnjax.errors import UserError

# Of each format: what writes it, and what runs it.
WRITERS = {
    "onnx": ("onnx",),
    "stablehlo": ("flatbuffers",),
    "saved_model": ("tensorflow",),
    "tflite": ("tensorflow",),
    "web": ("onnx",),
}
RUNTIMES = {
    "onnx": ("onnxruntime",),
    "stablehlo": ("flatbuffers",),
    "saved_model": ("tensorflow",),
    "tflite": ("ai_edge_litert",),
    "web": ("onnxruntime",),
}


def missing(kind: str, *, running: bool) -> list[str]:
    """Returns the packages that a format needs and that are not installed."""
    names = (RUNTIMES if running else WRITERS)[kind]
    return [name for name in names if importlib.util.find_spec(name) is None]


def require(kind: str, *, running: bool = False) -> None:
    """Raises a UserError that names what is not installed and how it is.

    Args:
      kind: of the format.
      running: whether a file is run, rather than written.
    """
    if absent := missing(kind, running=running):
        names = ", ".join(name.replace("_", "-") for name in absent)
        purpose = "run" if running else "write"
        remedy = " (--check 0 does without)" if running else ""
        raise UserError(
            f"to {purpose} {kind} the package {names} is needed{remedy}: "
            "pip install 'cnnjax[export]'."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what C++ libraries write to standard error of themselves from the user.

    Errors are exceptions, and are raised as they are.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
