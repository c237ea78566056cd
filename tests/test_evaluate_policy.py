"""Closed-loop evaluation: the rollout loop, replays, pictures, the model card, and the command around them."""

import json
import shutil
import sys
import threading

import av
import evaluate_policy
import gymnasium
import model_card
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES, REPOSITORY, TINY_POLICY
from huggingface_hub import ModelCard, ModelCardData
from load_policy import load_policy
from PIL import Image, ImageDraw

from evaluation import report
from evaluation.environments import Environment
from evaluation.policies import ExpertPolicy, ModelPolicy, RandomPolicy
from evaluation.replay import ReplayPolicy, load_replay
from evaluation.report import CAPTION_HEIGHT
from evaluation.rollout import Episode, Job, rollout, summarize, wilson_interval
from tabletop.environment import TabletopEnv
from tabletop.record import Recording, record
from tabletop.tasks import TASKS


def tabletop(**arguments):
    """Makes tabletops."""
    return Environment(arguments={"cameras": (), **arguments}).make


def run(*arguments) -> int:
    return evaluate_policy.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def expert_output(tmp_path_factory):
    """What the command writes for three episodes of each task by the expert."""
    directory = tmp_path_factory.mktemp("expert") / "new"
    arguments = ("--policy", "expert", "--episodes", 3, "--seed", 5, "--num_envs", 2, "--image_size", 32)
    assert run(*arguments, "--output_dir", directory) == 0
    return directory


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    """Two recorded episodes of each task, with varied looks."""
    output = tmp_path_factory.mktemp("demonstrations") / "demonstrations"
    return record(Recording(episodes=6, seed=2, image_size=16, randomize=True), output)


@pytest.fixture
def changed(demonstrations, tmp_path):
    """Copies the demonstrations with another first line of meta/tabletop.jsonl."""

    def change(**values):
        dataset = shutil.copytree(demonstrations, tmp_path / "changed")
        path = dataset / "meta" / "tabletop.jsonl"
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps({**json.loads(first), **values}), *rest]))
        return dataset

    return change


@pytest.fixture(scope="module")
def results(expert_output):
    return json.loads((expert_output / "results.json").read_text())


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [(10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_interval(successes, trials, low, high):
    np.testing.assert_allclose(wilson_interval(successes, trials), (low, high), atol=1e-4)


@pytest.mark.parametrize("successes, trials", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses(successes, trials):
    with pytest.raises(ValueError, match="have no interval"):
        wilson_interval(successes, trials)


class TestRollout:
    def test_expert_sees_the_scene_of_its_seed(self):
        (episode,) = rollout(ExpertPolicy(), [Job("pick", 7, record=True)], tabletop(image_size=32))
        env = TabletopEnv(image_size=32)
        observation, _ = env.reset(seed=7, options={"task": "pick"})
        assert episode.instruction == observation["instruction"]
        np.testing.assert_array_equal(episode.frames[0], observation["image"])
        for action, frame in zip(episode.actions, episode.frames[1:], strict=True):
            observation, _, _, _, info = env.step(action)
            np.testing.assert_array_equal(frame, observation["image"])
        assert info["outcome"] == episode.outcome == "success"

    def test_random_fails_alike_in_any_batch(self):
        jobs = [Job("pick", seed) for seed in range(4)]
        alone, together = (rollout(RandomPolicy(), jobs, tabletop(max_steps=20), num_envs=n) for n in (1, 3))
        assert summarize(alone)["success_rate"] == 0.0
        for one, other in zip(alone, together, strict=True):
            assert one.outcome == other.outcome
            np.testing.assert_array_equal(one.actions, other.actions)

    def test_model_acts_alike_in_any_batch(self, policy):
        """Instructions of different lengths, and episodes that start while others run."""
        jobs = [Job(task, seed) for task in TASKS for seed in range(2)]
        model_policy = ModelPolicy(*policy)
        make_env = tabletop(image_size=model_policy.image_size, cameras=model_policy.cameras, max_steps=4)
        alone, together = (rollout(model_policy, jobs, make_env, num_envs=n) for n in (1, 3))
        assert len({episode.instruction for episode in alone}) > 3
        assert len({tuple(action) for episode in alone for action in episode.actions}) > 1
        for job, one, other in zip(jobs, alone, together, strict=True):
            assert (one.task, one.seed) == (other.task, other.seed) == (job.task, job.seed)
            assert (one.outcome, one.steps, one.instruction) == (other.outcome, other.steps, other.instruction)
            np.testing.assert_array_equal(one.actions, other.actions)

    def test_every_tick_is_one_batch(self):
        sizes = []

        class Still:
            def act(self, runs):
                assert all(run.observation["image"].any() for run in runs)
                sizes.append(len(runs))
                return np.tile([0, 0, 0, 0, 0, 0, 1.0], (len(runs), 1))

        ended = []
        jobs = [Job("push", seed) for seed in range(5)]
        make_env = tabletop(image_size=16, cameras=("image",), max_steps=2)
        rollout(Still(), jobs, make_env, num_envs=3, on_episode=ended.append)
        assert sizes == [3, 3, 2, 2]
        assert [episode.outcome for episode in ended] == ["timeout"] * 5

    def test_wrong_actions(self):
        class Short(RandomPolicy):
            def act(self, runs):
                return super().act(runs)[:, :6]

        class Broken(RandomPolicy):
            def act(self, runs):
                return super().act(runs) * np.nan

        with pytest.raises(ValueError, match=r"must give actions \(1, 7\), got \(1, 6\)"):
            rollout(Short(), [Job("pick", 0)], tabletop())
        with pytest.raises(ValueError, match=r"policy's actions must be finite, got .* in 'pick', seed 4, step 0"):
            rollout(Broken(), [Job("pick", 4)], tabletop())
        with pytest.raises(ValueError, match="At least one environment"):
            rollout(RandomPolicy(), [Job("pick", 0)], tabletop(), num_envs=0)

    def test_random_needs_bounds(self):
        def make():
            env = TabletopEnv(cameras=())
            env.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (7,))
            return env

        with pytest.raises(ValueError, match="action space with bounds"):
            rollout(RandomPolicy(), [Job("pick", 0)], make)

    def test_an_environment_stays_in_its_thread(self, monkeypatch):
        """More environments than processors share threads, and each is always in the same one."""
        monkeypatch.setattr("os.cpu_count", lambda: 2)
        used, closed = {}, []

        class Watched(TabletopEnv):
            def _watch(self):
                used.setdefault(id(self), set()).add(threading.get_ident())

            def reset(self, **arguments):
                self._watch()
                return super().reset(**arguments)

            def step(self, action):
                self._watch()
                return super().step(action)

            def close(self):
                if self.camera is None:
                    closed.append(threading.get_ident())
                super().close()

        def make():
            env = Watched(cameras=(), max_steps=2)
            env._watch()
            return env

        rollout(RandomPolicy(), [Job("pick", seed) for seed in range(7)], make, num_envs=5)
        assert len(used) == 5
        assert all(len(threads) == 1 for threads in used.values())
        assert len(set.union(*used.values())) == 2
        assert threading.get_ident() not in set.union(*used.values())

    def test_environments_are_closed_after_an_error(self):
        made, closed = [], []

        class Watched(TabletopEnv):
            def close(self):
                closed.append(self)
                super().close()

        def make():
            if len(made) == 2:
                raise ValueError("no third one")
            made.append(Watched(cameras=()))
            return made[-1]

        with pytest.raises(ValueError, match="no third one"):
            rollout(RandomPolicy(), [Job("pick", seed) for seed in range(3)], make, num_envs=3)
        assert set(map(id, closed)) == set(map(id, made))

    def test_an_end_without_an_outcome(self):
        class Silent(TabletopEnv):
            def step(self, action):
                observation, reward, _, _, _ = super().step(action)
                return observation, reward, True, False, {}

        with pytest.raises(ValueError, match="without saying how"):
            rollout(RandomPolicy(), [Job("pick", 0)], lambda: Silent(cameras=()))

    def test_slow_first_calls_do_not_count(self):
        episode = Episode("pick", 0, "", "timeout", [np.zeros(7)] * 5, [60.0, 0.003, 0.004, 0.005, 0.004])
        assert summarize([episode])["ms_per_action"] == pytest.approx(4.0)


class TestReplay:
    def test_every_episode_succeeds(self, demonstrations, tmp_path):
        assert run("--policy", f"replay:{demonstrations}", "--num_envs", 4, "--output_dir", tmp_path) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        stories = [json.loads(line) for line in (demonstrations / "meta" / "tabletop.jsonl").read_text().splitlines()]
        assert results["all"]["success_rate"] == 1.0
        assert results["environment"]["arguments"] == {"image_size": 16, "randomize": True, "cameras": []}
        for episode, story in zip(results["episodes"], stories, strict=True):
            assert (episode["seed"], episode["instruction"]) == (story["seed"], story["instruction"])
            assert (episode["task"], episode["steps"]) == (story["options"]["task"], story["length"])
        assert {path.name for path in tmp_path.glob("*.gif")} == {f"{task}.gif" for task in TASKS}

    def test_the_recorded_actions_are_given(self, demonstrations):
        table = pq.read_table(demonstrations / "data/chunk-000/file-000.parquet", columns=["action", "episode_index"])
        recorded = np.stack(table["action"].to_numpy())
        replay = load_replay(demonstrations, tasks=["push"])
        environment = Environment(arguments={**replay.environment_arguments, "cameras": ()})
        for episode, index in zip(rollout(ReplayPolicy(replay), replay.jobs(), environment.make), (2, 5), strict=True):
            np.testing.assert_array_equal(episode.actions, recorded[table["episode_index"].to_numpy() == index])

    def test_limits(self, demonstrations):
        replay = load_replay(demonstrations, episodes=4)
        assert [job.task for job in replay.jobs(record_first=True)] == ["pick", "put_in_bowl", "push", "pick"]
        assert [job.record for job in replay.jobs(record_first=True)] == [True, True, True, False]
        assert not any(job.record for job in replay.jobs())

    def test_too_few_steps_are_a_timeout(self, demonstrations, tmp_path):
        policy = f"replay:{demonstrations}"
        assert run("--policy", policy, "--max_steps", 3, "--episodes", 1, "--output_dir", tmp_path) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["all"]["failures"] == {"timeout": 1}

    def test_after_the_last_action_the_robot_keeps_still(self, demonstrations):
        replay = load_replay(demonstrations, episodes=1)
        replay.actions[0] = replay.actions[0][:2]
        make_env = Environment(arguments={**replay.environment_arguments, "cameras": (), "max_steps": 4}).make
        (episode,) = rollout(ReplayPolicy(replay), replay.jobs(), make_env)
        np.testing.assert_array_equal(episode.actions[2:], [[0, 0, 0, 0, 0, 0, 1]] * 2)

    @pytest.mark.parametrize(
        "change, message",
        [
            ({"seed": 1}, "does not begin as it was recorded"),
            ({"qvel": [0.0] * 30}, "does not begin as it was recorded"),
            ({"qpos": [0.0]}, "differs by up to inf"),
            ({"instruction": "sing"}, "does not begin as it was recorded"),
            ({"length": 3}, "the dataset is damaged"),
            ({"episode_index": 77}, "episode 77 has 0 actions"),
            ({"environment": {"image_size": 8}}, "environments that differ"),
        ],
    )
    def test_damage(self, changed, capsys, change, message):
        assert run("--policy", f"replay:{changed(**change)}") == 1
        assert message in capsys.readouterr().err

    def test_rounding_is_no_damage(self, changed, demonstrations):
        story = json.loads((demonstrations / "meta" / "tabletop.jsonl").read_text().splitlines()[0])
        dataset = changed(qpos=[value + 1e-9 for value in story["qpos"]])
        assert run("--policy", f"replay:{dataset}", "--episodes", 1) == 0


class TestPictures:
    @pytest.fixture
    def episode(self):
        pictures = [np.full((24, 24, 3), 40 * index, np.uint8) for index in range(4)]
        actions = [np.float32([0.01, -0.02, 0, 0, 0, 0.1, 1])] * 3
        return Episode("lift/one cube", 0, "lift the cube", "wrong_object", actions, [0.01] * 3, pictures)

    @pytest.mark.parametrize("rate", [10, 12.5])
    def test_mp4(self, episode, tmp_path, rate):
        report.save_video(episode, tmp_path / "it.mp4", rate)
        with av.open(tmp_path / "it.mp4") as container:
            (stream,) = container.streams
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (stream.width, stream.height) == (336, 336 + CAPTION_HEIGHT)
            assert stream.average_rate == rate
        assert len(pictures) == 4 + 2 * rate - 1  # the last one stays for two seconds
        expected = [np.asarray(picture) for picture in report.draw_frames(episode)]
        for shown, drawn in zip(pictures, [*expected, *expected[-1:] * int(2 * rate - 1)], strict=True):
            assert np.abs(shown.astype(int) - drawn).mean() < 4

    def test_gif(self, episode, tmp_path):
        report.save_video(episode, tmp_path / "it.gif", 10)
        with Image.open(tmp_path / "it.gif") as gif:
            durations = []
            for index in range(gif.n_frames):
                gif.seek(index)
                durations.append(gif.info["duration"])
        assert durations == [100, 100, 100, 2000]

    def test_the_command_writes_mp4(self, tmp_path):
        arguments = ("--policy", "random", "--episodes", 1, "--max_steps", 3, "--tasks", "pick", "--image_size", 16)
        assert run(*arguments, "--video", "mp4", "--output_dir", tmp_path) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"pick.mp4", "sheet.png", "results.json"}

    def test_mp4_needs_av(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setitem(sys.modules, "av", None)
        assert run("--policy", "no/such_policy", "--video", "mp4", "--output_dir", tmp_path / "new") == 1
        assert "pip install av" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        "text",
        ["lift", "put the white mug on the left plate and the other one on the right plate", "W" * 300, "a " * 400],
    )
    def test_text_stays_in_its_box(self, text):
        picture = Image.new("L", (300, 60))
        report._write(ImageDraw.Draw(picture), (20, 10), text, 17, 255, (240, 24))
        left, top, right, bottom = picture.getbbox()
        assert 20 <= left < right <= 262
        assert 10 <= top < bottom <= 10 + 24 + 2

    def test_pictures_keep_their_shape(self):
        wide = np.full((20, 40, 3), 255, np.uint8)
        picture = np.asarray(report._resize(wide, 100))
        assert picture.shape == (100, 100, 3)
        assert (picture[30:70] == 255).all()
        assert (picture[:20] != 255).all()

    def test_file_names(self):
        assert report.file_name("libero/pick up: the bowl") == "libero_pick_up_the_bowl"
        assert len(report.file_name("word " * 100)) == 100


class TestModelCard:
    BODY = "\n# Mine\r\n\n---\ntext with  spaces \n\n---\nno newline at the end: é"
    METADATA = (
        "license: apache-2.0\nunknown_key:\n  nested: [1, {two: 3}]\nlanguage:\n- 'no'\nmodel-index:\n- name: mine\n"
        "  extra: kept\n  results:\n  - task: {type: robotics}\n    dataset: {type: other, name: Other}\n"
        "    metrics:\n    - {type: success_rate, value: 0.5}\n"
    )

    @pytest.fixture
    def card(self, tmp_path):
        path = tmp_path / "README.md"
        path.write_bytes(f"---\n{self.METADATA}---\n{self.BODY}".encode())
        return path

    def test_the_hub_reads_what_was_written(self, card, results):
        model_card.update_model_index(card, results)
        data = ModelCard.load(card).data
        assert data.model_name == "mine"
        other, *ours = data.eval_results
        assert (other.dataset_type, other.metric_value) == ("other", 0.5)
        assert [result.dataset_config for result in ours] == [*TASKS, None]
        for result, numbers in zip(ours, [*results["tasks"].values(), results["all"]], strict=True):
            assert (result.task_type, result.dataset_type) == ("robotics", "tabletop:Tabletop-v0")
            assert (result.metric_type, result.metric_value) == ("success_rate", 1.0)
            assert result.metric_args["trials"] == numbers["trials"]
            assert result.metric_args["wilson_95"] == [round(bound, 4) for bound in numbers["wilson_95"]]
            assert result.dataset_args == {"seeds": "5-7"}

    def test_what_the_environment_was_told(self, results):
        told = {**results, "arguments": {**results["arguments"], "env_arguments": {"hold_out": ["ball"]}}}
        for result in model_card.eval_results(told):
            assert result.dataset_args == {"seeds": "5-7", "hold_out": ["ball"]}

    def test_round_trip_through_the_hub(self, results):
        written = ModelCardData(model_name="mine", eval_results=model_card.eval_results(results))
        read = ModelCard(f"---\n{written.to_yaml()}\n---\n").data
        assert read.model_name == "mine"
        assert read.eval_results == written.eval_results

    def test_the_rest_of_the_card_stays(self, card, results):
        before = ModelCard.load(card).data.to_dict()
        model_card.update_model_index(card, results)
        assert card.read_bytes().endswith(f"\n---\n{self.BODY}".encode())
        data = ModelCard.load(card).data.to_dict()
        assert list(data) == list(before)
        assert [data[key] for key in data if key != "model-index"] == [
            before[key] for key in before if key != "model-index"
        ]
        assert "extra: kept" in card.read_text()
        assert [path.name for path in card.parent.iterdir()] == ["README.md"]

    def test_results_are_replaced(self, card, results):
        """And the rate over all tasks, of which one is no longer true, goes."""
        model_card.update_model_index(card, results)
        worse = json.loads(json.dumps(results))
        worse["tasks"] = {"pick": {**results["tasks"]["pick"], "success_rate": 0.123456}}
        model_card.update_model_index(card, worse)
        values = {result.dataset_config: result.metric_value for result in ModelCard.load(card).data.eval_results[1:]}
        assert values == {"put_in_bowl": 1.0, "push": 1.0, "pick": 0.1235}
        once = card.read_bytes()
        model_card.update_model_index(card, worse)
        assert card.read_bytes() == once

    @pytest.mark.parametrize(
        "metadata", ["", "---\n---\n", "---\nlicense: mit\n---\n", "---\r\nlicense: mit\r\n---\r\n"]
    )
    @pytest.mark.parametrize("text", ["", "# Text\n", "\n\n# Text\n\n---\nmore\n---\n"])
    def test_cards_without_results(self, tmp_path, results, metadata, text):
        folder = tmp_path / "my-policy"
        folder.mkdir()
        (folder / "README.md").write_bytes((metadata + text).encode())
        model_card.update_model_index(folder / "README.md", results)
        written = (folder / "README.md").read_bytes().decode()
        line_break = "\r\n" if "\r" in metadata else "\n"
        assert written.endswith(f"{line_break}---{line_break}{text}")
        head = written.removesuffix(text)
        assert head.count("\r\n") == (head.count("\n") if "\r" in metadata else 0)
        data = ModelCard(written).data
        assert (data.model_name, len(data.eval_results)) == ("my-policy", 4)
        assert data.get("license") == ("mit" if "mit" in metadata else None)

    def test_the_command(self, card):
        arguments = ("--policy", REPOSITORY, "--episodes", 2, "--max_steps", 2, "--tasks", "push", "--seed", 3)
        assert run(*arguments, "--trust_remote_code", "--model_card", card) == 0
        _, result = ModelCard.load(card).data.eval_results
        assert (result.dataset_config, result.metric_value, result.dataset_args) == ("push", 0.0, {"seeds": "3-4"})

    @pytest.mark.parametrize("policy", ["expert", "random", "replay:somewhere"])
    def test_no_baseline_enters_it(self, card, capsys, policy):
        before = card.read_bytes()
        assert run("--policy", policy, "--episodes", 1, "--max_steps", 1, "--model_card", card) == 1
        assert "takes the success of a model" in capsys.readouterr().err
        assert card.read_bytes() == before

    @pytest.mark.parametrize(
        "text, message",
        [
            (None, "There is no model card"),
            ("---\na: [1\n---\n", "cannot be read"),
            ("---\n- a\n---\n", "must be keys and values"),
            ("---\nmodel-index: mine\n---\n", "must be a list of models"),
        ],
    )
    def test_unreadable_cards_are_refused_first(self, tmp_path, capsys, text, message):
        path = tmp_path / "README.md"
        if text is not None:
            path.write_text(text)
        assert run("--policy", "no/such_policy", "--model_card", path) == 1
        assert message in capsys.readouterr().err


class TestCommand:
    def test_results(self, expert_output):
        results = json.loads((expert_output / "results.json").read_text())
        keys = {"policy", "arguments", "versions", "environment", "seconds", "tasks", "all", "episodes"}
        assert set(results) == keys
        assert (results["policy"], results["arguments"]["seed"]) == ("expert", 5)
        assert {"python", "torch", "transformers", "mujoco", "gymnasium"} <= set(results["versions"])
        assert list(results["tasks"]) == list(TASKS)
        for numbers in [*results["tasks"].values(), results["all"]]:
            assert numbers["success_rate"] == 1.0
            assert numbers["failures"] == {}
            assert numbers["wilson_95"] == list(wilson_interval(numbers["successes"], numbers["trials"]))
            assert numbers["ms_per_action"] > 0
        assert [(e["task"], e["seed"]) for e in results["episodes"]] == [(t, s) for t in TASKS for s in (5, 6, 7)]
        assert set(results["episodes"][0]) == {"task", "seed", "instruction", "outcome", "steps"}

    def test_pictures(self, expert_output):
        episodes = json.loads((expert_output / "results.json").read_text())["episodes"]
        for task, first in zip(TASKS, episodes[::3], strict=True):
            with Image.open(expert_output / f"{task}.gif") as gif:
                assert gif.size == (336, 336 + CAPTION_HEIGHT)
                assert 2 < gif.n_frames <= first["steps"] + 1  # equal neighbours are merged
        with Image.open(expert_output / "sheet.png") as sheet:
            sheet.load()
            assert sheet.size == (5 * 232 + 8, 3 * 266 + 8)

    def test_the_model_of_this_checkout(self, tmp_path, capsys):
        arguments = ("--policy", REPOSITORY, "--episodes", 2, "--tasks", "push", "pick", "--max_steps", 2)
        assert run(*arguments, "--trust_remote_code", "--output_dir", tmp_path) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        (side, _) = json.loads((REPOSITORY / "config.json").read_text())["image_sizes"]
        assert results["environment"]["arguments"]["image_size"] == side
        assert list(results["tasks"]) == ["push", "pick"]
        assert results["all"]["failures"] == {"timeout": 4}
        table = capsys.readouterr().out.splitlines()
        assert table[0].split()[:4] == ["task", "trials", "successes", "rate"]
        assert "timeout 4" in table[4]

    def test_nothing_is_overwritten(self, tmp_path, capsys):
        results = tmp_path / "results.json"
        results.write_text("mine")
        arguments = ("--policy", "random", "--episodes", 1, "--max_steps", 1, "--output_dir", tmp_path)
        assert run(*arguments) == 1
        assert "--overwrite" in capsys.readouterr().err
        assert results.read_text() == "mine"
        assert run(*arguments, "--overwrite") == 0
        assert json.loads(results.read_text())["policy"] == "random"

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--policy", "no/such_policy"], "'no/such_policy' cannot be loaded"),
            (["--policy", REPOSITORY / "tests"], "cannot be loaded"),
            (["--policy", "expert", "--tasks", "fly"], r"Tasks ['fly'] are unknown"),
            (["--policy", "expert", "--episodes", 0], "`--episodes` must be at least 1"),
            (["--policy", "expert", "--num_envs", 0], "`--num_envs` must be at least 1"),
            (["--policy", TINY_POLICY, "--unnorm_key", "moon"], "moon"),
            (["--policy", f"replay:{FIXTURES / 'lerobot' / 'v30_images'}"], "no meta/tabletop.jsonl"),
            (["--policy", "replay:nowhere"], "no meta/tabletop.jsonl"),
            (["--policy", "replay:nowhere", "--seed", 1], "--seed would be ignored"),
            (["--policy", "random", "--env_arguments", "[1]"], "must be names and values in JSON"),
            (["--policy", "random", "--env_arguments", '{"moon": 1}'], "moon"),
            (["--policy", "random", "--env_arguments", '{"backend": "egl"}'], "Start Python with MUJOCO_GL=egl"),
            (["--policy", "expert", "--device", "cuda"], "--device would be ignored"),
            (["--policy", "expert", "--video", "mp4"], "--video would be ignored"),
            (["--policy", "expert", "--camera", "front"], "--camera would be ignored"),
            (["--policy", "random", "--open_loop", "nowhere", "--env", "Other-v0"], "--env would be ignored"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, capsys, monkeypatch):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        assert run(*arguments) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]

    def test_environment_arguments(self, tmp_path):
        arguments = ("--policy", "random", "--episodes", 1, "--max_steps", 1, "--output_dir", tmp_path)
        assert run(*arguments, "--env_arguments", '{"randomize": true, "image_size": 8}', "--image_size", 9) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        expected = {"cameras": [], "randomize": True, "image_size": 9, "max_steps": 1}
        assert results["environment"]["arguments"] == expected

    def test_the_environment_configures_the_policy(self, policy):
        configured = []

        class Strict(TabletopEnv):
            def configure_policy(self, policy):
                configured.append(policy)

        class Place:
            def make(self):
                return gymnasium.Wrapper(Strict(cameras=()))

        model_policy = ModelPolicy(*policy)
        assert evaluate_policy.introduce(model_policy, Place()) == (TASKS, 10)
        evaluate_policy.introduce(RandomPolicy(), Place())
        assert configured == [model_policy]

    def test_what_environments_are_told(self):
        def told(*arguments):
            parsed = evaluate_policy.make_parser().parse_args(["--policy", "random", *arguments])
            return evaluate_policy.make_environment(parsed, RandomPolicy(), {}).arguments

        assert told() == told("--env", "robosuite:Lift") == {"cameras": ()}
        assert told("--env", "Other-v0", "--max_steps", "3") == {"max_steps": 3}
        assert told("--env", "robosuite:Lift", "--adapter", "module:Class") == {}

    def test_wrong_action_dimension(self, tmp_path, capsys):
        for path in [*TINY_POLICY.glob("*.json"), *TINY_POLICY.glob("*.safetensors")]:
            (tmp_path / path.name).symlink_to(path)
        statistics = json.loads((TINY_POLICY / "dataset_statistics.json").read_text())
        action = statistics["tabletop"]["action"]
        statistics["tabletop"]["action"] = {name: values[:6] for name, values in action.items()}
        (tmp_path / "dataset_statistics.json").unlink()
        (tmp_path / "dataset_statistics.json").write_text(json.dumps(statistics))
        assert run("--policy", tmp_path) == 1
        assert "7 dimensions; the model's have 6" in capsys.readouterr().err


class TestChunks:
    """How the chunks of a policy are spent, by flags."""

    @pytest.fixture(scope="class")
    def chunked(self, tmp_path_factory):
        """The tiny policy with chunks of three, two cameras and the state."""
        directory = tmp_path_factory.mktemp("chunked") / "policy"
        changes = {"chunk_size": 3, "num_images": 2, "use_proprio": True, "proprio_dim": 8, "norm_stats": {}}
        model, processor = load_policy(TINY_POLICY, changes=changes)
        bounds = {"q01": [-1.0] * 8, "q99": [1.0] * 8, "min": [-1.0] * 8, "max": [1.0] * 8}
        model.norm_stats = {"tabletop": {**processor.norm_stats["tabletop"], "proprio": bounds}}
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        return directory

    @pytest.mark.parametrize(
        ("flags", "calls"), [((), 2), (("--actions_per_chunk", 1), 4), (("--temporal_ensemble", 0.01), 4)]
    )
    def test_rollouts(self, chunked, monkeypatch, flags, calls):
        asked, predict = [], ModelPolicy.predict_chunks

        def remember(policy, instructions, images, states):
            asked.append(([len(row) for row in images], np.shape(states)))
            return predict(policy, instructions, images, states)

        monkeypatch.setattr(ModelPolicy, "predict_chunks", remember)
        arguments = ("--policy", chunked, "--tasks", "push", "--episodes", 1, "--max_steps", 4, *flags)
        assert run(*arguments) == 0
        assert asked == [([2], (1, 8))] * calls

    def test_open_loop(self, chunked, tmp_path):
        dataset = FIXTURES / "lerobot" / "v30_images"
        arguments = ("--policy", chunked, "--open_loop", dataset, "--frames", 2, "--episodes", 1)
        assert run(*arguments, "--output_dir", tmp_path) == 0
        results = json.loads((tmp_path / "open_loop.json").read_text())
        assert results["cameras"] == ["observation.images.front", "observation.images.wrist"]

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--actions_per_chunk", 4), "`--actions_per_chunk 4`: the policy's chunks have 3 action(s)"),
            (("--actions_per_chunk", 0), "`--actions_per_chunk` must be at least 1"),
            (("--temporal_ensemble", 0.0, "--policy", "random"), "--temporal_ensemble would be ignored"),
        ],
    )
    def test_refused(self, chunked, capsys, flags, message):
        assert run("--policy", chunked, *flags) == 1
        assert message in capsys.readouterr().err
