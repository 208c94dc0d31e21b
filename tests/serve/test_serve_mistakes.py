"""Mistakes of `cnnjax serve` are one line, before anything is loaded."""

import pytest

from cnnjax.commands import serve
from cnnjax.errors import UserError
from cnnjax.run import cli

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "jwt"):
    pytest.importorskip(package)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "no model given: name a run directory or an exported file by --run"),
        (["--run", "/nowhere.onnx"], "there is no file /nowhere.onnx"),
        (["--run", "{model}", "--run", "{model}", "--run", "a/b.gif"], "a/b.gif is not there"),
        (["--run", "a:b c={model}"], "'b c' is no version"),
        (["--run", "{model}", "--host", "0.0.0.0"], "others could reach it, and no key is asked"),
        (["--run", "{model}", "--max-batch", "0"], "--max-batch 0: give 1 to 4096"),
        (["--run", "{model}", "--workers", "0"], "--workers 0: give 1 to 256"),
        (["--run", "{model}", "--sizes", "big"], "--sizes big: give HEIGHTxWIDTH"),
        (["--run", "{model}", "--sizes", "0x9"], "--sizes 0x9: give sides of 1 to 4096"),
        (["--run", "{model}", "--sizes", "9x9"], "takes images of one size; leave it out"),
        (["--run", "a/b={model}"], "there is no such path, and 'a/b' is no name of a model"),
        (["--run", "{model}", "--grace", "-1"], "--grace -1: give 0 to 3600"),
        (["--run", "{model}", "--keep-alive", "0"], "--keep-alive 0: give 1 to 3600"),
        (["--run", "{model}", "--threads", "-1"], "--threads -1: give 0 to 1024"),
        (["--run", "{model}", "--jwt-burst", "-1"], "--jwt-burst -1: give 0 or more"),
        (["--run", "{model}", "--jwt-leeway", "nan"], "--jwt-leeway nan: give 0 or more"),
        (["--run", "{model}", "--timeout", "-1"], "--timeout -1: give 0.001 to 86400"),
        (["--run", "{model}", "--queue", "0"], "--queue 0: give room for 1 image"),
        (["--run", "{model}", "--delay-ms", "-1"], "--delay-ms -1: give 0 to 10000"),
        (["--run", "{model}", "--grpc-port", "70000"], "--grpc-port 70000: give 0 to 65535"),
        (["--run", "{model}", "--port", "-1"], "--port -1: give 0 to 65535"),
        (["--run", "{model}", "--keys", "/no/keys"], "cannot read the file of keys '/no/keys'"),
        (["--run", "{model}", "--keys", "{model}"], "is damaged"),
        (["--run", "{model}", "--jwt-jwks", "a"], "--jwt-jwks needs --jwt-issuer"),
        (["--run", "{model}", "--jwt-issuer", "a"], "need --jwt-jwks FILE or URL"),
        (["--run", "{model}", "--jwt-per-second", "-1"], "--jwt-per-second -1: give 0 or more"),
        (["--run", "{model}", "--tls-key", "a"], "TLS needs both --tls-certificate FILE and"),
        (["--run", "{model}", "--tls-client-ca", "a"], "TLS needs both --tls-certificate FILE and"),
        (
            ["--run", "{model}", "--audit-log", "/no/where"],
            "cannot write the audit log '/no/where'",
        ),
        (["--run", "{model}", "--reference", "a"], "--reference a: write NAME=RUN"),
        (["--run", "{model}", "--reference", "a=b"], "unknown model 'a'"),
        (["--run", "{model}", "--reference", "model=b"], "b has no reference.npz: make it by"),
        (["--run", "{model}", "--log", "/no/where"], "cannot write the log /no/where"),
        (["--run", "{model}", "--traces", "here"], "--traces here: give a URL"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_loaded(flags, text, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_serve", lambda *arguments: pytest.fail("it served"))
    if "--traces" in flags:
        pytest.importorskip("opentelemetry.sdk")
    model = tmp_path / "model.stablehlo"
    model.write_bytes(b"")
    words = [word.format(model=model) for word in ["--port", "0", *flags]]
    config = cli.parse(serve.Config, words, program="cnnjax serve")
    with pytest.raises(UserError) as error:
        serve.main(config)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_size_that_a_network_does_not_take_is_told_before_it_is_loaded(run, monkeypatch):
    monkeypatch.setattr(serve, "_serve", lambda *arguments: pytest.fail("it served"))
    monkeypatch.setattr("cnnjax.run.load.load_variables", lambda *a: pytest.fail("it loaded"))
    words = ["--port", "0", "--run", str(run), "--sizes", "28x28,64x32"]
    with pytest.raises(UserError) as error:
        serve.main(cli.parse(serve.Config, words, program="cnnjax serve"))
    assert str(error.value) == (
        f"--sizes 64x32: lenet5 of {run}, trained on images of 28x28, takes none of this size; "
        "leave it out."
    )


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--ray", "x"], "--ray x: give a number of replicas, or LEAST:MOST such as 1:3"),
        (["--ray", "3:1"], "--ray 3:1: give at least 1, and LEAST no more than MOST"),
        (["--ray", "0"], "--ray 0: give at least 1"),
        (["--ray", "1:"], "--ray 1:: give a number"),
        (["--ray", "2", "--grpc-port", "9000"], "--grpc-port with --ray: Ray's proxy speaks plain"),
        (["--ray", "2", "--ray-requests", "0"], "--ray-requests 0: give a number above 0"),
        (["--ray", "2", "--ray-models", "-1"], "are 0 or more"),
        (["--ray", "2", "--workers", "2"], "--workers with --ray: --ray says how many"),
    ],
)
def test_mistakes_about_ray_are_one_line_before_it_is_started(flags, text, tmp_path):
    pytest.importorskip("ray.serve")
    model = tmp_path / "model.stablehlo"
    model.write_bytes(b"")
    config = cli.parse(serve.Config, ["--run", str(model), *flags], program="cnnjax serve")
    with pytest.raises(UserError) as error:
        serve.main(config)
    assert text in str(error.value)
