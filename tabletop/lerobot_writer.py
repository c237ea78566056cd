"""
Writes episodes of the tabletop as a LeRobot v3.0 dataset: its files, statistics and descriptions.

An episode is staged first, in files of its own that any process can write, and the dataset is assembled from all of
them. Pictures lie in the parquet files as PNG, or beside them as videos, which are joined without encoding them again.
"""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .environment import CONTROL_RATE
from .lerobot_statistics import image_histogram, image_statistics, vector_statistics


CAMERAS = {"observation.images.front": "image", "observation.images.wrist": "wrist_image"}
_ACTION = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
VECTORS = {
    "observation.state": ("x", "y", "z", "rx", "ry", "rz", "left_finger", "right_finger"),
    "action": _ACTION,  # what was executed
    "expert_action": _ACTION,  # what the expert would have done: to learn from
}
INDICES = ("frame_index", "episode_index", "index", "task_index")

CHUNK_SIZE = 1000  # files per folder
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200
_PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}"

# H.264 decodes everywhere. Every other frame is a key frame, as LeRobot has it, so that any frame decodes fast; no
# frame depends on later ones, so that packets come in the order of their times. With macroblock trees, the bytes of
# small pictures differ from time to time.
VIDEO_ENCODER = "libx264"
_VIDEO_CODEC, _PIXEL_FORMAT = "h264", "yuv420p"
_ENCODER_OPTIONS = {"crf": "18", "preset": "veryfast", "g": "2", "bf": "0", "mbtree": "0"}

_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


# One episode


def write_episode(path: Path, frames: list[dict], story: dict, video: bool) -> None:
    """
    Stage an episode; the parquet file appears last, and only when all is whole.

    Args:
        path (`Path`): The parquet file. Videos lie beside it.
        frames (`list[dict]`): Observations of the environment, each with the `action` (7,) that followed it, and the
            `expert_action` (7,) that the expert would have taken.
        story (`dict`): What is to be known about the episode, with `episode_index` and `instruction`.
        video (`bool`): Whether pictures are kept as videos.
    """
    columns = {}
    if video:
        for key, name in CAMERAS.items():
            _write_video(_video_path(path, key), [frame[name] for frame in frames])
    else:
        columns = {key: _encode_all(frame[name] for frame in frames) for key, name in CAMERAS.items()}
    columns["observation.state"] = [frame["state"] for frame in frames]
    columns |= {key: [frame[key] for frame in frames] for key in ("action", "expert_action")}
    histograms = {key: image_histogram(frame[name] for frame in frames).tolist() for key, name in CAMERAS.items()}
    notes = {"story": json.dumps(story), "histograms": json.dumps(histograms)}
    partial = _partial(path)
    pq.write_table(pa.table(columns, schema=_episode_schema(video).with_metadata(notes)), partial)
    os.replace(partial, path)


def _episode_schema(video: bool) -> pa.Schema:
    vectors = [(key, pa.list_(pa.float32(), len(names))) for key, names in VECTORS.items()]
    return pa.schema(vectors if video else [*((key, _PICTURE) for key in CAMERAS), *vectors])


def _video_path(path: Path, key: str) -> Path:
    """The video of one camera beside a staged episode."""
    return path.with_name(f"{path.stem}.{key}.mp4")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def _encode_all(pictures: Iterator[np.ndarray]) -> list[dict]:
    return [{"bytes": _encode(picture), "path": f"frame-{index:06d}.png"} for index, picture in enumerate(pictures)]


def _encode(picture: np.ndarray) -> bytes:
    """PNG of a uint8 picture (S, S, 3)."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _write_video(path: Path, pictures: list[np.ndarray]) -> None:
    """MP4 of uint8 pictures (S, S, 3)."""
    partial = _partial(path)
    with av.open(partial, "w", format="mp4") as container:
        stream = container.add_stream(VIDEO_ENCODER, rate=CONTROL_RATE, options=_ENCODER_OPTIONS)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = _PIXEL_FORMAT
        stream.codec_context.thread_count = 1  # the bytes would depend on it
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, path)


# The dataset


@dataclass
class _Episode:
    """One finished episode with its place in the dataset."""

    path: Path
    table: pa.Table
    story: dict
    histograms: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]

    def statistics(self) -> dict[str, dict]:
        return _statistics(self.histograms, self.numbers)


def _statistics(histograms: dict[str, np.ndarray], numbers: dict[str, np.ndarray]) -> dict[str, dict]:
    count = len(numbers["index"])
    return {
        **{key: image_statistics(histogram, count) for key, histogram in histograms.items()},
        **{key: vector_statistics(values) for key, values in numbers.items()},
    }


def _load_episode(path: Path, first: int, tasks: dict[str, int], video: bool) -> _Episode:
    """
    Read a staged episode and number its frames.

    Args:
        path (`Path`): Its parquet file.
        first (`int`): `index` of its first frame.
        tasks (`dict[str, int]`): Tasks seen so far; a new one is added.
        video (`bool`): Whether its pictures are videos.
    """
    table = pq.read_table(path)
    story = json.loads(table.schema.metadata[b"story"])
    count = len(table)
    task = tasks.setdefault(story["instruction"], len(tasks))
    numbers = {
        **{key: table[key].combine_chunks().flatten().to_numpy().reshape(count, -1) for key in VECTORS},
        "timestamp": (np.arange(count) / CONTROL_RATE).astype(np.float32),
        "frame_index": np.arange(count),
        "episode_index": np.full(count, story["episode_index"]),
        "index": np.arange(first, first + count),
        "task_index": np.full(count, task),
    }
    for key in ("timestamp", *INDICES):
        table = table.append_column(key, pa.array(numbers[key]))
    histograms = {key: np.array(value) for key, value in json.loads(table.schema.metadata[b"histograms"]).items()}
    return _Episode(path, table.replace_schema_metadata(_huggingface_metadata(video)), story, histograms, numbers)


@dataclass
class _Place:
    """
    The file that the next episode goes to; none is to grow beyond `limit` bytes.
    """

    limit: float
    number: int = -1
    size: int = 0

    def advance(self, size: int) -> bool:
        """Make room for an episode of `size` bytes; whether that takes a new file."""
        is_new = self.number < 0 or self.size + size > self.limit
        if is_new:
            self.number, self.size = self.number + 1, 0
        self.size += size
        return is_new

    @property
    def indices(self) -> dict[str, int]:
        return {"chunk_index": self.number // CHUNK_SIZE, "file_index": self.number % CHUNK_SIZE}

    def path(self, folder: Path, suffix: str) -> Path:
        path = folder / f"{_PATH.format(**self.indices)}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _DataFiles:
    """Parquet files of episodes, one row group each."""

    def __init__(self, folder: Path):
        self.folder, self.writer, self.place = folder, None, _Place(DATA_FILE_MB * 2**20)

    def write(self, episode: _Episode) -> dict[str, int]:
        """Append an episode; where it lies."""
        if self.place.advance(episode.path.stat().st_size):
            self.close()
            self.writer = pq.ParquetWriter(self.place.path(self.folder, "parquet"), episode.table.schema)
        self.writer.write_table(episode.table, row_group_size=len(episode.table))
        return {f"data/{name}": value for name, value in self.place.indices.items()}

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _VideoFiles:
    """Videos of one camera, several episodes each, whose encoded frames are copied."""

    def __init__(self, folder: Path, key: str):
        self.folder, self.key, self.container, self.place = folder, key, None, _Place(VIDEO_FILE_MB * 2**20)

    def write(self, episode: _Episode) -> dict[str, float]:
        """
        Append an episode; where it lies.

        Raises:
            RuntimeError: If it was encoded in another way than the episodes before it in the file.
        """
        path = _video_path(episode.path, self.key)
        with av.open(path) as source:
            stream = source.streams.video[0]
            header = stream.codec_context.extradata
            if self.place.advance(path.stat().st_size):
                self._open(stream)
            elif self.header != header:
                raise RuntimeError(f"{path} was encoded by another version of {VIDEO_ENCODER}; remove {path.parent}.")
            shift = int(Fraction(self.frames, CONTROL_RATE) / stream.time_base)
            # The last packet is empty: it would tell a decoder that no more come.
            for packet in (packet for packet in source.demux(stream) if packet.size):
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, self.stream
                self.container.mux(packet)
        start, self.frames = self.frames, self.frames + len(episode.table)
        return {
            **{f"videos/{self.key}/{name}": value for name, value in self.place.indices.items()},
            f"videos/{self.key}/from_timestamp": start / CONTROL_RATE,
            f"videos/{self.key}/to_timestamp": self.frames / CONTROL_RATE,
        }

    def _open(self, template: av.VideoStream) -> None:
        self.close()
        path = self.place.path(self.folder / self.key, "mp4")
        # The index comes first, so that a reader over a network needs no request for it.
        self.container = av.open(path, "w", format="mp4", options={"movflags": "faststart"})
        self.stream, self.header = self.container.add_stream_from_template(template), template.codec_context.extradata
        self.frames = 0

    def close(self) -> None:
        if self.container is not None:
            self.container.close()


def assemble(paths: list[Path], folder: Path, image_size: int, video: bool) -> None:
    """
    Write the dataset.

    Args:
        paths (`list[Path]`): Parquet files of the staged episodes, in order.
        folder (`Path`): Of the dataset.
        image_size (`int`): Side of the pictures in pixels.
        video (`bool`): Whether pictures are kept as videos, as the episodes were staged.
    """
    files = [_DataFiles(folder / "data"), *(_VideoFiles(folder / "videos", key) for key in CAMERAS if video)]
    tasks, rows, stories, first = {}, [], [], 0
    histograms, numbers = dict.fromkeys(CAMERAS, 0), {}
    for path in paths:
        episode = _load_episode(path, first, tasks, video)
        places = [file.write(episode) for file in files]
        rows.append(_episode_row(episode, places, first))
        stories.append(json.dumps(episode.story) + "\n")
        first += len(episode.table)
        histograms = {key: value + episode.histograms[key] for key, value in histograms.items()}
        for key, value in episode.numbers.items():
            numbers.setdefault(key, []).append(value)
    for file in files:
        file.close()
    statistics = _statistics(histograms, {key: np.concatenate(values) for key, values in numbers.items()})
    totals = {"total_episodes": len(paths), "total_frames": first, "total_tasks": len(tasks)}
    meta = folder / "meta"
    _write_rows(rows, meta / "episodes" / f"{_PATH.format(chunk_index=0, file_index=0)}.parquet")
    _write_tasks(tasks, meta / "tasks.parquet")
    (meta / "tabletop.jsonl").write_text("".join(stories), encoding="utf-8")
    (meta / "stats.json").write_text(json.dumps(statistics, indent=4), encoding="utf-8")
    (meta / "info.json").write_text(json.dumps(_info(totals, image_size, video), indent=4), encoding="utf-8")


def _episode_row(episode: _Episode, places: list[dict], first: int) -> dict:
    """Its row in `meta/episodes`; `places` are those of its table and, if there are any, its videos."""
    statistics = episode.statistics()
    data, *videos = places
    return {
        "episode_index": episode.story["episode_index"],
        "tasks": [episode.story["instruction"]],
        "length": len(episode.table),
        **data,
        "dataset_from_index": first,
        "dataset_to_index": first + len(episode.table),
        **{name: value for place in videos for name, value in place.items()},
        **{f"stats/{key}/{name}": value for key, stats in statistics.items() for name, value in stats.items()},
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def _write_rows(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _write_tasks(tasks: dict[str, int], path: Path) -> None:
    """The tasks as pandas stores a frame whose index is the text."""
    column = {"metadata": None, "numpy_type": "int64", "pandas_type": "int64"}
    text = {"metadata": None, "numpy_type": "str", "pandas_type": "object"}
    axis = {"metadata": {"encoding": "UTF-8"}, "numpy_type": "str", "pandas_type": "unicode"}
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [{"name": None, "field_name": None, **axis}],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **column},
            {"name": None, "field_name": "__index_level_0__", **text},
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "3.1.1",
    }
    schema = pa.schema([("task_index", pa.int64()), ("__index_level_0__", pa.large_string())])
    values = {"task_index": list(tasks.values()), "__index_level_0__": list(tasks)}
    pq.write_table(pa.table(values, schema=schema.with_metadata({"pandas": json.dumps(pandas)})), path)


def _info(totals: dict[str, int], image_size: int, video: bool) -> dict:
    """`meta/info.json`."""
    return {
        "codebase_version": "v3.0",
        "robot_type": "tabletop",
        **totals,
        "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": DATA_FILE_MB,
        "video_files_size_in_mb": VIDEO_FILE_MB,
        "fps": CONTROL_RATE,
        "splits": {"train": f"0:{totals['total_episodes']}"},
        "data_path": f"data/{_PATH}.parquet",
        "video_path": f"videos/{{video_key}}/{_PATH}.mp4" if video else None,
        "features": {
            **{key: _picture_feature(image_size, video) for key in CAMERAS},
            **{
                key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
                for key, names in VECTORS.items()
            },
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **{key: {"dtype": "int64", "shape": [1], "names": None} for key in INDICES},
        },
    }


def _picture_feature(image_size: int, video: bool) -> dict:
    feature = {
        "dtype": "video" if video else "image",
        "shape": [image_size, image_size, 3],
        "names": ["height", "width", "channels"],
    }
    if video:
        feature["info"] = {
            "video.height": image_size,
            "video.width": image_size,
            "video.codec": _VIDEO_CODEC,
            "video.pix_fmt": _PIXEL_FORMAT,
            "video.is_depth_map": False,
            "video.fps": CONTROL_RATE,
            "video.channels": 3,
            "has_audio": False,
        }
    return feature


def _huggingface_metadata(video: bool) -> dict[str, str]:
    """What tells the library `datasets` the types of the columns."""
    number = {"dtype": "float32", "_type": "Value"}
    features = {
        **({} if video else {key: {"_type": "Image"} for key in CAMERAS}),
        **{key: {"feature": number, "length": len(names), "_type": "List"} for key, names in VECTORS.items()},
        "timestamp": number,
        **{key: {"dtype": "int64", "_type": "Value"} for key in INDICES},
    }
    return {"huggingface": json.dumps({"info": {"features": features}})}
