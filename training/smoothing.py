"""Labels that neighbouring action bins share."""

from typing import Any

import torch
import torch.nn.functional as F

from .metrics import IGNORE_INDEX


def smoothed_nll(log_probabilities: torch.Tensor, bins: torch.Tensor, width: float) -> torch.Tensor:
    """
    Negative log-likelihood under a Gaussian over the bins in place of the one right bin (HL-Gauss,
    https://arxiv.org/abs/2403.03950).

    Where many demonstrations agree to the bin, as at the largest action or at rest, and others are spread over many
    bins, the most probable bin is one of the former even where most of the probability is elsewhere. Smoothed, an
    action counts together with those near it.

    Args:
        log_probabilities (`torch.Tensor`): (..., bins).
        bins (`torch.Tensor`): (...), the right ones.
        width (`float`): Standard deviation of the Gaussian, in bins; 0: none.

    Returns:
        `torch.Tensor`: (...), not reduced.
    """
    if width == 0:
        return -log_probabilities.gather(-1, bins[..., None])[..., 0]
    offsets = torch.arange(log_probabilities.shape[-1], device=bins.device) - bins[..., None]
    targets = torch.softmax(-0.5 * (offsets / width) ** 2, dim=-1)
    return -(targets * log_probabilities).sum(dim=-1)


class SmoothedLoss:
    """
    A policy's `loss_function` in which action tokens share their label with their neighbours; other tokens do not.

    Args:
        codec ([`ActionCodec`]): Knows the action tokens.
        width (`float`): See [`smoothed_nll`].
    """

    def __init__(self, codec: Any, width: float):
        self.begin, self.end, self.width = codec.token_end - codec.n_bins, codec.token_end, width

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Mean over the supervised tokens, as transformers' loss functions are called.

        Args:
            logits (`torch.Tensor`): (B, A, V).
            labels (`torch.Tensor`): Not looked at.
            vocab_size (`int`): V.
            num_items_in_batch (`int`, *optional*): To divide the sum by, in place of the tokens of this batch.
            shift_labels (`torch.Tensor`): (B, A), what each position predicts; -100: nothing.
        """
        is_kept = shift_labels != IGNORE_INDEX
        log_probabilities, targets = F.log_softmax(logits[is_kept].float(), dim=-1), shift_labels[is_kept]
        is_action = (targets >= self.begin) & (targets < self.end)
        actions = log_probabilities[is_action, self.begin : self.end]
        total = smoothed_nll(actions, targets[is_action] - self.begin, self.width).sum()
        total = total + F.nll_loss(log_probabilities[~is_action], targets[~is_action], reduction="sum")
        return total / (is_kept.sum() if num_items_in_batch is None else num_items_in_batch)
