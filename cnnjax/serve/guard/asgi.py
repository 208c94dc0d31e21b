"""The guard around an HTTP application: an ASGI application that passes on what may pass."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from cnnjax.serve.guard import requests
from cnnjax.serve.guard.audit import event
from cnnjax.serve.guard.policy import Policy, admit
from cnnjax.serve.guard.refusal import Refused
from cnnjax.serve.http.asgi import App, Scope


def guard(policy: Policy) -> Callable[[App], App]:
    """Returns middleware that lets in what the policy allows, for `cnnjax.serve.web.application`.

    Path and headers are checked first, then key, role and rate, all before a byte of the body is
    read. All but allowed questions after health is written to the audit log, with what the
    application refused of its own, and each refusal is counted.
    """

    def around(application: App) -> App:
        async def asgi(scope: Scope, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                await _Exchange(policy, scope, receive, send).run(application)
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await application(scope, receive, send)

        return asgi

    return around


@dataclasses.dataclass
class _Exchange:
    """One request and its answer."""

    policy: Policy
    scope: Scope
    receive: Any
    send: Any
    status: int = 0
    who: str = ""
    role: str = ""
    began: float = dataclasses.field(default_factory=time.monotonic)

    async def run(self, application: App) -> None:
        state = self.scope.setdefault("state", {})
        if "request_id" not in state:
            state["request_id"] = requests.request_id(self.scope["headers"])
        self.request_id = state["request_id"]
        needed = requests.needed_role(self.scope["method"], self.scope["path"])
        try:
            identity = await self._let_in(needed)
            self.who, self.role = identity.name, identity.role
            await application(self.scope, self.receive, self._send_noted)
        except Refused as refused:
            state["refused"], self.who = refused.reason, refused.who
            self.policy.count_refused(refused.reason)
            await self._refuse(refused)
        finally:
            if needed != requests.OPEN or "refused" in state:
                self._write(state.get("refused", ""))

    async def _let_in(self, needed: str) -> Any:
        policy, headers = self.policy, self.scope["headers"]
        requests.check_path(self.scope.get("raw_path") or self.scope["path"].encode())
        requests.check_headers(headers)
        # What asks after health calls a container by its address, and learns nothing else.
        requests.check_site(headers, any_host=policy.any_host or needed == requests.OPEN)
        credential = requests.credential(headers)
        if policy.verify_token is not None and credential.count(".") == 2:
            # It may have to ask the issuer for new keys.
            return await asyncio.to_thread(admit, policy, credential, needed)
        return admit(policy, credential, needed)

    async def _send_noted(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self.send(message)

    async def _refuse(self, refused: Refused) -> None:
        body = json.dumps({"error": refused.text, "reason": refused.reason}).encode()
        headers = {
            **refused.headers(),
            "content-type": "application/json",
            "content-length": str(len(body)),
            # What was not read of the body must not be taken for the next request.
            "connection": "close",
        }
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        start = {"type": "http.response.start", "status": refused.status, "headers": pairs}
        await self._send_noted(start)
        await self.send({"type": "http.response.body", "body": body})

    def _write(self, reason: str) -> None:
        self.policy.write(
            event(
                "http",
                request_id=self.request_id,
                client=(self.scope.get("client") or ("", 0))[0],
                status=self.status,
                reason=reason,
                # Nothing was sent: the client has gone, or the application failed.
                failed=not 0 < self.status < 400,
                who=self.who,
                role=self.role,
                action=f"{self.scope['method']} {self.scope['path']}",
                model=requests.model_of(self.scope["path"]),
                secs=time.monotonic() - self.began,
            )
        )
