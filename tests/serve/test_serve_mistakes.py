"""Mistakes of `cnnjax serve` are one line, before anything is loaded."""

import pytest

from cnnjax.commands import serve
from cnnjax.errors import UserError
from cnnjax.run import cli

for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
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
        (["--run", "{model}", "--timeout", "-1"], "--timeout -1: give 0.001 to 86400"),
        (["--run", "{model}", "--queue", "0"], "--queue 0: give room for 1 image"),
        (["--run", "{model}", "--delay-ms", "-1"], "--delay-ms -1: give 0 to 10000"),
        (["--run", "{model}", "--grpc-port", "70000"], "--grpc-port 70000: give 0 to 65535"),
        (["--run", "{model}", "--port", "-1"], "--port -1: give 0 to 65535"),
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
