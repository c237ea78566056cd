"""
LIBERO's suites, such as `libero:libero_spatial`, by the protocol of OpenVLA's published evaluation.

The protocol, all of it here:

- Each task of a suite in 50 trials. Trial i starts from the i-th of the initial states that LIBERO ships, so seed 0 is
  the first (`--episodes 50`); `env.seed(0)`.
- Ten actions of waiting with an open gripper before the policy's first one, since objects fall at the start.
- At most 220 (spatial), 280 (object), 300 (goal), 520 (10) or 400 (90) actions of the policy.
- Pictures of 256 x 256, turned by 180 degrees, through a JPEG file of quality 95, as the training pictures were. The
  processor then resizes them with TensorFlow's `lanczos3` and keeps the middle 90% of the area; see
  [`configure_processor`].
- The six dimensions of the pose go to the controller as they are: LIBERO's data hold its input, from -1 to 1. The
  gripper is stretched from [0, 1] to [-1, 1], made -1, 0 or +1, and turned round: LIBERO opens at -1.

One thing differs: an exception in the simulator ends the evaluation instead of counting as a failure.

Needs the packages of requirements-libero.txt, in an environment of its own, LIBERO's assets, which hf-libero downloads
from the Hub (dataset `lerobot/libero-assets`), and MUJOCO_GL=osmesa or MUJOCO_GL=egl:

    MUJOCO_GL=egl python tools/evaluate_policy.py --policy openvla/openvla-7b-finetuned-libero-spatial \
        --env libero:libero_spatial --episodes 50 --num_envs 1 --device cuda

This adapter was written by LIBERO's interface and is tested with a stand-in for it. With hf-libero 0.1.4 everything up
to the loading of the assets was run; no episode in the simulator was.
"""

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np

from robot_data.pictures import jpeg_round_trip

from .controls import check_action, closing_sign, robot_state


if TYPE_CHECKING:
    from .policies import ModelPolicy


CONTROL_RATE = 20  # actions per second
PICTURE_SIDE = 256  # pixels
SETTLING_STEPS = 10
SETTLING_ACTION = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
SIMULATOR_SEED = 0
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}  # the observation's names and LIBERO's
RESAMPLE, CENTER_CROP_AREA = "tf_lanczos3", 0.9


class LiberoEnv(gymnasium.Env):
    """
    One of LIBERO's suites.

    Observation:
        image, wrist_image (uint8, (256, 256, 3)): LIBERO's `agentview` and `robot0_eye_in_hand`, turned by 180 degrees
            and through a JPEG file.
        state (float32, (8,)): Hand position x, y, z in metres and its orientation as a rotation vector, in the world's
            frame; the two finger joints in metres. As in the LIBERO datasets.
        instruction (str): LIBERO's.

    Action (float32, (7,)): the controller's input, six numbers from -1 to 1 (displacement: 0.05 m; rotation vector:
    0.5 rad), and gripper from 0 (closed) to 1 (open), above 0.5 opens. One action lasts 0.05 s.

    Args:
        suite (`str`): `libero_spatial`, `libero_object`, `libero_goal`, `libero_10` or `libero_90`.
        cameras (`tuple[str]`, defaults to `("image", "wrist_image")`): Pictures to render; the wrist's stays black
            without its name.
        max_steps (`int`, *optional*): Actions before `timeout`; by default the protocol's.
        published_pictures (`bool`, defaults to `True`): Let [`LiberoEnv.configure_policy`] change processors.
        library (`SimpleNamespace`, *optional*): What [`load_library`] gives, by default.

    Raises:
        ValueError: If a name is unknown, or LIBERO cannot be imported.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_RATE}
    render_mode = "rgb_array"

    def __init__(
        self,
        suite: str,
        cameras: tuple[str, ...] = tuple(CAMERAS),
        max_steps: int | None = None,
        published_pictures: bool = True,
        library: SimpleNamespace | None = None,
    ):
        if suite not in MAX_STEPS:
            raise ValueError(f"LIBERO's suite {suite!r} is unknown; known: {list(MAX_STEPS)}.")
        if unknown := set(cameras) - set(CAMERAS):
            raise ValueError(f"Cameras {sorted(unknown)} are unknown; known: {list(CAMERAS)}.")
        self.library = library or load_library()
        self.suite = self.library.benchmark.get_benchmark_dict()[suite]()
        self.tasks = tuple(self.suite.get_task(index).name for index in range(self.suite.n_tasks))
        self.cameras, self.published_pictures = tuple(cameras), published_pictures
        self.max_steps = MAX_STEPS[suite] if max_steps is None else max_steps
        picture = gymnasium.spaces.Box(0, 255, (PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                "image": picture,
                "wrist_image": picture,
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32),
                "instruction": gymnasium.spaces.Text(200),
            }
        )
        low, high = np.append(-np.ones(6), 0).astype(np.float32), np.ones(7, np.float32)
        self.action_space = gymnasium.spaces.Box(low, high)
        self.env, self.task_index = None, None

    def configure_policy(self, policy: "ModelPolicy") -> None:
        """
        Before a model is rolled out: bring its pictures to the protocol, by [`configure_processor`].

        A processor that says by itself how pictures are made, other than as published ones do, stays as it is.
        """
        settings = policy.processor.image_processor
        is_published = (settings.resample, settings.center_crop_area) == ("pil_bicubic", None)
        if self.published_pictures and is_published:
            configure_processor(policy.processor)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """
        Set up a trial, and let its objects fall.

        Args:
            seed (`int`, *optional*): Which of the task's initial states; drawn by default.
            options (`dict`, *optional*): `task`, by default the first.

        Raises:
            ValueError: If the task is unknown, or has no such initial state.
        """
        super().reset(seed=seed)
        task = (options or {}).get("task", self.tasks[0])
        if task not in self.tasks:
            raise ValueError(f"`task={task!r}` is unknown; known: {list(self.tasks)}.")
        self._open(self.tasks.index(task))
        trial = int(self.np_random.integers(len(self.initial_states))) if seed is None else seed
        if trial >= len(self.initial_states):
            raise ValueError(
                f"{task!r} has {len(self.initial_states)} initial states, so seeds go up to "
                f"{len(self.initial_states) - 1}; got {trial}. More trials would repeat the same ones."
            )
        self._make_current()
        self.env.reset()
        self.env.set_init_state(self.initial_states[trial])
        for _ in range(SETTLING_STEPS):
            self.raw, _, _, _ = self.env.step(SETTLING_ACTION)
        self.steps = 0
        return self._observe(), {"outcome": None}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        self._make_current()
        self.raw, _, is_success, _ = self.env.step(command(action))
        self.steps += 1
        is_success = bool(is_success)
        is_timeout = not is_success and self.steps >= self.max_steps
        outcome = "success" if is_success else "timeout" if is_timeout else None
        return self._observe(), float(is_success), is_success, is_timeout, {"outcome": outcome}

    def render(self) -> np.ndarray:
        """uint8 (256, 256, 3) of the camera `agentview`, as the policy sees it."""
        return self._picture("image")

    def close(self) -> None:
        if self.env is not None:
            self._make_current()
            self.env.close()
            self.env, self.task_index = None, None

    def _make_current(self) -> None:
        """
        Of several environments in a thread, robosuite would draw all in the OpenGL context of the one made last: most
        pixels are then wrong, without an error.
        """
        self.env.sim._render_context_offscreen.gl_ctx.make_current()

    def _open(self, index: int) -> None:
        """LIBERO's environments each have one task."""
        if index == self.task_index:
            return
        self.close()
        task = self.suite.get_task(index)
        folder = self.library.get_libero_path("bddl_files")
        try:
            self.env = self.library.OffScreenRenderEnv(
                bddl_file_name=os.path.join(folder, task.problem_folder, task.bddl_file),
                camera_names=[name for key, name in CAMERAS.items() if key == "image" or key in self.cameras],
                camera_heights=PICTURE_SIDE,
                camera_widths=PICTURE_SIDE,
            )
        except FileNotFoundError as error:
            raise ValueError(
                f"LIBERO's assets are missing: {error}. hf-libero downloads them from the Hub (dataset "
                "lerobot/libero-assets) by a call that huggingface_hub 0.36 knows and 2.4 does not; or put their "
                "folder at `assets` beside its modules."
            ) from error
        self.env.seed(SIMULATOR_SEED)
        self.initial_states = self.suite.get_task_init_states(index)
        self.task_index, self.instruction = index, task.language

    def _observe(self) -> dict[str, Any]:
        black = np.zeros((PICTURE_SIDE, PICTURE_SIDE, 3), np.uint8)
        return {
            **{key: self._picture(key) if key in self.cameras else black for key in CAMERAS},
            "state": robot_state(self.raw),
            "instruction": self.instruction,
        }

    def _picture(self, key: str) -> np.ndarray:
        return picture_of(self.raw[f"{CAMERAS[key]}_image"])


def make(name: str, **arguments: Any) -> gymnasium.Env:
    """The environment `libero:{name}`; arguments as [`LiberoEnv`] takes them."""
    return LiberoEnv(name, **arguments)


def load_library() -> SimpleNamespace:
    """
    What is used of LIBERO: `benchmark`, `get_libero_path` and `OffScreenRenderEnv`.

    Raises:
        ValueError: If it is not installed, or has not been set up.
    """
    try:
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv
    except ImportError as error:
        raise ValueError(f"LIBERO cannot be imported ({error}): pip install -r requirements-libero.txt.") from error
    except EOFError as error:
        raise ValueError(
            "LIBERO asks a question when it is imported for the first time. Answer it once, with N: "
            'echo N | python -c "import libero.libero"'
        ) from error
    return SimpleNamespace(benchmark=benchmark, get_libero_path=get_libero_path, OffScreenRenderEnv=OffScreenRenderEnv)


def configure_processor(processor: Any) -> Any:
    """
    Let a published LIBERO checkpoint's processor make its pixels as the protocol does.

    The published files do not say it: resized with TensorFlow's `lanczos3`, and the middle 90% of the area, enlarged,
    since the checkpoints were trained with random crops of that area.

    Args:
        processor: An OpenVLA processor; it is changed. Save it beside the checkpoint to have it remembered.

    Returns:
        The processor.
    """
    processor.image_processor.resample = RESAMPLE
    processor.image_processor.center_crop_area = CENTER_CROP_AREA
    return processor


def picture_of(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) as the policy was trained on it, of what LIBERO renders."""
    return jpeg_round_trip(np.ascontiguousarray(image[::-1, ::-1]))


def command(action: np.ndarray) -> list[float]:
    """The controller's input, seven numbers, for an action of the policy; the controller cuts it off at -1 and 1."""
    action = check_action(action)
    return [*action[:6].tolist(), closing_sign(action[6])]
