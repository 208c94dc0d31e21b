"""Devices and processes: backends, meshes, several processes as one run, versions."""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "backend",
        "channel",
        "environment",
        "processes",
        "sharding",
    ),
)

if TYPE_CHECKING:
    from cnnjax.devices import backend as backend
    from cnnjax.devices import channel as channel
    from cnnjax.devices import environment as environment
    from cnnjax.devices import processes as processes
    from cnnjax.devices import sharding as sharding
