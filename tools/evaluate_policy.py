"""
Roll a policy out on the simulated tabletop and report its success.

    python tools/evaluate_policy.py --policy . --episodes 20 --output_dir evaluation
    python tools/evaluate_policy.py --policy expert --tasks pick push

`--policy` is a directory, a Hub id, or a baseline: `expert` (the scripted one) or `random`. Episode i of every task
uses seed `--seed` + i, so that all policies meet the same scenes. `--output_dir` receives results.json, one GIF per
task of its first episode, and sheet.png with a row of pictures per task.
"""

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from load_policy import REPOSITORY, load_policy
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm


sys.path.insert(0, str(REPOSITORY))

from tabletop.environment import CONTROL_RATE, MAX_STEPS
from tabletop.rollout import Episode, ExpertPolicy, Job, ModelPolicy, Policy, RandomPolicy, rollout, summarize
from tabletop.tasks import TASKS


BASELINES = {"expert": ExpertPolicy, "random": RandomPolicy}
BASELINE_IMAGE_SIZE = 224
PICTURE_SIDE = 336  # of a GIF's scene, pixels
CAPTION_HEIGHT = 76
SHEET_SIDE, SHEET_COLUMNS, SHEET_GAP, SHEET_HEADER = 224, 5, 8, 34
BACKGROUND, TEXT, QUIET, GOOD, BAD = "#15181d", "#f4f4f4", "#aab2bd", "#7bd88f", "#ff8a80"
PACKAGES = ("torch", "transformers", "numpy", "mujoco", "gymnasium", "pillow")


def make_policy(arguments: argparse.Namespace) -> tuple[Policy, int]:
    """
    The policy of the command line, with the side of the pictures it is shown.

    Raises:
        ValueError: If the policy cannot be loaded or does not fit the tabletop; one line.
    """
    if arguments.policy in BASELINES:
        return BASELINES[arguments.policy](), arguments.image_size or BASELINE_IMAGE_SIZE
    try:
        model, processor = load_policy(
            arguments.policy, trust_remote_code=arguments.trust_remote_code, dtype=arguments.dtype
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"The policy {arguments.policy!r} cannot be loaded, and is none of {sorted(BASELINES)}: {reason}"
        ) from error
    policy = ModelPolicy(model.to(arguments.device), processor, arguments.unnorm_key)
    return policy, arguments.image_size or policy.image_size


def check_arguments(arguments: argparse.Namespace) -> None:
    """
    Refuse what cannot work before anything is loaded.

    Raises:
        ValueError: On an unknown task, a count below 1, or results that would be overwritten.
    """
    if unknown := [task for task in arguments.tasks if task not in TASKS]:
        raise ValueError(f"Tasks {unknown} are unknown; known: {list(TASKS)}.")
    for name in ("episodes", "num_envs", "max_steps", "image_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {value}.")
    if arguments.seed < 0:
        raise ValueError(f"`--seed` must not be negative, got {arguments.seed}.")
    if arguments.output_dir and (arguments.output_dir / "results.json").exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output_dir / 'results.json'} exists; pass --overwrite to replace it.")


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Episode]]:
    """Results as results.json holds them, and the episodes, the first of each task with its pictures."""
    tasks = tuple(dict.fromkeys(arguments.tasks))
    policy, image_size = make_policy(arguments)
    keeps_pictures = arguments.output_dir is not None
    jobs = [
        Job(task, arguments.seed + index, record=keeps_pictures and index == 0)
        for task in tasks
        for index in range(arguments.episodes)
    ]
    began, successes = time.perf_counter(), 0
    with tqdm(total=len(jobs), unit="episode", disable=None) as bar:

        def count(episode: Episode) -> None:
            nonlocal successes
            successes += episode.outcome == "success"
            bar.set_postfix(successes=successes, refresh=False)
            bar.update()

        episodes = rollout(
            policy,
            jobs,
            num_envs=arguments.num_envs,
            image_size=image_size,
            max_steps=arguments.max_steps,
            on_episode=count,
        )
    seconds = time.perf_counter() - began
    return make_results(arguments, image_size, tasks, episodes, seconds), episodes


def make_results(
    arguments: argparse.Namespace, image_size: int, tasks: tuple[str, ...], episodes: list[Episode], seconds: float
) -> dict[str, Any]:
    """The content of results.json."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    by_task = {task: summarize([episode for episode in episodes if episode.task == task]) for task in tasks}
    fields = ("task", "seed", "instruction", "outcome", "steps")
    return {
        "policy": arguments.policy,
        "arguments": given,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "environment": {"id": "Tabletop-v0", "control_rate": CONTROL_RATE, "image_size": image_size},
        "seconds": round(seconds, 3),
        "tasks": by_task,
        "all": summarize(episodes),
        "episodes": [{name: getattr(episode, name) for name in fields} for episode in episodes],
    }


def format_table(results: dict[str, Any]) -> str:
    """The results as text, one line per task."""
    header = ("task", "trials", "successes", "rate", "95% interval", "mean steps", "ms/action", "failures")
    groups = dict(results["tasks"])
    if len(groups) > 1:
        groups["all"] = results["all"]
    rows = [header, *(_table_row(name, numbers) for name, numbers in groups.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0], cells[-1] = row[0].ljust(widths[0]), row[-1]
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
    _write(draw, (10, PICTURE_SIDE + 7), episode.instruction, 17, TEXT, PICTURE_SIDE - 20)
    is_last = index == episode.steps
    status, color = (_outcome_text(episode), _outcome_color(episode)) if is_last else (f"step {index + 1}", QUIET)
    _write(draw, (10, PICTURE_SIDE + 31), status, 13, color, 130)
    if not is_last:
        action = episode.actions[index]
        grip = "open" if action[6] > 0.5 else "closed"
        _write(draw, (150, PICTURE_SIDE + 31), f"gripper {grip} ({action[6]:.2f})", 13, QUIET, 176)
        _write_action(draw, PICTURE_SIDE + 52, action)
    return frame


def _write_action(draw: ImageDraw.ImageDraw, top: int, action: np.ndarray) -> None:
    """The displacement in millimetres and the rotation in degrees, in fixed columns."""
    values = [*(1e3 * action[:3]), *np.rad2deg(action[3:6])]
    for column, (name, value) in enumerate(zip(("x", "y", "z", "rx", "ry", "rz"), values, strict=True)):
        unit = "mm" if column < 3 else "°"
        left = 10 + 60 * column if column < 3 else 196 + 46 * (column - 3)
        _write(draw, (left, top), f"{name} {value + 0.0:+.0f}{unit}", 12, QUIET, 56)


def save_gif(episode: Episode, path: Path) -> None:
    """Write a recorded episode at the speed of the robot; the last picture stays for two seconds."""
    frames = draw_frames(episode)
    durations = [1000 // CONTROL_RATE] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def save_sheet(episodes: list[Episode], path: Path) -> None:
    """Write one row of `SHEET_COLUMNS` pictures, evenly spread in time, per recorded episode."""
    across, down = SHEET_SIDE + SHEET_GAP, SHEET_HEADER + SHEET_SIDE + SHEET_GAP
    size = (SHEET_COLUMNS * across + SHEET_GAP, len(episodes) * down + SHEET_GAP)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for row, episode in enumerate(episodes):
        top = SHEET_GAP + row * down
        _write(draw, (SHEET_GAP, top + 6), episode.instruction, 18, TEXT, 3 * across)
        draw.text(
            (size[0] - SHEET_GAP, top + 6), _outcome_text(episode), _outcome_color(episode), _font(16), anchor="ra"
        )
        for column, index in enumerate(np.linspace(0, episode.steps, SHEET_COLUMNS).round().astype(int)):
            corner = (SHEET_GAP + column * across, top + SHEET_HEADER)
            sheet.paste(_resize(episode.frames[index], SHEET_SIDE), corner)
            _write_badge(draw, corner, f"{index / CONTROL_RATE:.1f} s")
    sheet.save(path)


def _write_badge(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    position, font = (corner[0] + 7, corner[1] + 5), _font(13)
    left, top, right, bottom = draw.textbbox(position, text, font)
    draw.rectangle((left - 4, top - 3, right + 4, bottom + 3), BACKGROUND)
    draw.text(position, text, TEXT, font)


def _write(
    draw: ImageDraw.ImageDraw, position: tuple[int, int], text: str, size: int, color: str, max_width: int
) -> None:
    """Text that shrinks until it fits."""
    while size > 8 and draw.textlength(text, _font(size)) > max_width:
        size -= 1
    draw.text(position, text, color, _font(size))


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _resize(picture: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)


def _outcome_text(episode: Episode) -> str:
    return f"{episode.outcome.replace('_', ' ')}, {episode.steps} steps"


def _outcome_color(episode: Episode) -> str:
    return GOOD if episode.outcome == "success" else BAD


def write_output(output_dir: Path, results: dict[str, Any], episodes: list[Episode]) -> None:
    """Write pictures, and results.json last: where it lies, everything does."""
    output_dir.mkdir(parents=True, exist_ok=True)
    recorded = [episode for episode in episodes if episode.frames]
    for episode in recorded:
        save_gif(episode, output_dir / f"{episode.task}.gif")
    save_sheet(recorded, output_dir / "sheet.png")
    text = json.dumps(results, indent=2, ensure_ascii=False)
    (output_dir / "results.json").write_text(text + "\n", encoding="utf-8")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", required=True, help="directory, Hub id, `expert` or `random`")
    parser.add_argument("--episodes", type=int, default=20, help="per task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"of {', '.join(TASKS)}; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode of each task")
    parser.add_argument("--num_envs", type=int, default=8, help="environments side by side: the size of a batch")
    parser.add_argument("--max_steps", type=int, default=MAX_STEPS, help="actions before `timeout`")
    parser.add_argument("--image_size", type=int, help="side of the camera picture; by default the processor's")
    parser.add_argument("--unnorm_key", help="dataset whose statistics scale the actions, where there are several")
    parser.add_argument("--output_dir", type=Path, help="where results.json and the pictures go; by default nowhere")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing results.json")
    parser.add_argument("--dtype", default="auto", help="of the weights: `auto` (as saved), `float32`, `bfloat16`")
    parser.add_argument("--device", default="cpu", help="such as `cuda`")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the repository's own copy of the code")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        check_arguments(arguments)
        results, episodes = evaluate(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(results))
    if arguments.output_dir:
        write_output(arguments.output_dir, results, episodes)
        print(f"written to {arguments.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
