"""From a trained run to a guarded, watched service: the ten commands of docs/serve.md."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import cnnjax

ROOT = Path(__file__).parents[2]
# What builds for minutes, or would change a cluster; tests/serve/test_deploy.py checks its files.
LEFT_OUT = ("podman ", "kubectl ")


def commands():
    text = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- ten commands -->\n```bash\n(.*?)```", text, re.DOTALL)[1]
    return block.splitlines()


def test_there_are_ten_commands():
    assert len(commands()) == 10


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("bash"), reason="no curl, bash")
def test_the_ten_commands_of_the_docs(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("python_multipart")
    from PIL import Image

    seven = 255 - cnnjax.data.load("mnist").test.image[0, :, :, 0]
    Image.fromarray(seven).resize((90, 120)).save(tmp_path / "digit.png")
    for name in ("experiments", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = [line for line in commands() if not line.startswith(LEFT_OUT)]
    lines = [line.replace("8080", str(port)).replace("--epochs 2", "--epochs 1") for line in lines]
    if not shutil.which("promtool"):
        lines = [line.partition(" | promtool")[0] for line in lines]
    script = "set -eo pipefail\ntrap 'kill $(jobs -p); wait' EXIT\n" + "\necho; echo ==\n".join(
        lines
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trained, checked, _, _, started, predicted, labeled, *_ = done.stdout.split("\n==\n")
    assert "test         accuracy" in trained
    assert re.search(r"clean +no alarm of 10,000 images", checked)
    noticed = re.findall(r"noticed after (\d+) of", checked)
    assert len(noticed) == 5 and all(int(number) <= 500 for number in noticed)
    # The server says so when it is ready, wherever in the output that is.
    assert "serving      lenet at" in done.stdout
    answer = json.loads(re.search(r"\{.*\}", started + predicted)[0])
    assert answer["classes"][0]["class_name"] == "7"
    assert json.loads(re.search(r"\{.*\}", labeled)[0])["accuracy"] == 1.0
    events = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert {"shop", "prometheus"} <= {event["who"] for event in events}
    assert (tmp_path / "keys.json").stat().st_mode & 0o077 == 0
