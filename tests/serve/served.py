"""An application of made runtimes, asked without a network; and requests."""

import asyncio
import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image

from cnnjax.serve import logs, protocol
from cnnjax.serve.models import Source
from tests.serve.made import Made

for package in ("fastapi", "prometheus_client", "python_multipart", "httpx"):
    pytest.importorskip(package)
INFER = "/v2/models/digits/infer"


class Served:
    """An application of made runtimes, asked without a network."""

    def __init__(self, monkeypatch, versions=("1",), limits=None, bounds=None, **made):
        self.made = [Made(**made) for _ in versions]
        self.opened = iter([each.runtime for each in self.made])
        self.lines = []
        monkeypatch.setattr("cnnjax.serve.repository.open_runtime", lambda *a: self.open())
        monkeypatch.setattr(logs, "_stream", self)
        from cnnjax.serve import Repository, application

        sources = [Source("digits", version, "made") for version in versions]
        self.repository = Repository(sources, limits=limits)
        self.seen = []
        self.app = application(
            self.repository,
            observers=[lambda *told: self.seen.append(told)],
            bounds=bounds,
            loads=False,
        )

    def open(self):
        found = next(self.opened)
        if isinstance(found, Exception):
            raise found
        return found

    def write(self, text):
        self.lines.append(json.loads(text))

    def flush(self):
        pass

    @contextlib.asynccontextmanager
    async def client(self):
        import httpx

        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://served") as client:
            await self.repository.start()
            yield client
            await self.repository.close()

    def ask(self, *requests):
        """Returns the responses to requests (method, path, options), one after another."""

        async def main():
            async with self.client() as client:
                return [
                    await client.request(method, path, **(options[0] if options else {}))
                    for method, path, *options in requests
                ]

        return asyncio.run(main())


def tensor(array, **more):
    datatype = "UINT8" if array.dtype == np.uint8 else "FP32"
    return {"name": "image", "shape": list(array.shape), "datatype": datatype, **more}


def body(array, **more):
    return {"inputs": [tensor(array, data=array.ravel().tolist())], **more}


def binary(array, **more):
    """The options of a request with a binary tensor."""
    content = array.tobytes()
    sized = tensor(array, parameters={"binary_data_size": len(content)})
    head = json.dumps({"inputs": [sized], **more}).encode()
    headers = {protocol.HEADER_LENGTH: str(len(head))}
    return {"content": head + content, "headers": headers}


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()
