"""Versions of a model: exchanged while it answers, weighed, shadowed, taken back."""

import asyncio

import pytest

from cnnjax.errors import UserError
from cnnjax.serve import rollout
from tests.serve.made import Made, images
from tests.serve.served import INFER, Served, body


def test_a_reload_exchanges_the_model_and_a_damaged_one_keeps_the_old(monkeypatch):
    served = Served(monkeypatch)
    newer = Made(largest=2)
    served.opened = iter([served.made[0].runtime, newer.runtime, UserError("it is damaged")])
    load = "/v2/repository/models/digits/load"
    answers = served.ask(
        ("POST", INFER, {"json": body(images(1))}),
        ("POST", load),
        ("POST", INFER, {"json": body(images(2))}),
        ("POST", load),
        ("POST", INFER, {"json": body(images(3))}),
        ("POST", "/v2/repository/models/digits/unload"),
        ("POST", INFER, {"json": body(images(4))}),
        ("GET", "/metrics"),
    )
    assert [each.status_code for each in answers] == [200, 200, 200, 400, 200, 200, 503, 200]
    assert "(the old one goes on answering): it is damaged" in answers[3].json()["error"]
    assert [len(each.batches) for each in (served.made[0], newer)] == [1, 2]
    assert 'cnnjax_model_loads_total{model="digits",result="failed"} 1.0' in answers[7].text


def test_a_reload_drops_no_request(monkeypatch):
    served = Served(monkeypatch, secs=0.005)
    served.opened = iter([served.made[0].runtime, *(Made(secs=0.005).runtime for _ in range(5))])

    async def main():
        async with served.client() as client:
            sent = [
                asyncio.create_task(client.post(INFER, json=body(images(value))))
                for value in range(60)
            ]
            for _ in range(5):
                await client.post("/v2/repository/models/digits/load")
            return await asyncio.gather(*sent)

    answers = asyncio.run(main())
    assert [each.status_code for each in answers] == [200] * 60
    assert [each.json()["outputs"][0]["data"][0] for each in answers] == list(range(60))


def test_weights_are_fractions_of_ids_and_an_id_has_one_version():
    divided = rollout.read_rollout({"weights": {"1": 3, "2": 1, "3": 0}}, ["1", "2", "3"])
    assert divided.weights == {"1": 0.75, "2": 0.25}
    chosen = [rollout.choose(divided, str(number)) for number in range(10_000)]
    # Within four standard deviations.
    assert abs(chosen.count("2") - 2500) < 4 * (10_000 * 0.25 * 0.75) ** 0.5
    assert chosen == [rollout.choose(divided, str(number)) for number in range(10_000)]


def test_traffic_is_divided_and_goes_back_by_one_call(monkeypatch):
    served = Served(monkeypatch, versions=("1", "2"))
    ask = ("POST", INFER, {"json": body(images(1))})
    rolled = ("POST", "/v1/models/digits:rollout", {"json": {"weights": {"2": 1}}})
    back = ("POST", "/v1/models/digits:rollback")
    answers = served.ask(ask, rolled, ask, back, ask, back, ask)
    versions = [answers[place].json()["model_version"] for place in (0, 2, 4, 6)]
    assert versions == ["1", "2", "1", "2"]
    assert answers[1].json()["weights"] == {"2": 1.0}
    assert answers[3].json()["weights"] == {"1": 1.0}


def test_a_shadow_is_asked_and_compared_and_not_sent(monkeypatch):
    served = Served(monkeypatch, versions=("1", "2"))
    call = served.made[1].runtime.call
    served.made[1].runtime.__dict__["call"] = lambda batch: call(255 - batch)
    answers = served.ask(
        ("POST", "/v1/models/digits:rollout", {"json": {"weights": {"1": 1}, "shadow": "2"}}),
        ("POST", INFER, {"json": body(images(10, 20))}),
        ("GET", "/v2/health/live"),
    )
    assert answers[1].json()["model_version"] == "1"
    assert answers[1].json()["outputs"][0]["data"] == [10, -10, 20, -20]
    compared = served.repository.models["digits"].compared.said()
    assert compared["images"] == 2 and compared["agreement"] == 1.0
    assert len(served.made[1].batches) == 1


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({}, "give {"),
        ({"weights": {"3": 1}}, "unknown version '3': there are 1, 2"),
        ({"weights": {"1": -1}}, "no number of 0 or more"),
        ({"weights": {"1": float("1e9")}}, "no number of 0 or more"),
        ({"weights": {"1": 0}}, "no version has a weight above 0"),
        ({"weights": {"1": 1}, "shadow": "1"}, "cannot both answer and be the shadow"),
        ({"weights": {"1": 1}, "canary": "2"}, "and no 'canary'"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(monkeypatch, content, text):
    served = Served(monkeypatch, versions=("1", "2"))
    refused, back = served.ask(
        ("POST", "/v1/models/digits:rollout", {"json": content}),
        ("POST", "/v1/models/digits:rollback"),
    )
    assert refused.status_code in (400, 404) and text in refused.json()["error"]
    assert "no rollout to go back to" in back.json()["error"]


def test_a_model_that_cannot_be_loaded_at_the_start_is_an_error(monkeypatch):
    served = Served(monkeypatch)
    served.opened = iter([UserError("no such run")])
    with pytest.raises(UserError, match="no such run"):
        asyncio.run(served.repository.start())
