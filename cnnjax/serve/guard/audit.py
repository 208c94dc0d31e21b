"""The audit log: who asked for what, and what came of it, as JSON lines."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError
from cnnjax.paths import expand

Write = Callable[[dict[str, Any]], None]
# What a stranger sends is cut to this length.
MAX_TEXT = 512


class _Lines(logging.handlers.WatchedFileHandler):
    """Appends lines, and starts the file anew when it was moved away, as logrotate does."""

    def __init__(self, path: str, lost: Callable[[], None]):
        super().__init__(path, encoding="utf-8", delay=True)
        self.lost, self.failing, self.written = lost, False, True

    def _open(self):
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return os.fdopen(descriptor, "a", encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        self.written = True
        super().emit(record)
        if self.failing and self.written:
            self.failing = False
            print(f"the audit log {self.baseFilename} is written again", file=sys.stderr)

    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk costs lines of the log, and no answer; each is counted."""
        self.lost()
        self.written = False
        error = sys.exc_info()[1]
        if not self.failing:
            print(f"cannot write the audit log {self.baseFilename}: {error}", file=sys.stderr)
        self.failing = True
        stream, self.stream = self.stream, None  # type: ignore[assignment]
        if stream is not None:
            # What could not be written is still in its buffer.
            with contextlib.suppress(OSError):
                stream.close()


def event(
    protocol: str,
    *,
    request_id: str,
    client: str,
    status: int | str,
    reason: str = "",
    failed: bool = False,
    who: str = "",
    role: str = "",
    action: str = "",
    model: str = "",
    secs: float = 0.0,
) -> dict[str, Any]:
    """Returns what the audit log has of one request, over HTTP and gRPC alike.

    Args:
      protocol: `http` or `grpc`.
      request_id: of the request.
      client: its address.
      status: that was answered; 0 where nothing was sent.
      reason: why it was refused; "" where it was not.
      failed: whether it was let in and came to nothing.
      who, role: of the key or token; "" where nobody was known.
      action: what was asked, such as `POST /v2/models/digits/infer`.
      model: that it was about.
      secs: it took.
    """
    return {
        "request_id": request_id,
        "who": who,
        "role": role,
        "client": client,
        "protocol": protocol,
        "action": action,
        "model": model,
        "result": "refused" if reason else "failed" if failed else "allowed",
        "reason": reason,
        "status": status,
        "milliseconds": round(secs * 1000, 1),
    }


def audit_log(path: str | Path = "", *, lost: Callable[[], None] = lambda: None) -> Write:
    """Returns what writes one line for an event: a JSON object with the time in front.

    Args:
      path: of the file, which only its owner may read; "" for standard error.
      lost: called for each line that could not be written.

    Raises:
      UserError: the file cannot be written.
    """
    handler: logging.Handler
    if not path:
        handler = logging.StreamHandler(sys.stderr)
    else:
        name = expand(path)
        try:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        except OSError as error:
            raise UserError(
                f"cannot write the audit log {name!r}: {error.strerror}; choose another --audit-log"
            ) from None
        handler = _Lines(name, lost)
    handler.setFormatter(logging.Formatter("%(message)s"))

    def write(event: dict[str, Any]) -> None:
        moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": moment, **{key: _cut(value) for key, value in event.items()}})
        handler.handle(logging.LogRecord("audit", logging.INFO, "", 0, line, None, None))

    return write


def _cut(value: Any) -> Any:
    return f"{value[:MAX_TEXT]}..." if isinstance(value, str) and len(value) > MAX_TEXT else value
