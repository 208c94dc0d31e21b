"""Sliding windows, alarms and labels, without a server and by way of one."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.errors import UserError
from cnnjax.evaluation import references
from cnnjax.serve.watch.monitor import DriftMonitor, LabelMonitor, Window
from tests.evaluation.test_drift import made_data

pytest.importorskip("prometheus_client")
pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("python_multipart")

import prometheus_client

from cnnjax.serve.watch.observer import Watch, Watched
from cnnjax.serve.watch.routes import routes

KEY = ("lenet", "1")


@pytest.fixture(scope="module")
def reference():
    return references.make_reference(*made_data(2000), window=100)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 13), max_size=30))
def test_a_window_holds_the_newest_rows(sizes):
    window, generator = Window(5, 2), np.random.default_rng(0)
    everything = np.zeros((0, 2), np.float32)
    for size in sizes:
        rows = generator.normal(0, 1, (size, 2)).astype(np.float32)
        window.add(rows)
        everything = np.concatenate([everything, rows])
        assert window.full == (len(everything) >= 5)
        if len(everything):
            np.testing.assert_allclose(window.mean(), everything[-5:].mean(axis=0), atol=1e-5)


def test_there_is_no_score_before_the_window_is_full(reference):
    monitor = DriftMonitor(reference)
    images, logits, embeddings, _ = made_data(100)
    monitor.add(images[:99], logits[:99])
    assert monitor.scores() == {}
    monitor.add(images[99:], logits[99:])
    assert "image_mean" in monitor.scores() and "embedding_mean" not in monitor.scores()
    monitor.add_embeddings(embeddings)
    assert monitor.scores().keys() == reference.thresholds.keys()


def test_accuracy_is_of_the_newest_labels():
    labels = LabelMonitor(remembered=3, window=2)
    assert math.isnan(labels.scores()["accuracy"])
    for number in range(4):
        labels.answered(f"r{number}", np.array([[2.0, 0.0]]))
    assert labels.take("r0") is None  # The longest ago.
    for name, label in (("r1", 1), ("r2", 0), ("r3", 0)):
        labels.label(labels.take(name), [label])
    assert labels.take("r3") is None
    confidence = 1 / (1 + math.exp(-2.0))
    scores = labels.scores()
    assert scores["accuracy"] == 1 and scores["calibration_error"] == pytest.approx(1 - confidence)


def watching(reference, **options):
    said, registry = [], prometheus_client.CollectorRegistry()
    watched = Watched(reference, ("a", "b", "c", "d"), **options)
    return Watch({KEY: watched}, registry, say=said.append), said, registry


def value(registry, name, **labels):
    return registry.get_sample_value(name, {"model": "lenet", "version": "1", **labels})


def test_an_alarm_is_said_once_and_its_end_too(reference):
    watch, said, registry = watching(reference)
    for seed, shift in ((1, 0), (2, 60), (3, 60), (4, 0), (5, 0)):
        images, logits, _, _ = made_data(200, seed, shift=shift)
        for at in range(0, 200, 10):
            watch.observe(*KEY, images[at : at + 10], logits[at : at + 10], f"{seed}-{at}")
        watch.flush()
        assert ("image_mean" in watch.alarms()[KEY]) == (shift > 0)
    events = [event["event"] for event in said if event["statistic"] == "image_mean"]
    assert events == ["drift", "drift_over"]
    threshold = value(registry, "cnnjax_drift_threshold", statistic="image_mean")
    assert value(registry, "cnnjax_drift_score", statistic="image_mean") < threshold
    assert threshold == reference.thresholds["image_mean"]
    assert value(registry, "cnnjax_drift_window_images", kind="answers") == 100


def test_embeddings_take_no_more_than_their_part_of_the_time(reference):
    now, batches = [0.0], []

    def embed(images):
        batches.append(len(images))
        now[0] += 1.0
        return np.zeros((len(images), 5))

    registry = prometheus_client.CollectorRegistry()
    watch = Watch({KEY: Watched(reference, embed=embed)}, registry, clock=lambda: now[0])
    images, logits, _, _ = made_data(64)
    for _ in range(100):
        watch.observe(*KEY, images, logits, "r")
        now[0] += 0.2
    assert set(batches) == {32}
    assert len(batches) / now[0] <= 0.21


def test_more_than_can_be_looked_at_is_counted_and_dropped(reference, monkeypatch):
    watch, _, registry = watching(reference)
    model = watch._models[KEY]
    monkeypatch.setattr(model, "look", lambda: None)  # A look that takes for ever.
    images, logits, _, _ = made_data(1024)
    for _ in range(6):
        watch.observe(*KEY, images, logits, "r")
    assert value(registry, "cnnjax_drift_skipped_images_total") == 2048


def test_a_model_without_a_reference_takes_labels_all_the_same():
    watch, _, _ = watching(None)
    watch.observe(*KEY, np.zeros((2, 6, 6, 1), np.uint8), np.eye(4)[:2], "r")
    found = watch.feedback("lenet", {"request_id": "r", "labels": ["a", 3]})
    assert found["accuracy"] == 0.5
    assert watch.describe("lenet")["versions"]["1"] == {"watched": False}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "send"),
        ({}, "send"),
        ({"request_id": 3}, "send"),
        ({"request_id": "r"}, "the name or the number"),
        ({"request_id": "r", "label": "e"}, "unknown class 'e'"),
        ({"request_id": "r", "label": 4}, "from 0 to 3"),
        ({"request_id": "r", "label": -1}, "from 0 to 3"),
        ({"request_id": "r", "label": True}, "the name or the number"),
        ({"request_id": "r", "labels": []}, "had 1 images"),
        ({"request_id": "r", "labels": "ab"}, "had 1 images"),
        ({"predicted": "a", "label": "a"}, "its confidence"),
        ({"predicted": "a", "label": "a", "confidence": 2}, "its confidence"),
        ({"predicted": "e", "label": "a", "confidence": 0.5}, "unknown class 'e'"),
    ],
)
def test_labels_that_mean_nothing_are_refused_and_can_be_sent_again(content, words):
    watch, _, _ = watching(None)
    watch.observe(*KEY, np.zeros((1, 6, 6, 1), np.uint8), np.eye(4)[:1], "r")
    with pytest.raises(UserError, match=words):
        watch.feedback("lenet", content)
    assert watch.feedback("lenet", {"request_id": "r", "label": "a"})["labels"] == 1


def test_an_answer_of_another_server_is_labeled_with_what_it_said():
    watch, _, registry = watching(None)
    for label in ("a", "b"):
        content = {"predicted": "a", "confidence": 0.75, "label": label}
        found = watch.feedback("lenet", content)
    assert found["accuracy"] == 0.5 and found["calibration_error"] == pytest.approx(0.25)
    assert value(registry, "cnnjax_labels_total", result="right") == 1
    assert value(registry, "cnnjax_labeled_accuracy") == 0.5


def test_feedback_and_drift_over_http(reference):
    import asyncio

    import httpx

    from cnnjax.serve.http.web import application
    from cnnjax.serve.measures import Measures
    from tests.serve.guarding import digits_repository

    measures = Measures()
    watch = Watch({KEY: Watched(None, tuple("0123456789"))}, measures.registry)
    app = application(
        digits_repository(measures),
        observers=(watch.observe,),
        routes=(routes(watch),),
        loads=False,
    )

    async def talk():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            pixels = np.full(784, 7).tolist()
            tensor = {"name": "image", "shape": [1, 28, 28, 1], "datatype": "UINT8", "data": pixels}
            answer = await client.post("/v2/models/lenet/infer", json={"inputs": [tensor]})
            content = {"request_id": answer.headers["x-request-id"], "label": "7"}
            sent = [
                ("/v1/models/lenet:feedback", content),
                ("/v1/models/lenet:feedback", content),
                ("/v1/models/lenet:feedback", [1]),
                ("/v1/models/lenet:feedback", content | {"request_id": 4}),
                ("/v1/models/other:feedback", content),
            ]
            answers = [await client.post(path, content=json.dumps(body)) for path, body in sent]
            answers.append(await client.get("/v1/models/lenet:drift"))
            answers.append(await client.get("/v1/models/other:drift"))
            answers.append(await client.post("/v1/models/lenet:drift"))
            answers.append(await client.get("/v1/models/lenet:none"))
            return (await client.get("/openapi.json")).json()["paths"], *answers

    paths, first, *others, wrong_method, no_verb = asyncio.run(talk())
    assert first.json()["accuracy"] == 1.0
    assert [answer.status_code for answer in others] == [404, 400, 400, 404, 200, 404]
    assert "labeled already" in others[0].json()["error"]
    for operation in (
        paths["/v1/models/{name}:feedback"]["post"],
        paths["/v1/models/{name}:drift"]["get"],
    ):
        assert {"200", "400", "404"} <= operation["responses"].keys()
    assert (wrong_method.status_code, wrong_method.headers["allow"]) == (405, "GET, HEAD")
    assert "GET :drift, POST :explain, POST :feedback" in no_verb.json()["error"]
