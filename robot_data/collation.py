"""Training batches of steps, through the policy's own processor: action tokens, or the actions themselves."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .augmentation import Augmentation
from .episode import Step
from .pictures import decode


IGNORE_INDEX = -100


@dataclass(frozen=True)
class Collator:
    """
    Makes a training batch of steps: pictures decoded, resized and augmented, actions as tokens behind the prompts.

    Pictures are resized as the processor does it and augmented afterwards, the order that OpenVLA was trained in.
    With an augmentation its random crop takes the place of the processor's centre crop.

    Args:
        processor: The policy's, with the statistics of every dataset that comes up.
        camera (`str`, defaults to `"primary"`): Role of the picture that the policy looks at.
        augmentation (`Augmentation`, *optional*): Varies the pictures; drawn from each step's own seed.
        predict_stop_token (`bool`, defaults to `True`): Whether the token after the action is learned, too.
        continuous (`bool`, defaults to `False`): Hand on the actions as they are, chunks too, in place of tokens.
    """

    processor: Any
    camera: str = "primary"
    augmentation: Augmentation | None = None
    predict_stop_token: bool = True
    continuous: bool = False

    def __call__(self, steps: list[Step]) -> dict[str, torch.Tensor]:
        """
        Args:
            steps (`list[Step]`): B steps with actions of one length, and chunks of one action unless `continuous`.

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels` (B, L), and `pixel_values` (B, C, S, S). Padding is on
            the processor's side, no longer than the longest row asks for. Labels are -100 outside the tokens of the
            action and the stop token. With `continuous` there are no labels, but, in the datasets' units, `actions`
            float32 (B, K, D) with `action_is_pad` bool (B, K), and, where the steps have one, `states` float32
            (B, S).

        Raises:
            ValueError: If a picture is missing or cannot be decoded, or the processor holds no statistics of a
                step's dataset; names the step.
        """
        learned = {} if self.continuous else _learned_actions(steps)
        batch = self.processor(
            instruction=[step.instruction for step in steps],
            images=[self._picture(step) for step in steps],
            padding=True,
            do_center_crop=self.augmentation is None,
            **learned,
        )
        if self.continuous:
            return {**batch, **_numbers(steps)}
        if not self.predict_stop_token:
            is_stop = batch["labels"] == self.processor.tokenizer.eos_token_id
            batch["labels"][is_stop] = IGNORE_INDEX
        return dict(batch)

    def _picture(self, step: Step) -> np.ndarray:
        """uint8 (S, S, 3)."""
        if self.camera not in step.images:
            raise ValueError(f"{_name(step)} has no camera {self.camera!r}; it has {sorted(step.images)}.")
        try:
            picture = self.processor.image_processor.resize(decode(step.images[self.camera]))
        except ValueError as error:
            raise ValueError(f"{_name(step)}, camera {self.camera!r}: {error}") from error
        return picture if self.augmentation is None else self.augmentation(picture, step.seed)


def _learned_actions(steps: list[Step]) -> dict[str, Any]:
    """What the processor makes tokens of."""
    actions = np.stack([_single_action(step) for step in steps])  # (B, D)
    return {"actions": actions, "unnorm_key": [step.dataset for step in steps]}


def _numbers(steps: list[Step]) -> dict[str, torch.Tensor]:
    columns = {
        "actions": [step.action for step in steps],  # (B, K, D)
        "action_is_pad": [step.action_is_pad for step in steps],  # (B, K)
    }
    if steps[0].state is not None:
        columns["states"] = [step.state for step in steps]  # (B, S)
    return {name: torch.from_numpy(np.stack(values)) for name, values in columns.items()}


def _single_action(step: Step) -> np.ndarray:
    """(D,) of a chunk (1, D)."""
    if len(step.action) != 1:
        raise ValueError(f"{_name(step)} has a chunk of {len(step.action)} actions; action tokens speak of one.")
    return step.action[0]


def _name(step: Step) -> str:
    return f"{step.dataset}, episode {step.episode}, frame {step.frame}"
