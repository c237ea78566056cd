# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""The pieces of the decoding benchmarks: the plain way is the published one, and the floor counts what runs."""

import copy
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_decoding import INSTRUCTIONS, make
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


sys.path.append(str(REPOSITORY / "benchmarks"))  # behind the packages: some of its scripts have their names

import latency
import plain_decoding as plain


@pytest.fixture(scope="module", params=[{}, {"use_proprio": True, "proprio_dim": 5}], ids=["image", "state"])
def policy(request):
    """A policy whose most probable tokens are action tokens, as after training, and a batch of observations."""
    model, processor = make(**request.param)
    head, config = model.get_output_embeddings().weight, model.config
    with torch.no_grad():
        head[: config.action_token_begin] = 0.0
        head[config.action_token_end :] = 0.0
    rng = np.random.default_rng(0)
    observations = [
        plain.Observation(text, rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), rng.uniform(-1, 1, 5))
        for text in INSTRUCTIONS
    ]
    return model, processor, observations


def test_plain_way_gives_the_same_actions(policy):
    model, processor, observations = policy
    for rows in (observations, observations[1:2]):
        inputs = plain.as_inputs(model, processor, rows)
        expected = model.predict_action(**inputs, return_dict=True)
        policy_to_compare = plain.PlainPolicy(model, processor)
        for name, value in policy_to_compare.preprocess(rows).items():
            assert torch.equal(value, inputs[name])
        actions, token_ids = policy_to_compare.predict(rows)
        assert torch.equal(token_ids, expected.token_ids)
        np.testing.assert_allclose(actions.squeeze(), expected.actions, atol=1e-12)


def test_plain_way_runs_every_block_and_all_logits(policy):
    model, processor, observations = policy
    calls, shapes = [], []
    hooks = [
        block.register_forward_hook(lambda *_: calls.append(1))
        for tower in model.vision_backbone.towers
        for block in tower.blocks
    ]
    head = model.get_output_embeddings()
    hooks.append(head.register_forward_hook(lambda _, __, logits: shapes.append(tuple(logits.shape))))
    plain.PlainPolicy(model, processor).predict(observations)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 4
    length = plain.as_inputs(model, processor, observations)["input_ids"].shape[1] + model.num_image_tokens
    assert shapes == [(3, length, 1088)] + [(3, 1, 1088)] * 6


def test_floor_counts_what_runs(policy):
    model, processor, observations = policy
    inputs = plain.as_inputs(model, processor, observations[1:2])
    tokens = model.predict_action(**inputs, return_dict=True).token_ids
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.predict_action(**inputs, draft_token_ids=tokens)
    flops = latency.action_flops(model, inputs["input_ids"].shape[1], 7)
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_random_weights_are_the_same_at_every_call():
    models = [plain.make_policy("tiny golden")[0] for _ in range(2)]
    for (name, first), (_, second) in zip(*(model.state_dict().items() for model in models), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this build of PyTorch has no MKL")
def test_twin_shares_tensors_and_is_warmed_up_alone():
    model, _ = plain.make_policy("tiny golden")
    warm = plain.twin(model)
    assert warm.warm_up(min_packed_size=0) > 0
    for (name, first), (_, second) in zip(*(each.state_dict().items() for each in (model, warm)), strict=True):
        assert first.data_ptr() == second.data_ptr(), name
    assert type(warm.projector.fc1).__name__ == "PackedLinear"
    assert type(model.projector.fc1) is torch.nn.Linear


def test_other_tokens_are_an_error_unless_they_tie(policy):
    model, processor, observations = policy
    inputs = plain.as_inputs(model, processor, observations)
    expected = model.predict_action(**inputs, return_dict=True).token_ids
    assert latency.count_equal("ours", model, inputs, expected, expected) == 1.0
    actual = expected.clone()
    begin = model.config.action_token_begin
    actual[1, 3] = (actual[1, 3] - begin + 100) % 256 + begin
    with pytest.raises(ValueError, match="some way: "):
        latency.count_equal("some way", model, inputs, actual, expected)
    with torch.no_grad():
        model = copy.deepcopy(model)
        model.get_output_embeddings().weight.zero_()  # all logits tie
    assert latency.count_equal("some way", model, inputs, actual, expected) == pytest.approx(20 / 21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latency_of_every_way(dtype):
    result = latency.measure("tiny golden", 1, 0.0, dtype=dtype)
    assert result["rounds"] == latency.MIN_ROUNDS
    for name in ("milliseconds", "equal_tokens"):
        assert set(result[name]) == set(latency.WAYS)
    assert set(result["speedup"]) == set(latency.WAYS) - {"plain"}
    if dtype == torch.float32:
        assert set(result["equal_tokens"].values()) == {1.0}
    assert latency.rows("tiny golden", 1, result)
