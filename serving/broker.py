"""How a control loop spends the chunks of a policy server: one action per tick, perhaps asking ahead."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.chunks import ChunkQueue, TemporalEnsemble

from .client import Answer


logger = logging.getLogger(__name__)


class LatencyMonitor:
    """
    How long answers take beside the period of a control loop.

    Args:
        period (`float`): In seconds, between two actions.
        window (`int`, defaults to 1000): Answers that are looked at, the last ones.
    """

    def __init__(self, period: float, window: int = 1000):
        if not period > 0:
            raise ValueError(f"The control period must be above 0 seconds, got {period}.")
        self.period = period
        self._seconds: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def summary(self) -> dict[str, float]:
        """
        `answers`, their `p50_ms`, `p99_ms` and `max_ms`, the share `within_period`, and `actions_per_answer`: how many
        actions a chunk must last for, so that the next one arrives in time 99 times of 100.
        """
        if not self._seconds:
            return {"answers": 0}
        seconds = np.array(self._seconds)
        slow = float(np.percentile(seconds, 99))
        return {
            "answers": len(seconds),
            "p50_ms": 1e3 * float(np.median(seconds)),
            "p99_ms": 1e3 * slow,
            "max_ms": 1e3 * float(seconds.max()),
            "within_period": float(np.mean(seconds <= self.period)),
            "actions_per_answer": int(np.ceil(slow / self.period)),
        }


class ChunkBroker:
    """
    One action per tick out of the chunks of a policy, which is asked where the queue needs a chunk.

    Args:
        infer (`Callable`): [`PolicyClient.infer`].
        make_queue (`Callable`, *optional*): Makes the queue of an episode: [`ChunkQueue`] (open loop, the default) or
            [`TemporalEnsemble`], which needs a chunk at every tick.
        monitor (`LatencyMonitor`, *optional*): Told of every answer.
    """

    def __init__(
        self,
        infer: Callable[[Mapping[str, Any]], Answer],
        make_queue: Callable[[], ChunkQueue | TemporalEnsemble] = ChunkQueue,
        monitor: LatencyMonitor | None = None,
    ):
        self._infer, self._make_queue, self._monitor = infer, make_queue, monitor
        self.reset()

    @property
    def age(self) -> float:
        """Seconds since the observation was given that the last action follows from."""
        return time.monotonic() - self._observed

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The action (D,) of this tick. Raises what `infer` raises."""
        if self._queue.needs_chunk:
            observed = time.monotonic()
            answer = self._infer(observation)
            if self._monitor is not None:
                self._monitor.add(answer.seconds)
            self._queue.add(answer.actions)
            self._observed = observed
        return self._queue.next_action()

    def reset(self) -> None:
        """Begin an episode: what is left of the last one's chunks is not acted on."""
        self._queue, self._observed = self._make_queue(), time.monotonic()

    def close(self) -> None:
        """Nothing runs beside the calls."""


@dataclass(frozen=True)
class _Request:
    """An observation on its way."""

    answer: Future
    observed: float
    tick: int


class PrefetchingBroker:
    """
    One action per tick, and the next chunk asked for in the background while the robot acts on the current one.

    A chunk begins at the tick of its observation: of one that arrives n ticks later the first n actions are passed
    over, and the others take the place of what is left of the current chunk.

    Args:
        infer (`Callable`): [`PolicyClient.infer`]; called in one thread of this object.
        prefetch_below (`int`): A chunk is asked for when so many actions are left, or fewer.
        num_actions (`int`, *optional*): Actions to take of a chunk at most, from its start; all by default.
        monitor (`LatencyMonitor`, *optional*): Told of every answer.

    Raises:
        ValueError: If `prefetch_below` is negative, or `num_actions` is not above it.
    """

    def __init__(
        self,
        infer: Callable[[Mapping[str, Any]], Answer],
        prefetch_below: int,
        num_actions: int | None = None,
        monitor: LatencyMonitor | None = None,
    ):
        if prefetch_below < 0 or (num_actions is not None and num_actions <= prefetch_below):
            raise ValueError(
                f"A chunk is asked for at {prefetch_below} remaining actions (`prefetch_below`), of {num_actions} "
                "(`num_actions`): expected 0 or more, and fewer than there are."
            )
        self._infer, self._monitor = infer, monitor
        self._prefetch_below, self._num_actions = prefetch_below, num_actions
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._request: _Request | None = None
        self.reset()

    @property
    def age(self) -> float:
        """Seconds since the observation was given that the last action follows from."""
        return time.monotonic() - self._observed

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """
        The action (D,) of this tick. It waits for the server where no action is left, which `stalls` counts, but for
        the first chunk.

        Raises what `infer` raises; where actions are left, not before they are spent.
        """
        if self._request is not None and self._request.answer.done():
            self._take()
        if self._request is None and self._queue.num_left <= self._prefetch_below:
            self._ask(observation)
        if self._queue.needs_chunk:
            self.stalls += self._tick > 0 and not self._request.answer.done()
            self._wait(observation)
        self._tick += 1
        return self._queue.next_action()

    def reset(self) -> None:
        """Begin an episode: what is left of the last one's chunks, or still on its way, is not acted on."""
        if self._request is not None:
            self._request.answer.cancel()
        self._request = None
        self._queue, self._observed = ChunkQueue(), time.monotonic()
        self._tick = self.stalls = 0

    def close(self) -> None:
        """End the thread, once an answer that is on its way is there."""
        self._thread.shutdown(cancel_futures=True)

    def _ask(self, observation: Mapping[str, Any]) -> None:
        # A copy, since a robot may write its next observation into the same dictionary.
        answer = self._thread.submit(self._infer, dict(observation))
        self._request = _Request(answer, time.monotonic(), self._tick)

    def _wait(self, observation: Mapping[str, Any]) -> None:
        """Until there is an action for this tick."""
        self._take()
        if self._queue.needs_chunk:  # the chunk ended before it arrived
            self._ask(observation)
            self._take()

    def _take(self) -> None:
        """Put the chunk that was asked for in the place of the current one, from this tick on."""
        request, self._request = self._request, None
        try:
            answer = request.answer.result()
        except Exception:
            if self._queue.needs_chunk:
                raise
            logger.warning("The policy was asked in vain, and will be asked again.", exc_info=True)
            return
        if self._monitor is not None:
            self._monitor.add(answer.seconds)
        chunk = answer.actions[: self._num_actions][self._tick - request.tick :]
        if len(chunk):
            self._queue.add(chunk)
            self._observed = request.observed
