"""How well actions are predicted: from the logits at the positions of the labels, or from what a head says."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from robot_data.episode import dimension_names


IGNORE_INDEX = -100


def predicted_tokens(logits: torch.Tensor, labels: Any) -> torch.Tensor:
    """
    The most probable tokens, for `Trainer(preprocess_logits_for_metrics=...)`.

    Args:
        logits (`torch.Tensor`): (B, A, V) at the positions of the labels, right-aligned.
        labels: Not looked at.

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


def without_padding(labels: torch.Tensor, action_is_pad: torch.Tensor, codec: Any) -> torch.Tensor:
    """
    Labels with -100 at the tokens of padded actions, which say where these are and are not learned.

    Args:
        labels (`torch.Tensor`): (B, L), with as many action tokens in each row.
        action_is_pad (`torch.Tensor`): bool (B, K).
        codec ([`ActionCodec`]): Knows the action tokens.
    """
    is_action = _is_action(labels, codec)
    tokens_per_action = int(is_action[0].sum()) // action_is_pad.shape[1]
    is_pad = action_is_pad.to(labels.device).repeat_interleave(tokens_per_action, dim=1)  # (B, K) -> (B, K * D)
    return labels.masked_scatter(is_action, labels[is_action].masked_fill(is_pad.flatten(), IGNORE_INDEX))


def count_correct(
    predicted: torch.Tensor, labels: torch.Tensor, action_is_pad: torch.Tensor, codec: Any
) -> torch.Tensor:
    """
    How many action tokens of a batch are predicted, and how many are learned: (2,). The stop token does not count.

    Args:
        predicted (`torch.Tensor`): (B, A), from [`predicted_tokens`].
        labels (`torch.Tensor`): (B, L).
        action_is_pad (`torch.Tensor`): bool (B, K).
        codec ([`ActionCodec`]): Knows the action tokens.
    """
    targets = without_padding(supervised(labels), action_is_pad, codec)
    is_action = _is_action(targets, codec)
    return torch.stack([((predicted == targets) & is_action).sum(), is_action.sum()])


def _is_action(labels: torch.Tensor, codec: Any) -> torch.Tensor:
    return (labels >= codec.token_end - codec.n_bins) & (labels < codec.token_end)


class ActionMetrics:
    """
    `compute_metrics` for `Trainer`: L1 and, of policies that speak in tokens, token accuracy, over all datasets and
    for each. Padded actions do not count.

    Predicted tokens are teacher-forced and, as in the published training, of the whole vocabulary; for the distances,
    a token that is no action counts as the nearest one that is.

    Args:
        processor: The policy's, with the statistics of all datasets.
        datasets (`Sequence[str]`): Dataset of each row, in the order of validation.
    """

    def __init__(self, processor: Any, datasets: Sequence[str]):
        self.processor, self.datasets = processor, np.array(datasets)

    @property
    def label_names(self) -> list[str]:
        """What of a batch a prediction is held against, for `Trainer.label_names`."""
        return ["labels", "action_is_pad", *(["actions"] if self.processor.head_type != "tokens" else [])]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Args:
            prediction (`EvalPrediction`): `predictions`, tokens (N, A), right-aligned, or normalised actions (N, K,
                D), and `label_ids`, of each of `label_names` one array.

        Returns:
            `dict[str, float]`: `l1_normalized` and, of tokens, `action_accuracy`, over all and for each dataset behind
            its name (`DATASET/action_accuracy`); and by dimension `DATASET/l1_normalized/x`, ..., and `DATASET/l1/x`,
            ... in the dataset's units.
        """
        labels, is_pad, *numbers = prediction.label_ids
        if len(labels) != len(self.datasets):
            raise ValueError(f"{len(labels)} rows were predicted, and {len(self.datasets)} are known.")
        columns = {}
        if numbers:
            predicted, targets = np.asarray(prediction.predictions, np.float64), numbers[0]
        else:
            tokens, target_tokens = self._action_tokens(prediction.predictions, labels, is_pad.shape[1])
            columns["action_accuracy"] = tokens == target_tokens
            predicted, targets = self._decode(tokens), self._decode(target_tokens)
        columns["l1_normalized"] = np.abs(predicted - targets)  # (N, K, D)
        is_learned = ~is_pad.astype(bool)  # (N, K)
        metrics = {kind: values[is_learned].mean() for kind, values in columns.items()}
        for name in dict.fromkeys(self.datasets.tolist()):
            rows = self.datasets == name
            metrics |= {f"{name}/{kind}": values[rows][is_learned[rows]].mean() for kind, values in columns.items()}
            actions = [self.processor.unnormalize_actions(values[rows], name) for values in (predicted, targets)]
            distances = {"l1_normalized": columns["l1_normalized"][rows], "l1": np.abs(actions[0] - actions[1])}
            for kind, values in distances.items():
                means = values[is_learned[rows]].mean(axis=0).tolist()  # (D,)
                pairs = zip(dimension_names(len(means)), means, strict=True)
                metrics |= {f"{name}/{kind}/{dimension}": value for dimension, value in pairs}
        return {name: float(value) for name, value in metrics.items()}

    def _action_tokens(
        self, predicted: np.ndarray, labels: np.ndarray, chunk_size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Predicted and true action tokens, (N, K, D) each."""
        targets = np.stack([row[row != IGNORE_INDEX] for row in labels])  # (N, A)
        predicted = np.asarray(predicted)[:, : targets.shape[1]]
        is_action = _is_action(targets[0], self.processor.codec)
        tokens = (predicted[:, is_action], targets[:, is_action])
        return tuple(each.reshape(len(each), chunk_size, -1) for each in tokens)

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        """Normalised actions, float64 (N, K, D)."""
        codec = self.processor.codec
        clipped = tokens.clip(codec.token_end - codec.n_bins, codec.token_end - 1)
        return codec.decode(clipped.reshape(len(clipped), -1)).reshape(clipped.shape)
