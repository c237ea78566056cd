"""Mixtures of datasets: by name, by weight, and which dataset the next step comes from."""

import os
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .episode import Source
from .sources import open_source
from .standardize import DatasetConfig, config_for


MIXTURES = Path(__file__).with_name("mixtures.yaml")
# 2^64 divided by the golden ratio, odd: its multiples fill the circle of 2^64 more evenly than any other's (Knuth, The
# Art of Computer Programming, volume 3, section 6.4).
GOLDEN_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Part:
    """
    One dataset of a mixture.

    Args:
        source (`Source`): The dataset.
        config (`DatasetConfig`): Its description.
        weight (`float`, defaults to 1.0): See [`probabilities`].
        num_steps (`int`, *optional*): Steps that it gives, such as `num_transitions` of its statistics; by default
            what its files say, before filters.

    Raises:
        ValueError: If the weight or the number of steps is not positive, or the dataset is empty.
    """

    source: Source
    config: DatasetConfig
    weight: float = 1.0
    num_steps: int | None = None

    def __post_init__(self):
        name = self.source.name
        if not 0 < self.weight < float("inf"):
            raise ValueError(
                f"The weight of {name} must be positive, got {self.weight}; leave the dataset out instead."
            )
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"`num_steps` of {name} must be positive, got {self.num_steps}.")
        if self.source.num_units < 1:
            raise ValueError(f"{name} is empty.")


def read_mixture(mixture: str | os.PathLike) -> dict[str, float]:
    """
    The weights of a mixture.

    Args:
        mixture (`str` or `os.PathLike`): A name of mixtures.yaml, such as `oxe_magic_soup_plus_minus`; or a YAML file
            of one mixture, `{dataset: weight}`.

    Returns:
        `dict[str, float]`: By dataset.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such mixture, or the file holds none.
    """
    text = os.fspath(mixture)
    known = yaml.safe_load(MIXTURES.read_text(encoding="utf-8"))
    if text in known:
        return known[text]
    if not text.endswith((".yaml", ".yml", ".json")):
        raise ValueError(f"There is no mixture {text!r}; known: {sorted(known)}, or give a YAML file of weights.")
    try:
        weights = yaml.safe_load(Path(text).read_text(encoding="utf-8"))
        return {str(name): float(weight) for name, weight in weights.items()}
    except (AttributeError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{text} must give a weight for each dataset by its name: {error}") from error


def open_part(
    location: str,
    *,
    name: str | None = None,
    weight: float = 1.0,
    num_steps: int | None = None,
    entries: Mapping[str, Mapping[str, Any]] | None = None,
) -> Part:
    """
    A dataset with its description.

    Args:
        location (`str`): See [`open_source`].
        name (`str`, *optional*): As in [`open_source`].
        weight (`float`, defaults to 1.0), num_steps (`int`, *optional*): See [`Part`].
        entries (`Mapping[str, Mapping]`, *optional*): By dataset, what is different in its description; see
            [`config_for`].

    Raises:
        FileNotFoundError: If there is no such dataset.
        ValueError: If it is empty, or its description does not fit.
    """
    source = open_source(location, name=name)
    config = config_for(source.name, source.columns, source.images, (entries or {}).get(source.name))
    return Part(source, config, weight, num_steps)


def open_mixture(
    mixture: str | os.PathLike,
    root: str | os.PathLike,
    *,
    entries: Mapping[str, Mapping[str, Any]] | None = None,
    statistics: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Part]:
    """
    The datasets of a mixture, each in the folder of its name.

    Args:
        mixture (`str` or `os.PathLike`): See [`read_mixture`].
        root (`str` or `os.PathLike`): The folder of these folders, or its URL.
        entries (`Mapping[str, Mapping]`, *optional*): By dataset, what is different in its description; see
            [`config_for`].
        statistics (`Mapping[str, Mapping]`, *optional*): By dataset, of which `num_transitions` says how many steps
            there are. Files of RLDS do not, and weights that count per step need it.

    Raises:
        FileNotFoundError: If a dataset is missing.
        ValueError: If there is no such mixture, or a description does not fit or belongs to no dataset of it.
    """
    weights, entries, statistics = read_mixture(mixture), entries or {}, statistics or {}
    if unknown := sorted(set(entries) - set(weights)):
        raise ValueError(f"Descriptions are given of {unknown}; the mixture has {sorted(weights)}.")
    return [
        open_part(
            f"{os.fspath(root).rstrip('/')}/{name}",
            name=name,
            weight=weight,
            num_steps=statistics.get(name, {}).get("num_transitions"),
            entries=entries,
        )
        for name, weight in weights.items()
    ]


def probabilities(parts: Sequence[Part], balance: bool = True) -> list[float]:
    """
    How often each dataset of a mixture comes up.

    Args:
        parts (`Sequence[Part]`): The mixture.
        balance (`bool`, defaults to `True`): Weights count per step, as in OpenVLA's training: the probability is
            proportional to weight x number of steps, so that equal weights make all steps equally likely. Otherwise
            it is proportional to the weight alone.

    Returns:
        `list[float]`: One for each part; their sum is 1.

    Raises:
        ValueError: If a number of steps is needed and not known.
    """
    shares = [part.weight for part in parts]
    if balance and len(parts) > 1:
        sizes = [part.num_steps or part.source.num_steps for part in parts]
        if unknown := [part.source.name for part, size in zip(parts, sizes, strict=True) if size is None]:
            raise ValueError(
                f"The files of {unknown} do not say how many steps there are, which `balance` needs. Give `num_steps` "
                "(`num_transitions` of the dataset's statistics), or weights that count by dataset with "
                "`balance=False`."
            )
        shares = [share * size for share, size in zip(shares, sizes, strict=True)]
    return [share / sum(shares) for share in shares]


class Choices:
    """
    A sequence of choices that keeps to its probabilities more closely than dice would.

    Draw t falls on the point `start + t / golden ratio` of a circle that is divided by the probabilities. Any n draws
    in a row hold each choice n p times, up to a few; and the t-th is known without the ones before it.

    Args:
        probabilities (`Sequence[float]`): They add up to 1.
        start (`int`): From 0 to 2^64 - 1.
    """

    def __init__(self, probabilities: Sequence[float], start: int):
        self._bounds = np.cumsum(probabilities)[:-1].tolist()
        self._start = start

    def __getitem__(self, draw: int) -> int:
        point = (self._start + draw * GOLDEN_STEP) % 2**64
        return bisect(self._bounds, point / 2**64)
