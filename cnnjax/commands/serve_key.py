"""Make, list and revoke the API keys of a server.

    cnnjax serve-key add shop --file keys.json --days 90 --per-second 50
    cnnjax serve-key add operator --file keys.json --role admin
    cnnjax serve-key list --file keys.json
    cnnjax serve-key revoke shop --file keys.json

A key is printed once, when it is made; the file holds its hash. A server that was started with
`--keys keys.json` reads the file again when it changes: nothing need be restarted.
"""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cnnjax.errors import UserError
from cnnjax.paths import expand


@dataclasses.dataclass(frozen=True)
class Config:
    """Make, list and revoke the API keys of a server."""

    action: tyro.conf.Positional[Literal["add", "list", "revoke"]]
    """add: a new key; list: those there are; revoke: a key is no longer let in."""

    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]] = ""
    """Of the key: what lists and logs call it."""

    file: str = "keys.json"
    """The file of keys; add makes it."""

    role: str = "infer"
    """infer: asks models; metrics: reads /metrics; admin: also loads, unloads and rolls out."""

    days: float = 0
    """Days until the key ends; 0 for never."""

    per_second: float = 0
    """Requests per second that the key may send for long; 0 for any number."""

    burst: int = 0
    """Requests that it may send at once; 0 for two seconds' worth."""


def main(config: Config) -> None:
    """Does what the first word says."""
    from cnnjax.serve.guard import keys

    path = Path(expand(config.file))
    if config.action != "list" and not config.name:
        raise UserError(f"cnnjax serve-key {config.action} needs the NAME of a key.")
    if config.action == "list" and config.name:
        raise UserError(f"cnnjax serve-key list takes no name, and got {config.name!r}.")
    if config.action == "add":
        known = keys.read_keys(path) if path.exists() else ()
        known, secret = keys.add_key(
            known,
            config.name,
            config.role,
            days=config.days,
            per_second=config.per_second,
            burst=config.burst,
        )
        keys.write_keys(path, known)
        kept = f"kept         its hash in {path}; the key itself is shown only now"
        # At once: `| head -1` leaves when it has the key.
        print(f"{secret}\n{kept}\n", end="")
    elif config.action == "revoke":
        keys.write_keys(path, keys.revoke_key(keys.read_keys(path), config.name))
        print(f"revoked      {config.name} in {path}; running servers let it in no more")
    else:
        print(keys.table(keys.read_keys(path), now=time.time()))
