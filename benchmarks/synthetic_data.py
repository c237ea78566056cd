"""Robot datasets of any size, made up: LeRobot v3.0 with pictures in parquet or as video, and RLDS."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from robot_data.pictures import encode_jpeg


CAMERA = "observation.images.front"
COLUMNS = {"action": 7, "observation.state": 8}
FPS = 10
TASK = "pick up the red cube"


def pictures(count: int, side: int) -> Iterator[np.ndarray]:
    """uint8 (S, S, 3) each: smooth shapes that move, and a camera's noise; about 25 KB as JPEG at 256 pixels."""
    y, x = np.mgrid[:side, :side] / side
    noise = np.random.default_rng(0).normal(0, 4, (4, side, side, 3))
    for index in range(count):
        waves = [np.sin(9 * x + 0.05 * index + channel) * np.cos(7 * y + 0.03 * index) for channel in range(3)]
        yield np.clip(np.stack(waves, axis=-1) * 90 + 128 + noise[index % 4], 0, 255).astype(np.uint8)


def write_lerobot(folder: Path, episodes: int, length: int, side: int | None = None, video: bool = False) -> Path:
    """
    A LeRobot v3.0 dataset, one row group per episode.

    Args:
        folder (`Path`): Must not exist.
        episodes (`int`), length (`int`): Number of episodes, and of steps in each.
        side (`int`, *optional*): Of the pictures in pixels; none at all without.
        video (`bool`, defaults to `False`): Pictures as H.264, rather than as JPEG in the parquet file.
    """
    frames = [] if side is None else list(pictures(length, side))
    encoded = [] if video else [{"bytes": encode_jpeg(frame), "path": None} for frame in frames]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            *((name, pa.list_(pa.float32(), width)) for name, width in COLUMNS.items()),
            *([(CAMERA, picture)] if encoded else []),
            ("timestamp", pa.float32()),
            *((name, pa.int64()) for name in ("frame_index", "episode_index", "index", "task_index")),
        ]
    )
    path = folder / "data/chunk-000/file-000.parquet"
    path.parent.mkdir(parents=True)
    with pq.ParquetWriter(path, schema) as writer:
        for episode in range(episodes):
            values = _columns(episode, length) | ({CAMERA: encoded} if encoded else {})
            writer.write_table(pa.table(values, schema=schema), row_group_size=length)
    if video:
        _write_video(folder / f"videos/{CAMERA}/chunk-000/file-000.mp4", frames, episodes)
    _write_meta(folder, episodes, length, side, video)
    return folder


def _columns(episode: int, length: int) -> dict[str, list | np.ndarray]:
    rng, steps = np.random.default_rng(episode), np.arange(length)
    return {
        **{name: list(rng.normal(size=(length, width)).astype(np.float32)) for name, width in COLUMNS.items()},
        "timestamp": (steps / FPS).astype(np.float32),
        "frame_index": steps,
        "episode_index": np.full(length, episode),
        "index": episode * length + steps,
        "task_index": np.zeros(length, np.int64),
    }


def _write_video(path: Path, frames: list[np.ndarray], episodes: int) -> None:
    """The frames once for each episode, with a key frame at every second picture, as LeRobot has them."""
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2", "crf": "23", "preset": "veryfast"})
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuv420p"
        for frame in frames * episodes:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_meta(folder: Path, episodes: int, length: int, side: int | None, video: bool) -> None:
    template = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    camera = {
        "dtype": "video" if video else "image",
        "shape": [side, side, 3],
        "names": ["height", "width", "channels"],
    }
    info = {
        "codebase_version": "v3.0",
        "fps": FPS,
        "total_episodes": episodes,
        "total_frames": episodes * length,
        "total_tasks": 1,
        "splits": {"train": f"0:{episodes}"},
        "data_path": f"data/{template}.parquet",
        "video_path": f"videos/{{video_key}}/{template}.mp4" if video else None,
        "features": {
            **{name: {"dtype": "float32", "shape": [width], "names": None} for name, width in COLUMNS.items()},
            **({} if side is None else {CAMERA: camera}),
        },
    }
    rows = {
        "episode_index": np.arange(episodes),
        "length": np.full(episodes, length),
        "dataset_from_index": np.arange(episodes) * length,
        "dataset_to_index": np.arange(1, episodes + 1) * length,
        "tasks": [[TASK]] * episodes,
        **{f"data/{name}_index": np.zeros(episodes, np.int64) for name in ("chunk", "file")},
    }
    if video:
        starts = np.arange(episodes) * length / FPS
        rows |= {f"videos/{CAMERA}/{name}_index": np.zeros(episodes, np.int64) for name in ("chunk", "file")}
        rows |= {f"videos/{CAMERA}/from_timestamp": starts, f"videos/{CAMERA}/to_timestamp": starts + length / FPS}
    meta = folder / "meta"
    (meta / "episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(rows), meta / "episodes/chunk-000/file-000.parquet")
    pq.write_table(pa.table({"task_index": [0], "task": [TASK]}), meta / "tasks.parquet")
    (meta / "info.json").write_text(json.dumps(info), encoding="utf-8")


def write_rlds(folder: Path, episodes: int, length: int, side: int, shards: int = 4) -> Path:
    """An RLDS dataset in LIBERO's form, with one camera as JPEG."""
    folder.mkdir(parents=True)
    encoded = [encode_jpeg(frame) for frame in pictures(length, side)]
    counts = [len(part) for part in np.array_split(np.arange(episodes), shards)]
    episode = 0
    for shard, count in enumerate(counts):
        with open(folder / f"{folder.name}-train.tfrecord-{shard:05d}-of-{shards:05d}", "wb") as file:
            for _ in range(count):
                columns = _columns(episode, length)
                file.write(_record(_example(encoded, columns["action"], columns["observation.state"])))
                episode += 1
    steps = {
        "action": _tensor(7),
        "observation": _group(image={"image": {"shape": {"dimensions": ["-1", "-1", "3"]}}}, state=_tensor(8)),
        "language_instruction": {"text": {}},
    }
    features = _group(steps={"sequence": {"feature": _group(**steps), "length": "-1"}})
    info = {
        "name": folder.name,
        "fileFormat": "tfrecord",
        "splits": [{"name": "train", "shardLengths": [str(count) for count in counts]}],
    }
    (folder / "features.json").write_text(json.dumps(features), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def _tensor(width: int) -> dict:
    return {"tensor": {"dtype": "float32", "shape": {"dimensions": [str(width)]}, "encoding": "none"}}


def _group(**features: dict) -> dict:
    return {"featuresDict": {"features": features}}


def _example(encoded: list[bytes], actions: list[np.ndarray], states: list[np.ndarray]) -> bytes:
    """A `tf.train.Example`: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/feature.proto"""
    texts = [TASK.encode()] * len(encoded)
    values = {
        "steps/observation/image": _message(1, b"".join(_message(1, item) for item in encoded)),
        "steps/language_instruction": _message(1, b"".join(_message(1, item) for item in texts)),
        "steps/action": _message(2, _message(1, np.stack(actions).astype("<f4").tobytes())),
        "steps/observation/state": _message(2, _message(1, np.stack(states).astype("<f4").tobytes())),
    }
    entries = [_message(1, _message(1, key.encode()) + _message(2, value)) for key, value in values.items()]
    return _message(1, b"".join(entries))


def _message(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer."""
    length, digits = len(content), []
    while length >= 0x80:
        digits.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2, *digits, length]) + content


def _record(data: bytes) -> bytes:
    """A record of a TFRecord file, with its checksums."""
    length = struct.pack("<Q", len(data))
    return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
    value = google_crc32c.value(data)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF)
