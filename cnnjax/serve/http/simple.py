"""The simple way in: an image file that a person sends by curl, and a page where one is dropped.

curl -F image=@digit.png http://127.0.0.1:8080/v1/models/digits:predict
curl --data-binary @digit.png http://127.0.0.1:8080/v1/models/digits:predict
"""

from __future__ import annotations

import asyncio
import functools
import importlib.resources
import io
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from cnnjax.explain import markup
from cnnjax.serve import protocol
from cnnjax.serve.ask import ask
from cnnjax.serve.http import asgi, described
from cnnjax.serve.refusals import Invalid, Unavailable, Unknown
from cnnjax.serve.repository import Repository

if TYPE_CHECKING:
    from cnnjax.serve.http.web import Bounds

PAGE = {"": ("index.html", "text/html"), "page.js": ("page.js", "text/javascript")}
PAGE |= {"style.css": ("style.css", "text/css")}
# Scripts and styles of its own alone: what a class is called cannot run.
POLICY = "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"


def add_routes(app: FastAPI, direct: asgi.Direct, repository: Repository, bounds: Bounds) -> None:
    """Adds predictions and explanations of image files, rollouts, and the page."""
    add_images(app, direct, repository, bounds)
    add_rollouts(app, repository)
    add_other_verbs(app)
    add_status(app, repository)
    for path, (name, kind) in PAGE.items():
        app.add_api_route(
            f"/{path}", _page_route(name, kind), include_in_schema=False, methods=["GET"]
        )


def add_images(app: FastAPI, direct: asgi.Direct, repository: Repository, bounds: Bounds) -> None:
    """Adds what takes an image file."""

    async def asked(
        request: Request, name: str, version: str, content: bytes
    ) -> tuple[np.ndarray, protocol.Answer]:
        images, answer = await ask(
            repository,
            name,
            [content],
            version=version,
            request_id=request.state.request_id,
            deadline_secs=bounds.deadline_secs,
            most_pixels=bounds.pixels,
            note=functools.partial(setattr, request.state, "logged"),
        )
        return images[0], answer

    async def predict(request: Request, name: str, version: str = "", top: int = 3) -> Response:
        """The likeliest classes of an image file."""
        check_top(top)
        content = await image_of(request, bounds)
        _, answer = await asgi.unless_gone(request, asked(request, name, version, content))
        return JSONResponse(prediction(answer, request.state.request_id, top))

    async def explain(
        request: Request, name: str, version: str = "", top: int = 3, label: int = -1
    ) -> Response:
        """The likeliest classes of an image file, and the Grad-CAM of one of them."""
        check_top(top)
        content = await image_of(request, bounds)
        image, answer = await asgi.unless_gone(request, asked(request, name, version, content))
        runtime = repository.find(name, answer.version)[1].runtime
        if runtime.explain is None:
            raise Unavailable(
                f"{name} has no Grad-CAM: it is a file, has no layer of images, or --no-explain."
            )
        if label >= len(answer.class_names):
            raise Invalid(f"label {label}: {name} has classes 0 to {len(answer.class_names) - 1}.")
        if label < 0:
            label = int(answer.probabilities[0].argmax())
        map_ = await asyncio.to_thread(runtime.explain, image, label)
        said = prediction(answer, request.state.request_id, top)
        pictures = {"image": picture_of(image), "heat": picture_of(heat_over(image, map_))}
        return JSONResponse(said | {"label": label, **pictures})

    async def predict_directly(request: Request, name: str, version: str = "") -> Response:
        return await predict(request, name, version, read_top(request.query_params.get("top")))

    for path in ("/v1/models/{name}", "/v1/models/{name}/versions/{version}"):
        direct.add(f"{path}:predict", predict_directly)
        for function, answers in (
            (predict, described.Prediction),
            (explain, described.Explanation),
        ):
            kind = "_version" if "version" in path else ""
            app.add_api_route(
                f"{path}:{function.__name__}",
                function,
                methods=["POST"],
                tags=["images"],
                operation_id=f"{function.__name__}{kind}",
                responses=described.answers(answers),
                openapi_extra=described.IMAGE,
            )


def add_rollouts(app: FastAPI, repository: Repository) -> None:
    """Adds what changes who answers."""
    status = described.answers(described.ModelStatus)

    @app.post(
        "/v1/models/{name}:rollout",
        tags=["rollout"],
        responses=status,
        openapi_extra=described.ROLLOUT,
    )
    async def rollout(request: Request, name: str) -> Response:
        """Divides a model's traffic among its versions, and names a shadow."""
        content = protocol.read_json(await asgi.read_body(request, 65_536, 20.0))
        await repository.change("rollout", name, content)
        return JSONResponse(repository.describe(name))

    @app.post("/v1/models/{name}:rollback", tags=["rollout"], responses=status)
    async def rollback(name: str) -> Response:
        """Divides a model's traffic as before the last change."""
        await repository.change("rollback", name)
        return JSONResponse(repository.describe(name))


def add_other_verbs(app: FastAPI) -> None:
    """Adds the answer to verbs that there are not, and to methods that a verb does not take.

    It comes behind all verbs, and before what takes `NAME:VERB` for the name of a model.
    """
    for path in ("/v1/models/{name}", "/v1/models/{name}/versions/{version}"):

        def refuse(request: Request, path: str = path) -> Response:
            verb, known = request.path_params["verb"], asgi.verbs_of(app, path)
            if verb in known:
                raise HTTPException(405)
            ways = ", ".join(f"{method} :{each}" for each, method in sorted(known.items()))
            raise Unknown(f"a model has no verb {verb[:100]!r}: there are {ways}.")

        app.add_route(
            f"{path}:{{verb}}",
            refuse,
            methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
            name=asgi.CATCH_ALL,
            include_in_schema=False,
        )


def add_status(app: FastAPI, repository: Repository) -> None:
    """Adds what says who answers."""

    @app.get("/v1/models", tags=["rollout"], responses=described.answers(described.Models))
    async def models() -> Response:
        """Every model's versions, rollout and comparison with the shadow."""
        return JSONResponse({"models": [repository.describe(name) for name in repository.models]})

    @app.get(
        "/v1/models/{name}", tags=["rollout"], responses=described.answers(described.ModelStatus)
    )
    async def model(name: str) -> Response:
        """A model's versions, rollout and comparison with the shadow."""
        return JSONResponse(repository.describe(name))


def read_top(text: str | None) -> int:
    """Returns the number of classes that a query asks for, 3 where it does not."""
    if text is None:
        return 3
    if not (text.isascii() and text.isdigit() and len(text) < 9):
        raise Invalid(f"top {text[:20]!r}: ask for 1 to 1000 classes.")
    return int(text)


def check_top(top: int) -> None:
    """Raises `Invalid` unless there are that many classes to tell."""
    if not 1 <= top <= 1000:
        raise Invalid(f"top {top}: ask for 1 to 1000 classes.")


async def image_of(request: Request, bounds: Bounds) -> bytes:
    """Returns the image file of a request: its body, or the part called `image` of a form.

    Raises:
      Refused: there is none, or it is too large or too slow.
    """
    body = await asgi.read_body(request, bounds.body_bytes, bounds.body_secs)
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() == "multipart/form-data":
        body = part_of(body, kind)
    if not body:
        raise Invalid("no image was sent: give a file, as by curl -F image=@FILE.")
    return body


def part_of(body: bytes, content_type: str) -> bytes:
    """Returns the content of the part `image` of a form, or of its only file.

    Raises:
      Invalid: the form is damaged or has no such part.
    """
    from python_multipart import parse_form

    fields: dict[str, bytes] = {}
    headers = {"Content-Type": content_type.encode("latin-1")}

    def keep(name: bytes | None, content: bytes) -> None:
        fields.setdefault((name or b"").decode("latin-1"), content)

    try:
        parse_form(
            headers,
            io.BytesIO(body),
            lambda field: keep(field.field_name, field.value or b""),
            lambda file: keep(file.field_name, _content(file)),
        )
    except Exception as error:  # Of several types, some of them undocumented.
        raise Invalid(f"the form cannot be read ({str(error)[:200]}).") from None
    if "image" in fields:
        return fields["image"]
    names = ", ".join(sorted(fields))[:200] or "none"
    raise Invalid(f"the form has the parts {names}: call the file's image.")


def _content(file: Any) -> bytes:
    file.file_object.seek(0)
    return file.file_object.read()


def prediction(answer: protocol.Answer, request_id: str, top: int) -> dict[str, Any]:
    """Returns the likeliest classes of the first image, as JSON has them."""
    probabilities = answer.probabilities[0]
    likeliest = (-probabilities).argsort(kind="stable")[:top]
    classes = [
        {
            "label": int(label),
            "class_name": answer.class_names[label],
            "probability": float(probabilities[label]),
        }
        for label in likeliest
    ]
    said = {"model": answer.model, "version": answer.version, "request_id": request_id}
    return said | {"classes": classes}


def picture_of(image: np.ndarray) -> str:
    """Returns uint8 `[height, width, 1 or 3]` as the address of a PNG picture."""
    return markup.uri(markup.png(image))


def heat_over(image: np.ndarray, map_: np.ndarray) -> np.ndarray:
    """Returns the image in gray, under red where the map `[height, width]`, 0 to 1, is high."""
    gray = image.astype(np.float32).mean(-1, keepdims=True).repeat(3, -1)
    red = np.array([255.0, 40.0, 0.0], np.float32)
    strength = 0.75 * map_[..., None]
    return np.round(gray * (1 - strength) + red * strength).astype(np.uint8)


def _page_route(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    content = (importlib.resources.files("cnnjax.serve") / "page" / name).read_bytes()
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}

    async def page() -> Response:
        return Response(content, media_type=kind, headers=headers)

    return page
