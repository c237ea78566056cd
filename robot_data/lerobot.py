"""LeRobot datasets, formats v3.0, v2.1 and v2.0, with pictures in parquet files or in videos."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .episode import BadEpisodeError, RawEpisode, check_unit, choose_keys
from .files import Files, Handles, reporting_damage
from .video import VideoFrames, VideoReader


VERSIONS = ("v3.0", "v2.1", "v2.0")
# Reading one episode may take this many times its rows before whole files are read instead.
MAX_EXCESS = 2.0


# Arrow columns


def column_values(column: pa.ChunkedArray) -> np.ndarray:
    """
    An Arrow column as one array.

    Args:
        column (`pa.ChunkedArray`): Numbers, strings, or lists of numbers nested to any depth.

    Returns:
        `np.ndarray`: (T, ...); `object` for strings and for lists of different lengths.

    Raises:
        ValueError: If a number or a list is null.
    """
    if not column.num_chunks:
        return np.zeros(0, dtype=object)
    return _array_values(pa.concat_arrays(column.chunks) if column.num_chunks > 1 else column.chunk(0))


def named_values(table: pa.Table, key: str) -> np.ndarray:
    """[`column_values`] of one column of a table, whose name an error says."""
    try:
        return column_values(table[key])
    except ValueError as error:
        raise ValueError(f"{key!r}: {error}") from error


def _array_values(array: pa.Array) -> np.ndarray:
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list and not (pa.types.is_primitive(kind) and not pa.types.is_temporal(kind)):
        return np.fromiter(array.to_pylist(), dtype=object, count=len(array))
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} values are null")
    if not is_list:
        return array.to_numpy(zero_copy_only=False)
    lengths = pc.list_value_length(array).to_numpy()
    flat = _array_values(array.flatten())
    if len(lengths) and (lengths == lengths[0]).all():
        return flat.reshape(len(lengths), lengths[0], *flat.shape[1:])
    parts = np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
    return np.fromiter(parts, dtype=object, count=len(parts))


class Pictures(Sequence[bytes]):
    """
    Encoded pictures in an Arrow column; each is copied out, or read from its own file, when it is asked for.

    Args:
        column (`pa.ChunkedArray`): Bytes, or structs of `bytes` and `path`.
        read_file (`Callable[[str], bytes]`): Reads the file at such a path.
        dataset (`str`), file (`str`), episode (`int`): For messages.
    """

    def __init__(
        self, column: pa.ChunkedArray, read_file: Callable[[str], bytes], dataset: str, file: str, episode: int
    ):
        is_struct = pa.types.is_struct(column.type)
        self._bytes = pc.struct_field(column, "bytes") if is_struct else column
        self._paths = pc.struct_field(column, "path") if is_struct else None
        self._read_file, self._where = read_file, (dataset, file, episode)

    def __len__(self) -> int:
        return len(self._bytes)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} pictures, got the index {index}.")
        index %= len(self)
        data = self._bytes[index].as_py()
        return data if data is not None else self._read_elsewhere(index)

    def _read_elsewhere(self, index: int) -> bytes:
        path = self._paths[index].as_py() if self._paths is not None else None
        if path is None:
            raise BadEpisodeError(f"picture {index} has neither bytes nor a path.", *self._where)
        try:
            return self._read_file(path)
        except FileNotFoundError as error:
            reason = f"picture {index} is not in the file, and there is no {path!r} either."
            raise BadEpisodeError(reason, *self._where) from error


class _ParquetFile(pq.ParquetFile):
    """A data file. Its row groups are found by the dataset's running `index` of their first rows."""

    def close(self, force: bool = True) -> None:
        super().close(force=force)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Rows of each row group, int64 (G,)."""
        return np.array([self.metadata.row_group(group).num_rows for group in range(self.num_row_groups)], np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """`index` of each row group's first row, int64 (G,); by the footer, or counted from the file's first row."""
        place = self.metadata.schema.names.index("index")
        columns = [self.metadata.row_group(group).column(place) for group in range(self.num_row_groups)]
        if all(column.statistics is not None and column.statistics.has_min_max for column in columns):
            return np.array([column.statistics.min for column in columns], np.int64)
        first = self.read_row_group(0, ["index"])["index"][0].as_py()
        return first + np.cumsum(self.sizes) - self.sizes

    def find(self, start: int, stop: int) -> tuple[range, int]:
        """
        Where a span of the dataset's rows lies.

        Args:
            start (`int`), stop (`int`): `index` of the first row, and of the one after the last.

        Returns:
            `tuple[range, int]`: The row groups, and how far into them the span begins.

        Raises:
            ValueError: If they are not in this file.
        """
        first, last = (int(np.searchsorted(self.starts, row, side="right")) - 1 for row in (start, stop - 1))
        if stop <= start or first < 0 or start >= self.starts[first] + self.sizes[first]:
            ends = (self.starts[0], self.starts[-1] + self.sizes[-1] - 1) if len(self.sizes) else (None, None)
            raise ValueError(
                f"its rows, {start} to {stop - 1} of the dataset, are not in the file, {ends[0]} to {ends[1]}"
            )
        return range(first, last + 1), start - int(self.starts[first])


# Meta data


def _read_info(files: Files) -> dict[str, Any]:
    info = files.read_json("meta/info.json")
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(
            f"{files.url('meta/info.json')} has codebase_version {version!r}; expected one of {VERSIONS}."
        )
    if missing := [key for key in ("fps", "features", "data_path") if key not in info]:
        raise ValueError(f"{files.url('meta/info.json')} lacks {missing}.")
    return info


def _read_json_lines(files: Files, name: str) -> pa.Table:
    try:
        return pa.Table.from_pylist([json.loads(line) for line in files.read(name).splitlines() if line.strip()])
    except ValueError as error:
        raise ValueError(f"{files.url(name)} is not valid JSON lines: {error}.") from error


def _read_table(files: Files, name: str, keep: Any = lambda column: True) -> pa.Table:
    """The top-level columns of a parquet file whose names `keep` takes."""
    if not files.exists(name):
        raise FileNotFoundError(f"{files.url(name)} is missing.")
    try:
        with files.open(name) as handle:
            file = pq.ParquetFile(handle, pre_buffer=True)
            columns = [column for column in file.schema_arrow.names if keep(column)]
            return file.read(columns).select(columns).replace_schema_metadata()
    except pa.ArrowException as error:
        raise ValueError(f"{files.url(name)} is not a readable parquet file: {error}") from error


def _read_tasks(files: Files, is_v3: bool) -> dict[int, str]:
    """The tasks' texts by their index."""
    table = _read_table(files, "meta/tasks.parquet") if is_v3 else _read_json_lines(files, "meta/tasks.jsonl")
    # The text is an index of pandas and has the name that its writer gave it, or none.
    texts = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not texts or "task_index" not in table.column_names:
        raise ValueError(
            f"The tasks in {files.url('meta')} must have `task_index` and `task`, got {table.column_names}."
        )
    return dict(zip(table["task_index"].to_pylist(), table[texts[0]].to_pylist(), strict=True))


def _read_episodes(files: Files, is_v3: bool) -> pa.Table:
    """One row per episode, in the order of their index."""
    if is_v3:
        folder = "meta/episodes"
        names = [
            f"{folder}/{chunk}/{name}" for chunk in files.names(folder) for name in files.names(f"{folder}/{chunk}")
        ]
        names = [name for name in names if name.endswith(".parquet")]
        if not names:
            raise FileNotFoundError(f"{files.url(folder)} is missing or holds no parquet file.")
        # Statistics are most of these files.
        tables = [
            _read_table(files, name, lambda column: not column.startswith("stats/") and column != "tasks")
            for name in names
        ]
        table = pa.concat_tables(tables, promote_options="permissive")
        wanted = ["data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index"]
    else:
        table, wanted = _read_json_lines(files, "meta/episodes.jsonl"), []
    if missing := sorted({"episode_index", "length", *wanted} - set(table.column_names)):
        raise ValueError(f"The episodes in {files.url('meta')} lack the columns {missing}.")
    return table.sort_by("episode_index").combine_chunks()


def _in_split(info: dict[str, Any], location: str, split: str | None, episodes: np.ndarray) -> np.ndarray:
    """Which of the episodes belong to a split, bool (N,)."""
    splits = info.get("splits") or {}
    if split == "all" or (split in (None, "train") and not splits):
        return np.ones(len(episodes), dtype=bool)
    if (split or "train") not in splits:
        raise ValueError(f"{location} has no split {split or 'train'!r}; it has {[*splits, 'all']}.")
    first, _, end = str(splits[split or "train"]).partition(":")
    if not (first.isdigit() and end.isdigit()):
        raise ValueError(f"{location} gives the split as {splits[split or 'train']!r}; expected 'first:end'.")
    return (episodes >= int(first)) & (episodes < int(end))


# The dataset


class LeRobotSource:
    """
    A LeRobot dataset. A unit is one episode; where the parquet files are cut so that one episode cannot be read
    without many others, a unit is one file.

    Columns go by their own names, `observation.state`. Pictures in parquet stay encoded, videos give frames. Depth
    videos are left out.

    Args:
        files (`Files`): The dataset's folder.
        name (`str`): Name of the dataset.
        split (`str`, *optional*): One of info.json, `train` by default; `all` for all episodes.

    Raises:
        FileNotFoundError: If a file under meta/ is missing.
        ValueError: If they do not describe a dataset in a known format, or not this split.
    """

    def __init__(self, files: Files, name: str, split: str | None = None):
        self.name, self._files = name, files
        self._info = _read_info(files)
        self._is_v3 = self._info["codebase_version"].startswith("v3")
        self._tasks = _read_tasks(files, self._is_v3)
        episodes = _read_episodes(files, self._is_v3)
        chosen = _in_split(self._info, files.location, split, episodes["episode_index"].to_numpy())
        self._episodes = episodes.filter(pa.array(chosen)).combine_chunks()
        if not len(self._episodes):
            raise ValueError(f"{files.location} has no episodes in the split {split or 'train'!r}.")
        self._cameras = {
            key: feature["dtype"]
            for key, feature in self._info["features"].items()
            if feature["dtype"] in ("image", "video") and not _is_depth(feature)
        }
        self._check_videos()
        self._videos = VideoReader(name, files)
        self._parquet = Handles(self._open_parquet)
        self._units = self._plan_units()

    def _check_videos(self) -> None:
        videos = [key for key, kind in self._cameras.items() if kind == "video"]
        if videos and not self._info.get("video_path"):
            raise ValueError(f"{self._files.url('meta/info.json')} has the videos {videos} and no `video_path`.")
        wanted = [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index", "from_timestamp")]
        if self._is_v3 and (missing := sorted(set(wanted) - set(self._episodes.column_names))):
            raise ValueError(f"{self._files.url('meta/episodes')} lacks the columns {missing}.")

    def _open_parquet(self, name: str) -> _ParquetFile:
        return _ParquetFile(self._files.open(name), pre_buffer=True)

    @property
    def num_units(self) -> int:
        return len(self._units)

    @property
    def num_episodes(self) -> int:
        return len(self._episodes)

    @property
    def num_steps(self) -> int:
        return pc.sum(self._episodes["length"]).as_py()

    @property
    def columns(self) -> list[str]:
        """Keys of the numbers and strings."""
        return [key for key, feature in self._info["features"].items() if feature["dtype"] not in ("image", "video")]

    @property
    def images(self) -> list[str]:
        """Keys of the cameras."""
        return list(self._cameras)

    # Where things lie

    def _row(self, number: int) -> dict[str, Any]:
        return self._episodes.slice(number, 1).to_pylist()[0]

    def _place(self, row: dict[str, Any], template: str, kind: str) -> str:
        """Name of the file that holds an episode's `data` or its `videos/<key>`."""
        if self._is_v3:
            place = {name: row[f"{kind}/{name}"] for name in ("chunk_index", "file_index")}
            if None in place.values():
                raise ValueError(f"the meta data do not say which file holds its {kind}")
        else:
            index = row["episode_index"]
            place = {"episode_chunk": index // self._info.get("chunks_size", 1000), "episode_index": index}
        return template.format(**place, video_key=kind.partition("/")[2])

    def _plan_units(self) -> list[list[int]]:
        """The rows of `_episodes` in each unit."""
        if not self._is_v3:
            return [[number] for number in range(len(self._episodes))]
        places = zip(*(self._episodes[f"data/{name}_index"].to_pylist() for name in ("chunk", "file")), strict=True)
        files: dict[tuple[int, int], list[int]] = {}
        for number, place in enumerate(places):
            files.setdefault(place, []).append(number)
        if self._reads_single_episodes(list(files.values())):
            return [[number] for number in range(len(self._episodes))]
        return list(files.values())

    def _reads_single_episodes(self, files: list[list[int]]) -> bool:
        """
        Whether an episode can be read without many others, judged by the first file that can tell.

        One footer stands for all: reading thousands of them takes minutes on a remote file system.
        """
        for numbers in files:
            if len(numbers) > 1 and (excess := self._measure_excess([self._row(number) for number in numbers])):
                return excess <= MAX_EXCESS
        return True

    def _measure_excess(self, rows: list[dict[str, Any]]) -> float | None:
        """How many rows are read for each one that is wanted, episode by episode; None if the file cannot tell."""
        taken = wanted = 0
        # What is wrong with a file or an episode comes up when it is read.
        with suppress(BadEpisodeError), reporting_damage(self.name, self._files.location), ExitStack() as stack:
            file = stack.enter_context(self._parquet.borrow(self._place(rows[0], self._info["data_path"], "data")))
            for row in rows:
                with suppress(ValueError):
                    groups, _ = file.find(row["dataset_from_index"], row["dataset_to_index"])
                    taken += int(file.sizes[groups.start : groups.stop].sum())
                    wanted += row["length"]
        return taken / wanted if wanted else None

    # Reading

    def read(
        self, unit: int, columns: Sequence[str] | None = None, images: Sequence[str] | None = None
    ) -> Iterator[RawEpisode]:
        """See [`Source.read`]."""
        check_unit(self, unit)
        columns = choose_keys(self, "columns", columns, self.columns)
        images = choose_keys(self, "pictures", images, self.images)
        return self._read(self._units[unit], columns, images)

    def _read(self, numbers: list[int], columns: list[str], images: list[str]) -> Iterator[RawEpisode]:
        stored = [key for key in images if self._cameras[key] == "image"]
        times = ["timestamp"] if len(stored) < len(images) else []
        needed = list(dict.fromkeys([*columns, *stored, *times, "episode_index", "task_index"]))
        groups: dict[int, pa.Table] = {}

        def read(number: int) -> RawEpisode:
            row = self._row(number)
            with reporting_damage(self.name, self._files.url("meta"), row["episode_index"]):
                name = self._place(row, self._info["data_path"], "data")
            with (
                reporting_damage(self.name, self._files.url(name), row["episode_index"]),
                self._parquet.borrow(name) as file,
            ):
                table = self._read_rows(file, row, needed, groups)
                return self._make_episode(row, table, self._files.url(name), columns, images)

        return map(read, numbers)  # which goes on after an error, as a generator would not

    def _read_rows(
        self, file: _ParquetFile, row: dict[str, Any], columns: list[str], groups: dict[int, pa.Table]
    ) -> pa.Table:
        """An episode's rows. `groups` holds the row groups of the episode before, then of this one."""
        if missing := sorted(set(columns) - set(file.schema_arrow.names)):
            raise ValueError(f"the file has no columns {missing}; it has {file.schema_arrow.names}")
        span, offset = range(file.num_row_groups), 0
        if self._is_v3:
            length = row["dataset_to_index"] - row["dataset_from_index"]
            if length != row["length"]:
                raise ValueError(f"its indices in the meta data span {length} rows, its length is {row['length']}")
            span, offset = file.find(row["dataset_from_index"], row["dataset_to_index"])
        for group in [group for group in groups if group not in span]:
            del groups[group]
        for group in span:
            if group not in groups:
                groups[group] = file.read_row_group(group, columns, use_threads=False).select(columns)
        table = pa.concat_tables([groups[group] for group in span])
        if self._is_v3:
            table = table.slice(offset, length)
        if len(table) != row["length"] or row["length"] < 1:
            raise ValueError(f"the file holds {len(table)} rows of it, the meta data say {row['length']}")
        others = np.unique(column_values(table["episode_index"]))
        if others.tolist() != [row["episode_index"]]:
            raise ValueError(f"its rows belong to the episodes {others.tolist()}")
        return table

    def _make_episode(
        self, row: dict[str, Any], table: pa.Table, file: str, columns: list[str], images: list[str]
    ) -> RawEpisode:
        index = row["episode_index"]
        return RawEpisode(
            dataset=self.name,
            file=file,
            index=index,
            columns={key: named_values(table, key) for key in columns},
            instructions=self._find_instructions(table),
            images={
                key: Pictures(table[key], self._files.read, self.name, file, index)
                if self._cameras[key] == "image"
                else self._open_video(row, key, column_values(table["timestamp"]))
                for key in images
            },
            metadata={key: self._info.get(key) for key in ("robot_type", "fps")},
        )

    def _find_instructions(self, table: pa.Table) -> list[str]:
        numbers = column_values(table["task_index"]).tolist()
        if unknown := sorted(set(numbers) - set(self._tasks)):
            raise ValueError(f"it has the tasks {unknown}, which {self._files.url('meta')} does not name")
        return [self._tasks[number] for number in numbers]

    def _open_video(self, row: dict[str, Any], key: str, timestamps: np.ndarray) -> VideoFrames:
        kind = f"videos/{key}"
        name = self._place(row, self._info["video_path"], kind)
        start = row[f"{kind}/from_timestamp"] if self._is_v3 else 0.0
        times = start + timestamps.astype(np.float64)  # (T,)
        return VideoFrames(self._videos, name, times, self._info["fps"], row["episode_index"])


def _is_depth(feature: dict[str, Any]) -> bool:
    details = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(details.get("is_depth_map") or details.get("video.is_depth_map"))
