"""Statistics of a dataset's actions and states, which scale them for the model: `dataset_statistics.json`."""

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np

from .episode import DIMENSIONS, BadEpisodeError, Episode, Source
from .reading import iter_episodes
from .standardize import DatasetConfig


logger = logging.getLogger(__name__)

QUANTILES = [0.01, 0.99]
MEMORY_BYTES = 4 * 2**20  # of each dimension; one that has more lies in a temporary file
BLOCK = 2**16  # numbers that are turned into float64 at a time
# Where less lies between the quantiles, in units of the dataset or as a share of max - min, the action's scale comes
# from noise or its bounds from outliers. Of the 25 datasets of openvla-7b, the share is below 0.01 in DobbE only, with
# jumps of a hundred metres, and in a constant angle of Berkeley Fanuc.
TINY_RANGE, TINY_SHARE = 1e-4, 1e-3


def compute_statistics(
    source: Source,
    config: DatasetConfig,
    *,
    mask: Sequence[bool] | None = None,
    skip_bad_episodes: bool = False,
    on_episode: Callable[[Episode], None] | None = None,
) -> dict[str, Any]:
    """
    Statistics of a whole dataset, exact, in one pass over its columns; pictures are not read.

    As in OpenVLA, the numbers are those of the standardised episodes before anything is dropped that training has no
    use for: the filters `unlabeled_episodes` and `zero_motion` are not applied, all others are.

    Minimum, maximum and quantiles are to the bit those of OpenVLA: `np.quantile`, linear, of float32 values, with
    positions and result in float64. Mean and standard deviation (of the population) are computed in float64. Each
    dimension takes 4 bytes per step, beyond 4 MiB in a temporary file; at the end one of them at a time is in memory.

    Args:
        source (`Source`): The dataset.
        config (`DatasetConfig`): Its description.
        mask (`Sequence[bool]`, *optional*): Dimensions of the action that are normalised. By default all but the
            last, the gripper.
        skip_bad_episodes (`bool`, defaults to `False`): Log damaged episodes and go on, rather than raise.
        on_episode (`Callable[[Episode], None]`, *optional*): Called with each episode, which has no pictures.

    Returns:
        `dict`: `action`: lists of D numbers `mean`, `std`, `max`, `min`, `q01`, `q99`, and of booleans `mask`;
        `proprio`: the same without `mask`, of the state, absent where the description has none (published files have
        zeros there, which would turn any state into zeros); `num_transitions` and `num_trajectories`: steps and
        episodes that were counted.

    Raises:
        BadEpisodeError: If an episode is damaged, or not as wide as those before it.
        ValueError: If the description or the mask does not fit the dataset, or no step is left.
    """
    steps = episodes = 0
    with ExitStack() as stack:
        blocks = {name: _Columns(stack) for name in ("action", "proprio")}
        for episode in iter_episodes(source, _numbers_only(config), skip_bad_episodes=skip_bad_episodes):
            if not steps:
                mask = _check_mask(mask, source.name, episode.actions.shape[1])
            if fault := _append(blocks, episode):
                _report(BadEpisodeError(fault, episode.dataset, episode.file, episode.index), skip_bad_episodes)
                continue
            steps, episodes = steps + len(episode), episodes + 1
            if on_episode is not None:
                on_episode(episode)
        if not steps:
            raise ValueError(f"{source.name} has no steps to compute statistics of.")
        statistics = {name: columns.summarize() for name, columns in blocks.items() if columns.width}
    statistics["action"]["mask"] = list(mask)
    statistics |= {"num_transitions": steps, "num_trajectories": episodes}
    for block, dimension, note in find_weaknesses(statistics):
        logger.warning("%s: dimension %d of the %s is %s", source.name, dimension, block, note)
    return statistics


def find_weaknesses(statistics: dict[str, Any]) -> list[tuple[str, int, str]]:
    """
    Dimensions that a model can learn little of.

    Args:
        statistics (`dict`): Of one dataset, from [`compute_statistics`] or a published file.

    Returns:
        `list[tuple[str, int, str]]`: `action` or `proprio`, the dimension from 0, and what is the matter.
    """
    found = []
    for block in ("action", "proprio"):
        values = statistics.get(block) or {}
        mask = values.get("mask") or [True] * len(values.get("q01", ()))
        columns = zip(*(values.get(key, ()) for key in ("min", "max", "q01", "q99")), mask, strict=False)
        notes = (_describe_weakness(*column) for column in columns)
        found += [(block, dimension, note) for dimension, note in enumerate(notes) if note]
    return found


def _describe_weakness(low: float, high: float, q01: float, q99: float, is_normalized: bool) -> str | None:
    if low == high:
        return f"constant: always {low:.6g}"
    if not is_normalized:
        is_cut = max(-low, high) > 1
        return f"not normalised, and cut off outside [-1, 1]: {low:.6g} to {high:.6g}" if is_cut else None
    if q99 - q01 < max(TINY_RANGE, TINY_SHARE * (high - low)):
        return f"almost constant but for outliers: q99 - q01 is {q99 - q01:.3g}, max - min {high - low:.3g}"
    return None


def _numbers_only(config: DatasetConfig) -> DatasetConfig:
    return replace(config, cameras={}, filters=replace(config.filters, unlabeled_episodes=False, zero_motion=None))


def _report(error: BadEpisodeError, skip_bad_episodes: bool) -> None:
    if not skip_bad_episodes:
        raise error
    logger.warning("Skipped: %s", error)


def _check_mask(mask: Sequence[bool] | None, name: str, width: int) -> list[bool]:
    if mask is None:
        if width != len(DIMENSIONS):
            logger.warning(
                "%s: the last of %d dimensions of the action is taken for the gripper and not normalised. Give the "
                "mask where it is none, or not the only one.",
                name,
                width,
            )
        return [True] * (width - 1) + [False]
    if len(mask) != width:
        raise ValueError(f"The mask has {len(mask)} dimensions, and the action of {name} {width}.")
    return [bool(value) for value in mask]


# Numbers


class _Columns:
    """
    Numbers of all steps, each dimension by itself, in memory or, where they are many, in temporary files.

    Args:
        stack (`ExitStack`): Closes them.
    """

    def __init__(self, stack: ExitStack):
        self._stack = stack
        self._files: list[SpooledTemporaryFile] = []
        self._length = 0

    @property
    def width(self) -> int:
        return len(self._files)

    def append(self, values: np.ndarray) -> None:
        """Add float32 (T, D)."""
        if not self._files:
            files = [SpooledTemporaryFile(MEMORY_BYTES) for _ in range(values.shape[1])]  # noqa: SIM115
            self._files = [self._stack.enter_context(file) for file in files]
        for file, column in zip(self._files, values.T, strict=True):
            file.write(column.tobytes())
        self._length += len(values)

    def summarize(self) -> dict[str, list[float]]:
        """Each statistic as a list of D numbers."""
        rows = [_summarize(self._read(file)) for file in self._files]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def _read(self, file: SpooledTemporaryFile) -> np.ndarray:
        """(N,)"""
        values = np.empty(self._length, np.float32)
        file.seek(0)
        if (size := file.readinto(values)) != values.nbytes:
            raise OSError(f"A temporary file holds {size} of {values.nbytes} bytes; is the disk full?")
        return values


def _append(blocks: dict[str, _Columns], episode: Episode) -> str | None:
    """Add an episode's numbers; or, where they are not as wide as those before, say so and add nothing."""
    given = {"action": episode.actions, "proprio": episode.states}
    given = {name: values for name, values in given.items() if values is not None}
    for name, values in given.items():
        if blocks[name].width not in (0, values.shape[1]):
            return f"its {name} is {values.shape[1]} wide, in the episodes before {blocks[name].width}"
    for name, values in given.items():
        blocks[name].append(values)
    return None


def _summarize(values: np.ndarray) -> dict[str, float]:
    """Statistics of float32 (N,), whose order is lost."""
    mean = values.mean(dtype=np.float64)
    blocks = np.array_split(values, math.ceil(len(values) / BLOCK))
    squares = sum(np.square(np.subtract(block, mean, dtype=np.float64)).sum() for block in blocks)
    low, high = values.min(), values.max()
    # As a list: NumPy 2 would round a single quantile to the float32 of the values, which OpenVLA's did not.
    q01, q99 = np.quantile(values, QUANTILES, overwrite_input=True)
    summary = {"mean": mean, "std": np.sqrt(squares / len(values)), "max": high, "min": low, "q01": q01, "q99": q99}
    return {key: float(value) for key, value in summary.items()}
