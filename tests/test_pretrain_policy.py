"""A small policy that learns to see the tabletop and what words mean: labels, questions, and learning from them."""

import argparse

import mujoco
import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from init_policy import make_statistics
from labelled_frames import (
    BACKGROUND,
    BOWL,
    FIRST_OBJECT,
    HAND,
    KINDS,
    NUM_CLASSES,
    OBJECTS,
    UNKNOWN,
    Frames,
    all_goals,
    class_poses,
    collect,
    collect_episode,
)
from load_policy import load_policy, repository_class
from pretrain_policy import (
    ACTION_DIM,
    Listening,
    Prompts,
    Seeing,
    draw_goals,
    listen,
    looked_at,
    normalized,
    patch_poses,
    patch_shares,
    see,
)

from tabletop.environment import TabletopEnv
from tabletop.expert import Expert
from tabletop.scene import COLORS
from tabletop.tasks import WORDINGS


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


def test_actions_are_the_experts_for_every_goal(episode):
    env = TabletopEnv(cameras=())
    env.reset(seed=3)
    assert [OBJECTS[number - FIRST_OBJECT] for number in episode.objects[0]] == [item.name for item in env.objects]
    expected = np.stack([Expert(env, goal).action() for goal in all_goals(env)])
    np.testing.assert_allclose(episode.actions[0], expected, atol=1e-6)
    own = all_goals(env)[episode.followed[0]]
    assert (own.task, own.target, own.side) == (env.goal.task, env.goal.target, env.goal.side)


def test_only_known_objects_are_handled():
    known = [name for name in OBJECTS if "cube" in name]
    episode = collect_episode(1, 16, known)
    followed = episode.objects[np.arange(len(episode)), episode.followed // len(KINDS)]
    assert {OBJECTS[number - FIRST_OBJECT] for number in followed} <= set(known)


def test_patches():
    """Four patches of 2 x 2 pixels: background, half an object, an object over the bowl, what is held out."""
    classes = np.array([[0, 0, 0, 9], [0, 0, 0, 9], [9, 9, 28, 28], [9, 1, 28, 28]], dtype=np.uint8)
    classes[classes == 28] = UNKNOWN
    poses = np.full((1, UNKNOWN, 6), np.nan, dtype=np.float32)
    poses[0, 9] = np.arange(6)
    poses[0, BOWL] = 7.0
    shares = patch_shares(classes[None], 2)
    assert shares.shape == (1, 4, UNKNOWN)
    assert shares[0, 0, BACKGROUND] == 1.0
    assert (shares[0, 1, BACKGROUND], shares[0, 1, 9]) == (0.5, 0.5)
    assert (shares[0, 2, 9], shares[0, 2, BOWL]) == (0.75, 0.25)
    assert shares[0, 3].sum() == 0.0
    targets = patch_poses(shares, normalized(poses))
    assert targets[0, [0, 3]].isnan().all()
    torch.testing.assert_close(targets[0, [1, 2]], normalized(poses)[0, [9, 9]])


def test_attention_on_an_object():
    shares = torch.zeros(1, 3, NUM_CLASSES)
    shares[0, 1, 9], shares[0, 2, 9], shares[0, 0, BOWL] = 0.8, 0.4, 0.5
    looks = torch.tensor([0.1, 0.2, 0.6]).expand(1, 1, 2, 2, 1, 3)  # one layer, two heads, two questions
    hits, is_seen = looked_at(looks, shares, torch.tensor([[[9, BOWL], [10, BOWL]]]))
    expected = torch.tensor([[0.2 + 0.5 * 0.6, 0.0], [0.1, 0.1]])
    torch.testing.assert_close(hits[0, 0, :, :, 0], expected)
    assert is_seen.tolist() == [[[True, False], [True, True]]]


# Questions


def test_goals_name_all_objects_before_one_again():
    rng, objects = np.random.default_rng(0), np.array([3, 9, 14, 20])
    asked_first = 0
    for _ in range(200):
        goals = draw_goals(objects, 5, [3, 9, 20], 5, rng)
        places = [goal // len(KINDS) for goal in goals]
        assert set(places) == {0, 1, 3}
        assert len(set(goals)) == 5
        asked_first += goals[0] == 5
    assert 120 < asked_first < 190
    assert set(draw_goals(objects, 5, [9], 6, rng)) == {4, 5, 6, 7}
    for _ in range(200):
        goals = draw_goals(objects, 5, objects.tolist(), 4, rng)
        assert {goal // len(KINDS) for goal in goals} == {0, 1, 2, 3}


def test_nothing_is_said_about_what_is_held_out():
    """Neither the word of its colour nor that of its shape learns from pictures in which it stands by."""
    model, processor = load_policy(TINY_POLICY, dtype=torch.float32)
    known = [name for name in OBJECTS if "purple" not in name and "ball" not in name]
    seeing = Seeing(model, processor, known)
    seeing.loss(collect_episode(0, SIZE, known)[slice(4)]).backward()
    words = {
        text: processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("purple", "ball", "red")
    }
    norms = {text: model.get_input_embeddings().weight.grad[ids].norm() for text, ids in words.items()}
    assert norms["red"] > 0.0
    assert norms["purple"] == norms["ball"] == 0.0


@pytest.fixture(scope="module")
def policy():
    return load_policy(TINY_POLICY, dtype=torch.float32)


def test_prompts_are_the_processors(policy):
    _, processor = policy
    prompts = Prompts(processor, ["red cube", "blue ball"], SIZE)
    blank = np.zeros((SIZE, SIZE, 3), np.uint8)
    for (kind, number), options in prompts.ends.items():
        task, side = KINDS[kind]
        name = OBJECTS[number - FIRST_OBJECT]
        assert len(options) == len(WORDINGS[task])
        for text, (end, named) in zip(WORDINGS[task], options, strict=True):
            expected = processor(instruction=text.format(object=name, side=side), images=blank)["input_ids"][
                0
            ].tolist()
            assert prompts.start + end == expected
            assert processor.tokenizer.decode(end[: named + 1]).endswith(name)


@pytest.mark.parametrize("use_proprio", [False, True])
def test_answers_are_those_of_the_policy_alone(use_proprio):
    """Packed as branches behind one picture, questions are answered as by the policy's own forward, one by one."""
    torch.manual_seed(0)
    processor = repository_class("OpenVLAProcessor").from_pretrained(TINY_POLICY, use_proprio=use_proprio)
    model = repository_class("OpenVLAForActionPrediction").from_pretrained(
        TINY_POLICY, dtype=torch.float32, use_proprio=use_proprio, proprio_dim=8 if use_proprio else None
    )
    model.norm_stats = processor.norm_stats = make_statistics("tabletop")
    episode = collect_episode(0, SIZE, OBJECTS)[slice(2)]
    seeing = Seeing(model, processor, OBJECTS)
    listening = Listening(model, processor, Prompts(processor, OBJECTS, SIZE), 3)
    asked = listening.ask(episode, np.random.default_rng(0))
    with torch.no_grad():
        states = listening.normalized_states(episode)
        features = model.get_image_features(seeing.pixel_values(episode))
        poses, logits, looks = listening(features, states, asked.ids, asked.allowed, asked.position_ids)
        for row, column in np.ndindex(2, 3):
            goal = int(asked.goals[row, column])
            place, kind = divmod(goal, len(KINDS))
            ends = listening.prompts.ends[kind, int(episode.objects[row, place])]
            branch = asked.ids[row, column].tolist()
            (end,) = [end for end, _ in ends if branch[-6 - len(end) : -6] == end]
            ids = torch.tensor([listening.prompts.start + end + branch[-6:]])
            answer = processor.encode_actions(episode.actions[row, goal])
            assert branch[-6:] == answer[:-1].tolist()
            alone = episode[slice(row, row + 1)]
            proprio = {"proprio": listening.normalized_states(alone)} if use_proprio else {}
            read = {"output_attentions": True, "output_hidden_states": True}
            output = model(input_ids=ids, pixel_values=seeing.pixel_values(alone), **proprio, **read)
            actions = slice(model.config.action_token_begin, model.config.action_token_end)
            torch.testing.assert_close(logits[row, column], output.logits[0, -ACTION_DIM:, actions], atol=1e-4, rtol=0)
            length = ids.shape[1] - len(listening.prompts.start)
            expected = listening.pose_readout(output.hidden_states[-1][0, -length:]).unflatten(-1, (3, 6))
            torch.testing.assert_close(poses[row, column, -length:], expected, atol=1e-4, rtol=0)
            attentions = torch.stack([output.attentions[layer][0, :2] for layer in listening.looking_layers])
            patches = attentions[:, :, -length:, 1 : 1 + listening.num_patches]
            torch.testing.assert_close(looks[row, :, :, column, -length:], patches, atol=1e-5, rtol=0)
            if use_proprio:
                other = model(input_ids=ids, pixel_values=seeing.pixel_values(alone), proprio=proprio["proprio"] + 1)
                assert (other.logits - output.logits).abs().max() > 1e-3


def test_pictures_that_show_no_object(policy):
    """An arm may hide them all: there is nothing to look at, and no loss of it."""
    model, processor = policy
    episode = collect_episode(0, SIZE, OBJECTS)[slice(2)]
    seeing = Seeing(model, processor, OBJECTS)
    listening = Listening(model, processor, Prompts(processor, OBJECTS, SIZE), 3)
    shares = patch_shares(np.full_like(episode.classes, HAND), seeing.grid)
    loss, found = listening.losses(episode, seeing.features(episode), shares, np.random.default_rng(0))
    assert loss.isfinite()
    assert len(found["looks"]) == 0


@pytest.mark.slow
def test_it_learns_to_see_and_to_listen():
    model, processor = load_policy(TINY_POLICY, dtype=torch.float32)
    torch.manual_seed(0)
    frames = collect(120, SIZE, OBJECTS, seed=0, num_workers=1)
    seeing = Seeing(model, processor, OBJECTS)
    listening = Listening(model, processor, Prompts(processor, OBJECTS, SIZE), 4)
    names = {"see_epochs": 20, "see_batch_size": 8, "listen_epochs": 8, "listen_batch_size": 8}
    arguments = argparse.Namespace(seed=0, learning_rate=1e-3, torch_compile=False, **names)
    before = {**seeing.validate(frames), **listening.validate(frames, seeing.features(frames))}
    see(seeing, frames, frames, arguments)
    listen(listening, seeing, frames, frames, arguments)
    after = {**seeing.validate(frames), **listening.validate(frames, seeing.features(frames))}
    assert after["class_accuracy"] > max(0.8, before["class_accuracy"])
    assert after["patch_mm"] < 0.8 * before["patch_mm"]
    assert after["looks"] > 1.5 * before["looks"]
    assert after["named_object_mm"] < 0.8 * before["named_object_mm"]
    assert after["action_loss"] < 0.5 * before["action_loss"]
