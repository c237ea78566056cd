"""Adapters of other benchmarks: action mappings, protocols with stand-ins, and the simulators themselves."""

import importlib.metadata
import importlib.util
import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import evaluate_policy
import gymnasium
import numpy as np
import pytest
from conftest import REPOSITORY, TINY_POLICY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from evaluation import libero_adapter, simpler_adapter
from evaluation.controls import StickyGripper, check_action, closing_sign, quaternion_from_euler, rotation_vector
from evaluation.environments import Environment
from evaluation.libero_adapter import LiberoEnv, configure_processor
from evaluation.policies import ModelPolicy, RandomPolicy
from evaluation.rollout import Job, rollout
from robot_data.pictures import jpeg_round_trip


ACTION = np.array([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 1.0])


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# LIBERO needs 1.4, which is another robosuite.
HAS_ROBOSUITE = is_installed("robosuite") and importlib.metadata.version("robosuite").startswith("1.5.")


class Script:
    """A policy that gives listed actions, then the last one again."""

    cameras = ("image",)

    def __init__(self, *actions):
        self.actions = np.array(actions)

    def act(self, runs):
        return np.stack([self.actions[min(run.episode.steps, len(self.actions) - 1)] for run in runs])


class TestControls:
    @pytest.mark.parametrize("opening, sign", [(0.0, 1), (0.498, 1), (0.5, 0), (0.502, -1), (0.996, -1), (1.0, -1)])
    def test_closing_sign(self, opening, sign):
        assert closing_sign(opening) == sign

    @pytest.mark.parametrize("action", [np.zeros(6), np.zeros((1, 7)), np.array([0, 0, 0, 0, 0, 0, np.nan])])
    def test_wrong_actions(self, action):
        with pytest.raises(ValueError, match="An action"):
            check_action(action)

    @pytest.mark.parametrize(
        "angles, vector",
        [
            # By `transforms3d.euler.euler2axangle`, which SimplerEnv uses.
            ((0.1, -0.2, 0.3), (0.12892336372590388, -0.18342579500937847, 0.30874816361702984)),
            ((3.0, 0.5, -2.5), (1.1741087290759096, -3.330787607846992, -0.5219377233962208)),
            ((0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
            ((0.0, 0.0, 1.25), (0.0, 0.0, 1.25)),
        ],
    )
    def test_rotation_vector_of_euler_angles(self, angles, vector):
        np.testing.assert_allclose(rotation_vector(quaternion_from_euler(*angles)), vector, atol=1e-12)

    def test_rotation_vector_keeps_the_sign_of_the_quaternion(self):
        """As robosuite: of the two vectors of a rotation, its states hold the one that the quaternion says."""
        half = np.sqrt(0.5)
        np.testing.assert_allclose(rotation_vector(np.array([half, 0, 0, half])), [np.pi / 2, 0, 0])
        np.testing.assert_allclose(rotation_vector(np.array([-half, 0, 0, -half])), [-3 * np.pi / 2, 0, 0])


class TestStickyGripper:
    def test_small_changes_pass(self):
        gripper = StickyGripper()
        commands = [gripper.command(opening) for opening in (1.0, 0.75, 0.5, 0.5)]
        assert commands == [0.0, 0.25, 0.25, 0.0]

    def test_a_large_change_is_held(self):
        """Closing, with a change back in between that is not followed, and one after it that is."""
        gripper = StickyGripper(repeat=3)
        openings = [1.0, 0.1, 1.0, 1.0, 1.0, 0.25, 0.25, 1.0, 1.0, 1.0]
        commands = [gripper.command(opening) for opening in openings]
        assert commands == [0.0, 0.9, 0.9, 0.9, 0.0, 0.75, 0.75, 0.75, 0.0, 0.0]

    @given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), max_size=80), st.integers(1, 15))
    def test_a_held_change_lasts_exactly_its_time(self, openings, repeat):
        gripper = StickyGripper(repeat)
        commands = [gripper.command(opening) for opening in openings]
        changes = [before - after for before, after in itertools.pairwise(openings)]
        step = 1
        while step < len(commands):
            held = abs(changes[step - 1]) > 0.5
            last = min(step + repeat, len(commands)) if held else step + 1
            assert commands[step:last] == [changes[step - 1]] * (last - step)
            step = last

    def test_reset(self):
        gripper = StickyGripper()
        assert [gripper.command(1.0), gripper.command(0.0)] == [0.0, 1.0]
        gripper.reset()
        assert gripper.command(1.0) == 0.0


# LIBERO


LIBERO_TASKS = ("put_the_bowl_on_the_plate", "open_the_middle_drawer")
NUM_INITIAL_STATES = 4
QUATERNION = np.array([0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5)])


def libero_picture(steps: int) -> np.ndarray:
    """Smooth, different after every step, and different in its four corners."""
    down, across = np.mgrid[0:256, 0:256]
    return np.stack([down, across, np.full_like(down, 3 * steps)], axis=-1).astype(np.uint8)


class FakeLiberoSimulator:
    """
    LIBERO's `OffScreenRenderEnv`: writes down what it is asked to do, and succeeds after a number of steps. As the
    real one, it draws in the OpenGL context that is current.
    """

    def __init__(self, calls: list, current: list, success_after: int, **arguments):
        self.calls, self.success_after, self.current = calls, success_after, current
        self.cameras, self.steps = arguments["camera_names"], 0
        context = SimpleNamespace(make_current=lambda: current.append(self))
        self.sim = SimpleNamespace(_render_context_offscreen=SimpleNamespace(gl_ctx=context))
        current.append(self)
        calls.append(("make", arguments))

    def seed(self, seed):
        self.calls.append(("seed", seed))

    def reset(self):
        self.calls.append(("reset", None))
        self.steps = 0
        return self.observation()

    def set_init_state(self, state):
        self.calls.append(("set_init_state", state.tolist()))
        return self.observation()

    def step(self, action):
        self.calls.append(("step", action))
        self.steps += 1
        return self.observation(), 0.0, self.steps >= self.success_after, {}

    def observation(self):
        return {
            **{f"{camera}_image": libero_picture(self.current[-1].steps) for camera in self.cameras},
            "robot0_eef_pos": np.array([0.5, -0.25, 1.0]),
            "robot0_eef_quat": QUATERNION,
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }

    def close(self):
        self.calls.append(("close", None))


class FakeLiberoSuite:
    n_tasks = len(LIBERO_TASKS)

    def get_task(self, index):
        name = LIBERO_TASKS[index]
        return SimpleNamespace(
            name=name, language=name.replace("_", " "), problem_folder="folder", bddl_file=f"{name}.bddl"
        )

    def get_task_init_states(self, index):
        return np.array([[100 * index + trial, 0.5] for trial in range(NUM_INITIAL_STATES)])


@pytest.fixture
def libero():
    """Makes environments on a stand-in for LIBERO, and its calls."""
    calls, current = [], []

    def make(suite="libero_spatial", success_after=10**6, **arguments):
        library = SimpleNamespace(
            benchmark=SimpleNamespace(
                get_benchmark_dict=lambda: dict.fromkeys(libero_adapter.MAX_STEPS, FakeLiberoSuite)
            ),
            get_libero_path=lambda key: f"/{key}",
            OffScreenRenderEnv=lambda **given: FakeLiberoSimulator(calls, current, success_after, **given),
        )
        return LiberoEnv(suite, library=library, **arguments)

    return make, calls


class TestLibero:
    def test_what_the_simulator_is_told(self, libero):
        make, calls = libero
        env = make()
        env.reset(seed=2, options={"task": LIBERO_TASKS[1]})
        made = {
            "bddl_file_name": "/bddl_files/folder/open_the_middle_drawer.bddl",
            "camera_names": ["agentview", "robot0_eye_in_hand"],
            "camera_heights": 256,
            "camera_widths": 256,
        }
        waiting = ("step", [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
        assert (
            calls == [("make", made), ("seed", 0), ("reset", None), ("set_init_state", [102.0, 0.5])] + [waiting] * 10
        )
        calls.clear()
        env.step(ACTION)
        env.step(np.array([1.5, -2.0, 0, 0, 0, 0, 0.25]))
        assert calls == [
            ("step", [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, -1.0]),
            ("step", [1.5, -2.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
        ]

    def test_the_simulator_changes_with_the_task(self, libero):
        make, calls = libero
        env = make()
        for task in (LIBERO_TASKS[0], LIBERO_TASKS[0], LIBERO_TASKS[1]):
            observation, _ = env.reset(seed=0, options={"task": task})
            assert observation["instruction"] == task.replace("_", " ")
        env.close()
        names = [name for name, _ in calls if name not in ("step", "set_init_state")]
        assert names == ["make", "seed", "reset", "reset", "close", "make", "seed", "reset", "close"]

    def test_observation(self, libero):
        make, _ = libero
        observation, _ = make().reset(seed=0)
        turned = libero_picture(10)[::-1, ::-1]  # after ten steps of waiting
        for name in ("image", "wrist_image"):
            np.testing.assert_array_equal(observation[name], jpeg_round_trip(np.ascontiguousarray(turned)))
        np.testing.assert_allclose(observation["image"][0, 0], [255, 255, 30], atol=6)
        np.testing.assert_allclose(observation["image"][0, -1], [255, 0, 30], atol=6)
        assert not np.array_equal(observation["image"], turned)  # it went through a JPEG file
        state = [0.5, -0.25, 1.0, 0, 0, np.pi / 2, 0.04, -0.04]
        np.testing.assert_allclose(observation["state"], np.float32(state), rtol=1e-6)
        assert observation["state"].dtype == np.float32

    def test_each_environment_draws_its_own_pictures(self, libero):
        one, other = libero[0](), libero[0]()
        for env in (one, other):
            env.reset(seed=0)
        one.step(ACTION)
        other.step(ACTION)
        observation, *_ = one.step(ACTION)
        np.testing.assert_array_equal(observation["image"], libero_adapter.picture_of(libero_picture(12)))
        other.close()
        observation, _ = one.reset(seed=0)
        np.testing.assert_array_equal(observation["image"], libero_adapter.picture_of(libero_picture(10)))

    def test_render_shows_what_the_policy_sees(self, libero):
        env = libero[0]()
        env.reset(seed=0)
        observation, *_ = env.step(ACTION)
        np.testing.assert_array_equal(env.render(), observation["image"])

    def test_only_the_cameras_that_are_looked_at(self, libero):
        make, calls = libero
        observation, _ = make(cameras=("image",)).reset(seed=0)
        assert calls[0][1]["camera_names"] == ["agentview"]
        assert observation["image"].any() and not observation["wrist_image"].any()
        observation, _ = make(cameras=()).reset(seed=0)
        assert not observation["image"].any()

    @pytest.mark.parametrize(
        "suite, limit",
        [
            ("libero_spatial", 220),
            ("libero_object", 280),
            ("libero_goal", 300),
            ("libero_10", 520),
            ("libero_90", 400),
        ],
    )
    def test_limits(self, libero, suite, limit):
        """Waiting does not count, and a success during it is not one."""
        make, calls = libero
        jobs = [Job(LIBERO_TASKS[0], 0)]
        (late,) = rollout(Script(ACTION), jobs, lambda: make(suite, cameras=()))
        assert (late.outcome, late.steps) == ("timeout", limit)
        assert [name for name, _ in calls].count("step") == 10 + limit
        (at_last,) = rollout(Script(ACTION), jobs, lambda: make(suite, success_after=10 + limit, cameras=()))
        assert (at_last.outcome, at_last.steps) == ("success", limit)
        (at_once,) = rollout(Script(ACTION), jobs, lambda: make(suite, success_after=3, cameras=()))
        assert (at_once.outcome, at_once.steps) == ("success", 1)

    def test_shorter_limit(self, libero):
        (episode,) = rollout(Script(ACTION), [Job(LIBERO_TASKS[0], 0)], lambda: libero[0](max_steps=3))
        assert (episode.outcome, episode.steps) == ("timeout", 3)

    def test_seeds_are_trials(self, libero):
        make, calls = libero
        env = make()
        for seed in range(NUM_INITIAL_STATES):
            env.reset(seed=seed)
        states = [state for name, state in calls if name == "set_init_state"]
        assert states == [[seed, 0.5] for seed in range(NUM_INITIAL_STATES)]
        with pytest.raises(ValueError, match="4 initial states, so seeds go up to 3; got 4"):
            env.reset(seed=4)

    @pytest.mark.parametrize(
        "arguments, message",
        [({"suite": "libero_far"}, "'libero_far' is unknown"), ({"cameras": ("left",)}, r"Cameras \['left'\]")],
    )
    def test_wrong_arguments(self, libero, arguments, message):
        with pytest.raises(ValueError, match=message):
            libero[0](**arguments)

    def test_wrong_task(self, libero):
        with pytest.raises(ValueError, match="`task='fly'` is unknown"):
            libero[0]().reset(seed=0, options={"task": "fly"})

    def test_missing_assets(self, libero):
        env = libero[0]()

        def fail(**arguments):
            raise FileNotFoundError("scenes/table.xml")

        env.library.OffScreenRenderEnv = fail
        with pytest.raises(ValueError, match=r"assets are missing: scenes/table\.xml"):
            env.reset(seed=0)

    def test_first_import_without_a_terminal(self, tmp_path, monkeypatch):
        """hf-libero asks where its datasets are to go."""
        package = tmp_path / "libero" / "libero"
        package.mkdir(parents=True)
        (tmp_path / "libero" / "__init__.py").touch()
        (package / "__init__.py").write_text("raise EOFError")
        for name in [name for name in sys.modules if name.split(".")[0] == "libero"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        try:
            with pytest.raises(ValueError, match="Answer it once, with N"):
                Environment("libero:libero_spatial").make()
        finally:
            sys.modules.pop("libero", None)

    @pytest.mark.skipif(is_installed("libero"), reason="LIBERO is installed")
    def test_not_installed(self):
        with pytest.raises(ValueError, match=r"pip install -r requirements-libero\.txt"):
            Environment("libero:libero_spatial").make()


class TestLiberoPictures:
    def test_configured_processor(self, processor):
        """The margin that a crop of 90% of the area leaves out, (1 - sqrt(0.9)) / 2 on each side, is not seen."""
        side = processor.image_processor.input_sizes[0][-1]
        margin = int((1 - 0.9**0.5) / 2 * side)
        framed = np.zeros((side, side, 3), np.uint8)
        framed[margin:-margin, margin:-margin] = 255
        whole = processor.image_processor(framed)["pixel_values"]
        assert configure_processor(processor) is processor
        cropped = processor.image_processor(framed)["pixel_values"]
        assert margin > 1 and whole.amin() < 0
        assert (cropped == whole.amax(dim=(2, 3), keepdim=True)).all()
        settings = processor.image_processor.to_dict()
        assert (settings["resample"], settings["center_crop_area"]) == ("tf_lanczos3", 0.9)

    def test_published_checkpoints_are_configured(self, policy, libero):
        model_policy = ModelPolicy(*policy)
        libero[0](published_pictures=False).configure_policy(model_policy)
        assert model_policy.processor.image_processor.resample == "pil_bicubic"
        libero[0]().configure_policy(model_policy)
        assert model_policy.processor.image_processor.resample == "tf_lanczos3"

    def test_a_processor_that_knows_better_stays(self, policy, libero):
        model_policy = ModelPolicy(*policy)
        model_policy.processor.image_processor.center_crop_area = 0.8
        libero[0]().configure_policy(model_policy)
        settings = model_policy.processor.image_processor
        assert (settings.resample, settings.center_crop_area) == ("pil_bicubic", 0.8)


class TestLiberoSimulator:
    def test_waiting_and_acting(self):
        """The real one, where it and its assets are."""
        if not is_installed("libero"):
            pytest.skip("LIBERO is not installed: make bench-libero")
        env = Environment("libero:libero_spatial", arguments={"max_steps": 5}).make()
        assert len(env.tasks) == 10
        try:
            observation, _ = env.reset(seed=0)
        except ValueError as error:
            if "assets are missing" not in str(error):
                raise
            pytest.skip(str(error))
        height = observation["state"][2]
        (episode,) = rollout(Script([0, 0, 1, 0, 0, 0, 1]), [Job(env.tasks[0], 0)], lambda: env)
        assert (episode.outcome, episode.steps) == ("timeout", 5)
        assert env.raw["robot0_eef_pos"][2] > height + 0.02


# SimplerEnv


def simpler_picture(steps: int) -> np.ndarray:
    down, across = np.mgrid[0:480, 0:640]
    return np.stack([down / 2, across / 3, np.full_like(down, steps)], axis=-1).astype(np.uint8)


class FakeSimpler(gymnasium.Env):
    """What `simpler_env.make` gives: succeeds in the listed steps, and ends after `limit`."""

    metadata = {"render_modes": []}
    action_space = gymnasium.spaces.Box(-1, 1, (7,))

    def __init__(self, camera: str, successes=(), limit=60):
        self.camera, self.successes, self.limit = camera, successes, limit
        self.resets, self.actions = [], []

    def reset(self, *, seed=None, options=None):
        self.resets.append((seed, options))
        self.actions.clear()
        return self.observation(), {}

    def step(self, action):
        self.actions.append(action.tolist())
        is_over = len(self.actions) >= self.limit
        return self.observation(), 0.0, len(self.actions) in self.successes, is_over, {"episode_stats": {}}

    def observation(self):
        return {"image": {self.camera: {"rgb": simpler_picture(len(self.actions))}, "other": {"rgb": None}}}

    def get_language_instruction(self):
        return "open the drawer" if len(self.actions) < 2 else "put the apple into it"


def widowx(**arguments):
    return simpler_adapter.SimplerEnv(FakeSimpler("3rd_view_camera", **arguments), "widowx_stack_cube")


def google_robot(**arguments):
    return simpler_adapter.SimplerEnv(FakeSimpler("overhead_camera", **arguments), "google_robot_open_drawer")


class TestSimpler:
    def test_conventions(self):
        assert (widowx().robot.unnorm_key, widowx().metadata["render_fps"]) == ("bridge_orig", 5)
        assert (google_robot().robot.unnorm_key, google_robot().metadata["render_fps"]) == ("fractal20220817_data", 3)
        with pytest.raises(ValueError, match="begins with none of the robots"):
            simpler_adapter.robot_of("panda_lift")

    @pytest.mark.parametrize("opening, sent", [(1.0, 1.0), (0.51, 1.0), (0.5, -1.0), (0.0, -1.0)])
    def test_widowx_gripper(self, opening, sent):
        env = widowx()
        env.reset(seed=0)
        env.step(np.append(np.zeros(6), opening))
        assert env.unwrapped.actions == [[0.0] * 6 + [sent]]

    def test_pose(self):
        """Metres as they are, Euler angles as a rotation vector."""
        env = widowx()
        env.reset(seed=0)
        env.step(np.array([0.01, -0.02, 0.03, 0.1, -0.2, 0.3, 1.0]))
        sent = [0.01, -0.02, 0.03, 0.12892336372590388, -0.18342579500937847, 0.30874816361702984, 1.0]
        np.testing.assert_allclose(env.unwrapped.actions[0], sent, atol=1e-12)

    def test_action_scale(self):
        env = simpler_adapter.SimplerEnv(FakeSimpler("3rd_view_camera"), "widowx_stack_cube", action_scale=2.0)
        np.testing.assert_allclose(env.command(np.array([0.01, 0, 0, 0, 0, 0.1, 1.0])), [0.02, 0, 0, 0, 0, 0.2, 1.0])

    def test_google_robot_gripper(self):
        """A change is held for 15 actions; each episode begins anew."""
        env = google_robot()
        for _ in range(2):
            env.reset(seed=0)
            for opening in [1.0] * 2 + [0.0] * 20:
                env.step(np.append(np.zeros(6), opening))
            assert [action[6] for action in env.unwrapped.actions] == [0.0] * 2 + [1.0] * 15 + [0.0] * 5

    @pytest.mark.parametrize("successes, outcome", [((), "timeout"), ((2, 3), "timeout"), ((5,), "success")])
    def test_the_last_state_decides(self, successes, outcome):
        job = Job("widowx_stack_cube", 7)
        (episode,) = rollout(RandomPolicy(), [job], lambda: widowx(successes=successes, limit=5))
        assert (episode.outcome, episode.steps) == (outcome, 5)

    def test_shorter_limit(self):
        env = simpler_adapter.SimplerEnv(FakeSimpler("3rd_view_camera", (2,)), "widowx_stack_cube", max_steps=2)
        env.reset(seed=0)
        assert [env.step(np.zeros(7))[4]["outcome"] for _ in range(2)] == [None, "success"]

    def test_seeds(self):
        for env in (widowx(), google_robot()):
            env.reset(seed=7)
            assert env.reset(seed=None)[1]["outcome"] is None
        assert env.unwrapped.resets == [(7, {}), (None, {})]
        env = widowx()
        env.reset(seed=7)
        assert env.unwrapped.resets == [(7, {"obj_init_options": {"episode_id": 7}})]

    def test_observation(self):
        env = google_robot()
        observation, _ = env.reset(seed=0)
        assert observation["image"].shape == (224, 224, 3)
        np.testing.assert_array_equal(env.render(), simpler_picture(0))
        instructions = [env.step(np.zeros(7))[0]["instruction"] for _ in range(3)]
        assert instructions == ["open the drawer", "put the apple into it", "put the apple into it"]

    def test_unlooked_picture_is_black(self):
        env = simpler_adapter.SimplerEnv(FakeSimpler("3rd_view_camera"), "widowx_stack_cube", cameras=())
        assert not env.reset(seed=0)[0]["image"].any()
        with pytest.raises(ValueError, match="'wrist_image'"):
            simpler_adapter.SimplerEnv(FakeSimpler("3rd_view_camera"), "widowx_stack_cube", cameras=("wrist_image",))

    def test_shrink(self):
        """Golden numbers of `cv2.resize(..., interpolation=cv2.INTER_AREA)`, OpenCV 4.11."""
        image = (np.arange(5 * 7 * 3).reshape(5, 7, 3) ** 2 % 251).astype(np.uint8)
        shrunk = [
            [[64, 71, 52], [113, 120, 114], [103, 88, 140]],
            [[71, 125, 166], [122, 117, 122], [115, 138, 149]],
            [[87, 186, 137], [140, 102, 159], [70, 153, 103]],
        ]
        np.testing.assert_array_equal(simpler_adapter.shrink(image, 3), shrunk)
        np.testing.assert_array_equal(simpler_adapter.shrink(image[:, :5], 5), image[:, :5])
        with pytest.raises(ValueError, match="7x5 pixels cannot be shrunk to 6x6"):
            simpler_adapter.shrink(image, 6)

    @pytest.mark.skipif(is_installed("simpler_env"), reason="SimplerEnv is installed")
    def test_not_installed(self):
        with pytest.raises(ValueError, match="'simpler:widowx_stack_cube' cannot be made: No module named"):
            Environment("simpler:widowx_stack_cube").make()


# The contract


class Untold(gymnasium.Wrapper):
    """An adapter that forgets to name the tasks."""

    def __init__(self, env):
        super().__init__(env)
        self.metadata = {"render_fps": 10}


class Told(Untold):
    tasks = ("balance",)


@pytest.fixture
def bare():
    """Id of an environment that is not in OpenVLA's terms."""
    gymnasium.register("Bare-v0", entry_point=lambda: FakeSimpler("camera"))
    yield "Bare-v0"
    del gymnasium.registry["Bare-v0"]


class TestContract:
    @pytest.mark.parametrize(
        "adapter, message",
        [
            (None, r"has no `tasks` and no `metadata\[\"render_fps\"\]`; it needs an adapter"),
            ("test_benchmark_adapters:Untold", "has no `tasks`; it needs an adapter"),
            ("test_benchmark_adapters:Missing", "cannot be made"),
        ],
    )
    def test_what_is_missing(self, adapter, message, bare):
        with pytest.raises(ValueError, match=message):
            Environment(bare, adapter).make()

    def test_a_wrapper_names_the_tasks(self, bare):
        env = Environment(bare, "test_benchmark_adapters:Told").make()
        assert env.get_wrapper_attr("tasks") == ("balance",)

    @pytest.mark.skipif(is_installed("robosuite"), reason="robosuite is installed")
    def test_not_installed(self):
        with pytest.raises(ValueError, match="'robosuite:Lift' cannot be made: No module named 'robosuite'"):
            Environment("robosuite:Lift").make()


# robosuite


class RobosuiteExpert:
    """Lifts a cube, and puts it on the other one where there is one; reads the state of the physics."""

    cameras = ()

    def act(self, runs):
        return np.stack([self._action(run.env.env) for run in runs])

    def _action(self, simulator):
        robot, data = simulator.robots[0], simulator.sim.data
        site = robot.eef_site_id["right"]
        cube = simulator.cubeA if hasattr(simulator, "cubeA") else simulator.cube
        body = simulator.sim.model.body_name2id(cube.root_body)
        place = data.body_xpos[body]
        if simulator._check_grasp(gripper=robot.gripper, object_geoms=cube):
            goal, opening = self._carry(simulator, place)
            return np.concatenate([4 * goal, np.zeros(3), [opening]])
        yaw = heading(data.body_xmat[body]) - heading(data.site_xmat[site])
        yaw = (yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
        offset = place - data.site_xpos[site]
        is_above = np.linalg.norm(offset[:2]) < 0.01 and abs(yaw) < 0.1
        goal = offset if is_above else offset + np.array([0, 0, 0.08])
        return np.concatenate([4 * goal, [0, 0, 4 * yaw], [float(np.linalg.norm(offset) > 0.015)]])

    @staticmethod
    def _carry(simulator, place):
        if not hasattr(simulator, "cubeA"):
            return np.array([0, 0, 0.1]), 0.0
        offset = simulator.sim.data.body_xpos[simulator.cubeB_body_id] - place
        distance = np.linalg.norm(offset[:2])
        if distance > 0.03 and place[2] < 0.88:
            return np.array([0, 0, 0.1]), 0.0
        if distance > 0.008:
            return offset + np.array([0, 0, 0.12]), 0.0
        return offset + np.array([0, 0, 0.046]), float(offset[2] > -0.0475)


def heading(matrix):
    return np.arctan2(matrix[3], matrix[0])


def robosuite_env(name, **arguments):
    return Environment(f"robosuite:{name}", arguments={"cameras": (), **arguments}).make


@pytest.mark.skipif(not HAS_ROBOSUITE, reason="robosuite 1.5 is not installed: make bench-robosuite")
class TestRobosuite:
    @pytest.mark.parametrize("name", ["Lift", "Stack"])
    def test_the_expert_succeeds(self, name):
        jobs = [Job(name, seed) for seed in range(5)]
        episodes = rollout(RobosuiteExpert(), jobs, robosuite_env(name, max_steps=150))
        assert [episode.outcome for episode in episodes] == ["success"] * 5

    def test_random_fails_at_the_limit(self):
        (episode,) = rollout(RandomPolicy(), [Job("Lift", 0)], robosuite_env("Lift", max_steps=20))
        assert (episode.outcome, episode.steps) == ("timeout", 20)

    @pytest.mark.parametrize(
        "action, moved, turned",
        [
            ([0.02, 0, 0, 0, 0, 0], [1, 0, 0], [0, 0, 0]),
            ([0, 0.02, 0, 0, 0, 0], [0, 1, 0], [0, 0, 0]),
            ([0, 0, 0.02, 0, 0, 0], [0, 0, 1], [0, 0, 0]),
            ([0, 0, 0, 0.1, 0, 0], [0, 0, 0], [1, 0, 0]),
            ([0, 0, 0, 0, 0.1, 0], [0, 0, 0], [0, 1, 0]),
            ([0, 0, 0, 0, 0, 0.1], [0, 0, 0], [0, 0, 1]),
        ],
    )
    def test_directions(self, action, moved, turned):
        """Ten actions; the controller covers about a fifth of what they add up to."""
        env = robosuite_env("Lift")()
        env.reset(seed=0)
        site = env.env.robots[0].eef_site_id["right"]
        data = env.env.sim.data
        place, turn = data.site_xpos[site].copy(), data.site_xmat[site].reshape(3, 3).copy()
        for _ in range(10):
            env.step(np.append(action, 1.0))
        after = data.site_xmat[site].reshape(3, 3) @ turn.T
        angles = np.array([after[2, 1] - after[1, 2], after[0, 2] - after[2, 0], after[1, 0] - after[0, 1]]) / 2
        for change, direction, unit in ((data.site_xpos[site] - place, moved, 0.2), (angles, turned, 1.0)):
            share, direction = change / unit, np.array(direction)
            assert not direction.any() or 0.15 < share @ direction < 0.3
            assert np.abs(share[direction == 0]).max() < 0.2
        env.close()

    def test_commands(self):
        env = robosuite_env("Lift")()
        np.testing.assert_allclose(
            env.command(np.array([0.05, -0.1, 0.01, 0.25, 1, 0, 0.9])), [1, -1, 0.2, 0.5, 1, 0, -1]
        )
        controller = robosuite_env("Lift", action_units="controller")()
        np.testing.assert_allclose(controller.command(ACTION), [*ACTION[:6], -1.0])
        np.testing.assert_allclose(env.action_space.high, [0.05] * 3 + [0.5] * 3 + [1.0])
        np.testing.assert_allclose(controller.action_space.low, [-1.0] * 6 + [0.0])
        env.close()
        controller.close()

    def test_gripper(self):
        """Opens above 0.5, and closes below."""
        env = robosuite_env("Lift")()
        observation, _ = env.reset(seed=0)
        widths = [np.ptp(observation["state"][6:])]
        for opening in (1.0, 0.0):
            for _ in range(10):
                observation, *_ = env.step(np.append(np.zeros(6), opening))
            widths.append(np.ptp(observation["state"][6:]))
        assert widths[2] < 0.03 < widths[0] < 0.06 < widths[1]
        env.close()

    def test_scenes_follow_their_seeds_in_any_batch(self):
        """With pictures, which two environments in one thread must not mix up."""
        jobs = [Job("Lift", seed, record=True) for seed in range(3)]
        make_env = robosuite_env("Lift", cameras=("image", "wrist_image"), image_size=64, max_steps=3)
        alone, together = (rollout(RandomPolicy(), jobs, make_env, num_envs=n) for n in (1, 3))
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one.frames, other.frames)
            np.testing.assert_array_equal(one.actions, other.actions)
        assert not np.array_equal(alone[0].frames[0], alone[1].frames[0])

    def test_pictures_are_upright(self):
        """The red cube lies before the robot: below the hand in the front camera's picture, and it is red."""
        env = robosuite_env("Lift", cameras=("image", "wrist_image"), image_size=128)()
        observation, _ = env.reset(seed=0)
        image = observation["image"].astype(int)
        red = (image[..., 0] > 100) & (image[..., 1] < 60)
        down, across = np.argwhere(red).mean(axis=0)
        assert 60 < down < 90 and 55 < across < 75
        assert image[:10].mean() < image[-10:].mean() - 50  # wall and robot above, the white table below
        assert observation["wrist_image"][-10:].mean() < 100  # the hand itself
        np.testing.assert_array_equal(env.render(), observation["image"])
        assert observation["instruction"] == "pick up the red cube"
        env.close()

    @pytest.mark.parametrize(
        "name, arguments, message",
        [
            ("Door", {}, "'Door' is not among the tasks"),
            ("Lift", {"cameras": ("left",)}, r"Cameras \['left'\] are unknown"),
            ("Lift", {"action_units": "feet"}, "`action_units` must be one of"),
        ],
    )
    def test_wrong_arguments(self, name, arguments, message):
        with pytest.raises(ValueError, match=message):
            robosuite_env(name, **arguments)()

    def test_no_graphics_library(self):
        code = (
            "import sys; sys.path.insert(0, '.'); from evaluation.environments import Environment; "
            "Environment('robosuite:Lift').make().reset(seed=0)"
        )
        finished = subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={"MUJOCO_GL": "glfw", "PATH": "/usr/bin"},
            capture_output=True,
            text=True,
        )
        assert "ValueError: MuJoCo cannot render" in finished.stderr
        assert "MUJOCO_GL=osmesa" in finished.stderr

    @pytest.mark.parametrize("policy", ["random", TINY_POLICY])
    def test_command(self, policy, tmp_path):
        arguments = [
            "--policy",
            policy,
            "--env",
            "robosuite:Stack",
            "--episodes",
            2,
            "--num_envs",
            2,
            "--max_steps",
            3,
        ]
        assert evaluate_policy.main([str(argument) for argument in [*arguments, "--output_dir", tmp_path]]) == 0
        results = json.loads((tmp_path / "results.json").read_text())
        assert results["environment"]["control_rate"] == 20
        assert results["all"]["failures"] == {"timeout": 2}
        with Image.open(tmp_path / "sheet.png") as sheet:
            assert np.asarray(sheet).std() > 30
