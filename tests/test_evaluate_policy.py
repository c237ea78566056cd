"""Closed-loop evaluation: the rollout loop and the command around it."""

import json

import evaluate_policy
import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from tabletop.environment import TabletopEnv
from tabletop.rollout import ExpertPolicy, Job, ModelPolicy, RandomPolicy, rollout, summarize, wilson_interval
from tabletop.tasks import TASKS


def run(*arguments) -> int:
    return evaluate_policy.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def expert_output(tmp_path_factory):
    """What the command writes for three episodes of each task by the expert."""
    directory = tmp_path_factory.mktemp("expert") / "new"
    arguments = ("--policy", "expert", "--episodes", 3, "--seed", 5, "--num_envs", 2, "--image_size", 32)
    assert run(*arguments, "--output_dir", directory) == 0
    return directory


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
        (episode,) = rollout(ExpertPolicy(), [Job("pick", 7, record=True)], image_size=32)
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
        alone, together = (rollout(RandomPolicy(), jobs, num_envs=n, max_steps=20) for n in (1, 3))
        assert summarize(alone)["success_rate"] == 0.0
        for one, other in zip(alone, together, strict=True):
            assert one.outcome == other.outcome
            np.testing.assert_array_equal(one.actions, other.actions)

    def test_model_acts_alike_in_any_batch(self, policy):
        """Instructions of different lengths, and episodes that start while others run."""
        jobs = [Job(task, seed) for task in TASKS for seed in range(2)]
        model_policy = ModelPolicy(*policy)
        size = model_policy.image_size
        alone, together = (rollout(model_policy, jobs, num_envs=n, image_size=size, max_steps=4) for n in (1, 3))
        assert len({episode.instruction for episode in alone}) > 3
        assert len({tuple(action) for episode in alone for action in episode.actions}) > 1
        for job, one, other in zip(jobs, alone, together, strict=True):
            assert (one.task, one.seed) == (other.task, other.seed) == (job.task, job.seed)
            assert (one.outcome, one.steps, one.instruction) == (other.outcome, other.steps, other.instruction)
            np.testing.assert_array_equal(one.actions, other.actions)

    def test_every_tick_is_one_batch(self):
        sizes = []

        class Still:
            needs_images = True

            def act(self, envs, observations):
                assert all(observation["image"].any() for observation in observations)
                sizes.append(len(envs))
                return np.tile([0, 0, 0, 0, 0, 0, 1.0], (len(envs), 1))

        ended = []
        jobs = [Job("push", seed) for seed in range(5)]
        rollout(Still(), jobs, num_envs=3, image_size=16, max_steps=2, on_episode=ended.append)
        assert sizes == [3, 3, 2, 2]
        assert [episode.outcome for episode in ended] == ["timeout"] * 5

    def test_wrong_actions(self):
        class Short(RandomPolicy):
            def act(self, envs, observations):
                return super().act(envs, observations)[:, :6]

        class Broken(RandomPolicy):
            def act(self, envs, observations):
                return super().act(envs, observations) * np.nan

        with pytest.raises(ValueError, match=r"must give actions \(1, 7\), got \(1, 6\)"):
            rollout(Short(), [Job("pick", 0)])
        with pytest.raises(ValueError, match="must be finite"):
            rollout(Broken(), [Job("pick", 0)])
        with pytest.raises(ValueError, match="At least one environment"):
            rollout(RandomPolicy(), [Job("pick", 0)], num_envs=0)


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
                assert gif.size == (336, 336 + evaluate_policy.CAPTION_HEIGHT)
                assert 2 < gif.n_frames <= first["steps"] + 1  # equal neighbours are merged
        with Image.open(expert_output / "sheet.png") as sheet:
            sheet.load()
            assert sheet.size == (5 * 232 + 8, 3 * 266 + 8)

    def test_the_model_of_this_checkout(self, tmp_path, capsys):
        arguments = ("--policy", REPOSITORY, "--episodes", 2, "--tasks", "push", "pick", "--max_steps", 2)
        assert run(*arguments, "--trust_remote_code", "--output_dir", tmp_path) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["environment"]["image_size"] == 112
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
            (["--policy", REPOSITORY, "--unnorm_key", "moon"], "moon"),
        ],
    )
    def test_errors_are_one_line(self, arguments, message, capsys):
        assert run(*arguments) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert message in lines[0]

    def test_wrong_action_dimension(self, policy):
        model, processor = policy
        statistics = model.norm_stats["tabletop"]
        short = {name: values[:6] for name, values in statistics["action"].items()}
        model.norm_stats = {"tabletop": {**statistics, "action": short}}
        with pytest.raises(ValueError, match="7 dimensions; the model's have 6"):
            ModelPolicy(model, processor)
