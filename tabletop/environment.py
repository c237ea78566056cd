"""The tabletop as a Gymnasium environment."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np

from .camera import check_backend, make_camera
from .control import HOME, OPEN_WIDTH, HandController, vector_from_rotation
from .scene import build_model, lay_out, object_names, randomize_appearance
from .tasks import SIDES, TASKS, WORDINGS, Goal


CONTROL_RATE = 10  # actions per second
SUBSTEPS = 25  # of 4 ms
MAX_TRANSLATION = 0.04  # metres per action and axis
MAX_ROTATION = 0.25  # radians per action and axis
MAX_STEPS = 120
NUM_OBJECTS = 4
CAMERAS = {"image": "front", "wrist_image": "wrist"}  # the observation's names and the scene's


class TabletopEnv(gymnasium.Env):
    """
    A Panda-like arm, a bowl and four objects; one of them is spoken of.

    Observation:
        image, wrist_image (uint8, (S, S, 3)): The front and the wrist camera.
        state (float32, (8,)): Grasp point x, y, z in metres and its orientation as a rotation vector in radians, both
            in the robot's base frame, relative to a hand that points straight down; the two finger joints in metres.
        instruction (str): What to do.

    Action (float32, (7,)): displacement of the grasp point x, y, z in metres, at most 0.04 per axis; roll, pitch, yaw
        in radians, at most 0.25, about the axes of the base frame; gripper from 0 (closed) to 1 (open), above 0.5
        opens. Base frame: x forward, y to the robot's left, z up. One action lasts 0.1 s. A hand that the joints do
        not let turn on moves without turning, and one that they do not let move either stays.

    Reward: 1 in the step that succeeds, else 0. `info["outcome"]` is None, `success`, `wrong_object`, `dropped` or
    `timeout`.

    Args:
        tasks (`tuple[str]`): Tasks to draw from.
        image_size (`int`, defaults to 224): Side of the pictures in pixels.
        backend (`str`, defaults to `"raycast"`): Renderer; see [`make_camera`].
        cameras (`tuple[str]`, defaults to `("image", "wrist_image")`): Pictures to render; the others stay black.
            Without any, steps cost a tenth.
        max_steps (`int`, defaults to 120): Actions before `timeout`.
        objects (`Sequence[str]`, *optional*): Colours, shapes or names (`red cube`) of what may be the target. All by
            default.
        hold_out (`Sequence[str]`): Colours, shapes or names of what may not.
        randomize (`bool`, defaults to `False`): Vary cameras, light and colours from episode to episode.
        render_mode (`str`, defaults to `"rgb_array"`): The only one there is.

    Raises:
        ValueError: If a value is out of range or unknown.
        RuntimeError: If the renderer's library was not asked for when Python started.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE}

    def __init__(
        self,
        tasks: tuple[str, ...] = TASKS,
        image_size: int = 224,
        backend: str = "raycast",
        cameras: tuple[str, ...] = tuple(CAMERAS),
        max_steps: int = MAX_STEPS,
        objects: Sequence[str] | None = None,
        hold_out: Sequence[str] = (),
        randomize: bool = False,
        render_mode: str | None = "rgb_array",
    ):
        self.tasks = _checked("tasks", tasks, TASKS)
        self.cameras = _checked("cameras", cameras, tuple(CAMERAS), least=0)
        self.object_names = object_names(objects, hold_out)
        for name, value in (("image_size", image_size), ("max_steps", max_steps)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"`render_mode` must be one of {self.metadata['render_modes']}, got {render_mode!r}.")
        check_backend(backend)
        self.image_size, self.max_steps, self.backend = image_size, max_steps, backend
        self.randomize, self.render_mode = randomize, render_mode
        picture = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image": picture,
                "wrist_image": picture,
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32),
                "instruction": gymnasium.spaces.Text(200, charset=_CHARACTERS),
            }
        )
        high = np.array([MAX_TRANSLATION] * 3 + [MAX_ROTATION] * 3 + [1.0], dtype=np.float32)
        self.action_space = gymnasium.spaces.Box(np.append(-high[:6], 0.0).astype(np.float32), high)
        self.model: mujoco.MjModel | None = None
        self.camera = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """
        Lay out a new scene.

        Args:
            seed (`int`, *optional*): Of the scene and the task.
            options (`dict`, *optional*): `task`, `target` (such as `red cube`), `side` (`left` or `right`), and
                `wording` (an index) fix what is otherwise drawn.

        Raises:
            ValueError: If an option or its value is unknown.
        """
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - set(_OPTIONS):
            raise ValueError(f"Options {sorted(unknown)} are unknown; known: {list(_OPTIONS)}.")
        task = options.get("task") or str(self.np_random.choice(self.tasks))
        if task not in TASKS:
            raise ValueError(f"`task={task!r}` is unknown; known: {list(TASKS)}.")
        target = options.get("target") or self._draw_target(task)
        names = object_names()
        if target not in names:
            raise ValueError(f"`target={target!r}` is unknown; known: {names}.")
        side = options.get("side") or str(self.np_random.choice(list(SIDES)))
        if side not in SIDES:
            raise ValueError(f"`side={side!r}` is unknown; known: {list(SIDES)}.")
        wording = options.get("wording", int(self.np_random.integers(len(WORDINGS[task]))))
        if wording not in range(len(WORDINGS[task])):
            raise ValueError(f"`wording` of {task!r} must be from 0 to {len(WORDINGS[task]) - 1}, got {wording}.")
        others = [name for name in names if name != target]
        distractors = self.np_random.choice(others, size=NUM_OBJECTS - 1, replace=False).tolist()
        self.objects, bowl = lay_out([target, *distractors], self.np_random, SIDES[side] if task == "push" else 0.0)
        self._build(bowl)
        start = self.data.body(target).xpos
        self.goal = Goal(task, target, tuple(start), side if task == "push" else None)
        self.instruction = self.goal.instruction(wording)
        self.steps = 0
        return self._observe(), {"task": task, "target": target, "outcome": None}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """
        Act for 0.1 s.

        Args:
            action (`np.ndarray`): (7,), as the class describes it; what is beyond its limits is cut.

        Raises:
            ValueError: If it has another shape or is not finite.
            RuntimeError: If no episode has been set up.
        """
        action = self._check_action(action)
        self._check_scene()
        opening = 1.0 if action[6] > 0.5 else 0.0
        self.controller.move(self.data, action[:3], action[3:6], opening)
        mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)
        self.steps += 1
        outcome = self.goal.outcome(self.data, [item.name for item in self.objects], self.is_held(self.goal.target))
        truncated = outcome is None and self.steps >= self.max_steps
        info = {"task": self.goal.task, "target": self.goal.target, "outcome": "timeout" if truncated else outcome}
        return self._observe(), float(outcome == "success"), outcome is not None, truncated, info

    def render(self) -> np.ndarray:
        """uint8 (S, S, 3) of the front camera."""
        self._check_scene()
        return self.camera.render(self.data, "front")

    def close(self) -> None:
        if self.camera is not None:
            self.camera.close()
            self.camera = None

    def is_held(self, name: str) -> bool:
        """Whether a finger touches the object."""
        pads = {self.model.geom("left_pad").id, self.model.geom("right_pad").id}
        target = self.model.geom(name).id
        return any(target in pair and pads & set(pair) for pair in self.data.contact.geom.tolist())

    def _draw_target(self, task: str) -> str:
        # One for each task, so that a seed does not name the same object in all of them.
        drawn = self.np_random.choice(self.object_names, size=len(TASKS))
        return str(drawn[TASKS.index(task)])

    def _check_scene(self) -> None:
        if self.camera is None:
            raise RuntimeError("There is no scene: call `reset` first, and again after `close`.")

    def _check_action(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, dtype=np.float64)
        if action.shape != (7,):
            raise ValueError(f"An action has shape (7,), got {action.shape}.")
        if not np.isfinite(action).all():
            raise ValueError(f"An action must be finite, got {action.tolist()}.")
        return np.clip(action, self.action_space.low, self.action_space.high)

    def _build(self, bowl: tuple[float, float]) -> None:
        self.close()
        self.model = build_model(self.objects, bowl)
        if self.randomize:
            randomize_appearance(self.model, self.np_random)
        self.data = mujoco.MjData(self.model)
        self.data.qpos[:7] = HOME
        self.data.qpos[7:9] = OPEN_WIDTH
        self.data.ctrl[:] = [*HOME, OPEN_WIDTH]
        mujoco.mj_step(self.model, self.data, nstep=SUBSTEPS)  # the objects settle
        self.controller = HandController(self.model)
        self.controller.reset(self.data)
        self.camera = make_camera(self.model, self.image_size, self.backend)

    def _observe(self) -> dict[str, Any]:
        shape = (self.image_size, self.image_size, 3)
        return {
            **{
                key: self.camera.render(self.data, name) if key in self.cameras else np.zeros(shape, np.uint8)
                for key, name in CAMERAS.items()
            },
            "state": self._state(),
            "instruction": self.instruction,
        }

    def _state(self) -> np.ndarray:
        site = self.data.site("grasp")
        down = np.diag([1.0, -1.0, -1.0])
        turned = vector_from_rotation(site.xmat.reshape(3, 3) @ down)
        return np.concatenate([site.xpos, turned, self.data.qpos[7:9]]).astype(np.float32)


def _checked(name: str, values: tuple[str, ...], known: tuple[str, ...], least: int = 1) -> tuple[str, ...]:
    """The values; `ValueError` if there are too few, one is unknown, or they are one text."""
    if isinstance(values, str) or len(values) < least:
        raise ValueError(f"`{name}` must be a sequence with at least {least} of {list(known)}, got {values!r}.")
    if unknown := set(values) - set(known):
        raise ValueError(f"{name.capitalize()} {sorted(unknown)} are unknown; known: {list(known)}.")
    return tuple(values)


_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz ")
_OPTIONS = ("task", "target", "side", "wording")
