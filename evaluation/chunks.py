"""How a control loop spends chunks of actions: one after the other, or averaged over time."""

from collections import deque

import numpy as np


class ChunkQueue:
    """
    Open loop: the actions of a chunk are taken in their order, and a new chunk is needed when they are spent.

    Args:
        num_actions (`int`, *optional*): Actions to take of each chunk, from its start; all by default.

    Raises:
        ValueError: If `num_actions` is not positive.
    """

    def __init__(self, num_actions: int | None = None):
        if num_actions is not None and num_actions < 1:
            raise ValueError(f"At least one action of a chunk must be taken, got {num_actions}.")
        self.num_actions = num_actions
        self._actions: deque[np.ndarray] = deque()

    @property
    def num_left(self) -> int:
        """Actions of the chunk that are left."""
        return len(self._actions)

    @property
    def needs_chunk(self) -> bool:
        """Whether the next action needs a new chunk."""
        return not self._actions

    def add(self, chunk: np.ndarray) -> None:
        """
        Put a chunk (K, D) in the place of what is left.

        Raises:
            ValueError: If it is of another shape, or shorter than `num_actions`.
        """
        chunk = _checked(chunk)
        if self.num_actions is not None and len(chunk) < self.num_actions:
            raise ValueError(f"{self.num_actions} actions are to be taken of a chunk of {len(chunk)}.")
        self._actions = deque(chunk[: self.num_actions])

    def next_action(self) -> np.ndarray:
        """
        The action (D,) of this tick.

        Raises:
            IndexError: If a new chunk is needed.
        """
        if self.needs_chunk:
            raise IndexError("All actions of the chunk are taken; add a new one.")
        return self._actions.popleft()


class TemporalEnsemble:
    """
    A chunk at every tick, and as action the mean of what all chunks so far say of this tick
    (https://arxiv.org/abs/2304.13705). The i-th oldest of them, from 0, weighs exp(-`decay` i): above 0, new chunks
    come in slowly.

    Rotations and grippers are averaged like everything else, which suits small displacements.

    Args:
        decay (`float`, defaults to 0.01): 0 weighs all alike, below 0 the newest most.
    """

    needs_chunk = True

    def __init__(self, decay: float = 0.01):
        self.decay = decay
        self._chunks: list[np.ndarray] = []  # the oldest first, each from this tick on

    def add(self, chunk: np.ndarray) -> None:
        """
        Put in the chunk (K, D) that was predicted at this tick.

        Raises:
            ValueError: If it is of another shape than (K, D).
        """
        self._chunks.append(_checked(chunk))

    def next_action(self) -> np.ndarray:
        """
        The action (D,) of this tick.

        Raises:
            IndexError: If no chunk reaches to this tick.
        """
        if not self._chunks:
            raise IndexError("No chunk reaches to this tick; add a new one.")
        weights = np.exp(-self.decay * np.arange(len(self._chunks)))
        action = np.average([chunk[0] for chunk in self._chunks], axis=0, weights=weights)
        self._chunks = [chunk[1:] for chunk in self._chunks if len(chunk) > 1]
        return action


def _checked(chunk: np.ndarray) -> np.ndarray:
    chunk = np.array(chunk)  # whose owner may write into it
    if chunk.ndim != 2 or not len(chunk):
        raise ValueError(f"A chunk must be of shape (K, D), got {chunk.shape}.")
    return chunk
