"""Training batches of steps, through the policy's own processor: what the policy sees, and the actions to learn."""

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
    Makes a training batch of steps: pictures decoded, resized and augmented, and what else the policy takes.

    Pictures are resized as the processor does it and augmented afterwards, the order that OpenVLA was trained in.
    With an augmentation its random crop takes the place of the processor's centre crop.

    Beyond the end of an episode its last action is repeated. Tokens of these actions keep their places and are not
    learned. A FAST token is of the whole chunk, and none can be left out: they spell the repeated actions, too, and
    all are learned (as openpi learns pi0-FAST).

    Args:
        processor: The policy's, with the statistics of every dataset that comes up. It tells how many pictures a
            policy looks at, how long its chunks are, and whether it takes the state.
        cameras (`tuple[str]`, *optional*): Roles of these pictures, in the policy's order. By default those of
            [`camera_roles`].
        augmentation (`Augmentation`, *optional*): Varies the pictures, each camera's by itself; drawn from each step's
            own seed.
        predict_stop_token (`bool`, defaults to `True`): Whether the token after the actions is learned, too. A head on
            the hidden states never learns it.
    """

    processor: Any
    cameras: tuple[str, ...] | None = None
    augmentation: Augmentation | None = None
    predict_stop_token: bool = True

    def __call__(self, steps: list[Step]) -> dict[str, torch.Tensor]:
        """
        Args:
            steps (`list[Step]`): B steps with chunks of the policy's length; robots may differ in action dimension.

        Returns:
            `dict`: `input_ids`, `attention_mask` and `labels` (B, L); `pixel_values` (B, images * C, S, S);
            `action_is_pad` bool (B, K); where the policy takes the state, `proprio` (B, P); for a head on the hidden
            states, the normalised `actions` float32 (B, K, D), and `action_dims` (B,) where robots differ in D; where
            the policy tells robots apart, `embodiment` (B,). Padding is on the processor's side, no longer than the
            longest row asks for. Labels are -100 outside the tokens of the actions, which say where the actions are,
            of padded ones as well, and the stop token. FAST tokens are of another number in each row.

        Raises:
            ValueError: If a picture or a state is missing, a picture cannot be decoded or a chunk has another length,
                naming the step; or if the processor holds no statistics of a step's dataset.
        """
        chunks = [self._chunk(step) for step in steps]  # B of (K, D)
        batch = self.processor(
            instruction=[step.instruction for step in steps],
            images=[self._pictures(step) for step in steps],
            padding=True,
            do_center_crop=self.augmentation is None,
            actions=chunks if self.processor.chunk_size > 1 else [chunk[0] for chunk in chunks],
            unnorm_key=[step.dataset for step in steps],
            **({"state": [_state(step) for step in steps]} if self.processor.use_proprio else {}),
        )
        if not self.predict_stop_token or self.processor.head_type not in ("tokens", "fast"):
            is_stop = batch["labels"] == self.processor.tokenizer.eos_token_id
            batch["labels"][is_stop] = IGNORE_INDEX
        return {**batch, "action_is_pad": torch.from_numpy(np.stack([step.action_is_pad for step in steps]))}

    def _pictures(self, step: Step) -> list[np.ndarray]:
        """uint8 (S, S, 3) of each camera."""
        cameras = self.cameras or camera_roles(self.processor.num_images)
        return [self._picture(step, camera, index) for index, camera in enumerate(cameras)]

    def _picture(self, step: Step, camera: str, index: int) -> np.ndarray:
        if camera not in step.images:
            raise ValueError(f"{_name(step)} has no camera {camera!r}; it has {sorted(step.images)}.")
        try:
            picture = self.processor.image_processor.resize(decode(step.images[camera]))
        except ValueError as error:
            raise ValueError(f"{_name(step)}, camera {camera!r}: {error}") from error
        return picture if self.augmentation is None else self.augmentation(picture, step.seed + index)

    def _chunk(self, step: Step) -> np.ndarray:
        """(K, D)."""
        expected = self.processor.chunk_size
        if len(step.action) != expected:
            raise ValueError(
                f"{_name(step)} has a chunk of {len(step.action)} actions; the policy's chunks have {expected}."
            )
        return step.action


def camera_roles(num_images: int) -> tuple[str, ...]:
    """Roles of the pictures that a policy looks at: the third-person view, and behind it those at the wrists."""
    return ("primary", "wrist", *(f"wrist_{number}" for number in range(2, num_images)))[:num_images]


def _state(step: Step) -> np.ndarray:
    """(S,)."""
    if step.state is None:
        raise ValueError(f"{_name(step)} has no state, and the policy takes one (`use_proprio`).")
    return step.state


def _name(step: Step) -> str:
    return f"{step.dataset}, episode {step.episode}, frame {step.frame}"
