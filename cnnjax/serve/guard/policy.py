"""One decision for HTTP and gRPC: who asks, and whether this may be asked."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from cnnjax.serve.guard.audit import Write
from cnnjax.serve.guard.keys import Identity, KeyFile
from cnnjax.serve.guard.rates import Rates
from cnnjax.serve.guard.refusal import Refused
from cnnjax.serve.guard.requests import OPEN, allows
from cnnjax.serve.guard.tokens import TokenRules, Verify, token_verifier

ANYONE = Identity("anonymous", "admin")
# Whose certificate is signed by --client-ca, and who brings no key.
CERTIFIED = Identity("certificate", "infer")


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a server lets in.

    Attributes:
      find_key: `key -> Identity`, None where there are no keys.
      verify_token: `token -> Identity`, None where there are no tokens.
      certified: whether transport lets in only clients with a certificate.
      any_host: whether the Host header may be any name.
      rates: the buckets of the keys.
      write: the audit log.
      count_refused: called with the reason of each refusal.
    """

    find_key: Callable[[str], Identity] | None = None
    verify_token: Verify | None = None
    certified: bool = False
    any_host: bool = False
    rates: Rates = dataclasses.field(default_factory=Rates)
    write: Write = lambda event: None
    count_refused: Callable[[str], None] = lambda reason: None

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
    write: Write = lambda event: None,
    count_refused: Callable[[str], None] = lambda reason: None,
    clock: Callable[[], float] = time.time,
) -> Policy:
    """Returns the policy of a server; what its files hold is read and checked now.

    Args:
      keys: a file of keys, see `cnnjax serve-key`.
      tokens: which tokens are accepted; None for none.
      certified: whether clients need a certificate.
      any_host: whether the server may be called by any name; with keys it always may.
      write: the audit log.
      count_refused: called with the reason of each refusal.
      clock: seconds since 1970.

    Raises:
      UserError: a file that cannot be read, or rules that mean nothing.
    """
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
        write=write,
        count_refused=count_refused,
    )
