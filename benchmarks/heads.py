"""
What each way of speaking actions costs and brings on the tabletop: tokens one by one and in parallel, L1, diffusion,
flow matching and FAST.

    python benchmarks/heads.py --folder heads --output benchmarks/results/heads.json

All start from one policy, whose towers and language model they take over, and learn through `train_hf.py` with
recipes/tabletop_heads.yaml from the same demonstrations, in the same order and number of steps; heads that the policy
has not got begin anew, and with `--num_images 2` all look at two pictures. The policy of this repository speaks in
tokens one by one: that row goes on where it stood, and the others have everything to learn. `tools/evaluate_policy.py`
rolls each out in the same unseen scenes. Times of an action are medians of single observations, taken in turn.
`--output FILE` stores the result. What lies in `--folder` already is not made again; flags that this command does not
know go to `train_hf.py`.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

import torch  # noqa: E402
from few_shot import TARGETS, check_folder  # noqa: E402
from load_policy import load_policy  # noqa: E402
from preprocessing import machine  # noqa: E402
from training_modes import as_flags, run, versions  # noqa: E402

from evaluation.policies import ModelPolicy, cameras_of  # noqa: E402
from tabletop.environment import TabletopEnv  # noqa: E402
from tabletop.scene import HELD_OUT  # noqa: E402


CHUNK = {"chunk_size": 8}
PARALLEL = {**CHUNK, "attention_mode": "bidirectional"}
HEADS = {
    "tokens, one by one": {"bin_smoothing": 8},
    "tokens, in parallel": {**PARALLEL, "head_type": "tokens", "append_stop_token": False, "bin_smoothing": 8},
    "L1": {**PARALLEL, "head_type": "l1", "append_stop_token": False},
    "diffusion": {**PARALLEL, "head_type": "diffusion", "append_stop_token": False, "num_inference_steps": 10},
    "flow": {**PARALLEL, "head_type": "flow", "append_stop_token": False, "num_inference_steps": 5},
    "FAST": {**CHUNK, "head_type": "fast", "fast_vocab_size": 200},
}
RECORDING_SEED, FIRST_SEED, TIMED_SCENE = 40, 700_000, 99


def record(folder: Path, policy: Path, episodes: int, cameras: Sequence[str]) -> Path:
    """Demonstrations of every task with what the policy has been taught to handle."""
    output = folder / "demonstrations"
    if not (output / "meta" / "info.json").is_file():
        side = json.loads((policy / "config.json").read_text())["image_sizes"][0]
        flags = {"episodes": episodes, "seed": RECORDING_SEED, "image_size": side, "detour": 0.5, "output": output}
        flags |= {"num_workers": 2}
        run(["-m", "tabletop.record", "--hold_out", *HELD_OUT, "--cameras", *cameras, *as_flags(flags)])
    return output


def train(folder: Path, policy: Path, dataset: Path, name: str, flags: list[str]) -> tuple[Path, float]:
    """The policy with this head, and the seconds that its training took."""
    output = folder / f"head-{list(HEADS).index(name)}"
    seconds = output / "seconds.json"
    if not seconds.is_file():
        paths = {"model_name_or_path": policy, "statistics": policy / "dataset_statistics.json", "dataset": dataset}
        began = time.perf_counter()
        head = as_flags({**paths, "output_dir": output, **HEADS[name]})
        run(["train_hf.py", "recipes/tabletop_heads.yaml", *head, *flags])
        seconds.write_text(json.dumps(time.perf_counter() - began))
    return output, json.loads(seconds.read_text())


def evaluate(policy: Path, rollouts: int) -> dict[str, Any]:
    """results.json of a policy on what it has been taught to handle, without its episodes."""
    output = policy / "rollouts"
    if not (output / "results.json").is_file():
        flags = {"policy": policy, "episodes": rollouts, "seed": FIRST_SEED, "num_envs": 25, "output_dir": output}
        run(["tools/evaluate_policy.py", *as_flags(flags), "--env_arguments", json.dumps(TARGETS["known"])])
    results = json.loads((output / "results.json").read_text())
    return {**results["tasks"], "all": results["all"]}


def time_predictions(policies: dict[str, Path], repetitions: int) -> dict[str, dict[str, float]]:
    """
    Milliseconds of a prediction, picture included, and of each action in it.

    Returns:
        `dict`: By the name of the head: `prediction_ms`, `action_ms`, `actions_per_prediction`.
    """
    loaded = {name: ModelPolicy(*load_policy(str(path))) for name, path in policies.items()}
    (side, *_) = {policy.image_size for policy in loaded.values()}
    seen, _ = TabletopEnv(image_size=side).reset(seed=TIMED_SCENE)
    times: dict[str, list[float]] = {name: [] for name in loaded}
    for repetition in range(repetitions + 3):  # the first few warm up
        for name, policy in loaded.items():
            states = [seen["state"]] if policy.processor.use_proprio else None
            began = time.perf_counter()
            policy.predict_chunks([seen["instruction"]], [[seen[camera] for camera in policy.cameras]], states)
            if repetition >= 3:
                times[name].append(1000 * (time.perf_counter() - began))
    result = {}
    for name, policy in loaded.items():
        median, size = statistics.median(times[name]), policy.processor.chunk_size
        result[name] = {"prediction_ms": median, "action_ms": median / size, "actions_per_prediction": size}
    return result


def describe(name: str, figures: dict[str, Any]) -> str:
    rates = ", ".join(f"{task} {each['success_rate']:.0%}" for task, each in figures["success"].items())
    return (
        f"{name:20} {rates}; {figures['prediction_ms']:.1f} ms a prediction, {figures['action_ms']:.2f} ms an action, "
        f"{figures['training_seconds'] / 60:.1f} min of training"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=REPOSITORY)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--num_images", type=int, default=1, choices=[1, 2], help="2 is with the wrist's camera")
    parser.add_argument("--demonstrations", type=int, default=1500)
    parser.add_argument("--rollouts", type=int, default=50, help="of each task")
    parser.add_argument("--repetitions", type=int, default=50, help="of each timed prediction")
    parser.add_argument("--folder", type=Path, required=True, help="where recordings, runs and results are kept")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments, flags = parser.parse_known_args()
    folder, policy = arguments.folder.resolve(), arguments.policy.resolve()
    counts = {name: getattr(arguments, name) for name in ("num_images", "demonstrations", "rollouts")}
    check_folder(folder, {"policy": str(policy), **counts, "flags": flags})
    dataset = record(folder, policy, arguments.demonstrations, cameras_of(arguments.num_images))
    flags = [*as_flags({"num_images": arguments.num_images}), *flags]
    trained, runs = {}, {}
    for name in arguments.heads:
        trained[name], seconds = train(folder, policy, dataset, name, flags)
        runs[name] = {"flags": HEADS[name], "num_images": arguments.num_images, "training_seconds": seconds}
        runs[name]["success"] = evaluate(trained[name], arguments.rollouts)
    for name, figures in time_predictions(trained, arguments.repetitions).items():
        runs[name] |= figures
        print(describe(name, runs[name]), flush=True)
    if arguments.output:
        result = {
            "command": shlex.join(["python", "benchmarks/heads.py", *sys.argv[1:]]),
            "machine": {**machine(), **versions(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
            "runs": runs,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
