"""The model: what it looks at, what a batch means, what the loss costs, what it refuses."""

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY, load_golden
from load_policy import load_policy, repository_class
from PIL import Image
from torch import nn
from transformers import GenerationConfig


INSTRUCTIONS = ["pick up the cube", "put the blue cylinder in the bowl on the left side of the table", "push it"]


def count_calls(module: nn.Module) -> list[int]:
    """A list that grows by the batch size at every call of `module`."""
    calls: list[int] = []
    module.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    return calls


def towers_of(model) -> list[nn.Module]:
    backbone = model.vision_backbone
    return [backbone.featurizer, backbone.fused_featurizer]


def noise_image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))


@pytest.fixture
def sharp_policy(policy):
    """The tiny policy with large weights: probabilities far from uniform, which depend on image and text."""
    model, processor = policy
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5 * 1.5)
    return model, processor


@pytest.fixture
def batch(sharp_policy):
    _, processor = sharp_policy
    return processor(instruction=INSTRUCTIONS, images=[noise_image(seed) for seed in range(3)])


class TestImageIsSeen:
    """The published code, on current transformers, answers without looking."""

    def test_predict_action_runs_each_tower_once(self, sharp_policy, batch):
        model, _ = sharp_policy
        calls = [count_calls(tower) for tower in towers_of(model)]
        model.predict_action(**batch)
        assert calls == [[3], [3]]

    @pytest.mark.parametrize(
        "use_cache, implementation, expected",
        [(True, None, [1]), (True, "static", [1]), (False, None, [1] * 7)],
    )
    def test_generate_runs_each_tower_once_per_prefill(self, sharp_policy, use_cache, implementation, expected):
        model, processor = sharp_policy
        inputs = processor(instruction="pick up the cube", images=noise_image(0))
        calls = [count_calls(tower) for tower in towers_of(model)]
        settings = {"use_cache": use_cache, "cache_implementation": implementation}
        model.generate(**inputs, max_new_tokens=7, min_new_tokens=7, do_sample=False, **settings)
        assert calls == [expected, expected]

    def test_black_and_white_differ(self, sharp_policy):
        model, processor = sharp_policy
        images = [Image.new("RGB", (80, 60), color) for color in ("black", "white")]
        inputs = processor(instruction=["pick up the cube"] * 2, images=images)
        with torch.no_grad():
            black, white = model(**inputs).logits[:, -1]
        assert (black - white).abs().max() > 0.1
        output = model.predict_action(**inputs, return_dict=True)
        assert (output.probabilities[0] - output.probabilities[1]).abs().max() > 0.01
        sequences = model.generate(**inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        black, white = sequences.logits[0]
        assert (black - white).abs().max() > 0.1

    def test_all_ways_to_decode_agree(self, sharp_policy, batch):
        model, _ = sharp_policy
        action_ids = list(range(model.config.action_token_begin, model.config.action_token_end))
        tokens = model.predict_action(**batch, return_dict=True).token_ids
        for implementation in (None, "static"):
            generated = model.generate(
                **batch,
                max_new_tokens=7,
                do_sample=False,
                prefix_allowed_tokens_fn=lambda *_: action_ids,
                cache_implementation=implementation,
            )
            assert torch.equal(generated[:, -7:], tokens)
        for row in range(3):
            mask = batch["attention_mask"][row].bool()
            ids = torch.cat([batch["input_ids"][row][mask], tokens[row]])[None]
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=batch["pixel_values"][row : row + 1]).logits[0, -8:-1]
            assert (logits[:, action_ids].argmax(dim=-1) + action_ids[0]).tolist() == tokens[row].tolist()

    def test_only_used_blocks_run(self):
        model = load_golden(dtype=torch.float32)
        calls = [[count_calls(block) for block in tower.blocks] for tower in towers_of(model)]
        unused = [count_calls(module) for tower in towers_of(model) for module in (tower.norm, tower.attn_pool)]
        model.get_image_features(torch.zeros(1, 6, 224, 224))
        assert calls == [[[1], [1], []], [[1], [1], []]]
        assert unused == [[], [], [], []]
        for tower in towers_of(model):
            frozen = {name for name, parameter in tower.named_parameters() if not parameter.requires_grad}
            expected = {n for n, _ in tower.named_parameters() if n.startswith(("blocks.2.", "norm.", "attn_pool."))}
            assert frozen == expected


class TestBatches:
    @pytest.fixture
    def singles(self, sharp_policy):
        model, processor = sharp_policy
        model.norm_stats = two_datasets(model.norm_stats)
        outputs = []
        for seed, instruction in enumerate(INSTRUCTIONS):
            inputs = processor(instruction=instruction, images=noise_image(seed))
            outputs.append(model.predict_action(**inputs, unnorm_key=["a", "b", "a"][seed], return_dict=True))
        return outputs

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("mask", [True, False])
    @pytest.mark.parametrize("closing_token", ["all", "some", "none"])
    def test_rows_are_as_alone(self, sharp_policy, singles, side, mask, closing_token):
        model, processor = sharp_policy
        processor.tokenizer.padding_side = side
        prompts = [processor.render_prompt(instruction) for instruction in INSTRUCTIONS]
        ends = {"all": [" "] * 3, "some": ["", " ", ""], "none": [""] * 3}[closing_token]
        texts = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
        inputs = processor(texts, [noise_image(seed) for seed in range(3)], padding=True)
        if not mask:
            del inputs["attention_mask"]
        output = model.predict_action(**inputs, unnorm_key=["a", "b", "a"], return_dict=True)
        assert output.actions.shape == (3, 7)
        assert output.actions.dtype == np.float64
        for row, single in enumerate(singles):
            assert single.actions.shape == (7,)
            assert torch.equal(output.token_ids[row], single.token_ids[0])
            np.testing.assert_array_equal(output.actions[row], single.actions)
            torch.testing.assert_close(output.probabilities[row], single.probabilities[0], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_generate_rows_are_as_alone(self, sharp_policy, side):
        model, processor = sharp_policy
        processor.tokenizer.padding_side = side
        inputs = processor(instruction=INSTRUCTIONS, images=[noise_image(seed) for seed in range(3)])
        new = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:]
        for row, instruction in enumerate(INSTRUCTIONS):
            single = processor(instruction=instruction, images=noise_image(row))
            ids = model.generate(**single, max_new_tokens=6, min_new_tokens=6, do_sample=False)
            assert ids[0, :-6].tolist() == single["input_ids"][0].tolist()
            assert torch.equal(ids[0, -6:], new[row])

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_forward_rows_are_as_alone(self, sharp_policy, side):
        model, processor = sharp_policy
        processor.tokenizer.padding_side = side
        inputs = processor(instruction=INSTRUCTIONS, images=[noise_image(seed) for seed in range(3)])
        with torch.no_grad():
            logits = model(**inputs).logits[:, model.config.num_image_tokens :]
            for row, instruction in enumerate(INSTRUCTIONS):
                alone = model(**processor(instruction=instruction, images=noise_image(row))).logits[0, -1]
                last = inputs["attention_mask"][row].nonzero()[-1]
                torch.testing.assert_close(logits[row, last][0], alone, atol=2e-4, rtol=1e-4)

    def test_datasets_of_different_size_in_a_batch(self, sharp_policy, batch):
        model, _ = sharp_policy
        model.norm_stats = {"a": {"action": {"q01": [0.0], "q99": [1.0]}}, **model.norm_stats}
        with pytest.raises(ValueError, match=r"same action dimension, got \{'a': 1, 'tabletop': 7\}"):
            model.predict_action(**batch, unnorm_key=["a", "tabletop", "a"])
        assert model.predict_action(**batch, unnorm_key="a").shape == (3, 1)


def two_datasets(norm_stats: dict) -> dict:
    (statistics,) = norm_stats.values()
    scaled = {"action": {**statistics["action"], "q01": [-3.0] * 7, "q99": [5.0] * 7}}
    return {"a": statistics, "b": scaled}


class TestUncertainty:
    def test_probabilities_belong_to_the_tokens(self, sharp_policy, batch):
        model, _ = sharp_policy
        output = model.predict_action(**batch, return_dict=True)
        assert output.probabilities.shape == (3, 7, 256)
        torch.testing.assert_close(output.probabilities.sum(-1), torch.ones(3, 7))
        bins = output.probabilities.argmax(dim=-1).numpy()
        np.testing.assert_array_equal(model.codec.bin_centers[bins], output.normalized_actions)
        entropy = torch.distributions.Categorical(output.probabilities.double()).entropy()
        torch.testing.assert_close(output.entropy.double(), entropy, atol=1e-5, rtol=1e-5)

    def test_an_ignorant_model_says_so(self, policy):
        model, processor = policy
        nn.init.zeros_(model.get_output_embeddings().weight)
        output = model.predict_action(**processor(instruction="x", images=noise_image(0)), return_dict=True)
        torch.testing.assert_close(output.entropy, torch.full((1, 7), np.log(256), dtype=torch.float32))


class TestSampling:
    def test_seeded(self, sharp_policy, batch):
        model, _ = sharp_policy
        draws = [
            model.predict_action(**batch, do_sample=True, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        ]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert (draws[0] != draws[2]).any()

    def test_limits_are_greedy(self, sharp_policy, batch):
        model, _ = sharp_policy
        greedy = model.predict_action(**batch)
        for limit in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}):
            np.testing.assert_array_equal(model.predict_action(**batch, do_sample=True, **limit), greedy)

    def test_sampling_settings_need_sampling(self, sharp_policy, batch):
        model, _ = sharp_policy
        with pytest.raises(ValueError, match="need `do_sample=True`"):
            model.predict_action(**batch, temperature=0.5)

    def test_generate_samples(self, sharp_policy, batch):
        model, _ = sharp_policy
        torch.manual_seed(0)
        sequences = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2)
        assert sequences.shape[0] == 6
        beams = model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False)
        assert beams.shape[0] == 3


class TestLoss:
    @pytest.fixture
    def labelled(self, sharp_policy):
        _, processor = sharp_policy
        images = [noise_image(seed) for seed in range(3)]
        return processor(instruction=INSTRUCTIONS, images=images, actions=np.linspace(-1, 1, 21).reshape(3, 7))

    def test_only_supervised_logits_are_computed(self, sharp_policy, labelled):
        model, _ = sharp_policy
        shapes = []
        model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
        output = model(**labelled)
        assert shapes == [(3, 8, 128)]
        assert output.logits.shape == (3, 8, 1088)

    def test_equals_the_loss_over_all_logits(self, sharp_policy, labelled):
        model, _ = sharp_policy
        output = model(**labelled)
        full = model(**labelled, logits_to_keep=0)
        num_patches = model.config.num_image_tokens
        logits = full.logits[:, num_patches:-1]
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labelled["labels"][:, 1:].flatten())
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(full.loss, expected)
        assert full.logits.shape[1] == labelled["input_ids"].shape[1] + num_patches

    def test_rows_with_fewer_targets_are_right_aligned(self, sharp_policy, labelled):
        model, _ = sharp_policy
        labels = labelled["labels"].clone()
        first = (labels[1] != -100).nonzero()[0]
        labels[1, first : first + 3] = -100
        everything = model(**labelled).logits
        kept = model(**{**labelled, "labels": labels}).logits
        torch.testing.assert_close(kept[1, 3:], everything[1, 3:])
        torch.testing.assert_close(kept[0], everything[0])

    def test_num_items_in_batch(self, sharp_policy, labelled):
        """Gradient accumulation divides the summed loss by the tokens of the whole batch."""
        model, _ = sharp_policy
        mean, divided = model(**labelled).loss, model(**labelled, num_items_in_batch=48).loss
        torch.testing.assert_close(divided, mean * 24 / 48)

    def test_logits_to_keep(self, sharp_policy, batch):
        model, _ = sharp_policy
        everything = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, everything[:, -2:])
        positions = torch.tensor([1, 5])
        torch.testing.assert_close(model(**batch, logits_to_keep=positions).logits, everything[:, positions])

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_gradient_checkpointing_gives_the_same_gradients(self, sharp_policy, labelled, implementation):
        model, _ = sharp_policy
        model.set_attn_implementation(implementation)
        model.train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.zero_grad()
            calls = count_calls(model.vision_backbone.featurizer.blocks[0].norm1)
            model(**labelled).loss.backward()
            assert len(calls) == 1 + checkpointing  # run again in the backward pass
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, msg=name)

    def test_nothing_supervised(self, sharp_policy, labelled):
        """A batch like this must not stop an evaluation, nor poison it with the mean of nothing."""
        model, _ = sharp_policy
        loss = model(**{**labelled, "labels": torch.full_like(labelled["labels"], -100)}).loss
        assert loss.item() == 0.0
        loss.backward()
        assert all(p.grad.abs().sum() == 0 for p in model.parameters() if p.grad is not None)

    def test_no_cache_is_built_in_training(self, sharp_policy, labelled):
        model, _ = sharp_policy
        assert model.train()(**labelled).past_key_values is None
        assert model.eval()(**labelled).past_key_values is not None


class TestGenerate:
    """Ways to call it that the library offers."""

    @pytest.fixture
    def single(self, sharp_policy):
        model, processor = sharp_policy
        return model, dict(processor(instruction="pick up the cube", images=noise_image(0)))

    @pytest.mark.parametrize("cache_implementation", [None, "static"])
    def test_inputs_embeds(self, single, cache_implementation):
        model, inputs = single
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        settings["cache_implementation"] = cache_implementation
        expected = model.generate(**inputs, **settings)[:, -5:]
        ids, mask, _ = model._expand_image(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        embeddings = model._embed(ids, model.get_image_features(inputs["pixel_values"]))
        assert torch.equal(model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings), expected)

    def test_lengths_count_text(self, single):
        model, inputs = single
        length = inputs["input_ids"].shape[1] + 4
        settings = GenerationConfig(max_length=length, min_length=length, do_sample=False)
        by_object = model.generate(inputs.pop("input_ids"), settings, **inputs)
        assert by_object.shape[1] == length
        assert settings.max_length == length
        ids = by_object[:, :-4]
        by_name = model.generate(ids, **inputs, max_length=length, min_length=length, do_sample=False)
        assert torch.equal(by_name, by_object)

    def test_placeholders_are_never_drawn(self, single):
        model, inputs = single
        head = model.get_output_embeddings()
        with torch.no_grad():
            head.weight[model.config.image_token_id] = 100 * head.weight.mean(dim=0) + 10
        sequences = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, use_cache=False)
        assert model.config.image_token_id not in sequences

    def test_result_object(self, single):
        model, inputs = single
        output = model.generate(**inputs, max_new_tokens=3, output_scores=True, return_dict_in_generate=True)
        assert output.sequences[:, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"].tolist()
        assert len(output.scores) == output.sequences.shape[1] - inputs["input_ids"].shape[1]

    def test_text_alone(self, single):
        model, inputs = single
        sequences = model.generate(input_ids=inputs["input_ids"], max_new_tokens=3, do_sample=False)
        assert sequences[:, : inputs["input_ids"].shape[1]].tolist() == inputs["input_ids"].tolist()


class TestForms:
    """Other ways to pass the same inputs."""

    def test_ids_with_placeholders(self, sharp_policy, batch):
        model, _ = sharp_policy
        ids, mask = batch["input_ids"], batch["attention_mask"]
        patches = torch.full((3, model.config.num_image_tokens), model.config.image_token_id)
        expanded = {
            "input_ids": torch.cat([ids[:, :1], patches, ids[:, 1:]], dim=1),
            "attention_mask": torch.cat([mask[:, :1], torch.ones_like(patches), mask[:, 1:]], dim=1),
            "pixel_values": batch["pixel_values"],
        }
        with torch.no_grad():
            torch.testing.assert_close(model(**expanded).logits, model(**batch).logits)
        np.testing.assert_array_equal(model.predict_action(**expanded), model.predict_action(**batch))
        with pytest.raises(ValueError, match=r"Each row needs 64 image placeholders \(id 1087\), got \[63, 63, 63\]"):
            model(**{**expanded, **{name: expanded[name][:, 2:] for name in ("input_ids", "attention_mask")}})

    def test_embeddings_instead_of_ids(self, sharp_policy):
        model, processor = sharp_policy
        ids = processor(instruction="pick up the cube")["input_ids"]
        embeddings = model.get_input_embeddings()(ids)
        with torch.no_grad():
            torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(input_ids=ids).logits)

    def test_published_positional_order(self, sharp_policy, batch):
        model, _ = sharp_policy
        ids = batch.pop("input_ids")
        actions = model.predict_action(ids, "tabletop", **batch)
        np.testing.assert_array_equal(actions, model.predict_action(input_ids=ids, **batch))

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_forward_finds_the_padding_by_itself(self, sharp_policy, side):
        model, processor = sharp_policy
        processor.tokenizer.padding_side = side
        inputs = processor(instruction=INSTRUCTIONS, images=[noise_image(seed) for seed in range(3)])
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            expected = model(**inputs).logits[:, 64:][real]
            del inputs["attention_mask"]
            torch.testing.assert_close(model(**inputs).logits[:, 64:][real], expected)

    def test_what_not_to_split(self, sharp_policy):
        model, _ = sharp_policy
        assert {"VisionTower", "Projector", "LlamaDecoderLayer"} <= set(model._no_split_modules)

    def test_tuple_output(self, sharp_policy, batch):
        model, _ = sharp_policy
        with torch.no_grad():
            output, as_tuple = model(**batch), model(**batch, return_dict=False)
        assert isinstance(as_tuple, tuple)
        torch.testing.assert_close(as_tuple[0], output.logits)

    def test_attention_implementations_agree(self, sharp_policy, batch):
        model, _ = sharp_policy
        with torch.no_grad():
            sdpa = model(**batch)
            assert model.config.text_config._attn_implementation == "sdpa"
            model.set_attn_implementation("eager")
            assert model.config.text_config._attn_implementation == "eager"
            eager = model(**batch, output_attentions=True)
        # At the padding the two differ, and nobody looks.
        real = batch["attention_mask"].bool()
        first = model.config.num_image_tokens
        torch.testing.assert_close(eager.logits[:, first:][real], sdpa.logits[:, first:][real], atol=2e-4, rtol=1e-4)
        assert len(eager.attentions) == 2

    def test_flash_attention_is_supported_where_installed(self):
        assert repository_class("OpenVLAForActionPrediction")._supports_flash_attn
        with pytest.raises(ImportError, match=r"flash.?attn|FlashAttention"):
            load_policy(TINY_POLICY, attn_implementation="flash_attention_2")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, camera_image, dtype):
        model, processor = load_policy(TINY_POLICY, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        inputs = processor("In: What action should the robot take to pick it?\nOut:", camera_image)
        action = model.predict_action(**inputs.to("cpu", dtype=dtype), unnorm_key="tabletop", do_sample=False)
        assert action.shape == (7,)
        assert np.isfinite(action).all()

    @pytest.mark.parametrize(
        "options", [{"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"device_map": {"": "cpu"}}]
    )
    def test_loading_options(self, policy, camera_image, options):
        model, processor = policy
        inputs = processor(instruction="pick it", images=camera_image)
        loaded, _ = load_policy(TINY_POLICY, dtype=torch.float32, **options)
        np.testing.assert_array_equal(loaded.predict_action(**inputs), model.predict_action(**inputs))

    @pytest.mark.parametrize(
        "device_map",
        [
            {"vision_backbone": "cpu", "projector": "cpu", "language_model": "disk"},
            {
                "vision_backbone": "disk",
                "projector": "disk",
                "language_model.model": "cpu",
                "language_model.lm_head": "disk",
            },
        ],
    )
    def test_offloaded_to_disk(self, policy, camera_image, device_map, tmp_path):
        model, processor = policy
        inputs = processor(instruction="pick it", images=camera_image)
        loaded, _ = load_policy(TINY_POLICY, dtype=torch.float32, device_map=device_map, offload_folder=tmp_path)
        assert loaded.get_output_embeddings().weight.is_meta
        np.testing.assert_array_equal(loaded.predict_action(**inputs), model.predict_action(**inputs))

    def test_output_projector_features(self, sharp_policy, batch):
        model, _ = sharp_policy
        assert model(**batch).projector_features is None
        assert model(**batch, output_projector_features=True).projector_features.shape == (3, 64, 128)

    def test_resized_vocabulary(self, sharp_policy, batch):
        model, _ = sharp_policy
        expected = model.predict_action(**batch)
        model.resize_token_embeddings(1200)
        assert model.config.text_config.vocab_size == 1200
        np.testing.assert_array_equal(model.predict_action(**batch), expected)


class TestBadInput:
    def test_statistics_keys(self, sharp_policy, batch):
        model, _ = sharp_policy
        with pytest.raises(ValueError, match=r"`unnorm_key='bridge'` is not .* they hold \['tabletop'\]"):
            model.predict_action(**batch, unnorm_key="bridge")
        with pytest.raises(ValueError, match="2 `unnorm_key`s were given for a batch of 3"):
            model.predict_action(**batch, unnorm_key=["tabletop", "tabletop"])
        model.norm_stats = two_datasets(model.norm_stats)
        with pytest.raises(ValueError, match=r"pass `unnorm_key`, one of \['a', 'b'\]"):
            model.predict_action(**batch)
        model.norm_stats = {}
        with pytest.raises(ValueError, match="no dataset statistics"):
            model.predict_action(**batch)

    @pytest.mark.parametrize("method", ["predict_action", "forward", "generate"])
    def test_numbers_of_images(self, sharp_policy, batch, method):
        model, _ = sharp_policy
        with pytest.raises(ValueError, match="3 texts and 2 images"):
            getattr(model, method)(**{**batch, "pixel_values": batch["pixel_values"][:2]})

    @pytest.mark.parametrize("method", ["predict_action", "generate"])
    def test_empty_batch(self, sharp_policy, batch, method):
        model, _ = sharp_policy
        with pytest.raises(ValueError, match=r"neither 0, got \(0, \d+\)"):
            getattr(model, method)(**{name: value[:0] for name, value in batch.items()})

    def test_pixels_that_are_not_finite(self, sharp_policy, batch):
        model, _ = sharp_policy
        batch["pixel_values"][1, 2, 3, 4] = torch.nan
        with pytest.raises(ValueError, match="NaN or infinite"):
            model.predict_action(**batch)

    @pytest.mark.parametrize("cut", [lambda pixels: pixels[:, :3], lambda pixels: pixels[0]])
    @pytest.mark.parametrize("method", ["predict_action", "forward", "generate"])
    def test_pixels_of_another_shape(self, sharp_policy, batch, method, cut):
        model, _ = sharp_policy
        with pytest.raises(ValueError, match=r"shape \(batch, 6, 112, 112\), got \("):
            getattr(model, method)(**{**batch, "pixel_values": cut(batch["pixel_values"])})

    @pytest.mark.parametrize("method", ["predict_action", "forward", "generate"])
    def test_masks_of_another_shape(self, sharp_policy, batch, method):
        model, _ = sharp_policy
        with pytest.raises(ValueError, match=r"`attention_mask` .* differ in shape"):
            getattr(model, method)(**{**batch, "attention_mask": batch["attention_mask"][:, 1:]})

    def test_labels_of_another_shape(self, sharp_policy, batch):
        model, _ = sharp_policy
        labels = torch.cat([batch["input_ids"], batch["input_ids"][:, :1]], dim=1)
        with pytest.raises(ValueError, match=r"`labels` .* differ in shape"):
            model(**batch, labels=labels)

    def test_positions_without_the_image(self, sharp_policy, batch):
        model, _ = sharp_policy
        positions = torch.arange(batch["input_ids"].shape[1])[None]
        with pytest.raises(ValueError, match="`position_ids` need `input_ids` with image placeholders"):
            model(**batch, position_ids=positions)

    @pytest.mark.parametrize("method", ["predict_action", "generate"])
    def test_rows_without_tokens(self, sharp_policy, batch, method):
        model, _ = sharp_policy
        batch["attention_mask"][1] = 0
        with pytest.raises(ValueError, match="rows without any token"):
            getattr(model, method)(**batch)

    @pytest.mark.parametrize("do_sample", [False, True])
    @pytest.mark.parametrize("part", ["layer", "head row"])
    def test_broken_weights_never_become_an_action(self, sharp_policy, batch, do_sample, part):
        model, _ = sharp_policy
        with torch.no_grad():
            if part == "layer":
                model.language_model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
            else:
                model.get_output_embeddings().weight[model.config.action_token_begin + 3] = torch.inf
        with pytest.raises(FloatingPointError, match="NaN or infinite"):
            model.predict_action(**batch, do_sample=do_sample)

    def test_no_ids(self, sharp_policy, batch):
        model, _ = sharp_policy
        with pytest.raises(ValueError, match="exactly one of `input_ids`"):
            model(pixel_values=batch["pixel_values"])
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        with pytest.raises(ValueError, match="`pixel_values` need `input_ids`"):
            model(inputs_embeds=embeddings, pixel_values=batch["pixel_values"])

    def test_prediction_with_gradient_checkpointing(self, sharp_policy, batch):
        model, _ = sharp_policy
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.predict_action(**batch)
        with pytest.raises(ValueError, match="call `eval"):
            model.train().predict_action(**batch)
