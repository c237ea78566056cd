"""The simulated tabletop: physics, pictures, tasks and the expert."""

import os
import subprocess
import sys

import gymnasium
import mujoco
import numpy as np
import pytest
from conftest import REPOSITORY
from gymnasium.utils.env_checker import check_env

from tabletop.camera import make_camera
from tabletop.control import OPEN_WIDTH
from tabletop.environment import MAX_ROTATION, MAX_TRANSLATION, TabletopEnv
from tabletop.expert import GRASP_TOLERANCE, MISSED_WIDTH, RELEASE_HEIGHT, RELEASE_TOLERANCE, Expert
from tabletop.scene import COLORS, SHAPES, TableObject, build_model, lay_out
from tabletop.tasks import LIFT_HEIGHT, TASKS, WORDINGS, Goal


COMPARE_RENDERERS = """
import sys
import numpy as np
from tabletop.camera import make_camera
from tabletop.environment import TabletopEnv

env = TabletopEnv(cameras=())
for seed in range(3):
    env.reset(seed=seed)
    other = make_camera(env.model, 224, sys.argv[1])
    for name in ("front", "wrist"):
        ours = make_camera(env.model, 224).render(env.data, name).astype(float)
        print(np.abs(ours - other.render(env.data, name)).mean())
    other.close()
"""
WITHOUT_GRAPHICS = """
import ctypes
import ctypes.util

ctypes.util.find_library = lambda name: None
opens = ctypes.CDLL.__init__

def refuse(self, name, *arguments, **options):
    if any(library in str(name) for library in ("OSMesa", "libEGL", "libGL.", "libOpenGL")):
        raise OSError("cannot open shared object file")
    opens(self, name, *arguments, **options)

ctypes.CDLL.__init__ = refuse
import tabletop.environment
"""
STILL = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)


def make_env(**kwargs) -> TabletopEnv:
    return TabletopEnv(**{"image_size": 32, "cameras": (), **kwargs})


def run_expert(env: TabletopEnv, seed: int, noise_seed: int | None = None) -> str:
    """The outcome of one episode."""
    env.reset(seed=seed)
    expert, rng = Expert(env), None if noise_seed is None else np.random.default_rng([noise_seed, 1])
    while True:
        action = expert.action() if rng is None else expert.noisy_action(rng)
        *_, terminated, truncated, info = env.step(action)
        if terminated or truncated:
            return info["outcome"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gymnasium_accepts_it():
    env = gymnasium.make("tabletop:Tabletop-v0", image_size=32, render_mode="rgb_array")
    check_env(env.unwrapped)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    np.testing.assert_array_equal(env.render(), observation["image"])


def test_bit_reproducible():
    first, second = (make_env(cameras=("image", "wrist_image"), randomize=True) for _ in range(2))
    for env in (first, second):
        env.reset(seed=11)
    actions = np.random.default_rng(0).uniform(-1, 1, (15, 7)) * first.action_space.high
    for action in actions:
        one, other = first.step(action)[0], second.step(action)[0]
        assert one["instruction"] == other["instruction"]
        for key in ("image", "wrist_image", "state"):
            np.testing.assert_array_equal(one[key], other[key])
    assert (first.reset(seed=11)[0]["image"] != first.reset(seed=12)[0]["image"]).any()


class TestActions:
    @pytest.fixture
    def env(self):
        env = make_env()
        env.reset(seed=0, options={"task": "pick"})
        return env

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_translation_is_in_metres_of_the_base_frame(self, env, axis):
        start = env.data.site("grasp").xpos.copy()
        action = STILL.copy()
        action[axis] = 0.02
        env.step(action)
        for _ in range(6):
            env.step(STILL)
        moved = env.data.site("grasp").xpos - start
        np.testing.assert_allclose(moved, 0.02 * np.eye(3)[axis], atol=3e-3)

    @pytest.mark.parametrize("axis", [3, 4, 5])
    def test_rotation_is_in_radians_about_the_base_axes(self, env, axis):
        before = env._state()[3:6]
        action = STILL.copy()
        action[axis] = 0.2
        env.step(action)
        for _ in range(6):
            env.step(STILL)
        np.testing.assert_allclose(env._state()[3:6] - before, 0.2 * np.eye(3)[axis - 3], atol=0.02)

    def test_gripper_closes_below_one_half(self, env):
        action = STILL.copy()
        action[6] = 0.4
        for _ in range(8):
            observation, *_ = env.step(action)
        assert (observation["state"][6:] < 0.005).all()
        action[6] = 0.6
        for _ in range(8):
            observation, *_ = env.step(action)
        assert (observation["state"][6:] > 0.035).all()

    def test_larger_actions_are_clipped(self, env):
        twin = make_env()
        twin.reset(seed=0, options={"task": "pick"})
        env.step(np.array([9, 9, 9, 0, 0, 9, 9.0]))
        twin.step(np.array([MAX_TRANSLATION] * 3 + [0, 0, MAX_ROTATION, 1]))
        np.testing.assert_array_equal(env.data.qpos, twin.data.qpos)

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_a_hand_stops_where_a_joint_ends(self, env, sign):
        """It stays in its place however long it is asked to turn on, and comes back at once."""
        site, start = env.data.site("grasp"), env.data.site("grasp").xpos.copy()
        forth, back = STILL.copy(), STILL.copy()
        forth[5], back[5] = sign * MAX_ROTATION, -sign * MAX_ROTATION
        for _ in range(40):
            env.step(forth)
            assert np.abs(site.xpos - start).max() < 0.06
            assert site.xmat[8] < -0.9
        end = site.xmat.reshape(3, 3).copy()
        for _ in range(5):
            env.step(back)
        turned = np.arccos((np.trace(site.xmat.reshape(3, 3) @ end.T) - 1) / 2)
        assert turned == pytest.approx(5 * MAX_ROTATION, abs=0.3)

    def test_a_hand_that_cannot_turn_still_moves(self, env):
        action = STILL.copy()
        action[5] = -MAX_ROTATION
        for _ in range(15):
            env.step(action)
        start, action[2] = env.data.site("grasp").xpos.copy(), 0.02
        for _ in range(5):
            env.step(action)
        assert env.data.site("grasp").xpos[2] > start[2] + 0.07

    def test_a_stretched_arm_comes_back(self, env):
        """At the end of its reach, where joints stand at their limits, too."""
        action = STILL.copy()
        for action[:3] in ([0.04, 0.04, 0.04], [0.04, 0.0, -0.04], [-0.04, -0.04, 0.0]):
            for _ in range(14):
                env.step(action)
        site = env.data.site("grasp")
        for _ in range(40):
            action[:3] = np.clip([0.5, 0.0, 0.2] - site.xpos, -MAX_TRANSLATION, MAX_TRANSLATION)
            env.step(action)
        np.testing.assert_allclose(site.xpos, [0.5, 0.0, 0.2], atol=0.01)
        assert site.xmat[8] < -0.99

    @pytest.mark.parametrize(
        "action, message",
        [
            (np.zeros(6), r"shape \(7,\), got \(6,\)"),
            (np.zeros((1, 7)), r"shape \(7,\), got \(1, 7\)"),
            (np.full(7, np.nan), "must be finite"),
            (np.array([np.inf, 0, 0, 0, 0, 0, 0]), "must be finite"),
        ],
    )
    def test_bad_actions(self, env, action, message):
        with pytest.raises(ValueError, match=message):
            env.step(action)

    def test_without_a_scene(self, env):
        env.close()
        for acts in (lambda: env.step(STILL), env.render, make_env().render):
            with pytest.raises(RuntimeError, match="call `reset` first"):
                acts()


class TestTasks:
    @pytest.mark.parametrize("task", TASKS)
    def test_every_wording(self, task):
        env = make_env()
        spoken = set()
        for wording in range(len(WORDINGS[task])):
            options = {"task": task, "target": "red cube", "side": "left", "wording": wording}
            spoken.add(env.reset(seed=0, options=options)[0]["instruction"])
        assert len(spoken) == len(WORDINGS[task])
        assert all("red cube" in text for text in spoken)

    def test_a_seed_names_another_object_in_another_task(self):
        env = make_env()
        targets = [[env.reset(seed=seed, options={"task": task})[1]["target"] for task in TASKS] for seed in range(20)]
        assert sum(len(set(names)) == len(TASKS) for names in targets) >= 15

    @pytest.mark.parametrize("task", TASKS)
    def test_expert_succeeds(self, task):
        env = make_env(tasks=(task,))
        assert [run_expert(env, seed) for seed in range(10)] == ["success"] * 10

    def test_expert_rises_while_the_fingers_close(self):
        """One that waited until it holds would teach a learner, who cannot tell, to wait for ever."""
        env = TabletopEnv(tasks=("pick",), cameras=())
        env.reset(seed=0)
        expert, ended = Expert(env), False
        while not ended:
            action = expert.action()
            if action[6] == 0.0 and env.data.qpos[7] < 0.9 * OPEN_WIDTH:
                assert action[2] > 0
            _, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
        assert terminated

    def test_expert_opens_after_a_miss(self):
        """Fingers that closed above the target open and rise; then it is grasped."""
        env = TabletopEnv(tasks=("pick",), cameras=())
        env.reset(seed=0, options={"target": "red cube"})
        expert = Expert(env)
        hand, target = env.data.site("grasp").xpos, env.data.body("red cube").xpos
        while np.abs(target - hand)[:2].max() > 0.005 or abs(hand[2] - target[2] - 0.034) > 0.003:
            goal = target + np.array([0.0, 0.0, 0.034])
            env.step(np.array([*np.clip(goal - hand, -0.02, 0.02), 0, 0, 0, 1]))
        for _ in range(4):
            env.step(np.zeros(7))
        assert np.abs(target - hand).max() < 3 * GRASP_TOLERANCE
        assert env.data.qpos[7] < MISSED_WIDTH
        outcome, action = None, expert.action()
        assert action[6] == 1.0
        assert action[2] > 0
        while outcome is None:
            outcome = env.step(expert.action())[4]["outcome"]
        assert outcome == "success"

    def test_expert_carries_above_the_rim_and_lets_go_over_the_middle(self):
        env = make_env(tasks=("put_in_bowl",))
        for seed in range(6):
            env.reset(seed=seed)
            expert, was_low, gave, outcome = Expert(env), False, None, None
            while outcome is None:
                action, hand = expert.action(), env.data.site("grasp").xpos
                away = np.linalg.norm(env.data.body("bowl").xpos[:2] - hand[:2])
                if expert._is_gripped() and away > 0.1 and hand[2] < RELEASE_HEIGHT:
                    was_low = True
                    assert (action[:2] == 0).all()
                    assert action[2] > 0
                if expert._is_gripped() and action[6] == 1.0:
                    gave = away, hand[2]
                outcome = env.step(action)[4]["outcome"]
            assert outcome == "success"
            assert was_low
            assert gave[0] < RELEASE_TOLERANCE
            assert gave[1] < RELEASE_HEIGHT + 0.01

    def test_expert_keeps_opening_in_the_bowl(self):
        """Fingers that are half open there have let go, and do not close again."""
        env = make_env(tasks=("put_in_bowl",))
        env.reset(seed=0)
        expert = Expert(env)
        while not (expert._is_gripped() and expert.action()[6] == 1.0):
            env.step(expert.action())
        env.data.qpos[7:9] = 0.03
        mujoco.mj_forward(env.model, env.data)
        action = expert.action()
        assert action[6] == 1.0
        assert action[2] == np.float32(MAX_TRANSLATION)

    def test_targets_by_colour_and_shape(self):
        env = make_env(tasks=("pick",), objects=["purple", "ball"], hold_out=["red"])
        expected = {f"{color} ball" for color in COLORS if color != "red"} | {f"purple {shape}" for shape in SHAPES}
        assert set(env.object_names) == expected
        assert {env.reset(seed=seed)[1]["target"] for seed in range(100)} == expected
        both = env.object_names + make_env(hold_out=["purple", "ball"]).object_names
        assert len(both) == len(set(both)) == len(COLORS) * len(SHAPES) - 1  # all but the red ball

    def test_expert_turns_the_hand_for_a_brick(self):
        env = make_env(tasks=("pick",), objects=["red brick"])
        assert {run_expert(env, seed) for seed in range(10)} == {"success"}

    @pytest.mark.parametrize("task", TASKS)
    @pytest.mark.parametrize("axis", [3, 4])
    def test_expert_rights_a_tilted_hand(self, task, axis):
        env = make_env(tasks=(task,))
        env.reset(seed=0)
        action, expert = STILL.copy(), Expert(env)
        assert (expert.action()[3:5] == 0).all()
        action[axis] = MAX_ROTATION
        for _ in range(3):
            env.step(action)
        assert expert.action()[axis] == -np.float32(MAX_ROTATION)
        while expert.action()[3:5].any():
            assert env.steps < 12
            env.step(expert.action())
        assert env.data.site("grasp").xmat[8] < -0.99

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_expert_turns_where_the_joint_allows_it(self, sign):
        """A brick looks the same after half a turn: of the two ways to it, the shorter one is not always open."""
        env = make_env()
        env.reset(seed=0, options={"task": "pick", "target": "red brick"})
        action, expert = STILL.copy(), Expert(env)
        action[5] = sign * MAX_ROTATION
        for _ in range(6):
            env.step(action)
        angle = sign * 2.4
        env.data.joint("red brick").qpos[3:] = [np.cos(angle / 2), 0, 0, np.sin(angle / 2)]
        mujoco.mj_forward(env.model, env.data)
        assert expert.action()[5] == -sign * np.float32(MAX_ROTATION)

    @pytest.mark.parametrize("task", TASKS)
    def test_expert_recovers_from_where_a_learner_goes(self, task):
        """Thirty random actions leave the hand tilted, turned, stretched or on the table."""
        env, outcomes = make_env(tasks=(task,), max_steps=200), []
        for seed in range(100, 120):
            env.reset(seed=seed)
            rng, expert, ended = np.random.default_rng(seed), Expert(env), False
            while not ended:
                action = expert.action()
                if env.steps < 30:
                    action = rng.uniform(env.action_space.low, env.action_space.high)
                *_, terminated, truncated, info = env.step(action)
                ended = terminated or truncated
            outcomes.append(info["outcome"])
        assert outcomes.count("success") >= 18

    @pytest.mark.slow
    @pytest.mark.parametrize("noisy", [False, True])
    @pytest.mark.parametrize("task", TASKS)
    def test_expert_succeeds_on_200_seeds(self, task, noisy):
        env = make_env(tasks=(task,))
        outcomes = [run_expert(env, seed, seed if noisy else None) for seed in range(1000, 1200)]
        assert outcomes.count("success") >= 196

    def test_the_wrong_object_is_named(self):
        env = make_env()
        env.reset(seed=3, options={"task": "pick"})
        asked, other = env.objects[0].name, env.objects[1].name
        # An expert for another goal in the same scene lifts another object.
        misled, ended = Expert(env, Goal("pick", other, env.goal.start)), False
        while not ended:
            *_, terminated, truncated, info = env.step(misled.action())
            ended = terminated or truncated
        assert asked != other
        assert info["outcome"] == "wrong_object"

    def test_an_object_in_the_air_is_not_picked(self):
        """It has to be held there."""
        env = make_env()
        env.reset(seed=0, options={"task": "pick"})
        env.data.joint(env.goal.target).qpos[:3] = [0.5, 0.3, 0.4]
        *_, info = env.step(STILL)
        assert env.data.body(env.goal.target).xpos[2] > 2 * LIFT_HEIGHT
        assert info["outcome"] is None

    def test_dropped_and_timeout(self):
        env = make_env(max_steps=5)
        env.reset(seed=0)
        env.data.joint(env.goal.target).qpos[:3] = [1.5, 0, -0.1]
        *_, terminated, _, info = env.step(STILL)
        assert (terminated, info["outcome"]) == (True, "dropped")
        env.reset(seed=0)
        for _ in range(5):
            *_, terminated, truncated, info = env.step(STILL)
        assert (terminated, truncated, info["outcome"]) == (False, True, "timeout")

    def test_nothing_succeeds_by_itself(self):
        env = make_env(max_steps=3)
        for seed in range(30):
            env.reset(seed=seed)
            for _ in range(3):
                *_, info = env.step(STILL)
            assert info["outcome"] == "timeout"

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"task": "fly"}, "`task='fly'` is unknown"),
            ({"target": "pink cube"}, "`target='pink cube'` is unknown"),
            ({"side": "up"}, "`side='up'` is unknown"),
            ({"task": "push", "wording": 3}, "`wording` of 'push' must be from 0 to 2, got 3"),
            ({"task": "push", "wording": -1}, "must be from 0 to 2, got -1"),
            ({"color": "red"}, r"Options \['color'\] are unknown"),
        ],
    )
    def test_unknown_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            make_env().reset(seed=0, options=options)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"tasks": ("fly",)}, r"Tasks \['fly'\] are unknown"),
            ({"objects": ["pink cube"]}, r"`objects` takes a list of colours .* got \['pink cube'\]"),
            ({"objects": "red cube"}, "`objects` takes a list .* got 'red cube'"),
            ({"hold_out": ["pink"]}, r"`hold_out` takes a list of colours .* got \['pink'\]"),
            ({"objects": ["red"], "hold_out": ["red"]}, "leaves no object to handle"),
            ({"cameras": ("top",)}, r"Cameras \['top'\] are unknown"),
            ({"objects": []}, "leaves no object to handle"),
            ({"tasks": ()}, "`tasks` must be a sequence with at least 1"),
            ({"tasks": "pick"}, "got 'pick'"),
            ({"image_size": 0}, "`image_size` must be at least 1, got 0"),
            ({"max_steps": 0}, "`max_steps` must be at least 1, got 0"),
            ({"backend": "vulkan"}, "`backend` must be one of"),
            ({"render_mode": "human"}, "`render_mode` must be one of"),
        ],
    )
    def test_unknown_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            make_env(**arguments)

    def test_layouts(self):
        names = [f"{color} {shape}" for color, shape in zip(list(COLORS)[:4], SHAPES, strict=True)]
        for seed in range(50):
            objects, bowl = lay_out(names, np.random.default_rng(seed), push=1.0)
            centres = np.array([*(item.position for item in objects), bowl])
            gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1) + np.eye(len(centres))
            assert gaps.min() > 0.06
        with pytest.raises(ValueError, match="No room on the table"):
            lay_out([f"{color} {shape}" for color in COLORS for shape in SHAPES], np.random.default_rng(0), tries=3)
        with pytest.raises(ValueError, match="are alike"):
            build_model([TableObject("red", "cube", (0.4, 0.0))] * 2, None)

    @pytest.mark.parametrize("place", [(0.2, 0.0), (0.5, -0.5), (0.9, 0.0), (0.7, 0.3), (np.nan, 0.0)])
    def test_places_out_of_reach(self, place):
        with pytest.raises(ValueError, match=r"red cube at .* is out of reach"):
            build_model([TableObject("red", "cube", place)], None)
        with pytest.raises(ValueError, match=r"bowl at .* is out of reach"):
            build_model([], place)


class TestCamera:
    @pytest.fixture(scope="class")
    @classmethod
    def scene(cls):
        places = [(0.42, -0.15), (0.42, 0.0), (0.42, 0.15), (0.58, -0.15), (0.58, 0.0), (0.58, 0.15)]
        objects = [TableObject(color, "cube", place) for color, place in zip(COLORS, places, strict=True)]
        model = build_model(objects, None)
        data = mujoco.MjData(model)
        mujoco.mj_forward(model, data)
        return model, data

    def test_colours_tell_apart_at_112_pixels(self, scene):
        """Every cube covers pixels whose nearest colour, brightness aside, is its own."""
        picture = make_camera(scene[0], 112).render(scene[1], "front").astype(float)
        assert picture.shape == (112, 112, 3)
        hues = picture / np.linalg.norm(picture, axis=-1, keepdims=True)
        for color in COLORS.values():
            similarity = hues @ (np.array(color) / np.linalg.norm(color))
            assert (similarity > 0.99).sum() >= 12

    def test_a_lamp_casts_shadows(self, scene):
        model, data = scene
        camera = make_camera(model, 64)
        lit = camera.render(data, "front")
        camera.light = camera.light + np.array([0.0, 1.0, 0.0])
        assert (camera.render(data, "front") != lit).any()

    @pytest.mark.parametrize("size", [33, 112])
    @pytest.mark.parametrize("seed", range(4))
    def test_rays_that_are_not_cast_change_nothing(self, seed, size, monkeypatch):
        """Against pictures whose every ray MuJoCo casts; one that grazes an edge may be rounded to its other side."""
        env = make_env(randomize=seed % 2 == 1)
        env.reset(seed=seed)
        expert, camera = Expert(env), make_camera(env.model, size)
        for _ in range(3):
            for _ in range(4):
                env.step(expert.action())
            for name in ("front", "wrist"):
                picture = camera.render(env.data, name)
                with monkeypatch.context() as patch:
                    patch.setattr(camera, "_near_boxes", lambda *where: np.ones((2, *[len(where[-1]) - 1] * 2), bool))
                    difference = np.abs(camera.render(env.data, name).astype(int) - picture).max(axis=-1)
                assert (difference > 1).sum() <= 1
                assert (difference > 0).mean() < 1e-3

    def test_few_rays_are_cast(self, scene, monkeypatch):
        camera, count = make_camera(scene[0], 112), []
        cast = camera._cast
        monkeypatch.setattr(camera, "_cast", lambda *where: (count.append(len(where[-1])), cast(*where))[1])
        camera.render(scene[1], "front")
        assert sum(count) < 0.5 * 2 * 112**2

    def test_randomization_moves_and_turns_cameras_and_changes_the_light(self):
        plain, varied = (make_env(randomize=randomize) for randomize in (False, True))
        for env in (plain, varied):
            env.reset(seed=0)
        for name, turn in (("front", 0.03), ("wrist", 0.02)):
            assert (plain.model.camera(name).pos != varied.model.camera(name).pos).all()
            cosine = np.abs(plain.model.camera(name).quat @ varied.model.camera(name).quat)
            assert 1e-3 < 2 * np.arccos(min(cosine, 1.0)) < turn * 3**0.5
        assert varied.model.light_diffuse[0, 0] != plain.model.light_diffuse[0, 0]
        bright = make_camera(varied.model, 32).render(varied.data, "front")
        varied.model.light_diffuse *= 0.5
        assert make_camera(varied.model, 32).render(varied.data, "front").mean() < bright.mean() - 5

    def test_wrist_camera_sees_the_fingers_and_the_table(self):
        env = make_env(cameras=("image", "wrist_image"), image_size=64)
        observation, _ = env.reset(seed=0)
        dark = (observation["wrist_image"].max(axis=-1) < 70).mean()
        assert 0.01 < dark < 0.3

    @pytest.mark.slow
    @pytest.mark.parametrize("backend", ["osmesa", "egl"])
    def test_renderers_agree(self, backend):
        """Within one grey level on average, so that they can be swapped; edges and shadows may differ by a pixel."""
        result = subprocess.run(
            [sys.executable, "-c", COMPARE_RENDERERS, backend],
            env={**os.environ, "MUJOCO_GL": backend, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        # Without its library, MuJoCo fails while it is imported, or the renderer while it starts.
        if (
            "its library cannot be opened" in result.stderr
            or f"The renderer '{backend}' cannot start" in result.stderr
        ):
            pytest.skip(f"{backend} is not installed: {result.stderr.strip().splitlines()[-1]}")
        assert result.returncode == 0, result.stderr
        differences = [float(value) for value in result.stdout.split()]
        assert len(differences) == 6
        assert max(differences) < 1.0

    def test_unknown_backend(self, scene):
        with pytest.raises(ValueError, match="must be one of"):
            make_camera(scene[0], 32, "vulkan")

    @pytest.mark.parametrize("backend", ["osmesa", "egl"])
    def test_missing_graphics_library(self, scene, backend, monkeypatch):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        with pytest.raises(RuntimeError, match=f"MUJOCO_GL={backend}.*apt-get install"):
            make_camera(scene[0], 32, backend)

    @pytest.mark.parametrize("backend, package", [("osmesa", "libosmesa6"), ("egl", "libegl1")])
    def test_a_library_that_cannot_be_opened(self, backend, package):
        """MuJoCo fails as it is imported, with an error that does not say why."""
        result = subprocess.run(
            [sys.executable, "-c", WITHOUT_GRAPHICS],
            env={**os.environ, "MUJOCO_GL": backend, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(f"ImportError: MUJOCO_GL={backend}, and its library cannot be opened")
        assert f"apt-get install {package}" in last
