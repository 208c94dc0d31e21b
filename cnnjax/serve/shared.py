"""What the workers of one server have in common: the changes that were asked of any of them.

A folder holds the changes in order, one JSON object a line, and for each worker how many of them it
has made. A worker that is asked for a change makes it first, so that what cannot be done is refused
and goes no further; then it writes it down, and answers when the others have made it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

Apply = Callable[[dict[str, Any]], Awaitable[None]]
POLL_SECS = 0.1
# A load takes as long as compiling does.
PATIENCE_SECS = 120.0


class Shared:
    """The changes of a server of several processes, as one of them sees them."""

    def __init__(self, folder: Path, apply: Apply) -> None:
        """Args: the folder that all workers share, and what makes a change in this one."""
        self.folder, self._apply = folder, apply
        self._changes, self._mine = folder / "changes.jsonl", folder / f"made-{os.getpid()}"
        self.made = 0

    async def start(self) -> None:
        """Makes the changes of before: all but loads, for what was just loaded is the newest."""
        for change in self._listed():
            if change["kind"] != "load":
                with contextlib.suppress(Exception):  # It was possible when it was asked for.
                    await self._apply(change)
            self.made += 1
        self._tell()

    async def change(self, change: dict[str, Any]) -> None:
        """Makes a change here, and waits for the others; raises as `apply` does."""
        async with self._alone():
            await self._catch_up()
            await self._apply(change)
            with self._changes.open("a") as file:
                file.write(json.dumps(change) + "\n")
            self.made += 1
            self._tell()
            made = self.made
        end = time.monotonic() + PATIENCE_SECS
        while not self._all_have(made) and time.monotonic() < end:
            await asyncio.sleep(POLL_SECS / 4)

    async def follow(self) -> None:
        """Makes the changes that other workers were asked for, for ever."""
        while True:
            await asyncio.sleep(POLL_SECS)
            if len(self._listed()) > self.made:
                await self._catch_up()

    async def _catch_up(self) -> None:
        for change in self._listed()[self.made :]:
            with contextlib.suppress(Exception):  # It is logged where it fails.
                await self._apply(change)
            self.made += 1
            self._tell()

    def _listed(self) -> list[dict[str, Any]]:
        try:
            lines = self._changes.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def _tell(self) -> None:
        temporary = self._mine.with_suffix(".tmp")
        temporary.write_text(str(self.made))
        os.replace(temporary, self._mine)

    def _all_have(self, made: int) -> bool:
        """Whether every worker that lives has made so many changes."""
        for path in self.folder.glob("made-*"):
            if path.suffix or not _lives(int(path.name.removeprefix("made-"))):
                continue
            with contextlib.suppress(OSError, ValueError):
                if int(path.read_bytes()) < made:
                    return False
        return True

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Keeps other workers from changing anything meanwhile."""
        import fcntl

        with (self.folder / "lock").open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(POLL_SECS / 4)
            yield


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True
