"""
Teach a small policy to see the tabletop, and what words mean, before it is trained to act.

    python tools/init_policy.py --output_dir untrained
    python tools/pretrain_policy.py --policy untrained --output_dir pretrained

Published policies start from a vision-language model: towers that have seen the world's pictures, and a language
model that knows what words mean. A small policy that is trained from scratch has neither, and demonstrations alone
teach it neither: they show one goal in each picture. The simulator knows more. First the towers and the projector
learn: each patch token is to be like the words for what the patch shows, and to tell where that is. Then the language
model learns, over towers that rest: from the word that names an object on, it is to look at that object's patches, to
tell where it lies, and to speak the action that the expert would do, for several goals in each picture, between which
only the words decide. What tells patches and places is thrown away afterwards.
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from labelled_frames import (
    BOWL,
    CLASSES,
    FIRST_OBJECT,
    HAND,
    KINDS,
    NUM_CLASSES,
    OBJECTS,
    POSE_CENTER,
    POSE_SCALE,
    POSE_SIZE,
    UNKNOWN,
    Frames,
    collect,
)
from load_policy import REPOSITORY, load_policy
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin, set_seed


sys.path.insert(0, str(REPOSITORY))

from tabletop.scene import object_names
from tabletop.tasks import WORDINGS
from training.smoothing import smoothed_nll


ACTION_DIM = 7
LIKENESS_SCALE = 4.0  # embeddings are small at the start
IMPOSSIBLE = -1e4  # a logit that is finite, for products with zero
# Weights of what is learned beside the classes of patches and the actions.
PATCH_POSE_WEIGHT, POSE_WEIGHT, LOOK_WEIGHT = 3.0, 2.0, 0.2
FOLLOWED_SHARE = 0.7  # of the pictures in which the goal that was followed is asked for: it alone shows grasps
WARMUP_STEPS = 200
LEAST_SHARE = 0.05  # of a patch that an object takes up, all patches together, to be seen at all


# What patches show


def patch_shares(classes: np.ndarray, grid: int) -> torch.Tensor:
    """Share of each class in each patch, float32 (B, P, C), of pixels' classes (B, S, S)."""
    count, side = classes.shape[:2]
    patches = classes.reshape(count, grid, side // grid, grid, side // grid).swapaxes(2, 3)
    patches = torch.from_numpy(patches.reshape(count, grid * grid, -1).astype(np.int64))  # (B, P, pixels)
    counts = torch.zeros(count, grid * grid, NUM_CLASSES + 1).scatter_add_(2, patches, torch.ones(patches.shape))
    return counts[..., :UNKNOWN] / patches.shape[2]


def normalized(poses: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((poses - POSE_CENTER) / POSE_SCALE)


def patch_poses(shares: torch.Tensor, poses: torch.Tensor) -> torch.Tensor:
    """
    Pose of what a patch shows most of, beside the background.

    Args:
        shares (`torch.Tensor`): (B, P, C), from [`patch_shares`].
        poses (`torch.Tensor`): (B, C, 6), normalised.

    Returns:
        `torch.Tensor`: (B, P, 6), NaN where there is none.
    """
    shown = shares[..., 1:].max(dim=-1)
    chosen = poses[torch.arange(len(poses))[:, None], shown.indices + 1]
    return chosen.masked_fill((shown.values == 0)[..., None], torch.nan)


def distance(read: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean error of what is known."""
    known = ~targets.isnan()
    return F.smooth_l1_loss(read[known], targets[known], beta=0.1)


def millimetres(difference: torch.Tensor) -> torch.Tensor:
    """Length (...,) of the difference of normalised poses (..., 6) in space."""
    return 1000 * (difference * torch.from_numpy(POSE_SCALE))[..., :3].norm(dim=-1)


class Seeing(nn.Module):
    """
    Reads from the patch tokens what they show. Classes are told by their likeness to the embeddings of the words.

    Args:
        model ([`PreTrainedModel`]): The policy.
        processor ([`ProcessorMixin`]): Of the policy.
        known (`list[str]`): Names of the objects that are taught. About others nothing is: not even what they are not.
        bf16 (`bool`, defaults to `False`): Compute in bfloat16.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, known: list[str], bf16: bool = False):
        super().__init__()
        self.is_taught = torch.tensor([name in known or number < FIRST_OBJECT for number, name in enumerate(CLASSES)])
        self.model, self.processor, self.bf16 = model, processor, bf16
        self.grid = math.isqrt(model.config.towers[0].num_patches)
        self.word_ids = [processor.tokenizer(name, add_special_tokens=False)["input_ids"] for name in CLASSES]
        self.class_bias = nn.Parameter(torch.zeros(NUM_CLASSES))
        self.pose_readout = nn.Linear(model.config.text_config.hidden_size, POSE_SIZE)

    def trained_parameters(self) -> list[nn.Parameter]:
        """All but the language model's layers."""
        parts = (self.model.vision_backbone, self.model.projector, self.model.get_input_embeddings())
        found = [each for part in (*parts, self.pose_readout) for each in part.parameters() if each.requires_grad]
        return [self.class_bias, *found]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the classes (B, P, C) and normalised poses (B, P, 6) of pictures (B, towers * 3, S, S)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            features = self.model.get_image_features(pixel_values)
            poses = self.pose_readout(features).float()
        embeddings = self.model.get_input_embeddings().weight
        words = torch.stack([embeddings[ids].sum(dim=0) for ids in self.word_ids])  # (C, H)
        logits = LIKENESS_SCALE * features.float() @ words.T + self.class_bias
        return logits.masked_fill(~self.is_taught, IMPOSSIBLE), poses

    def pixel_values(self, frames: Frames) -> torch.Tensor:
        return self.processor.image_processor(list(frames.images), return_tensors="pt")["pixel_values"]

    def loss(self, frames: Frames, forward: Callable | None = None) -> torch.Tensor:
        """Of some frames, by this module or its compiled `forward`."""
        logits, poses = (self if forward is None else forward)(self.pixel_values(frames))
        shares = patch_shares(frames.classes, self.grid)
        targets = patch_poses(shares, normalized(frames.poses))
        seen = F.cross_entropy(logits.transpose(1, 2), shares.transpose(1, 2))
        return seen + PATCH_POSE_WEIGHT * distance(poses, targets)

    @torch.no_grad()
    def validate(self, frames: Frames) -> dict[str, float]:
        """Patches whose class is right, and the middle error of objects' places, in millimetres."""
        hits, errors = [], []
        for batch in _batches(frames, 32):
            logits, poses = self(self.pixel_values(batch))
            shares = patch_shares(batch.classes, self.grid)
            targets = patch_poses(shares, normalized(batch.poses))
            hits.append((logits.argmax(-1) == shares.argmax(-1))[shares.sum(-1) > 0].float())
            # Of patches that show an object, most of all.
            errors.append(millimetres(poses - targets)[shares[..., FIRST_OBJECT:].sum(-1) > 0.3])
        return {"class_accuracy": torch.cat(hits).mean().item(), "patch_mm": torch.cat(errors).median().item()}

    @torch.no_grad()
    def features(self, frames: Frames) -> torch.Tensor:
        """Patch tokens, bfloat16 (N, P, H)."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return torch.cat(
                [self.model.get_image_features(self.pixel_values(batch)).bfloat16() for batch in _batches(frames, 32)]
            )


# What words ask for


class Prompts:
    """
    Every instruction about the known objects, as token ids.

    Args:
        processor ([`ProcessorMixin`]): Renders the prompt.
        known (`list[str]`): Names of the objects.
        image_size (`int`): Side of the pictures.
    """

    def __init__(self, processor: ProcessorMixin, known: list[str], image_size: int):
        self.known = [FIRST_OBJECT + OBJECTS.index(name) for name in known]
        keys = [(kind, name) for kind in range(len(KINDS)) for name in known]
        texts = {key: [text.format(object=key[1], side=KINDS[key[0]][1]) for text in wordings(key[0])] for key in keys}
        blank = np.zeros((image_size, image_size, 3), np.uint8)
        ids = {
            text: processor(instruction=[text], images=[blank])["input_ids"][0].tolist()
            for each in texts.values()
            for text in each
        }
        self.start = _common_start(list(ids.values()))
        self.length = max(len(each) for each in ids.values()) - len(self.start)
        words = {name: processor.tokenizer(name, add_special_tokens=False)["input_ids"] for name in known}
        self.ends = {
            (kind, FIRST_OBJECT + OBJECTS.index(name)): [
                (ids[text][len(self.start) :], _find(words[name], ids[text]) - len(self.start))
                for text in texts[kind, name]
            ]
            for kind, name in keys
        }


def wordings(kind: int) -> Sequence[str]:
    return WORDINGS[KINDS[kind][0]]


def _common_start(rows: list[list[int]]) -> list[int]:
    """What all rows begin with."""
    same = [len(set(column)) == 1 for column in zip(*rows, strict=False)]
    return rows[0][: same.index(False)]


def _find(part: list[int], row: list[int]) -> int:
    """Where the last token of `part` stands in `row`."""
    starts = [start for start in range(len(row)) if row[start : start + len(part)] == part]
    return starts[-1] + len(part) - 1


@dataclass
class Questions:
    """
    Several instructions about each of B pictures, as branches behind what they share: BOS, the P patches, the state
    and the start of the prompt. Branches are S tokens long: the rest of the prompt, padded on the left, and the
    action.

    Args:
        ids (`torch.Tensor`): (B, K, S).
        allowed (`torch.Tensor`): bool (B, 1, T, T), what attends to what.
        position_ids (`torch.Tensor`): (B, T).
        named (`torch.Tensor`): (B, K), where in the branch the name of the object ends.
        goals (`torch.Tensor`): (B, K), numbers of the goals, as in [`Frames`].
    """

    ids: torch.Tensor
    allowed: torch.Tensor
    position_ids: torch.Tensor
    named: torch.Tensor
    goals: torch.Tensor


def draw_goals(
    objects: np.ndarray, followed: int, known: list[int], count: int, rng: np.random.Generator
) -> list[int]:
    """
    Goals of one picture: all objects before one comes up again, and mostly the goal that was followed.

    Args:
        objects (`np.ndarray`): (O,), classes in the picture.
        followed (`int`): The goal that was followed.
        known (`list[int]`): Classes that may be asked for.
        count (`int`): How many.
        rng (`np.random.Generator`): Source of the choice.
    """
    places = [place for place, number in enumerate(objects) if number in known]
    kinds = {place: rng.permutation(len(KINDS)).tolist() for place in places}
    turns = [rng.permutation(places).tolist() for _ in KINDS]
    place, kind = divmod(int(followed), len(KINDS))
    if place in places and rng.random() < FOLLOWED_SHARE:
        for order, first in ((turns[0], place), (kinds[place], kind)):
            order.insert(0, order.pop(order.index(first)))
    goals = [place * len(KINDS) + kinds[place][turn] for turn, order in enumerate(turns) for place in order]
    return [goals[turn % len(goals)] for turn in range(count)]


class Listening(nn.Module):
    """
    Reads from the language model, over patch tokens that do not change, where it looks, which pose it has in mind,
    and what it would do.

    Args:
        model ([`PreTrainedModel`]): The policy.
        processor ([`ProcessorMixin`]): Of the policy, with statistics of one dataset.
        prompts ([`Prompts`]): What it may be asked.
        count (`int`): Questions about each picture.
        bin_smoothing (`float`, defaults to 0.0): Width of the actions' labels, in bins.
        bf16 (`bool`, defaults to `False`): Compute in bfloat16.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        prompts: Prompts,
        count: int,
        bin_smoothing: float = 0.0,
        bf16: bool = False,
    ):
        super().__init__()
        self.model, self.processor, self.prompts, self.bf16 = model, processor, prompts, bf16
        self.count, self.bin_smoothing = count, bin_smoothing
        self.num_patches = model.config.towers[0].num_patches
        self.num_shared = model.num_image_tokens + len(prompts.start)
        self.branch = prompts.length + ACTION_DIM - 1  # the last action token has nothing to predict
        self.pose_readout = nn.Linear(model.config.text_config.hidden_size, 3 * POSE_SIZE)
        # Two heads of each layer but the first, which has yet to put the words of a name together, and the last.
        self.looking_layers = range(1, max(2, model.config.text_config.num_hidden_layers - 1))
        # Their attention is read: no fused kernel returns it.
        model.language_model.set_attn_implementation("eager")

    def trained_parameters(self) -> list[nn.Parameter]:
        parts = (self.model.language_model, self.model.proprio_projector, self.pose_readout)
        return [each for part in parts if part is not None for each in part.parameters()]

    def ask(self, frames: Frames, rng: np.random.Generator) -> Questions:
        """Questions about some frames, with the actions that answer them."""
        goals = [
            draw_goals(objects, followed, self.prompts.known, self.count, rng)
            for objects, followed in zip(frames.objects, frames.followed, strict=True)
        ]
        size, length = (len(frames), self.count), self.prompts.length
        ids, named = np.zeros((*size, self.branch), np.int64), np.zeros(size, np.int64)
        starts = np.zeros(size, np.int64)
        for row, column in np.ndindex(size):
            place, kind = divmod(goals[row][column], len(KINDS))
            options = self.prompts.ends[kind, int(frames.objects[row, place])]
            end, position = options[rng.integers(len(options))]
            starts[row, column] = start = length - len(end)
            ids[row, column, start:length], named[row, column] = end, start + position
        answers = np.take_along_axis(frames.actions, np.array(goals)[..., None], axis=1)  # (B, K, 7)
        ids[..., length:] = self.action_tokens(answers)[..., :-1]
        return Questions(
            torch.from_numpy(ids), *self._layout(starts), torch.from_numpy(named), torch.from_numpy(np.array(goals))
        )

    def action_tokens(self, actions: np.ndarray) -> np.ndarray:
        """Token ids of the environment's actions (..., 7)."""
        return self.processor.encode_actions(actions.reshape(-1, ACTION_DIM)).reshape(actions.shape)

    def normalized_states(self, frames: Frames) -> torch.Tensor:
        """float32 (B, 8); (B, 0) for a policy that looks at none."""
        if not self.model.config.use_proprio:
            return torch.zeros(len(frames), 0)
        return torch.as_tensor(self.processor.normalize_state(frames.states), dtype=torch.float32)

    def _layout(self, starts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What attends to what, and positions, of branches (B, K) that begin at `starts`."""
        count, shared, total = len(starts), self.num_shared, self.num_shared + self.count * self.branch
        allowed = torch.ones(total, total, dtype=torch.bool).tril()
        for first in range(shared, total, self.branch):
            allowed[first : first + self.branch, shared:first] = False
        steps = torch.arange(self.branch) - torch.from_numpy(starts)[..., None]  # (B, K, S)
        is_token = torch.cat([torch.ones(count, shared, dtype=torch.bool), (steps >= 0).flatten(1)], dim=1)  # (B, T)
        # Padding attends to itself, or its attention would not be a number.
        allowed = (allowed & is_token[:, None]) | torch.eye(total, dtype=torch.bool)
        branches = (shared + steps.clamp(min=0)).flatten(1)
        return allowed[:, None], torch.cat([torch.arange(shared).expand(count, -1), branches], dim=1)

    def forward(
        self,
        features: torch.Tensor,
        states: torch.Tensor,
        ids: torch.Tensor,
        allowed: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            features (`torch.Tensor`): Patch tokens (B, P, H).
            states (`torch.Tensor`): Normalised states (B, 8), not looked at by a policy without `use_proprio`.
            ids, allowed, position_ids (`torch.Tensor`): As in [`Questions`].

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Normalised poses of the named object, the bowl and the
            hand at each token of the branches (B, K, S, 3, 6), logits of the bins (B, K, 7, bins) and how much the
            looking heads, one for the named object and one for the bowl, attend to the patches
            (B, layers, 2, K, S, P).
        """
        model, config = self.model, self.model.config
        embed, bins = model.get_input_embeddings(), slice(config.action_token_begin, config.action_token_end)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            start = embed(torch.tensor(self.prompts.start)).expand(len(features), -1, -1)
            observed = [features.to(start.dtype)]
            if model.config.use_proprio:
                observed.append(model.proprio_projector(states)[:, None].to(start.dtype))  # (B, 1, H)
            inputs = torch.cat([start[:, :1], *observed, start[:, 1:], embed(ids.flatten(1))], dim=1)
            output = model.language_model.get_decoder()(
                inputs_embeds=inputs,
                attention_mask=torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.bfloat16).min),
                position_ids=position_ids,
                use_cache=False,
                output_attentions=True,
            )
            hidden = output.last_hidden_state[:, self.num_shared :].unflatten(1, ids.shape[1:])  # (B, K, S, H)
            poses = self.pose_readout(hidden).float().unflatten(-1, (3, POSE_SIZE))
            logits = F.linear(hidden[:, :, self.prompts.length - 1 :], model.get_output_embeddings().weight[bins])
        looks = [output.attentions[layer][:, :2, self.num_shared :] for layer in self.looking_layers]
        looks = torch.stack(looks, dim=1)[..., 1 : 1 + self.num_patches].float()  # (B, layers, 2, K * S, P)
        return poses, logits.float(), looks.unflatten(3, ids.shape[1:])

    def losses(
        self, frames: Frames, features: torch.Tensor, shares: torch.Tensor, rng: np.random.Generator, forward=None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Of some frames.

        Args:
            frames ([`Frames`]): B of them.
            features (`torch.Tensor`): Their patch tokens (B, P, H).
            shares (`torch.Tensor`): From [`patch_shares`], (B, P, C).
            rng (`np.random.Generator`): Draws the questions.
            forward (`Callable`, *optional*): Compiled form of this module.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The loss, and what [`Listening.validate`] looks at.
        """
        asked = self.ask(frames, rng)
        poses, logits, looks = (self if forward is None else forward)(
            features, self.normalized_states(frames), asked.ids, asked.allowed, asked.position_ids
        )
        rows = torch.arange(len(frames))[:, None]
        numbers = torch.from_numpy(frames.objects.astype(np.int64))[rows, asked.goals // len(KINDS)]  # (B, K)
        bowls, hands = torch.full_like(numbers, BOWL), torch.full_like(numbers, HAND)
        asked_for = torch.stack([numbers, bowls, hands], dim=-1)  # (B, K, 3)
        targets = normalized(frames.poses)[rows[..., None], asked_for]  # (B, K, 3, 6)
        is_after = torch.arange(self.branch) >= asked.named[..., None]  # (B, K, S)
        actions = torch.from_numpy(frames.actions)[rows, asked.goals]  # (B, K, 7)
        # Tokens of low values have high ids; neighbours are neighbours all the same.
        bins = torch.from_numpy(self.action_tokens(actions.numpy())) - self.model.config.action_token_begin
        places = targets[:, :, None].expand_as(poses)
        hits, is_seen = looked_at(looks, shares, asked_for[..., :2])  # (B, layers, 2, K, S), (B, 2, K)
        hits = hits.permute(0, 2, 3, 4, 1)  # (B, 2, K, S, layers)
        look = -(hits + 1e-3).log()[is_after[:, None] & is_seen[..., None]].mean().nan_to_num()
        speak = smoothed_nll(logits.log_softmax(dim=-1), bins, self.bin_smoothing).mean()
        loss = speak + POSE_WEIGHT * distance(poses[is_after], places[is_after]) + LOOK_WEIGHT * look
        last = self.prompts.length - 1
        found = {"poses": poses[:, :, last, 0], "places": targets[:, :, 0], "logits": logits, "actions": actions}
        return loss, {**found, "speak": speak, "looks": hits[..., last, :][is_seen]}

    @torch.no_grad()
    def validate(self, frames: Frames, features: torch.Tensor) -> dict[str, float]:
        """
        Attention of the looking heads on what was named, the error of the place in mind in millimetres, and of the
        action that is most likely, given the ones before it: of its translation in millimetres, and of its gripper.
        """
        rng, begin = np.random.default_rng(0), self.model.config.action_token_begin
        looks, places, moves, grips, losses = [], [], [], [], []
        grid = math.isqrt(self.num_patches)
        for start in range(0, len(frames), 32):
            batch = frames[slice(start, start + 32)]
            _, found = self.losses(batch, features[start : start + 32], patch_shares(batch.classes, grid), rng)
            token_ids = found["logits"].argmax(-1).numpy().reshape(-1, ACTION_DIM) + begin
            spoken, wanted = self.processor.decode_actions(token_ids), found["actions"].flatten(0, 1).numpy()
            looks.append(found["looks"])
            losses.append(found["speak"])
            places.append(millimetres(found["poses"] - found["places"]).flatten())
            moves.append(1000 * np.abs(spoken - wanted)[..., :3].mean())
            grips.append(((spoken > 0.5) == (wanted > 0.5))[..., -1].mean())
        return {
            "looks": torch.cat(looks).mean().item(),
            "named_object_mm": torch.cat(places).median().item(),
            "action_loss": float(np.mean(losses)),
            "move_mm": float(np.mean(moves)),
            "gripper": float(np.mean(grips)),
        }


def looked_at(looks: torch.Tensor, shares: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How much attention goes to the patches of an object; those that show most of it count in full.

    Args:
        looks (`torch.Tensor`): (B, L, O, K, S, P), of L layers with a head for each of O objects.
        shares (`torch.Tensor`): (B, P, C).
        numbers (`torch.Tensor`): (B, K, O), classes of the objects.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (B, L, O, K, S), and bool (B, O, K), whether the object can be seen.
    """
    parts = shares[torch.arange(len(shares))[:, None, None], :, numbers.transpose(1, 2)]  # (B, O, K, P)
    most = parts.amax(dim=-1, keepdim=True)
    weights = parts / most.clamp(min=1e-6)
    return torch.einsum("blhksp,bhkp->blhks", looks, weights), parts.sum(dim=-1) > LEAST_SHARE


# Learning


def train(
    loss: Callable[[np.ndarray], torch.Tensor],
    parameters: list[nn.Parameter],
    validate: Callable[[], dict[str, float]],
    num_frames: int,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    rng: np.random.Generator,
    name: str,
) -> None:
    """
    AdamW over shuffled frames, with a rate that rises for `WARMUP_STEPS` and falls to zero from the middle on.

    Args:
        loss (`Callable`): Of the frames with these numbers.
        parameters (`list[nn.Parameter]`): What is trained.
        validate (`Callable`): Figures to print after each epoch.
        num_frames (`int`): How many there are.
        epochs, batch_size, learning_rate: As they are called.
        rng (`np.random.Generator`): Of the order.
        name (`str`): For the progress bar.
    """
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.01, fused=True)
    per_epoch = max(num_frames // batch_size, 1)
    total = max(epochs * per_epoch, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS, 2 * (1 - step / total))
    )
    with tqdm(total=total, desc=name) as bar:
        for epoch in range(epochs):
            order = rng.permutation(num_frames)
            for step in range(per_epoch):
                value = loss(order[step * batch_size : (step + 1) * batch_size])
                value.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{value.item():.3f}")
            figures = ", ".join(f"{key} {value:.4g}" for key, value in validate().items())
            tqdm.write(f"{name}, epoch {epoch + 1}: {figures}")


def _batches(frames: Frames, size: int) -> list[Frames]:
    return [frames[slice(start, start + size)] for start in range(0, len(frames), size)]


def see(seeing: Seeing, frames: Frames, held_out: Frames, arguments: argparse.Namespace) -> None:
    """Train towers, projector and words."""
    forward = torch.compile(seeing) if arguments.torch_compile else seeing
    seeing.train()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel's way back is slow on a CPU
        train(
            lambda numbers: seeing.loss(frames[numbers], forward),
            seeing.trained_parameters(),
            lambda: seeing.validate(held_out),
            len(frames),
            epochs=arguments.see_epochs,
            batch_size=arguments.see_batch_size,
            learning_rate=arguments.learning_rate,
            rng=np.random.default_rng(arguments.seed),
            name="see",
        )
    seeing.eval()


def listen(
    listening: Listening, seeing: Seeing, frames: Frames, held_out: Frames, arguments: argparse.Namespace
) -> None:
    """Train the language model over what the towers see."""
    features, held_out_features = seeing.features(frames), seeing.features(held_out)
    forward = torch.compile(listening) if arguments.torch_compile else listening
    rng = np.random.default_rng(arguments.seed)

    def loss(numbers: np.ndarray) -> torch.Tensor:
        batch = frames[numbers]
        shares = patch_shares(batch.classes, seeing.grid)
        return listening.losses(batch, features[torch.from_numpy(numbers)], shares, rng, forward)[0]

    listening.train()
    train(
        loss,
        listening.trained_parameters(),
        lambda: listening.validate(held_out, held_out_features),
        len(frames),
        epochs=arguments.listen_epochs,
        batch_size=arguments.listen_batch_size,
        learning_rate=arguments.learning_rate,
        rng=rng,
        name="listen",
    )
    listening.eval()


def save(model: PreTrainedModel, processor: ProcessorMixin, output_dir: Path) -> None:
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory of a policy, as tools/init_policy.py writes it")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=64_000)
    parser.add_argument("--see_epochs", type=int, default=2)
    parser.add_argument("--see_batch_size", type=int, default=32, help="frames")
    parser.add_argument("--listen_epochs", type=int, default=2)
    parser.add_argument("--listen_batch_size", type=int, default=12, help="frames")
    parser.add_argument("--questions", type=int, default=4, help="about each frame")
    parser.add_argument("--bin_smoothing", type=float, default=8.0, help="width of the actions' labels, in bins")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold_out", nargs="+", default=[], help="as `python -m tabletop.record` takes it")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that run the simulator")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, on CPUs that can")
    parser.add_argument("--torch_compile", action="store_true", help="faster after a minute; needs a C++ compiler")
    arguments = parser.parse_args()
    try:
        known = object_names(hold_out=arguments.hold_out)
        model, processor = load_policy(arguments.policy, dtype=torch.float32)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(arguments.seed)
    side = model.config.image_sizes[0]
    first_seed = arguments.seed * 1_000_000
    held_out = collect(1000, side, known, first_seed + 900_000, arguments.num_workers)
    frames = collect(arguments.frames, side, known, first_seed, arguments.num_workers)
    seeing = Seeing(model, processor, known, arguments.bf16)
    see(seeing, frames, held_out, arguments)
    save(model, processor, arguments.output_dir)  # who stops here goes on with --policy of it and --see_epochs 0
    prompts = Prompts(processor, known, side)
    listening = Listening(model, processor, prompts, arguments.questions, arguments.bin_smoothing, arguments.bf16)
    listen(listening, seeing, frames, held_out, arguments)
    save(model, processor, arguments.output_dir)


if __name__ == "__main__":
    main()
