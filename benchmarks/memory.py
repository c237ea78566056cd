"""
Memory that an action takes beside the weights, ours and a plain implementation of the published decoding.

    OMP_WAIT_POLICY=passive python benchmarks/memory.py --output benchmarks/results/memory.json

Each figure is of a process of its own: the highest resident memory during three actions, less what was resident
before the first. That is what the actions allocate, and the pages of the libraries that they touch first. The plain
way is described in `plain_decoding.py`: its logits of all positions are what ours does not have. Linux and the CPU
alone; what training takes is in `training.py`.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from latency import OurPolicy
from plain_decoding import (
    CONFIGURATIONS,
    PlainPolicy,
    forget_peak,
    in_new_process,
    make_policy,
    random_observations,
    resident_mib,
)
from preprocessing import machine


ACTIONS, PROCESSES = 3, 3


def measure(name: str, way: str, batch_size: int, threads: int) -> dict[str, float]:
    """MiB of the weights, and what the actions take beside them at most."""
    torch.set_num_threads(threads)
    model, processor = make_policy(name)
    policy = (PlainPolicy if way == "plain" else OurPolicy)(model, processor)
    observations = list(islice(random_observations(0, processor.use_proprio), batch_size))
    before = resident_mib()
    forget_peak()
    for _ in range(ACTIONS):
        policy.predict(observations)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    return {"weights": weights, "beside": resident_mib("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["small policy", "tiny golden", "mid-size"]
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=default)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "machine": {**machine(), "transformers": transformers.__version__, "load_average": os.getloadavg()[0]},
        "mib": {},
    }
    print(f"{'':20} {'batch':>5} {'weights':>8} {'plain':>8} {'ours':>8}   MiB")
    for name in arguments.configurations:
        for batch_size in arguments.batch_sizes:
            figures = {}
            for way in ("plain", "ours"):
                runs = [in_new_process(measure, name, way, batch_size, arguments.threads) for _ in range(PROCESSES)]
                figures[way] = statistics.median(run["beside"] for run in runs)
            figures["weights"] = runs[0]["weights"]
            result["mib"].setdefault(name, {})[batch_size] = figures
            values = " ".join(f"{figures[key]:8.1f}" for key in ("weights", "plain", "ours"))
            print(f"{name:20} {batch_size:5} {values}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
