# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Policies assembled from a language model and vision towers: parts to the bit, prompts, training, bad input."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import assemble_policy
import numpy as np
import pytest
import torch
import yaml
from assemble_policy import VISION_REPOSITORIES, assemble, check_repository, end_of_text_tokens, locate_towers
from conftest import FIXTURES, REPOSITORY, TINY_POLICY
from hub_server import HubServer
from load_policy import load_policy, repository_class
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import train_hf
from tabletop.record import Recording, record


END = "<|endoftext|>"
PROMPT = "In: What action should the robot take to pick up the red block?\nOut:"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
STATISTICS = {"arm": {"action": {"q01": [-2.0] * 6 + [0.0], "q99": [3.0] * 6 + [1.0], "mask": [True] * 6 + [False]}}}
KINDS = ("llama", "smollm", "qwen")
TOWER = {"depth": 3, "num_heads": 4, "mlp_dim": 64, "image_size": 56}
SMALL = {
    "tower_configs": [
        {**TOWER, "embed_dim": 32, "class_token": True, "num_registers": 4, "layer_scale": True},
        {**TOWER, "embed_dim": 48, "attention_pool": True},
    ]
}


def train_tokenizer(size: int, special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE: special tokens, 256 bytes, the words of the prompt, and then others."""
    words, letters = random.Random(0), "abcdefghijklmnopqrstuvwxyz"
    corpus = [PROMPT] * 1000 + [" " + "".join(words.choices(letters, k=8)) for _ in range(3000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    assert tokenizer.get_vocab_size() == size
    return tokenizer


def write_language_model(directory: Path, kind: str, **kwargs) -> Path:
    """
    A random language model with its tokenizer. `llama`: in bfloat16, BOS in front of every text, a lone "▁", <PAD> and
    spare rows. `smollm`: one special token, first in the vocabulary and in front of nothing, no row to spare, the
    head tied to the embedding. `qwen`: special tokens behind the vocabulary, no BOS, padding with what ends a text.
    """
    torch.manual_seed(1)
    if kind == "llama":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_POLICY)
        config = LlamaConfig(**SIZES, vocab_size=1088, rope_theta=5e4, rms_norm_eps=1e-5, **kwargs)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    elif kind == "smollm":
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(800, [END, "<|im_start|>"]))
        tokenizer.add_special_tokens({"bos_token": END, "eos_token": END, "unk_token": END})
        config = LlamaConfig(**SIZES, vocab_size=800, num_key_value_heads=2, tie_word_embeddings=True, **kwargs)
        model = LlamaForCausalLM(config)
    else:
        backend = train_tokenizer(800, [])
        backend.add_special_tokens([AddedToken(token, special=True) for token in (END, "<|im_start|>", "<|im_end|>")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END)
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, vocab_size=896, num_key_value_heads=2, **kwargs))
    for parameter in model.parameters():  # logits that tell tokens apart, and norms that differ from one
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    model.tie_weights()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def language_models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("language_models")
    return {kind: write_language_model(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> list[Path]:
    """timm's repositories of small towers, in float32 as theirs are."""
    root, generator = tmp_path_factory.mktemp("towers"), torch.Generator().manual_seed(0)
    fields = {"llm_backbone_id": None, "closing_token_id": None, "text_config": {**SIZES, "vocab_size": 896}}
    with torch.device("meta"):
        model = repository_class("OpenVLAForActionPrediction")(repository_class("OpenVLAConfig")(**SMALL, **fields))
    for name, tower in zip(("dino", "siglip"), model.vision_backbone.towers, strict=True):
        weights = {
            key.replace("scale_factor", "gamma"): torch.randn(each.shape, generator=generator) * 0.2
            for key, each in tower.state_dict().items()
        }
        (root / name).mkdir()
        save_file(weights, root / name / "model.safetensors")
        (root / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nA tower.\n")
    return [root / "dino", root / "siglip"]


@pytest.fixture(scope="module")
def assembled(language_models, towers, tmp_path_factory) -> dict[str, Path]:
    """A policy in float32 for each kind of language model. Do not change them."""
    root = tmp_path_factory.mktemp("assembled")
    for kind, source in language_models.items():
        assemble(source, root / kind, vision_weights=towers, dtype="float32", overrides=SMALL)
    return {kind: root / kind for kind in language_models}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def load_text_model(directory: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", KINDS)
class TestParts:
    def test_language_model(self, assembled, language_models, kind):
        """The same tensors, and the same logits for a text."""
        policy, processor = load_policy(assembled[kind])
        alone = load_text_model(language_models[kind])
        rows, own = alone.config.vocab_size, policy.language_model.state_dict()
        for name, tensor in alone.state_dict().items():
            assert torch.equal(own[name][:rows] if "embed_tokens" in name or "lm_head" in name else own[name], tensor)
        ids = torch.tensor(processor.tokenizer(["turn left, then grip"])["input_ids"])
        with torch.no_grad():
            logits, expected = policy(input_ids=ids).logits, alone(input_ids=ids).logits
        torch.testing.assert_close(logits[..., :rows], expected, rtol=0, atol=1e-5)
        assert expected.std() > 1

    def test_tied_embedding_is_one_tensor(self, assembled, kind):
        policy, _ = load_policy(assembled[kind])
        embedding, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
        assert (embedding is head) == (kind == "smollm")
        saved = load_file(assembled[kind] / "model.safetensors")
        assert ("language_model.lm_head.weight" in saved) == (kind != "smollm")

    def test_features(self, assembled, towers, kind):
        policy, _ = load_policy(assembled[kind])
        pixels = torch.randn(1, 6, 56, 56, generator=torch.Generator().manual_seed(0))
        features = []
        for source, tower, image in zip(towers, policy.vision_backbone.towers, pixels.split(3, dim=1), strict=True):
            alone = type(tower)(tower.config)
            weights = load_file(source / "model.safetensors")
            alone.load_state_dict({name.replace("gamma", "scale_factor"): weights[name] for name in weights})
            features.append(alone(image))
        with torch.no_grad():
            actual = policy.vision_backbone(pixels)
        torch.testing.assert_close(actual, torch.cat(features, dim=-1), rtol=0, atol=1e-5)
        assert actual.std() > 0.1

    def test_rows_are_added_only_where_there_is_none(self, assembled, language_models, kind):
        policy, _ = load_policy(assembled[kind])
        rows = {"llama": 1088, "smollm": 832, "qwen": 896}[kind]
        assert policy.config.text_config.vocab_size == policy.get_input_embeddings().num_embeddings == rows
        assert policy.get_input_embeddings().weight.isfinite().all()
        tokenizer = PreTrainedTokenizerFast.from_pretrained(assembled[kind])
        assert policy.config.image_token_id == rows - 1 > max(tokenizer.get_vocab().values())


def test_bfloat16_stays_to_the_bit(language_models, towers, tmp_path):
    assemble(language_models["llama"], tmp_path / "out", vision_weights=towers, overrides=SMALL)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    source = load_file(language_models["llama"] / "model.safetensors")
    assert all(torch.equal(saved[f"language_model.{name}"], tensor) for name, tensor in source.items())


def test_rounded_to_bfloat16(language_models, towers, tmp_path):
    """The weights alone: frequencies of the positions stay, or the text's logits would be others."""
    assemble(language_models["smollm"], tmp_path / "out", vision_weights=towers, dtype="bfloat16", overrides=SMALL)
    policy, processor = load_policy(tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert policy.dtype == torch.bfloat16
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    ids = processor(PROMPT)["input_ids"]
    alone = AutoModelForCausalLM.from_pretrained(language_models["smollm"], dtype=torch.bfloat16).eval()
    with torch.no_grad():
        logits, expected = policy(input_ids=ids).logits[..., :800], alone(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3 * expected.abs().max().item())


def test_seed(language_models, towers, tmp_path):
    """The projector alone, and added rows, depend on the seed."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assemble(language_models["qwen"], tmp_path / name, vision_weights=towers, seed=seed, overrides=SMALL)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    changed = {name for name in a if not torch.equal(a[name], c[name])}
    assert changed == {name for name in a if name.startswith("projector.") and name.endswith("weight")}
    assert a["projector.fc1.weight"].std() == pytest.approx(0.02, rel=0.05)


def test_features_of_timm(language_models, tmp_path):
    """timm's own weights of a small tower, and the features that timm itself computes with them."""
    golden = load_file(FIXTURES / "timm_small_towers.safetensors")
    prefix = "in1k.weights."
    weights = {name.removeprefix(prefix): each for name, each in golden.items() if name.startswith(prefix)}
    save_file(weights | {"head.weight": torch.zeros(2, 64)}, tmp_path / "tower.safetensors")
    sizes = {"embed_dim": 64, "depth": 3, "num_heads": 4, "mlp_dim": 256, "patch_size": 16}
    overrides = {"tower_configs": [{**sizes, "class_token": True, "embed_class_token": True}]}
    assemble(
        language_models["smollm"],
        tmp_path / "out",
        vision_backbone_id="in1k-vit-l",
        vision_weights=[tmp_path / "tower.safetensors"],
        overrides=overrides,
    )
    policy, processor = load_policy(tmp_path / "out")
    picture = golden["in1k.input"].permute(0, 2, 3, 1)  # (B, 3, S, S) -> (B, S, S, 3)
    pixels = processor.image_processor(picture)["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(policy.vision_backbone(pixels), golden["in1k.output"], atol=1e-4, rtol=0)


def test_positions_of_another_picture_size(language_models, towers, tmp_path):
    """DINOv2's own are for 518 pixels, 37 patches on a side."""
    shutil.copytree(towers[0], tmp_path / "dino")
    weights = load_file(towers[0] / "model.safetensors")
    position = torch.randn(1, 37 * 37, 32, generator=torch.Generator().manual_seed(0))
    save_file(weights | {"pos_embed": position}, tmp_path / "dino" / "model.safetensors")
    sources = [tmp_path / "dino", towers[1]]
    assemble(language_models["qwen"], tmp_path / "out", vision_weights=sources, overrides=SMALL)
    image = position[0].T.reshape(1, 32, 37, 37)
    expected = torch.nn.functional.interpolate(image, size=(4, 4), mode="bicubic", antialias=True)
    saved = load_file(tmp_path / "out" / "model.safetensors")["vision_backbone.featurizer.pos_embed"]
    assert torch.equal(saved, expected.reshape(1, 32, 16).mT)


@pytest.mark.parametrize("kind", KINDS)
class TestPrompt:
    def test_ids(self, assembled, kind):
        _, processor = load_policy(assembled[kind])
        tokenizer, closing = processor.tokenizer, processor.closing_token_id
        assert (closing is None) == (kind != "llama")
        ids = processor(instruction="Pick up the red block")["input_ids"][0].tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1
        text = ids[1:] if closing is None else ids[1:-1]
        assert tokenizer.decode(text) == PROMPT
        assert tokenizer.convert_ids_to_tokens(text)[-1] == ":"
        assert processor(PROMPT)["input_ids"][0].tolist() == [ids[0], *text]

    def test_special_tokens_in_an_instruction_stay_text(self, assembled, kind):
        _, processor = load_policy(assembled[kind])
        ids = processor(instruction=f"say {END}</s>")["input_ids"][0].tolist()
        assert not set(ids[1:]) & set(processor.tokenizer.all_special_ids)

    def test_labels_decode_to_the_actions(self, assembled, kind):
        policy, processor = load_policy(assembled[kind])
        policy.norm_stats = processor.norm_stats = STATISTICS
        actions = np.array([[0.5, -1.9, 2.9, 0.0, 1.0, -0.3, 1.0], [-2.0, 3.0, 0.1, 0.2, 0.3, 0.4, 0.0]])
        batch = processor(instruction=["go", "pick up the red block"], actions=actions)
        end = {"llama": 1024, "smollm": 800, "qwen": 800}[kind]
        assert processor.action_token_end == policy.config.action_token_end == policy.codec.token_end == end
        for row, expected in zip(batch["labels"], actions, strict=True):
            tokens = row[row != -100]
            assert tokens[-1] == processor.tokenizer.eos_token_id
            assert ((tokens[:-1] >= end - 256) & (tokens[:-1] < end)).all()
            assert np.abs(processor.decode_actions(tokens[:-1]) - expected).max() < 2.5 / 255
        padding = batch["attention_mask"] == 0
        assert padding.any()
        assert (batch["input_ids"][padding] == processor.tokenizer.pad_token_id).all()
        assert processor.tokenizer.pad_token_id == policy.config.pad_token_id != processor.tokenizer.eos_token_id

    def test_predicts(self, assembled, camera_image, kind):
        """The image stands behind the first token, counts, and whoever pads, and by which side, gets the same."""
        policy, processor = load_policy(assembled[kind])
        policy.norm_stats = processor.norm_stats = STATISTICS
        texts = ["go", "pick up the red block"]
        alone = policy.predict_action(**processor(instruction=texts[0], images=camera_image), return_dict=True)
        batch = processor(instruction=texts, images=[camera_image] * 2)
        together = policy.predict_action(**batch, return_dict=True)
        torch.testing.assert_close(together.probabilities[:1], alone.probabilities, rtol=1e-3, atol=1e-6)
        unmasked = policy.predict_action(batch["input_ids"], pixel_values=batch["pixel_values"], return_dict=True)
        torch.testing.assert_close(unmasked.probabilities, together.probabilities, rtol=0, atol=0)
        dark = policy.predict_action(**{**batch, "pixel_values": -batch["pixel_values"]}, return_dict=True)
        assert (dark.probabilities - together.probabilities).abs().max() > 1e-6


# What somebody without this project's tools does with a policy.
FRESH = """
import json, sys
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
def answer(directory):
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True, dtype="auto").eval()
    inputs = processor(instruction="go", images=Image.new("RGB", (64, 48), (200, 30, 30)))
    with torch.no_grad():
        model(**inputs)
        logits = model(**inputs).logits[0, -1]
    return processor, model, inputs["input_ids"][0].tolist(), logits
for source in sys.argv[1:]:
    copy = source.rpartition("/")[2] + "-copy"
    processor, model, ids, logits = answer(source)
    model.save_pretrained(copy)
    processor.save_pretrained(copy)
    _, _, ids_of_copy, logits_of_copy = answer(copy)
    same = ids == ids_of_copy and torch.equal(logits, logits_of_copy)
    print(json.dumps({"ids": ids, "logits": logits[:8].tolist(), "same": same}))
"""


@pytest.mark.slow
def test_auto_classes_in_a_fresh_process(assembled, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", FRESH, *assembled.values()],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    answers = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"ids"')]
    for directory, answer in zip(assembled.values(), answers, strict=True):
        assert answer["same"]
        policy, processor = load_policy(directory)
        inputs = processor(instruction="go", images=np.full((48, 64, 3), (200, 30, 30), dtype=np.uint8))
        assert answer["ids"] == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            expected = policy(**inputs).logits[0, -1, :8]
        torch.testing.assert_close(torch.tensor(answer["logits"]), expected, rtol=0, atol=1e-4)


class TestRepository:
    @pytest.mark.parametrize("kind", KINDS)
    def test_nothing_of_this_machine(self, assembled, language_models, kind):
        files = [path for path in assembled[kind].iterdir() if path.suffix in (".json", ".md")]
        assert {"config.json", "tokenizer.json", "processor_config.json", "README.md"} <= {path.name for path in files}
        for path in files:
            assert str(language_models[kind].parent) not in path.read_text(encoding="utf-8"), path
        assert (assembled[kind] / "modeling_openvla.py").is_file()
        assert read_json(assembled[kind] / "config.json")["norm_stats"] == {}

    @pytest.mark.parametrize(
        ("card", "licence", "told"),
        [
            ("---\nlicense: apache-2.0\n---\n", "apache-2.0", "apache-2.0"),
            ("---\nlicense: other\nlicense_name: own\n---\n", "other", "other, own"),
            (None, "other", "not stated"),
        ],
    )
    def test_card(self, language_models, towers, tmp_path, card, licence, told):
        shutil.copytree(language_models["qwen"], tmp_path / "a-model")
        if card is not None:
            (tmp_path / "a-model" / "README.md").write_text(card)
        assemble(tmp_path / "a-model", tmp_path / "out", vision_weights=towers, overrides=SMALL)
        text = (tmp_path / "out" / "README.md").read_text()
        metadata = yaml.safe_load(text.split("---")[1])
        assert metadata["license"] == licence
        assert "base_model" not in metadata
        assert f"| language model and tokenizer | `a-model` | {told} |" in text
        assert "| vision tower `vit_so400m_patch14_siglip_224` | `siglip` | apache-2.0 |" in text
        assert "The projector between them is random" in text

    @pytest.mark.slow
    def test_from_the_hub_and_back(self, language_models, towers, tmp_path):
        """Parts by their Hub ids, those of the towers by default."""
        hub_ids = {"me/lm": language_models["smollm"], **dict(zip(hub_ids_of_the_default(), towers, strict=True))}
        (tmp_path / "small.json").write_text(json.dumps(SMALL))
        with HubServer() as server:
            for hub_id, directory in hub_ids.items():
                server.create_repo(hub_id, {path.name: path.read_bytes() for path in directory.iterdir()})
            command = [REPOSITORY / "tools" / "assemble_policy.py", "me/lm", tmp_path / "out"]
            finished = subprocess.run(
                [sys.executable, *command, "--config", tmp_path / "small.json", "--push_to_hub", "me/start"],
                env={**server.environment(tmp_path), "HF_HUB_OFFLINE": "0"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert finished.returncode == 0, finished.stderr
            pushed = server.files("me/start")
        assert {"config.json", "model.safetensors", "modeling_openvla.py", "tokenizer.json"} <= pushed.keys()
        metadata = yaml.safe_load(pushed["README.md"].decode().split("---")[1])
        assert metadata["base_model"] == list(hub_ids)


def hub_ids_of_the_default() -> list[str]:
    return [source.root for source in locate_towers("dinosiglip-vit-so-224px", ())]


def test_where_the_hub_has_the_towers():
    assert hub_ids_of_the_default() == ["timm/vit_large_patch14_reg4_dinov2.lvd142m", "timm/ViT-SO400M-14-SigLIP"]
    ids = repository_class("OpenVLAConfig")(vision_backbone_id="dinosiglip-vit-so-384px").timm_model_ids
    assert VISION_REPOSITORIES.keys() & set(ids)


class TestRefusals:
    @pytest.fixture
    def refuse(self, language_models, towers, tmp_path, capsys):
        """Run the command; the one line on the error stream. Nothing may be written."""

        def call(language_model: str | Path, *arguments: str | Path, weights=towers, overrides=None) -> str:
            path = tmp_path / "overrides.json"
            path.write_text(json.dumps(SMALL | (overrides or {})))
            parts = [language_models.get(language_model, language_model), tmp_path / "out", "--config", path]
            parts += ["--vision_weights", *weights, *arguments]
            assert assemble_policy.main([str(part) for part in parts]) == 1
            assert not (tmp_path / "out").exists()
            lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert len(lines) == 1
            return lines[0]

        return call

    def test_towers(self, refuse, towers, tmp_path):
        assert "has 2 towers, and weights for 1 were given" in refuse("qwen", weights=towers[:1])
        assert "none of model.safetensors, open_clip" in refuse("qwen", weights=[tmp_path, towers[1]])
        error = refuse("qwen", weights=list(reversed(towers)))
        assert "missing: vision_backbone.featurizer" in error
        assert "not of this model: vision_backbone.featurizer.attn_pool" in error
        assert "vision_backbone_id" in refuse("qwen", overrides={"vision_backbone_id": "siglip"})

    @pytest.mark.parametrize(("drop", "add"), [("blocks.0.attn.qkv.bias", None), (None, "blocks.9.attn.qkv.bias")])
    def test_every_tensor_of_a_tower_counts(self, refuse, towers, tmp_path, drop, add):
        weights = load_file(towers[0] / "model.safetensors")
        weights = {name: each for name, each in weights.items() if name != drop}
        save_file(weights | ({add: torch.zeros(3)} if add else {}), tmp_path / "dino.safetensors")
        error = refuse("qwen", weights=[tmp_path / "dino.safetensors", towers[1]])
        assert f"{'missing' if drop else 'not of this model'}: vision_backbone.featurizer.{drop or add}" in error

    def test_every_tensor_of_the_language_model_counts(self, refuse, language_models, tmp_path):
        for name, change in (("less", {}), ("more", {"model.other.weight": torch.zeros(2)})):
            shutil.copytree(language_models["qwen"], tmp_path / name)
            weights = load_file(tmp_path / name / "model.safetensors")
            lost = weights.pop("model.layers.0.mlp.up_proj.weight") if not change else None
            save_file(weights | change, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
            error = refuse(tmp_path / name)
            expected = "missing: model.layers.0.mlp.up_proj" if lost is not None else "not of this model: model.other"
            assert expected in error

    def test_fields(self, refuse):
        assert "['llm_backbone_id', 'size'] are not fields" in refuse(
            "qwen", overrides={"llm_backbone_id": "phi-2-3b", "size": 3}
        )

    def test_no_language_model(self, refuse, tmp_path):
        assert "neither a directory" in refuse(tmp_path / "absent")
        shutil.copytree(FIXTURES / "openvla_tiny" / "ckpt", tmp_path / "policy")
        assert "openvla" in refuse(tmp_path / "policy")

    def test_quantised(self, refuse, language_models, tmp_path):
        shutil.copytree(language_models["qwen"], tmp_path / "quantised")
        config = read_json(tmp_path / "quantised" / "config.json")
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "quantised" / "config.json").write_text(json.dumps(config))
        assert "is quantised" in refuse(tmp_path / "quantised")

    def test_decoder_elsewhere(self, refuse, language_models, tmp_path):
        sizes = {**SIZES, "vocab_size": 896}
        shutil.copytree(language_models["qwen"], tmp_path / "neox", ignore=shutil.ignore_patterns("*.safetensors"))
        GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).save_pretrained(tmp_path / "neox")
        assert "GPTNeoXForCausalLM, which keeps its decoder elsewhere" in refuse(tmp_path / "neox")

    def test_another_models_tokenizer(self, refuse, language_models, tmp_path):
        shutil.copytree(language_models["qwen"], tmp_path / "mixed")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(language_models["llama"] / name, tmp_path / "mixed")
        error = refuse(tmp_path / "mixed")
        assert "has 896 embeddings: it belongs to another language model" in error
        (tmp_path / "mixed" / "tokenizer.json").unlink()
        assert "has no tokenizer.json" in refuse(tmp_path / "mixed")

    def test_vocabulary_too_small(self, refuse, language_models, tmp_path):
        shutil.copytree(language_models["qwen"], tmp_path / "small")
        backend = train_tokenizer(300, [])
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END).save_pretrained(tmp_path / "small")
        assert "The vocabulary is too small: the last 256 of its 300 tokens" in refuse(tmp_path / "small")

    def test_no_end_of_text(self, refuse, language_models, tmp_path):
        shutil.copytree(language_models["qwen"], tmp_path / "endless")
        PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(800, [])).save_pretrained(tmp_path / "endless")
        assert "no EOS token" in refuse(tmp_path / "endless")

    def test_a_tokenizer_that_loses_the_prompt(self, refuse, language_models, tmp_path):
        shutil.copytree(language_models["qwen"], tmp_path / "lossy")
        path = tmp_path / "lossy" / "tokenizer.json"
        path.write_text(json.dumps(read_json(path) | {"normalizer": {"type": "Lowercase"}}))
        assert "does not keep the prompt" in refuse(tmp_path / "lossy")

    def test_a_prompt_that_ends_in_eos(self, refuse, language_models, tmp_path):
        shutil.copytree(language_models["smollm"], tmp_path / "closed")
        path = tmp_path / "closed" / "tokenizer.json"
        backend = Tokenizer.from_file(str(path))
        backend.post_processor = processors.TemplateProcessing(single=["$A", END], special_tokens=[(END, 0)])
        backend.save(str(path))
        assert "does not keep the prompt" in refuse(tmp_path / "closed")

    def test_special_tokens_among_the_actions(self, refuse, language_models, tmp_path):
        shutil.copytree(language_models["qwen"], tmp_path / "mid")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(800, []))
        middle = tokenizer.convert_ids_to_tokens(700)
        tokenizer.add_special_tokens({"eos_token": middle})
        tokenizer.save_pretrained(tmp_path / "mid")
        error = refuse(tmp_path / "mid")
        assert f"special tokens {middle} are among them" in error
        assert "set `action_token_end` with --config" in error

    def test_too_short_a_memory(self, refuse, tmp_path):
        write_language_model(tmp_path / "short", "qwen", max_position_embeddings=32)
        assert "reads 32 tokens, and an image with a short prompt has" in refuse(tmp_path / "short")

    def test_logits_of_its_own(self, assembled, language_models):
        """What caps or scales its logits, as Gemma 2 and Granite do, answers otherwise in a policy."""
        alone = load_text_model(language_models["llama"])
        check_repository(assembled["llama"], alone)
        alone.lm_head.register_forward_hook(lambda module, inputs, logits: 5 * (logits / 5).tanh())
        with pytest.raises(ValueError, match=r"LlamaForCausalLM differ by \d+\.\d% .*a cap or a scale"):
            check_repository(assembled["llama"], alone)

    def test_what_is_in_the_way(self, language_models, towers, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").touch()
        with pytest.raises(ValueError, match="--overwrite"):
            assemble(language_models["qwen"], tmp_path / "out", vision_weights=towers, overrides=SMALL)
        tower = shutil.copytree(towers[0], tmp_path / "dino")
        (tower / "config.json").write_text("{}")
        sources = {"vision_weights": [tower, towers[1]], "overrides": SMALL}
        with pytest.raises(ValueError, match="is or contains the source"):
            assemble(language_models["qwen"], tower, **sources, overwrite=True)


@pytest.mark.parametrize(("special", "last", "end"), [([END], False, 500), ([], True, 499)])
def test_end_of_text_tokens(special, last, end):
    """A special token that ends the vocabulary, as in GPT-2, is no action."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(500, special))
    if last:
        tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(499)})
    assert end_of_text_tokens(tokenizer) == end


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    return record(Recording(episodes=2, image_size=32), tmp_path_factory.mktemp("recorded") / "tabletop")


def train(model: Path, dataset: Path, output: Path, *more: str) -> dict[str, torch.Tensor]:
    """One step; the weights that it leaves in the repository."""
    settings = {
        **{"model_name_or_path": model, "dataset": dataset, "output_dir": output, "use_cpu": True},
        **{"max_steps": 1, "logging_steps": 1, "validation_episodes": 0, "shuffle_buffer": 4},
        **{
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "per_device_train_batch_size": 1,
        },
    }
    train_hf.main([*(part for name, value in settings.items() for part in (f"--{name}", str(value))), *more])
    state = read_json(output / "checkpoint-1" / "trainer_state.json")
    (loss,) = (entry["loss"] for entry in state["log_history"] if "loss" in entry)
    assert np.isfinite(loss)
    assert 1 < loss < 100
    return load_file(output / "model.safetensors")


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
class TestTraining:
    @pytest.mark.parametrize("kind", ["smollm", "qwen"])
    def test_frozen_vision(self, assembled, recorded, tmp_path, camera_image, kind):
        """A step moves projector and language model and nothing else, and what it leaves acts."""
        before = load_file(assembled[kind] / "model.safetensors")
        after = train(assembled[kind], recorded, tmp_path, "--training_mode", "frozen_vision")
        assert after.keys() == before.keys()
        still = {name for name in before if torch.equal(before[name], after[name])}
        assert still == {name for name in before if name.startswith("vision_backbone.")}
        policy, processor = load_policy(tmp_path)
        action = policy.predict_action(**processor(instruction="go", images=camera_image))
        assert action.shape == (7,)
        assert np.isfinite(action).all()

    def test_lora(self, assembled, recorded, tmp_path):
        """Adapters are merged into what they adapt; the tied embedding stays."""
        before = load_file(assembled["smollm"] / "model.safetensors")
        after = train(assembled["smollm"], recorded, tmp_path, "--use_peft", "True", "--lora_r", "4")
        assert after.keys() == before.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert "language_model.model.layers.1.mlp.down_proj.weight" in changed
        assert "language_model.model.embed_tokens.weight" not in changed
