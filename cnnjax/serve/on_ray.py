"""The same application on Ray Serve: replicas on many machines, autoscaling, restarts.

    cnnjax serve --run lenet=RUN --ray 1:3

Ray's proxy takes the requests and passes each to a replica, which is the whole application of
`cnnjax.serve.http.web`: protocol, batches, guard, watch. With `--ray-models 2` a replica holds two
models at a time: it loads one when a request first names it and drops the longest unused, and Ray
sends requests for a model to replicas that have it (multiplexing).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from cnnjax.errors import UserError

# Flags -> (application, repository, and what other servers need).
Build = Callable[[Any], tuple[Any, ...]]
HEALTH_SECS, DRAIN_SECS, PROXY_SECS = 5.0, 30.0, 600.0


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How many replicas there are on Ray Serve."""

    ray: str = ""
    """Run on Ray Serve with this many replicas, such as 3, or 1:3 for one to three by load."""

    ray_address: str = ""
    """Of a Ray cluster, such as auto; by default one is started on this machine."""

    ray_requests: float = 16.0
    """Requests under way in each replica that are aimed at: with more, replicas are added."""

    ray_upscale: float = 5.0
    """Seconds for which there must be too many before replicas come."""

    ray_downscale: float = 60.0
    """Seconds for which there must be too few before replicas go."""

    ray_cpus: float = 1.0
    """CPUs that Ray reserves for each replica."""

    ray_gpus: float = 0.0
    """GPUs that Ray reserves for each replica."""

    ray_models: int = 0
    """Models that a replica holds at a time; 0 for all."""


def read_replicas(text: str) -> tuple[int, int]:
    """Returns (least, most) of `3` or `1:3`; a UserError for another text."""
    least, colon, most = text.partition(":")
    most = most if colon else least
    if not (least.isdecimal() and most.isdecimal()):
        raise UserError(f"--ray {text}: give a number of replicas, or LEAST:MOST such as 1:3.")
    if not 1 <= int(least) <= int(most):
        raise UserError(f"--ray {text}: give at least 1, and LEAST no more than MOST.")
    return int(least), int(most)


class Replica:
    """One process with the whole application; Ray makes it, asks after it, and ends it."""

    # Ray awaits it.
    async def __init__(self, config: Any, build: Build):  # type: ignore[misc]
        """Loads and warms all models. Args: the flags of `cnnjax serve`, and what uses them."""
        from cnnjax.serve import runtime

        runtime.start_jax()
        application, self.repository, *_ = build(config)
        if config.ray_models:
            # Loaded when they are named.
            self.repository.started_empty()
            self.application = self._loading(application, config.ray_models)
        else:
            await self.repository.start()
            self.application = application

    def __serve_build_asgi_app__(self) -> Any:
        return self.application

    def check_health(self) -> None:
        """Raises for a replica that is to be replaced."""
        if not self.repository.ready:
            raise RuntimeError("the models are not ready")

    def _loading(self, application: Any, most: int) -> Any:
        """Returns the application with models loaded by Ray's rule: at most `most` at a time."""
        from ray import serve

        from cnnjax.serve.guard.requests import model_of

        repository, loop = self.repository, asyncio.get_running_loop()

        async def load(name: str) -> _Held:
            await repository.load(name)
            return _Held(repository, name, loop)

        hold = serve.multiplexed(max_num_models_per_replica=most)(load)

        async def asgi(scope: Any, receive: Any, send: Any) -> None:
            name = model_of(scope["path"]) if scope["type"] == "http" else ""
            if name in repository.models:
                await hold(name)
            await application(scope, receive, send)

        return asgi


class _Held:
    """A model while a replica holds it; Ray calls `__del__` on a thread when it lets go."""

    def __init__(self, repository: Any, name: str, loop: asyncio.AbstractEventLoop):
        self.repository, self.name, self.loop, self.held = repository, name, loop, True

    def __del__(self) -> None:
        if self.held and not self.loop.is_closed():
            self.held = False
            asyncio.run_coroutine_threadsafe(self.repository.unload(self.name), self.loop)


def deployment(config: Any, build: Build) -> Any:
    """Returns a Ray Serve application, for `ray.serve.run`.

    Args:
      config: the flags of `cnnjax serve`.
      build: makes the application of them, as `cnnjax.commands.serve.build`.

    Raises:
      UserError: Ray is not installed, or the flags mean nothing.
    """
    least, most = check(config)
    from ray import serve

    autoscaling = {
        "min_replicas": least,
        "max_replicas": most,
        "target_ongoing_requests": config.ray_requests,
        "upscale_delay_s": config.ray_upscale,
        "downscale_delay_s": config.ray_downscale,
        "metrics_interval_s": 1.0,
        "look_back_period_s": 5.0,
    }
    made = serve.deployment(
        name="cnnjax",
        autoscaling_config=autoscaling,
        # More are refused by the replica's own queue, with 429.
        max_ongoing_requests=config.queue + config.max_batch,
        ray_actor_options={"num_cpus": config.ray_cpus, "num_gpus": config.ray_gpus},
        health_check_period_s=HEALTH_SECS,
        graceful_shutdown_timeout_s=DRAIN_SECS,
    )
    return made(serve.ingress()(Replica)).bind(config, build)


def check(config: Any) -> tuple[int, int]:
    """Returns the least and most replicas.

    Raises:
      UserError: Ray is not installed, or flags that mean nothing on it.
    """
    import importlib.util

    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("ray.serve") is None:
        raise UserError("--ray needs Ray Serve: pip install 'cnnjax[serve,ray-serve]'")
    for flag in ("tls_certificate", "tls_client_ca", "grpc_port"):
        if getattr(config, flag):
            name = flag.replace("_", "-")
            raise UserError(f"--{name} with --ray: Ray's proxy speaks plain HTTP; leave it out.")
    if config.workers > 1:
        raise UserError(
            "--workers with --ray: --ray says how many replicas there are; leave it out."
        )
    for flag in ("ray_requests", "ray_upscale", "ray_downscale"):
        if not 0 < getattr(config, flag) < 1e6:
            name = flag.replace("_", "-")
            raise UserError(f"--{name} {getattr(config, flag):g}: give a number above 0.")
    if config.ray_models < 0 or min(config.ray_cpus, config.ray_gpus) < 0:
        raise UserError("--ray-models, --ray-cpus and --ray-gpus are 0 or more.")
    return read_replicas(config.ray)


def run(config: Any, build: Build) -> int:
    """Serves on Ray until SIGTERM, then lets the replicas answer what they have, and ends.

    Args:
      config: the flags of `cnnjax serve`, checked.
      build: makes a replica's application of them, as `cnnjax.commands.serve.build`.
    """
    application = deployment(config, build)
    # On a busy machine Ray's proxy takes longer to start than the 5 s that it is given.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "30")
    # Ray runs workers at niceness 15, below all else on a machine; these are what it is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray
    from ray import serve

    ray.init(address=config.ray_address or None, include_dashboard=False, log_to_driver=False)
    try:
        # Its proxy may take longer than the minute that is waited for: it is asked below.
        with contextlib.suppress(TimeoutError):
            serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(application, name="cnnjax", route_prefix="/")
        _wait_until_ready(config)
        print(f"serving      on Ray at http://{config.host}:{config.port}/", flush=True)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        if config.ray_address:
            serve.delete("cnnjax")  # Other applications of the cluster go on.
        else:
            serve.shutdown()
    finally:
        ray.shutdown()
    return 0


def _wait_until_ready(config: Any) -> None:
    """Returns when the proxy passes requests to a replica; a UserError if that takes too long."""
    host = "127.0.0.1" if config.host in ("0.0.0.0", "::") else config.host
    url = f"http://{host}:{config.port}/v2/health/ready"
    deadline = time.monotonic() + PROXY_SECS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.5)
    raise UserError(f"Ray's proxy does not answer at {url}: is the port taken? See `ray status`.")
