"""
Floating-point operations of a policy's matrix products, counted from their shapes.

A product of (m, k) by (k, n) takes 2 m k n of them, attention of S queries to T keys 4 S T D.
"""

from torch import nn


def linear_flops(module: nn.Module) -> int:
    """Of a token in all linear layers of a module."""
    return sum(2 * part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def vision_flops(model: nn.Module) -> int:
    """Of a picture in the blocks of the towers that are used, and in the projector."""
    patches = model.config.num_image_tokens
    flops = patches * linear_flops(model.projector)
    for tower in model.vision_backbone.towers:
        length, blocks = patches + tower.config.num_prefix_tokens, tower.blocks[: tower.config.num_used_blocks]
        flops += patches * 2 * tower.patch_embed.proj.weight.numel()
        flops += length * linear_flops(blocks) + len(blocks) * 4 * length**2 * tower.config.embed_dim
    return flops
