"""
What the language model costs in 4 and 8 bits, and how often its tokens stay those of bfloat16.

    OMP_WAIT_POLICY=passive python benchmarks/quantisation.py --output benchmarks/results/quantisation.json

- `nf4` is the published recipe: bitsandbytes, as it loads with a `BitsAndBytesConfig`, in bfloat16.
- `int8` and `int4` are torchao's weight-only quantisation of the same layers (`pip install torchao`), by output
  channel and by groups of 32 inputs. Where torchao is not installed they are left out.

Towers, projector and output head stay as they are. Each is a process of its own. Memory is that of the language
model's layers: their tensors, with what belongs to them, and what is resident after loading and three actions. Times
are of `predict_action`, without preprocessing. Tokens are compared with those that bfloat16 decodes of the same
observations, frames of the tabletop for the small policy and noise for the random weights of the other: the share of
tokens that are equal, of which one that differs may change those behind it, and by how many bins tokens are off on
average, from those of bfloat16 and from those of float32.
"""

import argparse
import importlib.util
import json
import os
import shlex
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from latency import timed
from load_policy import load_policy
from plain_decoding import (
    SMALL,
    as_inputs,
    in_new_process,
    make_policy,
    random_observations,
    resident_mib,
    tabletop_observations,
)
from preprocessing import machine, summarise
from torch import nn
from transformers import BitsAndBytesConfig


REFERENCE = "bfloat16"
METHODS = ("float32", REFERENCE, "nf4", "int8", "int4")
TORCHAO = ("int8", "int4")


def load(method: str, directory: Path) -> tuple[nn.Module, Any]:
    """A checkpoint with its language model's layers quantised."""
    if method == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return load_policy(directory, dtype=torch.bfloat16, quantization_config=config)
    model, processor = load_policy(directory, dtype=torch.float32 if method == "float32" else torch.bfloat16)
    if method in TORCHAO:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

        config = Int8WeightOnlyConfig()
        if method == "int4":
            config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        quantize_(model.get_decoder(), config)
    return model, processor


def layer_bytes(model: nn.Module) -> int:
    """Bytes of the tensors of the language model's layers, scales and tables included."""
    return sum(_bytes(tensor) for tensor in model.get_decoder().layers.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "quant_state"):  # of bitsandbytes
        state = tensor.quant_state
        return tensor.nbytes + state.absmax.nbytes + state.code.nbytes
    if hasattr(tensor, "__tensor_flatten__"):  # of torchao
        names, _ = tensor.__tensor_flatten__()
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def measure(method: str, directory: str, name: str, observations: list, threads: int) -> dict[str, Any]:
    """Figures and token ids (N, D) of a quantisation."""
    torch.set_num_threads(threads)
    before = resident_mib()
    model, processor = load(method, Path(directory))
    size = layer_bytes(model)
    times, tokens = [], []
    for observation in observations:
        inputs = as_inputs(model, processor, [observation])
        elapsed, _, output = timed(lambda inputs=inputs: model.predict_action(**inputs, return_dict=True))
        times.append(elapsed)
        tokens.append(output.token_ids[0].tolist())
    return {
        "layers_mib": size / 2**20,
        "resident_mib": resident_mib() - before,
        "milliseconds": summarise(times[3:]),
        "token_ids": tokens,
    }


def compare(name: str, count: int, threads: int, methods: list[str]) -> dict[str, dict[str, Any]]:
    """All figures of a configuration."""
    model, processor = make_policy(name)
    if name == SMALL:
        frames = tabletop_observations(model, processor)
    else:
        frames = random_observations(0, processor.use_proprio)
    observations = list(islice(frames, count))
    with tempfile.TemporaryDirectory() as directory:
        for part in (model, processor):
            part.save_pretrained(directory)
        del model
        figures = {
            method: in_new_process(measure, method, directory, name, observations, threads) for method in methods
        }
    tokens = {method: torch.tensor(figure.pop("token_ids")) for method, figure in figures.items()}  # (N, D) each
    for method, figure in figures.items():
        figure["equal_tokens"] = (tokens[method] == tokens[REFERENCE]).float().mean().item()
        for other in ("bfloat16", "float32"):
            figure[f"bins_off_{other}"] = (tokens[method] - tokens[other]).abs().float().mean().item()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", nargs="+", default=[SMALL, "mid-size"])
    parser.add_argument("--observations", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    has_torchao = importlib.util.find_spec("torchao") is not None
    methods = [method for method in METHODS if has_torchao or method not in TORCHAO]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/quantisation.py", *sys.argv[1:]]),
        "machine": {**machine(), "transformers": transformers.__version__, "load_average": os.getloadavg()[0]},
        "configurations": {},
    }
    header = f"{'':14} {'':9} {'layers':>9} {'resident':>9} {'per action':>11} {'tokens':>7}"
    print(f"{header} {'off bf16':>9} {'off fp32':>9}")
    for name in arguments.configurations:
        figures = compare(name, arguments.observations, arguments.threads, methods)
        result["configurations"][name] = figures
        for method, figure in figures.items():
            print(
                f"{name:14} {method:9} {figure['layers_mib']:5.1f} MiB {figure['resident_mib']:5.0f} MiB "
                f"{figure['milliseconds']['median']:8.1f} ms {figure['equal_tokens']:7.3f} "
                f"{figure['bins_off_bfloat16']:9.2f} {figure['bins_off_float32']:9.2f}",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
