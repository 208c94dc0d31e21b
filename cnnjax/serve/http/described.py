"""The messages of the protocol as OpenAPI describes them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from cnnjax.serve.models import NAME

SUMMARY = (
    "Trained networks behind the Open Inference Protocol, version 2, and a simpler way for image "
    "files. Errors are JSON with the key `error`."
)


class Error(BaseModel):
    """Why there is no answer."""

    error: str


class Live(BaseModel):
    """The server's liveness."""

    live: bool


class Ready(BaseModel):
    """The server's readiness."""

    ready: bool


class ModelReady(BaseModel):
    """A model's readiness."""

    name: str
    ready: bool


class Server(BaseModel):
    """The server's metadata."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """A tensor of a model."""

    name: str
    datatype: str
    shape: list[int]


class Metadata(BaseModel):
    """A model's metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class State(BaseModel):
    """A version of a model, and its state."""

    name: str
    version: str
    state: str
    reason: str


Index = list[State]


class Nothing(BaseModel):
    """Nothing but that it was done."""


class RequestInput(BaseModel):
    """A tensor that is sent."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    data: list[Any] | None = None


class RequestOutput(BaseModel):
    """A tensor that is asked for."""

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class InferenceRequest(BaseModel):
    """Images, as one tensor."""

    id: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    inputs: list[RequestInput]
    outputs: list[RequestOutput] = Field(default_factory=list)


class ResponseOutput(BaseModel):
    """A tensor of an answer."""

    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class Answer(BaseModel):
    """A model's answer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[ResponseOutput]


class Class(BaseModel):
    """A class and its probability."""

    label: int
    class_name: str
    probability: float


class Prediction(BaseModel):
    """The likeliest classes of one image."""

    model: str
    version: str
    request_id: str
    classes: list[Class]


class Explanation(Prediction):
    """The likeliest classes, and where one of them is seen (a PNG picture in base64)."""

    label: int
    image: str
    heat: str


class RolloutRequest(BaseModel):
    """How the traffic of a model is divided: a fraction for each version, and a shadow."""

    weights: dict[str, float]
    shadow: str = ""


class ModelStatus(BaseModel):
    """A model's versions, how its traffic is divided, and how its shadow compares."""

    name: str
    class_names: list[str]
    versions: dict[str, Any]
    weights: dict[str, float]
    shadow: str
    compared: dict[str, Any]


class Models(BaseModel):
    """The status of every model."""

    models: list[ModelStatus]


class Drift(BaseModel):
    """How far each version's newest images are from its reference."""

    name: str
    versions: dict[str, Any]


class Labeled(BaseModel):
    """What the labels that came back say of a version."""

    model: str
    version: str
    labels: int
    accuracy: float
    calibration_error: float


def readiness(model: Any) -> dict[int | str, dict[str, Any]]:
    """Returns the responses of a probe: 503 has its own message, too."""
    told = {"model": model, "description": "Not ready."}
    return answers(model) | {503: told}


def answers(model: Any) -> dict[int | str, dict[str, Any]]:
    """Returns the responses of a route for OpenAPI: its own, and errors."""
    refusals = {
        400: "The request is wrong.",
        404: "There is no such model, version or tensor.",
        409: "It cannot be done as things stand.",
        408: "The body came too slowly.",
        413: "Too many bytes, pixels or images.",
        429: "The queue is full: try again after the seconds of Retry-After.",
        503: "The model is not loaded, or the server is stopping.",
        504: "The deadline passed.",
    }
    errors: dict[int | str, dict[str, Any]]
    errors = {status: {"model": Error, "description": text} for status, text in refusals.items()}
    return {200: {"model": model}, **errors}


def body(content: dict[str, Any]) -> dict[str, Any]:
    """Returns what OpenAPI says of a request's body: its content types and their schemas."""
    return {"requestBody": {"required": True, "content": content}}


def with_requests(schema: dict[str, Any]) -> dict[str, Any]:
    """Returns an OpenAPI document with the messages that clients send, and what names are."""
    from pydantic.json_schema import models_json_schema

    _, found = models_json_schema(
        [(InferenceRequest, "validation"), (RolloutRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    schema["components"].setdefault("schemas", {}).update(found["$defs"])
    for operations in schema["paths"].values():
        for operation in operations.values():
            # What FastAPI refuses has the status 400 here.
            operation["responses"].pop("422", None)
            for each in operation.get("parameters", ()):
                if each["name"] in ("name", "version"):
                    each["schema"]["pattern"] = f"^{NAME.pattern}$"
    return schema


BINARY = {"schema": {"type": "string", "format": "binary"}}
INFER = body(
    {
        "application/json": {"schema": {"$ref": "#/components/schemas/InferenceRequest"}},
        "application/octet-stream": BINARY,
    }
)
IMAGE = body(
    {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"image": {"type": "string", "format": "binary"}},
                "required": ["image"],
            }
        },
        "image/*": BINARY,
        "application/octet-stream": BINARY,
    }
)
ROLLOUT = body({"application/json": {"schema": {"$ref": "#/components/schemas/RolloutRequest"}}})
