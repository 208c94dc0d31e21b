"""A trained network behind the Open Inference Protocol: batched, measured, exchanged while it runs.

    cnnjax serve --run runs/mnist_lenet

is the program; `application(Repository(read_sources(["runs/mnist_lenet"])))` is the same as an ASGI
application, and `Client("http://127.0.0.1:8080")` asks it.
"""

from typing import TYPE_CHECKING

from cnnjax import lazy

lazy.attach(
    __name__,
    (
        "batcher",
        "client",
        "measures",
        "models",
        "protocol",
        "refusals",
        "repository",
        "rollout",
        "runtime",
    ),
    {
        "http.web": ("application",),
        "batcher": ("Limits",),
        "client": ("AsyncClient", "Client", "ServeError"),
        "models": ("Source", "read_sources"),
        "repository": ("Repository",),
        "runtime": ("Options", "open_runtime"),
    },
)

if TYPE_CHECKING:
    from cnnjax.serve import batcher as batcher
    from cnnjax.serve import client as client
    from cnnjax.serve import measures as measures
    from cnnjax.serve import models as models
    from cnnjax.serve import protocol as protocol
    from cnnjax.serve import refusals as refusals
    from cnnjax.serve import repository as repository
    from cnnjax.serve import rollout as rollout
    from cnnjax.serve import runtime as runtime
    from cnnjax.serve.batcher import Limits as Limits
    from cnnjax.serve.client import AsyncClient as AsyncClient
    from cnnjax.serve.client import Client as Client
    from cnnjax.serve.client import ServeError as ServeError
    from cnnjax.serve.http.web import application as application
    from cnnjax.serve.models import Source as Source
    from cnnjax.serve.models import read_sources as read_sources
    from cnnjax.serve.repository import Repository as Repository
    from cnnjax.serve.runtime import Options as Options
    from cnnjax.serve.runtime import open_runtime as open_runtime
