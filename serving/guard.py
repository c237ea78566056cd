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
        max_body (`int`): Bytes of a body.
        body_timeout (`float`): In seconds, for a body to arrive.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: Collection[str], max_body: int, body_timeout: float):
        self.app, self.token, self.hosts = app, token, frozenset(hosts)
        self.max_body, self.body_timeout = max_body, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if refusal := self._refuse(scope["path"], Headers(scope=scope)):
            status, message = refusal
            headers = {"WWW-Authenticate": 'Basic realm="openvla"'} if status == 401 else {}
            await JSONResponse({"detail": message}, status, headers)(scope, receive, send)
            return
        limited = _Body(receive, self.max_body, self.body_timeout) if scope["type"] == "http" else receive
        await self.app(scope, limited, send)

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

    def __init__(self, receive: Receive, limit: int, timeout: float):
        self._receive, self._limit, self._timeout = receive, limit, timeout
        self._deadline: float | None = None
        self._size, self._is_complete = 0, False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()  # that the client has gone
        message = await self._next()
        if self._size > self._limit:
            while message.get("more_body", False) and self._size <= self._limit + MAX_DISCARDED:
                message = await self._next()
            self._is_complete = True
            raise ServingError(413, 1009, "too_large", f"The body has more than {self._limit} bytes.")
        return message

    async def _next(self) -> Message:
        loop = asyncio.get_running_loop()
        self._deadline = self._deadline or loop.time() + self._timeout
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError as error:
            self._is_complete = True
            raise ServingError(408, 1008, "slow", f"The body did not arrive within {self._timeout:g} s.") from error
        self._size += len(message.get("body", b""))
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
