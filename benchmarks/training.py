"""
A training step of `train_hf.py`, beside a plain loop over the same model that computes all logits.

    python benchmarks/training.py

Ours is the step that `train_hf.py` takes: its trainer, the model's own loss over logits at the supervised positions
alone, clipping, and the trainer's default optimizer, which is fused. The plain loop does what the published training
does with the same model: logits at every position, cross-entropy in float32 over all of them, clipping, and AdamW as
torch makes it by default. Both train all weights in float32 on the same batch of 16 rows as long as those of the
golden batch (27 to 34 tokens of text, 8 of them supervised, behind the pictures' 256; random ids and pixels, on which
no time depends). Their losses must agree, or there is no result.

Speed: both take steps in turns in one process, so that both see the same machine. A ratio is that of two neighbouring
steps; the median and the quartiles of all pairs are reported, by the clock and, where other programs run too, by the
processor time that the steps took. The promise for the tiny golden configuration is 1.3 times the steps per second.

Memory: each way trains for two steps in new processes of its own. `peak` is the highest resident memory of the
process while it does so, less what was resident just before the first step, plus the bytes of the weights: weights,
gradients, moments, activations and logits, without interpreter and libraries. The promise is a ratio of at most 0.7.

Beside both ratios stand those that the arithmetic allows, from the shapes: see `step_flops`, `step_bytes` and
`peak_bytes`. If a step's time is the sum of what its products and its traffic take, its ratio lies between those of
the two. `--output FILE` stores the result. Linux only, for the peak.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

import torch  # noqa: E402
import transformers  # noqa: E402
from arithmetic import linear_flops, vision_flops  # noqa: E402
from data import in_new_process  # noqa: E402
from init_policy import LANGUAGE_MODEL, TOWERS  # noqa: E402
from load_policy import repository_class  # noqa: E402
from preprocessing import machine, summarise  # noqa: E402
from torch import nn  # noqa: E402
from torch.autograd.graph import saved_tensors_hooks  # noqa: E402

from training.arguments import OpenVLATrainingArguments  # noqa: E402
from training.data import TrainingData  # noqa: E402
from training.trainer import OpenVLATrainer  # noqa: E402


IGNORE_INDEX = -100
NUM_SUPERVISED = 8  # seven dimensions and the stop token
LEARNING_RATE, MAX_GRAD_NORM = 1e-4, 1.0
MEMORY_STEPS, MEMORY_PROCESSES = 2, 3  # the moments are there from the second step on
MIN_PAIRS, MAX_SECONDS = 5, 120
FLOAT_BYTES = 4
MIB = 2**20

# What the plain loop holds at once where its backward pass begins, each as large as the logits: the logits, the
# logarithms of their softmax, and the gradients of both.
LOGIT_COPIES = 4

# How often as many bytes as the logits have are read or written in a step. Forward: written by the head (1), copied
# without the last position (2), softmax (2). Backward: gradient of the loss (1), of the softmax (3), of the copy (3),
# and the head's two products (2).
LOGIT_PASSES = 14
# The same of the weights: read forward and backward (2), their gradient written (1), its norm (1), clipping (2), and
# AdamW, which reads four numbers and writes three (7).
PARAMETER_PASSES = 13

Step = Callable[[], float]


@dataclass(frozen=True)
class Setup:
    """
    A policy and a batch.

    Args:
        towers (`tuple[dict, ...]`): `tower_configs`; empty for those of openvla-7b.
        text_config (`dict`): Of the language model, without the vocabulary.
        vocab_size (`int`, defaults to 32064): Of the language model.
        text_length (`int`, defaults to 34): Of the longest row, as in the golden batch.
        batch_size (`int`, defaults to 16): The published one per device.
    """

    towers: tuple[dict[str, Any], ...]
    text_config: dict[str, Any]
    vocab_size: int = 32064
    text_length: int = 34
    batch_size: int = 16


def _llama(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def _dino_and_siglip(depth: int, heads: int, *sizes: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """Towers of the published kinds, each of some width and MLP width."""
    kinds = ({"class_token": True, "num_registers": 4, "layer_scale": True}, {"attention_pool": True})
    return tuple(
        {**kind, "embed_dim": width, "mlp_dim": mlp, "depth": depth, "num_heads": heads}
        for kind, (width, mlp) in zip(kinds, sizes, strict=True)
    )


GOLDEN = "tiny golden"
SETUPS = {
    GOLDEN: Setup(_dino_and_siglip(3, 16, (64, 256), (96, 358)), _llama(32, 88, 2, 2)),
    "small policy": Setup(tuple(TOWERS), LANGUAGE_MODEL, vocab_size=1088),
    "hidden 256": Setup(_dino_and_siglip(5, 3, (192, 768), (192, 768)), _llama(256, 688, 4, 4)),
    "hidden 512": Setup(_dino_and_siglip(5, 3, (192, 768), (192, 768)), _llama(512, 1376, 4, 8)),
}
OPENVLA_7B = Setup((), {})


# What is trained


def make_model(setup: Setup) -> nn.Module:
    """A policy with random weights in float32, in training mode, the same at every call."""
    options: dict[str, Any] = {}
    if setup.towers:
        padding = setup.vocab_size - 64
        options = {
            "vision_backbone_id": None,
            "llm_backbone_id": None,
            "tower_configs": [dict(tower) for tower in setup.towers],
            "text_config": {**setup.text_config, "vocab_size": setup.vocab_size, "pad_token_id": padding},
            "pad_token_id": padding,
            "closing_token_id": None,
        }
    torch.manual_seed(0)
    return repository_class("OpenVLAForActionPrediction")(repository_class("OpenVLAConfig")(**options)).train()


def make_batch(setup: Setup, model: nn.Module) -> dict[str, torch.Tensor]:
    """A batch padded on the right, whose rows are as long as those of the golden batch, or longer by the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (setup.batch_size, setup.text_length)
    shorter = torch.tensor([6, 0, 7]).repeat(setup.batch_size)[: setup.batch_size, None]  # (B, 1)
    length, position = setup.text_length - shorter, torch.arange(setup.text_length)[None]  # (B, 1), (1, L)
    is_text = position < length  # (B, L)
    ids = torch.randint(3, 1000, shape, generator=generator)
    is_learned = is_text & (position >= length - NUM_SUPERVISED)
    is_action = is_learned & (position < length - 1)
    config = model.config
    actions = torch.randint(config.action_token_begin, config.action_token_end, shape, generator=generator)
    ids = torch.where(is_action, actions, ids)
    input_ids = ids.masked_fill(position == 0, 1).masked_fill(~is_text, model.config.pad_token_id)
    input_ids = input_ids.masked_fill(is_learned & ~is_action, model.config.stop_token_id)
    side, channels = model.config.image_sizes[0], 3 * len(model.config.image_sizes)
    return {
        "input_ids": input_ids,
        "attention_mask": is_text.long(),
        "labels": input_ids.masked_fill(~is_learned, IGNORE_INDEX),
        "pixel_values": torch.randn(setup.batch_size, channels, side, side, generator=generator),
        "action_is_pad": torch.zeros(setup.batch_size, 1, dtype=torch.bool),
    }


# The two ways


class NoStream:
    """In the place of a dataset: the trainer's step is handed its batch, and nothing is read."""

    def for_worker(self, worker: int, num_workers: int) -> "NoStream":
        return self


def trainer_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """A step as `train_hf.py` takes it, on one batch for ever; it returns the loss."""
    arguments = OpenVLATrainingArguments(
        output_dir=tempfile.gettempdir(),  # which must be; nothing is written
        eval_strategy="no",
        learning_rate=LEARNING_RATE,
        max_grad_norm=MAX_GRAD_NORM,
        use_cpu=True,
    )
    processor = SimpleNamespace(codec=model.codec, head_type="tokens")
    data = TrainingData(stream=NoStream(), held_out=[], curves=[], num_steps=1, collator=None, plain_collator=None)
    trainer = OpenVLATrainer(model, arguments, data, SimpleNamespace(processor=processor))
    optimizer = trainer.create_optimizer()
    num_items = (batch["labels"] != IGNORE_INDEX).sum()

    def step() -> float:
        loss = trainer.training_step(model, batch, num_items)
        trainer.accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        model.zero_grad()
        return loss.item()

    return step


def plain_step(model: nn.Module, batch: dict[str, torch.Tensor]) -> Step:
    """A step that computes all logits, and their loss as transformers 4.40 did; it returns the loss."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = with_image(batch["labels"], model.num_image_tokens)

    def step() -> float:
        loss = full_loss(model(**inputs, logits_to_keep=0).logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def with_image(labels: torch.Tensor, num_patches: int) -> torch.Tensor:
    """Labels with the patches behind the first token, (B, L) -> (B, L + P)."""
    patches = labels.new_full((len(labels), num_patches), IGNORE_INDEX)
    return torch.cat([labels[:, :1], patches, labels[:, 1:]], dim=1)


def full_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in float32 over all positions (B, T, V), most of which are ignored."""
    logits = logits.float()
    predicted, targets = logits[:, :-1].contiguous(), labels[:, 1:].contiguous()
    return nn.functional.cross_entropy(predicted.view(-1, logits.shape[-1]), targets.view(-1))


WAYS: dict[str, Callable[[nn.Module, dict[str, torch.Tensor]], Step]] = {"plain": plain_step, "ours": trainer_step}


def make_step(way: str, setup: Setup) -> tuple[Step, nn.Module]:
    model = make_model(setup)
    return WAYS[way](model, make_batch(setup, model)), model


# What is measured


def measure_speed(setup: Setup, pairs: int) -> dict[str, Any]:
    """
    Seconds per step of both ways, in turns, and how many times the steps per second ours takes.

    Raises:
        ValueError: If the ways disagree about the loss: they do not train the same.
    """
    steps = {way: make_step(way, setup)[0] for way in WAYS}
    losses = {way: [step(), step()] for way, step in steps.items()}  # untimed: caches, moments
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    processor_seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    began = time.perf_counter()
    for pair in range(pairs):
        if pair >= MIN_PAIRS and time.perf_counter() - began > MAX_SECONDS:
            break
        for way in sorted(WAYS, reverse=pair % 2 == 0):
            start, processor_start = time.perf_counter(), time.process_time()
            losses[way].append(steps[way]())
            seconds[way].append(time.perf_counter() - start)
            processor_seconds[way].append(time.process_time() - processor_start)
    check_same_training(losses)
    return {
        "pairs": len(seconds["ours"]),
        "seconds_per_step": {way: summarise(values) for way, values in seconds.items()},
        "processor_seconds_per_step": {way: summarise(values) for way, values in processor_seconds.items()},
        "steps_per_second_ratio": summarise(_ratios(seconds)),
        "steps_per_processor_second_ratio": summarise(_ratios(processor_seconds)),
        "losses": losses,
    }


def check_same_training(losses: dict[str, list[float]]) -> None:
    """
    Raises:
        ValueError: If the ways disagree about the loss of any step.
    """
    plain, ours = (torch.tensor(losses[way]) for way in ("plain", "ours"))
    if not torch.allclose(ours, plain, rtol=1e-3, atol=0):
        raise ValueError(f"The ways train differently: losses of {losses['plain']} and {losses['ours']}.")


def _ratios(seconds: dict[str, list[float]]) -> list[float]:
    return [plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True)]


def measure_peak(way: str, setup: Setup) -> float:
    """Peak memory of two steps in MiB, in this process, which should have done nothing before."""
    step, model = make_step(way, setup)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(MEMORY_STEPS):
        step()
    return (_resident("VmHWM") - before + weights) / MIB


def _resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(line for line in lines if line.startswith(f"{name}:")).split()[1]
    return 1024 * int(kibibytes)


def measure_memory(setup: Setup) -> dict[str, Any]:
    """Peaks of both ways in MiB, each process anew, and the ratio of their medians."""
    peaks = {way: [in_new_process(measure_peak, way, setup) for _ in range(MEMORY_PROCESSES)] for way in WAYS}
    medians = {way: statistics.median(values) for way, values in peaks.items()}
    return {"peak_mib": peaks, "peak_ratio": medians["ours"] / medians["plain"]}


# What the arithmetic allows


def forward_flops(model: nn.Module, setup: Setup, num_predicted: int) -> int:
    """
    Floating-point operations of the matrix products of one forward pass over the batch.

    A linear layer takes twice its weights for each token, and attention over T tokens 2 T^2 D each for scores and for
    values, masked or not (Kaplan et al. 2020, Scaling Laws for Neural Language Models, section 2.1). What is not a
    product is left out.

    Args:
        num_predicted (`int`): Positions of each row that the output head runs on.
    """
    config, tokens = model.config.text_config, model.num_image_tokens + setup.text_length
    attention_dim = config.num_attention_heads * config.head_dim
    flops = vision_flops(model) + tokens * linear_flops(model.get_decoder())
    flops += config.num_hidden_layers * 4 * tokens**2 * attention_dim
    flops += num_predicted * 2 * model.get_output_embeddings().weight.numel()
    return setup.batch_size * flops


def step_flops(model: nn.Module, setup: Setup, num_predicted: int) -> int:
    """Of a step: the backward pass takes twice the forward's, for inputs and for weights (the same source)."""
    return 3 * forward_flops(model, setup, num_predicted)


def step_bytes(num_parameters: int, saved: int, logits: int) -> int:
    """
    Memory traffic of a step, at the least: `PARAMETER_PASSES` and `LOGIT_PASSES`, counted from the operations that
    torch runs, and what the forward pass saves, written once and read once.

    Args:
        num_parameters (`int`), saved (`int`), logits (`int`): As for [`peak_bytes`].
    """
    return PARAMETER_PASSES * FLOAT_BYTES * num_parameters + 2 * saved + LOGIT_PASSES * logits


def peak_bytes(num_parameters: int, saved: int, logits: int) -> int:
    """
    Peak memory of a step with AdamW in float32, of three things that are there by turns.

    Where the backward pass begins: weights and two moments (12 bytes per parameter), what the forward pass saved, and
    `LOGIT_COPIES` times the logits. Where the optimizer runs: weights, moments and gradients (16 bytes per parameter).

    Args:
        num_parameters (`int`): All of which are trained.
        saved (`int`): Bytes that the layers in front of the head keep for the backward pass.
        logits (`int`): Bytes of the logits.
    """
    return max(3 * FLOAT_BYTES * num_parameters + saved + LOGIT_COPIES * logits, 4 * FLOAT_BYTES * num_parameters)


def saved_bytes(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the tensors that a forward pass with few logits keeps for the backward pass, weights excepted."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(**batch, use_cache=False)
    del outputs
    return sum(storages.values())


def allowed(setup: Setup) -> dict[str, float]:
    """Shapes, and the ratios that follow from them."""
    model = make_model(setup)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    saved = saved_bytes(model, make_batch(setup, model))
    positions = {"plain": model.num_image_tokens + setup.text_length, "ours": NUM_SUPERVISED}
    flops = {way: step_flops(model, setup, count) for way, count in positions.items()}
    logits = {way: setup.batch_size * count * setup.vocab_size * FLOAT_BYTES for way, count in positions.items()}
    traffic = {way: step_bytes(num_parameters, saved, logits[way]) for way in WAYS}
    peaks = {way: peak_bytes(num_parameters, saved, logits[way]) for way in WAYS}
    return {
        "parameters": num_parameters,
        "saved_mib": saved / MIB,
        "logits_mib": {way: count / MIB for way, count in logits.items()},
        "step_gflops": {way: count / 1e9 for way, count in flops.items()},
        "step_traffic_mib": {way: count / MIB for way, count in traffic.items()},
        "steps_per_second_ratio_by_flops": flops["plain"] / flops["ours"],
        "steps_per_second_ratio_by_traffic": traffic["plain"] / traffic["ours"],
        "peak_mib": {way: count / MIB for way, count in peaks.items()},
        "peak_ratio": peaks["ours"] / peaks["plain"],
    }


def openvla_7b() -> dict[str, Any]:
    """What the arithmetic says of openvla-7b and the same batch; nothing is measured."""
    with torch.device("meta"):
        model = make_model(OPENVLA_7B)
    positions = {"plain": model.num_image_tokens + OPENVLA_7B.text_length, "ours": NUM_SUPERVISED}
    flops = {way: step_flops(model, OPENVLA_7B, count) for way, count in positions.items()}
    logits = {way: OPENVLA_7B.batch_size * count * OPENVLA_7B.vocab_size for way, count in positions.items()}
    return {
        "step_gflops": {way: count / 1e9 for way, count in flops.items()},
        "steps_per_second_ratio": flops["plain"] / flops["ours"],
        "float32_logits_mib": {way: FLOAT_BYTES * count / MIB for way, count in logits.items()},
        "copies_of_them_at_the_peak": LOGIT_COPIES,
    }


# The table


def measure(name: str, pairs: int) -> dict[str, Any]:
    """All figures of a configuration."""
    setup = SETUPS[name]
    return {
        "speed": in_new_process(measure_speed, setup, pairs),
        "memory": measure_memory(setup),
        "allowed": in_new_process(allowed, setup),
    }


HEADER = (
    f"{'':14} {'ms per step':^15} {'steps per second':^39} {'peak in MiB':^15} {'ratio':^15}\n{'':14} {'plain':>7} "
    f"{'ours':>7} {'ratio':>6} {'quartiles':>12} {'processor':>9} {'allowed':>10} {'plain':>7} {'ours':>7} "
    f"{'ratio':>6} {'allowed':>8}"
)


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    speed, memory, possible = result["speed"], result["memory"], result["allowed"]
    milliseconds = {way: 1e3 * each["median"] for way, each in speed["seconds_per_step"].items()}
    ratio, processor_ratio = speed["steps_per_second_ratio"], speed["steps_per_processor_second_ratio"]["median"]
    quartiles = f"{ratio['lower_quartile']:.2f}..{ratio['upper_quartile']:.2f}"
    bounds = sorted(possible[f"steps_per_second_ratio_by_{kind}"] for kind in ("flops", "traffic"))
    peaks = {way: statistics.median(values) for way, values in memory["peak_mib"].items()}
    return (
        f"{name:14} {milliseconds['plain']:7.0f} {milliseconds['ours']:7.0f} {ratio['median']:6.2f} {quartiles:>12} "
        f"{processor_ratio:9.2f} {f'{bounds[0]:.2f}..{bounds[1]:.2f}':>10} {peaks['plain']:7.0f} {peaks['ours']:7.0f} "
        f"{memory['peak_ratio']:6.2f} {possible['peak_ratio']:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(SETUPS))
    parser.add_argument("--pairs", type=int, default=15, help="of steps that are timed, fewer where they take long")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result = {
        "command": shlex.join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "machine": {**machine(), "transformers": transformers.__version__, "load_average": os.getloadavg()[0]},
        "openvla-7b": openvla_7b(),
        "setups": {},
    }
    print(HEADER, flush=True)
    for name in arguments.setups:
        result["setups"][name] = measure(name, arguments.pairs)
        print(row(name, result["setups"][name]), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    gain = result["openvla-7b"]["steps_per_second_ratio"]
    print(f"openvla-7b, by its products alone: {gain:.3f} times the steps per second")


if __name__ == "__main__":
    main()
