"""
Latency and memory of the small policy over 10,000 consecutive frames of the tabletop in which it acts.

    OMP_WAIT_POLICY=passive python benchmarks/endurance.py --output benchmarks/results/endurance.json

Each frame's action is timed from the picture to the action, with the previous action as a draft. Between actions a
fixed workload is timed, products of matrices that take about as long as an action: what stretches both is the machine.
The promises: the 99th percentile of the actions, over their median, is at most 1.5 times that of the fixed workload
over its own; and resident memory does not grow from the first tenth of the frames to the last, but for what the
allocator moves (2%).
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from latency import OurPolicy, timed
from plain_decoding import SMALL, Observation, make_policy, resident_mib
from preprocessing import machine


WARM_UP = 100
SIDE = 256
MAX_GROWTH, MAX_RATIO = 1.02, 1.5


class FixedWork:
    """Products of matrices that take about so many milliseconds."""

    def __init__(self, milliseconds: float):
        self._matrix = torch.randn(SIDE, SIDE)
        self._count = 1
        one = statistics.median(timed(self)[0] for _ in range(200))
        self._count = max(round(milliseconds / one), 1)

    def __call__(self) -> None:
        for _ in range(self._count):
            self._matrix @ self._matrix


def measure(frames: int) -> dict[str, Any]:
    import gymnasium

    model, processor = make_policy(SMALL)
    policy, env = OurPolicy(model, processor), gymnasium.make("tabletop:Tabletop-v0", image_size=128)
    actions, fixed, memory, accepted = [], [], [], []
    work, seed, is_over, output = None, 600_000, True, None
    for frame in range(frames + WARM_UP):
        if is_over:
            seen, _ = env.reset(seed=seed)
            seed, output = seed + 1, None
        observation = Observation(seen["instruction"], seen["image"], seen["state"])
        draft = None if output is None else output.token_ids
        elapsed, _, output = timed(lambda o=observation, d=draft: policy.predict([o], d))
        actions.append(elapsed)
        if frame == WARM_UP:
            work, actions = FixedWork(statistics.median(actions[WARM_UP // 2 :])), []
        if work is not None:
            fixed.append(timed(work)[0])
            memory.append(resident_mib())
            if output.accepted_tokens is not None:
                accepted.append(output.accepted_tokens.item())
        seen, _, terminated, truncated, _ = env.step(output.actions.astype(np.float32))
        is_over = terminated or truncated
    tenth = max(len(memory) // 10, 1)
    growth = statistics.median(memory[-tenth:]) / statistics.median(memory[:tenth])
    percentiles = {name: percentile(values) for name, values in (("action", actions), ("fixed work", fixed))}
    tails = {name: values["p99"] / values["p50"] for name, values in percentiles.items()}
    return {
        "frames": frames,
        "episodes": seed - 600_000,
        "milliseconds": percentiles,
        "p99_ratio": tails["action"] / tails["fixed work"],
        "memory_mib": {"first tenth": statistics.median(memory[:tenth]), "last": statistics.median(memory[-tenth:])},
        "memory_growth": growth,
        "accepted_of_previous_draft": statistics.mean(accepted),
    }


def percentile(values: list[float]) -> dict[str, float]:
    return {f"p{each}": float(np.percentile(values, each)) for each in (50, 90, 99, 99.9)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = {
        "command": shlex.join(["python", "benchmarks/endurance.py", *sys.argv[1:]]),
        "machine": {**machine(), "transformers": transformers.__version__, "load_average": os.getloadavg()[0]},
        **measure(arguments.frames),
    }
    for name, values in result["milliseconds"].items():
        print(f"{name:10} " + ", ".join(f"{each} {value:.2f} ms" for each, value in values.items()))
    print(
        f"p99 over median {result['p99_ratio']:.2f} times that of the fixed work (at most {MAX_RATIO}); memory "
        f"{result['memory_growth']:.3f} times the first tenth's (at most {MAX_GROWTH})"
    )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
