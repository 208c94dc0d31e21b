"""Malformed requests, made by hypothesis: none is the server's fault, none leaves anything."""

import asyncio
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnjax.serve import protocol
from cnnjax.serve.measures import resident_bytes
from tests.serve.served import INFER, Served

PATHS = (
    *(INFER, "/v1/models/digits:predict", "/v1/models/digits:rollout"),
    *("/v2/repository/index", "/v2/repository/models/digits/load"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "inputs", "id"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
INPUT = st.fixed_dictionaries(
    {},
    optional={
        "name": st.just("image") | JSON,
        "shape": st.lists(st.integers(-1, 3) | JSON, max_size=5) | JSON,
        "datatype": st.sampled_from(["UINT8", "FP32", "BYTES", "FP16"]) | JSON,
        "data": st.lists(st.integers(-1, 300) | JSON, max_size=6) | JSON,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 9) | JSON}) | JSON,
    },
)
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.lists(INPUT, max_size=2) | JSON,
        "outputs": st.lists(
            st.fixed_dictionaries({"name": st.sampled_from(["label", "logits"]) | JSON}), max_size=2
        )
        | JSON,
        "parameters": JSON,
        "id": JSON,
    },
)


def sent_by_hypothesis(examples):
    """Returns so many malformed requests: path, content, headers."""
    found = []

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.sampled_from(PATHS),
        st.binary(max_size=60) | REQUEST.map(lambda each: json.dumps(each).encode()),
        st.binary(max_size=20),
        st.none() | st.integers(-1, 200).map(str) | st.text("0123456789-xe٣", max_size=30),
        st.sampled_from(["application/json", "multipart/form-data; boundary=a", "image/png"]),
    )
    def draw(path, content, tail, length, kind):
        headers = {"content-type": kind}
        if length is not None:
            headers[protocol.HEADER_LENGTH] = length.encode()
        found.append((path, content + tail, headers))

    draw()
    return found


def check_answers(served, requests, check_memory=lambda number: None):
    """Sends the requests; none may be the server's fault, and each refusal is one line."""
    served.opened = itertools.repeat(served.made[0].runtime)
    served.write = lambda text: None

    async def main():
        async with served.client() as client:
            for number, (path, content, headers) in enumerate(requests):
                answer = await client.post(path, content=content, headers=headers)
                assert answer.status_code < 500, (path, content, headers, answer.text)
                if answer.status_code >= 400:
                    assert "\n" not in answer.json()["error"]
                check_memory(number)

    asyncio.run(main())


@pytest.mark.slow
def test_malformed_requests_are_never_the_servers_fault(monkeypatch):
    check_answers(Served(monkeypatch), sent_by_hypothesis(200))


@pytest.mark.exhaustive
def test_ten_thousand_malformed_requests_leave_memory_as_it_was(monkeypatch):
    requests = sent_by_hypothesis(10_000)
    assert len(requests) >= 9_000
    resident = {}

    def check_memory(number):
        if number % len(requests) == len(requests) - 1:
            resident[number // len(requests)] = resident_bytes()

    check_answers(Served(monkeypatch), requests * 3, check_memory)
    assert resident[2] < resident[0] * 1.02 + 2e6, resident
