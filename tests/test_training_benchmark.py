# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""The pieces of the training benchmarks: that both ways train the same, and that the arithmetic counts what runs."""

import importlib.util
import sys
from types import ModuleType

import matplotlib.image
import pytest
import torch
from conftest import GOLDEN, REPOSITORY, TINY_POLICY
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


BENCHMARKS = REPOSITORY / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, some of whose names are those of packages."""
    sys.path.append(str(BENCHMARKS))  # for what they share; behind the packages
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


benchmark, modes = load_benchmark("training"), load_benchmark("training_modes")

TOWER = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "image_size": 28, "output_block": -1}
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SETUP = benchmark.Setup(({**TOWER, "class_token": True}, TOWER), TEXT, vocab_size=1088, batch_size=3)


def test_golden_setup_is_the_golden_checkpoint():
    with torch.device("meta"):
        model = benchmark.make_model(benchmark.SETUPS[benchmark.GOLDEN])
    with safe_open(GOLDEN / "ckpt" / "model.safetensors", framework="pt") as checkpoint:
        expected = {name: checkpoint.get_slice(name).get_shape() for name in checkpoint.keys()}  # noqa: SIM118
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_batch_is_shaped_as_the_golden_one():
    golden = load_file(GOLDEN / "golden_float32.safetensors")
    batch = benchmark.make_batch(SETUP, benchmark.make_model(SETUP))
    lengths = batch["attention_mask"].sum(dim=1)
    assert sorted(lengths.tolist()) == sorted(golden["train.attention_mask"].sum(dim=1).tolist())
    for mine, its in zip(lengths.argsort(), golden["train.attention_mask"].sum(dim=1).argsort(), strict=True):
        assert torch.equal(batch["labels"][mine] != -100, golden["train.labels"][its] != -100)
    assert batch["input_ids"].shape == golden["train.input_ids"].shape


def test_both_ways_train_the_same_and_differ_in_their_logits():
    losses, shapes = {}, {}
    for way in benchmark.WAYS:
        step, model = benchmark.make_step(way, SETUP)
        shapes[way] = set()
        model.get_output_embeddings().register_forward_hook(
            lambda module, inputs, output, seen=shapes[way]: seen.add(tuple(output.shape))
        )
        losses[way] = [step() for _ in range(4)]
    benchmark.check_same_training(losses)
    assert losses["ours"][-1] < losses["ours"][0]
    assert shapes == {"plain": {(3, 34 + 4, 1088)}, "ours": {(3, 8, 1088)}}


def test_ways_that_train_differently_have_no_result():
    with pytest.raises(ValueError, match="train differently"):
        benchmark.check_same_training({"plain": [7.0, 6.9], "ours": [7.0, 6.8]})


def test_products_are_those_that_run():
    model = benchmark.make_model(SETUP)
    batch = benchmark.make_batch(SETUP, model)
    batch.pop("labels")
    for num_predicted in (8, 38):
        # The counter knows the products of attention only where they are written out.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch, logits_to_keep=num_predicted)
        # transformers 4.57 writes the rotary angles, an outer product, as a matrix product.
        kinds = [flops for name, flops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
        angles = sum(sum(flops.values()) for flops in kinds)
        assert benchmark.forward_flops(model, SETUP, num_predicted) == counter.get_total_flops() - angles


def test_saved_bytes_are_of_the_batch():
    model = benchmark.make_model(SETUP)
    whole = benchmark.make_batch(SETUP, model)
    single = {name: tensor[1:2] for name, tensor in whole.items()}  # the longest row
    saved = {len(batch["input_ids"]): benchmark.saved_bytes(model, batch) for batch in (single, whole)}
    assert 2.5 < saved[3] / saved[1] <= 3.0  # masks and positions of a length are shared


def peak() -> float:
    return benchmark.measure_peak("plain", benchmark.Setup((TOWER,), TEXT, vocab_size=32064, batch_size=16))


def test_peak_memory_holds_the_weights_and_the_logits():
    """In MiB: the logits are nearly all of it, at least the three copies of the forward pass."""
    logits = 16 * (34 + 4) * 32064 * 4 / benchmark.MIB
    # What other tests have left in this process would be used again, and counted as nothing.
    assert 3 * logits < benchmark.in_new_process(peak) < 12 * logits


def test_openvla_7b_gains_little():
    result = benchmark.openvla_7b()
    assert 1.0 < result["steps_per_second_ratio"] < 1.05


class TestModes:
    HISTORY = [
        {"step": 0, "eval_loss": 3.0, "eval_action_accuracy": 0.1, "eval_l1_normalized": 0.5},
        {"step": 10, "loss": 2.5, "data_wait": 0.9},
        {"step": 20, "loss": 2.0, "data_wait": 0.1},
        {"step": 30, "loss": 1.0, "data_wait": 0.3},
        {"step": 30, "eval_loss": 1.5, "eval_action_accuracy": 0.6, "eval_l1_normalized": 0.2},
        {"step": 30, "train_loss": 1.8, "train_steps_per_second": 2.0},
    ]

    def test_curves(self):
        result = modes.summarise(self.HISTORY)
        assert (result["step"], result["loss"]) == ([10, 20, 30], [2.5, 2.0, 1.0])
        assert (result["validation_step"], result["validation_accuracy"]) == ([0, 30], [0.1, 0.6])
        assert result["data_wait"] == 0.2

    def test_trained_parameters(self):
        names = ("full", "last layer", "LoRA")
        full, last_layer, lora = (modes.trainable_parameters(TINY_POLICY, modes.RUNS[name]) for name in names)
        assert full > last_layer > 0
        assert lora > 0

    def test_picture(self, tmp_path):
        runs = {name: modes.summarise(self.HISTORY) | {"trainable_parameters": 10**6} for name in modes.RUNS}
        modes.draw(runs, tmp_path / "modes.png")
        picture = matplotlib.image.imread(tmp_path / "modes.png")
        assert picture.shape[0] > 400
        assert picture.min() == 0.0

    def test_a_failing_run_says_why(self):
        with pytest.raises(RuntimeError, match="noise"):
            modes.run(["-m", "tabletop.record", "--episodes", "1", "--output", "unwritten", "--noise", "-1"])
