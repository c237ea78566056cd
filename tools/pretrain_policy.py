"""
Teach a small policy to see the tabletop and to know what it is told of, before it learns to act.

    python tools/init_policy.py --output_dir untrained
    python tools/pretrain_policy.py --policy untrained --output_dir pretrained

Published policies start from a vision-language model: towers that have seen the world's pictures, and a language
model that knows what words mean. A small policy that is trained from scratch has neither. Here each patch token learns
to be like the words for what the patch shows, and where that is, and the end of the prompt where the object lies that
the instruction names, and where the hand is. Every known object of a picture is asked for: only the words tell which.
Labels come from the simulator, through linear layers that are thrown away afterwards.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from load_policy import REPOSITORY, load_policy
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin, set_seed


sys.path.insert(0, str(REPOSITORY))

from tabletop.environment import TabletopEnv
from tabletop.expert import Expert
from tabletop.record import Recording
from tabletop.scene import COLORS, SHAPES
from tabletop.tasks import SIDES, TASKS, WORDINGS


OBJECTS = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
CLASSES = ["table", "bowl", "robot", *OBJECTS]
BACKGROUND, BOWL, HAND, FIRST_OBJECT = range(4)
NUM_CLASSES = len(CLASSES)
UNKNOWN = NUM_CLASSES  # held out: nothing is said about it
HAND_BODIES = ("hand", "left_finger", "right_finger")
# Turns about the vertical after which a shape looks the same: in a full turn, so many.
SYMMETRY = {"cube": 4, "brick": 2}
# Position in metres, cosine and sine of the turn, opening of the fingers in metres: about zero and one of each.
POSE_CENTER = np.array([0.51, 0.0, 0.1, 0.0, 0.0, 0.02], dtype=np.float32)
POSE_SCALE = np.array([0.12, 0.2, 0.1, 1.0, 1.0, 0.02], dtype=np.float32)
POSE_SIZE = len(POSE_SCALE)
# Tokens that are to know the object, up to the end of the prompt: the words that name it stand among them, and find it
# in one step of attention, from which the others copy.
PROMPT_END = 11
LIKENESS_SCALE = 4.0  # embeddings are small at the start
NOISE = 0.5  # of the expert: hands off the straight way are seen, too


@dataclass
class Frames:
    """
    Pictures of the front camera with what is on them.

    Args:
        images (`np.ndarray`): uint8 (N, S, S, 3).
        classes (`np.ndarray`): uint8 (N, S, S), what each pixel shows; `UNKNOWN` where nothing is to be learned.
        poses (`np.ndarray`): float32 (N, C, 6), of each class: x, y, z in metres in the robot's base frame, cosine and
            sine of the turn about the vertical, opening of the fingers in metres; NaN where it has none.
    """

    images: np.ndarray
    classes: np.ndarray
    poses: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: np.ndarray | slice) -> "Frames":
        return Frames(self.images[index], self.classes[index], self.poses[index])

    @staticmethod
    def concatenate(parts: list["Frames"]) -> "Frames":
        return Frames(*(np.concatenate([getattr(part, name) for part in parts]) for name in Frames.__annotations__))


# Frames of the simulator


def collect_episode(seed: int, image_size: int, known: list[str]) -> Frames:
    """What the front camera sees while a noisy expert handles one of the known objects."""
    env = TabletopEnv(image_size=image_size, cameras=(), objects=known)
    env.reset(seed=seed)
    rng, expert, found, ended = np.random.default_rng(seed), Expert(env), [], False
    classes = geom_classes(env, known)
    while not ended:
        picture, geoms = env.camera.render_with_geoms(env.data, "front")
        found.append((picture, classes[geoms], class_poses(env)))
        _, _, terminated, truncated, _ = env.step(expert.noisy_action(rng, NOISE))
        ended = terminated or truncated
    env.close()
    return Frames(*(np.stack(column) for column in zip(*found, strict=True)))


def geom_classes(env: TabletopEnv, known: list[str]) -> np.ndarray:
    """Class of each geometry of the scene, uint8 (G + 1,); the last one is the sky."""
    classes = {name: FIRST_OBJECT + index if name in known else UNKNOWN for index, name in enumerate(OBJECTS)}
    classes |= {"bowl": BOWL} | dict.fromkeys(HAND_BODIES, HAND)
    names = [env.model.body(body).name for body in env.model.geom_bodyid]
    return np.array([*(classes.get(name, BACKGROUND) for name in names), BACKGROUND], dtype=np.uint8)


def class_poses(env: TabletopEnv) -> np.ndarray:
    """float32 (C, 6), as [`Frames`] has them."""
    poses = np.full((NUM_CLASSES, 6), np.nan, dtype=np.float32)
    poses[BOWL] = [*env.data.body("bowl").xpos, 0.0, 0.0, 0.0]
    site = env.data.site("grasp")
    poses[HAND] = [*site.xpos, *_turn(site.xmat, 1), env.data.qpos[7]]
    for item in env.objects:
        body = env.data.body(item.name)
        turn = _turn(body.xmat, SYMMETRY[item.shape]) if item.shape in SYMMETRY else (0.0, 0.0)
        poses[FIRST_OBJECT + OBJECTS.index(item.name)] = [*body.xpos, *turn, 0.0]
    return poses


def _turn(matrix: np.ndarray, symmetry: int) -> tuple[float, float]:
    angle = symmetry * math.atan2(matrix.reshape(3, 3)[1, 0], matrix.reshape(3, 3)[0, 0])
    return math.cos(angle), math.sin(angle)


def collect(num_frames: int, image_size: int, known: list[str], seed: int, num_workers: int) -> Frames:
    """Frames of as many episodes as it takes."""
    found: list[Frames] = []
    with ProcessPoolExecutor(num_workers) as pool, tqdm(total=num_frames, desc="frames") as bar:
        while bar.n < num_frames:
            seeds = range(seed, seed + 32)
            seed += len(seeds)
            for episode in pool.map(collect_episode, seeds, repeat(image_size), repeat(known)):
                found.append(episode)
                bar.update(len(episode))
    return Frames.concatenate(found)[slice(num_frames)]


# Learning


def patch_targets(frames: Frames, grid: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each patch is to tell.

    Args:
        frames ([`Frames`]): B of them.
        grid (`int`): Patches along a side.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Share of each class in the patch, float32 (B, P, C); pose of the largest
        one that has a pose, float32 (B, P, 6), normalised, NaN where there is none.
    """
    count, side = frames.classes.shape[:2]
    patches = frames.classes.reshape(count, grid, side // grid, grid, side // grid).swapaxes(2, 3)
    patches = torch.from_numpy(patches.reshape(count, grid * grid, -1).astype(np.int64))  # (B, P, pixels)
    counts = torch.zeros(count, grid * grid, NUM_CLASSES + 1).scatter_add_(2, patches, torch.ones(patches.shape))
    shares = counts[..., :UNKNOWN] / patches.shape[2]
    shown = shares[..., 1:].max(dim=-1)
    poses = torch.from_numpy((frames.poses - POSE_CENTER) / POSE_SCALE)
    chosen = poses[torch.arange(count)[:, None], shown.indices + 1]  # (B, P, 6)
    chosen[shown.values == 0] = torch.nan
    return shares, chosen


class GroundingTrainer:
    """
    A policy with linear layers that read the labels from its patch tokens and from the end of its prompt. Classes of
    patches are told by their likeness to the embedding of the words for them, in which the prompt asks.

    Args:
        model ([`PreTrainedModel`]): The policy.
        processor ([`ProcessorMixin`]): Of the policy.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin):
        self.model, self.processor = model, processor
        self.grid = math.isqrt(model.config.towers[0].num_patches)
        width = model.config.text_config.hidden_size
        self.word_ids = [processor.tokenizer(name, add_special_tokens=False)["input_ids"] for name in CLASSES]
        self.class_bias = torch.nn.Parameter(torch.zeros(NUM_CLASSES))
        self.patch_readout = torch.nn.Linear(width, POSE_SIZE)
        self.prompt_readout = torch.nn.Linear(width, 2 * POSE_SIZE)

    def parameters(self) -> list[torch.nn.Parameter]:
        modules = (self.model, self.patch_readout, self.prompt_readout)
        return [self.class_bias, *(each for module in modules for each in module.parameters() if each.requires_grad)]

    def read(self, frames: Frames, instructions: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        What the policy has to say.

        Args:
            frames ([`Frames`]): B of them.
            instructions (`list[str]`): One for each.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Logits of the patches' classes (B, P, C), their
            normalised poses (B, P, 6), and those of the object and of the hand at the end of the prompt
            (B, N, 2, 6), N times.
        """
        inputs = self.processor(instruction=instructions, images=list(frames.images), padding=True)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.model(**inputs, output_hidden_states=True, output_projector_features=True, logits_to_keep=1)
            poses = self.patch_readout(output.projector_features).float()
            prompt = self.prompt_readout(_end_of_prompt(output.hidden_states[-1], inputs["attention_mask"])).float()
        embeddings = self.model.get_input_embeddings().weight
        words = torch.stack([embeddings[ids].sum(dim=0) for ids in self.word_ids])  # (C, H)
        logits = LIKENESS_SCALE * output.projector_features.float() @ words.T + self.class_bias
        return logits, poses, prompt.unflatten(-1, (2, POSE_SIZE))

    def loss(self, frames: Frames, known: list[str], rng: np.random.Generator) -> torch.Tensor:
        """Of one batch, in which every known object is asked for."""
        rows, instructions, targets = ask(frames, known, rng)
        frames = frames[rows]
        logits, poses, prompt = self.read(frames, instructions)
        shares, patch_poses = patch_targets(frames, self.grid)
        seen = F.cross_entropy(logits.transpose(1, 2), shares.transpose(1, 2)) + _distance(poses, patch_poses)
        return seen + _distance(prompt, targets[:, None].expand_as(prompt))

    @torch.no_grad()
    def validate(self, frames: Frames, known: list[str]) -> dict[str, float]:
        """Patches whose class is right, and middle errors of positions in millimetres."""
        hits, patch_errors, object_errors = [], [], []
        rng = np.random.default_rng(0)
        for batch in batches(frames, 32, None):
            rows, instructions, targets = ask(batch, known, rng)
            batch = batch[rows]
            logits, poses, prompt = self.read(batch, instructions)
            shares, patch_poses = patch_targets(batch, self.grid)
            hits.append((logits.argmax(-1) == shares.argmax(-1)).float())
            # Of patches that show an object, most of all.
            is_object = shares[..., FIRST_OBJECT:].sum(-1) > 0.3
            patch_errors.append(_millimetres(poses - patch_poses)[is_object])
            object_errors.append(_millimetres(prompt[:, -1, 0] - targets[:, 0]))
        return {
            "class_accuracy": torch.cat(hits).mean().item(),
            "patch_mm": torch.cat(patch_errors).median().item(),
            "named_object_mm": torch.cat(object_errors).median().item(),
        }


def _end_of_prompt(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """The last hidden states of each row (B, T, H), whatever stands behind them: (B, `PROMPT_END`, H)."""
    padding = attention_mask.flip(1).argmax(dim=1)  # on the right, (B,)
    last = hidden.shape[1] - 1 - padding
    index = last[:, None] - torch.arange(PROMPT_END).flip(0)  # (B, N)
    return hidden[torch.arange(len(hidden))[:, None], index]


def _distance(read: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    known = ~targets.isnan()
    return F.smooth_l1_loss(read[known], targets[known], beta=0.1)


def _millimetres(difference: torch.Tensor) -> torch.Tensor:
    return 1000 * (difference * torch.from_numpy(POSE_SCALE))[..., :3].norm(dim=-1)


def ask(frames: Frames, known: list[str], rng: np.random.Generator) -> tuple[np.ndarray, list[str], torch.Tensor]:
    """
    An instruction about every known object in every frame, in the words of any task.

    Returns:
        `tuple[np.ndarray, list[str], torch.Tensor]`: Of each instruction the frame (N,), the text, and the normalised
        poses of object and hand (N, 2, 6).
    """
    numbers = [FIRST_OBJECT + OBJECTS.index(name) for name in known]
    asked = [
        (row, number) for row, poses in enumerate(frames.poses) for number in numbers if not np.isnan(poses[number, 0])
    ]
    texts = [str(rng.choice(WORDINGS[str(rng.choice(TASKS))])) for _ in asked]
    instructions = [
        text.format(object=CLASSES[number], side=str(rng.choice(list(SIDES))))
        for text, (_, number) in zip(texts, asked, strict=True)
    ]
    targets = np.stack([frames.poses[row, [number, HAND]] for row, number in asked])
    return np.array([row for row, _ in asked]), instructions, torch.from_numpy((targets - POSE_CENTER) / POSE_SCALE)


def batches(frames: Frames, size: int, rng: np.random.Generator | None) -> Iterator[Frames]:
    """All frames, in order or shuffled."""
    order = np.arange(len(frames)) if rng is None else rng.permutation(len(frames))
    for start in range(0, len(order), size):
        yield frames[order[start : start + size]]


def pretrain(
    trainer: GroundingTrainer, frames: Frames, held_out: Frames, known: list[str], arguments: argparse.Namespace
) -> None:
    rng = np.random.default_rng(arguments.seed)
    optimizer = torch.optim.AdamW(trainer.parameters(), arguments.learning_rate, weight_decay=0.01, fused=True)
    steps = arguments.epochs * -(-len(frames) // arguments.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, arguments.learning_rate, total_steps=steps, pct_start=0.1
    )
    bar = tqdm(total=steps, desc="training")
    for epoch in range(arguments.epochs):
        for batch in batches(frames, arguments.batch_size, rng):
            loss = trainer.loss(batch, known, rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainer.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
        found = trainer.validate(held_out, known)
        tqdm.write(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory of a policy, as tools/init_policy.py writes it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=40_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=12, help="frames, each with some three instructions")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold_out", nargs="+", default=[], help="as `python -m tabletop.record` takes it")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that run the simulator")
    arguments = parser.parse_args()
    known = Recording(episodes=1, hold_out=tuple(arguments.hold_out)).targets()
    set_seed(arguments.seed)
    model, processor = load_policy(arguments.policy, dtype=torch.float32)
    side = model.config.image_sizes[0]
    first_seed = arguments.seed * 1_000_000
    held_out = collect(1000, side, known, first_seed + 900_000, arguments.num_workers)
    frames = collect(arguments.frames, side, known, first_seed, arguments.num_workers)
    pretrain(GroundingTrainer(model, processor), frames, held_out, known, arguments)
    model.to(torch.bfloat16).save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    main()
