"""Inspection of datasets: what the table says is true, the picture shows the episode, and damage is reported."""

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import inspect_dataset
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES
from inspect_dataset import Contents, View, find_unit, list_instructions, main, open_view, save_picture
from PIL import Image

from robot_data.episode import BadEpisodeError, Episode, RawEpisode
from robot_data.pictures import decode
from robot_data.sources import open_source
from robot_data.standardize import config_for, standardize
from robot_data.statistics import compute_statistics
from tabletop.record import Recording, record


FRONT = "observation.images.front"
LEROBOT_FIXTURES = ["lerobot/v30_images", "lerobot/v30_video", "lerobot/v21_video"]
LIBERO = "rlds/mini_libero_no_noops"


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def cells(text: str, first: str) -> list[str]:
    """The first line that begins with this cell."""
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    return next(row for row in rows if row[0] == first)


def open_fixture(name: str) -> tuple:
    source = open_source(FIXTURES / name, split="all")
    return source, config_for(source.name, source.columns, source.images)


def share_of_color(path: Path, color: np.ndarray) -> float:
    """Share of a file's pixels that are nearly of this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return float((np.abs(pixels - color.astype(int)).max(axis=-1) <= 6).mean())


def edit_parquet(path: Path, column: str, row: int, change) -> None:
    table = pq.read_table(path)
    values, field = table[column].to_pylist(), table.schema.field(column)
    values[row] = change(values[row])
    pq.write_table(table.set_column(table.column_names.index(column), field, pa.array(values, field.type)), path)


# The table


@pytest.mark.parametrize("fixture", LEROBOT_FIXTURES)
def test_a_lerobot_fixture_is_described(capsys, fixture):
    status, text, _ = run(capsys, FIXTURES / fixture)
    assert status == 0
    assert cells(text, "episodes") == ["episodes", "5"]
    assert cells(text, "steps")[1] == "88, 12 to 25 per episode, median 17"
    assert cells(text, "fps") == ["fps", "10"]
    assert cells(text, "action") == ["action", "float32", "7"]
    assert cells(text, "frame_index") == ["frame_index", "int64", "1"]
    assert cells(text, FRONT) == [FRONT, "primary", "96 x 128"]
    assert cells(text, "observation.images.wrist") == ["observation.images.wrist", "wrist", "64 x 64"]
    truth = json.loads((FIXTURES / f"{fixture}.truth.json").read_text())
    steps = Counter(frame["task"] for frame in truth["frames"])
    episodes = Counter(task for episode in truth["episodes"] for task in episode["tasks"])
    for task, number in steps.items():
        assert cells(text, str(number)) == [str(number), str(episodes[task]), task]
    actions = np.array([frame["action"] for frame in truth["frames"]], np.float32)
    q01, q99 = np.quantile(actions[:, 5], [0.01, 0.99])
    values = (actions[:, 5].mean(), actions[:, 5].std(), actions[:, 5].min(), q01, q99, actions[:, 5].max())
    assert cells(text, "yaw") == ["yaw", *(format(value, ".4g") for value in values), "yes"]
    assert text.rstrip().endswith("warnings:\n- none")


def test_the_rlds_fixture_is_described(capsys):
    status, text, _ = run(capsys, FIXTURES / LIBERO, "--episode", 3)
    assert status == 0
    assert cells(text, "steps")[1] == "31, 1 to 9 per episode, median 5.5"
    assert cells(text, "fps") == ["fps", "unknown"]
    assert cells(text, "language_instruction") == ["language_instruction", "str", "1"]
    assert cells(text, "observation/image") == ["observation/image", "primary", "64 x 64"]
    assert cells(text, "6") == ["6", "1", "(no instruction)"]
    assert cells(text, "1") == ["1", "1", "turn on the stove — café"]


def test_frequent_instructions_come_first_and_the_rest_is_counted():
    contents = Contents("made")
    for index in range(5):
        texts = [f"task {index}"] * (index + 1) + ["twice\nin one", " "]
        actions = np.zeros((len(texts), 7), np.float32)
        contents.add(Episode("made", "file", index, actions, None, texts, {}))
    rows = list_instructions(contents, 3)
    assert rows[0] == ("steps", "episodes", "instruction")
    assert {row[0] for row in rows[1:4]} == {"5"}
    assert rows[-1] == ("...", "...", "and 4 others")
    assert list_instructions(contents, 7)[-1] == ("1", "1", "task 0")
    assert ("5", "5", "twice in one") in list_instructions(contents, 7)


def test_weak_dimensions_are_warned_of(tmp_path, capsys):
    description = tmp_path / "datasets.yaml"
    description.write_text("v30_images: {action: ['action[:2]', zeros(1), 'action[3:]']}\n")
    _, text, errors = run(capsys, FIXTURES / "lerobot/v30_images", "--config", description)
    assert cells(text, "z")[-1] == "constant: always 0"
    assert "- v30_images: dimension 2 of the action is constant: always 0" in text.splitlines()
    assert not errors


def test_a_damaged_episode_is_reported_and_the_others_are_shown(tmp_path, capsys):
    dataset = Path(shutil.copytree(FIXTURES / "lerobot/v30_images", tmp_path / "data"))
    edit_parquet(dataset / "data/chunk-000/file-000.parquet", "action", 0, lambda action: [float("nan")] * 7)
    status, text, _ = run(capsys, dataset)
    assert status == 0
    assert cells(text, "episodes") == ["episodes", "4"]
    assert re.search(r"^- Skipped: data, .*file-000.parquet, episode 0: .* is nan at frame 0", text, re.MULTILINE)
    status, _, errors = run(capsys, dataset, "--episode", 0)
    assert status == 1 and "is nan at frame 0" in errors and len(errors.splitlines()) == 1


def test_a_damaged_picture_is_reported_and_the_other_camera_is_shown(tmp_path, capsys):
    dataset = Path(shutil.copytree(FIXTURES / "lerobot/v30_images", tmp_path / "data"))
    edit_parquet(
        dataset / "data/chunk-000/file-000.parquet", FRONT, 0, lambda picture: {"bytes": b"nonsense", "path": None}
    )
    status, text, _ = run(capsys, dataset, "--output_dir", tmp_path)
    assert status == 0
    assert f"- the camera '{FRONT}' cannot be shown: A picture of 8 bytes" in text
    assert cells(text, "observation.images.wrist")[-1] == "64 x 64"
    assert (tmp_path / "data_episode_0.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no folder nowhere"),
        ([FIXTURES / LIBERO, "--episode", 6], "mini_libero_no_noops has no episode 6"),
        ([FIXTURES / LIBERO, "--episode", -1], "mini_libero_no_noops has no episode -1"),
        ([FIXTURES / LIBERO, "--split", "test"], "no split 'test'"),
    ],
)
def test_an_error_is_one_line(capsys, arguments, message):
    status, _, errors = run(capsys, *arguments)
    assert status == 1
    assert errors.startswith("error: ") and message in errors and len(errors.splitlines()) == 1


def test_a_missing_matplotlib_is_an_error_before_anything_is_read(tmp_path, capsys, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
    )
    status, text, errors = run(capsys, FIXTURES / LIBERO, "--output_dir", tmp_path)
    assert status == 1 and not text and "pip install -r requirements-evaluation.txt" in errors
    assert run(capsys, FIXTURES / LIBERO)[0] == 0


# The episode


@pytest.mark.parametrize("fixture", [*LEROBOT_FIXTURES, LIBERO])
def test_the_view_shows_the_episode(fixture):
    source, config = open_fixture(fixture)
    view = open_view(source, config, 1)
    (raw,) = source.read(find_unit(source, 1))
    assert view.frames[0] == 0 and view.frames[-1] == len(raw) - 1
    assert len(view.frames) == 8 and not view.faults
    np.testing.assert_array_equal(view.episode.actions, raw.columns["action"])
    assert list(view.pictures) == source.images
    for camera, pictures in view.pictures.items():
        for frame, picture in zip(view.frames, pictures, strict=True):
            np.testing.assert_array_equal(picture, decode(raw.images[camera][frame]))


def test_pictures_are_those_of_the_steps_that_are_kept():
    source, _ = open_fixture("lerobot/v30_images")
    config = config_for(source.name, source.columns, source.images, {"drop_first": 3, "drop_last": 2})
    view = open_view(source, config, 0)
    (raw,) = source.read(0)
    assert len(view.episode) == 7 and view.frames == list(range(7))
    for frame, picture in zip(view.frames, view.pictures[FRONT], strict=True):
        np.testing.assert_array_equal(picture, decode(raw.images[FRONT][frame + 3]))


def test_an_episode_is_found_where_units_are_numbered_otherwise():
    class Shifted:
        name, num_units = "shifted", 4

        def read(self, unit, columns=None, images=None):
            if unit == 2:
                raise BadEpisodeError("damaged", "shifted", "file", 12)
            for index in (10 + unit, 20 + unit):
                yield RawEpisode("shifted", "file", index, {}, [""], {})

    assert find_unit(Shifted(), 11) == 1
    assert find_unit(Shifted(), 23) == 3
    with pytest.raises(BadEpisodeError, match="damaged"):
        find_unit(Shifted(), 12)


# The picture


@pytest.mark.parametrize("fixture", [*LEROBOT_FIXTURES, LIBERO])
def test_the_picture_shows_cameras_and_curves(tmp_path, capsys, fixture):
    _, text, _ = run(capsys, FIXTURES / fixture, "--episode", 1, "--output_dir", tmp_path)
    path = tmp_path / f"{Path(fixture).name}_episode_1.png"
    assert f"{path}: written" in text
    assert Image.open(path).width == 1600
    source, config = open_fixture(fixture)
    for pictures in open_view(source, config, 1).pictures.values():
        colors, counts = np.unique(pictures[0].reshape(-1, 3), axis=0, return_counts=True)
        assert share_of_color(path, colors[counts.argmax()]) > 1e-4
    for color in (inspect_dataset.CURVE_COLOR, inspect_dataset.BAND_COLOR):
        rgb = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)])
        assert share_of_color(path, rgb) > 1e-4


def test_a_recording_of_the_tabletop_is_shown(tmp_path, capsys):
    record(Recording(episodes=1, image_size=32), tmp_path / "demo")
    status, text, _ = run(capsys, tmp_path / "demo", "--output_dir", tmp_path)
    assert status == 0
    assert cells(text, FRONT)[-1] == "32 x 32"
    assert cells(text, "robot_type") == ["robot_type", "tabletop"]
    assert (tmp_path / "demo_episode_0.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("instruction", ["costs $5 and $6 \\alpha", "", "line\nbreak", "long " * 60, "拿起方块"])
def test_any_episode_can_be_drawn(tmp_path, instruction):
    """One step, 14 dimensions, a camera without pictures, pictures of two sizes, and instructions of every kind."""
    pictures = {"main": [np.zeros((20, 60, 3), np.uint8)], "empty": [b""], "tall": [np.zeros((90, 30, 3), np.uint8)]}
    raw = {
        "action": np.ones((1, 14), np.float32),
        "task": instruction,
        **{key: pictures[key] for key in ("main", "tall")},
    }
    source = open_source([raw], name="made/of parts")
    config = config_for(source.name, ["action"], ["main", "tall"])
    (read,) = source.read(0)
    read.images["empty"] = pictures["empty"]
    episode: Episode = standardize(read, config)
    contents = Contents(source.name)
    contents.add(episode)
    contents.steps += Counter({f"instruction {index}": 1 for index in range(20)})
    contents.statistics = compute_statistics(source, config)
    shown = {"main": pictures["main"], "empty": [None], "tall": pictures["tall"]}
    save_picture(config, contents, View(read, episode, [0], shown), tmp_path / "made.png")
    assert Image.open(tmp_path / "made.png").height > 800


def test_an_episode_without_cameras_can_be_drawn(tmp_path):
    source = open_source([{"action": np.ones((3, 7), np.float32), "task": "move"}], name="made")
    config = config_for(source.name, ["action"], [])
    (read,) = source.read(0)
    contents = Contents(source.name)
    contents.statistics = compute_statistics(source, config, on_episode=contents.add)
    save_picture(config, contents, View(read, standardize(read, config), [0, 1, 2]), tmp_path / "made.png")
    assert Image.open(tmp_path / "made.png").width == 1600
