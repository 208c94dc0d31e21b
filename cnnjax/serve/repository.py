"""The models of a server: loaded, exchanged without a pause, and asked.

    repository = Repository([Source("digits", "1", "runs/mnist_lenet")])
    await repository.start()
    answer = await repository.infer("digits", images, request_id="42")

All methods run on one event loop; models are opened and warmed on a thread of their own while the
old ones answer.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnnjax.errors import UserError
from cnnjax.serve import after
from cnnjax.serve import rollout as rollouts
from cnnjax.serve.after import Observer
from cnnjax.serve.batcher import Batcher, Computed, Limits, check_limits
from cnnjax.serve.logs import log
from cnnjax.serve.measures import Measures
from cnnjax.serve.models import Loaded, Model, Source, check_images
from cnnjax.serve.protocol import Answer
from cnnjax.serve.refusals import Impossible, Invalid, Unavailable, unknown
from cnnjax.serve.runtime import Options, check_options, open_runtime
from cnnjax.serve.shared import Shared


class Repository:
    """Models by name, each with versions, one of which answers a request."""

    def __init__(
        self,
        sources: Sequence[Source],
        options: Options | None = None,
        limits: Limits | None = None,
        *,
        measures: Measures | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        """Args: where models come from, how they are opened and queued, who hears of answers."""
        self.options, self.limits = options or Options(), limits or Limits()
        check_options(self.options)
        check_limits(self.limits)
        self.measures = measures or Measures()
        self.models: dict[str, Model] = {}
        for source in sources:
            model = self.models.setdefault(source.name, Model({}))
            model.sources[source.version] = source
        self.closing = False
        self.draining = False
        self._started = False
        self._shared: Shared | None = None
        self._following: asyncio.Task | None = None
        self._loader = concurrent.futures.ThreadPoolExecutor(1, "load")
        self._changing = asyncio.Lock()
        self._observing = after.Observing(self.measures, observers)
        self._shadows: set[asyncio.Task] = set()

    def add_observers(self, observers: Sequence[Observer]) -> None:
        """Adds functions that are called after each answer, on a thread of their own."""
        self._observing.observers += tuple(observers)

    @property
    def ready(self) -> bool:
        """Whether every model was loaded at the start, and the server is not stopping."""
        return self._started and not self.closing and not self.draining

    async def start(self) -> None:
        """Loads the versions of all models; the first version of each answers.

        Raises:
          UserError: one cannot be loaded.
        """
        if self._started:
            return
        for name, model in self.models.items():
            for version in model.sources:
                await self._load(name, version)
        self._started = True
        self.measures.ready.set(1)

    def started_empty(self) -> None:
        """Says that it is ready without a model: each is loaded when `load` is called."""
        self._started = True
        self.measures.ready.set(1)

    def drain(self) -> None:
        """Says that the server is not ready, and still answers."""
        self.draining = True
        self.measures.ready.set(0)

    async def share(self, folder: Path) -> None:
        """Makes every change together with the other workers that share a folder."""
        self._shared = Shared(folder, self._change)
        await self._shared.start()
        self._following = asyncio.create_task(self._shared.follow())

    async def change(self, kind: str, name: str, content: dict[str, Any] | None = None) -> None:
        """Changes a model, in all workers: kind is load, unload, rollout or rollback.

        Raises:
          Refused: why nothing was changed.
        """
        self._model(name)
        change = {"kind": kind, "name": name, "content": content or {}}
        await (self._change if self._shared is None else self._shared.change)(change)

    async def _change(self, change: dict[str, Any]) -> None:
        kind, name = change["kind"], change["name"]
        if kind == "load":
            await self.load(name)
        elif kind == "unload":
            await self.unload(name)
        elif kind == "rollout":
            self.set_rollout(name, change["content"])
        else:
            self.roll_back(name)

    async def close(self) -> None:
        """Answers what has been accepted, and stops."""
        self.closing = True
        self.measures.ready.set(0)
        if self._following is not None:
            self._following.cancel()
        for model in self.models.values():
            await asyncio.gather(*(each.batcher.close() for each in model.loaded.values()))
        for task in list(self._shadows):
            await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(self._observing.close)
        self._loader.shutdown(wait=False)

    async def load(self, name: str, version: str = "") -> None:
        """Loads a version anew from where it comes from, or all; the old one answers until then.

        Raises:
          Unknown: there is no such model or version.
          Invalid: it cannot be loaded; what was loaded goes on answering.
        """
        model = self._model(name)
        if version and version not in model.sources:
            raise unknown(f"version of {name}", version, model.sources)
        for each in [version] if version else list(model.sources):
            try:
                await self._load(name, each)
            except UserError as error:
                kept = "the old one goes on answering" if each in model.loaded else "not loaded"
                raise Invalid(f"cannot load {name} version {each} ({kept}): {error}") from None

    async def unload(self, name: str) -> None:
        """Stops answering for a model, all of its versions; what was accepted is answered.

        Raises:
          Unknown: there is no such model.
        """
        model = self._model(name)
        async with self._changing:
            dropped, model.loaded = model.loaded, {}
            model.rollout = model.previous = None
            model.reasons |= dict.fromkeys(dropped, "unloaded")
        for each in dropped.values():
            await each.batcher.close()
        log("model_unloaded", model=name, versions=list(dropped))

    async def _load(self, name: str, version: str) -> None:
        """Opens a version on the loader's thread, and puts it in the place of the old one."""
        model = self.models[name]
        source = model.sources[version]
        loop = asyncio.get_running_loop()
        async with self._changing:
            try:
                opened = await loop.run_in_executor(
                    self._loader, open_runtime, source.path, self.options
                )
            except Exception as error:
                self.measures.loads.labels(name, "failed").inc()
                model.reasons[version] = str(error)
                log("model_load_failed", model=name, version=version, error=str(error))
                if isinstance(error, UserError):
                    raise
                # Whatever a damaged file makes a library raise.
                raise UserError(f"{type(error).__name__}: {error}") from error
            batcher = Batcher(
                opened,
                self.limits,
                on_batch=lambda computed: self._count(name, version, computed),
            )
            old = model.loaded.get(version)
            model.loaded[version] = Loaded(opened, batcher, time.time())
            model.reasons.pop(version, None)
            if model.rollout is None:
                model.rollout = rollouts.all_to(version)
        self.measures.loads.labels(name, "loaded").inc()
        self.measures.load_secs.labels(name, version).set(opened.warm_secs)
        log(
            "model_loaded",
            model=name,
            version=version,
            step=opened.step,
            platform=opened.platform,
            secs=round(opened.warm_secs, 3),
        )
        if old:
            await old.batcher.close()

    def set_rollout(self, name: str, content: dict[str, Any]) -> rollouts.Rollout:
        """Divides the traffic of a model anew; see `rollout.read_rollout` for the content."""
        model = self._model(name)
        new = rollouts.read_rollout(content, model.loaded)
        model.previous, model.rollout = model.rollout, new
        model.compared = rollouts.Compared()
        log("rollout", model=name, **new.said())
        return new

    def roll_back(self, name: str) -> rollouts.Rollout:
        """Divides the traffic as before the last change; once more undoes that.

        Raises:
          Impossible: there was no change, or a version of before is no longer loaded.
        """
        model = self._model(name)
        if model.previous is None:
            raise Impossible(f"{name} has no rollout to go back to.")
        return self.set_rollout(name, model.previous.said())

    def describe(self, name: str) -> dict[str, Any]:
        """Returns versions, rollout and comparison with the shadow, as JSON has them."""
        model = self._model(name)
        versions = {each: self._describe_version(model, each) for each in model.sources}
        said = model.rollout.said() if model.rollout else {"weights": {}, "shadow": ""}
        names = list(next(iter(model.loaded.values())).runtime.class_names) if model.loaded else []
        compared = model.compared.said()
        return {"name": name, "class_names": names, "versions": versions, **said} | {
            "compared": compared
        }

    def _count(self, name: str, version: str, computed: Computed) -> None:
        self.measures.count_batch(name, version, computed)
        if found := self.models[name].loaded.get(version):
            self.measures.queued.labels(name, version).set(found.batcher.queued)

    def count_queues(self) -> None:
        """Sets the gauge of the images that wait."""
        for name, model in self.models.items():
            for version, found in model.loaded.items():
                self.measures.queued.labels(name, version).set(found.batcher.queued)

    def _describe_version(self, model: Model, version: str) -> dict[str, Any]:
        said: dict[str, Any] = {
            "state": self._state(model, version),
            "reason": model.reasons.get(version, ""),
        }
        if found := model.loaded.get(version):
            said |= {
                "step": found.runtime.step,
                "platform": found.runtime.platform,
                "buckets": list(found.runtime.buckets),
                "queued": found.batcher.queued,
                "since": found.since,
            }
        return said

    def index(self, *, only_ready: bool = False) -> list[dict[str, str]]:
        """Returns every version of every model with its state, as the protocol's index has them."""
        rows = [
            {
                "name": name,
                "version": version,
                "state": self._state(model, version),
                "reason": model.reasons.get(version, ""),
            }
            for name, model in self.models.items()
            for version in model.sources
        ]
        return [row for row in rows if row["state"] == "READY" or not only_ready]

    def is_ready(self, name: str, version: str = "") -> bool:
        """Whether a model, or a version of it, answers."""
        model = self._model(name)
        if version and version not in model.sources:
            raise unknown(f"version of {name}", version, model.sources)
        return not self.closing and (version in model.loaded if version else bool(model.loaded))

    def find(self, name: str, version: str = "", request_id: str = "") -> tuple[str, Loaded]:
        """Returns the version that answers a request; that which is asked for, or by the rollout.

        Raises:
          Unknown: there is no such model or version.
          Unavailable: it is not loaded.
        """
        model = self._model(name)
        if version and version not in model.sources:
            raise unknown(f"version of {name}", version, model.sources)
        if self.closing:
            raise Unavailable("the server is stopping: ask another.", retry_after=1)
        if not version and model.rollout is not None:
            version = rollouts.choose(model.rollout, request_id)
        if version not in model.loaded:
            raise Unavailable(f"{name} is not loaded{' yet' * (not self._started)}.", retry_after=1)
        return version, model.loaded[version]

    async def infer(
        self,
        name: str,
        images: np.ndarray,
        *,
        version: str = "",
        request_id: str = "",
        deadline_secs: float | None = None,
    ) -> Answer:
        """Returns a model's answer.

        Args:
          name, version: of the model; without a version the rollout chooses.
          images: `[images, height, width, channels]`, of the dtype and a shape of the model.
          request_id: of the request.
          deadline_secs: after which the answer is of no use.

        Raises:
          Refused: why there is no answer.
        """
        version, found = self.find(name, version, request_id)
        check_images(images, found.runtime)
        logits, probabilities = await found.batcher.submit(images, deadline_secs=deadline_secs)
        self._observing.tell(name, version, images, logits, request_id)
        model = self.models[name]
        if model.rollout is not None and model.rollout.shadow:
            asked = after.ask_shadow(model, name, images, probabilities, self.measures)
            self._shadows.add(asked)
            asked.add_done_callback(self._shadows.discard)
        return Answer(name, version, logits, probabilities, found.runtime.class_names)

    def _model(self, name: str) -> Model:
        if name not in self.models:
            raise unknown("model", name, self.models)
        return self.models[name]

    def _state(self, model: Model, version: str) -> str:
        if version in model.loaded:
            return "READY"
        return "UNAVAILABLE" if self._started or version in model.reasons else "LOADING"
