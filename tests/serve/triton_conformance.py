"""Every method of the protocol by tritonclient, which nobody here wrote; run by its own Python.

    python triton_conformance.py HTTP_ADDRESS GRPC_ADDRESS EXPECTED.npz MODEL

EXPECTED holds `images`, uint8 [batch, height, width, channels], the `logits` and `probabilities`
that `cnnjax predict` computes of them, and `png`, the bytes of an image file of the first. Prints
a line for each method.
"""

import asyncio
import sys

import numpy as np


def check(what, is_right):
    if not is_right:
        sys.exit(f"FAILED {what}")
    print(f"ok {what}")


def check_server(client, kind, model, names):
    """Health, metadata and repository, which both clients have under the same names."""

    def field(message, name):
        return message[name] if isinstance(message, dict) else getattr(message, name)

    check(f"{kind} is_server_live", client.is_server_live())
    check(f"{kind} is_server_ready", client.is_server_ready())
    check(f"{kind} is_model_ready", client.is_model_ready(model))
    check(f"{kind} is_model_ready version", client.is_model_ready(model, "1"))
    said = client.get_server_metadata()
    check(f"{kind} get_server_metadata", field(said, "name") == "cnnjax")
    said = client.get_model_metadata(model)
    (tensor,) = field(said, "inputs")
    shape = [int(side) for side in field(tensor, "shape")]
    check(
        f"{kind} get_model_metadata", (field(tensor, "name"), shape) == ("image", [-1, 28, 28, 1])
    )
    check(f"{kind} outputs", [field(each, "name") for each in field(said, "outputs")] == names)
    index = client.get_model_repository_index()
    rows = index if isinstance(index, list) else index.models
    states = [(field(row, "name"), field(row, "state")) for row in rows]
    check(f"{kind} get_model_repository_index", (model, "READY") in states)
    client.unload_model(model)
    check(f"{kind} unload_model", not client.is_model_ready(model))
    client.load_model(model)
    check(f"{kind} load_model", client.is_model_ready(model))


def check_infer(module, client, kind, model, names, expected, error_type):
    """Tensors as binary and as listed data, image files, errors."""
    images = expected["images"]
    tensor = module.InferInput("image", images.shape, "UINT8")
    tensor.set_data_from_numpy(images)
    found = client.infer(model, [tensor], request_id="42")
    for name in ("logits", "probabilities"):
        check(
            f"{kind} infer {name} bit for bit", np.array_equal(found.as_numpy(name), expected[name])
        )
    label = expected["probabilities"].argmax(-1)
    check(f"{kind} infer label", np.array_equal(found.as_numpy("label"), label))
    words = [word.decode() for word in found.as_numpy("class_name")]
    check(f"{kind} infer class_name", words == [str(each) for each in label])
    said = found.get_response()
    given = said["id"] if isinstance(said, dict) else said.id
    check(f"{kind} infer id", given == "42")
    asked = [module.InferRequestedOutput("probabilities")]
    found = client.infer(model, [tensor], model_version="1", outputs=asked, timeout=5_000_000)
    check(f"{kind} infer one output", found.as_numpy("logits") is None)
    same = np.array_equal(found.as_numpy("probabilities"), expected["probabilities"])
    check(f"{kind} infer version", same)
    file = module.InferInput("image", [1], "BYTES")
    file.set_data_from_numpy(np.array([expected["png"].tobytes()], object))
    found = client.infer(model, [file])
    check(f"{kind} infer image file", found.as_numpy("label").shape == (1,))
    handle = client.async_infer(model, [tensor]) if kind == "http" else None
    if handle is not None:
        check(f"{kind} async_infer", handle.get_result().as_numpy("label").shape == label.shape)
    for what, call in {
        "unknown model": lambda: client.infer("no_such", [tensor]),
        "unknown version": lambda: client.infer(model, [tensor], model_version="9"),
        "unknown model to load": lambda: client.load_model("../etc/passwd"),
        "wrong shape": lambda: client.infer(model, [wrong(module)]),
    }.items():
        try:
            call()
        except error_type as error:
            check(f"{kind} refuses {what}: {error.message()}", True)
        else:
            check(f"{kind} refuses {what}", False)


def wrong(module):
    tensor = module.InferInput("image", [1, 27, 28, 1], "UINT8")
    tensor.set_data_from_numpy(np.zeros((1, 27, 28, 1), np.uint8))
    return tensor


async def check_async(http_address, grpc_address, model, expected):
    """The asynchronous clients."""
    import tritonclient.grpc as plain_grpc
    import tritonclient.grpc.aio as grpc_client
    import tritonclient.http as plain_http
    import tritonclient.http.aio as http_client

    for kind, module, plain, address in (
        ("http.aio", http_client, plain_http, http_address),
        ("grpc.aio", grpc_client, plain_grpc, grpc_address),
    ):
        tensor = plain.InferInput("image", expected["images"].shape, "UINT8")
        tensor.set_data_from_numpy(expected["images"])
        async with module.InferenceServerClient(address) as client:
            check(f"{kind} is_server_ready", await client.is_server_ready())
            found = await client.infer(model, [tensor])
            same = np.array_equal(found.as_numpy("logits"), expected["logits"])
            check(f"{kind} infer bit for bit", same)


def main(http_address, grpc_address, path, model):
    import tritonclient.grpc as grpc_client
    import tritonclient.http as http_client
    from tritonclient.utils import InferenceServerException

    expected = dict(np.load(path))
    names = ["logits", "probabilities", "label", "class_name"]
    for kind, module, address in (
        ("http", http_client, http_address),
        ("grpc", grpc_client, grpc_address),
    ):
        client = module.InferenceServerClient(address)
        check_server(client, kind, model, names)
        check_infer(module, client, kind, model, names, expected, InferenceServerException)
        client.close()
    listed = http_client.InferInput("image", expected["images"].shape, "UINT8")
    listed.set_data_from_numpy(expected["images"], binary_data=False)
    output = http_client.InferRequestedOutput("probabilities", binary_data=False)
    with http_client.InferenceServerClient(http_address) as client:
        found = client.infer(model, [listed], outputs=[output]).as_numpy("probabilities")
    check("http JSON bit for bit", np.array_equal(found, expected["probabilities"]))
    asyncio.run(check_async(http_address, grpc_address, model, expected))
    print("conforms")


if __name__ == "__main__":
    main(*sys.argv[1:])
