# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Which parameters a fine-tune trains, by number and by gradient, and that no quantisation loses a gradient."""

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import FIXTURES, TINY_POLICY, load_golden
from load_policy import load_policy, repository_class
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, set_seed

from training.modes import (
    GRADIENT_CHECKPOINTING_KWARGS,
    MODES,
    PUBLISHED_TARGETS,
    add_lora,
    added_modules,
    check_not_repacked,
    lora_config,
    prepare_quantized,
    quantization_config,
    select_trainable,
)


# transformers 5 has other names for it; peft uses those that 4.57 knows too.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

DINO, SIGLIP = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
UNUSED_7B = (f"{DINO}blocks.23.", f"{DINO}norm.", *(f"{SIGLIP}{part}." for part in ("blocks.26", "norm", "attn_pool")))
LAST_LAYER_7B = ("language_model.model.embed_tokens.", "language_model.model.layers.31.", "language_model.lm_head.")

SOURCES = {
    "policy": lambda: load_policy(TINY_POLICY, dtype=torch.float32)[0],
    "golden": lambda: load_golden(dtype=torch.float32),  # two towers, with parts that never run
}

PLAIN_AND_CHECKPOINTED = pytest.mark.parametrize(
    ("source", "checkpointing"),
    [("policy", False), ("policy", True), ("golden", True)],
    ids=["policy-plain", "policy-checkpointing", "golden-checkpointing"],
)


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.arange(1, 15)[None]
    labels = ids.clone()
    labels[:, :7] = -100
    side, channels = model.config.image_sizes[0], 3 * len(model.config.image_sizes)
    pixel_values = torch.randn(1, channels, side, side, generator=generator)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixel_values}


def names_with_gradient(model: nn.Module, batch: dict[str, torch.Tensor]) -> set[str]:
    """One real backward pass; the parameters to which a gradient came that is not 0."""
    model.train()(**batch).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.fixture
def openvla_7b() -> PreTrainedModel:
    """openvla-7b on the meta device, where it costs nothing."""
    with torch.device("meta"):
        return repository_class("OpenVLAForActionPrediction")(repository_class("OpenVLAConfig")())


@pytest.fixture(scope="module")
def weights() -> dict[str, list[int]]:
    return json.loads((FIXTURES / "openvla_7b_weight_shapes.json").read_text())


class TestModes:
    # 13,122,816 parameters of DINOv2 and 29,957,664 of SigLIP never run.
    @pytest.mark.parametrize(
        ("mode", "count", "parts"),
        [
            ("full", 7_498_156_704, ("vision_backbone.", "projector.", "language_model.")),
            ("frozen_vision", 6_810_325_504, ("projector.", "language_model.")),
            ("last_layer", 465_051_648, LAST_LAYER_7B),
            ("sandwich", 1_224_268_448, ("vision_backbone.", "projector.", *LAST_LAYER_7B)),
        ],
    )
    def test_openvla_7b(self, openvla_7b, weights, mode, count, parts):
        expected = {name for name in weights if name.startswith(parts) and not name.startswith(UNUSED_7B)}
        assert select_trainable(openvla_7b, mode) is openvla_7b
        assert trainable_names(openvla_7b) == expected
        assert sum(np.prod(weights[name]) for name in expected) == count

    @PLAIN_AND_CHECKPOINTED
    @pytest.mark.parametrize("mode", MODES[:-1])
    def test_gradients(self, source, mode, checkpointing):
        model = select_trainable(SOURCES[source](), mode)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=GRADIENT_CHECKPOINTING_KWARGS)
        trainable = trainable_names(model)
        assert trainable
        assert names_with_gradient(model, batch_for(model)) == trainable

    @pytest.mark.parametrize("mode", MODES)
    def test_heads_learn_in_every_mode(self, policy, mode):
        model, _ = policy
        model.action_head = nn.Linear(4, 7)
        select_trainable(model, mode)
        assert {"action_head.weight", "action_head.bias"} <= trainable_names(model)
        if mode == "head_only":
            assert len(trainable_names(model)) == 2

    def test_film_learns_in_every_mode(self):
        model = load_golden(dtype=torch.float32, use_film=True, attention_mode="bidirectional")
        expected = {name for name in trainable_names(model) if ".film." in name}
        assert expected
        for mode in MODES:
            learned = trainable_names(select_trainable(model, mode))
            assert expected <= learned
            if mode == "head_only":
                assert learned == expected

    def test_the_last_mode_counts(self, policy):
        model, _ = policy
        expected = trainable_names(select_trainable(model, "last_layer"))
        for mode in MODES[:-1]:
            select_trainable(model, mode)
        assert trainable_names(select_trainable(model, "last_layer")) == expected

    def test_head_only_without_a_head(self, policy):
        model, _ = policy
        before = trainable_names(model)
        with pytest.raises(ValueError, match=r"'head_only' trains .* this one has nothing.*'sandwich'"):
            select_trainable(model, "head_only")
        assert trainable_names(model) == before

    def test_unknown_mode(self, policy):
        model, _ = policy
        with pytest.raises(ValueError, match=r"mode='lora'.*'full', 'frozen_vision', 'last_layer'"):
            select_trainable(model, "lora")


class TestLora:
    @staticmethod
    def adapt(model: PreTrainedModel, **kwargs) -> PeftModel:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*exclude_modules.*")
            on_meta = model.device.type == "meta"
            return get_peft_model(model, lora_config(model, **kwargs), low_cpu_mem_usage=on_meta)

    @staticmethod
    def adapted_layers(model: PeftModel) -> set[str]:
        return {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in trainable_names(model)}

    # Beside the published set: the head 1,157,120, patch convolutions 107,264, and what never runs, DINOv2's last
    # block 524,288, SigLIP's 570,368 and its pooling head 607,232.
    @pytest.mark.parametrize(
        ("targets", "count"),
        [
            ("published", 110_828_288),
            ("all-linear", 110_828_288 - 1_157_120 - 107_264 - 524_288 - 570_368 - 607_232),
            (PUBLISHED_TARGETS[:7], 79_953_920),
            (["lm_head"], 1_157_120),
            (["patch_embed.proj"], 107_264),
            (["fc3"], 262_144),
        ],
    )
    def test_openvla_7b(self, openvla_7b, targets, count):
        # PEFT's own count: for the published set, what vla-scripts/finetune.py prints.
        assert self.adapt(openvla_7b, target_modules=targets).get_nb_trainable_parameters() == (
            count,
            7_541_237_184 + count,
        )

    def test_all_linear_is_what_runs(self, openvla_7b, weights):
        adapted = self.adapted_layers(self.adapt(openvla_7b))
        assert adapted == {
            name.removesuffix(".weight")
            for name, shape in weights.items()
            if len(shape) == 2
            and name.endswith(".weight")
            and not name.startswith(UNUSED_7B)
            and "embed_tokens" not in name
            and "lm_head" not in name
        }

    def test_published_is_by_name(self, openvla_7b, weights):
        adapted = self.adapted_layers(self.adapt(openvla_7b, target_modules="published"))
        modules = {name.removesuffix(".weight") for name, shape in weights.items() if len(shape) > 1}
        assert adapted == {name for name in modules if name.rpartition(".")[2] in PUBLISHED_TARGETS}

    def test_as_published(self, openvla_7b):
        config = lora_config(openvla_7b, target_modules="published")
        assert (config.r, config.lora_alpha, config.lora_dropout, config.init_lora_weights) == (
            32,
            16,
            0.0,
            "gaussian",
        )
        assert config.target_modules == set(PUBLISHED_TARGETS)
        assert config.exclude_modules is None

    @PLAIN_AND_CHECKPOINTED
    @pytest.mark.parametrize("targets", ["all-linear", "published", ["q_proj", "qkv", "embed_tokens"]])
    def test_gradients(self, source, targets, checkpointing):
        model = SOURCES[source]()
        unused = tuple(f"base_model.model.{name}.lora_" for name in model.unused_linear_names())
        model = self.adapt(model, r=4, target_modules=targets)
        set_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # a side that starts at 0 leaves the other without a gradient
                nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=GRADIENT_CHECKPOINTING_KWARGS)
        trainable = trainable_names(model)
        assert all("lora_" in name for name in trainable)
        if targets == "published":
            assert any(name.startswith(unused) for name in trainable) == (source == "golden")
            trainable = {name for name in trainable if not name.startswith(unused)}
        assert names_with_gradient(model, batch_for(model)) == trainable

    def test_heads_are_not_adapted(self, policy):
        model, _ = policy
        expected = self.adapted_layers(self.adapt(load_policy(TINY_POLICY, dtype=torch.float32)[0]))
        model.action_head = nn.Sequential(OrderedDict({"fc1": nn.Linear(4, 7), "out": nn.Linear(7, 7)}))
        adapted = self.adapt(model)
        head = {f"{layer}.{kind}" for layer in ("fc1", "out") for kind in ("weight", "bias")}
        expected |= {f"action_head.modules_to_save.default.{name}" for name in head}
        assert self.adapted_layers(adapted) == expected

    @pytest.mark.parametrize("targets", ["all-linear", "published", ["fc1", "q_proj"]])
    def test_what_lies_beside_the_adapters(self, targets):
        """Heads, projectors and FiLM learn whole, in float32; FiLM in blocks that never run does not."""
        changes = {"head_type": "flow", "attention_mode": "bidirectional", "action_dim": 7, "use_film": True}
        model = load_golden(dtype=torch.bfloat16, use_proprio=True, proprio_dim=8, norm_stats={}, **changes)
        heads = ["proprio_projector", "noisy_action_projector", "action_head"]
        films = [name for name, _ in model.named_modules() if name.endswith(".film")]
        assert sorted(added_modules(model)) == sorted([*heads, *films])
        unused = {id(module) for part in model.unused_modules() for module in part.modules()}
        learning = {*heads, *(name for name in films if id(model.get_submodule(name)) not in unused)}
        assert len(learning) < len(heads) + len(films)
        adapted = add_lora(model, lora_config(model, r=2, target_modules=targets))
        whole = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
        names = {name.removeprefix("base_model.model.").partition(".modules_to_save.")[0] for name in whole}
        assert names == learning
        assert {parameter.dtype for parameter in whole.values()} == {torch.float32}
        assert not [name for name, _ in adapted.named_parameters() if "lora_" in name and "modules_to_save" in name]

    def test_further_arguments(self, policy):
        config = lora_config(policy[0], r=8, alpha=4, dropout=0.1, use_rslora=True, modules_to_save=["projector"])
        assert isinstance(config, LoraConfig)
        assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (8, 4, 0.1, True)
        assert (config.modules_to_save, config.task_type) == (["projector"], peft.TaskType.CAUSAL_LM)

    @pytest.mark.parametrize(
        ("targets", "pattern"),
        [
            (["q_porj", "qkv"], r"got \['q_porj'\]\. There are q_proj, .*down_proj"),
            ("all_linear", r"be 'all-linear' or 'published'; got \['all_linear'\]"),
            ([], r"got \[\]"),
            (["attn_pool.kv"], r"name layers that run.*got \['attn_pool\.kv'\]"),
            (["proj", "norm1"], r"got \['norm1'\]"),
        ],
    )
    def test_unknown_targets(self, golden_model, targets, pattern):
        with pytest.raises(ValueError, match=pattern):
            lora_config(golden_model, target_modules=targets)


@pytest.fixture(scope="module")
def quantizable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy whose widths bitsandbytes can repack: 64n inputs and 32n outputs."""
    config_class = repository_class("OpenVLAConfig")
    fields = config_class.from_pretrained(TINY_POLICY).to_dict()
    fields["text_config"] |= {
        **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32},
    }
    fields |= {"use_fused_vision_backbone": None, "arch_specifier": None}
    set_seed(0)
    model = repository_class("OpenVLAForActionPrediction")(config_class(**fields))
    directory = tmp_path_factory.mktemp("policy_to_quantize")
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def load_quantized(quantizable: Path) -> Callable[..., PreTrainedModel]:
    def load(dtype: torch.dtype = torch.bfloat16, **kwargs) -> PreTrainedModel:
        model_class = repository_class("OpenVLAForActionPrediction")
        config = quantization_config(**(kwargs or {"load_in_4bit": True}))
        return model_class.from_pretrained(quantizable, dtype=dtype, quantization_config=config)

    return load


@torch.no_grad()
def predict(model: nn.Module) -> None:
    """The least that makes bitsandbytes repack: each layer runs once in evaluation mode."""
    model.eval()(input_ids=torch.arange(1, 4)[None])


def repacks(model: nn.Module) -> bool:
    """Whether this machine's bitsandbytes repacks 4-bit weights at all."""
    states = [getattr(parameter, "quant_state", None) for parameter in model.parameters()]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


def pretend_repacked(model: nn.Module) -> str:
    """Mark a 4-bit weight as bitsandbytes does; its name."""
    name, parameter = next((n, p) for n, p in model.named_parameters() if hasattr(p, "quant_state"))
    parameter.quant_state.packing_format_for_cpu = True
    return name


class TestQuantized:
    @pytest.mark.parametrize("nested", [False, True])
    def test_4_bits(self, nested):
        config = quantization_config(load_in_4bit=True, use_bnb_nested_quant=nested)
        assert config.load_in_4bit
        assert not config.load_in_8bit
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
        assert config.bnb_4bit_use_double_quant is nested

    def test_8_bits_and_none(self):
        config = quantization_config(load_in_8bit=True)
        assert (config.load_in_4bit, config.load_in_8bit) == (False, True)
        assert quantization_config() is None

    def test_contradictions(self):
        with pytest.raises(ValueError, match="exclude each other"):
            quantization_config(load_in_4bit=True, load_in_8bit=True)
        with pytest.raises(ValueError, match="'nf4' or 'fp4', got 'int4'"):
            quantization_config(load_in_4bit=True, bnb_4bit_quant_type="int4")

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
    @pytest.mark.parametrize(
        "quantization",
        [{"load_in_4bit": True}, {"load_in_4bit": True, "use_bnb_nested_quant": True}, {"load_in_8bit": True}],
        ids=["nf4", "nf4_nested", "int8"],
    )
    def test_gradients_and_precision(self, load_quantized, quantization, checkpointing):
        model = prepare_quantized(load_quantized(**quantization))
        unquantized = ("vision_backbone.", "projector.", "language_model.lm_head", "language_model.model.norm")
        kept = [p.dtype for name, p in model.named_parameters() if name.startswith(unquantized)]
        assert set(kept) == {torch.bfloat16}
        set_seed(0)
        model = get_peft_model(model, lora_config(model, r=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=GRADIENT_CHECKPOINTING_KWARGS)
        trainable = trainable_names(model)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert names_with_gradient(model, batch_for(model)) == trainable

    def test_steps_lower_the_loss(self, load_quantized):
        model = prepare_quantized(load_quantized())
        set_seed(0)
        model = get_peft_model(model, lora_config(model, r=4, alpha=8)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        batch, losses = batch_for(model), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        # Measured: from 7.0 to 6.2.
        assert losses[-1] < losses[0] - 0.5

    @pytest.mark.parametrize("nested", [False, True], ids=["nf4", "nf4_nested"])
    def test_a_prediction_between_two_steps_changes_no_gradient(self, load_quantized, nested):
        model = prepare_quantized(load_quantized(load_in_4bit=True, use_bnb_nested_quant=nested))
        set_seed(0)
        model = get_peft_model(model, lora_config(model, r=4))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        batch, gradients = batch_for(model), []
        for _ in range(2):
            names_with_gradient(model, batch)
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
            predict(model)
            check_not_repacked(model)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)

    @pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered")
    def test_without_preparation_a_prediction_loses_gradients(self, load_quantized):
        """What the guard is for; should bitsandbytes mend it, this test says so."""
        model = load_quantized()
        predict(model)
        if not repacks(model):
            pytest.skip("bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 alone")
        hidden = torch.randn(3, 128, dtype=torch.bfloat16, requires_grad=True)
        model.train().get_decoder().layers[0].self_attn.q_proj(hidden).sum().backward()
        assert hidden.grad is None
        with pytest.raises(ValueError, match="load the model again"):
            prepare_quantized(model)

    def test_repacked_weights_are_refused(self, load_quantized):
        model = load_quantized()
        check_not_repacked(model)
        name = pretend_repacked(model)
        for refuse in (check_not_repacked, prepare_quantized):
            with pytest.raises(ValueError, match=rf"repacked 1 4-bit weights.*{name}.*load the model again"):
                refuse(model)

    @pytest.mark.parametrize("quantization", ["load_in_4bit", "load_in_8bit"])
    def test_float16_is_refused(self, load_quantized, quantization):
        with pytest.raises(ValueError, match=r"are float16.*dtype=torch\.bfloat16"):
            prepare_quantized(load_quantized(torch.float16, **{quantization: True}))

    def test_a_full_model_is_refused(self, policy):
        with pytest.raises(ValueError, match="not quantised"):
            prepare_quantized(policy[0])

    @pytest.mark.parametrize("quantization", ["load_in_4bit", "load_in_8bit"])
    def test_weights_in_few_bits_are_not_trained_themselves(self, load_quantized, quantization):
        with pytest.raises(ValueError, match="those of this model are quantised: train LoRA"):
            select_trainable(load_quantized(**{quantization: True}), "last_layer")
