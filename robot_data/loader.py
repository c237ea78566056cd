"""Batches of a stream from worker processes, and the state of what was consumed, not of what was prefetched."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .episode import Step
from .stream import StepStream, count_removed, count_skipped


class _Batches(IterableDataset):
    """Each worker's batches, with the position of its stream after them. Worker w iterates `streams[w]`."""

    def __init__(self, streams: list[StepStream], batch_size: int, collate_fn: Callable[[list[Step]], Any]):
        self.streams, self.batch_size, self.collate_fn = streams, batch_size, collate_fn

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        info = get_worker_info()
        stream = self.streams[0 if info is None else info.id]
        steps: list[Step] = []
        for step in stream:
            steps.append(step)
            if len(steps) == self.batch_size:
                yield self.collate_fn(steps), stream.position
                steps = []


def _same(value: Any) -> Any:
    return value


class StepLoader:
    """
    Endless batches of a stream, from worker processes, that go on exactly where they were left.

    Each worker fills whole batches with its own part of the stream, and batches come from the workers in turn. Every
    rank builds its own loader, of a stream with its rank, and gets as many batches as it asks for: with `accelerate`
    or `Trainer`, return it from `get_train_dataloader` as it is, without `prepare`, and let `Trainer` begin anew
    rather than skip batches (`ignore_data_skip=True`).

    Workers read ahead, so a worker's state travels with its batch: [`state_dict`] speaks of the batches that this
    process was given. Iterating goes on where the last iteration stopped, with the same workers.

    Args:
        stream ([`StepStream`]): The stream. The loader begins at its start, whatever was taken from it.
        batch_size (`int`): Steps in a batch.
        collate_fn (`Callable[[list[Step]], Any]`, *optional*): Makes a batch of a list of steps, in the workers; by
            default the list is the batch.
        num_workers (`int`, defaults to 0): Worker processes of this rank. With 0 this process reads.
        num_batches (`int`, *optional*): Batches until an iteration ends, which is the loader's length; the next one
            goes on from there. By default iterating does not end and the loader has no length.
        pin_memory (`bool`, defaults to `False`), prefetch_factor (`int`, *optional*), multiprocessing_context
            (*optional*): As in `torch.utils.data.DataLoader`.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        stream: StepStream,
        batch_size: int,
        collate_fn: Callable[[list[Step]], Any] | None = None,
        num_workers: int = 0,
        num_batches: int | None = None,
        pin_memory: bool = False,
        prefetch_factor: int | None = None,
        multiprocessing_context: Any = None,
    ):
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be {least} or more, got {value}.")
        if num_batches is not None and num_batches < 1:
            raise ValueError(f"`num_batches` must be 1 or more, or None for no end; got {num_batches}.")
        self.batch_size, self.num_batches = batch_size, num_batches
        self._collate_fn = collate_fn or _same
        self._options = {
            "num_workers": num_workers,
            "pin_memory": pin_memory,
            "prefetch_factor": prefetch_factor,
            "multiprocessing_context": multiprocessing_context,
        }
        # The workers iterate copies; these tell where each was after the last of its batches that was given out.
        count = max(num_workers, 1)
        self._streams = [stream.for_worker(worker, count) for worker in range(count)]
        self._batches = 0
        self._iterator: Iterator[tuple[Any, dict[str, Any]]] | None = None

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("The stream has no end; say with `num_batches` after how many batches to stop.")
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self._iterator is None:
                self._iterator = self._start()
            try:
                batch, position = next(self._iterator)
            except BaseException:
                self._iterator = None
                raise
            self._streams[self._batches % len(self._streams)].seek(position)
            self._batches += 1
            yield batch
            if self.num_batches is not None and self._batches % self.num_batches == 0:
                return

    def _start(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        # A `DataLoader` begins with its worker 0, which therefore takes the stream whose turn it is.
        turn = self._batches % len(self._streams)
        streams = self._copy_streams()
        # Without a generator of its own, a `DataLoader` draws from torch's global one.
        generator = torch.Generator()
        batches = _Batches(streams[turn:] + streams[:turn], self.batch_size, self._collate_fn)
        return iter(DataLoader(batches, batch_size=None, collate_fn=_same, generator=generator, **self._options))

    def _copy_streams(self) -> list[StepStream]:
        count = len(self._streams)
        streams = [self._streams[0].for_worker(worker, count) for worker in range(count)]
        for stream, current in zip(streams, self._streams, strict=True):
            stream.seek(current.position)
        return streams

    @property
    def skipped(self) -> dict[str, int]:
        """How many different damaged episodes the workers of this rank skipped so far, by dataset."""
        return count_skipped(self._streams)

    @property
    def removed(self) -> dict[str, dict[str, int]]:
        """How many steps filters removed from what this rank's workers read; see [`StepStream.removed`]."""
        return count_removed(self._streams)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is after the last batch it was given; fit for JSON."""
        return {"batches": self._batches, "workers": [stream.state_dict() for stream in self._streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on after the last batch that was given out before `state` was taken.

        Args:
            state (`dict[str, Any]`): From [`state_dict`] of a loader of the same stream, rank and number of workers.
                Batches may be of another size.

        Raises:
            ValueError: If it was made with something else, naming it, or is no such state.
        """
        if missing := sorted({"batches", "workers"} - set(state)):
            raise ValueError(f"This is no state of a loader: it lacks {missing}.")
        if len(state["workers"]) != len(self._streams):
            raise ValueError(
                f"The state was made with {len(state['workers'])} worker(s), this loader has {len(self._streams)}. "
                "The order of the steps depends on it: load the state with the same `num_workers`."
            )
        streams = self._copy_streams()
        for stream, saved in zip(streams, state["workers"], strict=True):
            stream.load_state_dict(saved)
        self._streams, self._batches, self._iterator = streams, state["batches"], None
