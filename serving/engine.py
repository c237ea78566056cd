"""The policy, its inference thread, and the batches that observations of several robots share."""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature

from .observations import Observation, ObservationError


logger = logging.getLogger(__name__)

MAX_PROMPT_TOKENS = 512
REMEMBERED_SESSIONS = 4096
FAILURES_UNTIL_UNHEALTHY = 3  # in a row: a broken device fails every time


class SupersededError(Exception):
    """A newer observation of the same session has come, or the session was reset."""


@dataclass(frozen=True)
class Row:
    """
    One observation, ready for the model.

    Args:
        inputs (`BatchFeature`): Of this row alone, as the processor makes them.
        instruction, unnorm_key (`str`): As they were checked; the key is resolved.
        action_dim (`int`): Rows of one batch have the same.
    """

    inputs: BatchFeature
    instruction: str
    unnorm_key: str
    action_dim: int


@dataclass(frozen=True)
class Prediction:
    """
    Args:
        actions (`np.ndarray`): float64 (K, D), in the units of the dataset.
        entropy (`np.ndarray`, *optional*): float32 (K, D), in nats, where a token stands for each number.
        queue_seconds, inference_seconds (`float`): How long the row waited, and its batch took.
        batch_size (`int`): Rows of its batch.
    """

    actions: np.ndarray
    entropy: np.ndarray | None = None
    queue_seconds: float = 0.0
    inference_seconds: float = 0.0
    batch_size: int = 1


class Policy:
    """
    A model with its processor, split into what each observation needs for itself and what a batch shares.

    Args:
        model: With `predict_action`, as `load_policy` loads it.
        processor: The one that belongs to it.
        name (`str`): What to call it.
    """

    def __init__(self, model: Any, processor: Any, name: str):
        self.model, self.processor, self.name = model, processor, name
        # A fast tokenizer keeps its options in itself: two threads at once make it fail.
        self._tokenizer_lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """What a client may want to know, in plain types."""
        config, statistics = self.model.config, self.model.norm_stats
        states = {key: each for key, each in statistics.items() if self.processor.use_proprio and "proprio" in each}
        return {
            "policy": self.name,
            "head_type": config.head_type,
            "chunk_size": config.chunk_size,
            "num_images": self.processor.num_images,
            "image_size": int(self.processor.image_processor.input_sizes[0][-1]),
            "use_proprio": bool(self.processor.use_proprio),
            "action_dims": {key: int(self.model.get_action_dim(key)) for key in sorted(statistics)},
            "state_dims": {key: len(each["proprio"]["mean"]) for key, each in states.items()},
            "n_action_bins": config.n_action_bins,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }

    def prepare(self, observation: Observation) -> Row:
        """
        Raises:
            ObservationError: On whatever the processor does not take, so that no batch fails for one of its rows.
        """
        try:
            key = self._resolve(observation.unnorm_key)
            state = {} if observation.state is None else {"state": observation.state, "unnorm_key": key}
            with self._tokenizer_lock:
                inputs = self.processor(instruction=observation.instruction, **state)
            if inputs["input_ids"].shape[1] > MAX_PROMPT_TOKENS:
                raise ObservationError(f"The instruction has more than {MAX_PROMPT_TOKENS} tokens.")
            pixels = self.processor.image_processor(list(observation.images), return_tensors="pt")["pixel_values"]
            # (images, towers * 3, S, S) -> (1, images * towers * 3, S, S)
            inputs["pixel_values"] = pixels.reshape(1, -1, *pixels.shape[2:])
            return Row(inputs, observation.instruction, key, self.model.get_action_dim(key))
        except ValueError as error:
            raise ObservationError(str(error)) from error

    def predict(self, rows: Sequence[Row]) -> list[Prediction]:
        """Actions of rows with one action dimension."""
        inputs = rows[0].inputs if len(rows) == 1 else self._collate(rows)
        output = self.model.predict_action(
            **inputs.to(self.model.device, dtype=self.model.dtype),
            unnorm_key=[row.unnorm_key for row in rows],
            return_dict=True,
        )
        shape = (len(rows), self.model.config.chunk_size, rows[0].action_dim)
        actions = output.actions.reshape(shape)  # (D,), (B, D), (K, D) or (B, K, D) -> (B, K, D)
        entropy = self._entropy(output, shape)
        return [Prediction(row, sure) for row, sure in zip(actions, entropy, strict=True)]

    def _resolve(self, unnorm_key: str | None) -> str:
        self.model.get_action_stats(unnorm_key)  # raises where there is no such dataset, or several to choose from
        return next(iter(self.model.norm_stats)) if unnorm_key is None else unnorm_key

    def _collate(self, rows: Sequence[Row]) -> BatchFeature:
        """The rows' inputs as one, their prompts padded by the processor."""
        with self._tokenizer_lock:
            inputs = self.processor(instruction=[row.instruction for row in rows])
        for name in ("pixel_values", "proprio"):
            if name in rows[0].inputs:
                inputs[name] = torch.cat([row.inputs[name] for row in rows])
        return inputs

    def _entropy(self, output: Any, shape: tuple[int, int, int]) -> list[np.ndarray | None]:
        if output.entropy is None or self.model.config.head_type == "fast":
            return [None] * shape[0]
        return list(output.entropy.cpu().numpy().reshape(shape))  # (B, K * D) -> (B, K, D)


@dataclass(eq=False)
class _Ticket:
    """A row that waits, or is in the batch that runs."""

    row: Row
    session_id: str | None
    order: int
    future: Future = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)


class Batcher:
    """
    The thread that runs the policy, one batch at a time.

    A batch takes what waits, the oldest first. Where the last batch had several rows, it waits for as many again, for
    at most `batch_wait` seconds: robots that are answered together come back together. A robot alone never waits.

    Args:
        predict (`Callable`): Predictions of a list of rows; see [`Policy.predict`].
        max_batch_size (`int`): Most rows of a batch.
        batch_wait (`float`): In seconds, how long the oldest row may wait for others.
        on_batch (`Callable`): Told the size of each batch and the seconds that it took.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Row]], list[Prediction]],
        max_batch_size: int = 8,
        batch_wait: float = 0.01,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ):
        if max_batch_size < 1 or batch_wait < 0:
            raise ValueError(f"A batch of {max_batch_size} rows that waits {batch_wait} s; expected 1 and 0 at least.")
        self.max_batch_size, self.batch_wait = max_batch_size, batch_wait
        self._predict, self._on_batch = predict, on_batch
        self._condition = threading.Condition()
        self._waiting: deque[_Ticket] = deque()
        self._running: list[_Ticket] = []
        self._newest: OrderedDict[str, int] = OrderedDict()  # order of the newest observation of a session
        self._last_size, self._failures, self._is_closing = 1, 0, False
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_healthy(self) -> bool:
        """Whether the thread runs, and did not fail each of the last times."""
        return self._thread.is_alive() and self._failures < FAILURES_UNTIL_UNHEALTHY

    def submit(self, row: Row, session_id: str | None = None, order: int = 0) -> Future:
        """
        A future of the row's [`Prediction`].

        Args:
            row (`Row`): See [`Policy.prepare`].
            session_id (`str`, *optional*): Of the observations of a session only the newest waits: the future of
                another one raises [`SupersededError`]. What runs already is finished and answered.
            order (`int`): When the observation came, in any unit: rows may be ready in another order.
        """
        ticket = _Ticket(row, session_id, order)
        with self._condition:
            if self._is_closing:
                raise RuntimeError("The batcher is closed.")
            if session_id is not None and not self._is_newest(session_id, order):
                _fail(ticket, SupersededError("A newer observation of this session has come."))
                return ticket.future
            if session_id is not None:
                self._drop(self._waiting, session_id, "A newer observation of this session has come.")
            self._waiting.append(ticket)
            self._condition.notify()
        return ticket.future

    def reset(self, session_id: str, order: int = 0) -> int:
        """Forget a session: what waits or runs for it is not answered any more. Returns how many rows that were."""
        with self._condition:
            self._is_newest(session_id, order)
            running = [ticket for ticket in self._running if not ticket.future.done()]
            return sum(self._drop(rows, session_id, "The session was reset.") for rows in (self._waiting, running))

    def close(self, timeout: float | None = None) -> None:
        """Finish what waits, then stop."""
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join(timeout)

    def _is_newest(self, session_id: str, order: int) -> bool:
        """Whether no newer observation of the session was submitted; notes this one."""
        if order < self._newest.get(session_id, order):
            return False
        self._newest[session_id] = order
        self._newest.move_to_end(session_id)
        while len(self._newest) > REMEMBERED_SESSIONS:
            self._newest.popitem(last=False)
        return True

    def _drop(self, tickets: deque[_Ticket] | list[_Ticket], session_id: str, reason: str) -> int:
        dropped = [ticket for ticket in tickets if ticket.session_id == session_id]
        for ticket in dropped:
            _fail(ticket, SupersededError(reason))
            tickets.remove(ticket)
        return len(dropped)

    def _run(self) -> None:
        while batch := self._next_batch():
            self._last_size = len(batch)
            self._answer(batch)
            self._running = []

    def _next_batch(self) -> list[_Ticket]:
        """The rows to predict next; none when closed and all is done."""
        with self._condition:
            while True:
                self._condition.wait_for(lambda: self._waiting or self._is_closing)
                self._wait_for_company()
                live = [ticket for ticket in self._waiting if not ticket.future.done()]  # the others were cancelled
                if live or (self._is_closing and not self._waiting):
                    break
                self._waiting.clear()
            same = [ticket for ticket in live if ticket.row.action_dim == live[0].row.action_dim]
            self._running = same[: self.max_batch_size]
            taken = set(map(id, self._running))
            self._waiting = deque(ticket for ticket in live if id(ticket) not in taken)
            return self._running

    def _wait_for_company(self) -> None:
        expected = min(self._last_size, self.max_batch_size)
        while self._waiting and len(self._waiting) < expected and not self._is_closing:
            left = self._waiting[0].submitted + self.batch_wait - time.monotonic()
            if left <= 0:
                return
            self._condition.wait(left)

    def _answer(self, batch: list[_Ticket]) -> None:
        began = time.monotonic()
        try:
            predictions = self._predict([ticket.row for ticket in batch])
        except Exception as error:
            if len(batch) > 1:  # one row must not spoil the others' answers
                logger.warning("A batch of %d failed (%s); its rows are run one by one.", len(batch), error)
                for ticket in batch:
                    self._answer([ticket])
                return
            logger.exception("A prediction failed.")
            self._failures += 1
            _fail(batch[0], error)
            return
        self._failures = 0
        seconds = time.monotonic() - began
        self._on_batch(len(batch), seconds)
        for ticket, prediction in zip(batch, predictions, strict=True):
            waited = began - ticket.submitted
            _resolve(ticket, Prediction(prediction.actions, prediction.entropy, waited, seconds, len(batch)))


def _resolve(ticket: _Ticket, prediction: Prediction) -> None:
    try:
        ticket.future.set_result(prediction)
    except InvalidStateError:  # cancelled by a client that has gone, or its session was reset
        logger.debug("A prediction came too late for its client.")


def _fail(ticket: _Ticket, error: Exception) -> None:
    try:
        ticket.future.set_exception(error)
    except InvalidStateError:
        logger.debug("A failure came too late for its client.")
