# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Spending chunks of actions in a control loop."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from evaluation.chunks import ChunkQueue, TemporalEnsemble
from evaluation.policies import ModelPolicy
from evaluation.rollout import Job, rollout


class TestChunkQueue:
    def test_actions_in_their_order(self):
        queue = ChunkQueue()
        assert queue.needs_chunk
        queue.add(np.arange(6).reshape(3, 2))
        assert [queue.next_action().tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
        assert queue.needs_chunk
        with pytest.raises(IndexError, match="add a new one"):
            queue.next_action()

    def test_the_first_actions_alone(self):
        queue = ChunkQueue(num_actions=2)
        queue.add(np.arange(3)[:, None])
        assert [queue.next_action().tolist() for _ in range(2)] == [[0], [1]]
        assert queue.needs_chunk

    def test_a_new_chunk_replaces_what_is_left(self):
        queue = ChunkQueue()
        queue.add(np.zeros((3, 1)))
        queue.add(np.ones((2, 1)))
        assert queue.next_action() == 1

    @pytest.mark.parametrize("chunk", [np.zeros(7), np.zeros((0, 7)), np.zeros((1, 3, 7))])
    def test_refused(self, chunk):
        for queue in (ChunkQueue(), TemporalEnsemble()):
            with pytest.raises(ValueError, match=r"must be of shape \(K, D\)"):
                queue.add(chunk)

    def test_too_many_actions(self):
        with pytest.raises(ValueError, match="5 actions are to be taken of a chunk of 3"):
            ChunkQueue(5).add(np.zeros((3, 7)))
        with pytest.raises(ValueError, match="At least one action"):
            ChunkQueue(0)


class TestTemporalEnsemble:
    def test_weights(self):
        """By hand: the oldest chunk that reaches to the tick weighs most."""
        ensemble = TemporalEnsemble(decay=np.log(2))
        with pytest.raises(IndexError, match="No chunk reaches"):
            ensemble.next_action()
        actions = []
        for start in (0.0, 10.0, 20.0, 30.0):
            ensemble.add(np.array([[start], [start + 1], [start + 2]]))
            actions.append(ensemble.next_action().item())
        expected = [0, (1 + 10 / 2) / 1.5, (2 + 11 / 2 + 20 / 4) / 1.75, (12 + 21 / 2 + 30 / 4) / 1.75]
        np.testing.assert_allclose(actions, expected)

    def test_equal_chunks_are_kept(self):
        ensemble, truth = TemporalEnsemble(), np.random.default_rng(0).normal(size=(10, 7))
        for tick in range(6):
            ensemble.add(truth[tick : tick + 4])
            np.testing.assert_allclose(ensemble.next_action(), truth[tick])


class CountingEnv(gymnasium.Env):
    """Ends after its number of steps; its state tells the step."""

    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (7,))

    def reset(self, seed=None, options=None):
        self.step_number, self.last = 0, seed
        return self._observe(), {}

    def step(self, action):
        self.step_number += 1
        outcome = "success" if self.step_number == self.last else None
        return self._observe(), 0.0, outcome is not None, False, {"outcome": outcome}

    def _observe(self):
        pictures = {name: np.full((8, 8, 3), value, np.uint8) for name, value in (("image", 1), ("wrist_image", 2))}
        state = np.array([self.last, self.step_number], np.float32)
        return {"instruction": "count", "state": state, **pictures}


class CountingModel:
    """The action says which episode and tick the chunk was asked for, and its place in the chunk."""

    device = dtype = None

    def __init__(self, chunk_size):
        self.chunk_size, self.batches = chunk_size, []

    def get_action_dim(self, unnorm_key):
        return 7

    def predict_action(self, state, images, unnorm_key=None):
        self.batches.append(len(state))
        assert all([picture[0, 0, 0] for picture in row] == [1, 2] for row in images)
        chunks = np.zeros((len(state), self.chunk_size, 7))
        chunks[:, :, :2], chunks[:, :, 2] = state[:, None], np.arange(self.chunk_size)
        chunks = chunks[:, 0] if self.chunk_size == 1 else chunks
        return chunks[0] if len(chunks) == 1 else chunks


class Inputs(dict):
    def to(self, device, dtype=None):
        return self


def make_policy(chunk_size: int, **kwargs) -> ModelPolicy:
    def process(instruction, images, state, unnorm_key):
        return Inputs(state=state, images=images)

    process.num_images, process.use_proprio, process.chunk_size = 2, True, chunk_size
    return ModelPolicy(CountingModel(chunk_size), process, **kwargs)


class TestModelPolicy:
    @pytest.mark.parametrize("num_envs", [1, 2, 3])
    @pytest.mark.parametrize("chunk_size, taken", [(1, 1), (4, 4), (4, 3)])
    def test_every_run_spends_its_own_chunks(self, chunk_size, taken, num_envs):
        """Episodes of different lengths, in any batch, twice with the same policy."""
        policy = make_policy(chunk_size, make_queue=lambda: ChunkQueue(taken))
        assert policy.cameras == ("image", "wrist_image")
        for _ in range(2):
            episodes = rollout(policy, [Job("count", n) for n in (5, 2, 7)], CountingEnv, num_envs=num_envs)
            for episode in episodes:
                told = np.array(episode.actions)[:, :3]
                ticks = np.arange(episode.seed)
                expected = np.stack(
                    [np.full(episode.seed, episode.seed), ticks // taken * taken, ticks % taken], axis=1
                )
                np.testing.assert_array_equal(told, expected)

    def test_a_chunk_is_asked_for_when_the_last_one_is_spent(self):
        policy = make_policy(4)
        rollout(policy, [Job("count", 8), Job("count", 8)], CountingEnv, num_envs=2)
        assert policy.model.batches == [2, 2]

    def test_an_ensemble_asks_at_every_tick(self):
        policy = make_policy(4, make_queue=TemporalEnsemble)
        (episode,) = rollout(policy, [Job("count", 3)], CountingEnv)
        assert policy.model.batches == [1, 1, 1]
        weights = np.exp([0, -0.01])
        assert episode.actions[1][2] == pytest.approx(weights[0] / weights.sum())

    def test_too_many_cameras(self):
        process = SimpleNamespace(num_images=3)
        with pytest.raises(ValueError, match="looks at 3 images"):
            ModelPolicy(CountingModel(1), process)
