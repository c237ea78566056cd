"""From the data arguments to datasets, their statistics, the stream of training, and the steps to validate on."""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from robot_data.augmentation import Augmentation
from robot_data.collation import Collator, camera_roles
from robot_data.episode import Episode, RawEpisode, Source, Step, check_unit
from robot_data.filters import Filters
from robot_data.mixture import Part, open_mixture, open_part, probabilities
from robot_data.reading import iter_episodes
from robot_data.sources import JoinedSource, open_source
from robot_data.standardize import DatasetConfig, config_for
from robot_data.stream import StepStream

from .arguments import DataArguments, read_yaml


# At most this part of a dataset is held out.
HELD_OUT_FRACTION = 0.1


@dataclass(frozen=True)
class Selection:
    """
    Some units of a source, as a source.

    Args:
        source (`Source`): All of it.
        units (`tuple[int]`): Which of its units.
        first_only (`bool`, defaults to `False`): Of each unit only the first episode.
    """

    source: Source
    units: tuple[int, ...]
    first_only: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def columns(self) -> list[str]:
        return self.source.columns

    @property
    def images(self) -> list[str]:
        return self.source.images

    @property
    def num_units(self) -> int:
        return len(self.units)

    @property
    def num_episodes(self) -> None:
        """None: units may hold several."""

    @property
    def num_steps(self) -> None:
        """None: known of the whole dataset alone."""

    def read(
        self, unit: int, columns: Sequence[str] | None = None, images: Sequence[str] | None = None
    ) -> Iterator[RawEpisode]:
        """See [`Source.read`]."""
        check_unit(self, unit)
        episodes = self.source.read(self.units[unit], columns, images)
        return itertools.islice(episodes, 1) if self.first_only else episodes


def open_parts(arguments: DataArguments, num_images: int = 1) -> list[Part]:
    """
    The datasets that were asked for, with the descriptions by which they are read.

    Args:
        arguments ([`DataArguments`]): `dataset` or `mixture`, and what describes them.
        num_images (`int`, defaults to 1): Pictures that the policy looks at.

    Raises:
        FileNotFoundError: If a dataset or file is missing.
        ValueError: If a mixture is unknown, a dataset is empty or does not fit its description, or the cameras are not
            as many as the pictures.
    """
    cameras = choose_cameras(arguments.camera, num_images)
    entries = read_yaml(arguments.dataset_configs) if arguments.dataset_configs else {}
    if arguments.mixture is None:
        parts = _open_datasets(arguments, entries)
        if unknown := sorted(set(entries) - {part.source.name for part in parts}):
            raise ValueError(f"{arguments.dataset_configs} describes {unknown}, which are not trained on.")
    elif arguments.data_root is None:
        raise ValueError("--mixture needs --data_root, the folder with one folder per dataset.")
    else:
        parts = open_mixture(arguments.mixture, arguments.data_root, entries=entries)
    return [replace(part, config=_restrict(part, cameras, arguments)) for part in parts]


def choose_cameras(asked: Sequence[str] | None, num_images: int) -> tuple[str, ...]:
    """
    Roles of the pictures that the policy looks at, in its order.

    Raises:
        ValueError: If others are asked for than so many.
    """
    cameras = camera_roles(num_images) if asked is None else tuple(asked)
    if len(cameras) != num_images:
        raise ValueError(
            f"The policy looks at {num_images} image(s) (`num_images`), and --camera names {len(cameras)}: "
            f"{', '.join(cameras)}."
        )
    return cameras


def _open_datasets(arguments: DataArguments, entries: dict[str, Any]) -> list[Part]:
    """Those of `--dataset`, each by itself, or under `--unnorm_key` as one."""
    located, name = [split_weight(text) for text in arguments.dataset], arguments.unnorm_key
    if name is None:
        return [open_part(location, weight=weight, entries=entries) for location, weight in located]
    if any(weight != 1.0 for _, weight in located):
        raise ValueError("--unnorm_key makes one dataset of all, in which every step counts alike: leave out =weight.")
    source = JoinedSource([open_source(location, name=name) for location, _ in located])
    return [Part(source, config_for(name, source.columns, source.images, entries.get(name)))]


def _restrict(part: Part, cameras: tuple[str, ...], arguments: DataArguments) -> DatasetConfig:
    """A dataset's description, with the cameras and the steps that are trained on."""
    known = part.config.cameras
    for camera in cameras:
        if camera not in known:
            raise ValueError(f"{part.source.name} has no camera {camera!r}; it has {dict(known)}.")
    filters = _filters(part.config.filters, arguments)
    return replace(part.config, cameras={camera: known[camera] for camera in cameras}, filters=filters)


def _filters(filters: Filters, arguments: DataArguments) -> Filters:
    """A dataset's filters, with those of the command line; steps without an instruction teach nothing."""
    names = ("include_tasks", "exclude_tasks")
    given = {name: tuple(value) for name in names if (value := getattr(arguments, name)) is not None}
    return replace(filters, unlabeled_steps=True, **given)


def split_weight(text: str) -> tuple[str, float]:
    """Place and weight of a dataset that is given as `PLACE` or `PLACE=WEIGHT`."""
    location, _, weight = text.rpartition("=")
    try:
        return (location, float(weight)) if location else (text, 1.0)
    except ValueError:  # the sign belongs to the path
        return text, 1.0


def measure_widths(parts: Sequence[Part], known: dict[str, dict]) -> tuple[int, int | None]:
    """
    Numbers in the widest action and, if every dataset has one, in the widest state.

    Args:
        parts (`Sequence[Part]`): Measured by their first episodes.
        known (`dict[str, dict]`): Statistics of datasets that the policy knows beside them.
    """
    episodes = [_first_episode(part) for part in parts]
    sizes = {
        name: [len(statistics[name]["q01"]) for statistics in known.values() if name in statistics]
        for name in ("action", "proprio")
    }
    action_dim = max([episode.actions.shape[1] for episode in episodes] + sizes["action"])
    if any(episode.states is None for episode in episodes):
        return action_dim, None
    return action_dim, max([episode.states.shape[1] for episode in episodes] + sizes["proprio"])


def _first_episode(part: Part) -> Episode:
    try:
        return next(iter_episodes(part.source, replace(part.config, cameras={})))
    except StopIteration:
        raise ValueError(f"The filters leave nothing of {part.source.name}.") from None


# Statistics


def read_statistics(path: str | Path, names: Sequence[str]) -> dict[str, dict]:
    """
    Statistics of some datasets from a `dataset_statistics.json`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has none of a dataset.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no {path} with statistics.")
    statistics = json.loads(Path(path).read_text(encoding="utf-8"))
    if missing := [name for name in names if name not in statistics]:
        raise ValueError(f"{path} has no statistics of {missing}; it has {sorted(statistics)}.")
    return {name: statistics[name] for name in names}


# Chunks to fit a FAST tokenizer on


def sample_chunks(
    parts: Sequence[Part],
    statistics: dict[str, dict],
    arguments: DataArguments,
    *,
    chunk_size: int,
    limit: int,
    seed: int,
) -> tuple[np.ndarray, list[str]]:
    """
    Chunks of the training episodes, at every step and at the end with its last action repeated, as they are learned.

    Each dataset gives as many of them as it comes up in training, from its episodes in a drawn order. No picture is
    read.

    Args:
        parts (`Sequence[Part]`): From [`open_parts`].
        statistics (`dict[str, dict]`): By dataset name.
        arguments ([`DataArguments`]): How they are divided and balanced.
        chunk_size (`int`): Actions of each, K.
        limit (`int`): Chunks at most, N.
        seed (`int`): Of the order, and of which episodes are held out, as in [`make_data`].

    Returns:
        `tuple`: Actions (N, K, D) in the units of their datasets, and the dataset of each.
    """
    parts = [replace(part, num_steps=_num_steps(statistics, part)) for part in parts]
    sampled, names = [], []
    for part, share in zip(parts, probabilities(parts, arguments.balance), strict=True):
        episodes = _shuffled_episodes(part, arguments, seed)
        chunks = (chunk for episode in episodes for chunk in episode.chunks(np.arange(len(episode)), chunk_size)[0])
        rows = list(itertools.islice(chunks, max(int(share * limit), 1)))
        sampled += rows
        names += [part.source.name] * len(rows)
    return np.stack(sampled), names


def _shuffled_episodes(part: Part, arguments: DataArguments, seed: int) -> Iterator[Episode]:
    """The actions of the training episodes, units of them in a drawn order."""
    selection, _ = _divide(part, arguments, seed)
    order = np.random.default_rng([seed, selection.num_units]).permutation(selection.num_units).tolist()
    shuffled = replace(selection, units=tuple(selection.units[unit] for unit in order))
    config = replace(part.config, cameras={}, state=())
    return iter_episodes(shuffled, config, skip_bad_episodes=arguments.skip_bad_episodes)


# Training and validation


@dataclass(frozen=True)
class TrainingData:
    """
    What training and validation are made of.

    Args:
        stream ([`StepStream`]): Of this process, for training.
        held_out (`list[Step]`): To validate on; empty for no validation.
        curves (`list[Episode]`): One of the held-out episodes of each dataset, to be drawn.
        num_steps (`int`): In one pass over all datasets.
        collator ([`Collator`]): For training, with augmentation.
        plain_collator ([`Collator`]): For validation, without.
    """

    stream: StepStream
    held_out: list[Step]
    curves: list[Episode]
    num_steps: int
    collator: Collator
    plain_collator: Collator


def make_data(
    parts: Sequence[Part],
    statistics: dict[str, dict],
    processor: Any,
    arguments: DataArguments,
    *,
    seed: int,
    rank: int,
    world_size: int,
) -> TrainingData:
    """
    Divide the datasets into training and validation.

    Args:
        parts (`Sequence[Part]`): From [`open_parts`].
        statistics (`dict[str, dict]`): By dataset name.
        processor: Of the policy, with these statistics. It tells the length of the chunks, how many pictures there
            are, and whether the state is read. Its centre crop is made to fit the augmentation.
        arguments ([`DataArguments`]): What to do with them.
        seed (`int`): Of the order of the steps, and of which episodes are held out.
        rank (`int`), world_size (`int`): Number of this process, and how many there are.

    Raises:
        ValueError: If the policy takes the state, and a dataset's description has none.
    """
    parts = [_with_state(part, processor.use_proprio) for part in parts]
    divided = [_divide(part, arguments, seed) for part in parts]
    training = [
        replace(part, source=source, num_steps=_num_steps(statistics, part))
        for part, (source, _) in zip(parts, divided, strict=True)
    ]
    validation = [
        replace(part, source=source)
        for part, (_, source) in zip(parts, divided, strict=True)
        if source.num_units and arguments.validation_episodes
    ]
    augmentation = None
    if arguments.image_augmentation != "none":
        augmentation = Augmentation(mode=arguments.image_augmentation)
        processor.image_processor.center_crop_area = augmentation.crop_area
    episodes = [_read(part, arguments) for part in validation]
    for group in episodes:
        _check_width(group[0], statistics)
    cameras = choose_cameras(arguments.camera, processor.num_images)
    plain = Collator(processor, cameras, predict_stop_token=arguments.predict_stop_token)
    chunk_size = processor.chunk_size
    return TrainingData(
        stream=StepStream(
            training,
            seed=seed,
            buffer_steps=arguments.shuffle_buffer,
            chunk_size=chunk_size,
            balance=arguments.balance,
            skip_bad_episodes=arguments.skip_bad_episodes,
            rank=rank,
            world_size=world_size,
        ),
        held_out=[step for group in episodes for step in _sample(group, arguments.validation_steps, chunk_size)],
        curves=[group[0] for group in episodes],
        num_steps=sum(part.num_steps for part in training),
        collator=replace(plain, augmentation=augmentation),
        plain_collator=plain,
    )


def _with_state(part: Part, use_proprio: bool) -> Part:
    if use_proprio and not part.config.state:
        raise ValueError(
            f"The policy takes the robot's state (`use_proprio`), and {part.source.name} has none: say which columns "
            "it is with `state` in the dataset's description (--dataset_configs)."
        )
    return part if use_proprio else replace(part, config=replace(part.config, state=()))


def _num_steps(statistics: dict[str, dict], part: Part) -> int:
    # Statistics of published checkpoints, and of datasets that were written by hand, may not count.
    name = part.source.name
    if (count := statistics[name].get("num_transitions") or part.source.num_steps) is None:
        raise ValueError(
            f"Neither the files of {name} nor its statistics say how many steps there are: add `num_transitions` to "
            "the statistics."
        )
    return count


def _divide(part: Part, arguments: DataArguments, seed: int) -> tuple[Selection, Selection]:
    """What to train on, and what to validate on."""
    source = part.source
    if arguments.overfit_one_episode:
        return Selection(source, (0,), first_only=True), Selection(source, (0,), first_only=True)
    count = min(arguments.validation_episodes, int(HELD_OUT_FRACTION * source.num_units))
    order = np.random.default_rng([seed, source.num_units]).permutation(source.num_units).tolist()
    return Selection(source, tuple(sorted(order[count:]))), Selection(source, tuple(sorted(order[:count])))


def _read(part: Part, arguments: DataArguments) -> list[Episode]:
    episodes = list(iter_episodes(part.source, part.config, skip_bad_episodes=arguments.skip_bad_episodes))
    if not episodes:
        raise ValueError(
            f"The filters leave nothing of the held-out episodes of {part.source.name}: hold out more of them with "
            "--validation_episodes, or 0 for no validation."
        )
    return episodes


def _check_width(episode: Episode, statistics: dict[str, dict]) -> None:
    expected, found = len(statistics[episode.dataset]["action"]["q01"]), episode.actions.shape[1]
    if found != expected:
        raise ValueError(
            f"The actions of {episode.dataset} have {found} dimensions, its statistics {expected}: they belong to "
            "another dataset or description."
        )


def _sample(episodes: list[Episode], limit: int, chunk_size: int) -> list[Step]:
    """So many steps of some episodes, evenly spread."""
    frames = [(episode, frame) for episode in episodes for frame in range(len(episode))]
    indices = np.linspace(0, len(frames) - 1, min(limit, len(frames))).round().astype(int)
    return [_make_step(*frames[index], chunk_size) for index in indices]


def _make_step(episode: Episode, frame: int, chunk_size: int) -> Step:
    (chunk,), (is_pad,) = episode.chunks(np.array([frame]), chunk_size)  # (1, K, D), (1, K)
    return Step(
        images={role: pictures[frame] for role, pictures in episode.images.items()},
        instruction=episode.instructions[frame],
        action=chunk,
        action_is_pad=is_pad,
        state=None if episode.states is None else episode.states[frame],
        dataset=episode.dataset,
        episode=episode.index,
        frame=frame,
    )


@dataclass(frozen=True)
class NamedBatch:
    """
    A collator whose batches say which steps they are made of, for messages.

    Args:
        collator ([`Collator`]): Makes the batch.
    """

    collator: Collator

    def __call__(self, steps: list[Step]) -> dict[str, Any]:
        names = [f"{step.dataset} episode {step.episode} frame {step.frame}" for step in steps]
        return {**self.collator(steps), "names": names}
