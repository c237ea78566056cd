"""The process around the application: uvicorn, which here finishes what runs before it closes."""

import asyncio
import logging
import socket

import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from .app import Settings, create_app
from .service import Service


logger = logging.getLogger(__name__)

CLOSE_SECONDS = 10.0  # for a websocket's client to read what was sent before its connection was closed


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's, which by itself keeps a closed connection for as long as its client reads nothing."""

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self.loop.call_later(CLOSE_SECONDS, self.transport.abort)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.loop.call_later(CLOSE_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """
    A server that answers what it has taken before it closes connections, websockets among them.

    Args:
        service (`Service`): What it serves.
        config (`uvicorn.Config`): How.
    """

    def __init__(self, service: Service, config: uvicorn.Config):
        super().__init__(config)
        self.service = service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            for server in self.servers:
                for each in server.sockets:
                    logger.info("Serving %s on %s", self.service.policy.name, each.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self.service.drain(self.service.timeout))
        while not draining.done() and not self.force_exit:  # a second interrupt
            await asyncio.wait({draining}, timeout=0.1)
        draining.cancel()
        await super().shutdown(sockets)


def make_server(service: Service, settings: Settings, port: int) -> Server:
    """A server of one process; `serve()` runs it until `should_exit`."""
    config = uvicorn.Config(
        create_app(service, settings),
        host=settings.host,
        port=port,
        http="h11",
        loop="asyncio",
        ws=WebSocketProtocol,
        ws_max_size=settings.max_body,
        ws_per_message_deflate=False,
        access_log=False,
        server_header=False,
        log_config=None,
        timeout_graceful_shutdown=int(service.timeout) + 1,
    )
    return Server(service, config)
