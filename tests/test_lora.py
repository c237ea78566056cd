# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""LoRA adapters: those trained with the published code, and training, acting, merging and saving with PEFT."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import FIXTURES, GOLDEN, load_golden
from load_policy import repository_class
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, set_seed


# What "all-linear" came to when peft 0.11 met the published model: also the convolutions, the head, and tower parts
# that never run.
PUBLISHED_TARGETS = [
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    *("fc1", "fc2", "fc3", "qkv", "proj", "q", "kv"),
]

RANK, ALPHA = 8, 16

# adapter_config.json as peft 0.11.1 wrote it after vla-scripts/finetune.py.
PUBLISHED_ADAPTER_CONFIG = {
    "alpha_pattern": {},
    "auto_mapping": {
        "base_model_class": "OpenVLAForActionPrediction",
        "parent_library": "transformers_modules.openvla.openvla-7b.modeling_prismatic",
    },
    "base_model_name_or_path": "openvla/openvla-7b",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": "gaussian",
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": ALPHA,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": RANK,
    "rank_pattern": {},
    "revision": None,
    "target_modules": PUBLISHED_TARGETS,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}

# Written out once, so that the rule behind the other names cannot be wrong in silence.
PUBLISHED_NAMES = {
    "base_model.model.vision_backbone.featurizer.patch_embed.proj.lora_A.weight",
    "base_model.model.vision_backbone.featurizer.blocks.0.attn.qkv.lora_A.weight",
    "base_model.model.vision_backbone.featurizer.blocks.1.attn.proj.lora_B.weight",
    "base_model.model.vision_backbone.featurizer.blocks.2.mlp.fc2.lora_B.weight",
    "base_model.model.vision_backbone.fused_featurizer.patch_embed.proj.lora_B.weight",
    "base_model.model.vision_backbone.fused_featurizer.blocks.0.mlp.fc1.lora_A.weight",
    "base_model.model.vision_backbone.fused_featurizer.attn_pool.q.lora_A.weight",
    "base_model.model.vision_backbone.fused_featurizer.attn_pool.kv.lora_B.weight",
    "base_model.model.vision_backbone.fused_featurizer.attn_pool.mlp.fc1.lora_A.weight",
    "base_model.model.projector.fc3.lora_B.weight",
    "base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_A.weight",
    "base_model.model.language_model.model.layers.1.mlp.down_proj.lora_B.weight",
    "base_model.model.language_model.lm_head.lora_A.weight",
}

# peft saves the head itself with the adapter wherever the head is adapted.
SAVED_HEAD = "base_model.model.language_model.lm_head.base_layer.weight"

PREFIX = "base_model.model."
DATASET = "bridge_orig"
PROMPT_IDS = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 7910, 29973, 13, 3744, 29901, 29871]

# transformers 5 has other names for it; peft uses those that 4.57 knows too.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def published_shapes(weights: dict[str, list[int]], r: int) -> dict[str, list[int]]:
    """Names and shapes of an adapter's tensors, from those of the model's weights."""
    shapes = {}
    for name, (out_features, *in_shape) in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and in_shape and module.rpartition(".")[2] in PUBLISHED_TARGETS:
            shapes[f"{PREFIX}{module}.lora_A.weight"] = [r, *in_shape]
            shapes[f"{PREFIX}{module}.lora_B.weight"] = [out_features, r, *[1] * (len(in_shape) - 1)]
    return shapes


def base_weights() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "ckpt" / "model.safetensors")


@pytest.fixture(scope="module")
def published_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random weights for the golden checkpoint, written by hand: peft has no say in the names."""
    directory = tmp_path_factory.mktemp("published_adapter")
    (directory / "adapter_config.json").write_text(json.dumps(PUBLISHED_ADAPTER_CONFIG))
    base = base_weights()
    shapes = published_shapes({name: list(weight.shape) for name, weight in base.items()}, RANK)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.05).bfloat16() for name, shape in shapes.items()}
    tensors[SAVED_HEAD] = base["language_model.lm_head.weight"]
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def load_published(directory: Path, **kwargs) -> PeftModel:
    return PeftModel.from_pretrained(load_golden(dtype=torch.float32), directory, **kwargs)


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.tensor([PROMPT_IDS]),
        "attention_mask": torch.ones(1, len(PROMPT_IDS), dtype=torch.int64),
        "pixel_values": torch.randn(1, 6, 224, 224, generator=generator),
    }


@torch.no_grad()
def logits_of(model, inputs: dict) -> torch.Tensor:
    return model.eval()(**inputs).logits


def token_ids_of(model, inputs: dict) -> list[int]:
    return model.eval().predict_action(**inputs, unnorm_key=DATASET, return_dict=True).token_ids[0].tolist()


def action_ids_of(model) -> list[int]:
    return list(range(model.config.action_token_begin, model.config.action_token_end))


def generated_ids(model, inputs: dict) -> list[int]:
    """Greedy `generate`, restricted to the action tokens."""
    action_ids = action_ids_of(model)
    output = model.eval().generate(
        **inputs,
        max_new_tokens=7,
        do_sample=False,
        prefix_allowed_tokens_fn=lambda *_: action_ids,
    )
    return output[0, -7:].tolist()


def forced_ids(model, inputs: dict, token_ids: list[int]) -> list[int]:
    """The action token that the forward pass prefers at each of the positions of `token_ids`."""
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], torch.tensor([token_ids])], dim=1),
        "pixel_values": inputs["pixel_values"],
    }
    action_ids = action_ids_of(model)
    preferred = logits_of(model, whole)[0, -len(token_ids) - 1 : -1, action_ids].argmax(dim=-1)
    return (preferred + action_ids[0]).tolist()


class TestPublishedAdapters:
    def test_every_tensor_is_loaded(self, published_adapter):
        model = load_published(published_adapter)
        saved = load_file(published_adapter / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(model, save_embedding_layers=True)
        torch.testing.assert_close(loaded, {name: tensor.float() for name, tensor in saved.items()}, rtol=0, atol=0)

    def test_peft_writes_the_same_names(self, published_adapter, tmp_path):
        config = LoraConfig(r=RANK, target_modules=PUBLISHED_TARGETS)
        get_peft_model(load_golden(dtype=torch.float32), config).save_pretrained(tmp_path, save_embedding_layers=True)
        written, published = (
            {name: tensor.shape for name, tensor in load_file(directory / "adapter_model.safetensors").items()}
            for directory in (tmp_path, published_adapter)
        )
        assert written.keys() > PUBLISHED_NAMES
        assert written == published

    def test_changes_the_action(self, published_adapter, golden_model, inputs):
        model = load_published(published_adapter)
        before, after = (m.eval().predict_action(**inputs, unnorm_key=DATASET) for m in (golden_model, model))
        assert np.abs(before - after).max() > 0.001
        with model.disable_adapter():
            np.testing.assert_array_equal(model.predict_action(**inputs, unnorm_key=DATASET), before)

    def test_merged_weights(self, published_adapter):
        """Against the definition, W + alpha / r * B A; a convolution's kernel is a matrix of one row per channel."""
        merged = load_published(published_adapter).merge_and_unload()
        adapter = load_file(published_adapter / "adapter_model.safetensors")
        actual, base = merged.state_dict(), base_weights()
        assert actual.keys() == base.keys()
        for name, weight in base.items():
            module = f"{PREFIX}{name.rpartition('.')[0]}"
            expected = weight.float()
            if name.endswith(".weight") and f"{module}.lora_A.weight" in adapter:
                down, up = (adapter[f"{module}.lora_{side}.weight"].float().flatten(1) for side in "AB")
                expected = expected + ALPHA / RANK * (up @ down).view_as(weight)
            torch.testing.assert_close(actual[name], expected, rtol=1e-5, atol=1e-5)

    def test_merged_model_acts_saves_and_reloads(self, published_adapter, inputs, tmp_path):
        model = load_published(published_adapter)
        logits, action = logits_of(model, inputs), model.predict_action(**inputs, unnorm_key=DATASET)
        merged = model.merge_and_unload()
        # Of the largest logit: each is a sum of terms of that size.
        torch.testing.assert_close(logits_of(merged, inputs), logits, rtol=0, atol=1e-5 * logits.abs().max().item())
        merged.save_pretrained(tmp_path / "merged_policy")
        reloaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "merged_policy", trust_remote_code=True, dtype=torch.float32
        )
        assert torch.equal(logits_of(reloaded, inputs), logits_of(merged, inputs))
        np.testing.assert_array_equal(reloaded.predict_action(**inputs, unnorm_key=DATASET), action)


class TestPublishedSizes:
    """On the meta device, where openvla-7b costs nothing."""

    @pytest.fixture
    def weights(self) -> dict[str, list[int]]:
        return json.loads((FIXTURES / "openvla_7b_weight_shapes.json").read_text())

    @pytest.fixture
    def model(self):
        with torch.device("meta"):
            return repository_class("OpenVLAForActionPrediction")(repository_class("OpenVLAConfig")())

    @staticmethod
    def add_lora(model, **kwargs) -> PeftModel:
        config = LoraConfig(
            r=32, lora_alpha=16, target_modules=PUBLISHED_TARGETS, init_lora_weights="gaussian", **kwargs
        )
        return get_peft_model(model, config, low_cpu_mem_usage=True)

    def test_published_adapter(self, model, weights):
        adapted = self.add_lora(model)
        state_dict = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        shapes = {name: list(tensor.shape) for name, tensor in state_dict.items()}
        assert shapes == published_shapes(weights, 32)
        # As vla-scripts/finetune.py prints them.
        assert adapted.get_nb_trainable_parameters() == (110_828_288, 7_652_065_472)

    def test_unused_parts_are_frozen_and_can_be_left_out(self, model, weights):
        unused = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        dino, siglip = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
        parts = (f"{dino}blocks.23.", f"{dino}norm.", f"{siglip}blocks.26.", f"{siglip}norm.", f"{siglip}attn_pool.")
        assert unused == {name for name in weights if name.startswith(parts)}
        adapted = self.add_lora(model, exclude_modules=sorted({name.rpartition(".")[0] for name in unused}))
        count, _ = adapted.get_nb_trainable_parameters()
        # DINOv2's last block 524,288, SigLIP's 570,368, its pooling head 607,232.
        assert count == 110_828_288 - 1_701_888


class TestActing:
    @pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
    def test_predict_action_and_generate_agree(self, published_adapter, golden_model, inputs, task_type):
        config = LoraConfig.from_pretrained(published_adapter)
        config.task_type = task_type
        model = load_published(published_adapter, config=config)
        assert type(model) is (PeftModel if task_type is None else peft.PeftModelForCausalLM)
        token_ids = token_ids_of(model, inputs)
        assert generated_ids(model, inputs) == token_ids
        assert forced_ids(model, inputs, token_ids) == token_ids
        assert token_ids != token_ids_of(golden_model, inputs)

    @pytest.mark.parametrize("kind", ["lora", "copy"])
    def test_decoding_honours_an_adapted_head(self, golden_model, inputs, kind):
        """Decoding computes only the rows of the action tokens, and must not take them past the adapter."""
        set_seed(0)
        if kind == "lora":
            config = LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
            model = get_peft_model(load_golden(dtype=torch.float32), config)
        else:
            config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
            model = get_peft_model(load_golden(dtype=torch.float32), config)
            torch.nn.init.normal_(model.get_output_embeddings().modules_to_save["default"].weight)
        token_ids = token_ids_of(model, inputs)
        assert token_ids != token_ids_of(golden_model, inputs)
        assert generated_ids(model, inputs) == token_ids
        assert forced_ids(model, inputs, token_ids) == token_ids
        with model.disable_adapter():
            assert token_ids_of(model, inputs) == token_ids_of(golden_model, inputs)

    def test_auto_peft_model(self, inputs, tmp_path):
        """The base is found by the path in the adapter's configuration, and brings the code."""
        load_golden(dtype=torch.float32).save_pretrained(tmp_path / "base_policy")
        base = AutoModelForCausalLM.from_pretrained(
            tmp_path / "base_policy", trust_remote_code=True, dtype=torch.float32
        )
        set_seed(0)
        config = LoraConfig(r=4, target_modules=["qkv", "q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(base, config)
        model.save_pretrained(tmp_path / "adapter")
        saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == str(tmp_path / "base_policy")
        loaded = AutoPeftModelForCausalLM.from_pretrained(
            tmp_path / "adapter", trust_remote_code=True, dtype=torch.float32
        )
        assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
        assert token_ids_of(loaded, inputs) == token_ids_of(model, inputs)


def training_loss(model, inputs: dict) -> torch.Tensor:
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return model.train()(**inputs, labels=labels).loss


def gradients(model, inputs: dict) -> dict[str, torch.Tensor | None]:
    training_loss(model, inputs).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestTraining:
    @staticmethod
    def adapted():
        set_seed(0)
        config = LoraConfig(r=4, target_modules=PUBLISHED_TARGETS, init_lora_weights=False)
        return get_peft_model(load_golden(dtype=torch.float32), config)

    def test_gradient_checkpointing_reaches_every_part(self, inputs):
        expected = gradients(self.adapted(), inputs)
        model = self.adapted()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls = []
        model.vision_backbone.fused_featurizer.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
        actual = gradients(model, inputs)
        assert len(calls) == 2  # once more in the backward pass
        idle = {name for name, gradient in actual.items() if gradient is None}
        assert idle == {name for name in actual if ".blocks.2." in name or ".attn_pool." in name}
        assert all(gradient.abs().sum() > 0 for name, gradient in actual.items() if name not in idle)
        torch.testing.assert_close(
            {name: actual[name] for name in actual.keys() - idle},
            {name: expected[name] for name in expected.keys() - idle},
        )

    def test_a_step_lowers_the_loss_and_leaves_the_base(self, inputs):
        model = self.adapted()
        base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = training_loss(model, inputs)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > losses[1] > losses[2]
        assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters() if name in base)


def test_without_what_never_runs_every_adapter_learns():
    """With `all-linear` alone, adapters on the last blocks and the pooling head never get a gradient."""
    model = load_golden(dtype=torch.float32)
    names = model.unused_linear_names()
    assert "vision_backbone.featurizer.blocks.2.attn.qkv" in names
    assert "vision_backbone.fused_featurizer.attn_pool.kv" in names
    assert not any(".blocks.0." in name or ".blocks.1." in name for name in names)
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=names)
    adapted = get_peft_model(model, config)
    ids = torch.arange(1, 12)[None]
    adapted(input_ids=ids, labels=ids, pixel_values=torch.randn(1, 6, 224, 224)).loss.backward()
    without = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
