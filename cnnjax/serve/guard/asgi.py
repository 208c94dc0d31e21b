"""The guard around an HTTP application: an ASGI application that passes on what may pass."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cnnjax.serve.guard import requests
from cnnjax.serve.guard.policy import Policy, admit
from cnnjax.serve.guard.refusal import Refused

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

# Where the application finds who asks, and says why it refused: see `note_refused`.
NOTE = "cnnjax.guard"


def guarded(application: Application, policy: Policy) -> Application:
    """Returns an ASGI application that lets in what the policy allows.

    Path, headers and announced size are checked first, then key, role and rate, all before a byte
    of the body is read. A body that turns out larger, or does not come, is cut off. All but allowed
    questions after health is written to the audit log, and each refusal is counted.
    """

    async def asgi(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await application(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _Exchange(policy, scope, receive, send).run(application)

    return asgi


def note_refused(scope: Scope, refused: Refused) -> None:
    """Has the guard count and write down a refusal that the application itself decided on."""
    if NOTE in scope:
        scope[NOTE]["reason"] = refused.reason


@dataclasses.dataclass
class _Exchange:
    """One request and its answer."""

    policy: Policy
    scope: Scope
    receive: Receive
    send: Send
    taken_bytes: int = 0
    status: int = 0
    cut: bool = False
    began: float = dataclasses.field(default_factory=time.monotonic)
    note: dict[str, Any] = dataclasses.field(default_factory=dict)

    async def run(self, application: Application) -> None:
        headers = self.scope["headers"]
        path = self.scope["path"]
        needed = requests.needed_role(self.scope["method"], path)
        self.request_id = requests.request_id(headers)
        try:
            identity = await self._let_in(headers, needed)
        except Refused as refused:
            self.note |= {"reason": refused.reason, "who": refused.who}
            await self._refuse(refused)
        else:
            self.note |= {"who": identity.name, "role": identity.role}
            others = [pair for pair in headers if pair[0] != b"x-request-id"]
            inner = {
                **self.scope,
                "headers": [*others, (b"x-request-id", self.request_id.encode())],
                NOTE: self.note,
            }
            await self._pass_on(application, inner)
        finally:
            if needed != requests.OPEN or "reason" in self.note:
                self._write(path)

    async def _let_in(self, headers: requests.Headers, needed: str) -> Any:
        policy = self.policy
        requests.check_path(self.scope.get("raw_path") or self.scope["path"].encode())
        requests.check_headers(headers, max_body_bytes=policy.max_body_bytes)
        # What asks after health calls a container by its address, and learns nothing else.
        requests.check_site(headers, any_host=policy.any_host or needed == requests.OPEN)
        credential = requests.credential(headers)
        if policy.verify_token is not None and credential.count(".") == 2:
            # It may have to ask the issuer for new keys.
            return await asyncio.to_thread(admit, policy, credential, needed)
        return admit(policy, credential, needed)

    async def _pass_on(self, application: Application, scope: Scope) -> None:
        try:
            await application(scope, self._receive_checked, self._send_noted)
        except Exception:
            # Of a request that was cut off nobody waits for an answer.
            if not self.cut:
                self.note.setdefault("error", True)
                raise

    async def _receive_checked(self) -> MutableMapping[str, Any]:
        if self.cut:
            return {"type": "http.disconnect"}
        left_secs = self.began + self.policy.body_secs - time.monotonic()
        if self.note.get("whole"):
            return await self.receive()
        try:
            message = await asyncio.wait_for(self.receive(), max(0.0, left_secs))
        except TimeoutError:
            return await self._cut_off(Refused("slow_body", f"{self.policy.body_secs:g} s"))
        if message["type"] == "http.request":
            self.taken_bytes += len(message.get("body", b""))
            self.note["whole"] = not message.get("more_body", False)
        if self.taken_bytes > self.policy.max_body_bytes:
            limit = f"at most {self.policy.max_body_bytes:,} bytes"
            return await self._cut_off(Refused("body_too_large", limit))
        return message

    async def _cut_off(self, refused: Refused) -> MutableMapping[str, Any]:
        self.note["reason"] = refused.reason
        if not self.status:
            await self._refuse(refused)
        self.cut = True
        return {"type": "http.disconnect"}

    async def _send_noted(self, message: MutableMapping[str, Any]) -> None:
        if self.cut:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send(message)

    async def _refuse(self, refused: Refused) -> None:
        body = json.dumps({"error": refused.text, "reason": refused.reason}).encode()
        headers = {
            **refused.headers(),
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": self.request_id,
            # What was not read of the body must not be taken for the next request.
            "connection": "close",
        }
        self.status = refused.status
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})

    def _write(self, path: str) -> None:
        reason = self.note.get("reason", "")
        if reason:
            self.policy.count_refused(reason, "http")
        client = self.scope.get("client") or ("", 0)
        failed = self.status >= 400 or self.note.get("error")
        result = "refused" if reason else "failed" if failed else "allowed"
        self.policy.write(
            {
                "request_id": self.request_id,
                "who": self.note.get("who", ""),
                "role": self.note.get("role", ""),
                "client": client[0],
                "protocol": "http",
                "action": f"{self.scope['method']} {path}",
                "model": requests.model_of(path),
                "result": result,
                "reason": reason,
                "status": self.status or 500,
                "milliseconds": round((time.monotonic() - self.began) * 1000, 1),
            }
        )
