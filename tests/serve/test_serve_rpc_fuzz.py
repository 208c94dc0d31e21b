"""Malformed gRPC calls, of mutated fields and bytes: none is the server's fault or stays."""

import asyncio
import random

import pytest

from cnnjax.serve.measures import resident_bytes
from tests.serve.made import images
from tests.serve.served import Served

grpc = pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")

from cnnjax.serve.rpc import messages, service  # noqa: E402

VALID = images(1, 2)
NAMES = ("digits", "digit", "", "../x", "a" * 300, "ü", "\0")
NUMBERS = (-(2**63), -1, 0, 1, 2, 4, 255, 256, 2**31, 2**63 - 1)
BYTES = (b"", b"\0", b"\xff" * 8, VALID.tobytes(), b"\1\0\0\0a", b"\x89PNG\r\n\x1a\n")
# What the server itself did wrong; UNIMPLEMENTED would be a method that it has lost.
FAULTS = {"INTERNAL", "UNKNOWN", "UNIMPLEMENTED", "DATA_LOSS", "UNAVAILABLE"}


def valid_request():
    tensor = {"name": "image", "datatype": "UINT8", "shape": VALID.shape}
    return messages.load()["ModelInferRequest"](
        model_name="digits", id="1", inputs=[tensor], raw_input_contents=[VALID.tobytes()]
    )


def drawn(draw, field):
    """Returns a value of a scalar field's type, or None for a message's."""
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        return draw.choice(BYTES if field.type == field.TYPE_BYTES else NAMES)
    if kind == field.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return draw.choice((0.0, -1.0, float("nan"), float("inf"), 1e30))
    if kind == field.CPPTYPE_MESSAGE:
        return None
    least = -(2**31) if kind == field.CPPTYPE_INT32 else -(2**63)
    is_signed = kind in (field.CPPTYPE_INT32, field.CPPTYPE_INT64)
    bits = 32 if kind in (field.CPPTYPE_INT32, field.CPPTYPE_UINT32) else 64
    top = 2 ** (bits - is_signed) - 1
    return min(top, max(least if is_signed else 0, draw.choice(NUMBERS)))


def mutate(draw, message):
    """Changes one field of a message or of one within it, by its description."""
    if not message.DESCRIPTOR.fields:
        return
    field = draw.choice(message.DESCRIPTOR.fields)
    value = drawn(draw, field)
    if field.message_type and field.message_type.GetOptions().map_entry:
        key = draw.choice(("timeout", "binary_data", "x"))
        entry = field.message_type.fields_by_name["value"]
        if entry.message_type:
            mutate(draw, getattr(message, field.name)[key])
    elif field.is_repeated:
        found = getattr(message, field.name)
        if found and draw.random() < 0.3:
            found.pop()
        elif field.message_type:
            mutate(draw, draw.choice(found) if found and draw.random() < 0.7 else found.add())
        else:
            found.append(value)
    elif field.message_type:
        mutate(draw, getattr(message, field.name))
    else:
        setattr(message, field.name, value)


def made_calls(seed, count):
    """Returns so many calls (method, bytes): valid ones with fields or bytes changed, and noise."""
    draw, methods = random.Random(seed), messages.methods()
    calls = []
    for _ in range(count):
        # An unload may succeed, after which the model rightly is UNAVAILABLE.
        others = sorted(methods.keys() - {"RepositoryModelUnload"})
        name = "ModelInfer" if draw.random() < 0.8 else draw.choice(others)
        message = valid_request() if name == "ModelInfer" else methods[name][0]()
        for _ in range(draw.randint(1, 4)):
            mutate(draw, message)
        content = bytearray(message.SerializeToString())
        if draw.random() < 0.5:
            for _ in range(draw.randint(1, 4)):
                at = draw.randrange(len(content) + 1)
                content[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        calls.append((name, bytes(content)))
    return calls


def codes_of(served, rounds, check_memory=lambda number: None):
    """Sends rounds of calls as they are, eight at a time, and counts the codes of the answers."""
    served.opened = iter(lambda: served.made[0].runtime, None)
    served.write = lambda text: None
    codes = {}

    async def main():
        await served.repository.start()
        server, port = await service.start(served.repository, "127.0.0.1:0")
        room = asyncio.Semaphore(8)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:

            async def send(name, content):
                async with room:
                    call = channel.unary_unary(f"/{messages.SERVICE}/{name}")
                    try:
                        await call(content, timeout=20)
                        code = "OK"
                    except grpc.aio.AioRpcError as error:
                        code = error.code().name
                        assert "\n" not in error.details(), (name, content, error.details())
                assert code not in FAULTS, (name, content, code)
                codes[code] = codes.get(code, 0) + 1

            for number, calls in enumerate(rounds):
                await asyncio.gather(*(send(*call) for call in calls))
                check_memory(number)
        await server.stop(1)
        await served.repository.close()

    asyncio.run(main())
    return codes


@pytest.mark.slow
def test_malformed_calls_are_never_the_servers_fault_and_leave_memory_as_it_was(monkeypatch):
    calls, resident = made_calls(0, 700), []
    codes = codes_of(
        Served(monkeypatch), [calls] * 3, lambda number: resident.append(resident_bytes())
    )
    # Most are refused, and some are still right.
    assert sum(codes.values()) == 2100 and codes["OK"] > 100
    assert {"INVALID_ARGUMENT", "NOT_FOUND"} <= codes.keys()
    assert resident[2] < resident[0] * 1.02 + 2e6, resident
