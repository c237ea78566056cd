"""A source's episodes in the project's form, in order."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from .episode import BadEpisodeError, Episode, RawEpisode, Source
from .standardize import DatasetConfig, required_columns, required_images, standardize


logger = logging.getLogger(__name__)


def iter_episodes(
    source: Source, config: DatasetConfig, *, skip_bad_episodes: bool = False, removed: Counter[str] | None = None
) -> Iterator[Episode]:
    """
    The episodes of a dataset in their order, once: for evaluation, statistics or a look.

    Args:
        source (`Source`): The dataset.
        config (`DatasetConfig`): Its description, with the filters. Only the columns and cameras that it names are
            read.
        skip_bad_episodes (`bool`, defaults to `False`): Log damaged episodes and go on, rather than raise.
        removed (`Counter[str]`, *optional*): The number of steps that filters remove is added to it by reason.

    Raises:
        BadEpisodeError: If an episode is damaged.
    """

    def report(ordinal: int, error: BadEpisodeError) -> None:
        if not skip_bad_episodes:
            raise error
        logger.warning("Skipped: %s", error)

    for unit in range(source.num_units):
        for _, episode in read_unit(source, config, unit, report, Counter() if removed is None else removed):
            yield episode


def read_unit(
    source: Source,
    config: DatasetConfig,
    unit: int,
    report: Callable[[int, BadEpisodeError], None],
    removed: Counter[str],
) -> Iterator[tuple[int, Episode]]:
    """
    The episodes of a unit with their places in it.

    Args:
        source (`Source`), config (`DatasetConfig`): As in [`iter_episodes`].
        unit (`int`): Number of the unit.
        report (`Callable[[int, BadEpisodeError], None]`): Hears of the place and the fault of each damaged episode,
            and may raise.
        removed (`Counter[str]`): The number of steps that filters remove is added to it by reason.
    """

    columns, images = required_columns(config), required_images(config)
    for ordinal, raw in read_raw(source, unit, columns, images, report):
        try:
            episode, reasons = config.filters.apply(standardize(raw, config), raw)
        except BadEpisodeError as error:
            report(ordinal, error)
            continue
        removed.update(reasons)
        if episode is not None:
            yield ordinal, episode


def read_raw(
    source: Source,
    unit: int,
    columns: Sequence[str],
    images: Sequence[str],
    report: Callable[[int, BadEpisodeError], None],
) -> Iterator[tuple[int, RawEpisode]]:
    """
    The episodes of a unit as the dataset has them, with their places in it; damaged ones are reported, as in
    [`read_unit`].

    Args:
        source (`Source`), unit (`int`), columns (`Sequence[str]`), images (`Sequence[str]`): As in [`Source.read`].
        report (`Callable[[int, BadEpisodeError], None]`): As in [`read_unit`].
    """
    try:
        episodes = source.read(unit, columns, images)
    except BadEpisodeError as error:
        report(0, error)
        return
    for ordinal in itertools.count():
        try:
            raw = next(episodes, None)
        except BadEpisodeError as error:
            report(ordinal, error)
            continue
        if raw is None:
            return
        yield ordinal, raw
