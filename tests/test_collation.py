"""Training batches of steps."""

import io

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import repository_class
from PIL import Image

from robot_data.augmentation import Augmentation
from robot_data.collation import IGNORE_INDEX, Collator, camera_roles
from robot_data.episode import Step


def picture(seed: int, side: int = 112) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_step(frame: int = 0, **changes) -> Step:
    values = {
        "images": {"primary": png(picture(frame)), "wrist": picture(frame + 100)},
        "instruction": "pick up the red cube" if frame % 2 else "lift the ball",
        "action": np.full((1, 7), 0.01 * frame, np.float32),
        "action_is_pad": np.zeros(1, bool),
        "state": None,
        "dataset": "tabletop",
        "episode": 3,
        "frame": frame,
        "seed": frame,
    }
    return Step(**{**values, **changes})


@pytest.fixture
def collated(processor):
    steps = [make_step(frame) for frame in range(4)]
    return steps, Collator(processor)(steps)


def test_equals_the_processor_row_by_row(processor, collated):
    steps, batch = collated
    for row, step in enumerate(steps):
        single = processor(
            instruction=step.instruction,
            images=picture(step.frame),
            actions=step.action[0],
            unnorm_key="tabletop",
        )
        length = single["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask", "labels"):
            torch.testing.assert_close(batch[name][row, :length], single[name][0], rtol=0, atol=0)
        torch.testing.assert_close(batch["pixel_values"][row], single["pixel_values"][0], rtol=0, atol=0)
        assert not batch["attention_mask"][row, length:].any()
        assert (batch["labels"][row, length:] == IGNORE_INDEX).all()


def test_padding_is_as_short_as_the_rows_allow(collated):
    _, batch = collated
    assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1]
    assert batch["attention_mask"].sum(dim=1).min() < batch["input_ids"].shape[1]


def test_labels_are_the_action_and_the_stop_token(processor, collated):
    steps, batch = collated
    for row, step in enumerate(steps):
        labels = batch["labels"][row]
        learned = labels[labels != IGNORE_INDEX].tolist()
        ids = processor.encode_actions(step.action[0], "tabletop").tolist()
        assert learned == [*ids, processor.tokenizer.eos_token_id]


def test_the_stop_token_can_be_left_out(processor, collated):
    steps, batch = collated
    without = Collator(processor, predict_stop_token=False)(steps)
    differs = without["labels"] != batch["labels"]
    assert differs.sum(dim=1).tolist() == [1] * len(steps)
    assert (batch["labels"][differs] == processor.tokenizer.eos_token_id).all()
    torch.testing.assert_close(without["input_ids"], batch["input_ids"], rtol=0, atol=0)


STATE = {"q01": [-1.0] * 8, "q99": [1.0, 3.0] * 4}
STATE |= {"min": STATE["q01"], "max": STATE["q99"], "mean": [0.0] * 8, "std": [1.0] * 8}


@pytest.fixture
def oft():
    """The processor of a policy with a head, two cameras, chunks of three and the state."""
    processor = repository_class("OpenVLAProcessor").from_pretrained(
        TINY_POLICY, head_type="l1", chunk_size=3, num_images=2, use_proprio=True
    )
    processor.norm_stats["tabletop"]["proprio"] = STATE
    return processor


def chunk_steps() -> list[Step]:
    rng = np.random.default_rng(0)
    return [
        make_step(
            frame,
            action=rng.uniform(-0.9, 0.9, (3, 7)).astype(np.float32),
            action_is_pad=np.arange(3) > 2 - frame % 3,
            state=rng.uniform(-1, 1, 8).astype(np.float32),
        )
        for frame in range(4)
    ]


def test_a_head_gets_cameras_state_and_normalised_chunks(oft):
    steps = chunk_steps()
    batch = Collator(oft)(steps)
    assert set(batch) == {
        *("input_ids", "attention_mask", "labels", "pixel_values", "proprio", "actions", "action_is_pad")
    }
    action = oft.norm_stats["tabletop"]["action"]
    low, high, mask = (np.array(action[name]) for name in ("q01", "q99", "mask"))
    for row, step in enumerate(steps):
        pictures = [oft.image_processor(picture(seed))["pixel_values"][0] for seed in (step.frame, step.frame + 100)]
        torch.testing.assert_close(batch["pixel_values"][row], torch.cat(pictures), rtol=0, atol=0)
        expected = np.clip(2 * (step.state - STATE["q01"]) / (np.array(STATE["q99"]) - STATE["q01"]) - 1, -1, 1)
        np.testing.assert_allclose(batch["proprio"][row], expected, atol=1e-6)
        expected = np.where(mask, 2 * (step.action - low) / np.where(mask, high - low, 1) - 1, step.action)
        np.testing.assert_allclose(batch["actions"][row], expected, atol=1e-6)
        labels = batch["labels"][row]
        is_action = labels != IGNORE_INDEX
        assert labels[is_action].tolist() == oft.encode_actions(step.action, "tabletop").flatten().tolist()
        assert batch["input_ids"][row][is_action].tolist() == labels[is_action].tolist()
    assert batch["action_is_pad"].tolist() == [step.action_is_pad.tolist() for step in steps]
    assert (batch["actions"].dtype, batch["actions"].shape) == (torch.float32, (4, 3, 7))


def test_tokens_of_chunks(oft):
    """The stop token is learned behind them, padded actions keep their places, and there are no other actions."""
    oft.head_type, oft.use_proprio = "tokens", False
    steps = chunk_steps()
    batch = Collator(oft)(steps)
    assert not {"actions", "proprio"} & set(batch)
    for row, step in enumerate(steps):
        labels = batch["labels"][row]
        ids = oft.encode_actions(step.action, "tabletop").flatten().tolist()
        assert labels[labels != IGNORE_INDEX].tolist() == [*ids, oft.tokenizer.eos_token_id]


def test_single_actions_are_never_padded(collated):
    assert collated[1]["action_is_pad"].tolist() == [[False]] * 4
    assert not {"actions", "proprio"} & set(collated[1])


def test_roles_of_cameras():
    assert camera_roles(1) == ("primary",)
    assert camera_roles(4) == ("primary", "wrist", "wrist_2", "wrist_3")


def test_each_camera_is_augmented_by_itself(oft):
    same = {"primary": picture(5), "wrist": picture(5)}
    (step, *_) = chunk_steps()
    step.images = same
    augmentation = Augmentation()
    (pixels,) = Collator(oft, augmentation=augmentation)([step])["pixel_values"]
    resized = oft.image_processor.resize(picture(5))
    for camera, expected in enumerate(pixels.chunk(2)):
        augmented = oft.image_processor(augmentation(resized, step.seed + camera))["pixel_values"][0]
        torch.testing.assert_close(augmented, expected, rtol=0, atol=0)
    assert not torch.equal(*pixels.chunk(2))


def test_another_camera(processor):
    batch = Collator(processor, cameras=("wrist",))([make_step(1)])
    expected = processor.image_processor(picture(101))["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=0)


def test_augmentation_is_the_steps_own(processor):
    """The same step gives the same picture in any batch; another seed another one; resized first, augmented then."""
    augmentation = Augmentation()
    collator = Collator(processor, augmentation=augmentation)
    large = {"primary": picture(5, side=300)}
    step, twin, other = (make_step(1, images=large, seed=seed) for seed in (7, 7, 8))
    pixels = collator([make_step(2), step, twin, other])["pixel_values"]
    torch.testing.assert_close(pixels[1], pixels[2], rtol=0, atol=0)
    torch.testing.assert_close(collator([step])["pixel_values"][0], pixels[1], rtol=0, atol=0)
    assert not torch.equal(pixels[1], pixels[3])
    resized = processor.image_processor.resize(large["primary"])
    expected = processor.image_processor(augmentation(resized, 7))["pixel_values"][0]
    torch.testing.assert_close(pixels[1], expected, rtol=0, atol=0)


def test_the_random_crop_takes_the_place_of_the_centre_crop(processor):
    image_processor = processor.image_processor
    image_processor.center_crop_area = 0.5
    still = Augmentation(crop_area=1.0, brightness=0, contrast=0, saturation=0, hue=0)
    plain, augmented = (Collator(processor, augmentation=each)([make_step(1)]) for each in (None, still))
    whole = image_processor(picture(1), do_center_crop=False)["pixel_values"]
    assert not torch.equal(plain["pixel_values"], whole)
    # Up to one grey level of 255, scaled by the smallest standard deviation of the towers.
    spread = min(min(std) for std in image_processor.stds)
    torch.testing.assert_close(augmented["pixel_values"], whole, rtol=0, atol=1.01 / 255 / spread)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": {"wrist": picture(0)}}, "tabletop, episode 3, frame 0 has no camera 'primary'; it has ['wrist']"),
        ({"images": {"primary": b"\x89PNG broken"}}, "tabletop, episode 3, frame 0, camera 'primary': A picture of"),
        ({"images": {"primary": b""}}, "frame 0, camera 'primary': The picture is empty"),
        ({"action": np.zeros((2, 7), np.float32)}, "frame 0 has a chunk of 2 actions; the policy's chunks have 1"),
        ({"instruction": " "}, "Every instruction needs words"),
    ],
)
def test_bad_steps_are_named(processor, changes, message):
    with pytest.raises(ValueError) as error:
        Collator(processor)([make_step(**changes)])
    assert message in str(error.value)


def test_unknown_dataset(processor):
    with pytest.raises(ValueError, match="moon"):
        Collator(processor)([make_step(dataset="moon")])


def test_a_missing_state_is_named(oft):
    (step, *_) = chunk_steps()
    step.state = None
    with pytest.raises(ValueError, match="tabletop, episode 3, frame 0 has no state, and the policy takes one"):
        Collator(oft)([step])
