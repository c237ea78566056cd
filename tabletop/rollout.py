"""Closed-loop rollouts: environments stepped side by side, and one batch of actions for all of them per tick."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .environment import MAX_STEPS, TabletopEnv
from .expert import Expert


ACTION_DIM = 7


class Policy(Protocol):
    """
    What a rollout drives.

    `needs_images` says whether observations must hold the front camera's picture; without it, scenes are rendered for
    recorded episodes only.
    """

    needs_images: bool

    def act(self, envs: list[TabletopEnv], observations: list[dict[str, Any]]) -> np.ndarray:
        """Actions (B, 7) in the units of [`TabletopEnv`], one per environment that still runs."""


class ExpertPolicy:
    """The scripted expert, which reads the state of the physics."""

    needs_images = False

    def act(self, envs: list[TabletopEnv], observations: list[dict[str, Any]]) -> np.ndarray:
        return np.stack([Expert(env).action() for env in envs])


class RandomPolicy:
    """Uniform in the action space; an action depends on the episode's seed and step alone."""

    needs_images = False

    def act(self, envs: list[TabletopEnv], observations: list[dict[str, Any]]) -> np.ndarray:
        return np.stack([self._draw(env) for env in envs])

    @staticmethod
    def _draw(env: TabletopEnv) -> np.ndarray:
        rng = np.random.default_rng([env.np_random_seed, env.steps])
        return rng.uniform(env.action_space.low, env.action_space.high).astype(np.float32)


class ModelPolicy:
    """
    A policy model with its processor.

    Args:
        model: With `predict_action` and `get_action_dim`.
        processor: Takes `instruction` and `images`.
        unnorm_key (`str`, *optional*): Dataset whose statistics scale the actions.

    Raises:
        ValueError: If `unnorm_key` is unknown, or the model's actions do not have 7 dimensions.
    """

    needs_images = True

    def __init__(self, model: Any, processor: Any, unnorm_key: str | None = None):
        self.model, self.processor, self.unnorm_key = model, processor, unnorm_key
        if (dimension := model.get_action_dim(unnorm_key)) != ACTION_DIM:
            raise ValueError(f"The tabletop takes actions of {ACTION_DIM} dimensions; the model's have {dimension}.")

    @property
    def image_size(self) -> int:
        """Side of the model's picture in pixels."""
        return self.processor.image_processor.input_sizes[0][-1]

    def act(self, envs: list[TabletopEnv], observations: list[dict[str, Any]]) -> np.ndarray:
        inputs = self.processor(
            instruction=[observation["instruction"] for observation in observations],
            images=[observation["image"] for observation in observations],
        ).to(self.model.device, dtype=self.model.dtype)
        actions = self.model.predict_action(**inputs, unnorm_key=self.unnorm_key)
        return np.atleast_2d(actions)  # (B, 7), and for one observation (7,) -> (1, 7)


@dataclass(frozen=True)
class Job:
    """
    An episode to run.

    Args:
        task (`str`): One of `tabletop.tasks.TASKS`.
        seed (`int`): Of the scene, the target and the wording.
        record (`bool`, defaults to `False`): Keep the pictures.
    """

    task: str
    seed: int
    record: bool = False


@dataclass
class Episode:
    """
    What happened.

    Args:
        task (`str`), seed (`int`), instruction (`str`): As it was set up.
        outcome (`str`): `success`, `wrong_object`, `dropped` or `timeout`.
        actions (`list[np.ndarray]`): (7,) each, as the policy gave them, before the environment clips them.
        policy_seconds (`float`): Share of the policy's time: a batch's time is divided evenly among its rows.
        frames (`list[np.ndarray]`): uint8 (S, S, 3): what was seen before each action, and after the last one.
            Empty unless the job asked for them.
    """

    task: str
    seed: int
    instruction: str
    outcome: str | None = None
    actions: list[np.ndarray] = field(default_factory=list)
    policy_seconds: float = 0.0
    frames: list[np.ndarray] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.actions)


class _Runner:
    """One environment with the episode that runs in it."""

    def __init__(self, env: TabletopEnv, needs_images: bool):
        self.env, self.needs_images = env, needs_images

    def start(self, job: Job) -> None:
        observation, _ = self.env.reset(seed=job.seed, options={"task": job.task})
        self.job = job
        self.episode = Episode(job.task, job.seed, observation["instruction"])
        self._see(observation)

    def step(self, action: np.ndarray, policy_seconds: float) -> None:
        observation, _, _, _, info = self.env.step(action)
        self.episode.actions.append(action)
        self.episode.policy_seconds += policy_seconds
        self.episode.outcome = info["outcome"]
        self._see(observation)

    def _see(self, observation: dict[str, Any]) -> None:
        is_over = self.episode.outcome is not None
        if self.job.record or (self.needs_images and not is_over):
            observation = {**observation, "image": self.env.render()}
        if self.job.record:
            self.episode.frames.append(observation["image"])
        self.observation = observation


def rollout(
    policy: Policy,
    jobs: Iterable[Job],
    *,
    num_envs: int = 1,
    image_size: int = 224,
    max_steps: int = MAX_STEPS,
    on_episode: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """
    Run episodes, `num_envs` at a time; when one ends, the next takes its place.

    Environments step and render in threads, since MuJoCo works without Python's lock. Only the front camera is
    rendered: no policy here looks through the wrist's.

    Args:
        policy (`Policy`): Asked once per tick for all environments that run.
        jobs (`Iterable[Job]`): Episodes.
        num_envs (`int`, defaults to 1): Environments side by side.
        image_size (`int`, defaults to 224): Side of the pictures in pixels.
        max_steps (`int`, defaults to `MAX_STEPS`): Actions before `timeout`.
        on_episode (`Callable`, *optional*): Called with each episode as it ends.

    Returns:
        `list[Episode]`: In the order of `jobs`, whatever order they ended in.

    Raises:
        ValueError: If there is no environment, a task is unknown, or the policy's actions are of the wrong shape or
            not finite.
    """
    if num_envs < 1:
        raise ValueError(f"At least one environment is needed, got {num_envs}.")
    jobs = list(jobs)
    waiting, finished = deque(jobs), {}
    arguments = {"image_size": image_size, "max_steps": max_steps, "render_observations": False}
    active = [_Runner(TabletopEnv(**arguments), policy.needs_images) for _ in range(min(num_envs, len(jobs)))]
    with ThreadPoolExecutor(min(max(len(active), 1), os.cpu_count() or 1)) as pool:
        list(pool.map(_Runner.start, active, [waiting.popleft() for _ in active]))
        while active:
            _tick(policy, active, pool)
            ended = [runner for runner in active if runner.episode.outcome is not None]
            for runner in ended:
                finished[runner.job] = runner.episode
                if on_episode is not None:
                    on_episode(runner.episode)
            replaced = ended[: len(waiting)]
            list(pool.map(_Runner.start, replaced, [waiting.popleft() for _ in replaced]))
            for runner in ended[len(replaced) :]:
                runner.env.close()
                active.remove(runner)
    return [finished[job] for job in jobs]


def _tick(policy: Policy, active: list[_Runner], pool: ThreadPoolExecutor) -> None:
    """One action in every environment."""
    began = time.perf_counter()
    actions = policy.act([runner.env for runner in active], [runner.observation for runner in active])
    share = (time.perf_counter() - began) / len(active)
    if np.shape(actions) != (len(active), ACTION_DIM):
        raise ValueError(f"The policy must give actions ({len(active)}, {ACTION_DIM}), got {np.shape(actions)}.")
    list(pool.map(_Runner.step, active, actions, [share] * len(active)))


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """
    Wilson's score interval of a success rate: https://doi.org/10.1080/01621459.1927.10502953.

    Args:
        successes (`int`): At most `trials`.
        trials (`int`): At least 1.
        z (`float`, defaults to 1.959964): Standard normal quantile; the default gives 95%.

    Returns:
        `tuple[float, float]`: Bounds in [0, 1].

    Raises:
        ValueError: If there are no trials, or the successes do not fit them.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes of {trials} trials have no interval.")
    rate, shrink = successes / trials, 1 + z**2 / trials
    centre = (rate + z**2 / (2 * trials)) / shrink
    half = z * (rate * (1 - rate) / trials + z**2 / (4 * trials**2)) ** 0.5 / shrink
    return max(centre - half, 0.0), min(centre + half, 1.0)


def summarize(episodes: list[Episode]) -> dict[str, Any]:
    """
    Numbers of a group of episodes.

    Returns:
        `dict`: `trials`, `successes`, `success_rate`, `wilson_95` (two bounds), `mean_steps` (of all trials),
        `failures` (count by outcome, the most frequent first) and `ms_per_action` (the policy's alone, within its
        batch).
    """
    outcomes = [episode.outcome for episode in episodes]
    successes, steps = outcomes.count("success"), sum(episode.steps for episode in episodes)
    failures = {name: outcomes.count(name) for name in set(outcomes) - {"success"}}
    return {
        "trials": len(episodes),
        "successes": successes,
        "success_rate": successes / len(episodes),
        "wilson_95": list(wilson_interval(successes, len(episodes))),
        "mean_steps": steps / len(episodes),
        "failures": dict(sorted(failures.items(), key=lambda item: (-item[1], item[0]))),
        "ms_per_action": 1e3 * sum(episode.policy_seconds for episode in episodes) / steps,
    }
