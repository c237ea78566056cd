"""What a rollout drives: a model, or a baseline that tells whether the wiring or the model is at fault."""

from typing import Any

import numpy as np

from .rollout import Run


class ExpertPolicy:
    """The tabletop's scripted expert, which reads the state of the physics."""

    cameras = ()

    def act(self, runs: list[Run]) -> np.ndarray:
        """
        Raises:
            ValueError: If an environment is not the tabletop.
        """
        from tabletop.environment import TabletopEnv
        from tabletop.expert import Expert

        environments = [run.env.unwrapped for run in runs]
        if others := {type(env).__name__ for env in environments if not isinstance(env, TabletopEnv)}:
            raise ValueError(f"The expert knows the tabletop alone, not {sorted(others)}.")
        return np.stack([Expert(env).action() for env in environments])


class RandomPolicy:
    """Uniform in the action space; an action depends on the episode's seed and step alone."""

    cameras = ()

    def act(self, runs: list[Run]) -> np.ndarray:
        """
        Raises:
            ValueError: If an action space has no bounds to draw between.
        """
        return np.stack([self._draw(run) for run in runs])

    @staticmethod
    def _draw(run: Run) -> np.ndarray:
        rng, space = np.random.default_rng([run.episode.seed, run.episode.steps]), run.env.action_space
        if not space.is_bounded():
            raise ValueError(f"Random actions need an action space with bounds, got {space}.")
        return rng.uniform(space.low, space.high).astype(np.float32)


class ModelPolicy:
    """
    A policy model with its processor.

    Args:
        model: With `predict_action` and `get_action_dim`.
        processor: Takes `instruction` and `images`.
        unnorm_key (`str`, *optional*): Dataset whose statistics scale the actions.

    Raises:
        ValueError: If `unnorm_key` is unknown.
    """

    cameras = ("image",)

    def __init__(self, model: Any, processor: Any, unnorm_key: str | None = None):
        self.model, self.processor, self.unnorm_key = model, processor, unnorm_key
        self.action_dim = model.get_action_dim(unnorm_key)

    @property
    def image_size(self) -> int:
        """Side of the model's picture in pixels."""
        return self.processor.image_processor.input_sizes[0][-1]

    def act(self, runs: list[Run]) -> np.ndarray:
        observations = [run.observation for run in runs]
        return self.predict(
            [observation["instruction"] for observation in observations],
            [observation["image"] for observation in observations],
        )

    def predict(self, instructions: list[str], images: list[np.ndarray]) -> np.ndarray:
        """
        Actions for a batch of observations.

        Args:
            instructions (`list[str]`): One per row.
            images (`list[np.ndarray]`): uint8 (H, W, 3), one per row.

        Returns:
            `np.ndarray`: float64 (B, D).
        """
        inputs = self.processor(instruction=instructions, images=images).to(self.model.device, dtype=self.model.dtype)
        actions = self.model.predict_action(**inputs, unnorm_key=self.unnorm_key)
        return np.atleast_2d(actions)  # (B, D), and for one observation (D,) -> (1, D)

    def bins(self, actions: np.ndarray) -> np.ndarray:
        """
        Interval of each action (B, D) among those that the tokens stand for, int64 (B, D), from the lowest value up.

        The topmost token holds the value 1 alone and decodes as the one below it: they count as one.
        """
        codec = self.processor.codec
        numbers = codec.token_end - self.processor.encode_actions(actions, self.unnorm_key)
        return np.minimum(numbers, codec.n_bins - 1)
