"""The Open Inference Protocol, version 2: requests as arrays, and arrays as responses.

Pure functions of bytes, for HTTP: JSON, and JSON followed by binary tensors (the binary tensor data
extension: https://github.com/triton-inference-server/server, protocol/extension_binary_data.md).
The protocol is published at https://github.com/kserve/open-inference-protocol.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnnjax.serve.refusals import Invalid, TooLarge, unknown
from cnnjax.serve.runtime import Runtime

DATATYPES: dict[str, np.dtype] = {"UINT8": np.dtype("<u1"), "FP32": np.dtype("<f4")}
DATATYPE_OF: dict[np.dtype, str] = {np.dtype(np.uint8): "UINT8", np.dtype(np.float32): "FP32"}
INPUT = "image"
OUTPUTS = ("logits", "probabilities", "label", "class_name")
HEADER_LENGTH = "inference-header-content-length"
# Nothing that a client may mean is deeper: data of images are nested four times.
DEEPEST = 16
LARGEST_ID = 256


@dataclasses.dataclass(frozen=True)
class Request:
    """What a client asks for.

    Attributes:
      images: `[images, height, width, channels]`; or None.
      files: contents of image files, where the datatype is BYTES; or None.
      id: by which the client knows the request; empty for none.
      outputs: the names of the tensors asked for, in order, and whether each is sent in binary.
      deadline_secs: after which the answer is of no use; None for no such time.
    """

    images: np.ndarray | None
    files: list[bytes] | None
    id: str
    outputs: tuple[tuple[str, bool], ...]
    deadline_secs: float | None

    @property
    def given(self) -> np.ndarray | list[bytes]:
        """The images, or the contents of image files."""
        return (self.files or []) if self.images is None else self.images


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as a message describes it; `data` is binary, or what JSON or gRPC has listed."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | Sequence[Any]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model has said.

    Attributes:
      model, version: that answered.
      logits: float32 `[images, outputs]`.
      probabilities: float32 `[images, classes]`.
      class_names: one per class.
    """

    model: str
    version: str
    logits: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]

    def output(self, name: str) -> np.ndarray:
        """Returns the array of one of `OUTPUTS`; `class_name` is of Python's strings."""
        if name == "logits":
            return self.logits
        if name == "probabilities":
            return self.probabilities
        label = self.probabilities.argmax(-1).astype(np.int64)
        return label if name == "label" else np.array(self.class_names, object)[label]


def metadata(name: str, versions: Sequence[str], runtime: Runtime) -> dict[str, Any]:
    """Returns the metadata of a model: name, versions, platform, tensors with class names."""
    height, width, channels = runtime.shapes[0]
    several = len(runtime.shapes) > 1
    shape = [-1, -1 if several else height, -1 if several else width, channels]
    classes = len(runtime.class_names)
    outputs = (
        ("logits", "FP32", [-1, runtime.num_logits]),
        ("probabilities", "FP32", [-1, classes]),
        ("label", "INT64", [-1]),
        ("class_name", "BYTES", [-1]),
    )
    datatype = DATATYPE_OF[np.dtype(runtime.dtype)]
    return {
        "name": name,
        "versions": list(versions),
        "platform": f"cnnjax_{runtime.platform}",
        "inputs": [{"name": INPUT, "datatype": datatype, "shape": shape}],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shape}
            for name, datatype, shape in outputs
        ],
    }


def read_json(body: bytes | memoryview) -> dict[str, Any]:
    """Returns the object that JSON text holds.

    Raises:
      Invalid: it is no JSON, too deep, or no object.
    """
    try:
        content = json.loads(bytes(body))
    except RecursionError:
        raise Invalid(f"the JSON is nested more than {DEEPEST} deep.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise Invalid(f"the body is no JSON ({str(error)[:200]}).") from None
    if not isinstance(content, dict):
        raise Invalid(f"the body is a JSON {type(content).__name__}: send an object.")
    return content


def read_request(body: bytes, header_length: str | None, *, largest: int) -> Request:
    """Reads the body of an inference request over HTTP.

    Args:
      body: JSON, or JSON and then binary tensors.
      header_length: the value of `Inference-Header-Content-Length`: bytes of JSON; None for all.
      largest: images in a request.

    Raises:
      Invalid: what is wrong with it.
      TooLarge: too many images.
    """
    view = memoryview(body)
    length = len(view) if header_length is None else _length(header_length, len(view))
    content = read_json(view[:length])
    tensors, at = [], length
    for each in _listed(content, "inputs"):
        tensor, at = _read_tensor(each, view, at)
        tensors.append(tensor)
    if at != len(view):
        raise Invalid(f"{len(view) - at} bytes are left after the tensors: check binary_data_size.")
    parameters = _mapping(content, "parameters")
    is_binary = parameters.get("binary_data_output") is True
    return make_request(
        tensors,
        id=_text(content.get("id", ""), "id"),
        outputs=[_read_output(each, is_binary) for each in _listed(content, "outputs")],
        parameters=parameters,
        is_binary=is_binary,
        largest=largest,
    )


def make_request(
    tensors: Sequence[Tensor],
    *,
    id: str,
    outputs: Sequence[tuple[str, bool]],
    parameters: Mapping[str, Any],
    is_binary: bool,
    largest: int,
) -> Request:
    """Returns the request of these parts; arguments as `Request` and `read_request` have them.

    Raises:
      Invalid, TooLarge, Unknown: what is wrong with it.
    """
    if len(tensors) != 1 or tensors[0].name != INPUT:
        names = ", ".join(each.name[:50] for each in tensors[:5]) or "none"
        raise Invalid(f"the inputs are {names}: give one, called {INPUT!r}.")
    for name, _ in outputs:
        if name not in OUTPUTS:
            raise unknown("output", name, OUTPUTS)
    if len({name for name, _ in outputs}) < len(outputs):
        raise Invalid("an output is asked for twice: name each once.")
    (tensor,) = tensors
    count = tensor.shape[0] if tensor.shape else 0
    if count > largest:
        raise TooLarge(f"{count} images in a request: send at most {largest}.")
    is_file = tensor.datatype == "BYTES"
    return Request(
        images=None if is_file else array_of(tensor),
        files=files_of(tensor) if is_file else None,
        id=id,
        outputs=tuple(outputs) or tuple((name, is_binary) for name in OUTPUTS),
        deadline_secs=_deadline(parameters.get("timeout")),
    )


def array_of(tensor: Tensor) -> np.ndarray:
    """Returns the array of a tensor of images `[images, height, width, channels]`.

    Raises:
      Invalid: its datatype, shape or data are wrong.
    """
    dtype = DATATYPES.get(tensor.datatype)
    if dtype is None:
        choices = ", ".join((*DATATYPES, "BYTES"))
        raise Invalid(f"{INPUT} has datatype {tensor.datatype[:20]!r}: give one of {choices}.")
    shape = tensor.shape
    if len(shape) != 4 or min(shape) < 1:
        raise Invalid(f"{INPUT} has shape {list(shape)}: give [images, height, width, channels].")
    count = math.prod(shape)
    if isinstance(tensor.data, bytes | memoryview):
        if len(tensor.data) != count * dtype.itemsize:
            raise Invalid(
                f"{INPUT} has {len(tensor.data)} bytes, and its shape {list(shape)} takes "
                f"{count * dtype.itemsize}."
            )
        array = np.frombuffer(tensor.data, dtype).reshape(shape)
    else:
        array = _listed_array(tensor.data, dtype, shape, count)
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise Invalid(f"{INPUT} has values that are not numbers (NaN or infinite).")
    return array


def _listed_array(
    data: Sequence[Any], dtype: np.dtype, shape: tuple[int, ...], count: int
) -> np.ndarray:
    """Returns the array of listed numbers, flat or nested as the shape is."""
    try:
        found = np.array(data)
    except (ValueError, OverflowError):
        raise Invalid(f"the data of {INPUT} are no array: nest them evenly, or not.") from None
    if found.dtype.kind not in "uif" or (dtype.kind == "u" and found.dtype.kind == "f"):
        raise Invalid(
            f"the data of {INPUT} are not all {'numbers' if dtype.kind == 'f' else 'integers'}."
        )
    if found.shape not in ((count,), shape):
        raise Invalid(f"{INPUT} has data of shape {list(found.shape)[:8]}, not {list(shape)}.")
    if dtype.kind == "u" and (found.min() < 0 or found.max() > 255):
        raise Invalid(f"{INPUT} has values outside 0 to 255.")
    with np.errstate(over="ignore"):
        return found.astype(dtype).reshape(shape)


def files_of(tensor: Tensor) -> list[bytes]:
    """Returns the elements of a BYTES tensor `[images]`: contents of image files.

    Binary data are, for each element, its length in four bytes (little endian) and its bytes.
    """
    if (
        len(tensor.shape) not in (1, 2)
        or min(tensor.shape) < 1
        or tensor.shape[1:] not in ((), (1,))
    ):
        raise Invalid(f"{INPUT} of BYTES has shape {list(tensor.shape)}: give [images].")
    if isinstance(tensor.data, bytes | memoryview):
        found = _split(tensor.data)
    elif all(isinstance(each, bytes) for each in tensor.data):
        found = [bytes(each) for each in tensor.data]
    else:
        raise Invalid(f"{INPUT} of BYTES is sent as binary data: JSON holds no files.")
    if len(found) != tensor.shape[0]:
        raise Invalid(f"{INPUT} has {len(found)} elements, and its shape says {tensor.shape[0]}.")
    return found


def _split(data: bytes | memoryview) -> list[bytes]:
    found, at = [], 0
    while at < len(data):
        if at + 4 > len(data):
            raise Invalid(f"{INPUT} ends within the length of an element.")
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > len(data):
            raise Invalid(f"{INPUT} ends within an element of {length} bytes.")
        found.append(bytes(data[at : at + length]))
        at += length
    return found


def response(answer: Answer, request: Request) -> tuple[bytes, int | None]:
    """Returns the body of a response, and how many bytes of it are JSON (None: all are).

    Args:
      answer: of the model.
      request: which outputs are sent, and how.
    """
    tensors, binary = [], []
    for name, is_binary in request.outputs:
        array = answer.output(name)
        tensor: dict[str, Any] = {
            "name": name,
            "datatype": datatype_of(array),
            "shape": list(array.shape),
        }
        if is_binary:
            content = raw(array)
            tensor["parameters"] = {"binary_data_size": len(content)}
            binary.append(content)
        else:
            tensor["data"] = array.ravel().tolist()
        tensors.append(tensor)
    said: dict[str, Any] = {"model_name": answer.model, "model_version": answer.version}
    if request.id:
        said["id"] = request.id
    text = json.dumps(said | {"outputs": tensors}, separators=(",", ":")).encode()
    return (b"".join((text, *binary)), len(text)) if binary else (text, None)


def datatype_of(array: np.ndarray) -> str:
    """Returns the protocol's name of an output's type."""
    return {"f": "FP32", "i": "INT64", "O": "BYTES"}[array.dtype.kind]


def raw(array: np.ndarray) -> bytes:
    """Returns an output as binary data, little endian; text with its length before each element."""
    if array.dtype.kind != "O":
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    texts = [text.encode() for text in array]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _length(text: str, whole: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= whole):
        raise Invalid(
            f"Inference-Header-Content-Length is {text[:40]!r}, of a body of {whole} bytes."
        )
    return int(text)


def _listed(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = content.get(name, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise Invalid(f"{name} is no list of objects.")
    if len(found) > len(OUTPUTS):
        raise Invalid(f"{name} has {len(found)} entries: the model has fewer.")
    return found


def _mapping(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name, {})
    if not isinstance(found, dict):
        raise Invalid(f"{name} is no object.")
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or len(value) > LARGEST_ID:
        raise Invalid(f"{name} is no text of at most {LARGEST_ID} characters.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{name} has characters that are no UTF-8.") from None
    return value


def _read_tensor(each: dict[str, Any], view: memoryview, at: int) -> tuple[Tensor, int]:
    """Returns an input, and where the binary data go on behind its own."""
    shape = each.get("shape")
    if not isinstance(shape, list):
        raise Invalid("an input has no shape: give a list of numbers.")
    check_shape(shape)
    size = _mapping(each, "parameters").get("binary_data_size")
    if size is None:
        data = each.get("data")
        if not isinstance(data, list):
            raise Invalid("an input has neither a list of data nor a binary_data_size.")
    else:
        if type(size) is not int or not 0 <= size <= len(view) - at:
            raise Invalid("a binary_data_size does not fit the body.")
        data, at = view[at : at + size], at + size
    name, datatype = (_text(each.get(key), key) for key in ("name", "datatype"))
    return Tensor(name, datatype, tuple(shape), data), at


def check_shape(shape: Sequence[Any]) -> None:
    """Raises `Invalid` for a shape that no tensor of a request has."""
    if len(shape) > 8:
        raise Invalid(f"an input has a shape of {len(shape)} sides: give at most 8.")
    for side in shape:
        if type(side) is not int or side >= 2**31:
            raise Invalid("the shape of an input is no list of whole numbers below 2147483648.")
        if side < 0:
            raise Invalid(
                f"an input has shape {list(shape)[:8]}: in a request each side is a number of 0 or "
                "more; -1 is only what a model's metadata say for any number."
            )


def _read_output(each: dict[str, Any], is_binary: bool) -> tuple[str, bool]:
    parameters = _mapping(each, "parameters")
    if "classification" in parameters:
        raise Invalid("classification is not among the extensions: ask for probabilities.")
    return _text(each.get("name"), "name"), parameters.get("binary_data", is_binary) is True


def _deadline(timeout: Any) -> float | None:
    """Returns the seconds of a timeout in microseconds, as Triton's clients give it; 0 is none."""
    if timeout is None or timeout == 0:
        return None
    if type(timeout) is not int or not 0 <= timeout < 2**63:
        raise Invalid("the parameter timeout is no number of microseconds.")
    return timeout / 1e6
