#!/usr/bin/env python3
# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""
Merge a LoRA adapter into its base: a complete repository that the Auto classes load.

    python tools/merge_adapter.py ADAPTER --output DIR
        [--base_model DIR_OR_ID] [--dtype bfloat16] [--overwrite] [--push_to_hub REPO]

ADAPTER is a directory or a Hub id with adapter_config.json and adapter_model.safetensors, as PEFT writes them. Its
base is the one that it was trained over, published or ours, unless another is given; an adapter that was trained over
a base in 4 bits is merged into the unquantised base.

The sum is taken in float32 on the CPU, one weights file of the base after another, so that the model is never in
memory whole. Statistics and processor that lie beside the adapter replace those of the base, and so do the fields of
the configuration in its action_config.json: a head that the base has not got comes from the adapter.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from convert_checkpoint import STATISTICS_NAME, Source, check_target, push, read_object, replacing
from load_policy import REPOSITORY, repository_class
from model_card import model_card
from native_checkpoint import preview, raise_on_difference
from oft_checkpoint import component_files
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin


CONFIG_NAME, ADAPTER_NAME = "adapter_config.json", "adapter_model.safetensors"
# Fields of the policy's configuration, beside an adapter of `train_hf.py`: its base may have them otherwise.
ACTION_CONFIG_NAME = "action_config.json"
WEIGHTS_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"

# Ends of the names of an adapter's tensors, and what the tensor is: factors of an update, of a layer or an embedding.
FACTORS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
}

# Settings of LoRA under which a tensor is not base + scale * B A.
OTHER_ARITHMETIC = (
    *("use_dora", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config"),
    *("alora_invocation_tokens", "layer_replication", "target_parameters", "fan_in_fan_out", "ensure_weight_tying"),
)
# Initialisations that leave the base as it is; the others (PiSSA, OLoRA, LoftQ, ...) change it before training.
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")

# Rows of a tensor that are merged at a time: openvla-7b's widest take 45 MB in float32.
ROWS = 1024


class Adapter:
    """
    A LoRA adapter whose tensors are read when they are needed.

    Args:
        source ([`Source`]): Directory or Hub repository.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is no LoRA adapter, or one of another arithmetic.
    """

    def __init__(self, source: Source):
        self.config = read_lora_config(source)
        self.action_config = source.read_json(ACTION_CONFIG_NAME) or {}
        path = source.fetch(ADAPTER_NAME)
        if path is None:
            raise FileNotFoundError(f"{source.root} has no {ADAPTER_NAME}; save the adapter again, as safetensors.")
        self._file = safe_open(path, framework="pt")
        # By tensor of the base: names of the tensors that make its update, or of the one that replaces it.
        self.changes: dict[str, dict[str, str]] = {}
        for key in self._file.keys():  # noqa: SIM118 - a safetensors file is no dictionary
            name, kind = place_of(key)
            self.changes.setdefault(name, {})[kind] = key

    def check(self, shapes: dict[str, Sequence[int]]) -> None:
        """
        Hold the adapter against its base.

        Args:
            shapes (`dict[str, Sequence[int]]`): Of the tensors of the base.

        Raises:
            ValueError: Listing the tensors of the adapter that have no place in the base, or do not fit theirs.
        """
        lost = [key for name in self.changes.keys() - shapes.keys() for key in self.changes[name].values()]
        if lost:
            raise ValueError(
                f"{len(lost)} tensors of the adapter change nothing that the base has: {preview(sorted(lost))}. Is it "
                "an adapter for another model? --base_model names its own."
            )
        misfits = [name for name in self.changes if not self._fits(name, tuple(shapes[name]))]
        if misfits:
            raise ValueError(
                f"The adapter does not fit the base, or lacks half of an update, at {len(misfits)} tensors: "
                f"{preview(sorted(misfits))}."
            )

    def whole_tensors(self) -> set[str]:
        """Names of the tensors that it holds whole, such as those of a new head."""
        return {name for name, change in self.changes.items() if "value" in change}

    def whole_tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """One of [`whole_tensors`]."""
        return self._file.get_tensor(self.changes[name]["value"]).to(dtype)

    def _fits(self, name: str, shape: tuple[int, ...]) -> bool:
        change = {kind: tuple(self._file.get_slice(key).get_shape()) for kind, key in self.changes[name].items()}
        if change.pop("value", shape) != shape:
            return False
        r, _ = self._rank_and_scale(name)
        match change:
            case {"down": down, "up": up, **rest} if not rest:
                return down == (r, *shape[1:]) and up[:2] == (shape[0], r) and math.prod(up[2:]) == 1
            case {"embedding_down": down, "embedding_up": up, **rest} if not rest:
                return down == (r, shape[0]) and up == (shape[1], r)
        return not change

    def _rank_and_scale(self, name: str) -> tuple[int, float]:
        config, module = self.config, name.removesuffix(".weight")
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
        return r, alpha / (math.sqrt(r) if config.use_rslora else r)

    def merge(self, name: str, base: Any, dtype: torch.dtype | None) -> torch.Tensor:
        """
        A tensor of the base with its update.

        Args:
            name (`str`): Of the tensor.
            base (slice of a safetensors file): The tensor, not read yet.
            dtype (`torch.dtype`, *optional*): Of the result. Default: as in the base.
        """
        tensors = {kind: self._file.get_tensor(key) for kind, key in self.changes.get(name, {}).items()}
        dtype = base[:1].dtype if dtype is None else dtype
        base = tensors.pop("value", base)
        if not tensors:
            return base[:].to(dtype)
        _, scale = self._rank_and_scale(name)
        if "up" in tensors:
            # A convolution's kernel is a matrix with one row per output channel.
            up, down = tensors["up"].float().flatten(1), tensors["down"].float().flatten(1)  # (M, r), (r, N)
        else:
            up, down = tensors["embedding_down"].float().T, tensors["embedding_up"].float().T
        merged = torch.empty(list(base.shape if isinstance(base, torch.Tensor) else base.get_shape()), dtype=dtype)
        for start in range(0, len(merged), ROWS):
            rows = slice(start, start + ROWS)
            weight = base[rows].float()
            merged[rows] = weight + ((up[rows] @ down) * scale).view_as(weight)
        return merged


def read_lora_config(source: Source) -> LoraConfig:
    """The configuration of an adapter, if it is one that can be merged."""
    path = source.fetch(CONFIG_NAME)
    if path is None:
        raise FileNotFoundError(f"{source.root} has no {CONFIG_NAME}: it is no PEFT adapter.")
    kind = read_object(path).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{source.root} is an adapter of type {kind}; only LORA can be merged.")
    config = PeftConfig.from_pretrained(str(path.parent))
    if other := [name for name in OTHER_ARITHMETIC if getattr(config, name, None)]:
        raise ValueError(f"{source.root} is a LoRA adapter with {other}, which cannot be merged tensor by tensor.")
    if config.init_lora_weights not in PLAIN_INITIALIZATIONS:
        raise ValueError(
            f"{source.root} was initialised by {config.init_lora_weights!r}, which changes the base as well: convert "
            "the adapter with PEFT first (`save_pretrained(path_initial_model_for_weight_conversion=...)`)."
        )
    return config


def place_of(key: str) -> tuple[str, str]:
    """The tensor of the base that a tensor of an adapter changes, and what it is to it."""
    name = key.removeprefix("base_model.model.")
    for end, kind in FACTORS.items():
        if name.endswith(end):
            return f"{name.removesuffix(end)}.weight", kind
    # Whole tensors: of `modules_to_save`, biases, and the head, which PEFT stores where it is adapted.
    return name.replace(".base_layer.", "."), "value"


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    base_model: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    repo_id: str | None = None,
) -> None:
    """
    Write a complete repository of the merged model.

    Args:
        adapter (`str` or `Path`): Directory or Hub id.
        output (`str` or `Path`): Directory to write. It appears whole, or not at all.
        base_model (`str` or `Path`, *optional*): Directory or Hub id. Default: what the adapter's configuration names.
        dtype (`torch.dtype`, *optional*): Of the weights written. Default: as in the base.
        overwrite (`bool`, defaults to `False`): Replace `output`, if it is a repository.
        repo_id (`str`, *optional*): Hub repository to push `output` to; it is created where need be.

    Raises:
        FileNotFoundError: If adapter or base, or a file they need, does not exist.
        ValueError: If `output` is in the way, or the adapter cannot be merged completely.
    """
    output, located = Path(output).resolve(), Source.locate(str(adapter), "main")
    loaded = Adapter(located)
    base = locate_base(loaded.config, base_model)
    for source in (located, base):
        check_target(output, source, overwrite)
    with replacing(output) as directory:
        write_merged(loaded, located, base, directory, dtype, repo_id or output.name)
    print(f"{output}: written")
    if repo_id is not None:
        push(output, repo_id)


def locate_base(config: LoraConfig, base_model: str | Path | None) -> Source:
    """The base that was asked for, or the one that the adapter was trained over."""
    if base_model is not None:
        return Source.locate(str(base_model), "main")
    if not config.base_model_name_or_path:
        raise ValueError(f"{CONFIG_NAME} names no base model; give --base_model.")
    try:
        return Source.locate(config.base_model_name_or_path, config.revision or "main")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The adapter was trained over {config.base_model_name_or_path}, which does not exist here; give "
            "--base_model."
        ) from error


def write_merged(
    adapter: Adapter, source: Source, base: Source, directory: Path, dtype: torch.dtype | None, repo_id: str
) -> None:
    """
    Write the files of the merged model into a directory.

    Args:
        adapter ([`Adapter`]): To merge.
        source ([`Source`]): Where it comes from, perhaps with statistics and a processor.
        base ([`Source`]): What to merge it into.
        directory (`Path`): Exists.
        dtype (`torch.dtype`, *optional*): Of the weights written. Default: as in the base.
        repo_id (`str`): What the model card says to load.
    """
    model, processor = load_around_weights(source, base, adapter.action_config)
    if dtype is not None:
        model.config.dtype = str(dtype).removeprefix("torch.")
    write_weights(adapter, base, model, directory, dtype)
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)
    processor.save_pretrained(directory)
    for path in [*REPOSITORY.glob("*_openvla.py"), REPOSITORY / "handler.py"]:
        shutil.copy(path, directory)
    card = model_card(
        repo_id,
        f"{base.described} with the LoRA adapter {source.described} merged into its weights.",
        unnorm_keys=sorted(model.norm_stats),
        base_model=None if base.is_local else base.root,
        llm_backbone_id=model.config.llm_backbone_id,
    )
    (directory / "README.md").write_text(card, encoding="utf-8")


def load_around_weights(
    source: Source, base: Source, action_config: dict[str, Any]
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model without weights (on the meta device), configured as the adapter's is, and the processor."""
    if base.fetch("config.json") is None:
        raise FileNotFoundError(f"The base model {base.root} has no config.json.")
    statistics = source.read_json(STATISTICS_NAME)
    changes = action_config if statistics is None else {**action_config, "norm_stats": statistics}
    config = repository_class("OpenVLAConfig").from_pretrained(base.root, revision=base.revision, **changes)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"The base model {base.root} is quantised; give the full one with --base_model.")
    if parts := component_files(base.files()):
        raise ValueError(
            f"The base model {base.root} is an OpenVLA-OFT checkpoint, and {preview(sorted(parts.values()))} would be "
            "lost: make one repository of it with tools/convert_checkpoint.py, and give that with --base_model."
        )
    model_class = repository_class("OpenVLAForActionPrediction")
    config.architectures = [model_class.__name__]
    with torch.device("meta"):
        model = model_class(config)
    if base.fetch("generation_config.json") is not None:
        model.generation_config = GenerationConfig.from_pretrained(base.root, revision=base.revision)
    print(f"statistics of the {'base' if statistics is None else 'adapter'}: {preview(sorted(model.norm_stats))}")
    # Only our own processor_config.json is complete without a config.json beside it, which an adapter has not.
    with_processor = "prompt_style" in (source.read_json("processor_config.json") or {})
    print(f"processor of the {'adapter' if with_processor else 'base'}")
    origin = source if with_processor else base
    processor = repository_class("OpenVLAProcessor").from_pretrained(origin.root, revision=origin.revision)
    return model, processor


def write_weights(
    adapter: Adapter, base: Source, model: PreTrainedModel, directory: Path, dtype: torch.dtype | None
) -> None:
    """Write the merged tensors, in files that are divided as those of the base are."""
    paths = weights_files(base)
    with ExitStack() as stack:
        files = {name: stack.enter_context(safe_open(path, framework="pt")) for name, path in paths.items()}
        shapes = {key: file.get_slice(key).get_shape() for file in files.values() for key in file.keys()}  # noqa: SIM118
    # Tied weights are in the file once, under the name that comes first.
    wanted = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    added = {name: wanted[name] for name in sorted(adapter.whole_tensors() & wanted.keys() - shapes.keys())}
    left = shapes.keys() - model.state_dict().keys()  # a head in whose place the adapter has another
    raise_on_difference(
        missing=wanted.keys() - shapes.keys() - added.keys(), surplus=[] if adapter.action_config else left
    )
    adapter.check(shapes | added)
    weight_map, total_size = {}, 0
    for name, path in paths.items():
        with safe_open(path, framework="pt") as file:
            kept = [key for key in file.keys() if key not in left]  # noqa: SIM118
            tensors = {key: adapter.merge(key, file.get_slice(key), dtype) for key in kept}
            if name == list(paths)[-1]:
                like = next(iter(tensors.values())).dtype
                tensors |= {key: adapter.whole_tensor(key, like) for key in added}
            save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        del tensors
        print(f"{name}: merged")
    if list(paths) != [WEIGHTS_NAME]:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def weights_files(base: Source) -> dict[str, Path]:
    """Names and paths of the weights files of a repository."""
    index = base.read_json(INDEX_NAME)
    names = [WEIGHTS_NAME] if index is None else sorted(set(index["weight_map"].values()))
    paths = {name: base.fetch(name) for name in names}
    if missing := [name for name, path in paths.items() if path is None]:
        raise FileNotFoundError(f"The base model {base.root} has no {preview(missing)}.")
    return paths


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="directory or Hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--base_model", metavar="DIR_OR_ID", help="default: what the adapter was trained over")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights written; default: as in the base",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR, if it is a model repository")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload DIR to this Hub repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error becomes one line and exit status 1."""
    options = parse_arguments(arguments)
    try:
        merge(
            options.adapter,
            options.output,
            base_model=options.base_model,
            dtype=None if options.dtype is None else getattr(torch, options.dtype),
            overwrite=options.overwrite,
            repo_id=options.push_to_hub,
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
