"""Why a request is refused: one table of reasons, with what HTTP and gRPC answer for each."""

from __future__ import annotations

import math

from cnnjax.serve import refusals

# Reason -> (HTTP status, name of the gRPC status, what the client reads). The reason is the label
# of the counter and the word in the audit log; the text says nothing that helps to guess a key.
REASONS: dict[str, tuple[int, str, str]] = {
    "no_credentials": (
        401,
        "UNAUTHENTICATED",
        "no key: send it as `Authorization: Bearer KEY`",
    ),
    "unknown_key": (401, "UNAUTHENTICATED", "this key is not known here"),
    "expired_key": (401, "UNAUTHENTICATED", "this key has expired: ask for a new one"),
    "bad_token": (401, "UNAUTHENTICATED", "the token is damaged, or not signed by a known key"),
    "token_algorithm": (401, "UNAUTHENTICATED", "the token's algorithm is not accepted"),
    "expired_token": (401, "UNAUTHENTICATED", "the token has expired, or is not valid yet"),
    "wrong_audience": (401, "UNAUTHENTICATED", "the token is for another audience"),
    "wrong_issuer": (401, "UNAUTHENTICATED", "the token is from another issuer"),
    "wrong_role": (403, "PERMISSION_DENIED", "the role of this key does not allow this request"),
    "cross_site": (403, "PERMISSION_DENIED", "a page of another site may not send this request"),
    "unknown_host": (
        403,
        "PERMISSION_DENIED",
        "without keys this server answers only to localhost",
    ),
    "bad_path": (400, "INVALID_ARGUMENT", "the path holds what no name of a model has"),
    "bad_headers": (400, "INVALID_ARGUMENT", "the headers contradict each other, or are too many"),
    "encoded_body": (415, "INVALID_ARGUMENT", "compressed bodies are not accepted"),
    "malformed": (400, "INVALID_ARGUMENT", "this is no HTTP"),
    "slow_head": (408, "DEADLINE_EXCEEDED", "the head of the request did not arrive in time"),
    "over_rate": (429, "RESOURCE_EXHAUSTED", "more requests than this key may send"),
}


class Refused(refusals.Refused):
    """A request that is not let in.

    Attributes:
      reason: a key of `REASONS`.
      status: the HTTP status.
      code: the name of the gRPC status.
      text: what the client is told.
      retry_after: seconds after which to ask again; None where that does not help.
      who: the name of the key or the subject of the token, where it is known.
    """

    def __init__(
        self, reason: str, detail: str = "", *, retry_after: float | None = None, who: str = ""
    ):
        status, self.code, text = REASONS[reason]
        super().__init__(f"{text} ({detail})" if detail else text, retry_after=retry_after)
        self.reason, self.status, self.who = reason, status, who

    def headers(self) -> dict[str, str]:
        """Returns the headers of HTTP that belong to this refusal (RFC 9110, 10.2.3 and 11.6.1)."""
        headers = {"cache-control": "no-store"}
        if self.status == 401:
            # Basic lets a browser ask its user for the key.
            headers["www-authenticate"] = 'Bearer realm="cnnjax", Basic realm="cnnjax"'
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return headers
