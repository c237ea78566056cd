# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""The pipeline that config.json declares: `pipeline(model=repository, trust_remote_code=True)` gives robot actions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Pipeline
from transformers.image_utils import load_image


ImageSource = str | Path | Image.Image | np.ndarray | torch.Tensor

OBSERVATION_FIELDS = ("images", "instruction", "state", "unnorm_key")


class OpenVLAPipeline(Pipeline):
    """
    Camera images and an instruction in, robot actions out.

        policy = pipeline(model=repository, trust_remote_code=True)
        policy("camera.png", "pick up the red cube", state=state)["actions"]

    The task is called `robotics`; it need not be named. Arguments of a call may also be given to `pipeline(...)`, for
    all calls.
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]] | Any,
        instruction: str | Sequence[str] | None = None,
        state: np.ndarray | Sequence | None = None,
        **kwargs: Any,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """
        Actions for an observation, or for several.

        Args:
            images: The camera's picture: a PIL image, an array, a tensor, a path, a URL or base64; a list of them for
                policies that look at several (`num_images`), the third-person view first. With a list of instructions,
                one of these for each. Alternatively a dictionary of `images`, `instruction`, `state` and `unnorm_key`,
                or a list, generator or dataset of such dictionaries.
            instruction (`str` or `list[str]`, *optional*): What the robot should do.
            state (`np.ndarray`, *optional*): (P,) or one per instruction, (B, P), in the units of the dataset; for
                policies with `use_proprio`.
            unnorm_key (`str`, *optional*): Dataset whose statistics scale action and state. May be left out where
                there is only one.
            return_uncertainty (`bool`, defaults to `False`): Return `entropy` as well.
            timeout (`float`, *optional*): Seconds to wait for a picture behind a URL.
            batch_size, num_workers (`int`, *optional*): As in every pipeline; how many observations one pass takes.
            kwargs: Of `predict_action`: `do_sample`, `temperature`, `top_k`, `top_p`, `generator`,
                `num_inference_steps`.

        Returns:
            `dict` or `list[dict]`: For each observation `actions`, float64 (D,), with chunks (K, D), in the units of
            the dataset, and with `return_uncertainty` the `entropy` of each action token, float32 (K * D,), in nats.

        Raises:
            ValueError: If the numbers of images, instructions and states differ, or one of them cannot be used.
        """
        if instruction is None:
            if state is not None:
                raise ValueError("`state` goes with `instruction`; a dictionary holds its own.")
            return super().__call__(images, **kwargs)
        if isinstance(instruction, str):
            return super().__call__({"images": images, "instruction": instruction, "state": state}, **kwargs)
        states = [None] * len(instruction) if state is None else state
        if not len(images) == len(instruction) == len(states):
            raise ValueError(
                f"{len(instruction)} instructions, {len(images)} images and {len(states)} states were given."
            )
        rows = zip(images, instruction, states, strict=True)
        return super().__call__([dict(zip(OBSERVATION_FIELDS, row, strict=False)) for row in rows], **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save policy and processor, in the layout that every supported version of transformers reads."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)

    def _sanitize_parameters(
        self,
        unnorm_key: str | None = None,
        timeout: float | None = None,
        return_uncertainty: bool | None = None,
        **sampling: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        known = {"do_sample", "temperature", "top_k", "top_p", "generator", "num_inference_steps"}
        if unknown := sorted(sampling.keys() - known):
            raise ValueError(
                f"Arguments {unknown} are unknown; known are unnorm_key, timeout, return_uncertainty, "
                f"{', '.join(sorted(known))}, and those of every pipeline."
            )
        reading = {"unnorm_key": unnorm_key, "timeout": timeout}
        # What a call leaves out must not undo what the pipeline was made with.
        reading = {name: value for name, value in reading.items() if value is not None}
        writing = {} if return_uncertainty is None else {"return_uncertainty": return_uncertainty}
        return reading, {**sampling, **writing}, writing

    def preprocess(
        self, observation: dict[str, Any], unnorm_key: str | None = None, timeout: float | None = None
    ) -> dict[str, Any]:
        """Model inputs of one observation, and the `unnorm_key` that its action needs."""
        if not isinstance(observation, dict) or not {"images", "instruction"} <= observation.keys():
            given = sorted(observation) if isinstance(observation, dict) else type(observation).__name__
            raise ValueError(
                f"An observation is an image with an `instruction`, or a dictionary of {list(OBSERVATION_FIELDS)}; "
                f"got {given}."
            )
        if unknown := sorted(observation.keys() - set(OBSERVATION_FIELDS)):
            raise ValueError(f"An observation has fields {list(OBSERVATION_FIELDS)}; {unknown} are unknown.")
        unnorm_key = observation.get("unnorm_key") or unnorm_key
        images, state = observation["images"], observation.get("state")
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        inputs = self.processor(
            instruction=observation["instruction"],
            images=[[_open(image, timeout) for image in images]],
            **({} if state is None else {"state": state, "unnorm_key": unnorm_key}),
        )
        return {**inputs, "unnorm_key": unnorm_key}

    def _forward(
        self, inputs: dict[str, Any], return_uncertainty: bool = False, **sampling: Any
    ) -> dict[str, np.ndarray | torch.Tensor]:
        unnorm_key = inputs.pop("unnorm_key")
        if isinstance(unnorm_key, list) and set(unnorm_key) == {None}:
            unnorm_key = None
        inputs = {
            name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()
        }
        output = self.model.predict_action(**inputs, unnorm_key=unnorm_key, return_dict=True, **sampling)
        batch_size = len(inputs["input_ids"])
        actions = output.actions[None] if batch_size == 1 else output.actions  # (B, D) or (B, K, D)
        if not return_uncertainty:
            return {"actions": actions}
        if output.entropy is None:
            raise ValueError(
                f"`return_uncertainty=True`: a policy with `head_type={self.model.config.head_type!r}` does not say "
                "how sure it is."
            )
        return {"actions": actions, "entropy": output.entropy.float().cpu().numpy()}

    def postprocess(self, outputs: dict[str, np.ndarray], return_uncertainty: bool = False) -> dict[str, np.ndarray]:
        """The row (1, ...) of one observation, without its first axis."""
        return {name: values[0] for name, values in outputs.items()}


def _open(image: ImageSource, timeout: float | None) -> Image.Image | np.ndarray | torch.Tensor:
    """What the processor takes."""
    return load_image(str(image), timeout=timeout) if isinstance(image, (str, Path)) else image


__all__ = ["OpenVLAPipeline"]
