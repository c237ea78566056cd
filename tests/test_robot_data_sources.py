"""Reading LeRobot and RLDS datasets, and tables and episodes of one's own: equal to the truth, lazy, and loud."""

import hashlib
import io
import json
import multiprocessing
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import datasets
import fsspec
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES, REPOSITORY
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from robot_data.episode import BadEpisodeError, RawEpisode
from robot_data.files import OPEN_FILES, Files, Handles
from robot_data.reading import read_raw
from robot_data.sources import JoinedSource, open_source
from robot_data.tfrecord import masked_crc32c, parse_example, scan_records
from tabletop.record import Recording, record


LEROBOT, RLDS = FIXTURES / "lerobot", FIXTURES / "rlds"
LIBERO = RLDS / "mini_libero_no_noops" / "1.0.0"
META, DATA = "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"
LENGTHS = [12, 25, 17, 20, 14]
FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def read_all(source, **wanted) -> list[RawEpisode]:
    return [episode for unit in range(source.num_units) for episode in source.read(unit, **wanted)]


def readable(source) -> dict[int, str | None]:
    """Of each unit, what is wrong with it."""
    outcomes = {}
    for unit in range(source.num_units):
        try:
            for episode in source.read(unit):
                for pictures in episode.images.values():
                    list(pictures)
            outcomes[unit] = None
        except BadEpisodeError as error:
            outcomes[unit] = str(error)
    return outcomes


def copy_dataset(folder: Path, destination: Path) -> Path:
    return Path(shutil.copytree(folder, destination / folder.name))


def edit_parquet(path: Path, change: Callable[[pa.Table], pa.Table], row_groups: list[int] | None = None) -> None:
    """Change a table, in one row group or in those of the given lengths."""
    table = change(pq.read_table(path))
    with pq.ParquetWriter(path, table.schema) as writer:
        start = 0
        for size in row_groups or [len(table)]:
            writer.write_table(table.slice(start, size), row_group_size=max(size, 1))
            start += size


def set_value(table: pa.Table, column: str, row: int, value) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    place = table.column_names.index(column)
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))


def set_span(table: pa.Table, row: int, start: int, stop: int) -> pa.Table:
    return set_value(set_value(table, "dataset_from_index", row, start), "dataset_to_index", row, stop)


# Equal to the truth


def frame_number(picture: np.ndarray) -> int:
    """The number that the strip of ten black and white cells at the top of a fixture's picture spells."""
    height, width = picture.shape[:2]
    cells = [
        picture[1 : max(8, height // 8) - 1, cell * width // 10 + 1 : (cell + 1) * width // 10 - 1]
        for cell in range(10)
    ]
    return sum(int(cell.mean() > 127.5) << bit for bit, cell in enumerate(cells))


def quadrants(picture: np.ndarray) -> np.ndarray:
    """Mean colours, (4, 3)."""
    rows, columns = picture.shape[0] // 2, picture.shape[1] // 2
    parts = [part for half in (picture[:rows], picture[rows:]) for part in (half[:, :columns], half[:, columns:])]
    return np.stack([part.reshape(-1, 3).mean(axis=0) for part in parts])


def sha256_of_pixels(encoded: bytes) -> str:
    return hashlib.sha256(np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB")).tobytes()).hexdigest()


@pytest.mark.parametrize("fixture", ["v30_images", "v30_video", "v21_video"])
def test_a_lerobot_dataset_equals_its_truth(fixture):
    truth = json.loads((LEROBOT / f"{fixture}.truth.json").read_text())
    source = open_source(LEROBOT / fixture)
    assert (source.name, source.num_units, source.num_episodes, source.num_steps) == (fixture, 5, 5, 88)
    episodes = read_all(source)
    assert [(episode.index, len(episode)) for episode in episodes] == [
        (episode["episode_index"], episode["length"]) for episode in truth["episodes"]
    ]
    frames = truth["frames"]
    joined = {key: np.concatenate([episode.columns[key] for episode in episodes]) for key in source.columns}
    for key, name in (("action", "action"), ("observation.state", "state"), ("timestamp", "timestamp")):
        np.testing.assert_array_equal(joined[key], np.array([frame[name] for frame in frames], np.float32))
        assert joined[key].dtype == np.float32
    for key in ("episode_index", "frame_index", "index"):
        assert joined[key].tolist() == [frame[key] for frame in frames]
    assert [text for episode in episodes for text in episode.instructions] == [frame["task"] for frame in frames]
    tasks = list(dict.fromkeys(frame["task"] for frame in frames))
    assert joined["task_index"].tolist() == [tasks.index(frame["task"]) for frame in frames]
    assert episodes[0].metadata == {"robot_type": "fixture_arm", "fps": 10}
    check_pictures(episodes, frames, truth["storage"])


def check_pictures(episodes: list[RawEpisode], frames: list[dict], storage: str) -> None:
    for camera in (FRONT, WRIST):
        pictures = [picture for episode in episodes for picture in episode.images[camera]]
        expected = [frame["images"][camera] for frame in frames]
        if storage == "image":
            assert [sha256_of_pixels(picture) for picture in pictures] == [image["sha256"] for image in expected]
            continue
        numbers = [frame["episode_index"] * 64 + frame["frame_index"] for frame in frames]
        assert [frame_number(picture) for picture in pictures] == numbers
        distances = [
            np.abs(quadrants(picture) - image["quad_rgb"]).max()
            for picture, image in zip(pictures, expected, strict=True)
        ]
        # Neighbouring frames differ by more; the codec alone is off by up to 6.4, in a tiny picture.
        assert np.quantile(distances, 0.95) < 5 and max(distances) < 7


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_an_rlds_dataset_equals_its_truth(split):
    truth = json.loads((RLDS / "mini_libero_no_noops_truth.json").read_text())
    expected = truth["train"] + truth["val"] if split == "all" else truth[split]
    source = open_source(RLDS / "mini_libero_no_noops", split=split)
    assert source.name == "mini_libero_no_noops"
    assert (source.num_units, source.num_episodes, source.num_steps) == (len(expected), len(expected), None)
    for index, (episode, wanted) in enumerate(zip(read_all(source), expected, strict=True)):
        steps = wanted["steps"]
        assert episode.index == index and len(episode) == len(steps)
        assert episode.metadata == {"episode_metadata/file_path": wanted["episode_metadata"]["file_path"]}
        assert episode.instructions == [step["language_instruction"] for step in steps]
        for key, dtype in (
            ("action", "f4"),
            ("discount", "f4"),
            ("reward", "f4"),
            ("is_last", "?"),
            ("is_first", "?"),
        ):
            np.testing.assert_array_equal(episode.columns[key], np.array([step[key] for step in steps], dtype))
            assert episode.columns[key].dtype == dtype
        for key in ("state", "joint_state"):
            values = np.array([step["observation"][key] for step in steps], np.float32)
            np.testing.assert_array_equal(episode.columns[f"observation/{key}"], values)
        for key, hashes in wanted["sha256_encoded_images"].items():
            pictures = episode.images[f"observation/{key}"]
            assert [hashlib.sha256(picture).hexdigest() for picture in pictures] == hashes


def test_the_newest_version_of_an_rlds_dataset_is_opened_unless_one_is_named(tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        shutil.copytree(LIBERO, tmp_path / "mini" / version)
    assert "/1.10.0/" in next(open_source(tmp_path / "mini").read(0)).file
    assert "/1.9.0/" in next(open_source(tmp_path / "mini" / "1.9.0").read(0)).file


def test_the_recorders_datasets_are_read_back(tmp_path):
    path = record(Recording(episodes=3, image_size=32), tmp_path / "demonstrations")
    source = open_source(path)
    table = pq.read_table(path / DATA)
    stories = [json.loads(line) for line in (path / "meta/tabletop.jsonl").read_text().splitlines()]
    assert (source.num_units, source.num_steps) == (3, len(table))
    episodes = read_all(source)
    assert [episode.instructions for episode in episodes] == [[s["instruction"]] * s["length"] for s in stories]
    for key in ("action", "observation.state"):
        joined = np.concatenate([episode.columns[key] for episode in episodes])
        np.testing.assert_array_equal(joined, np.array(table[key].to_pylist(), np.float32))
    for camera in (FRONT, WRIST):
        pictures = [picture for episode in episodes for picture in episode.images[camera]]
        assert pictures == [picture["bytes"] for picture in table[camera].to_pylist()]


def test_datasets_are_read_as_one(tmp_path):
    paths = [record(Recording(episodes=count, image_size=16, seed=count), tmp_path / str(count)) for count in (2, 3)]
    parts = [open_source(path, name="all") for path in paths]
    source = JoinedSource(parts)
    assert (source.name, source.num_units, source.num_episodes) == ("all", 5, 5)
    assert source.num_steps == sum(part.num_steps for part in parts)
    assert (source.columns, source.images) == (parts[0].columns, parts[0].images)
    joined, own = read_all(source), [episode for part in parts for episode in read_all(part)]
    assert [(each.file, each.index, each.instructions) for each in joined] == [
        (each.file, each.index, each.instructions) for each in own
    ]
    for each, expected in zip(joined, own, strict=True):
        np.testing.assert_array_equal(each.columns["action"], expected.columns["action"])
    with pytest.raises(IndexError, match="all has units 0 to 4, got 5"):
        source.read(5)


def test_datasets_that_differ_are_not_one(tmp_path):
    pictures = open_source(LEROBOT / "v30_images", name="all")
    recorded = record(Recording(episodes=1, image_size=16), tmp_path / "recorded")
    with pytest.raises(ValueError, match="alike in name, columns and cameras; got"):
        JoinedSource([pictures, open_source(recorded, name="all")])
    with pytest.raises(ValueError, match="alike in name"):
        JoinedSource([pictures, open_source(LEROBOT / "v30_images", name="other")])


# Which rows are read


@pytest.mark.parametrize("row_groups", [[88], [40, 40, 8]])
def test_episodes_in_large_row_groups_are_read_by_the_file(tmp_path, row_groups):
    path = copy_dataset(LEROBOT / "v30_images", tmp_path)
    edit_parquet(path / DATA, lambda table: table, row_groups)
    source = open_source(path)
    assert (source.num_units, source.num_episodes) == (1, 5)
    edit_parquet(path / META, lambda table: set_span(table, 0, -12, 0))
    assert open_source(path).num_units == 1
    for episode, expected in zip(source.read(0), read_all(open_source(LEROBOT / "v30_images")), strict=True):
        assert episode.index == expected.index
        np.testing.assert_array_equal(episode.columns["index"], expected.columns["index"])
        assert list(episode.images[WRIST]) == list(expected.images[WRIST])


def test_rows_are_found_in_small_row_groups_of_any_size_and_without_statistics(tmp_path):
    path = copy_dataset(LEROBOT / "v30_images", tmp_path)
    name = path / DATA
    pq.write_table(pq.read_table(name), name, row_group_size=7, write_statistics=False)
    source = open_source(path)
    assert source.num_units == 5
    episodes = read_all(source, images=())
    assert np.concatenate([episode.columns["index"] for episode in episodes]).tolist() == list(range(88))


def test_a_split_of_a_lerobot_dataset_is_a_range_of_episodes(tmp_path):
    path = copy_dataset(LEROBOT / "v30_images", tmp_path)
    info = json.loads((path / "meta/info.json").read_text())
    info["splits"] = {"train": "0:3", "val": "3:5"}
    (path / "meta/info.json").write_text(json.dumps(info))
    read = {split: [e.index for e in read_all(open_source(path, split=split))] for split in (None, "val", "all")}
    assert read == {None: [0, 1, 2], "val": [3, 4], "all": [0, 1, 2, 3, 4]}
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'val', 'all'\]"):
        open_source(path, split="test")


def test_only_what_is_asked_for_is_read():
    for source, column, camera in (
        (open_source(LEROBOT / "v30_images"), "action", WRIST),
        (open_source(LEROBOT / "v30_video"), "action", WRIST),
        (open_source(LIBERO), "observation/state", "observation/image"),
    ):
        (episode,) = source.read(0, columns=[column], images=[camera])
        assert list(episode.columns) == [column] and list(episode.images) == [camera]
        (bare,) = source.read(0, columns=(), images=())
        assert not bare.columns and not bare.images and bare.instructions == episode.instructions
        with pytest.raises(ValueError, match="has no columns \\['nope'\\]"):
            source.read(0, columns=["nope"])
        with pytest.raises(ValueError, match="has no pictures \\['nope'\\]"):
            source.read(0, images=["nope"])
        with pytest.raises(IndexError):
            source.read(source.num_units)


def test_lists_of_any_depth_strings_and_nulls_become_arrays_or_errors(tmp_path):
    path = copy_dataset(LEROBOT / "v30_images", tmp_path)
    matrices = [[[float(row), 1.0], [2.0, 3.0], [4.0, 5.0]] for row in range(88)]
    ragged = [[[row, step] for step in range(row % 3)] for row in range(88)]
    extra = {"matrix": matrices, "ragged": ragged, "note": [f"n{row}" for row in range(88)], "done": [True] * 88}

    def add(table: pa.Table) -> pa.Table:
        for key, values in extra.items():
            table = table.append_column(key, pa.array(values))
        return table

    name = path / DATA
    edit_parquet(name, add, [12, 25, 17, 20, 14])
    info = json.loads((path / "meta/info.json").read_text())
    info["features"] |= {key: {"dtype": "float64", "shape": [1], "names": None} for key in extra}
    (path / "meta/info.json").write_text(json.dumps(info))
    (episode,) = open_source(path).read(1, columns=list(extra), images=())
    np.testing.assert_array_equal(episode.columns["matrix"], np.array(matrices[12:37]))
    assert [values.tolist() for values in episode.columns["ragged"]] == ragged[12:37]
    assert episode.columns["note"].tolist() == extra["note"][12:37]
    assert episode.columns["done"].dtype == bool
    edit_parquet(name, lambda table: set_value(table, "timestamp", 13, None), [12, 25, 17, 20, 14])
    assert [fault is None for fault in readable(open_source(path)).values()] == [True, False, True, True, True]


# Video


def write_video(path: Path, frames: int, fps: int, **options: str) -> None:
    """A video of numbered frames full of noise."""
    rng = np.random.default_rng(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = 160, 64, "yuv420p"
        for number in range(frames):
            picture = rng.integers(256, size=(64, 160, 3), dtype=np.uint8)
            picture[:8] = np.repeat([255 * (number >> bit & 1) for bit in range(10)], 16)[:, None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def lerobot_video(tmp_path: Path, **options: str) -> Path:
    """The v3.0 fixture, one of its cameras encoded anew."""
    path = copy_dataset(LEROBOT / "v30_video", tmp_path)
    write_video(path / f"videos/{FRONT}/chunk-000/file-000.mp4", 88, 10, **options)
    return path


@pytest.mark.parametrize("options", [{"g": "250", "bf": "3"}, {"g": "2"}, {"g": "12", "bf": "2"}])
def test_frames_are_found_whatever_lies_between_the_key_frames(tmp_path, options):
    source = open_source(lerobot_video(tmp_path, **options))
    for unit in (4, 1, 3, 0, 2):
        (episode,) = source.read(unit, images=[FRONT])
        numbers = [frame_number(picture) for picture in episode.images[FRONT]]
        assert numbers == episode.columns["index"].tolist()


def test_episodes_of_one_video_can_be_read_by_turns():
    source = open_source(LEROBOT / "v30_video")
    episodes = [next(source.read(unit, images=[FRONT])) for unit in (3, 1, 1)]
    for step, pictures in enumerate(zip(*(episode.images[FRONT] for episode in episodes), strict=False)):
        assert [frame_number(picture) for picture in pictures] == [3 * 64 + step, 64 + step, 64 + step]


def test_frames_by_number_decode_once_and_iteration_keeps_nothing(monkeypatch):
    (episode,) = open_source(LEROBOT / "v30_video").read(1, images=[FRONT])
    frames, calls = episode.images[FRONT], Counter()
    decode = type(frames)._decode
    monkeypatch.setattr(type(frames), "_decode", lambda self: calls.update(["decode"]) or decode(self))
    assert len(list(frames)) == len(list(frames)) == 25 and calls["decode"] == 2
    assert [frame_number(frames[step]) for step in (24, 0, -1, 7)] == [64 + 24, 64, 64 + 24, 64 + 7]
    assert [frame_number(picture) for picture in frames[3:5]] == [64 + 3, 64 + 4]
    assert len(list(frames)) == 25 and calls["decode"] == 3
    assert len(frames[20:]) == 5


def test_a_video_is_opened_only_for_its_frames(tmp_path):
    path = copy_dataset(LEROBOT / "v30_video", tmp_path)
    shutil.rmtree(path / "videos")
    episodes = read_all(open_source(path))
    assert sum(len(episode.images[WRIST]) for episode in episodes) == 88
    with pytest.raises(
        BadEpisodeError, match=r"v30_video, .*front/chunk-000/file-000.mp4, episode 2: the file is mis"
    ):
        next(iter(episodes[2].images[FRONT]))


def test_frames_beside_their_steps_are_refused(tmp_path):
    path = copy_dataset(LEROBOT / "v30_video", tmp_path)
    meta, start = path / META, f"videos/{FRONT}/from_timestamp"
    for episode, seconds in ((0, -1.0), (1, 1.246), (2, 3.757), (3, 8.0)):
        edit_parquet(meta, lambda table, at=episode, to=seconds: set_value(table, start, at, to))
    faults = readable(open_source(path))
    assert "episode 0: there is no frame" in faults[0]
    assert faults[1] is None  # within half a frame
    assert "episode 3: the video ends before" in faults[3]
    assert faults[2] is faults[4] is None
    (late,) = open_source(path).read(2, images=[FRONT])
    assert frame_number(late.images[FRONT][0]) == 2 * 64 + 1  # the nearest


# Damage


@pytest.mark.parametrize(
    ("fixture", "missing"),
    [
        ("v30_images", "meta/info.json"),
        ("v30_images", "meta/tasks.parquet"),
        ("v30_images", "meta/episodes/chunk-000/file-000.parquet"),
        ("v21_video", "meta/tasks.jsonl"),
        ("v21_video", "meta/episodes.jsonl"),
    ],
)
def test_a_missing_description_is_named(tmp_path, fixture, missing):
    path = copy_dataset(LEROBOT / fixture, tmp_path)
    (path / missing).unlink()
    with pytest.raises(FileNotFoundError, match="/".join(missing.split("/")[:2])):
        open_source(path)


@pytest.mark.parametrize("missing", ["dataset_info.json", "features.json"])
def test_a_missing_description_of_rlds_is_named(tmp_path, missing):
    path = copy_dataset(LIBERO, tmp_path)
    (path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        open_source(path)


def test_what_is_no_dataset_is_refused_with_what_was_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds nothing"):
        open_source(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*/nowhere/at/all"):
        open_source("/nowhere/at/all")
    copy_dataset(LEROBOT / "v30_images", tmp_path)
    with pytest.raises(FileNotFoundError, match="the one in its folder v30_images"):
        open_source(tmp_path)
    copy_dataset(RLDS / "mini_libero_no_noops", tmp_path)
    with pytest.raises(ValueError, match=r"holds the datasets \['mini_libero_no_noops', 'v30_images'\]"):
        open_source(tmp_path)
    shutil.copytree(LIBERO, tmp_path / "v30_images" / "1.0.0")
    with pytest.raises(ValueError, match="holds two datasets"):
        open_source(tmp_path / "v30_images")
    with pytest.raises(ValueError, match="no `instruction_key`"):
        open_source(LEROBOT / "v30_images", instruction_key="task")
    with pytest.raises(ValueError, match="has no split 'test'; it has \\['train', 'val', 'all'\\]"):
        open_source(LIBERO, split="test")
    with pytest.raises(ValueError, match="`revision`"):
        open_source(LIBERO, revision="main")
    for location in ("owner/name@v1", "hf://datasets/owner/name@v1/folder"):
        with pytest.raises(ValueError, match="given twice"):
            open_source(location, revision="v2")


@pytest.mark.parametrize(
    ("location", "revision", "url"),
    [
        ("owner/name", None, "hf://datasets/owner/name"),
        ("owner/name@refs/pr/1", None, "hf://datasets/owner/name@refs%2Fpr%2F1"),
        ("hf://datasets/owner/name@refs%2Fpr%2F1/1.0.0", None, "hf://datasets/owner/name@refs%2Fpr%2F1/1.0.0"),
        ("hf://datasets/owner/name/1.0.0", "v1", "hf://datasets/owner/name@v1/1.0.0"),
        ("gs://bucket/name/", None, "gs://bucket/name"),
    ],
)
def test_locations_of_all_forms(location, revision, url):
    files = Files(location, revision)
    assert files.location == url and files.name in ("name", "1.0.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebase_version": "v1.6"}, "codebase_version 'v1.6'; expected one of"),
        ({"video_path": None}, "no `video_path`"),
        ({"splits": {"train": "90%"}}, "expected 'first:end'"),
        ({"splits": {"train": "9:12"}}, "no episodes in the split 'train'"),
    ],
)
def test_descriptions_that_cannot_be_followed_are_refused(tmp_path, change, message):
    path = copy_dataset(LEROBOT / "v30_video", tmp_path)
    info = json.loads((path / "meta/info.json").read_text())
    (path / "meta/info.json").write_text(json.dumps(info | change | {"some_later_key": 1}))
    with pytest.raises(ValueError, match=message):
        open_source(path)
    (path / "meta/info.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta/info.json is not valid JSON"):
        open_source(path)


@pytest.mark.parametrize(
    ("file", "change", "row_groups", "bad", "message"),
    [
        (META, lambda t: set_value(t, "dataset_from_index", 1, 1000), None, 1, "span -963 rows, its length is 25"),
        (META, lambda t: set_span(t, 1, 1000, 1025), None, 1, "rows, 1000 to 1024 .* not in the file, 0 to 87"),
        (META, lambda t: set_value(t, "data/chunk_index", 3, None), None, 3, "do not say which file holds its data"),
        (META, lambda t: set_value(t, "dataset_to_index", 4, 2000), None, 4, "span 1926 rows"),
        (META, lambda t: set_span(t, 0, -12, 0), None, 0, "rows, -12 to -1 of the dataset, are not in the file"),
        (META, lambda t: set_value(t, "length", 2, 18), None, 2, "span 17 rows, its length is 18"),
        (
            META,
            lambda t: set_value(t, "data/file_index", 3, 9),
            None,
            3,
            "file-009.parquet, episode 3: the file is mi",
        ),
        (DATA, lambda t: set_value(t, "episode_index", 40, 7), LENGTHS, 2, r"belong to the episodes \[2, 7\]"),
        (DATA, lambda t: set_value(t, "task_index", 40, 7), LENGTHS, 2, r"the tasks \[7\]"),
        (DATA, lambda t: pa.concat_tables([t[:50], t[51:]]), [12, 25, 16, 20, 14], 2, "16 rows of it"),
        (DATA, lambda t: t[:74], LENGTHS[:4], 4, "rows, 74 to 87 of the dataset, are not in the file, 0 to 73"),
    ],
)
def test_one_bad_episode_leaves_the_others_readable(tmp_path, file, change, row_groups, bad, message):
    path = copy_dataset(LEROBOT / "v30_images", tmp_path)
    edit_parquet(path / file, change, row_groups)
    source = open_source(path)
    faults = readable(source)
    assert [unit for unit, fault in faults.items() if fault] == [bad]
    with pytest.raises(BadEpisodeError, match=message) as caught:
        list(source.read(bad))
    assert caught.value.episode == bad and caught.value.dataset == "v30_images"


def test_one_bad_episode_of_a_unit_leaves_those_that_follow(tmp_path):
    """Whatever the source: LeRobot's files in one row group, a shard of steps, a function that makes episodes."""
    path = copy_dataset(LEROBOT / "v30_images", tmp_path)
    edit_parquet(path / DATA, lambda table: set_value(table, "task_index", 40, 7), [88])
    rows = [{"episode_index": episode, "action": [1.0, None if episode == 1 else 2.0]} for episode in range(4)]
    shard = datasets.Dataset.from_list(rows).to_iterable_dataset()
    made = [own_episode(0), {"action": np.zeros((9, 7)), "task": ["one"]}, own_episode(2)]
    for data, bad, left in ((path, [2], [0, 1, 3, 4]), (shard, [1], [0, 2, 3]), (lambda: iter(made), [1], [0, 2])):
        source, faults = open_source(data), {}
        assert source.num_units == 1
        assert [raw.index for _, raw in read_raw(source, 0, ["action"], (), faults.setdefault)] == left
        assert {place: error.episode for place, error in faults.items()} == {number: number for number in bad}


def test_damaged_pages_and_cut_files_are_refused(tmp_path):
    path = copy_dataset(LEROBOT / "v30_images", tmp_path)
    name = path / DATA
    chunk = pq.ParquetFile(name).metadata.row_group(2).column(0)
    content = bytearray(name.read_bytes())
    content[chunk.data_page_offset : chunk.data_page_offset + 16] = bytes(16)
    name.write_bytes(content)
    faults = readable(open_source(path))
    assert [unit for unit, fault in faults.items() if fault] == [2]
    assert "file-000.parquet, episode 2: cannot be read" in faults[2]
    name.write_bytes(content[:-100])
    assert all("cannot be read" in fault for fault in readable(open_source(path)).values())


def test_a_damaged_file_of_v21_is_one_bad_episode(tmp_path):
    path = copy_dataset(LEROBOT / "v21_video", tmp_path)
    (path / "data/chunk-000/episode_000000.parquet").unlink()
    edit_parquet(path / "data/chunk-000/episode_000001.parquet", lambda table: table[:20])
    video = path / f"videos/chunk-000/{WRIST}/episode_000002.mp4"
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    (path / f"videos/chunk-000/{FRONT}/episode_000003.mp4").write_bytes(b"no video at all")
    faults = readable(open_source(path))
    assert "episode_000000.parquet, episode 0: the file is missing" in faults[0]
    assert "20 rows of it, the meta data say 25" in faults[1]
    assert "episode_000002.mp4, episode 2" in faults[2] and "episode_000003.mp4, episode 3" in faults[3]
    assert faults[4] is None


def test_pictures_with_only_a_path_are_read_from_there(tmp_path):
    path = copy_dataset(LEROBOT / "v30_images", tmp_path)
    picture = {}

    def strip(table: pa.Table) -> pa.Table:
        picture.update(table[WRIST][40].as_py())
        return set_value(table, WRIST, 40, {"bytes": None, "path": "images/picture.png"})

    edit_parquet(path / DATA, strip, LENGTHS)
    (episode,) = open_source(path).read(2)
    with pytest.raises(BadEpisodeError, match=r"episode 2: picture 3 is not in the file, and there is no 'images/pic"):
        list(episode.images[WRIST])
    (path / "images").mkdir()
    (path / "images/picture.png").write_bytes(picture["bytes"])
    assert episode.images[WRIST][3] == picture["bytes"]


# TFRecord


def varint(value: int) -> bytes:
    value, digits = value & (2**64 - 1), []
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def encode_example(values: dict[str, np.ndarray | list[bytes]]) -> bytes:
    """A `tf.train.Example`, written by its definition."""
    entries = b""
    for key, value in values.items():
        if isinstance(value, list):
            feature = message(1, b"".join(message(1, item) for item in value)) if value else b""
        elif value.dtype.kind == "f":
            feature = message(2, message(1, value.astype("<f4").tobytes()))
        else:
            feature = message(3, message(1, b"".join(varint(int(item)) for item in value.reshape(-1))))
        entries += message(1, message(1, key.encode()) + message(2, feature))
    return message(1, entries)


def frame_record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


def test_the_checksum_is_crc32c_masked():
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert masked_crc32c(b"123456789") == (0x2507C60D + 0xA282EAD8) & 0xFFFFFFFF  # rotated by hand


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1)),
    st.lists(st.integers(0, 127)),
    st.lists(st.floats(width=32, allow_nan=False)),
    st.lists(st.binary(max_size=300)),
)
def test_examples_are_read_as_written(integers, small, floats, items):
    written = {
        "observation/ü": np.array(integers, np.int64),
        "small": np.array(small, np.int64),
        "f": np.array(floats, np.float32),
        "b": items,
    }
    record = parse_example(encode_example(written))
    assert list(record) == list(written)
    np.testing.assert_array_equal(record["observation/ü"].integers(), written["observation/ü"])
    np.testing.assert_array_equal(record["small"].integers(), written["small"])
    np.testing.assert_array_equal(record["f"].floats(), written["f"])
    assert record["b"].items() == items
    if items:
        with pytest.raises(ValueError, match="holds bytes, expected floats"):
            record["b"].floats()


def test_numbers_that_are_not_packed_are_read_too():
    floats = b"".join(varint(1 << 3 | 5) + struct.pack("<f", value) for value in (0.5, -2.0))
    integers = b"".join(varint(1 << 3 | 0) + varint(value) for value in (3, -4))
    entries = message(1, message(1, b"f") + message(2, message(2, floats)))
    entries += message(1, message(1, b"i") + message(2, message(3, integers)))
    record = parse_example(message(1, entries))
    assert record["f"].floats().tolist() == [0.5, -2.0] and record["i"].integers().tolist() == [3, -4]


@given(st.binary(min_size=1, max_size=200))
def test_noise_is_refused_or_read_but_never_crashes(noise):
    try:
        for feature in parse_example(noise).values():
            feature.spans()
    except ValueError:
        pass


def damage_shard(path: Path, change: Callable[[bytearray, list[list[int]]], bytes]) -> dict[int, str | None]:
    """Change the first training shard, which holds the episodes 0 and 1; what is wrong with each of the four."""
    shard = path / "mini_libero_no_noops-train.tfrecord-00000-of-00002"
    with shard.open("rb") as file:
        spans, fault = scan_records(file, shard.stat().st_size)
    assert fault is None and len(spans) == 2
    shard.write_bytes(change(bytearray(shard.read_bytes()), spans.tolist()))
    return readable(open_source(path))


def flip(content: bytearray, place: int) -> bytearray:
    content[place] ^= 1
    return content


@pytest.mark.parametrize(
    ("change", "bad", "reason"),
    [
        (lambda content, spans: flip(content, spans[0][0] + 5000), [0], "data of the record at byte 0 does not match"),
        (lambda content, spans: flip(content, spans[1][1] + 1), [1], "does not match its checksum"),
        (lambda content, spans: flip(content, spans[1][0] - 12), [1], "length of the record at byte"),
        (lambda content, spans: flip(content, 2), [0, 1], "the length of the record at byte 0 does not match"),
        (lambda content, spans: content[:-1], [1], "is cut off"),
        (lambda content, spans: content[: spans[1][0] - 3], [1], "ends within the header"),
        (lambda content, spans: content[: spans[1][0] - 12], [1], "holds 1 records, dataset_info.json says 2"),
        (lambda content, spans: b"", [0, 1], "holds 0 records"),
    ],
)
def test_damage_in_a_shard_is_confined_and_named(tmp_path, change, bad, reason):
    faults = damage_shard(copy_dataset(LIBERO, tmp_path), change)
    assert [unit for unit, fault in faults.items() if fault] == bad
    for unit in bad:
        assert reason in faults[unit] and f"tfrecord-00000-of-00002, episode {unit}: " in faults[unit]


def test_a_missing_shard_is_named(tmp_path):
    path = copy_dataset(LIBERO, tmp_path)
    (path / "mini_libero_no_noops-train.tfrecord-00001-of-00002").unlink()
    faults = readable(open_source(path))
    assert [fault is None for fault in faults.values()] == [True, True, False, False]
    assert "00001-of-00002, episode 2: the file is missing" in faults[2]


def test_surplus_records_are_reported(tmp_path, caplog):
    path = copy_dataset(LIBERO, tmp_path)
    info = json.loads((path / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["1", "2"]
    (path / "dataset_info.json").write_text(json.dumps(info))
    assert len(read_all(open_source(path))) == 3
    assert "holds 2 records; only the 1 declared" in caplog.text


# RLDS in all its forms


def tensor(dtype: str, *shape: int, encoding: str = "none") -> dict:
    return {"tensor": {"dtype": dtype, "shape": {"dimensions": [str(size) for size in shape]}, "encoding": encoding}}


def sequence(feature: dict, length: int = -1) -> dict:
    return {"sequence": {"feature": feature, "length": str(length)}}


def group(**features: dict) -> dict:
    return {"featuresDict": {"features": features}}


def write_rlds(path: Path, steps: dict, episodes: list[dict], **metadata: dict) -> Path:
    """A dataset of one shard with the given features of a step and of the episode."""
    path.mkdir(parents=True)
    (path / "features.json").write_text(json.dumps(group(steps=sequence(group(**steps)), **metadata)))
    split = {"name": "train", "shardLengths": [str(len(episodes))]}
    info = {"name": path.name, "splits": [split], "fileFormat": "tfrecord"}
    (path / "dataset_info.json").write_text(json.dumps(info))
    content = b"".join(frame_record(encode_example(episode)) for episode in episodes)
    (path / f"{path.name}-train.tfrecord-00000-of-00001").write_bytes(content)
    return path


STRESS = {
    "observation": group(
        **{"clip_function_input/base_pose": {"tensor": {"dtype": "string", "shape": {}}}},
        picture={"image": {"shape": {"dimensions": ["-1", "-1", "3"]}}},
        state=tensor("float64", 2, encoding="zlib"),
        code=tensor("int32", 3),
    ),
    "action": group(world_vector=tensor("float64", 3), grip=tensor("float32"), big=tensor("uint64")),
    "matrix": tensor("uint8", 2, 2),
    "raw": tensor("bool", 2, encoding="bytes"),
    "free": tensor("float32", -1, 2),
    "words": sequence({"text": {}}),
    "pairs": sequence(tensor("int64", 2)),
    "twins": sequence(tensor("int64")),
    "triple": sequence(tensor("float32"), 3),
    "text": {"text": {}},
    "label": {"classLabel": {"numClasses": "4"}},
    "sound": {"pythonClassName": "tensorflow_datasets.core.features.audio_feature.Audio", "audio": {}},
}
STATES = np.array([[1e-9, 1.0], [2.0, 1 / 3]])
POSES = [zlib.compress(np.array([step], "<f4").tobytes()) for step in (1.0, 2.0)]
STRESS_EPISODE = {
    "steps/observation/clip_function_input/base_pose": POSES,
    "steps/observation/picture": [b"", b"\xff\xd8 picture \x00\x00"],
    "steps/observation/state": [zlib.compress(row.tobytes()) for row in STATES],
    "steps/observation/code": np.array([112, 105, 0, 110, 233, 0]),
    "steps/action/world_vector": np.array([0.1, 2, 3, 4, 5, 6], np.float32),
    "steps/action/grip": np.array([0.5, -1], np.float32),
    "steps/action/big": np.array([2**64 - 1, 7], np.uint64),
    "steps/matrix": np.arange(248, 256),
    "steps/raw": [b"\x01\x00", b"\x00\x01"],
    "steps/free": np.arange(12, dtype=np.float32),
    "steps/words/ragged_flat_values": ["é".encode(), b"b", b"c"],
    "steps/words/ragged_row_lengths_0": np.array([1, 2]),
    "steps/pairs/ragged_flat_values": np.arange(6),
    "steps/pairs/ragged_row_lengths_0": np.array([3, 0]),
    "steps/twins/ragged_flat_values": np.arange(4),
    "steps/twins/ragged_row_lengths_0": np.array([2, 2]),
    "steps/triple/ragged_flat_values": np.arange(6, dtype=np.float32),
    "steps/triple/ragged_row_lengths_0": np.array([3, 3]),
    "steps/text": ["Öffne".encode(), b""],
    "steps/label": np.array([3, 1]),
    "steps/sound": np.array([0, 0]),
    "meta/success": np.array([1]),
    "meta/id": [b"x1"],
    "scores": np.array([1.5, 2.5], np.float32),
}
META_FEATURES = {
    "meta": group(success=tensor("bool"), id={"text": {}}),
    "scores": sequence(tensor("float32")),
}
STRESS_COLUMNS = {
    "observation/state": STATES,
    "observation/code": np.array([[112, 105, 0], [110, 233, 0]], np.int32),
    "action/world_vector": np.array([[0.1, 2, 3], [4, 5, 6]], np.float32).astype(np.float64),
    "action/grip": np.array([0.5, -1], np.float32),
    "action/big": np.array([2**64 - 1, 7], np.uint64),
    "matrix": np.arange(248, 256, dtype=np.uint8).reshape(2, 2, 2),
    "raw": np.array([[True, False], [False, True]]),
    "free": np.arange(12, dtype=np.float32).reshape(2, 3, 2),
    "triple": np.arange(6, dtype=np.float32).reshape(2, 3),
    "label": np.array([3, 1]),
}


@pytest.fixture
def stress(tmp_path) -> Path:
    return write_rlds(tmp_path / "stress", STRESS, [STRESS_EPISODE], **META_FEATURES)


def test_every_kind_of_feature_is_read(stress):
    source = open_source(stress, instruction_key="text")
    (episode,) = source.read(0, columns=[key for key in source.columns if key != "sound"])
    for key, expected in STRESS_COLUMNS.items():
        np.testing.assert_array_equal(episode.columns[key], expected)
        assert episode.columns[key].dtype == expected.dtype, key
    assert episode.columns["observation/clip_function_input/base_pose"].tolist() == POSES
    assert [words.tolist() for words in episode.columns["words"]] == [["é"], ["b", "c"]]
    assert [pairs.tolist() for pairs in episode.columns["pairs"]] == [[[0, 1], [2, 3], [4, 5]], []]
    assert [twins.tolist() for twins in episode.columns["twins"]] == [[0, 1], [2, 3]]
    assert list(episode.images["observation/picture"]) == [b"", b"\xff\xd8 picture \x00\x00"]
    assert episode.images["observation/picture"][1:][0] == b"\xff\xd8 picture \x00\x00"
    assert episode.instructions == ["Öffne", ""]
    assert episode.metadata.pop("scores").tolist() == [1.5, 2.5]
    assert episode.metadata == {"meta/success": True, "meta/id": "x1"}


def test_instructions_of_an_episode_and_without_a_key(stress):
    (episode,) = open_source(stress, instruction_key="meta/id").read(0, columns=())
    assert episode.instructions == ["x1", "x1"]
    (episode,) = open_source(stress).read(0, columns=())
    assert episode.instructions == ["", ""]
    with pytest.raises(ValueError, match="has no text 'observation/code' for an instruction; it has"):
        open_source(stress, instruction_key="observation/code")


def test_a_feature_that_cannot_be_read_stops_only_who_asks_for_it(stress):
    with pytest.raises(ValueError, match=r"'sound', which cannot be read: .*Audio are not supported"):
        open_source(stress).read(0)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("steps/label", np.array([1]), "'steps/label' has 1 elements, expected 2"),
        ("steps/matrix", np.arange(7), "7 values do not make elements of shape"),
        ("steps/matrix", np.zeros(8, np.float32), "'steps/matrix': it holds floats, expected integers"),
        ("steps/observation/picture", [b"one"], "has 1 elements, expected 2"),
        ("steps/pairs/ragged_row_lengths_0", np.array([3, 1]), "'steps/pairs'"),
        ("steps/observation/state", [b"no", b"zlib"], "'steps/observation/state': Error -3"),
        ("steps/text", [b"\xff", b""], "'utf-8' codec"),
        ("meta/id", None, "'meta/id': the record does not have it"),
    ],
)
def test_records_that_are_not_as_declared_are_refused(tmp_path, key, value, reason):
    changed = {name: item for name, item in (STRESS_EPISODE | {key: value}).items() if item is not None}
    steps = {name: feature for name, feature in STRESS.items() if name != "sound"}
    path = write_rlds(tmp_path / "stress", steps, [changed, STRESS_EPISODE], **META_FEATURES)
    faults = readable(open_source(path))
    assert reason in faults[0] and faults[1] is None


# Remote


class CountingFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        CountingFileSystem.fetched[self.path] += end - start
        return MemoryFileSystem.store[self.path].getvalue()[start:end]


class CountingFileSystem(MemoryFileSystem):
    """The files of `memory://`, read as those of a remote file system are, with a count of the bytes."""

    protocol = "counting"
    fetched: Counter = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://"))

    def _open(self, path, mode="rb", block_size=None, cache_options=None, **options):
        return CountingFile(self, path, mode, block_size or 2**22, cache_options=cache_options, **options)


@pytest.fixture
def remote() -> Iterator[Callable[[Path], str]]:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    memory = fsspec.filesystem("memory")

    def upload(folder: Path) -> str:
        memory.put(str(folder), f"/{folder.name}", recursive=True)
        CountingFileSystem.fetched.clear()
        return f"counting://{folder.name}"

    yield upload
    for path in memory.ls("/", detail=False):
        memory.rm(path, recursive=True)


@pytest.mark.parametrize("fixture", ["v30_images", "v30_video", "v21_video"])
def test_remote_and_local_datasets_read_alike(remote, fixture):
    url = remote(LEROBOT / fixture)
    episodes = zip(read_all(open_source(url)), read_all(open_source(LEROBOT / fixture)), strict=True)
    for far, near in episodes:
        assert far.file.startswith(url) and far.instructions == near.instructions
        np.testing.assert_array_equal(far.columns["action"], near.columns["action"])
        for there, here in zip(far.images[FRONT], near.images[FRONT], strict=True):
            np.testing.assert_array_equal(there, here)


def test_a_remote_rlds_dataset_is_read_record_by_record(remote):
    source = open_source(remote(LIBERO))
    (episode,) = source.read(3)
    (expected,) = open_source(LIBERO).read(3)
    assert list(episode.images["observation/image"]) == list(expected.images["observation/image"])
    shard = "/1.0.0/mini_libero_no_noops-train.tfrecord-0000{}-of-00002"
    # Of the second shard its two headers and the last record; of the first nothing.
    record = len(MemoryFileSystem.store[shard.format(1)].getvalue()) - 2 * 16
    assert CountingFileSystem.fetched[shard.format(0)] == 0
    assert 0 < CountingFileSystem.fetched[shard.format(1)] < 0.3 * record


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The image dataset with pictures of 20 kB, so that they outweigh all else."""
    path = copy_dataset(LEROBOT / "v30_images", tmp_path_factory.mktemp("large"))
    rng = np.random.default_rng(0)

    def fill(table: pa.Table) -> pa.Table:
        pictures = [{"bytes": rng.bytes(20_000), "path": None} for _ in range(len(table))]
        place = table.column_names.index(FRONT)
        return table.set_column(place, FRONT, pa.array(pictures, table.schema.field(FRONT).type))

    edit_parquet(path / DATA, fill, LENGTHS)
    return path


def test_only_the_columns_that_are_wanted_are_fetched(remote, large):
    url = remote(large)
    size = len(MemoryFileSystem.store[f"/v30_images/{DATA}"].getvalue())
    assert size > 88 * 20_000
    actions = read_all(open_source(url), columns=["action"], images=())
    assert sum(len(episode) for episode in actions) == 88
    assert CountingFileSystem.fetched[f"/v30_images/{DATA}"] < size / 10


def test_only_the_pictures_of_the_episode_are_fetched(remote, large):
    source = open_source(remote(large))
    (episode,) = source.read(1)
    assert len(episode.images[FRONT][24]) == 20_000
    own = sum(map(len, [*episode.images[FRONT], *episode.images[WRIST]]))
    assert own < CountingFileSystem.fetched[f"/v30_images/{DATA}"] < own + 100_000


def test_only_the_part_of_a_video_that_holds_the_episode_is_fetched(remote, tmp_path, monkeypatch):
    monkeypatch.setattr("robot_data.video.READ_AHEAD", 4096)
    source = open_source(remote(lerobot_video(tmp_path, g="2")))
    (episode,) = source.read(3)
    assert [frame_number(picture) for picture in episode.images[FRONT]] == list(range(54, 74))
    video = f"/v30_video/videos/{FRONT}/chunk-000/file-000.mp4"
    size, fetched = len(MemoryFileSystem.store[video].getvalue()), CountingFileSystem.fetched
    assert size > 400_000 and size * 20 / 88 < fetched[video] < size / 2
    assert fetched[video.replace(FRONT, WRIST)] == 0
    once = fetched[video]
    (episode,) = source.read(4)
    list(episode.images[FRONT])
    assert fetched[video] - once < size / 4  # the file's description has been read already


HUB = """
import sys
from robot_data.sources import JoinedSource, open_source
for name, options in (("hf://datasets/org/images", {}), ("org/images@v1", {}), ("org/images", {"revision": "v1"})):
    source = open_source(name, token=sys.argv[1], **options)
    steps = sum(len(p) for unit in range(source.num_units) for e in source.read(unit) for p in e.images.values())
    print(source.name, source.num_units, steps)
"""


def test_datasets_on_the_hub_are_streamed(tmp_path):
    folder = LEROBOT / "v30_images"
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with HubServer() as hub:
        hub.create_repo("org/images", files, repo_type="dataset")
        repo = hub.find("datasets", "org/images")
        repo.branches["v1"] = repo.branches["main"]
        environment = hub.environment(tmp_path) | {"PYTHONPATH": str(REPOSITORY)}
        token = environment.pop("HF_TOKEN")
        command = [sys.executable, "-c", HUB, token]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["images 5 176"] * 3
    assert not list(tmp_path.rglob("*.parquet"))


# In other processes


def digest(source, unit: int) -> str:
    content = hashlib.sha256()
    for episode in source.read(unit):
        for key in sorted(episode.columns):
            content.update(pickle.dumps(episode.columns[key].tolist()))
        for key in sorted(episode.images):
            for picture in episode.images[key]:
                content.update(bytes(picture))
    return content.hexdigest()


FOLDERS = [LEROBOT / "v30_images", LEROBOT / "v30_video", LIBERO]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_sources_work_in_a_fork_after_use_in_this_process(folder):
    source = open_source(folder)
    units = range(source.num_units)
    expected = [digest(source, unit) for unit in units]  # leaves files open
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    # Not sent but inherited, open files and all; the units in different orders.
    children = [
        context.Process(
            target=lambda start=start: results.put(
                {unit: digest(source, unit) for unit in [*units[start:], *units] * 5}
            )
        )
        for start in range(3)
    ]
    for child in children:
        child.start()
    for _ in children:
        assert results.get(timeout=60) == dict(enumerate(expected))
    for child in children:
        child.join(timeout=60)
        assert child.exitcode == 0
    assert [digest(source, unit) for unit in units] == expected


ELSEWHERE = """
import pickle, sys
for source in pickle.load(sys.stdin.buffer):
    episodes = [episode for unit in range(source.num_units) for episode in source.read(unit)]
    pictures = [bytes(picture) for episode in episodes for images in episode.images.values() for picture in images]
    print(len(episodes), sum(map(len, episodes)), len(pictures), len(set(pictures)))
"""


def test_sources_travel_to_a_new_process_after_use():
    sources = [open_source(folder) for folder in FOLDERS]
    for source in sources:
        read_all(source)
        assert len(pickle.dumps(source)) < 20_000
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        input=pickle.dumps(sources),
        capture_output=True,
        cwd=REPOSITORY,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout.decode().splitlines() == ["5 88 176 176", "5 88 176 176", "4 22 44 44"]


def test_files_are_lent_once_closed_on_failure_and_few_stay_open():
    opened = []

    class File:
        def __init__(self, name: str):
            self.name, self.is_open = name, True
            opened.append(self)

        def close(self) -> None:
            self.is_open = False

    handles = Handles(File)
    with handles.borrow("a") as first, handles.borrow("a") as second:
        assert first is not second
    with handles.borrow("a") as again:
        assert again.is_open
    with pytest.raises(ValueError, match="bad"), handles.borrow("a") as broken:
        raise ValueError("bad")
    assert not broken.is_open
    for name in range(2 * OPEN_FILES):
        with handles.borrow(str(name)):
            pass
    assert sum(file.is_open for file in opened) == OPEN_FILES


# Tables and episodes of one's own


def steps_of(episodes: list[int], camera: bool = True) -> Iterator[dict]:
    for episode in episodes:
        for frame in range(3 + episode):
            picture = {"picture": Image.new("RGB", (4, 4), (episode, frame, 0))} if camera else {}
            yield {
                "episode_index": episode,
                "frame_index": frame,
                "action": np.full(7, 10 * episode + frame, np.float32),
                "task": f"task {episode}",
                **picture,
            }


def check_own(episodes: list[RawEpisode], expected: list[int]) -> None:
    assert [episode.index for episode in episodes] == expected
    for episode in episodes:
        assert len(episode) == 3 + episode.index
        assert episode.instructions == [f"task {episode.index}"] * len(episode)
        assert episode.columns["action"].dtype == np.float32 and episode.columns["action"].shape == (len(episode), 7)
        assert episode.columns["action"][:, 6].tolist() == [10 * episode.index + step for step in range(len(episode))]
        for step, picture in enumerate(episode.images.get("picture", ())):
            assert np.asarray(Image.open(io.BytesIO(picture)))[0, 0].tolist() == [episode.index, step, 0]


@pytest.fixture
def steps(tmp_path) -> datasets.Dataset:
    return datasets.Dataset.from_generator(steps_of, gen_kwargs={"episodes": [4, 0, 2]}, cache_dir=str(tmp_path))


def test_a_table_of_steps_is_read_episode_by_episode(steps):
    source = open_source(steps, name="mine")
    assert (source.name, source.num_units, source.num_episodes, source.num_steps) == ("mine", 3, 3, 15)
    check_own(read_all(source), [4, 0, 2])
    (episode,) = source.read(2, columns=["action"], images=())
    assert list(episode.columns) == ["action"] and not episode.images and episode.instructions == ["task 2"] * 5
    with pytest.raises(ValueError, match="has no columns \\['nope'\\]"):
        list(source.read(0, columns=["nope"], images=()))
    gaps = open_source(
        datasets.Dataset.from_dict({"episode_index": [0, 0, 1], "action": [1.0, None, 2.0]}), name="gaps"
    )
    with pytest.raises(BadEpisodeError, match="gaps, gaps, episode 0: 'action': 1 of 2 values are null"):
        list(gaps.read(0))
    assert next(gaps.read(1)).instructions == [""]
    with pytest.raises(ValueError, match="need the column `episode_index`"):
        open_source(steps.remove_columns("episode_index"))


@pytest.mark.parametrize("rows", [2, 256])
def test_a_stream_of_steps_is_read_shard_by_shard(rows, monkeypatch):
    monkeypatch.setattr("robot_data.sources.ROWS_AT_ONCE", rows)
    stream = datasets.IterableDataset.from_generator(steps_of, gen_kwargs={"episodes": [5, 1, 0, 3]})
    source = open_source(stream)
    assert (source.num_units, source.num_episodes, source.num_steps) == (4, None, None)
    check_own(read_all(source), [5, 1, 0, 3])
    check_own(list(source.read(3)), [3])
    first = next(source.read(0))
    assert (source.columns, source.images) == (list(first.columns), list(first.images))
    doubled = open_source(stream.map(lambda step: {"twice": step["episode_index"] * 2}))
    assert [episode.columns["twice"][0] for episode in read_all(doubled)] == [10, 2, 0, 6]
    (episode,) = source.read(1, columns=["action"], images=())
    assert list(episode.columns) == ["action"] and episode.instructions == ["task 1"] * 4


def test_an_episode_cut_by_a_shard_is_refused(steps):
    source = open_source(steps.to_iterable_dataset(num_shards=2))
    assert [episode.index for episode in source.read(0)] == [4, 0]
    with pytest.raises(BadEpisodeError, match="episode 0: starts with frame 1"):
        list(source.read(1))


def own_episode(index: int) -> dict:
    count = 3 + index
    return {
        "action": np.full((count, 7), index, np.float32),
        "views": [b"a picture"] * count,
        "frames": np.zeros((count, 2, 2, 3), np.uint8),
        "photos": [Image.new("L", (5, 4), 7)] * count,
        "notes": ["note"] * count,
        "task": f"task {index}",
        "success": True,
    }


def test_episodes_made_in_python_are_read():
    for data, units in (([own_episode(0), own_episode(1)], 2), (lambda: map(own_episode, range(2)), 1)):
        source = open_source(data, name="made")
        assert source.num_units == units
        assert (source.columns, source.images) == (["action", "notes"], ["views", "frames", "photos"])
        for _ in range(2):
            first, second = read_all(source)
            assert (first.index, second.index, len(second)) == (0, 1, 4) and second.instructions == ["task 1"] * 4
            assert sorted(second.columns) == ["action", "notes"] and second.columns["notes"].dtype == object
            assert sorted(second.images) == ["frames", "photos", "views"] and second.images["views"][0] == b"a picture"
            assert second.images["photos"][3].tolist() == np.full((4, 5, 3), 7).tolist()
            assert second.metadata == {"task": "task 1", "success": True}
    uneven = open_source([own_episode(0) | {"action": np.zeros((9, 7))}], name="made")
    with pytest.raises(BadEpisodeError, match=r"made, made, episode 0: .*'action': 9, 'views': 3"):
        list(uneven.read(0))
    with pytest.raises(ValueError, match="made has no episodes"):
        _ = open_source([], name="made").columns
    with pytest.raises(ValueError, match="can be read only once"):
        open_source(iter([own_episode(0)]))
    with pytest.raises(ValueError, match=r"\['split'\] are for datasets in files"):
        open_source([own_episode(0)], split="train")
