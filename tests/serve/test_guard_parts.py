"""The parts of the guard alone: keys, buckets, paths, headers, images, binding, the audit log."""

import base64
import dataclasses
import json
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnjax.errors import UserError
from cnnjax.serve.guard import audit, keys, rates, requests, tokens
from cnnjax.serve.guard.keys import Identity
from cnnjax.serve.guard.refusal import REASONS, Refused

pytest.importorskip("prometheus_client")
pytest.importorskip("jwt")

from cnnjax.serve import measures
from cnnjax.serve.guard import settings as flags


def refused_reason(call, *arguments, **options):
    with pytest.raises(Refused) as found:
        call(*arguments, **options)
    return found.value.reason


def test_a_key_is_found_by_its_hash_alone_and_the_file_does_not_hold_it(tmp_path):
    path = tmp_path / "keys.json"
    known, secret = keys.add_key((), "shop", "infer", per_second=3)
    keys.write_keys(path, known)
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = keys.find_key(keys.read_keys(path), secret, now=0)
    assert found == Identity("shop", "infer", 3, 6)
    assert refused_reason(keys.find_key, known, secret[:-1], now=0) == "unknown_key"
    assert len(base64.urlsafe_b64decode(secret.removeprefix(keys.PREFIX) + "=")) == 32


def test_a_key_ends_when_its_days_are_over():
    known, secret = keys.add_key((), "shop", "infer", days=2, now=1e9)
    assert keys.find_key(known, secret, now=1e9 + 2 * 86_400 - 1).name == "shop"
    assert refused_reason(keys.find_key, known, secret, now=1e9 + 2 * 86_400) == "expired_key"


def test_a_changed_file_of_keys_is_read_within_a_second(tmp_path):
    path, now, said = tmp_path / "keys.json", [100.0], []
    known, secret = keys.add_key((), "shop", "infer")
    keys.write_keys(path, known)
    file = keys.KeyFile(path, complain=said.append, clock=lambda: now[0])
    assert file.find(secret).name == "shop"
    path.write_text("{")
    now[0] += 1
    assert file.find(secret).name == "shop" and "damaged" in said[0]
    keys.write_keys(path, ())
    now[0] += 1
    assert refused_reason(file.find, secret) == "unknown_key"
    keys.write_keys(path, known)
    now[0] += 1
    assert file.find(secret).name == "shop"
    path.unlink()
    now[0] += 1
    assert refused_reason(file.find, secret) == "unknown_key" and "gone" in said[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"role": "boss"}, "the role 'boss': choose from infer, metrics, admin"),
        ({"sha256": "x"}, "no SHA-256 for shop"),
        ({"expires": "soon"}, "the end 'soon' of shop"),
        ({"per_second": -1}, "the rate -1 of shop"),
        ({"name": "../x"}, "the name '../x'"),
        ({"nonsense": 1}, "damaged"),
    ],
)
def test_a_file_of_keys_says_what_is_wrong_with_it(tmp_path, change, words):
    known, _ = keys.add_key((), "shop", "infer")
    entry = dataclasses.asdict(known[0]) | change
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [entry]}))
    with pytest.raises(UserError, match=words):
        keys.read_keys(path)


@settings(max_examples=30)
@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=60),
    st.floats(0.1, 50),
    st.integers(1, 20),
)
def test_a_bucket_gives_no_more_than_its_burst_and_what_came_in(gaps, per_second, burst):
    now = [0.0]
    buckets = rates.Rates(clock=lambda: now[0])
    identity, taken = Identity("shop", "infer", per_second, burst), 0
    for gap in gaps:
        now[0] += gap
        try:
            buckets.check(identity)
            taken += 1
        except Refused as refused:
            # Who waits as long as was said is let in.
            level, wait = rates.take(
                buckets._buckets["shop"][0],
                refused.retry_after + 1e-9,
                per_second=per_second,
                burst=burst,
            )
            assert wait == 0 and level >= 0
    assert taken <= burst + per_second * now[0] + 1e-6
    assert taken >= min(len(gaps), burst)


def test_buckets_forget_the_longest_unused():
    buckets = rates.Rates(clock=lambda: 0.0, most=2)
    for name in ("a", "b", "c"):
        buckets.check(Identity(name, "infer", 1.0, 1))
    assert refused_reason(buckets.check, Identity("c", "infer", 1.0, 1)) == "over_rate"
    buckets.check(Identity("a", "infer", 1.0, 1))


@pytest.mark.parametrize(
    "path",
    [
        b"/v2/models/../../etc/passwd",
        b"/v2/models/..%2f..%2fetc",
        b"/v2/models/%2e%2e/infer",
        b"/v2/models/%252e%252e/infer",
        b"/v2/models/a%00b/infer",
        b"/v2/models/a%5c..%5cb",
        b"/v2/models/a\\b",
        b"/v2/models/%ff/infer",
        b"/v2/models/a%0d%0ab",
        b"/v1/models/.ssh:predict",
        b"/v2/models/a b/infer",
        b"/v2/" + b"a" * 3000,
    ],
)
def test_paths_that_go_elsewhere_are_refused(path):
    assert refused_reason(requests.check_path, path) == "bad_path"


@settings(max_examples=30)
@given(st.from_regex(requests.MODEL_NAME, fullmatch=True))
def test_every_name_of_a_model_may_be_asked_for(name):
    for path in (f"/v2/models/{name}/versions/3/infer", f"/v1/models/{name}:predict"):
        requests.check_path(path.encode())
        assert requests.needed_role("POST", path) == "infer"
        assert requests.model_of(path) == name


@settings(max_examples=30)
@given(st.binary(max_size=60))
def test_no_path_is_more_than_refused(path):
    try:
        requests.check_path(b"/v2/models/" + path)
    except Refused as refused:
        assert refused.reason == "bad_path"


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/v2/health/live", ""),
        ("GET", "/v2/health/ready", ""),
        ("GET", "/", "infer"),
        ("GET", "/v2", "infer"),
        ("POST", "/v2/models/a/infer", "infer"),
        ("POST", "/v2/repository/index", "infer"),
        ("POST", "/v1/models/a:predict", "infer"),
        ("POST", "/v1/models/a:feedback", "infer"),
        ("GET", "/metrics", "metrics"),
        ("POST", "/v2/repository/models/a/load", "admin"),
        ("POST", "/v2/repository/models/a/unload", "admin"),
        ("POST", "/v1/models/a:rollback", "admin"),
        ("POST", "/v1/models/a:anything", "admin"),
        ("DELETE", "/v2/models/a", "admin"),
        ("POST", "/v2/health/live", "admin"),
        ("GET", "/v2/health/live/", "admin"),
        ("GET", "//v2/health/live", "admin"),
    ],
)
def test_what_is_not_listed_is_for_administrators(method, path, role):
    assert requests.needed_role(method, path) == role


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([("content-length", "5"), ("transfer-encoding", "chunked")], "bad_headers"),
        ([("content-length", "5"), ("content-length", "5")], "bad_headers"),
        ([("transfer-encoding", "chunked, identity")], "bad_headers"),
        ([("content-length", "+5")], "bad_headers"),
        ([("content-length", "-1")], "bad_headers"),
        ([("authorization", "Bearer a"), ("authorization", "Bearer b")], "bad_headers"),
        ([("x-request-id", "a\x00b")], "bad_headers"),
        ([(f"x-{number}", "") for number in range(101)], "bad_headers"),
        ([("x", "a" * 40_000)], "bad_headers"),
        ([("content-encoding", "gzip")], "encoded_body"),
    ],
)
def test_headers_with_two_meanings_are_refused(headers, reason):
    pairs = [(name.encode(), value.encode()) for name, value in headers]
    assert refused_reason(requests.check_headers, pairs) == reason


def test_pages_of_other_sites_are_refused_and_own_pages_are_not():
    def check(any_host=True, **headers):
        pairs = [
            (name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()
        ]
        return requests.check_site(pairs, any_host=any_host)

    check(host="a.test", sec_fetch_site="same-origin", origin="https://a.test")
    check(host="127.0.0.1:8080", any_host=False)
    check(host="[::1]:8080", any_host=False)
    assert refused_reason(check, host="a.test", any_host=False) == "unknown_host"
    assert refused_reason(check, host="a.test", origin="https://b.test") == "cross_site"
    for origin in ("null", "http://[", "http://[::1", "//[x]"):
        assert refused_reason(check, host="a.test", origin=origin) == "cross_site"
    assert refused_reason(check, host="a.test", sec_fetch_site="cross-site") == "cross_site"


def test_a_key_comes_by_bearer_by_its_own_header_or_as_a_password():
    basic = "Basic " + base64.b64encode(b"any:secret").decode()
    for name, value in (
        (b"authorization", b"Bearer secret"),
        (b"authorization", b"bearer  secret"),
        (b"x-api-key", b"secret"),
        (b"authorization", basic.encode()),
    ):
        assert requests.credential([(name, value)]) == "secret"
    both = [(b"authorization", b"Bearer a"), (b"x-api-key", b"b")]
    assert refused_reason(requests.credential, both) == "bad_headers"
    assert requests.credential([]) == ""


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([b"authorization", b"x-api-key"]), st.binary())))
def test_no_credential_is_more_than_refused(headers):
    try:
        requests.credential(headers)
    except Refused as refused:
        assert refused.reason in REASONS


def test_elsewhere_needs_a_key_a_certificate_or_the_word(tmp_path):
    known, _ = keys.add_key((), "shop", "infer")
    keys.write_keys(tmp_path / "keys.json", known)
    path = str(tmp_path / "keys.json")

    def check(host, *, insecure=False, **given):
        measured = measures.Measures()
        return flags.policy_of(flags.Guarding(**given), host, insecure=insecure, measures=measured)

    for host in ("127.0.0.1", "localhost", "::1"):
        assert not check(host).any_host
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com"):
        with pytest.raises(UserError, match="--insecure"):
            check(host)
        assert check(host, insecure=True).any_host
        assert check(host, keys=path).asks_for_keys
        assert check(host, tls_client_ca="ca.pem").certified


def test_the_audit_log_escapes_cuts_and_survives_its_own_move(tmp_path):
    log = tmp_path / "audit.jsonl"
    write = audit.audit_log(log)
    write({"who": 'a"\n{"forged": true}', "action": "x" * 10_000})
    os.rename(log, tmp_path / "old")
    write({"who": "b"})
    lines = (tmp_path / "old").read_text().splitlines()
    assert len(lines) == 1 and len(lines[0]) < 1000
    assert json.loads(lines[0])["who"] == 'a"\n{"forged": true}'
    assert json.loads(log.read_text())["who"] == "b"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_costs_lines_of_the_log_and_no_answer(tmp_path, capsys):
    link, lost = tmp_path / "audit.jsonl", []
    link.symlink_to("/dev/full")
    write = audit.audit_log(link, lost=lambda: lost.append(1))
    write({"who": "a"})
    write({"who": "b"})
    assert len(lost) == 2
    assert capsys.readouterr().err.count("cannot write the audit log") == 1
    link.unlink()
    write({"who": "c"})
    assert json.loads(link.read_text())["who"] == "c"
    assert "is written again" in capsys.readouterr().err


def test_tokens_know_all_roles():
    assert set(tokens.WIDEST_FIRST) == set(keys.ROLES)
