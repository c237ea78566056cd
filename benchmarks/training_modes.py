"""
Loss curves of the ways to fine-tune, from LoRA to all weights, of one small policy on one small dataset.

    python benchmarks/training_modes.py

Everything goes through `train_hf.py` as a user would call it, each run in a process of its own, and the figures come
from the run's `trainer_state.json`. An adapter over random weights has little to adapt, so all runs start from one
policy that a short full run has taught two other tasks of the tabletop, recorded with another seed. Data, their order,
number of steps and seed are the same for all; the learning rate is one for adapters and one for weights. Further runs
show the 8-bit optimizer, and which fraction of the time is spent waiting for data with 0, 1 and 2 worker processes.

Nobody can predict the noise of the demonstrations' actions: with `--noise 0.3`, the recorder's default, it is most of
the loss. `--folder DIR` keeps recordings and runs there, and a second call with the same arguments goes on with what
is missing. `--output FILE` stores the result and draws the curves into the PNG beside it.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

import accelerate  # noqa: E402
import bitsandbytes  # noqa: E402
import matplotlib  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from preprocessing import machine  # noqa: E402

import train_hf  # noqa: E402
from training.arguments import parse_arguments  # noqa: E402
from training.checkpoint import find_checkpoints  # noqa: E402


LORA = ("--use_peft", "True", "--learning_rate", "2e-3")
WEIGHTS = ("--learning_rate", "5e-4")
RUNS = {
    "full": WEIGHTS,
    "sandwich": ("--training_mode", "sandwich", *WEIGHTS),
    "frozen vision": ("--training_mode", "frozen_vision", *WEIGHTS),
    "last layer": ("--training_mode", "last_layer", *WEIGHTS),
    "LoRA": LORA,
    "QLoRA (NF4)": ("--load_in_4bit", "True", *LORA),
    "full, 8-bit AdamW": ("--optim", "adamw_bnb_8bit", *WEIGHTS),
}
DRAWN = tuple(RUNS)[:-1]  # the last lies on top of the first

START_RECORDING = ("--tasks", "pick", "push", "--seed", "1", "--episodes", "300")
RECORDING = ("--tasks", "put_in_bowl", "--seed", "0", "--episodes", "80")
START_TRAINING = {"max_steps": 600, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "eval_strategy": "no"}
TRAINING = {"per_device_train_batch_size": 16, "eval_strategy": "steps", "eval_on_start": True}
COMMON = {"seed": 0, "image_augmentation": "independent", "shuffle_buffer": 2000, "logging_steps": 10}

# Okabe and Ito's colours, told apart by readers who see fewer.
COLOURS = ("#000000", "#56B4E9", "#009E73", "#E69F00", "#0072B2", "#D55E00")
STYLES = ("-", "-", "-", "-", "--", ":")


def run(command: list[str | Path]) -> None:
    """
    Raises:
        RuntimeError: If the command fails, with the end of what it said.
    """
    done = subprocess.run([sys.executable, *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr[-3000:]}")


def record(output: Path, what: tuple[str, ...], noise: float) -> Path:
    if not (output / "meta" / "info.json").is_file():
        run(["-m", "tabletop.record", *what, "--noise", noise, "--image_size", "112", "--output", output])
    return output


def as_flags(values: dict[str, Any]) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def train(model: Path, dataset: Path, output: Path, flags: list[str]) -> list[dict[str, float]]:
    """Fine-tune as the command line does, unless it is done; the log of the run."""
    if not find_checkpoints(output):  # the only one is written at the end
        paths = {"model_name_or_path": model, "dataset": dataset, "output_dir": output}
        run(["train_hf.py", *as_flags(paths | COMMON), *flags])
    return read_history(output)


def read_history(output: Path) -> list[dict[str, float]]:
    """The log of a run, from its last checkpoint."""
    return json.loads((find_checkpoints(output)[-1] / "trainer_state.json").read_text())["log_history"]


def trainable_parameters(model: Path, flags: tuple[str, ...]) -> int:
    """How many parameters `train_hf.py` trains with these flags."""
    required = as_flags({"model_name_or_path": model, "dataset": "unread", "output_dir": "unwritten"})
    trained, _, _ = train_hf.load_model(parse_arguments([*required, *flags])[0])
    return sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)


def summarise(history: list[dict[str, float]]) -> dict[str, Any]:
    """Curves and last figures of a run."""
    training = [entry for entry in history if "loss" in entry]
    validation = [entry for entry in history if "eval_loss" in entry]
    return {
        "step": [entry["step"] for entry in training],
        "loss": [entry["loss"] for entry in training],
        "validation_step": [entry["step"] for entry in validation],
        "validation_loss": [entry["eval_loss"] for entry in validation],
        "validation_accuracy": [entry["eval_action_accuracy"] for entry in validation],
        "validation_l1_normalized": [entry["eval_l1_normalized"] for entry in validation],
        # Not the first line, which holds the start of everything.
        "data_wait": statistics.median(entry["data_wait"] for entry in training[1:]),
    }


def prepare(folder: Path, noise: float) -> tuple[Path, Path]:
    """The policy that all runs start from, and the dataset that they train on."""
    untrained, start = folder / "untrained", folder / "start"
    if not (untrained / "config.json").is_file():
        run(["tools/init_policy.py", "--output_dir", untrained])
    other = record(folder / "other_tasks", START_RECORDING, noise)
    train(untrained, other, start, as_flags(START_TRAINING | {"save_steps": START_TRAINING["max_steps"]}))
    return start, record(folder / "tabletop", RECORDING, noise)


def measure_modes(start: Path, dataset: Path, folder: Path, steps: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """The runs of these names."""
    schedule = {"max_steps": steps, "save_steps": steps, "eval_steps": max(steps // 6, 1)}
    result = {}
    for name in names:
        flags, output = RUNS[name], folder / f"run-{list(RUNS).index(name)}"
        history = train(start, dataset, output, [*as_flags(TRAINING | schedule), *flags])
        result[name] = {
            "flags": " ".join(flags),
            "trainable_parameters": trainable_parameters(start, flags),
            "optimizer_bytes": (find_checkpoints(output)[-1] / "optimizer.pt").stat().st_size,
            **summarise(history),
        }
        print(describe(name, result[name]), flush=True)
    return result


def measure_waiting(
    start: Path, dataset: Path, folder: Path, steps: int, numbers: list[int]
) -> dict[str, dict[str, float]]:
    """Fraction of the time spent waiting for data, by number of worker processes: the lines of the log but one."""
    result = {}
    schedule = {"max_steps": steps, "save_steps": steps, "eval_strategy": "no", "per_device_train_batch_size": 16}
    for workers in numbers:
        flags = as_flags(schedule | {"dataloader_num_workers": workers})
        history = train(start, dataset, folder / f"workers-{workers}", [*flags, *WEIGHTS])
        fractions = [entry["data_wait"] for entry in history if "loss" in entry]
        later = fractions[1:]
        result[str(workers)] = {
            "first_line": fractions[0],
            "median": statistics.median(later),
            "lowest": min(later),
            "highest": max(later),
        }
    return result


def describe(name: str, figures: dict[str, Any]) -> str:
    return (
        f"{name:18} {figures['trainable_parameters']:10,} parameters, loss {figures['loss'][0]:.3f} to "
        f"{figures['loss'][-1]:.3f}, validation accuracy {figures['validation_accuracy'][0]:.1%} to "
        f"{figures['validation_accuracy'][-1]:.1%}"
    )


def draw(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Loss in training and validation over the steps."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    training, validation = figure.subplots(1, 2, sharey=True)
    for name, colour, style in zip(DRAWN, COLOURS, STYLES, strict=True):
        if name not in runs:
            continue
        each = runs[name]
        accuracy = each["validation_accuracy"][-1]
        label = f"{name}: {each['trainable_parameters'] / 1e6:.2f} M parameters, {accuracy:.1%}"
        training.plot(each["step"], each["loss"], style, color=colour, label=label, linewidth=1.6)
        steps, losses = each["validation_step"], each["validation_loss"]
        validation.plot(steps, losses, style, color=colour, marker="o", markersize=4, linewidth=1.6)
    training.set(title="Training, mean of ten steps", ylabel="loss (nats per token)")
    validation.set_title("Held-out episodes")
    for axes in (training, validation):
        axes.set_xlabel("optimizer step (16 pictures each)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*training.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        "Fine-tuning a small policy on a new task of the tabletop, by what learns\n"
        "(start: short full run on two other tasks; same data, order and seed; %: held-out action tokens predicted)",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


def settings() -> dict[str, Any]:
    return {
        "start": {
            "recording": " ".join(START_RECORDING),
            "training": START_TRAINING | COMMON,
            "model": "tools/init_policy.py, then a full run on other tasks and another seed",
        },
        "recording": " ".join(RECORDING),
        "training": TRAINING | COMMON,
    }


def versions() -> dict[str, str]:
    return {each.__name__: each.__version__ for each in (transformers, peft, accelerate, bitsandbytes, matplotlib)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of each mode")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 1, 2], help="that data are waited for")
    parser.add_argument("--noise", type=float, default=0.01, help="of the demonstrations")
    parser.add_argument("--folder", type=Path, help="where recordings and runs are kept")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        start, dataset = prepare(folder, arguments.noise)
        runs = measure_modes(start, dataset, folder, arguments.steps, arguments.runs)
        waiting = measure_waiting(start, dataset, folder, max(arguments.steps // 5, 20), arguments.workers)
    for workers, each in waiting.items():
        print(f"{workers} workers: waits for data {each['median']:.1%} of the time")
    if arguments.output:
        result = {
            "command": shlex.join(["python", "benchmarks/training_modes.py", *sys.argv[1:]]),
            "machine": {**machine(), **versions(), "load_average": os.getloadavg()[0]},
            "settings": settings() | {"steps": arguments.steps, "noise": arguments.noise},
            "runs": runs,
            "data_wait_by_workers": waiting,
        }
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw(runs, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
