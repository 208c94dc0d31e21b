"""What the tests of the guard share: an issuer of tokens, keys, a guarded server on a socket."""

import asyncio
import contextlib
import dataclasses
import datetime
import json
import socket
import threading
import time

import jwt
import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cnnjax.serve.guard import keys
from cnnjax.serve.server import event_loop

ISSUER, AUDIENCE = "https://issuer.test", "cnnjax"


@dataclasses.dataclass(frozen=True)
class Issuer:
    """An identity provider: private keys, and the file of their public halves."""

    private: ec.EllipticCurvePrivateKey
    stranger: ec.EllipticCurvePrivateKey
    jwks: str

    def token(self, key=None, algorithm="ES256", kid="one", headers=None, **claims):
        now = int(time.time())
        claims = {
            **{"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": now + 300, "roles": ["infer"]},
            **claims,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        headers = {"kid": kid, **(headers or {})}
        key = self.private if key is None else key
        return jwt.encode(claims, key, algorithm=algorithm, headers=headers)


def make_issuer(directory):
    private = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(private.public_key()))
    path = directory / "jwks.json"
    path.write_text(json.dumps({"keys": [{**public, "kid": "one", "alg": "ES256"}]}))
    return Issuer(private, ec.generate_private_key(ec.SECP256R1()), str(path))


def make_keys(directory):
    """Returns the path of a file of keys, and the keys by their names."""
    secrets, known, now = {}, (), time.time()
    for name, role, options in (
        ("shop", "infer", {}),
        ("operator", "admin", {}),
        ("prometheus", "metrics", {}),
        ("slow", "infer", {"per_second": 1.0, "burst": 2}),
        ("old", "infer", {"days": 1, "now": now - 3 * 86_400}),
    ):
        known, secrets[name] = keys.add_key(known, name, role, **options)
    path = directory / "keys.json"
    keys.write_keys(path, known)
    return path, secrets


def digits_repository(measures=None):
    """Returns a repository whose model `lenet` answers with the mean of each image, in NumPy."""
    from cnnjax.data.image_files import image_to_shape
    from cnnjax.serve import batcher, models, runtime
    from cnnjax.serve.repository import Repository
    from cnnjax.serve.rollout import all_to

    def call(images):
        logits = np.zeros((len(images), 10), np.float32)
        logits[np.arange(len(images)), images.mean(axis=(1, 2, 3)).astype(int) % 10] = 5.0
        return logits, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    opened = runtime.Runtime(
        source="",
        platform="numpy",
        step=-1,
        shapes=((28, 28, 1),),
        dtype="uint8",
        class_names=tuple("0123456789"),
        num_logits=10,
        buckets=(1, 2, 4, 8),
        call=call,
        prepare=lambda image: image_to_shape(image, (28, 28, 1), fit="pad"),
    )
    repository = Repository([], measures=measures)
    loaded = models.Loaded(opened, batcher.Batcher(opened, repository.limits), 0.0)
    source = models.Source("lenet", "1", "")
    repository.models["lenet"] = models.Model(
        {"1": source}, loaded={"1": loaded}, rollout=all_to("1")
    )
    return repository


def guarded_application(directory, **bounds):
    """Returns the application with keys and tokens, its secrets, issuer, measures and log."""
    from cnnjax.serve.guard import asgi, settings
    from cnnjax.serve.http.web import Bounds, application
    from cnnjax.serve.measures import Measures

    path, secrets = make_keys(directory)
    issuer, measures, log = make_issuer(directory), Measures(), directory / "audit.jsonl"
    guarding = settings.Guarding(
        keys=str(path),
        jwt_jwks=issuer.jwks,
        jwt_issuer=ISSUER,
        jwt_audience=AUDIENCE,
        audit_log=str(log),
    )
    policy = settings.policy_of(guarding, "0.0.0.0", insecure=False, measures=measures)
    app = application(
        digits_repository(measures),
        middleware=(asgi.guard(policy),),
        bounds=Bounds(**bounds),
        loads=False,
    )
    return app, policy, secrets, issuer, measures.registry, log


def lines_of(log):
    return [json.loads(line) for line in log.read_text().splitlines()]


def refused_count(registry, reason):
    return registry.get_sample_value("cnnjax_refused_total", {"reason": reason}) or 0


@contextlib.contextmanager
def serving(application, **options):
    """Runs uvicorn on a free port of loopback in a thread, and yields the port."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(application, port=port, log_level="warning", lifespan="off", **options)
    server = uvicorn.Server(config)

    def run():
        with asyncio.Runner(loop_factory=event_loop()) as runner:
            runner.run(server.serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join(20)


def raw(port, content, *, secs=5.0):
    """Sends bytes to a port of loopback and returns what comes back until it is closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=secs) as connection:
        connection.sendall(content)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := connection.recv(65_536):
                answer += part
        return answer


def make_certificate(directory, name, *, authority=None, days=30):
    """Writes NAME.pem and NAME.key, signed by an authority or by itself, and returns both."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer = (authority[0].subject, authority[1]) if authority else (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
    (directory / f"{name}.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, key
