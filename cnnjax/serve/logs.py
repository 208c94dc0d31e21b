"""Structured logs: one JSON object per line, on standard error or in a file.

    {"time": "2026-01-01T00:00:00.000Z", "event": "request", "request_id": "a1", "status": 200}

A log that cannot be written never stops an answer: a full disk costs lines, which are counted.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from cnnjax.errors import UserError
from cnnjax.paths import expand

_lock = threading.Lock()
_stream: TextIO | None = None
_count_lost: Callable[[], None] | None = None


def count_lost(count: Callable[[], None]) -> None:
    """Has a function called for each line that cannot be written."""
    global _count_lost
    _count_lost = count


def write_to(path: str | Path | None) -> None:
    """Sends the log to the end of a file; None: to standard error.

    Raises:
      UserError: the file cannot be written.
    """
    global _stream
    if path is None:
        _stream = None
        return
    try:
        _stream = open(expand(path), "a", encoding="utf-8")  # noqa: SIM115 - while the process lives
    except OSError as error:
        raise UserError(f"cannot write the log {path}: {error.strerror}; choose another.") from None


def log(event: str, **fields: Any) -> None:
    """Writes a line: the time, the event, the fields that are not None."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    text = line({"time": now.replace("+00:00", "Z"), "event": event, **fields})
    with _lock:
        try:
            stream = _stream or sys.stderr
            stream.write(text)
            stream.flush()
        except (OSError, ValueError, AttributeError):
            if _count_lost is not None:
                _count_lost()


def line(fields: Mapping[str, Any]) -> str:
    """Returns one line of JSON; control characters of what clients send are escaped by JSON."""
    kept = {name: value for name, value in fields.items() if value is not None}
    return json.dumps(kept, default=str, separators=(",", ":")) + "\n"


class _Lines(logging.Handler):
    """What other libraries say, as lines of the log."""

    def emit(self, record: logging.LogRecord) -> None:
        log("library", logger=record.name, level=record.levelname, text=record.getMessage()[:2000])


def take_over() -> None:
    """Has uvicorn, asyncio and gRPC write their warnings as lines of the log."""
    for name in ("uvicorn", "asyncio", "grpc"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [_Lines(logging.WARNING)], False
    # It warns of each damaged form, which is refused and logged.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
