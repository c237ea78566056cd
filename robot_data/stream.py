"""Several datasets as one endless, shuffled stream of steps that goes on exactly where it was left."""

import copy
import heapq
import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from .episode import BadEpisodeError, Episode, Step
from .filters import Subset
from .mixture import Choices, Part, probabilities
from .pictures import decode, encode_jpeg
from .reading import read_unit


logger = logging.getLogger(__name__)

# A dataset that comes up rarely still waits with this many steps, so that they are not all of one episode.
MIN_BUFFER_STEPS = 100
# What random numbers are for: the first part of their key.
_ORDER, _STEPS, _CHOICES = range(3)


def _generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on nothing but the seed and a key."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


# Steps


def _make_steps(
    episode: Episode, indices: np.ndarray, seeds: np.ndarray, chunk_size: int, is_checked: bool
) -> list[Step]:
    """Some steps of an episode, each with its seed and the chunk of actions that begins with it."""
    actions, is_pad = episode.chunks(indices, chunk_size)  # (N, K, D), (N, K)
    states = None if episode.states is None else episode.states[indices]  # (N, S)
    indices = indices.tolist()
    pictures = {role: _read_pictures(episode, role, indices, is_checked) for role in episode.images}
    return [
        Step(
            images={role: column[row] for role, column in pictures.items()},
            instruction=episode.instructions[index],
            action=actions[row],
            action_is_pad=is_pad[row],
            state=None if states is None else states[row],
            dataset=episode.dataset,
            episode=episode.index,
            frame=index,
            seed=seed,
        )
        for row, (index, seed) in enumerate(zip(indices, seeds.tolist(), strict=True))
    ]


def _read_pictures(episode: Episode, role: str, indices: list[int], is_checked: bool) -> list[bytes]:
    """Encoded pictures; those that come as pixels become JPEG, at a tenth of their size."""
    encoded = []
    for index, picture in zip(indices, Subset(episode.images[role], indices), strict=True):
        try:
            if isinstance(picture, bytes) and is_checked:
                decode(picture)
            encoded.append(picture if isinstance(picture, bytes) else encode_jpeg(picture, subsampling="444"))
        except ValueError as error:
            raise BadEpisodeError(
                f"picture {index} of {role!r}: {error}", episode.dataset, episode.file, episode.index
            ) from error
    return encoded


# One dataset


class _Reader:
    """
    One consumer's way through one dataset, without an end.

    Steps are numbered as they are read. Each waits for its turn: step n is due at n + a random delay below `window`,
    and within a pass steps leave in the order in which they are due. So reading goes on evenly, step by step, and
    about window / 2 steps wait at a time. What has left is known from the last one alone; steps that may still wait
    are found by reading again from the oldest unit that can hold one.

    Args:
        part ([`Part`]): The dataset.
        key (`tuple[int, int]`): Seed, and place of the dataset in the mixture.
        consumer (`tuple[int, int]`): Number of this consumer, and how many there are.
        buffer_steps (`int`): Steps to wait at a time.
        chunk_size (`int`): Actions in a step.
        skip_bad_episodes (`bool`): Whether to go on after a damaged episode.
        position (`dict[str, Any]`, *optional*): From the property of that name; by default the start.
    """

    def __init__(
        self,
        part: Part,
        key: tuple[int, int],
        consumer: tuple[int, int],
        buffer_steps: int,
        chunk_size: int,
        skip_bad_episodes: bool,
        position: dict[str, Any] | None,
    ):
        self._source, self._config, (self._seed, self._index) = part.source, part.config, key
        self._consumer, num_consumers = consumer
        # Too few units for all: everyone reads all of them, and takes every so many-th step.
        is_shared = part.source.num_units < num_consumers
        self._step_stride = num_consumers if is_shared else 1
        self._unit_stride = 1 if is_shared else num_consumers
        self._window = 2 * buffer_steps * self._step_stride
        self._chunk_size, self._skip_bad_episodes = chunk_size, skip_bad_episodes

        start = {
            "unit": 0 if is_shared else self._consumer,
            "step": 0,
            "last": [-1, -1],
            "left_out": [],
            "skipped": [],
            "removed": {},
        }
        position = position or start
        self._unit, self._step = position["unit"], position["step"]  # counted through all passes
        self._last = tuple(position["last"])  # when the last step to leave was due, and its number
        self._left_out = {tuple(place) for place in position["left_out"]}  # damaged episodes of this pass
        self._skipped = {tuple(place) for place in position["skipped"]}  # of all passes
        self._removed = Counter(position["removed"])  # steps that filters removed of what was read so far, by reason
        self._waiting: list[tuple[int, int, Step]] = []  # a heap: when due, number, step
        # Units of which steps may wait: number, that of their first step, and what was removed before it.
        self._marks: deque[tuple[int, int, Counter[str]]] = deque()
        self._fruitless_units = 0
        self._width = 0  # of the actions; not known yet
        self._episodes: Iterator[list[tuple[int, int, Step]]] | None = self._read_pass()

    @property
    def position(self) -> dict[str, Any]:
        """Where to go on after the last step that was given."""
        unit, step, removed = self._marks[0] if self._marks else (self._unit, self._step, self._removed)
        return {
            "unit": unit,
            "step": step,
            "last": list(self._last),
            "left_out": sorted(map(list, self._left_out)),
            "skipped": sorted(map(list, self._skipped)),
            "removed": dict(removed),
        }

    def __next__(self) -> Step:
        self.fill()
        due, number, step = heapq.heappop(self._waiting)
        self._last = due, number
        while len(self._marks) > 1 and self._marks[1][1] <= due - self._window + 1:
            self._marks.popleft()
        return step

    def fill(self) -> None:
        """Read until no step that is still to be read can be due before the first one that waits."""
        while not self._waiting or (self._episodes is not None and self._waiting[0][0] > self._step):
            if self._episodes is None:
                self._marks.clear()
                self._left_out.clear()
                self._last = (-1, -1)
                self._episodes = self._read_pass()
            entries = next(self._episodes, None)
            if entries is None:
                self._episodes = None
                continue
            for entry in entries:
                heapq.heappush(self._waiting, entry)

    def _read_pass(self) -> Iterator[list[tuple[int, int, Step]]]:
        """Read the rest of a pass, episode by episode."""
        pass_number, first = divmod(self._unit, self._source.num_units)
        order = _generator(self._seed, _ORDER, self._index, pass_number).permutation(self._source.num_units)
        for unit in order[first :: self._unit_stride].tolist():
            self._marks.append((self._unit, self._step, self._removed.copy()))
            self._fruitless_units += 1
            for ordinal, episode in self._read(unit, self._removed):
                key = (self._seed, _STEPS, self._index, pass_number, unit, ordinal)
                entries = self._enter(episode, unit, ordinal, _generator(*key))
                if entries:
                    self._fruitless_units = 0
                    yield entries
            if new := sorted(set(self._removed) - set(self._marks[-1][2])):
                logger.warning("%s: filters leave out steps: %s, first in unit %d.", self._source.name, new, unit)
            self._unit += self._unit_stride
            if self._fruitless_units >= self._source.num_units:
                self._check_for_steps()

    def _read(self, unit: int, removed: Counter[str]) -> Iterator[tuple[int, Episode]]:
        def report(ordinal: int, error: BadEpisodeError) -> None:
            self._report(unit, ordinal, error)

        return read_unit(self._source, self._config, unit, report, removed)

    def _report(self, unit: int, ordinal: int, error: BadEpisodeError) -> None:
        if not self._skip_bad_episodes:
            raise error
        self._left_out.add((unit, ordinal))
        if (unit, ordinal) not in self._skipped:
            self._skipped.add((unit, ordinal))
            logger.warning("Skipped: %s", error)

    def _enter(
        self, episode: Episode, unit: int, ordinal: int, generator: np.random.Generator
    ) -> list[tuple[int, int, Step]]:
        """Number an episode's steps, and make those that this consumer has yet to give."""
        numbers = self._step + np.arange(len(episode))
        due = numbers + generator.integers(self._window, size=len(episode))
        seeds = generator.integers(2**63, size=len(episode))
        self._step += len(episode)
        last_due, last_number = self._last
        is_wanted = (due > last_due) | ((due == last_due) & (numbers > last_number))
        if self._step_stride > 1:
            is_wanted &= numbers % self._step_stride == self._consumer
        indices = np.flatnonzero(is_wanted)
        # Asked for fewer of its pictures, after resuming, an episode that was left out might not show its damage.
        if not len(indices) or (unit, ordinal) in self._left_out:
            return []
        try:
            self._check_width(episode)
            steps = _make_steps(episode, indices, seeds[indices], self._chunk_size, self._skip_bad_episodes)
        except BadEpisodeError as error:
            # Its steps keep their numbers: who need not make them does not learn that they are missing.
            self._report(unit, ordinal, error)
            return []
        return list(zip(due[indices].tolist(), numbers[indices].tolist(), steps, strict=True))

    def _check_width(self, episode: Episode) -> None:
        width = episode.actions.shape[1]
        self._width = self._width or width
        if width != self._width:
            reason = f"its actions are {width} wide, those of episodes before {self._width}"
            raise BadEpisodeError(reason, episode.dataset, episode.file, episode.index)

    def _check_for_steps(self) -> None:
        """Search the whole dataset for a step, as other consumers may find some where this one finds none."""
        removed: Counter[str] = Counter()
        for unit in range(self._source.num_units):
            for ordinal, episode in self._read(unit, removed):
                try:
                    indices = np.arange(len(episode))
                    _make_steps(episode, indices, indices, self._chunk_size, self._skip_bad_episodes)
                except BadEpisodeError as error:
                    self._report(unit, ordinal, error)
                    continue
                self._fruitless_units = 0
                return
        raise ValueError(
            f"{self._source.name} gives no step at all: of its {self._source.num_units} units, {len(self._skipped)} "
            f"are damaged or hold something that is; filters removed {dict(removed) or 'nothing'}."
        )


# The mixture


class StepStream(IterableDataset):
    """
    Several datasets as one endless, shuffled stream of [`Step`]s.

    Consumers are the workers of all ranks, `world_size * num_workers` of them. In each pass over a dataset its units,
    usually episodes, come in a new random order and are dealt to the consumers like cards; the dealing goes on from
    pass to pass. So in every pass each unit goes to one consumer, and each of its steps comes up once. A dataset with
    fewer units than there are consumers is read by all of them, and its steps, numbered through all passes in the
    order of reading, are dealt instead: consumer c of C takes the numbers c, c + C, c + 2 C, and so on. Consumers do
    not wait for each other, so that at one time they may be in different passes.

    A consumer shuffles its part of a pass: each step waits until a random number of others were read, fewer than
    twice `buffer_steps`. Pictures wait as the encoded files that they are; pixels, from videos, as JPEG of quality 95
    with full colour.

    Which dataset comes next follows a fixed sequence that keeps every consumer's proportions, to a few steps.

    Iterating goes on where the last iteration stopped, as with a file; at most one iteration runs at a time. The state
    is small and can be stored as JSON: where each dataset is, no steps. What comes after it is what would have come,
    to the bit, with the same version of NumPy and as long as the datasets are the same; the steps that were waiting
    are read again. [`StepLoader`] does the same for the workers of a `DataLoader`. In a `DataLoader` of torch the
    workers share the steps as said above, but what they have prefetched makes the state useless.

    Args:
        parts (`Sequence[Part]`): The mixture.
        seed (`int`, defaults to 0): Of everything that is random.
        buffer_steps (`int`, defaults to 10000): Steps that wait in each consumer, of all datasets together, by their
            probabilities but no fewer than 100 each.
        chunk_size (`int`, defaults to 1): Actions in each step.
        balance (`bool`, defaults to `True`): Whether weights count per step; see [`probabilities`].
        skip_bad_episodes (`bool`, defaults to `False`): Log and count damaged episodes and go on, rather than raise.
            Each encoded picture is then decoded once more, so that a torn one is found here and not in the batch.
        rank (`int`, *optional*), world_size (`int`, *optional*): Number of this process, and how many there are; by
            default those of `torch.distributed` if it is initialised, one process otherwise.

    Raises:
        ValueError: If an argument is out of range, or a number of steps is needed and not known. While iterating: if
            the actions of two datasets differ in width, or a dataset gives no step at all.
        BadEpisodeError: While iterating, if an episode is damaged. Iterating again tries it once more.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seed: int = 0,
        buffer_steps: int = 10_000,
        chunk_size: int = 1,
        balance: bool = True,
        skip_bad_episodes: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        own_rank, own_world_size = _distributed_place()
        self.rank = own_rank if rank is None else rank
        self.world_size = own_world_size if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"`rank` must lie in [0, {self.world_size}), got {self.rank}.")
        names = Counter(part.source.name for part in parts)
        if not parts or max(names.values()) > 1:
            raise ValueError(f"A mixture needs datasets, each with a name of its own; got {list(names.elements())}.")
        least = {"seed": 0, "buffer_steps": 1, "chunk_size": 1}
        for name, value in (("seed", seed), ("buffer_steps", buffer_steps), ("chunk_size", chunk_size)):
            if value < least[name]:
                raise ValueError(f"`{name}` must be {least[name]} or more, got {value}.")
        self.parts, self.seed, self.buffer_steps, self.chunk_size = tuple(parts), seed, buffer_steps, chunk_size
        self.skip_bad_episodes = skip_bad_episodes
        self.probabilities = probabilities(parts, balance)
        self._worker: tuple[int, int] | None = None
        self.seek(self._start)

    # Iterating

    def for_worker(self, worker: int, num_workers: int) -> "StepStream":
        """
        The stream of one worker from its start, in whichever process it is iterated.

        Args:
            worker (`int`): From 0 to `num_workers - 1`.
            num_workers (`int`): Workers of each rank.
        """
        stream = copy.copy(self)
        stream._worker = worker, num_workers
        stream.seek(self._start)
        return stream

    def _find_worker(self) -> tuple[int, int]:
        """Number of this worker, and how many there are."""
        if self._worker is not None:
            return self._worker
        info = get_worker_info()
        return (0, 1) if info is None else (info.id, info.num_workers)

    def __iter__(self) -> Iterator[Step]:
        while True:
            try:
                step = self._draw()
            except BaseException:
                # What was being read is lost; going on from the last step reads it again.
                self.seek(self.position)
                raise
            yield step

    def _draw(self) -> Step:
        if self._readers is None:
            self._readers, self._choices = self._open()
        step = next(self._readers[self._choices[self._draws]])
        self._draws += 1
        return step

    def _open(self) -> tuple[list[_Reader], Choices]:
        worker, num_workers = self._find_worker()
        consumer = self.rank * num_workers + worker
        readers = [
            _Reader(
                part,
                key=(self.seed, index),
                consumer=(consumer, self.world_size * num_workers),
                buffer_steps=max(round(self.buffer_steps * probability), min(self.buffer_steps, MIN_BUFFER_STEPS)),
                chunk_size=self.chunk_size,
                skip_bad_episodes=self.skip_bad_episodes,
                position=position,
            )
            for index, (part, probability, position) in enumerate(
                zip(self.parts, self.probabilities, self._sources, strict=True)
            )
        ]
        for reader in readers:
            reader.fill()  # a dataset without a step is told of at once, and not when it first comes up
        start = int(_generator(self.seed, _CHOICES, consumer).integers(2**64, dtype=np.uint64))
        return readers, Choices(self.probabilities, start)

    # State

    @property
    def skipped(self) -> dict[str, int]:
        """How many different damaged episodes were skipped so far, by dataset."""
        return count_skipped([self])

    @property
    def removed(self) -> dict[str, dict[str, int]]:
        """
        How many steps filters removed so far, by dataset and reason (see [`Filters.apply`]): of the units that were
        read before the oldest one of which steps still wait.
        """
        return count_removed([self])

    @property
    def position(self) -> dict[str, Any]:
        """What changes in the state."""
        sources = self._sources if self._readers is None else [reader.position for reader in self._readers]
        return {"draws": self._draws, "sources": sources}

    @property
    def _start(self) -> dict[str, Any]:
        return {"draws": 0, "sources": [None] * len(self.parts)}

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from a position of this same stream; see [`load_state_dict`] for one that was stored."""
        self._draws, self._sources = position["draws"], position["sources"]
        self._readers: list[_Reader] | None = None  # while there are none, the two above say where to go on

    @property
    def made_with(self) -> dict[str, Any]:
        """What fixes the order of the steps."""
        worker, num_workers = self._find_worker()
        made_with = {
            "seed": self.seed,
            "buffer_steps": self.buffer_steps,
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": worker,
            "num_workers": num_workers,
            "datasets": [part.source.name for part in self.parts],
        }
        for part, probability in zip(self.parts, self.probabilities, strict=True):
            name, config = part.source.name, part.config
            made_with[f"units of {name}"] = part.source.num_units
            made_with[f"probability of {name}"] = probability
            made_with[f"steps dropped of {name}"] = [config.drop_first, config.drop_last]
            made_with[f"filters of {name}"] = repr(config.filters)
        return made_with

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is after the last step it gave, with what it was made with; fit for JSON."""
        return {"made_with": self.made_with, **self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on from a state.

        Args:
            state (`dict[str, Any]`): From [`state_dict`] of a stream of the same mixture, seed, buffer, rank and
                worker. Chunks and skipping may differ.

        Raises:
            ValueError: If it was made with something else, naming it, or is no such state.
        """
        if missing := sorted({"made_with", "draws", "sources"} - set(state)):
            raise ValueError(f"This is no state of a stream: it lacks {missing}.")
        saved, own = state["made_with"], self.made_with
        if changes := [
            f"{key} {saved.get(key)!r}, here {own.get(key)!r}" for key in saved | own if saved.get(key) != own.get(key)
        ]:
            raise ValueError(
                f"The state is of another stream. It was made with {'; '.join(changes)}. Make the stream as it was, "
                "or begin anew without the state."
            )
        self.seek(state)


def count_skipped(streams: Sequence[StepStream]) -> dict[str, int]:
    """
    How many different damaged episodes were skipped, by dataset.

    Args:
        streams (`Sequence[StepStream]`): Streams of the same mixture, such as those of several workers.
    """
    positions = [stream.position["sources"] for stream in streams]
    return {
        part.source.name: len({tuple(place) for reader in readers if reader for place in reader["skipped"]})
        for part, readers in zip(streams[0].parts, zip(*positions, strict=True), strict=True)
    }


def count_removed(streams: Sequence[StepStream]) -> dict[str, dict[str, int]]:
    """
    How many steps filters removed, by dataset and reason, in all passes together.

    Args:
        streams (`Sequence[StepStream]`): Streams of the same mixture, such as those of several workers.
    """
    positions = [stream.position["sources"] for stream in streams]
    return {
        part.source.name: dict(sum((Counter(reader["removed"]) for reader in readers if reader), Counter()))
        for part, readers in zip(streams[0].parts, zip(*positions, strict=True), strict=True)
    }


def _distributed_place() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
