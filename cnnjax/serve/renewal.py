"""Newer checkpoints and files are found by looking, and take the old ones' place."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from cnnjax.paths import expand
from cnnjax.serve.repository import Repository

Stamp = tuple[tuple[str, int, int], ...]


def stamp(path: str) -> Stamp:
    """Returns names, sizes and times of what a model is read from; another one means it is newer.

    Of a run directory: its steps of checkpoints, and its summary, which names the best of them.
    """
    found = Path(expand(path))
    parts = [found]
    if found.is_dir():
        parts = [*sorted((found / "checkpoints").glob("[0-9]*")), found / "summary.json"]
    told = []
    for part in parts:
        with contextlib.suppress(OSError):
            status = part.stat()
            told.append((part.name, status.st_size, status.st_mtime_ns))
    return tuple(told)


async def renew(repository: Repository, every_secs: float) -> None:
    """Looks at every loaded version's source, for ever, and loads what has changed.

    A source is loaded once two looks have found it the same, so that it is whole. One that cannot
    be loaded is tried again when it changes once more; the old one answers.
    """
    sources = {
        (name, version): source.path
        for name, model in repository.models.items()
        for version, source in model.sources.items()
    }
    loaded = {key: await asyncio.to_thread(stamp, path) for key, path in sources.items()}
    seen = dict(loaded)
    while True:
        await asyncio.sleep(every_secs)
        for (name, version), path in sources.items():
            key, now = (name, version), await asyncio.to_thread(stamp, path)
            is_settled, seen[key] = now == seen[key], now
            if now != loaded[key] and is_settled and now:
                loaded[key] = now
                if version in repository.models[name].loaded:
                    with contextlib.suppress(Exception):  # It is logged, and the old one answers.
                        await repository.load(name, version)
