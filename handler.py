# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""
What a Hugging Face Inference Endpoint runs that is made from this repository.

    POST {"inputs": {"image": "<base64 of a PNG or JPEG>", "instruction": "pick up the red cube"},
          "parameters": {"unnorm_key": "tabletop", "return_uncertainty": true}}

answers `{"actions": [...], "entropy": [...]}`. `inputs` may be a list of such dictionaries; the answer is then a list.
"""

import base64
import io
from typing import Any

from PIL import Image
from transformers import pipeline


_INPUTS = ("image", "images", "instruction", "state", "unnorm_key")
_PARAMETERS = ("unnorm_key", "return_uncertainty", "do_sample", "temperature", "top_k", "top_p", "num_inference_steps")
MAX_BATCH_SIZE = 32


class EndpointHandler:
    """
    A policy behind the `__call__` of an Inference Endpoint.

    Args:
        path (`str`): Directory of the repository, whose own code runs.
        kwargs: Further arguments of `pipeline`, such as `device`; by default the first GPU is used, if there is one.
    """

    def __init__(self, path: str = "", **kwargs: Any):
        self.policy = pipeline(model=path or ".", trust_remote_code=True, **kwargs)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
        """
        Actions for the body of a request.

        Args:
            data (`dict`): `inputs`: a dictionary, or a list of at most `MAX_BATCH_SIZE`, of

                - `image` (`str`), or `images` (`list[str]`) of a policy that looks at several: base64 of a picture,
                  with or without `data:image/...;base64,`; no paths and no URLs;
                - `instruction` (`str`);
                - `state` (`list[float]`), where the policy takes one, and `unnorm_key` (`str`, *optional*).

                `parameters` (`dict`, *optional*): `unnorm_key` for all inputs, `return_uncertainty`, `do_sample`,
                `temperature`, `top_k`, `top_p`, `num_inference_steps`.

        Returns:
            `dict` or `list[dict]`: Of each input `actions`, (D,) or with chunks (K, D), as lists, in the units of the
            dataset, and with `return_uncertainty` the `entropy` of each action token in nats.

        Raises:
            ValueError: If the body cannot be used; the endpoint answers with the message and status 400.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"`parameters` must be an object, got {type(parameters).__name__}.")
        _check_fields("parameters", parameters, _PARAMETERS)
        rows = inputs if isinstance(inputs, list) else [inputs]
        if not 1 <= len(rows) <= MAX_BATCH_SIZE:
            raise ValueError(f"`inputs` must hold 1 to {MAX_BATCH_SIZE} observations, got {len(rows)}.")
        observations = [_observation(row) for row in rows]
        outputs = self.policy(observations, batch_size=len(rows), **parameters)
        answers = [{name: values.tolist() for name, values in output.items()} for output in outputs]
        return answers if isinstance(inputs, list) else answers[0]


def _observation(inputs: Any) -> dict[str, Any]:
    """An observation as the pipeline takes it."""
    if not isinstance(inputs, dict):
        raise ValueError(
            'Send JSON with `inputs`: {"image": <base64>, "instruction": <text>}, or a list of these; got '
            f"{type(inputs).__name__}."
        )
    _check_fields("inputs", inputs, _INPUTS)
    if ("image" in inputs) == ("images" in inputs):
        raise ValueError("An observation has either an `image` or a list of `images`.")
    if not isinstance(inputs.get("instruction"), str):
        raise ValueError(f"An observation needs an `instruction` in words, got {inputs.get('instruction')!r}.")
    images = inputs["images"] if "images" in inputs else [inputs["image"]]
    if not isinstance(images, list):
        raise ValueError(f"`images` must be a list of base64 strings, got {type(images).__name__}.")
    others = {name: inputs[name] for name in ("instruction", "state", "unnorm_key") if inputs.get(name) is not None}
    return {"images": [_decode(image) for image in images], **others}


def _decode(image: Any) -> Image.Image:
    """The picture of a base64 string. Anything else, such as a path, is refused: it would be read on the server."""
    if not isinstance(image, str):
        raise ValueError(f"An image must be the base64 of a PNG or JPEG, got {type(image).__name__}.")
    encoded = image.partition(",")[2] if image.startswith("data:") else image
    try:
        return Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=("PNG", "JPEG", "WEBP"))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"An image of {len(image)} characters is not the base64 of a PNG or JPEG: {error}") from error


def _check_fields(name: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"`{name}` has unknown fields {unknown}; known are {list(known)}.")


__all__ = ["EndpointHandler"]
