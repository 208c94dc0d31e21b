"""The protocol's messages for gRPC, built of the description of `inference.proto`.

    messages = load()
    request = messages["ModelInferRequest"](model_name="digits")

They are in a pool of their own: another library in the process may have the same names.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

SERVICE = "inference.GRPCInferenceService"


@functools.cache
def pool() -> Any:
    """Returns the descriptor pool that holds the protocol."""
    from google.protobuf import descriptor_pool

    found = descriptor_pool.DescriptorPool()
    file = importlib.resources.files("cnnjax.serve.rpc") / "inference.binpb"
    found.AddSerializedFile(file.read_bytes())
    return found


@functools.cache
def load() -> dict[str, Any]:
    """Returns the classes of the protocol's messages by name."""
    from google.protobuf import message_factory

    file = pool().FindFileByName("inference.proto")
    return {
        name: message_factory.GetMessageClass(found)
        for name, found in file.message_types_by_name.items()
    }


def methods() -> dict[str, tuple[Any, Any]]:
    """Returns the classes of request and response of each method of the service."""
    service, classes = pool().FindServiceByName(SERVICE), load()
    return {
        method.name: (classes[method.input_type.name], classes[method.output_type.name])
        for method in service.methods
    }


def parameters_of(sent: Any) -> dict[str, Any]:
    """Returns the parameters of a message as Python's values."""
    found = {}
    for name, value in sent.items():
        choice = value.WhichOneof("parameter_choice")
        if choice:
            found[name] = getattr(value, choice)
    return found
