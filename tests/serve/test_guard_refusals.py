"""What a stranger can send, over real sockets: refused, logged, counted; and the table of the docs.

With CNNJAX_WRITE_TABLES=1 the table in docs/serve.md is written anew.
"""

import asyncio
import contextlib
import json
import os
import socket
import ssl
import struct
import time
import zlib
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client")
pytest.importorskip("jwt")
pytest.importorskip("uvicorn")
pytest.importorskip("grpc")
pytest.importorskip("cryptography")
pytest.importorskip("httptools")
pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")

import grpc

from cnnjax.errors import UserError
from cnnjax.serve.guard import asgi, rpc, tokens, transport
from cnnjax.serve.guard.policy import Policy
from cnnjax.serve.http.web import application
from cnnjax.serve.rpc import service
from tests.serve.guarding import (
    AUDIENCE,
    ISSUER,
    digits_repository,
    guarded_application,
    lines_of,
    make_certificate,
    raw,
    refused_count,
    serving,
)

DOCS = Path(__file__).parents[2] / "docs" / "serve.md"
BEGIN, END = "<!-- refusals: begin -->\n", "<!-- refusals: end -->\n"
INFER = "/v2/models/lenet/infer"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Yields a guarded server: (port, its policy, keys, issuer, registry, log)."""
    app, *made = guarded_application(
        tmp_path_factory.mktemp("guard"), body_bytes=4000, body_secs=0.5
    )
    protocol = transport.patient_protocol(made[0], head_secs=0.5)
    with serving(app, http=protocol) as port:
        yield port, *made


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def png_header(width, height):
    """The head of a PNG file, and one chunk of pixels that are not there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(10))
    chunks = [
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each))
        for each in (header, data)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def request_bytes(path=INFER, body=b"{}", method="POST", **headers):
    lines = [f"{method} {path} HTTP/1.1"]
    length = str(len(body))
    headers = {"Host": "localhost", "Connection": "close", "Content-Length": length, **headers}
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def attempts(keys, issuer):
    """Returns (what is tried, bytes sent over HTTP, metadata of the same over gRPC or None)."""
    chunked = "Transfer-Encoding: chunked\r\n"
    good = f"Authorization: Bearer {keys['shop']}\r\n"
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{good}"
    secret = issuer.token("secret" * 8, "HS256")
    load = "/v2/repository/models/lenet/load"
    by_key = [
        ("no key", {}),
        ("a wrong key", bearer("cnnjax_" + "A" * 43)),
        ("an expired key", bearer(keys["old"])),
        ("a damaged token", bearer(issuer.token()[:-6])),
        ("a token signed by a stranger", bearer(issuer.token(issuer.stranger))),
        ("a token with an unknown key id", bearer(issuer.token(kid="two"))),
        ("a token of algorithm none", bearer(issuer.token("", "none"))),
        ("a token signed with a shared secret", bearer(secret)),
        ("an expired token", bearer(issuer.token(exp=int(time.time()) - 60))),
        ("a token that is not valid yet", bearer(issuer.token(nbf=int(time.time()) + 600))),
        ("a token without an end", bearer(issuer.token(exp=None))),
        ("a token for another audience", bearer(issuer.token(aud="shop"))),
        ("a token from another issuer", bearer(issuer.token(iss="https://evil.test"))),
        ("a token without a role", bearer(issuer.token(roles=["guest"]))),
    ]
    yield from ((what, request_bytes(**given), given) for what, given in by_key)
    yield "a key of the role infer that loads", request_bytes(load, **bearer(keys["shop"])), None
    metrics = request_bytes("/metrics", b"", "GET", **bearer(keys["shop"]))
    yield "a key of the role infer that reads metrics", metrics, None
    yield (
        "a body announced too large",
        request_bytes(body=b"x" * 4001, **bearer(keys["shop"])),
        None,
    )
    long = head + chunked + "\r\n" + 3 * ("800\r\n" + "x" * 2048 + "\r\n") + "0\r\n\r\n"
    yield "a body that turns out too large", long.encode(), None
    yield (
        "a compressed body",
        request_bytes(**bearer(keys["shop"]), **{"Content-Encoding": "gzip"}),
        None,
    )
    for name in (
        "../../etc/passwd",
        "..%2f..%2fetc%2fpasswd",
        "%2e%2e/infer",
        "%252e%252e",
        "a%00b",
    ):
        path = f"/v2/models/{name}"
        yield f"the model `{name}`", request_bytes(path, **bearer(keys["shop"])), None
    both = head + chunked + "Content-Length: 2\r\n\r\n0\r\n\r\n"
    yield "two lengths: Content-Length and chunked", both.encode(), None
    twice = head + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"
    yield "Content-Length twice", twice.encode(), None
    other = head + f"Authorization: Bearer {keys['operator']}\r\nContent-Length: 2\r\n\r\n{{}}"
    yield "two keys", other.encode(), None
    many = head + "".join(f"X-{number}: a\r\n" for number in range(200)) + "\r\n"
    yield "200 headers", many.encode(), None
    site = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    yield "a page of another site", request_bytes(**bearer(keys["shop"]), **site), None
    bomb = request_bytes(
        "/v1/models/lenet:predict", png_header(60_000, 60_000), **bearer(keys["shop"])
    )
    yield "an image of 60,000 x 60,000 pixels in 80 bytes", bomb, None
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    eps = request_bytes("/v1/models/lenet:predict", eps, **bearer(keys["shop"]))
    yield "a PostScript program as an image", eps, None
    pickled = request_bytes(
        "/v1/models/lenet:predict", b"\x80\x04cos\nsystem\n.", **bearer(keys["shop"])
    )
    yield "a pickle as an image", pickled, None
    files = b'{"parameters": {"file:1/model.onnx": "AAAA", "config": "{}"}}'
    config = request_bytes(load, files, **bearer(keys["operator"]))
    yield "a load that brings files and a config", config, None
    yield "a body that does not come", (head + "Content-Length: 9\r\n\r\n{").encode(), None


async def call(port, metadata):
    pairs = [(name.lower(), value) for name, value in metadata.items()]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        try:
            await method(b"", metadata=pairs, timeout=10)
            return "OK"
        except grpc.aio.AioRpcError as error:
            return error.code().name


@contextlib.asynccontextmanager
async def grpc_serving(policy):
    server, port = await service.start(
        digits_repository(), "127.0.0.1:0", interceptors=(rpc.interceptor(policy),)
    )
    try:
        yield port
    finally:
        await server.stop(0)


def status_of(answer):
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/") else 0


def events(log, after):
    """Returns the log's lines after the first `after`, once there is one."""
    deadline = time.monotonic() + 5
    while len(found := lines_of(log)) <= after and time.monotonic() < deadline:
        time.sleep(0.01)
    return found[after:]


@pytest.mark.slow
def test_each_attempt_is_refused_logged_and_counted(guarded):
    port, policy, keys, issuer, registry, log = guarded
    rows = ["| what is tried | HTTP | gRPC | reason in log and counter |", "|---|---|---|---|"]
    for what, sent, metadata in attempts(keys, issuer):
        before = len(lines_of(log))
        answer = raw(port, sent)
        status = status_of(answer)
        assert 400 <= status < 500, (what, answer)
        (event,) = events(log, before)
        reason = event["reason"]
        assert (event["result"], event["status"]) == ("refused", status)
        assert (
            event["request_id"] and event["client"] == "127.0.0.1" and event["protocol"] == "http"
        )
        if reason != "malformed":  # The parser of HTTP answers that, in plain text.
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        code = ""
        if metadata is not None:

            async def over_grpc(metadata=metadata):
                async with grpc_serving(policy) as grpc_port:
                    return await call(grpc_port, metadata)

            code = asyncio.run(over_grpc())
            *_, event = events(log, before + 1)
            assert (event["protocol"], event["reason"], event["status"]) == ("grpc", reason, code)
            assert refused_count(registry, reason) >= 1
        rows.append(f"| {what} | {status} | {code} | `{reason}` |")
    logged = [event for event in lines_of(log) if event["reason"]]
    for reason in {event["reason"] for event in logged}:
        count = sum(event["reason"] == reason for event in logged)
        assert refused_count(registry, reason) == count
    check_table("\n".join(rows) + "\n")


def check_table(table):
    text = DOCS.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    found, _, after = rest.partition(END)
    if os.environ.get("CNNJAX_WRITE_TABLES"):
        DOCS.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    else:
        assert found == table


def test_what_may_pass_passes(guarded):
    port, _, keys, issuer, _, log = guarded
    before = len(lines_of(log))
    senders = {"shop": keys["shop"], "token:ada": issuer.token(), "operator": keys["operator"]}
    for name, key in senders.items():
        status, content = asked(port, infer_body(), **bearer(key))
        assert status == 200 and content["model_name"] == "lenet"
        (event,) = events(log, before)
        assert (event["who"], event["result"], event["model"]) == (name, "allowed", "lenet")
        before += 1
    assert asked(port, b"", "/v2/health/live", "GET") == (200, {"live": True})
    for roles in ("openid admin", ["x", "admin"]):
        token = bearer(issuer.token(roles=roles))
        assert asked(port, b"", "/v2/repository/models/other/unload", **token)[0] == 404
    metrics = request_bytes("/metrics", b"", "GET", **bearer(keys["prometheus"]))
    assert b"cnnjax_refused_total" in raw(port, metrics)


def infer_body():
    pixels = [0] * 784
    tensor = {"name": "image", "shape": [1, 28, 28, 1], "datatype": "UINT8", "data": pixels}
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def asked(port, body, path=INFER, method="POST", **headers):
    """Returns the status and the JSON of an answer."""
    answer = raw(port, request_bytes(path, body, method, **headers))
    return status_of(answer), json.loads(answer.partition(b"\r\n\r\n")[2])


def test_a_key_over_its_rate_is_told_when_to_come_back(guarded):
    port, _, keys, _, registry, _ = guarded
    sent = request_bytes("/v2", b"", "GET", **bearer(keys["slow"]))
    answers = [raw(port, sent) for _ in range(4)]
    assert [status_of(answer) for answer in answers] == [200, 200, 429, 429]
    assert b"retry-after: 1\r\n" in answers[-1]
    assert refused_count(registry, "over_rate") == 2


@pytest.mark.slow
def test_a_head_that_does_not_come_is_not_waited_for(guarded):
    port, *_, registry, log = guarded
    before = len(lines_of(log))
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        began = time.monotonic()
        slow.sendall(b"GET /v2 HTTP/1.1\r\nHost: lo")
        assert slow.recv(100) == b""
        assert 0.2 < time.monotonic() - began < 5
    # Each byte restarts nothing: the whole head has this time.
    with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            slow.sendall(b"GET /")
            while time.monotonic() - began < 5:
                slow.sendall(b"a")
                time.sleep(0.1)
        assert time.monotonic() - began < 4
    assert [event["reason"] for event in events(log, before + 1)] == ["slow_head"]
    assert refused_count(registry, "slow_head") == 2


def test_grpc_lets_in_by_role_and_leaves_health_open(guarded):
    _, policy, keys, issuer, _, log = guarded
    # Of a message whose first field is a name; its tag and length come first.
    other, path = b"\x0a\x05other", b"\x0a\x09../../etc"
    tried = (
        ("ServerLive", b"", "", "OK"),
        ("ServerMetadata", b"", "", "UNAUTHENTICATED"),
        ("ServerMetadata", b"", keys["shop"], "OK"),
        ("ServerMetadata", b"", issuer.token(), "OK"),
        ("ModelMetadata", other, keys["shop"], "NOT_FOUND"),
        ("ModelMetadata", path, keys["shop"], "INVALID_ARGUMENT"),
        ("RepositoryModelUnload", b"", keys["shop"], "PERMISSION_DENIED"),
        ("RepositoryModelUnload", b"", keys["operator"], "NOT_FOUND"),
        ("Missing", b"", keys["operator"], "UNIMPLEMENTED"),
    )

    async def ask_all():
        async with (
            grpc_serving(policy) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            for method, content, key, _ in tried:
                ask = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
                try:
                    await ask(content, metadata=[("x-api-key", key)] if key else [], timeout=10)
                    yield "OK"
                except grpc.aio.AioRpcError as error:
                    yield error.code().name

    async def codes():
        return [code async for code in ask_all()]

    before = len(lines_of(log))
    assert asyncio.run(codes()) == [code for *_, code in tried]
    found = [event["reason"] for event in lines_of(log)[before:]]
    assert found == ["no_credentials", "", "", "", "bad_path", "wrong_role", ""]


def test_clients_need_a_certificate_of_the_authority(tmp_path):
    authority = make_certificate(tmp_path, "authority")
    make_certificate(tmp_path, "server", authority=authority)
    make_certificate(tmp_path, "client", authority=authority)
    make_certificate(tmp_path, "stranger")
    paths = [str(tmp_path / name) for name in ("server.pem", "server.key", "authority.pem")]
    options = transport.tls_options(*paths)
    policy = Policy(certified=True, any_host=True)
    app = application(digits_repository(), middleware=(asgi.guard(policy),), loads=False)
    with serving(app, **options) as port:

        def status(name=""):
            context = ssl.create_default_context(cafile=paths[2])
            if name:
                context.load_cert_chain(tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as connection,
            ):
                connection.sendall(request_bytes("/v2", b"", "GET"))
                return status_of(connection.recv(4096))

        assert status("client") == 200
        # In TLS 1.3 a client learns only as it reads that its certificate was refused.
        for name in ("", "stranger"):
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                assert status(name) == 0
    assert transport.grpc_credentials(options) is not None


def test_a_stopping_server_waits_for_no_farewell(tmp_path):
    make_certificate(tmp_path, "server")
    paths = [str(tmp_path / name) for name in ("server.pem", "server.key")]
    app = application(digits_repository(), loads=False)
    options = transport.tls_options(*paths) | {"http": transport.patient_protocol(Policy())}
    context = ssl.create_default_context(cafile=paths[0])
    with serving(app, **options) as port:
        plain = socket.create_connection(("127.0.0.1", port), timeout=10)
        idle = context.wrap_socket(plain, server_hostname="localhost")
        idle.sendall(request_bytes("/v2", b"", "GET", Connection="keep-alive"))
        assert status_of(idle.recv(4096)) == 200
        began = time.monotonic()
    # It would be half a minute.
    assert time.monotonic() - began < 15
    idle.close()


def test_an_offer_of_another_protocol_is_not_taken_up():
    async def app(scope, receive, send):
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"][::-1]})

    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMA"}
    with serving(app, http=transport.patient_protocol(Policy())) as port:
        # Of two on one connection, and with what looks like an offer within a body.
        sent = request_bytes(body=b"abc\r\nupgrade: me", **offer)
        sent += request_bytes(body=b"\r\n\r\nxyz")
        answer = raw(port, sent)
    assert b"em :edargpu\n\rcba" in answer
    assert b"zyx\n\r\n\r" in answer


def test_each_of_several_requests_learns_that_the_client_has_gone():
    begun, gone = [], []

    async def app(scope, receive, send):
        begun.append(scope["path"])
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.append(scope["path"])

    with serving(app, http=transport.patient_protocol(Policy())) as port:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            several = (
                request_bytes(path, Connection="keep-alive") for path in ("/first", "/second")
            )
            client.sendall(b"".join(several))
            until = time.monotonic() + 10
            while not begun and time.monotonic() < until:
                time.sleep(0.01)
        while not gone and time.monotonic() < until:
            time.sleep(0.01)
    assert begun == gone == ["/first"]


def test_files_that_make_no_tls_are_named(tmp_path):
    make_certificate(tmp_path, "a")
    make_certificate(tmp_path, "b")
    make_certificate(tmp_path, "ended", days=-1)
    a, b, ended = (str(tmp_path / name) for name in ("a.pem", "b.pem", "ended.pem"))
    keys = {name: name.replace(".pem", ".key") for name in (a, b, ended)}
    for arguments, words in (
        ((a, ""), "both --tls-certificate"),
        (("", "", a), "both --tls-certificate"),
        ((a, keys[b]), "belong together"),
        ((keys[a], keys[a]), "belong together"),
        (("/nowhere.pem", keys[a]), "there is no such file"),
        ((ended, keys[ended]), "it ended on"),
        ((a, keys[a], keys[a]), "no certificates"),
    ):
        with pytest.raises(UserError, match=words):
            transport.tls_options(*arguments)
    assert transport.tls_options("", "") == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithms": ("none",)}, "has no signature"),
        ({"algorithms": ("HS256",)}, "one secret for both sides"),
        ({"algorithms": ("RS265",)}, "did you mean RS256"),
        ({"algorithms": ()}, "name at least one"),
        ({"audience": ""}, "needs --jwt-audience"),
        ({"issuer": ""}, "needs --jwt-issuer"),
        ({"jwks": "http://issuer.test/jwks"}, "an https URL"),
        ({"jwks": "/nowhere.json"}, "No such file"),
    ],
)
def test_rules_for_tokens_that_let_in_too_many_are_refused(guarded, change, words):
    rules = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": guarded[3].jwks} | change
    with pytest.raises(UserError, match=words):
        tokens.token_verifier(tokens.TokenRules(**rules))


def test_key_sets_that_are_none_are_named(tmp_path):
    for content, words in (
        ("{", "no JSON Web Key Set"),
        ('{"keys": []}', "no JSON Web Key Set"),
        ('{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}', "shared secret"),
        ("[]", "no JSON Web Key Set"),
    ):
        path = tmp_path / "jwks.json"
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            tokens.read_jwks(str(path))


def test_new_keys_of_an_issuer_are_asked_for_and_not_too_often(tmp_path, guarded):
    issuer, asked = guarded[3], []
    content = [Path(issuer.jwks).read_bytes().replace(b'"one"', b'"zero"')]

    async def jwks(scope, receive, send):
        asked.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content[0]})

    with serving(jwks) as port:
        now = [0.0]
        rules = tokens.TokenRules(ISSUER, AUDIENCE, f"http://127.0.0.1:{port}/jwks")
        verify = tokens.token_verifier(rules, clock=lambda: now[0])
        content[0] = Path(issuer.jwks).read_bytes()
        for seconds, outcome in ((10, "bad_token"), (29, "bad_token"), (31, "token:ada")):
            now[0] = seconds
            try:
                assert verify(issuer.token()).name == outcome
            except tokens.Refused as refused:
                assert refused.reason == outcome
        assert len(asked) == 2
    now[0] = 1000.0
    assert verify(issuer.token()).name == "token:ada"  # The issuer is away.
