"""Who may ask, and how much at once: tokens, hosts and origins, and limits on bodies."""

import asyncio
import base64
import binascii
import hmac
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import ServingError


PUBLIC_PATHS = ("/healthz", "/readyz")
# Of a body that is too large, so many bytes are read and thrown away: a client that is still writing would never read
# the answer otherwise.
MAX_DISCARDED = 256 * 2**20
MAX_BODIES = 32  # of the largest size, in memory at once; of smaller ones more
MAX_WEBSOCKETS = 256  # each holds up to a frame that has not come as a whole


class Guard:
    """
    ASGI middleware in front of everything.

    Without a token, requests must name a host of `hosts`: a page that has its own name resolve to this machine (DNS
    rebinding) names another. Requests of pages of other origins are refused in any case.

    Args:
        app: What is guarded.
        token (`str`, *optional*): Must come with every request but those of `PUBLIC_PATHS`: as `Authorization: Bearer
            TOKEN`, as `Api-Key TOKEN` as openpi's clients send it, or as the password of any user, which browsers ask
            for.
        hosts (`Collection[str]`): Names by which the server may be asked for where there is no token.
        max_body (`int`): Bytes of a body; of all that are in work at once, `MAX_BODIES` times as many.
        body_timeout (`float`): In seconds, for a body to arrive.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: Collection[str], max_body: int, body_timeout: float):
        self.app, self.token, self.hosts = app, token, frozenset(hosts)
        self.max_body, self.body_timeout = max_body, body_timeout
        self.held = 0  # bytes of bodies, from their arrival until their answer
        self._num_websockets = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if refusal := self._refuse(scope["path"], Headers(scope=scope)):
            status, message = refusal
            headers = {"WWW-Authenticate": 'Basic realm="openvla"'} if status == 401 else {}
            await JSONResponse({"detail": message}, status, headers)(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
            return
        body = _Body(receive, self)
        try:
            await self.app(scope, body, send)
        finally:
            body.release()

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._num_websockets >= MAX_WEBSOCKETS:
            await JSONResponse({"detail": "Too many websockets are open."}, 429)(scope, receive, send)
            return
        self._num_websockets += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._num_websockets -= 1

    def _refuse(self, path: str, headers: Headers) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return 403, "Pages of other origins may not use this server."
        if path in PUBLIC_PATHS:
            return None
        if self.token is not None:
            given = _given_token(headers.get("authorization", ""))
            is_right = hmac.compare_digest(given.encode(), self.token.encode())
            return None if is_right else (401, "The token is missing or wrong; send `Authorization: Bearer TOKEN`.")
        if _host_name(host) not in self.hosts:
            return 403, f"Without a token, the server is to be asked for as one of {sorted(self.hosts)}."
        return None


class _Body:
    """The `receive` of a request, which counts its body."""

    def __init__(self, receive: Receive, guard: Guard):
        self._receive, self._guard = receive, guard
        self._deadline: float | None = None
        self.held, self._is_complete = 0, False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()  # that the client has gone
        message = await self._next()
        guard, size = self._guard, len(message.get("body", b""))
        self.held += size
        guard.held += size
        if self.held > guard.max_body:
            await self._discard(message)
            raise ServingError(413, 1009, "too_large", f"The body has more than {guard.max_body} bytes.")
        if guard.held > MAX_BODIES * guard.max_body:
            self._is_complete = True
            self.release()  # at once, so that others are not refused for the same bytes
            raise ServingError(429, 1013, "busy", "Too many bodies are in work; come back later.")
        return message

    def release(self) -> None:
        """Count this body no longer."""
        self._guard.held -= self.held
        self.held = 0

    async def _discard(self, message: Message) -> None:
        """The rest of a body that is refused."""
        size = 0
        while message.get("more_body", False) and size <= MAX_DISCARDED:
            message = await self._next()
            size += len(message.get("body", b""))
        self._is_complete = True

    async def _next(self) -> Message:
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._guard.body_timeout
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            self._is_complete = True
            text = f"The body did not arrive within {self._guard.body_timeout:g} s."
            raise ServingError(408, 1008, "slow", text) from error
        self._is_complete = not message.get("more_body", False)
        return message


def _given_token(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() in ("bearer", "api-key"):
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value).decode().partition(":")[2]
    except (ValueError, binascii.Error):
        return ""


def _host_name(host: str) -> str:
    """Of a `Host` header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def loopback_hosts(host: str) -> list[str]:
    """Names of this machine for those who are on it, and the name that it is bound to."""
    return ["localhost", "127.0.0.1", "::1", host.lower().strip("[]")]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
