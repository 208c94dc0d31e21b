"""What a request may look like before anyone looks at what it asks: path, headers, role."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
import urllib.parse
from collections.abc import Iterable, Sequence

from cnnjax.serve.guard.refusal import Refused
from cnnjax.serve.http.asgi import request_id_of
from cnnjax.serve.server import is_loopback

Headers = Sequence[tuple[bytes, bytes]]

# A model's name is compared with those in the repository and never joined to a path; what cannot be
# one is refused all the same, so that no part behind the guard need think of it.
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_HEADERS, MAX_HEADER_BYTES, MAX_PATH_BYTES = 100, 32_768, 2048

# Two of one of these, and a proxy may take the one and this server the other (RFC 9112, 11.2).
SINGLE_HEADERS = {
    *(b"authorization", b"content-length", b"content-type", b"host", b"origin"),
    *(b"transfer-encoding", b"x-api-key", b"x-request-id"),
}

_ENCODED = re.compile(rb"%(2f|5c|00|25)", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_BYTES = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_LENGTH = re.compile(rb"[0-9]{1,18}")

OPEN, INFER, METRICS, ADMIN = "", "infer", "metrics", "admin"
# What needs no key at all, and what a key for inference may do; all else is for administrators.
_OPEN_PATHS = {"/v2/health/live", "/v2/health/ready"}
_INFER_PATHS = re.compile(
    r"/"
    r"|/(?:docs|openapi\.json|page\.js|style\.css|v2|v2/models|v1/models)/?"
    r"|/v2/models/[^/]+(?:/versions/[^/]+)?(?:/ready|/infer|/generate)?"
    r"|/v1/models/[^/:]+(?:/versions/[^/:]+)?(?::predict|:explain|:feedback|:drift)?"
    r"|/v2/repository/index"
)
_OPEN_CALLS = {"ServerLive", "ServerReady", "Check", "Watch"}
_INFER_CALLS = {"ServerMetadata", "ModelMetadata", "ModelReady", "ModelInfer", "RepositoryIndex"}


def needed_role(method: str, path: str) -> str:
    """Returns the role that an HTTP request needs: `OPEN`, `INFER`, `METRICS` or `ADMIN`.

    Args:
      method: such as `POST`.
      path: decoded, without the query.
    """
    if path in _OPEN_PATHS and method in ("GET", "HEAD"):
        return OPEN
    if path == "/metrics":
        return METRICS
    return INFER if _INFER_PATHS.fullmatch(path) and method in ("GET", "HEAD", "POST") else ADMIN


def needed_role_of_call(method: str) -> str:
    """Returns the role that a gRPC call needs, by its full name `/PACKAGE.SERVICE/METHOD`."""
    name = method.rpartition("/")[2]
    return OPEN if name in _OPEN_CALLS else INFER if name in _INFER_CALLS else ADMIN


def allows(role: str, needed: str) -> bool:
    """Whether a role suffices: administrators may do all, the others what is theirs."""
    return needed == OPEN or role in (ADMIN, needed)


def check_path(raw_path: bytes) -> None:
    """Raises Refused for a path that goes elsewhere than it seems to.

    That is one with `..`, a backslash, control characters, bytes that are not UTF-8, an encoded
    slash, or something encoded twice.

    Args:
      raw_path: as it was sent, percent-encoded, without the query.
    """
    if len(raw_path) > MAX_PATH_BYTES:
        raise Refused("bad_path", "it is too long")
    try:
        path = urllib.parse.unquote_to_bytes(raw_path).decode()
    except UnicodeDecodeError:
        raise Refused("bad_path") from None
    segments = path.split("/")
    is_hidden = _ENCODED.search(raw_path) or _CONTROL.search(path)
    if is_hidden or "\\" in path or ".." in segments or "." in segments:
        raise Refused("bad_path")
    for before, segment in itertools.pairwise(segments):
        if before == "models" and segment:
            check_model_name(segment.partition(":")[0])


def check_model_name(name: str) -> None:
    """Raises Refused for what no model can be called."""
    if not MODEL_NAME.fullmatch(name):
        raise Refused("bad_path", "a model's name has letters, digits and . _ - only")


def model_of(path: str) -> str:
    """Returns the name of the model that a path is about, "" for none."""
    found = re.search(r"/models/([^/:]+)", path)
    return found[1] if found else ""


def check_headers(headers: Headers) -> None:
    """Raises Refused for headers that two readers may understand differently, or that are too many.

    Args:
      headers: names in lower case, and values, as ASGI has them.
    """
    if len(headers) > MAX_HEADERS:
        raise Refused("bad_headers", f"more than {MAX_HEADERS}")
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise Refused("bad_headers", f"more than {MAX_HEADER_BYTES} bytes")
    found = dict(headers)
    if len(found) < len(headers):
        names = [name for name, _ in headers]
        for name in SINGLE_HEADERS:
            if names.count(name) > 1:
                raise Refused("bad_headers", f"{name.decode()} twice")
    if any(_CONTROL_BYTES.search(value) for _, value in headers):
        raise Refused("bad_headers", "control characters")
    if b"content-length" in found and b"transfer-encoding" in found:
        raise Refused("bad_headers", "content-length with transfer-encoding")
    if found.get(b"transfer-encoding", b"chunked").strip().lower() != b"chunked":
        raise Refused("bad_headers", "transfer-encoding other than chunked")
    length = found.get(b"content-length", b"0").strip()
    if not _LENGTH.fullmatch(length):
        raise Refused("bad_headers", "content-length is no number")
    # A small body can unpack to a large one; no client of the protocol compresses unless asked to.
    if found.get(b"content-encoding", b"identity").strip().lower() not in (b"identity", b""):
        raise Refused("encoded_body")


def check_site(headers: Headers, *, any_host: bool) -> None:
    """Raises Refused where a page of another site uses its reader's browser to ask.

    Browsers send Sec-Fetch-Site with each request, and Origin with each that changes something;
    what is no browser sends neither. A page that rebinds its own name to this machine's address is
    told by the Host header.

    Args:
      headers: as of `check_headers`.
      any_host: whether Host may be any name: where each request brings a key of its own.
    """
    found = {name: value.decode("latin-1").strip().lower() for name, value in headers}
    site, origin, host = (found.get(name, "") for name in (b"sec-fetch-site", b"origin", b"host"))
    if not any_host and not is_loopback(_without_port(host).strip("[]")):
        raise Refused("unknown_host")
    if site in ("cross-site", "same-site") and found.get(b"sec-fetch-mode") != "navigate":
        raise Refused("cross_site")
    if origin and _netloc(origin) != host:
        raise Refused("cross_site")


def _netloc(origin: str) -> str | None:
    try:
        return urllib.parse.urlsplit(origin).netloc
    except ValueError:  # It is no address.
        return None


def _without_port(host: str) -> str:
    return re.sub(r":\d*$", "", host)


def credential(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Returns the key or token that a request brings, "" for none.

    `Authorization: Bearer KEY`, `X-API-Key: KEY`, or the password of `Authorization: Basic`, which
    is what a browser asks its user for (RFC 6750, section 2.1; RFC 7617).

    Raises:
      Refused: two that differ, or a header that is none of these.
    """
    found = {name: value.decode("latin-1").strip() for name, value in headers}
    given = found.get(b"x-api-key", "")
    scheme, _, rest = found.get(b"authorization", "").partition(" ")
    rest = rest.strip()
    if scheme.lower() == "basic":
        try:
            rest = base64.b64decode(rest, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            raise Refused("bad_headers", "Authorization: Basic cannot be read") from None
    elif scheme and scheme.lower() != "bearer":
        raise Refused("no_credentials")
    if given and rest and given != rest:
        raise Refused("bad_headers", "two keys that differ")
    return given or rest


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Returns the request id that the client sent, where it can be one, or else a new one."""
    return request_id_of(dict(headers).get(b"x-request-id", b"").decode("latin-1"))
