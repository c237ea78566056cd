"""What people read and look at after an evaluation: tables, a video per task, a sheet of pictures, and curves."""

import importlib
import importlib.util
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .rollout import Episode


if TYPE_CHECKING:
    from .open_loop import Comparison


PICTURE_SIDE = 336  # of a video's scene, pixels
CAPTION_HEIGHT = 76
INSTRUCTION_HEIGHT, MIN_TEXT_SIZE = 24, 9
LAST_PICTURE_SECONDS = 2
SHEET_SIDE, SHEET_COLUMNS, SHEET_GAP, SHEET_HEADER = 224, 5, 8, 34
BACKGROUND, TEXT, QUIET, GOOD, BAD = "#15181d", "#f4f4f4", "#aab2bd", "#7bd88f", "#ff8a80"
RECORDED_COLOR, PREDICTED_COLOR = "#8a94a0", "#1f6fd0"
VIDEO_FORMATS = ("gif", "mp4")


def format_table(results: dict[str, Any]) -> str:
    """The results of rollouts as text, one line per task."""
    header = ("task", "trials", "successes", "rate", "95% interval", "mean steps", "ms/action", "failures")
    groups = dict(results["tasks"])
    if len(groups) > 1:
        groups["all"] = results["all"]
    return _align([header, *(_table_row(name, numbers) for name, numbers in groups.items())], last_left=True)


def format_open_loop(results: dict[str, Any]) -> str:
    """The results of an open-loop check as text, one line per dimension."""
    header = ("dimension", "MAE", "RMSE", "correlation", "same bin", "within one", "MAE mean", "MAE previous")
    forms = (".4f", ".4f", ".3f", ".1%", ".1%", ".4f", ".4f")
    rows = [
        (name, *(_format(value, form) for value, form in zip(numbers.values(), forms, strict=True)))
        for name, numbers in results["dimensions"].items()
    ]
    lines = [f"{results['frames']} frames of {results['episodes']} episodes", "", _align([header, *rows])]
    if accuracy := results["gripper_accuracy"]:
        named = ", ".join(f"{name.replace('_', ' ')} {_format(share, '.1%')}" for name, share in accuracy.items())
        lines += ["", f"gripper on the right side: {named}"]
    return "\n".join(lines)


def _format(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _align(rows: list[tuple[str, ...]], last_left: bool = False) -> str:
    """A table whose first row is its header; the first column, and the last if asked for, are flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        if last_left:
            cells[-1] = row[-1]
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _table_row(name: str, numbers: dict[str, Any]) -> tuple[str, ...]:
    low, high = numbers["wilson_95"]
    return (
        name,
        str(numbers["trials"]),
        str(numbers["successes"]),
        f"{numbers['success_rate']:.1%}",
        f"{low:.1%} - {high:.1%}",
        f"{numbers['mean_steps']:.1f}",
        f"{numbers['ms_per_action']:.2f}",
        ", ".join(f"{kind} {count}" for kind, count in numbers["failures"].items()) or "-",
    )


def draw_frames(episode: Episode) -> list[Image.Image]:
    """Pictures of a recorded episode, `PICTURE_SIDE` wide, with the caption below."""
    return [_draw_frame(episode, index) for index in range(len(episode.frames))]


def _draw_frame(episode: Episode, index: int) -> Image.Image:
    frame = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE + CAPTION_HEIGHT), BACKGROUND)
    frame.paste(_resize(episode.frames[index], PICTURE_SIDE))
    draw = ImageDraw.Draw(frame)
    _write(draw, (10, PICTURE_SIDE + 5), episode.instruction, 17, TEXT, (PICTURE_SIDE - 20, INSTRUCTION_HEIGHT))
    is_last = index == episode.steps
    status, color = (_outcome_text(episode), _outcome_color(episode)) if is_last else (f"step {index + 1}", QUIET)
    _write(draw, (10, PICTURE_SIDE + 33), status, 13, color, (PICTURE_SIDE - 20 if is_last else 130, 18))
    if not is_last:
        action = episode.actions[index]
        grip = "open" if action[6] > 0.5 else "closed"
        _write(draw, (174, PICTURE_SIDE + 33), f"gripper {grip} ({action[6]:.2f})", 13, QUIET, (152, 18))
        _write_motion(draw, PICTURE_SIDE + 54, action[:6])
    return frame


def _write_motion(draw: ImageDraw.ImageDraw, top: int, motion: np.ndarray) -> None:
    """Displacement and rotation in the units of the environment, in fixed columns."""
    for column, (name, value) in enumerate(zip(("x", "y", "z", "rx", "ry", "rz"), motion, strict=True)):
        left, gap = 10 + 54 * column, 10 if column < 3 else 14
        _write(draw, (left, top), name, 11, QUIET, (14, 16))
        _write(draw, (left + gap, top), f"{round(float(value), 3) + 0.0:+.3f}", 11, QUIET, (38, 16))


def save_video(episode: Episode, path: Path, control_rate: float) -> None:
    """
    Write a recorded episode at the robot's speed; the last picture stays for two seconds.

    Args:
        episode (`Episode`): With pictures.
        path (`Path`): Ends in one of `VIDEO_FORMATS`.
        control_rate (`float`): Actions per second.
    """
    write = {".gif": _save_gif, ".mp4": _save_mp4}[path.suffix]
    write(draw_frames(episode), path, control_rate)


def check_video_format(video_format: str) -> None:
    """
    Find out before a rollout whether its videos can be written.

    Raises:
        ValueError: If a package is missing, or was built without the codec.
    """
    if video_format != "mp4":
        return
    try:
        importlib.import_module("av").codec.Codec("libx264", "w")
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"An mp4 needs the package av with libx264 ({error}): `pip install av`, or choose `--video gif`."
        ) from error


def _save_gif(frames: list[Image.Image], path: Path, control_rate: float) -> None:
    durations = [round(1000 / control_rate)] * (len(frames) - 1) + [1000 * LAST_PICTURE_SECONDS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def _save_mp4(frames: list[Image.Image], path: Path, control_rate: float) -> None:
    """H.264 in yuv420p, which every browser plays."""
    import av

    rate = Fraction(control_rate).limit_denominator(1000)
    held = [frames[-1]] * round(LAST_PICTURE_SECONDS * rate)
    with av.open(path, "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in [*frames, *held[1:]]:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def file_name(task: str) -> str:
    """A task's name as a file's: whole sentences and paths can be names of tasks."""
    return re.sub(r"[^\w.-]+", "_", task)[:100]


def save_sheet(episodes: list[Episode], path: Path, control_rate: float) -> None:
    """Write one row of `SHEET_COLUMNS` pictures, evenly spread in time, per recorded episode."""
    across, down = SHEET_SIDE + SHEET_GAP, SHEET_HEADER + SHEET_SIDE + SHEET_GAP
    size = (SHEET_COLUMNS * across + SHEET_GAP, len(episodes) * down + SHEET_GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(episodes):
        top = SHEET_GAP + row * down
        _write(draw, (SHEET_GAP, top + 4), episode.instruction, 18, TEXT, (3 * across, SHEET_HEADER - 8))
        draw.text(
            (size[0] - SHEET_GAP, top + 6), _outcome_text(episode), _outcome_color(episode), _font(16), anchor="ra"
        )
        for column, index in enumerate(np.linspace(0, episode.steps, SHEET_COLUMNS).round().astype(int)):
            corner = (SHEET_GAP + column * across, top + SHEET_HEADER)
            sheet.paste(_resize(episode.frames[index], SHEET_SIDE), corner)
            _write_badge(draw, corner, f"{index / control_rate:.1f} s")
    sheet.save(path)


def _write_badge(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    position, font = (corner[0] + 7, corner[1] + 5), _font(13)
    left, top, right, bottom = draw.textbbox(position, text, font)
    draw.rectangle((left - 4, top - 3, right + 4, bottom + 3), BACKGROUND)
    draw.text(position, text, TEXT, font)


def _write(
    draw: ImageDraw.ImageDraw,
    position: tuple[int, int],
    text: str,
    size: int,
    color: str,
    box: tuple[int, int],
) -> None:
    """Text that fits a box (width, height): it shrinks, takes several lines when it is small, and at last is cut."""
    width, height = box
    text = " ".join(text.split())
    for smaller in range(size, MIN_TEXT_SIZE - 1, -1):
        font = _font(smaller)
        lines = [text] if smaller > 0.75 * size else _wrap(draw, text, font, width)
        room = int(height // (1.2 * smaller))  # lines
        if len(lines) <= room and all(draw.textlength(line, font) <= width for line in lines):
            break
    else:
        lines = [_cut(draw, line, font, width) for line in [*lines[: room - 1], " ".join(lines[room - 1 :])]]
    draw.multiline_text(position, "\n".join(lines), color, font, spacing=1)


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _cut(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if draw.textlength(text, font) <= width:
        return text
    while draw.textlength(f"{text}...", font) > width:
        text = text[:-1]
    return f"{text}..."


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _resize(picture: np.ndarray, side: int) -> Image.Image:
    """A square picture, with bars where the given one is not."""
    return ImageOps.pad(Image.fromarray(picture), (side, side), Image.Resampling.BICUBIC, BACKGROUND)


def _outcome_text(episode: Episode) -> str:
    return f"{episode.outcome.replace('_', ' ')}, {episode.steps} steps"


def _outcome_color(episode: Episode) -> str:
    return GOOD if episode.outcome == "success" else BAD


def check_figures() -> None:
    """
    Find out before a check whether its figure can be drawn.

    Raises:
        ValueError: If matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "The figure of an open-loop check needs matplotlib: `pip install -r requirements-evaluation.txt`, or "
            "leave out --output_dir."
        )


def save_open_loop_figure(episodes: list["Comparison"], names: list[str], path: Path, title: str) -> None:
    """
    Draw predicted beside recorded actions, one row per dimension: curves over the drawn episodes, and all sampled
    frames against each other.

    Args:
        episodes (`list[Comparison]`): With predictions.
        names (`list[str]`): Of the dimensions.
        path (`Path`): Ends in `.png`.
        title (`str`): Over everything.
    """
    from matplotlib.figure import Figure

    drawn = [episode for episode in episodes if episode.is_drawn]
    ratios = [2.4] * len(drawn) + [1.3]
    figure = Figure((4 * sum(ratios) / 1.3, 1.9 * len(names) + 1), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    axes = figure.subplots(len(names), len(ratios), squeeze=False, sharey="row", width_ratios=ratios)  # (D, E + 1)
    for dimension, (name, row) in enumerate(zip(names, axes, strict=True)):
        for episode, axis in zip(drawn, row[:-1], strict=True):
            _draw_curve(axis, episode, dimension)
        _draw_scatter(row[-1], episodes, dimension)
        row[0].set_ylabel(name, fontsize=11)
    for episode, axis in zip(drawn, axes[0], strict=False):
        axis.set_title(f"episode {episode.index}: {_shorten(episode.instructions[0])}", fontsize=11)
    for axis in axes[-1][:-1]:
        axis.set_xlabel("step")
    axes[0][-1].set_title("predicted over recorded, sampled frames", fontsize=11)
    axes[-1][-1].set_xlabel("recorded")
    axes[0][0].legend(loc="best", fontsize=9)
    figure.savefig(path)


def _draw_curve(axis: Any, episode: "Comparison", dimension: int) -> None:
    steps = np.arange(len(episode.recorded))
    axis.plot(steps, episode.recorded[:, dimension], color=RECORDED_COLOR, linewidth=3, label="recorded")
    axis.plot(steps, episode.predicted[:, dimension], color=PREDICTED_COLOR, linewidth=1.3, label="predicted")
    axis.grid(alpha=0.25)
    axis.margins(x=0.01)


def _draw_scatter(axis: Any, episodes: list["Comparison"], dimension: int) -> None:
    recorded, predicted = (
        np.concatenate([getattr(episode, name)[episode.is_sampled, dimension] for episode in episodes])
        for name in ("recorded", "predicted")
    )
    axis.axline((recorded[0], recorded[0]), slope=1, color=RECORDED_COLOR, linewidth=1)
    axis.scatter(recorded, predicted, s=7, alpha=0.4, color=PREDICTED_COLOR, edgecolors="none")
    axis.grid(alpha=0.25)


def _shorten(text: str, length: int = 52) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
