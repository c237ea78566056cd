"""Policy servers on loopback for tests, which stop with the test that started them."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from serving.app import Settings
from serving.engine import Prediction, Row
from serving.observations import Observation
from serving.server import Server, make_server
from serving.service import Service


@dataclass(frozen=True)
class Running:
    """A server and where it listens."""

    service: Service
    server: Server
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"


@contextmanager
def running(policy, settings: Settings | None = None, **options) -> Iterator[Running]:
    """Serve a policy on a free port, in a thread; `options` are those of [`Service`]."""
    service = Service(policy, **options)
    server = make_server(service, settings or Settings(), port=0)
    started = threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(_serve(server, started),), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield Running(service, server, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


async def _serve(server: Server, started: threading.Event) -> None:
    async def tell() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        started.set()

    telling = asyncio.create_task(tell())
    await server.serve()
    await telling


class StubPolicy:
    """
    Answers the instruction "go N" with N, once `gate` is open; keeps the numbers of each batch. Of a dataset named
    `wide` the actions have 8 numbers, in place of 7. The instruction "fail" fails.
    """

    name = "stub"

    def __init__(self, seconds: float = 0.0):
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.seconds, self.batches = seconds, []

    def describe(self) -> dict:
        return {
            **{"policy": self.name, "head_type": "tokens", "chunk_size": 1, "num_images": 1, "image_size": 32},
            **{"use_proprio": False, "action_dims": {"narrow": 7, "wide": 8}, "n_action_bins": 256},
            **{"dtype": "float32", "device": "cpu"},
        }

    def prepare(self, observation: Observation) -> Row:
        key = observation.unnorm_key or "narrow"
        return Row({}, observation.instruction, key, 8 if key == "wide" else 7)

    def predict(self, rows: list[Row]) -> list[Prediction]:
        self.entered.set()
        assert self.gate.wait(20)
        time.sleep(self.seconds)
        self.batches.append([row.instruction for row in rows])
        if any(row.instruction == "fail" for row in rows):
            raise FloatingPointError("The logits are not finite: /a/secret/path")
        return [Prediction(np.full((1, row.action_dim), _number(row.instruction))) for row in rows]


def _number(instruction: str) -> float:
    """Its last word, or 0 where this is no number."""
    word = instruction.split()[-1]
    return float(word) if word.isascii() and word.isdecimal() else 0.0


PICTURE = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)


def observation(number: int = 0, **fields) -> dict:
    """What a client of the published server sends; the stub answers with the number."""
    return {"image": PICTURE, "instruction": f"go {number}", **fields}
