"""
How many demonstrations does the policy need of objects that it has never handled?

    python benchmarks/few_shot.py --folder few_shot --output benchmarks/results/few_shot.json

The colour and the shape that were kept out of its training are recorded, and beside them as many demonstrations with
what it knows, which it would forget otherwise. LoRA adapters learn from both through `train_hf.py` and
recipes/tabletop_lora.yaml, and `tools/evaluate_policy.py` rolls every policy out in the same unseen scenes. Fewer
demonstrations are the first ones of more, and all runs train for the same number of steps. `--output FILE` stores the
result and draws it into the PNG beside it. What lies in `--folder` already is not made again.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

from matplotlib.figure import Figure  # noqa: E402
from preprocessing import machine  # noqa: E402
from training_modes import as_flags, run, versions  # noqa: E402

from tabletop.scene import HELD_OUT  # noqa: E402


# Targets of the evaluations: what was handled in training, and what was not.
TARGETS = {"known": {"hold_out": HELD_OUT}, "held_out": {"objects": HELD_OUT}}
RECORDING_SEEDS, FIRST_SEED = {"held_out": 5, "known": 6}, 500_000
# With many pushes, and ways that begin towards something else: demonstrations that go straight to the object teach
# nothing about how to come back to it.
DISTURBED = {"noise": 0.6, "nudges": 0.25, "detour": 0.5}


def check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: If the folder holds what other settings have made.
    """
    path = folder / "settings.json"
    if path.is_file() and (found := json.loads(path.read_text())) != settings:
        raise ValueError(f"{folder} was made with {found}, now asked for is {settings}: choose another --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def record(folder: Path, policy: Path, tasks: list[str], episodes: int) -> list[Path]:
    """So many demonstrations of what is new and of what is known, in the size that the policy looks at."""
    side = json.loads((policy / "config.json").read_text())["image_sizes"][0]
    outputs = []
    for kind, targets in TARGETS.items():
        outputs.append(folder / f"demonstrations-{episodes}-{kind}")
        if not (outputs[-1] / "meta" / "info.json").is_file():
            flags = {"episodes": episodes, "seed": RECORDING_SEEDS[kind], "image_size": side, "cameras": "image"}
            ((flag, names),) = targets.items()
            chosen = [f"--{flag}", *names, "--tasks", *tasks]
            run(["-m", "tabletop.record", *as_flags({**flags, **DISTURBED, "output": outputs[-1]}), *chosen])
    return outputs


def adapt(folder: Path, policy: Path, datasets: list[Path], episodes: int, flags: list[str]) -> tuple[Path, float]:
    """The policy after so many demonstrations, and the seconds that the training took."""
    output = folder / f"adapted-{episodes}"
    seconds = output / "seconds.json"
    if not seconds.is_file():
        began = time.perf_counter()
        statistics = policy / "dataset_statistics.json"  # the units that the policy speaks in
        paths = {"model_name_or_path": policy, "statistics": statistics, "output_dir": output}
        run(["train_hf.py", "recipes/tabletop_lora.yaml", *as_flags(paths), "--dataset", *datasets, *flags])
        seconds.write_text(json.dumps(time.perf_counter() - began))
    return output, json.loads(seconds.read_text())


def evaluate(folder: Path, policy: Path, tasks: list[str], rollouts: int, name: str) -> dict[str, Any]:
    """results.json of a policy on objects that were held out, and of what it had learned before."""
    found = {}
    for kind, targets in TARGETS.items():
        output = folder / f"results-{name}-{kind}"
        if not (output / "results.json").is_file():
            flags = ["--episodes", rollouts, "--seed", FIRST_SEED, "--num_envs", 25, "--output_dir", output]
            arguments = ["--env_arguments", json.dumps(targets), "--tasks", *tasks]
            run(["tools/evaluate_policy.py", "--policy", policy, *arguments, *flags])
        found[kind] = json.loads((output / "results.json").read_text())["tasks"]
    return found


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Success over the number of demonstrations, with 95% intervals."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(runs))
    lines = [(kind, task) for kind in ("held_out", "known") for task in next(iter(runs.values()))[kind]]
    for index, (kind, task) in enumerate(lines):
        numbers = [each[kind][task] for each in runs.values()]
        rates = [100 * each["success_rate"] for each in numbers]
        bounds = [[100 * abs(each["wilson_95"][end] - each["success_rate"]) for each in numbers] for end in (0, 1)]
        style = "-o" if kind == "held_out" else "--s"
        shifted = [place + 0.04 * index for place in places]
        label = f"{task}, {'objects to adapt to' if kind == 'held_out' else 'objects of the first training'}"
        axes.errorbar(shifted, rates, yerr=bounds, fmt=style, capsize=3, markersize=5, label=label)
    axes.set_xticks(list(places), list(runs))
    axes.set(xlabel="demonstrations", ylabel="success in unseen scenes, %", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, default=REPOSITORY)
    parser.add_argument("--demonstrations", nargs="+", type=int, default=[0, 10, 50, 100, 500])
    parser.add_argument("--tasks", nargs="+", default=["pick"])
    parser.add_argument("--rollouts", type=int, default=100, help="of each task")
    parser.add_argument("--folder", type=Path, required=True, help="where recordings, runs and results are kept")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments, flags = parser.parse_known_args()
    folder, policy, runs = arguments.folder.resolve(), arguments.policy.resolve(), {}
    check_folder(
        folder, {"policy": str(policy), "tasks": arguments.tasks, "rollouts": arguments.rollouts, "flags": flags}
    )
    for count in arguments.demonstrations:
        adapted, seconds = policy, 0.0
        if count:
            datasets = record(folder, policy, arguments.tasks, count)
            adapted, seconds = adapt(folder, policy, datasets, count, flags)
        found = evaluate(folder, adapted, arguments.tasks, arguments.rollouts, str(count))
        runs[str(count)] = {"training_seconds": seconds, **found}
        for kind, tasks in found.items():
            rates = ", ".join(f"{task} {each['success_rate']:.0%}" for task, each in tasks.items())
            print(f"{count:4} demonstrations, {seconds / 60:5.1f} min, {kind:8}: {rates}", flush=True)
    if arguments.output:
        result = {
            "command": shlex.join(["python", "benchmarks/few_shot.py", *sys.argv[1:]]),
            "machine": {**machine(), **versions(), "load_average": os.getloadavg()[0]},
            "held_out": HELD_OUT,
            "runs": runs,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw(runs, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
