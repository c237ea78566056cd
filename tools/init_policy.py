"""
Write a small, randomly initialised policy with its processor: the start of a training from scratch.

    python tools/init_policy.py --output_dir my_policy
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from load_policy import REPOSITORY, repository_class
from torch import nn
from transformers import PreTrainedTokenizerFast, set_seed


sys.path.insert(0, str(REPOSITORY))

from tabletop.control import OPEN_WIDTH, REACH_HIGH, REACH_LOW
from tabletop.environment import MAX_ROTATION, MAX_TRANSLATION


IMAGE_SIZE, PATCH_SIZE = 128, 16
VIT = {
    **{"embed_dim": 128, "depth": 4, "num_heads": 2, "mlp_dim": 512},
    **{"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "output_block": -1},
}
TOWERS = [
    {**VIT, "class_token": True, "num_registers": 4, "layer_scale": True, "final_norm": False},
    {**VIT, "final_norm": False},
]
LANGUAGE_MODEL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.04,
}
ROOM = 1.25
EMBEDDING_NORM = LANGUAGE_MODEL["initializer_range"] * math.sqrt(LANGUAGE_MODEL["hidden_size"])


def make_statistics(dataset: str) -> dict[str, dict]:
    """Statistics that scale the tabletop's actions by their bounds, whatever was recorded; the gripper as it is."""
    # With room on both sides, so that the largest actions, which are the most common ones, are bins among others.
    high = [ROOM * MAX_TRANSLATION] * 3 + [ROOM * MAX_ROTATION] * 3 + [1.0]
    action = {**_bounds([-value for value in high[:6]] + [0.0], high), "mask": [True] * 6 + [False]}
    turn = [math.pi] * 3
    proprio = _bounds(
        [*REACH_LOW.tolist(), *(-value for value in turn), 0.0, 0.0],
        [*REACH_HIGH.tolist(), *turn, OPEN_WIDTH, OPEN_WIDTH],
    )
    return {dataset: {"action": action, "proprio": proprio, "num_transitions": 0, "num_trajectories": 0}}


def _bounds(low: list[float], high: list[float]) -> dict[str, list[float]]:
    """Statistics of numbers that may lie anywhere between two ends."""
    mean = [(least + most) / 2 for least, most in zip(low, high, strict=True)]
    std = [(most - least) / math.sqrt(12) for least, most in zip(low, high, strict=True)]
    return {"mean": mean, "std": std, "min": low, "max": high, "q01": low, "q99": high}


def position_embedding(grid: int, dim: int) -> torch.Tensor:
    """
    Sines and cosines of each patch's row and column, (1, grid * grid, dim): a tower that starts with them knows where
    its patches are (the fixed embedding of MAE, https://arxiv.org/abs/2111.06377, here a start that is trained on).
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(grid)[:, None] * frequencies  # (grid, dim / 4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    rows, columns = line[:, None].expand(-1, grid, -1), line[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).reshape(1, grid * grid, dim)


def bin_embedding(num_bins: int, dim: int, num_waves: int = 32) -> torch.Tensor:
    """
    Rows (num_bins, dim) of unit length in which bins that lie near each other are alike: waves along the value, fewer
    of the fast ones, in random directions. What is learned of one bin is learned of its neighbours, too.
    """
    value = torch.linspace(0.0, math.pi, num_bins)[:, None]
    number = torch.arange(1, num_waves + 1)
    waves = torch.cat([(number * value).cos(), (number * value).sin()], dim=1) / number.repeat(2).sqrt()
    directions = torch.linalg.qr(torch.randn(dim, 2 * num_waves))[0]  # (dim, 2 * num_waves)
    return nn.functional.normalize(waves @ directions.T, dim=1)


def write_policy(output_dir: Path, seed: int, dataset: str) -> None:
    """Write model, processor and statistics into `output_dir`."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(REPOSITORY)
    pad_to_multiple_of = 64
    vocab_size = -(-len(tokenizer) // pad_to_multiple_of) * pad_to_multiple_of
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = repository_class("OpenVLAConfig")(
        vision_backbone_id=None,
        llm_backbone_id=None,
        tower_configs=TOWERS,
        text_config={**LANGUAGE_MODEL, **special, "vocab_size": vocab_size},
        norm_stats=make_statistics(dataset),
        # One camera does not tell how far away the hand is.
        use_proprio=True,
        proprio_dim=8,
        action_token_end=tokenizer.vocab_size,
        closing_token_id=tokenizer.convert_tokens_to_ids("▁"),
        pad_token_id=tokenizer.pad_token_id,
        pad_to_multiple_of=pad_to_multiple_of,
    )
    set_seed(seed)
    model = repository_class("OpenVLAForActionPrediction")(config)
    for tower in model.vision_backbone.towers:
        tower.pos_embed.data = position_embedding(IMAGE_SIZE // PATCH_SIZE, VIT["embed_dim"])
    # Bins in ascending order have descending ids.
    bins = bin_embedding(config.n_action_bins, LANGUAGE_MODEL["hidden_size"]).flip(0)
    rows = slice(config.action_token_begin, config.action_token_end)
    model.get_output_embeddings().weight.data[rows] = bins
    model.get_input_embeddings().weight.data[rows] = EMBEDDING_NORM * bins
    for name, token_id in special.items():
        setattr(model.generation_config, name, token_id)
    image_processor = repository_class("OpenVLAImageProcessor")(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        input_sizes=[(3, IMAGE_SIZE, IMAGE_SIZE)] * 2,
        means=[(0.485, 0.456, 0.406), (0.5, 0.5, 0.5)],
        stds=[(0.229, 0.224, 0.225), (0.5, 0.5, 0.5)],
    )
    model.to(torch.bfloat16).save_pretrained(output_dir)
    repository_class("OpenVLAProcessor")(image_processor, tokenizer).save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dataset", default="tabletop", help="name of the dataset in the statistics")
    arguments = parser.parse_args()
    write_policy(arguments.output_dir, arguments.seed, arguments.dataset)
    size = sum(path.stat().st_size for path in arguments.output_dir.glob("*.safetensors"))
    print(f"{arguments.output_dir}: a randomly initialised policy, {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main()
