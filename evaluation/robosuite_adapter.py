"""
robosuite's tabletop tasks, `robosuite:Lift` and `robosuite:Stack`, for policies in OpenVLA's terms.

Needs the packages of requirements-robosuite.txt, in an environment of its own, and a graphics library that needs no
display; Python is started with `MUJOCO_GL=osmesa` (Debian: libosmesa6) or `MUJOCO_GL=egl` (libegl1 libegl-mesa0).

    MUJOCO_GL=osmesa python tools/evaluate_policy.py --policy . --env robosuite:Lift --episodes 20
"""

from typing import Any

import gymnasium
import mujoco
import numpy as np
import robosuite

from .controls import check_action, closing_sign, robot_state


CONTROL_RATE = 20  # actions per second
MAX_TRANSLATION = 0.05  # metres per action and axis, what the controller's 1 stands for
MAX_ROTATION = 0.5  # radians per action and axis
MAX_STEPS = 400  # the horizon of robomimic's rollouts of such tasks (https://arxiv.org/abs/2108.03298)
# robosuite has no instructions; these are ours.
INSTRUCTIONS = {"Lift": "pick up the red cube", "Stack": "stack the red cube on the green cube"}
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}  # the observation's names and robosuite's
ACTION_UNITS = ("metric", "controller")


class RobosuiteEnv(gymnasium.Env):
    """
    A Panda arm at a table, driven by the operational space controller `OSC_POSE`.

    Observation:
        image, wrist_image (uint8, (S, S, 3)): robosuite's `agentview` and `robot0_eye_in_hand`, upright.
        state (float32, (8,)): Grasp point x, y, z in metres and its orientation as a rotation vector, in the world's
            frame; the two finger joints in metres.
        instruction (str): What to do.

    Action (float32, (7,)): displacement of the grasp point x, y, z and a rotation vector, both about the axes of the
    robot's base frame; gripper from 0 (closed) to 1 (open), above 0.5 opens. One action lasts 0.05 s. The controller
    aims so far from where the hand is, and covers about a fifth of the way in that time.

    Pictures are rendered without antialiasing and with a small shadow map, which halves their cost on a processor.

    Args:
        name (`str`): `Lift` or `Stack`.
        image_size (`int`, defaults to 256): Side of the pictures in pixels.
        cameras (`tuple[str]`, defaults to `("image", "wrist_image")`): Pictures to render; the others stay black.
        max_steps (`int`, defaults to 400): Actions before `timeout`.
        action_units (`str`, defaults to `"metric"`): `metric`: metres and radians, cut off at 0.05 and 0.5 per axis,
            as OpenVLA's terms are in general. `controller`: the controller's own input from -1 to 1, for policies
            that were trained on datasets which hold it, as robomimic's and LIBERO's do.

    Raises:
        ValueError: If a name is unknown.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE}
    render_mode = "rgb_array"

    def __init__(
        self,
        name: str,
        image_size: int = 256,
        cameras: tuple[str, ...] = tuple(CAMERAS),
        max_steps: int = MAX_STEPS,
        action_units: str = "metric",
    ):
        if name not in INSTRUCTIONS:
            raise ValueError(f"robosuite's {name!r} is not among the tasks with an instruction: {list(INSTRUCTIONS)}.")
        if unknown := set(cameras) - set(CAMERAS):
            raise ValueError(f"Cameras {sorted(unknown)} are unknown; known: {list(CAMERAS)}.")
        if action_units not in ACTION_UNITS:
            raise ValueError(f"`action_units` must be one of {list(ACTION_UNITS)}, got {action_units!r}.")
        self.tasks = (name,)
        self.image_size, self.cameras, self.max_steps = image_size, tuple(cameras), max_steps
        reach = np.array([MAX_TRANSLATION] * 3 + [MAX_ROTATION] * 3)
        self.unit = reach if action_units == "metric" else np.ones(6)  # (6,), what the controller's 1 stands for
        self.action_space = gymnasium.spaces.Box(
            np.append(-self.unit, 0).astype(np.float32), np.append(self.unit, 1).astype(np.float32)
        )
        picture = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image": picture,
                "wrist_image": picture,
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32),
                "instruction": gymnasium.spaces.Text(200),
            }
        )
        # Pictures are rendered here, and only where they are looked at: robosuite does not make its OpenGL context
        # current, so that of two environments in a thread one would be drawn with the other's textures and meshes.
        self.env = robosuite.make(
            name,
            robots="Panda",
            controller_configs=robosuite.load_composite_controller_config(robot="Panda"),
            control_freq=CONTROL_RATE,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            ignore_done=True,
        )
        self.renderer: mujoco.Renderer | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """
        Lay out a new scene.

        Args:
            seed (`int`, *optional*): Of the scene.
            options (`dict`, *optional*): `task`: the only one there is.
        """
        super().reset(seed=seed)
        task = (options or {}).get("task", self.tasks[0])
        if task not in self.tasks:
            raise ValueError(f"`task={task!r}` is unknown; known: {list(self.tasks)}.")
        self._close_renderer()
        # The sampler of places is made anew with the generator; otherwise it would keep the one it first had.
        self.env.placement_initializer, self.env.rng = None, self.np_random
        state = self.env.reset()
        self.steps = 0
        return self._observe(state), {"outcome": None}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        state, _, _, _ = self.env.step(self.command(action))
        self.steps += 1
        is_success = bool(self.env._check_success())
        is_timeout = not is_success and self.steps >= self.max_steps
        outcome = "success" if is_success else "timeout" if is_timeout else None
        return self._observe(state), float(is_success), is_success, is_timeout, {"outcome": outcome}

    def command(self, action: np.ndarray) -> np.ndarray:
        """float64 (7,), each within [-1, 1], for the controller."""
        action = check_action(action)
        return np.append(np.clip(action[:6] / self.unit, -1, 1), closing_sign(action[6]))

    def render(self) -> np.ndarray:
        """uint8 (S, S, 3) of the camera `agentview`."""
        return self._render("image")

    def close(self) -> None:
        self._close_renderer()
        self.env.close()

    def _observe(self, state: dict[str, np.ndarray]) -> dict[str, Any]:
        black = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        return {
            **{name: self._render(name) if name in self.cameras else black for name in CAMERAS},
            "state": robot_state(state),
            "instruction": INSTRUCTIONS[self.tasks[0]],
        }

    def _render(self, name: str) -> np.ndarray:
        if self.renderer is None:
            self.renderer = make_renderer(self.env.sim.model._model, self.image_size)
        self.renderer.update_scene(self.env.sim.data._data, CAMERAS[name], _visible_geometry())
        return self.renderer.render().copy()

    def _close_renderer(self) -> None:
        """Before each reset: robosuite then builds another model."""
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None


def make(name: str, **arguments: Any) -> gymnasium.Env:
    """The environment `robosuite:{name}`; arguments as [`RobosuiteEnv`] takes them."""
    return RobosuiteEnv(name, **arguments)


def make_renderer(model: mujoco.MjModel, size: int) -> mujoco.Renderer:
    """
    Raises:
        ValueError: If there is no graphics library.
    """
    # Read when the renderer is made, and never again.
    model.vis.quality.offsamples, model.vis.quality.shadowsize = 0, 1024
    try:
        return mujoco.Renderer(model, size, size)
    except Exception as error:
        raise ValueError(
            f"MuJoCo cannot render ({error}). Start Python with MUJOCO_GL=osmesa (on Debian: apt-get install "
            "libosmesa6) or MUJOCO_GL=egl (libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri): the graphics library is "
            "chosen when MuJoCo is imported."
        ) from error


def _visible_geometry() -> mujoco.MjvOption:
    """robosuite keeps collision shapes in group 0 and what is seen in group 1."""
    option = mujoco.MjvOption()
    option.geomgroup[0] = 0
    return option
