"""
openpi's websocket protocol: the server sends its metadata, then answers each observation with actions, in order.

A failure is told in a text frame, which openpi's client raises as an error, and closes the connection. Beyond openpi,
an observation may carry `session_id` (of those, only the newest waits; an older one is answered with `{"superseded":
True}`), `unnorm_key`, `uncertainty`, and `endpoint: "reset"`, which forgets its session.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from .observations import MAX_NAME
from .service import Answer, Service, ServingError
from .wire import WireError, pack, unpack


MAX_PENDING = 4  # frames of a connection that are read ahead; the others wait with their sender
MAX_RESET_FRAME = 4096


class Connection:
    """
    One client.

    Args:
        websocket (`WebSocket`): Of the client.
        service (`Service`): What answers.
        send_timeout (`float`): In seconds, for the client to read an answer.
    """

    def __init__(self, websocket: WebSocket, service: Service, send_timeout: float):
        self._websocket, self._service, self._send_timeout = websocket, service, send_timeout
        self._pending: asyncio.Queue[asyncio.Task] = asyncio.Queue(MAX_PENDING)
        self._answering: set[asyncio.Task] = set()

    async def serve(self) -> None:
        """Until the client goes, does not read, or is refused something."""
        await self._websocket.accept()
        self._service.metrics.connections.inc()
        reader, writer = asyncio.create_task(self._read()), asyncio.create_task(self._write())
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                await writer
        except ServingError as error:
            await self._refuse(error)
        except (WebSocketDisconnect, TimeoutError):
            pass  # it has gone, or does not read
        finally:
            for task in (reader, writer, *self._answering):
                task.cancel()
            self._service.num_unsent -= len(self._answering)
            self._service.metrics.connections.dec()

    async def _read(self) -> None:
        """Begin to answer each frame that comes, until the client goes."""
        while (frame := await self._websocket.receive())["type"] != "websocket.disconnect":
            task = asyncio.create_task(self._answer(frame))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, also where none waits
            self._answering.add(task)
            self._service.num_unsent += 1
            await self._pending.put(task)

    async def _write(self) -> None:
        """Send the metadata, then the answers in the order of their frames."""
        await self._send(pack(self._service.description))
        previous_seconds = None
        while True:
            began = time.monotonic()
            task = await self._pending.get()
            reply = await task
            if "server_timing" in reply and previous_seconds is not None:
                reply["server_timing"]["prev_total_ms"] = 1000 * previous_seconds
            await self._send(pack(reply))
            self._answering.remove(task)
            self._service.num_unsent -= 1
            previous_seconds = time.monotonic() - began

    async def _answer(self, frame: Mapping[str, Any]) -> dict[str, Any]:
        data = frame.get("bytes")
        if data is None:
            raise ServingError(400, 1003, "malformed", "Observations come as binary frames of msgpack, not as text.")
        if len(data) <= MAX_RESET_FRAME and (reply := self._reset(data)) is not None:
            return reply
        try:
            return _actions(await self._service.answer("websocket", lambda: unpack(data)))
        except ServingError as error:
            if error.outcome != "superseded":
                raise
            return {"superseded": True, "server_timing": {}}

    def _reset(self, data: bytes) -> dict[str, Any] | None:
        """The reply to a frame that resets a session; nothing for another one."""
        try:
            fields = unpack(data)
        except WireError:
            return None  # refused where it is read as an observation
        if not isinstance(fields, dict) or fields.get("endpoint") != "reset":
            return None
        session_id = fields.get("session_id", "")
        if not isinstance(session_id, str) or len(session_id) > MAX_NAME:
            raise ServingError(422, 1007, "invalid", f"`session_id` must be a text of at most {MAX_NAME} characters.")
        return {"status": "reset successful", "dropped": self._service.reset(session_id)}

    async def _send(self, content: bytes) -> None:
        async with asyncio.timeout(self._send_timeout):
            await self._websocket.send_bytes(content)

    async def _refuse(self, error: ServingError) -> None:
        """Say why, and close."""
        try:
            async with asyncio.timeout(self._send_timeout):
                await self._websocket.send_text(error.message)
                await self._websocket.close(error.close_code, error.outcome)
        except (WebSocketDisconnect, TimeoutError, RuntimeError):
            pass  # it has gone in between


def _actions(answer: Answer) -> dict[str, Any]:
    prediction = answer.prediction
    reply: dict[str, Any] = {
        "actions": prediction.actions,  # (K, D)
        "policy_timing": {"infer_ms": 1000 * prediction.inference_seconds},
        "server_timing": {"infer_ms": 1000 * answer.total_seconds},
    }
    if answer.observation.uncertainty and prediction.entropy is not None:
        reply["entropy"] = prediction.entropy  # (K, D)
    return reply
