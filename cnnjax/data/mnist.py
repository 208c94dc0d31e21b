"""The MNIST that ships inside the package: the four files as first published.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition",
Proceedings of the IEEE 86(11), 1998. Attribution and license stand next to the files.
"""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import struct

import numpy as np

from cnnjax.data.dataset import Arrays
from cnnjax.errors import UserError

DIRECTORY = pathlib.Path(__file__).parent / "mnist"
CLASS_NAMES = tuple("0123456789")

# SHA-256 of the published files, as TensorFlow Datasets has them registered for mnist 3.0.1.
SHA256 = {
    "train-images-idx3-ubyte.gz": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
    ),
    "train-labels-idx1-ubyte.gz": (
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
    ),
}


def read(directory: str | pathlib.Path = DIRECTORY) -> dict[str, Arrays]:
    """Returns `train` (60,000) and `test` (10,000) as published, in about a second.

    Args:
      directory: holds the four files; the shipped ones by default.

    Raises:
      UserError: when a file is missing or is not, byte for byte, the published one.
    """
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        image = read_idx(read_verified(pathlib.Path(directory), f"{prefix}-images-idx3-ubyte.gz"))
        label = read_idx(read_verified(pathlib.Path(directory), f"{prefix}-labels-idx1-ubyte.gz"))
        splits[split] = Arrays(image[..., None], label.astype(np.int32))
    return splits


def read_verified(directory: pathlib.Path, name: str) -> bytes:
    """Returns the unzipped content of one of the four files once its SHA-256 is found right."""
    path = directory / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read MNIST file {path} ({error.strerror}): install cnnjax again"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UserError(
            f"MNIST file {path} is damaged: expected SHA-256 {SHA256[name]}, found {found}; "
            "install cnnjax again, or restore the file from version control"
        )
    return gzip.decompress(content)


def read_idx(content: bytes) -> np.ndarray:
    """Decodes an IDX file of unsigned bytes into a read-only uint8 array.

    The format is described at http://yann.lecun.com/exdb/mnist/: two zero bytes, the type (8 for
    unsigned bytes), the number of dimensions, each dimension as a big-endian int32, the values.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise UserError(f"not an IDX file of unsigned bytes: it starts with {content[:4]!r}")
    num_dimensions = content[3]
    start = 4 + 4 * num_dimensions
    if len(content) < start:
        raise UserError(f"IDX file of {len(content)} bytes ends inside its header")
    shape = struct.unpack(f">{num_dimensions}i", content[4:start])
    if len(content) - start != np.prod(shape):
        raise UserError(
            f"IDX file announces shape {list(shape)} but holds {len(content) - start} values"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
