"""
What judges the policy while it is trained: open-loop pictures at each validation, rollouts at each save.

It needs the packages of requirements-evaluation.txt, and training without it does not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluate_policy import choose_tasks, introduce, summarize_tasks
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from evaluation.environments import Environment
from evaluation.open_loop import Comparison
from evaluation.policies import ModelPolicy
from evaluation.report import save_open_loop_figure
from evaluation.rollout import Job, rollout
from robot_data.episode import Episode, dimension_names
from robot_data.pictures import decode

from .arguments import OpenVLATrainingArguments
from .randomness import own_random_numbers


MAX_DRAWN_STEPS = 300


class OpenLoopCallback(TrainerCallback):
    """
    Draws what the policy predicts on held-out episodes beside what was recorded, at each validation, into
    `open_loop/DATASET-step-N.png` of the output directory.

    Args:
        model: With `predict_action`, whole in the main process.
        processor: Of the policy.
        episodes (`list[Episode]`): The first 300 steps of each are drawn.
        cameras (`Sequence[str]`): Roles of the pictures that the policy looks at, in its order.
    """

    def __init__(self, model: Any, processor: Any, episodes: list[Episode], cameras: Sequence[str]):
        self.model, self.processor, self.episodes, self.cameras = model, processor, episodes, cameras

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "open_loop"
        folder.mkdir(parents=True, exist_ok=True)
        self.model.eval()
        for episode in self.episodes:
            comparison = self._compare(episode, args.per_device_eval_batch_size)
            names = list(dimension_names(comparison.recorded.shape[1]))
            path = folder / f"{episode.dataset}-step-{state.global_step}.png"
            save_open_loop_figure([comparison], names, path, f"{episode.dataset}, step {state.global_step}")

    def _compare(self, episode: Episode, batch_size: int) -> Comparison:
        count = min(len(episode), MAX_DRAWN_STEPS)
        comparison = Comparison(0, episode.index, episode.instructions[:count], episode.actions[:count])
        comparison.is_drawn, comparison.is_sampled = True, comparison.is_told
        policy = ModelPolicy(self.model, self.processor, episode.dataset)
        steps = comparison.is_sampled.nonzero()[0]
        for start in range(0, len(steps), batch_size):
            batch = steps[start : start + batch_size]
            comparison.predicted[batch] = policy.predict(
                [episode.instructions[step] for step in batch],
                [[decode(episode.images[camera][step]) for camera in self.cameras] for step in batch],
                None if episode.states is None else list(episode.states[batch]),
            )
        return comparison


class TabletopRollouts:
    """
    Rolls the policy out in the simulated tabletop, every time in the same scenes.

    Args:
        model: With `predict_action`, whole in this process.
        processor: Of the policy.
        args ([`OpenVLATrainingArguments`]): Which tasks, how many episodes of each, and how many side by side.

    Raises:
        ValueError: If the simulator cannot be made, a task or `rollout_unnorm_key` is unknown, or the policy's actions
            are not the tabletop's.
    """

    def __init__(self, model: Any, processor: Any, args: OpenVLATrainingArguments):
        self.policy = ModelPolicy(model, processor, args.rollout_unnorm_key)
        self.environment = Environment(
            arguments={"image_size": self.policy.image_size, "cameras": self.policy.cameras}
        )
        known_tasks, _ = introduce(self.policy, self.environment)
        self.jobs = [
            Job(task, args.rollout_seed + index)
            for task in choose_tasks(args.rollout_tasks, known_tasks)
            for index in range(args.rollout_episodes)
        ]
        self.seed, self.num_envs = args.rollout_seed, args.per_device_eval_batch_size

    def __call__(self) -> dict[str, float]:
        """
        Roll the policy out. The model and the random numbers of training are afterwards as they were.

        Returns:
            `dict[str, float]`: `rollout_success` over all tasks, and `rollout_success_TASK` of each.
        """
        model = self.policy.model
        was_training = {name: module.training for name, module in model.named_modules()}
        model.eval()
        try:
            with own_random_numbers(self.seed, model.device):
                episodes = rollout(self.policy, self.jobs, self.environment.make, num_envs=self.num_envs)
        finally:
            for name, module in model.named_modules():
                module.training = was_training[name]
        numbers = summarize_tasks(episodes)
        success = {f"rollout_success_{task}": each["success_rate"] for task, each in numbers["tasks"].items()}
        return {"rollout_success": numbers["all"]["success_rate"], **success}
