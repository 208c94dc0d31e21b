"""A run behind Ray Serve, as its documentation shows: one replica, batched by `serve.batch`.

    pip install 'ray[serve]' . && python benchmarks/serve_ray.py RUN --port 8000 --max-batch 32

POST /png takes an image file, POST /tensor the bytes of uint8 `[height, width, channels]`. Ray
Serve is set for throughput, without a log of requests.
"""

import argparse
import os
import signal

# What its guide to performance names; read when Ray Serve is imported, in every process.
os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
# Ray lowers the priority of its workers to 15 otherwise.
os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.requests import Request


class Classifier:
    """The run's function; requests are put together by Ray Serve, where it is to batch."""

    def __init__(self, run: str, largest: int, batch_secs: float):
        from cnnjax.devices import backend
        from cnnjax.serve import Options, open_runtime

        backend.start(devices=1)
        options = Options(largest_batch=largest, prepare="image", explain=False)
        self.runtime, self.largest = open_runtime(run, options), largest
        self.batched.set_max_batch_size(largest)
        self.batched.set_batch_wait_timeout_s(batch_secs)

    @serve.batch
    async def batched(self, images: list[np.ndarray]) -> list[list[float]]:
        """The probabilities of images that came together."""
        return self.runtime.run(np.stack(images))[1].tolist()

    async def __call__(self, request: Request) -> dict:
        from cnnjax.data import read_image

        content = await request.body()
        if request.url.path.endswith("/png"):
            image = self.runtime.prepare(read_image(content))
        else:
            image = np.frombuffer(content, np.uint8).reshape(self.runtime.shapes[0])
        if self.largest > 1:
            return {"probabilities": await self.batched(image)}
        return {"probabilities": self.runtime.run(image[None])[1][0].tolist()}


def main(options: argparse.Namespace) -> None:
    """Serves until it is stopped."""
    # Of its own, whatever cluster there may be; a replica's CPU is one of these.
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    deployment = serve.deployment(
        Classifier,
        max_ongoing_requests=4096,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    application = deployment.bind(options.run, options.max_batch, options.batch_secs)
    serve.run(application, name="model", route_prefix="/")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--batch-secs", type=float, default=0.002)
    main(parser.parse_args())
