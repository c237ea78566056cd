"""
Records demonstrations of the expert as a LeRobot v3.0 dataset, with the pictures inside the parquet files.

    python -m tabletop.record --episodes 100 --output demonstrations --num_workers 2
"""

import argparse
import io
import itertools
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from .environment import CONTROL_RATE, TabletopEnv
from .expert import Expert
from .scene import COLORS, SHAPES
from .tasks import SIDES, TASKS, WORDINGS


CAMERAS = {"observation.images.front": "image", "observation.images.wrist": "wrist_image"}
VECTORS = {
    "observation.state": ("x", "y", "z", "rx", "ry", "rz", "left_finger", "right_finger"),
    "action": ("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
}
INDICES = ("frame_index", "episode_index", "index", "task_index")
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}

NOOP_THRESHOLD = 1e-4
MIN_NOISE = 0.01
MAX_DRAWS = 100
MAX_ATTEMPTS = 100
CHUNK_SIZE = 1000  # files per folder
DATA_FILE_MB, VIDEO_FILE_MB = 100, 200
_PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"

_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_EPISODE_SCHEMA = pa.schema(
    [
        *((key, _PICTURE) for key in CAMERAS),
        *((key, pa.list_(pa.float32(), len(names))) for key, names in VECTORS.items()),
    ]
)


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
        hold_out (`tuple[str]`): Colours, shapes or objects (`red cube`) that are never the target.
        randomize (`bool`, defaults to `False`): Vary cameras, light and colours from episode to episode.

    Raises:
        ValueError: If a value is out of range or unknown, or nothing is left to handle.
    """

    episodes: int
    seed: int = 0
    tasks: tuple[str, ...] = TASKS
    image_size: int = 224
    noise: float = 0.3
    hold_out: tuple[str, ...] = ()
    randomize: bool = False

    def __post_init__(self):
        for name, least in (("episodes", 1), ("seed", 0), ("image_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not self.tasks or set(self.tasks) - set(TASKS):
            raise ValueError(f"`tasks` must be among {list(TASKS)}, got {list(self.tasks)}.")
        if not self.noise >= MIN_NOISE:
            # No-ops are not executed: an expert that rests without noise, as its fingers close, would rest for ever.
            raise ValueError(f"`noise` must be at least {MIN_NOISE}, got {self.noise}.")
        if not self.targets():
            raise ValueError(f"Holding out {list(self.hold_out)} leaves no object to handle.")

    def targets(self) -> list[str]:
        """Names of the objects that are not held out."""
        names = [(f"{color} {shape}", color, shape) for color in COLORS for shape in SHAPES]
        known = set(itertools.chain.from_iterable(names))
        if unknown := set(self.hold_out) - known:
            raise ValueError(
                f"`hold_out` takes colours {list(COLORS)}, shapes {list(SHAPES)} and objects such as 'red cube'; "
                f"got {sorted(unknown)}."
            )
        return [name[0] for name in names if not set(name) & set(self.hold_out)]


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
    env: TabletopEnv, observation: dict, rng: np.random.Generator, noise: float
) -> tuple[list[dict], str | None]:
    """
    The expert's way from a fresh start to the end.

    Args:
        env (`TabletopEnv`): Just reset.
        observation (`dict`): What the reset returned.
        rng (`np.random.Generator`): Source of the noise.
        noise (`float`): See [`Expert.noisy_action`].

    Returns:
        `tuple[list[dict], str | None]`: Frames, each an observation with the `action` (7,) that followed it, and the
        outcome (None: the expert came to rest).
    """
    expert, frames, previous = Expert(env), [], None
    while True:
        draws = (expert.noisy_action(rng, noise) for _ in range(MAX_DRAWS))
        action = next((draw for draw in draws if not is_noop(draw, previous)), None)
        if action is None:
            return frames, None
        frames.append({**observation, "action": action})
        observation, _, terminated, truncated, info = env.step(action)
        previous = action
        if terminated or truncated:
            return frames, info["outcome"]


def record_episode(recording: Recording, episode: int, path: Path) -> None:
    """
    Write one successful demonstration to a file, which appears only when it is whole.

    Raises:
        RuntimeError: If the expert failed a hundred times.
    """
    env = TabletopEnv(image_size=recording.image_size, randomize=recording.randomize)
    for attempt in range(MAX_ATTEMPTS):
        seed, options, rng = draw_start(recording, episode, attempt)
        observation, _ = env.reset(seed=seed, options=options)
        start = {"qpos": env.data.qpos.tolist(), "qvel": env.data.qvel.tolist()}
        frames, outcome = demonstrate(env, observation, rng, recording.noise)
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
    _write_episode(path, frames, story)


def _write_episode(path: Path, frames: list[dict], story: dict) -> None:
    columns = {
        key: [{"bytes": _encode(frame[name]), "path": f"frame-{index:06d}.png"} for index, frame in enumerate(frames)]
        for key, name in CAMERAS.items()
    }
    columns["observation.state"] = [frame["state"] for frame in frames]
    columns["action"] = [frame["action"] for frame in frames]
    histograms = {key: _histogram(frame[name] for frame in frames).tolist() for key, name in CAMERAS.items()}
    notes = {"story": json.dumps(story), "histograms": json.dumps(histograms)}
    table = pa.table(columns, schema=_EPISODE_SCHEMA.with_metadata(notes))
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def _encode(picture: np.ndarray) -> bytes:
    """PNG of a uint8 picture (S, S, 3)."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _histogram(pictures: Iterator[np.ndarray]) -> np.ndarray:
    """Pixels of each channel and level, (3, 256), of uint8 pictures (S, S, 3)."""
    return sum(
        np.stack([np.bincount(picture[..., channel].reshape(-1), minlength=256) for channel in range(3)])
        for picture in pictures
    )


# Statistics


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


# The dataset


@dataclass
class _Episode:
    """One finished episode with its place in the dataset."""

    table: pa.Table
    story: dict
    histograms: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    row: dict

    def statistics(self) -> dict[str, dict]:
        return _statistics(self.histograms, self.numbers)


def _statistics(histograms: dict[str, np.ndarray], numbers: dict[str, np.ndarray]) -> dict[str, dict]:
    count = len(numbers["index"])
    return {
        **{key: image_statistics(histogram, count) for key, histogram in histograms.items()},
        **{key: vector_statistics(values) for key, values in numbers.items()},
    }


def _load_episode(path: Path, first: int, tasks: dict[str, int]) -> _Episode:
    """
    Read an episode from the staging folder and number its frames.

    Args:
        path (`Path`): Its file.
        first (`int`): `index` of its first frame.
        tasks (`dict[str, int]`): Tasks seen so far; a new one is added.
    """
    table = pq.read_table(path)
    story = json.loads(table.schema.metadata[b"story"])
    count = len(table)
    task = tasks.setdefault(story["instruction"], len(tasks))
    numbers = {
        **{key: table[key].combine_chunks().flatten().to_numpy().reshape(count, -1) for key in VECTORS},
        "timestamp": (np.arange(count) / CONTROL_RATE).astype(np.float32),
        "frame_index": np.arange(count),
        "episode_index": np.full(count, story["episode_index"]),
        "index": np.arange(first, first + count),
        "task_index": np.full(count, task),
    }
    for key in ("timestamp", *INDICES):
        table = table.append_column(key, pa.array(numbers[key]))
    histograms = {key: np.array(value) for key, value in json.loads(table.schema.metadata[b"histograms"]).items()}
    row = {"episode_index": story["episode_index"], "tasks": [story["instruction"]], "length": count}
    table = table.replace_schema_metadata(_huggingface_metadata())
    return _Episode(table, story, histograms, numbers, row)


class _DataFiles:
    """Writes episodes, one row group each, to files of at most about 100 MB."""

    def __init__(self, folder: Path):
        self.folder, self.writer, self.number, self.size = folder, None, -1, 0

    def write(self, table: pa.Table, size: int) -> dict[str, int]:
        """Append an episode of `size` bytes; where it lies."""
        if self.writer is None or self.size + size > DATA_FILE_MB * 2**20:
            self.close()
            self.number, self.size = self.number + 1, 0
            path = self.folder / _PATH.format(**self._place())
            path.parent.mkdir(parents=True, exist_ok=True)
            self.writer = pq.ParquetWriter(path, table.schema)
        self.writer.write_table(table, row_group_size=len(table))
        self.size += size
        return {f"data/{name}": value for name, value in self._place().items()}

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _place(self) -> dict[str, int]:
        return {"chunk_index": self.number // CHUNK_SIZE, "file_index": self.number % CHUNK_SIZE}


def assemble(recording: Recording, staging: Path, folder: Path) -> None:
    """Write the dataset from its finished episodes."""
    files, tasks, rows, stories, first = _DataFiles(folder / "data"), {}, [], [], 0
    histograms, numbers = dict.fromkeys(CAMERAS, 0), {}
    for path in (_episode_path(staging, index) for index in range(recording.episodes)):
        episode = _load_episode(path, first, tasks)
        place = files.write(episode.table, path.stat().st_size)
        rows.append(_episode_row(episode, place, first))
        stories.append(json.dumps(episode.story) + "\n")
        first += len(episode.table)
        histograms = {key: value + episode.histograms[key] for key, value in histograms.items()}
        for key, value in episode.numbers.items():
            numbers.setdefault(key, []).append(value)
    files.close()
    statistics = _statistics(histograms, {key: np.concatenate(values) for key, values in numbers.items()})
    meta = folder / "meta"
    _write_rows(rows, meta / "episodes" / _PATH.format(chunk_index=0, file_index=0))
    _write_tasks(tasks, meta / "tasks.parquet")
    (meta / "tabletop.jsonl").write_text("".join(stories), encoding="utf-8")
    (meta / "stats.json").write_text(json.dumps(statistics, indent=4), encoding="utf-8")
    (meta / "info.json").write_text(json.dumps(_info(recording, first, len(tasks)), indent=4), encoding="utf-8")


def _episode_row(episode: _Episode, place: dict[str, int], first: int) -> dict:
    statistics = episode.statistics()
    return {
        **episode.row,
        **place,
        "dataset_from_index": first,
        "dataset_to_index": first + len(episode.table),
        **{f"stats/{key}/{name}": value for key, stats in statistics.items() for name, value in stats.items()},
        "meta/episodes/chunk_index": 0,
        "meta/episodes/file_index": 0,
    }


def _write_rows(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _write_tasks(tasks: dict[str, int], path: Path) -> None:
    """The tasks as pandas stores a frame whose index is the text."""
    column = {"metadata": None, "numpy_type": "int64", "pandas_type": "int64"}
    text = {"metadata": None, "numpy_type": "str", "pandas_type": "object"}
    axis = {"metadata": {"encoding": "UTF-8"}, "numpy_type": "str", "pandas_type": "unicode"}
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [{"name": None, "field_name": None, **axis}],
        "columns": [
            {"name": "task_index", "field_name": "task_index", **column},
            {"name": None, "field_name": "__index_level_0__", **text},
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "3.1.1",
    }
    schema = pa.schema([("task_index", pa.int64()), ("__index_level_0__", pa.large_string())])
    values = {"task_index": list(tasks.values()), "__index_level_0__": list(tasks)}
    pq.write_table(pa.table(values, schema=schema.with_metadata({"pandas": json.dumps(pandas)})), path)


def _info(recording: Recording, frames: int, tasks: int) -> dict:
    """`meta/info.json`."""
    shape = [recording.image_size, recording.image_size, 3]
    return {
        "codebase_version": "v3.0",
        "robot_type": "tabletop",
        "total_episodes": recording.episodes,
        "total_frames": frames,
        "total_tasks": tasks,
        "chunks_size": CHUNK_SIZE,
        "data_files_size_in_mb": DATA_FILE_MB,
        "video_files_size_in_mb": VIDEO_FILE_MB,
        "fps": CONTROL_RATE,
        "splits": {"train": f"0:{recording.episodes}"},
        "data_path": f"data/{_PATH}",
        "video_path": None,
        "features": {
            **{key: {"dtype": "image", "shape": shape, "names": ["height", "width", "channels"]} for key in CAMERAS},
            **{
                key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
                for key, names in VECTORS.items()
            },
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **{key: {"dtype": "int64", "shape": [1], "names": None} for key in INDICES},
        },
    }


def _huggingface_metadata() -> dict[str, str]:
    """What tells the library `datasets` the types of the columns."""
    number = {"dtype": "float32", "_type": "Value"}
    features = {
        **{key: {"_type": "Image"} for key in CAMERAS},
        **{key: {"feature": number, "length": len(names), "_type": "List"} for key, names in VECTORS.items()},
        "timestamp": number,
        **{key: {"dtype": "int64", "_type": "Value"} for key in INDICES},
    }
    return {"huggingface": json.dumps({"info": {"features": features}})}


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
    assemble(recording, staging, folder)
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
    parser.add_argument(
        "--hold_out",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="colours, shapes or objects that are never the target: red, ball, 'blue cube'",
    )
    parser.add_argument("--randomize", action="store_true", help="vary cameras, light and colours")
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
            hold_out=tuple(parsed.hold_out),
            randomize=parsed.randomize,
        )
        output = record(recording, parsed.output, parsed.num_workers)
    except (ValueError, FileExistsError) as error:
        parsed.error(str(error))
    info = json.loads((output / "meta" / "info.json").read_text())
    print(f"{output}: {info['total_episodes']} episodes, {info['total_frames']} frames.")  # noqa: T201


if __name__ == "__main__":
    main()
