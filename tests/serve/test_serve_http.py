"""The HTTP side: what is answered, what is refused, what is counted and logged."""

import asyncio
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from cnnjax.serve import Limits, protocol
from tests.serve.made import images
from tests.serve.served import INFER, Served, binary, body, png, tensor


def bounds(**settings):
    from cnnjax.serve.http.web import Bounds

    return Bounds(**settings)


@pytest.fixture
def served(monkeypatch):
    return Served(monkeypatch)


def test_health_and_metadata_are_as_published(served):
    live, ready, server, model, version, index = served.ask(
        ("GET", "/v2/health/live"),
        ("GET", "/v2/health/ready"),
        ("GET", "/v2"),
        ("GET", "/v2/models/digits"),
        ("GET", "/v2/models/digits/versions/1/ready"),
        ("POST", "/v2/repository/index"),
    )
    assert live.json() == {"live": True} and ready.json() == {"ready": True}
    assert {"binary_tensor_data", "model_repository"} <= set(server.json()["extensions"])
    assert version.json() == {"name": "digits", "ready": True}
    assert index.json() == [{"name": "digits", "version": "1", "state": "READY", "reason": ""}]
    said = model.json()
    assert said["versions"] == ["1"] and said["platform"] == "cnnjax_made"
    assert said["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 2, 2, 1]}]
    shapes = {each["name"]: (each["datatype"], each["shape"]) for each in said["outputs"]}
    assert shapes == {
        "logits": ("FP32", [-1, 2]),
        "probabilities": ("FP32", [-1, 2]),
        "label": ("INT64", [-1]),
        "class_name": ("BYTES", [-1]),
    }


def test_json_and_binary_tensors_get_the_same_answer(served):
    sent = images(1, 2, 3)
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "class_name"}]
    listed, nested, packed, asked = served.ask(
        ("POST", INFER, {"json": body(sent, id="42")}),
        ("POST", INFER, {"json": {"inputs": [tensor(sent, data=sent.tolist())]}}),
        ("POST", INFER, binary(sent, parameters={"binary_data_output": True})),
        ("POST", INFER, binary(sent, outputs=outputs)),
    )
    said = listed.json()
    assert said["model_name"] == "digits" and said["model_version"] == "1" and said["id"] == "42"
    logits = said["outputs"][0]
    assert (logits["name"], logits["shape"]) == ("logits", [3, 2])
    assert logits["data"] == [1, -1, 2, -2, 3, -3]
    assert nested.json()["outputs"] == said["outputs"]
    length = int(packed.headers[protocol.HEADER_LENGTH])
    sizes = [
        each["parameters"]["binary_data_size"]
        for each in json.loads(packed.content[:length])["outputs"]
    ]
    assert sizes == [3 * 2 * 4, 3 * 2 * 4, 3 * 8, 3 * (4 + 1)]
    raw = np.frombuffer(packed.content[length : length + sizes[0]], "<f4")
    assert raw.tolist() == logits["data"]
    assert packed.content.endswith(b"\1\0\0\0a" * 3)
    length = int(asked.headers[protocol.HEADER_LENGTH])
    assert json.loads(asked.content[:length])["outputs"][1]["data"] == ["a"] * 3
    assert asked.content[length:] == raw.tobytes()


@pytest.mark.parametrize(
    ("sent", "status", "text"),
    [
        (b"{", 400, "the body is no JSON"),
        (b"[]", 400, "the body is a JSON list: send an object"),
        (b"[" * 100_000, 400, "nested|no JSON"),
        (b"{}", 400, "the inputs are none: give one, called 'image'"),
        ({"inputs": 3}, 400, "inputs is no list of objects"),
        ({"inputs": [{"name": "image"}]}, 400, "an input has no shape"),
        ({"inputs": [tensor(images(1))]}, 400, "neither a list of data nor a binary_data_size"),
        ({"inputs": [tensor(images(1), data=[1, 2])]}, 400, r"data of shape \[2\], not"),
        ({"inputs": [tensor(images(1), data=[1, 2, 3, 256])]}, 400, "values outside 0 to 255"),
        ({"inputs": [tensor(images(1), data=[1, 2, 3, 1.5])]}, 400, "are not all integers"),
        ({"inputs": [tensor(images(1), data=[1, 2, 3, "4"])]}, 400, "are not all integers"),
        ({"inputs": [tensor(images(1), data=[1, [2], 3, 4])]}, 400, "are no array"),
        ({"inputs": [tensor(images(1), parameters={"binary_data_size": 9})]}, 400, "not fit the"),
        (body(images(1), outputs=[{"name": "logit"}]), 404, "unknown output 'logit': did"),
        (body(np.zeros((1, 3, 2, 1), np.uint8)), 400, r"takes \[2, 2, 1\]"),
        (body(np.zeros((1, 2, 2, 1), np.float32)), 400, "are float32, and the model takes uint8"),
        (body(images(1), parameters={"timeout": "soon"}), 400, "no number of microseconds"),
        (body(images(1), parameters={"timeout": 10**400}), 400, "no number of microseconds"),
        (body(images(1), id=7), 400, "id is no text"),
        (body(images(*range(9))), 413, "9 images in a request: send at most 8"),
    ],
)
def test_bad_tensors_are_refused_in_one_line(monkeypatch, sent, status, text):
    served = Served(monkeypatch, bounds=bounds(images=8))
    options = {"content": sent} if isinstance(sent, bytes) else {"json": sent}
    (answer,) = served.ask(("POST", INFER, options))
    assert answer.status_code == status
    error = answer.json()["error"]
    assert re.search(text, error), error
    assert "\n" not in error and not served.made[0].batches


def test_names_that_are_not_there_touch_no_path(served, tmp_path):
    answers = served.ask(
        ("GET", "/v2/models/digit"),
        ("GET", "/v2/models/..%2F..%2Fetc%2Fpasswd"),
        ("POST", "/v2/repository/models/..%2F..%2Fetc%2Fpasswd/load"),
        ("POST", "/v2/models/digits/versions/..%2f1/infer", {"json": body(images(1))}),
        ("POST", "/v2/repository/models/digits/load", {"json": {"parameters": {"file:a": "b"}}}),
    )
    assert [answer.status_code for answer in answers] == [404, 404, 404, 404, 400]
    assert answers[0].json()["error"] == "unknown model 'digit': did you mean digits?"
    assert "parameters are not taken" in answers[4].json()["error"]


def test_an_image_file_comes_as_body_or_form(served):
    file = png(images(9)[0])
    answers = served.ask(
        ("POST", "/v1/models/digits:predict", {"content": file}),
        ("POST", "/v1/models/digits:predict?top=1", {"files": {"image": ("a.png", file)}}),
        ("POST", "/v1/models/digits/versions/1:predict", {"content": file}),
    )
    assert [answer.status_code for answer in answers] == [200] * 3
    classes = [answer.json()["classes"] for answer in answers]
    assert [each["class_name"] for each in classes[0]] == ["a", "b"]
    assert classes[0][0]["label"] == 0 and len(classes[1]) == 1 and classes[2] == classes[0]


def test_image_files_that_cannot_be_are_refused_before_they_are_decoded(served):
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    small = png(images(9)[0])
    answers = served.ask(
        ("POST", "/v1/models/digits:predict", {"content": b""}),
        ("POST", "/v1/models/digits:predict", {"content": b"/etc/passwd"}),
        ("POST", "/v1/models/digits:predict", {"content": small[:40]}),
        ("POST", "/v1/models/digits:predict", {"files": {"photo": small}}),
        ("POST", "/v1/models/digits:predict", {"content": huge.getvalue()}),
        ("POST", "/v1/models/digits:predict?top=0", {"content": small}),
        ("POST", "/v1/models/digits:predict?top=x", {"content": small}),
        ("POST", "/v1/models/digits:explain", {"content": small}),
        (
            "POST",
            "/v1/models/digits:predict",
            {"content": b"nonsense", "headers": {"content-type": "multipart/form-data"}},
        ),
    )
    texts = [
        (400, "no image was sent"),
        (400, "not an image: send PNG"),
        (400, "not an image|cannot"),
        (400, "the form has the parts photo: call the file's image"),
        (413, "9000 x 9000 pixels, more than the 16777216 accepted"),
        (400, "ask for 1 to 1000 classes"),
        (400, "ask for 1 to 1000 classes"),
        (503, "has no Grad-CAM"),
        (400, "the form cannot be read"),
    ]
    for answer, (status, text) in zip(answers, texts, strict=True):
        assert answer.status_code == status, answer.text
        assert any(part in answer.json()["error"] for part in text.split("|")), answer.text


def test_verbs_and_methods_that_there_are_not_name_those_that_there_are(served):
    verbs = "there are POST :explain, POST :predict, POST :rollback, POST :rollout."
    model = "/v1/models/digits"
    expected = [
        ("GET", f"{model}:predict", 405, "send POST.", "POST"),
        ("PUT", f"{model}:rollout", 405, "send POST.", "POST"),
        ("GET", f"{model}/versions/1:explain", 405, "send POST.", "POST"),
        ("POST", model, 405, "send GET or HEAD.", "GET, HEAD"),
        ("GET", INFER, 405, "send POST.", "POST"),
        ("POST", f"{model}:foo", 404, f"a model has no verb 'foo': {verbs}", None),
        ("GET", f"{model}:foo", 404, f"a model has no verb 'foo': {verbs}", None),
        ("POST", f"{model}/versions/1:rollout", 404, "there are POST :explain, POST :pre", None),
    ]
    answers = served.ask(*((method, path) for method, path, *_ in expected))
    for answer, (_, _, status, text, allow) in zip(answers, expected, strict=True):
        assert answer.status_code == status and text in answer.json()["error"]
        assert answer.headers.get("allow") == allow


def test_options_and_head_are_answered_for_whatever_is_there(served):
    predict, status, nothing, head = served.ask(
        ("OPTIONS", "/v1/models/digits:predict"),
        ("OPTIONS", "/v1/models/digits"),
        ("OPTIONS", "/v1/models/digits:foo"),
        ("HEAD", "/v2/health/ready"),
    )
    assert (predict.status_code, predict.headers["allow"]) == (204, "POST")
    assert (status.status_code, status.headers["allow"]) == (204, "GET, HEAD")
    assert (nothing.status_code, head.status_code) == (404, 200)
    line = next(each for each in served.lines if each["event"] == "request")
    assert line["method"] == "OPTIONS" and line["status"] == 204


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ([-1, 2, 2, 1], "shape [-1, 2, 2, 1]: in a request each side is a number of 0 or more; -1"),
        ("4", "an input has no shape: give a list of numbers."),
        ([1.5, 2, 2, 1], "is no list of whole numbers below 2147483648"),
        ([1] * 9, "a shape of 9 sides: give at most 8"),
    ],
)
def test_a_shape_that_is_none_says_why(served, shape, text):
    (answer,) = served.ask(
        ("POST", INFER, {"json": {"inputs": [tensor(images(1), data=[1]) | {"shape": shape}]}})
    )
    assert answer.status_code == 400 and text in answer.json()["error"]


def test_a_body_that_is_too_large_or_too_slow_is_refused(monkeypatch):
    served = Served(monkeypatch, bounds=bounds(body_bytes=100, body_secs=0.05))

    async def slowly():
        yield b"{"
        await asyncio.sleep(1)
        yield b"}"

    large, slow = served.ask(
        ("POST", INFER, {"content": b" " * 101}),
        ("POST", INFER, {"content": slowly()}),
    )
    assert large.status_code == 413 and "more than the 100 accepted" in large.json()["error"]
    assert slow.status_code == 408 and "did not come within 0.05 s" in slow.json()["error"]


def test_above_capacity_there_is_429_and_nothing_else(monkeypatch):
    served = Served(monkeypatch, limits=Limits(queue_images=4), largest=2, secs=0.01)

    async def main():
        async with served.client() as client:
            sent = [client.post(INFER, json=body(images(value))) for value in range(40)]
            return await asyncio.gather(*sent)

    answers = asyncio.run(main())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4
    assert all(int(each.headers["retry-after"]) >= 1 for each in answers if each.status_code == 429)
    for value, answer in enumerate(answers):
        if answer.status_code == 200:
            assert answer.json()["outputs"][0]["data"][0] == value


def test_a_deadline_is_504(monkeypatch):
    served = Served(monkeypatch, secs=0.2)
    (late,) = served.ask(("POST", INFER, {"json": body(images(1), parameters={"timeout": 20_000})}))
    assert late.status_code == 504 and "deadline of 0.02 s" in late.json()["error"]


def test_what_is_not_answered_when_the_server_must_end_is_503(monkeypatch):
    """As uvicorn does when the time to end in is over: it cancels what is still going on."""
    served = Served(monkeypatch, limits=Limits(delay_secs=9.0))

    async def main():
        async with served.client() as client:
            asked = asyncio.create_task(client.post(INFER, json=body(images(1))))
            while not served.repository.models["digits"].loaded["1"].batcher.queued:
                await asyncio.sleep(0.01)
            asked.cancel()
            return await asked

    answer = asyncio.run(main())
    assert (answer.status_code, answer.json()) == (
        503,
        {"error": "the server is stopping: ask another."},
    )


def test_a_model_that_fails_is_500_and_says_nothing_of_itself(served):
    served.made[0].fails = True
    (answer,) = served.ask(("POST", INFER, {"json": body(images(1))}))
    assert answer.status_code == 500 and "it fails" not in answer.text
    error = next(line for line in served.lines if line["event"] == "error")
    assert error["error"] == "RuntimeError('it fails')"
    assert error["request_id"] == answer.headers["x-request-id"]


def test_requests_are_logged_with_their_ids_and_counted(served):
    named, made_up, metrics = served.ask(
        ("POST", INFER, {"json": body(images(1, 2)), "headers": {"x-request-id": "abc-1"}}),
        ("POST", INFER, {"json": {}, "headers": {"x-request-id": 'a"\x0bb'}}),
        ("GET", "/metrics"),
    )
    assert named.headers["x-request-id"] == "abc-1"
    assert made_up.headers["x-request-id"] != 'a"\x0bb'
    lines = [line for line in served.lines if line["event"] == "request"]
    assert [(line["status"], line["request_id"]) for line in lines] == [
        (200, "abc-1"),
        (400, made_up.headers["x-request-id"]),
    ]
    assert lines[0]["model"] == "digits" and lines[0]["images"] == 2
    text = metrics.text
    assert 'cnnjax_images_total{model="digits",version="1"} 2.0' in text
    assert 'cnnjax_refused_total{reason="invalid"} 1.0' in text
    route = 'route="/v2/models/{name}/infer"'
    assert f'cnnjax_requests_total{{protocol="http",{route},status="200"}} 1.0' in text
    assert 'cnnjax_batch_images_bucket{le="2.0",model="digits",version="1"} 1.0' in text
    assert "cnnjax_device_memory_bytes" in text and "cnnjax_ready 1.0" in text


def test_observers_are_told_of_every_answer(served):
    served.ask(("POST", INFER, {"json": body(images(5)), "headers": {"x-request-id": "a"}}))
    ((model, version, seen, logits, request_id),) = served.seen
    assert (model, version, request_id) == ("digits", "1", "a")
    np.testing.assert_array_equal(seen, images(5))
    assert logits.tolist() == [[5, -5]]


def test_a_client_that_leaves_makes_room(monkeypatch):
    served = Served(monkeypatch, largest=1)
    content = json.dumps(body(images(7))).encode()
    scope = {"type": "http", "method": "POST", "path": INFER, "raw_path": INFER.encode()}
    scope |= {"query_string": b"", "headers": [], "client": ("127.0.0.1", 1), "root_path": ""}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 1)}

    async def main():
        async with served.client() as client:
            served.made[0].go.clear()
            first = asyncio.create_task(client.post(INFER, json=body(images(1))))
            await asyncio.sleep(0.02)
            messages = iter([{"type": "http.request", "body": content}])

            async def receive():
                await asyncio.sleep(0.01)
                return next(messages, {"type": "http.disconnect"})

            sent = []

            async def send(message):
                sent.append(message)

            await served.app(scope, receive, send)
            assert sent[0]["status"] == 499
            served.made[0].go.set()
            assert (await first).status_code == 200

    asyncio.run(main())
    assert [batch[0, 0, 0, 0] for batch in served.made[0].batches] == [1]
