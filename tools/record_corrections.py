"""
Roll a policy out on the tabletop and record, for every state that it comes to, what the expert would have done there.

    python tools/record_corrections.py --policy my_policy --episodes 500 --output corrections

Trained on together with demonstrations, these frames teach a policy to recover from its own mistakes, which no
demonstration shows (DAgger, https://arxiv.org/abs/1011.0686). The dataset has the form of `python -m tabletop.record`:
`action` is what was done, `expert_action` what would have been right.
"""

import argparse
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from load_policy import REPOSITORY, load_policy
from tqdm import tqdm


sys.path.insert(0, str(REPOSITORY))

from evaluation.policies import ModelPolicy
from tabletop.environment import TabletopEnv
from tabletop.expert import Expert
from tabletop.lerobot_writer import assemble, write_episode
from tabletop.record import MAX_ATTEMPTS, Recording, draw_start


@dataclass
class Rollout:
    """An episode that the policy acts in, and what has been seen of it."""

    index: int
    env: TabletopEnv
    rng: np.random.Generator
    observation: dict
    story: dict
    frames: list[dict] = field(default_factory=list)
    outcome: str | None = None

    @classmethod
    def start(cls, recording: Recording, index: int, max_steps: int) -> "Rollout":
        # Scenes that no demonstration shows: those stop before this attempt.
        seed, options, rng = draw_start(recording, index, attempt=MAX_ATTEMPTS)
        env = TabletopEnv(image_size=recording.image_size, cameras=recording.cameras, max_steps=max_steps)
        observation, _ = env.reset(seed=seed, options=options)
        start = {"qpos": env.data.qpos.tolist(), "qvel": env.data.qvel.tolist()}
        story = {"episode_index": index, "seed": seed, "options": options, "instruction": env.instruction, **start}
        return cls(index, env, rng, observation, story)

    def step(self, action: np.ndarray, expert_share: float) -> None:
        """One action of the policy (7,), in so many of all steps the expert's; `outcome` is set at the end."""
        right = Expert(self.env).action()
        space = self.env.action_space
        done = right if self.rng.random() < expert_share else np.clip(np.float32(action), space.low, space.high)
        self.frames.append({**self.observation, "action": done, "expert_action": right})
        self.observation, _, _, _, info = self.env.step(done)
        self.outcome = info["outcome"]

    def write(self, path: Path) -> None:
        story = {**self.story, "outcome": self.outcome, "length": len(self.frames)}
        write_episode(path, self.frames, story, video=False)
        self.env.close()


def record_corrections(
    policy: ModelPolicy,
    recording: Recording,
    output: Path,
    *,
    expert_share: float = 0.2,
    max_steps: int = 60,
    num_envs: int = 32,
) -> dict[str, int]:
    """
    Write the dataset.

    Args:
        policy ([`ModelPolicy`]): What acts.
        recording ([`Recording`]): Episodes, seed, tasks, image size and what is held out.
        output (`Path`): Folder of the dataset; must not exist.
        expert_share (`float`, defaults to 0.2): Of the steps, those that the expert takes: a policy that is stuck
            would show the same picture again and again.
        max_steps (`int`, defaults to 60): After which an episode ends.
        num_envs (`int`, defaults to 32): Episodes side by side.

    Returns:
        `dict[str, int]`: How often each outcome came.

    Raises:
        FileExistsError: If `output` exists.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it or choose another output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        paths = [Path(folder) / f"{index}.parquet" for index in range(recording.episodes)]
        with tqdm(total=recording.episodes, unit="episode") as bar:
            for rollout in roll_out(policy, recording, expert_share, max_steps, num_envs):
                rollout.write(paths[rollout.index])
                outcomes[rollout.outcome] = outcomes.get(rollout.outcome, 0) + 1
                bar.update()
                bar.set_postfix(outcomes)
        assemble(paths, Path(folder) / "dataset", recording.image_size, video=False)
        (Path(folder) / "dataset").rename(output)
    return outcomes


def roll_out(
    policy: ModelPolicy, recording: Recording, expert_share: float, max_steps: int, num_envs: int
) -> Iterator[Rollout]:
    """The episodes in the order in which they end."""
    waiting, running = deque(range(recording.episodes)), []
    while waiting or running:
        while waiting and len(running) < num_envs:
            running.append(Rollout.start(recording, waiting.popleft(), max_steps))
        begun = [each.index for each in running if not each.frames]
        actions = policy.next_actions({each.index: each.observation for each in running}, begun)
        for each, action in zip(running, actions, strict=True):
            each.step(action, expert_share)
        yield from (each for each in running if each.outcome is not None)
        running = [each for each in running if each.outcome is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory or Hub id")
    parser.add_argument("--episodes", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--tasks", "--objects", "--hold_out"):
        parser.add_argument(name, nargs="+", help="as `python -m tabletop.record` takes them")
    parser.add_argument("--unnorm_key", help="statistics that scale the actions")
    parser.add_argument("--dtype", default="auto", help="of the weights: `auto` (as saved), `float32`, `bfloat16`")
    parser.add_argument("--expert_share", type=float, default=0.2, help="of the steps that the expert takes")
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--num_envs", type=int, default=32)
    arguments = parser.parse_args()
    policy = ModelPolicy(*load_policy(arguments.policy, dtype=arguments.dtype), arguments.unnorm_key)
    chosen = {name: getattr(arguments, name) for name in ("tasks", "objects", "hold_out")}
    try:
        recording = Recording(
            episodes=arguments.episodes,
            seed=arguments.seed,
            image_size=policy.image_size,
            cameras=policy.cameras,
            **{name: tuple(values) for name, values in chosen.items() if values},
        )
        options = {name: getattr(arguments, name) for name in ("expert_share", "max_steps", "num_envs")}
        outcomes = record_corrections(policy, recording, arguments.output, **options)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"{arguments.output}: " + ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())))


if __name__ == "__main__":
    main()
