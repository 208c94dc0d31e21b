"""Ask a server from Python, by HTTP: tensors in binary, image files, rollouts.

    client = Client("http://127.0.0.1:8080")
    client.predict("digits", "digit.png").class_names          # ['7', '2', '9']
    client.infer("digits", images)["probabilities"]            # uint8 [batch, 28, 28, 1]

    async with AsyncClient("http://127.0.0.1:8080") as client:
        await client.predict("digits", "digit.png")

What the server is too busy for is tried again after the seconds that it asks for, as is a
connection that broke, until the timeout: asking twice changes nothing, but for loads and rollbacks,
which are sent once.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from cnnjax.errors import UserError
from cnnjax.paths import expand

HEADER_LENGTH = "Inference-Header-Content-Length"
DTYPES: dict[str, np.dtype] = {
    "FP32": np.dtype("<f4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("u1"),
}
DATATYPES: dict[np.dtype, str] = {np.dtype("u1"): "UINT8", np.dtype("f4"): "FP32"}
# A server that is busy or not there yet; the protocol's requests may be sent again.
AGAIN = (429, 503)
# A load compiles every batch size, in all workers.
LOAD_SECS = 600.0
Image = str | os.PathLike | bytes


class ServeError(UserError):
    """What a server refused: its text, and `status` of HTTP (0: it was not reached)."""

    def __init__(self, text: str, status: int) -> None:
        """Args: the server's text and status."""
        super().__init__(text)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, the likeliest first.

    Attributes:
      model, version: that answered.
      request_id: by which the server's log has it.
      labels, class_names, probabilities: of each class.
    """

    model: str
    version: str
    request_id: str
    labels: list[int]
    class_names: list[str]
    probabilities: list[float]


@dataclasses.dataclass(frozen=True)
class Call:
    """A request, what becomes of the response's body and headers, and how it is asked.

    Attributes:
      repeats: whether it may be asked again.
      secs: that it may take; None for the client's timeout.
    """

    method: str
    path: str
    read: Callable[[bytes, Any], Any]
    body: bytes = b""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    repeats: bool = True
    secs: float | None = None


def infer_call(
    model: str,
    images: np.ndarray,
    version: str,
    outputs: Sequence[str],
    deadline_secs: float | None,
) -> Call:
    """Returns the request for a model's outputs; arguments as of `Client.infer`.

    Raises:
      UserError: the images are no array of images.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype not in DATATYPES:
        raise UserError(
            f"images of {images.dtype} {list(images.shape)}: give uint8 or float32 [batch, height, "
            "width, channels]."
        )
    content = np.ascontiguousarray(images).tobytes()
    tensor = {
        "name": "image",
        "shape": list(images.shape),
        "datatype": DATATYPES[images.dtype],
        "parameters": {"binary_data_size": len(content)},
    }
    parameters: dict[str, Any] = {"binary_data_output": True}
    if deadline_secs is not None:
        parameters["timeout"] = round(deadline_secs * 1e6)
    asked = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json.dumps({"inputs": [tensor], "outputs": asked, "parameters": parameters}).encode()
    headers = {HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
    return Call("POST", f"/v2{_model(model, version)}/infer", read_outputs, head + content, headers)


def read_outputs(body: bytes, headers: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a response to an inference request; of strings for BYTES."""
    at = int(headers.get(HEADER_LENGTH, len(body)))
    found = {}
    for each in json.loads(body[:at])["outputs"]:
        size = each.get("parameters", {}).get("binary_data_size")
        if size is None:
            array = np.array(each["data"], DTYPES.get(each["datatype"], np.dtype(object)))
        else:
            content, at = body[at : at + size], at + size
            if each["datatype"] == "BYTES":
                array = np.array(_strings(content), object)
            else:
                array = np.frombuffer(content, DTYPES[each["datatype"]])
        found[each["name"]] = array.reshape(each["shape"])
    return found


def predict_call(model: str, image: Image, version: str, top: int) -> Call:
    """Returns the request for an image file's classes.

    Raises:
      UserError: there is no such file.
    """
    if not isinstance(image, bytes):
        file = Path(expand(image))
        if not file.is_file():
            raise UserError(f"there is no image file {image}.")
        image = file.read_bytes()
    headers = {"Content-Type": "application/octet-stream"}
    path = f"/v1{_model(model, version)}:predict?top={top}"
    return Call("POST", path, read_prediction, image, headers)


def read_prediction(body: bytes, headers: Any) -> Prediction:
    """Returns the prediction that a response holds."""
    said = json.loads(body)
    columns = {
        name: [each[key] for each in said["classes"]]
        for name, key in (
            ("labels", "label"),
            ("class_names", "class_name"),
            ("probabilities", "probability"),
        )
    }
    return Prediction(said["model"], said["version"], said["request_id"], **columns)


def json_call(method: str, path: str, content: Any = None) -> Call:
    """Returns a request whose response is JSON."""
    body = b"" if content is None else json.dumps(content).encode()
    headers = {"Content-Type": "application/json"} if body else {}
    return Call(method, path, lambda answer, _: json.loads(answer), body, headers)


def _model(name: str, version: str) -> str:
    from urllib.parse import quote

    where = f"/models/{quote(name, safe='')}"
    return f"{where}/versions/{quote(version, safe='')}" if version else where


def _strings(content: bytes) -> list[str]:
    found, at = [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<I", content, at)
        found.append(content[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return found


def _settings(address: str, key: str, timeout_secs: float, options: dict[str, Any]) -> dict:
    if not address.startswith(("http://", "https://")):
        raise UserError(f"the address {address!r} is no URL: give one, as http://127.0.0.1:8080.")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"base_url": address.rstrip("/"), "headers": headers, "timeout": timeout_secs, **options}


def _outcome(call: Call, response: Any) -> Any:
    """Returns what a response says.

    Raises:
      ServeError: the server's refusal.
    """
    if response.status_code < 400:
        return call.read(response.content, response.headers)
    try:
        text = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        text = response.text[:200] or response.reason_phrase
    raise ServeError(f"{response.status_code}: {text}", response.status_code)


class _Tries:
    """A request as often as it is sent; `pause` is until the next time, None for the last."""

    def __init__(self, call: Call, timeout_secs: float, is_probe: bool) -> None:
        self.call, self.is_probe = call, is_probe
        self.pause: float | None = None
        self.request: dict[str, Any] = {
            "method": call.method,
            "url": call.path,
            "headers": call.headers,
            "content": call.body,
        }
        if call.secs is not None:
            self.request["timeout"] = call.secs
        self._end, self._attempt = time.monotonic() + timeout_secs, 0
        self._last: Any = None

    def note(self, answer: Any) -> None:
        """Takes a response, or what was raised instead of one."""
        self._last = answer
        status = getattr(answer, "status_code", 0)
        # What the server asks for, or 0.05, 0.1, 0.2 ...
        asked = getattr(answer, "headers", {}).get("Retry-After", "")
        pause = float(asked) if asked.isdecimal() else min(0.05 * 2**self._attempt, 2.0)
        is_over = status not in (0, *AGAIN) or time.monotonic() + pause > self._end
        once = self.is_probe or not self.call.repeats
        self.pause = None if once or is_over else pause
        self._attempt += 1

    def outcome(self) -> Any:
        """Returns what the last response says; raises a ServeError for a refusal, or for none."""
        if self.is_probe:
            return getattr(self._last, "status_code", 0) == 200
        if isinstance(self._last, Exception):
            text = f"no answer to {self.call.path}: {self._last or repr(self._last)}"
            raise ServeError(text, 0) from None
        return _outcome(self.call, self._last)


class _Requests:
    """The requests, as both clients have them; `_ask` is theirs."""

    def infer(
        self,
        model: str,
        images: np.ndarray,
        *,
        version: str = "",
        outputs: Sequence[str] = (),
        deadline_secs: float | None = None,
    ) -> Any:
        """Returns the outputs of a model by name: logits, probabilities, label, class_name.

        Args:
          model: its name.
          images: uint8 or float32 `[batch, height, width, channels]`, as the model takes them.
          version: of the model; by default the server chooses.
          outputs: which; all by default.
          deadline_secs: after which the server gives up.

        Raises:
          ServeError: the server refuses, or is not reached.
        """
        return self._ask(infer_call(model, images, version, outputs, deadline_secs))

    def predict(self, model: str, image: Image, *, version: str = "", top: int = 3) -> Any:
        """Returns the `Prediction` of an image file: its path, or its bytes. Raises as `infer`."""
        return self._ask(predict_call(model, image, version, top))

    def is_ready(self) -> Any:
        """Returns whether the server, with all its models, is there and ready."""
        return self._ask(json_call("GET", "/v2/health/ready"), is_probe=True)

    def metadata(self, model: str, *, version: str = "") -> Any:
        """Returns a model's name, versions, platform, inputs and outputs."""
        return self._ask(json_call("GET", f"/v2{_model(model, version)}"))

    def models(self) -> Any:
        """Returns every version of every model, with its state."""
        return self._ask(json_call("POST", "/v2/repository/index"))

    def status(self, model: str) -> Any:
        """Returns a model's versions, how its traffic is divided, and how its shadow compares."""
        return self._ask(json_call("GET", f"/v1{_model(model, '')}"))

    def load(self, model: str) -> Any:
        """Loads a model anew from where it comes from; the old one answers until then."""
        call = json_call("POST", f"/v2/repository{_model(model, '')}/load")
        return self._ask(dataclasses.replace(call, repeats=False, secs=LOAD_SECS))

    def unload(self, model: str) -> Any:
        """Stops answering for a model."""
        return self._ask(json_call("POST", f"/v2/repository{_model(model, '')}/unload"))

    def rollout(self, model: str, weights: dict[str, float], *, shadow: str = "") -> Any:
        """Divides a model's traffic: a weight for each version, and perhaps a shadow."""
        content = {"weights": weights, "shadow": shadow}
        return self._ask(json_call("POST", f"/v1{_model(model, '')}:rollout", content))

    def rollback(self, model: str) -> Any:
        """Divides a model's traffic as before the last change."""
        call = json_call("POST", f"/v1{_model(model, '')}:rollback")
        return self._ask(dataclasses.replace(call, repeats=False))

    def _ask(self, call: Call, *, is_probe: bool = False) -> Any:
        raise NotImplementedError


class Client(_Requests):
    """A client that waits for each answer; safe to use from several threads."""

    def __init__(
        self, address: str, *, key: str = "", timeout_secs: float = 30.0, **options: Any
    ) -> None:
        """Args: the server's URL, an API key or token, seconds for an answer, options of httpx."""
        import httpx

        self._http = httpx.Client(**_settings(address, key, timeout_secs, options))
        self._timeout_secs, self._errors = timeout_secs, httpx.TransportError

    def _ask(self, call: Call, *, is_probe: bool = False) -> Any:
        tries = _Tries(call, self._timeout_secs, is_probe)
        while True:
            try:
                tries.note(self._http.request(**tries.request))
            except self._errors as error:
                tries.note(error)
            if tries.pause is None:
                return tries.outcome()
            time.sleep(tries.pause)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """Returns the client itself."""
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        self.close()


class AsyncClient(_Requests):
    """A client whose methods are awaited."""

    def __init__(
        self, address: str, *, key: str = "", timeout_secs: float = 30.0, **options: Any
    ) -> None:
        """Args: as of `Client`."""
        import httpx

        self._http = httpx.AsyncClient(**_settings(address, key, timeout_secs, options))
        self._timeout_secs, self._errors = timeout_secs, httpx.TransportError

    async def _ask(self, call: Call, *, is_probe: bool = False) -> Any:
        tries = _Tries(call, self._timeout_secs, is_probe)
        while True:
            try:
                tries.note(await self._http.request(**tries.request))
            except self._errors as error:
                tries.note(error)
            if tries.pause is None:
                return tries.outcome()
            await asyncio.sleep(tries.pause)

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        """Returns the client itself."""
        return self

    async def __aexit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connections."""
        await self.close()
