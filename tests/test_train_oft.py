# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning policies with chunks, heads on the hidden states, several cameras, the state and FiLM, from a base."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from load_policy import ACTION_FIELDS, load_policy
from merge_adapter import merge
from safetensors.torch import load_file
from test_train_hf import LORA, flags, history, losses
from transformers import AutoModelForImageTextToText, AutoProcessor

import train_hf
from tabletop.record import Recording, record
from training.arguments import parse_arguments
from training.checkpoint import find_checkpoints
from training.modes import added_modules


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

CHUNK = 3
PARALLEL = ("--attention_mode", "bidirectional", "--chunk_size", str(CHUNK))
OFT = (*PARALLEL, "--num_images", "2", "--use_proprio", "True")
KINDS = {
    "tokens": (*PARALLEL, "--head_type", "tokens"),
    "causal": ("--chunk_size", str(CHUNK)),
    "l1": (*OFT, "--head_type", "l1", "--use_film", "True"),
    "diffusion": (*PARALLEL, "--head_type", "diffusion", "--diffusion_steps", "10", "--num_inference_steps", "2"),
    "flow": (*PARALLEL, "--head_type", "flow", "--num_inference_steps", "2"),
    "lora": (*OFT, "--head_type", "l1", "--use_film", "True", *LORA),
    "lora flow": (*PARALLEL, "--head_type", "flow", "--num_inference_steps", "2", *LORA),
}
STEPS = 8
LENGTH = ("--max_steps", str(STEPS), "--save_steps", str(STEPS // 2), "--eval_steps", str(STEPS))


@pytest.fixture(scope="session")
def recorded(tmp_path_factory) -> Path:
    """Ten demonstrations on the tabletop with two cameras, one of which is held out."""
    return record(Recording(episodes=10, image_size=32), tmp_path_factory.mktemp("recorded") / "tabletop")


def command(recorded: Path, output: Path, kind: str, *more: str) -> list[str]:
    return flags(recorded, output, *LENGTH, *KINDS[kind], "--eval_on_start", "True", *more)


@pytest.fixture(scope="session", params=KINDS)
def run(request, recorded, tmp_path_factory) -> tuple[str, Path]:
    """A finished run of each kind. Do not change it."""
    output = tmp_path_factory.mktemp("runs") / request.param.replace(" ", "_")
    train_hf.main(command(recorded, output, request.param))
    return request.param, output


def evaluations(output: Path) -> list[dict]:
    return [entry for entry in history(find_checkpoints(output)[-1]) if "eval_loss" in entry]


class TestRuns:
    def test_the_loss_falls(self, run):
        """On the held-out episode, where the same noise is drawn each time."""
        kind, output = run
        before, after = evaluations(output)
        assert after["eval_loss"] < before["eval_loss"]
        speaks_tokens = kind in ("tokens", "causal")
        for entry in (before, after):
            assert ("eval_action_accuracy" in entry) == speaks_tokens
            assert np.isfinite(entry["eval_tabletop/l1/x"])
            assert 0 < entry["eval_l1_normalized"] < 2
        training = [entry for entry in history(find_checkpoints(output)[-1]) if "loss" in entry]
        assert all(("action_accuracy" in entry) == speaks_tokens for entry in training)
        if kind in ("l1", "lora"):  # the loss itself, but for rounding and the size of the batches
            assert after["eval_l1_normalized"] == pytest.approx(after["eval_loss"], rel=0.05)

    def test_the_repository_predicts_chunks(self, run, camera_image):
        kind, output = run
        processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, dtype="auto").eval()
        options = parse_arguments(command(Path("a"), Path("b"), kind))[0]
        for name, value in train_hf.asked_changes(options).items():
            assert getattr(model.config, name) == value
        assert model.dtype == torch.bfloat16
        state = {"state": np.zeros(8), "unnorm_key": "tabletop"} if processor.use_proprio else {}
        inputs = processor(
            instruction="pick up the red cube", images=[[camera_image] * processor.num_images], **state
        ).to(model.dtype)
        chunk = model.predict_action(**inputs, unnorm_key="tabletop")
        assert chunk.shape == (CHUNK, 7)
        assert np.isfinite(chunk).all()

    def test_what_is_new_has_learned(self, run):
        kind, output = run
        before, after = (load_file(path / "model.safetensors") for path in (REPOSITORY, output))
        assert before.keys() <= after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert any(name.startswith("language_model.model.layers") for name in changed)
        model = load_policy(output, dtype=torch.float32)[0]
        assert set(after) - set(before) == {
            f"{part}.{name}" for part in added_modules(model) for name in model.get_submodule(part).state_dict()
        }
        unused = {id(module) for part in model.unused_modules() for module in part.modules()}
        films = [module for name, module in model.named_modules() if name.endswith(".film")]
        assert bool(films) == (kind in ("l1", "lora"))
        for film in films:  # which begins with zeros
            assert bool(film.scale.weight.any()) == bool(film.shift.bias.any()) == (id(film) not in unused)

    def test_resumed_to_the_bit(self, run, recorded, tmp_path):
        kind, output = run
        middle = f"checkpoint-{STEPS // 2}"
        shutil.copytree(output / middle, tmp_path / middle)
        train_hf.main(command(recorded, tmp_path, kind, "--resume_from_checkpoint", "True"))
        assert losses(tmp_path) == losses(output)
        assert (tmp_path / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
        assert evaluations(tmp_path)[-1]["eval_loss"] == evaluations(output)[-1]["eval_loss"]
        assert evaluations(tmp_path)[-1]["eval_l1_normalized"] == evaluations(output)[-1]["eval_l1_normalized"]

    def test_adapters_merge_by_the_tool(self, run, tmp_path):
        kind, output = run
        if not kind.startswith("lora"):
            pytest.skip("has no adapter")
        checkpoint = find_checkpoints(output)[-1]
        config = json.loads((checkpoint / "action_config.json").read_text())
        assert set(config) == set(ACTION_FIELDS)
        merge(checkpoint, tmp_path / "merged")
        for name in ("model.safetensors", "processor_config.json", "dataset_statistics.json"):
            assert (tmp_path / "merged" / name).read_bytes() == (output / name).read_bytes()
        assert load_policy(tmp_path / "merged")[0].config.head_type == config["head_type"] != "tokens"

    def test_going_on_from_the_run(self, run, recorded, tmp_path, caplog):
        """What it has learned is all there, and nothing begins anew."""
        _, output = run
        arguments = flags(recorded, tmp_path, "--model_name_or_path", str(output), "--validation_episodes", "0")
        with caplog.at_level(logging.INFO, "load_policy"):
            trainer, _ = train_hf.set_up(*parse_arguments(arguments))
        assert "Initialised anew" not in caplog.text
        saved = load_file(output / "model.safetensors")
        assert all(torch.equal(value.bfloat16(), saved[name]) for name, value in trainer.model.state_dict().items())
