"""The open-loop check: its figures against hand-made numbers, what it shows the policy, and the command."""

import io
import json

import evaluate_policy
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES, TINY_POLICY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluation.open_loop import (
    DIMENSIONS,
    Comparison,
    RandomPredictor,
    RecordedFrames,
    dimension_names,
    measure,
    predict,
    sample,
)
from evaluation.policies import ModelPolicy
from evaluation.report import format_open_loop, save_open_loop_figure


DATASET = FIXTURES / "lerobot" / "v30_images"
FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def run(*arguments) -> int:
    return evaluate_policy.main([str(argument) for argument in arguments])


def compared(recorded, predicted, index=0) -> Comparison:
    """An episode of which all frames are sampled."""
    episode = Comparison(0, index, ["go"] * len(recorded), np.float32(recorded))
    episode.predicted[:] = predicted
    episode.is_sampled[:] = True
    return episode


@pytest.fixture(scope="module")
def rows():
    """The rows of the dataset by episode, as pyarrow reads them."""
    paths = sorted((DATASET / "data").rglob("*.parquet"))
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    episodes = {}
    for row in rows:
        episodes.setdefault(row["episode_index"], []).append(row)
    return episodes


class Recorder:
    """Predicts zeros, and keeps what it was asked."""

    def __init__(self, dimensions=7):
        self.dimensions, self.asked, self.sizes = dimensions, [], []

    def predict(self, instructions, images, states=None):
        self.asked += zip(instructions, images, states or [None] * len(images), strict=True)
        self.sizes.append(len(instructions))
        return np.arange(len(self.asked) - len(images), len(self.asked))[:, None] * np.ones(self.dimensions)


class TestMeasure:
    def test_by_hand(self):
        first = compared([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]], [[1.0, 1.0], [2.0, 0.0], [3.0, 1.0]])
        second = compared([[10.0, 1.0]], [[8.0, 1.0]], index=1)
        result = measure([first, second])
        assert (result["episodes"], result["frames"], result["gripper_accuracy"]) == (2, 4, None)
        numbers, constant = result["dimensions"]["action 0"], result["dimensions"]["action 1"]
        assert numbers["mae"] == pytest.approx(1.0)  # |1|, 0, |-1|, |-2|
        assert numbers["rmse"] == pytest.approx(1.5**0.5)
        assert numbers["correlation"] == pytest.approx(np.corrcoef([1, 2, 3, 8], [0, 2, 4, 10])[0, 1])
        assert numbers["mean_action_mae"] == pytest.approx(3.0)  # to 4: 4, 2, 0, 6
        assert numbers["previous_action_mae"] == pytest.approx(2.0)  # the first frames have no action before them
        assert (constant["mae"], constant["correlation"]) == (0.25, None)
        assert numbers["same_bin"] is numbers["within_one_bin"] is None

    def test_gripper(self):
        recorded, predicted = np.zeros((5, 7)), np.zeros((5, 7))
        recorded[:, 6], predicted[:, 6] = [1, 1, 1, 0, 0], [0.9, 0.4, 0.6, 0.1, 0.7]
        accuracy = measure([compared(recorded, predicted)])["gripper_accuracy"]
        assert accuracy == pytest.approx({"policy": 0.6, "mean_action": 0.6, "previous_action": 0.75})

    def test_bins(self):
        recorded, predicted = [[0.0], [0.0], [0.0], [0.0]], [[0.1], [1.2], [-1.0], [2.5]]
        result = measure([compared(recorded, predicted)], bins=np.floor)["dimensions"]["action 0"]
        assert (result["same_bin"], result["within_one_bin"]) == (0.25, 0.75)

    def test_frames_that_are_only_drawn_do_not_count(self):
        episode = compared([[0.0], [1.0], [2.0]], [[0.0], [50.0], [2.0]])
        episode.is_sampled[1] = False
        result = measure([episode])
        assert (result["frames"], result["dimensions"]["action 0"]["mae"]) == (2, 0.0)
        assert result["dimensions"]["action 0"]["mean_action_mae"] == 1.0

    def test_results_are_json(self):
        result = measure([compared([[1.0]], [[1.0]])])
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert result["dimensions"]["action 0"]["previous_action_mae"] is None
        assert "action 0" in format_open_loop(result)

    def test_bins_of_a_model_are_its_tokens(self, policy):
        model, processor = policy
        image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        instructions = ["pick up the red cube", "push it"]
        inputs = processor(instruction=instructions, images=[image, image[::-1]])
        output = model.predict_action(**inputs, return_dict=True)
        bins = ModelPolicy(model, processor).bins(output.actions)
        numbers = processor.codec.token_end - output.token_ids.numpy()
        np.testing.assert_array_equal(bins, np.minimum(numbers, 255))

    def test_the_topmost_token_is_no_bin_of_its_own(self, policy):
        model, processor = policy
        statistics = model.norm_stats["tabletop"]["action"]
        top = np.where(statistics["mask"], statistics["q99"], 1.0)[None]
        decoded = processor.decode_actions(processor.encode_actions(top))
        bins = ModelPolicy(model, processor).bins
        changing = np.array(statistics["q99"]) > np.array(statistics["q01"])
        np.testing.assert_array_equal(bins(top)[:, changing], 255)
        np.testing.assert_array_equal(bins(decoded)[:, changing], 255)


class TestSample:
    @given(
        st.lists(st.lists(st.sampled_from(["go", "", " "]), min_size=1, max_size=30), min_size=1), st.integers(1, 50)
    )
    def test_number_and_spread(self, instructions, frames):
        episodes = [Comparison(0, 0, texts, np.zeros((len(texts), 7))) for texts in instructions]
        told = np.concatenate([episode.is_told for episode in episodes])
        if not told.any():
            with pytest.raises(ValueError, match="No frame of the dataset has an instruction"):
                sample(episodes, frames)
            return
        sample(episodes, frames)
        sampled = np.concatenate([episode.is_sampled for episode in episodes])
        assert sampled.sum() == min(frames, told.sum())
        assert not (sampled & ~told).any()
        gaps = np.diff(np.flatnonzero(sampled[told]))
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
        assert sum(episode.is_drawn for episode in episodes) == min(2, len(episodes))
        for episode in episodes:
            assert not (episode.is_wanted & ~episode.is_told).any()


class TestFrames:
    @pytest.mark.parametrize(
        "cameras, keys, options",
        [
            (None, [FRONT], {}),
            ([WRIST], [WRIST], {}),
            (None, [FRONT, WRIST], {"num_images": 2, "use_proprio": True}),
            ([WRIST, FRONT], [WRIST, FRONT], {"num_images": 2}),
        ],
    )
    def test_the_policy_sees_the_recorded_frames(self, rows, cameras, keys, options):
        dataset, recorder = RecordedFrames(str(DATASET), cameras, **options), Recorder()
        episodes = dataset.episodes()
        sample(episodes, 20)
        batches = []
        predict(recorder, dataset, episodes, 8, batches.append)
        wanted = [
            (episode, step)
            for episode in episodes
            for step, instruction in enumerate(episode.instructions)
            if (episode.is_sampled[step] or episode.is_drawn) and instruction
        ]
        assert dataset.cameras == keys
        assert recorder.sizes == batches == [8] * (len(wanted) // 8) + [len(wanted) % 8] * (len(wanted) % 8 > 0)
        tasks = pq.read_table(DATASET / "meta" / "tasks.parquet").to_pylist()
        texts = {row["task_index"]: next(value for value in row.values() if isinstance(value, str)) for row in tasks}
        for number, ((episode, step), (instruction, images, state)) in enumerate(
            zip(wanted, recorder.asked, strict=True)
        ):
            row = rows[episode.index][step]
            for image, key in zip(images, keys, strict=True):
                np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(row[key]["bytes"]))))
            expected = np.float32(row["observation.state"]) if options.get("use_proprio") else None
            np.testing.assert_array_equal(state, expected)
            np.testing.assert_array_equal(episode.recorded[step], np.float32(row["action"]))
            assert instruction == texts[row["task_index"]]
            assert (episode.predicted[step] == number).all()
        for episode in episodes:
            assert np.isnan(episode.predicted[~episode.is_wanted]).all()

    def test_cameras_that_are_not_there(self):
        with pytest.raises(ValueError, match=r"looks at 2 image\(s\) .* got the cameras \['front'\]"):
            RecordedFrames(str(DATASET), ["front"], num_images=2)
        with pytest.raises(ValueError, match=r"has no cameras \['wrist_2'\]"):
            RecordedFrames(str(DATASET), num_images=3)

    def test_all_episodes_or_the_first(self, rows):
        episodes = RecordedFrames(str(DATASET)).episodes()
        assert {episode.index: len(episode.recorded) for episode in episodes} == {
            index: len(frames) for index, frames in rows.items()
        }
        assert [episode.index for episode in RecordedFrames(str(DATASET)).episodes(2)] == [0, 1]

    def test_another_robot(self):
        dataset = RecordedFrames(str(DATASET))
        episodes = dataset.episodes(1)
        sample(episodes, 3)
        with pytest.raises(ValueError, match="have 14 dimensions, and the recorded ones 7"):
            predict(Recorder(14), dataset, episodes, 2)
        assert dimension_names(7) == DIMENSIONS
        assert dimension_names(2) == ("action 0", "action 1")

    def test_random_stays_among_the_recorded(self):
        episodes = RecordedFrames(str(DATASET)).episodes()
        actions = np.concatenate([episode.recorded for episode in episodes])
        drawn = RandomPredictor(episodes, 0).predict(["go"] * 2000, [], None)
        assert (drawn >= actions.min(axis=0)).all()
        assert (drawn <= actions.max(axis=0)).all()
        middle = (actions.min(axis=0) + actions.max(axis=0)) / 2
        np.testing.assert_allclose(drawn.mean(axis=0), middle, atol=0.05 * np.ptp(actions, axis=0).max())


class TestCommand:
    KEYS = ("policy", "arguments", "versions", "dataset", "cameras", "seconds", "episodes", "frames", "dimensions")

    def test_random(self, tmp_path, capsys):
        assert run("--policy", "random", "--open_loop", DATASET, "--frames", 30, "--output_dir", tmp_path) == 0
        results = json.loads((tmp_path / "open_loop.json").read_text())
        assert tuple(results) == (*self.KEYS, "gripper_accuracy")
        assert (results["frames"], results["episodes"], list(results["dimensions"])) == (30, 5, list(DIMENSIONS))
        assert capsys.readouterr().out.splitlines()[2].startswith("dimension")
        with Image.open(tmp_path / "open_loop.png") as picture:
            assert np.ptp(np.asarray(picture.convert("L"))) == 255
        assert run("--policy", "random", "--open_loop", DATASET, "--output_dir", tmp_path) == 1
        assert "--overwrite" in capsys.readouterr().err

    def test_a_model(self, capsys):
        assert run("--policy", TINY_POLICY, "--open_loop", DATASET, "--frames", 6, "--episodes", 1) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "6 frames of 1 episodes"
        assert all(line.count("%") == 2 for line in lines[4:11])
        assert lines[-1].startswith("gripper on the right side: policy ")

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--policy", "expert", "--open_loop", DATASET], "compares a model, or `random`"),
            (["--policy", "replay:x", "--open_loop", DATASET], "compares a model, or `random`"),
            (["--policy", "random", "--open_loop", DATASET, "--camera", "moon"], "moon"),
            (["--policy", "random", "--open_loop", "nowhere"], "nowhere"),
            (["--policy", "random", "--open_loop", DATASET, "--frames", 0], "`--frames` must be at least 1"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, capsys):
        assert run(*arguments) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in line

    def test_the_figure_needs_matplotlib(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert run("--policy", "random", "--open_loop", DATASET, "--output_dir", tmp_path / "new") == 1
        assert "requirements-evaluation.txt" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    def test_the_figure_draws_any_number_of_episodes(self, tmp_path):
        for number in (1, 3):
            episodes = [compared(np.eye(2), np.eye(2), index) for index in range(number)]
            for episode in episodes[:2]:
                episode.is_drawn = True
            save_open_loop_figure(episodes, ["a", "b"], tmp_path / f"{number}.png", "title")
        with Image.open(tmp_path / "1.png") as one, Image.open(tmp_path / "3.png") as three:
            assert one.width < three.width
            assert one.height == three.height
