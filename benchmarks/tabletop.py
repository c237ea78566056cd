"""
Speed of the simulated tabletop: control steps without a camera, pictures per second of each renderer, and recorded
frames per second of two worker processes.

    python benchmarks/tabletop.py
    MUJOCO_GL=egl python benchmarks/tabletop.py --backend egl

A recorded frame is a picture of each camera, encoded as PNG, with the physics and the expert. The promise is 60 of
them per second at 112 px on two cores, which is 33 ms of processor time each; that time tells more where other
programs run too. `--output FILE` stores the result.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mujoco
from preprocessing import machine

from tabletop.camera import BACKENDS, make_camera
from tabletop.environment import TabletopEnv
from tabletop.expert import Expert
from tabletop.tasks import TASKS


REPOSITORY = Path(__file__).resolve().parent.parent


DEFAULT = "raycast"  # what the recorder uses


def per_second(function: Callable[[], int], repetitions: int) -> float:
    """Median of the units of work per second that `function` reports."""
    rates = []
    for _ in range(repetitions):
        start = time.perf_counter()
        rates.append(function() / (time.perf_counter() - start))
    return statistics.median(rates)


def control_steps(env: TabletopEnv, seed: int) -> int:
    """Steps of one episode of the expert."""
    env.reset(seed=seed)
    expert, done = Expert(env), False
    while not done:
        *_, terminated, truncated, _ = env.step(expert.action())
        done = terminated or truncated
    return env.steps


def measure(backend: str, episodes: int) -> dict[str, float]:
    """Rates by what was done."""
    seeds = iter(range(episodes * len(TASKS)))
    result = {}
    for task in TASKS:
        env = TabletopEnv(tasks=(task,), cameras=())
        result[f"control steps, {task}"] = per_second(lambda env=env: control_steps(env, next(seeds)), episodes)
    env = TabletopEnv(cameras=())
    env.reset(seed=0)
    for size in (112, 224):
        camera = make_camera(env.model, size, backend)
        for name in ("front", "wrist"):

            def draw(camera=camera, name=name) -> int:
                camera.render(env.data, name)
                return 1

            draw()
            result[f"{backend} frames, {name} {size} px"] = per_second(draw, 30)
        camera.close()
    return result


def recorded_frames(size: int, episodes: int) -> tuple[float, float]:
    """Frames per second, and milliseconds of processor time per frame, of a whole recording by two workers."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tabletop.record", "--output", f"{folder}/dataset", "--num_workers", "2"]
        command += ["--episodes", str(episodes), "--image_size", str(size)]
        used, start = _children_seconds(), time.perf_counter()
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
        seconds, used = time.perf_counter() - start, _children_seconds() - used
        frames = json.loads(Path(folder, "dataset/meta/info.json").read_text())["total_frames"]
    return frames / seconds, 1e3 * used / frames


def _children_seconds() -> float:
    """Processor time of all processes that have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default=DEFAULT, help="others: without recordings")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--recorded_episodes", type=int, default=40)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rates = measure(arguments.backend, arguments.episodes)
    processor_times = {}
    for size in (112, 224) if arguments.backend == DEFAULT else ():
        name = f"recorded frames, two workers, {size} px"
        rates[name], processor_times[name] = recorded_frames(size, arguments.recorded_episodes)
    for name, rate in rates.items():
        milliseconds = f" {processor_times[name]:8.1f} ms of processor time each" if name in processor_times else ""
        print(f"{name:36} {rate:8.1f} per second{milliseconds}")
    if arguments.output:
        result = {
            "machine": {**machine(), "mujoco": mujoco.__version__, "load_average": list(os.getloadavg())},
            "per_second": rates,
            "processor_milliseconds": processor_times,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
