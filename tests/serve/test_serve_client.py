"""The clients read what the server says, refuse what it refuses, and try again what can be."""

import asyncio
import inspect

import numpy as np
import pytest

from cnnjax.errors import UserError
from cnnjax.serve import AsyncClient, Client, ServeError
from tests.serve.made import images
from tests.serve.served import Served, png

httpx = pytest.importorskip("httpx")


def asked(served, *questions):
    """Returns what `AsyncClient` answers to questions, functions of it, one after another."""

    async def main():
        transport = httpx.ASGITransport(served.app, raise_app_exceptions=False)
        async with AsyncClient("http://served", transport=transport, timeout_secs=1) as client:
            await served.repository.start()
            found = [await question(client) for question in questions]
            await served.repository.close()
            return found

    return asyncio.run(main())


def test_outputs_come_as_arrays(monkeypatch):
    sent = images(1, 2, 3)
    whole, one = asked(
        Served(monkeypatch),
        lambda client: client.infer("digits", sent),
        lambda client: client.infer("digits", sent, version="1", outputs=["label"]),
    )
    assert whole["logits"].tolist() == [[1, -1], [2, -2], [3, -3]]
    assert whole["logits"].dtype == whole["probabilities"].dtype == np.float32
    assert whole["class_name"].tolist() == ["a"] * 3
    assert list(one) == ["label"] and one["label"].tolist() == [0] * 3


def test_an_image_file_comes_by_its_path_or_its_bytes(monkeypatch, tmp_path):
    file = png(images(9)[0])
    (tmp_path / "nine.png").write_bytes(file)
    by_bytes, by_path = asked(
        Served(monkeypatch),
        lambda client: client.predict("digits", file, top=1),
        lambda client: client.predict("digits", tmp_path / "nine.png"),
    )
    assert by_bytes.class_names == ["a"] and by_bytes.labels == [0]
    assert by_path.class_names == ["a", "b"]
    assert by_path.probabilities[0] > by_path.probabilities[1]


def test_models_are_listed_loaded_rolled_out_and_rolled_back(monkeypatch):
    found = asked(
        Served(monkeypatch, versions=("1", "2")),
        lambda client: client.is_ready(),
        lambda client: client.models(),
        lambda client: client.metadata("digits"),
        lambda client: client.rollout("digits", {"1": 1, "2": 1}, shadow=""),
        lambda client: client.rollback("digits"),
        lambda client: client.unload("digits"),
        lambda client: client.status("digits"),
    )
    assert found[0] is True
    assert [(each["version"], each["state"]) for each in found[1]] == [
        ("1", "READY"),
        ("2", "READY"),
    ]
    assert found[2]["inputs"][0]["name"] == "image"
    assert found[3]["weights"] == {"1": 0.5, "2": 0.5} and found[4]["weights"] == {"1": 1.0}
    assert found[6]["versions"]["1"]["state"] == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("question", "status", "text"),
    [
        (lambda client: client.infer("digit", images(1)), 404, "did you mean digits"),
        (lambda client: client.infer("a/../b", images(1)), 404, "Not Found"),
        (lambda client: client.predict("digits", b"no image"), 400, "not an image"),
        (lambda client: client.infer("digits", images(1, shape=(3, 2, 1))), 400, "the model takes"),
        (lambda client: client.rollback("digits"), 409, "no rollout to go back to"),
    ],
)
def test_refusals_are_the_servers_own_words(monkeypatch, question, status, text):
    with pytest.raises(ServeError, match=text) as error:
        asked(Served(monkeypatch), question)
    assert error.value.status == status


def answering(*answers):
    """A client whose server gives these answers, and the requests that it got."""
    left, got = iter(answers), []

    def handle(request):
        got.append(request)
        answer = next(left)
        if isinstance(answer, Exception):
            raise answer
        return answer

    client = Client("http://served", timeout_secs=2, transport=httpx.MockTransport(handle))
    return client, got


READY = {"weights": {"1": 1.0}}


def test_what_is_busy_or_broken_is_asked_again():
    busy = httpx.Response(429, json={"error": "busy"}, headers={"retry-after": "0"})
    broken = httpx.ConnectError("refused")
    client, got = answering(busy, broken, httpx.Response(503), httpx.Response(200, json=READY))
    assert client.status("digits") == READY
    assert len(got) == 4


def test_a_rollback_is_asked_once():
    client, got = answering(httpx.ReadError("reset"), httpx.Response(200, json=READY))
    with pytest.raises(ServeError, match=r"no answer to .*rollback: reset") as error:
        client.rollback("digits")
    assert error.value.status == 0 and len(got) == 1


def test_what_stays_busy_is_refused_before_the_timeout():
    client, got = answering(httpx.Response(429, json={"error": "x"}, headers={"retry-after": "9"}))
    with pytest.raises(ServeError, match="429: x"):
        client.status("digits")
    assert len(got) == 1


def test_the_key_is_sent():
    sent = []

    def handle(request):
        sent.append(request.headers["authorization"])
        return httpx.Response(200, json=READY)

    Client("http://served", key="abc", transport=httpx.MockTransport(handle)).status("digits")
    assert sent == ["Bearer abc"]


def test_mistakes_are_one_line_before_anything_is_sent(tmp_path):
    client, got = answering()
    with pytest.raises(UserError, match="no image file"):
        client.predict("digits", tmp_path / "no.png")
    with pytest.raises(UserError, match=r"images of float64 \[2, 2\]: give uint8 or float32"):
        client.infer("digits", np.zeros((2, 2)))
    with pytest.raises(UserError, match="'localhost:1' is no URL"):
        Client("localhost:1")
    assert not got


def test_both_clients_have_the_same_methods():
    public = [
        {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}
        for kind in (Client, AsyncClient)
    ]
    assert public[0] == public[1]
