"""
What the benchmarks of decoding share: policies to measure, what they look at, and the published way to decode.

[`PlainPolicy`] does with the weights of a policy what the published code does: the picture once for each tower, every
block of the towers, logits of the whole vocabulary at every position, a cache that grows, and `generate`. Two things
are not as published, so that they can be compared at all: it takes batches, and the robot's state where a policy has
one.
"""

import copy
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn


sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tools")]

from load_policy import REPOSITORY, load_policy, repository_class  # noqa: E402


INSTRUCTIONS = ["pick up the red cube", "push the blue cylinder to the left", "put the green brick in the bowl"]
FRAME_SIZE = (480, 640)
VOCABULARY = 32064

Inputs = dict[str, torch.Tensor]


@dataclass
class Observation:
    """What a policy is asked with: uint8 (H, W, 3), and (S,) where it takes a state."""

    instruction: str
    image: np.ndarray
    state: np.ndarray | None = None


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": VOCABULARY,
        "pad_token_id": VOCABULARY - 64,
    }


def _golden_towers() -> list[dict[str, Any]]:
    shared = {"depth": 3, "num_heads": 16}
    dino = {"embed_dim": 64, "mlp_dim": 256, "class_token": True, "num_registers": 4, "layer_scale": True}
    return [{**shared, **dino}, {**shared, "embed_dim": 96, "mlp_dim": 358, "attention_pool": True}]


SMALL = "small policy"
# Fields of the configuration; random weights. The shipped policy has its own.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny golden": {
        "vision_backbone_id": None,
        "tower_configs": _golden_towers(),
        "text_config": _llama(32, 88, 2, 2),
    },
    "mid-size": {
        "vision_backbone_id": None,
        "tower_configs": _golden_towers(),
        "text_config": _llama(1024, 2816, 8, 16),
    },
    "full-size towers": {"text_config": _llama(1024, 2816, 8, 16)},
    "openvla-7b": {"text_config": _llama(4096, 11008, 32, 32)},
}
CONFIGURATIONS = (SMALL, *SHAPES)


def make_policy(name: str, **kwargs: Any) -> tuple[nn.Module, Any]:
    """
    A policy of `CONFIGURATIONS` with its processor, in float32 unless `dtype` says otherwise.

    Random weights are large enough for sharp probabilities, and the same at every call. Their output head is zero
    but for the action tokens, so that what is most probable is one of these, as after training.

    Args:
        kwargs: `dtype` and `device`.
    """
    dtype, device = kwargs.get("dtype", torch.float32), kwargs.get("device", "cpu")
    if name == SMALL:
        model, processor = load_policy(REPOSITORY, dtype=dtype)
        return model.to(device), processor
    processor = repository_class("OpenVLAProcessor").from_pretrained(REPOSITORY, use_proprio=False)
    processor.image_processor = repository_class("OpenVLAImageProcessor")(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        means=[[0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5]],
        stds=[[0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5]],
    )
    config = repository_class("OpenVLAConfig")(
        norm_stats=processor.norm_stats,
        pad_token_id=VOCABULARY - 64,
        closing_token_id=processor.closing_token_id,
        **SHAPES[name],
    )
    with torch.device("meta"):
        model = repository_class("OpenVLAForActionPrediction")(config)
    processor.action_token_end = config.action_token_end
    return _with_random_weights(model.to(dtype), device), processor


def _with_random_weights(model: nn.Module, device: str) -> nn.Module:
    config = model.config
    rotary = type(model.get_decoder().rotary_emb)(config=config.text_config)  # its buffer is in no checkpoint
    model = model.to_empty(device=device).eval()
    model.get_decoder().rotary_emb = rotary.to(device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = 1.0 if "embed" in name else 1.5 / parameter[0].numel() ** 0.5
                parameter.normal_(0.0, scale, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        head = model.get_output_embeddings().weight
        head[: config.action_token_begin] = 0.0
        head[config.action_token_end :] = 0.0
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same tensors, so that `warm_up` prepares one of both."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, tensors)


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns, in a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_mib(name: str = "VmRSS") -> float:
    """Resident memory of this process: now, or with "VmHWM" the most since [`forget_peak`]."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


def forget_peak() -> None:
    """Let the peak of resident memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def random_observations(seed: int, has_state: bool) -> Iterator[Observation]:
    """Noise and instructions for ever; no time depends on what is seen, but for drafts."""
    rng = np.random.default_rng(seed)
    while True:
        image = rng.integers(0, 256, (*FRAME_SIZE, 3), dtype=np.uint8)
        state = rng.uniform(-0.2, 0.8, 8) if has_state else None
        yield Observation(INSTRUCTIONS[rng.integers(len(INSTRUCTIONS))], image, state)


def tabletop_observations(model: nn.Module, processor: Any, seed: int = 600_000) -> Iterator[Observation]:
    """Consecutive frames of a policy that acts in the tabletop, episode after episode, for ever."""
    import gymnasium

    env = gymnasium.make("tabletop:Tabletop-v0", image_size=128)
    while True:
        seen, _ = env.reset(seed=seed)
        is_over, seed = False, seed + 1
        while not is_over:
            observation = Observation(seen["instruction"], seen["image"], seen["state"])
            yield observation
            action = model.predict_action(**as_inputs(model, processor, [observation]))
            seen, _, terminated, truncated, _ = env.step(action.astype(np.float32))
            is_over = terminated or truncated


def as_inputs(model: nn.Module, processor: Any, observations: list[Observation]) -> Inputs:
    """A batch, as the processor makes it, in the dtype and on the device of the model."""
    inputs = {
        "instruction": [each.instruction for each in observations],
        "images": [each.image for each in observations],
    }
    if processor.use_proprio:
        inputs["state"] = np.stack([each.state for each in observations])
    return on_model(model, processor(**inputs))


def on_model(model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs on the device of the model, and those with a floating point in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


class PlainPolicy:
    """
    The published way from a camera's picture to action tokens, with the weights of a policy.

    Args:
        model (`nn.Module`), processor: Of [`make_policy`].
    """

    def __init__(self, model: nn.Module, processor: Any):
        self.model, self.processor = model, processor
        self.num_tokens = model.get_action_dim()

    def preprocess(self, observations: list[Observation]) -> Inputs:
        """As [`as_inputs`], with the picture resized, cropped, converted and normalised for each tower."""
        images = self.processor.image_processor
        side = images.input_sizes[0][-1]
        pixels = [self._pixels(each.image, side, images.tvf_normalize_params) for each in observations]
        text = self.processor(instruction=[each.instruction for each in observations])
        inputs = {**text, "pixel_values": torch.stack(pixels)}
        if self.processor.use_proprio:
            states = np.stack([each.state for each in observations])
            inputs["proprio"] = torch.from_numpy(self.processor.normalize_state(states)).float()
        return on_model(self.model, inputs)

    @staticmethod
    def _pixels(frame: np.ndarray, side: int, settings: list[dict[str, Any]]) -> torch.Tensor:
        """(towers * 3, S, S)."""
        image = Image.fromarray(frame).convert("RGB")
        towers = []
        for tower in settings:
            resized = image.resize((side, side), Image.Resampling.BICUBIC).crop((0, 0, side, side))
            levels = torch.from_numpy(np.array(resized, copy=True)).permute(2, 0, 1).contiguous()  # (3, S, S)
            pixels = levels.to(torch.float32).div(255).clone()
            mean, std = (torch.tensor(tower[name]).view(3, 1, 1) for name in ("mean", "std"))
            towers.append(pixels.sub_(mean).div_(std))
        return torch.vstack(towers)

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embeddings of the patches (B, P, H), after every block of the towers."""
        backbone = self.model.vision_backbone
        images = pixel_values.split(3, dim=1)
        towers = [_all_blocks(tower, image) for tower, image in zip(backbone.towers, images, strict=True)]
        return self.model.projector(torch.cat(towers, dim=2))

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, T, H) of BOS, patches, state and text, and their mask; padding must be on the left."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        features = self.features(inputs["pixel_values"])
        if "proprio" in inputs:
            features = torch.cat([features, self.model.proprio_projector(inputs["proprio"])[:, None]], dim=1)
        text = self.model.get_input_embeddings()(ids)
        first = mask.argmax(dim=1)  # of each row, where the text begins
        rows = [
            torch.cat([row[: at + 1], seen, row[at + 1 :]])
            for row, seen, at in zip(text, features, first.tolist(), strict=True)
        ]
        ones = mask.new_ones(len(mask), features.shape[1])
        return torch.stack(rows), torch.cat([mask, ones], dim=1)

    @torch.no_grad()
    def decode(self, embeddings: torch.Tensor, mask: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
        """Token ids (B, N) by `generate`, with logits of the whole vocabulary at every position of the prompt."""
        return self.model.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=mask,
            max_new_tokens=num_tokens or self.num_tokens,
            min_new_tokens=num_tokens or self.num_tokens,
            do_sample=False,
            use_cache=True,
            logits_to_keep=0,
        )

    def predict(self, observations: list[Observation]) -> tuple[np.ndarray, torch.Tensor]:
        """Actions (B, D), and their token ids (B, D)."""
        token_ids = self.decode(*self.embed(left_padded(self.preprocess(observations))))
        return self.detokenise(token_ids), token_ids

    def detokenise(self, token_ids: torch.Tensor) -> np.ndarray:
        """Actions (B, D) in the units of the dataset."""
        statistics, config = self.model.get_action_stats(), self.model.config
        centers = self.model.codec.centers
        normalized = centers[np.clip(config.action_token_end - token_ids.cpu().numpy() - 1, 0, len(centers) - 1)]
        low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
        return np.where(statistics["mask"], 0.5 * (normalized + 1) * (high - low) + low, normalized)


def _all_blocks(tower: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Patches (B, P, D) as the used blocks give them, while all run."""
    hidden = tower.patch_embed(image)  # (B, P, D)
    prefix = [each.expand(len(hidden), -1, -1) for each in (tower.cls_token, tower.reg_token) if each is not None]
    if tower.config.embed_class_token:
        hidden = torch.cat([*prefix, hidden], dim=1) + tower.pos_embed
    else:
        hidden = torch.cat([*prefix, hidden + tower.pos_embed], dim=1)
    hidden = tower.norm_pre(hidden)
    outputs = []
    for block in tower.blocks:
        hidden = block(hidden)
        outputs.append(hidden)
    return outputs[tower.config.num_used_blocks - 1][:, tower.config.num_prefix_tokens :]


def left_padded(inputs: Inputs) -> Inputs:
    """Inputs whose padding is moved to the left, as the library's `generate` needs it."""
    order = inputs["attention_mask"].argsort(dim=1, stable=True)
    moved = {name: inputs[name].gather(1, order) for name in ("input_ids", "attention_mask")}
    return {**inputs, **moved}
