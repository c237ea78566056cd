"""How well tokens and actions are predicted, from the logits at the supervised positions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from robot_data.episode import dimension_names


IGNORE_INDEX = -100


def predicted_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    The most probable tokens, for `Trainer(preprocess_logits_for_metrics=...)`.

    Args:
        logits (`torch.Tensor`): (B, A, V) at the supervised positions, right-aligned.
        labels (`torch.Tensor`): (B, L), not looked at.

    Returns:
        `torch.Tensor`: (B, A).
    """
    return logits.argmax(dim=-1)


def supervised(labels: torch.Tensor) -> torch.Tensor:
    """The supervised labels (B, A) of labels (B, L), A the most of a row, right-aligned, -100 in front of fewer."""
    is_target = labels != IGNORE_INDEX
    count = int(is_target.sum(dim=1).max())
    # A stable sort moves the supervised positions of each row to its end, in their order.
    kept = is_target.to(torch.uint8).argsort(dim=1, stable=True)[:, labels.shape[1] - count :]  # (B, A)
    return labels.gather(1, kept)


def count_correct(predicted: torch.Tensor, labels: torch.Tensor, codec: Any) -> torch.Tensor:
    """
    How many action tokens of a batch are predicted, and how many there are: (2,). The stop token does not count.

    Args:
        predicted (`torch.Tensor`): (B, A), from [`predicted_tokens`].
        labels (`torch.Tensor`): (B, L).
        codec ([`ActionCodec`]): Knows the action tokens.
    """
    targets = supervised(labels)
    is_action = (targets >= codec.token_end - codec.n_bins) & (targets < codec.token_end)
    return torch.stack([((predicted == targets) & is_action).sum(), is_action.sum()])


class ActionMetrics:
    """
    `compute_metrics` for `Trainer`: token accuracy and L1, over all datasets and for each.

    Predictions are teacher-forced and, as in the published training, of the whole vocabulary; for the distances, a
    token that is no action counts as the nearest one that is.

    Args:
        processor: The policy's, with the statistics of all datasets.
        datasets (`Sequence[str]`): Dataset of each row, in the order of validation.
    """

    def __init__(self, processor: Any, datasets: Sequence[str]):
        self.processor, self.datasets = processor, np.array(datasets)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Args:
            prediction (`EvalPrediction`): `predictions` (N, A), right-aligned, and `label_ids` (N, L).

        Returns:
            `dict[str, float]`: `action_accuracy` and `l1_normalized`, over all and for each dataset behind its name
            (`DATASET/action_accuracy`); and by dimension `DATASET/l1_normalized/x`, ..., and `DATASET/l1/x`, ... in
            the dataset's units.
        """
        predicted, targets = self._action_tokens(prediction)
        codec = self.processor.codec
        clipped = predicted.clip(codec.token_end - codec.n_bins, codec.token_end - 1)
        distance = np.abs(codec.decode(clipped) - codec.decode(targets))  # (N, D)
        correct = predicted == targets
        metrics = {"action_accuracy": float(correct.mean()), "l1_normalized": float(distance.mean())}
        for name in dict.fromkeys(self.datasets.tolist()):
            rows = self.datasets == name
            metrics[f"{name}/action_accuracy"] = correct[rows].mean()
            metrics[f"{name}/l1_normalized"] = distance[rows].mean()
            decoded = [self.processor.decode_actions(ids[rows], unnorm_key=name) for ids in (clipped, targets)]
            columns = {"l1_normalized": distance[rows], "l1": np.abs(decoded[0] - decoded[1])}
            for kind, values in columns.items():
                pairs = zip(dimension_names(values.shape[1]), values.mean(axis=0).tolist(), strict=True)
                metrics |= {f"{name}/{kind}/{dimension}": value for dimension, value in pairs}
        return {name: float(value) for name, value in metrics.items()}

    def _action_tokens(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and true action tokens, (N, D) each."""
        labels = prediction.label_ids
        if len(labels) != len(self.datasets):
            raise ValueError(f"{len(labels)} rows were predicted, and {len(self.datasets)} are known.")
        targets = np.stack([row[row != IGNORE_INDEX] for row in labels])  # (N, A)
        predicted = np.asarray(prediction.predictions)[:, : targets.shape[1]]
        is_action = targets[0] < self.processor.action_token_end
        is_action &= targets[0] >= self.processor.action_token_end - self.processor.n_action_bins
        return predicted[:, is_action], targets[:, is_action]
