"""A small policy that learns to see the tabletop and what words mean: labels, questions, and learning from them."""

import argparse

import mujoco
import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from load_policy import load_policy
from pretrain_policy import (
    BACKGROUND,
    BOWL,
    FIRST_OBJECT,
    HAND,
    OBJECTS,
    POSE_CENTER,
    POSE_SCALE,
    UNKNOWN,
    Frames,
    GroundingTrainer,
    ask,
    class_poses,
    collect,
    collect_episode,
    patch_targets,
    pretrain,
)

from tabletop.environment import NUM_OBJECTS, TabletopEnv
from tabletop.scene import COLORS


SIZE = 112


@pytest.fixture(scope="module")
def episode() -> Frames:
    return collect_episode(3, SIZE, OBJECTS)


def test_pictures_are_those_of_the_environment(episode):
    observation, _ = TabletopEnv(image_size=SIZE, cameras=("image",)).reset(seed=3)
    np.testing.assert_array_equal(episode.images[0], observation["image"])


def test_pixels_have_the_color_of_their_class(episode):
    """In light and in shadow alike, an object's largest channel is that of its colour."""
    seen = [number for number in np.unique(episode.classes) if number >= FIRST_OBJECT]
    assert seen
    for number in seen:
        color = COLORS[OBJECTS[number - FIRST_OBJECT].split()[0]]
        pixels = episode.images[episode.classes == number]
        assert (pixels.argmax(axis=1) == np.argmax(color)).mean() > 0.95
    assert {BACKGROUND, BOWL, HAND} < set(np.unique(episode.classes))


def test_objects_project_to_their_pixels():
    """The centre of an object, through the camera, lies on pixels of its class."""
    episode, env = collect_episode(8, SIZE, OBJECTS), TabletopEnv(image_size=SIZE, cameras=())
    env.reset(seed=8)
    camera = env.data.camera("front")
    focal = 0.5 * SIZE / np.tan(np.deg2rad(env.model.camera("front").fovy[0]) / 2)
    for item in env.objects:
        number = FIRST_OBJECT + OBJECTS.index(item.name)
        x, y, z = camera.xmat.reshape(3, 3).T @ (episode.poses[0, number, :3] - camera.xpos)
        column, row = (np.array([x, -y]) / -z * focal + SIZE / 2).astype(int)
        assert number in episode.classes[0, row - 1 : row + 2, column - 1 : column + 2]


def test_what_is_held_out_is_never_named():
    known = [name for name in OBJECTS if "ball" not in name]
    frames = [collect_episode(seed, 32, known) for seed in range(6)]
    classes = np.unique(np.concatenate([each.classes for each in frames]))
    assert UNKNOWN in classes
    assert not {FIRST_OBJECT + OBJECTS.index(name) for name in OBJECTS if "ball" in name} & set(classes.tolist())


def test_turn_is_the_same_for_shapes_that_look_the_same():
    env = TabletopEnv(cameras=())
    env.reset(seed=0, options={"target": "red cube"})
    number = FIRST_OBJECT + OBJECTS.index("red cube")
    joint = env.model.joint("red cube").qposadr[0]
    found = []
    for turn in (0.3, 0.3 + np.pi / 2):
        env.data.qpos[joint + 3 : joint + 7] = [np.cos(turn / 2), 0, 0, np.sin(turn / 2)]
        mujoco.mj_kinematics(env.model, env.data)
        found.append(class_poses(env)[number, 3:5])
    np.testing.assert_allclose(found[0], [np.cos(1.2), np.sin(1.2)], atol=1e-6)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


def test_patch_targets():
    """Four patches of 2 x 2 pixels: background, half an object, an object over the bowl, what is held out."""
    classes = np.array([[0, 0, 0, 9], [0, 0, 0, 9], [9, 9, 28, 28], [9, 1, 28, 28]], dtype=np.uint8)
    classes[classes == 28] = UNKNOWN
    poses = np.full((1, UNKNOWN, 6), np.nan, dtype=np.float32)
    poses[0, 9] = np.arange(6)
    poses[0, BOWL] = 7.0
    shares, targets = patch_targets(Frames(np.zeros((1, 4, 4, 3), np.uint8), classes[None], poses), 2)
    assert shares.shape == (1, 4, UNKNOWN)
    assert shares[0, 0, BACKGROUND] == 1.0
    assert (shares[0, 1, BACKGROUND], shares[0, 1, 9]) == (0.5, 0.5)
    assert (shares[0, 2, 9], shares[0, 2, BOWL]) == (0.75, 0.25)
    assert shares[0, 3].sum() == 0.0
    assert targets[0, [0, 3]].isnan().all()
    expected = torch.from_numpy((np.arange(6) - POSE_CENTER) / POSE_SCALE)
    torch.testing.assert_close(targets[0, [1, 2]].double(), expected.double().expand(2, -1))


def test_every_object_is_asked_for():
    """Of each, the pose that is asked for is that of the object in the words, and the hand's."""
    episode = collect_episode(3, 16, OBJECTS)
    rows, instructions, targets = ask(episode, OBJECTS, np.random.default_rng(0))
    np.testing.assert_array_equal(rows, np.repeat(np.arange(len(episode)), NUM_OBJECTS))
    for row, text, target in zip(rows, instructions, targets.numpy(), strict=True):
        (name,) = [name for name in OBJECTS if name in text]
        expected = episode.poses[row, [FIRST_OBJECT + OBJECTS.index(name), HAND]]
        np.testing.assert_allclose(target * POSE_SCALE + POSE_CENTER, expected, atol=1e-5)
    assert len(set(instructions[:NUM_OBJECTS])) == NUM_OBJECTS


def test_only_known_objects_are_asked_for():
    env = TabletopEnv(cameras=())
    env.reset(seed=3)
    known = [env.objects[1].name]
    rows, instructions, _ = ask(collect_episode(3, 16, OBJECTS), known, np.random.default_rng(0))
    assert all(known[0] in text for text in instructions)
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_answer_is_read_behind_the_instruction(side):
    """From the last tokens of the prompt, on whichever side shorter rows are padded."""
    model, processor = load_policy(REPOSITORY, dtype=torch.float32)
    processor.tokenizer.padding_side = side
    frames = collect_episode(0, model.config.image_sizes[0], OBJECTS)[slice(2)]
    trainer = GroundingTrainer(model, processor)
    texts = ["pick up the red cube", "drop the orange cylinder in the bowl"]
    together = trainer.read(frames, texts)[2]
    alone = [trainer.read(frames[slice(i, i + 1)], texts[i : i + 1])[2] for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), atol=2e-2, rtol=0)
    assert (alone[0] - alone[1]).abs().max() > 2e-2


@pytest.mark.slow
def test_it_learns_to_see_and_to_listen():
    model, processor = load_policy(REPOSITORY, dtype=torch.float32)
    torch.manual_seed(0)
    trainer = GroundingTrainer(model, processor)
    frames = collect(120, model.config.image_sizes[0], OBJECTS, seed=0, num_workers=1)
    before = trainer.validate(frames, OBJECTS)
    arguments = argparse.Namespace(seed=0, epochs=6, batch_size=8, learning_rate=1e-3)
    pretrain(trainer, frames, frames, OBJECTS, arguments)
    after = trainer.validate(frames, OBJECTS)
    assert after["class_accuracy"] > max(0.8, before["class_accuracy"])
    assert after["patch_mm"] < 0.8 * before["patch_mm"]
    assert after["named_object_mm"] < 0.8 * before["named_object_mm"]
