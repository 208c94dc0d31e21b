"""API keys: random, stored as hashes in one file, each with a role, a rate and an end.

A key is 256 bits from the system's random numbers, so a plain SHA-256 of it cannot be reversed by
trying (NIST SP 800-63B, 5.1.1.2 asks for slow hashes of what people choose, and not of these). The
key itself is shown once, when it is made, and is in no file.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cnnjax.errors import UserError, unknown_name
from cnnjax.paths import expand, read_text
from cnnjax.serve.guard.refusal import Refused

ROLES = ("infer", "metrics", "admin")
PREFIX = "cnnjax_"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Identity:
    """Who sends a request.

    Attributes:
      name: of the key, or the subject of the token.
      role: one of `ROLES`; "" for a token that names none of them.
      per_second: requests that it may send for long; 0 for any number.
      burst: requests that it may send at once.
    """

    name: str
    role: str
    per_second: float = 0.0
    burst: int = 0


@dataclasses.dataclass(frozen=True)
class Key:
    """One entry of a file of keys.

    Attributes:
      name: what lists and logs call it.
      role: one of `ROLES`.
      sha256: of the key, in hexadecimal.
      created: when, ISO 8601.
      expires: when it ends, likewise; "" for never.
      per_second: requests that it may send for long; 0 for any number.
      burst: requests that it may send at once.
    """

    name: str
    role: str
    sha256: str
    created: str
    expires: str = ""
    per_second: float = 0.0
    burst: int = 0

    def identity(self) -> Identity:
        return Identity(self.name, self.role, self.per_second, self.burst)


def new_secret() -> str:
    """Returns a key that nobody has: 256 random bits behind a prefix that secret scanners find."""
    return PREFIX + secrets.token_urlsafe(32)


def hashed(secret: str) -> str:
    """Returns what a file of keys holds of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def read_keys(path: str | Path) -> tuple[Key, ...]:
    """Reads a file of keys.

    Raises:
      UserError: it is missing, is no such file, or has an entry that means nothing.
    """
    text = read_text(path, "file of keys")
    try:
        entries = json.loads(text)["keys"]
        keys = tuple(Key(**entry) for entry in entries)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"the file of keys {str(path)!r} is damaged ({error}): make one by cnnjax serve-key add"
        ) from None
    for key in keys:
        if problem := _problem(key):
            raise UserError(f"the file of keys {str(path)!r} has {problem}")
    if len({key.name for key in keys}) < len(keys):
        raise UserError(f"the file of keys {str(path)!r} has two keys of one name: remove one")
    return keys


def _problem(key: Key) -> str:
    """Returns what is wrong with an entry, "" for nothing."""
    problem = ""
    if not isinstance(key.name, str) or not NAME.fullmatch(key.name):
        problem = f"the name {key.name!r}: letters, digits and . _ @ - at most 64"
    elif key.role not in ROLES:
        problem = f"the role {key.role!r}: choose from {', '.join(ROLES)}"
    elif not re.fullmatch(r"[0-9a-f]{64}", str(key.sha256)):
        problem = f"no SHA-256 for {key.name}"
    elif not isinstance(key.per_second, int | float) or not 0 <= key.per_second < float("inf"):
        problem = f"the rate {key.per_second!r} of {key.name}: requests per second, 0 or more"
    elif not isinstance(key.burst, int) or key.burst < 0:
        problem = f"the burst {key.burst!r} of {key.name}: a number of requests, 0 or more"
    elif key.expires:
        try:
            _instant(key.expires)
        except (ValueError, TypeError):
            problem = f"the end {key.expires!r} of {key.name}: a time such as 2027-01-31T00:00:00Z"
    return problem


def write_keys(path: str | Path, keys: tuple[Key, ...]) -> None:
    """Writes a file of keys, which only its owner may read; a crash leaves the old one or this."""
    from cnnjax.run.files import write_json

    path = Path(expand(path))
    try:
        write_json(path, {"keys": [dataclasses.asdict(key) for key in keys]}, mode=0o600)
    except OSError as error:
        raise UserError(f"cannot write the file of keys {str(path)!r}: {error.strerror}") from None


def add_key(
    keys: tuple[Key, ...],
    name: str,
    role: str,
    *,
    days: float = 0,
    per_second: float = 0,
    burst: int = 0,
    now: float | None = None,
) -> tuple[tuple[Key, ...], str]:
    """Returns the keys with a new one, and that key itself.

    Args:
      keys: those there are.
      name: of the new one.
      role: one of `ROLES`.
      days: until it ends; 0 for never.
      per_second: requests that it may send for long; 0 for any number.
      burst: requests that it may send at once; 0 for two seconds' worth.
      now: the time, in seconds since 1970.

    Raises:
      UserError: a name that is taken or cannot be one, an unknown role, or a number out of range.
    """
    if name in {key.name for key in keys}:
        raise UserError(f"there is a key {name} already: revoke it, or choose another name")
    if role not in ROLES:
        raise unknown_name("role", role, ROLES)
    if not 0 <= days < 36_500:
        raise UserError(f"--days {days:g}: give 0 for a key that does not end, or up to 36,500")
    now = time.time() if now is None else now
    burst = burst or (max(1, round(2 * per_second)) if 0 < per_second < 1e9 else 0)
    secret = new_secret()
    key = Key(
        name,
        role,
        hashed(secret),
        created=_written(now),
        expires=_written(now + days * 86_400) if days else "",
        per_second=per_second,
        burst=burst,
    )
    if problem := _problem(key):
        raise UserError(f"cannot add the key: {problem}")
    return (*keys, key), secret


def revoke_key(keys: tuple[Key, ...], name: str) -> tuple[Key, ...]:
    """Returns the keys without the one of this name; a UserError if there is none."""
    names = [key.name for key in keys]
    if not names:
        raise UserError(f"cannot revoke {name}: there is no key")
    if name not in names:
        raise unknown_name("key", name, names)
    return tuple(key for key in keys if key.name != name)


def find_key(keys: tuple[Key, ...], secret: str, *, now: float) -> Identity:
    """Returns whose key this is.

    Every entry is compared, so that the time taken says nothing about which one is near.

    Raises:
      Refused: no such key, or it has ended.
    """
    digest, found = hashed(secret), None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            found = key
    if found is None:
        raise Refused("unknown_key")
    if found.expires and _instant(found.expires) <= now:
        raise Refused("expired_key", who=found.name)
    return found.identity()


def table(keys: tuple[Key, ...], *, now: float) -> str:
    """Returns a list of keys for people: name, role, rate, when made, when it ends."""
    rows = [("name", "role", "per second", "created", "expires")]
    for key in keys:
        rate = f"{key.per_second:g} (burst {key.burst})" if key.per_second else "any"
        ended = " (expired)" if key.expires and _instant(key.expires) <= now else ""
        rows.append((key.name, key.role, rate, key.created, (key.expires or "never") + ended))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


class KeyFile:
    """A file of keys that is read again when it has changed: a revoked key is out within a second.

    A file that was removed lets nobody in. One that cannot be read leaves the keys as they were,
    and says so by `complain`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        complain: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ):
        self.path, self.complain, self.clock = Path(expand(path)), complain, clock
        self._keys = read_keys(self.path)
        self._stamp, self._looked = self._state(), clock()
        self._lock = threading.Lock()

    def find(self, secret: str) -> Identity:
        """Returns whose key this is; raises Refused as `find_key`."""
        now = self.clock()
        with self._lock:
            if not 0 <= now - self._looked < 1.0:
                self._looked = now
                self._read_again()
        return find_key(self._keys, secret, now=now)

    def _state(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read_again(self) -> None:
        stamp = self._state()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        if stamp is None:
            self._keys = ()
            self.complain(f"the file of keys {self.path} is gone: no key is let in")
            return
        try:
            self._keys = read_keys(self.path)
        except UserError as error:
            self.complain(f"{error}; the keys stay as they were")


def _written(instant: float) -> str:
    moment = datetime.datetime.fromtimestamp(instant, datetime.UTC)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


def _instant(text: str) -> float:
    moment = datetime.datetime.fromisoformat(text)
    # Without a zone it is UTC, and not that of the machine.
    return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
