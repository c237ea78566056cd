"""
What does a policy act on? Wrappers for `--adapter` that take something away from it.

    python tools/evaluate_policy.py --policy . --adapter evaluation.ablations:BlackImage
    python tools/evaluate_policy.py --policy . --adapter evaluation.ablations:OtherObject

A policy that looks succeeds at nothing in the dark. One that listens goes where it is told: the task that was set
fails, mostly as `wrong_object`, since another object was handled as it was asked to be.
"""

from typing import Any

import gymnasium
import numpy as np


class BlackImage(gymnasium.Wrapper):
    """All pictures are black."""

    def reset(self, **kwargs: Any) -> tuple[dict, dict]:
        observation, info = self.env.reset(**kwargs)
        return self._darken(observation), info

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, *rest = self.env.step(action)
        return self._darken(observation), *rest

    @staticmethod
    def _darken(observation: dict) -> dict:
        pictures = {name: np.zeros_like(value) for name, value in observation.items() if name.endswith("image")}
        return {**observation, **pictures}


class OtherObject(gymnasium.Wrapper):
    """
    The instruction names another object of the tabletop than the one by which success is judged.

    Raises:
        ValueError: If the environment is not the tabletop.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        if not hasattr(env.unwrapped, "object_names"):
            raise ValueError(f"Only the tabletop knows what else lies on the table; got {env.unwrapped}.")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        observation, info = self.env.reset(seed=seed, options=options)
        env = self.env.unwrapped
        others = [item.name for item in env.objects if item.name != env.goal.target]
        # Where the policy knows only some objects, one of them.
        known = [name for name in others if name in env.object_names] or others
        self.named = str(np.random.default_rng(seed).choice(known))
        return self._rename(observation), info

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, *rest = self.env.step(action)
        return self._rename(observation), *rest

    def _rename(self, observation: dict) -> dict:
        target = self.env.unwrapped.goal.target
        return {**observation, "instruction": observation["instruction"].replace(target, self.named)}
