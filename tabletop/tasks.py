"""What the robot is asked to do, in words, and when it has done it."""

from dataclasses import dataclass

import mujoco
import numpy as np

from .scene import BOWL_HEIGHT, BOWL_RADIUS


LIFT_HEIGHT = 0.10
PUSH_DISTANCE = 0.10
# Off the table is below its surface.
DROPPED_HEIGHT = -0.05

# Several wordings of each task; the first is the canonical one. Left and right are those of the front camera's
# picture: its left is the robot's right, -y.
WORDINGS = {
    "pick": (
        "pick up the {object}",
        "grasp the {object} and lift it",
        "lift the {object}",
        "take the {object} off the table",
    ),
    "put_in_bowl": (
        "put the {object} in the bowl",
        "place the {object} into the bowl",
        "move the {object} to the bowl",
        "drop the {object} in the bowl",
    ),
    "push": (
        "push the {object} to the {side}",
        "slide the {object} to the {side}",
        "move the {object} {side}",
    ),
}
TASKS = tuple(WORDINGS)
SIDES = {"left": -1.0, "right": 1.0}


@dataclass(frozen=True)
class Goal:
    """
    A task on one object.

    Args:
        task (`str`): One of `TASKS`.
        target (`str`): The object's name, such as `red cube`.
        side (`str`, *optional*): `left` or `right`, for `push`.
        start (`tuple[float, float, float]`): Where the object was at the start, in metres.
    """

    task: str
    target: str
    start: tuple[float, float, float]
    side: str | None = None

    def instruction(self, wording: int = 0) -> str:
        return WORDINGS[self.task][wording].format(object=self.target, side=self.side)

    def outcome(self, data: mujoco.MjData, names: list[str], is_held: bool) -> str | None:
        """
        What the state of the physics says.

        Args:
            data (`mujoco.MjData`): After a control step.
            names (`list[str]`): Objects on the table.
            is_held (`bool`): Whether a finger touches the target.

        Returns:
            `str` or `None`: `success`; `dropped` (the target left the table) or `wrong_object` (another one was
            lifted or left the table); `None` while it goes on.
        """
        position = data.body(self.target).xpos
        if position[2] < DROPPED_HEIGHT:
            return "dropped"
        for name in names:
            height = data.body(name).xpos[2]
            if name != self.target and (height > LIFT_HEIGHT or height < DROPPED_HEIGHT):
                return "wrong_object"
        return "success" if self._is_reached(data, position, is_held) else None

    def _is_reached(self, data: mujoco.MjData, position: np.ndarray, is_held: bool) -> bool:
        if self.task == "pick":
            return bool(position[2] > LIFT_HEIGHT and is_held)
        if self.task == "put_in_bowl":
            from_bowl = np.linalg.norm(position[:2] - data.body("bowl").xpos[:2])
            return bool(from_bowl < BOWL_RADIUS and position[2] < BOWL_HEIGHT + 0.02 and not is_held)
        moved = (position[1] - self.start[1]) * SIDES[self.side]
        return bool(moved > PUSH_DISTANCE and position[2] < LIFT_HEIGHT)
