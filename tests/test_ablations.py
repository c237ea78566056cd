"""Wrappers that take the picture, or the right instruction, away from a policy."""

import json

import evaluate_policy
import gymnasium
import numpy as np
import pytest
from conftest import TINY_POLICY

from evaluation.ablations import BlackImage, OtherObject
from tabletop.environment import TabletopEnv


ACTION = np.array([0.0, 0.0, 0.01, 0.0, 0.0, 0.0, 1.0], dtype=np.float32)


def test_black_image():
    plain, dark = TabletopEnv(image_size=16), BlackImage(TabletopEnv(image_size=16))
    for seen, blackened in [
        (plain.reset(seed=1)[0], dark.reset(seed=1)[0]),
        (plain.step(ACTION)[0], dark.step(ACTION)[0]),
    ]:
        assert seen["image"].any()
        assert not blackened["image"].any()
        assert not blackened["wrist_image"].any()
        assert blackened["image"].shape == seen["image"].shape
        np.testing.assert_array_equal(blackened["state"], seen["state"])
        assert blackened["instruction"] == seen["instruction"]


def test_other_object():
    plain, misled = TabletopEnv(cameras=()), OtherObject(TabletopEnv(cameras=()))
    for seed in range(20):
        told = plain.reset(seed=seed)[0]["instruction"]
        observation, info = misled.reset(seed=seed)
        assert misled.unwrapped.goal == plain.goal
        assert info["target"] == plain.goal.target
        assert misled.named != plain.goal.target
        assert misled.named in [item.name for item in plain.objects]
        assert observation["instruction"] == told.replace(plain.goal.target, misled.named)
        assert misled.step(ACTION)[0]["instruction"] == observation["instruction"]
    assert misled.reset(seed=3)[0]["instruction"] == misled.reset(seed=3)[0]["instruction"]


def test_other_object_is_a_known_one():
    known = ["red cube", "green cube", "blue cube", "yellow cube"]
    env = OtherObject(TabletopEnv(cameras=(), objects=known))
    named = []
    for seed in range(30):
        env.reset(seed=seed)
        lying = {item.name for item in env.unwrapped.objects} - {env.unwrapped.goal.target}
        if lying & set(known):
            named.append(env.named)
    assert len(named) > 3
    assert set(named) <= set(known)


def test_other_object_needs_the_tabletop():
    with pytest.raises(ValueError, match="Only the tabletop"):
        OtherObject(gymnasium.make("CartPole-v1"))


@pytest.mark.parametrize("name", ["BlackImage", "OtherObject"])
def test_command(name, tmp_path):
    arguments = ["--policy", str(TINY_POLICY), "--episodes", "1", "--max_steps", "2", "--tasks", "pick"]
    adapter = ["--adapter", f"evaluation.ablations:{name}", "--output_dir", str(tmp_path)]
    assert evaluate_policy.main([*arguments, *adapter]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["tasks"]["pick"]["trials"] == 1
