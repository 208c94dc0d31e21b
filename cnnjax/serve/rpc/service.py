"""The protocol over gRPC, by grpc.aio: the same models, batches and limits as over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

import cnnjax
from cnnjax.errors import UserError
from cnnjax.serve import protocol
from cnnjax.serve.ask import ask
from cnnjax.serve.guard.rpc import server_options
from cnnjax.serve.http.asgi import request_id_of
from cnnjax.serve.http.web import EXTENSIONS, Bounds, model_metadata
from cnnjax.serve.logs import log
from cnnjax.serve.measures import Measures
from cnnjax.serve.refusals import Invalid, Refused
from cnnjax.serve.repository import Repository
from cnnjax.serve.rpc.messages import SERVICE, load, methods, parameters_of

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclasses.dataclass
class Call:
    """What is known of a call: its id, and what the log and its span have of it."""

    request_id: str
    logged: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Damaged:
    """Bytes that are no message: what is wrong with them."""

    text: str


Handler = Callable[[Any, Any, Call], Awaitable[Any]]


async def start(
    repository: Repository,
    address: str,
    *,
    interceptors: Sequence[Any] = (),
    bounds: Bounds | None = None,
    credentials: Any = None,
    shares_port: bool = False,
    traced: Callable | None = None,
) -> tuple[Any, int]:
    """Starts a server, and returns it with the port that it listens at.

    Args:
      repository: of models.
      address: `HOST:PORT`; port 0 for any that is free.
      interceptors: of grpc.aio.
      bounds: as for HTTP.
      credentials: of `grpc.ssl_server_credentials`; None for a port without TLS.
      shares_port: whether other processes listen at the same port, as workers do.
      traced: a context manager around each call, see `traces.Tracing.rpc`.

    Raises:
      UserError: the port cannot be used.
    """
    bounds = bounds or Bounds()
    options = [
        *server_options(),
        ("grpc.max_receive_message_length", bounds.body_bytes),
        ("grpc.so_reuseport", int(shares_port)),
    ]
    server = grpc.aio.server(interceptors=list(interceptors), options=options)
    server.add_generic_rpc_handlers((handler(repository, bounds, traced),))
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise UserError(f"cannot listen at {address} for gRPC; choose another --grpc-port.")
    await server.start()
    return server, port


def handler(repository: Repository, bounds: Bounds, traced: Callable | None = None) -> Any:
    """Returns gRPC's generic handler of the service."""
    service = Service(repository, bounds)
    named: dict[str, Handler] = {
        "ServerLive": service.server_live,
        "ServerReady": service.server_ready,
        "ModelReady": service.model_ready,
        "ServerMetadata": service.server_metadata,
        "ModelMetadata": service.model_metadata,
        "ModelInfer": service.model_infer,
        "RepositoryIndex": service.repository_index,
        "RepositoryModelLoad": service.repository_model_load,
        "RepositoryModelUnload": service.repository_model_unload,
    }
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            recorded(named[name], name, repository, traced),
            request_deserializer=functools.partial(read_message, sent),
            response_serializer=answered.SerializeToString,
        )
        for name, (sent, answered) in methods().items()
    }
    return grpc.method_handlers_generic_handler(SERVICE, handlers)


def read_message(kind: Any, content: bytes) -> Any:
    """Returns the message of a kind that bytes hold, or `Damaged`.

    What raises here would be an error of the server's to gRPC, and would be in no log.
    """
    from google.protobuf.message import DecodeError

    try:
        return kind.FromString(content)
    except DecodeError as error:
        return Damaged(f"the message cannot be read: {' '.join(str(error).split())[:200]}.")


def recorded(
    function: Handler, name: str, repository: Repository, traced: Callable | None = None
) -> Any:
    """Returns a method that is counted, timed, logged and traced, and refuses by gRPC's codes."""

    async def method(request: Any, context: Any) -> Any:
        sent = {key: value for key, value in context.invocation_metadata() or ()}
        name_of = getattr(request, "model_name", "") or getattr(request, "name", "")
        logged = {"model": name_of} if name_of else {}
        call = Call(request_id_of(sent.get("x-request-id")), logged)
        if traced is None:
            return await answer(request, context, call, {})
        with traced(name, sent) as about:
            return await answer(request, context, call, about)

    async def answer(request: Any, context: Any, call: Call, about: dict[str, Any]) -> Any:
        began, status = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            if isinstance(request, Damaged):
                raise Invalid(request.text)
            response = await function(request, context, call)
            status = grpc.StatusCode.OK
            await context.send_initial_metadata((("x-request-id", call.request_id),))
            return response
        except Refused as error:
            repository.measures.refused.labels(error.reason).inc()
            status = CODES.get(error.status, grpc.StatusCode.INTERNAL)
            trailing = [("x-request-id", call.request_id)]
            if error.retry_after is not None:
                trailing.append(("retry-after", str(max(1, math.ceil(error.retry_after)))))
            await context.abort(status, error.text, tuple(trailing))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError):
                raise
            status = grpc.StatusCode.INTERNAL
            log("error", request_id=call.request_id, error=repr(error))
            await context.abort(status, "the server failed: its log has the request's id.")
        finally:
            secs = time.perf_counter() - began
            about |= {"request.id": call.request_id, **call.logged}
            about["rpc.grpc.status_code"] = status.value[0]
            _record(repository.measures, name, status.name, secs, context.peer(), call)

    return method


def _record(
    measures: Measures, name: str, status: str, secs: float, client: str, call: Call
) -> None:
    """Counts, times and logs a call that is over."""
    measures.requests.labels("grpc", name, status).inc()
    measures.latency.labels("grpc", name).observe(secs)
    if name in ("ServerLive", "ServerReady") and status == "OK":
        return
    log(
        "request",
        request_id=call.request_id,
        client=client,
        method=name,
        status=status,
        ms=round(secs * 1e3, 3),
        **call.logged,
    )


class Service:
    """The methods: each takes a message, gRPC's context and what is known of the call."""

    def __init__(self, repository: Repository, bounds: Bounds) -> None:
        """Args: the models, and what a request may cost."""
        self.repository, self.bounds, self.messages = repository, bounds, load()

    async def server_live(self, request: Any, context: Any, call: Call) -> Any:
        """Whether the server answers."""
        return self.messages["ServerLiveResponse"](live=True)

    async def server_ready(self, request: Any, context: Any, call: Call) -> Any:
        """Whether every model is warm, and the server is not stopping."""
        return self.messages["ServerReadyResponse"](ready=self.repository.ready)

    async def model_ready(self, request: Any, context: Any, call: Call) -> Any:
        """Whether a model answers."""
        is_ready = self.repository.is_ready(request.name, request.version)
        return self.messages["ModelReadyResponse"](ready=is_ready)

    async def server_metadata(self, request: Any, context: Any, call: Call) -> Any:
        """The name, version and extensions of the server."""
        return self.messages["ServerMetadataResponse"](
            name="cnnjax", version=cnnjax.__version__, extensions=EXTENSIONS
        )

    async def model_metadata(self, request: Any, context: Any, call: Call) -> Any:
        """The versions and tensors of a model."""
        said = model_metadata(self.repository, request.name, request.version)
        return self.messages["ModelMetadataResponse"](**said)

    async def model_infer(self, request: Any, context: Any, call: Call) -> Any:
        """The model's answer to a tensor of images."""
        asked = read_request(request, largest=self.bounds.images)
        _, answer = await ask(
            self.repository,
            request.model_name,
            asked.given,
            version=request.model_version,
            request_id=call.request_id,
            deadline_secs=self._deadline(asked, context),
            most_pixels=self.bounds.pixels,
            note=call.logged.update,
        )
        return response(answer, asked, is_raw=bool(request.raw_input_contents))

    async def repository_index(self, request: Any, context: Any, call: Call) -> Any:
        """Every version of every model, with its state."""
        rows = self.repository.index(only_ready=request.ready)
        return self.messages["RepositoryIndexResponse"](models=rows)

    async def repository_model_load(self, request: Any, context: Any, call: Call) -> Any:
        """Loads a model anew from where it comes from."""
        name = request.second or request.first
        await self.repository.change("load", name)
        return self.messages["RepositoryModelLoadResponse"](model_name=name, isLoaded=True)

    async def repository_model_unload(self, request: Any, context: Any, call: Call) -> Any:
        """Stops answering for a model."""
        name = request.second or request.first
        await self.repository.change("unload", name)
        return self.messages["RepositoryModelUnloadResponse"](model_name=name, isUnloaded=True)

    def _deadline(self, asked: protocol.Request, context: Any) -> float:
        """Returns the seconds that are left: the least of the client's, gRPC's and the server's."""
        left = context.time_remaining()
        limits = [asked.deadline_secs or self.bounds.deadline_secs]
        return min([*limits, left] if left is not None else limits)


def read_request(request: Any, *, largest: int) -> protocol.Request:
    """Returns what a ModelInferRequest asks for; errors as of `protocol.make_request`."""
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise Invalid(f"{len(raw)} raw contents for {len(request.inputs)} inputs.")
    tensors = []
    for place, sent in enumerate(request.inputs):
        data: Any = raw[place] if raw else _contents(sent)
        shape = tuple(sent.shape)
        protocol.check_shape(shape)
        tensors.append(protocol.Tensor(sent.name, sent.datatype, shape, data))
    return protocol.make_request(
        tensors,
        id=request.id,
        outputs=[(each.name, True) for each in request.outputs],
        parameters=parameters_of(request.parameters),
        is_binary=bool(raw),
        largest=largest,
    )


def _contents(sent: Any) -> list[Any]:
    """Returns the listed contents of an input."""
    fields = {"UINT8": "uint_contents", "FP32": "fp32_contents", "BYTES": "bytes_contents"}
    return list(getattr(sent.contents, fields.get(sent.datatype, "uint_contents")))


def response(answer: protocol.Answer, asked: protocol.Request, *, is_raw: bool) -> Any:
    """Returns the ModelInferResponse of an answer.

    Args:
      answer: of the model.
      asked: which outputs are sent.
      is_raw: whether they are sent as bytes, as the request's were, or listed.
    """
    message = load()["ModelInferResponse"](
        model_name=answer.model, model_version=answer.version, id=asked.id
    )
    for name, _ in asked.outputs:
        array = answer.output(name)
        tensor = message.outputs.add(
            name=name, datatype=protocol.datatype_of(array), shape=array.shape
        )
        if is_raw:
            message.raw_output_contents.append(protocol.raw(array))
        elif array.dtype.kind == "O":
            tensor.contents.bytes_contents.extend(text.encode() for text in array)
        elif array.dtype.kind == "i":
            tensor.contents.int64_contents.extend(array.ravel().tolist())
        else:
            tensor.contents.fp32_contents.extend(array.ravel().tolist())
    return message
