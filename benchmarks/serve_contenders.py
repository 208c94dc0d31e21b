"""The servers that `serve.py` compares: how each is started, and asked for the same images."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from serve_processes import HERE, Asked, Server, free_port

JSON = ("Content-Type:application/json",)
BYTES = ("Content-Type:application/octet-stream",)


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another server: its name, the package that it is, and the Python that has it."""

    name: str
    package: str
    python: str


def peers_of(litserve: str, mlserver: str, ray: str) -> tuple[Peer, ...]:
    """Returns the peers whose packages these Pythons have; says which are left out."""
    known = (
        Peer("LitServe", "litserve", litserve),
        Peer("MLServer", "mlserver", mlserver),
        Peer("Ray Serve", "ray.serve", ray),
    )
    found = []
    for peer in known:
        words = [peer.python, "-c", f"import {peer.package}"]
        if subprocess.run(words, capture_output=True).returncode:
            print(f"{peer.name} is left out: {peer.python} has no {peer.package}", flush=True)
        else:
            found.append(peer)
    return tuple(found)


def write_bodies(run: str, folder: Path) -> dict[str, Path]:
    """Writes the bodies of requests for one image, of the form that each server takes."""
    from PIL import Image

    from cnnjax.run.files import read_json

    shape = tuple(read_json(Path(run) / "model.json", f"{run} is no run")["image_shape"])
    image = np.random.default_rng(0).integers(0, 256, (1, *shape), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(image[0, ..., 0] if shape[-1] == 1 else image[0]).save(buffer, "PNG")
    files = {"png": buffer.getvalue(), "tensor": image.tobytes()}
    content = files["tensor"]
    tensor: dict[str, Any] = {"name": "image", "shape": image.shape, "datatype": "UINT8"}
    tensor["parameters"] = {"binary_data_size": len(content)}
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    contents = {"cnnjax-png": files["png"], "cnnjax-tensor": head + content}
    for kind, each in files.items():
        text = base64.b64encode(each).decode()
        contents[f"LitServe-{kind}"] = json.dumps({kind: text}).encode()
        # Base64 is its shortest form over HTTP: a list of numbers takes it longer to read.
        listed: dict[str, Any] = {
            "name": kind,
            "shape": [1, 1],
            "datatype": "BYTES",
            "data": [text],
        }
        listed["parameters"] = {"content_type": "base64"}
        contents[f"MLServer-{kind}"] = json.dumps({"inputs": [listed]}).encode()
        contents[f"Ray Serve-{kind}"] = each
    for name, each in contents.items():
        (folder / name).write_bytes(each)
    (folder / "head").write_text(str(len(head)))
    return {name: folder / name for name in contents}


def cnnjax_server(run: str, batch: int, folder: Path, queue: int) -> Server:
    """Starts `cnnjax serve`, batching or not."""
    bodies, port = write_bodies(run, folder), free_port()
    words = [sys.executable, "-m", "cnnjax", "serve", "--run", f"model={run}", "--port", str(port)]
    words += ["--max-batch", str(batch), "--prepare", "image", "--no-explain"]
    words += ["--log", os.devnull, "--queue", str(queue)]
    root = f"http://127.0.0.1:{port}"
    length = (folder / "head").read_text()
    header = (f"Inference-Header-Content-Length:{length}",)
    asked = {
        "png": Asked(f"{root}/v1/models/model:predict", bodies["cnnjax-png"]),
        "tensor": Asked(f"{root}/v2/models/model/infer", bodies["cnnjax-tensor"], header),
    }
    return Server(_named("cnnjax", batch), words, asked)


def peer_server(peer: Peer, run: str, batch: int, folder: Path) -> Server:
    """Starts a peer with the same function, batching or not."""
    bodies, port = write_bodies(run, folder), free_port()
    root, headers = f"http://127.0.0.1:{port}", JSON
    script = {"LitServe": "litserve", "MLServer": "mlserver", "Ray Serve": "ray"}[peer.name]
    words = [peer.python, str(HERE / f"serve_{script}.py"), str(Path(run).resolve())]
    words += ["--port", str(port), "--max-batch", str(batch)]
    urls = {"png": f"{root}/predict", "tensor": f"{root}/predict"}
    if peer.name == "MLServer":
        urls = dict.fromkeys(urls, f"{root}/v2/models/model/infer")
    if peer.name == "Ray Serve":
        urls, headers = {"png": f"{root}/png", "tensor": f"{root}/tensor"}, BYTES
    asked = {kind: Asked(url, bodies[f"{peer.name}-{kind}"], headers) for kind, url in urls.items()}
    return Server(_named(peer.name, batch), words, asked)


def _named(name: str, batch: int) -> str:
    return name if batch > 1 else f"{name}, batching off"


def start_all(
    run: str, peers: Sequence[Peer], batch: int, folder: Path, queue: int
) -> list[Server]:
    """Starts this server and the peers, each with batching and without; one after another."""
    servers: list[Server] = []
    try:
        for largest in (batch, 1):
            servers.append(cnnjax_server(run, largest, folder, queue))
            servers[-1].wait_until_ready()
        for peer in peers:
            for largest in (batch, 1):
                servers.append(peer_server(peer, run, largest, folder))
                servers[-1].wait_until_ready()
    except BaseException:
        for server in servers:
            server.close()
        raise
    return servers


def random_run(model: str, folder: Path) -> str:
    """Writes a run of a network with random weights, as its training would start, and returns it.

    Args:
      model: a name that `cnnjax models` lists.
      folder: where it goes.
    """
    import contextlib

    import jax

    import cnnjax
    from cnnjax import convert, models
    from cnnjax.commands import convert as command

    shape = models.input_shape(model)
    network = models.create(model, num_classes=models.canonical_classes(model))
    variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, *shape), np.float32))
    framework = convert.frameworks_for(network)[0]
    arrays = convert.from_cnnjax(variables, network, shape, framework=framework)
    convert.write(folder / "weights.npz", arrays)
    config = command.Config(
        folder / "weights.npz", folder / model, model=model, framework=framework
    )
    with contextlib.redirect_stdout(sys.stderr):
        cnnjax.commands.convert.main(config)
    return str(folder / model)
