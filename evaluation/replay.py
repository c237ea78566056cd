"""
Recorded episodes played again: the same scenes and the same actions, and so the same ends.

A replay goes the way of every policy. Where it succeeds and a model fails, the wiring is right and the model is at
fault.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .rollout import Job, Run


START_TOLERANCE = 1e-6  # metres, radians and their rates: rounding on another machine is far below it


@dataclass(frozen=True)
class Replay:
    """
    Recorded episodes of one environment.

    Args:
        stories (`list[dict]`): How each began, as `meta/tabletop.jsonl` says it.
        actions (`list[np.ndarray]`): float32 (T, 7) of each.
    """

    stories: list[dict[str, Any]]
    actions: list[np.ndarray]

    @property
    def environment_arguments(self) -> dict[str, Any]:
        """What the environment was made with."""
        return self.stories[0]["environment"]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Each once, in the order of their first episodes."""
        return tuple(dict.fromkeys(story["options"]["task"] for story in self.stories))

    def jobs(self, record_first: bool = False) -> list[Job]:
        """The episodes to run, with pictures of the first of each task if asked for."""
        named = [(story["options"]["task"], story) for story in self.stories]
        tasks = [task for task, _ in named]
        return [
            Job(task, story["seed"], record_first and tasks.index(task) == index, story["options"])
            for index, (task, story) in enumerate(named)
        ]


def load_replay(dataset: Path, tasks: Sequence[str] | None = None, episodes: int | None = None) -> Replay:
    """
    Read a dataset that `tabletop.record` wrote.

    Args:
        dataset (`Path`): Its folder.
        tasks (`Sequence[str]`, *optional*): Those to replay; all by default.
        episodes (`int`, *optional*): The first so many; all by default.

    Raises:
        ValueError: If the dataset does not say how its episodes began, has none of the tasks, holds environments that
            differ, or lacks actions.
    """
    stories = _load_stories(dataset)
    known = {story["options"]["task"] for story in stories}
    if unknown := set(tasks or ()) - known:
        raise ValueError(f"Tasks {sorted(unknown)} are not in {dataset}; it holds {sorted(known)}.")
    stories = [story for story in stories if not tasks or story["options"]["task"] in tasks][:episodes]
    if any(story["environment"] != stories[0]["environment"] for story in stories):
        raise ValueError(f"{dataset} holds environments that differ; replay the datasets that it was made of.")
    return Replay(stories, _load_actions(dataset, stories))


def _load_stories(dataset: Path) -> list[dict[str, Any]]:
    path = dataset / "meta" / "tabletop.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{dataset} cannot be replayed: it has no meta/tabletop.jsonl, in which `python -m tabletop.record` "
            "writes how each episode began. Compare predictions with its actions instead: --open_loop."
        )
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _load_actions(dataset: Path, stories: list[dict[str, Any]]) -> list[np.ndarray]:
    from robot_data.sources import open_source

    source, found = open_source(dataset), {}
    wanted = {story["episode_index"]: story["length"] for story in stories}
    for unit in range(source.num_units):
        if len(found) == len(wanted):
            break
        for raw in source.read(unit, columns=["action"], images=()):
            if raw.index in wanted:
                found[raw.index] = np.asarray(raw.columns["action"], np.float32)
    for index, length in wanted.items():
        if len(found.get(index, ())) != length:
            raise ValueError(
                f"{dataset}: episode {index} has {len(found.get(index, ()))} actions, and {length} by "
                "meta/tabletop.jsonl; the dataset is damaged."
            )
    return [found[story["episode_index"]] for story in stories]


class ReplayPolicy:
    """
    Recorded actions. After the last one the robot keeps still.

    Args:
        replay (`Replay`): Episodes in the order of the rollout's jobs.
    """

    cameras = ()

    def __init__(self, replay: Replay):
        self.replay = replay

    def act(self, runs: list[Run]) -> np.ndarray:
        """
        The next recorded action of each episode.

        Raises:
            ValueError: If an episode does not begin as the recorded one did.
        """
        for run in runs:
            if run.episode.steps == 0:
                check_start(run, self.replay.stories[run.index])
        return np.stack([self._next(run) for run in runs])

    def _next(self, run: Run) -> np.ndarray:
        actions = self.replay.actions[run.index]
        if run.episode.steps < len(actions):
            return actions[run.episode.steps]
        return np.append(np.zeros(6, np.float32), actions[-1][6])


def check_start(run: Run, story: dict[str, Any]) -> None:
    """
    Refuse a scene that is not the recorded one. It is not put right: where the start differs, so does the physics that
    follows, and a failure would say nothing about the wiring.

    Raises:
        ValueError: Naming the episode and the difference.
    """
    data = run.env.unwrapped.data
    state, recorded = np.append(data.qpos, data.qvel), np.append(story["qpos"], story["qvel"])
    same = state.shape == recorded.shape and run.observation["instruction"] == story["instruction"]
    difference = np.abs(state - recorded).max() if same else np.inf
    if not difference <= START_TOLERANCE:
        raise ValueError(
            f"Episode {story['episode_index']} does not begin as it was recorded: the state differs by up to "
            f"{difference:.2g}. The dataset was recorded with another version of the tabletop, of MuJoCo or of numpy; "
            "use that version, or record again."
        )
