# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Chunks of actions in one pass: heads, attention, images, state and FiLM, on small policies of every kind."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import PROCESSOR_FIELDS, load_policy, repository_class
from PIL import Image
from transformers import AttentionInterface, Trainer, TrainingArguments
from transformers.masking_utils import AttentionMaskInterface


KEY = "tabletop"
STATE_DIM, CHUNK = 5, 3
BASE = {"attention_mode": "bidirectional", "chunk_size": CHUNK, "action_dim": 7, "num_images": 2}
BASE |= {"use_proprio": True, "proprio_dim": STATE_DIM}
KINDS = {
    "tokens": BASE | {"head_type": "tokens"},
    "l1": BASE | {"head_type": "l1"},
    "diffusion": BASE | {"head_type": "diffusion", "num_inference_steps": 4},
    "flow": BASE | {"head_type": "flow", "num_inference_steps": 4},
    "film": BASE | {"head_type": "l1", "use_film": True},
}
CAUSAL = {"chunk_size": 2, "num_images": 2, "use_proprio": True, "proprio_dim": STATE_DIM}
TOWER = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "image_size": 28, "final_norm": False}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1088, "pad_token_id": 1024}


def statistics() -> dict:
    spread = {"mean": [0.0] * STATE_DIM, "std": [1.0] * STATE_DIM}
    low, high = [-2.0, -1.0, 0.0, 0.0, 3.0], [2.0, 1.0, 4.0, 8.0, 3.0]
    proprio = spread | {"min": low, "max": high, "q01": low, "q99": high}
    action = json.loads((TINY_POLICY / "dataset_statistics.json").read_text())[KEY]["action"]
    return {KEY: {"action": action, "proprio": proprio}}


def make_config(**overrides):
    settings = json.loads((TINY_POLICY / "config.json").read_text())
    names = ("action_token_end", "closing_token_id", "pad_token_id")
    return repository_class("OpenVLAConfig")(
        llm_backbone_id=None,
        vision_backbone_id=None,
        tower_configs=[TOWER | {"output_block": 0}, TOWER],
        **{
            "text_config": TEXT | {"model_type": "llama"},
            "norm_stats": statistics(),
            **{name: settings[name] for name in names},
            **overrides,
        },
    )


def make_policy(**overrides):
    """A policy with large random weights, which depends on all that it sees, and its processor."""
    torch.manual_seed(0)
    config = make_config(**overrides)
    model = repository_class("OpenVLAForActionPrediction")(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else parameter[0].numel() ** -0.5)
    processor = repository_class("OpenVLAProcessor").from_pretrained(
        TINY_POLICY, input_sizes=[[3, 28, 28]] * 2, **{name: getattr(config, name) for name in PROCESSOR_FIELDS}
    )
    processor.norm_stats = config.norm_stats
    return model, processor


def noise_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8))


INSTRUCTIONS = ["pick up the cube", "put the blue cylinder into the bowl on the left", "push it"]
IMAGES = [[noise_image(2 * row), noise_image(2 * row + 1)] for row in range(3)]
STATES = np.random.default_rng(1).uniform(-1, 1, (3, STATE_DIM))
ACTIONS = np.random.default_rng(2).uniform(-0.9, 0.9, (3, CHUNK, 7))


def observations(processor, rows=slice(None), **kwargs):
    return processor(instruction=INSTRUCTIONS[rows], images=IMAGES[rows], state=STATES[rows], **kwargs)


def noise_for(model, rows: int) -> dict[str, torch.Tensor]:
    """What a prediction begins with, the same for a row whatever its batch."""
    if not model.config.is_denoising:
        return {}
    return {"noise": torch.randn(3, CHUNK, 7, generator=torch.Generator().manual_seed(7))[:rows]}


@pytest.fixture(scope="module")
def policies():
    made = {}

    def get(kind: str):
        if kind not in made:
            made[kind] = make_policy(**(CAUSAL if kind == "causal" else KINDS[kind]))
        return made[kind]

    return get


class TestConfiguration:
    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"head_type": "fast"}, "`head_type=.fast.` shortens chunks along time, and `chunk_size` is 1"),
            ({"head_type": "l2"}, "`head_type` must be .tokens., .fast. or one of .*, got 'l2'"),
            ({"attention_mode": "full"}, "`attention_mode` must be 'causal' or 'bidirectional', got 'full'"),
            ({"chunk_size": 0}, "`chunk_size` must be a positive integer, got 0"),
            ({"num_images": 1.5}, "`num_images` must be a positive integer, got 1.5"),
            ({"action_dim": -1}, "`action_dim` must be a positive integer"),
            ({"head_type": "l1", "attention_mode": "bidirectional"}, "`head_type='l1'` needs `action_dim`"),
            ({"head_type": "l1", "action_dim": 7}, "set `attention_mode='bidirectional'`"),
            ({"use_film": True}, "`use_film=True` averages the instruction and the stop token"),
            ({"append_stop_token": False}, "`append_stop_token=False` means nothing"),
            ({"use_proprio": True}, "`use_proprio=True` and `proprio_dim` go together"),
            ({"proprio_dim": 8}, "`use_proprio=True` and `proprio_dim` go together"),
            ({"num_inference_steps": 5}, "is for the 'diffusion' and 'flow' heads, not 'tokens'"),
            (KINDS["diffusion"] | {"num_inference_steps": 51}, "51 exceeds the 50 noise levels"),
            (
                {"use_proprio": True, "proprio_dim": 2, "norm_stats": {"a": {"action": {"q01": [0], "q99": [1]}}}},
                r"needs `proprio` statistics, and those of \['a'\] have none",
            ),
            (
                {"use_proprio": True, "proprio_dim": 2, "norm_stats": statistics()},
                r"`proprio_dim` is 2, and the states of \['tabletop'\] have \[5\]",
            ),
            (
                KINDS["l1"] | {"action_dim": 14, "norm_stats": statistics()},
                r"`action_dim` is 14, and the actions of \['tabletop'\] have \[7\]",
            ),
            (
                {"norm_type": "bounds", "norm_stats": {"a": {"action": {"q01": [0], "q99": [1]}}}},
                r"scales by \('min', 'max'\), which no statistics of \['a'\] hold",
            ),
            (BASE | {"text_config": TEXT | {"model_type": "llama", "eos_token_id": [2, 3]}}, "one `eos_token_id`"),
        ],
    )
    def test_refused(self, overrides, message):
        arguments = {"llm_backbone_id": None, "closing_token_id": None, "text_config": TEXT, "action_token_end": 1024}
        with pytest.raises(ValueError, match=message):
            repository_class("OpenVLAConfig")(**{**arguments, **overrides})

    def test_it_is_saved_and_read(self, tmp_path):
        make_config(**KINDS["diffusion"]).save_pretrained(tmp_path)
        config = repository_class("OpenVLAConfig").from_pretrained(tmp_path)
        assert {name: getattr(config, name) for name in KINDS["diffusion"]} == KINDS["diffusion"]

    def test_defaults_are_the_published_policy(self):
        config = repository_class("OpenVLAConfig")()
        assert (config.head_type, config.attention_mode, config.chunk_size) == ("tokens", "causal", 1)
        assert config.num_image_tokens == 256


class TestPrediction:
    @pytest.mark.parametrize("kind", KINDS)
    def test_rows_act_as_they_do_alone(self, policies, kind):
        model, processor = policies(kind)
        batch = model.predict_action(**observations(processor), **noise_for(model, 3))
        assert batch.shape == (3, CHUNK, 7)
        assert batch.dtype == np.float64
        single = model.predict_action(**observations(processor, slice(1)), **noise_for(model, 1))
        assert single.shape == (CHUNK, 7)
        np.testing.assert_allclose(single, batch[0], atol=1e-4)

    @pytest.mark.parametrize("kind", [*KINDS, "causal"])
    def test_everything_is_seen(self, policies, kind):
        """Each image, the state and the instruction change the actions."""
        model, processor = policies(kind)
        given = {"instruction": INSTRUCTIONS[0], "images": IMAGES[0], "state": STATES[0]}
        changes = {
            "first image": {"images": [IMAGES[1][0], IMAGES[0][1]]},
            "second image": {"images": [IMAGES[0][0], IMAGES[1][1]]},
            "state": {"state": STATES[1]},
            "instruction": {"instruction": INSTRUCTIONS[1]},
        }
        noise = noise_for(model, 1)

        def output(**changed):
            result = model.predict_action(**processor(**given | changed), **noise, return_dict=True)
            return result.normalized_actions if result.probabilities is None else result.probabilities.numpy()

        reference = output()
        for name, change in changes.items():
            assert np.abs(output(**change) - reference).max() > 1e-4, name

    def test_probabilities_of_tokens_alone(self, policies):
        model, processor = policies("tokens")
        output = model.predict_action(**observations(processor), return_dict=True)
        assert output.token_ids.shape == (3, CHUNK * 7)
        assert output.probabilities.shape == (3, CHUNK * 7, 256)
        np.testing.assert_allclose(processor.decode_actions(output.token_ids), output.actions)
        model, processor = policies("l1")
        output = model.predict_action(**observations(processor), return_dict=True)
        assert output.probabilities is None
        assert output.actions.shape == (3, CHUNK, 7)

    def test_causal_chunks(self, policies):
        """Two actions, one token after the other, are what `generate` gives."""
        model, processor = policies("causal")
        inputs = observations(processor, slice(1))
        output = model.predict_action(**inputs, return_dict=True)
        assert output.actions.shape == (2, 7)
        ids = torch.cat([inputs["input_ids"], output.token_ids], dim=1)
        with torch.no_grad():
            logits = model(input_ids=ids, **{k: inputs[k] for k in ("pixel_values", "proprio")}).logits
        best = logits[0, -15:-1, 768:1024].argmax(dim=-1) + 768
        assert best.tolist() == output.token_ids[0].tolist()
        new = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
        assert new == logits[0, -15].index_fill(0, torch.tensor(model.config.image_token_id), -1e9).argmax()

    def test_single_actions_have_no_axis_of_time(self):
        model, processor = make_policy(**BASE | {"head_type": "l1", "chunk_size": 1})
        assert model.predict_action(**observations(processor)).shape == (3, 7)
        assert model.predict_action(**observations(processor, slice(1))).shape == (7,)

    def test_noise_is_drawn_by_the_generator(self, policies):
        model, processor = policies("flow")
        inputs = observations(processor, slice(1))
        draws = [
            model.predict_action(**inputs, generator=torch.Generator().manual_seed(seed), num_inference_steps=steps)
            for seed, steps in ((0, 2), (0, 2), (1, 2), (0, 3))
        ]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert not np.allclose(draws[0], draws[2])
        assert not np.allclose(draws[0], draws[3])

    @pytest.mark.parametrize(
        "kind, changes, message",
        [
            ("l1", {"proprio": None}, "needs `proprio`: pass `state=`"),
            ("l1", {"proprio": torch.zeros(1, 4)}, r"`proprio` must be of shape \(1, 5\), got \(1, 4\)"),
            ("l1", {"proprio": torch.full((1, 5), torch.nan)}, "`proprio` hold NaN"),
            ("l1", {"pixel_values": torch.zeros(1, 6, 28, 28)}, r"\(batch, 12, 28, 28\), got .* looks at 2 image"),
            ("l1", {"noise": torch.zeros(1, 3, 7)}, "mean nothing to a 'l1' head"),
            ("tokens", {"noise": torch.zeros(1, 3, 7)}, "mean nothing to a 'tokens' head"),
            ("causal", {"num_inference_steps": 5}, "mean nothing to a 'tokens' head"),
            ("l1", {"do_sample": True}, "`do_sample` draws tokens, and a 'l1' head speaks of none"),
            ("flow", {"num_inference_steps": 0}, "at least one step, got 0"),
            ("diffusion", {"noise": torch.zeros(1, 2, 7)}, r"`noise` must be of shape \(1, 3, 7\)"),
            ("diffusion", {"num_inference_steps": 51}, "takes 1 to 50 steps, got 51"),
        ],
    )
    def test_refused(self, policies, kind, changes, message):
        model, processor = policies(kind)
        with pytest.raises(ValueError, match=message):
            model.predict_action(**{**observations(processor, slice(1)), **changes})

    def test_statistics_of_another_robot(self, policies):
        model, processor = make_policy(**KINDS["l1"])
        inputs = observations(processor, slice(1))
        six = {"arm": {"action": {"q01": [0.0] * 6, "q99": [1.0] * 6}}}
        before = model.norm_stats
        with pytest.raises(ValueError, match=r"`action_dim` is 7, and the actions of \['arm'\] have \[6\]"):
            model.norm_stats = six
        assert model.norm_stats == before
        model.config.norm_stats = six
        with pytest.raises(ValueError, match=r"actions are of 7 numbers \(`action_dim`\), the statistics of 6"):
            model.predict_action(**inputs)

    def test_infinite_actions(self):
        model, processor = make_policy(**KINDS["l1"])
        torch.nn.init.constant_(model.action_head.model.fc2.bias, float("inf"))
        with pytest.raises(FloatingPointError, match="actions are NaN or infinite"):
            model.predict_action(**observations(processor))

    def test_no_generation(self, policies):
        model, processor = policies("tokens")
        with pytest.raises(ValueError, match="use `predict_action`"):
            model.generate(**observations(processor))


def silently_causal(module, query, key, value, attention_mask, **kwargs):
    """An implementation of attention that looks at neither the mask nor `is_causal`."""
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attended.transpose(1, 2).contiguous(), None


def sees_padding(module, query, key, value, attention_mask, **kwargs):
    attended = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return attended.transpose(1, 2).contiguous(), None


def causal_without_a_mask(module, query, key, value, attention_mask, **kwargs):
    """As a flash kernel that does not follow `is_causal`: single prompts come without a mask."""
    attend = torch.nn.functional.scaled_dot_product_attention
    mask = None if attention_mask is None else attention_mask[:, None, None].bool()
    attended = attend(query, key, value, attn_mask=mask, is_causal=mask is None)
    return attended.transpose(1, 2).contiguous(), None


class TestAttention:
    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("kind", ["tokens", "causal"])
    def test_it_is_what_the_configuration_says(self, policies, kind, implementation):
        model, _ = policies(kind)
        model.set_attn_implementation(implementation)
        try:
            model.check_attention()
        finally:
            model.set_attn_implementation("sdpa")

    @pytest.mark.parametrize("broken", [silently_causal, sees_padding])
    def test_a_broken_mask_raises_before_the_first_action(self, broken):
        AttentionInterface.register(broken.__name__, broken)
        model, processor = make_policy(**KINDS["l1"])
        inputs = observations(processor)
        good = model.predict_action(**inputs)
        model.set_attn_implementation(broken.__name__)
        with pytest.raises(RuntimeError, match="attention is not bidirectional, as the configuration says"):
            model.predict_action(**inputs)
        model.set_attn_implementation("sdpa")
        np.testing.assert_array_equal(model.predict_action(**inputs), good)

    def test_it_is_checked_once(self):
        model, processor = make_policy(**KINDS["l1"])
        inputs = observations(processor, slice(1))
        calls = []
        model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
        for _ in range(3):
            model.predict_action(**inputs)
        assert len(calls) == 2 + 3

    def test_single_prompts_are_checked_too(self):
        """The mask goes through the library as it does for the flash kernels, which know padding alone."""
        AttentionInterface.register("flash_stand_in", causal_without_a_mask)
        AttentionMaskInterface.register("flash_stand_in", lambda *args, attention_mask=None, **kwargs: attention_mask)
        model, processor = make_policy(**KINDS["l1"])
        model.language_model.config._attn_implementation = (
            "flash_stand_in"  # by itself, the library looks for a kernel
        )
        with pytest.raises(RuntimeError, match="attention is not bidirectional, as the configuration says"):
            model.predict_action(**observations(processor, slice(1)))

    @pytest.mark.parametrize("kind", ["tokens", "flow"])
    def test_implementations_agree(self, policies, kind):
        model, processor = policies(kind)
        inputs, actions = observations(processor), []
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            actions.append(model.predict_action(**inputs, **noise_for(model, 3)))
        model.set_attn_implementation("sdpa")
        np.testing.assert_allclose(*actions, atol=1e-4)

    def test_flash_attention_is_told_about_padding_alone(self):
        """Its kernels need a GPU; what they are given does not."""
        decoding = sys.modules[type(make_policy(**KINDS["l1"])[0]).__module__.replace("modeling", "decoding")]
        mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        arguments = decoding.bidirectional_arguments(mask, torch.bfloat16, "flash_attention_2")
        assert arguments["is_causal"] is False
        assert torch.equal(arguments["attention_mask"], mask)
        assert decoding.bidirectional_arguments(mask[1:], torch.bfloat16, "flash_attention_2") == {
            "attention_mask": None,
            "is_causal": False,
        }


class TestHeads:
    def test_diffusion_steps_lead_to_the_actions(self, policies):
        """With the true noise as prediction every number of steps ends at the actions."""
        head = policies("diffusion")[0].action_head
        actions, noise = torch.from_numpy(ACTIONS).float(), torch.randn(3, CHUNK, 7)
        for steps in (1, 7, 50):
            schedule = head.schedule(steps)
            assert len(schedule) == steps
            sample, _ = head.corrupt(actions, noise, torch.full((3,), schedule[0][0]))
            for time, next_time in schedule:
                sample = head.step(noise, sample, time, next_time)
            torch.testing.assert_close(sample, actions, atol=2e-3, rtol=0)

    def test_flow_leads_to_the_actions(self, policies):
        head = policies("flow")[0].action_head
        actions, noise = torch.from_numpy(ACTIONS).float(), torch.randn(3, CHUNK, 7)
        for steps in (1, 7):
            sample = noise
            for time, next_time in head.schedule(steps):
                noisy, velocity = head.corrupt(actions, noise, torch.full((3,), time))
                torch.testing.assert_close(sample, noisy, atol=1e-5, rtol=0)
                sample = head.step(velocity, sample, time, next_time)
            torch.testing.assert_close(sample, actions, atol=1e-5, rtol=0)

    def test_fresh_film_changes_nothing(self):
        torch.manual_seed(0)
        model = repository_class("OpenVLAForActionPrediction")(make_config(**KINDS["film"]))
        pixels, block = torch.randn(2, 12, 28, 28), model.vision_backbone.featurizer.blocks[0]
        modulated = model.get_image_features(pixels, torch.randn(2, 32))
        block.film = None
        for block in [*model.vision_backbone.featurizer.blocks, *model.vision_backbone.fused_featurizer.blocks]:
            block.film = None
        torch.testing.assert_close(modulated, model.projector(model.vision_backbone(pixels)))
        with pytest.raises(ValueError, match="the towers need `instruction`"):
            model.get_image_features(pixels)

    def test_film_in_float32_modulates_towers_in_16_bits(self):
        model, processor = make_policy(**KINDS["film"])
        batch = observations(processor, actions=ACTIONS)
        with torch.no_grad():
            expected = model(**batch).head_predictions
            model.bfloat16()
            for tower in model.vision_backbone.towers:
                for block in tower.blocks:
                    block.film.float()
            predictions = model(**batch).head_predictions
        assert predictions.dtype == torch.bfloat16
        assert (predictions - expected).abs().mean() < 0.1 * expected.abs().mean()

    def test_fresh_projectors_let_their_input_through(self):
        torch.manual_seed(0)
        model = repository_class("OpenVLAForActionPrediction")(make_config(**KINDS["flow"]))
        spread = model.noisy_action_projector(torch.tensor([[[-1.0], [1.0]]])).diff(dim=1).abs().mean()
        assert spread > 0.05


class TestTraining:
    @pytest.mark.parametrize("kind", [*KINDS, "causal"])
    def test_all_that_runs_learns(self, policies, kind):
        """Every parameter that asks for a gradient gets one."""
        model, processor = policies(kind)
        actions = ACTIONS[:, :2] if kind == "causal" else ACTIONS
        model.zero_grad()
        torch.manual_seed(0)
        output = model(**observations(processor, actions=actions))
        output.loss.backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        assert (output.head_predictions is not None) == model.config.is_continuous
        if model.config.is_continuous:
            assert output.head_predictions.shape == (3, CHUNK, 7)
        assert any("lm_head" in name for name in model.unused_linear_names()) == model.config.is_continuous

    @pytest.mark.parametrize("kind", ["tokens", "l1", "film"])
    def test_training_sees_what_prediction_sees(self, kind):
        """The forward pass of a training batch, whatever the actions in it, predicts what `predict_action` does."""
        model, processor = make_policy(**KINDS[kind])
        expected = model.predict_action(**observations(processor), return_dict=True).normalized_actions
        processor.tokenizer.padding_side = "right"
        processor._instruction_tokenizer.padding_side = "right"
        with torch.no_grad():
            output = model(**observations(processor, actions=ACTIONS))
        if kind == "tokens":
            best = output.logits[:, :-1, 768:1024].argmax(dim=-1) + 768
            predicted = model.codec.decode(best.numpy()).reshape(3, CHUNK, 7)
        else:
            predicted = output.head_predictions.numpy()
        np.testing.assert_allclose(predicted, expected, atol=1e-4)

    def test_padded_actions_do_not_count(self, policies):
        model, processor = policies("l1")
        batch = observations(processor, actions=ACTIONS)
        is_pad = torch.zeros(3, CHUNK, dtype=torch.bool)
        is_pad[:, 2] = True
        with torch.no_grad():
            predictions = model(**batch).head_predictions[:, :2]
            loss = model(**batch, action_is_pad=is_pad).loss
        assert loss.item() == pytest.approx((predictions - batch["actions"][:, :2]).abs().mean().item(), rel=1e-5)

    @pytest.mark.parametrize("kind", ["tokens", "causal"])
    def test_padded_tokens_do_not_count(self, policies, kind):
        """They keep their positions, and their logits are returned."""
        model, processor = policies(kind)
        size = model.config.chunk_size
        batch = observations(processor, actions=ACTIONS[:, :size])
        is_pad = torch.zeros(3, size, dtype=torch.bool)
        is_pad[0, -1] = True
        with torch.no_grad():
            whole = model(**batch)
            padded = model(**batch, action_is_pad=is_pad, num_items_in_batch=3 * (7 * size + 1) - 7)
            alone = model(**batch, action_is_pad=is_pad)
        labels = torch.stack([row[row != -100] for row in batch["labels"]])  # (B, K * D + 1)
        torch.testing.assert_close(padded.logits, whole.logits)
        losses = torch.nn.functional.cross_entropy(whole.logits.transpose(1, 2), labels, reduction="none")
        losses[0, 7 * (size - 1) : 7 * size] = 0.0
        expected = losses.sum() / (3 * (7 * size + 1) - 7)
        torch.testing.assert_close(padded.loss, expected)
        torch.testing.assert_close(alone.loss, expected)

    @pytest.mark.parametrize(
        "kind, changes, message",
        [
            ("tokens", {"action_is_pad": torch.zeros(3, 2, dtype=torch.bool)}, r"`action_is_pad` must be of shape"),
            ("l1", {"actions": None}, "learns from `actions` and `labels` together"),
            ("l1", {"actions": torch.zeros(3, 2, 7)}, r"`actions` must be of shape \(3, 3, 7\)"),
            ("flow", {"actions": None, "labels": None}, "needs `labels` and `actions`"),
            ("tokens", {"labels": torch.full((3, 4), -100)}, "differ in shape"),
        ],
    )
    def test_refused(self, policies, kind, changes, message):
        model, processor = policies(kind)
        with pytest.raises(ValueError, match=message):
            model(**{**observations(processor, actions=ACTIONS), **changes})

    def test_labels_of_another_chunk(self, policies):
        model, processor = policies("tokens")
        batch = observations(processor, slice(1), actions=ACTIONS[:1])
        batch["labels"][:, -8:-1] = -100
        with pytest.raises(ValueError, match=r"needs the action tokens of 3 action\(s\), got \[14\]"):
            model(**batch)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["l1", "flow"])
    def test_the_trainer_learns_a_chunk(self, tmp_path, kind):
        """With accumulated gradients the loss is that of the whole batch, and it falls."""
        model, processor = make_policy(**KINDS[kind])
        rows = [
            {
                name: value[0]
                for name, value in observations(processor, slice(row, row + 1), actions=ACTIONS[row]).items()
            }
            for row in (0, 0)
        ]
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=30,
            learning_rate=3e-3,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=1,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows * 30)
        with torch.no_grad():
            torch.manual_seed(0)
            alone = model(**{name: value[None] for name, value in rows[0].items()}).loss.item()
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if kind == "l1":
            assert losses[0] == pytest.approx(alone, rel=1e-3)
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


class TestProcessor:
    @pytest.fixture(scope="class")
    def processor(self):
        return make_policy(**KINDS["l1"])[1]

    def test_images_lie_behind_each_other(self, processor):
        """Third-person view first, in the channels as published: six per image for two towers."""
        both = processor(instruction=INSTRUCTIONS[:2], images=IMAGES[:2])["pixel_values"]
        assert both.shape == (2, 12, 28, 28)
        for row in range(2):
            for view in range(2):
                single = processor.image_processor(IMAGES[row][view])["pixel_values"][0]
                assert torch.equal(both[row, 6 * view : 6 * view + 6], single)
        flat = processor(instruction=INSTRUCTIONS[0], images=IMAGES[0])["pixel_values"]
        stacked = processor(instruction=INSTRUCTIONS[0], images=np.stack([np.asarray(i) for i in IMAGES[0]]))
        assert torch.equal(flat, both[:1])
        assert torch.equal(stacked["pixel_values"], both[:1])

    def test_state(self, processor):
        """By the `proprio` bounds, clipped; a number whose bounds coincide becomes 0."""
        proprio = processor(instruction="a", state=[1.0, 0.5, 1.0, 99.0, 2.7])["proprio"]
        assert proprio.dtype == torch.float32
        torch.testing.assert_close(proprio, torch.tensor([[0.5, 0.5, -0.5, 1.0, 0.0]]))
        assert processor.model_input_names[-1] == "proprio"

    def test_chunks(self, processor):
        batch = processor(instruction=INSTRUCTIONS, actions=ACTIONS)
        torch.testing.assert_close(batch["actions"], torch.from_numpy(ACTIONS).float())
        ids = batch["labels"][batch["labels"] != -100].view(3, -1)
        assert ids.shape == (3, CHUNK * 7 + 1)
        assert (ids[:, -1] == processor.tokenizer.eos_token_id).all()
        np.testing.assert_array_equal(ids[:, :-1].reshape(3, CHUNK, 7), processor.encode_actions(ACTIONS))
        single = processor(instruction=INSTRUCTIONS[0], actions=ACTIONS[0])["labels"]
        assert single[single != -100].tolist() == ids[0].tolist()
        decoded = processor.decode_actions(ids[:, :-1])
        assert decoded.shape == (3, CHUNK, 7)
        np.testing.assert_allclose(decoded, ACTIONS, atol=1 / 255)
        np.testing.assert_allclose(processor.decode_actions(ids[0, :-1]), decoded[0])

    def test_normalised_actions_get_their_units_back(self, processor):
        batch = observations(processor, actions=ACTIONS)
        statistics = processor.norm_stats[KEY]["action"]
        changes = np.array(statistics["max"]) > np.array(statistics["min"])
        actions = processor.unnormalize_actions(batch["actions"].numpy(), KEY)
        assert actions.dtype == np.float64
        np.testing.assert_allclose(actions[..., changes], ACTIONS[..., changes], atol=1e-6)

    def test_no_stop_token(self):
        _, processor = make_policy(**KINDS["tokens"] | {"append_stop_token": False})
        labels = processor(instruction=INSTRUCTIONS[0], actions=ACTIONS[0])["labels"]
        assert (labels != -100).sum() == CHUNK * 7
        assert "actions" not in processor(instruction=INSTRUCTIONS[0], actions=ACTIONS[0])

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"images": IMAGES[0][:1]}, r"looks at 2 image\(s\) per text \(`num_images`\), got 1"),
            ({"images": [IMAGES[0], IMAGES[1]]}, "1 texts and 2 images"),
            ({"state": np.zeros((2, STATE_DIM))}, r"`state` must be of shape \(P,\) or \(1, P\), got \(2, 5\)"),
            ({"state": [0, 0, 0, np.nan, 0]}, "`state` must be finite"),
            ({"state": np.zeros(4)}, "statistics are of 5 dimensions, and the values of 4"),
            ({"actions": ACTIONS[0, :2]}, "Chunks of 3 actions are learned, got 2"),
            ({"actions": ACTIONS[0, 0]}, r"shape \(K, D\) or \(B, K, D\), got \(7,\)"),
        ],
    )
    def test_refused(self, processor, arguments, message):
        with pytest.raises(ValueError, match=message):
            processor(instruction=INSTRUCTIONS[0], **arguments)

    def test_statistics_without_a_state(self):
        _, processor = make_policy(**KINDS["l1"])
        recorded = processor.norm_stats[KEY]
        never = dict.fromkeys(recorded["proprio"], [0.0] * STATE_DIM)
        processor.norm_stats = {KEY: recorded | {"proprio": never}}
        with pytest.raises(ValueError, match="`proprio` statistics never change in any number"):
            processor(instruction="a", state=STATES[0])
        processor.norm_stats = {KEY: {"action": recorded["action"]}}
        with pytest.raises(ValueError, match=r"hold no `proprio`, only \['action'\]"):
            processor(instruction="a", state=STATES[0])

    def test_a_state_that_nobody_takes(self):
        processor = repository_class("OpenVLAProcessor").from_pretrained(TINY_POLICY)
        with pytest.raises(ValueError, match="takes none"):
            processor(instruction="a", state=STATES[0])


PREDICT = """
import json, sys
import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto").eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
images = list(np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8))
inputs = processor(instruction="pick up the cube", images=images, state=[0.1, 0.2, 0.3, 0.4, 0.5])
print(json.dumps(model.predict_action(**inputs).tolist()))
"""


class TestSaving:
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, policies, tmp_path, kind):
        model, processor = policies(kind)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        again, loaded = load_policy(tmp_path)
        assert loaded.to_dict() == processor.to_dict()
        frozen = [{name for name, p in m.named_parameters() if not p.requires_grad} for m in (model, again)]
        assert frozen[0] == frozen[1]
        inputs = observations(loaded)
        np.testing.assert_array_equal(
            again.predict_action(**inputs, **noise_for(model, 3)),
            model.predict_action(**inputs, **noise_for(model, 3)),
        )

    @pytest.mark.slow
    def test_fresh_process_with_an_empty_cache(self, policies, tmp_path):
        model, processor = policies("film")
        directory, home = tmp_path / "policy", tmp_path / "home"
        home.mkdir()
        model.save_pretrained(directory)
        processor.save_pretrained(directory)
        assert (directory / "action_heads_openvla.py").is_file()
        result = subprocess.run(
            [sys.executable, "-c", PREDICT, directory],
            env={**os.environ, "HF_HOME": str(home)},
            cwd=home,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        images = list(np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8))
        inputs = processor(instruction="pick up the cube", images=images, state=[0.1, 0.2, 0.3, 0.4, 0.5])
        expected = model.predict_action(**inputs)
        # The first forward of a process may be off by 1e-4: see conftest.
        np.testing.assert_allclose(json.loads(result.stdout.splitlines()[-1]), expected, atol=1e-3)
