"""
Open-loop check: what a policy predicts on the frames of a dataset, beside what was recorded there.

It tells within minutes whether a model has learned its data at all. It does not replace a rollout: small errors add up
in closed loop, and a large one may be another good way to the goal.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from robot_data.collation import camera_roles
from robot_data.episode import DIMENSIONS, Episode, dimension_names
from robot_data.pictures import decode
from robot_data.sources import open_source
from robot_data.standardize import config_for, required_columns, required_images, standardize


NUM_CURVES = 2  # episodes that are predicted whole, to be drawn


class Predictor(Protocol):
    """What is checked: a [`ModelPolicy`], or a floor to compare it with."""

    def predict(
        self, instructions: list[str], images: list[list[np.ndarray]], states: list[np.ndarray] | None
    ) -> np.ndarray:
        """Actions (B, D) for a batch of observations, of each row the pictures of all cameras."""


class RandomPredictor:
    """
    Uniform between the smallest and the largest recorded value of each dimension.

    Args:
        episodes (`list[Comparison]`): The recorded ones.
        seed (`int`): Of the draws.
    """

    def __init__(self, episodes: list["Comparison"], seed: int):
        actions = np.concatenate([episode.recorded for episode in episodes])  # (N, D)
        self.low, self.high, self.rng = actions.min(axis=0), actions.max(axis=0), np.random.default_rng(seed)

    def predict(
        self, instructions: list[str], images: list[list[np.ndarray]], states: list[np.ndarray] | None
    ) -> np.ndarray:
        return self.rng.uniform(self.low, self.high, (len(instructions), len(self.low)))


@dataclass
class Comparison:
    """
    An episode's recorded actions beside the predicted ones.

    Args:
        unit (`int`), index (`int`): Where the dataset has it, and its number there.
        instructions (`list[str]`): One per step.
        recorded (`np.ndarray`): (T, D).
        is_sampled (`np.ndarray`): bool (T,), the frames that the figures are made of.
        is_drawn (`bool`): Whether every frame is predicted, for a curve.
        predicted (`np.ndarray`): float64 (T, D), NaN where nothing was predicted.
    """

    unit: int
    index: int
    instructions: list[str]
    recorded: np.ndarray
    is_sampled: np.ndarray = field(init=False)
    is_drawn: bool = False
    predicted: np.ndarray = field(init=False)

    def __post_init__(self):
        self.is_sampled = np.zeros(len(self.recorded), bool)
        self.predicted = np.full(self.recorded.shape, np.nan)

    @property
    def is_told(self) -> np.ndarray:
        """bool (T,): the frames with an instruction; a policy cannot be asked about the others."""
        return np.array([bool(instruction.strip()) for instruction in self.instructions])

    @property
    def is_wanted(self) -> np.ndarray:
        """bool (T,): the frames to predict."""
        return self.is_told if self.is_drawn else self.is_sampled

    @property
    def previous(self) -> np.ndarray:
        """(T, D), the action before each; NaN at the start."""
        return np.concatenate([np.full_like(self.recorded[:1], np.nan), self.recorded[:-1]])


class RecordedFrames:
    """
    A dataset in the form that a policy is asked in.

    Args:
        dataset (`str`): As [`open_source`] takes it.
        cameras (`Sequence[str]`, *optional*): Keys of the pictures that the policy sees, in its order; by default the
            dataset's main one and behind it those at the wrists.
        num_images (`int`, defaults to 1): How many the policy sees.
        use_proprio (`bool`, defaults to `False`): Whether it takes the state.

    Raises:
        ValueError: If there is no such dataset or camera, nothing in it, or no state; or if other cameras are named
            than so many.
    """

    def __init__(
        self, dataset: str, cameras: Sequence[str] | None = None, num_images: int = 1, use_proprio: bool = False
    ):
        self.source = open_source(dataset)
        if not self.source.num_units:
            raise ValueError(f"{self.source.name} has no episodes.")
        self.roles = camera_roles(num_images)
        if cameras is not None and len(cameras) != num_images:
            raise ValueError(f"The policy looks at {num_images} image(s) (`num_images`), got the cameras {cameras}.")
        entry: dict[str, Any] = {
            "cameras": self.roles if cameras is None else dict(zip(self.roles, cameras, strict=True))
        }
        if not use_proprio:
            entry["state"] = None
        self.config = config_for(self.source.name, self.source.columns, self.source.images, entry)
        if use_proprio and not self.config.state:
            raise ValueError(f"The policy takes the robot's state (`use_proprio`), and {self.source.name} has none.")

    @property
    def cameras(self) -> list[str]:
        """Keys of the pictures that the policy sees; where a role has several, each episode has one of them."""
        return [key for role in self.roles for key in self.config.cameras[role]]

    def episodes(self, limit: int | None = None) -> list[Comparison]:
        """The first episodes, all by default; pictures are not touched."""
        found: list[Comparison] = []
        for unit in range(self.source.num_units):
            read = self._read(unit, pictures=False)
            found += [Comparison(unit, each.index, each.instructions, each.actions) for each in read]
            if limit is not None and len(found) >= limit:
                break
        return found[:limit]

    def frames(
        self, episodes: list[Comparison]
    ) -> Iterator[tuple[Comparison, int, list[np.ndarray], np.ndarray | None]]:
        """The wanted frames of the episodes: episode, step, pictures as uint8 (H, W, 3), and state (S,) or None."""
        wanted = {(episode.unit, episode.index): episode for episode in episodes if episode.is_wanted.any()}
        for unit in dict.fromkeys(unit for unit, _ in wanted):
            for read in self._read(unit, pictures=True):
                if episode := wanted.get((unit, read.index)):
                    for step in np.flatnonzero(episode.is_wanted).tolist():
                        pictures = [decode(read.images[role][step]) for role in self.roles]
                        yield episode, step, pictures, None if read.states is None else read.states[step]

    def _read(self, unit: int, pictures: bool) -> Iterator[Episode]:
        config = self.config if pictures else replace(self.config, cameras={})
        for raw in self.source.read(unit, required_columns(config), required_images(config)):
            yield standardize(raw, config)


def sample(episodes: list[Comparison], frames: int) -> None:
    """
    Mark `frames` frames, evenly spread over all, or all where there are fewer; and the episodes to draw.

    Raises:
        ValueError: If no frame has an instruction.
    """
    told = [(episode, step) for episode in episodes for step in np.flatnonzero(episode.is_told)]
    if not told:
        raise ValueError("No frame of the dataset has an instruction: a policy cannot be asked about any.")
    for index in _spread(len(told), frames):
        episode, step = told[index]
        episode.is_sampled[step] = True
    for index in _spread(len(episodes), NUM_CURVES):
        episodes[index].is_drawn = True


def _spread(size: int, number: int) -> np.ndarray:
    """At most so many of the indices below `size`, evenly spread from the first to the last."""
    return np.linspace(0, size - 1, min(number, size)).round().astype(int)


def predict(
    predictor: Predictor,
    dataset: RecordedFrames,
    episodes: list[Comparison],
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> None:
    """
    Fill in what the policy predicts on the wanted frames.

    Args:
        predictor (`Predictor`): The policy.
        dataset (`RecordedFrames`): Where the pictures are.
        episodes (`list[Comparison]`): Of that dataset, sampled.
        batch_size (`int`): Frames per call of the policy.
        on_batch (`Callable[[int], None]`, *optional*): Called after each batch with its number of frames.

    Raises:
        ValueError: If the policy's actions are not of the dataset's dimension.
    """
    frames = dataset.frames(episodes)
    while batch := [frame for _, frame in zip(range(batch_size), frames, strict=False)]:
        actions = predictor.predict(
            [episode.instructions[step] for episode, step, _, _ in batch],
            [pictures for _, _, pictures, _ in batch],
            [state for _, _, _, state in batch] if dataset.config.state else None,
        )
        for (episode, step, _, _), action in zip(batch, actions, strict=True):
            if action.shape != episode.recorded[step].shape:
                raise ValueError(
                    f"The policy's actions have {len(action)} dimensions, and the recorded ones "
                    f"{len(episode.recorded[step])}; compare it with a dataset of its own robot."
                )
            episode.predicted[step] = action
        if on_batch is not None:
            on_batch(len(batch))


def measure(episodes: list[Comparison], bins: Callable[[np.ndarray], np.ndarray] | None = None) -> dict[str, Any]:
    """
    Numbers of the comparison, over the sampled frames.

    Args:
        episodes (`list[Comparison]`): With predictions.
        bins (`Callable`, *optional*): Interval of each action (N, D), as [`ModelPolicy.bins`] gives it.

    Returns:
        `dict`: `episodes` and `frames` (how many); `dimensions`, by name: `mae`, `rmse` (in the dataset's units),
        `correlation` (None where either never changes), `same_bin` and `within_one_bin` (shares of the frames; None
        without `bins`), and the MAE of two baselines, `mean_action_mae` (always the mean of all recorded actions) and
        `previous_action_mae` (the recorded action before, over the frames that have one); `gripper_accuracy`: share
        of frames where both are on the same side of 0.5, of `policy`, `mean_action` and `previous_action`, or None
        for other robots than arms with 7 dimensions.
    """
    recorded, predicted, previous = (
        np.concatenate([getattr(episode, name)[episode.is_sampled] for episode in episodes]).astype(np.float64)
        for name in ("recorded", "predicted", "previous")
    )  # (N, D) each
    mean = np.concatenate([episode.recorded for episode in episodes]).mean(axis=0, dtype=np.float64)  # (D,)
    error, has_previous = predicted - recorded, ~np.isnan(previous[:, 0])
    columns = {
        "mae": np.abs(error).mean(axis=0),
        "rmse": np.sqrt((error**2).mean(axis=0)),
        "correlation": [_correlation(*pair) for pair in zip(predicted.T, recorded.T, strict=True)],
        **_bin_shares(predicted, recorded, bins),
        "mean_action_mae": np.abs(mean - recorded).mean(axis=0),
        "previous_action_mae": _mean(np.abs(previous - recorded)[has_previous]),
    }
    names = dimension_names(recorded.shape[1])
    is_open = recorded[:, -1] > 0.5
    right = {
        "policy": is_open == (predicted[:, -1] > 0.5),
        "mean_action": is_open == (mean[-1] > 0.5),
        "previous_action": (is_open == (previous[:, -1] > 0.5))[has_previous],
    }
    return {
        "episodes": len(episodes),
        "frames": len(recorded),
        "dimensions": {
            name: {column: _number(values[index]) for column, values in columns.items()}
            for index, name in enumerate(names)
        },
        "gripper_accuracy": {name: _number(_mean(frames[:, None])[0]) for name, frames in right.items()}
        if names == DIMENSIONS
        else None,
    }


def _bin_shares(
    predicted: np.ndarray, recorded: np.ndarray, bins: Callable[[np.ndarray], np.ndarray] | None
) -> dict[str, Any]:
    if bins is None:
        return dict.fromkeys(("same_bin", "within_one_bin"), [None] * recorded.shape[1])
    distance = np.abs(bins(predicted) - bins(recorded))
    return {"same_bin": (distance == 0).mean(axis=0), "within_one_bin": (distance <= 1).mean(axis=0)}


def _correlation(predicted: np.ndarray, recorded: np.ndarray) -> float | None:
    if np.ptp(predicted) == 0 or np.ptp(recorded) == 0:
        return None
    return np.corrcoef(predicted, recorded)[0, 1]


def _mean(values: np.ndarray) -> np.ndarray | list[None]:
    """(N, D) -> (D,), None where there is nothing."""
    return values.mean(axis=0) if len(values) else [None] * values.shape[1]


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
