"""
SimplerEnv's tasks, such as `simpler:widowx_carrot_on_plate`, by the conventions of its own evaluation of OpenVLA.

Needs SimplerEnv and its ManiSkill2_real2sim, from their repository (https://github.com/simpler-env/SimplerEnv), and a
GPU. The statistics to scale openvla-7b's actions with are those of the robot's dataset:

    python tools/evaluate_policy.py --policy openvla/openvla-7b --unnorm_key bridge_orig \
        --env simpler:widowx_carrot_on_plate --episodes 24 --num_envs 1 --device cuda

This adapter was written by SimplerEnv's interface and is tested with a stand-in for it; it has never run with the real
simulator.
"""

from typing import Any, Protocol

import gymnasium
import numpy as np

from .controls import StickyGripper, check_action, quaternion_from_euler, rotation_vector


PICTURE_SIDE = 224  # pixels, of what SimplerEnv shows OpenVLA


class Robot(Protocol):
    """
    Conventions of a robot in SimplerEnv.

    Its `unnorm_key` is the dataset whose statistics scale openvla-7b's actions, `camera` the picture that policies
    see, `control_rate` the actions per second.
    """

    unnorm_key: str
    camera: str
    control_rate: int

    def reset_options(self, seed: int | None) -> dict[str, Any]:
        """Options of SimplerEnv's `reset` for an episode; begins it."""

    def gripper(self, opening: float) -> float:
        """Gripper command for an opening from 0 (closed) to 1 (open)."""


class WidowX:
    """
    The arm of BridgeData V2. The gripper opens at +1 and closes at -1, switched at 0.5.

    Seeds are SimplerEnv's episode numbers: 24 distinct layouts per task, which then repeat.
    """

    unnorm_key = "bridge_orig"
    camera = "3rd_view_camera"
    control_rate = 5

    def reset_options(self, seed: int | None) -> dict[str, Any]:
        return {} if seed is None else {"obj_init_options": {"episode_id": seed}}

    def gripper(self, opening: float) -> float:
        return 1.0 if opening > 0.5 else -1.0


class GoogleRobot:
    """
    The robot of RT-1. The gripper takes changes, which are held for 15 actions: see [`StickyGripper`].

    Seeds are those of SimplerEnv's own draw of the layout.
    """

    unnorm_key = "fractal20220817_data"
    camera = "overhead_camera"
    control_rate = 3

    def __init__(self):
        self.sticky = StickyGripper()

    def reset_options(self, seed: int | None) -> dict[str, Any]:
        self.sticky.reset()
        return {}

    def gripper(self, opening: float) -> float:
        return self.sticky.command(opening)


ROBOTS: dict[str, type[Robot]] = {"widowx": WidowX, "google_robot": GoogleRobot}  # by how names of tasks begin


class SimplerEnv(gymnasium.Wrapper):
    """
    A task of SimplerEnv in OpenVLA's terms.

    Observation: `image` (uint8, (224, 224, 3)), the robot's camera, squashed as OpenCV's `INTER_AREA` does, and
    `instruction`, which can change in tasks of several parts.

    Action (float32, (7,)): displacement x, y, z in metres; roll, pitch, yaw in radians, which become a rotation
    vector; gripper from 0 (closed) to 1 (open).

    An episode lasts until the simulator's time limit and its last state decides, as in SimplerEnv's evaluation: what
    has been put down and knocked over again is no success. OpenVLA never says that it has finished.

    Args:
        env (`gymnasium.Env`): As `simpler_env.make` gives it.
        task (`str`): Its name there.
        cameras (`tuple[str]`, defaults to `("image",)`): Pictures that are looked at; `image` stays black without its
            name.
        max_steps (`int`, *optional*): Actions before the last state is judged, where fewer than the simulator's limit
            are wanted.
        action_scale (`float`, defaults to 1.0): Times displacement and rotation vector.

    Raises:
        ValueError: If the name does not tell the robot, or a camera is unknown.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        task: str,
        cameras: tuple[str, ...] = ("image",),
        max_steps: int | None = None,
        action_scale: float = 1.0,
    ):
        super().__init__(env)
        if unknown := set(cameras) - {"image"}:
            raise ValueError(f"Cameras {sorted(unknown)} are unknown; known: ['image'].")
        self.cameras, self.max_steps = tuple(cameras), max_steps
        self.robot, self.action_scale = robot_of(task), action_scale
        self.tasks = (task,)
        self.metadata = {**env.metadata, "render_fps": self.robot.control_rate}
        high = np.array([0.05] * 3 + [0.25] * 3 + [1.0], dtype=np.float32)  # about what the datasets reach
        self.action_space = gymnasium.spaces.Box(np.append(-high[:6], 0).astype(np.float32), high)
        picture = gymnasium.spaces.Box(0, 255, (PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
        instruction = gymnasium.spaces.Text(200)
        self.observation_space = gymnasium.spaces.Dict({"image": picture, "instruction": instruction})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """
        Lay out a new scene.

        Args:
            seed (`int`, *optional*): Of the scene.
            options (`dict`, *optional*): `task`: the only one there is.
        """
        task = (options or {}).get("task", self.tasks[0])
        if task not in self.tasks:
            raise ValueError(f"`task={task!r}` is unknown; known: {list(self.tasks)}.")
        observation, info = self.env.reset(seed=seed, options=self.robot.reset_options(seed))
        self.steps = 0
        return self._observe(observation), {**info, "outcome": None}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, reward, is_success, is_over, info = self.env.step(self.command(action))
        self.steps += 1
        is_over = bool(is_over) or self.steps == self.max_steps
        outcome = ("success" if is_success else "timeout") if is_over else None
        return self._observe(observation), float(reward), False, is_over, {**info, "outcome": outcome}

    def command(self, action: np.ndarray) -> np.ndarray:
        """float64 (7,): displacement, rotation vector and gripper, for the simulator. Advances a sticky gripper."""
        action = check_action(action)
        turn = rotation_vector(quaternion_from_euler(*action[3:6]))
        pose = np.concatenate([action[:3], turn]) * self.action_scale
        return np.append(pose, self.robot.gripper(action[6]))

    def render(self) -> np.ndarray:
        """uint8 (H, W, 3) of the robot's camera, whole."""
        return self.picture

    def _observe(self, observation: dict[str, Any]) -> dict[str, Any]:
        self.picture = np.asarray(observation["image"][self.robot.camera]["rgb"])
        instruction = self.env.unwrapped.get_language_instruction()
        if "image" in self.cameras:
            return {"image": shrink(self.picture, PICTURE_SIDE), "instruction": instruction}
        return {"image": np.zeros((PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8), "instruction": instruction}


def make(name: str, **arguments: Any) -> gymnasium.Env:
    """
    The environment `simpler:{name}`; arguments as [`SimplerEnv`] takes them.

    Raises:
        ValueError: If SimplerEnv has no such task.
    """
    import simpler_env

    if name not in simpler_env.ENVIRONMENTS:
        raise ValueError(f"SimplerEnv has no task {name!r}; known: {list(simpler_env.ENVIRONMENTS)}.")
    return SimplerEnv(simpler_env.make(name), name, **arguments)


def robot_of(task: str) -> Robot:
    """
    The robot that a task's name begins with.

    Raises:
        ValueError: If it begins with none.
    """
    for prefix, robot in ROBOTS.items():
        if task.startswith(prefix):
            return robot()
    raise ValueError(f"SimplerEnv's task {task!r} begins with none of the robots {list(ROBOTS)}.")


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """
    uint8 (side, side, 3) of uint8 (H, W, 3): each pixel the mean of the area that it covers, as OpenCV's `INTER_AREA`.

    Raises:
        ValueError: If the picture is smaller.
    """
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise ValueError(f"A picture of {width}x{height} pixels cannot be shrunk to {side}x{side}.")
    rows, columns = _coverage(height, side), _coverage(width, side)
    shrunk = np.einsum("ih,hwc,jw->ijc", rows, image.astype(np.float32), columns, optimize=True)
    return np.rint(shrunk).astype(np.uint8)


def _coverage(size: int, side: int) -> np.ndarray:
    """float32 (side, size): the share of each pixel in the mean that makes a smaller one."""
    edges = np.arange(side + 1) * (size / side)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)  # (side, size)
    return (np.clip(overlap, 0, 1) * (side / size)).astype(np.float32)
