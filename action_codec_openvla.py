# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Actions of a robot <-> normalised actions in [-1, 1] <-> action tokens."""

from collections.abc import Sequence

import numpy as np

from .configuration_openvla import STATISTICS_BOUNDS, OpenVLAConfig


class ActionCodec:
    """
    Uniform bins over [-1, 1], spoken as the last tokens of the vocabulary.

    `n_bins` edges from -1 to 1 enclose `n_bins - 1` intervals. Bin `d` in 1..n_bins of a value is the number of edges
    at or below it, and its token is `token_end - d`: low values have high ids. A token decodes to the centre of its
    interval; the two lowest ids share the topmost one, since bin `n_bins` holds the value 1 alone.

    Args:
        n_bins (`int`): Number of action tokens, 256 in every published checkpoint.
        token_end (`int`): One past the last action token, 32000 in Llama-2's vocabulary.
    """

    def __init__(self, n_bins: int, token_end: int):
        self.n_bins = n_bins
        self.token_end = token_end
        self.edges = np.linspace(-1.0, 1.0, n_bins)  # (n_bins,)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2.0  # (n_bins - 1,)

    @classmethod
    def from_config(cls, config: OpenVLAConfig) -> "ActionCodec":
        return cls(config.n_action_bins, config.action_token_end)

    @property
    def bin_centers(self) -> np.ndarray:
        """Values of the bins 1..n_bins, in ascending order, (n_bins,)."""
        return np.append(self.centers, self.centers[-1])

    def encode(self, normalized_actions: np.ndarray) -> np.ndarray:
        """
        Token ids of normalised actions; values outside [-1, 1] are clipped.

        Args:
            normalized_actions (`np.ndarray`): Any shape.

        Returns:
            `np.ndarray`: int64 ids of the same shape.

        Raises:
            ValueError: If a value is NaN.
        """
        values = np.asarray(normalized_actions)
        if np.isnan(values).any():
            raise ValueError(f"Actions to encode contain NaN: {values.tolist()}.")
        return self.token_end - np.digitize(np.clip(values, -1.0, 1.0), self.edges).astype(np.int64)

    def decode(self, token_ids: np.ndarray) -> np.ndarray:
        """
        Normalised actions of action tokens.

        Args:
            token_ids (`np.ndarray`): Integer ids of any shape.

        Returns:
            `np.ndarray`: float64 values of the same shape.

        Raises:
            ValueError: If an id is not an action token.
        """
        bins = self.token_end - np.asarray(token_ids)
        if ((bins < 1) | (bins > self.n_bins)).any():
            raise ValueError(
                f"{np.asarray(token_ids).tolist()} holds ids that are no action tokens; these are "
                f"{self.token_end - self.n_bins}..{self.token_end - 1}."
            )
        return self.bin_centers[bins - 1]


def resolve_key(norm_stats: dict[str, dict], unnorm_key: str | None) -> str:
    """
    The dataset `unnorm_key`, which may be `None` where there is only one.

    Raises:
        ValueError: Listing the keys, if the key is missing or unknown.
    """
    if not norm_stats:
        raise ValueError(
            "There are no dataset statistics to un-normalise actions with; assign `model.norm_stats` or put a "
            "dataset_statistics.json beside config.json."
        )
    if unnorm_key is None:
        if len(norm_stats) > 1:
            raise ValueError(
                f"The statistics hold {len(norm_stats)} datasets; pass `unnorm_key`, one of {sorted(norm_stats)}."
            )
        return next(iter(norm_stats))
    if unnorm_key not in norm_stats:
        raise ValueError(f"`unnorm_key={unnorm_key!r}` is not in the statistics; they hold {sorted(norm_stats)}.")
    return unnorm_key


def select_statistics(norm_stats: dict[str, dict], unnorm_key: str | None) -> dict:
    """Statistics of the dataset that [`resolve_key`] tells."""
    return norm_stats[resolve_key(norm_stats, unnorm_key)]


def resolve_row_keys(
    norm_stats: dict[str, dict], unnorm_key: str | Sequence[str] | None, batch_size: int
) -> list[str]:
    """
    The dataset of each row of a batch.

    Args:
        norm_stats (`dict`): Statistics by dataset name.
        unnorm_key (`str`, `list[str]` or `None`): One key for all rows, or one per row.
        batch_size (`int`): Number of rows.

    Raises:
        ValueError: On an unknown key, or a wrong number of keys.
    """
    if unnorm_key is None or isinstance(unnorm_key, str):
        return [resolve_key(norm_stats, unnorm_key)] * batch_size
    if len(unnorm_key) != batch_size:
        raise ValueError(f"{len(unnorm_key)} `unnorm_key`s were given for a batch of {batch_size}.")
    return [resolve_key(norm_stats, key) for key in unnorm_key]


def select_row_statistics(
    norm_stats: dict[str, dict], unnorm_key: str | Sequence[str] | None, batch_size: int
) -> list[dict]:
    """
    Statistics for each row of a batch, whose datasets must agree in action dimension.

    Args:
        norm_stats, unnorm_key, batch_size: See [`resolve_row_keys`].

    Returns:
        `list[dict]`: One dictionary with `action` (and `proprio`) per row.

    Raises:
        ValueError: On an unknown key, a wrong number of keys, or rows that differ in action dimension.
    """
    keys = resolve_row_keys(norm_stats, unnorm_key, batch_size)
    sizes = {key: action_dim(norm_stats[key]) for key in keys}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Rows of one batch need the same action dimension, got {sizes}.")
    return [norm_stats[key] for key in keys]


def embodiment_rows(embodiments: Sequence[str], keys: Sequence[str]) -> list[int]:
    """
    Place of each dataset of `keys` among the `embodiments` of a policy.

    Raises:
        ValueError: Listing the known ones, if a dataset is none of them.
    """
    if unknown := sorted(set(keys) - set(embodiments)):
        raise ValueError(f"The policy tells the robots {list(embodiments)} apart (`embodiments`), not {unknown}.")
    return [embodiments.index(key) for key in keys]


def action_dim(statistics: dict) -> int:
    """Number of action dimensions of a dataset."""
    return len(statistics["action"]["q01"])


def normalize(values: np.ndarray, statistics: dict, norm_type: str = "bounds_q99") -> np.ndarray:
    """
    Physical values to normalised ones, as the training data of OpenVLA were made: bounds are clipped to [-1, 1],
    dimensions outside the mask (the gripper) are kept, and dimensions that never change become 0.

    Args:
        values (`np.ndarray`): (..., D), in the units of the dataset.
        statistics (`dict`): The `action` or `proprio` block of a dataset.
        norm_type (`str`): `bounds_q99`, `bounds` or `normal`.

    Returns:
        `np.ndarray`: float64 (..., D).
    """
    values = np.asarray(values, dtype=np.float64)
    low, scale, mask = _affine(statistics, norm_type, values.shape[-1])
    normalized = (values - low) / (scale + 1e-8)
    if norm_type != "normal":
        normalized = np.clip(2.0 * normalized - 1.0, -1.0, 1.0)
    normalized = np.where(mask, normalized, values)
    if norm_type == "normal" or "min" not in statistics:
        return normalized
    constant = np.asarray(statistics["min"]) == np.asarray(statistics["max"])
    return np.where(constant, 0.0, normalized)


def unnormalize(normalized: np.ndarray, statistics: dict, norm_type: str = "bounds_q99") -> np.ndarray:
    """
    Normalised values to physical ones; dimensions outside the mask are kept.

    Args:
        normalized (`np.ndarray`): (..., D).
        statistics (`dict`): The `action` or `proprio` block of a dataset.
        norm_type (`str`): `bounds_q99`, `bounds` or `normal`.

    Returns:
        `np.ndarray`: float64 (..., D), in the units of the dataset.
    """
    normalized = np.asarray(normalized, dtype=np.float64)
    low, scale, mask = _affine(statistics, norm_type, normalized.shape[-1])
    if norm_type == "normal":
        return np.where(mask, normalized * (scale + 1e-8) + low, normalized)
    return np.where(mask, 0.5 * (normalized + 1.0) * scale + low, normalized)


def _affine(statistics: dict, norm_type: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset, scale and mask, each (D,)."""
    names = STATISTICS_BOUNDS[norm_type]
    if missing := [name for name in names if name not in statistics]:
        raise ValueError(f"`norm_type={norm_type!r}` needs {list(names)}, and the statistics lack {missing}.")
    first, second = (np.asarray(statistics[name], dtype=np.float64) for name in names)
    if len(first) != size:
        raise ValueError(f"The statistics are of {len(first)} dimensions, and the values of {size}.")
    mask = np.asarray(statistics.get("mask", [True] * size), dtype=bool)
    return first, second if norm_type == "normal" else second - first, mask
