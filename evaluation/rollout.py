"""Closed-loop rollouts: environments stepped side by side, and one batch of actions for all of them per tick."""

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import gymnasium
import numpy as np


ACTION_DIM = 7


@dataclass(frozen=True)
class Job:
    """
    An episode to run.

    Args:
        task (`str`): One of the environment's.
        seed (`int`): Of everything that is drawn.
        record (`bool`, defaults to `False`): Keep pictures.
        options (`dict[str, Any]`): Further options of the environment's `reset`.
    """

    task: str
    seed: int
    record: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Episode:
    """
    What happened.

    Args:
        task (`str`), seed (`int`), instruction (`str`): As it was set up.
        outcome (`str`): `success`, `timeout` or another kind of failure.
        actions (`list[np.ndarray]`): (7,) each, as the policy gave them, before the environment clips them.
        policy_seconds (`list[float]`): The policy's time for each action: a batch's time is divided evenly among its
            rows.
        frames (`list[np.ndarray]`): uint8 (S, S, 3): what was seen before each action, and after the last one.
            Empty unless the job asked for them.
    """

    task: str
    seed: int
    instruction: str
    outcome: str | None = None
    actions: list[np.ndarray] = field(default_factory=list)
    policy_seconds: list[float] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.actions)


class Run:
    """
    An environment with the episode that runs in it.

    Args:
        make_env (`Callable[[], gymnasium.Env]`): Makes the environment.
        thread (`Executor`): Of one thread, in which everything that the environment does is done: OpenGL contexts do
            not change threads. Runs may share it.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env], thread: Executor):
        self._thread = thread
        self.env = thread.submit(make_env).result()

    def start(self, index: int, job: Job) -> Future:
        """Set up the episode of the job at a place in the rollout's order."""
        return self._thread.submit(self._start, index, job)

    def step(self, action: np.ndarray, policy_seconds: float) -> Future:
        return self._thread.submit(self._step, action, policy_seconds)

    def close(self) -> None:
        self._thread.submit(self.env.close).result()

    def _start(self, index: int, job: Job) -> None:
        self.index, self.job = index, job
        self.observation, _ = self.env.reset(seed=job.seed, options={"task": job.task, **job.options})
        self.episode = Episode(job.task, job.seed, self.observation["instruction"])
        self._look()

    def _step(self, action: np.ndarray, policy_seconds: float) -> None:
        self.observation, _, terminated, truncated, info = self.env.step(action)
        self.episode.actions.append(action)
        self.episode.policy_seconds.append(policy_seconds)
        self.episode.outcome = info.get("outcome")
        if (terminated or truncated) and self.episode.outcome is None:
            raise ValueError(f"{self.env} ended an episode of {self.job.task!r} without saying how.")
        self._look()

    def _look(self) -> None:
        if self.job.record:
            self.episode.frames.append(self.env.render())


class Policy(Protocol):
    """
    Gives the actions of a rollout.

    `cameras` names the pictures that it looks at (`image`, `wrist_image`): no others need to be rendered.
    """

    cameras: tuple[str, ...]

    def act(self, runs: list[Run]) -> np.ndarray:
        """Actions (B, 7) in the terms of [`environments`](environments.py), one per episode that still runs."""


def rollout(
    policy: Policy,
    jobs: Iterable[Job],
    make_env: Callable[[], gymnasium.Env],
    *,
    num_envs: int = 1,
    on_episode: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """
    Run episodes, `num_envs` at a time; when one ends, the next takes its place.

    Environments step and render in as many threads as there are processors, since MuJoCo works without Python's lock;
    more threads than that are slower.

    Args:
        policy (`Policy`): Asked once per tick for all episodes that run.
        jobs (`Iterable[Job]`): Episodes.
        make_env (`Callable[[], gymnasium.Env]`): Makes an environment in OpenVLA's terms; see
            [`environments`](environments.py).
        num_envs (`int`, defaults to 1): Environments side by side.
        on_episode (`Callable`, *optional*): Called with each episode as it ends.

    Returns:
        `list[Episode]`: In the order of `jobs`, whatever order they ended in.

    Raises:
        ValueError: If there is no environment, a task is unknown, or the policy's actions are of the wrong shape or
            not finite.
    """
    if num_envs < 1:
        raise ValueError(f"At least one environment is needed, got {num_envs}.")
    waiting = deque(enumerate(jobs))
    finished: dict[int, Episode] = {}
    with ExitStack() as stack:
        active = _open_runs(make_env, min(num_envs, len(waiting)), stack)
        _wait([run.start(*waiting.popleft()) for run in active])
        while active:
            _tick(policy, active)
            ended = [run for run in active if run.episode.outcome is not None]
            for run in ended:
                finished[run.index] = run.episode
                if on_episode is not None:
                    on_episode(run.episode)
            active = [run for run in active if run not in ended[len(waiting) :]]
            _wait([run.start(*waiting.popleft()) for run in ended[: len(waiting)]])
    return [finished[index] for index in range(len(finished))]


def _open_runs(make_env: Callable[[], gymnasium.Env], number: int, stack: ExitStack) -> list[Run]:
    """Environments in threads that they share in turn; the stack closes both."""
    num_threads = min(number, os.cpu_count() or 1)
    threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(num_threads)]
    runs = []
    for index in range(number):
        runs.append(Run(make_env, threads[index % num_threads]))
        stack.callback(runs[-1].close)
    return runs


def _wait(futures: list[Future]) -> None:
    for future in futures:
        future.result()


def _tick(policy: Policy, active: list[Run]) -> None:
    """One action in every environment."""
    began = time.perf_counter()
    actions = policy.act(active)
    share = (time.perf_counter() - began) / len(active)
    if np.shape(actions) != (len(active), ACTION_DIM):
        raise ValueError(f"The policy must give actions ({len(active)}, {ACTION_DIM}), got {np.shape(actions)}.")
    for run, action in zip(active, actions, strict=True):
        if not np.isfinite(action).all():
            where = f"{run.job.task!r}, seed {run.job.seed}, step {run.episode.steps}"
            raise ValueError(f"The policy's actions must be finite, got {np.asarray(action).tolist()} in {where}.")
    _wait([run.step(action, share) for run, action in zip(active, actions, strict=True)])


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
        batch; the median, since the first calls, and those with a new batch size or prompt length, also pay for what
        the libraries prepare once).
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
        "ms_per_action": 1e3 * statistics.median(share for episode in episodes for share in episode.policy_seconds),
    }
