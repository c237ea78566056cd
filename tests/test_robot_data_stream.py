"""The stream: what is dealt to whom, in which proportions, how well shuffled, and exactly resumable."""

import hashlib
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from robot_data.episode import BadEpisodeError, RawEpisode, Step
from robot_data.filters import Filters
from robot_data.loader import StepLoader
from robot_data.mixture import Choices, Part, open_mixture, probabilities, read_mixture
from robot_data.pictures import decode, encode_jpeg
from robot_data.reading import iter_episodes
from robot_data.sources import open_source
from robot_data.standardize import DatasetConfig, config_for
from robot_data.stream import StepStream


FIXTURES = Path(__file__).resolve().parent / "fixtures"
LEROBOT, LIBERO = FIXTURES / "lerobot", FIXTURES / "rlds" / "mini_libero_no_noops" / "1.0.0"
LIBERO_MIXTURE = "libero_4_task_suites_no_noops"
JPEG = encode_jpeg(np.zeros((8, 8, 3), np.uint8))  # decoders stop at its end and leave what follows alone
CONFIG = DatasetConfig.from_dict({"cameras": {"primary": "image"}, "action": "action", "state": "state"}, "fake")


class FakeSource:
    """
    Episodes whose numbers and pictures say where they come from.

    Args:
        name: Name of the dataset.
        units: Lengths of the episodes of each unit.
        width: Numbers in an action.
        bad: Units that cannot be read.
        bad_pictures: Units whose last picture cannot be read.
        failures: How often reading fails before it works.
        silent: Units whose episodes have no instruction.
        sizes_known: Whether it says how many steps it has.
        picture_size: Bytes of a picture.
    """

    def __init__(
        self,
        name: str,
        units: Sequence[Sequence[int]],
        width: int = 7,
        bad: Iterable[int] = (),
        bad_pictures: Iterable[int] = (),
        failures: int = 0,
        silent: Iterable[int] = (),
        sizes_known: bool = True,
        picture_size: int = 1,
    ):
        self.name, self.units, self.width, self.failures = name, [list(unit) for unit in units], width, failures
        self.bad, self.bad_pictures, self.silent = set(bad), set(bad_pictures), set(silent)
        self.sizes_known, self.picture_size = sizes_known, picture_size
        self.reads: list[int] = []

    @property
    def num_units(self) -> int:
        return len(self.units)

    @property
    def num_episodes(self) -> int:
        return sum(map(len, self.units))

    @property
    def num_steps(self) -> int | None:
        return sum(map(sum, self.units)) if self.sizes_known else None

    def read(self, unit: int, columns=None, images=None) -> Iterator[RawEpisode]:
        self.reads.append(unit)
        first = sum(map(len, self.units[:unit]))
        for index, length in enumerate(self.units[unit], start=first):
            if self.failures:
                self.failures -= 1
                raise ConnectionError("the network is away")
            if unit in self.bad:
                raise BadEpisodeError("it is torn", self.name, f"{self.name}.file", index)
            yield self._make(unit, index, length)

    def _make(self, unit: int, index: int, length: int) -> RawEpisode:
        column = np.arange(length, dtype=np.float32)[:, None] + 1000 * index
        return RawEpisode(
            dataset=self.name,
            file=f"{self.name}.file",
            index=index,
            columns={"action": np.repeat(column, self.width, axis=1), "state": column},
            instructions=["" if unit in self.silent else f"task {index}"] * length,
            images={"image": FakePictures(self, index, length, unit in self.bad_pictures)},
        )


class FakePictures(Sequence):
    def __init__(self, source: FakeSource, episode: int, length: int, is_bad: bool):
        self.source, self.episode, self.length, self.is_bad = source, episode, length, is_bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, frame: int) -> bytes:
        if not 0 <= frame < self.length:
            raise IndexError(frame)
        if self.is_bad and frame == self.length - 1:
            raise BadEpisodeError("the picture is torn", self.source.name, self.source.name, self.episode)
        return (JPEG + f"{self.source.name} {self.episode} {frame}".encode()).ljust(self.source.picture_size)


def parts_of(*sources: FakeSource, weights: Sequence[float] | None = None) -> list[Part]:
    return [
        Part(source, CONFIG, weight) for source, weight in zip(sources, weights or [1.0] * len(sources), strict=True)
    ]


def take(stream: Iterable[Any], count: int) -> list[Any]:
    return list(itertools.islice(iter(stream), count))


def place(step: Step) -> tuple[str, int, int]:
    return step.dataset, step.episode, step.frame


def content(step: Step) -> tuple[Any, ...]:
    """All of a step."""
    state = None if step.state is None else step.state.tobytes()
    actions = step.action.tobytes(), step.action.shape, step.action_is_pad.tobytes()
    return (*place(step), step.seed, step.instruction, *step.images.items(), *actions, state)


def contents(steps: Iterable[Step]) -> list[tuple[Any, ...]]:
    return list(map(content, steps))


def digest(steps: list[Step]) -> str:
    return hashlib.sha256(repr(contents(steps)).encode()).hexdigest()[:16]


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


# The mixture


def test_probabilities_are_weight_times_size():
    parts = parts_of(FakeSource("a", [[30]]), FakeSource("b", [[5, 5]]), weights=[1, 2])
    assert probabilities(parts) == [0.6, 0.4]
    assert probabilities(parts, balance=False) == pytest.approx([1 / 3, 2 / 3])
    # A size that is given comes before the files'.
    assert probabilities([replace(parts[0], num_steps=60), parts[1]]) == [0.75, 0.25]


def test_unknown_sizes_are_an_error_where_they_matter():
    parts = parts_of(FakeSource("a", [[3]], sizes_known=False), FakeSource("b", [[3]]))
    with pytest.raises(ValueError, match=r"\['a'\] do not say how many steps.*num_steps.*balance=False"):
        probabilities(parts)
    assert probabilities(parts, balance=False) == [0.5, 0.5]
    assert probabilities(parts[:1]) == [1.0]
    assert probabilities([replace(parts[0], num_steps=9), parts[1]]) == [0.75, 0.25]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight": 0}, "weight of a must be positive, got 0"),
        ({"weight": math.nan}, "weight of a must be positive"),
        ({"num_steps": 0}, "`num_steps` of a must be positive"),
        ({"source": FakeSource("none", [])}, "none is empty"),
    ],
)
def test_impossible_parts_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Part(**{"source": FakeSource("a", [[3]]), "config": CONFIG, **values})


def test_a_named_mixture_is_opened_from_a_folder(tmp_path):
    for name in ("libero_spatial_no_noops", "libero_object_no_noops", "libero_goal_no_noops", "libero_10_no_noops"):
        (tmp_path / name).symlink_to(LIBERO.parent)
    statistics = {name: {"num_transitions": size} for size, name in enumerate(read_mixture(LIBERO_MIXTURE), start=1)}
    entries = {"libero_10_no_noops": {"cameras": ["wrist"]}}
    parts = open_mixture(LIBERO_MIXTURE, f"{tmp_path}/", entries=entries, statistics=statistics)
    assert [part.source.name for part in parts] == list(statistics)
    assert probabilities(parts) == [0.1, 0.2, 0.3, 0.4]
    assert list(parts[0].config.cameras) == ["primary", "wrist"] and list(parts[3].config.cameras) == ["wrist"]
    with pytest.raises(ValueError, match="do not say how many steps"):
        StepStream(open_mixture(LIBERO_MIXTURE, tmp_path))
    with pytest.raises(FileNotFoundError, match="bridge_orig"):
        open_mixture("bridge", tmp_path)
    with pytest.raises(ValueError, match=r"given of \['other'\]; the mixture has"):
        open_mixture(LIBERO_MIXTURE, tmp_path, entries={"other": {}})


def test_mixtures_are_read_by_name_or_file(tmp_path):
    assert len(read_mixture("oxe_magic_soup_plus_minus")) == 25 and len(read_mixture("oxe_magic_soup_plus")) == 27
    assert read_mixture("oxe_magic_soup_plus")["kuka"] == 0.8341046294
    file = tmp_path / "own.yaml"
    file.write_text("mine: 1\nyours: 0.5\n")
    assert read_mixture(file) == {"mine": 1.0, "yours": 0.5}
    with pytest.raises(ValueError, match=r"no mixture 'magic'; known: \['bridge',"):
        read_mixture("magic")
    for text in ("- mine", "mine: much", "mine: {a: 1}", "{", ""):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"own\.yaml must give a weight for each dataset"):
            read_mixture(file)
    with pytest.raises(FileNotFoundError):
        read_mixture(tmp_path / "none.yaml")


@given(
    weights=st.lists(st.floats(0.001, 1), min_size=1, max_size=30),
    start=st.integers(0, 2**64 - 1),
    first=st.integers(0, 10**9),
)
@settings(max_examples=30, deadline=None)
def test_every_stretch_of_choices_keeps_the_proportions(weights, start, first):
    shares = np.array(weights) / sum(weights)
    choices = Choices(shares, start)
    counts = np.zeros(len(shares))
    for drawn, draw in enumerate(range(first, first + 3000), start=1):
        counts[choices[draw]] += 1
        if drawn in (10, 100, 1000, 3000):
            assert np.abs(counts - drawn * shares).max() < 5


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (3, 2)])
def test_proportions_of_a_hundred_thousand_draws(world_size, num_workers):
    sources = [FakeSource("a", [[50]] * 7), FakeSource("b", [[9]]), FakeSource("c", [[90]] * 40)]
    parts = [replace(part, config=replace(CONFIG, cameras={})) for part in parts_of(*sources, weights=[1, 3, 0.25])]
    counts: Counter[str] = Counter()
    for rank in range(world_size):
        stream = StepStream(parts, rank=rank, world_size=world_size, buffer_steps=100)
        for worker in range(num_workers):
            draws = take(stream.for_worker(worker, num_workers), 100_000 // (world_size * num_workers))
            counts.update(step.dataset for step in draws)
    for name, share in zip("abc", stream.probabilities, strict=True):
        assert counts[name] / counts.total() == pytest.approx(share, rel=0.01)


# Passes


def consumers(parts: list[Part], world_size: int, num_workers: int, **options: Any) -> list[StepStream]:
    streams = [StepStream(parts, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    return [stream.for_worker(worker, num_workers) for stream in streams for worker in range(num_workers)]


UNITS = {
    "episodes": [[length] for length in (3, 9, 1, 4, 7, 5, 2, 6, 8, 4, 4, 3, 1)],
    "files": [[3, 4, 5], [1], [6, 2], [3, 3, 3], [7], [2, 2], [5, 1], [4, 4]],
}


@pytest.mark.parametrize("kind", UNITS)
@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 1), (2, 1), (1, 3), (2, 2), (4, 2)])
def test_units_are_dealt_like_cards(kind, world_size, num_workers):
    """Each pass has every unit once, in a new order; each consumer gives its units' steps of a pass once."""
    units, passes, count = UNITS[kind], 3, world_size * num_workers
    steps = {unit: sum(lengths) for unit, lengths in enumerate(units)}
    first_episode = np.cumsum([0, *map(len, units)])
    dealt: dict[int, int] = {}
    for consumer in range(count):
        source = FakeSource("fake", units)
        stream = consumers(parts_of(source), world_size, num_workers, buffer_steps=20)[consumer]
        given = iter(stream)
        # Long enough that all units of the passes are read.
        positions = range(consumer, passes * len(units), count)
        while len(source.reads) <= len(positions):
            next(given)
        own = dict(zip(positions, source.reads, strict=False))
        dealt |= own
        given = iter(consumers(parts_of(source), world_size, num_workers, buffer_steps=20)[consumer])
        for pass_number in range(passes):
            expected = [unit for position, unit in own.items() if position // len(units) == pass_number]
            episodes = Counter(
                (episode, frame)
                for unit in expected
                for episode, length in enumerate(units[unit], start=int(first_episode[unit]))
                for frame in range(length)
            )
            got = [next(given) for _ in range(sum(steps[unit] for unit in expected))]
            assert Counter((step.episode, step.frame) for step in got) == episodes
    orders = [
        [dealt[position] for position in range(len(units) * number, len(units) * (number + 1))] for number in (0, 1, 2)
    ]
    assert all(sorted(order) == list(range(len(units))) for order in orders)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("units", [[[5]], [[5, 2], [4]], [[1], [1], [1]], [[40, 30]]])
@pytest.mark.parametrize(("world_size", "num_workers"), [(4, 1), (2, 4), (1, 7)])
def test_steps_of_a_tiny_dataset_are_dealt(units, world_size, num_workers):
    """Fewer units than consumers: these share each pass step by step, and no one goes without."""
    count, total = world_size * num_workers, sum(map(sum, units))
    streams = consumers(parts_of(FakeSource("tiny", units)), world_size, num_workers, buffer_steps=3)
    numbers = [range(consumer, total * count, count) for consumer in range(count)]  # `count` passes
    given = [iter(stream) for stream in streams]
    for pass_number in range(count):
        shares = [sum(number // total == pass_number for number in own) for own in numbers]
        steps = [next(steps) for steps, share in zip(given, shares, strict=True) for _ in range(share)]
        assert len({(step.episode, step.frame) for step in steps}) == len(steps) == total


def test_a_tiny_dataset_changes_nothing_for_the_others():
    big = FakeSource("big", [[20]] * 50)
    streams = consumers(parts_of(big, FakeSource("tiny", [[3]]), weights=[1, 100]), 2, 4, buffer_steps=50)
    steps = [step for stream in streams for step in take(stream, 200)]
    assert Counter(step.dataset for step in steps)["tiny"] / len(steps) == pytest.approx(300 / 1300, abs=0.01)
    places = [place(step) for step in steps if step.dataset == "big"]
    # 1231 draws from 1000 steps: as far as no consumer is in its second pass, no step comes twice.
    assert len(places) > 1000
    assert all(count <= 2 for count in Counter(places).values())


def test_a_step_has_a_new_seed_each_time_it_comes_up():
    stream = StepStream(parts_of(FakeSource("a", [[4], [5]])))
    steps = take(stream, 9 * 20)
    assert len({step.seed for step in steps}) == len(steps)
    # All consumers draw from one order: the same step of the same pass has the same seed whoever gives it.
    shared = [step for other in consumers(stream.parts, 3, 1) for step in take(other, 3)]
    assert {step.seed for step in shared} == {step.seed for step in steps[:9]}


def test_the_order_does_not_change_between_versions():
    """A stored state means this order."""
    stream = StepStream(parts_of(FakeSource("a", UNITS["files"]), FakeSource("b", [[9]] * 9)), seed=7, buffer_steps=30)
    order = [(*place(step), step.seed) for step in take(stream, 300)]
    assert hashlib.sha256(repr(order).encode()).hexdigest()[:16] == "ca4a80b78f55f638"


# Shuffling


def test_batches_mix_as_many_episodes_as_chance_would():
    length, buffer = 50, 1000
    stream = StepStream(parts_of(FakeSource("a", [[length]] * 400)), buffer_steps=buffer)
    steps = take(stream, 20_000)
    batches = [len({step.episode for step in steps[start : start + 64]}) for start in range(4000, 16_000, 64)]
    # As drawn at random from twice the buffer, 40 episodes.
    expected = 40 * (1 - (1 - 1 / 40) ** 64)
    assert np.mean(batches) == pytest.approx(expected, rel=0.05)
    # The first batch comes early and is less mixed.
    assert len({step.episode for step in steps[:64]}) >= 5
    # Nothing of an episode's own order is left.
    frames = np.array([step.frame for step in steps[4000:16_000]], float)
    assert abs(np.corrcoef(frames[:-1], frames[1:])[0, 1]) < 0.05
    # And the batches of a pass are not in the order of the files.
    episodes = np.array([step.episode for step in steps], float)
    assert abs(np.corrcoef(np.arange(20_000), episodes)[0, 1]) < 0.1


def test_a_small_dataset_is_shuffled_whole():
    stream = StepStream(parts_of(FakeSource("a", [[10]] * 10)), buffer_steps=10_000)
    passes = np.array([[10 * step.episode + step.frame for step in take(stream, 100)] for _ in range(300)])
    assert (np.sort(passes, axis=1) == np.arange(100)).all()
    # Where a step stands is uniform: mean 49.5, standard deviation 28.9 / sqrt(300) = 1.7.
    assert np.abs(np.argsort(passes, axis=1).mean(axis=0) - 49.5).max() < 8
    # Steps that follow each other in an episode stand as far apart as any two: 100 / 3.
    places = np.argsort(passes, axis=1).reshape(300, 10, 10)
    assert np.abs(np.diff(places, axis=2)).mean() == pytest.approx(101 / 3, rel=0.03)


def test_reading_is_even_and_starts_early():
    length, buffer = 20, 2000
    source = FakeSource("a", [[length]] * 1000)
    stream = iter(StepStream(parts_of(source), buffer_steps=buffer))
    take(stream, 64)
    assert len(source.reads) * length < buffer / 2
    take(stream, 5000)
    for _ in range(50):
        before = len(source.reads)
        take(stream, 100)
        assert 100 / length - 2 <= len(source.reads) - before <= 100 / length + 2


def test_waiting_steps_are_as_many_as_asked_for():
    sources = [FakeSource("a", [[20]] * 2000), FakeSource("b", [[5]] * 200)]
    stream = StepStream(parts_of(*sources), buffer_steps=1000)
    given = iter(stream)
    waiting = []
    for _ in range(10_000):
        next(given)
        waiting.append([len(reader._waiting) for reader in stream._readers])
    assert 900 < max(row[0] for row in waiting) < 1.1 * 1000 + 20
    assert 80 < max(row[1] for row in waiting) < 1.3 * 100  # by its share it had 24


def test_consumers_that_share_a_dataset_have_their_own_buffers():
    stream = StepStream(parts_of(FakeSource("a", [[100] * 90])), buffer_steps=200).for_worker(0, 4)
    given, waiting = iter(stream), []
    for _ in range(2000):
        next(given)
        waiting.append(len(stream._readers[0]._waiting))
    assert 180 < np.mean(waiting[400:1800]) < 220


def test_without_a_buffer_steps_come_nearly_in_the_order_of_reading():
    source = FakeSource("a", [[30]] * 5)
    steps = take(StepStream(parts_of(source), buffer_steps=1), 150)
    order = [source.reads[number // 30] * 30 + number % 30 for number in range(150)]
    got = [30 * step.episode + step.frame for step in steps]
    assert all(abs(order.index(number) - place) <= 2 for place, number in enumerate(got))


# Resuming


@st.composite
def mixtures(draw) -> list[Part]:
    lengths = st.lists(st.integers(1, 9), min_size=1, max_size=3)
    sources = [
        FakeSource(name, draw(st.lists(lengths, min_size=1, max_size=8)), silent=draw(st.sets(st.integers(1, 7))))
        for name in "abc"[: draw(st.integers(1, 3))]
    ]
    return parts_of(*sources, weights=[draw(st.floats(0.1, 3)) for _ in sources])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_follows_a_state_is_what_would_have_come(data):
    num_workers = data.draw(st.integers(1, 5))
    world_size = data.draw(st.integers(1, 2))
    options = {
        "seed": data.draw(st.integers(0, 2**40)),
        "buffer_steps": data.draw(st.integers(1, 60)),
        "chunk_size": data.draw(st.integers(1, 4)),
        "rank": data.draw(st.integers(0, world_size - 1)),
        "world_size": world_size,
    }
    parts, worker = data.draw(mixtures()), data.draw(st.integers(0, num_workers - 1))

    def make() -> StepStream:
        return StepStream(parts, **options).for_worker(worker, num_workers)

    whole = contents(take(make(), 200))
    stream, done = make(), 0
    for cut in sorted(data.draw(st.lists(st.integers(0, 150), min_size=1, max_size=3))):
        assert contents(take(stream, cut - done)) == whole[done:cut]
        state, done = through_json(stream.state_dict()), cut
        stream = make()
        stream.load_state_dict(state)
        assert through_json(stream.state_dict()) == state
    assert contents(take(stream, 200 - done)) == whole[done:]


@pytest.mark.parametrize("buffer_steps", [1, 2, 4])
def test_every_step_is_a_place_to_go_on_from(buffer_steps):
    parts = parts_of(FakeSource("a", [[1], [4], [2], [1, 1], [3]]))
    stream, states = StepStream(parts, buffer_steps=buffer_steps), []
    whole = [(states.append(stream.state_dict()), content(step))[1] for step in itertools.islice(stream, 150)]
    for done, state in enumerate(states[:100], start=1):
        stream.load_state_dict(state)
        assert contents(take(stream, 30)) == whole[done : done + 30]


def test_a_state_is_small_and_resuming_reads_the_buffer_and_no_more():
    source = FakeSource("a", [[20]] * 3000)
    stream = StepStream(parts_of(source), buffer_steps=500)
    take(stream, 30_000)
    state = through_json(stream.state_dict())
    assert len(json.dumps(stream.position)) < 150
    again = StepStream(parts_of(source), buffer_steps=500)
    again.load_state_dict(state)
    source.reads.clear()
    assert content(next(iter(again))) == content(next(iter(stream)))
    assert len(source.reads) <= 2 * 500 / 20 + 3


def test_iterating_again_goes_on():
    parts = parts_of(FakeSource("a", [[9]] * 9), FakeSource("b", [[4]] * 3))
    whole, stream = contents(take(StepStream(parts), 60)), StepStream(parts)
    assert [content(step) for _ in range(20) for step in take(stream, 3)] == whole


def test_a_passing_failure_loses_nothing():
    def make() -> StepStream:
        return StepStream(parts_of(FakeSource("a", [[9]] * 30)), buffer_steps=20)

    whole, stream, steps = contents(take(make(), 1000)), make(), []
    for _ in range(8):
        steps += take(stream, 45)
        stream.parts[0].source.failures = 1
        with pytest.raises(ConnectionError):
            steps.extend(iter(stream))
    assert 8 * 45 <= len(steps) < 1000
    assert contents(steps) == whole[: len(steps)]


STATE_OPTIONS = {"seed": 3, "buffer_steps": 30}


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        (None, {"seed": 4}, "seed 3, here 4"),
        (None, {"buffer_steps": 31}, "buffer_steps 30, here 31"),
        (None, {"world_size": 2}, "world_size 1, here 2"),
        (None, {"balance": False}, r"probability of a 0\.75, here 0\.5"),
        ([("a", 9)], {}, r"datasets \['a', 'b'\], here \['a'\]"),
        ([("b", 3), ("a", 9)], {}, r"datasets \['a', 'b'\], here \['b', 'a'\]"),
        ([("a", 8), ("b", 3)], {}, "units of a 9, here 8"),
    ],
)
def test_a_state_of_another_stream_is_refused(parts, options, message):
    def make(parts: list[tuple[str, int]] | None, options: dict[str, Any]) -> StepStream:
        sources = [FakeSource(name, [[5]] * units) for name, units in parts or [("a", 9), ("b", 3)]]
        return StepStream(parts_of(*sources), **{**STATE_OPTIONS, **options})

    state = through_json(make(None, {}).state_dict())
    stream = make(parts, options)
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(state)
    assert stream.position["draws"] == 0


def test_a_state_with_other_filters_or_another_worker_is_refused():
    stream = StepStream(parts_of(FakeSource("a", [[5]] * 9)))
    state = stream.state_dict()
    config = replace(CONFIG, filters=Filters(no_ops=True))
    with pytest.raises(ValueError, match=r"filters of a 'Filters\(no_ops=False.*here 'Filters\(no_ops=True"):
        StepStream([Part(FakeSource("a", [[5]] * 9), config)]).load_state_dict(state)
    with pytest.raises(ValueError, match="num_workers 1, here 2"):
        stream.for_worker(0, 2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"no state of a stream: it lacks \['draws', 'made_with', 'sources'\]"):
        stream.load_state_dict({"epoch": 1})
    # Chunks may change.
    StepStream(stream.parts, chunk_size=8).load_state_dict(state)


# Steps


def test_chunks_repeat_the_last_action_beyond_the_end():
    steps = take(StepStream(parts_of(FakeSource("a", [[5]])), chunk_size=3), 5)
    steps.sort(key=lambda step: step.frame)
    assert [step.action[:, 0].tolist() for step in steps] == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 4], [4, 4, 4]]
    assert [step.action_is_pad.tolist() for step in steps[2:]] == [
        [False, False, False],
        [False, False, True],
        [False, True, True],
    ]
    assert steps[0].action.shape == (3, 7)
    assert steps[0].action.dtype == np.float32
    assert [step.state.tolist() for step in steps] == [[0], [1], [2], [3], [4]]
    steps[1].action[:] = -1  # no step shares its numbers with another
    assert steps[0].action[:, 0].tolist() == [0, 1, 2]


def test_chunks_longer_than_the_episode():
    (step,) = take(StepStream(parts_of(FakeSource("a", [[1]])), chunk_size=4), 1)
    assert step.action[:, 0].tolist() == [0, 0, 0, 0]
    assert step.action_is_pad.tolist() == [False, True, True, True]


def test_only_what_the_description_names_is_read():
    class Curious(FakeSource):
        def read(self, unit, columns=None, images=None):
            asked.append((list(columns), list(images)))
            return super().read(unit, columns, images)

    asked: list[Any] = []
    config = DatasetConfig.from_dict({"cameras": {}, "action": "action[:2]"}, "a")
    (step,) = take(StepStream([Part(Curious("a", [[5]]), config)]), 1)
    assert asked == [(["action"], [])]
    assert step.images == {}
    assert step.state is None


def test_datasets_of_different_action_width_keep_theirs():
    sources = [FakeSource("seven", [[5]] * 4), FakeSource("fourteen", [[5]] * 4, width=14)]
    steps = take(StepStream(parts_of(*sources)), 40)
    assert {(step.dataset, step.action.shape[1]) for step in steps} == {("seven", 7), ("fourteen", 14)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world_size": 2}, r"`rank` must lie in \[0, 2\), got 2"),
        ({"seed": -1}, "`seed` must be 0 or more"),
        ({"buffer_steps": 0}, "`buffer_steps` must be 1 or more"),
        ({"chunk_size": 0}, "`chunk_size` must be 1 or more"),
        ({"parts": []}, "needs datasets"),
        ({"parts": parts_of(FakeSource("a", [[5]]), FakeSource("a", [[6]]))}, r"name of its own; got \['a', 'a'\]"),
    ],
)
def test_impossible_streams_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StepStream(**{"parts": parts_of(FakeSource("a", [[5]])), **options})


def test_the_place_among_the_ranks_is_that_of_torch_distributed(monkeypatch):
    parts = parts_of(FakeSource("a", [[5]]))
    assert (StepStream(parts).rank, StepStream(parts).world_size) == (0, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    assert (StepStream(parts).rank, StepStream(parts).world_size) == (2, 3)
    assert (StepStream(parts, rank=0, world_size=1).rank, StepStream(parts).world_size) == (0, 3)


# Damage


@pytest.mark.parametrize("damage", ["bad", "bad_pictures"])
def test_a_damaged_episode_is_an_error(damage):
    stream = StepStream(parts_of(FakeSource("a", [[5]] * 9, **{damage: {4}})), buffer_steps=2)
    steps = []
    for _ in range(3):  # it does not go away
        with pytest.raises(BadEpisodeError, match=r"a, a.*, episode 4: .*torn"):
            steps.extend(iter(stream))
    assert all(step.episode != 4 for step in steps)


@pytest.mark.parametrize("damage", ["bad", "bad_pictures"])
def test_damaged_episodes_can_be_skipped_and_are_counted(damage, caplog):
    source = FakeSource("a", [[5]] * 9, **{damage: {2, 4}})
    stream = StepStream(parts_of(source, FakeSource("b", [[3]] * 9)), buffer_steps=8, skip_bad_episodes=True)
    assert stream.skipped == {"a": 0, "b": 0}
    with caplog.at_level(logging.WARNING):
        steps = [step for step in take(stream, 300) if step.dataset == "a"]
    assert {step.episode for step in steps} == set(range(9)) - {2, 4}
    assert stream.skipped == {"a": 2, "b": 0}
    messages = [record.getMessage() for record in caplog.records if record.name == "robot_data.stream"]
    assert sorted(message.split(":")[1] for message in messages) == [
        f" a, {'a.file' if damage == 'bad' else 'a'}, episode {episode}" for episode in (2, 4)
    ]


@pytest.mark.parametrize("damage", ["bad", "bad_pictures"])
@pytest.mark.parametrize("num_workers", [1, 6])
@pytest.mark.parametrize("cut", range(5, 100, 17))
def test_skipping_survives_resuming(damage, num_workers, cut, caplog):
    def make() -> StepStream:
        source = FakeSource("a", [[5]] * 4 + [[4, 6]], **{damage: {2, 4}})
        stream = StepStream(parts_of(source), buffer_steps=12, skip_bad_episodes=True)
        return stream.for_worker(0, num_workers)

    stream = make()
    whole = contents(take(stream, 120))
    stream = make()
    take(stream, cut)
    state, skipped = through_json(stream.state_dict()), stream.skipped
    again = make()
    again.load_state_dict(state)
    assert again.skipped == skipped
    caplog.clear()
    assert contents(take(again, 120 - cut)) == whole[cut:]
    assert len(caplog.records) == sum(again.skipped.values()) - sum(skipped.values())


@pytest.mark.parametrize("damage", ["bad", "bad_pictures"])
def test_a_repaired_episode_comes_back_in_the_next_pass(damage):
    source = FakeSource("a", [[5]] * 4, **{damage: {0, 1, 2, 3}})
    stream = StepStream(parts_of(source), buffer_steps=1, skip_bad_episodes=True)
    with pytest.raises(ValueError, match="no step at all"):
        next(iter(stream))
    getattr(source, damage).intersection_update({2})
    assert {step.episode for step in take(stream, 30)} == {0, 1, 3}
    getattr(source, damage).clear()
    assert {step.episode for step in take(stream, 60)} == {0, 1, 2, 3}
    assert stream.skipped == {"a": 1}


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_a_dataset_without_a_step_is_an_error(num_workers):
    silent = FakeSource("quiet", [[5, 3]] * 3, silent=range(3))
    with pytest.raises(ValueError, match=r"quiet gives no step at all: of its 3 units.*{'unlabeled': 24}"):
        next(iter(StepStream(parts_of(silent)).for_worker(0, num_workers)))
    # Of five workers that share an episode of five steps only one sees its last picture.
    for damage in ("bad", "bad_pictures")[: 1 if num_workers == 5 else 2]:
        broken = FakeSource("broken", [[5]] * 3, **{damage: range(3)})
        with pytest.raises(ValueError, match=r"broken gives no step at all: of its 3 units, 3 are damaged"):
            next(iter(StepStream(parts_of(broken), skip_bad_episodes=True).for_worker(0, num_workers)))


@pytest.mark.parametrize("num_workers", [1, 4, 40])
def test_few_episodes_of_many_may_be_left(num_workers):
    source = FakeSource("a", [[3]] * 40, silent=set(range(40)) - {17})
    for worker in (0, num_workers - 1):
        steps = take(StepStream(parts_of(source)).for_worker(worker, num_workers), 30)
        assert {step.episode for step in steps} == {17}


def test_steps_that_filters_remove_are_counted_and_logged_once(caplog):
    source = FakeSource("a", [[3]] * 10, silent={2, 7})
    stream = StepStream(parts_of(source, FakeSource("b", [[2]])), buffer_steps=1)
    whole, states = [], []
    for step in itertools.islice(stream, 400):
        whole.append(step)
        states.append((through_json(stream.state_dict()), stream.removed))
    passes = Counter(place(step) for step in whole)["a", 0, 0]
    assert stream.removed["b"] == {}
    assert 6 * (passes - 1) <= stream.removed["a"]["unlabeled"] <= 6 * (passes + 1)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "a: filters leave out steps: ['unlabeled'], first in unit" in messages[0]
    for (state, removed), (_, expected) in zip(states[::40], states[50::40], strict=False):
        again = StepStream(stream.parts, buffer_steps=1)
        again.load_state_dict(state)
        assert again.removed == removed
        take(again, 50)
        assert again.removed == expected
    loader = StepLoader(stream, 4, num_workers=2)
    take(loader, 40)
    assert loader.removed["a"]["unlabeled"] > 0


def test_a_damaged_episode_leaves_those_that_follow_in_its_unit():
    """Its source's iterator goes on after the error."""

    class Table(FakeSource):
        def read(self, unit, columns=None, images=None):
            return map(self._read_one, range(len(self.units[unit])))

        def _read_one(self, index):
            if index in self.bad:
                raise BadEpisodeError("it is torn", self.name, "file", index)
            return self._make(0, index, self.units[0][index])

    stream = StepStream(parts_of(Table("a", [[3, 4, 5, 6, 7]], bad={1, 3})), skip_bad_episodes=True)
    assert {step.episode for step in take(stream, 60)} == {0, 2, 4}
    assert stream.skipped == {"a": 2}


@pytest.mark.parametrize("picture", [JPEG[:-20], b"", b"no picture"])
def test_torn_pictures_are_skipped_with_their_episode(picture):
    class Torn(FakeSource):
        def _make(self, unit, index, length):
            raw = super()._make(unit, index, length)
            pictures = list(raw.images["image"])
            return replace(raw, images={"image": [*pictures[:-1], picture]}) if index == 2 else raw

    stream = StepStream(parts_of(Torn("a", [[4]] * 5)), buffer_steps=1, skip_bad_episodes=True)
    assert {step.episode for step in take(stream, 60)} == {0, 1, 3, 4}
    assert stream.skipped == {"a": 1}


def test_an_episode_of_another_width_is_bad():
    class Odd(FakeSource):
        def _make(self, unit, index, length):
            raw = super()._make(unit, index, length)
            return replace(raw, columns={**raw.columns, "action": np.zeros((length, 8))}) if index == 2 else raw

    stream = StepStream(parts_of(Odd("a", [[4]] * 5)), seed=1)
    with pytest.raises(BadEpisodeError, match=r"a, a\.file, episode \d: its actions are \d wide"):
        take(stream, 40)


def test_episodes_in_order():
    source = FakeSource("a", [[3, 2], [4], [5, 1]], silent={1}, bad={2})
    removed: Counter[str] = Counter()
    with pytest.raises(BadEpisodeError, match="episode 3"):
        list(iter_episodes(source, CONFIG))
    episodes = list(iter_episodes(source, CONFIG, skip_bad_episodes=True, removed=removed))
    assert [(episode.index, len(episode)) for episode in episodes] == [(0, 3), (1, 2)]
    assert removed == {"unlabeled": 4}


# Real datasets


def open_fixture(folder: Path, **options: Any) -> Part:
    source = open_source(str(folder), **options)
    return Part(source, config_for(source.name, source.columns, source.images))


@pytest.mark.parametrize("folder", [LEROBOT / "v30_images", LEROBOT / "v30_video", LEROBOT / "v21_video", LIBERO])
def test_a_pass_over_a_real_dataset_holds_each_step_once(folder):
    part = open_fixture(folder)
    episodes = {episode.index: episode for episode in iter_episodes(part.source, part.config)}
    total = sum(map(len, episodes.values()))
    steps = take(StepStream([part], chunk_size=4), total)
    assert len({place(step) for step in steps}) == total
    for step in steps:
        episode = episodes[step.episode]
        assert step.instruction == episode.instructions[step.frame]
        assert np.array_equal(step.action[0], episode.actions[step.frame])
        assert np.array_equal(step.state, episode.states[step.frame])
        assert list(step.images) == list(part.config.cameras)
        for role, picture in step.images.items():
            assert type(picture) is bytes
            original = episode.images[role][step.frame]
            if isinstance(original, bytes):
                assert picture == original
            elif step.frame % 5 == 0:
                assert np.abs(decode(picture).astype(int) - original).mean() < 2


def test_real_datasets_mixed_from_workers_and_resumed():
    def make() -> StepLoader:
        parts = [replace(open_fixture(LEROBOT / "v30_video", name="video"), num_steps=88)]
        parts.append(replace(open_fixture(LEROBOT / "v30_images", name="images"), num_steps=88))
        return StepLoader(StepStream(parts, buffer_steps=40), batch_size=5, num_workers=2)

    whole = [digest(batch) for batch in take(make(), 14)]
    loader = make()
    take(loader, 5)
    again = make()
    again.load_state_dict(through_json(loader.state_dict()))
    assert [digest(batch) for batch in take(again, 9)] == whole[5:]


# The loader


def make_loader(num_workers: int, rank: int = 0, world_size: int = 1, **options: Any) -> StepLoader:
    sources = [FakeSource("a", [[7]] * 40), FakeSource("b", [[5, 4]] * 3), FakeSource("c", [[60]])]
    stream = StepStream(parts_of(*sources), seed=5, buffer_steps=50, chunk_size=2, rank=rank, world_size=world_size)
    return StepLoader(stream, batch_size=4, num_workers=num_workers, **options)


@pytest.mark.parametrize(
    ("context", "cut"), [("fork", 0), ("fork", 7), pytest.param("spawn", 7, marks=pytest.mark.slow)]
)
def test_the_loader_goes_on_after_the_last_batch_it_gave(context, cut):
    loader = make_loader(2, collate_fn=digest, multiprocessing_context=context)
    given = iter(loader)
    take(given, cut)
    state = through_json(loader.state_dict())  # the workers are two batches ahead each
    again = make_loader(2, collate_fn=digest, multiprocessing_context=context)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert take(again, 9) == take(given, 9)


def test_batches_come_from_the_workers_in_turn():
    batches = take(make_loader(3), 9)
    for worker in range(3):
        steps = take(make_loader(1)._streams[0].for_worker(worker, 3), 12)
        assert contents(itertools.chain(*batches[worker::3])) == contents(steps)
    assert contents(itertools.chain(*take(make_loader(0), 9))) == contents(itertools.chain(*take(make_loader(1), 9)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterating_a_loader_again_goes_on(num_workers):
    whole = take(make_loader(num_workers, collate_fn=digest), 12)
    loader = make_loader(num_workers, collate_fn=digest, num_batches=5)
    assert len(loader) == 5
    assert [*loader, *loader, *take(loader, 2)] == whole
    again = make_loader(num_workers, collate_fn=digest, num_batches=5)
    again.load_state_dict(loader.state_dict())
    assert list(again) == list(loader)  # the three that were left of the third
    assert len(list(again)) == 5
    with pytest.raises(TypeError, match="no end"):
        len(make_loader(num_workers))


@pytest.mark.parametrize(("saved", "own"), [(2, 3), (2, 0), (0, 2)])
def test_another_number_of_workers_is_refused(saved, own):
    loader = make_loader(own)
    with pytest.raises(ValueError, match=rf"made with {max(saved, 1)} worker\(s\), this loader has {max(own, 1)}"):
        loader.load_state_dict(make_loader(saved).state_dict())


def test_a_loader_refuses_the_state_of_another_rank_and_what_is_no_state():
    state = make_loader(2, world_size=2).state_dict()
    with pytest.raises(ValueError, match="rank 0, here 1"):
        make_loader(2, rank=1, world_size=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"no state of a loader: it lacks \['workers'\]"):
        make_loader(2).load_state_dict({"batches": 1})
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more"):
        StepLoader(StepStream(parts_of(FakeSource("a", [[5]]))), batch_size=0)
    with pytest.raises(ValueError, match="`num_batches` must be 1 or more"):
        make_loader(0, num_batches=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_reaches_the_main_process(num_workers):
    stream = StepStream(parts_of(FakeSource("a", [[5]] * 4, bad={2})))
    with pytest.raises((BadEpisodeError, RuntimeError), match=r"a, a\.file, episode 2: it is torn"):
        take(StepLoader(stream, 4, num_workers=num_workers), 10)
    stream = StepStream(stream.parts, skip_bad_episodes=True)
    loader = StepLoader(stream, 4, num_workers=num_workers)
    take(loader, 20)
    assert loader.skipped == {"a": 1}
    again = StepLoader(stream, 4, num_workers=num_workers)
    again.load_state_dict(loader.state_dict())
    assert again.skipped == {"a": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_random_numbers_outside_are_left_alone(num_workers):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    take(make_loader(num_workers), 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_the_workers_of_a_plain_data_loader_share_the_steps():
    stream = StepStream(parts_of(FakeSource("a", [[5]] * 8)))
    batches = take(DataLoader(stream, batch_size=None, num_workers=2, collate_fn=content), 40)
    assert len({batch[:3] for batch in batches}) == 40


# A run that is killed


def train(folder: str, rank: int, num_batches: int) -> None:
    """Write the digest of each batch to a log; after every third batch, replace the state file."""
    log, state = Path(folder, f"log-{rank}"), Path(folder, f"state-{rank}.json")
    loader = make_loader(2, rank=rank, world_size=2, collate_fn=digest)
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    first = loader.state_dict()["batches"]
    with log.open("a") as lines:
        for number, batch in enumerate(itertools.islice(loader, num_batches - first), start=first):
            lines.write(f"{number} {batch}\n")
            lines.flush()
            if number % 3 == 2:
                state.with_suffix(".new").write_text(json.dumps(loader.state_dict()))
                state.with_suffix(".new").replace(state)
            time.sleep(0.01)


def start(folder: Path, num_batches: int) -> list[subprocess.Popen]:
    here = Path(__file__).resolve()
    code = (
        f"import sys; sys.path[:0] = [{str(here.parent)!r}, {str(here.parent.parent)!r}]; "
        f"import {here.stem} as test; test.train({str(folder)!r}, int(sys.argv[1]), {num_batches})"
    )
    return [subprocess.Popen([sys.executable, "-c", code, str(rank)]) for rank in range(2)]


def wait_for(condition, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert all(process.poll() in (None, 0) for process in processes)
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_state(tmp_path):
    logs, total = [tmp_path / f"log-{rank}" for rank in range(2)], 100
    processes = start(tmp_path, 10**6)
    try:
        wait_for(lambda: all(log.exists() and len(log.read_text().splitlines()) > 22 for log in logs), processes)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert all(process.returncode == -signal.SIGKILL for process in processes)
    kept = [json.loads((tmp_path / f"state-{rank}.json").read_text())["batches"] for rank in range(2)]
    for process in start(tmp_path, total):
        assert process.wait(timeout=120) == 0
    for rank, log in enumerate(logs):
        whole = take(make_loader(2, rank=rank, world_size=2, collate_fn=digest), total)
        lines = [line.split() for line in log.read_text().splitlines()]
        assert all(whole[int(number)] == batch for number, batch in lines if int(number) < total)
        assert [int(number) for number, _ in lines[-(total - kept[rank]) :]] == list(range(kept[rank], total))


# Memory


def measure_memory(queue: Any) -> None:
    def resident() -> float:
        status = Path("/proc/self/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    before, peak = resident(), 0.0
    source = FakeSource("a", [[100]] * 1000, picture_size=25_000)
    for number, _ in enumerate(itertools.islice(StepStream(parts_of(source)), 40_000)):
        if number % 100 == 0:
            peak = max(peak, resident())
    queue.put(peak - before)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_a_buffer_takes_its_pictures_and_little_more():
    """10,000 pictures of 25 KB are 238 MiB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(queue,))
    process.start()
    assert 230 < queue.get(timeout=120) < 350
    process.join()
