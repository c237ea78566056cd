"""A policy behind a server, rolled out as one in this process is."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from evaluation.chunks import ChunkQueue, TemporalEnsemble
from evaluation.policies import ChunkedPolicy, cameras_of

from .client import PolicyClient


class RemotePolicy(ChunkedPolicy):
    """
    A policy behind a server. Every episode that runs has a connection of its own, as robots have, so that the server
    answers those that ask at the same time in one batch.

    Args:
        url (`str`): Of the server: `http://HOST:PORT` or `ws://HOST:PORT`.
        token (`str`, *optional*), timeout (`float`, defaults to 30.0): See [`PolicyClient`].
        unnorm_key (`str`, *optional*): Dataset whose statistics scale the actions.
        make_queue (`Callable`, *optional*): See [`ChunkedPolicy`].

    Raises:
        ValueError: If the server does not describe its policy, or `unnorm_key` is not of its datasets.
        TimeoutError: If it does not answer.
        PolicyServerError: If it refuses.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 30.0,
        unnorm_key: str | None = None,
        make_queue: Callable[[], ChunkQueue | TemporalEnsemble] = ChunkQueue,
    ):
        fields = {} if unnorm_key is None else {"unnorm_key": unnorm_key}
        self._make_client = lambda: PolicyClient(url, token=token, timeout=timeout, **fields)
        self._clients = [self._make_client()]
        self.description = self._clients[0].metadata()
        if (
            missing := {"num_images", "use_proprio", "image_size", "action_dims", "chunk_size"}
            - self.description.keys()
        ):
            raise ValueError(f"{url} does not say what its policy takes: {sorted(missing)} are missing.")
        dims = self.description["action_dims"]
        if unnorm_key is None and len(dims) == 1:
            unnorm_key = next(iter(dims))
        if unnorm_key not in dims:
            raise ValueError(f"`unnorm_key={unnorm_key!r}` is not one of the server's datasets {sorted(dims)}.")
        super().__init__(
            cameras_of(self.description["num_images"]), dims[unnorm_key], self.description["use_proprio"], make_queue
        )

    @property
    def image_size(self) -> int:
        """Side of the model's picture in pixels."""
        return self.description["image_size"]

    def predict_chunks(
        self, instructions: list[str], images: list[list[np.ndarray]], states: list[np.ndarray] | None = None
    ) -> np.ndarray:
        """
        See [`ChunkedPolicy.predict_chunks`].

        Raises:
            PolicyServerError: If the server refuses an observation, or fails.
            TimeoutError: If it does not answer.
        """
        observations = [
            {"instruction": instruction, **dict(zip(self.cameras, pictures, strict=True))}
            for instruction, pictures in zip(instructions, images, strict=True)
        ]
        for observation, state in zip(observations, states or [], strict=False):
            observation["state"] = state
        while len(self._clients) < len(observations):
            self._clients.append(self._make_client())
        with ThreadPoolExecutor(len(observations)) as threads:
            answers = threads.map(PolicyClient.infer, self._clients, observations)
            return np.stack([answer.actions for answer in answers])

    def close(self) -> None:
        for client in self._clients:
            client.close()
