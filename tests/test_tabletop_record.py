"""Recording: the dataset's form and contents, videos, determinism, kills and reruns, replay."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES, REPOSITORY
from PIL import Image

from tabletop import lerobot_writer as writer
from tabletop import record as recorder
from tabletop.environment import TabletopEnv
from tabletop.expert import Expert
from tabletop.lerobot_statistics import QUANTILES, image_statistics, vector_statistics
from tabletop.record import Recording, draw_start, is_noop, main, record
from tabletop.scene import COLORS


SMALL = Recording(episodes=6, seed=3, image_size=32)
REAL = json.loads((FIXTURES / "lerobot_v30_schema.json").read_text())
REAL_VIDEO = json.loads((FIXTURES / "lerobot_v30_video_schema.json").read_text())
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return record(SMALL, tmp_path_factory.mktemp("recorded") / "dataset")


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    return record(replace(SMALL, video=True), tmp_path_factory.mktemp("recorded") / "videos")


@pytest.fixture(params=["dataset", "videos"])
def like_real(request) -> tuple[Path, dict]:
    """A dataset with what the real one says of itself."""
    return request.getfixturevalue(request.param), {"dataset": REAL, "videos": REAL_VIDEO}[request.param]


@pytest.fixture(scope="module")
def frames(dataset) -> list[dict]:
    return pq.read_table(dataset / DATA).to_pylist()


@pytest.fixture(scope="module")
def stories(dataset) -> list[dict]:
    return [json.loads(line) for line in (dataset / "meta/tabletop.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(dataset: Path) -> list[str]:
    return [path.name for path in dataset.parent.iterdir() if path != dataset and path.name.startswith(dataset.name)]


def pictures(frames: list[dict], key: str) -> np.ndarray:
    return np.stack([np.array(Image.open(io.BytesIO(frame[key]["bytes"]))) for frame in frames])


def with_expert_action(entries: dict) -> dict:
    """Entries by name, and behind those of `action` the same for `expert_action`, which is the tabletop's own."""
    found, doubles = {}, {}
    for name, value in entries.items():
        parts = name.split("/")
        if "action" not in parts:
            found, doubles = found | doubles, {}
        else:
            doubles["/".join("expert_action" if part == "action" else part for part in parts)] = value
        found[name] = value
    return found | doubles


class TestForm:
    """Against what the package lerobot itself wrote (tests/fixtures/lerobot_v30_*schema.json)."""

    def test_files(self, like_real):
        dataset, real = like_real
        assert sorted(contents(dataset)) == sorted([*real["files"], "meta/tabletop.jsonl"])

    def test_info(self, like_real):
        dataset, real = like_real
        info, real = json.loads((dataset / "meta/info.json").read_text()), real["info"]
        assert list(info) == list(real)
        own = {"robot_type", "total_episodes", "total_frames", "total_tasks", "splits", "features"}
        assert {key: info[key] for key in info if key not in own} == {key: real[key] for key in real if key not in own}
        assert info["robot_type"] == "tabletop"
        assert info["splits"] == {"train": "0:6"}
        features = with_expert_action(real["features"])
        assert list(info["features"]) == list(features)
        for key, feature in info["features"].items():
            expected = features[key]
            assert list(feature) == list(expected)
            assert feature["dtype"] == expected["dtype"]
            if feature["dtype"] in ("image", "video"):
                assert (feature["shape"], feature["names"]) == ([32, 32, 3], expected["names"])
                own = {"video.height": 32, "video.width": 32, "video.codec": "h264"}
                assert feature.get("info", own) == {**expected.get("info", {}), **own}
            else:
                assert feature["shape"] == expected["shape"]
                assert feature["names"] is None or len(feature["names"]) == feature["shape"][0]

    @pytest.mark.parametrize("path", sorted(REAL["parquet"]))
    def test_parquet_columns(self, like_real, path):
        schema, real = pq.read_schema(like_real[0] / path), like_real[1]["parquet"][path]
        columns = with_expert_action(real["columns"])
        assert {field.name: str(field.type) for field in schema} == columns
        assert schema.names == list(columns)

    def test_parquet_metadata(self, like_real):
        dataset, real = like_real
        features = json.loads(pq.read_schema(dataset / DATA).metadata[b"huggingface"])["info"]["features"]
        assert features == with_expert_action(real["parquet"][DATA]["metadata"]["huggingface"]["info"]["features"])
        pandas = json.loads(pq.read_schema(dataset / "meta/tasks.parquet").metadata[b"pandas"])
        expected = real["parquet"]["meta/tasks.parquet"]["metadata"]["pandas"]
        assert pandas == {**expected, "creator": pandas["creator"]}

    def test_statistics(self, like_real):
        dataset, real = like_real
        statistics = json.loads((dataset / "meta/stats.json").read_text())
        assert {
            key: {name: [list(np.shape(value)), np.array(value).dtype.kind] for name, value in values.items()}
            for key, values in statistics.items()
        } == with_expert_action(real["stats"])

    def test_row_groups_are_episodes(self, dataset, stories):
        metadata = pq.ParquetFile(dataset / DATA).metadata
        rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        assert rows == [story["length"] for story in stories]

    def test_files_roll_over(self, tmp_path, monkeypatch):
        monkeypatch.setattr(writer, "DATA_FILE_MB", 0.05)
        folder = record(SMALL, tmp_path / "dataset")
        rows = pq.read_table(folder / EPISODES).to_pylist()
        assert len({row["data/file_index"] for row in rows}) > 1
        for row in rows:
            path = REAL["info"]["data_path"].format(
                chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
            )
            index = pq.read_table(folder / path, filters=[("episode_index", "=", row["episode_index"])])["index"]
            assert index.to_pylist() == list(range(row["dataset_from_index"], row["dataset_to_index"]))


class TestContents:
    def test_numbering(self, dataset, frames, stories):
        info = json.loads((dataset / "meta/info.json").read_text())
        lengths = [story["length"] for story in stories]
        assert len(frames) == info["total_frames"] == sum(lengths)
        assert [frame["index"] for frame in frames] == list(range(len(frames)))
        expected = [(episode, step) for episode, length in enumerate(lengths) for step in range(length)]
        assert [(frame["episode_index"], frame["frame_index"]) for frame in frames] == expected
        for frame in frames:
            assert frame["timestamp"] == np.float32(frame["frame_index"] / 10)

    def test_tasks(self, dataset, frames, stories):
        rows = pq.read_table(dataset / "meta/tasks.parquet").to_pylist()
        texts = {row["task_index"]: row["__index_level_0__"] for row in rows}
        assert list(texts) == list(range(len(rows))) == list(range(len(set(texts.values()))))
        for frame in frames:
            assert texts[frame["task_index"]] == stories[frame["episode_index"]]["instruction"]

    def test_episodes(self, dataset, stories):
        first = 0
        for row, story in zip(pq.read_table(dataset / EPISODES).to_pylist(), stories, strict=True):
            assert row["episode_index"] == story["episode_index"]
            assert row["tasks"] == [story["instruction"]]
            assert row["length"] == story["length"]
            assert (row["dataset_from_index"], row["dataset_to_index"]) == (first, first + row["length"])
            first += row["length"]

    def test_pictures(self, frames):
        for key in ("observation.images.front", "observation.images.wrist"):
            seen = pictures(frames, key)
            assert seen.shape == (len(frames), 32, 32, 3)
            assert seen.std() > 10
            assert [frame[key]["path"] for frame in frames] == [f"frame-{f['frame_index']:06d}.png" for f in frames]
        assert REAL["image_paths"] == [f"frame-{index:06d}.png" for index in (10, 11, 0, 1, 2)]

    def test_only_successes_and_every_task(self, stories):
        assert {story["outcome"] for story in stories} == {"success"}
        assert [story["options"]["task"] for story in stories] == ["pick", "put_in_bowl", "push"] * 2

    def test_statistics_equal_numpy(self, dataset, frames):
        statistics = json.loads((dataset / "meta/stats.json").read_text())
        rows = pq.read_table(dataset / EPISODES).to_pylist()
        for key, values in statistics.items():
            self.check(values, key, frames)
            for row in rows[:2]:
                own = {name: row[f"stats/{key}/{name}"] for name in values}
                self.check(own, key, frames[row["dataset_from_index"] : row["dataset_to_index"]])

    @staticmethod
    def check(statistics: dict, key: str, frames: list[dict]) -> None:
        if "images" in key:
            values = pictures(frames, key).reshape(-1, 3) / 255
        else:
            values = np.array([frame[key] for frame in frames], dtype=np.float64).reshape(len(frames), -1)
        expected = {name: getattr(values, name)(axis=0) for name in ("min", "max", "mean", "std")}
        expected |= {name: np.quantile(values, at, axis=0) for name, at in QUANTILES.items()}
        assert statistics["count"] == [len(frames)]
        for name, value in expected.items():
            np.testing.assert_allclose(
                np.ravel(statistics[name]), value, rtol=1e-9, atol=1e-9, err_msg=f"{key} {name}"
            )

    def test_statistics_of_few_pixels(self):
        """Quantiles between two levels are interpolated as numpy does it."""
        rng = np.random.default_rng(0)
        for count in (1, 2, 5, 101):
            pixels = rng.integers(0, 256, (count, 3), dtype=np.uint8)
            histogram = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)])
            ours, numpys = image_statistics(histogram, 1), vector_statistics(pixels / 255)
            for name in QUANTILES:
                np.testing.assert_allclose(np.ravel(ours[name]), numpys[name], atol=1e-12)


class TestVideos:
    @staticmethod
    def decode(path: Path) -> tuple[list[Fraction], np.ndarray]:
        """Times in seconds and pictures (T, S, S, 3)."""
        with av.open(path) as container:
            container.streams.video[0].thread_type = "NONE"
            decoded = list(container.decode(video=0))
        return [frame.pts * frame.time_base for frame in decoded], np.stack(
            [f.to_ndarray(format="rgb24") for f in decoded]
        )

    @pytest.mark.parametrize("key", writer.CAMERAS)
    def test_frames_are_the_pictures(self, videos, frames, key):
        """Close to them, and far closer than to their neighbours: none is missing, doubled or late."""
        times, seen = self.decode(videos / f"videos/{key}/chunk-000/file-000.mp4")
        raw = pictures(frames, key)
        assert seen.shape == raw.shape
        assert times == [Fraction(index, 10) for index in range(len(frames))]
        error = np.abs(seen.astype(float) - raw).mean(axis=(1, 2, 3))
        # The codec halves the colours' resolution, which tells most in pictures as small as these.
        assert error.mean() < 5
        for shift in (-1, 1):
            moved = np.abs(np.roll(seen, shift, axis=0).astype(float) - raw).mean(axis=(1, 2, 3))
            assert np.median(error / moved) < 0.7

    @pytest.mark.parametrize("key", writer.CAMERAS)
    def test_any_frame_decodes_fast(self, videos, key):
        """Key frames are two apart, and no packet waits for a later one."""
        with av.open(videos / f"videos/{key}/chunk-000/file-000.mp4") as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        assert all(packet.pts == packet.dts for packet in packets)
        keys = [packet.is_keyframe for packet in packets]
        assert not any(not first and not second for first, second in itertools.pairwise(keys))

    def test_numbers_are_those_of_the_pictures_dataset(self, dataset, videos):
        for path in ("meta/stats.json", "meta/tasks.parquet", "meta/tabletop.jsonl"):
            assert (videos / path).read_bytes() == (dataset / path).read_bytes()
        columns = pq.read_schema(videos / DATA).names
        assert pq.read_table(videos / DATA).equals(pq.read_table(dataset / DATA, columns=columns))

    @pytest.mark.parametrize("limit", [200, 0.01])
    def test_places(self, videos, tmp_path, monkeypatch, limit):
        """Each episode's frames lie where its row says, also where the files roll over."""
        monkeypatch.setattr(writer, "VIDEO_FILE_MB", limit)
        folder = videos if limit == 200 else record(replace(SMALL, video=True), tmp_path / "dataset")
        template = json.loads((folder / "meta/info.json").read_text())["video_path"]
        rows = pq.read_table(folder / EPISODES).to_pylist()
        for key in writer.CAMERAS:
            whole = self.decode(videos / f"videos/{key}/chunk-000/file-000.mp4")[1]
            numbers = [row[f"videos/{key}/file_index"] for row in rows]
            assert (max(numbers) == 0) == (limit == 200)
            for row in rows:
                place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
                times, seen = self.decode(folder / template.format(video_key=key, **place))
                start, end = (row[f"videos/{key}/{name}_timestamp"] for name in ("from", "to"))
                first, last = round(start * 10), round(end * 10)
                assert (last - first, times[first]) == (row["length"], Fraction(first, 10))
                np.testing.assert_array_equal(
                    seen[first:last], whole[row["dataset_from_index"] : row["dataset_to_index"]]
                )

    def test_another_encoder_is_not_joined(self, tmp_path, monkeypatch):
        frame = {"state": np.zeros(8), "action": np.zeros(7), "expert_action": np.zeros(7), "instruction": "wait"}
        frame |= dict.fromkeys(writer.CAMERAS.values(), np.zeros((32, 32, 3), np.uint8))
        paths = [tmp_path / f"{index}.parquet" for index in range(2)]
        for index, path in enumerate(paths):
            monkeypatch.setitem(writer._ENCODER_OPTIONS, "profile", ["baseline", "high"][index])
            writer.write_episode(path, [frame], {"episode_index": index, "instruction": "wait"}, video=True)
        with pytest.raises(RuntimeError, match=r"1\.observation\.images\.front\.mp4 was encoded by another version"):
            writer.assemble(paths, tmp_path / "dataset", 32, video=True)


class TestReplay:
    def test_recorded_actions_succeed_from_the_recorded_start(self, frames, stories):
        """Bit for bit: the states on the way are the recorded ones."""
        for story in stories:
            env = TabletopEnv(image_size=32, cameras=())
            observation, _ = env.reset(seed=story["seed"], options=story["options"])
            assert env.data.qpos.tolist() == story["qpos"]
            assert env.data.qvel.tolist() == story["qvel"]
            assert observation["instruction"] == story["instruction"]
            for frame in (frame for frame in frames if frame["episode_index"] == story["episode_index"]):
                np.testing.assert_array_equal(observation["state"], np.float32(frame["observation.state"]))
                observation, *_, info = env.step(np.float32(frame["action"]))
            assert info["outcome"] == "success"

    def test_pictures_are_of_the_start(self, frames, stories):
        env = TabletopEnv(image_size=32)
        observation, _ = env.reset(seed=stories[0]["seed"], options=stories[0]["options"])
        for key, name in writer.CAMERAS.items():
            np.testing.assert_array_equal(pictures(frames[:1], key)[0], observation[name])


class TestNoops:
    def test_rule(self):
        still, open_hand = np.zeros(7), np.array([0, 0, 0, 0, 0, 0, 1.0])
        assert is_noop(still, None)
        assert is_noop(still, still)
        assert not is_noop(still, open_hand)
        assert is_noop(np.array([5e-5, 5e-5, 0, 0, 0, 0, 1]), open_hand)
        assert not is_noop(np.array([8e-5, 8e-5, 0, 0, 0, 0, 1]), open_hand)

    def test_none_is_recorded(self, frames):
        for index, frame in enumerate(frames):
            previous = frames[index - 1]["action"] if frame["frame_index"] else None
            assert not is_noop(np.array(frame["action"]), None if previous is None else np.array(previous))

    def test_none_is_executed(self, monkeypatch):
        """An expert that rests every other time: the rests reach neither the robot nor the record."""
        moves = iter(range(1000))

        def action(self, rng, noise, nudges):
            return np.array([0.01 * (next(moves) % 2), 0, 0, 0, 0, 0, 1], dtype=np.float32)

        monkeypatch.setattr(recorder.Expert, "noisy_action", action)
        env = TabletopEnv(image_size=8, max_steps=7)
        observation, _ = env.reset(seed=0)
        taken, outcome = recorder.demonstrate(env, observation, np.random.default_rng(0), 0.3)
        assert (len(taken), env.steps, outcome) == (7, 7, "timeout")
        assert all(frame["action"][0] > 0 for frame in taken)

    def test_an_expert_at_rest_ends_the_attempt(self, monkeypatch):
        monkeypatch.setattr(recorder.Expert, "noisy_action", lambda *_: np.zeros(7, dtype=np.float32))
        env = TabletopEnv(image_size=8)
        observation, _ = env.reset(seed=0)
        assert recorder.demonstrate(env, observation, np.random.default_rng(0), 0.3) == ([], None)
        monkeypatch.setattr(recorder, "MAX_ATTEMPTS", 3)
        with pytest.raises(RuntimeError, match="Episode 0 failed 3 times"):
            recorder.record_episode(Recording(1, image_size=8), 0, Path("unused"))

    def test_the_least_noise_succeeds(self, tmp_path):
        record(Recording(episodes=3, image_size=8, noise=recorder.MIN_NOISE), tmp_path / "dataset")


class TestReruns:
    @pytest.mark.parametrize("kind", ["dataset", "videos"])
    def test_two_workers_record_the_same(self, kind, tmp_path, request):
        recording = replace(SMALL, video=kind == "videos")
        expected = contents(request.getfixturevalue(kind))
        assert contents(record(recording, tmp_path / "dataset", num_workers=2)) == expected

    def test_seeds_differ(self):
        starts = {str(draw_start(Recording(1, seed=seed), episode, 0)[:2]) for seed in (0, 1) for episode in range(5)}
        assert len(starts) == 10

    @pytest.mark.parametrize("num_workers, kind", [(1, "dataset"), (2, "dataset"), (2, "videos")])
    def test_kill_and_resume(self, tmp_path, num_workers, kind, request):
        expected = contents(request.getfixturevalue(kind))
        output = tmp_path / "dataset"
        staging = tmp_path / "dataset.recording"
        arguments = ["--episodes", "6", "--seed", "3", "--image_size", "32", "--output", str(output)]
        arguments += ["--num_workers", str(num_workers), *(["--video"] if kind == "videos" else [])]
        command = [sys.executable, "-m", "tabletop.record", *arguments]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(staging.glob("episode-*.parquet"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not output.exists()
        finished = {path: path.stat().st_mtime_ns for path in staging.glob("episode-*.parquet")}
        assert 2 <= len(finished) < 6
        # What a kill in the middle of writing leaves behind.
        (staging / "episode-000005.parquet.1.partial").write_bytes(b"half")
        (staging / "episode-000005.observation.images.front.mp4").write_bytes(b"older")
        (tmp_path / "dataset.assembling" / "data").mkdir(parents=True)
        recorded = []
        original = recorder.record_episode
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recorder, "record_episode", lambda *job: (recorded.append(job[1]), original(*job)))
            main([*arguments, "--num_workers", "1"])
        assert not set(recorded) & {int(path.name[8:14]) for path in finished}
        assert contents(output) == expected
        assert leftovers(output) == []

    def test_killed_while_assembling(self, dataset, tmp_path, monkeypatch):
        original = recorder.os.rename

        def die(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(recorder.os, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            record(SMALL, tmp_path / "dataset")
        assert not (tmp_path / "dataset").exists()
        monkeypatch.setattr(recorder.os, "rename", original)
        monkeypatch.setattr(recorder, "record_episode", die)
        assert contents(record(SMALL, tmp_path / "dataset")) == contents(dataset)

    def test_killed_while_clearing_up(self, tmp_path):
        small = Recording(episodes=1, image_size=8)
        output = record(small, tmp_path / "dataset")
        staging = tmp_path / "dataset.recording"
        staging.mkdir()
        (staging / "arguments.json").write_text(json.dumps(recorder.asdict(small)))
        assert record(small, output) == output
        assert leftovers(output) == []

    def test_workers_end_with_the_recording(self, tmp_path):
        command = [sys.executable, "-m", "tabletop.record", "--episodes", "500", "--image_size", "32"]
        command += ["--num_workers", "2", "--output", str(tmp_path / "dataset")]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
        staging = tmp_path / "dataset.recording"
        deadline = time.monotonic() + 60
        while len(list(staging.glob("episode-*.parquet"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1.0)
        before = len(list(staging.iterdir()))
        time.sleep(1.5)
        assert len(list(staging.iterdir())) == before


@pytest.mark.parametrize("nudges", [0.0, 0.5])
def test_nudges(nudges):
    """Pushes show in what was done, close to the object as elsewhere, and never in what was right."""
    env = TabletopEnv(cameras=(), image_size=8, tasks=("pick",))
    pushed, close = 0, 0
    for seed in range(5):
        observation, _ = env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        frames, _ = recorder.demonstrate(env, observation, rng, recorder.MIN_NOISE, nudges=nudges)
        for frame in frames:
            is_pushed = np.abs(frame["action"] - frame["expert_action"])[:3].max() > 0.01
            pushed += is_pushed
            close += is_pushed and np.abs(frame["expert_action"][:3]).max() < 0.01
    assert (pushed > 5, close > 0) == (nudges > 0, nudges > 0)


class TestDetours:
    def drive(self, detour: float, seed: int) -> tuple[TabletopEnv, list[dict], str | None]:
        env = TabletopEnv(cameras=(), image_size=8)
        observation, _ = env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        return env, *recorder.demonstrate(env, observation, rng, recorder.MIN_NOISE, detour, nudges=0.0)

    def test_labels_are_for_the_task_from_the_start(self):
        """Played again, each `expert_action` is the expert's for the target; the first steps went elsewhere."""
        strayed, outcomes = 0, []
        for seed in range(8):
            env, frames, outcome = self.drive(1.0, seed)
            outcomes.append(outcome)
            env.reset(seed=seed)
            for frame in frames:
                np.testing.assert_array_equal(frame["expert_action"], Expert(env).action())
                env.step(frame["action"])
            apart = [np.abs(frame["action"] - frame["expert_action"])[:3].max() > 0.02 for frame in frames]
            strayed += any(apart[:2])
            assert not any(apart[recorder.DETOUR_STEPS[1] :])
        assert strayed > 4
        assert outcomes.count("success") > 5

    def test_nothing_else_is_touched(self):
        """Up to the end of the longest detour, no finger closes."""
        for seed in range(8):
            env, frames, _ = self.drive(1.0, seed)
            if env.goal.task != "push":
                assert all(frame["action"][6] == 1.0 for frame in frames[: recorder.DETOUR_STEPS[0]])

    def test_none_by_default(self):
        frames, straight = (self.drive(detour, 1)[1] for detour in (0.0, 1e-12))
        np.testing.assert_allclose(frames[0]["action"], straight[0]["action"], atol=1e-2)
        assert all(np.abs(frame["action"] - frame["expert_action"])[:3].max() < 0.02 for frame in frames)

    def test_in_a_recording(self, tmp_path):
        colors = [color for color in COLORS if color != "green"]
        output = tmp_path / "dataset"
        command = ["--episodes", "3", "--image_size", "8", "--output", str(output), "--tasks", "pick", "--randomize"]
        main([*command, "--objects", "cube", "--hold_out", *colors])
        lines = [json.loads(line) for line in (output / "meta/tabletop.jsonl").read_text().splitlines()]
        assert {(line["options"]["target"], line["options"]["task"]) for line in lines} == {("green cube", "pick")}
        assert all("green cube" in line["instruction"] and line["environment"]["randomize"] for line in lines)


class TestRefused:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"episodes": 0}, "`episodes` must be at least 1, got 0"),
            ({"seed": -1}, "`seed` must be at least 0"),
            ({"image_size": 0}, "`image_size` must be at least 1"),
            ({"tasks": ("fly",)}, r"`tasks` must be among .* got \['fly'\]"),
            ({"tasks": ()}, "`tasks` must be among"),
            ({"noise": 0.0}, "`noise` must be at least 0.01, got 0.0"),
            ({"noise": float("nan")}, "`noise` must be at least"),
            ({"detour": 1.5}, "`detour` is a share of the episodes, from 0 to 1; got 1.5"),
            ({"nudges": -0.1}, "`nudges` is a share of the steps, from 0 to 1; got -0.1"),
            ({"cameras": ()}, "`cameras` must be among"),
            ({"cameras": ("top",)}, r"`cameras` must be among .* got \['top'\]"),
            ({"objects": ("pink",)}, r"`objects` takes .* got \['pink'\]"),
            ({"hold_out": ("pink",)}, r"`hold_out` takes .* got \['pink'\]"),
            ({"hold_out": tuple(COLORS)}, "leaves no object"),
            ({"video": True, "image_size": 33}, "`image_size` must be even for videos, got 33"),
        ],
    )
    def test_values(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Recording(**{"episodes": 1, **arguments})

    def test_missing_encoder(self, monkeypatch):
        monkeypatch.setattr(recorder, "VIDEO_ENCODER", "libnone")
        with pytest.raises(ValueError, match="lacks the encoder libnone"):
            Recording(1, video=True)

    def test_workers(self, tmp_path):
        with pytest.raises(ValueError, match="`num_workers` must be at least 1"):
            record(SMALL, tmp_path / "dataset", num_workers=0)

    def test_existing_output(self, dataset):
        before = contents(dataset)
        with pytest.raises(FileExistsError, match="remove it or choose another"):
            record(SMALL, dataset)
        assert contents(dataset) == before

    def test_other_arguments(self, tmp_path, capsys):
        (tmp_path / "dataset.recording").mkdir()
        (tmp_path / "dataset.recording" / "arguments.json").write_text(json.dumps(recorder.asdict(SMALL)))
        command = ["--episodes", "6", "--seed", "4", "--image_size", "32", "--output", str(tmp_path / "dataset")]
        with pytest.raises(SystemExit):
            main(command)
        assert "holds a recording with other arguments (seed=3, now 4)" in capsys.readouterr().err
        assert not (tmp_path / "dataset").exists()
