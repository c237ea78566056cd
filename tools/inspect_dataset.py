"""
Show what is in a dataset: as a table, and one episode as a picture.

    python tools/inspect_dataset.py demonstrations
    python tools/inspect_dataset.py owner/dataset --episode 3 --output_dir pictures

SOURCE is a LeRobot or RLDS dataset: a folder, an id on the Hub or a URL. Its numbers are all read once; damaged
episodes are reported and left out. The actions are those that training would see: standardised by the description of
the dataset, which `--config` changes as in tools/compute_statistics.py, but not normalised.

`--output_dir` receives `<name>_episode_<N>.png`, drawn with matplotlib: pictures of every camera, each dimension of
the action with the band between the dataset's q01 and q99, and the most frequent instructions.
"""

import argparse
import importlib.util
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from compute_statistics import align, format_statistics, open_datasets, read_entries
from tqdm import tqdm


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from robot_data.episode import BadEpisodeError, Episode, RawEpisode, Source, dimension_names
from robot_data.pictures import decode
from robot_data.reading import read_raw
from robot_data.standardize import DatasetConfig, required_columns, standardize
from robot_data.statistics import compute_statistics


if TYPE_CHECKING:
    from matplotlib.figure import SubFigure


NUM_PICTURES, CURVE_COLUMNS = 8, 4
NUM_LISTED, NUM_DRAWN = 50, 12  # instructions in the table and in the picture
WIDTH, CURVE_HEIGHT, LINE_HEIGHT, TITLE_HEIGHT = 16, 1.8, 0.19, 0.45  # inches
CURVE_COLOR, BAND_COLOR, QUIET_COLOR = "#1f6fd0", "#dbe6f5", "#8a94a0"
MANY_STEPS = 60  # of which a curve has no dots
UNLABELED = "(no instruction)"


@dataclass
class Contents:
    """
    What a dataset holds.

    Args:
        name (`str`): Of the dataset.
        lengths (`dict[int, int]`): Steps by number of the episode.
        steps (`Counter[str]`): Steps by instruction.
        episodes (`Counter[str]`): Episodes by instruction; one with several counts for each.
        statistics (`dict`): From [`compute_statistics`].
    """

    name: str
    lengths: dict[int, int] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)
    episodes: Counter[str] = field(default_factory=Counter)
    statistics: dict[str, Any] = field(default_factory=dict)

    def add(self, episode: Episode) -> None:
        """Count an episode."""
        counted = Counter(text.strip() or UNLABELED for text in episode.instructions)
        self.lengths[episode.index] = len(episode)
        self.steps += counted
        self.episodes += Counter(counted.keys())


@dataclass
class View:
    """
    One episode to look at.

    Args:
        raw (`RawEpisode`): As the dataset has it, with all pictures.
        episode (`Episode`): In the project's form, without.
        frames (`list[int]`): Steps of `episode` whose pictures are shown.
        pictures (`dict[str, list[np.ndarray | None]]`): These by camera, uint8 (H, W, 3); None for an empty one.
        faults (`dict[str, str]`): By camera, why it cannot be shown.
    """

    raw: RawEpisode
    episode: Episode
    frames: list[int]
    pictures: dict[str, list[np.ndarray | None]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


# Reading


def survey(name: str, source: Source, config: DatasetConfig) -> Contents:
    """Read all numbers of a dataset, with a progress bar."""
    contents = Contents(name)
    with tqdm(total=source.num_episodes, unit="episode", desc=name, disable=None) as bar:

        def add(episode: Episode) -> None:
            contents.add(episode)
            bar.update()

        contents.statistics = compute_statistics(source, config, skip_bad_episodes=True, on_episode=add)
    return contents


def open_view(source: Source, config: DatasetConfig, number: int) -> View:
    """
    Read an episode with its pictures.

    Raises:
        ValueError: If there is none of this number.
        BadEpisodeError: If its numbers are damaged.
    """
    raw = read_episode(source, find_unit(source, number), number, required_columns(config), source.images)
    episode = standardize(raw, replace(config, cameras={}))
    frames = np.unique(np.linspace(0, len(episode) - 1, NUM_PICTURES).round().astype(int)).tolist()
    view = View(raw, episode, frames)
    for camera, stored in raw.images.items():
        try:
            view.pictures[camera] = [read_picture(stored[config.drop_first + frame]) for frame in frames]
        except ValueError as error:
            view.faults[camera] = str(error)
    return view


def find_unit(source: Source, number: int) -> int:
    """
    The unit that holds an episode.

    Raises:
        ValueError: If there is no such episode.
        BadEpisodeError: If there is none, but a damaged unit that may have held it.
    """
    damage: list[BadEpisodeError] = []
    # Most often a unit is an episode, of the same number.
    for unit in sorted(range(source.num_units), key=lambda unit: unit != number):
        episodes = read_raw(source, unit, (), (), lambda _, error: damage.append(error))
        if any(raw.index == number for _, raw in episodes):
            return unit
    named = [error for error in damage if error.episode == number]
    raise next(iter(named or damage), None) or ValueError(f"{source.name} has no episode {number}.")


def read_episode(
    source: Source, unit: int, number: int, columns: Sequence[str], images: Sequence[str] = ()
) -> RawEpisode:
    """
    An episode of a unit.

    Raises:
        BadEpisodeError: If it is damaged.
    """

    def report(_: int, error: BadEpisodeError) -> None:
        if error.episode in (number, None):
            raise error

    return next(raw for _, raw in read_raw(source, unit, columns, images, report) if raw.index == number)


def read_picture(stored: bytes | np.ndarray) -> np.ndarray | None:
    """uint8 (H, W, 3); None for the empty string that stands for no picture in RLDS."""
    return None if isinstance(stored, bytes) and not stored else decode(stored)


def describe_columns(source: Source, number: int) -> Iterator[tuple[str, str, str]]:
    """Name, type and shape of each column, as an episode has it."""
    unit = find_unit(source, number)
    for key in source.columns:
        try:
            values = read_episode(source, unit, number, [key]).columns[key]
        except ValueError as error:
            yield key, "-", f"cannot be read: {error}"
            continue
        kind = type(values[0]).__name__ if values.dtype == object else str(values.dtype)
        yield key, kind, " x ".join(map(str, values.shape[1:])) or "1"


class Collector(logging.Handler):
    """Keeps what is logged as text."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """The warnings of robot_data while the block runs, in place of their lines on the terminal."""
    parent, collector = logging.getLogger("robot_data"), Collector()
    propagate, parent.propagate = parent.propagate, False
    parent.addHandler(collector)
    try:
        yield collector.messages
    finally:
        parent.removeHandler(collector)
        parent.propagate = propagate


# Text


def format_contents(source: Source, config: DatasetConfig, contents: Contents, view: View, warnings: list[str]) -> str:
    """Everything as text."""
    lengths = list(contents.lengths.values())
    facts = {
        "dataset": contents.name,
        "episodes": f"{len(lengths)}",
        "steps": f"{sum(lengths)}, {min(lengths)} to {max(lengths)} per episode, median {np.median(lengths):g}",
        "fps": "unknown",
        **{key: str(value) for key, value in view.raw.metadata.items() if value is not None},
    }
    sections = [
        "\n".join(f"{key:{max(map(len, facts))}}  {value}" for key, value in facts.items()),
        align([("column", "type", "per step"), *describe_columns(source, view.raw.index)], left=2),
        align([("camera", "role", "height x width"), *describe_cameras(config, view)], left=2),
        align(list_instructions(contents, NUM_LISTED), left=0),
        format_statistics(contents.statistics),
        "\n".join(["warnings:", *(f"- {warning}" for warning in warnings or ["none"])]),
    ]
    return "\n\n".join(sections)


def describe_cameras(config: DatasetConfig, view: View) -> Iterator[tuple[str, str, str]]:
    """Key, role and size of each camera."""
    for camera in view.raw.images:
        shapes = {picture.shape[:2] for picture in view.pictures.get(camera, ()) if picture is not None}
        sizes = ", ".join(f"{height} x {width}" for height, width in sorted(shapes))
        yield camera, roles(config, camera), view.faults.get(camera) or sizes or "empty"


def roles(config: DatasetConfig, camera: str) -> str:
    """What a camera is used for."""
    return ", ".join(role for role, keys in config.cameras.items() if camera in keys) or "-"


def list_instructions(contents: Contents, limit: int) -> list[tuple[str, str, str]]:
    """Header, steps, episodes and text of the most frequent instructions, and how many are left out."""
    rows = [("steps", "episodes", "instruction")]
    rows += [
        (str(steps), str(contents.episodes[text]), shorten(text, 140))
        for text, steps in contents.steps.most_common(limit)
    ]
    if (rest := len(contents.steps) - limit) > 0:
        rows.append(("...", "...", f"and {count(rest, 'other')}"))
    return rows


# Picture


def check_matplotlib() -> None:
    """
    Raises:
        ValueError: If matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "The picture needs matplotlib: `pip install -r requirements-evaluation.txt`, or leave out --output_dir."
        )


def save_picture(config: DatasetConfig, contents: Contents, view: View, path: Path) -> None:
    """Write the episode's pictures, its actions and the dataset's instructions as PNG."""
    from matplotlib.figure import Figure

    curve_rows = math.ceil(view.episode.actions.shape[1] / CURVE_COLUMNS)
    lines = len(list_instructions(contents, NUM_DRAWN))
    panels = [
        (TITLE_HEIGHT + CURVE_HEIGHT * curve_rows, lambda panel: draw_curves(panel, contents, view, curve_rows)),
        (TITLE_HEIGHT + LINE_HEIGHT * lines, lambda panel: draw_instructions(panel, contents)),
    ]
    if view.pictures:
        height = sum(map(picture_height, view.pictures.values()))
        panels.insert(0, (height, lambda panel: draw_pictures(panel, config, view)))
    heights = [height for height, _ in panels]
    figure = Figure((WIDTH, TITLE_HEIGHT + sum(heights)), dpi=100, layout="constrained")
    title = " / ".join(dict.fromkeys(text.strip() or UNLABELED for text in view.episode.instructions))
    title = f"{contents.name}, episode {view.raw.index}, {count(len(view.episode), 'step')}: {shorten(title, 90)}"
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    figure.suptitle(title, fontsize=14, fontweight="bold", parse_math=False)
    parts = figure.subfigures(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (_, draw) in zip(parts, panels, strict=True):
        draw(part)
    figure.savefig(path)


def picture_height(pictures: list[np.ndarray | None]) -> float:
    """Of a row of pictures, in inches, with the text above."""
    ratios = [picture.shape[0] / picture.shape[1] for picture in pictures if picture is not None]
    return 0.35 + WIDTH / NUM_PICTURES * max(ratios, default=1)


def draw_pictures(panel: "SubFigure", config: DatasetConfig, view: View) -> None:
    """A row for each camera, and a column for each step."""
    heights = list(map(picture_height, view.pictures.values()))
    axes = panel.subplots(len(heights), NUM_PICTURES, squeeze=False, height_ratios=heights)
    fps = view.raw.metadata.get("fps")
    for row, (camera, pictures) in zip(axes, view.pictures.items(), strict=True):
        row[0].set_ylabel(f"{shorten(camera, 28)}\n({roles(config, camera)})", fontsize=9, parse_math=False)
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, frame, picture in zip(row, view.frames, pictures, strict=False):
            axis.set_title(f"step {frame}" + (f", {frame / fps:.1f} s" if fps else ""), fontsize=9)
            if picture is None:
                axis.text(0.5, 0.5, "no picture", color=QUIET_COLOR, ha="center", transform=axis.transAxes)
            else:
                axis.imshow(picture, interpolation="antialiased")


def draw_curves(panel: "SubFigure", contents: Contents, view: View, rows: int) -> None:
    """Each dimension of the action over the steps."""
    panel.suptitle("Actions. Band: q01 to q99 of the dataset. Vertical: the steps of the pictures.", fontsize=11)
    statistics, actions = contents.statistics["action"], view.episode.actions
    axes = panel.subplots(rows, CURVE_COLUMNS, squeeze=False, sharex=True).reshape(-1)
    for axis in axes[actions.shape[1] :]:
        axis.set_axis_off()
    names = dimension_names(actions.shape[1])
    bands = zip(statistics["q01"], statistics["q99"], strict=True)
    for axis, name, values, band in zip(axes, names, actions.T, bands, strict=False):
        axis.axhspan(*band, color=BAND_COLOR)
        for frame in view.frames:
            axis.axvline(frame, color=QUIET_COLOR, linewidth=0.5, alpha=0.5)
        axis.plot(values, color=CURVE_COLOR, linewidth=1.4, marker="." if len(values) <= MANY_STEPS else None)
        axis.set_title(name, fontsize=10)
        axis.set_xlim(-0.5, len(values) - 0.5)
        axis.tick_params(labelsize=8)


def draw_instructions(panel: "SubFigure", contents: Contents) -> None:
    """The most frequent instructions."""
    panel.suptitle(count(len(contents.steps), "instruction"), fontsize=11)
    rows = list_instructions(contents, NUM_DRAWN)
    lines = [f"{steps:>9}  {episodes:>8}  {text}" for steps, episodes, text in rows]
    axis = panel.subplots()
    axis.set_axis_off()
    axis.text(
        0, 1, "\n".join(lines), fontsize=10, family="monospace", va="top", transform=axis.transAxes, parse_math=False
    )


def count(number: int, noun: str) -> str:
    """`1 step`, `2 steps`"""
    return f"{number} {noun}{'s' * (number != 1)}"


def shorten(text: str, length: int) -> str:
    """One line of at most so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


# The command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder, Hub id or URL of a dataset, or name=SOURCE")
    parser.add_argument("--episode", type=int, metavar="N", help="to show; by default the first")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="where the picture goes; by default nowhere")
    parser.add_argument("--split", default="all", help="%(default)s by default, or one of the dataset's")
    parser.add_argument("--config", type=Path, metavar="YAML", help="description of the dataset, by its name")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Read, print and draw."""
    if arguments.output_dir is not None:
        check_matplotlib()
    with collecting_warnings() as warnings:
        datasets = open_datasets([arguments.source], arguments.split, read_entries(arguments.config))
        ((name, (source, config)),) = datasets.items()
        contents = survey(name, source, config)
        number = min(contents.lengths) if arguments.episode is None else arguments.episode
        view = open_view(source, config, number)
    warnings += [f"the camera {camera!r} cannot be shown: {fault}" for camera, fault in view.faults.items()]
    print(format_contents(source, config, contents, view, warnings))
    if arguments.output_dir is not None:
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        path = arguments.output_dir / re.sub(r"[^\w.-]+", "_", f"{name}_episode_{number}.png")
        save_picture(config, contents, view, path)
        print(f"\n{path}: written")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error becomes one line and exit status 1."""
    options = make_parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
