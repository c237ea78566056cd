"""
Time from a camera's picture to a robot's action, beside a plain implementation of the published decoding.

    python benchmarks/latency.py --threads 2

Both ways have the same weights and see the same observations, in turns in one process, a new one for each
configuration and batch size; a ratio is that of two actions of one round, and the median and quartiles of all pairs
are reported, by the clock and, where other programs run too, by the processor time that the actions took. The plain
way is described in `plain_decoding.py`. Ours is `processor(...)` and `predict_action`, in three cases: as it is, with
the previous action as a draft, and with a draft that is right; and the first and the last of these once more after
`warm_up`, which packs weights on a CPU and records actions as CUDA graphs on a GPU; nobody has run the latter yet. All
must give the same tokens, but where logits tie within rounding, or there is no result; the share of equal tokens is
part of it.

The small policy looks at consecutive frames of the tabletop in which it acts, the others, whose weights are random, at
noise: they never draft well, and what is measured of them is arithmetic and overhead.

`floor` is what the arithmetic takes at the speed that this machine reaches in one large product, measured in the
same run: the used blocks of the towers, the projector, the language model over the prompt, its last layer where
needed; and, token by token, for each token but the first a stream of the language model's weights through the
processor, as fast as products with one vector are here. A draft that is right needs no such stream.

`--reference DIR --reference_python PYTHON` measures the published implementation, too: a checkout of it and the
interpreter of its old environment, in which `reference_latency.py` predicts in turns with this process. Nobody has run
that yet. `--output FILE` stores the result.
"""

import argparse
import functools
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from arithmetic import linear_flops, vision_flops
from decoding_equality import explain
from plain_decoding import (
    CONFIGURATIONS,
    SMALL,
    Inputs,
    Observation,
    PlainPolicy,
    as_inputs,
    in_new_process,
    make_policy,
    random_observations,
    resident_mib,
    tabletop_observations,
    twin,
)
from preprocessing import machine, summarise
from torch import nn


MIN_ROUNDS, STAGE_ROUNDS = 4, 8
WAYS = ("plain", "ours", "previous draft", "right draft", "warmed up", "warmed up, right draft")

Result = dict[str, Any]


def observe(name: str, model: nn.Module, processor: Any, batch_size: int, count: int) -> list[list[Observation]]:
    """Batches of observations that follow each other, of as many episodes as there are rows."""
    if name == SMALL:
        rows = [tabletop_observations(model, processor, 600_000 + 1000 * row) for row in range(batch_size)]
    else:
        rows = [random_observations(row, processor.use_proprio) for row in range(batch_size)]
    return [[next(row) for row in rows] for _ in range(count)]


class OurPolicy:
    """From pictures to actions with this repository."""

    def __init__(self, model: nn.Module, processor: Any):
        self.model, self.processor = model, processor

    def predict(self, observations: list[Observation], draft: torch.Tensor | None = None) -> Any:
        """The output of `predict_action`."""
        inputs = as_inputs(self.model, self.processor, observations)
        return self.model.predict_action(**inputs, draft_token_ids=draft, return_dict=True)


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    """Milliseconds by the clock and of the processor, and what the function returned."""
    processor_start, start = time.process_time(), time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, (time.process_time() - processor_start) * 1e3, result


def measure(
    name: str, batch_size: int, seconds: float, reference: "Reference | None" = None, **placement: Any
) -> Result:
    """All figures of a configuration at one batch size; `placement` is for `make_policy`."""
    model, processor = make_policy(name, **placement)
    plain, ours, warm = PlainPolicy(model, processor), OurPolicy(model, processor), OurPolicy(twin(model), processor)
    batches = observe(name, model, processor, batch_size, max(24, 96 // batch_size) if name == SMALL else 3)
    clock: dict[str, list[float]] = {way: [] for way in WAYS}
    processor_time: dict[str, list[float]] = {way: [] for way in WAYS}
    equal: dict[str, list[float]] = {way: [] for way in WAYS}
    accepted, previous = [], ours.predict(batches[0]).token_ids
    plain.predict(batches[0])  # untimed, as the one above and the one below
    before = resident_mib()
    num_prepared = warm.model.warm_up(batch_sizes=[batch_size])
    grown = resident_mib() - before
    warm.predict(batches[0])
    began, rounds = time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - began < seconds:
        observations = batches[(rounds + 1) % len(batches)]
        right = ours.predict(observations).token_ids
        inputs = as_inputs(model, processor, observations)
        functions = {
            "plain": lambda observations=observations: plain.predict(observations)[1],
            "ours": lambda observations=observations: ours.predict(observations).token_ids,
            "previous draft": lambda observations=observations, draft=previous: ours.predict(observations, draft),
            "right draft": lambda observations=observations, draft=right: ours.predict(observations, draft).token_ids,
            "warmed up": lambda observations=observations: warm.predict(observations).token_ids,
            "warmed up, right draft": lambda observations=observations, draft=right: (
                warm.predict(observations, draft).token_ids
            ),
        }
        for way in sorted(WAYS, reverse=rounds % 2 == 0):
            elapsed, processed, result = timed(functions[way])
            clock[way].append(elapsed)
            processor_time[way].append(processed)
            if way == "previous draft":
                accepted += result.accepted_tokens.tolist()
                result = result.token_ids
            equal[way].append(count_equal(way, model, inputs, result, right))
        if reference is not None:
            clock.setdefault("reference", []).append(reference.predict())
        previous, rounds = right, rounds + 1
    peak, text_length = machine_speed(model), as_inputs(model, processor, batches[0])["input_ids"].shape[1]
    return {
        "rounds": rounds,
        "warm_up": {"prepared": num_prepared, "resident_mib": grown},
        "milliseconds": {way: summarise(values) for way, values in clock.items()},
        "processor_milliseconds": {way: summarise(values) for way, values in processor_time.items()},
        "speedup": ratios(clock),
        "processor_speedup": ratios(processor_time),
        "equal_tokens": {way: statistics.mean(values) for way, values in equal.items()},
        "accepted_of_previous_draft": statistics.mean(accepted),
        "stages": {
            "plain": plain_stages(plain, batches),
            "ours": our_stages(ours, batches),
            "warmed up": our_stages(warm, batches),
        },
        "machine_speed": peak,
        "floor_milliseconds": floor(model, batch_size, text_length, peak),
    }


def measure_alone(
    name: str, batch_size: int, seconds: float, threads: int, reference: tuple[Path, str] | None, **placement: Any
) -> Result:
    """As [`measure`], with a number of threads, beside the published implementation where `reference` has it."""
    torch.set_num_threads(threads)
    beside = None if reference is None else Reference(*reference, name)
    try:
        return measure(name, batch_size, seconds, beside, **placement)
    finally:
        if beside is not None:
            beside.close()


def count_equal(way: str, model: nn.Module, inputs: Inputs, actual: torch.Tensor, expected: torch.Tensor) -> float:
    """
    Share of the tokens that a way decodes as ours does.

    Raises:
        ValueError: If there are others, and their logits do not tie.
    """
    for row in (actual != expected).any(dim=1).nonzero().flatten().tolist():
        difference = explain(model, inputs, row, actual[row], expected[row])
        if not difference["is_tie"]:
            logits = [difference[name][1] for name in ("ours", "plain")]
            raise ValueError(f"{way}: {actual[row].tolist()}; ours: {expected[row].tolist()}; logits: {logits}.")
    return (actual == expected).float().mean().item()


def ratios(times: dict[str, list[float]]) -> Result:
    """How many times as fast as the plain way the others are."""
    pairs = {way: zip(times["plain"], values, strict=True) for way, values in times.items() if way != "plain"}
    return {way: summarise([plain / other for plain, other in each]) for way, each in pairs.items()}


# Stages


def plain_stages(policy: PlainPolicy, batches: list[list[Observation]]) -> dict[str, float]:
    """Median milliseconds of each stage."""
    times: dict[str, list[float]] = {}
    for observations in itertools.islice(itertools.cycle(batches), STAGE_ROUNDS):
        *_, inputs = record(times, "preprocessing", lambda o=observations: policy.preprocess(o))
        *_, prompt = record(times, "towers", lambda i=inputs: policy.embed(i))
        record(times, "prefill", lambda p=prompt: policy.decode(*p, num_tokens=1))
        *_, token_ids = record(times, "all tokens", lambda p=prompt: policy.decode(*p))
        record(times, "detokenise", lambda t=token_ids: policy.detokenise(t))
    medians = {stage: statistics.median(values) for stage, values in times.items()}
    everything = medians.pop("all tokens")
    return {**medians, "decode": everything - medians["prefill"]}


def our_stages(policy: OurPolicy, batches: list[list[Observation]]) -> dict[str, float]:
    """Median milliseconds of each stage. Those inside of `predict_action` follow from its time with a right draft."""
    times: dict[str, list[float]] = {}
    model = policy.model
    for observations in itertools.islice(itertools.cycle(batches), STAGE_ROUNDS):
        *_, inputs = record(times, "preprocessing", lambda o=observations: as_inputs(model, policy.processor, o))
        with torch.no_grad():
            record(times, "towers", lambda i=inputs: model.get_image_features(i["pixel_values"]))
        predict = functools.partial(model.predict_action, **inputs, return_dict=True)
        ids = record(times, "all", predict)[-1].token_ids
        record(times, "one pass", functools.partial(predict, draft_token_ids=ids))
        record(times, "detokenise", lambda t=ids: policy.processor.decode_actions(t.cpu().numpy()))
    medians = {stage: statistics.median(values) for stage, values in times.items()}
    everything, one_pass = medians.pop("all"), medians.pop("one pass")
    prefill = one_pass - medians["towers"] - medians["detokenise"]
    return {**medians, "prefill": prefill, "decode": everything - one_pass}


def record(times: dict[str, list[float]], stage: str, function: Callable[[], Any]) -> tuple[float, float, Any]:
    result = timed(function)
    times.setdefault(stage, []).append(result[0])
    return result


# What the arithmetic takes


def machine_speed(model: nn.Module) -> dict[str, float]:
    """GFLOP/s of a large product, and milliseconds of all products of the language model with a vector."""
    side = 1024 if model.device.type == "cpu" else 8192
    square = torch.randn(side, side, device=model.device, dtype=model.dtype)
    product = statistics.median(timed(lambda: square @ square)[0] for _ in range(20))
    linears = [part.weight for part in model.get_decoder().modules() if isinstance(part, nn.Linear)]
    vectors = {weight: weight.new_ones(1, weight.shape[1]) for weight in linears}

    @torch.inference_mode()
    def stream() -> None:
        for weight in linears:
            nn.functional.linear(vectors[weight], weight)

    return {
        "gflops": 2 * side**3 / product / 1e6,
        "stream_milliseconds": statistics.median(timed(stream)[0] for _ in range(20)),
    }


def floor(model: nn.Module, batch_size: int, text_length: int, speed: dict[str, float]) -> dict[str, float]:
    """Milliseconds of an action whose draft is right, and of one that is decoded token by token."""
    num_tokens = model.get_action_dim()
    gflops = batch_size * action_flops(model, text_length, num_tokens) / 1e9
    one_pass = gflops / speed["gflops"] * 1e3
    return {
        "gflops": gflops,
        "right draft": one_pass,
        "token by token": one_pass + (num_tokens - 1) * speed["stream_milliseconds"],
    }


def action_flops(model: nn.Module, text_length: int, num_tokens: int) -> int:
    """
    Floating-point operations of the matrix products of one observation, with a draft that is right.

    Attention that is causal counts half.
    """
    config, flops = model.config.text_config, vision_flops(model)
    tokens = model.config.num_image_tokens + text_length + num_tokens - 1
    *layers, last = model.get_decoder().layers
    width = config.num_attention_heads * config.head_dim
    flops += sum(tokens * linear_flops(layer) + 2 * tokens**2 * width for layer in layers)
    keys = linear_flops(last.self_attn.k_proj) + linear_flops(last.self_attn.v_proj)
    flops += tokens * keys + num_tokens * (linear_flops(last) - keys + 4 * tokens * width)
    return flops + num_tokens * 2 * config.hidden_size * model.config.n_action_bins


# The published implementation


class Reference:
    """
    The published implementation in a process of its own, with the weights of a configuration.

    Args:
        checkout (`Path`): Its repository.
        python (`str`): An interpreter with its old environment.
        name (`str`): Of `CONFIGURATIONS`; one without a robot's state.
    """

    def __init__(self, checkout: Path, python: str, name: str):
        model, processor = make_policy(name)
        self._folder = tempfile.TemporaryDirectory()
        for part in (model, processor):
            part.save_pretrained(self._folder.name)
        script = Path(__file__).resolve().parent / "reference_latency.py"
        command = [python, str(script), str(checkout), self._folder.name, str(torch.get_num_threads())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def predict(self) -> float:
        """
        Milliseconds of one action.

        Raises:
            RuntimeError: If the reference has stopped.
        """
        self._process.stdin.write("predict\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The reference stopped with exit code {self._process.wait()}; see above why.")
        return float(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


# The table


HEADER = (
    f"{'':20} {'batch':>5} {'way':22} {'ms':>9} {'quartiles':>19} {'speedup':>8} {'quartiles':>14} {'processor':>9}"
)


def rows(name: str, batch_size: int, result: Result) -> list[str]:
    lines = []
    for way, times in result["milliseconds"].items():
        quartiles = f"{times['lower_quartile']:.2f}..{times['upper_quartile']:.2f}"
        line = f"{name:20} {batch_size:5} {way:22} {times['median']:9.2f} {quartiles:>19}"
        if way in result["speedup"]:
            ratio, processed = result["speedup"][way], result["processor_speedup"].get(way, {"median": float("nan")})
            quartiles = f"{ratio['lower_quartile']:.2f}..{ratio['upper_quartile']:.2f}"
            line += f" {ratio['median']:8.2f} {quartiles:>14} {processed['median']:9.2f}"
        lines.append(line)
    bounds = result["floor_milliseconds"]
    lines.append(
        f"{'':26} floor: {bounds['right draft']:.2f} with a right draft, {bounds['token by token']:.2f} token by "
        f"token; {result['accepted_of_previous_draft']:.2f} tokens of the previous draft were right; "
        f"{min(result['equal_tokens'].values()):.1%} of the tokens or more are ours"
    )
    for way, stages in result["stages"].items():
        lines.append(f"{'':26} {way}: " + ", ".join(f"{stage} {value:.2f}" for stage, value in stages.items()))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [SMALL, "tiny golden", "full-size towers"]
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=default)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each configuration and batch size")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--reference", type=Path, metavar="DIR", help="checkout of the published implementation")
    parser.add_argument("--reference_python", default="python", help="interpreter of its environment")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.reference and not set(arguments.configurations) <= {SMALL, "full-size towers", "openvla-7b"}:
        parser.error("`--reference` has no such towers; give `--configurations 'full-size towers'`, or openvla-7b.")
    if arguments.reference and (arguments.device, arguments.dtype) != ("cpu", "float32"):
        parser.error("`--reference` runs on the CPU in float32: beside it, so must we.")
    torch.set_num_threads(arguments.threads)  # for what the result says of the machine
    placement = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    result: Result = {
        "command": shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]]),
        "machine": {**machine(), "transformers": transformers.__version__, "load_average": os.getloadavg()[0]},
        "configurations": {},
    }
    print(HEADER, flush=True)
    for name in arguments.configurations:
        cells = result["configurations"].setdefault(name, {})
        for batch_size in arguments.batch_sizes:
            has_reference = arguments.reference and name != SMALL and batch_size == 1
            reference = (arguments.reference, arguments.reference_python) if has_reference else None
            settings = (arguments.seconds, arguments.threads, reference)
            cells[batch_size] = in_new_process(
                functools.partial(measure_alone, **placement), name, batch_size, *settings
            )
            print("\n".join(rows(name, batch_size, cells[batch_size])), flush=True)
        if arguments.output:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
