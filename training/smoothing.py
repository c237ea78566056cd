"""Labels that neighbouring action bins share."""

import torch
import torch.nn.functional as F


def smoothed_cross_entropy(logits: torch.Tensor, bins: torch.Tensor, width: float) -> torch.Tensor:
    """
    Cross-entropy with a Gaussian over the bins in place of the one right bin (HL-Gauss,
    https://arxiv.org/abs/2403.03950).

    Where many demonstrations agree to the bin, as at the largest action or at rest, and others are spread over many
    bins, the most probable bin is one of the former even where most of the probability is elsewhere. Smoothed, an
    action counts together with those near it.

    Args:
        logits (`torch.Tensor`): (..., bins).
        bins (`torch.Tensor`): (...), the right ones.
        width (`float`): Standard deviation of the Gaussian, in bins; 0: none.

    Returns:
        `torch.Tensor`: (...), not reduced.
    """
    if width == 0:
        return F.cross_entropy(logits.flatten(0, -2), bins.flatten(), reduction="none").view(bins.shape)
    offsets = torch.arange(logits.shape[-1], device=logits.device) - bins[..., None]
    targets = torch.softmax(-0.5 * (offsets / width) ** 2, dim=-1)
    return -(targets * logits.float().log_softmax(dim=-1)).sum(dim=-1)
