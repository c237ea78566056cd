# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning from the command line: what is written, exact resumption, the loss and its gradients, bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import GOLDEN, REPOSITORY, load_golden
from hub_server import HubServer
from load_policy import repository_class
from merge_adapter import merge
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import train_hf
from robot_data.reading import iter_episodes
from tabletop.record import Recording, record
from training.arguments import parse_arguments
from training.checkpoint import find_checkpoints, locate_checkpoint
from training.data import open_parts


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
        "model_name_or_path": REPOSITORY,
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
        before, after = (load_file(path / "model.safetensors") for path in (REPOSITORY, output))
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
    return {name: golden[f"train.{name}"] for name in names} | {"pixel_values": pixel_values}


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
        before, after = (load_file(path / "model.safetensors") for path in (REPOSITORY, tmp_path))
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
        trainer = self.set_up(recorded, tmp_path, "--validation_episodes", "0")
        assert trainer.eval_dataset is None
        assert trainer.args.eval_strategy == "no"
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
        with pytest.raises(FileNotFoundError, match="nowhere"):
            self.set_up(tmp_path / "nowhere", tmp_path)

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
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(REPOSITORY / "train_hf.py"), *flags(recorded, two, *more)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model.safetensors: merged") == (2 if mode else 0)  # by one process, once per save
    assert list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=1e-5)
    assert (two / "checkpoint-6" / "data_stream_1.json").is_file()
    evaluations = [next(e for e in history(path / "checkpoint-6") if "eval_loss" in e) for path in (one, two)]
    names = ("eval_loss", "eval_action_accuracy", "eval_tabletop/l1/x")
    assert [evaluations[1][name] for name in names] == pytest.approx(
        [evaluations[0][name] for name in names], rel=1e-5
    )


@pytest.mark.slow
def test_overfit_one_episode(recorded, tmp_path):
    more = ("--overfit_one_episode", "True", "--max_steps", "200", "--eval_steps", "200", "--save_steps", "200")
    size = ("--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--validation_steps", "100")
    train_hf.main(flags(recorded, tmp_path / "out", *more, *size))
    (evaluation,) = (entry for entry in history(tmp_path / "out" / "checkpoint-200") if "eval_loss" in entry)
    assert evaluation["eval_action_accuracy"] >= 0.99


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


PRISMATIC_13B = {"llm_backbone_id": "llama2-13b-pure"}
# What each recipe starts from, and how many parameters it trains.
RECIPES = {
    "openvla_lora": ({}, 107_862_016),
    "openvla_full": ({}, 7_498_156_704),
    "open_x_pretraining": ({}, 7_498_156_704),
    "prismatic_13b_lora": (PRISMATIC_13B, None),
    "tabletop_from_scratch": (None, None),
}


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
        config = config_class.from_pretrained(REPOSITORY) if fields is None else config_class(**fields)
        with torch.device("meta"):
            model = repository_class("OpenVLAForActionPrediction")(config)
        model = train_hf.select_parameters(model, arguments)
        count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert count > 0 if expected is None else count == expected
        if data.mixture is not None:
            assert data.mixture in yaml.safe_load((REPOSITORY / "robot_data" / "mixtures.yaml").read_text())

    @pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
    def test_accelerate_reads_its_configurations(self, name, golden_model):
        config = load_config_from_file(str(REPOSITORY / "recipes" / "accelerate" / f"{name}.yaml"))
        if config.fsdp_config:
            known = {type(module).__name__ for module in golden_model.modules()}
            assert set(config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")) <= known
