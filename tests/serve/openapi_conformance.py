"""Asks a server by the client that openapi-python-client generates of its OpenAPI file.

    python openapi_conformance.py ADDRESS FOLDER MODEL IMAGE

Its own Python has openapi-python-client; the client is written to FOLDER. Prints a line for each
method.
"""

import importlib
import io
import json
import subprocess
import sys
import urllib.request
from pathlib import Path


def check(what, is_right):
    if not is_right:
        sys.exit(f"FAILED {what}")
    print(f"ok {what}")


def generate(address, folder):
    """Writes the client, and imports it."""
    path = folder / "openapi.json"
    path.write_bytes(urllib.request.urlopen(f"{address}/openapi.json").read())
    words = ["-m", "openapi_python_client", "generate", "--path", path, "--meta", "none"]
    words += ["--output-path", folder / "generated"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True)
    check("generate", (folder / "generated" / "client.py").exists() or print(done.stdout))
    sys.path.insert(0, str(folder))
    return importlib.import_module("generated")


def main(address, folder, model, image):
    generated = generate(address, Path(folder))
    client = generated.Client(base_url=address)

    def ask(name, *words, **options):
        group, name = name.split(".")
        module = importlib.import_module(f"generated.api.{group}.{name}")
        response = module.sync_detailed(*words, client=client, **options)
        check(f"{name}: {response.status_code}", response.status_code == 200)
        return response.parsed

    models = importlib.import_module("generated.models")
    check("is live", ask("health.live").live)
    check("is ready", ask("health.ready").ready)
    check("server", ask("health.server").name == "cnnjax")
    tensor = ask("models.model_metadata", model).inputs[0]
    check("metadata", tensor.name == "image" and tensor.datatype == "UINT8")
    check("model is ready", ask("models.model_ready_version", model, "1").ready)
    check("index", ask("repository.index")[0].state == "READY")
    shape = [1, *tensor.shape[1:]]
    count = shape[1] * shape[2] * shape[3]
    sent = models.RequestInput(name="image", shape=shape, datatype="UINT8", data=[0] * count)
    answer = ask("models.model_infer", model, body=models.InferenceRequest(inputs=[sent]))
    names = [each.name for each in answer.outputs]
    check("outputs", names == ["logits", "probabilities", "label", "class_name"])
    file = importlib.import_module("generated.types").File(io.BytesIO(Path(image).read_bytes()))
    predicted = ask("images.predict", model, body=file, top=2)
    check("classes", len(predicted.classes) == 2)
    weights = models.RolloutRequestWeights.from_dict({"1": 1.0})
    status = ask("rollout.rollout", model, body=models.RolloutRequest(weights=weights))
    check("weights", status.weights.to_dict() == {"1": 1.0})
    check("rollback", ask("rollout.rollback", model).name == model)
    check("loaded", ask("repository.load", model) is not None)
    refused = importlib.import_module("generated.api.models.model_ready")
    found = refused.sync_detailed("no_such", client=client)
    error = json.loads(found.content)["error"]
    check(f"refuses: {error}", found.status_code == 404)
    print("conforms")


if __name__ == "__main__":
    main(*sys.argv[1:])
