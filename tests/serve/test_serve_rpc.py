"""The gRPC side: the published messages, the same answers as over HTTP, refusals by their codes."""

import asyncio
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.serve.made import images
from tests.serve.served import Served, png

grpc = pytest.importorskip("grpc")
pytest.importorskip("google.protobuf")

from cnnjax.serve.rpc import messages  # noqa: E402

ROOT = Path(__file__).parents[2]


def called(served, *calls, interceptors=(), traced=None):
    """Returns what calls (method, message) are answered: a message, or (code, text, metadata)."""
    from cnnjax.serve.rpc import service

    async def main():
        await served.repository.start()
        server, port = await service.start(
            served.repository, "127.0.0.1:0", interceptors=interceptors, traced=traced
        )
        found = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method, message, *options in calls:
                sent, answered = messages.methods()[method]
                call = channel.unary_unary(
                    f"/{messages.SERVICE}/{method}",
                    request_serializer=sent.SerializeToString,
                    response_deserializer=answered.FromString,
                )
                try:
                    found.append(await call(sent(**message), **(options[0] if options else {})))
                except grpc.aio.AioRpcError as error:
                    trailing = dict(error.trailing_metadata() or ())
                    found.append((error.code().name, error.details(), trailing))
        await server.stop(1)
        await served.repository.close()
        return found

    return asyncio.run(main())


def tensor(array, **more):
    return {"name": "image", "datatype": "UINT8", "shape": array.shape, **more}


def asked(array, **more):
    message = {"model_name": "digits", "inputs": [tensor(array)]}
    return message | {"raw_input_contents": [array.tobytes()]} | more


def test_health_and_metadata_are_as_published(monkeypatch):
    live, ready, model_ready, server, model, index = called(
        Served(monkeypatch),
        ("ServerLive", {}),
        ("ServerReady", {}),
        ("ModelReady", {"name": "digits", "version": "1"}),
        ("ServerMetadata", {}),
        ("ModelMetadata", {"name": "digits"}),
        ("RepositoryIndex", {}),
    )
    assert live.live and ready.ready and model_ready.ready and server.name == "cnnjax"
    assert [each.name for each in model.outputs] == [
        "logits",
        "probabilities",
        "label",
        "class_name",
    ]
    assert list(model.inputs[0].shape) == [-1, 2, 2, 1]
    assert [(each.name, each.version, each.state) for each in index.models] == [
        ("digits", "1", "READY")
    ]


def test_raw_and_listed_tensors_get_the_same_answer(monkeypatch):
    sent = images(1, 2)
    contents = {"contents": {"uint_contents": sent.ravel().tolist()}}
    listed = {"model_name": "digits", "id": "7", "inputs": [tensor(sent, **contents)]}
    raw, found, one = called(
        Served(monkeypatch),
        ("ModelInfer", asked(sent)),
        ("ModelInfer", listed),
        ("ModelInfer", asked(sent, outputs=[{"name": "class_name"}])),
    )
    assert [each.name for each in raw.outputs] == ["logits", "probabilities", "label", "class_name"]
    logits = np.frombuffer(raw.raw_output_contents[0], "<f4").tolist()
    assert logits == [1, -1, 2, -2] == list(found.outputs[0].contents.fp32_contents)
    assert found.id == "7" and list(found.outputs[2].contents.int64_contents) == [0, 0]
    assert list(found.outputs[3].contents.bytes_contents) == [b"a", b"a"]
    assert list(one.raw_output_contents) == [b"\1\0\0\0a" * 2]


def test_image_files_come_raw_or_listed(monkeypatch):
    file = png(images(9)[0])
    entry = {"name": "image", "datatype": "BYTES", "shape": [1]}
    raw = struct.pack("<I", len(file)) + file
    found = called(
        Served(monkeypatch),
        ("ModelInfer", {"model_name": "digits", "inputs": [entry], "raw_input_contents": [raw]}),
        (
            "ModelInfer",
            {"model_name": "digits", "inputs": [entry | {"contents": {"bytes_contents": [file]}}]},
        ),
    )
    assert np.frombuffer(found[0].raw_output_contents[0], "<f4").tolist() == [9, -9]
    assert list(found[1].outputs[0].contents.fp32_contents) == [9, -9]


def test_refusals_have_codes_and_the_text_of_http(monkeypatch):
    sent = images(1)
    served = Served(monkeypatch, secs=0.3)
    found = called(
        served,
        ("ModelInfer", asked(sent, model_name="digit")),
        ("ModelInfer", asked(sent, model_version="9")),
        ("ModelInfer", asked(images(1, shape=(3, 2, 1)))),
        ("ModelInfer", asked(sent, raw_input_contents=[b"12"])),
        ("ModelInfer", asked(sent, raw_input_contents=[b"1", b"2"])),
        ("ModelInfer", asked(sent, outputs=[{"name": "logit"}])),
        ("ModelInfer", asked(sent, parameters={"timeout": {"int64_param": 20_000}})),
        ("RepositoryModelLoad", {"first": "../etc/passwd"}),
        ("ModelMetadata", {"name": "digit"}),
        ("ModelInfer", asked(sent, inputs=[tensor(sent) | {"shape": [-1, 2, 2, 1]}])),
    )
    expected = [
        ("NOT_FOUND", "unknown model 'digit': did you mean digits?"),
        ("NOT_FOUND", "unknown version of digits '9': there are 1."),
        ("INVALID_ARGUMENT", "[3, 2, 1], and the model takes [2, 2, 1]"),
        ("INVALID_ARGUMENT", "has 2 bytes, and its shape [1, 2, 2, 1] takes 4"),
        ("INVALID_ARGUMENT", "2 raw contents for 1 inputs"),
        ("NOT_FOUND", "unknown output 'logit': did you mean logits?"),
        ("DEADLINE_EXCEEDED", "deadline of 0.02 s"),
        ("NOT_FOUND", "unknown model '../etc/passwd'"),
        ("NOT_FOUND", "unknown model 'digit'"),
        (
            "INVALID_ARGUMENT",
            "shape [-1, 2, 2, 1]: in a request each side is a number of 0 or more",
        ),
    ]
    for (code, text, trailing), (right_code, part) in zip(found, expected, strict=True):
        assert code == right_code and part in text and trailing["x-request-id"]
    reasons = [line for line in served.lines if line["event"] == "request"]
    assert [line["status"] for line in reasons][-2:] == ["NOT_FOUND", "INVALID_ARGUMENT"]


def test_a_call_is_a_span_of_its_callers_trace(monkeypatch):
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    from cnnjax.serve.traces import tracing

    served, exporter = Served(monkeypatch), InMemorySpanExporter()
    spans = tracing("http://collector", exporter=exporter)
    metadata = {
        "metadata": (("traceparent", f"00-{'1' * 32}-{'2' * 16}-01"), ("x-request-id", "a"))
    }
    served.made[0].fails = True
    called(
        served,
        ("ModelInfer", asked(images(1)), metadata),
        ("ModelMetadata", {"name": "digit"}, metadata),
        traced=spans.rpc,
    )
    spans.end()
    failed, refused = exporter.get_finished_spans()
    assert failed.name == "inference.GRPCInferenceService/ModelInfer"
    assert format(failed.context.trace_id, "032x") == "1" * 32
    assert format(failed.parent.span_id, "016x") == "2" * 16
    told = {"request.id": "a", "model": "digits", "version": "1", "images": 1}
    told |= {"rpc.system": "grpc", "rpc.method": "ModelInfer", "rpc.grpc.status_code": 13}
    assert told.items() <= dict(failed.attributes).items()
    # A mistake of the caller's is no failure of the server.
    assert refused.attributes["rpc.grpc.status_code"] == 5
    assert (failed.status.is_ok, refused.status.is_ok) == (False, True)


def test_a_call_that_is_cancelled_by_its_deadline_is_not_computed(monkeypatch):
    served = Served(monkeypatch, largest=1, secs=0.2)
    slow, late = ("ModelInfer", asked(images(1))), ("ModelInfer", asked(images(2)))
    (answer, refused) = called(served, slow, (*late, {"timeout": 0.01}))
    assert answer.model_version == "1" and refused[0] == "DEADLINE_EXCEEDED"


def test_a_failing_model_says_nothing_of_itself(monkeypatch):
    served = Served(monkeypatch)
    served.made[0].fails = True
    ((code, text, _),) = called(served, ("ModelInfer", asked(images(1))))
    assert code == "INTERNAL" and "it fails" not in text


@pytest.mark.parametrize("field", ["first", "second"])
def test_models_are_exchanged_by_the_names_of_both_kinds_of_client(monkeypatch, field):
    served = Served(monkeypatch)
    served.opened = iter([served.made[0].runtime] * 2)
    unloaded, ready, loaded = called(
        served,
        ("RepositoryModelUnload", {field: "digits"}),
        ("ModelReady", {"name": "digits"}),
        ("RepositoryModelLoad", {field: "digits"}),
    )
    assert unloaded.isUnloaded and not ready.ready and loaded.isLoaded


def test_the_description_is_that_of_the_proto_file():
    pytest.importorskip("grpc_tools")
    from scripts.describe_protocol import FOLDER, described

    assert (FOLDER / "inference.binpb").read_bytes() == described()
