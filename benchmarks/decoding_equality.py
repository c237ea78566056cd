"""
Whether every way of decoding gives the tokens of the plain loop.

    OMP_WAIT_POLICY=passive python benchmarks/decoding_equality.py --output benchmarks/results/decoding_equality.json

The plain loop is that of `plain_decoding.py`: `generate` over a growing cache, all logits, the picture processed once
for each tower. Beside it: `predict_action` as it is (a single row is verified from a guess, batches go one by one),
with the previous action as a draft, with a draft that is right, and with one that is random, and one by one with the
library's layers and growing cache, as for models with hooks; as it is and with a draft that is right after `warm_up`,
where that prepares something (in float32 on a CPU, here small layers, too); and the model's own `generate`, with a
growing and with a static cache. All see 1,000 random observations, and 200 consecutive frames of the tabletop in which
the small policy acts, in batches of 1 and of 8.

The random ones are for the tiny golden configuration and for the small policy. Where tokens differ, the result has the
logits of both: a difference that is no tie is an error. Ways round differently where the shapes of products do, so
tokens may differ where two logits are within rounding of each other: two steps of bfloat16, sixteen of float32, which
is two millionths of the logit. These ties are counted, and the first ones listed.
"""

import argparse
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from plain_decoding import (
    SMALL,
    Inputs,
    Observation,
    PlainPolicy,
    as_inputs,
    left_padded,
    make_policy,
    random_observations,
    tabletop_observations,
    twin,
)
from preprocessing import machine
from torch import nn


BATCH_SIZES = (1, 8)
LISTED_TIES = 50
# Relative to the number, whose significant bits are 24 and 8.
TIE = {torch.float32: 16 * 2**-23, torch.bfloat16: 2 * 2**-7}

Ways = dict[str, Callable[[], torch.Tensor]]
Models = tuple[nn.Module, nn.Module | None]


def ways(models: Models, inputs: Inputs, previous: torch.Tensor, right: torch.Tensor, seed: int) -> Ways:
    """Token ids (B, N) of each way but the plain one; `models` are a policy and its twin after `warm_up`, if any."""
    model, warm = models
    config, num_tokens = model.config, right.shape[1]
    begin, end = config.action_token_begin, config.action_token_end
    noise = torch.randint(begin, end, right.shape, generator=torch.Generator().manual_seed(seed))

    def predict(draft: torch.Tensor | None = None, model: nn.Module = model) -> torch.Tensor:
        return model.predict_action(**inputs, draft_token_ids=draft, return_dict=True).token_ids

    def generate(implementation: str | None) -> torch.Tensor:
        settings = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False}
        ids = model.generate(**inputs, **settings, cache_implementation=implementation)
        return ids[:, -num_tokens:]

    def predict_with_hooks() -> torch.Tensor:
        hook = model.get_decoder().register_forward_hook(lambda *_: None)
        try:
            return predict()
        finally:
            hook.remove()

    warmed_up = {
        "after warm_up": lambda: predict(model=warm),
        "after warm_up, right draft": lambda: predict(right, warm),
    }
    return (warmed_up if warm is not None else {}) | {
        "predict_action": predict,
        "library's layers": predict_with_hooks,
        "previous draft": lambda: predict(previous),
        "right draft": lambda: predict(right),
        "random draft": lambda: predict(noise),
        "generate": lambda: generate(None),
        "generate, static cache": lambda: generate("static"),
    }


def compare(name: str, observations: list[Observation], batch_size: int, dtype: torch.dtype, slow_every: int) -> dict:
    """Observations, and those in which each way differs from the plain loop."""
    model, processor = make_policy(name, dtype=dtype)
    warm = twin(model)
    models = (model, warm if warm.warm_up([batch_size], min_packed_size=0) else None)
    plain = PlainPolicy(model, processor)
    previous = torch.full((batch_size, plain.num_tokens), -1)
    counts: dict[str, int] = {}
    differences: list[dict[str, Any]] = []
    for number, start in enumerate(range(0, len(observations), batch_size)):
        rows = observations[start : start + batch_size]
        expected = plain.decode(*plain.embed(left_padded(plain.preprocess(rows))))
        inputs = as_inputs(model, processor, rows)
        for way, decode in ways(models, inputs, previous[: len(rows)], expected, number).items():
            if way.startswith("generate") and number % slow_every:
                continue
            tokens = decode()
            counts[way] = counts.get(way, 0) + len(rows)
            for row in (tokens != expected).any(dim=1).nonzero().flatten().tolist():
                where = {"way": way, "observation": start + row}
                differences.append(where | explain(model, inputs, row, tokens[row], expected[row]))
        previous = expected
    return {"observations": counts, "differences": differences}


@torch.no_grad()
def explain(model: nn.Module, inputs: Inputs, row: int, actual: torch.Tensor, expected: torch.Tensor) -> dict:
    """The first token that differs, and whether its logits tie, by one pass over the prompt and what both agree on."""
    at = int((actual != expected).nonzero()[0])
    mask = inputs["attention_mask"][row].bool()
    ids = torch.cat([inputs["input_ids"][row][mask], expected[:at]])[None]
    observation = {key: inputs[key][row : row + 1] for key in ("pixel_values", "proprio") if key in inputs}
    logits = model(input_ids=ids, **observation, logits_to_keep=1).logits[0, -1].float()
    ours, plain = logits[actual[at]].item(), logits[expected[at]].item()
    is_tie = abs(ours - plain) <= TIE[model.dtype] * max(abs(ours), abs(plain))
    return {"token": at, "ours": [int(actual[at]), ours], "plain": [int(expected[at]), plain], "is_tie": is_tie}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=1000, help="random observations")
    parser.add_argument("--frames", type=int, default=200, help="consecutive frames of the tabletop")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--generate_every", type=int, default=10, help="batches, of which one goes through `generate`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = make_policy(SMALL)
    frames = list(islice(tabletop_observations(model, processor), arguments.frames))
    cells = [(SMALL, "tabletop", frames)]
    for name, has_state in ((SMALL, True), ("tiny golden", False)):
        cells.append((name, "random", list(islice(random_observations(0, has_state), arguments.random))))
    result = {
        "command": shlex.join(["python", "benchmarks/decoding_equality.py", *sys.argv[1:]]),
        "machine": {**machine(), "transformers": transformers.__version__, "load_average": os.getloadavg()[0]},
        "cells": [],
    }
    for name, kind, observations in cells:
        for batch_size in BATCH_SIZES:
            for dtype in arguments.dtypes:
                compared = compare(name, observations, batch_size, getattr(torch, dtype), arguments.generate_every)
                differences = compared.pop("differences")
                ties = [each for each in differences if each["is_tie"]]
                wrong = [each for each in differences if not each["is_tie"]]
                cell = {"policy": name, "observations": kind, "batch_size": batch_size, "dtype": dtype, **compared}
                cell |= {"ties": dict(Counter(each["way"] for each in ties)), "first_ties": ties[:LISTED_TIES]}
                result["cells"].append(cell | {"wrong": wrong})
                print(
                    f"{name:14} {kind:10} batch {batch_size} {dtype:9} {cell['observations']['predict_action']:5} "
                    f"observations, {len(ties)} ties, {len(wrong)} other differences",
                    flush=True,
                )
                if arguments.output:
                    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if wrong := [each for cell in result["cells"] for each in cell["wrong"]]:
        raise SystemExit(f"{len(wrong)} differences are no ties, such as {wrong[0]}.")


if __name__ == "__main__":
    main()
