"""A run behind MLServer, as its documentation shows: a model of one's own, batched by MLServer.

    pip install mlserver 'uvloop<0.22' . && python benchmarks/serve_mlserver.py RUN --port 8000

The Open Inference Protocol at /v2/models/model/infer: one input, called `png` (image files) or
`tensor` (uint8 `[height, width, channels]`), of BYTES `[images, 1]` in base64. With `--workers 0`
the process that reads requests computes, too, which is faster for a small network; with 1, which is
MLServer's default, another does (its workers do not start with uvloop 0.22 and newer).
"""

import argparse
import asyncio
import logging
import socket

import numpy as np
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import Base64Codec, NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse


class Classifier(MLModel):
    """The run's function; requests are put together by MLServer, where it is to batch."""

    async def load(self) -> bool:
        from cnnjax.devices import backend
        from cnnjax.serve import Options, open_runtime

        backend.start(devices=1)
        largest = max(1, self.settings.max_batch_size)
        run = self.settings.parameters.uri
        options = Options(largest_batch=largest, prepare="image", explain=False)
        self.runtime = open_runtime(run, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        from cnnjax.data import read_image

        (given,) = payload.inputs
        contents = Base64Codec.decode_input(given)
        if given.name == "png":
            images = [self.runtime.prepare(read_image(each)) for each in contents]
        else:
            shape = self.runtime.shapes[0]
            images = [np.frombuffer(each, np.uint8).reshape(shape) for each in contents]
        _, probabilities = self.runtime.run(np.stack(images))
        outputs = [NumpyCodec.encode_output("probabilities", probabilities)]
        return InferenceResponse(model_name=self.name, outputs=outputs)


async def main(options: argparse.Namespace) -> None:
    """Serves until it is stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        grpc_port = probe.getsockname()[1]
    settings = Settings(
        host="127.0.0.1",
        http_port=options.port,
        grpc_port=grpc_port,
        metrics_endpoint=None,
        parallel_workers=options.workers,
        gzip_enabled=False,
        debug=False,
    )
    batching = {}
    if options.max_batch > 1:
        batching = {"max_batch_size": options.max_batch, "max_batch_time": options.batch_secs}
    model = ModelSettings(
        name="model",
        implementation="serve_mlserver.Classifier",
        parameters=ModelParameters(uri=options.run),
        **batching,
    )
    server = MLServer(settings)
    logging.disable(logging.INFO)
    await server.start([model])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--batch-secs", type=float, default=0.002)
    parser.add_argument("--workers", type=int, default=0)
    asyncio.run(main(parser.parse_args()))
