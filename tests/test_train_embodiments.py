# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning one policy on several robots: a single arm and a bimanual one, then another."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import load_policy
from merge_adapter import merge
from safetensors.torch import load_file
from test_train_hf import LORA, flags, losses
from test_train_oft import evaluations
from transformers import AutoModelForImageTextToText, AutoProcessor

import train_hf
from tabletop.record import Recording, record
from training.arguments import parse_arguments
from training.checkpoint import find_checkpoints
from training.metrics import ActionTokens, without_padding


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

CHUNK, STEPS = 2, 4
ADAPTER = ("--use_embodiment_adapter", "True", "--chunk_size", str(CHUNK))
FLOW = ("--attention_mode", "bidirectional", "--head_type", "flow", "--num_inference_steps", "2")
KINDS = {
    "tokens": ADAPTER,
    "lora flow": (*ADAPTER, *FLOW, "--use_proprio", "True", *LORA),
}
LENGTH = ("--max_steps", str(STEPS), "--save_steps", str(STEPS // 2), "--eval_steps", str(STEPS))
BATCH = ("--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "4", "--validation_steps", "3")
SIZES = {"one_arm": 7, "two_arms": 14}


@pytest.fixture(scope="session")
def robots(tmp_path_factory) -> Path:
    """Three datasets of ten demonstrations, and a description in which one is of a robot with twice the numbers."""
    folder = tmp_path_factory.mktemp("robots")
    record(Recording(episodes=10, image_size=32), folder / "one_arm")
    shutil.copytree(folder / "one_arm", folder / "two_arms")
    shutil.copytree(folder / "one_arm", folder / "third")
    twice = {"action": ["action", "expert_action"], "state": ["observation.state", "observation.state"]}
    (folder / "two_arms.json").write_text(json.dumps({"two_arms": twice}))
    return folder


def command(robots: Path, output: Path, kind: str, *more: str) -> list[str]:
    both = ("--dataset", str(robots / "one_arm"), str(robots / "two_arms"))
    described = ("--dataset_configs", str(robots / "two_arms.json"))
    return flags(robots, output, *LENGTH, *BATCH, *KINDS[kind], *both, *described, *more)


@pytest.fixture(scope="session", params=KINDS)
def run(request, robots, tmp_path_factory) -> tuple[str, Path]:
    """A finished run of each kind. Do not change it."""
    output = tmp_path_factory.mktemp("runs") / request.param.replace(" ", "_")
    train_hf.main(command(robots, output, request.param))
    return request.param, output


def state_of(processor, key: str) -> dict:
    return {"state": np.zeros(8 * SIZES[key] // 7), "unnorm_key": key} if processor.use_proprio else {}


class TestRuns:
    def test_the_repository_drives_both(self, run, camera_image):
        _, output = run
        processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, dtype="auto").eval()
        assert model.config.embodiments == processor.embodiments == list(SIZES)
        for key, size in SIZES.items():
            inputs = processor(instruction="push it", images=camera_image, **state_of(processor, key)).to(model.dtype)
            actions = model.predict_action(**inputs, unnorm_key=key)
            assert actions.shape == (CHUNK, size)
            assert np.isfinite(actions).all()

    def test_all_of_the_adapter_has_learned(self, run):
        _, output = run
        before, after = (load_file(path / "model.safetensors") for path in (TINY_POLICY, output))
        weights = {name: tensor for name, tensor in after.items() if name.startswith("embodiment_adapter.")}
        assert set(weights) == {
            f"embodiment_adapter.{name}"
            for name in (
                *(f"{layer}.{kind}" for layer in ("down", "up") for kind in ("weight", "bias")),
                *(f"embeddings.{row}.weight" for row in range(2)),
            )
        }
        assert not set(weights) & set(before)
        assert weights["embodiment_adapter.up.weight"].any()
        assert weights["embodiment_adapter.up.bias"].any()

    def test_each_robot_is_measured(self, run):
        kind, output = run
        (measured,) = evaluations(output)
        for key, size in SIZES.items():
            names = [name for name in measured if name.startswith(f"eval_{key}/l1/")]
            assert len(names) == size
            assert all(np.isfinite(measured[name]) for name in names)
            assert (f"eval_{key}/action_accuracy" in measured) == (kind == "tokens")
        counts = {key: 3 * CHUNK * size for key, size in SIZES.items()}
        parts = [measured[f"eval_{key}/l1_normalized"] for key in SIZES]
        low, high = min(parts), max(parts)
        assert low <= measured["eval_l1_normalized"] <= high
        assert measured["eval_l1_normalized"] == pytest.approx(
            sum(part * count for part, count in zip(parts, counts.values(), strict=True)) / sum(counts.values()),
            rel=0.05,  # actions behind an episode's end do not count
        )

    def test_resumed_to_the_bit(self, run, robots, tmp_path):
        kind, output = run
        middle = f"checkpoint-{STEPS // 2}"
        shutil.copytree(output / middle, tmp_path / middle)
        train_hf.main(command(robots, tmp_path, kind, "--resume_from_checkpoint", "True"))
        assert losses(tmp_path) == losses(output)
        assert (tmp_path / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
        assert evaluations(tmp_path)[-1]["eval_l1_normalized"] == evaluations(output)[-1]["eval_l1_normalized"]

    def test_merged_by_the_tool(self, run, tmp_path):
        kind, output = run
        if not kind.startswith("lora"):
            pytest.skip("has no adapter of the weights")
        merge(find_checkpoints(output)[-1], tmp_path / "merged")
        for name in ("model.safetensors", "processor_config.json", "dataset_statistics.json"):
            assert (tmp_path / "merged" / name).read_bytes() == (output / name).read_bytes()
        assert load_policy(tmp_path / "merged")[0].config.embodiments == list(SIZES)

    def test_another_robot(self, run, robots, tmp_path, caplog, camera_image):
        """It is added behind the others, whose embeddings and statistics stay as they are while it alone learns."""
        kind, output = run
        lora = LORA if kind.startswith("lora") else ()
        alone = ("--model_name_or_path", str(output), "--dataset", str(robots / "third"), "--max_steps", "3")
        more = ("--save_steps", "3", "--validation_episodes", "0", "--weight_decay", "0.1", *lora)
        train_hf.main(flags(robots, tmp_path, *alone, *more))
        model, processor = load_policy(tmp_path)
        assert model.config.embodiments == processor.embodiments == [*SIZES, "third"]
        before, after = (load_file(path / "model.safetensors") for path in (output, tmp_path))
        assert set(after) - set(before) == {"embodiment_adapter.embeddings.2.weight"}
        for row in range(2):
            name = f"embodiment_adapter.embeddings.{row}.weight"
            assert torch.equal(before[name], after[name])
        assert not torch.equal(before["embodiment_adapter.up.weight"], after["embodiment_adapter.up.weight"])
        known = json.loads((output / "dataset_statistics.json").read_text())
        assert {name: model.norm_stats[name] for name in SIZES} == known
        assert "fine-tuned on `third`." in (tmp_path / "README.md").read_text()
        for key, size in SIZES.items():
            inputs = processor(instruction="push it", images=camera_image, **state_of(processor, key)).to(model.dtype)
            assert model.predict_action(**inputs, unnorm_key=key).shape == (CHUNK, size)


def test_items_without_padding():
    """What a batch's loss is divided by, by hand: two rows with places for two actions of three numbers."""
    tokens = ActionTokens(90, 100)
    labels = torch.tensor([[-100, 91, 92, 93, 94, 95, 96, 2], [91, 92, 93, 94, 95, 96, 2, -100]])
    is_pad = torch.tensor([[False, False], [False, True]])
    learned = without_padding(labels, is_pad, tokens, torch.tensor([2, 3]))
    assert learned[0].tolist() == [-100, 91, 92, -100, 94, 95, -100, 2]
    assert learned[1].tolist() == [91, 92, 93, -100, -100, -100, 2, -100]
    # As many tokens as numbers, and nothing but whole actions that are padding.
    labels = torch.tensor([[-100, -100, -100, 91, 92, 2], [91, 92, 93, 94, 2, -100]])
    learned = without_padding(labels, torch.tensor([[False, True]] * 2), tokens)
    assert learned.tolist() == [[-100, -100, -100, 91, -100, 2], [91, 92, -100, -100, 2, -100]]


class TestStart:
    def set_up(self, robots: Path, output: Path, *more: str):
        return train_hf.set_up(
            *parse_arguments(command(robots, output, "tokens", "--validation_episodes", "0", *more))
        )

    def test_a_batch_of_both(self, robots, tmp_path):
        trainer, _ = self.set_up(robots, tmp_path, *FLOW, "--use_proprio", "True")
        batches = [batch for batch, _ in zip(trainer.loader, range(4), strict=False)]
        assert any(len(set(batch["embodiment"].tolist())) == 2 for batch in batches)
        for batch in batches:
            assert batch["action_dims"].tolist() == [7 * (1 + row) for row in batch["embodiment"].tolist()]
            assert (batch["proprio"].shape, batch["actions"].shape) == ((4, 16), (4, CHUNK, 14))
        config = trainer.model.config
        assert (config.action_dim, config.proprio_dim) == (14, 16)

    def test_without_the_adapter(self, robots, tmp_path):
        trainer, _ = self.set_up(robots, tmp_path, "--use_embodiment_adapter", "False")
        assert trainer.model.embodiment_adapter is None
        assert "embodiment" not in next(iter(trainer.loader))

    def test_the_adapter_alone_learns(self, robots, tmp_path):
        """Beside a policy that speaks in tokens it is all that `head_only` has."""
        trainer, _ = self.set_up(robots, tmp_path, "--training_mode", "head_only")
        learning = {name.split(".")[0] for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert learning == {"embodiment_adapter"}

    def test_fast_tokens_of_two_dimensions(self, robots, tmp_path):
        with pytest.raises(ValueError, match=r"of one dimension, those of the datasets have \{'one_arm': 7, 'two"):
            self.set_up(robots, tmp_path, "--head_type", "fast", "--fast_vocab_size", "200")
