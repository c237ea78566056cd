"""Action mappings that several benchmarks share: checks, gripper signs and rotations."""

import numpy as np

from .rollout import ACTION_DIM


def check_action(action: np.ndarray) -> np.ndarray:
    """
    An action as float64 (7,).

    Raises:
        ValueError: If its shape is another, or a value is not finite.
    """
    action = np.asarray(action, dtype=np.float64)
    if action.shape != (ACTION_DIM,):
        raise ValueError(f"An action has shape ({ACTION_DIM},), got {action.shape}.")
    if not np.isfinite(action).all():
        raise ValueError(f"An action must be finite, got {action.tolist()}.")
    return action


def closing_sign(opening: float) -> float:
    """
    Gripper command of robosuite and LIBERO, -1 to open and +1 to close, of an opening from 0 (closed) to 1 (open).

    The published LIBERO evaluation stretches the opening to [-1, 1], takes the sign and turns it round. Exactly 0.5
    gives 0: the fingers keep still.
    """
    return float(-np.sign(2.0 * opening - 1.0))


class StickyGripper:
    """
    The Google robot's gripper, which takes changes of closedness: +1 closes, -1 opens, 0 keeps.

    A change of the opening by more than 0.5 is held for several actions, since one alone moves the fingers only part
    of the way; changes that come meanwhile are not followed. As in SimplerEnv's OpenVLA policy.

    Args:
        repeat (`int`, defaults to 15): Actions that a change is held for.
    """

    def __init__(self, repeat: int = 15):
        self.repeat = repeat
        self.reset()

    def reset(self) -> None:
        """Begin an episode."""
        self.previous: float | None = None
        self.held, self.remaining = 0.0, 0

    def command(self, opening: float) -> float:
        """The change to send for an opening from 0 (closed) to 1 (open)."""
        change = 0.0 if self.previous is None else self.previous - opening
        self.previous = opening
        if not self.remaining and abs(change) > 0.5:
            self.held, self.remaining = change, self.repeat
        if not self.remaining:
            return change
        self.remaining -= 1
        return self.held


def quaternion_from_euler(roll: float, pitch: float, yaw: float) -> np.ndarray:
    """Quaternion (x, y, z, w) of rotations about the fixed x, y and z axes, in this order, in radians."""
    (sr, sp, sy), (cr, cp, cy) = np.sin(np.divide([roll, pitch, yaw], 2)), np.cos(np.divide([roll, pitch, yaw], 2))
    return np.array(
        [
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
            cr * cp * cy + sr * sp * sy,
        ]
    )


def rotation_vector(quaternion: np.ndarray) -> np.ndarray:
    """
    Axis times angle in radians of a unit quaternion (x, y, z, w), with the angle in [0, 2 pi].

    A quaternion and its negative give different vectors of the same rotation, as in robosuite, whose datasets hold
    such vectors as states.
    """
    w = np.clip(quaternion[3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * (2.0 * np.arccos(w) / sine)


def robot_state(observation: dict[str, np.ndarray]) -> np.ndarray:
    """float32 (8,) of an observation of robosuite or LIBERO: position, rotation vector and finger joints."""
    orientation = rotation_vector(observation["robot0_eef_quat"])
    parts = [observation["robot0_eef_pos"], orientation, observation["robot0_gripper_qpos"]]
    return np.concatenate(parts).astype(np.float32)
