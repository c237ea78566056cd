"""
Turn an OpenVLA checkpoint into a complete repository with this project's code, which the Auto classes load.

    python tools/convert_checkpoint.py SOURCE OUT [--push_to_hub REPO]

What SOURCE is follows from its config.json:

- a checkpoint in the Hugging Face format, published or ours: a directory or a Hub id. The code that comes with it is
  never run; this checkout's code replaces it.
- a native Prismatic checkpoint of a VLA: a run directory with config.json, dataset_statistics.json and checkpoints/,
  a .pt file in there, or a Hub id with these files. Its language model's tokenizer is given with --tokenizer.
- a native Prismatic checkpoint of a plain VLM, to start a training from. Its vision towers were frozen and are
  usually not in the file; --vision_weights gives timm's checkpoints of them, in the order of the towers.

Where the published conversion departs from native training, a native checkpoint is converted as published:

- `rms_norm_eps` of the language model is 1e-6, the default of its configuration class, in every published
  checkpoint. Llama 2 and native training use 1e-5: --rms_norm_eps 1e-5.
- The normalisation constants of a VLA's image processor (`tvf_normalize_params`) are rounded to bfloat16: those of
  DINOv2 and CLIP change, the 0.5 of SigLIP and of the ImageNet tower does not. `means` and `stds` stay exact, and so
  are all constants of a plain VLM, which was trained with them.
"""

import argparse
import inspect
import json
import math
import pickle
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from load_policy import repository_class
from model_card import model_card
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file


STATISTICS_NAME = "dataset_statistics.json"
PUBLISHED_RMS_NORM_EPS = 1e-6

_CLIP_336, _SIGLIP_384, _DINOSIGLIP_384 = "clip-vit-l-336px", "siglip-vit-so400m-384px", "dinosiglip-vit-so-384px"
_DINOCLIP_336, _DINOSIGLIP_224 = "dinoclip-vit-l-336px", "dinosiglip-vit-so-224px"
_VICUNA, _LLAMA = "vicuna-v15-7b", "llama2-7b-pure"

_CLIP_VICUNA_VLMS = (
    "reproduction-llava-v15+7b",
    "one-stage+7b",
    "full-ft-multi-stage+7b",
    "full-ft-one-stage+7b",
    "vicuna-no-cotraining+7b",
    "train-1.25-epochs+7b",
    "train-1.5-epochs+7b",
    "train-2-epochs+7b",
    "train-3-epochs+7b",
    "llava-lvis4v+7b",
    "llava-lrv+7b",
    "llava-lvis4v-lrv+7b",
)
_CLIP_LANGUAGE_MODELS = {
    "reproduction-llava-v15+13b": "vicuna-v15-13b",
    "one-stage+13b": "vicuna-v15-13b",
    "llama2+7b": _LLAMA,
    "llama2+13b": "llama2-13b-pure",
    "llama2-no-cotraining+7b": _LLAMA,
    "llama2-chat+7b": "llama2-7b-chat",
    "llama2-chat+13b": "llama2-13b-chat",
    "mistral-v0.1+7b": "mistral-v0.1-7b-pure",
    "mistral-instruct-v0.1+7b": "mistral-v0.1-7b-instruct",
    "phi-2+3b": "phi-2-3b",
}
_PRISMS = {"clip": _CLIP_336, "siglip": _SIGLIP_384, "dinosiglip": _DINOSIGLIP_384}

# VLMs that native VLAs start from: vision backbone, language model, resize strategy. Not listed: prism-siglip+13b,
# whose training configuration names a CLIP tower and whose published description a SigLIP one.
BASE_VLMS = {
    **dict.fromkeys(_CLIP_VICUNA_VLMS, (_CLIP_336, _VICUNA, "letterbox")),
    **{name: (_CLIP_336, llm, "letterbox") for name, llm in _CLIP_LANGUAGE_MODELS.items()},
    "in1k-224px+7b": ("in1k-vit-l", _VICUNA, "letterbox"),
    "dinov2-224px+7b": ("dinov2-vit-l", _VICUNA, "letterbox"),
    "clip-224px+7b": ("clip-vit-l", _VICUNA, "letterbox"),
    "siglip-224px+7b": ("siglip-vit-so400m", _VICUNA, "letterbox"),
    "clip-336px-resize-crop+7b": (_CLIP_336, _VICUNA, "resize-crop"),
    "clip-336px-resize-naive+7b": (_CLIP_336, _VICUNA, "resize-naive"),
    "siglip-384px-letterbox+7b": (_SIGLIP_384, _VICUNA, "letterbox"),
    "siglip-384px-resize-crop+7b": (_SIGLIP_384, _VICUNA, "resize-crop"),
    "siglip-384px-resize-naive+7b": (_SIGLIP_384, _VICUNA, "resize-naive"),
    "dinoclip-336px-letterbox+7b": (_DINOCLIP_336, _VICUNA, "letterbox"),
    "dinoclip-336px-resize-naive+7b": (_DINOCLIP_336, _VICUNA, "resize-naive"),
    "dinosiglip-384px-letterbox+7b": (_DINOSIGLIP_384, _VICUNA, "letterbox"),
    "dinosiglip-384px-resize-naive+7b": (_DINOSIGLIP_384, _VICUNA, "resize-naive"),
    "dinosiglip-224px-resize-naive+7b": (_DINOSIGLIP_224, _VICUNA, "resize-naive"),
    "prism-dinosiglip-224px+7b": (_DINOSIGLIP_224, _LLAMA, "resize-naive"),
    "prism-dinosiglip-224px-controlled+7b": (_DINOSIGLIP_224, _LLAMA, "resize-naive"),
    **{
        f"prism-{name}{variant}+{size}": (vision, f"llama2-{size}-pure", "resize-naive")
        for name, vision in _PRISMS.items()
        for variant in ("", "-controlled")
        for size in ("7b", "13b")
        if f"{name}{variant}+{size}" != "siglip+13b"
    },
}

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Mean and standard deviation of a tower's pixels, by a part of its timm name.
NORMALIZATION = {
    "_dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "_siglip_": _HALF,
    "_clip_": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "augreg_in21k_ft_in1k": _HALF,
}

# Modules of a native checkpoint's vision backbone, and where their tensors belong.
_NATIVE_TOWERS = {
    "featurizer": "vision_backbone.featurizer",
    "dino_featurizer": "vision_backbone.featurizer",
    "siglip_featurizer": "vision_backbone.fused_featurizer",
    "clip_featurizer": "vision_backbone.fused_featurizer",
}
_TOWERS = ("vision_backbone.featurizer", "vision_backbone.fused_featurizer")


@dataclass(frozen=True)
class NativeOptions:
    """
    What a native checkpoint does not say by itself.

    Args:
        tokenizer (`str`, *optional*): Directory or Hub id of the language model's tokenizer.
        vision_weights (`Sequence[str]`): timm checkpoints, one per tower, where the checkpoint has no vision weights.
        vision_backbone_id, llm_backbone_id (`str`, *optional*): Instead of what the run's config.json names.
        rms_norm_eps (`float`, defaults to 1e-6): Of the language model; see above.
        overrides (`Mapping`): Fields of `OpenVLAConfig`, which have the last word; those of its `text_config` are
            merged into the ones found.
    """

    tokenizer: str | None = None
    vision_weights: Sequence[str] = ()
    vision_backbone_id: str | None = None
    llm_backbone_id: str | None = None
    rms_norm_eps: float = PUBLISHED_RMS_NORM_EPS
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Source:
    """
    A directory or a Hub repository with a checkpoint.

    Args:
        root (`str`): The directory or the Hub id.
        revision (`str`, *optional*): On the Hub.
        checkpoint (`str`, *optional*): The .pt file that was asked for, relative to `root`.
    """

    root: str
    revision: str | None = None
    checkpoint: str | None = None

    @classmethod
    def locate(cls, source: str, revision: str | None = None) -> "Source":
        """The source behind a command-line argument: a directory, a .pt file or a Hub id."""
        path = Path(source)
        if path.is_file():
            root = path.parent.parent if path.parent.name == "checkpoints" else path.parent
            return cls(str(root), revision, path.relative_to(root).as_posix())
        if not path.is_dir() and (path.suffix == ".pt" or path.is_absolute() or source.count("/") > 1):
            raise FileNotFoundError(f"{source} is neither a directory, nor a .pt file, nor a Hub id.")
        return cls(source, revision)

    @property
    def is_local(self) -> bool:
        return Path(self.root).is_dir()

    @property
    def described(self) -> str:
        """The source in a model card, which tells no local paths."""
        if self.is_local:
            return f"`{Path(self.root).resolve().name}`"
        return f"[{self.root}](https://huggingface.co/{self.root})"

    def fetch(self, name: str) -> Path | None:
        """Path of a file, downloaded where need be; `None` where there is none."""
        path = cached_file(self.root, name, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)

    def read_json(self, name: str) -> dict | None:
        path = self.fetch(name)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{name} of {self.root} is not JSON: {error}.") from error
        if not isinstance(content, dict):
            raise ValueError(f"{name} of {self.root} holds a {type(content).__name__} instead of an object.")
        return content

    def native_checkpoint(self) -> Path:
        """The .pt file that was asked for, or the newest one in `checkpoints`."""
        name = self.checkpoint
        if name is None and self.is_local:
            name = choose_checkpoint(f"checkpoints/{path.name}" for path in Path(self.root, "checkpoints").glob("*"))
        elif name is None:
            name = choose_checkpoint(HfApi().list_repo_files(self.root, revision=self.revision))
        path = self.fetch(name)
        if path is None:
            raise FileNotFoundError(f"{self.root} has no {name}; is it a broken link?")
        return path


def choose_checkpoint(names: Iterable[str]) -> str:
    """
    The native checkpoint to convert: `latest-checkpoint.pt`, else the one with the highest step.

    Raises:
        FileNotFoundError: If there is neither; lists what there is.
    """
    names = sorted(name for name in names if name.startswith("checkpoints/"))
    if "checkpoints/latest-checkpoint.pt" in names:
        return "checkpoints/latest-checkpoint.pt"
    steps = {name: re.fullmatch(r"checkpoints/step-(\d+)-epoch-(\d+)-loss=.*\.pt", name) for name in names}
    numbered = {name: (int(match[1]), int(match[2])) for name, match in steps.items() if match}
    if not numbered:
        raise FileNotFoundError(
            "`checkpoints` holds neither latest-checkpoint.pt nor step-XXXXXX-epoch-YY-loss=Z.pt, but "
            f"{preview(names) or 'nothing'}."
        )
    return max(numbered, key=numbered.get)


def preview(names: Iterable[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    repo_id: str | None = None,
    native: NativeOptions = NativeOptions(),
) -> Path:
    """
    Write a complete repository.

    Args:
        source (`str` or `Path`): Directory, .pt file or Hub id.
        out (`str` or `Path`): Directory to write. It appears whole, or not at all.
        revision (`str`, *optional*): Of `source`, on the Hub.
        dtype (`str`, *optional*): Of the weights written. Default: as they are, and `bfloat16` for native checkpoints.
        max_shard_size (`str`, defaults to `"5GB"`): Of a weights file.
        overwrite (`bool`, defaults to `False`): Replace `out`, if it is a repository.
        repo_id (`str`, *optional*): Hub repository to push `out` to; it is created where need be.
        native ([`NativeOptions`]): For native checkpoints only.

    Returns:
        `Path`: The directory written.

    Raises:
        FileNotFoundError: If `source`, or a file it needs, does not exist.
        ValueError: If `out` is in the way, or the source cannot be converted completely.
    """
    out, located = Path(out).resolve(), Source.locate(str(source), revision)
    check_target(out, located, overwrite)
    model, processor, origin = load_source(located, dtype, native)
    card = model_card(
        repo_id or out.name,
        origin,
        unnorm_keys=sorted(model.norm_stats),
        base_model=None if located.is_local else located.root,
        llm_backbone_id=model.config.llm_backbone_id,
    )
    with replacing(out) as directory:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        processor.save_pretrained(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: written, {model.num_parameters():,} parameters in {model.dtype}")
    if repo_id is not None:
        push(out, repo_id)
    return out


def load_source(
    source: Source, dtype: str | None, native: NativeOptions
) -> tuple[PreTrainedModel, ProcessorMixin, str]:
    """Model and processor of a source, by its config.json, and a sentence on where they come from."""
    config = source.read_json("config.json")
    if config is None:
        raise FileNotFoundError(f"{source.root} has no config.json.")
    if config.get("model_type") in ("openvla", "prismatic"):
        if native != NativeOptions():
            raise ValueError(
                f"{source.root} is in the Hugging Face format; options for native checkpoints do not apply."
            )
        return load_published(source, config, dtype or "auto")
    if isinstance(config.get("vla") or config.get("model"), dict):
        return load_native(source, config, dtype or "bfloat16", native)
    raise ValueError(
        f"config.json of {source.root} is neither that of an OpenVLA in the Hugging Face format (`model_type` "
        f"openvla) nor of a native run (`vla` or `model`); it has {preview(sorted(config))}."
    )


def check_target(out: Path, source: Source, overwrite: bool) -> None:
    """Refuse to write where something would be lost."""
    if source.is_local and Path(source.root).resolve().is_relative_to(out):
        raise ValueError(f"{out} is or contains the source; choose another directory.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{out} exists and is not empty; --overwrite replaces it.")
    if not (out / "config.json").is_file():
        raise ValueError(f"{out} holds no config.json: it is not a model repository and is not replaced.")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, which takes its place when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(Path(temporary) / "old")
        new.rename(out)


def push(directory: Path, repo_id: str) -> None:
    """Upload a directory to the Hub."""
    api = HfApi()
    url = api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(folder_path=directory, repo_id=url.repo_id, commit_message="Upload converted OpenVLA checkpoint")
    print(f"{url}: pushed")


# The Hugging Face format


def load_published(source: Source, config: dict, dtype: str) -> tuple[PreTrainedModel, ProcessorMixin, str]:
    """
    Model and processor of a checkpoint in the Hugging Face format, and where they come from.

    Raises:
        ValueError: If tensors are missing or left over.
    """
    print(f"{source.root}: a checkpoint in the Hugging Face format")
    if source.checkpoint is not None:
        raise ValueError(f"Give the directory {source.root}, not its file {source.checkpoint}.")
    report_statistics(config.get("norm_stats") or {}, source.read_json(STATISTICS_NAME))
    # Not `load_policy`: where a source carries our code, that runs the source's copy of it.
    hub_kwargs = {} if source.revision is None else {"revision": source.revision}
    processor = repository_class("OpenVLAProcessor").from_pretrained(source.root, **hub_kwargs)
    model, info = repository_class("OpenVLAForActionPrediction").from_pretrained(
        source.root, dtype=parse_dtype(dtype), output_loading_info=True, **hub_kwargs
    )
    raise_on_difference(missing=info["missing_keys"], surplus=info["unexpected_keys"])
    origin = f"Converted from {source.described}, a checkpoint in the Hugging Face format."
    if source.fetch("README.md") is not None:
        origin += " Its own model card describes the code that it came with, and is not repeated here."
    return model, processor, origin


def report_statistics(in_config: dict, statistics: dict | None) -> None:
    """Say which datasets' statistics are used, and which are stale."""
    named = preview(sorted(in_config)) or "none"
    if statistics is None:
        print(f"statistics of config.json, used: {named}")
        return
    if in_config != statistics:
        print(f"statistics of config.json, stale and not used: {named}")
    print(f"statistics of {STATISTICS_NAME}, used: {preview(sorted(statistics))}")


def parse_dtype(name: str) -> str | torch.dtype:
    return name if name == "auto" else getattr(torch, name)


# The native format


def load_native(
    source: Source, run_config: dict, dtype: str, options: NativeOptions
) -> tuple[PreTrainedModel, ProcessorMixin, str]:
    """
    Model and processor of a native checkpoint, and where they come from.

    Raises:
        FileNotFoundError: If the checkpoint, the statistics of a VLA or the tokenizer are missing.
        ValueError: If tensors are missing or left over, or the tokenizer is another language model's.
    """
    if dtype == "auto":
        raise ValueError("A native checkpoint has no dtype of its own: give bfloat16, float16 or float32.")
    is_vla = isinstance(run_config.get("vla"), dict)
    path = source.native_checkpoint()
    kind = "VLA" if is_vla else "vision-language model"
    print(f"{source.root}: a native {kind}, {path.name}")
    statistics = source.read_json(STATISTICS_NAME)
    if is_vla and statistics is None:
        raise FileNotFoundError(f"{source.root} has no {STATISTICS_NAME}: a VLA's actions have no scale without it.")
    groups = read_native_checkpoint(path)
    fields = native_fields(run_config, options)
    tokenizer = load_tokenizer(options.tokenizer, fields.get("llm_backbone_id"))
    config = make_config(fields, options, tokenizer, num_embeddings(groups), statistics)
    print(f"statistics: {preview(sorted(config.norm_stats)) or 'none, there is no ' + STATISTICS_NAME}")
    processor = make_processor(config, tokenizer, rounded=is_vla)
    tensors = rename_native(groups)
    tensors |= load_vision_weights(options.vision_weights, config, found="vision_backbone" in groups)
    model = build_model(config, tensors, parse_dtype(dtype))
    return model, processor, f"Converted from {source.described}, a native Prismatic {kind} (`{path.name}`)."


def read_native_checkpoint(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """
    Tensors of a native checkpoint by module: `vision_backbone`, `projector`, `llm_backbone`.

    Raises:
        ValueError: If the file holds pickled objects, which are never loaded, or is laid out otherwise.
    """
    content = read_torch_file(path)
    groups = content.get("model") if isinstance(content, dict) else None
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{path} is not laid out as {{'model': {{'projector': {{...}}, 'llm_backbone': {{...}}}}}}.")
    for name, group in groups.items():
        if others := [key for key, value in group.items() if not isinstance(value, torch.Tensor)]:
            raise ValueError(f"{path}: {preview(others)} of {name} are not tensors.")
    return {name: group for name, group in groups.items() if group}


def read_torch_file(path: Path) -> Any:
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a pickled {unsafe[1]}" if unsafe else str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a file of tensors alone and is not loaded: {reason}.") from error


def num_embeddings(groups: dict[str, dict[str, torch.Tensor]]) -> int:
    """Rows of the language model's embedding."""
    for name, tensor in groups.get("llm_backbone", {}).items():
        if name.endswith("embed_tokens.weight"):
            return len(tensor)
    raise ValueError(f"The checkpoint has no language model (`llm_backbone`), only {preview(groups)}.")


def native_fields(run_config: dict, options: NativeOptions) -> dict[str, Any]:
    """
    Fields of `OpenVLAConfig` that a run's config.json names, directly or through its base VLM.

    Raises:
        ValueError: If the vision backbone or the language model remains unknown.
    """
    if isinstance(run_config.get("vla"), dict):
        base_vlm = str(run_config["vla"].get("base_vlm"))
        names = ("vision_backbone_id", "llm_backbone_id", "image_resize_strategy")
        fields = dict(zip(names, BASE_VLMS.get(PurePosixPath(base_vlm).name, ()), strict=False))
        described = f"the base VLM {base_vlm!r} (known: {preview(BASE_VLMS, limit=len(BASE_VLMS))})"
    else:
        model = run_config["model"]
        names = ("vision_backbone_id", "llm_backbone_id", "arch_specifier", "image_resize_strategy", "llm_max_length")
        fields = {name: model[name] for name in names if model.get(name) is not None}
        described = f"the `model` of config.json ({preview(sorted(model))})"
    for name in ("vision_backbone_id", "llm_backbone_id"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
        if name not in fields and name not in options.overrides:
            raise ValueError(f"No `{name}` follows from {described}; give --{name}.")
    return fields | {name: value for name, value in options.overrides.items() if name != "text_config"}


def load_tokenizer(source: str | None, llm_backbone_id: str | None) -> PreTrainedTokenizerBase:
    """
    The language model's tokenizer, with `<PAD>` behind its last token unless it has a padding token of its own.

    Raises:
        FileNotFoundError: If no source is given (names one), or it has no tokenizer.json.
    """
    if source is None:
        raise FileNotFoundError(
            f"A native checkpoint comes without the tokenizer of its language model, {llm_backbone_id}: give a "
            "directory or Hub id with --tokenizer; for Llama 2 and Vicuna, for example openvla/openvla-7b."
        )
    if Source(source).fetch("tokenizer.json") is None:
        raise FileNotFoundError(f"{source} has no tokenizer.json; slow tokenizers are not converted.")
    # The processor's own way of reading a tokenizer.json, which transformers 5 would rebuild by other rules.
    tokenizer = inspect.getmodule(repository_class("OpenVLAProcessor")).load_tokenizer(source, {})
    if tokenizer.pad_token in (None, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
        print(f"{source}: tokenizer, <PAD> added with id {tokenizer.pad_token_id}")
    tokenizer.padding_side = "right"
    return tokenizer


def make_config(
    fields: dict[str, Any],
    options: NativeOptions,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    statistics: dict | None,
) -> PretrainedConfig:
    """
    The configuration of a native checkpoint.

    Raises:
        ValueError: On unknown fields, or a tokenizer that does not fit the embedding.
    """
    config_class = repository_class("OpenVLAConfig")
    if unknown := sorted(fields.keys() - inspect.signature(config_class.__init__).parameters.keys()):
        raise ValueError(f"{unknown} are not fields of OpenVLAConfig.")
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    own_text = options.overrides.get("text_config", {})
    found = {
        "norm_stats": statistics,
        "pad_token_id": tokenizer.pad_token_id,
        "action_token_end": tokenizer.vocab_size,
        "text_config": {"vocab_size": vocab_size, **special, **own_text},
    }
    config = config_class(**(found | fields))
    if hasattr(config.text_config, "rms_norm_eps") and "rms_norm_eps" not in own_text:
        config.text_config.rms_norm_eps = options.rms_norm_eps
    check_tokenizer(config, tokenizer)
    tokenizer.model_max_length = config.llm_max_length
    return config


def check_tokenizer(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Native training pads the embedding to a multiple of 64 rows, `<PAD>` included."""
    rows, multiple = config.text_config.vocab_size, config.pad_to_multiple_of
    closing = tokenizer.convert_tokens_to_ids("▁")
    if math.ceil(len(tokenizer) / multiple) * multiple != rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens, which do not make the {rows} rows of the checkpoint's "
            "embedding: it belongs to another language model."
        )
    if config.closing_token_id is not None and config.closing_token_id != closing:
        raise ValueError(
            f"The tokenizer's '▁' has id {closing}, that of {config.llm_backbone_id} {config.closing_token_id}: it "
            "belongs to another language model."
        )


def make_image_processor(config: PretrainedConfig, rounded: bool) -> BaseImageProcessor:
    """
    The image processor of the published vision backbones.

    Args:
        config (`OpenVLAConfig`): Names the towers.
        rounded (`bool`): Round the constants that are used to bfloat16.
    """
    constants = [
        next(constants for part, constants in NORMALIZATION.items() if part in name) for name in config.timm_model_ids
    ]
    if not constants:
        raise ValueError(f"No normalisation is known for the vision backbone {config.vision_backbone_id!r}.")
    means, stds = zip(*constants, strict=True)
    used = torch.tensor(constants, dtype=torch.bfloat16 if rounded else torch.float64).tolist()
    return repository_class("OpenVLAImageProcessor")(
        use_fused_vision_backbone=config.use_fused_vision_backbone,
        image_resize_strategy=config.image_resize_strategy,
        input_sizes=[(3, size, size) for size in config.image_sizes],
        means=means,
        stds=stds,
        tvf_normalize_params=[{"inplace": False, "mean": mean, "std": std} for mean, std in used],
    )


def make_processor(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, rounded: bool) -> ProcessorMixin:
    names = ("norm_type", "n_action_bins", "action_token_end", "closing_token_id")
    return repository_class("OpenVLAProcessor")(
        make_image_processor(config, rounded),
        tokenizer,
        prompt_style="vicuna" if (config.llm_backbone_id or "").startswith("vicuna") else "pure",
        **{name: getattr(config, name) for name in names},
    )


def rename_native(groups: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Tensors of a native checkpoint under the names of the model.

    Raises:
        ValueError: Listing the names that mean nothing here, or stand for the same tensor twice.
    """
    renamed, surplus = {}, []
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            target = rename_native_tensor(group, name)
            if target is None or target in renamed:
                surplus.append(f"{group}: {name}")
            else:
                renamed[target] = tensor
    raise_on_difference(surplus=surplus)
    return renamed


def rename_native_tensor(group: str, name: str) -> str | None:
    """The model's name of a native tensor; `None` if it has none."""
    if group == "projector":
        match = re.fullmatch(r"(?:projector\.)*([024])\.(weight|bias)", name)
        return match and f"projector.fc{int(match[1]) // 2 + 1}.{match[2]}"
    module, _, rest = name.partition(".")
    if group == "llm_backbone" and module == "llm":
        return f"language_model.{rest}"
    if group == "vision_backbone" and module in _NATIVE_TOWERS:
        return f"{_NATIVE_TOWERS[module]}.{rename_tower_tensor(rest)}"
    return None


def rename_tower_tensor(name: str) -> str:
    """timm's name, or that of the original DINOv2, as the towers have it."""
    return re.sub(r"\.gamma$", ".scale_factor", "reg_token" if name == "register_tokens" else name)


def load_vision_weights(files: Sequence[str], config: PretrainedConfig, found: bool) -> dict[str, torch.Tensor]:
    """
    Tensors of the vision towers from timm's checkpoints, under the names of the model.

    Args:
        files (`Sequence[str]`): One per tower.
        config (`OpenVLAConfig`): Describes the towers.
        found (`bool`): Whether the native checkpoint holds the towers itself.

    Raises:
        ValueError: If there are too many files, or too few.
    """
    towers = config.towers
    if found and files:
        raise ValueError("The checkpoint holds its vision towers; --vision_weights would replace them.")
    if found:
        return {}
    if len(files) != len(towers):
        wanted = config.timm_model_ids or [f"tower {index}" for index in range(len(towers))]
        raise ValueError(
            f"The checkpoint holds no vision weights (they were frozen), and {len(files)} files were given: pass "
            f"--vision_weights with one timm checkpoint (.safetensors, .pt, .bin) for each of {', '.join(wanted)}, "
            "in this order."
        )
    tensors = {}
    for prefix, file, tower in zip(_TOWERS, files, towers, strict=False):
        own = read_timm_tower(Path(file), tower)
        print(f"{file}: {len(own)} tensors of {prefix}")
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in own.items()}
    return tensors


def read_timm_tower(path: Path, tower: Any) -> dict[str, torch.Tensor]:
    """
    Tensors of a timm checkpoint, or of an OpenCLIP checkpoint around a timm tower, as a tower holds them.

    Args:
        path (`Path`): A .safetensors file, or a file of `torch.save` with tensors alone.
        tower (`TowerConfig`): The tower.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The vision weights {path} do not exist.")
    tensors = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
    for wrapper in ("model", "state_dict"):
        tensors = tensors.get(wrapper, tensors)
    trunk = "visual.trunk."
    if any(name.startswith(trunk) for name in tensors):
        tensors = {name.removeprefix(trunk): tensor for name, tensor in tensors.items() if name.startswith(trunk)}
    named = {
        rename_tower_tensor(name): tensor
        for name, tensor in tensors.items()
        if name != "mask_token" and not name.startswith("head.")
    }
    if "pos_embed" not in named:
        raise ValueError(f"{path} has no `pos_embed`: it is not a timm vision transformer, but has {preview(named)}.")
    return fit_position_embedding(named, tower)


def fit_position_embedding(tensors: dict[str, torch.Tensor], tower: Any) -> dict[str, torch.Tensor]:
    """
    `tensors` with the position embedding on the tower's grid.

    The original DINOv2 adds a position to the class token, where timm's tower with registers has none: that row is
    added to the class token once and for all.
    """
    position, tensors = tensors["pos_embed"].float(), dict(tensors)
    num_prefix = tower.num_prefix_tokens if tower.embed_class_token else 0
    if tower.class_token and not num_prefix and math.isqrt(position.shape[1]) ** 2 != position.shape[1]:
        tensors["cls_token"] = tensors["cls_token"] + position[:, :1]
        position = position[:, 1:]
    tensors["pos_embed"] = resample_position_embedding(position, tower.image_size // tower.patch_size, num_prefix)
    return tensors


def resample_position_embedding(position: torch.Tensor, grid: int, num_prefix: int = 0) -> torch.Tensor:
    """
    Bicubic interpolation, with antialiasing, of a position embedding over a square grid, as timm does it.

    Args:
        position (`torch.Tensor`): float32 (1, prefix + N * N, D).
        grid (`int`): Side G of the grid wanted.
        num_prefix (`int`): Rows in front, which are kept.

    Returns:
        `torch.Tensor`: (1, prefix + G * G, D).

    Raises:
        ValueError: If the rows make no square.
    """
    prefix, patches = position.split([num_prefix, position.shape[1] - num_prefix], dim=1)
    side = math.isqrt(patches.shape[1])
    if side**2 != patches.shape[1]:
        raise ValueError(f"A position embedding of {position.shape[1]} rows, {num_prefix} in front, is no square.")
    if side == grid:
        return position
    image = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, N * N, D) -> (1, D, N, N)
    image = nn.functional.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)  # (1, prefix + G * G, D)


def build_model(config: PretrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """
    The model with these tensors, every one of them and no others.

    Raises:
        ValueError: Listing tensors that are missing, left over or of another shape.
    """
    with torch.device("meta"):
        model = repository_class("OpenVLAForActionPrediction")(config)
    wanted = model.state_dict()
    raise_on_difference(
        missing=wanted.keys() - tensors.keys(),
        surplus=tensors.keys() - wanted.keys(),
        misshapen=[
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
    )
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=config.pad_token_id
    )
    print(f"{len(tensors)} tensors, all that the model has")
    return model


def raise_on_difference(
    missing: Collection[str] = (), surplus: Collection[str] = (), misshapen: Collection[str] = ()
) -> None:
    """Raise a `ValueError` that lists the tensors, if there are any."""
    kinds = {"missing": missing, "not of this model": surplus, "of another shape": misshapen}
    found = [f"{len(names)} {kind}: {preview(sorted(names))}" for kind, names in kinds.items() if names]
    if found:
        raise ValueError(f"The checkpoint's tensors do not match the model; {'; '.join(found)}.")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory, native .pt file, or Hub id")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload OUT to this Hub repository")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a model repository")
    parser.add_argument("--revision", help="branch, tag or commit of a SOURCE on the Hub")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of the weights written; default: bfloat16 for native checkpoints, else as they are",
    )
    parser.add_argument("--max_shard_size", default="5GB")
    native = parser.add_argument_group("native checkpoints")
    native.add_argument("--tokenizer", metavar="DIR_OR_ID", help="tokenizer of the language model")
    native.add_argument("--vision_weights", metavar="FILE", nargs="+", default=(), help="timm's, one file per tower")
    native.add_argument("--vision_backbone_id", help="instead of what the run's config.json names")
    native.add_argument("--llm_backbone_id", help="instead of what the run's config.json names")
    native.add_argument("--rms_norm_eps", type=float, default=PUBLISHED_RMS_NORM_EPS, help="default: %(default)s")
    native.add_argument("--config", type=Path, metavar="FILE", help="JSON with fields of OpenVLAConfig to override")
    return parser.parse_args(arguments)


def read_overrides(path: Path | None) -> dict[str, Any]:
    """Fields of `OpenVLAConfig` from a JSON file."""
    if path is None:
        return {}
    try:
        overrides = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(overrides, dict) or not isinstance(overrides.get("text_config", {}), dict):
        raise ValueError(f"{path} must hold an object with fields of OpenVLAConfig, `text_config` an object as well.")
    return overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error becomes one line and exit status 1."""
    options = parse_arguments(arguments)
    try:
        native = NativeOptions(
            options.tokenizer,
            options.vision_weights,
            options.vision_backbone_id,
            options.llm_backbone_id,
            options.rms_norm_eps,
            read_overrides(options.config),
        )
        convert(
            options.source,
            options.out,
            revision=options.revision,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            repo_id=options.push_to_hub,
            native=native,
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
