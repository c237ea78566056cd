"""
Ask a policy server for actions: `python -m serving`, a published OpenVLA server, or openpi's.

    with PolicyClient("ws://gpu-machine:8000", token=TOKEN, timeout=0.5) as policy:
        answer = policy.infer({"image": picture, "instruction": "pick up the red cube", "state": state})
        answer.actions  # float64 (K, D); `serving.broker` spends it, one action per tick

`http://` speaks the published REST protocol (`POST /act`, arrays as json_numpy writes them), `ws://` openpi's, whose
messages are smaller. A robot's computer needs numpy, httpx, websockets and msgpack, and neither torch nor
transformers.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from .wire import WireError, dump_json, load_json, pack, unpack


logger = logging.getLogger(__name__)

# Answers that mean "later", and close codes of a server that goes away or is busy.
RETRIED_STATUSES = frozenset((429, 502, 503, 504))
RETRIED_CLOSE_CODES = frozenset((1000, 1001, 1006, 1012, 1013))
MAX_ANSWER_BYTES = 16 * 2**20
CLOSE_TIMEOUT = 1.0
_JSON_HEADERS = {"Content-Type": "application/json"}


class PolicyServerError(ConnectionError):
    """
    The server has answered, and not with actions.

    Args:
        message (`str`): What it says.
        code (`int`, *optional*): HTTP status, or close code of the websocket.
    """

    def __init__(self, message: str, code: int | None = None):
        super().__init__(message if code is None else f"{message} ({code})")
        self.code = code


class _RetriedError(Exception):
    """There is no connection, or the server is busy: the observation can be sent again."""


@dataclass(frozen=True)
class Answer:
    """
    Args:
        actions (`np.ndarray`): float64 (K, D), in the units of the dataset.
        seconds (`float`): From the call until here, attempts that failed included.
        details (`dict`): What else the server says, such as `server_timing`.
    """

    actions: np.ndarray
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Backoff:
    """
    Pauses between attempts, in seconds: `first`, then `factor` times as long each, up to `longest`; each shortened by
    up to half, at random, so that robots do not come back all at once.
    """

    first: float = 0.05
    factor: float = 2.0
    longest: float = 2.0

    def pauses(self) -> Iterator[float]:
        pause = self.first
        while True:
            yield pause * random.uniform(0.5, 1.0)
            pause = min(pause * self.factor, self.longest)


# What both protocols send and read


def _check_url(url: str) -> str:
    """The address that is asked: `/act` of a REST server, the root of a websocket server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https", "ws", "wss") or not parts.hostname:
        raise ValueError(f"The server's address must begin with http://, https://, ws:// or wss://, got {url!r}.")
    path = parts.path.rstrip("/")
    if parts.scheme.startswith("http") and not path.endswith("/act"):
        path += "/act"
    return urlunsplit((parts.scheme, parts.netloc, path or "/", parts.query, ""))


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _status_url(url: str) -> str:
    """Where our server describes itself, beside `/act`."""
    return url.removesuffix("/act") + "/status"


def _read_description(response: httpx.Response) -> dict[str, Any]:
    """What a REST server says of its policy; published ones have nothing to say."""
    if response.status_code == 404:
        return {}
    content = _read_response(response)
    return content.get("policy", {}) if isinstance(content, dict) else {}


def _read_response(response: httpx.Response) -> Any:
    """What a REST server has answered."""
    if response.status_code in RETRIED_STATUSES:
        raise _RetriedError(f"{response.status_code}: {response.text[:200]}")
    if response.status_code != 200:
        raise PolicyServerError(_detail(response.content), response.status_code)
    return _decoded(load_json, response.content)


def _decoded(decode: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return decode(content)
    except WireError as error:
        raise PolicyServerError(f"The server speaks another protocol: {error}") from error


def _detail(body: bytes) -> str:
    """What the body of a refusal says."""
    try:
        detail = load_json(body)["detail"]
    except (WireError, KeyError, TypeError):
        detail = body.decode(errors="replace")
    return str(detail)[:2000]


def _read_actions(content: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Actions (K, D), and what else is in an answer."""
    details: dict[str, Any] = {}
    if isinstance(content, str):  # "error", as published servers have it, with status 200
        raise PolicyServerError(f"The server answers {content[:2000]!r}.")
    if isinstance(content, Mapping):
        details = {name: value for name, value in content.items() if name != "actions"}
        if details.get("superseded"):
            raise PolicyServerError("A newer observation of the same session has come.", 409)
        content = content.get("actions")
    try:
        actions = np.atleast_2d(np.asarray(content, dtype=np.float64))  # (D,) or (K, D) -> (K, D)
    except (TypeError, ValueError) as error:
        raise PolicyServerError(f"The server answers with something else than actions: {content!r:.200}.") from error
    if actions.ndim != 2 or not actions.size or not np.isfinite(actions).all():
        raise PolicyServerError(f"Actions must be finite numbers (K, D), the server sends shape {actions.shape}.")
    return actions, details


def _failure_of_handshake(error: Exception) -> Exception:
    """What to raise where no websocket came about."""
    if isinstance(error, InvalidStatus) and error.response.status_code not in RETRIED_STATUSES:
        message = _detail(error.response.body) if error.response.body else str(error)
        return PolicyServerError(message, error.response.status_code)
    return _RetriedError(str(error) or type(error).__name__)


def _failure_of_connection(message: str, close_code: int | None) -> Exception:
    """What to raise where the server has closed a websocket, perhaps with a text frame before, as openpi's do."""
    if close_code in RETRIED_CLOSE_CODES:
        return _RetriedError(message)
    return PolicyServerError(message[:2000], close_code)


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


# Transports: one attempt to exchange an observation for an answer


class _Rest:
    def __init__(self, url: str, token: str | None):
        self.url = url
        self._client = httpx.AsyncClient(headers=_headers(token))

    async def exchange(self, observation: Mapping[str, Any], deadline: float) -> Any:
        return _read_response(await self._send("POST", self.url, dump_json(dict(observation)), deadline))

    async def metadata(self, deadline: float) -> dict[str, Any]:
        return _read_description(await self._send("GET", _status_url(self.url), None, deadline))

    async def close(self) -> None:
        await self._client.aclose()

    async def _send(self, method: str, url: str, content: str | None, deadline: float) -> httpx.Response:
        try:
            async with asyncio.timeout(_remaining(deadline)):
                return await self._client.request(method, url, content=content, headers=_JSON_HEADERS, timeout=None)
        except httpx.TransportError as error:
            raise _RetriedError(str(error) or type(error).__name__) from error


class _Websocket:
    def __init__(self, url: str, token: str | None):
        self.url, self._token = url, token
        self._connection: ClientConnection | None = None
        self._metadata: dict[str, Any] = {}

    async def exchange(self, observation: Mapping[str, Any], deadline: float) -> Any:
        frame = pack(dict(observation))
        connection = await self._connected(deadline)
        try:
            async with asyncio.timeout(_remaining(deadline)):
                await connection.send(frame)
                answer = await connection.recv()
            if isinstance(answer, str):
                raise _failure_of_connection(answer, await self._close_code(connection, deadline))
            return _decoded(unpack, answer)
        except BaseException as error:
            # An answer that comes after all would be taken for that to the next observation. Nor is there time to
            # close with a server that may not read.
            self._connection = None
            connection.transport.abort()
            if isinstance(error, ConnectionClosed):
                raise _failure_of_connection(str(error), connection.close_code) from error
            raise

    async def metadata(self, deadline: float) -> dict[str, Any]:
        await self._connected(deadline)
        return self._metadata

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connected(self, deadline: float) -> ClientConnection:
        if self._connection is not None:
            return self._connection
        try:
            connection = await connect(
                self.url,
                additional_headers=_headers(self._token),
                compression=None,
                max_size=MAX_ANSWER_BYTES,
                open_timeout=_remaining(deadline),
                close_timeout=CLOSE_TIMEOUT,
            )
        except TimeoutError:
            raise
        except (OSError, InvalidHandshake) as error:
            raise _failure_of_handshake(error) from error
        try:
            async with asyncio.timeout(_remaining(deadline)):
                first = await connection.recv()
            if isinstance(first, str):
                raise _failure_of_connection(first, await self._close_code(connection, deadline))
            self._connection, self._metadata = connection, _decoded(unpack, first)
        except ConnectionClosed as error:
            raise _failure_of_connection(str(error), connection.close_code) from error
        finally:
            if self._connection is None:
                connection.transport.abort()
        return connection

    @staticmethod
    async def _close_code(connection: ClientConnection, deadline: float) -> int | None:
        """With which the server closes, as it does behind a text frame."""
        try:
            async with asyncio.timeout(min(CLOSE_TIMEOUT, deadline - time.monotonic())):
                await connection.recv()
        except ConnectionClosed:
            return connection.close_code
        except TimeoutError:
            pass
        return None


# Clients


class AsyncPolicyClient:
    """
    A policy behind a server, for programs on asyncio. Calls at the same time wait for each other.

    Args:
        url (`str`): `http://` and `https://`: REST, the path `/act` is added; `ws://` and `wss://`: openpi's protocol.
        token (`str`, *optional*): Sent as `Authorization: Bearer`.
        timeout (`float`, defaults to 10.0): In seconds, for an answer, with all attempts at a connection.
        backoff (`Backoff`, *optional*): Pauses between attempts where there is no connection, or the server is busy.
        fields: Sent with every observation, such as `unnorm_key`, or the `session_id` of this robot.

    Raises:
        ValueError: If the address is none.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 10.0,
        backoff: Backoff | None = None,
        **fields: Any,
    ):
        self.url, self.timeout, self.backoff, self.fields = _check_url(url), timeout, backoff or Backoff(), fields
        self._transport = (_Rest if self.url.startswith("http") else _Websocket)(self.url, token)
        self._lock = asyncio.Lock()

    async def infer(self, observation: Mapping[str, Any]) -> Answer:
        """
        Actions for an observation.

        Args:
            observation (`Mapping`): As the server takes it: the picture as `image`, uint8 (H, W, 3), those of further
                cameras under names with `wrist`, `instruction`, and where the policy takes it `state`, (P,).

        Raises:
            TimeoutError: If there is no answer in time.
            PolicyServerError: If the server refuses, or fails.
        """
        began = time.monotonic()
        fields = {**self.fields, **observation}
        async with self._lock:
            content = await self._attempt(lambda deadline: self._transport.exchange(fields, deadline), began)
        actions, details = _read_actions(content)
        return Answer(actions, time.monotonic() - began, details)

    async def metadata(self) -> dict[str, Any]:
        """What our server says of its policy; another one says what it will, and a published REST server nothing."""
        async with self._lock:
            return await self._attempt(self._transport.metadata, time.monotonic())

    async def close(self) -> None:
        async with self._lock:
            await self._transport.close()

    async def __aenter__(self) -> "AsyncPolicyClient":
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.close()

    async def _attempt(self, exchange: Callable[[float], Awaitable[Any]], began: float) -> Any:
        deadline, reason = began + self.timeout, ""
        for pause in self.backoff.pauses():
            try:
                return await exchange(deadline)
            except _RetriedError as error:
                reason = str(error)
            except TimeoutError:
                break
            if time.monotonic() + pause >= deadline:
                break
            logger.info("%s: %s; another attempt in %.2f s", self.url, reason, pause)
            await asyncio.sleep(pause)
        raise TimeoutError(_too_late(self.url, self.timeout, reason))


class PolicyClient:
    """
    An [`AsyncPolicyClient`] for programs without asyncio, in a thread of its own: whatever the server or the network
    does, no call outlasts its timeout. Threads that share it wait for each other.

    Args:
        url (`str`), token (`str`, *optional*), timeout (`float`), backoff (`Backoff`, *optional*), fields: See
            [`AsyncPolicyClient`].

    Raises:
        ValueError: If the address is none.
    """

    def __init__(self, url: str, **arguments: Any):
        self._client = AsyncPolicyClient(url, **arguments)
        self.url = self._client.url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="policy client", daemon=True)
        self._thread.start()

    def infer(self, observation: Mapping[str, Any]) -> Answer:
        """See [`AsyncPolicyClient.infer`]."""
        return self._run(self._client.infer(observation))

    def metadata(self) -> dict[str, Any]:
        """See [`AsyncPolicyClient.metadata`]."""
        return self._run(self._client.metadata())

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:  # such as an interrupt: nobody waits for the answer any more
            future.cancel()
            raise


def _too_late(url: str, timeout: float, reason: str) -> str:
    said = f"; the last attempt: {reason}" if reason else ""
    return f"{url} has not answered within {timeout:g} s{said}."
