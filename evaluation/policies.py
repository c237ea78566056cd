"""What a rollout drives: a model, or a baseline that tells whether the wiring or the model is at fault."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from .chunks import ChunkQueue, TemporalEnsemble
from .rollout import Run


# What environments call their pictures, in the order in which policies take them.
CAMERAS = ("image", "wrist_image")


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


class ChunkedPolicy(ABC):
    """
    Spends the chunks of each episode, and asks for new ones where they are spent.

    Args:
        cameras (`Sequence[str]`): Names of the pictures that the policy looks at, in its order.
        action_dim (`int`): Numbers per action.
        use_proprio (`bool`): Whether it takes the state.
        make_queue (`Callable`, *optional*): Makes what spends the chunks of an episode, a [`ChunkQueue`] (the default,
            which takes all actions of a chunk) or a [`TemporalEnsemble`].
    """

    def __init__(
        self,
        cameras: Sequence[str],
        action_dim: int,
        use_proprio: bool,
        make_queue: Callable[[], ChunkQueue | TemporalEnsemble] = ChunkQueue,
    ):
        self.cameras, self.action_dim, self.use_proprio = tuple(cameras), action_dim, use_proprio
        self.make_queue = make_queue
        self._queues: dict[int, ChunkQueue | TemporalEnsemble] = {}

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the model's picture in pixels."""

    @abstractmethod
    def predict_chunks(
        self, instructions: list[str], images: list[list[np.ndarray]], states: list[np.ndarray] | None = None
    ) -> np.ndarray:
        """
        Chunks for a batch of observations.

        Args:
            instructions (`list[str]`): One per row.
            images (`list[list[np.ndarray]]`): uint8 (H, W, 3), one per camera for each row.
            states (`list[np.ndarray]`, *optional*): (S,), one per row, where the policy takes one.

        Returns:
            `np.ndarray`: float64 (B, K, D).
        """

    def act(self, runs: list[Run]) -> np.ndarray:
        """Actions (B, D): where the chunk of a run is spent, from a new one, in one batch for all such runs."""
        begun = [run.index for run in runs if not run.episode.steps]
        return self.next_actions({run.index: run.observation for run in runs}, begun)

    def next_actions(self, observations: dict[int, dict[str, Any]], begun: Collection[int]) -> np.ndarray:
        """
        The next action of each episode that runs, (B, D).

        Args:
            observations (`dict[int, dict]`): By the number of the episode: its `instruction`, the pictures of
                `cameras`, and the `state`, if the policy takes one.
            begun (`Collection[int]`): The episodes that begin: no chunk under their numbers is theirs.
        """
        kept = {index: queue for index, queue in self._queues.items() if index not in begun}
        self._queues = {index: kept.get(index) or self.make_queue() for index in observations}
        asking = [index for index in observations if self._queues[index].needs_chunk]
        if asking:
            seen = [observations[index] for index in asking]
            chunks = self.predict_chunks(
                [observation["instruction"] for observation in seen],
                [[observation[camera] for camera in self.cameras] for observation in seen],
                [observation["state"] for observation in seen] if self.use_proprio else None,
            )
            for index, chunk in zip(asking, chunks, strict=True):
                self._queues[index].add(chunk)
        return np.stack([queue.next_action() for queue in self._queues.values()])


def cameras_of(num_images: int) -> tuple[str, ...]:
    """
    The cameras of a policy that looks at so many pictures.

    Raises:
        ValueError: If environments have fewer.
    """
    if num_images > len(CAMERAS):
        raise ValueError(f"The policy looks at {num_images} images; environments have {CAMERAS}.")
    return CAMERAS[:num_images]


class ModelPolicy(ChunkedPolicy):
    """
    A policy model with its processor. It looks at as many cameras as the processor takes images, and gets the state
    where the processor takes one.

    Args:
        model: With `predict_action` and `get_action_dim`.
        processor: Takes `instruction` and `images`, and tells `chunk_size`, `num_images` and `use_proprio`.
        unnorm_key (`str`, *optional*): Dataset whose statistics scale the actions.
        make_queue (`Callable`, *optional*): See [`ChunkedPolicy`].

    Raises:
        ValueError: If `unnorm_key` is unknown, or the policy looks at more cameras than environments have.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        unnorm_key: str | None = None,
        make_queue: Callable[[], ChunkQueue | TemporalEnsemble] = ChunkQueue,
    ):
        self.model, self.processor, self.unnorm_key = model, processor, unnorm_key
        cameras = cameras_of(processor.num_images)
        super().__init__(cameras, model.get_action_dim(unnorm_key), processor.use_proprio, make_queue)

    @property
    def image_size(self) -> int:
        """Side of the model's picture in pixels."""
        return self.processor.image_processor.input_sizes[0][-1]

    def predict_chunks(
        self, instructions: list[str], images: list[list[np.ndarray]], states: list[np.ndarray] | None = None
    ) -> np.ndarray:
        """See [`ChunkedPolicy.predict_chunks`]."""
        inputs = self.processor(
            instruction=instructions,
            images=images,
            **({} if states is None else {"state": np.stack(states), "unnorm_key": self.unnorm_key}),
        ).to(self.model.device, dtype=self.model.dtype)
        actions = self.model.predict_action(**inputs, unnorm_key=self.unnorm_key)
        return actions.reshape(len(instructions), self.processor.chunk_size, -1)  # (D,), (B, D), (K, D) -> (B, K, D)

    def predict(
        self, instructions: list[str], images: list[list[np.ndarray]], states: list[np.ndarray] | None = None
    ) -> np.ndarray:
        """Of each chunk of [`predict_chunks`] the first action: float64 (B, D)."""
        return self.predict_chunks(instructions, images, states)[:, 0]

    def bins(self, actions: np.ndarray) -> np.ndarray:
        """
        Interval of each action (B, D) among those of action tokens, int64 (B, D), from the lowest value up, whatever
        head the policy speaks with.

        The topmost token holds the value 1 alone and decodes as the one below it: they count as one.
        """
        codec = self.processor.codec
        chunk = actions if self.processor.chunk_size == 1 else actions[None]
        normalized = self.processor.normalize_actions(chunk, self.unnorm_key).reshape(actions.shape)
        numbers = codec.token_end - codec.encode(normalized)
        return np.minimum(numbers, codec.n_bins - 1)
