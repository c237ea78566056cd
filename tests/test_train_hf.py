# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning from the command line: what is written, exact resumption, the loss and its gradients, bad input."""

import importlib.util
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from conftest import GOLDEN, REPOSITORY, TINY_POLICY, load_golden
from hub_server import HubServer
from load_policy import repository_class
from merge_adapter import merge
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, get_scheduler

import train_hf
from evaluation.policies import ExpertPolicy, ModelPolicy
from robot_data.lerobot import LeRobotSource
from robot_data.reading import iter_episodes
from tabletop.record import Recording, record
from training import trainer as trainer_module
from training.arguments import DataArguments, parse_arguments
from training.callbacks import PushCallback
from training.checkpoint import Repository, find_checkpoints, locate_checkpoint, writing
from training.data import open_parts
from training.trackers import continue_trackers, save_tracker_run
from training.trainer import OpenVLATrainer


pytestmark = [
    # transformers 5 has other names for it; peft uses those that 4.57 knows too.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

STEPS = 6
LORA = ("--use_peft", "True", "--lora_r", "4")


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Path:
    """Ten demonstrations on the tabletop, one of which is held out."""
    return record(Recording(episodes=10, image_size=32), tmp_path_factory.mktemp("recorded") / "tabletop")


def flags(dataset: Path, output: Path, *more: str) -> list[str]:
    values = {
        "model_name_or_path": TINY_POLICY,
        "dataset": dataset,
        "output_dir": output,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "eval_steps": STEPS,
        "per_device_train_batch_size": 2,
        "validation_steps": 4,
        "shuffle_buffer": 50,
        "learning_rate": 1e-3,
        "save_total_limit": 10,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))] + list(more)


def history(checkpoint: Path) -> list[dict]:
    return json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]


def losses(output: Path) -> dict[int, float]:
    """Loss of each step, from the last checkpoint."""
    return {entry["step"]: entry["loss"] for entry in history(find_checkpoints(output)[-1]) if "loss" in entry}


@pytest.fixture(scope="session", params=["full", "lora"])
def run(request, recorded, tmp_path_factory) -> tuple[list[str], Path]:
    """A finished run, and what its mode adds to the command line. Do not change it."""
    mode = list(LORA) if request.param == "lora" else []
    output = tmp_path_factory.mktemp("runs") / request.param
    train_hf.main(flags(recorded, output, *mode))
    return mode, output


def test_smoothed_bins(recorded, tmp_path):
    """The loss of a step is that of the smoothed labels, which no prediction brings to zero."""
    common = ["--max_steps", "1", "--validation_episodes", "0", "--save_steps", "1"]
    for width in ("0", "6"):
        train_hf.main(flags(recorded, tmp_path / width, *common, "--bin_smoothing", width))
    plain, smoothed = (
        json.loads((tmp_path / width / "checkpoint-1" / "trainer_state.json").read_text())["log_history"][0]["loss"]
        for width in ("0", "6")
    )
    assert plain != smoothed
    assert abs(plain - smoothed) < 0.5  # the start of the training knows nothing of either
    with pytest.raises(ValueError, match="must not be negative"):
        train_hf.parse_arguments([*flags(recorded, tmp_path), "--bin_smoothing", "-1"])


class TestOutput:
    def test_root_is_a_repository(self, run, camera_image):
        _, output = run
        processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, dtype="auto")
        assert model.dtype == torch.bfloat16  # as the base is saved, whatever is trained in
        assert model.norm_stats == processor.norm_stats
        assert list(model.norm_stats) == ["tabletop"]
        assert model.norm_stats["tabletop"]["num_trajectories"] == 10
        assert processor.image_processor.center_crop_area == 0.9
        inputs = processor(instruction="pick up the red cube", images=camera_image)
        action = model.predict_action(**inputs.to(model.dtype))
        assert action.shape == (7,)
        assert np.isfinite(action).all()

    def test_weights_have_learned(self, run):
        _, output = run
        before, after = (load_file(path / "model.safetensors") for path in (TINY_POLICY, output))
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {"projector.fc1.weight", "language_model.model.layers.0.self_attn.q_proj.weight"} <= changed

    def test_checkpoints(self, run):
        mode, output = run
        checkpoints = find_checkpoints(output)
        assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-6"]
        weights = "adapter_model.safetensors" if mode else "model.safetensors"
        state = {weights, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "data_stream_0.json"}
        for checkpoint in checkpoints:
            names = {path.name for path in checkpoint.iterdir()}
            assert state <= names
            assert "config.json" not in names
        assert not (output / "_partial").exists()

    def test_metrics(self, run):
        _, output = run
        (evaluation,) = (entry for entry in history(output / "checkpoint-6") if "eval_loss" in entry)
        assert {
            "eval_action_accuracy",
            "eval_l1_normalized",
            "eval_tabletop/l1/x",
            "eval_tabletop/l1_normalized/gripper",
        } <= set(evaluation)
        training = [entry for entry in history(output / "checkpoint-6") if "loss" in entry]
        assert len(training) == STEPS
        assert all(0 <= entry["data_wait"] <= 1 and 0 <= entry["action_accuracy"] <= 1 for entry in training)
        assert losses(output)[STEPS] < losses(output)[1]

    def test_card(self, run):
        mode, output = run
        card = (output / "README.md").read_text()
        for text in ("| tabletop | 10 |", "`lora_r` | 4" if mode else "`mode` | full", "eval_loss", "transformers"):
            assert text in card
        assert str(output.parent) not in card

    def test_best_model(self, recorded, tmp_path):
        """The repository holds the best checkpoint, which outlives `save_total_limit`."""
        best = ("--load_best_model_at_end", "True", "--save_total_limit", "2", "--metric_for_best_model", "eval_loss")
        steps = ("--eval_steps", "1", "--save_steps", "1", "--max_steps", "3", "--lr_scheduler_type", "constant")
        train_hf.main(flags(recorded, tmp_path, *best, *steps, "--learning_rate", "1", "--max_grad_norm", "0"))
        kept = find_checkpoints(tmp_path)
        state = json.loads((kept[-1] / "trainer_state.json").read_text())
        evaluated = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
        best_step = min(evaluated, key=evaluated.get)
        assert best_step < 3  # such a learning rate makes it worse and worse
        assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{best_step}")
        assert [path.name for path in kept] == [f"checkpoint-{best_step}", "checkpoint-3"]
        weights, saved = (load_file(path / "model.safetensors") for path in (kept[0], tmp_path))
        assert all(torch.equal(saved[name], weights[name].bfloat16()) for name in saved)
        assert f"| eval_loss | {evaluated[best_step]:.5g} |" in (tmp_path / "README.md").read_text()

    def test_best_step_that_was_not_saved(self, recorded, tmp_path):
        """The best checkpoint is the best of those that there are."""
        steps = ("--eval_steps", "1", "--save_steps", "2", "--max_steps", "4", "--lr_scheduler_type", "constant")
        # The loss falls from the first step on: where the greatest is the best, that step is.
        best = ("--metric_for_best_model", "loss", "--greater_is_better", "True", "--load_best_model_at_end", "True")
        train_hf.main(flags(recorded, tmp_path, *steps, *best))
        state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["best_global_step"] == 1
        assert state["best_model_checkpoint"] is None or Path(state["best_model_checkpoint"]).is_dir()

    def test_every_process_knows_the_best_checkpoint(self, recorded, tmp_path, monkeypatch):
        trainer, _ = train_hf.set_up(*parse_arguments(flags(recorded, tmp_path)))
        monkeypatch.setattr(type(trainer.args), "should_save", False)  # as in all but the main one
        (tmp_path / "_partial" / "checkpoint-3").mkdir(parents=True)
        trainer._globalstep_last_logged = 0
        trainer.state.best_model_checkpoint = str(tmp_path / "_partial" / "checkpoint-3")
        trainer._complete_checkpoint(tmp_path / "_partial" / "checkpoint-3")
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")

    def test_card_is_told_of_datasets_without_their_weights(self, recorded, tmp_path):
        trainer, _ = train_hf.set_up(*parse_arguments(flags(f"{recorded}=3", tmp_path)))
        assert trainer.repository.datasets == [str(recorded)]

    def test_adapter_merges_by_the_tool(self, run, tmp_path):
        mode, output = run
        if not mode:
            pytest.skip("has no adapter")
        merge(output / "checkpoint-6", tmp_path / "merged")
        for name in ("model.safetensors", "dataset_statistics.json", "preprocessor_config.json"):
            assert (tmp_path / "merged" / name).read_bytes() == (output / name).read_bytes()


class TestResume:
    def resumed(self, run, recorded, folder: Path) -> Path:
        """The run again, from its first checkpoint."""
        mode, output = run
        shutil.copytree(output / "checkpoint-3", folder / "checkpoint-3")
        train_hf.main(flags(recorded, folder, *mode, "--resume_from_checkpoint", "True"))
        return folder

    def test_to_the_bit(self, run, recorded, tmp_path):
        (tmp_path / "_partial" / "checkpoint-5").mkdir(parents=True)  # cut short while it was written
        resumed = self.resumed(run, recorded, tmp_path)
        assert losses(resumed) == losses(run[1])
        for name in ("model.safetensors", "dataset_statistics.json"):
            assert (resumed / name).read_bytes() == (run[1] / name).read_bytes()
        epochs = [[entry["epoch"] for entry in history(path / "checkpoint-6")] for path in (resumed, run[1])]
        assert epochs[0] == epochs[1]
        assert not (tmp_path / "_partial").exists()

    def test_between_two_lines_of_the_log(self, recorded, tmp_path):
        """The first line after a resume also covers the steps since the last one before it."""
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        more = ("--logging_steps", "2", "--gradient_accumulation_steps", "2", "--max_steps", "6")
        train_hf.main(flags(recorded, whole, *more))
        shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
        train_hf.main(flags(recorded, resumed, *more, "--resume_from_checkpoint", "True"))
        assert losses(resumed) == losses(whole)
        assert sorted(losses(whole)) == [2, 4, 6]
        accuracies = [
            [entry["action_accuracy"] for entry in history(path / "checkpoint-6") if "loss" in entry]
            for path in (resumed, whole)
        ]
        assert accuracies[0] == accuracies[1]

    def test_after_the_end(self, run, recorded, tmp_path):
        """The repository is written again as it was, with the figures on its card."""
        shutil.copytree(run[1] / "checkpoint-6", tmp_path / "checkpoint-6")
        train_hf.main(flags(recorded, tmp_path, *run[0], "--resume_from_checkpoint", "True"))
        assert (tmp_path / "model.safetensors").read_bytes() == (run[1] / "model.safetensors").read_bytes()
        cards = [(path / "README.md").read_text().partition("### Metrics") for path in (tmp_path, run[1])]
        assert "| loss |" in cards[0][2]
        assert "| eval_loss |" in cards[0][2]
        assert cards[0][2] == cards[1][2]

    def test_without_the_streams_place(self, run, recorded, tmp_path):
        shutil.copytree(run[1] / "checkpoint-3", tmp_path / "checkpoint-3")
        (tmp_path / "checkpoint-3" / "data_stream_0.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no data_stream_0\.json"):
            train_hf.main(flags(recorded, tmp_path, *run[0], "--resume_from_checkpoint", "True"))

    def test_other_data(self, run, recorded, tmp_path):
        shutil.copytree(run[1] / "checkpoint-3", tmp_path / "checkpoint-3")
        more = ("--resume_from_checkpoint", "True", "--validation_episodes", "0")
        with pytest.raises(ValueError, match=r"state is of another stream.*units of tabletop"):
            train_hf.main(flags(recorded, tmp_path, *run[0], *more))

    def test_nothing_to_resume_from(self, tmp_path):
        (tmp_path / "_partial" / "checkpoint-5").mkdir(parents=True)
        (tmp_path / "checkpoint-tmp").mkdir()
        with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
            locate_checkpoint("True", tmp_path)
        with pytest.raises(FileNotFoundError, match="neither a directory nor a Hub id"):
            locate_checkpoint("no/such/folder", tmp_path)

    def test_the_last_by_number(self, tmp_path):
        for number in (9, 100, 20):
            (tmp_path / f"checkpoint-{number}").mkdir()
        assert locate_checkpoint("True", tmp_path).name == "checkpoint-100"
        with pytest.raises(ValueError, match="checkpoints of another run, up to checkpoint-100"):
            locate_checkpoint(None, tmp_path)


# Stand-ins for the packages of trackers: they write down where a run would go.
TRACKERS = {
    "wandb": """
import os, sys, types
run = None
config = type("Config", (dict,), {"update": lambda self, values, **options: None})()
errors = types.ModuleType("wandb.sdk.lib.config_util")
errors.ConfigError = ValueError
sys.modules["wandb.sdk"] = sys.modules["wandb.sdk.lib"] = types.ModuleType("wandb.sdk")
sys.modules["wandb.sdk.lib.config_util"] = errors
__path__ = []
def init(name, **options):
    global run
    run = types.SimpleNamespace(id=os.environ["WANDB_RUN_ID"], summary={}, _label=lambda **options: None)
    with open(os.environ["TRACKED"], "a") as file:
        print("wandb", name, run.id, os.environ["WANDB_RESUME"], file=file)
def log(values):
    pass
""",
    "trackio": """
import os, types
__version__ = "0.20"
config = type("Config", (dict,), {"update": lambda self, values, **options: None})()
variable = types.SimpleNamespace(get=lambda: None)
context_vars = types.SimpleNamespace(current_space_id=variable, current_project=variable)
def init(name, resume, **options):
    with open(os.environ["TRACKED"], "a") as file:
        print("trackio", name, resume, file=file)
def log(values):
    pass
def finish():
    pass
""",
    "tensorboardX": """
import os
class SummaryWriter:
    def __init__(self, log_dir):
        with open(os.environ["TRACKED"], "a") as file:
            print("tensorboard", log_dir, file=file)
    def add_text(self, *args):
        pass
    add_scalar = add_text
    def flush(self):
        pass
    close = flush
""",
}


class TestTrackers:
    @pytest.mark.slow
    def test_a_resumed_run_is_the_same_run(self, recorded, tmp_path):
        """As it reaches the trackers through Trainer's own callbacks."""
        for name, code in TRACKERS.items():
            (tmp_path / "packages" / name).mkdir(parents=True)
            (tmp_path / "packages" / name / "__init__.py").write_text(code)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TENSORBOARD_"))}
        path = os.pathsep.join([str(tmp_path / "packages"), str(REPOSITORY)])
        tracked, runs = tmp_path / "tracked", []
        for more in (("--max_steps", "1"), ("--max_steps", "2", "--resume_from_checkpoint", "True")):
            command = flags(recorded, tmp_path / "out", *more, *LORA, "--gradient_checkpointing", "True")
            command += ["--report_to", "wandb", "trackio", "tensorboard"]
            done = subprocess.run(
                [sys.executable, str(REPOSITORY / "train_hf.py"), *command],
                env={**clean, "PYTHONPATH": path, "TRACKED": str(tracked)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            assert "Warning:" not in done.stderr  # nothing that the user cannot change
            runs.append(sorted(tracked.read_text().splitlines()))
            tracked.unlink()
        assert runs[0] == runs[1]
        tensorboard, trackio, wandb = (line.split() for line in runs[0])
        assert tensorboard == ["tensorboard", str(tmp_path / "out" / "runs")]
        assert trackio == ["trackio", wandb[1], "allow"]
        assert wandb == ["wandb", f"out-{wandb[2]}", wandb[2], "allow"]

    def test_names(self, tmp_path):
        def named(checkpoint: Path | None, environment: dict[str, str], *more: str):
            training = parse_arguments(flags(tmp_path, tmp_path / "out", *more))[2]
            continue_trackers(training, checkpoint, environment)
            return training

        first, other = named(None, {}), named(None, {})
        assert first.run_name == f"out-{first.run_id}"
        assert first.run_id != other.run_id
        save_tracker_run(first, tmp_path)
        again = named(tmp_path, {})
        assert (again.run_id, again.run_name) == (first.run_id, first.run_name)
        given = named(tmp_path, {"WANDB_RUN_ID": "mine"}, "--run_name", "arms", "--run_id", "other")
        assert (given.run_id, given.run_name) == ("mine", "arms")
        assert named(tmp_path / "older", {}).run_id not in (first.run_id, other.run_id)


class TestFullDisk:
    """A limit on the size of files stands in for the disk: the system itself refuses to write on."""

    @pytest.fixture
    def limit(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

        def set_limit(size: int = soft) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

        yield set_limit
        set_limit()

    @pytest.mark.parametrize("run", ["full"], indirect=True)
    @pytest.mark.parametrize(
        ("owner", "method", "what", "kept"),
        [
            (OpenVLATrainer, "_save_checkpoint", "checkpoint-6", ["checkpoint-3"]),
            (OpenVLATrainer, "_save_optimizer_and_scheduler", "checkpoint-6", ["checkpoint-3"]),
            (Repository, "write", "the repository", ["checkpoint-3", "checkpoint-6"]),
        ],
        ids=["weights", "optimizer", "repository"],
    )
    def test_what_was_saved_before_stays(self, run, recorded, tmp_path, limit, monkeypatch, owner, method, what, kept):
        wrapped, weights = getattr(owner, method), []

        def at_the_limit(*args, **kwargs):
            if (tmp_path / "checkpoint-3").exists() and (tmp_path / "model.safetensors").exists():
                weights.append((tmp_path / "model.safetensors").read_bytes())
                limit(2**20)
            return wrapped(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, at_the_limit)
            message = (
                rf"^{what} could not be written into {tmp_path}, where \d+ MiB were free\. {kept[-1]} is complete: "
            )
            with pytest.raises(OSError, match=message):
                train_hf.main(flags(recorded, tmp_path))
        limit()
        assert [path.name for path in find_checkpoints(tmp_path)] == kept
        assert not (tmp_path / "_partial").exists()
        assert (tmp_path / "model.safetensors").read_bytes() == weights[0]
        assert AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
        train_hf.main(flags(recorded, tmp_path, "--resume_from_checkpoint", "True"))
        assert losses(tmp_path) == losses(run[1])
        assert (tmp_path / "model.safetensors").read_bytes() == (run[1] / "model.safetensors").read_bytes()


# Kills itself in the middle of something, the second time that it comes there.
KILLED = """
import os, signal, sys
import train_hf
from training import checkpoint, trainer
place, arguments = sys.argv[1], sys.argv[2:]
owner, name = {
    "in a step": (trainer.OpenVLATrainer, "log"),
    "before the state": (trainer, "write_json"),
    "before the name": (trainer, "publish_checkpoint"),
    "before the repository": (trainer.OpenVLATrainer, "_rotate"),
    "in the repository": (checkpoint.Repository, "_card"),
}[place]
wrapped, calls = getattr(owner, name), []
def deadly(*args, **kwargs):
    calls.append(name)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return wrapped(*args, **kwargs)
setattr(owner, name, deadly)
train_hf.main(arguments)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "last"),
    [
        ("in a step", None),
        ("before the state", 2),
        ("before the name", 2),
        ("before the repository", 4),
        ("in the repository", 4),
    ],
)
def test_killed_anywhere(recorded, tmp_path, place, last):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ("--save_steps", "2", "--dataloader_num_workers", "2")
    train_hf.main(flags(recorded, whole, *more))
    command = [sys.executable, "-c", KILLED, place, *flags(recorded, killed, *more)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    found = [path.name for path in find_checkpoints(killed)]
    assert found[-1:] == ([] if last is None else [f"checkpoint-{last}"])
    train_hf.main(flags(recorded, killed, *more, *(("--resume_from_checkpoint", "True") if last else ())))
    assert losses(killed) == losses(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def golden_batch(golden_image_processor) -> dict[str, torch.Tensor]:
    """The batch of three that the reference trained on."""
    golden = load_file(GOLDEN / "golden_float32.safetensors")
    records = json.loads((GOLDEN / "golden_float32.json").read_text())["train"]["examples"]
    images = [Image.open(GOLDEN / "images" / f"{record['image']}.png") for record in records]
    names = ("input_ids", "attention_mask", "labels")
    pixel_values = golden_image_processor(images)["pixel_values"]
    is_pad = torch.zeros(len(images), 1, dtype=torch.bool)
    tensors = {name: golden[f"train.{name}"] for name in names}
    return tensors | {"pixel_values": pixel_values, "action_is_pad": is_pad}


class TestLoss:
    @pytest.mark.parametrize("sizes", [(3,), (1, 1, 1), (2, 1)], ids=str)
    def test_golden_gradients(self, recorded, golden_batch, tmp_path, sizes):
        """However a batch is divided, the gradient is that of the mean over all its tokens."""
        arguments = flags(recorded, tmp_path, "--gradient_accumulation_steps", str(len(sizes)), "--use_cpu", "True")
        trainer, _ = train_hf.set_up(*parse_arguments(arguments))
        model = load_golden(dtype=torch.float32)
        parts = {name: tensor.split(sizes) for name, tensor in golden_batch.items()}
        batches = [{**{name: part[i] for name, part in parts.items()}, "names": []} for i in range(len(sizes))]
        batches, count = trainer.get_batch_samples(iter(batches), len(sizes), trainer.args.device)
        assert count == 24
        trainer.current_gradient_accumulation_steps = len(sizes)
        loss = sum(trainer.training_step(model, batch, count) for batch in batches)

        expected = json.loads((GOLDEN / "golden_float32.json").read_text())["train"]["train"]
        assert loss.item() == pytest.approx(expected["loss"], rel=2e-6)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, norm in expected["grad_norms"].items():
            assert (gradients[name] is None) == (norm is None), name
            assert norm is None or gradients[name].norm().item() == pytest.approx(norm, rel=1e-5), name
        for name, gradient in load_file(GOLDEN / "golden_float32.safetensors").items():
            if name.startswith("train.grad."):
                actual = gradients[name.removeprefix("train.grad.")]
                assert ((actual - gradient).norm() / gradient.norm()).item() < 1e-5, name

    def test_not_finite(self, recorded, tmp_path):
        trainer, _ = train_hf.set_up(*parse_arguments(flags(recorded, tmp_path)))
        with torch.no_grad():
            trainer.model.projector.fc1.weight[0, 0] = torch.nan
        with pytest.raises(
            FloatingPointError, match=r"loss of step 1 is nan.*tabletop episode \d+ frame \d+, tabletop"
        ):
            trainer.train()


LANGUAGE, VISION = "language_model.model.layers.", "vision_backbone."
LAST_LAYER = ("language_model.model.embed_tokens.", f"{LANGUAGE}1.", "language_model.lm_head.")


class TestModes:
    @pytest.mark.parametrize(
        ("more", "parts"),
        [
            (("--training_mode", "frozen_vision"), ("projector.", "language_model.")),
            (("--training_mode", "last_layer"), LAST_LAYER),
            (("--training_mode", "sandwich"), (VISION, "projector.", *LAST_LAYER)),
            ((*LORA, "--lora_target_modules", "q_proj", "fc1"), ("projector.fc1", VISION, LANGUAGE)),
            ((*LORA, "--load_in_4bit", "True"), ("projector.", VISION, LANGUAGE)),
            ((*LORA, "--load_in_8bit", "True"), ("projector.", VISION, LANGUAGE)),
        ],
        ids=["frozen_vision", "last_layer", "sandwich", "targets", "4bit", "8bit"],
    )
    def test_what_changes(self, recorded, tmp_path, more, parts):
        quick = ("--max_steps", "2", "--save_steps", "2", "--eval_steps", "1", "--gradient_checkpointing", "True")
        train_hf.main(flags(recorded, tmp_path, *quick, *more, "--learning_rate", "1e-2"))
        before, after = (load_file(path / "model.safetensors") for path in (TINY_POLICY, tmp_path))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert all(name.startswith(parts) for name in changed)
        assert all(any(name.startswith(part) for name in changed) for part in parts)
        if "q_proj" in more:
            assert {name.rpartition(".")[0].rpartition(".")[2] for name in changed} == {"q_proj", "fc1"}
        assert AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)

    def test_unknown_targets(self, recorded, tmp_path):
        with pytest.raises(ValueError, match=r"got \['q_porj'\]\. There are q_proj"):
            train_hf.main(flags(recorded, tmp_path, *LORA, "--lora_target_modules", "q_porj"))


class TestData:
    def set_up(self, dataset: Path, output: Path, *more: str):
        return train_hf.set_up(*parse_arguments(flags(dataset, output, *more)))[0]

    def test_held_out_episodes_are_not_trained_on(self, recorded, tmp_path):
        trainer = self.set_up(recorded, tmp_path, "--validation_steps", "5")
        held_out = {step.episode for step in trainer.eval_dataset}
        assert len(held_out) == 1
        assert len(trainer.eval_dataset) == 5
        names = [name for _, batch in zip(range(300), trainer.loader, strict=False) for name in batch["names"]]
        trained = {int(name.split()[2]) for name in names}
        assert trained == set(range(10)) - held_out

    def test_no_validation(self, recorded, tmp_path):
        trainer = self.set_up(recorded, tmp_path, "--validation_episodes", "0", "--eval_on_start", "True")
        assert trainer.eval_dataset is None
        assert trainer.args.eval_strategy == "no"
        assert not trainer.args.eval_on_start
        with pytest.raises(ValueError, match="load_best_model_at_end needs --validation_episodes"):
            self.set_up(
                recorded,
                tmp_path,
                "--validation_episodes",
                "0",
                "--load_best_model_at_end",
                "True",
                "--eval_steps",
                "3",
            )

    @pytest.mark.parametrize(("augmentation", "area"), [("published", 0.9), ("independent", 0.9), ("none", None)])
    def test_evaluation_crop(self, recorded, tmp_path, augmentation, area):
        trainer = self.set_up(recorded, tmp_path, "--image_augmentation", augmentation)
        assert trainer.repository.processor.image_processor.center_crop_area == area
        first, again = (self.set_up(recorded, tmp_path, "--image_augmentation", augmentation) for _ in range(2))
        batches = [next(iter(each.loader)) for each in (first, again)]
        assert torch.equal(batches[0]["pixel_values"], batches[1]["pixel_values"])

    def test_overfitting_takes_pictures_as_they_are(self, recorded, tmp_path):
        trainer = self.set_up(recorded, tmp_path, "--overfit_one_episode", "True")
        assert {step.episode for step in trainer.eval_dataset} == {0}
        assert trainer.repository.processor.image_processor.center_crop_area is None
        names = [name for _, batch in zip(range(30), trainer.loader, strict=False) for name in batch["names"]]
        assert all(name.startswith("tabletop episode 0 ") for name in names)

    def test_given_statistics(self, run, recorded, tmp_path):
        statistics = json.loads((run[1] / "dataset_statistics.json").read_text())
        statistics["tabletop"]["action"]["q99"][0] = 0.5
        path = tmp_path / "given.json"
        path.write_text(json.dumps(statistics | {"other": statistics["tabletop"]}))
        trainer = self.set_up(recorded, tmp_path / "out", "--statistics", str(path))
        assert list(trainer.model.norm_stats) == ["tabletop"]
        assert trainer.model.norm_stats["tabletop"]["action"]["q99"][0] == 0.5
        path.write_text(json.dumps({"other": statistics["tabletop"]}))
        with pytest.raises(ValueError, match=r"no statistics of \['tabletop'\]; it has \['other'\]"):
            self.set_up(recorded, tmp_path / "out", "--statistics", str(path))
        path.write_text(json.dumps({"tabletop": {"action": {"mean": [0.0] * 7}}}))
        with pytest.raises(ValueError, match=r"'tabletop' has no `action` statistics with `q01` and `q99`"):
            self.set_up(recorded, tmp_path / "out", "--statistics", str(path))

    def test_number_of_steps_that_nobody_knows(self, run, recorded, tmp_path, monkeypatch):
        statistics = json.loads((run[1] / "dataset_statistics.json").read_text())
        del statistics["tabletop"]["num_transitions"]
        path = tmp_path / "given.json"
        path.write_text(json.dumps(statistics))
        monkeypatch.setattr(LeRobotSource, "num_steps", None)  # as of RLDS
        with pytest.raises(ValueError, match=r"files of tabletop nor its statistics.*add `num_transitions`"):
            self.set_up(recorded, tmp_path / "out", "--statistics", str(path))

    def test_statistics_of_another_width(self, run, recorded, tmp_path):
        statistics = json.loads((run[1] / "dataset_statistics.json").read_text())
        block = statistics["tabletop"]["action"]
        statistics["tabletop"]["action"] = {name: [*values, values[-1]] for name, values in block.items()}
        path = tmp_path / "wide.json"
        path.write_text(json.dumps(statistics))
        with pytest.raises(ValueError, match="tabletop have 7 dimensions, its statistics 8"):
            self.set_up(recorded, tmp_path / "out", "--statistics", str(path))

    def test_several_datasets_as_one(self, recorded, tmp_path):
        """One set of statistics over all of them, under the name that was given, and steps of all."""
        more = record(Recording(episodes=4, image_size=32, seed=9), tmp_path / "more")
        config = tmp_path / "configs.yaml"
        config.write_text(yaml.safe_dump({"both": {"action": ["expert_action"]}}))
        given = ("--unnorm_key", "both", "--dataset_configs", str(config), "--validation_episodes", "0")
        trainer = self.set_up(recorded, tmp_path / "out", "--dataset", str(recorded), str(more), *given)
        (statistics,) = trainer.model.norm_stats.values()
        assert list(trainer.model.norm_stats) == ["both"]
        tables = [pq.read_table(each / "data/chunk-000/file-000.parquet") for each in (recorded, more)]
        actions = np.concatenate([np.array(table["expert_action"].to_pylist(), np.float32) for table in tables])
        assert statistics["num_transitions"] == len(actions)
        assert statistics["num_trajectories"] == 14
        np.testing.assert_array_equal(statistics["action"]["max"], actions.max(axis=0))
        names = [name for _, batch in zip(range(400), trainer.loader, strict=False) for name in batch["names"]]
        assert {int(name.split()[2]) for name in names} == set(range(10))
        assert all(name.startswith("both episode") for name in names)

    def test_one_dataset_of_all_has_no_weights(self, recorded, tmp_path):
        with pytest.raises(ValueError, match="every step counts alike: leave out =weight"):
            self.set_up(recorded, tmp_path, "--dataset", f"{recorded}=2", str(recorded), "--unnorm_key", "both")
        with pytest.raises(ValueError, match="--unnorm_key goes with --dataset"):
            DataArguments(mixture="bridge", unnorm_key="both")

    def test_tasks_by_pattern(self, recorded, tmp_path):
        told = {}
        for name, more in {
            "all": (),
            "some": ("--include_tasks", "push|slide", "bowl", "--exclude_tasks", "slide"),
        }.items():
            (part,) = open_parts(parse_arguments(flags(recorded, tmp_path / "out", *more))[1])
            assert part.config.filters.unlabeled_steps
            told[name] = {text for episode in iter_episodes(part.source, part.config) for text in episode.instructions}
        wanted = {text for text in told["all"] if ("push" in text or "bowl" in text) and "slide" not in text}
        assert told["some"] == wanted
        assert 0 < len(wanted) < len(told["all"])

    def test_mixture(self, recorded, tmp_path):
        shutil.copytree(recorded, tmp_path / "data" / "second")
        shutil.copytree(recorded, tmp_path / "data" / "first")
        path = tmp_path / "mixture.yaml"
        path.write_text("{first: 1.0, second: 3.0}")
        arguments = flags(recorded, tmp_path / "out", "--mixture", str(path), "--data_root", str(tmp_path / "data"))
        place = arguments.index("--dataset")
        trainer, _ = train_hf.set_up(*parse_arguments(arguments[:place] + arguments[place + 2 :]))
        assert trainer.loader._streams[0].probabilities == pytest.approx([0.25, 0.75])
        assert sorted(trainer.model.norm_stats) == ["first", "second"]

    @pytest.mark.parametrize("source", ["dataset", "mixture"])
    def test_descriptions(self, recorded, tmp_path, source):
        path = tmp_path / "descriptions.yaml"
        arguments = ["--model_name_or_path", ".", "--output_dir", str(tmp_path), "--dataset_configs", str(path)]
        arguments += ["--dataset", str(recorded)] if source == "dataset" else ["--mixture", str(tmp_path / "one.yaml")]
        arguments += ["--data_root", str(recorded.parent)] if source == "mixture" else []
        (tmp_path / "one.yaml").write_text("{tabletop: 2.0}")
        path.write_text("{tabletop: {cameras: {primary: observation.images.wrist}}}")
        (part,) = open_parts(parse_arguments(arguments)[1])
        assert dict(part.config.cameras) == {"primary": ("observation.images.wrist",)}
        assert part.weight == (2.0 if source == "mixture" else 1.0)
        path.write_text("{other: {}}")
        with pytest.raises(ValueError, match="'other'"):
            open_parts(parse_arguments(arguments)[1])

    def test_weights_of_datasets(self, recorded, tmp_path):
        shutil.copytree(recorded, tmp_path / "other")
        arguments = flags(recorded, tmp_path / "out", "--balance", "False")
        place = arguments.index("--dataset")
        arguments[place + 1 : place + 2] = [f"{recorded}=3", str(tmp_path / "other")]
        trainer, _ = train_hf.set_up(*parse_arguments(arguments))
        assert trainer.loader._streams[0].probabilities == pytest.approx([0.75, 0.25])

    def test_bad_input(self, recorded, tmp_path):
        with pytest.raises(ValueError, match=r"tabletop has no camera 'overhead'.*wrist"):
            self.set_up(recorded, tmp_path, "--camera", "overhead")
        with pytest.raises(ValueError, match=r"looks at 1 image\(s\) .* --camera names 2: primary, wrist"):
            self.set_up(recorded, tmp_path, "--camera", "primary", "wrist")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            self.set_up(tmp_path / "nowhere", tmp_path)

    def test_no_such_policy(self, recorded, tmp_path):
        with pytest.raises(OSError, match=r"^--model_name_or_path no/such-policy cannot be loaded: \S.*\S$"):
            self.set_up(recorded, tmp_path, "--model_name_or_path", "no/such-policy")

    def test_output_that_cannot_be_written(self, recorded, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match=r"^--output_dir .*/file/out cannot be written to: .*Not a directory"):
            self.set_up(recorded, tmp_path / "file" / "out")

    def test_other_action_dimension(self):
        model = SimpleNamespace(config=SimpleNamespace(action_dim=7))
        statistics = {"arms": {"action": {"q01": [0.0] * 14}}}
        with pytest.raises(ValueError, match=r"have 7 dimensions, those of the datasets \{'arms': 14\}"):
            train_hf.check_action_dimensions(model, statistics)
        train_hf.check_action_dimensions(SimpleNamespace(config=SimpleNamespace()), statistics)


def test_open_loop_pictures(recorded, tmp_path):
    more = ("--plot_open_loop", "True", "--overfit_one_episode", "True", "--max_steps", "2", "--eval_steps", "1")
    train_hf.main(flags(recorded, tmp_path, *LORA, *more))
    pictures = sorted(path.name for path in (tmp_path / "open_loop").iterdir())
    assert pictures == ["tabletop-step-1.png", "tabletop-step-2.png"]
    with Image.open(tmp_path / "open_loop" / pictures[0]) as picture:
        assert min(picture.size) > 400


class TestRollouts:
    FLAGS = ("--rollout_episodes", "2", "--rollout_tasks", "pick", "push")

    @pytest.fixture
    def expert(self, monkeypatch):
        """Has the expert act for the policy, and draw random numbers of every kind besides."""

        def act(policy, runs):
            assert not any(module.training for module in policy.model.modules())
            torch.rand(3), np.random.rand(3), random.random()
            return ExpertPolicy().act(runs)

        monkeypatch.setattr(ModelPolicy, "act", act)

    def rollouts(self, output: Path) -> dict[int, dict]:
        entries = history(find_checkpoints(output)[-1])
        return {
            entry["step"]: {name: value for name, value in entry.items() if name.startswith("rollout_")}
            for entry in entries
            if "rollout_success" in entry
        }

    @pytest.mark.parametrize("mode", [(), (*LORA, "--lora_dropout", "0.2")], ids=["full", "lora"])
    def test_disturb_nothing(self, recorded, tmp_path, expert, mode):
        """Training goes on as without them, to the bit, also when it resumes; dropout draws in it."""
        plain, whole, resumed = (tmp_path / name for name in ("plain", "whole", "resumed"))
        train_hf.main(flags(recorded, plain, *mode))
        train_hf.main(flags(recorded, whole, *mode, *self.FLAGS))
        shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
        train_hf.main(flags(recorded, resumed, *mode, *self.FLAGS, "--resume_from_checkpoint", "True"))
        success = {"rollout_success": 1.0, "rollout_success_pick": 1.0, "rollout_success_push": 1.0}
        for output in (whole, resumed):
            assert losses(output) == losses(plain)
            assert (output / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
            assert self.rollouts(output) == {3: success, 6: success}
            assert "| rollout_success_push | 1 |" in (output / "README.md").read_text()
        states = [torch.load(path / "checkpoint-6" / "rng_state.pth", weights_only=False) for path in (plain, whole)]
        assert torch.equal(states[0]["cpu"], states[1]["cpu"])
        assert states[0]["python"] == states[1]["python"]
        assert states[0]["numpy"][2] == states[1]["numpy"][2]
        assert np.array_equal(states[0]["numpy"][1], states[1]["numpy"][1])

    def test_the_model_itself_acts_in_the_same_scenes(self, recorded, tmp_path, monkeypatch):
        more = (*LORA, "--gradient_checkpointing", "True", "--per_device_eval_batch_size", "2")
        trainer, _ = train_hf.set_up(*parse_arguments(flags(recorded, tmp_path, *self.FLAGS, *more)))
        trainer.model.train()
        trainer.model.get_base_model().vision_backbone.eval()
        modes = [module.training for module in trainer.model.modules()]
        asked, predict = [], ModelPolicy.predict_chunks

        def remember(policy, instructions, images, states=None):
            actions = predict(policy, instructions, images, states)
            asked.append((instructions, np.stack(images), actions))
            return actions

        monkeypatch.setattr(ModelPolicy, "predict_chunks", remember)
        assert trainer.rollouts() == trainer.rollouts()
        assert [module.training for module in trainer.model.modules()] == modes
        first, again = asked[: len(asked) // 2], asked[len(asked) // 2 :]
        assert len(first[0][0]) == 2  # side by side
        for one, other in zip(first, again, strict=True):
            assert one[0] == other[0]
            assert np.array_equal(one[1], other[1])
            assert np.array_equal(one[2], other[2])

    @pytest.mark.parametrize(
        ("more", "pattern"),
        [
            (("--rollout_tasks", "juggle"), r"\['juggle'\] are unknown; known: \['pick'"),
            (("--rollout_unnorm_key", "other"), "other.*tabletop"),
            (("--rollout_episodes", "-1"), "must not be negative"),
            (("--rollout_seed", "-1"), "must not be negative"),
            (("--rollout_episodes", "0"), "need --rollout_episodes"),
        ],
        ids=str,
    )
    def test_refused(self, recorded, tmp_path, more, pattern):
        with pytest.raises(ValueError, match=pattern):
            train_hf.set_up(*parse_arguments(flags(recorded, tmp_path, *self.FLAGS, *more)))

    @pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
    @pytest.mark.parametrize("flag", ["--rollout_episodes", "--plot_open_loop"])
    def test_a_divided_model_is_refused(self, recorded, tmp_path, monkeypatch, kind, flag):
        arguments = parse_arguments(flags(recorded, tmp_path, flag, "1"))
        monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")  # as `accelerate launch` does
        with pytest.raises(ValueError, match=rf"{flag} needs the whole model in one process"):
            train_hf.set_up(*arguments)

    @pytest.mark.parametrize("package", ["mujoco", "gymnasium"])
    def test_a_missing_simulator_is_refused(self, recorded, tmp_path, monkeypatch, package):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
        with pytest.raises(ValueError, match=rf"--rollout_episodes needs {package}: pip install -r requirements-eval"):
            train_hf.set_up(*parse_arguments(flags(recorded, tmp_path, "--rollout_episodes", "1")))

    def test_training_alone_needs_no_simulator(self):
        """The packages of the evaluator are imported when they are asked for."""
        code = "import sys, train_hf; assert not {'gymnasium', 'mujoco', 'matplotlib'} & sys.modules.keys()"
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def noting(order: list[str], event: str, function: Callable) -> Callable:
    """The function, which says in `order` that it was called."""

    def noted(*args, **kwargs):
        result = function(*args, **kwargs)
        order.append(event)
        return result

    return noted


class TestPush:
    @pytest.fixture
    def api(self, monkeypatch):
        """The uploads that were asked for; the first fails."""
        uploads = []

        def upload_folder(api, folder_path, ignore_patterns=(), path_in_repo=None, **options):
            uploads.append((Path(folder_path), tuple(ignore_patterns), path_in_repo, options["commit_message"]))
            if len(uploads) == 1:
                raise ConnectionError("the network is down")

        monkeypatch.setattr("training.callbacks.HfApi.upload_folder", upload_folder)
        return uploads

    def test_a_failure_does_not_end_the_run(self, recorded, tmp_path, api, monkeypatch, caplog):
        monkeypatch.setattr(
            "transformers.Trainer.init_hf_repo",
            lambda self, *args, **kwargs: setattr(self, "hub_model_id", "me/policy"),
        )
        order = []
        for owner, name, event in (
            (PushCallback, "_start", "uploading"),
            (PushCallback, "finish", "uploaded"),
            (trainer_module, "publish_checkpoint", "written"),
            (Repository, "write", "written"),
        ):
            monkeypatch.setattr(owner, name, noting(order, event, getattr(owner, name)))
        more = ("--push_to_hub", "True", "--hub_model_id", "me/policy", "--hub_strategy", "checkpoint")
        train_hf.main(flags(recorded, tmp_path, *more))
        assert "Pushing to me/policy failed, training goes on: the network is down" in caplog.text
        assert [upload[2:] for upload in api] == [
            (None, "Training in progress, step 3"),
            (None, "Training in progress, step 6"),
            ("last-checkpoint", "Training in progress, step 6"),
            (None, "End of training"),
            ("last-checkpoint", "End of training"),
        ]
        assert all("checkpoint-*" in upload[1] for upload in api if upload[0] == tmp_path)
        assert "me/policy" in (tmp_path / "README.md").read_text()
        assert {"uploading", "written"} <= set(order)
        # Nothing is replaced while it is uploaded.
        assert ("uploading", "written") not in itertools.pairwise(order)


HUB_ROUND_TRIP = """
import sys
import train_hf
from transformers import AutoModelForImageTextToText, AutoProcessor
*arguments, output, resumed = sys.argv[1:]
train_hf.main([*arguments, "--output_dir", output, "--max_steps", "3"])
model = AutoModelForImageTextToText.from_pretrained("tester/policy", trust_remote_code=True)
AutoProcessor.from_pretrained("tester/policy", trust_remote_code=True)
assert list(model.norm_stats) == ["tabletop"]
train_hf.main([*arguments, "--output_dir", resumed, "--resume_from_checkpoint", "tester/policy"])
"""


@pytest.mark.slow
def test_hub(recorded, tmp_path):
    """Push at every save, load from the Hub, and go on from the checkpoint there."""
    more = ("--push_to_hub", "True", "--hub_model_id", "tester/policy", "--hub_strategy", "checkpoint")
    with HubServer() as server:
        environment = {**server.environment(tmp_path / "home"), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", HUB_ROUND_TRIP, *flags(recorded, tmp_path, *more)]
        done = subprocess.run(
            [*command, str(tmp_path / "out"), str(tmp_path / "resumed")],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        names = set(server.files("tester/policy"))
    assert {"config.json", "model.safetensors", "modeling_openvla.py", "dataset_statistics.json"} <= names
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/data_stream_0.json"} <= names
    assert not any(name.startswith(("checkpoint-", "_partial")) for name in names)
    assert sorted(losses(tmp_path / "resumed")) == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), LORA], ids=["full", "lora"])
def test_two_processes(recorded, tmp_path, mode):
    """Two processes are two workers of one process that accumulates over both."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = (*mode, "--use_cpu", "True", "--max_grad_norm", "1", "--learning_rate", "1e-4")
    train_hf.main(flags(recorded, one, *more, "--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"))
    rollouts = ("--rollout_episodes", "1", "--rollout_tasks", "push")  # by one process, while the other waits
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(REPOSITORY / "train_hf.py"), *flags(recorded, two, *more, *rollouts)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model.safetensors: merged") == (2 if mode else 0)  # by one process, once per save
    assert list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=1e-5)
    assert (two / "checkpoint-6" / "data_stream_1.json").is_file()
    assert sum("rollout_success_push" in entry for entry in history(two / "checkpoint-6")) == 2
    evaluations = [next(e for e in history(path / "checkpoint-6") if "eval_loss" in e) for path in (one, two)]
    names = ("eval_loss", "eval_action_accuracy", "eval_tabletop/l1/x")
    assert [evaluations[1][name] for name in names] == pytest.approx(
        [evaluations[0][name] for name in names], rel=1e-5
    )


FAILING = """
import sys
import train_hf
def compute_statistics(*args, **kwargs):
    raise ValueError("the joints of episode 3 are missing")
train_hf.compute_statistics = compute_statistics
train_hf.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_every_process_stops_with_the_cause(recorded, tmp_path):
    """What fails in the one process that computes the statistics ends the others, too, which say why."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", FAILING, *flags(recorded, tmp_path, "--use_cpu", "True")]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "ValueError: the joints of episode 3 are missing" in errors[0]
    assert "RuntimeError: Computing statistics failed in the main process: ValueError: the joints of ep" in errors[1]


@pytest.mark.slow
def test_overfit_one_episode(recorded, tmp_path):
    more = ("--overfit_one_episode", "True", "--max_steps", "200", "--eval_steps", "200", "--save_steps", "200")
    size = ("--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--validation_steps", "100")
    train_hf.main(flags(recorded, tmp_path / "out", *more, *size))
    (evaluation,) = (entry for entry in history(tmp_path / "out" / "checkpoint-200") if "eval_loss" in entry)
    assert evaluation["eval_action_accuracy"] >= 0.99


def test_optimizer_with_8_bits(recorded, tmp_path):
    """bitsandbytes keeps the moments of all large tensors as bytes, on the CPU as well."""
    pytest.importorskip("bitsandbytes")
    train_hf.main(flags(recorded, tmp_path / "out", "--optim", "adamw_bnb_8bit", "--validation_episodes", "0"))
    (checkpoint,) = find_checkpoints(tmp_path / "out")[-1:]
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    moments = [state.get("__bnb_optimizer_quant_state__", state)["state1"] for state in states]
    in_bytes = sum(moment.numel() for moment in moments if moment.dtype == torch.uint8)
    assert in_bytes > 0.5 * sum(moment.numel() for moment in moments)
    assert losses(tmp_path / "out")[STEPS] < losses(tmp_path / "out")[1]


class TestArguments:
    def test_a_file_alone(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"model_name_or_path": ".", "dataset": ["a", "b=0.5"], "output_dir": "out"}))
        model, data, training = parse_arguments([str(path)])
        assert (model.model_name_or_path, data.dataset, training.output_dir) == (".", ["a", "b=0.5"], "out")

    def test_flags_come_before_the_file(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text("{model_name_or_path: ., dataset: [a], output_dir: out, max_steps: 5, learning_rate: 1e-3}")
        _, data, training = parse_arguments([str(path), "--max_steps", "7", "--dataset", "b"])
        assert (training.max_steps, training.learning_rate, data.dataset) == (7, 1e-3, ["b"])

    @pytest.mark.parametrize(
        ("more", "pattern"),
        [
            (["--mixture", "bridge"], "exactly one of --dataset and --mixture"),
            (["--load_in_4bit", "True"], "add --use_peft"),
            ([*LORA, "--training_mode", "sandwich"], "exclude each other"),
            (["--warmup_steps", "1.5"], "a fraction below 1"),
            (["--ignore_data_skip", "False"], "must stay false"),
        ],
    )
    def test_contradictions(self, tmp_path, more, pattern):
        with pytest.raises(ValueError, match=pattern):
            parse_arguments(flags(tmp_path, tmp_path, *more))

    def test_unknown_name_in_a_file(self, tmp_path):
        path = tmp_path / "run.yaml"
        path.write_text("{model_name_or_path: ., lora_rank: 3}")
        with pytest.raises(ValueError, match=r"unknown arguments \['lora_rank'\]"):
            parse_arguments([str(path)])

    @pytest.mark.parametrize(("peft", "expected"), [([], 2e-5), (list(LORA), 5e-4)])
    def test_learning_rate(self, tmp_path, peft, expected):
        arguments = ["--model_name_or_path", ".", "--dataset", "a", "--output_dir", str(tmp_path), *peft]
        assert parse_arguments(arguments)[2].learning_rate == expected

    @pytest.mark.parametrize(("given", "steps"), [("0.1", 20), ("7", 7), ("0", 0)])
    def test_warm_up(self, tmp_path, given, steps):
        training = parse_arguments(flags(tmp_path, tmp_path, "--warmup_steps", given))[2]
        assert training.get_warmup_steps(200) == steps

    def test_warm_up_by_its_older_name(self, tmp_path):
        training = parse_arguments(flags(tmp_path, tmp_path, "--warmup_ratio", "0.25"))[2]
        assert training.get_warmup_steps(200) == 50
        with pytest.raises(ValueError, match="--warmup_ratio is a fraction below 1"):
            parse_arguments(flags(tmp_path, tmp_path, "--warmup_ratio", "1.5"))


def commands(text: str) -> list[list[str]]:
    """The words of each indented command of a text."""
    lines = re.findall(r"^    ((?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " ")) for line in lines]


class TestDocumentation:
    def test_commands_are_valid(self, monkeypatch):
        monkeypatch.chdir(REPOSITORY)
        launched = [command for command in commands(train_hf.__doc__) if "train_hf.py" in command]
        assert len(launched) == 5
        for command in launched:
            place = command.index("train_hf.py")
            if command[0] == "accelerate":
                words = [{"$NODE": "1", "$FIRST_NODE": "10.0.0.1"}.get(word, word) for word in command[2:]]
                launcher = launch_command_parser().parse_args(words)
                assert load_config_from_file(launcher.config_file)
                assert launcher.training_script == "train_hf.py"
            else:
                assert command[:place] == ["python"]
            # The machine of the tests may have no bfloat16.
            parse_arguments([*command[place + 1 :], "--bf16", "False", "--use_cpu", "True"])

    def test_flags_in_the_text_exist(self):
        names = {
            field.name for arguments in parse_arguments(flags(Path("a"), Path("b"))) for field in fields(arguments)
        }
        told = set(re.findall(r"`--(\w+)", train_hf.__doc__))
        assert {"resume_from_checkpoint", "rollout_episodes"} <= told <= names


PRISMATIC_13B = {"llm_backbone_id": "llama2-13b-pure"}
# HuggingFaceTB/SmolLM2-360M, by its config.json, with 64 rows more.
SMOLLM2_360M = {
    **{"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32},
    **{"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "tie_word_embeddings": True},
    **{"vocab_size": 49216, "pad_token_id": 49152},
}
SMALL_LM = {"llm_backbone_id": None, "text_config": SMOLLM2_360M, "closing_token_id": None, "pad_token_id": 49152}


def l1_head(action_dim: int, dim: int = 4096) -> int:
    """Parameters of an L1 head by its published shapes: 151 million for LIBERO, 269 for ALOHA."""
    first = 2 * action_dim * dim + (action_dim * dim + 1) * dim
    blocks = 2 * (2 * dim + (dim + 1) * dim)
    return first + blocks + 2 * dim + (dim + 1) * action_dim


def state_projector(proprio_dim: int, dim: int = 4096) -> int:
    return (proprio_dim + 1) * dim + (dim + 1) * dim


# FiLM's scale and shift in the 23 blocks of DINOv2 and the 26 of SigLIP that run.
FILM = 2 * (4096 + 1) * (23 * 1024 + 26 * 1152)
LIBERO, ALOHA = {"action_dim": 7, "proprio_dim": 8}, {"action_dim": 14, "proprio_dim": 14}
# What each recipe starts from, and how many parameters it trains.
RECIPES = {
    "openvla_lora": ({}, 107_862_016),
    "openvla_full": ({}, 7_498_156_704),
    "open_x_pretraining": ({}, 7_498_156_704),
    "prismatic_13b_lora": (PRISMATIC_13B, None),
    "tabletop_from_scratch": (None, None),
    "tabletop_lora": (None, None),
    "tabletop_heads": (None, None),
    "tabletop_flow": (None, None),
    "small_language_model": (SMALL_LM, 1_121_022_208 - 43_080_480),
    "openvla_oft_libero": (LIBERO, 107_862_016 + l1_head(7) + state_projector(8)),
    "openvla_oft_plus_aloha": (ALOHA, 107_862_016 + l1_head(14) + state_projector(14) + FILM),
    "openvla_fast_libero": (LIBERO | {"fast_min_token": -32}, 7_498_156_704 + state_projector(8)),
}


class TestWriting:
    """What is said where a checkpoint cannot be written, and what is not said."""

    @pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("PytorchStreamWriter failed")])
    def test_failures_of_writing(self, tmp_path, error):
        (tmp_path / "_partial").mkdir()
        with pytest.raises(OSError, match="the weights could not be written into"), writing("the weights", tmp_path):
            raise error
        assert not (tmp_path / "_partial").exists()

    def test_other_failures_keep_their_name(self, tmp_path):
        (tmp_path / "_partial").mkdir()
        with pytest.raises(torch.OutOfMemoryError), writing("the weights", tmp_path):
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert (tmp_path / "_partial").exists()


class TestRecipes:
    def test_all_are_tested(self):
        assert {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")} == RECIPES.keys()

    @pytest.mark.parametrize("name", RECIPES)
    def test_on_the_meta_device(self, tmp_path, name):
        path = REPOSITORY / "recipes" / f"{name}.yaml"
        source = ["--data_root", "data"] if "mixture" in path.read_text() else ["--dataset", "data"]
        arguments, data, _ = parse_arguments(
            [str(path), *source, "--output_dir", str(tmp_path), "--bf16", "False", "--use_cpu", "True"]
        )
        fields, expected = RECIPES[name]
        config_class = repository_class("OpenVLAConfig")
        changes = train_hf.asked_changes(arguments)
        config = config_class.from_pretrained(REPOSITORY) if fields is None else config_class(**fields | changes)
        with torch.device("meta"):
            model = repository_class("OpenVLAForActionPrediction")(config)
        model = train_hf.select_parameters(model, arguments)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert count > 0 if expected is None else count == expected
        if data.mixture is not None:
            assert data.mixture in yaml.safe_load((REPOSITORY / "robot_data" / "mixtures.yaml").read_text())

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("openvla_oft_libero", {0: 1.0, 100_000: 1.0, 100_001: 0.1, 150_000: 0.1}),
            ("openvla_oft_plus_aloha", {0: 1.0, 50_000: 1.0, 50_001: 0.1, 100_000: 0.1}),
            ("openvla_fast_libero", {0: 0.0, 1_000: 1.0, 15_500: 0.55, 30_000: 0.1}),
        ],
    )
    def test_learning_rate_falls_to_a_tenth(self, tmp_path, name, expected):
        path = REPOSITORY / "recipes" / f"{name}.yaml"
        more = ("--dataset", "data", "--output_dir", str(tmp_path), "--bf16", "False", "--use_cpu", "True")
        training = parse_arguments([str(path), *more])[2]
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
        scheduler = get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=training.get_warmup_steps(training.max_steps),
            num_training_steps=training.max_steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )
        (factor,) = scheduler.lr_lambdas
        assert {step: factor(step) for step in expected} == pytest.approx(expected)
        assert training.max_steps == max(expected)

    def test_tabletop_learns_what_the_expert_would_do(self, recorded, tmp_path, monkeypatch):
        monkeypatch.chdir(REPOSITORY)
        recipe = "recipes/tabletop_from_scratch.yaml"
        arguments = parse_arguments([recipe, "--dataset", str(recorded), "--output_dir", str(tmp_path)])[1]
        (part,) = open_parts(arguments)
        (first, *_) = iter_episodes(part.source, part.config)
        rows = pq.read_table(recorded / "data/chunk-000/file-000.parquet").slice(0, len(first)).to_pydict()
        np.testing.assert_array_equal(first.actions, np.float32(rows["expert_action"]))
        assert not np.array_equal(first.actions, np.float32(rows["action"]))

    @pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
    def test_accelerate_reads_its_configurations(self, name, golden_model):
        config = load_config_from_file(str(REPOSITORY / "recipes" / "accelerate" / f"{name}.yaml"))
        if config.fsdp_config:
            known = {type(module).__name__ for module in golden_model.modules()}
            assert set(config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= known
