"""The tabletop as a Gymnasium environment."""

from typing import Any

import gymnasium
import mujoco
import numpy as np

from .camera import make_camera
from .control import HOME, OPEN_WIDTH, HandController, vector_from_rotation
from .scene import COLORS, SHAPES, build_model, lay_out, randomize_appearance
from .tasks import SIDES, TASKS, WORDINGS, Goal


CONTROL_RATE = 10  # actions per second
SUBSTEPS = 25  # of 4 ms
MAX_TRANSLATION = 0.04  # metres per action and axis
MAX_ROTATION = 0.25  # radians per action and axis
MAX_STEPS = 120
NUM_OBJECTS = 4


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
        opens. Base frame: x forward, y to the robot's left, z up. One action lasts 0.1 s.

    Reward: 1 in the step that succeeds, else 0. `info["outcome"]` is None, `success`, `wrong_object`, `dropped` or
    `timeout`.

    Args:
        tasks (`tuple[str]`): Tasks to draw from.
        image_size (`int`, defaults to 224): Side of the pictures in pixels.
        backend (`str`, defaults to `"raycast"`): Renderer; see [`make_camera`].
        render_observations (`bool`, defaults to `True`): Without, both pictures are black, and steps cost a tenth.
        max_steps (`int`, defaults to 120): Actions before `timeout`.
        objects (`list[str]`, *optional*): Names to draw the target from, such as `red cube`. Default: all.
        randomize (`bool`, defaults to `False`): Vary cameras, light and colours from episode to episode.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE}
    render_mode = "rgb_array"

    def __init__(
        self,
        tasks: tuple[str, ...] = TASKS,
        image_size: int = 224,
        backend: str = "raycast",
        render_observations: bool = True,
        max_steps: int = MAX_STEPS,
        objects: list[str] | None = None,
        randomize: bool = False,
    ):
        if unknown := set(tasks) - set(TASKS):
            raise ValueError(f"Tasks {sorted(unknown)} are unknown; known: {list(TASKS)}.")
        self.tasks = tuple(tasks)
        self.image_size, self.backend = image_size, backend
        self.render_observations = render_observations
        self.max_steps = max_steps
        known = self._all_names()
        if unknown := set(objects or []) - set(known):
            raise ValueError(f"Objects {sorted(unknown)} are unknown; known: {known}.")
        self.object_names = objects or known
        self.randomize = randomize
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
            options (`dict`, *optional*): `task`, `target` (such as `red cube`), `side`, and `wording` (an index) fix
                what is otherwise drawn.
        """
        super().reset(seed=seed)
        options = options or {}
        task = options.get("task") or str(self.np_random.choice(self.tasks))
        if task not in TASKS:
            raise ValueError(f"`task={task!r}` is unknown; known: {list(TASKS)}.")
        target = options.get("target") or str(self.np_random.choice(self.object_names))
        if target not in self._all_names():
            raise ValueError(f"`target={target!r}` is unknown; known: {self._all_names()}.")
        side = options.get("side") or str(self.np_random.choice(list(SIDES)))
        wording = options.get("wording", int(self.np_random.integers(len(WORDINGS[task]))))
        others = [name for name in self._all_names() if name != target]
        distractors = self.np_random.choice(others, size=NUM_OBJECTS - 1, replace=False).tolist()
        self.objects, bowl = lay_out([target, *distractors], self.np_random, SIDES[side] if task == "push" else 0.0)
        self._build(bowl)
        start = self.data.body(target).xpos
        self.goal = Goal(task, target, tuple(start), side if task == "push" else None)
        self.instruction = self.goal.instruction(wording)
        self.steps = 0
        return self._observe(), {"task": task, "target": target, "outcome": None}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        action = self._check_action(action)
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

    @staticmethod
    def _all_names() -> list[str]:
        return [f"{color} {shape}" for color in COLORS for shape in SHAPES]

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
        pictures = {"image": "front", "wrist_image": "wrist"}
        shape = (self.image_size, self.image_size, 3)
        return {
            **{
                key: self.camera.render(self.data, name) if self.render_observations else np.zeros(shape, np.uint8)
                for key, name in pictures.items()
            },
            "state": self._state(),
            "instruction": self.instruction,
        }

    def _state(self) -> np.ndarray:
        site = self.data.site("grasp")
        down = np.diag([1.0, -1.0, -1.0])
        turned = vector_from_rotation(site.xmat.reshape(3, 3) @ down)
        return np.concatenate([site.xpos, turned, self.data.qpos[7:9]]).astype(np.float32)


_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz ")
