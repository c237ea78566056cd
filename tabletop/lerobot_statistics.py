"""Statistics of a dataset as LeRobot stores them, exact over all frames."""

from collections.abc import Iterator

import numpy as np


QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


def vector_statistics(values: np.ndarray) -> dict[str, list]:
    """LeRobot's statistics of numbers (N,) or (N, D), exact, each a list of D (`count`: of one)."""
    values = values.reshape(len(values), -1)  # (N, D)
    wide = values.astype(np.float64)
    quantiles = np.quantile(wide, list(QUANTILES.values()), axis=0)  # (5, D)
    return {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": wide.mean(axis=0).tolist(),
        "std": wide.std(axis=0).tolist(),
        "count": [len(values)],
        **dict(zip(QUANTILES, quantiles.tolist(), strict=True)),
    }


def image_histogram(pictures: Iterator[np.ndarray]) -> np.ndarray:
    """Pixels of each channel and level, (3, 256), of uint8 pictures (S, S, 3)."""
    return sum(
        np.stack([np.bincount(picture[..., channel].reshape(-1), minlength=256) for channel in range(3)])
        for picture in pictures
    )


def image_statistics(histogram: np.ndarray, frames: int) -> dict[str, list]:
    """
    LeRobot's statistics of pictures with values in [0, 1], exact over all pixels.

    Args:
        histogram (`np.ndarray`): (3, 256), pixels of each channel and level.
        frames (`int`): Number of pictures, which is LeRobot's `count`.

    Returns:
        `dict[str, list]`: Each statistic nested as (3, 1, 1), `count` as (1,).
    """
    levels = np.arange(256) / 255
    total = histogram[0].sum()
    mean = histogram @ levels / total  # (3,)
    spread = np.sqrt((histogram * (levels - mean[:, None]) ** 2).sum(axis=1) / total)
    present = histogram > 0
    moments = {
        "min": levels[present.argmax(axis=1)],
        "max": levels[255 - present[:, ::-1].argmax(axis=1)],
        "mean": mean,
        "std": spread,
    }
    quantiles = {name: _histogram_quantile(histogram, quantile) for name, quantile in QUANTILES.items()}
    return {
        **{name: value.reshape(3, 1, 1).tolist() for name, value in moments.items()},
        "count": [frames],
        **{name: value.reshape(3, 1, 1).tolist() for name, value in quantiles.items()},
    }


def _histogram_quantile(histogram: np.ndarray, quantile: float) -> np.ndarray:
    """What `np.quantile` gives for the pixels behind a histogram (3, 256), in [0, 1], (3,)."""
    cumulative = histogram.cumsum(axis=1)
    rank = quantile * (cumulative[0, -1] - 1)
    below, above = (
        np.array([np.searchsorted(row, at, side="right") for row in cumulative])
        for at in (int(np.floor(rank)), int(np.ceil(rank)))
    )
    return (below + (above - below) * (rank - np.floor(rank))) / 255
