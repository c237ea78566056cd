"""Opens robot data of any kind: a dataset's files, a table of the `datasets` library, episodes made in Python."""

import bisect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from PIL import Image

from .episode import BadEpisodeError, RawEpisode, Source, check_unit, choose_keys
from .files import Files, recognize, reporting_damage
from .lerobot import LeRobotSource, Pictures, column_values, named_values
from .rlds import RLDSSource


# Where an instruction is looked for if nothing is said: LeRobot's name for it, then that of RLDS.
INSTRUCTION_KEYS = ("task", "language_instruction")
ROWS_AT_ONCE = 256


def open_source(
    data: Any,
    *,
    name: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    instruction_key: str | None = None,
) -> Source:
    """
    Open robot data.

    Args:
        data: Where a LeRobot or RLDS dataset lies: a local folder, an id on the Hub (`owner/name`,
            `owner/name@revision`) or a URL that fsspec knows. Or a `datasets.Dataset` or `datasets.IterableDataset`
            of steps (see [`RowsSource`]). Or episodes: a sequence of them, or a function that makes an iterator over
            them (see [`EpisodesSource`]).
        name (`str`, *optional*): Name of the dataset. By default its own, where it has one.
        split (`str`, *optional*): Split of a stored dataset, `train` by default; `all` for all of them.
        revision (`str`, *optional*): Branch, tag or commit of a dataset on the Hub.
        token (`str`, *optional*): For the file system; by default the one that is logged in.
        instruction_key (`str`, *optional*): Where the instruction stands. LeRobot datasets fix it; elsewhere `task`
            or `language_instruction` by default.

    Raises:
        FileNotFoundError: If there is no dataset, or one of its descriptions is missing.
        ValueError: If it is in no known format, or an argument does not fit it.
    """
    if isinstance(data, str | os.PathLike):
        return _open_files(Files(data, revision, token), name, split, instruction_key)
    if given := [
        key for key, value in (("split", split), ("revision", revision), ("token", token)) if value is not None
    ]:
        raise ValueError(f"{given} are for datasets in files; got a {type(data).__name__}.")
    if isinstance(data, datasets.Dataset | datasets.IterableDataset):
        return RowsSource(data, name, instruction_key)
    return EpisodesSource(data, name, instruction_key)


def _open_files(files: Files, name: str | None, split: str | None, instruction_key: str | None) -> Source:
    kind, folder = recognize(files)
    if kind == "rlds":
        return RLDSSource(folder, name, split, instruction_key)
    if instruction_key is not None:
        raise ValueError(
            f"{files.location} is a LeRobot dataset, whose instruction is its task: no `instruction_key`."
        )
    return LeRobotSource(folder, name or files.name, split)


class _KeysOfFirst:
    """Columns and cameras of a source that learns them from its first episode."""

    @property
    def columns(self) -> list[str]:
        """Keys of the numbers and strings."""
        return self._keys[0]

    @property
    def images(self) -> list[str]:
        """Keys of the cameras."""
        return self._keys[1]

    @cached_property
    def _keys(self) -> tuple[list[str], list[str]]:
        first = next(self.read(0), None) if self.num_units else None
        if first is None:
            raise ValueError(f"{self.name} has no episodes.")
        return list(first.columns), list(first.images)


class RowsSource(_KeysOfFirst):
    """
    Steps in a table of the `datasets` library, each with its `episode_index`; an episode's steps follow each other.

    A unit is one episode of a `Dataset`, one shard of an `IterableDataset`. No episode may lie in two shards.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Columns of encoded pictures (the `Image` feature,
            or bytes), numbers and strings.
        name (`str`, *optional*): `rows` by default.
        instruction_key (`str`, *optional*): Column of the instruction. By default `task` or `language_instruction`,
            whichever is a string; without one instructions are empty.

    Raises:
        ValueError: If a `Dataset` has no `episode_index`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        name: str | None = None,
        instruction_key: str | None = None,
    ):
        self.name = name or "rows"
        self._dataset, self._instruction_key = dataset.with_format("arrow"), instruction_key
        self._starts: np.ndarray | None = None
        if isinstance(dataset, datasets.Dataset):
            if "episode_index" not in dataset.column_names:
                raise ValueError(f"Steps need the column `episode_index`; {self.name} has {dataset.column_names}.")
            episodes = column_values(self._dataset.select_columns("episode_index")[:]["episode_index"])
            changes = np.flatnonzero(np.diff(episodes)) + 1
            self._starts = np.concatenate([[0], changes, [len(episodes)]] if len(episodes) else [[0]])

    @property
    def num_units(self) -> int:
        return self._dataset.num_shards if self._starts is None else len(self._starts) - 1

    @property
    def num_episodes(self) -> int | None:
        return None if self._starts is None else self.num_units

    @property
    def num_steps(self) -> int | None:
        return None if self._starts is None else int(self._starts[-1])

    def read(
        self, unit: int, columns: Sequence[str] | None = None, images: Sequence[str] | None = None
    ) -> Iterator[RawEpisode]:
        """See [`Source.read`]."""
        check_unit(self, unit)
        return self._read(unit, columns, images)

    def _read(self, unit: int, columns: Sequence[str] | None, images: Sequence[str] | None) -> Iterator[RawEpisode]:
        dataset, known = self._dataset, self._dataset.column_names
        if known is not None and columns is not None and images is not None:
            wanted = {*columns, *images, *INSTRUCTION_KEYS, self._instruction_key, "episode_index", "frame_index"}
            dataset = dataset.select_columns([key for key in known if key in wanted])
        if self._starts is not None:
            tables = [dataset[int(self._starts[unit]) : int(self._starts[unit + 1])]]
        else:
            tables = _split_episodes(dataset.shard(self.num_units, unit).iter(ROWS_AT_ONCE), self.name)
        return map(partial(self._make_episode, columns=columns, images=images), tables)

    def _make_episode(
        self, table: pa.Table, columns: Sequence[str] | None, images: Sequence[str] | None
    ) -> RawEpisode:
        index = table["episode_index"][0].as_py()
        if "frame_index" in table.column_names and table["frame_index"][0].as_py() != 0:
            reason = f"starts with frame {table['frame_index'][0]}: its steps do not follow each other."
            raise BadEpisodeError(reason, self.name, self.name, index)
        pictures = [field.name for field in table.schema if _holds_pictures(field.type)]
        columns = choose_keys(self, "columns", columns, [key for key in table.column_names if key not in pictures])
        images = choose_keys(self, "pictures", images, pictures)
        instructions = self._find_instructions(table)
        with reporting_damage(self.name, self.name, index):
            values = {key: named_values(table, key) for key in columns}
        return RawEpisode(
            dataset=self.name,
            file=self.name,
            index=index,
            columns=values,
            instructions=instructions,
            images={key: Pictures(table[key], _read_path, self.name, self.name, index) for key in images},
        )

    def _find_instructions(self, table: pa.Table) -> list[str]:
        strings = [field.name for field in table.schema if pa.types.is_string(field.type)]
        key = _choose_instruction(self.name, self._instruction_key, strings)
        return [""] * len(table) if key is None else [text or "" for text in table[key].to_pylist()]


def _split_episodes(batches: Iterable[pa.Table], name: str) -> Iterator[pa.Table]:
    """The rows of each episode in turn."""
    parts: list[pa.Table] = []
    for batch in batches:
        if "episode_index" not in batch.column_names:
            raise ValueError(f"Steps need the column `episode_index`; {name} has {batch.column_names}.")
        episodes = column_values(batch["episode_index"])
        changes = (np.flatnonzero(np.diff(episodes)) + 1).tolist()
        for start, stop in itertools.pairwise([0, *changes, len(batch)]):
            if parts and parts[-1]["episode_index"][0].as_py() != episodes[start]:
                yield pa.concat_tables(parts, promote_options="permissive")
                parts = []
            parts.append(batch.slice(start, stop - start))
    if parts:
        yield pa.concat_tables(parts, promote_options="permissive")


def _holds_pictures(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.ExtensionType):
        return False
    if pa.types.is_struct(kind):
        return {field.name for field in kind} == {"bytes", "path"}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _read_path(path: str) -> bytes:
    with fsspec.open(path, "rb") as file:
        return file.read()


class EpisodesSource(_KeysOfFirst):
    """
    Episodes made in Python: mappings from keys to values.

    A value is a picture per step (encoded bytes, PIL images, or uint8 (H, W, 3), also as one array (T, H, W, 3)),
    an array of numbers (T, ...), a list of T strings, or one string or number that holds for the whole episode.

    A unit is one item of a sequence. What a function makes is one unit, made anew each time it is read.

    Args:
        episodes (`Sequence[Mapping]` or `Callable[[], Iterable[Mapping]]`): The episodes.
        name (`str`, *optional*): `episodes` by default.
        instruction_key (`str`, *optional*): Key of the instruction, one or T strings. By default `task` or
            `language_instruction`; without one instructions are empty.

    Raises:
        ValueError: If `episodes` is of another kind.
    """

    def __init__(
        self,
        episodes: Sequence[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]],
        name: str | None = None,
        instruction_key: str | None = None,
    ):
        if not isinstance(episodes, Sequence) and not callable(episodes):
            raise ValueError(
                "Expected a path, a Hub id, a URL, a table of `datasets`, a sequence of episodes or a function that "
                f"makes an iterator over them, got {type(episodes).__name__}. An iterator can be read only once: give "
                "the function that makes it."
            )
        self.name, self._episodes, self._instruction_key = name or "episodes", episodes, instruction_key

    @property
    def num_units(self) -> int:
        return 1 if callable(self._episodes) else len(self._episodes)

    @property
    def num_episodes(self) -> int | None:
        return None if callable(self._episodes) else len(self._episodes)

    @property
    def num_steps(self) -> None:
        """None: only the episodes themselves know."""

    def read(
        self, unit: int, columns: Sequence[str] | None = None, images: Sequence[str] | None = None
    ) -> Iterator[RawEpisode]:
        """See [`Source.read`]."""
        check_unit(self, unit)
        numbered = enumerate(self._episodes()) if callable(self._episodes) else [(unit, self._episodes[unit])]
        return itertools.starmap(partial(self._make_episode, columns=columns, images=images), numbered)

    def _make_episode(
        self, index: int, values: Mapping[str, Any], columns: Sequence[str] | None, images: Sequence[str] | None
    ) -> RawEpisode:
        per_step = {key: value for key, value in values.items() if _is_per_step(value)}
        lengths = {key: len(value) for key, value in per_step.items()}
        if len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise BadEpisodeError(
                f"the values are not one per step: their lengths are {lengths}.", *self._where(index)
            )
        pictures = [key for key, value in per_step.items() if _is_picture(value[0])]
        columns = choose_keys(self, "columns", columns, [key for key in per_step if key not in pictures])
        images = choose_keys(self, "pictures", images, pictures)
        return RawEpisode(
            dataset=self.name,
            file=self.name,
            index=index,
            columns={key: _as_column(per_step[key]) for key in columns},
            instructions=self._find_instructions(values, next(iter(lengths.values()))),
            images={key: _as_pictures(per_step[key]) for key in images},
            metadata={key: value for key, value in values.items() if key not in per_step},
        )

    def _find_instructions(self, values: Mapping[str, Any], count: int) -> list[str]:
        firsts = {key: value[0] if _is_per_step(value) else value for key, value in values.items()}
        strings = [key for key, first in firsts.items() if isinstance(first, str)]
        key = _choose_instruction(self.name, self._instruction_key, strings)
        text = "" if key is None else values[key]
        return [text] * count if isinstance(text, str) else [str(item) for item in text]

    def _where(self, index: int) -> tuple[str, str, int]:
        return self.name, self.name, index


def _is_per_step(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, str | bytes | Mapping) and getattr(value, "ndim", 1) > 0


def _is_picture(value: Any) -> bool:
    is_array = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3
    return is_array or isinstance(value, bytes | Image.Image)


def _as_pictures(value: Sequence[Any]) -> Sequence[Any]:
    if isinstance(value[0], Image.Image):
        return [np.asarray(picture.convert("RGB")) for picture in value]
    return value


def _as_column(value: Any) -> np.ndarray:
    column = np.asarray(value)
    return column.astype(object) if column.dtype.kind in "US" else column


def _choose_instruction(name: str, key: str | None, strings: list[str]) -> str | None:
    if key is not None and key not in strings:
        raise ValueError(f"{name} has no string {key!r} for an instruction; it has {strings}.")
    return key or next((key for key in INSTRUCTION_KEYS if key in strings), None)


class JoinedSource:
    """
    Several datasets of one robot as one: with one description, one set of statistics, and each step as likely as any
    other.

    Args:
        sources (`Sequence[Source]`): Opened by one name.

    Raises:
        ValueError: If they differ in name, columns or cameras.
    """

    def __init__(self, sources: Sequence[Source]):
        self.name = sources[0].name
        forms = [(source.name, sorted(source.columns), sorted(source.images)) for source in sources]
        if different := [form for form in forms if form != forms[0]]:
            raise ValueError(
                "Datasets that are to be one must be alike in name, columns and cameras; got "
                f"{forms[0]} and {different[0]}."
            )
        self._sources = tuple(sources)

    @property
    def num_units(self) -> int:
        return sum(source.num_units for source in self._sources)

    @property
    def columns(self) -> list[str]:
        return self._sources[0].columns

    @property
    def images(self) -> list[str]:
        return self._sources[0].images

    @property
    def num_steps(self) -> int | None:
        return _total(source.num_steps for source in self._sources)

    @property
    def num_episodes(self) -> int | None:
        return _total(source.num_episodes for source in self._sources)

    def read(
        self, unit: int, columns: Sequence[str] | None = None, images: Sequence[str] | None = None
    ) -> Iterator[RawEpisode]:
        """See [`Source.read`]. An episode's `index` is that within its own dataset; `file` tells which."""
        check_unit(self, unit)
        ends = list(itertools.accumulate(source.num_units for source in self._sources))
        number = bisect.bisect_right(ends, unit)
        return self._sources[number].read(unit - [0, *ends][number], columns, images)


def _total(counts: Iterable[int | None]) -> int | None:
    counts = list(counts)
    return None if None in counts else sum(counts)
