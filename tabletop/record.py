"""
Records demonstrations of the expert as a LeRobot v3.0 dataset, with pictures as PNG or, with `--video`, as MP4.

    python -m tabletop.record --episodes 100 --output demonstrations --num_workers 2
"""

import argparse
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from .environment import CAMERAS, TabletopEnv
from .expert import Expert
from .lerobot_writer import VIDEO_ENCODER, assemble, write_episode
from .scene import object_names
from .tasks import SIDES, TASKS, WORDINGS, Goal


NOOP_THRESHOLD = 1e-4
MIN_NOISE = 0.01
MAX_DRAWS = 100
MAX_ATTEMPTS = 100
DETOUR_STEPS = (2, 9)  # at least, and fewer than: the way to an object takes about six


@dataclass(frozen=True)
class Recording:
    """
    What is recorded: equal values give equal datasets, to the byte, on one machine.

    Args:
        episodes (`int`): Successful demonstrations to record.
        seed (`int`, defaults to 0): Of everything that is drawn.
        tasks (`tuple[str]`): The episodes take turns with them.
        image_size (`int`, defaults to 224): Side of the pictures in pixels.
        noise (`float`, defaults to 0.3): Of the expert; see [`Expert.noisy_action`].
        nudges (`float`, defaults to 0.03): Share of the steps in which the hand is pushed off its way, also close to
            an object, so that demonstrations show how to come back (https://arxiv.org/abs/1703.09327).
        detour (`float`, defaults to 0.0): In so many of the episodes the hand sets out for another object first, so
            that the place of the hand does not betray the target.
        objects (`tuple[str]`, *optional*): Colours, shapes or names (`red cube`) of what may be the target; by default
            everything.
        hold_out (`tuple[str]`): Colours, shapes or names of what never is.
        randomize (`bool`, defaults to `False`): Vary cameras, light and colours from episode to episode.
        cameras (`tuple[str]`, defaults to both): Of `image` and `wrist_image`, those to render; another one stays
            black, which takes half the time.
        video (`bool`, defaults to `False`): Keep the pictures as H.264 videos, which are smaller and not exact; else
            as PNG.

    Raises:
        ValueError: If a value is out of range or unknown, nothing is left to handle, or no videos of this size can be
            encoded.
    """

    episodes: int
    seed: int = 0
    tasks: tuple[str, ...] = TASKS
    image_size: int = 224
    noise: float = 0.3
    nudges: float = 0.03
    detour: float = 0.0
    objects: tuple[str, ...] | None = None
    hold_out: tuple[str, ...] = ()
    randomize: bool = False
    cameras: tuple[str, ...] = tuple(CAMERAS)
    video: bool = False

    def __post_init__(self):
        for name, least in (("episodes", 1), ("seed", 0), ("image_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise ValueError(f"`tasks` must be among {list(TASKS)}, got {list(self.tasks)}.")
        if not self.cameras or set(self.cameras) - set(CAMERAS):
            raise ValueError(f"`cameras` must be among {list(CAMERAS)}, got {list(self.cameras)}.")
        if not self.noise >= MIN_NOISE:
            # No-ops are not executed: an expert that rests without noise, as its fingers close, would rest for ever.
            raise ValueError(f"`noise` must be at least {MIN_NOISE}, got {self.noise}.")
        for name, what in (("nudges", "steps"), ("detour", "episodes")):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"`{name}` is a share of the {what}, from 0 to 1; got {getattr(self, name)}.")
        self.targets()
        if self.video and self.image_size % 2:
            raise ValueError(f"`image_size` must be even for videos, got {self.image_size}.")
        if self.video and VIDEO_ENCODER not in av.codecs_available:
            raise ValueError(f"This PyAV lacks the encoder {VIDEO_ENCODER}, which its wheels have: pip install av.")

    def targets(self) -> list[str]:
        """Names of the objects that may be the target."""
        return object_names(self.objects, self.hold_out)


# One episode


def is_noop(action: np.ndarray, previous: np.ndarray | None) -> bool:
    """Whether an action (7,) changes nothing, by OpenVLA's rule for LIBERO; `previous` is the last one kept."""
    still = np.linalg.norm(action[:6]) < NOOP_THRESHOLD
    return bool(still and (previous is None or action[6] == previous[6]))


def draw_start(recording: Recording, episode: int, attempt: int) -> tuple[int, dict, np.random.Generator]:
    """The environment's seed and reset options for one attempt at an episode, and the source of the noise."""
    rng = np.random.default_rng([recording.seed, episode, attempt])
    task = recording.tasks[episode % len(recording.tasks)]
    options = {
        "task": task,
        "target": str(rng.choice(recording.targets())),
        "side": str(rng.choice(list(SIDES))),
        "wording": int(rng.integers(len(WORDINGS[task]))),
    }
    return int(rng.integers(2**31)), options, rng


def demonstrate(
    env: TabletopEnv,
    observation: dict,
    rng: np.random.Generator,
    noise: float,
    detour: float = 0.0,
    nudges: float = 0.03,
) -> tuple[list[dict], str | None]:
    """
    The expert's way from a fresh start to the end.

    Args:
        env (`TabletopEnv`): Just reset.
        observation (`dict`): What the reset returned.
        rng (`np.random.Generator`): Source of the noise.
        noise (`float`): See [`Expert.noisy_action`].
        detour (`float`, defaults to 0.0): Probability of setting out for another object first.
        nudges (`float`, defaults to 0.03): Of each step, to be a push; see [`Expert.noisy_action`].

    Returns:
        `tuple[list[dict], str | None]`: Frames, each an observation with the `action` (7,) that followed it and the
        `expert_action` (7,) without noise; the outcome (None: the expert came to rest).
    """
    expert, frames, previous = Expert(env), [], None
    stray, detour_steps = expert, 0
    if detour and rng.random() < detour:
        stray, detour_steps = Expert(env, draw_other_goal(env, rng)), int(rng.integers(*DETOUR_STEPS))
    while True:
        if detour_steps and (len(frames) == detour_steps or stray.action()[6] == 0.0):
            detour_steps = 0  # it looks, and never touches
        actor = stray if detour_steps else expert
        draws = (actor.noisy_action(rng, noise, nudges) for _ in range(MAX_DRAWS))
        action = next((draw for draw in draws if not is_noop(draw, previous)), None)
        if action is None:
            return frames, None
        frames.append({**observation, "action": action, "expert_action": expert.action()})
        observation, _, terminated, truncated, info = env.step(action)
        previous = action
        if terminated or truncated:
            return frames, info["outcome"]


def draw_other_goal(env: TabletopEnv, rng: np.random.Generator) -> Goal:
    """To pick up an object that was not asked for."""
    others = [item.name for item in env.objects if item.name != env.goal.target]
    name = str(rng.choice(others))
    return Goal("pick", name, tuple(env.data.body(name).xpos))


def record_episode(recording: Recording, episode: int, path: Path) -> None:
    """
    Write one successful demonstration to a file, which appears only when it is whole.

    Raises:
        RuntimeError: If the expert failed a hundred times.
    """
    env = TabletopEnv(image_size=recording.image_size, randomize=recording.randomize, cameras=recording.cameras)
    for attempt in range(MAX_ATTEMPTS):
        seed, options, rng = draw_start(recording, episode, attempt)
        observation, _ = env.reset(seed=seed, options=options)
        start = {"qpos": env.data.qpos.tolist(), "qvel": env.data.qvel.tolist()}
        frames, outcome = demonstrate(env, observation, rng, recording.noise, recording.detour, recording.nudges)
        if outcome == "success":
            break
    else:
        raise RuntimeError(f"Episode {episode} failed {MAX_ATTEMPTS} times; the last start was {options}.")
    env.close()
    story = {
        "episode_index": episode,
        "seed": seed,
        "options": options,
        "environment": {"image_size": recording.image_size, "randomize": recording.randomize},
        "attempt": attempt,
        "noise": recording.noise,
        "instruction": env.instruction,
        "outcome": outcome,
        "length": len(frames),
        **start,
    }
    write_episode(path, frames, story, recording.video)


# The whole recording


def record(recording: Recording, output: str | Path, num_workers: int = 1) -> Path:
    """
    Record a dataset, or finish one whose recording was interrupted.

    Finished episodes wait in the folder `OUTPUT.recording`; `OUTPUT` appears in one go when the dataset is whole.

    Args:
        recording (`Recording`): What to record.
        output (`str` or `Path`): Folder of the dataset; must not exist.
        num_workers (`int`, defaults to 1): Processes. The dataset does not depend on their number.

    Returns:
        `Path`: `output`.

    Raises:
        ValueError: If `num_workers` is below 1, or an interrupted recording had other arguments.
        FileExistsError: If `output` exists.
    """
    if num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    output = Path(os.path.abspath(output))
    staging, folder = (output.with_name(f"{output.name}.{what}") for what in ("recording", "assembling"))
    if output.exists():
        # Nothing but the clearing up was left of a recording that was killed at its very end.
        if staging.exists() and _is_started(recording, staging):
            shutil.rmtree(staging)
            return output
        raise FileExistsError(f"{output} exists; remove it or choose another output.")
    staging.mkdir(parents=True, exist_ok=True)
    if not _is_started(recording, staging):
        _write_text(staging / "arguments.json", json.dumps(asdict(recording)))
    _record_episodes(recording, staging, num_workers)
    shutil.rmtree(folder, ignore_errors=True)
    paths = [_episode_path(staging, index) for index in range(recording.episodes)]
    assemble(paths, folder, recording.image_size, recording.video)
    os.rename(folder, output)
    shutil.rmtree(staging)
    return output


def _is_started(recording: Recording, staging: Path) -> bool:
    """Whether this recording has begun in the folder; `ValueError` if another one has."""
    path = staging / "arguments.json"
    if not path.exists():
        return False
    old, new = json.loads(path.read_text()), json.loads(json.dumps(asdict(recording)))
    if different := [f"{name}={old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]:
        raise ValueError(
            f"{staging} holds a recording with other arguments ({'; '.join(different)}). Finish it with its own "
            "arguments, remove the folder, or choose another output."
        )
    return True


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _episode_path(staging: Path, index: int) -> Path:
    return staging / f"episode-{index:06d}.parquet"


def _record_episodes(recording: Recording, staging: Path, num_workers: int) -> None:
    paths = {index: _episode_path(staging, index) for index in range(recording.episodes)}
    missing = [(recording, index, path) for index, path in paths.items() if not path.exists()]
    done = recording.episodes - len(missing)
    with tqdm(total=recording.episodes, initial=done, unit="episode", desc="recording") as progress:
        for _ in _run(missing, min(num_workers, len(missing))):
            progress.update()


def _run(jobs: list[tuple], num_workers: int) -> Iterator[None]:
    """Do the jobs in this process or in several, in any order; yields after each."""
    if num_workers <= 1:
        for job in jobs:
            yield record_episode(*job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=_die_with_parent) as pool:
        futures = [pool.submit(record_episode, *job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _die_with_parent() -> None:
    """End this worker when the recording is killed, instead of waiting for work that never comes."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tabletop.record", description=__doc__.strip().splitlines()[0])
    parser.add_argument("--episodes", type=int, required=True, help="successful demonstrations to record")
    parser.add_argument("--output", required=True, help="folder of the dataset; an interrupted recording goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_workers", type=int, default=1, help="processes; the dataset does not depend on it")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"default: {' '.join(TASKS)}")
    parser.add_argument("--image_size", type=int, default=224, help="side of the pictures in pixels")
    parser.add_argument("--noise", type=float, default=0.3, help="of the expert, as a fraction of its largest action")
    parser.add_argument("--nudges", type=float, default=0.03, help="share of steps that push the hand off its way")
    parser.add_argument("--detour", type=float, default=0.0, help="share of episodes that first head elsewhere")
    what = "colours, shapes or objects (red, ball, 'blue cube') that"
    parser.add_argument("--objects", nargs="+", metavar="WHAT", help=f"{what} may be the target; by default all")
    parser.add_argument("--hold_out", nargs="+", default=[], metavar="WHAT", help=f"{what} are never the target")
    parser.add_argument("--randomize", action="store_true", help="vary cameras, light and colours")
    parser.add_argument("--cameras", nargs="+", default=list(CAMERAS), help="to render; the others stay black")
    parser.add_argument("--video", action="store_true", help="pictures as MP4 (H.264) instead of PNG")
    parsed = parser.parse_args(arguments)
    parsed.error = parser.error
    return parsed


def main(arguments: list[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    try:
        recording = Recording(
            episodes=parsed.episodes,
            seed=parsed.seed,
            tasks=tuple(parsed.tasks),
            image_size=parsed.image_size,
            noise=parsed.noise,
            nudges=parsed.nudges,
            detour=parsed.detour,
            objects=parsed.objects and tuple(parsed.objects),
            hold_out=tuple(parsed.hold_out),
            randomize=parsed.randomize,
            cameras=tuple(parsed.cameras),
            video=parsed.video,
        )
        output = record(recording, parsed.output, parsed.num_workers)
    except (ValueError, FileExistsError) as error:
        parsed.error(str(error))
    info = json.loads((output / "meta" / "info.json").read_text())
    print(f"{output}: {info['total_episodes']} episodes, {info['total_frames']} frames.")  # noqa: T201


if __name__ == "__main__":
    main()
