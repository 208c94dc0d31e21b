"""JSON Web Tokens of an identity provider: who signed, for whom, until when, with which role.

As RFC 8725 (JWT Best Current Practices) asks: algorithms are pinned, `none` and shared secrets are
never accepted, issuer, audience and end are required. PyJWT does the cryptography.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from cnnjax.errors import UserError, unknown_name
from cnnjax.paths import read_text
from cnnjax.serve.guard.keys import Identity
from cnnjax.serve.guard.refusal import Refused

# Those with a private and a public half: the server's half can check, and cannot sign.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
# Of several roles in a token the widest counts.
WIDEST_FIRST = ("admin", "infer", "metrics")
FRESH_SECS = 300.0
# A token with an unknown key id may come from anyone: it makes the server ask no more often.
AT_MOST_EVERY_SECS = 30.0
MAX_JWKS_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class TokenRules:
    """Which tokens are accepted.

    Attributes:
      issuer: the `iss` that they must have.
      audience: the `aud` that they must have, or have among theirs.
      jwks: the issuer's public keys (RFC 7517): a file, or an https URL.
      algorithms: accepted ones of `ALGORITHMS`.
      role_claim: where roles are: a claim, or a path such as `realm_access.roles`; a list, or words
        in one string as in `scope`.
      leeway_secs: how far clocks may be apart.
      per_second: requests that each subject may send for long; 0 for any number.
      burst: requests that each may send at once.
    """

    issuer: str
    audience: str
    jwks: str
    algorithms: Sequence[str] = ("RS256", "ES256", "EdDSA")
    role_claim: str = "roles"
    leeway_secs: float = 30.0
    per_second: float = 0.0
    burst: int = 0


Verify = Callable[[str], Identity]


def token_verifier(rules: TokenRules, *, clock: Callable[[], float] = time.monotonic) -> Verify:
    """Returns `verify(token) -> Identity`, which raises Refused for a token that does not hold.

    It may be called from any thread. With a URL it asks the issuer now and then, and blocks then.

    Raises:
      UserError: rules that mean nothing, keys that cannot be read, or PyJWT is not installed.
    """
    _check_rules(rules)
    find = _PublicKeys(rules.jwks, clock)

    def verify(token: str) -> Identity:
        import jwt

        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError:
            raise Refused("bad_token") from None
        if header.get("alg") not in rules.algorithms:
            raise Refused("token_algorithm", f"accepted: {', '.join(rules.algorithms)}")
        key = find(header.get("kid"))
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=list(rules.algorithms),
                audience=rules.audience,
                issuer=rules.issuer,
                leeway=rules.leeway_secs,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.ExpiredSignatureError, jwt.ImmatureSignatureError):
            raise Refused("expired_token") from None
        except jwt.InvalidAudienceError:
            raise Refused("wrong_audience") from None
        except jwt.InvalidIssuerError:
            raise Refused("wrong_issuer") from None
        except jwt.MissingRequiredClaimError as error:
            raise Refused("bad_token", f"it lacks the claim {error.claim}") from None
        except (jwt.InvalidAlgorithmError, jwt.InvalidKeyError):
            raise Refused("token_algorithm") from None
        except (jwt.PyJWTError, ValueError, TypeError):
            raise Refused("bad_token") from None
        role = widest_role(claims, rules.role_claim)
        return Identity(f"token:{claims['sub']}", role, rules.per_second, rules.burst)

    return verify


def widest_role(claims: dict[str, Any], claim: str) -> str:
    """Returns the widest role that the claims of a token name; "" if they name none."""
    found: Any = claims
    for part in claim.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    words = found.split() if isinstance(found, str) else found
    named = {word for word in words if isinstance(word, str)} if isinstance(words, list) else set()
    return next((role for role in WIDEST_FIRST if role in named), "")


def _check_rules(rules: TokenRules) -> None:
    try:
        import cryptography  # noqa: F401
        import jwt  # noqa: F401
    except ImportError:
        raise UserError(
            "tokens are checked by PyJWT, which is not here: pip install 'cnnjax[serve]'"
        ) from None
    for name, flag in (("issuer", "--jwt-issuer"), ("audience", "--jwt-audience")):
        if not getattr(rules, name):
            raise UserError(f"--jwt-jwks needs {flag}: tokens of others would be let in")
    if not rules.algorithms:
        raise UserError(f"--jwt-algorithms: name at least one of {', '.join(ALGORITHMS)}")
    for name in rules.algorithms:
        if name.lower() == "none" or name.startswith("HS"):
            why = "has no signature" if name.lower() == "none" else "has one secret for both sides"
            raise UserError(f"--jwt-algorithms {name}: it {why}; take one of {ALGORITHMS}")
        if name not in ALGORITHMS:
            raise unknown_name("algorithm", name, ALGORITHMS)


class _PublicKeys:
    """The keys of an issuer by their ids, read again from time to time where they are at a URL."""

    def __init__(self, source: str, clock: Callable[[], float]):
        self.source, self.clock = source, clock
        self.is_url = "://" in source
        if self.is_url:
            _check_url(source)
        self.keys = read_jwks(source)
        self.asked = self.read = clock()
        self.lock = threading.Lock()

    def __call__(self, key_id: str | None) -> Any:
        if self.is_url:
            self._refresh(key_id)
        keys = self.keys
        if key_id is None and len(keys) == 1:
            return next(iter(keys.values()))
        if key_id not in keys:
            raise Refused("bad_token", "no key of this id")
        return keys[key_id]

    def _refresh(self, key_id: str | None) -> None:
        with self.lock:
            now = self.clock()
            stale = now - self.read > FRESH_SECS or (key_id and key_id not in self.keys)
            if not stale or now - self.asked < AT_MOST_EVERY_SECS:
                return
            self.asked = now
        try:
            keys = read_jwks(self.source)
        except UserError:
            return  # An issuer that is away for a while does not lock its users out.
        with self.lock:
            self.keys, self.read = keys, now


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise UserError(f"--jwt-jwks {url}: give a file or an https URL; others can be changed")


def read_jwks(source: str) -> dict[str, Any]:
    """Returns the public keys of a JWKS file or URL (RFC 7517, section 5), by their ids.

    Raises:
      UserError: it cannot be read, is no such set, or holds a secret that both sides share.
    """
    import jwt

    what = f"--jwt-jwks {source}"
    if "://" in source:
        try:
            with urllib.request.urlopen(source, timeout=5) as answer:
                text = answer.read(MAX_JWKS_BYTES).decode()
        except (OSError, ValueError) as error:
            raise UserError(f"{what}: cannot read the issuer's keys ({error})") from None
    else:
        text = read_text(source, "file of the issuer's keys (--jwt-jwks)")
    try:
        found = json.loads(text)
        entries = found["keys"]
        if any(entry.get("kty") == "oct" for entry in entries):
            raise UserError(f"{what}: it holds a shared secret (kty oct); give public keys only")
        keys = jwt.PyJWKSet.from_dict(found).keys
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, jwt.PyJWTError) as error:
        raise UserError(f"{what}: this is no JSON Web Key Set ({error})") from None
    return {key.key_id or f"key {number}": key for number, key in enumerate(keys)}
