"""
Speed of the simulated tabletop: control steps without a camera, and pictures per second of each renderer.

    python benchmarks/tabletop.py
    MUJOCO_GL=egl python benchmarks/tabletop.py --backend egl

`--output FILE` stores the result.
"""

import argparse
import json
import statistics
import sys
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
        env = TabletopEnv(tasks=(task,), render_observations=False)
        result[f"control steps, {task}"] = per_second(lambda env=env: control_steps(env, next(seeds)), episodes)
    env = TabletopEnv(render_observations=False)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, default="raycast")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rates = measure(arguments.backend, arguments.episodes)
    for name, rate in rates.items():
        print(f"{name:32} {rate:8.1f} per second")
    if arguments.output:
        result = {"machine": {**machine(), "mujoco": mujoco.__version__}, "per_second": rates}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
