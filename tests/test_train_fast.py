# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning policies that speak of chunks in FAST tokens, from a base that does not."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY_POLICY
from load_policy import load_policy, repository_class
from merge_adapter import merge
from test_fast_tokenizer import PUBLISHED, published_bpe  # noqa: F401  (a fixture)
from test_train_hf import LORA, flags, history, losses, recorded  # noqa: F401  (a fixture)
from transformers import AutoModelForImageTextToText, AutoProcessor, EvalPrediction

import train_hf
from robot_data.collation import Collator
from robot_data.pictures import decode
from robot_data.reading import iter_episodes
from tabletop.lerobot_writer import assemble, write_episode
from training import fast as fast_module
from training.arguments import parse_arguments
from training.checkpoint import find_checkpoints
from training.data import open_parts, sample_chunks
from training.metrics import ActionMetrics, ActionTokens, count_correct, predicted_tokens, without_padding


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

FastTokenizer = repository_class("FastTokenizer")
CHUNK, STOP = 8, 2
VOCAB = ("--fast_vocab_size", "200")
FAST = ("--head_type", "fast", "--chunk_size", str(CHUNK))
FIT = (*FAST, *VOCAB)
KINDS = {"full": (), "lora": LORA}
STEPS = 8
LENGTH = ("--max_steps", str(STEPS), "--save_steps", str(STEPS // 2), "--eval_steps", str(STEPS))
NAME = "fast_tokenizer.json"


def command(recorded: Path, output: Path, kind: str, *more: str) -> list[str]:  # noqa: F811
    known = ("--eval_on_start", "True", "--overfit_one_episode", "True")  # so few steps teach little of other episodes
    # Rows of different lengths, in two batches of each step.
    batches = ("--gradient_accumulation_steps", "2")
    return flags(recorded, output, *LENGTH, *FIT, *KINDS[kind], *known, *batches, *more)


def set_up(dataset: Path, output: Path, *more: str):
    return train_hf.set_up(*parse_arguments(flags(dataset, output, "--validation_episodes", "0", *more)))[0]


@pytest.fixture(scope="module", params=KINDS)
def run(request, recorded, tmp_path_factory) -> tuple[str, Path]:  # noqa: F811
    """A finished run of each kind. Do not change it."""
    output = tmp_path_factory.mktemp("runs") / request.param
    train_hf.main(command(recorded, output, request.param))
    return request.param, output


def evaluations(output: Path) -> list[dict]:
    return [entry for entry in history(find_checkpoints(output)[-1]) if "eval_loss" in entry]


def refuse_to_fit(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("A tokenizer is there already.")

    # Where the class comes from, there are others of its name.
    monkeypatch.setattr(repository_class("OpenVLAProcessor"), "fit_fast_tokenizer", refuse)


class TestRuns:
    def test_the_loss_falls(self, run):
        _, output = run
        before, after = evaluations(output)
        assert after["eval_loss"] < before["eval_loss"]
        for entry in (before, after):
            assert 0 <= entry["eval_action_accuracy"] <= 1
            assert entry["eval_tabletop/valid_chunks"] == entry["eval_valid_chunks"]
            has_distances = entry["eval_valid_chunks"] > 0
            assert ("eval_l1_normalized" in entry) == ("eval_tabletop/l1/x" in entry) == has_distances
        training = [entry for entry in history(find_checkpoints(output)[-1]) if "loss" in entry]
        assert len(training) == STEPS
        assert all("action_accuracy" in entry for entry in training)

    def test_the_tokenizer_is_saved_everywhere(self, run):
        _, output = run
        tokenizer = fast_module.read_fast_tokenizer(str(output))
        for checkpoint in find_checkpoints(output):
            assert not (checkpoint / "config.json").exists()
            assert (checkpoint / NAME).read_bytes() == (output / NAME).read_bytes()
            assert fast_module.read_fast_tokenizer(str(checkpoint)).config_fields == tokenizer.config_fields
        config = json.loads((output / "config.json").read_text())
        assert {name: config[name] for name in tokenizer.config_fields} == tokenizer.config_fields
        assert config["head_type"] == "fast"
        assert tokenizer.vocab_size <= 200
        assert tokenizer.scale == 10

    def test_the_repository_predicts_chunks(self, run, camera_image):
        _, output = run
        processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True, dtype="auto").eval()
        inputs = processor(instruction="pick up the red cube", images=camera_image).to(model.dtype)
        chunk = model.predict_action(**inputs, unnorm_key="tabletop")
        assert chunk.shape == (CHUNK, 7)
        assert np.isfinite(chunk).all()

    def test_resumed_to_the_bit_without_fitting_again(self, run, recorded, tmp_path, monkeypatch):  # noqa: F811
        kind, output = run
        middle = f"checkpoint-{STEPS // 2}"
        shutil.copytree(output / middle, tmp_path / middle)
        refuse_to_fit(monkeypatch)
        resume = command(recorded, tmp_path, kind, "--resume_from_checkpoint", "True")
        with pytest.raises(ValueError, match="goes on with --fast_scale 10, got 20"):
            train_hf.main([*resume, "--fast_scale", "20"])
        train_hf.main(resume)
        assert losses(tmp_path) == losses(output)
        for name in ("model.safetensors", NAME):
            assert (tmp_path / name).read_bytes() == (output / name).read_bytes()
        runtime = re.compile("_runtime|_per_second")
        last = [
            {name: value for name, value in evaluations(path)[-1].items() if not runtime.search(name)}
            for path in (tmp_path, output)
        ]
        assert last[0] == last[1]

    def test_checkpoints_of_sharded_weights_have_the_tokenizer(self, recorded, tmp_path):  # noqa: F811
        """Their weights are saved by transformers alone."""
        trainer = set_up(recorded, tmp_path, *FIT)
        directory = tmp_path / "checkpoint-2"
        directory.mkdir()
        trainer._globalstep_last_logged = 0  # as training begins
        trainer._complete_checkpoint(directory)
        tokenizer = fast_module.read_fast_tokenizer(str(directory))
        assert tokenizer.bpe.to_str() == trainer.repository.processor.fast_tokenizer.bpe.to_str()

    def test_adapters_merge_by_the_tool(self, run, tmp_path):
        kind, output = run
        if kind != "lora":
            pytest.skip("has no adapter")
        merge(find_checkpoints(output)[-1], tmp_path / "merged")
        for name in ("model.safetensors", "processor_config.json", "config.json", NAME):
            assert (tmp_path / "merged" / name).read_bytes() == (output / name).read_bytes()
        model, processor = load_policy(tmp_path / "merged")
        assert model.fast_tokenizer.config_fields == processor.fast_tokenizer.config_fields

    def test_going_on_from_the_run(self, run, recorded, tmp_path, monkeypatch, caplog):  # noqa: F811
        """A policy that speaks in FAST tokens keeps its own."""
        _, output = run
        refuse_to_fit(monkeypatch)
        with caplog.at_level(logging.INFO, "training.fast"):
            trainer = set_up(recorded, tmp_path, "--model_name_or_path", str(output))
        assert "FAST tokenizer, as it was saved: scale 10" in caplog.text
        trainer.repository.processor.save_pretrained(tmp_path)
        assert (tmp_path / NAME).read_bytes() == (output / NAME).read_bytes()
        with pytest.raises(ValueError, match=r"--fast_scale 20\.0 is for fitting .* with its own: leave it out"):
            set_up(recorded, tmp_path, "--model_name_or_path", str(output), "--fast_scale", "20")
        with pytest.raises(ValueError, match="fit it to chunks of 32 actions"):
            set_up(recorded, tmp_path, "--model_name_or_path", str(output), "--chunk_size", "32")

    def test_back_to_bins(self, run, recorded, tmp_path):  # noqa: F811
        _, output = run
        trainer = set_up(recorded, tmp_path, "--model_name_or_path", str(output), "--head_type", "tokens")
        processor = trainer.repository.processor
        assert trainer.model.fast_tokenizer is processor.fast_tokenizer is None
        for owner in (trainer.model.config, processor):
            assert owner.fast_scale is owner.fast_min_token is None


class TestFitting:
    def test_on_the_training_episodes(self, recorded, tmp_path, caplog):  # noqa: F811
        """Every chunk that is learned, those at the ends too, and none of what is held out; the log says how well."""
        more = (*FIT, "--fast_scale", "20", "--validation_episodes", "1")
        with caplog.at_level(logging.INFO, "training.fast"):
            trainer = set_up(recorded, tmp_path, *more)
        processor, (part,) = trainer.repository.processor, trainer.loader._streams[0].parts
        chunks = []
        for episode in iter_episodes(part.source, part.config):
            held = np.concatenate([episode.actions, np.repeat(episode.actions[-1:], CHUNK - 1, axis=0)])
            chunks += [held[start : start + CHUNK] for start in range(len(episode))]
        normalized = processor.normalize_actions(np.stack(chunks), "tabletop")
        expected = FastTokenizer.fit(normalized, scale=20, vocab_size=200)
        found = trainer.model.fast_tokenizer
        assert found.bpe.to_str() == expected.bpe.to_str()
        assert found.config_fields == expected.config_fields
        assert {name: getattr(trainer.model.config, name) for name in found.config_fields} == found.config_fields
        rows = expected.encode(normalized)
        per_action = sum(map(len, rows)) / (len(rows) * CHUNK)
        error = expected.decode(rows, CHUNK, 7) - normalized
        assert f"FAST tokenizer, fitted: scale 20, {expected.vocab_size} tokens; on {len(rows)} chunks" in caplog.text
        assert f"{per_action:.2f} tokens per action" in caplog.text
        assert f"error {np.sqrt((error**2).mean()):.4f} RMS" in caplog.text

    def test_twice_the_same(self, recorded, tmp_path):  # noqa: F811
        texts = {set_up(recorded, tmp_path, *FIT).model.fast_tokenizer.bpe.to_str() for _ in range(2)}
        assert len(texts) == 1

    def test_no_more_chunks_than_documented(self, recorded, tmp_path, monkeypatch, caplog):  # noqa: F811
        monkeypatch.setattr(fast_module, "MAX_CHUNKS", 50)
        with caplog.at_level(logging.INFO, "training.fast"):
            set_up(recorded, tmp_path, *FIT)
        assert "on 50 chunks of 8 actions" in caplog.text

    def test_datasets_by_their_shares(self, recorded, tmp_path):  # noqa: F811
        twin = tmp_path / "twin"
        shutil.copytree(recorded, twin)
        data = parse_arguments(flags(recorded, tmp_path))[1]
        data.dataset = [str(recorded), f"{twin}=3"]
        statistics = {name: {"num_transitions": 500} for name in ("tabletop", "twin")}
        chunks, names = sample_chunks(open_parts(data), statistics, data, chunk_size=3, limit=80, seed=0)
        assert chunks.shape == (80, 3, 7)
        assert (names.count("tabletop"), names.count("twin")) == (20, 60)

    def test_too_many_tokens_for_the_vocabulary(self, recorded, tmp_path):  # noqa: F811
        with pytest.raises(ValueError, match=r"1024 FAST tokens .* take the place of .* \(`fast_vocab_size`\)"):
            set_up(recorded, tmp_path, *FAST)


class TestGiven:
    def published(self, bpe, folder: Path, **changes) -> Path:
        """As it lies in the published repository."""
        folder.mkdir()
        bpe.save(str(folder / "tokenizer.json"))
        settings = {"processor_class": "UniversalActionProcessor", **PUBLISHED, **changes}
        (folder / "processor_config.json").write_text(json.dumps(settings))
        return folder

    @pytest.mark.parametrize("name", ["", NAME])
    def test_of_a_policy(self, run, recorded, tmp_path, monkeypatch, name):  # noqa: F811
        """Its directory, or the file."""
        _, output = run
        refuse_to_fit(monkeypatch)
        trainer = set_up(recorded, tmp_path, *FAST, "--fast_tokenizer", str(output / name))
        tokenizer = fast_module.read_fast_tokenizer(str(output))
        for owner in (trainer.model, trainer.repository.processor):
            assert owner.fast_tokenizer.bpe.to_str() == tokenizer.bpe.to_str()
            assert owner.fast_tokenizer.config_fields == tokenizer.config_fields

    def test_published(self, published_bpe, recorded, tmp_path, monkeypatch):  # noqa: F811
        """Over the tiny policy with the special tokens out of its way."""
        refuse_to_fit(monkeypatch)
        base = tmp_path / "base"
        shutil.copytree(TINY_POLICY, base)
        changes = {"action_token_end": 1060, "closing_token_id": 3, "pad_token_id": 1061}
        for file in ("config.json", "processor_config.json"):
            settings = json.loads((base / file).read_text())
            known = {name: value for name, value in changes.items() if name in settings}
            (base / file).write_text(json.dumps(settings | known))
        location = self.published(published_bpe, tmp_path / "published")
        more = (*FAST, "--model_name_or_path", str(base), "--fast_tokenizer", str(location))
        trainer = set_up(recorded, tmp_path, *more)
        config = trainer.model.config
        assert (config.fast_scale, config.fast_min_token, config.fast_vocab_size) == (10, -354, 1024)
        batch = next(iter(trainer.loader))
        learned = batch["labels"][batch["labels"] != -100]
        assert (((learned >= 36) & (learned < 1060)) | (learned == STOP)).all()

    def test_too_short_an_alphabet(self, recorded, tmp_path):  # noqa: F811
        """What some chunk of training may need is asked for before it."""
        location = tmp_path / "short"
        short = FastTokenizer.fit(np.zeros((1, 2, 7)), vocab_size=100)
        location.mkdir()
        short.save(location)
        settings = {"fast_scale": short.scale, "fast_min_token": short.min_token}
        (location / "processor_config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=r"spells coefficients of -15\.\.15, .* chunks have -28\.\.28: fit it to"):
            set_up(recorded, tmp_path, *FAST, "--fast_tokenizer", str(location))

    def test_none_there(self, recorded, tmp_path):  # noqa: F811
        for location, message in (
            (
                TINY_POLICY,
                r"cannot be reached: fast_tokenizer\.json with \['fast_scale', 'fast_min_token'\] or",
            ),
            (tmp_path / "nowhere", "is neither a directory"),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match=message):
                set_up(recorded, tmp_path, *FAST, "--fast_tokenizer", str(location))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((*VOCAB, "--head_type", "fast"), "shortens chunks along time, and `chunk_size` is 1: use 'tokens'"),
        ((*FIT, "--attention_mode", "bidirectional"), "decodes token after token: set `attention_mode='causal'`"),
        ((*FIT, "--norm_type", "normal"), r"needs actions in \[-1, 1\]: `norm_type` 'bounds_q99' or 'bounds'"),
        ((*FIT, "--use_film", "True"), "`use_film=True` averages"),
        ((*FIT, "--bin_smoothing", "3"), "--bin_smoothing is for policies that speak in bins, not for 'fast': leave"),
        (
            ("--fast_tokenizer", "a/b"),
            r"--fast_tokenizer a/b is for .* FAST tokens, not for 'tokens': add --head",
        ),
        (("--head_type", "tokens", *VOCAB), r"--fast_vocab_size 200 is for policies .* not for 'tokens'"),
        ((*FIT, "--fast_tokenizer", "a/b"), r"--fast_tokenizer a/b has .* own: leave out --fast_vocab_size 200"),
        ((*FAST, "--fast_vocab_size", "20"), "different coefficients, more than `vocab_size` 20: raise it"),
        ((*FIT, "--fast_scale", "0"), "`fast_scale` must be positive, got 0.0"),
    ],
)
def test_refused(recorded, tmp_path, more, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        set_up(recorded, tmp_path, *more)


class TestLabels:
    def test_of_a_stream(self, recorded, tmp_path):  # noqa: F811
        """The whole chunk in the ids that are decoded, the repeated end of an episode too, and the stop token."""
        trainer = set_up(recorded, tmp_path, *FIT, "--per_device_train_batch_size", "64")
        processor, stream = trainer.repository.processor, trainer.loader._streams[0]
        steps = [step for _, step in zip(range(64), stream, strict=False)]
        assert any(step.action_is_pad.any() for step in steps)
        batch = Collator(processor)(steps)
        prompts = processor(instruction=[step.instruction for step in steps])
        lengths = set()
        for row, step in enumerate(steps):
            normalized = processor.normalize_actions(step.action, "tabletop")
            expected = [1023 - token for token in processor.fast_tokenizer.encode(normalized)[0]] + [STOP]
            ids, labels = (
                batch[name][row][batch["attention_mask"][row] == 1].tolist() for name in ("input_ids", "labels")
            )
            prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1].tolist()
            assert ids == prompt + expected
            assert labels == [-100] * len(prompt) + expected
            lengths.add(len(expected))
        assert len(lengths) > 1
        without = Collator(processor, predict_stop_token=False)(steps)["labels"]
        assert (without == STOP).sum() == 0
        assert ((without != -100).sum(dim=1) == (batch["labels"] != -100).sum(dim=1) - 1).all()

    def test_items_and_divided_batches(self, recorded, tmp_path):  # noqa: F811
        """The loss is the mean over all tokens of a step, however it is divided; none is left out as padded."""
        size = ("--per_device_train_batch_size", "16", "--use_cpu", "True")
        trainer = set_up(recorded, tmp_path, *FIT, *size)
        batch = next(iter(trainer.loader))
        batch["action_is_pad"] = torch.arange(CHUNK).expand(16, -1) > torch.arange(16)[:, None] % CHUNK
        del batch["names"]
        counts = (batch["labels"] != -100).sum(dim=1)
        assert counts.unique().numel() > 1
        parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 5), slice(5, 16))]
        items = [trainer._get_num_items_in_batch(each, trainer.args.device) for each in ([batch], parts)]
        assert items[0] == items[1] == counts.sum()
        with torch.no_grad():
            whole = trainer.model(**batch).loss
            divided = sum(trainer.model(**part, num_items_in_batch=items[1]).loss for part in parts)
        torch.testing.assert_close(divided, whole)


SHOWING = """
import os, sys
import train_hf
from training import fast

sample = fast.sample_chunks
def sample_chunks(*args, **kwargs):
    print("chunks read by rank", os.environ["RANK"], flush=True)
    return sample(*args, **kwargs)
fast.sample_chunks = sample_chunks
train_hf.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_two_processes(recorded, tmp_path):  # noqa: F811
    """One of them fits, both speak with the same; they are two workers of one process that accumulates over both."""
    one, two = tmp_path / "one", tmp_path / "two"
    more = (*FIT, *LENGTH, "--use_cpu", "True", "--max_grad_norm", "1", "--learning_rate", "1e-4")
    more = (*more, "--validation_steps", "6")
    both = ("--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2", "--per_device_eval_batch_size", "2")
    train_hf.main(flags(recorded, one, *more, *both))
    script = tmp_path / "show.py"
    script.write_text(SHOWING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    each = flags(recorded, two, *more, "--per_device_eval_batch_size", "1")  # of different lengths
    done = subprocess.run([*launch, *each], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall("chunks read by rank .", done.stdout) == ["chunks read by rank 0"]
    assert (two / NAME).read_bytes() == (one / NAME).read_bytes()
    assert list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=1e-5)
    (first,), (second,) = evaluations(one), evaluations(two)
    names = [name for name in first if "accuracy" in name or "valid" in name or name == "eval_loss" or "/l1" in name]
    assert len(names) >= 5
    assert [second[name] for name in names] == pytest.approx([first[name] for name in names], rel=1e-5)


def test_two_chunks_by_heart(tmp_path):
    """What is taught is what is predicted, but for the rounding of the tokenizer."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-0.04, 0.04, (2, 7)).astype(np.float32)
    actions[:, 6] = (0, 1)
    frames = [
        {
            **{name: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in ("image", "wrist_image")},
            **{"state": np.zeros(8, np.float32), "action": action, "expert_action": action},
        }
        for action in actions
    ]
    staged = tmp_path / "staged.parquet"
    write_episode(staged, frames, {"episode_index": 0, "instruction": "push the cube"}, video=False)
    dataset, output = tmp_path / "tabletop", tmp_path / "output"
    assemble([staged], dataset, image_size=32, video=False)
    more = ("--max_steps", "150", "--save_steps", "150", "--eval_steps", "150", "--overfit_one_episode", "True")
    train_hf.main(flags(dataset, output, *FIT, *more))
    (evaluation,) = evaluations(output)
    assert evaluation["eval_action_accuracy"] == evaluation["eval_valid_chunks"] == 1
    assert evaluation["eval_l1_normalized"] == evaluation["eval_tabletop/l1/x"] == 0
    model, processor = load_policy(output, dtype=torch.float32)
    (part,) = open_parts(parse_arguments(flags(dataset, output))[1])
    (episode,) = iter_episodes(part.source, part.config)
    chunks, _ = episode.chunks(np.arange(2), CHUNK)
    pictures = [decode(picture) for picture in episode.images["primary"]]
    prediction = model.predict_action(
        **processor(instruction=["push the cube"] * 2, images=pictures), unnorm_key="tabletop", return_dict=True
    )
    target = processor.normalize_actions(chunks, "tabletop")
    error = np.sqrt(((prediction.normalized_actions.reshape(target.shape) - target) ** 2).mean(axis=1))  # (2, 7)
    assert error.max() <= 0.5 / processor.fast_scale
    assert np.abs(target[0] - target[1]).max() > 1
    for row, ids in enumerate(processor.encode_actions(chunks, "tabletop")):
        spoken = prediction.token_ids[row].tolist()
        assert spoken == ids + [STOP] * (len(spoken) - len(ids))


class TestMetrics:
    TOKENS = ActionTokens(90, 100, is_fast=True)

    def test_nothing_is_padded(self):
        labels = torch.tensor([[-100, 91, 92, 2], [-100, 95, 2, -100]])
        is_pad = torch.tensor([[False, True, True], [False, False, True]])
        assert without_padding(labels, is_pad, self.TOKENS) is labels
        predicted = torch.tensor([[91, 0, 2], [-100, 95, 0]])
        assert count_correct(predicted, labels, is_pad, self.TOKENS).tolist() == [2, 3]

    def test_predicted_tokens_stand_where_the_labels_are(self):
        """Rows of different lengths, and a batch that another process has longer ones than."""
        labels = torch.tensor([[-100, 5, 6, 2], [-100, -100, 7, 2]])
        logits = torch.nn.functional.one_hot(torch.tensor([[5, 1, 2], [3, 7, 2]]), 10).float()
        expected = [[5, 1, 2], [-100, 7, 2]]
        assert predicted_tokens(logits, labels).tolist() == expected
        assert predicted_tokens(logits, (labels, None)).tolist() == expected
        longer = torch.nn.functional.pad(logits, (0, 0, 0, 2), value=-100)
        assert predicted_tokens(longer, labels).tolist() == [[*row, -100, -100] for row in expected]

    def test_by_hand(self, processor):
        """Four rows of two datasets: right, wrong but whole, no chunk, and right with a padded end."""
        processor.head_type, processor.chunk_size = "fast", 2
        statistics = processor.norm_stats["tabletop"]
        statistics["action"] |= {"q01": [-2.0] * 7, "q99": [4.0] * 7}
        processor.norm_stats = {"tabletop": statistics, "moon": statistics}
        processor.fast_tokenizer = FastTokenizer.fit(np.zeros((1, 2, 7)), scale=2.0, vocab_size=7)  # no merges
        tokens = np.full((4, 14), 3)  # zeros
        wrong = tokens.copy()
        wrong[1, :7] = 4  # the first coefficient of each dimension: 1 / scale, 0.5 / sqrt(2) for both actions
        wrong[2, 0] = 40  # no FAST token
        wrong[3, 7:] = 5  # the second one: 1 / sqrt(2), with the other sign at the action that is padded
        stop = np.full((4, 1), STOP)
        labels = np.concatenate([np.full((4, 3), -100), 1023 - tokens, stop, np.full((4, 2), -100)], axis=1)
        predictions = np.concatenate([1023 - wrong, stop, np.full((4, 2), -100)], axis=1)
        is_pad = np.array([[False, False]] * 3 + [[False, True]])
        metrics = ActionMetrics(processor, ["tabletop", "tabletop", "moon", "moon"])
        assert metrics.label_names == ["labels", "action_is_pad"]
        values = metrics(EvalPrediction(predictions=predictions, label_ids=(labels, is_pad)))
        root = 2**0.5
        assert values["action_accuracy"] == pytest.approx((14 + 7 + 13 + 7) / 56)
        assert values["moon/action_accuracy"] == pytest.approx((13 + 7) / 28)
        assert (values["valid_chunks"], values["tabletop/valid_chunks"], values["moon/valid_chunks"]) == (0.75, 1, 0.5)
        assert values["tabletop/l1_normalized"] == pytest.approx(0.5 / root / 2)
        assert values["moon/l1_normalized"] == pytest.approx(1 / root)
        assert values["l1_normalized"] == pytest.approx((0 + 0 + 2 * 0.5 / root + 1 / root) / 5)
        assert values["tabletop/l1/x"] == pytest.approx(3 * 0.5 / root / 2)  # half of 4 - (-2)
        assert values["tabletop/l1/gripper"] == pytest.approx(0.5 / root / 2)  # which is not normalised

    def test_no_chunk_no_distance(self, processor):
        processor.head_type, processor.chunk_size = "fast", 2
        processor.fast_tokenizer = FastTokenizer.fit(np.zeros((1, 2, 7)), scale=2.0, vocab_size=7)
        labels = np.full((1, 14), 1020)
        metrics = ActionMetrics(processor, ["tabletop"])
        values = metrics(EvalPrediction(predictions=labels - 500, label_ids=(labels, np.zeros((1, 2), bool))))
        expected = {"action_accuracy": 0.0, "valid_chunks": 0.0}
        assert values == expected | {f"tabletop/{name}": value for name, value in expected.items()}
