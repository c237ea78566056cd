# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning policies with chunks, heads on the hidden states, several cameras, the state and FiLM, from a base."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import ACTION_FIELDS, load_policy
from merge_adapter import merge
from safetensors.torch import load_file
from test_train_hf import LORA, flags, history, losses
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction

import train_hf
from evaluation.policies import ModelPolicy
from tabletop.record import Recording, record
from training.arguments import parse_arguments
from training.checkpoint import find_checkpoints
from training.metrics import ActionMetrics, ActionTokens, count_correct, without_padding
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
    known = ("--eval_on_start", "True", "--overfit_one_episode", "True")  # so few steps teach little of other episodes
    return flags(recorded, output, *LENGTH, *KINDS[kind], *known, *more)


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
        """On the episode that it learns, where the same noise is drawn each time."""
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
        before, after = (load_file(path / "model.safetensors") for path in (TINY_POLICY, output))
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


class TestStart:
    """From a base policy to one with other parts."""

    def set_up(self, recorded: Path, output: Path, *more: str):
        return train_hf.set_up(*parse_arguments(flags(recorded, output, "--validation_episodes", "0", *more)))[0]

    def test_only_what_is_new_begins_anew(self, recorded, tmp_path, caplog):
        with caplog.at_level(logging.INFO, "load_policy"):
            trainer = self.set_up(recorded, tmp_path, *KINDS["l1"])
        assert "Initialised anew: FiLM, action_head, proprio_projector" in caplog.text
        config, base = trainer.model.config, load_file(TINY_POLICY / "model.safetensors")
        assert (config.action_dim, config.proprio_dim, config.num_images) == (7, 8, 2)
        weights = trainer.model.state_dict()
        assert all(torch.equal(weights[name], tensor.float()) for name, tensor in base.items())
        assert not any(film.any() for name, film in weights.items() if ".film." in name)

    def test_a_batch_is_what_the_policy_takes(self, recorded, tmp_path):
        trainer = self.set_up(recorded, tmp_path, *KINDS["l1"])
        batch = next(iter(trainer.loader))
        assert batch["pixel_values"].shape == (2, 12, 112, 112)
        assert (batch["proprio"].shape, batch["actions"].shape) == ((2, 8), (2, CHUNK, 7))
        (part,) = trainer.loader._streams[0].parts
        assert list(part.config.cameras) == ["primary", "wrist"]

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (("--head_type", "l1"), "reads all actions of one pass: set `attention_mode='bidirectional'`"),
            (("--use_film", "True"), "set `attention_mode='bidirectional'`"),
            (("--head_type", "l2", *PARALLEL), "`head_type` must be 'tokens', 'fast' or one of"),
            (("--num_inference_steps", "3"), "is for the 'diffusion' and 'flow' heads"),
            (("--num_images", "3"), "tabletop has no camera 'wrist_2'"),
            ((*OFT, "--camera", "primary"), r"looks at 2 image\(s\) .* --camera names 1: primary"),
        ],
    )
    def test_refused(self, recorded, tmp_path, more, message):
        with pytest.raises(ValueError, match=message):
            self.set_up(recorded, tmp_path, *more)

    def test_a_dataset_without_a_state(self, recorded, tmp_path):
        path = tmp_path / "descriptions.yaml"
        path.write_text("{tabletop: {state: null}}")
        with pytest.raises(ValueError, match=r"takes the robot's state .* has none: say which columns"):
            self.set_up(recorded, tmp_path, *OFT, "--dataset_configs", str(path))

    def test_validation_of_noise_needs_the_whole_model(self, recorded, tmp_path, monkeypatch):
        arguments = parse_arguments(flags(recorded, tmp_path, *KINDS["flow"]))
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        with pytest.raises(ValueError, match=r"Validation of a 'flow' head .* needs the whole model in one process"):
            train_hf.set_up(*arguments)

    def test_another_head_in_the_place_of_one(self, recorded, tmp_path, caplog):
        """Merged over a base with another head, an adapter leaves that one behind."""
        first, second = tmp_path / "first", tmp_path / "second"
        quick = ("--max_steps", "1", "--save_steps", "1", "--validation_episodes", "0")
        train_hf.main(flags(recorded, first, *KINDS["diffusion"], *quick))
        changes = ("--head_type", "l1", "--model_name_or_path", str(first))
        train_hf.main(flags(recorded, second, *LORA, *quick, *changes))
        assert "Left behind: action_head, noisy_action_projector" in caplog.text
        model, _ = load_policy(second)
        assert (model.config.head_type, model.config.num_inference_steps) == ("l1", None)


class TestPadding:
    """Actions beyond the end of an episode, by hand: two rows of three actions of two numbers."""

    TOKENS = ActionTokens(90, 100)
    LABELS = torch.tensor([[-100, -100, 91, 92, 93, 94, 95, 96, 2], [-100, 81, 97, 98, 99, 90, 91, 92, 2]])
    IS_PAD = torch.tensor([[False, False, True], [False, True, True]])

    def test_labels(self):
        learned = without_padding(self.LABELS, self.IS_PAD, self.TOKENS)
        assert learned[0].tolist() == [-100, -100, 91, 92, 93, 94, -100, -100, 2]
        assert learned[1].tolist() == [-100, 81, 97, 98, -100, -100, -100, -100, 2]

    def test_accuracy(self):
        predicted = torch.tensor([[0, 91, 92, 0, 94, 95, 96, 2], [81, 97, 0, 99, 90, 91, 92, 0]])
        assert count_correct(predicted, self.LABELS, self.IS_PAD, self.TOKENS).tolist() == [4, 6]

    def test_items(self, recorded, tmp_path):
        """What the loss is divided by, over all batches of a step."""
        trainer, _ = train_hf.set_up(*parse_arguments(flags(recorded, tmp_path, *KINDS["tokens"])))
        batches = [next(iter(trainer.loader)) for _ in range(3)]
        batches[1]["action_is_pad"] = torch.tensor([[False, True, True], [False, False, True]])
        _, count = trainer.get_batch_samples(iter(batches), 3, trainer.args.device)
        pads = sum(int(batch["action_is_pad"].sum()) for batch in batches)
        assert count == 6 * (7 * CHUNK + 1) - 7 * pads

    @pytest.mark.parametrize("kind", ["tokens", "l1"])
    def test_however_a_batch_is_divided(self, recorded, tmp_path, kind):
        """Its loss is the mean over all that is learned, whichever part of the batch is padded."""
        size = ("--per_device_train_batch_size", "3", "--use_cpu", "True")
        trainer, _ = train_hf.set_up(*parse_arguments(flags(recorded, tmp_path, *KINDS[kind], *size)))
        batch = next(iter(trainer.loader))
        batch["action_is_pad"] = torch.tensor([[False, True, True], [False, False, False], [False, False, True]])
        del batch["names"]
        parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
        counts = [trainer._get_num_items_in_batch(each, trainer.args.device) for each in ([batch], parts)]
        assert counts[0] == counts[1]
        with torch.no_grad():
            whole = trainer.model(**batch).loss
            divided = sum(trainer.model(**part, num_items_in_batch=counts[1]).loss for part in parts)
        torch.testing.assert_close(divided, whole)

    def test_metrics_of_a_head(self, processor):
        processor.head_type, processor.chunk_size = "l1", 2
        statistics = processor.norm_stats["tabletop"]["action"]
        statistics |= {"q01": [-2.0] * 7, "q99": [4.0] * 7}
        targets = np.zeros((3, 2, 7), np.float32)
        predictions = np.full((3, 2, 7), 0.25)
        predictions[1] = [[0.5] * 7, [9.0] * 7]
        is_pad = np.array([[False, False], [False, True], [False, True]])
        labels = (np.full((3, 5), -100), is_pad, targets)
        metrics = ActionMetrics(processor, ["tabletop"] * 3)
        assert metrics.label_names == ["labels", "action_is_pad", "actions"]
        values = metrics(EvalPrediction(predictions=predictions, label_ids=labels))
        assert values["l1_normalized"] == values["tabletop/l1_normalized"] == pytest.approx((3 * 0.25 + 0.5) / 4)
        assert values["tabletop/l1/x"] == pytest.approx(3 * (3 * 0.25 + 0.5) / 4)  # half of 4 - (-2)
        assert values["tabletop/l1/gripper"] == pytest.approx((3 * 0.25 + 0.5) / 4)  # which is not normalised
        assert not any("accuracy" in name for name in values)


def test_corrections_spend_chunks(monkeypatch):
    """A chunk per episode is asked for where the last one is spent; others go on with theirs."""
    processor = SimpleNamespace(num_images=2, use_proprio=True, chunk_size=CHUNK)
    policy = ModelPolicy(SimpleNamespace(get_action_dim=lambda key: 7), processor)
    asked = []

    def predict_chunks(instructions, images, states):
        asked.append((instructions, [list(row) for row in images], states))
        return np.arange(CHUNK)[None, :, None] + np.zeros((len(instructions), CHUNK, 7))

    monkeypatch.setattr(policy, "predict_chunks", predict_chunks)

    def observe(*numbers: int) -> dict[int, dict]:
        return {n: {"instruction": f"{n}", "image": n, "wrist_image": -n, "state": 10 * n} for n in numbers}

    taken = [policy.next_actions(observe(0), [0]), policy.next_actions(observe(0, 1), [1])]
    taken += [policy.next_actions(observe(0, 1), []), policy.next_actions(observe(0, 1), [])]
    assert [actions[:, 0].tolist() for actions in taken] == [[0], [1, 0], [2, 1], [0, 2]]
    assert asked == [(["0"], [[0, 0]], [0]), (["1"], [[1, -1]], [10]), (["0"], [[0, 0]], [0])]
    assert policy.next_actions(observe(1), [1])[:, 0].tolist() == [0]  # a new episode under an old number
