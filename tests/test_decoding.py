# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""How action tokens are decoded: every way gives the tokens of the plain loop, and says what it accepted."""

import copy
import logging
import pickle
import sys
import threading
import time
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_action_heads import CAUSAL, KINDS, TEXT, make_policy, noise_image, statistics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache


INSTRUCTIONS = ["pick up the cube", "put the blue cylinder into the bowl on the left", "push it"]
ONE_IMAGE = {"num_images": 1, "use_proprio": False, "proprio_dim": None}
GROUPED = {"text_config": TEXT | {"model_type": "llama", "num_key_value_heads": 1, "attention_bias": True}}
SCALED = {"text_config": TEXT | {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}}
CHUNKS = {"chunk_size": 2}


def decoding_of(model):
    """The module that decodes for `model`: the remote code may be loaded more than once."""
    return sys.modules[type(model).__module__.replace("modeling", "decoding")]


def make(**overrides):
    """A policy whose tokens depend on the picture, the text, and those before them; and its processor."""
    model, processor = make_policy(**{**CAUSAL, **ONE_IMAGE, "chunk_size": 1, **overrides})
    with torch.no_grad():
        model.get_input_embeddings().weight *= 0.2
    return model, processor


def make_batch(processor, size: int = 3, seed: int = 0):
    rows = [(seed + row) % len(INSTRUCTIONS) for row in range(size)]
    images = [noise_image(1000 * seed + row) for row in range(size)]
    return processor(instruction=[INSTRUCTIONS[row] for row in rows], images=images)


def plain_tokens(model, inputs, num_tokens: int = 7) -> torch.Tensor:
    """Each row alone, one forward pass over everything for each token, without a cache, (B, num_tokens)."""
    config, rows = model.config, []
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        ids, pixels = inputs["input_ids"][row][mask][None], inputs["pixel_values"][row : row + 1]
        for _ in range(num_tokens):
            with torch.no_grad():
                logits = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[0, -1]
            chosen = logits[config.action_token_begin : config.action_token_end].argmax() + config.action_token_begin
            ids = torch.cat([ids, chosen.view(1, 1)], dim=1)
        rows.append(ids[0, -num_tokens:])
    return torch.stack(rows)


@contextmanager
def counted_passes(model):
    """A list that grows by the positions that each pass over the language model reads."""
    decoder, read = decoding_of(model).TokenDecoder, decoding_of(model).TokenDecoder.read
    passes: list[int] = []

    def counting(self, token_ids, num_outputs=1):
        passes.append(token_ids.shape[1])
        return read(self, token_ids, num_outputs)

    decoder.read = counting
    try:
        yield passes
    finally:
        decoder.read = read


@pytest.mark.parametrize("overrides", [{}, GROUPED, SCALED, CHUNKS], ids=["plain", "grouped", "scaled", "chunks"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_and_single_rows_are_as_the_plain_loop(overrides, side):
    model, processor = make(**overrides)
    assert decoding_of(model).why_not_static(model.get_decoder(), torch.device("cpu")) is None
    processor.tokenizer.padding_side = side
    inputs = make_batch(processor)
    num_tokens = 7 * model.config.chunk_size
    expected = plain_tokens(model, inputs, num_tokens)
    assert torch.equal(model.predict_action(**inputs, return_dict=True).token_ids, expected)
    for row, instruction in enumerate(INSTRUCTIONS):
        single = processor(instruction=instruction, images=noise_image(row))
        output = model.predict_action(**single, return_dict=True)
        assert torch.equal(output.token_ids[0], expected[row])


@pytest.fixture(scope="module")
def policy_and_batch():
    """A policy, a batch of three and its tokens. Do not change them."""
    model, processor = make()
    inputs = make_batch(processor)
    return model, inputs, plain_tokens(model, inputs)


class TestDraft:
    def test_right_draft_takes_one_pass(self, policy_and_batch):
        model, inputs, expected = policy_and_batch
        with counted_passes(model) as passes:
            output = model.predict_action(**inputs, draft_token_ids=expected, return_dict=True)
        assert passes == [6]
        assert torch.equal(output.token_ids, expected)
        assert output.accepted_tokens.tolist() == [7, 7, 7]

    @pytest.mark.parametrize("wrong", range(7))
    def test_wrong_from_some_token_on(self, policy_and_batch, wrong):
        model, inputs, expected = policy_and_batch
        begin = model.config.action_token_begin
        draft = expected.clone()
        draft[1, wrong:] = (expected[1, wrong:] - begin + 7) % 256 + begin
        with counted_passes(model) as passes:
            output = model.predict_action(**inputs, draft_token_ids=draft, return_dict=True)
        assert torch.equal(output.token_ids, expected)
        assert output.accepted_tokens.tolist() == [7, wrong, 7]
        assert passes[0] == 6
        assert all(later <= earlier for earlier, later in pairwise(passes[1:]))
        assert len(passes) <= 7 - wrong

    def test_probabilities_are_those_without_a_draft(self, policy_and_batch):
        model, inputs, expected = policy_and_batch
        without = model.predict_action(**inputs, return_dict=True)
        draft = torch.randint(768, 1024, (3, 7), generator=torch.Generator().manual_seed(0))
        for tokens in (expected, draft):
            output = model.predict_action(**inputs, draft_token_ids=tokens, return_dict=True)
            torch.testing.assert_close(output.probabilities, without.probabilities, atol=1e-6, rtol=1e-4)
            np.testing.assert_array_equal(output.actions, without.actions)
        assert without.accepted_tokens is None

    def test_rows_without_a_draft(self, policy_and_batch):
        model, inputs, expected = policy_and_batch
        draft = expected.clone()
        draft[0] = -1
        output = model.predict_action(**inputs, draft_token_ids=draft, return_dict=True)
        assert torch.equal(output.token_ids, expected)
        assert output.accepted_tokens.tolist() == [0, 7, 7]

    def test_rows_without_a_draft_are_guessed(self, policy_and_batch, monkeypatch):
        model, inputs, expected = policy_and_batch
        decoding, drafts = decoding_of(model), []
        verify = decoding._verify
        monkeypatch.setattr(decoding, "_verify", lambda *args: drafts.append(args[-1]) or verify(*args))
        draft = expected.clone()
        draft[0] = -1
        model.predict_action(**inputs, draft_token_ids=draft)
        guess = decoding.guess_tokens(model.config, 1, 7, expected.device)
        assert torch.equal(drafts[0], torch.cat([guess, expected[1:]]))

    def test_is_refused_where_it_means_nothing(self, policy_and_batch):
        model, inputs, expected = policy_and_batch
        with pytest.raises(ValueError, match="greedy decoding of action tokens one by one; got `do_sample=True`"):
            model.predict_action(**inputs, draft_token_ids=expected, do_sample=True)
        with pytest.raises(ValueError, match=r"`draft_token_ids` must be of shape \(3, 7\), got \(3, 6\)"):
            model.predict_action(**inputs, draft_token_ids=expected[:, :6])
        parallel, processor = make_policy(**KINDS["tokens"] | ONE_IMAGE)
        with pytest.raises(ValueError, match="`attention_mode='bidirectional'`"):
            parallel.predict_action(**make_batch(processor, 1), draft_token_ids=torch.zeros(1, 21).long())

    @pytest.mark.parametrize("most", [3, 16])
    def test_many_tokens_are_read_again_a_few_at_a_time(self, monkeypatch, most):
        """Three on a CPU; what a GPU does is shown here, too."""
        model, processor = make(chunk_size=4)
        assert decoding_of(model)._MAX_GUESSED_ON_CPU == 3
        monkeypatch.setattr(decoding_of(model), "_MAX_GUESSED_ON_CPU", most)
        inputs = make_batch(processor, 1)
        expected = plain_tokens(model, inputs, 28)
        draft = expected.clone()
        draft[0, 3:] = model.config.action_token_begin
        for tokens, first in ((None, 0), (draft, 27)):
            with counted_passes(model) as passes:
                output = model.predict_action(**inputs, draft_token_ids=tokens, return_dict=True)
            assert torch.equal(output.token_ids, expected)
            assert passes[0] == first
            assert max(passes[1:]) == (most if first else 1)

    def test_single_row_is_verified_from_a_guess(self, policy_and_batch):
        model, inputs, expected = policy_and_batch
        single = {name: value[1:2] for name, value in inputs.items()}  # the longest text, which is not padded
        with counted_passes(model) as passes:
            output = model.predict_action(**single, return_dict=True)
        assert passes[0] == 6
        assert torch.equal(output.token_ids, expected[1:2])
        with counted_passes(model) as passes:
            model.predict_action(**single, do_sample=True, top_k=1)
        assert passes == [0] + [1] * 6


class TestOtherLanguageModels:
    """What [`StaticReader`] does not know is read by the library's own code, to the same tokens."""

    def check(self, model, inputs, expected, reason):
        decoding = decoding_of(model)
        assert reason in decoding.why_not_static(model.get_decoder(), torch.device("cpu"))
        for draft in (None, expected):
            output = model.predict_action(**inputs, draft_token_ids=draft, return_dict=True)
            assert torch.equal(output.token_ids, expected)
        assert output.accepted_tokens.tolist() == [7] * len(expected)

    def test_eager_attention(self, policy_and_batch):
        _, inputs, expected = policy_and_batch
        model, _ = make()
        model.set_attn_implementation("eager")
        self.check(model, inputs, expected, "'eager' and not 'sdpa'")

    def test_hooks_are_called(self, policy_and_batch):
        _, inputs, expected = policy_and_batch
        model, _ = make()
        calls = []
        model.get_decoder().layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
        self.check(model, inputs, expected, "hooks")
        assert len(calls) == 14

    def test_hidden_states_that_were_asked_for_once(self, policy_and_batch):
        _, inputs, expected = policy_and_batch
        model, _ = make()
        model(**inputs, output_hidden_states=True)
        assert decoding_of(model).why_not_static(model.get_decoder(), torch.device("cpu")) is None
        assert torch.equal(model.predict_action(**inputs, return_dict=True).token_ids, expected)

    @pytest.mark.parametrize("part", ["", "layers.0", "layers.0.self_attn", "layers.0.mlp"])
    def test_class_whose_forward_was_replaced(self, policy_and_batch, monkeypatch, part):
        _, inputs, expected = policy_and_batch
        model, _ = make()
        kind = type(model.get_decoder().get_submodule(part))
        forward, calls = kind.forward, []

        def patched(self, *args, **kwargs):
            calls.append(1)
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", patched)
        self.check(model, inputs, expected, f"{kind.__name__} of test_decoding")
        assert calls

    def test_hook_of_the_head_is_called(self, policy_and_batch):
        _, inputs, expected = policy_and_batch
        model, _ = make()
        model.get_output_embeddings().register_forward_hook(lambda _, __, logits: -logits)
        assert not torch.equal(model.predict_action(**inputs, return_dict=True).token_ids, expected)

    def test_head_on_another_device(self, policy_and_batch, monkeypatch):
        model, inputs, expected = policy_and_batch
        decoding, moves = decoding_of(model), []
        original = decoding.action_logits_function

        class Elsewhere(torch.Tensor):
            def to(self, device):
                moves.append(device)
                return self.as_subclass(torch.Tensor)

        def function(head, config):
            return lambda hidden: original(head, config)(hidden).as_subclass(Elsewhere)

        monkeypatch.setattr(decoding, "action_logits_function", function)
        tokens = model.predict_action(**inputs, return_dict=True).token_ids
        assert torch.equal(tokens, expected)
        assert moves == [inputs["input_ids"].device] * 7

    def test_rotary_embedding_that_changes(self):
        rope = {"rope_type": "dynamic", "factor": 2.0}
        model, processor = make(text_config=TEXT | {"model_type": "llama", "rope_scaling": rope})
        inputs = make_batch(processor)
        self.check(model, inputs, plain_tokens(model, inputs), "of type 'dynamic'")

    def test_another_architecture(self):
        model, processor = make(text_config=TEXT | {"model_type": "qwen3"})
        inputs = make_batch(processor)
        self.check(model, inputs, plain_tokens(model, inputs), "Qwen3Model")

    def test_the_log_says_why(self, caplog):
        model, processor = make(text_config=TEXT | {"model_type": "qwen3"})
        logger = logging.getLogger(decoding_of(model).__name__)
        with caplog.at_level(logging.INFO, logger=logger.name):
            logger.addHandler(caplog.handler)
            model.predict_action(**make_batch(processor, 1), draft_token_ids=torch.zeros(1, 7).long())
            logger.removeHandler(caplog.handler)
        assert "modeling_qwen3 and not a LlamaModel" in caplog.text


def test_bfloat16_follows_the_library():
    """It rounds where the library rounds: the hidden states of both readers are the same."""
    model, _ = make()
    model.to(torch.bfloat16)
    decoding = decoding_of(model)
    embeddings = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    mask = torch.ones(2, 9, dtype=torch.long)
    static = decoding.StaticReader(model.get_decoder(), mask, False, 10, torch.bfloat16)
    library = decoding.LibraryReader(model.get_decoder(), mask)
    with torch.no_grad():
        for length in (9, 1):
            assert torch.equal(
                static.read(embeddings[:, :length], length), library.read(embeddings[:, :length], length)
            )


@pytest.mark.parametrize("value", [3e38, float("nan"), float("inf")])
def test_large_values_are_no_broken_camera(policy_and_batch, value):
    model, inputs, _ = policy_and_batch
    pixels = inputs["pixel_values"].clone()
    pixels[0, 0, 0, :2] = value
    expected = (FloatingPointError, "logits") if np.isfinite(value) else (ValueError, "`pixel_values` hold NaN")
    with pytest.raises(expected[0], match=expected[1]):
        model.predict_action(**inputs | {"pixel_values": pixels})


def test_adapters_are_called():
    model, processor = make()
    inputs = make_batch(processor)
    before = model.predict_action(**inputs, return_dict=True).token_ids
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora).base_model.model
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    assert decoding_of(adapted).why_not_static(adapted.get_decoder(), torch.device("cpu")) is None
    expected = plain_tokens(adapted, inputs)
    assert not torch.equal(expected, before)
    assert torch.equal(adapted.predict_action(**inputs, return_dict=True).token_ids, expected)


class TestActionGraph:
    """What CUDA graphs would record, run as it is: nothing here has a GPU."""

    @pytest.fixture(params=[{}, {"use_proprio": True, "proprio_dim": 5}])
    def prepared(self, request):
        """A policy with an action of fixed shapes for three rows and one for a single row, and a batch."""
        model, processor = make(**request.param)
        inputs = make_batch(processor) if not model.config.use_proprio else None
        if inputs is None:
            states = np.random.default_rng(0).uniform(-1, 1, (3, 5))
            images = [noise_image(row) for row in range(3)]
            inputs = processor(instruction=INSTRUCTIONS, images=images, state=states)
        expected = model.predict_action(**inputs, return_dict=True)
        length = inputs["input_ids"].shape[1] + model.num_image_tokens
        with torch.no_grad():
            graphs = [model._make_graph(*shape) for shape in ((3, length + 5), (3, length), (1, length + 5))]
        model._recorded = decoding_of(model).RecordedActions(model, graphs)
        return model, inputs, expected

    def test_gives_the_same_actions(self, prepared):
        model, inputs, expected = prepared
        with counted_graphs(model) as replayed:
            for draft in (None, expected.token_ids, expected.token_ids.flip(1)):
                output = model.predict_action(**inputs, draft_token_ids=draft, return_dict=True)
                assert torch.equal(output.token_ids, expected.token_ids)
                torch.testing.assert_close(output.probabilities, expected.probabilities, atol=1e-5, rtol=1e-3)
            for row in range(3):
                single = {name: value[row : row + 1] for name, value in inputs.items()}
                output = model.predict_action(**single, return_dict=True)
                assert torch.equal(output.token_ids[0], expected.token_ids[row])
        length = inputs["input_ids"].shape[1] + model.num_image_tokens
        assert replayed == [(3, length)] * 3 + [(1, length + 5)] * 3

    def test_is_left_alone_where_it_does_not_fit(self, prepared):
        model, inputs, expected = prepared
        with counted_graphs(model) as replayed:
            for _ in range(2):
                two = {name: value[:2] for name, value in inputs.items()}
                assert torch.equal(model.predict_action(**two, return_dict=True).token_ids, expected.token_ids[:2])
            model.predict_action(**inputs, do_sample=True)
            if model.config.use_proprio:
                with pytest.raises(ValueError, match="The policy needs `proprio`"):
                    model.predict_action(**{**inputs, "proprio": None})
            head = model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.flip(0))
            changed = model.predict_action(**inputs, return_dict=True)
            assert not torch.equal(changed.token_ids, expected.token_ids)
        assert replayed == []
        assert model._recorded is None

    def test_is_left_alone_where_what_it_reads_has_changed(self, prepared):
        model, inputs, expected = prepared
        with counted_graphs(model) as replayed:
            with torch.autocast("cpu", torch.bfloat16):
                model.predict_action(**inputs)
            assert model._recorded is not None
            rotary = model.get_decoder().rotary_emb
            rotary.inv_freq = rotary.inv_freq.clone()
            assert torch.equal(model.predict_action(**inputs, return_dict=True).token_ids, expected.token_ids)
        assert replayed == []
        assert model._recorded is None

    def test_copies_have_none(self, prepared):
        model, inputs, expected = prepared
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert model._recorded is not None
        for each in copies:
            assert each._recorded is None
            assert torch.equal(each.predict_action(**inputs, return_dict=True).token_ids, expected.token_ids)

    def test_threads_wait_for_each_other(self, prepared):
        model, inputs, expected = prepared
        inside = []

        def slowly(begin):
            def run():
                inside.append(1)
                time.sleep(0.05)
                begin()
                assert len(inside) == 1
                inside.clear()

            return run

        for graph in model._recorded.graphs:
            graph._parts[0] = slowly(graph._parts[0])
        outputs = {}

        def act(row):
            single = {name: value[row : row + 1] for name, value in inputs.items()}
            outputs[row] = model.predict_action(**single, return_dict=True).token_ids[0]

        threads = [threading.Thread(target=act, args=(row,)) for row in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(torch.stack([outputs[row] for row in range(3)]), expected.token_ids)

    @torch.no_grad()
    def test_single_token(self):
        known = statistics()["tabletop"]["action"]
        stats = {"one": {"action": {name: values[:1] for name, values in known.items()}}}
        model, processor = make(norm_stats=stats)
        inputs = make_batch(processor)
        expected = plain_tokens(model, inputs, 1)
        assert torch.equal(model.predict_action(**inputs, return_dict=True).token_ids, expected)
        graph = model._make_graph(3, inputs["input_ids"].shape[1] + model.num_image_tokens)
        model._recorded = decoding_of(model).RecordedActions(model, [graph])
        assert torch.equal(model.predict_action(**inputs, return_dict=True).token_ids, expected)
        graph._go_on()  # which `record` runs, too
        assert torch.equal(graph._token_ids, expected)

    def test_adapters_are_not_recorded(self):
        model, _ = make()
        assert "'cpu'" in model._why_no_graphs()
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["fc2"])).base_model.model
        assert "adapters" in adapted._why_no_graphs()


@contextmanager
def counted_graphs(model):
    """A list that grows by the rows, and the positions of the prompt, of each action of fixed shapes."""
    graph_class = decoding_of(model).ActionGraph
    call = graph_class.__call__
    rows: list[tuple[int, int]] = []

    def counting(self, inputs, draft):
        rows.append((len(draft), self.length))
        return call(self, inputs, draft)

    graph_class.__call__ = counting
    try:
        yield rows
    finally:
        graph_class.__call__ = call


class PackedProducts(TorchDispatchMode):
    """Counts products with packed weights."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.mkl._mkl_linear.default
        return function(*args, **(kwargs or {}))


def count_packed(model, inputs, **kwargs) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many products of an action are with packed weights, its tokens and their probabilities."""
    with PackedProducts() as counter:
        output = model.predict_action(**inputs, return_dict=True, **kwargs)
    return counter.count, output.token_ids, output.probabilities


@contextmanager
def logged(model, caplog):
    logger = logging.getLogger(type(model).__module__)
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of PyTorch has no MKL")
class TestPackedWeights:
    """What `warm_up` does on a CPU."""

    @pytest.fixture
    def warm(self):
        # Four layers in each block that runs, of two towers, and three of the projector.
        model, processor = make()
        blocks = sum(tower.config.num_used_blocks for tower in model.vision_backbone.towers)
        num_layers = 4 * blocks + 3
        inputs = make_batch(processor)
        _, *expected = count_packed(model, inputs)
        assert model.warm_up([3], min_packed_size=0) == num_layers
        warning_once = sys.modules[type(model).__module__].logger.warning_once
        warning_once.cache_clear()
        yield model, inputs, expected, num_layers
        warning_once.cache_clear()

    def test_actions_are_the_same(self, warm):
        model, inputs, (tokens, probabilities), num_layers = warm
        count, actual, actual_probabilities = count_packed(model, inputs)
        assert count == num_layers
        assert torch.equal(actual, tokens)
        torch.testing.assert_close(actual_probabilities, probabilities, rtol=1e-4, atol=1e-7)
        assert torch.equal(count_packed(model, inputs, draft_token_ids=tokens)[1], tokens)

    @pytest.mark.parametrize("overrides", [{"use_film": True}, {"num_images": 2}], ids=["film", "two images"])
    def test_of_every_kind(self, overrides):
        kind = KINDS["l1"] | {"use_proprio": False, "proprio_dim": None, **overrides}
        model, processor = make_policy(**kind)
        images = [[noise_image(row + 10 * view) for view in range(model.config.num_images)] for row in range(2)]
        inputs = processor(instruction=INSTRUCTIONS[:2], images=images)
        expected = model.predict_action(**inputs)
        assert model.warm_up([2], min_packed_size=0) > 0
        with PackedProducts() as counter:
            actual = model.predict_action(**inputs)
        assert counter.count > 0
        np.testing.assert_allclose(actual, expected, atol=1e-6)

    def test_for_these_batches_alone(self, warm):
        model, inputs, (tokens, _), num_layers = warm
        two = {name: value[:2] for name, value in inputs.items()}
        assert count_packed(model, two)[0] == 0
        model.warm_up([2, 3], min_packed_size=0)
        for rows, given in ((two, tokens[:2]), (inputs, tokens)):
            count, actual, _ = count_packed(model, rows)
            assert count == num_layers
            assert torch.equal(actual, given)
        model.warm_up([2], min_packed_size=0)
        assert count_packed(model, inputs)[0] == 0
        assert model.warm_up([]) == 0
        assert count_packed(model, two)[0] == 0

    @pytest.mark.parametrize("change", ["in place", "through data", "replaced", "in inference mode", "loaded"])
    def test_weights_that_change(self, warm, change, caplog):
        model, inputs, _, num_layers = warm
        layer = model.vision_backbone.featurizer.blocks[0].mlp.fc1
        with torch.no_grad():
            if change == "in place":
                layer.weight[1:] *= -1.0
            elif change == "through data":
                layer.weight.data[1:] *= -1.0
            elif change == "replaced":
                layer.weight = nn.Parameter(-layer.weight)
            elif change == "in inference mode":
                with torch.inference_mode():
                    layer.weight = nn.Parameter(-layer.weight)
            else:
                layer.load_state_dict({"weight": -layer.weight, "bias": layer.bias})
        with logged(model, caplog):
            count, *actual = count_packed(model, inputs)
        assert count == num_layers - 1
        assert "call `warm_up` again" in caplog.text
        fresh = copy.deepcopy(model)
        _, *expected = count_packed(fresh, inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
        assert model.warm_up([3], min_packed_size=0) == (num_layers if change != "in inference mode" else 0)

    def test_merged_adapters(self, warm):
        model, inputs, _, num_layers = warm
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["fc2"], init_lora_weights=False)).eval()
        policy = adapted.base_model.model
        assert count_packed(policy, inputs)[0] == num_layers
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:
                    parameter[0] = 0.0  # whose first row of numbers stays
        adapted.merge_adapter()
        count, *actual = count_packed(policy, inputs)
        assert 0 < count < num_layers
        _, *expected = count_packed(copy.deepcopy(policy), inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)

    def test_not_with_gradients(self, warm):
        model, inputs, _, _ = warm
        with PackedProducts() as counter:
            features = model.get_image_features(inputs["pixel_values"])
        assert counter.count == 0
        features.sum().backward()
        assert model.projector.fc1.weight.grad.abs().sum() > 0
        with PackedProducts() as counter, torch.no_grad():
            model.train().get_image_features(inputs["pixel_values"])
        model.eval()
        assert counter.count == 0
        with PackedProducts() as counter, torch.autocast("cpu", torch.bfloat16):
            model.predict_action(**inputs)
        assert counter.count == 0

    @torch.no_grad()
    def test_values_of_another_width(self, warm):
        layer = warm[0].projector.fc1
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(torch.ones(next(iter(layer._packed)), layer.in_features + 1))

    @torch.no_grad()
    def test_not_when_compiled(self, warm):
        model, inputs, _, _ = warm
        graphs = []

        def backend(graph, _):
            graphs.append(graph.code)
            return graph

        torch.compiler.reset()
        actual = torch.compile(model.get_image_features, fullgraph=True, backend=backend)(inputs["pixel_values"])
        torch.compiler.reset()
        assert "linear" in graphs[0]
        assert "mkl" not in graphs[0]
        torch.testing.assert_close(actual, model.get_image_features(inputs["pixel_values"]), rtol=1e-4, atol=1e-5)

    def test_copies_and_files_have_none(self, warm, tmp_path):
        model, inputs, (tokens, _), num_layers = warm
        names = list(make()[0].state_dict())
        assert list(model.state_dict()) == names
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            count, actual, _ = count_packed(copied, inputs)
            assert count == 0
            assert torch.equal(actual, tokens)
        model.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == set(names)
        assert count_packed(model, inputs)[0] == num_layers

    def test_says_why_not(self, warm, caplog, monkeypatch):
        model, inputs, (tokens, _), _ = warm
        with logged(model, caplog):
            assert copy.deepcopy(model).bfloat16().warm_up() == 0
            assert "torch.bfloat16 on 'cpu' and not torch.float32" in caplog.text
            monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
            assert model.warm_up() == 0
            assert "no MKL" in caplog.text
        count, actual, _ = count_packed(model, inputs)  # nor with what was packed before
        assert count == 0
        assert torch.equal(actual, tokens)

    def test_small_layers_gain_nothing(self, caplog):
        model, _ = make()
        sizes = sorted(layer.weight.numel() for layer in model.projector.children() if isinstance(layer, nn.Linear))
        assert model.warm_up(min_packed_size=sizes[-1]) == sum(size == sizes[-1] for size in sizes)
        with logged(model, caplog):
            assert model.warm_up() == 0
        assert "none has 262144 numbers" in caplog.text

    def test_layers_with_hooks(self, warm, caplog):
        model, inputs, (tokens, _), num_layers = warm
        calls = []
        hook = model.projector.fc1.register_forward_hook(lambda *_: calls.append(1))
        with logged(model, caplog):
            assert model.warm_up([3], min_packed_size=0) == 0
        assert "layers have hooks" in caplog.text
        count, actual, _ = count_packed(model, inputs)
        assert (count, calls) == (0, [1])
        assert torch.equal(actual, tokens)
        hook.remove()
        assert model.warm_up([3], min_packed_size=0) == num_layers
        assert count_packed(model, inputs)[0] == num_layers

    @pytest.mark.parametrize("is_warm", [False, True])
    def test_hooks_of_accelerate_that_come_and_go(self, is_warm):
        """They leave each layer's own `forward` behind, bound to it."""
        model, processor = make()
        inputs = make_batch(processor)
        if is_warm:
            model.warm_up([3], min_packed_size=0)
        add_hook_to_module(model.vision_backbone, ModelHook())
        for layer in model.vision_backbone.modules():
            add_hook_to_module(layer, ModelHook())
        assert model.warm_up([3], min_packed_size=0) == 0
        assert count_packed(model, inputs)[0] == 0
        remove_hook_from_module(model, recurse=True)
        num_packed = model.warm_up([3], min_packed_size=0)
        assert num_packed > 0
        assert count_packed(model, inputs)[0] == num_packed

    def test_layer_of_two_names(self):
        model, _ = make()
        mlp = model.vision_backbone.featurizer.blocks[0].mlp
        mlp.another_name = mlp.fc1
        model.warm_up(min_packed_size=0)
        assert type(mlp.fc1).__name__ == "PackedLinear"
        assert mlp.another_name is mlp.fc1

    @torch.no_grad()
    def test_export_and_trace(self, warm):
        model, inputs, _, _ = warm
        pixels = inputs["pixel_values"]
        expected = copy.deepcopy(model).vision_backbone(pixels)
        exported = torch.export.export(model.vision_backbone, (pixels,)).module()
        layer = model.projector.fc1
        values = torch.randn(next(iter(layer._packed)), layer.in_features)
        traced = torch.jit.trace(layer, values)
        torch.testing.assert_close(exported(pixels), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(traced(values), layer(values), rtol=1e-4, atol=1e-5)

    def test_flags_of_layers_stay(self):
        """Without the one that it sets on loaded layers, transformers 4.57 would fill them with random numbers."""
        model, _ = make()
        for module in model.modules():
            module._is_hf_initialized = True
        assert model.warm_up(min_packed_size=0) > 0
        assert all(module._is_hf_initialized for module in model.modules())

    @pytest.mark.parametrize("batch_sizes", [[0], [1, -1]])
    def test_batches_without_rows(self, warm, batch_sizes):
        with pytest.raises(ValueError, match="a row at least"):
            warm[0].warm_up(batch_sizes)


class TestCompiledAndExported:
    """Without graph breaks, and with the same numbers."""

    @pytest.fixture
    def compiled(self):
        torch.compiler.reset()
        yield lambda function: torch.compile(function, fullgraph=True, backend="eager")
        torch.compiler.reset()

    @torch.no_grad()
    def test_towers(self, policy_and_batch, compiled):
        model, inputs, _ = policy_and_batch
        pixels = inputs["pixel_values"]
        assert torch.equal(compiled(model.get_image_features)(pixels), model.get_image_features(pixels))
        exported = torch.export.export(model.vision_backbone, (pixels,)).module()
        assert torch.equal(exported(pixels), model.vision_backbone(pixels))

    @torch.no_grad()
    def test_prompt_and_step_of_the_library(self, policy_and_batch, compiled):
        model, _, _ = policy_and_batch
        decoder = model.get_decoder()
        caches = [StaticCache(config=decoder.config, max_cache_len=12) for _ in range(2)]
        for embeddings, position in ((torch.randn(2, 9, 32), 0), (torch.randn(2, 1, 32), 9)):
            positions = torch.arange(position, position + embeddings.shape[1])
            inputs = {"inputs_embeds": embeddings, "position_ids": positions.expand(2, -1), "use_cache": True}
            inputs |= {"cache_position": positions}
            outputs = [
                call(past_key_values=cache, **inputs).last_hidden_state
                for call, cache in zip((decoder, compiled(decoder) if position else decoder), caches, strict=True)
            ]
            assert torch.equal(*outputs)

    @torch.no_grad()
    def test_static_reader(self, policy_and_batch, compiled):
        model, _, _ = policy_and_batch
        reader_class = decoding_of(model).StaticReader
        arguments = (model.get_decoder(), torch.ones(2, 9, dtype=torch.long), False, 16, torch.float32)
        readers = [reader_class(*arguments) for _ in range(2)]
        read = compiled(readers[0].read)
        for length in (9, 1, 1, 3):
            embeddings = torch.randn(2, length, 32)
            assert torch.equal(read(embeddings), readers[1].read(embeddings))

    @torch.no_grad()
    def test_exported_prompt(self, policy_and_batch):
        model, _, _ = policy_and_batch
        prompt = Prompt(model.get_decoder(), decoding_of(model).StaticReader)
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, :3] = 0
        inputs = (torch.randn(2, 9, 32), mask)
        for actual, expected in zip(
            torch.export.export(prompt, inputs).module()(*inputs), prompt(*inputs), strict=True
        ):
            assert torch.equal(actual, expected)


class Prompt(nn.Module):
    """Hidden state behind a prompt, and the keys and values of all layers, as an inference engine takes them."""

    def __init__(self, decoder, reader_class):
        super().__init__()
        self.decoder, self.reader_class = decoder, reader_class

    def forward(self, embeddings, mask):
        reader = self.reader_class(self.decoder, mask, True, embeddings.shape[1], embeddings.dtype)
        hidden = reader.read(embeddings)
        return hidden, torch.stack([torch.stack([layer.keys, layer.values]) for layer in reader.layers])


def test_training_goes_on_after_an_action(policy_and_batch):
    """Nothing that was made without gradients is left in the model."""
    model, processor = make()
    inputs = make_batch(processor)
    output = model.predict_action(**inputs, return_dict=True)
    assert not output.token_ids.is_inference()
    assert not output.probabilities.is_inference()
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), output.token_ids], dim=1)
    ids = torch.cat([inputs["input_ids"], output.token_ids], dim=1)
    model(input_ids=ids, labels=labels, pixel_values=inputs["pixel_values"]).loss.backward()
    assert all(p.grad is not None for p in model.language_model.parameters())
