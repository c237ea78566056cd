"""
What a dataset's description may do to a column of numbers: small rules that are named in YAML.

A rule takes the values of an episode, (T, W), and returns (T, W'). The names in [`RULES`] are the ones that
descriptions use: `action[-1] | clip | invert`.
"""

import zlib
from collections.abc import Callable

import numpy as np


OPEN, CLOSED = 0.95, 0.05
RELATIVE_THRESHOLD = 0.1
GIMBAL_TOLERANCE = 1e-6


# Gripper


def binarize(gripper: np.ndarray) -> np.ndarray:
    """
    Open or closed for a gripper that passes through values in between.

    Above 0.95 is open, below 0.05 closed. Values in between take the one that is settled on next; where none follows
    they take the last raw value. OpenVLA's rule for Bridge V2.

    Args:
        gripper (`np.ndarray`): float (T, W), 1 = open, 0 = closed.

    Returns:
        `np.ndarray`: float (T, W), each 0 or 1 but for a trail of values in between.
    """
    steps = np.arange(len(gripper))[:, None]  # (T, 1)
    settled = (gripper > OPEN) | (gripper < CLOSED)
    following = np.where(settled, steps, len(gripper))
    following = np.minimum.accumulate(following[::-1], axis=0)[::-1]  # step of the next settled value, T: none
    opened = np.concatenate([(gripper > OPEN).astype(gripper.dtype), gripper[-1:]])  # (T + 1, W)
    return np.take_along_axis(opened, following, axis=0)


def relative_to_absolute(gripper: np.ndarray) -> np.ndarray:
    """
    Open or closed for a gripper that is told only when to move.

    Above 0.1 it closes, below -0.1 it opens, anything else holds. Before the first event it is in the state that
    this event changes; without an event it is open. OpenVLA's rule for the Google robot.

    Args:
        gripper (`np.ndarray`): float (T, W), +1 = close, -1 = open, 0 = hold.

    Returns:
        `np.ndarray`: float (T, W) of 1 = open, 0 = closed.
    """
    closes, opens = gripper > RELATIVE_THRESHOLD, gripper < -RELATIVE_THRESHOLD
    events = closes | opens
    steps = np.arange(len(gripper))[:, None]
    last = np.maximum.accumulate(np.where(events, steps, -1), axis=0)  # step of the last event, -1: none yet
    first = np.take_along_axis(closes, events.argmax(axis=0)[None], axis=0)  # (1, W)
    before = first | ~events.any(axis=0)
    state = np.where(last < 0, before, np.take_along_axis(opens, np.maximum(last, 0), axis=0))
    return state.astype(gripper.dtype)


def invert(gripper: np.ndarray) -> np.ndarray:
    """`1 - gripper`: open and closed change places."""
    return 1 - gripper


def clip(gripper: np.ndarray) -> np.ndarray:
    """Values below 0 become 0, above 1 become 1: a gripper that is told -1 or 1."""
    return np.clip(gripper, 0, 1)


# Pose


def quaternion_to_euler(quaternions: np.ndarray) -> np.ndarray:
    """
    Roll, pitch and yaw of rotations, as `tensorflow_graphics`' `euler.from_quaternion` gives them.

    The rotation is `Rz(yaw) @ Ry(pitch) @ Rx(roll)`: about the fixed axes x, then y, then z. Pitch lies in
    [-pi/2, pi/2], the others in [-pi, pi]; where pitch is +-pi/2 (within 1e-6 in its sine) yaw is 0.

    Args:
        quaternions (`np.ndarray`): float (T, 4), x, y, z, w, of length 1; they are not normalised.

    Returns:
        `np.ndarray`: float (T, 3) in radians.

    Raises:
        ValueError: If there are not four columns.
    """
    if quaternions.shape[-1] != 4:
        raise ValueError(f"a quaternion has 4 columns (x, y, z, w), these are {quaternions.shape[-1]}")
    x, y, z, w = quaternions.astype(np.float64).T
    r00, r10, r20 = 1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)
    r21, r22 = 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    r01, r02 = 2 * (x * y - w * z), 2 * (x * z + w * y)
    sign = np.where(r20 < 0, -1.0, 1.0)
    general = [np.arctan2(r21, r22), -np.arcsin(np.clip(r20, -1, 1)), np.arctan2(r10, r00)]
    locked = [np.arctan2(-sign * r01, -sign * r02), -sign * np.pi / 2, np.zeros_like(r20)]
    angles = np.where(np.abs(np.abs(r20) - 1) < GIMBAL_TOLERANCE, locked, general)  # (3, T)
    return angles.T.astype(quaternions.dtype)


def displacement(states: np.ndarray) -> np.ndarray:
    """
    How far each state is from the next one: what a robot did in place of what it was told.

    A plain difference, angles included: one that passes from pi to -pi differs by 2 pi, as in OpenVLA's Bridge V2.

    Args:
        states (`np.ndarray`): float (T, W).

    Returns:
        `np.ndarray`: float (T, W). The last row is NaN, since no state follows; `drop_last: 1` removes it.
    """
    return np.diff(states, axis=0, append=np.full_like(states[-1:], np.nan))


# Encodings


def zlib_float32(values: np.ndarray) -> np.ndarray:
    """
    The float32 numbers that each step stores as zlib-compressed bytes, as Kuka does with its state.

    Args:
        values (`np.ndarray`): object (T,) or (T, 1) of `bytes`. Numbers pass as they are: a reader that heeds the
            encoding in features.json has decoded them already.

    Returns:
        `np.ndarray`: float32 (T, W).

    Raises:
        zlib.error: If a step's bytes are no zlib stream of float32, or differ in number from another's.
    """
    if values.dtype != object:
        return values
    try:
        return np.stack([np.frombuffer(zlib.decompress(value), "<f4") for value in values.reshape(-1)])
    except (ValueError, TypeError) as error:
        raise zlib.error(f"expected compressed float32, as many at each step: {error}") from error


def decode_code_points(codes: np.ndarray) -> list[str]:
    """
    Text that is stored as Unicode code points, cut at the first 0, as Language Table does.

    Args:
        codes (`np.ndarray`): int (T, N).

    Raises:
        UnicodeDecodeError: If a number before the first 0 is no code point.
    """
    lengths = np.cumprod(codes != 0, axis=1).sum(axis=1)
    return [
        row[:length].astype("<u4").tobytes().decode("utf-32-le") for row, length in zip(codes, lengths, strict=True)
    ]


RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    rule.__name__: rule
    for rule in (
        binarize,
        relative_to_absolute,
        invert,
        clip,
        quaternion_to_euler,
        displacement,
        zlib_float32,
    )
}
