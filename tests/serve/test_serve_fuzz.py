"""Malformed requests, made by hypothesis: none is the server's fault, none leaves anything."""

import asyncio
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


def fuzzed(served, examples):
    """Sends so many malformed requests, and returns their statuses."""
    statuses = []
    loop = asyncio.new_event_loop()

    async def opened():
        import httpx

        transport = httpx.ASGITransport(served.app, raise_app_exceptions=False)
        await served.repository.start()
        return httpx.AsyncClient(transport=transport, base_url="http://served")

    client = loop.run_until_complete(opened())

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(
        st.sampled_from(PATHS),
        st.binary(max_size=60) | REQUEST.map(lambda each: json.dumps(each).encode()),
        st.binary(max_size=20),
        st.none() | st.integers(-1, 200).map(str) | st.text("0123456789-xe٣", max_size=30),
        st.sampled_from(["application/json", "multipart/form-data; boundary=a", "image/png"]),
    )
    def one(path, sent, tail, length, kind):
        headers = {"content-type": kind}
        if length is not None:
            headers[protocol.HEADER_LENGTH] = length.encode()
        served.opened = iter([served.made[0].runtime])
        answer = loop.run_until_complete(client.post(path, content=sent + tail, headers=headers))
        statuses.append(answer.status_code)
        assert answer.status_code < 500, (path, sent, tail, length, answer.text)
        if answer.status_code >= 400:
            assert "\n" not in answer.json()["error"]

    one()
    loop.run_until_complete(served.repository.close())
    loop.run_until_complete(client.aclose())
    loop.close()
    return statuses


@pytest.fixture
def served(monkeypatch):
    return Served(monkeypatch)


@pytest.mark.slow
def test_a_hundred_malformed_requests_are_never_the_servers_fault(served):
    assert len(fuzzed(served, 100)) >= 90


@pytest.mark.exhaustive
def test_ten_thousand_malformed_requests_leave_memory_as_it_was(served):
    fuzzed(served, 2000)
    served.lines.clear()
    before = resident_bytes()
    statuses = fuzzed(served, 10_000)
    served.lines.clear()
    assert len(statuses) >= 9_000
    assert resident_bytes() < before * 1.05 + 20e6
