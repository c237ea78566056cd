"""How well actions are predicted: from the logits at the positions of the labels, or from what a head says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from robot_data.episode import dimension_names


IGNORE_INDEX = -100
# Heads through which the language model itself speaks.
TOKEN_HEADS = ("tokens", "fast")


@dataclass(frozen=True)
class ActionTokens:
    """
    The tokens of the vocabulary that speak of actions.

    Args:
        begin (`int`), end (`int`): The first, and one past the last.
        is_fast (`bool`, defaults to `False`): Whether they are FAST tokens, as many as each chunk needs and none of
            one action alone; otherwise one for each number, action after action.
    """

    begin: int
    end: int
    is_fast: bool = False

    @classmethod
    def of(cls, processor: Any) -> "ActionTokens":
        """Those of a policy's processor, which with `head_type="fast"` has its FAST tokenizer."""
        if processor.head_type == "fast":
            end = processor.action_token_end
            return cls(end - processor.fast_tokenizer.vocab_size, end, is_fast=True)
        return cls(processor.codec.token_end - processor.codec.n_bins, processor.codec.token_end)

    def find(self, labels: Any) -> Any:
        """Where they are in labels, bool of the same shape."""
        return (labels >= self.begin) & (labels < self.end)


def predicted_tokens(logits: torch.Tensor, labels: Any) -> torch.Tensor:
    """
    The most probable tokens, for `Trainer(preprocess_logits_for_metrics=...)`.

    Args:
        logits (`torch.Tensor`): (B, A, V) at the positions of the labels, right-aligned. Behind them there may be
            more, where another process has longer rows.
        labels (`torch.Tensor`, or a tuple that begins with it): (B, L).

    Returns:
        `torch.Tensor`: (B, A), -100 where there is no label.
    """
    is_target = supervised(labels[0] if isinstance(labels, (tuple, list)) else labels) != IGNORE_INDEX
    is_target = torch.nn.functional.pad(is_target, (0, logits.shape[1] - is_target.shape[1]))  # (B, A)
    return logits.argmax(dim=-1).masked_fill(~is_target, IGNORE_INDEX)


def supervised(labels: torch.Tensor) -> torch.Tensor:
    """The supervised labels (B, A) of labels (B, L), A the most of a row, right-aligned, -100 in front of fewer."""
    is_target = labels != IGNORE_INDEX
    count = int(is_target.sum(dim=1).max())
    # A stable sort moves the supervised positions of each row to its end, in their order.
    kept = is_target.to(torch.uint8).argsort(dim=1, stable=True)[:, labels.shape[1] - count :]  # (B, A)
    return labels.gather(1, kept)


def without_padding(
    labels: torch.Tensor, action_is_pad: torch.Tensor, tokens: ActionTokens, action_dims: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Labels with -100 at the tokens of padded actions and numbers, which say where these are and are not learned. FAST
    tokens, which are of the whole chunk, are all learned.

    Args:
        labels (`torch.Tensor`): (B, L), with the tokens of K actions in each row.
        action_is_pad (`torch.Tensor`): bool (B, K).
        tokens ([`ActionTokens`]): Of the policy.
        action_dims (`torch.Tensor`, *optional*): (B,), numbers in each row's actions, in front of those that pad them.
    """
    if tokens.is_fast:
        return labels
    is_action = tokens.find(labels)
    # At least one, for rows without an action, where nothing is padded.
    tokens_per_action = (is_action.sum(dim=1, keepdim=True) // action_is_pad.shape[1]).clamp(min=1)  # (B, 1)
    place = (is_action.cumsum(dim=1) - 1).clamp(min=0)  # (B, L), of a token among those of its row
    is_pad = action_is_pad.to(labels.device).gather(1, place // tokens_per_action)  # (B, L)
    if action_dims is not None:
        is_pad |= place % tokens_per_action >= action_dims.to(labels.device)[:, None]
    return labels.masked_fill(is_action & is_pad, IGNORE_INDEX)


def count_correct(
    predicted: torch.Tensor, labels: torch.Tensor, action_is_pad: torch.Tensor, tokens: ActionTokens
) -> torch.Tensor:
    """
    How many action tokens of a batch are predicted, and how many are learned: (2,). The stop token does not count.

    Args:
        predicted (`torch.Tensor`): (B, A), from [`predicted_tokens`].
        labels (`torch.Tensor`): (B, L).
        action_is_pad (`torch.Tensor`): bool (B, K).
        tokens ([`ActionTokens`]): Of the policy.
    """
    targets = without_padding(supervised(labels), action_is_pad, tokens)
    is_action = tokens.find(targets)
    return torch.stack([((predicted == targets) & is_action).sum(), is_action.sum()])


class ActionMetrics:
    """
    `compute_metrics` for `Trainer`: L1 and, of policies that speak in tokens, token accuracy, over all datasets and
    for each. Padded actions do not count.

    Predicted tokens are teacher-forced and, as in the published training, of the whole vocabulary; for the distances,
    a token that is no action counts as the nearest one that is.

    FAST tokens spell a chunk or nothing: `valid_chunks` is the share of rows whose predicted tokens do, the distances
    are those of these rows, to the chunk that the labels spell, and are absent where there is no such row. Of their
    accuracy, the tokens of repeated actions are a part.

    Of robots that differ in action dimension each number counts alike; those that pad a robot's actions do not.

    Args:
        processor: The policy's, with the statistics of all datasets.
        datasets (`Sequence[str]`): Dataset of each row, in the order of validation.
    """

    def __init__(self, processor: Any, datasets: Sequence[str]):
        self.processor, self.datasets = processor, np.array(datasets)

    @property
    def label_names(self) -> list[str]:
        """What of a batch a prediction is held against, for `Trainer.label_names`."""
        return ["labels", "action_is_pad", *(["actions"] if self.processor.head_type not in TOKEN_HEADS else [])]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """
        Args:
            prediction (`EvalPrediction`): `predictions`, tokens (N, A) with -100 beside those of shorter rows, or
                normalised actions (N, K, D), and `label_ids`, of each of `label_names` one array.

        Returns:
            `dict[str, float]`: `l1_normalized` and, of tokens, `action_accuracy` (of FAST tokens `valid_chunks`, too),
            over all and for each dataset behind its name (`DATASET/action_accuracy`); and by dimension
            `DATASET/l1_normalized/x`, ..., and `DATASET/l1/x`, ... in the dataset's units.
        """
        labels, is_pad, *numbers = prediction.label_ids
        if len(labels) != len(self.datasets):
            raise ValueError(f"{len(labels)} rows were predicted, and {len(self.datasets)} are known.")
        counts, shares = ~is_pad.astype(bool), {}  # (N, K), and by name for each row an array of what is averaged
        if numbers:
            predicted, targets = (self._own_numbers(rows) for rows in (prediction.predictions, numbers[0]))
        else:
            tokens = _rows(prediction.predictions), _rows(labels)
            if self.processor.head_type == "fast":
                predicted, targets, is_valid, shares = self._measure_fast(*tokens, counts.shape[1])
                counts = counts & is_valid[:, None]
            else:
                predicted, targets, shares = self._measure_bins(*tokens, counts)
        metrics = _average(shares, predicted, targets, counts)
        for name in dict.fromkeys(self.datasets.tolist()):
            rows = np.flatnonzero(self.datasets == name)
            own = {kind: [values[row] for row in rows] for kind, values in shares.items()}
            pair = [np.stack([values[row] for row in rows]) for values in (predicted, targets)]  # (rows, K, D)
            summary = _average(own, *pair, counts[rows])
            summary |= self._by_dimension(*pair, counts[rows], name)
            metrics |= {f"{name}/{kind}": value for kind, value in summary.items()}
        return metrics

    def _measure_bins(
        self, predicted: list[np.ndarray], targets: list[np.ndarray], counts: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, list[np.ndarray]]]:
        """Normalised actions, N of (K, D), predicted and true, and which of the tokens that count are right."""
        is_action = [ActionTokens.of(self.processor).find(row) for row in targets]
        tokens, target_tokens = (
            [row[kept].reshape(counts.shape[1], -1) for row, kept in zip(rows, is_action, strict=True)]
            for rows in (predicted, targets)
        )
        is_right = [(row == target)[kept] for row, target, kept in zip(tokens, target_tokens, counts, strict=True)]
        actions = ([self._decode(row) for row in rows] for rows in (tokens, target_tokens))
        return *actions, {"action_accuracy": [row.flatten() for row in is_right]}

    def _decode(self, tokens: np.ndarray) -> np.ndarray:
        """Normalised actions, float64 of the same shape."""
        codec = self.processor.codec
        return codec.decode(tokens.clip(codec.token_end - codec.n_bins, codec.token_end - 1))

    def _measure_fast(
        self, predicted: list[np.ndarray], targets: list[np.ndarray], chunk_size: int
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray, dict[str, list[np.ndarray]]]:
        """
        Normalised actions, N of (K, D), predicted and true, which rows are predicted chunks, and the shares that
        tokens and rows are counted in.
        """
        is_action = [ActionTokens.of(self.processor).find(row) for row in targets]
        tokens, target_tokens = (
            [row[kept] for row, kept in zip(rows, is_action, strict=True)] for rows in (predicted, targets)
        )
        is_right = [row == target for row, target in zip(tokens, target_tokens, strict=True)]
        shapes = [(chunk_size, size) for size in self._sizes()]
        true = [self._spell(row, shape) for row, shape in zip(target_tokens, shapes, strict=True)]
        spelled = [np.full(shape, np.nan) for shape in shapes]
        is_valid = np.zeros(len(true), dtype=bool)
        for index, row in enumerate(tokens):
            try:
                spelled[index], is_valid[index] = self._spell(row, shapes[index]), True
            except ValueError:  # a MalformedActionError
                continue
        shares = {"action_accuracy": is_right, "valid_chunks": list(is_valid[:, None])}
        return spelled, true, is_valid, shares

    def _spell(self, token_ids: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """The normalised chunk of this shape (K, D) of FAST tokens (n,)."""
        tokens = (self.processor.action_token_end - 1 - token_ids).tolist()
        return self.processor.fast_tokenizer.decode([tokens], *shape)[0]

    def _sizes(self) -> list[int]:
        """Numbers in the actions of each row's robot, N."""
        return [len(self.processor.norm_stats[name]["action"]["q01"]) for name in self.datasets.tolist()]

    def _own_numbers(self, actions: np.ndarray) -> list[np.ndarray]:
        """Of actions (N, K, D), float64, N of (K, D) without what pads those of each row's robot."""
        return [np.asarray(row, np.float64)[:, :size] for row, size in zip(actions, self._sizes(), strict=True)]

    def _by_dimension(
        self, predicted: np.ndarray, targets: np.ndarray, counts: np.ndarray, dataset: str
    ) -> dict[str, float]:
        """L1 of each number of an action, normalised and in the dataset's units."""
        if not counts.any():
            return {}
        actions = [self.processor.unnormalize_actions(values, dataset) for values in (predicted, targets)]
        distances = {"l1_normalized": np.abs(predicted - targets), "l1": np.abs(actions[0] - actions[1])}
        means = {kind: values[counts].mean(axis=0).tolist() for kind, values in distances.items()}  # (D,) each
        return {
            f"{kind}/{dimension}": value
            for kind, values in means.items()
            for dimension, value in zip(dimension_names(len(values)), values, strict=True)
        }


def _rows(tokens: Any) -> list[np.ndarray]:
    """The tokens of each row of (N, A), without the -100 beside them."""
    return [row[row != IGNORE_INDEX] for row in np.asarray(tokens)]


def _average(
    shares: dict[str, list[np.ndarray]],
    predicted: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    counts: np.ndarray,
) -> dict[str, float]:
    """Means over all rows: of the values of `shares`, and L1 of the actions, N of (K, D), that count (N, K)."""
    averages = {kind: float(np.concatenate(values).mean()) for kind, values in shares.items()}
    if counts.any():
        rows = zip(predicted, targets, counts, strict=True)
        averages["l1_normalized"] = float(np.concatenate([np.abs(p - t)[c].flatten() for p, t, c in rows]).mean())
    return averages
