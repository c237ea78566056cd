"""
Pictures of the tabletop with what the simulator knows about them: what each pixel shows, where things are, and what
the expert would do in each picture for every goal there is. Labels for a policy that has to learn to see, to find what
the words name, and to act on it.
"""

import math
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from itertools import repeat

import numpy as np
from load_policy import REPOSITORY
from tqdm import tqdm


sys.path.insert(0, str(REPOSITORY))

from tabletop.environment import TabletopEnv
from tabletop.expert import Expert
from tabletop.scene import COLORS, SHAPES
from tabletop.tasks import Goal


OBJECTS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
CLASSES = ["table", "bowl", "robot", *OBJECTS]
BACKGROUND, BOWL, HAND, FIRST_OBJECT = range(4)
NUM_CLASSES = len(CLASSES)
UNKNOWN = NUM_CLASSES  # held out: nothing is said about it
HAND_BODIES = ("hand", "left_finger", "right_finger")
# What can be asked of each object: task and side.
KINDS = (("pick", None), ("put_in_bowl", None), ("push", "left"), ("push", "right"))
# Turns about the vertical after which a shape looks the same: in a full turn, so many.
SYMMETRY = {"cube": 4, "brick": 2}
# Position in metres, cosine and sine of the turn, opening of the fingers in metres: about zero and one of each.
POSE_CENTER = np.array([0.51, 0.0, 0.1, 0.0, 0.0, 0.02], dtype=np.float32)
POSE_SCALE = np.array([0.12, 0.2, 0.1, 1.0, 1.0, 0.02], dtype=np.float32)
POSE_SIZE = len(POSE_SCALE)
# The expert's errors, and how often it takes up another goal: hands far from the way, and from any goal that is asked
# for, are seen, too. Episodes go on for a while after their end.
NOISE = 0.3
CHANGE_OF_GOAL = 0.04
REST = 0.15
MAX_STEPS = 70
# Of the frames in which the hand is farther from what it is to handle, so many are kept: neighbours are alike.
NEAR = 0.05
KEPT_FAR = 0.35


@dataclass
class Frames:
    """
    Pictures of the front camera with what is on them. Goals are numbered object by object, as `KINDS` lists them.

    Args:
        images (`np.ndarray`): uint8 (N, S, S, 3).
        classes (`np.ndarray`): uint8 (N, S, S), what each pixel shows; `UNKNOWN` where nothing is to be learned.
        poses (`np.ndarray`): float32 (N, C, 6), of each class: x, y, z in metres in the robot's base frame, cosine and
            sine of the turn about the vertical, opening of the fingers in metres; NaN where it has none.
        objects (`np.ndarray`): uint8 (N, O), classes of the objects of the scene.
        actions (`np.ndarray`): float32 (N, O * 4, 7), what the expert would do for each goal.
        followed (`np.ndarray`): uint8 (N,), the goal that was followed.
        states (`np.ndarray`): float32 (N, 8), the robot's, as [`TabletopEnv`] observes it.
    """

    images: np.ndarray
    classes: np.ndarray
    poses: np.ndarray
    objects: np.ndarray
    actions: np.ndarray
    followed: np.ndarray
    states: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: np.ndarray | slice) -> "Frames":
        return Frames(*(getattr(self, field.name)[index] for field in fields(self)))

    @staticmethod
    def concatenate(parts: Sequence["Frames"]) -> "Frames":
        return Frames(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(Frames)))


def collect(num_frames: int, image_size: int, known: list[str], seed: int, num_workers: int) -> Frames:
    """
    Frames of as many episodes as it takes.

    Args:
        num_frames (`int`): How many.
        image_size (`int`): Side of the pictures in pixels.
        known (`list[str]`): Names of the objects that may be handled and named; others only stand by.
        seed (`int`): Of the first episode; each has its own.
        num_workers (`int`): Processes that run the simulator.
    """
    found: list[Frames] = []
    with ProcessPoolExecutor(num_workers) as pool, tqdm(total=num_frames, desc="frames") as bar:
        while bar.n < num_frames:
            seeds = range(seed, seed + 32)
            seed += len(seeds)
            for episode in pool.map(collect_episode, seeds, repeat(image_size), repeat(known)):
                found.append(episode)
                bar.update(len(episode))
    return Frames.concatenate(found)[slice(num_frames)]


def collect_episode(seed: int, image_size: int, known: list[str]) -> Frames:
    """What the front camera sees while a noisy expert handles known objects, now for one goal, now for another."""
    env = TabletopEnv(image_size=image_size, cameras=(), objects=known, max_steps=MAX_STEPS)
    observation, _ = env.reset(seed=seed)
    rng, found, ended = np.random.default_rng([seed, 1]), [], False  # not the one that the scene is drawn from
    goals = all_goals(env)
    experts, names = [Expert(env, goal) for goal in goals], [goal.target for goal in goals]
    allowed = [number for number, name in enumerate(names) if name in known]
    own = (env.goal.task, env.goal.target, env.goal.side)
    followed = next(number for number, goal in enumerate(goals) if (goal.task, goal.target, goal.side) == own)
    classes = geom_classes(env, known)
    objects = [FIRST_OBJECT + OBJECTS.index(item.name) for item in env.objects]
    while not ended:
        way = env.data.body(names[followed]).xpos - env.data.site("grasp").xpos
        if not found or np.linalg.norm(way) < NEAR or rng.random() < KEPT_FAR:
            picture, geoms = env.camera.render_with_geoms(env.data, "front")
            actions = np.stack([expert.action() for expert in experts])
            labels = classes[geoms], class_poses(env), np.uint8(objects), actions, np.uint8(followed)
            found.append((picture, *labels, observation["state"]))
        if rng.random() < CHANGE_OF_GOAL:
            followed = int(rng.choice(allowed))
        observation, _, _, truncated, info = env.step(experts[followed].noisy_action(rng, NOISE))
        over = info["outcome"] in ("success", "wrong_object") and rng.random() < REST
        ended = truncated or over or info["outcome"] == "dropped"
    env.close()
    return Frames(*(np.stack(column) for column in zip(*found, strict=True)))


def all_goals(env: TabletopEnv) -> list[Goal]:
    """Every kind of goal for every object, in the order of [`Frames`]."""
    starts = [(item.name, tuple(env.data.body(item.name).xpos)) for item in env.objects]
    return [Goal(task, name, start, side) for name, start in starts for task, side in KINDS]


def geom_classes(env: TabletopEnv, known: list[str]) -> np.ndarray:
    """Class of each geometry of the scene, uint8 (G + 1,); the last one is the sky."""
    classes = {name: FIRST_OBJECT + index if name in known else UNKNOWN for index, name in enumerate(OBJECTS)}
    classes |= {"bowl": BOWL} | dict.fromkeys(HAND_BODIES, HAND)
    names = [env.model.body(body).name for body in env.model.geom_bodyid]
    return np.array([*(classes.get(name, BACKGROUND) for name in names), BACKGROUND], dtype=np.uint8)


def class_poses(env: TabletopEnv) -> np.ndarray:
    """float32 (C, 6), as [`Frames`] has them."""
    poses = np.full((NUM_CLASSES, POSE_SIZE), np.nan, dtype=np.float32)
    poses[BOWL, :3] = env.data.body("bowl").xpos
    site = env.data.site("grasp")
    poses[HAND] = [*site.xpos, *_turn(site.xmat, 1), env.data.qpos[7]]
    for item in env.objects:
        body = env.data.body(item.name)
        turn = _turn(body.xmat, SYMMETRY[item.shape]) if item.shape in SYMMETRY else (np.nan, np.nan)
        poses[FIRST_OBJECT + OBJECTS.index(item.name), :5] = [*body.xpos, *turn]
    return poses


def _turn(matrix: np.ndarray, symmetry: int) -> tuple[float, float]:
    angle = symmetry * math.atan2(matrix.reshape(3, 3)[1, 0], matrix.reshape(3, 3)[0, 0])
    return math.cos(angle), math.sin(angle)
