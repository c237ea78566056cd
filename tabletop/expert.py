"""A scripted expert: the right action for any state."""

import numpy as np

from .control import OPEN_WIDTH
from .environment import MAX_ROTATION, MAX_TRANSLATION, TabletopEnv
from .scene import BOWL_HEIGHT, SHAPES
from .tasks import SIDES, Goal


HOVER = 0.10  # above the table, metres
# In metres and radians: fingers that close farther from the middle squeeze a cylinder out.
GRASP_TOLERANCE = 0.012
YAW_TOLERANCE = 0.3
# The way down is a cone: so far from its axis the hand stays so much above its end.
CONE_RADIUS = 0.010
CONE_SLOPE = 1.6
CONE_SLOPE_YAW = 0.2  # metres per radian beyond half the tolerance
# Of one finger, metres: closed farther than around the narrowest object, it has missed.
MISSED_WIDTH = 0.012
CLOSING_RISE = 0.004
MAX_CLOSING_HEIGHT = 1.5 * GRASP_TOLERANCE + 2 * CLOSING_RISE  # of the hand above the target, metres
# Over the bowl, a cone again: high enough above its rim on the way, low enough to let go at its end.
CARRY_HEIGHT, RELEASE_HEIGHT = 0.13, 0.06
RELEASE_TOLERANCE = 0.03
PUSH_HEIGHT = 0.022
LAG = 0.06  # of a hand below its way, in metres, at which it does not move across
CLEAR = np.array([0.5, 0.0, 0.2])  # where a hand can turn freely, metres
# Radians from straight down that are left alone: demonstrations turn about the vertical alone.
TILT_TOLERANCE = 0.12
# Radians about the vertical, from the start, that the last joint allows wherever the hand is.
MAX_YAW = 1.8


class Expert:
    """
    Acts on the state of the physics alone, so that it can label the states that a learner visits: it rights a tilted
    hand and comes back from the ends of the arm's reach. It finds no way out where several joints have been wound up
    to their ends, or where the bowl is between the fingers and the target.

    There is no phase to remember. The one hysteresis is in the state itself: a hand that has closed around the target
    stays closed and goes on, within a tolerance wider than the one it closed at.

    Args:
        env (`TabletopEnv`): The environment to act in.
        goal (`Goal`, *optional*): What to do in it; by default what the environment asks for.
    """

    def __init__(self, env: TabletopEnv, goal: Goal | None = None):
        self.env, self._own_goal = env, goal

    @property
    def goal(self) -> Goal:
        return self._own_goal or self.env.goal

    def noisy_action(
        self, rng: np.random.Generator, noise: float = 0.3, nudge_probability: float = 0.03
    ) -> np.ndarray:
        """
        The action with errors, whose correction the following actions show.

        Args:
            rng (`np.random.Generator`): Source of the errors.
            noise (`float`, defaults to 0.3): Standard deviation on translation and rotation, as a fraction of the
                largest action.
            nudge_probability (`float`, defaults to 0.03): Of a push of the full size in a random direction instead.

        Returns:
            `np.ndarray`: float32 (7,); the gripper is the expert's.
        """
        action = self.action()
        largest = np.array([MAX_TRANSLATION] * 3 + [0.0, 0.0, MAX_ROTATION])
        # Small where the expert's own motion is small: near the grasp, errors of full size would undo it.
        scale = noise * max(float(np.abs(action[:3]).max() / MAX_TRANSLATION), 0.1)
        if rng.random() < nudge_probability:
            scale = 1.0
        action[:6] += (largest * rng.normal(0.0, scale, 6)).astype(np.float32)
        return np.clip(action, self.env.action_space.low, self.env.action_space.high)

    def action(self) -> np.ndarray:
        """float32 (7,), as [`TabletopEnv`] takes it."""
        task, upright = self.goal.task, self._upright_error()
        if upright.any() and not self._is_gripped():
            # Away from the objects, which a tilted hand would knock over, and from the ends of the arm's reach.
            move, yaw, opening = CLEAR - self.env.data.site("grasp").xpos, 0.0, 1.0
        else:
            move, yaw, opening = self._push() if task == "push" else self._grasp(task)
        translation = np.clip(move, -MAX_TRANSLATION, MAX_TRANSLATION)
        rotation = np.clip([*upright, yaw], -MAX_ROTATION, MAX_ROTATION)
        return np.concatenate([translation, rotation, [opening]]).astype(np.float32)

    def _grasp(self, task: str) -> tuple[np.ndarray, float, float]:
        """Translation, yaw and gripper for the tasks that hold the target."""
        env = self.env
        target, hand = env.data.body(self.goal.target).xpos, env.data.site("grasp").xpos
        offset = target - hand
        sideways, width = np.linalg.norm(offset[:2]), env.data.qpos[7]
        is_in_bowl = task == "put_in_bowl" and self._over_bowl(target) and target[2] < 2 * BOWL_HEIGHT
        if is_in_bowl and not self._is_gripped():
            return np.array([0.0, 0.0, MAX_TRANSLATION]), 0.0, 1.0  # released: out of the way
        around = sideways < 3 * GRASP_TOLERANCE and abs(offset[2]) < 3 * GRASP_TOLERANCE
        if around and width < 0.9 * OPEN_WIDTH:
            if self._is_gripped():
                return self._carry(task, hand)
            missed = width < MISSED_WIDTH or sideways > 1.5 * GRASP_TOLERANCE or offset[2] < -MAX_CLOSING_HEIGHT
            # Up as well: where it is no longer around the target, fingers that open are not taken for closing ones.
            return self._close(offset) if not missed else (np.array([0.0, 0.0, MAX_TRANSLATION]), 0.0, 1.0)
        yaw = self._yaw_error()
        if sideways < GRASP_TOLERANCE and abs(offset[2]) < GRASP_TOLERANCE and abs(yaw) < YAW_TOLERANCE:
            return self._close(offset)
        turn = CONE_SLOPE_YAW * max(abs(yaw) - YAW_TOLERANCE / 2, 0.0)
        return np.append(offset[:2], self._height(target[2] + turn, sideways) - hand[2]), yaw, 1.0

    @staticmethod
    def _close(offset: np.ndarray) -> tuple[np.ndarray, float, float]:
        """
        Slowly up as well: who cannot tell whether the fingers hold yet would wait for ever. And on towards the
        target's middle: fingers that close beside it squeeze a round one out.
        """
        return np.append(offset[:2], CLOSING_RISE), 0.0, 0.0

    def _height(self, end: float, sideways: float) -> float:
        """Of the cone's side, so far from its axis."""
        return min(HOVER, end + CONE_SLOPE * max(sideways - CONE_RADIUS, 0.0))

    def _carry(self, task: str, hand: np.ndarray) -> tuple[np.ndarray, float, float]:
        """With the target in the hand. Asks for the place of the hand alone, which a learner knows exactly."""
        if task == "pick":
            return np.array([0.0, 0.0, MAX_TRANSLATION]), 0.0, 0.0
        across = self.env.data.body("bowl").xpos[:2] - hand[:2]
        sideways = np.linalg.norm(across)
        if sideways < RELEASE_TOLERANCE and hand[2] < RELEASE_HEIGHT + 0.01:
            return np.zeros(3), 0.0, 1.0
        up = min(CARRY_HEIGHT, RELEASE_HEIGHT + max(sideways - RELEASE_TOLERANCE / 2, 0.0)) - hand[2]
        return self._up_and_across(up, across), 0.0, 0.0

    def _push(self) -> tuple[np.ndarray, float, float]:
        """The more the hand is low, behind the target and in line with it, the more it pushes; else it goes there."""
        env = self.env
        direction = np.array([0.0, SIDES[self.goal.side], 0.0])
        target, hand = env.data.body(self.goal.target).xpos, env.data.site("grasp").xpos
        reach = self._half_width() + 0.02
        behind, beside = (target - hand) @ direction, target[0] - hand[0]
        is_low, is_behind = _ramp(hand[2], 0.06, 0.04), _ramp(behind, 0.3 * reach, 0.6 * reach)
        ready = is_low * is_behind * _ramp(abs(beside), 0.04, 0.025)
        push = 0.03 * direction + [0.5 * beside, 0.0, PUSH_HEIGHT - hand[2]]
        across = (target - (reach + 0.025) * direction - hand)[:2]
        up = self._height(PUSH_HEIGHT, np.linalg.norm(across)) - hand[2]
        return ready * push + (1.0 - ready) * self._up_and_across(up, across), 0.0, 0.0

    @staticmethod
    def _up_and_across(up: float, across: np.ndarray) -> np.ndarray:
        """Translation (3,), up first: something is in the way."""
        return np.append(_ramp(up, LAG, LAG / 2) * across, up)

    def _is_gripped(self) -> bool:
        """Whether both fingers touch the target."""
        env = self.env
        target = env.model.geom(self.goal.target).id
        pads = [env.model.geom(name).id for name in ("left_pad", "right_pad")]
        pairs = [set(pair) for pair in env.data.contact.geom.tolist()]
        return all({pad, target} in pairs for pad in pads)

    def _over_bowl(self, target: np.ndarray) -> bool:
        return bool(np.linalg.norm(target[:2] - self.env.data.body("bowl").xpos[:2]) < 0.04)

    def _yaw_error(self) -> float:
        """
        Turn about the vertical, in radians, after which the fingers close across a brick's narrow side. Other shapes
        fit between the fingers, or turn into them, as they lie.
        """
        env = self.env
        if self.goal.target.split()[1] != "brick":
            return 0.0
        hand = env.data.site("grasp").xmat.reshape(3, 3)
        across = env.data.body(self.goal.target).xmat.reshape(3, 3)[:, 1]
        error = np.arctan2(across[1], across[0]) - np.arctan2(hand[1, 1], hand[0, 1])
        error = float((error + np.pi / 2) % np.pi - np.pi / 2)
        turned = np.arctan2(hand[1, 0], hand[0, 0])
        return error if abs(turned + error) < MAX_YAW else error - float(np.copysign(np.pi, turned))

    def _upright_error(self) -> np.ndarray:
        """Roll and pitch (2,), in radians, after which the hand points straight down; zero where it nearly does."""
        x, y, z = self.env.data.site("grasp").xmat.reshape(3, 3)[:, 2]
        sideways = np.hypot(x, y)
        tilt = np.arctan2(sideways, -z)
        if tilt < TILT_TOLERANCE:
            return np.zeros(2)
        return tilt * np.array([-y, x]) / sideways if sideways > 1e-6 else np.array([tilt, 0.0])

    def _half_width(self) -> float:
        """Extent of the target along y, in metres."""
        env = self.env
        shape = self.goal.target.split()[1]
        _, size = SHAPES[shape]
        if shape in ("cylinder", "ball"):
            return size[0]
        turned = np.abs(env.data.body(self.goal.target).xmat.reshape(3, 3)[1, :2])
        return float(turned @ size[:2])


def _ramp(value: float, zero: float, one: float) -> float:
    """From 0 at one place to 1 at another, and no farther."""
    return float(np.clip((value - zero) / (one - zero), 0.0, 1.0))
