"""One decision for HTTP and gRPC: who asks, and whether this may be asked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from cnnjax.errors import UserError
from cnnjax.serve.guard.audit import Write, audit_log
from cnnjax.serve.guard.images import MAX_PIXELS
from cnnjax.serve.guard.keys import Identity, KeyFile
from cnnjax.serve.guard.rates import Rates
from cnnjax.serve.guard.refusal import Refused
from cnnjax.serve.guard.requests import OPEN, allows
from cnnjax.serve.guard.tokens import TokenRules, Verify, token_verifier

ANYONE = Identity("anonymous", "admin")
# Whose certificate is signed by --client-ca, and who brings no key.
CERTIFIED = Identity("certificate", "infer")
MAX_BODY_BYTES = 32 << 20
BODY_SECS = 30.0


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a server lets in.

    Attributes:
      find_key: `key -> Identity`, None where there are no keys.
      verify_token: `token -> Identity`, None where there are no tokens.
      certified: whether transport lets in only clients with a certificate.
      any_host: whether the Host header may be any name.
      max_body_bytes: of a request.
      max_pixels: of an image.
      body_secs: within which a body must have arrived.
      rates: the buckets of the keys.
      write: the audit log.
      count_refused: `(reason, protocol) -> None`.
    """

    find_key: Callable[[str], Identity] | None = None
    verify_token: Verify | None = None
    certified: bool = False
    any_host: bool = False
    max_body_bytes: int = MAX_BODY_BYTES
    max_pixels: int = MAX_PIXELS
    body_secs: float = BODY_SECS
    rates: Rates = dataclasses.field(default_factory=Rates)
    write: Write = lambda event: None
    count_refused: Callable[[str, str], None] = lambda reason, protocol: None

    @property
    def asks_for_keys(self) -> bool:
        return self.find_key is not None or self.verify_token is not None


def identify(policy: Policy, credential: str) -> Identity:
    """Returns who brings this credential; raises Refused for nobody that is known here.

    A token has three parts with dots between them, and a key has none.
    """
    if not policy.asks_for_keys:
        return CERTIFIED if policy.certified else ANYONE
    if not credential:
        if policy.certified:
            return CERTIFIED
        raise Refused("no_credentials")
    if policy.verify_token is not None and (credential.count(".") == 2 or policy.find_key is None):
        return policy.verify_token(credential)
    assert policy.find_key is not None
    return policy.find_key(credential)


def admit(policy: Policy, credential: str, needed: str) -> Identity:
    """Returns who asks; raises Refused unless their role and rate allow it."""
    if needed == OPEN:
        return Identity("anyone", "")
    identity = identify(policy, credential)
    if not allows(identity.role, needed):
        raise Refused("wrong_role", f"{needed} is needed", who=identity.name)
    policy.rates.check(identity)
    return identity


def make_policy(
    *,
    keys: str = "",
    tokens: TokenRules | None = None,
    certified: bool = False,
    any_host: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_pixels: int = MAX_PIXELS,
    body_secs: float = BODY_SECS,
    audit_path: str = "",
    registry: Any = None,
    clock: Callable[[], float] = time.time,
) -> Policy:
    """Returns the policy of a server; what its files hold is read and checked now.

    Args:
      keys: a file of keys, see `cnnjax serve-key`.
      tokens: which tokens are accepted; None for none.
      certified: whether clients need a certificate.
      any_host: whether the server may be called by any name; with keys it always may.
      max_body_bytes: of a request.
      max_pixels: of an image.
      body_secs: within which a body must have arrived.
      audit_path: of the audit log; "" for standard error.
      registry: of prometheus-client; None for its own.
      clock: seconds since 1970.

    Raises:
      UserError: a file that cannot be read or written, or a bound that is not positive.
    """
    for name, value in (
        ("--max-body-mib", max_body_bytes),
        ("--max-pixels", max_pixels),
        ("--body-timeout-secs", body_secs),
    ):
        if value <= 0:
            raise UserError(f"{name}: give a positive number")
    refused, lost = counters(registry)
    write = audit_log(audit_path, lost=lost.inc)
    found = None
    if keys:
        found = KeyFile(
            keys, complain=lambda text: write({"action": "keys", "problem": text}), clock=clock
        ).find
    return Policy(
        find_key=found,
        verify_token=token_verifier(tokens) if tokens else None,
        certified=certified,
        any_host=any_host or bool(keys) or tokens is not None or certified,
        max_body_bytes=max_body_bytes,
        max_pixels=max_pixels,
        body_secs=body_secs,
        write=write,
        count_refused=lambda reason, protocol: refused.labels(reason, protocol).inc(),
    )


def counters(registry: Any = None) -> tuple[Any, Any]:
    """Returns the counters of refused requests, by reason and protocol, and of lost audit lines.

    A registry has them once: asked again, it gives those it has.
    """
    import prometheus_client

    registry = registry or prometheus_client.REGISTRY
    refused = _counter(
        registry,
        "cnnjax_refused_requests",
        "Requests that were not let in, by reason.",
        ("reason", "protocol"),
    )
    lost = _counter(registry, "cnnjax_audit_lines_lost", "Lines of the audit log not written.", ())
    return refused, lost


def _counter(registry: Any, name: str, text: str, labels: Sequence[str]) -> Any:
    import prometheus_client

    try:
        return prometheus_client.Counter(name, text, labels, registry=registry)
    except ValueError:
        return registry._names_to_collectors[name]
