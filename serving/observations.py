"""From the names and forms that clients use to one observation: camera pictures, instruction, state."""

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


MAX_PIXELS = 4096 * 3072  # of one picture
MAX_CHARACTERS = 1000  # of an instruction
MAX_NAME = 128

# The camera that policies see first, as clients call it: published OpenVLA, OpenVLA-OFT, and openpi's for LIBERO and
# DROID. Every key with `wrist` in it is a further camera, in the order in which they come, as in OpenVLA-OFT.
FRONT_CAMERAS = ("image", "full_image", "observation/image", "observation/exterior_image_1_left")
# openpi's ALOHA clients send a map of cameras, in any order; OpenVLA-OFT is trained on them in this one.
ALOHA_CAMERAS = ("cam_high", "cam_left_wrist", "cam_right_wrist")
INSTRUCTIONS = ("instruction", "prompt")
STATES = ("state", "observation/state")
DROID_STATE = ("observation/joint_position", "observation/gripper_position")


class ObservationError(ValueError):
    """An observation that lacks something, or of which something is of a wrong form."""


@dataclass(frozen=True)
class Observation:
    """
    What a robot sees and is told.

    Args:
        instruction (`str`): What it should do.
        images (`tuple`): As many pictures as the policy looks at: PIL images, or arrays (H, W, 3) or (3, H, W).
        state (`np.ndarray`, *optional*): float64 (P,), where the policy takes one.
        unnorm_key (`str`, *optional*): Dataset whose statistics scale the actions.
        session_id (`str`, *optional*): Robot or episode whose newest observation counts alone.
        uncertainty (`bool`): Whether the answer should tell how sure the policy is.
    """

    instruction: str
    images: tuple[Image.Image | np.ndarray, ...]
    state: np.ndarray | None = None
    unnorm_key: str | None = None
    session_id: str | None = None
    uncertainty: bool = False


def read_observation(fields: Any, num_images: int, use_proprio: bool) -> Observation:
    """
    The observation in a message of any of the known clients.

    Args:
        fields (`Mapping`): The message. A picture is an array, or a JPEG or PNG as bytes or as base64.
        num_images (`int`): Pictures that the policy looks at. One that looks at one picture gets the front camera's.
        use_proprio (`bool`): Whether it takes a state, which is left unread otherwise.

    Raises:
        ObservationError: Saying what is missing or wrong.
    """
    if not isinstance(fields, Mapping):
        raise ObservationError(f"An observation must be a map of names to values, got {type(fields).__name__}.")
    instruction = _text(fields, INSTRUCTIONS, MAX_CHARACTERS)
    if instruction is None:
        raise ObservationError(f"The observation has no instruction; expected one of {list(INSTRUCTIONS)}.")
    return Observation(
        instruction=instruction,
        images=tuple(read_picture(name, value) for name, value in _cameras(fields, num_images)),
        state=_state(fields) if use_proprio else None,
        unnorm_key=_text(fields, ("unnorm_key",), MAX_NAME),
        session_id=_text(fields, ("session_id",), MAX_NAME),
        uncertainty=_flag(fields, "uncertainty"),
    )


def read_picture(name: str, value: Any) -> Image.Image | np.ndarray:
    """
    The picture of a camera; an array is left to the processor, which knows what it takes.

    Raises:
        ObservationError: If it is neither an array, nor a JPEG or PNG that can be decoded, or has too many pixels.
    """
    if isinstance(value, np.ndarray):
        if value.ndim not in (2, 3) or value.size > 4 * MAX_PIXELS:
            raise ObservationError(f"`{name}` must be of shape (H, W, 3), of {MAX_PIXELS} pixels at most.")
        return value
    if isinstance(value, str):
        value = _from_base64(name, value)
    if not isinstance(value, bytes):
        raise ObservationError(
            f"`{name}` must be an array, or a JPEG or PNG as base64 or bytes, got {type(value).__name__}."
        )
    return _decoded(name, value)


def sends_arrays(fields: Any) -> bool:
    """Whether a message has its pictures as arrays, so that its sender reads arrays, too."""
    return isinstance(fields, Mapping) and any(
        isinstance(fields.get(name), np.ndarray) for name in FRONT_CAMERAS if name in fields
    )


def _cameras(fields: Mapping[str, Any], num_images: int) -> list[tuple[str, Any]]:
    """Names and values of the pictures that the policy looks at."""
    cameras = _given_cameras(fields)
    if (num_images > 1 and len(cameras) != num_images) or not cameras:
        raise ObservationError(
            f"The policy looks at {num_images} picture(s), the observation has {[name for name, _ in cameras]}: the "
            f"first as one of {list(FRONT_CAMERAS)}, further ones under names with `wrist` in them, or `images` with "
            f"{list(ALOHA_CAMERAS)}."
        )
    return cameras[:num_images]


def _given_cameras(fields: Mapping[str, Any]) -> list[tuple[str, Any]]:
    if isinstance(images := fields.get("images"), Mapping):
        return [(name, images[name]) for name in ALOHA_CAMERAS if name in images]
    fronts = [name for name in FRONT_CAMERAS if name in fields]
    if len(fronts) > 1:
        raise ObservationError(f"The observation has several front cameras: {fronts}.")
    wrists = [name for name in fields if isinstance(name, str) and "wrist" in name]
    return [(name, fields[name]) for name in (*fronts, *wrists)] if fronts else []


def _state(fields: Mapping[str, Any]) -> np.ndarray:
    """float64 (P,)."""
    if all(name in fields for name in DROID_STATE):
        return np.concatenate([_numbers(name, fields[name]) for name in DROID_STATE])
    for name in STATES:
        if fields.get(name) is not None:
            return _numbers(name, fields[name])
    raise ObservationError(f"The policy takes a state; expected one of {list(STATES)}, or {list(DROID_STATE)}.")


def _numbers(name: str, value: Any) -> np.ndarray:
    """Finite float64 (P,); a lone number is (1,)."""
    try:
        numbers = np.atleast_1d(value)
    except ValueError as error:  # rows of different lengths
        raise ObservationError(f"`{name}` must be a list of numbers.") from error
    if numbers.dtype.kind not in "biuf" or numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ObservationError(f"`{name}` must be a list of finite numbers, got {numbers.dtype} {numbers.shape}.")
    return numbers.astype(np.float64)


def _text(fields: Mapping[str, Any], names: tuple[str, ...], limit: int) -> str | None:
    for name in names:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, str) or not value.strip() or len(value) > limit:
            raise ObservationError(f"`{name}` must be a text of 1 to {limit} characters.")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ObservationError(f"`{name}` holds half a character (a lone surrogate).")
        return value
    return None


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if isinstance(value, str) and value.lower() in ("true", "false"):  # of a form
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ObservationError(f"`{name}` must be true or false.")
    return value


def _from_base64(name: str, text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ObservationError(f"`{name}` is not base64; paths and addresses are not read.") from error


def _decoded(name: str, data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    except Exception as error:  # damaged files make the decoders raise nearly anything
        raise ObservationError(f"`{name}` is neither a JPEG nor a PNG.") from error
    if image.width * image.height > MAX_PIXELS:
        raise ObservationError(f"`{name}` has {image.width}x{image.height} pixels; at most {MAX_PIXELS} are taken.")
    try:
        image.load()
    except Exception as error:
        raise ObservationError(f"`{name}` is damaged.") from error
    return image
