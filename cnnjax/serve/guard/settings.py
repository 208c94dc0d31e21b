"""The flags of `cnnjax serve` that say who is let in, and what they come to."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnnjax.serve.guard.audit import Write
    from cnnjax.serve.guard.policy import Policy
    from cnnjax.serve.measures import Measures


@dataclasses.dataclass(frozen=True)
class Guarding:
    """Who is let in."""

    keys: str = ""
    """A file of API keys, see cnnjax serve-key; it is read again when it changes."""

    jwt_jwks: str = ""
    """Take JSON Web Tokens, checked by these keys of their issuer: a file or an https URL."""

    jwt_issuer: str = ""
    """The issuer (iss) that tokens must have."""

    jwt_audience: str = ""
    """The audience (aud) that tokens must have."""

    jwt_algorithms: str = "RS256,ES256,EdDSA"
    """Algorithms of tokens that are taken."""

    jwt_role_claim: str = "roles"
    """Where tokens have their roles (infer, metrics, admin): a claim, or a path such as
    realm_access.roles."""

    jwt_per_second: float = 0.0
    """Requests per second that each subject of a token may send for long; 0 for any number."""

    jwt_burst: int = 0
    """Requests that each subject may send at once; 0 for two seconds' worth."""

    jwt_leeway: float = 30.0
    """Seconds that the clocks of issuer and server may be apart."""

    tls_certificate: str = ""
    """A PEM file: the server's certificate and those that lead to its root; then HTTPS."""

    tls_key: str = ""
    """A PEM file: the certificate's private key."""

    tls_client_ca: str = ""
    """A PEM file: clients need a certificate signed by one of these."""

    audit_log: str = ""
    """A file for one line per request that needs a role: who, what, result; by default the log."""

    def tokens(self) -> Any:
        """Returns the rules for tokens, None where none are taken; UserError for half of them."""
        from cnnjax.errors import UserError
        from cnnjax.serve.guard.tokens import TokenRules

        if not self.jwt_jwks:
            if self.jwt_issuer or self.jwt_audience:
                raise UserError("--jwt-issuer and --jwt-audience need --jwt-jwks FILE or URL.")
            return None
        return TokenRules(
            self.jwt_issuer,
            self.jwt_audience,
            self.jwt_jwks,
            algorithms=tuple(filter(None, self.jwt_algorithms.replace(" ", "").split(","))),
            role_claim=self.jwt_role_claim,
            leeway_secs=self.jwt_leeway,
            per_second=self.jwt_per_second,
            burst=self.jwt_burst,
        )


def policy_of(guarding: Guarding, host: str, *, insecure: bool, measures: Measures) -> Policy:
    """Returns the policy that the flags ask for, all of their files read and checked.

    Args:
      guarding: the flags.
      host: to listen at.
      insecure: whether anyone may reach a server that asks for no key.
      measures: that count refusals and lost lines.

    Raises:
      UserError: a file that cannot be read, flags that contradict each other, or a server that
        anyone could use.
    """
    from cnnjax.errors import UserError
    from cnnjax.serve.guard import policy
    from cnnjax.serve.server import check_host, is_loopback

    for flag in ("jwt_per_second", "jwt_burst", "jwt_leeway"):
        if not 0 <= (value := getattr(guarding, flag)) < 1e9:
            raise UserError(f"--{flag.replace('_', '-')} {value:g}: give 0 or more.")
    made = policy.make_policy(
        keys=guarding.keys,
        tokens=guarding.tokens(),
        certified=bool(guarding.tls_client_ca),
        any_host=insecure and not is_loopback(host),
        write=_write_of(guarding, measures),
        count_refused=lambda reason: measures.refused.labels(reason).inc(),
    )
    check_host(host, guarded=made.asks_for_keys or made.certified or insecure)
    return made


def check_guard(guarding: Guarding, host: str, *, insecure: bool) -> None:
    """Raises as `policy_of` and `uvicorn_options` do, before anything is started."""
    from cnnjax.serve.measures import Measures

    uvicorn_options(guarding, policy_of(guarding, host, insecure=insecure, measures=Measures()))


def uvicorn_options(guarding: Guarding, policy: Policy) -> dict[str, Any]:
    """Returns what uvicorn is told: TLS, and the protocol that does not wait for ever."""
    from cnnjax.serve.guard import transport

    tls = transport.tls_options(guarding.tls_certificate, guarding.tls_key, guarding.tls_client_ca)
    return {**tls, "http": transport.patient_protocol(policy), "ws": "none"}


def _write_of(guarding: Guarding, measures: Measures) -> Write:
    from cnnjax.serve.guard.audit import audit_log
    from cnnjax.serve.logs import log

    if guarding.audit_log:
        return audit_log(guarding.audit_log, lost=measures.audit_lost.inc)
    anonymous = not (guarding.keys or guarding.jwt_jwks or guarding.tls_client_ca)

    def write(event: dict[str, Any]) -> None:
        # Where nobody has a name, the log's own line says all but why a request was refused.
        if not anonymous or event.get("reason"):
            log("audit", **event)

    return write
