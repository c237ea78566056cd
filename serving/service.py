"""From a message to an answer: admission, preparation beside the event loop, the queue, deadlines."""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from .engine import Batcher, Policy, Prediction, Row, SupersededError
from .metrics import Metrics
from .observations import Observation, ObservationError, read_observation
from .wire import WireError


logger = logging.getLogger(__name__)


class ServingError(Exception):
    """
    Why there is no action.

    Args:
        status (`int`): HTTP status.
        close_code (`int`): With which a websocket is closed (https://www.iana.org/assignments/websocket).
        outcome (`str`): What the metrics call it.
        message (`str`): For the client.
    """

    def __init__(self, status: int, close_code: int, outcome: str, message: str):
        super().__init__(message)
        self.status, self.close_code, self.outcome, self.message = status, close_code, outcome, message


@dataclass(frozen=True)
class Answer:
    """A prediction, with what it answers and the seconds that were spent on it."""

    prediction: Prediction
    observation: Observation
    prepare_seconds: float
    total_seconds: float

    def timing(self) -> dict[str, float]:
        """Milliseconds by stage."""
        prediction = self.prediction
        seconds = (self.prepare_seconds, prediction.queue_seconds, prediction.inference_seconds, self.total_seconds)
        return dict(zip(("prepare", "queue", "inference", "total"), (1000 * each for each in seconds), strict=True))


class Service:
    """
    A policy that answers many clients.

    Args:
        policy (`Policy`): What predicts.
        max_batch_size, batch_wait: See [`Batcher`].
        max_open (`int`): Observations that may be taken and not answered yet; further ones are refused.
        timeout (`float`): In seconds, for one answer, waiting included.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_batch_size: int = 8,
        batch_wait: float = 0.01,
        max_open: int = 64,
        timeout: float = 30.0,
    ):
        self.policy, self.max_open, self.timeout = policy, max_open, timeout
        self.num_open = 0  # observations that are taken and not answered
        self.num_unsent = 0  # frames of websockets whose answers are not sent
        self.is_draining = False
        self.metrics = Metrics(lambda: self.batcher.num_waiting, lambda: self.num_open)
        self.batcher = Batcher(policy.predict, max_batch_size, batch_wait, self.metrics.batch)
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="prepare")
        self._orders = itertools.count()
        self.description = policy.describe()

    @property
    def is_ready(self) -> bool:
        """Whether observations are answered at present."""
        return not self.is_draining and self.batcher.is_healthy

    async def answer(self, protocol: str, read: Callable[[], Any]) -> Answer:
        """
        Args:
            protocol (`str`): What the metrics call it.
            read (`Callable`): The fields of the message; run beside the event loop.

        Raises:
            ServingError: If there is no answer.
        """
        try:
            async with self._admitted():
                answer = await self._answer(read)
        except ServingError as error:
            self.metrics.count(protocol, error.outcome)
            raise
        except asyncio.CancelledError:
            self.metrics.count(protocol, "gone")
            raise
        self.metrics.count(protocol, "ok")
        seconds = {stage: milliseconds / 1000 for stage, milliseconds in answer.timing().items()}
        self.metrics.answered(answer.prediction.batch_size, **seconds)
        return answer

    async def warm_up(self, batch_sizes: Sequence[int] = ()) -> None:
        """
        One prediction on a gray picture, however long it takes: it finds what is broken before a robot does.

        Args:
            batch_sizes (`Sequence[int]`, *optional*): Batches that the model's own `warm_up` prepares before; nobody
                may be served yet.
        """
        if batch_sizes:
            self.policy.model.warm_up(batch_sizes)
        side, statistics = self.description["image_size"], self.policy.model.norm_stats
        key = next(iter(statistics))
        picture = np.full((side, side, 3), 127, np.uint8)
        fields = {"image": picture, "instruction": "wait", "unnorm_key": key}
        fields |= {f"wrist_{index}": picture for index in range(1, self.description["num_images"])}
        if self.description["use_proprio"]:
            fields["state"] = statistics[key]["proprio"]["mean"]
        await self._answer(lambda: fields)

    def reset(self, session_id: str) -> int:
        """See [`Batcher.reset`]."""
        return self.batcher.reset(session_id, next(self._orders))

    async def drain(self, timeout: float) -> None:
        """Take nothing more, and wait for what is open to be answered."""
        self.is_draining = True
        deadline = time.monotonic() + timeout
        while (self.num_open or self.num_unsent) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def close(self) -> None:
        """Stop the threads, once what they do is done."""
        self.is_draining = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.batcher.close(timeout=self.timeout)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        if self.is_draining:
            raise ServingError(503, 1012, "draining", "The server is shutting down; ask another one.")
        if self.num_open >= self.max_open:
            raise ServingError(429, 1013, "busy", f"{self.num_open} observations are waiting; come back later.")
        self.num_open += 1
        try:
            async with asyncio.timeout(self.timeout):
                yield
        except TimeoutError as error:
            raise ServingError(504, 1013, "timeout", f"There was no answer within {self.timeout:g} s.") from error
        finally:
            self.num_open -= 1

    async def _answer(self, read: Callable[[], Any]) -> Answer:
        began, order = time.monotonic(), next(self._orders)
        try:
            loop = asyncio.get_running_loop()
            observation, row = await loop.run_in_executor(self._pool, self._prepare, read)
            prepared = time.monotonic()
            prediction = await asyncio.wrap_future(self.batcher.submit(row, observation.session_id, order))
        except WireError as error:
            raise ServingError(400, 1007, "malformed", str(error)) from error
        except ObservationError as error:
            raise ServingError(422, 1007, "invalid", str(error)) from error
        except SupersededError as error:
            raise ServingError(409, 1000, "superseded", str(error)) from error
        except Exception as error:
            logger.exception("An observation was not answered.")
            raise ServingError(500, 1011, "failed", "The policy failed; the server's log says how.") from error
        return Answer(prediction, observation, prepared - began, time.monotonic() - began)

    def _prepare(self, read: Callable[[], Any]) -> tuple[Observation, Row]:
        observation = read_observation(read(), self.description["num_images"], self.description["use_proprio"])
        return observation, self.policy.prepare(observation)
