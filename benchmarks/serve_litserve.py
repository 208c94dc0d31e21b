"""A run behind LitServe, as its documentation shows: the same function, batched by LitServe.

    pip install litserve && python benchmarks/serve_litserve.py RUN --port 8000 --max-batch 32

POST /predict with {"png": BASE64} or {"tensor": BASE64 of uint8 [1, height, width, channels]}.
"""

import argparse
import base64

import litserve
import numpy as np


class Classifier(litserve.LitAPI):
    """The run's function; decoding, batching and encoding by LitServe."""

    def __init__(self, run: str, **options):
        super().__init__(**options)
        self.run = run

    def setup(self, device):
        from cnnjax.devices import backend
        from cnnjax.serve import Options, open_runtime

        backend.start(devices=1)
        largest = self.max_batch_size
        self.runtime = open_runtime(
            self.run, Options(largest_batch=largest, prepare="image", explain=False)
        )

    def decode_request(self, request):
        from cnnjax.data import read_image

        if "png" in request:
            return self.runtime.prepare(read_image(base64.b64decode(request["png"])))
        shape = self.runtime.shapes[0]
        return np.frombuffer(base64.b64decode(request["tensor"]), np.uint8).reshape(shape)

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, images):
        if self.max_batch_size == 1:
            return self.runtime.run(images[None])[1][0]
        return self.runtime.run(images)[1]

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return {"probabilities": output.tolist()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=32)
    options = parser.parse_args()
    api = Classifier(options.run, max_batch_size=options.max_batch, batch_timeout=0.002)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False, log_level="warning")
