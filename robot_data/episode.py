"""
What flows through this package: raw episodes of a source, then uniform episodes, then steps.

    files -> source.read(unit) -> RawEpisode -> standardize -> Episode -> stream (filter, mix, shuffle) -> Step

Every number is in the dataset's physical units; only the processor normalises.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


# Of an action in OpenVLA's convention for arms.
DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def dimension_names(size: int) -> tuple[str, ...]:
    """Names of an action's dimensions: those of an arm's displacement where there are 7."""
    return DIMENSIONS if size == len(DIMENSIONS) else tuple(f"action {index}" for index in range(size))


class BadEpisodeError(ValueError):
    """
    An episode, or a file of them, that cannot be used: damaged, incomplete or out of its declared form.

    Args:
        reason (`str`): What was found and what was expected.
        dataset (`str`): Name of the dataset.
        file (`str`): Path or URL of the file that is at fault.
        episode (`int`, *optional*): Index of the episode, where the fault lies in one.
    """

    def __init__(self, reason: str, dataset: str, file: str, episode: int | None = None):
        where = f"{dataset}, {file}" if episode is None else f"{dataset}, {file}, episode {episode}"
        super().__init__(f"{where}: {reason}")
        self.reason, self.dataset, self.file, self.episode = reason, dataset, file, episode

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.dataset, self.file, self.episode)


@dataclass
class RawEpisode:
    """
    One episode as a dataset has it, under the dataset's own names.

    Args:
        dataset (`str`): Name of the dataset.
        file (`str`): Path or URL that it was read from, for messages.
        index (`int`): Number of the episode in the dataset, from 0.
        columns (`dict[str, np.ndarray]`): Numbers per step, (T, ...) each, in the dataset's own type: `action`,
            `observation.state` (LeRobot); `action`, `observation/state`, `action/world_vector` (RLDS). Strings are
            arrays of `object`.
        instructions (`list[str]`): One per step, as the dataset has them, empty where there is none.
        images (`dict[str, Sequence[bytes | np.ndarray]]`): By the dataset's own key, T pictures: encoded files, or
            uint8 (H, W, 3). A picture is decoded or read when it is asked for, and only then.
        metadata (`dict[str, Any]`): What the dataset says of the whole episode (`success`, `robot_type`, ...).
    """

    dataset: str
    file: str
    index: int
    columns: dict[str, np.ndarray]
    instructions: list[str]
    images: dict[str, Sequence[Any]]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.instructions)


class Source(Protocol):
    """
    A dataset that can be read from any place.

    A *unit* is what is read in one go: usually one episode, and several where the files allow no less. Units can be
    read in any order and any number of times, and give the same episodes each time.
    """

    name: str

    @property
    def num_units(self) -> int:
        """How many units there are."""

    def read(
        self, unit: int, columns: Sequence[str] | None = None, images: Sequence[str] | None = None
    ) -> Iterator[RawEpisode]:
        """
        The episodes of a unit, in their order.

        Args:
            unit (`int`): From 0 to `num_units - 1`.
            columns (`Sequence[str]`, *optional*): Keys to read; all by default.
            images (`Sequence[str]`, *optional*): Cameras to read; all by default. `()` touches no picture.

        Raises:
            BadEpisodeError: If the unit, or one of its episodes, is damaged: by the iterator, in the episode's place.
                After it the next one follows, where the files allow it; a generator ends there, and what follows in
                the unit is lost with it.
        """

    @property
    def columns(self) -> list[str]:
        """Keys of the numbers and strings."""

    @property
    def images(self) -> list[str]:
        """Keys of the cameras, in the dataset's order."""

    @property
    def num_steps(self) -> int | None:
        """Steps in the whole dataset, where its files say so."""

    @property
    def num_episodes(self) -> int | None:
        """Episodes in the whole dataset, where its files say so."""


def check_unit(source: Source, unit: int) -> None:
    """
    Raises:
        IndexError: If a source has no such unit.
    """
    if not 0 <= unit < source.num_units:
        raise IndexError(f"{source.name} has units 0 to {source.num_units - 1}, got {unit}.")


def choose_keys(source: Source, kind: str, keys: Sequence[str] | None, own: list[str]) -> list[str]:
    """
    What of its own a source is to read.

    Args:
        source (`Source`): For the message.
        kind (`str`): `columns` or `pictures`, for the message.
        keys (`Sequence[str]`, *optional*): What was asked for; all by default.
        own (`list[str]`): What there is.

    Raises:
        ValueError: If there is no such key.
    """
    if unknown := sorted(set(keys or ()) - set(own)):
        raise ValueError(f"{source.name} has no {kind} {unknown}; it has {own}.")
    return own if keys is None else list(keys)


@dataclass
class Episode:
    """
    One episode in the project's form.

    Args:
        dataset (`str`), file (`str`), index (`int`): As in [`RawEpisode`].
        actions (`np.ndarray`): float32 (T, D). OpenVLA's convention for arms: displacement x, y, z; roll, pitch,
            yaw; gripper 1 = open, 0 = closed. Units and frame are the dataset's.
        states (`np.ndarray`, *optional*): float32 (T, S).
        instructions (`list[str]`): One per step.
        images (`dict[str, Sequence[bytes | np.ndarray]]`): By role, the main one first: `primary`, `secondary`,
            `wrist`. T pictures each, as in [`RawEpisode`].
    """

    dataset: str
    file: str
    index: int
    actions: np.ndarray
    states: np.ndarray | None
    instructions: list[str]
    images: dict[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.actions)

    def chunks(self, indices: np.ndarray, chunk_size: int) -> tuple[np.ndarray, np.ndarray]:
        """
        The actions from some steps on. Beyond the episode's end the last one is repeated.

        Args:
            indices (`np.ndarray`): The steps (N,).
            chunk_size (`int`): Actions of each, K.

        Returns:
            `tuple`: Actions (N, K, D), and bool (N, K), true beyond the end.
        """
        places, last = indices[:, None] + np.arange(chunk_size), len(self) - 1  # (N, K)
        return self.actions[np.minimum(places, last)], places > last


@dataclass
class Step:
    """
    One training example.

    Args:
        images (`dict[str, bytes | np.ndarray]`): By role, the main one first; an encoded picture (JPEG, PNG) or
            uint8 (H, W, 3).
        instruction (`str`): What the robot is told.
        action (`np.ndarray`): float32 (K, D), the actions from this step on. Beyond the episode's end the last one
            is repeated.
        action_is_pad (`np.ndarray`): bool (K,), true beyond the episode's end.
        state (`np.ndarray`, *optional*): float32 (S,).
        dataset (`str`): Name of the dataset.
        episode (`int`): Number of the episode in it.
        frame (`int`): Number of the step in the episode, from 0.
        seed (`int`): For whatever is drawn for this step, such as its augmentation; the stream draws a new one each
            time the step comes up.
    """

    images: dict[str, Any]
    instruction: str
    action: np.ndarray
    action_is_pad: np.ndarray
    state: np.ndarray | None
    dataset: str
    episode: int
    frame: int
    seed: int = 0
