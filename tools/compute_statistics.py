"""
Compute what scales a dataset's actions and states for the model, and write it as `dataset_statistics.json`.

    python tools/compute_statistics.py demonstrations --output dataset_statistics.json
    python tools/compute_statistics.py owner/dataset libero=rlds/libero_goal_no_noops --output dataset_statistics.json
    python tools/compute_statistics.py aloha --mask 1,1,1,1,1,1,0,1,1,1,1,1,1,0 --output dataset_statistics.json

A SOURCE is a LeRobot or RLDS dataset: a folder, an id on the Hub or a URL. `name=SOURCE` gives it another name, under
which the model finds its statistics (`unnorm_key`).

Per dataset, the file holds for `action` and `proprio` (the state) the mean, standard deviation, minimum, maximum and
the quantiles q01 and q99 of each dimension; for the action `mask`, the dimensions that are normalised; and the
numbers of steps and episodes. They are exact, and computed as OpenVLA does: over all splits, including episodes
without an instruction. LeRobot's own stats.json is not used: its quantiles are averages over episodes. A dataset
without a state has no `proprio`.

`--config` describes datasets by their names, with the fields of robot_data/standardize.py:

    demonstrations: {action: ["action[:6]", "action[6] | invert"], state: null}
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from robot_data.episode import Source, dimension_names
from robot_data.sources import open_source
from robot_data.standardize import DatasetConfig, config_for, registry_name
from robot_data.statistics import compute_statistics, find_weaknesses


COLUMNS = ("mean", "std", "min", "q01", "q99", "max")


# Datasets


def open_datasets(
    sources: Sequence[str], split: str, entries: Mapping[str, Any]
) -> dict[str, tuple[Source, DatasetConfig]]:
    """
    The datasets of a command line with their descriptions.

    Args:
        sources (`Sequence[str]`): Where they are, or `name=where`.
        split (`str`): Of each.
        entries (`Mapping[str, Any]`): By name of the dataset, what is different in its description.

    Returns:
        `dict[str, tuple[Source, DatasetConfig]]`: By the name given, or else the dataset's own.

    Raises:
        ValueError: If two have the same name, or an entry belongs to none.
        OSError: If there is no such dataset.
    """
    opened: dict[str, Source] = {}
    for given, path in map(split_name, sources):
        source = open_source(path, split=split)
        name = given or source.name
        if name in opened:
            raise ValueError(f"Two datasets are called {name!r}; give one another name with `name=SOURCE`.")
        opened[name] = source
    if unknown := sorted(set(entries) - set(opened)):
        raise ValueError(f"--config describes {unknown}; the datasets are {list(opened)}.")
    return {name: (source, describe(name, source, entries.get(name))) for name, source in opened.items()}


def describe(name: str, source: Source, entry: Mapping[str, Any] | None) -> DatasetConfig:
    """The description of a dataset that is known under the name given or its own, or of any other."""
    known = name if registry_name(name) else source.name
    return config_for(known, source.columns, source.images, entry)


def split_name(source: str) -> tuple[str | None, str]:
    """`name=path` -> (name, path); a path alone has no name."""
    name, equals, path = source.partition("=")
    if not equals or "/" in name or Path(source).exists():
        return None, source
    if not name or not path:
        raise ValueError(f"Expected SOURCE or name=SOURCE, got {source!r}.")
    return name, path


def read_entries(path: Path | None) -> dict[str, Any]:
    """
    The file of `--config`, empty without one.

    Raises:
        ValueError: If it is not YAML, or not a mapping of mappings.
    """
    if path is None:
        return {}
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError(f"{path} must give a description for each dataset by its name.")
    return entries


# Statistics


def compute(name: str, source: Source, config: DatasetConfig, **options: Any) -> dict[str, Any]:
    """[`compute_statistics`] with a progress bar."""
    with logging_redirect_tqdm(), tqdm(total=source.num_episodes, unit="episode", desc=name, disable=None) as bar:
        return compute_statistics(source, config, on_episode=lambda episode: bar.update(), **options)


def format_statistics(statistics: dict[str, Any]) -> str:
    """The statistics of one dataset as text, one line per dimension with what is the matter with it."""
    notes = {(block, dimension): note for block, dimension, note in find_weaknesses(statistics)}
    rows = [("dimension", *COLUMNS, "mask", "")]
    for block in ("action", "proprio"):
        values = statistics.get(block, {"mean": []})
        size = len(values["mean"])
        names = dimension_names(size) if block == "action" else [f"state {index}" for index in range(size)]
        masks = ["yes" if value else "no" for value in values.get("mask", [])] or ["-"] * size
        for index, (name, mask) in enumerate(zip(names, masks, strict=True)):
            numbers = [format(values[column][index], ".4g") for column in COLUMNS]
            rows.append((name, *numbers, mask, notes.get((block, index), "")))
    return align(rows)


def align(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose first row is its header; so many columns at its left, and the last, are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < left or column == len(row) - 1 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# The file


def read_output(path: Path, overwrite: bool, update: bool) -> dict[str, Any]:
    """
    The statistics to keep of a file that is there already.

    Raises:
        ValueError: If it would be lost, or is to be kept and cannot be read.
    """
    if not path.exists() or overwrite:
        return {}
    if not update:
        raise ValueError(f"{path} exists; --update adds to it, --overwrite replaces it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be updated, it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be updated: it must hold statistics by dataset.")
    return content


def write_output(path: Path, statistics: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(statistics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# The command line


def parse_mask(text: str) -> list[bool]:
    """`1,1,0` -> [True, True, False]"""
    values = [value.strip() for value in text.split(",")]
    if not set(values) <= {"0", "1"}:
        raise argparse.ArgumentTypeError(f"expected ones and zeros such as 1,1,1,1,1,1,0, got {text!r}")
    return [value == "1" for value in values]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources", metavar="SOURCE", nargs="+", help="folder, Hub id or URL of a dataset, or name=SOURCE"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="dataset_statistics.json to write")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--update", action="store_true", help="keep the other datasets of an existing FILE")
    existing.add_argument("--overwrite", action="store_true", help="replace an existing FILE")
    parser.add_argument(
        "--split", default="all", help="%(default)s by default, as in OpenVLA, or one of the dataset's"
    )
    parser.add_argument("--config", type=Path, metavar="YAML", help="descriptions of datasets")
    parser.add_argument(
        "--mask",
        type=parse_mask,
        help="dimensions of the action that are normalised, such as 1,1,1,1,1,1,0; by default all but the last",
    )
    parser.add_argument("--skip_bad_episodes", action="store_true", help="log damaged episodes and go on")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Compute, print and write."""
    statistics = read_output(arguments.output, arguments.overwrite, arguments.update)
    datasets = open_datasets(arguments.sources, arguments.split, read_entries(arguments.config))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    options = {"mask": arguments.mask, "skip_bad_episodes": arguments.skip_bad_episodes}
    for name, (source, config) in datasets.items():
        statistics[name] = computed = compute(name, source, config, **options)
        print(f"{name}: {computed['num_transitions']} steps, {computed['num_trajectories']} episodes\n")
        print(format_statistics(computed), end="\n\n")
    write_output(arguments.output, statistics)
    print(f"{arguments.output}: written, with {', '.join(statistics)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error becomes one line and exit status 1."""
    options = make_parser().parse_args(arguments)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
