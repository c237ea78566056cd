"""Which steps and episodes of a dataset are left out; what is removed is counted by its reason."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .episode import Episode, RawEpisode


NOOP_THRESHOLD = 1e-4
ZERO_MOTION_THRESHOLD = 1e-5


class Subset(Sequence):
    """
    Some items of a sequence, in their order, without copying them.

    Iterating walks the sequence itself from its start, so that a video is decoded in one go.

    Args:
        items (`Sequence`): What they are taken from.
        indices (`Iterable[int]`): Their places, ascending.
    """

    def __init__(self, items: Sequence[Any], indices: Iterable[int]):
        self.items, self.indices = items, [int(index) for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return Subset(self.items, self.indices[index])
        return self.items[self.indices[index]]

    def __iter__(self) -> Iterator[Any]:
        wanted = iter(self.indices)
        following = next(wanted, None)
        if following is None:
            return
        for place, item in enumerate(self.items):
            if place == following:
                yield item
                following = next(wanted, None)
                if following is None:
                    return


def select_steps(episode: Episode, indices: Sequence[int]) -> Episode:
    """The episode with some of its steps only; `indices` are ascending."""
    return replace(
        episode,
        actions=episode.actions[indices],
        states=None if episode.states is None else episode.states[indices],
        instructions=[episode.instructions[index] for index in indices],
        images={role: Subset(pictures, indices) for role, pictures in episode.images.items()},
    )


def moving_steps(actions: np.ndarray) -> np.ndarray:
    """
    Steps that are no no-ops by OpenVLA's rule for LIBERO.

    A no-op has a pose (all dimensions but the last) of norm below 1e-4 and the gripper of the last step that was
    kept; as long as none was kept, the norm alone decides.

    Args:
        actions (`np.ndarray`): float (T, D), the last dimension the gripper.

    Returns:
        `np.ndarray`: bool (T,).
    """
    still = np.linalg.norm(actions[:, :-1], axis=1) < NOOP_THRESHOLD
    keep, gripper = ~still, None
    for step, action in enumerate(actions):
        keep[step] |= gripper is not None and action[-1] != gripper
        if keep[step]:
            gripper = action[-1]
    return keep


@dataclass(frozen=True)
class Filters:
    """
    What of a dataset is left out.

    Args:
        no_ops (`bool`, defaults to `False`): Steps that change nothing; see [`moving_steps`].
        unlabeled_episodes (`bool`, defaults to `True`): Episodes without an instruction at any step, as OpenVLA does.
        unlabeled_steps (`bool`, defaults to `False`): Every step without an instruction.
        success_column (`str`, *optional*): Column whose last value is above zero in a successful episode
            (`next.success`, `reward`); the other episodes are left out.
        success_metadata (`str`, *optional*): The same for a key of the episode's metadata.
        include_robots (`tuple[str]`): Patterns (`re.search`, any case) of `robot_type`; others are left out.
        include_tasks (`tuple[str]`), exclude_tasks (`tuple[str]`): Patterns of the instruction.
        zero_motion (`dict[str, Sequence[float]]`, *optional*): Quantiles `q01` and `q99` of the first dimensions of
            the action. Steps at which all of these, scaled to 2 between the quantiles, are within 1e-5 of zero are
            left out: OpenVLA's rule for DROID.

    Raises:
        ValueError: If a pattern is no regular expression, or `zero_motion` is incomplete.
    """

    no_ops: bool = False
    unlabeled_episodes: bool = True
    unlabeled_steps: bool = False
    success_column: str | None = None
    success_metadata: str | None = None
    include_robots: tuple[str, ...] = ()
    include_tasks: tuple[str, ...] = ()
    exclude_tasks: tuple[str, ...] = ()
    zero_motion: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self):
        for pattern in (*self.include_robots, *self.include_tasks, *self.exclude_tasks):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the filter's pattern {pattern!r} is no regular expression: {error}") from error
        if self.zero_motion is not None and (
            set(self.zero_motion) != {"q01", "q99"} or len(self.zero_motion["q01"]) != len(self.zero_motion["q99"])
        ):
            raise ValueError(f"`zero_motion` takes `q01` and `q99`, equally long; got {dict(self.zero_motion)}")

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Filters":
        """
        From YAML: patterns may be one string or a list.

        Raises:
            ValueError: On an unknown key or a value of the wrong type.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(entry) - set(known)):
            raise ValueError(f"unknown filters {unknown}; known: {known}")
        values = dict(entry)
        for name in ("include_robots", "include_tasks", "exclude_tasks"):
            if name in values:
                values[name] = strings(values[name], name)
        for name in ("no_ops", "unlabeled_episodes", "unlabeled_steps"):
            if not isinstance(values.get(name, False), bool):
                raise ValueError(f"the filter `{name}` is true or false, got {values[name]!r}")
        return cls(**values)

    def apply(self, episode: Episode, raw: RawEpisode) -> tuple[Episode | None, Counter[str]]:
        """
        What is left of an episode.

        Args:
            episode (`Episode`): From [`standardize`].
            raw (`RawEpisode`): What it was made from.

        Returns:
            `tuple[Episode | None, Counter[str]]`: The episode, None where no step is left; and the number of steps
            removed by reason: `failed`, `robot`, `unlabeled`, `task`, `zero_motion`, `no_op`.

        Raises:
            ValueError: If a filter needs something that the dataset does not have.
        """
        removed: Counter[str] = Counter()
        if reason := self._rejection(episode, raw):
            removed[reason] = len(episode)
            return None, removed
        keep = np.ones(len(episode), bool)
        for reason, mask in self._masks(episode):
            removed[reason] += int((keep & ~mask).sum())
            keep &= mask
        indices = np.flatnonzero(keep)
        if self.no_ops:
            indices = indices[moving_steps(episode.actions[indices])]
            removed["no_op"] = int(keep.sum()) - len(indices)
        removed = +removed
        if not removed:
            return episode, removed
        return (select_steps(episode, indices.tolist()) if len(indices) else None), removed

    def _rejection(self, episode: Episode, raw: RawEpisode) -> str | None:
        """Why the whole episode is left out, if it is."""
        if not self._succeeded(raw):
            return "failed"
        if self.include_robots and not _matches(self.include_robots, _metadata(raw, "robot_type", "include_robots")):
            return "robot"
        if self.unlabeled_episodes and not any(map(str.strip, episode.instructions)):
            return "unlabeled"
        return None

    def _succeeded(self, raw: RawEpisode) -> bool:
        if self.success_metadata and not bool(_metadata(raw, self.success_metadata, "success_metadata")):
            return False
        if not self.success_column:
            return True
        if self.success_column not in raw.columns:
            raise ValueError(
                f"{raw.dataset} has no column {self.success_column!r}, which the filter `success_column` names; "
                f"it has {sorted(raw.columns)}"
            )
        return bool(np.asarray(raw.columns[self.success_column][-1]).reshape(-1)[0] > 0)

    def _masks(self, episode: Episode) -> Iterator[tuple[str, np.ndarray]]:
        """Reasons to leave steps out, each with the steps that may stay, bool (T,)."""
        if self.unlabeled_steps:
            yield "unlabeled", np.array([bool(text.strip()) for text in episode.instructions])
        if self.include_tasks or self.exclude_tasks:
            wanted = {text: self._is_wanted(text) for text in set(episode.instructions)}
            yield "task", np.array([wanted[text] for text in episode.instructions])
        if self.zero_motion is not None:
            span = np.subtract(self.zero_motion["q99"], self.zero_motion["q01"]) + 1e-8
            yield (
                "zero_motion",
                (np.abs(2 * episode.actions[:, : len(span)] / span) > ZERO_MOTION_THRESHOLD).any(axis=1),
            )

    def _is_wanted(self, instruction: str) -> bool:
        included = not self.include_tasks or _matches(self.include_tasks, instruction)
        return included and not _matches(self.exclude_tasks, instruction)


def strings(value: Any, name: str) -> tuple[str, ...]:
    """A string, or a list of them, as a tuple."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"`{name}` is a string or a list of strings, got {value!r}")
    return tuple(values)


def _matches(patterns: Iterable[str], text: Any) -> bool:
    return any(re.search(pattern, str(text), re.IGNORECASE) for pattern in patterns)


def _metadata(raw: RawEpisode, key: str, filter_name: str) -> Any:
    if key not in raw.metadata:
        raise ValueError(
            f"the filter `{filter_name}` needs {key!r}, which {raw.dataset} does not say of its episodes; it says "
            f"{sorted(raw.metadata)}"
        )
    return raw.metadata[key]
