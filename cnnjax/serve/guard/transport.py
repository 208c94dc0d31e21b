"""What a server binds to, and how: loopback unless told, TLS, client certificates, slow clients."""

from __future__ import annotations

import datetime
import re
import ssl
import uuid
from pathlib import Path
from typing import Any

from cnnjax.errors import UserError
from cnnjax.paths import expand
from cnnjax.serve.guard.audit import event
from cnnjax.serve.guard.policy import Policy
from cnnjax.serve.guard.refusal import REASONS

HEAD_SECS = 10.0
OFFER = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
# In which a client of TLS must say that it has closed its side, when the server stops.
FAREWELL_SECS = 1.0


def tls_options(certificate: str, key: str, client_ca: str = "") -> dict[str, Any]:
    """Returns uvicorn's options for TLS; with `client_ca` clients need a certificate of it.

    Args:
      certificate: a PEM file: the server's certificate, then those that lead to its root.
      key: a PEM file: the private key.
      client_ca: a PEM file: the roots of the clients' certificates; "" for clients without.

    Raises:
      UserError: one without the other, or files that cannot be read, do not belong together, or
        hold a certificate that has ended.
    """
    if not certificate and not key and not client_ca:
        return {}
    if not certificate or not key:
        raise UserError("TLS needs both --tls-certificate FILE and --tls-key FILE.")
    names = {"--tls-certificate": certificate, "--tls-key": key, "--tls-client-ca": client_ca}
    for flag, name in names.items():
        if name and not Path(expand(name)).is_file():
            raise UserError(f"{flag} {name}: there is no such file.")
    certificate, key, client_ca = expand(certificate), expand(key), expand(client_ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a password would ask for it at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        raise UserError(
            f"--tls-certificate {certificate} and --tls-key {key}: they are no certificate and key "
            f"that belong together, without a password ({error})."
        ) from None
    _check_dates(certificate)
    options: dict[str, Any] = {"ssl_certfile": certificate, "ssl_keyfile": key}
    if client_ca:
        try:
            context.load_verify_locations(client_ca)
        except (ssl.SSLError, OSError) as error:
            raise UserError(f"--tls-client-ca {client_ca}: no certificates ({error}).") from None
        options |= {"ssl_ca_certs": client_ca, "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return options


def _check_dates(certificate: str) -> None:
    from cryptography import x509

    ends = x509.load_pem_x509_certificate(Path(certificate).read_bytes()).not_valid_after_utc
    if ends < datetime.datetime.now(datetime.UTC):
        raise UserError(f"--tls-certificate {certificate}: it ended on {ends:%Y-%m-%d}.")


def grpc_credentials(options: dict[str, Any]) -> Any:
    """Returns a gRPC server's credentials for the same files; None without TLS."""
    import grpc

    if "ssl_certfile" not in options:
        return None
    key, chain = (Path(options[name]).read_bytes() for name in ("ssl_keyfile", "ssl_certfile"))
    roots = options.get("ssl_ca_certs")
    return grpc.ssl_server_credentials(
        [(key, chain)],
        root_certificates=Path(roots).read_bytes() if roots else None,
        require_client_auth=bool(roots),
    )


def patient_protocol(policy: Policy, *, head_secs: float = HEAD_SECS) -> type:
    """Returns uvicorn's HTTP protocol with an end to its patience: it closes a connection on which
    the head of a request has not arrived within `head_secs`.

    uvicorn has no such bound, so that a client which sends a byte now and then (slowloris) keeps a
    connection for ever. Bodies have theirs in `cnnjax.serve.guard.asgi`. What is no HTTP, such as a
    request with two lengths, never reaches the application: it is written down and counted here.
    """

    class Patient(_mended_protocol()):  # type: ignore[misc]
        _patience: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._patience is None:
                self._wait()

        def on_headers_complete(self) -> None:
            self._arrived()
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            self._arrived()
            write_refused(policy, "malformed", (self.client or ("",))[0])
            super().send_400_response(msg)

        def connection_lost(self, exc: Exception | None) -> None:
            self._arrived()
            super().connection_lost(exc)

        def _wait(self) -> None:
            self._patience = self.loop.call_later(head_secs, self._give_up)

        def _arrived(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _give_up(self) -> None:
            self._patience = None
            if self.transport is not None and not self.transport.is_closing():
                write_refused(policy, "slow_head", (self.client or ("",))[0])
                self.transport.close()

    return Patient


def _mended_protocol() -> type:
    """Returns uvicorn's HTTP protocol without three faults of it.

    Of several requests that were sent at once, it tells only the last that its client has gone;
    here all are told. A server that stops waits half a minute for each client of TLS to say
    farewell; here a second. And of a request that offers another protocol (h2c, as Java's client
    does) its parser loses the body; here the offer is not seen.
    """
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    class Mended(HttpToolsProtocol):  # type: ignore[misc]
        _is_stopping, _in_head = False, True

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._unanswered: list[Any] = []

        def data_received(self, data: bytes) -> None:
            end = data.find(b"\r\n\r\n")
            if self._in_head and (found := OFFER.search(data, 0, end if end > 0 else len(data))):
                data = b"\r\nx-".join((data[: found.start()], data[found.start() + 2 :]))
            super().data_received(data)

        def on_message_complete(self) -> None:
            self._in_head = True
            super().on_message_complete()

        def on_headers_complete(self) -> None:
            self._in_head = False
            super().on_headers_complete()
            self._unanswered.append(self.cycle)

        def on_response_complete(self) -> None:
            self._unanswered = [each for each in self._unanswered if not each.response_complete]
            super().on_response_complete()
            if self._is_stopping:
                self._end()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.pipeline.clear()
            for cycle in self._unanswered:
                cycle.disconnected = True
                cycle.message_event.set()

        def shutdown(self) -> None:
            self._is_stopping = True
            super().shutdown()
            self._end()

        def _end(self) -> None:
            """Cuts a connection that is closing, once all that was written has been sent."""
            if self.transport.is_closing() and self.scheme == "https":
                self.loop.call_later(FAREWELL_SECS, self._cut)

        def _cut(self) -> None:
            if self.transport.get_write_buffer_size():
                self._end()
            else:
                self.transport.abort()

    return Mended


def write_refused(policy: Policy, reason: str, client: str) -> None:
    """Writes down and counts a connection on which no request arrived."""
    policy.count_refused(reason)
    policy.write(
        event(
            "http",
            request_id=uuid.uuid4().hex,
            client=client,
            status=REASONS[reason][0],
            reason=reason,
        )
    )
