"""
Native Prismatic checkpoints: what is in them, and the configuration, processor and model that they make.

A checkpoint is a .pt file of tensors by module (`vision_backbone`, `projector`, `llm_backbone`); the config.json of
its run names a base VLM, or the parts of the model by their ids. Where the published conversion departs from native
training, it is followed:

- `rms_norm_eps` of the language model is 1e-6, the default of its configuration class, in every published checkpoint.
  Llama 2 and native training use 1e-5.
- The normalisation constants of a VLA's image processor (`tvf_normalize_params`) are rounded to bfloat16: those of
  DINOv2 and CLIP change, the 0.5 of SigLIP and of the ImageNet tower does not. `means` and `stds` stay exact, and so
  are all constants of a plain VLM, which was trained with them.
"""

import inspect
import math
import pickle
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from load_policy import repository_class
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file


_CLIP, _SIGLIP, _DINOSIGLIP = "clip-vit-l-336px", "siglip-vit-so400m-384px", "dinosiglip-vit-so-384px"
_DINOCLIP, _DINOSIGLIP_224 = "dinoclip-vit-l-336px", "dinosiglip-vit-so-224px"
_VICUNA_7B, _LLAMA_7B, _LLAMA_13B = "vicuna-v15-7b", "llama2-7b-pure", "llama2-13b-pure"

# VLMs that native VLAs start from: vision backbone, language model, resize strategy. Not listed: prism-siglip+13b,
# whose training configuration names a CLIP tower and whose published description a SigLIP one.
BASE_VLMS = {
    "reproduction-llava-v15+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "reproduction-llava-v15+13b": (_CLIP, "vicuna-v15-13b", "letterbox"),
    "one-stage+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "one-stage+13b": (_CLIP, "vicuna-v15-13b", "letterbox"),
    "full-ft-multi-stage+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "full-ft-one-stage+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "in1k-224px+7b": ("in1k-vit-l", _VICUNA_7B, "letterbox"),
    "dinov2-224px+7b": ("dinov2-vit-l", _VICUNA_7B, "letterbox"),
    "clip-224px+7b": ("clip-vit-l", _VICUNA_7B, "letterbox"),
    "siglip-224px+7b": ("siglip-vit-so400m", _VICUNA_7B, "letterbox"),
    "clip-336px-resize-crop+7b": (_CLIP, _VICUNA_7B, "resize-crop"),
    "clip-336px-resize-naive+7b": (_CLIP, _VICUNA_7B, "resize-naive"),
    "siglip-384px-letterbox+7b": (_SIGLIP, _VICUNA_7B, "letterbox"),
    "siglip-384px-resize-crop+7b": (_SIGLIP, _VICUNA_7B, "resize-crop"),
    "siglip-384px-resize-naive+7b": (_SIGLIP, _VICUNA_7B, "resize-naive"),
    "dinoclip-336px-letterbox+7b": (_DINOCLIP, _VICUNA_7B, "letterbox"),
    "dinoclip-336px-resize-naive+7b": (_DINOCLIP, _VICUNA_7B, "resize-naive"),
    "dinosiglip-224px-resize-naive+7b": (_DINOSIGLIP_224, _VICUNA_7B, "resize-naive"),
    "dinosiglip-384px-letterbox+7b": (_DINOSIGLIP, _VICUNA_7B, "letterbox"),
    "dinosiglip-384px-resize-naive+7b": (_DINOSIGLIP, _VICUNA_7B, "resize-naive"),
    "llama2+7b": (_CLIP, _LLAMA_7B, "letterbox"),
    "llama2+13b": (_CLIP, _LLAMA_13B, "letterbox"),
    "llama2-no-cotraining+7b": (_CLIP, _LLAMA_7B, "letterbox"),
    "llama2-chat+7b": (_CLIP, "llama2-7b-chat", "letterbox"),
    "llama2-chat+13b": (_CLIP, "llama2-13b-chat", "letterbox"),
    "mistral-v0.1+7b": (_CLIP, "mistral-v0.1-7b-pure", "letterbox"),
    "mistral-instruct-v0.1+7b": (_CLIP, "mistral-v0.1-7b-instruct", "letterbox"),
    "phi-2+3b": (_CLIP, "phi-2-3b", "letterbox"),
    "vicuna-no-cotraining+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "train-1.25-epochs+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "train-1.5-epochs+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "train-2-epochs+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "train-3-epochs+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "llava-lvis4v+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "llava-lrv+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "llava-lvis4v-lrv+7b": (_CLIP, _VICUNA_7B, "letterbox"),
    "prism-clip-controlled+7b": (_CLIP, _LLAMA_7B, "resize-naive"),
    "prism-clip-controlled+13b": (_CLIP, _LLAMA_13B, "resize-naive"),
    "prism-clip+7b": (_CLIP, _LLAMA_7B, "resize-naive"),
    "prism-clip+13b": (_CLIP, _LLAMA_13B, "resize-naive"),
    "prism-siglip-controlled+7b": (_SIGLIP, _LLAMA_7B, "resize-naive"),
    "prism-siglip-controlled+13b": (_SIGLIP, _LLAMA_13B, "resize-naive"),
    "prism-siglip+7b": (_SIGLIP, _LLAMA_7B, "resize-naive"),
    "prism-dinosiglip-controlled+7b": (_DINOSIGLIP, _LLAMA_7B, "resize-naive"),
    "prism-dinosiglip-controlled+13b": (_DINOSIGLIP, _LLAMA_13B, "resize-naive"),
    "prism-dinosiglip+7b": (_DINOSIGLIP, _LLAMA_7B, "resize-naive"),
    "prism-dinosiglip+13b": (_DINOSIGLIP, _LLAMA_13B, "resize-naive"),
    "prism-dinosiglip-224px-controlled+7b": (_DINOSIGLIP_224, _LLAMA_7B, "resize-naive"),
    "prism-dinosiglip-224px+7b": (_DINOSIGLIP_224, _LLAMA_7B, "resize-naive"),
}

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Mean and standard deviation of a tower's pixels, by a part of its timm name.
NORMALIZATION = {
    "_dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "_siglip_": _HALF,
    "_clip_": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "augreg_in21k_ft_in1k": _HALF,
}

# Where a native name, behind its module, begins so, and what the model says instead.
NATIVE_NAMES = {
    "vision_backbone.featurizer.": "vision_backbone.featurizer.",
    "vision_backbone.dino_featurizer.": "vision_backbone.featurizer.",
    "vision_backbone.siglip_featurizer.": "vision_backbone.fused_featurizer.",
    "vision_backbone.clip_featurizer.": "vision_backbone.fused_featurizer.",
    "projector.0.": "projector.fc1.",
    "projector.2.": "projector.fc2.",
    "projector.4.": "projector.fc3.",
    "llm_backbone.llm.": "language_model.",
}
EMBEDDING = "llm.model.embed_tokens.weight"


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
    rms_norm_eps: float = 1e-6
    overrides: Mapping[str, Any] = field(default_factory=dict)


def native_kind(run_config: dict) -> str | None:
    """`"VLA"` or `"VLM"`, by the config.json of a native run; `None` if it is something else."""
    kinds = {"vla": "VLA", "model": "VLM"}
    return next((kind for name, kind in kinds.items() if isinstance(run_config.get(name), dict)), None)


def choose_checkpoint(names: Collection[str]) -> str:
    """
    The native checkpoint to convert: `latest-checkpoint.pt`, else the one with the highest step.

    Raises:
        FileNotFoundError: If there is neither; lists what there is.
    """
    if "checkpoints/latest-checkpoint.pt" in names:
        return "checkpoints/latest-checkpoint.pt"
    matches = [re.fullmatch(r"checkpoints/step-(\d+)-epoch-\d+-loss=.*\.pt", name) for name in names]
    steps = {match[0]: int(match[1]) for match in matches if match}
    if not steps:
        found = sorted(name for name in names if name.startswith("checkpoints/"))
        raise FileNotFoundError(
            "`checkpoints` holds neither latest-checkpoint.pt nor step-XXXXXX-epoch-YY-loss=Z.pt, but "
            f"{preview(found) or 'nothing'}."
        )
    return max(steps, key=steps.get)


def load_native(
    path: Path, run_config: dict, statistics: dict | None, dtype: torch.dtype, options: NativeOptions
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Model and processor of a native checkpoint.

    Args:
        path (`Path`): The .pt file.
        run_config, statistics (`dict`): The run's config.json and, where it has one, dataset_statistics.json.
        dtype (`torch.dtype`): Of the model.
        options ([`NativeOptions`]): What these files do not say.

    Raises:
        FileNotFoundError: If the tokenizer or vision weights are missing.
        ValueError: If tensors are missing or left over, or the tokenizer is another language model's.
    """
    groups = read_native_checkpoint(path)
    fields = {"norm_stats": statistics} | native_fields(run_config, options)
    tokenizer = load_tokenizer(options.tokenizer, fields.get("llm_backbone_id"))
    config = make_config(fields, options, tokenizer, len(groups["llm_backbone"][EMBEDDING]))
    processor = make_processor(config, tokenizer, rounded=native_kind(run_config) == "VLA")
    tensors = rename_native(groups)
    if "vision_backbone" not in groups:
        tensors |= load_vision_weights(options.vision_weights, config)
    elif options.vision_weights:
        raise ValueError("The checkpoint holds its vision towers; --vision_weights would replace them.")
    return build_model(config, tensors, dtype), processor


# Reading the checkpoint


def read_native_checkpoint(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """
    Tensors of a native checkpoint by module: `vision_backbone`, `projector`, `llm_backbone`.

    Raises:
        ValueError: If the file holds pickled objects, which are never loaded, or is laid out otherwise.
    """
    groups = read_torch_file(path).get("model")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{path} is not laid out as {{'model': {{'projector': {{...}}, 'llm_backbone': {{...}}}}}}.")
    for name, group in groups.items():
        if others := [key for key, value in group.items() if not isinstance(value, torch.Tensor)]:
            raise ValueError(f"{path}: {preview(others)} of {name} are not tensors.")
    groups = {name: group for name, group in groups.items() if group}
    if EMBEDDING not in groups.get("llm_backbone", {}):
        raise ValueError(
            f"{path} holds no language model (`llm_backbone`), only {preview(groups)}; or it lacks {EMBEDDING}."
        )
    return groups


def read_torch_file(path: Path) -> dict[str, Any]:
    """The dictionary in a file of `torch.save`, which may hold tensors alone."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a pickled {unsafe[1]}" if unsafe else str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a file of tensors alone and is not loaded: {reason}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} instead of named tensors.")
    return content


def rename_native(groups: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """
    Tensors of a native checkpoint under the names of the model.

    Raises:
        ValueError: Listing the names that mean nothing here, or stand for the same tensor twice.
    """
    renamed, surplus = {}, []
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            target = rename_native_tensor(f"{group}.{name}")
            if target is None or target in renamed:
                surplus.append(f"{group}: {name}")
            else:
                renamed[target] = tensor
    raise_on_difference(surplus=surplus)
    return renamed


def rename_native_tensor(name: str) -> str | None:
    """The model's name of a native tensor; `None` if it has none."""
    name = name.replace("projector.projector.", "projector.")
    for native, ours in NATIVE_NAMES.items():
        if name.startswith(native):
            return ours + rename_tower_tensor(name.removeprefix(native))
    return None


def rename_tower_tensor(name: str) -> str:
    """timm's name, or that of the original DINOv2, as the towers have it."""
    return re.sub(r"\.gamma$", ".scale_factor", "reg_token" if name == "register_tokens" else name)


# Configuration and processor


def native_fields(run_config: dict, options: NativeOptions) -> dict[str, Any]:
    """
    Fields of `OpenVLAConfig` that a run's config.json names, directly or through its base VLM.

    Raises:
        ValueError: If the vision backbone or the language model remains unknown.
    """
    if native_kind(run_config) == "VLA":
        base_vlm = str(run_config["vla"].get("base_vlm"))
        names = ("vision_backbone_id", "llm_backbone_id", "image_resize_strategy")
        fields = dict(zip(names, BASE_VLMS.get(PurePosixPath(base_vlm).name, ()), strict=False))
        described = f"the base VLM {base_vlm!r} (known: {', '.join(BASE_VLMS)})"
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
    if cached_file(source, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is None:
        raise FileNotFoundError(f"{source} has no tokenizer.json; slow tokenizers are not converted.")
    tokenizer = repository_class("OpenVLAProcessor").load_tokenizer(source, {}, padding_side="right")
    if tokenizer.pad_token in (None, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token):
        tokenizer.add_special_tokens({"pad_token": "<PAD>"})
        print(f"{source}: tokenizer, <PAD> added with id {tokenizer.pad_token_id}")
    return tokenizer


def make_config(
    fields: dict[str, Any], options: NativeOptions, tokenizer: PreTrainedTokenizerBase, vocab_size: int
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
    if not isinstance(own_text, dict):
        raise ValueError(f"`text_config` must be an object with fields of the language model, not {own_text!r}.")
    found = {
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


def make_processor(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, rounded: bool) -> ProcessorMixin:
    """The processor of a published vision backbone, its normalisation `rounded` to bfloat16 or exact."""
    names = ("norm_type", "n_action_bins", "action_token_end", "closing_token_id")
    return repository_class("OpenVLAProcessor")(
        make_image_processor(config, rounded),
        tokenizer,
        prompt_style="vicuna" if (config.llm_backbone_id or "").startswith("vicuna") else "pure",
        **{name: getattr(config, name) for name in names},
    )


def make_image_processor(config: PretrainedConfig, rounded: bool) -> BaseImageProcessor:
    """`means` and `stds` stay exact; `tvf_normalize_params`, which are used, may be `rounded`."""
    if not config.timm_model_ids:
        raise ValueError(f"No normalisation is known for the vision backbone {config.vision_backbone_id!r}.")
    constants = [
        next(constants for part, constants in NORMALIZATION.items() if part in name) for name in config.timm_model_ids
    ]
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


# Vision weights that the checkpoint does not hold


def load_vision_weights(files: Sequence[str], config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """
    Tensors of the vision towers from timm's checkpoints, one file per tower, under the names of the model.

    Raises:
        ValueError: If there are too many files, or too few.
    """
    if len(files) != len(config.towers):
        raise ValueError(
            f"The checkpoint holds no vision weights (they were frozen), and {len(files)} files were given: pass "
            f"--vision_weights with one timm checkpoint (.safetensors, .pt, .bin) for each of "
            f"{', '.join(config.timm_model_ids)}, in this order."
        )
    tensors = {}
    for prefix, file, tower in zip(("featurizer", "fused_featurizer"), files, config.towers, strict=False):
        own = read_timm_tower(Path(file), tower)
        print(f"{file}: {len(own)} tensors of vision_backbone.{prefix}")
        tensors |= {f"vision_backbone.{prefix}.{name}": tensor for name, tensor in own.items()}
    return tensors


def read_timm_tower(path: Path, tower: Any) -> dict[str, torch.Tensor]:
    """Tensors of a timm checkpoint, or of an OpenCLIP checkpoint around a timm tower, as `tower` holds them."""
    if not path.is_file():
        raise FileNotFoundError(f"The vision weights {path} do not exist.")
    tensors = load_file(path) if path.suffix == ".safetensors" else read_torch_file(path)
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
    Bicubic interpolation, with antialiasing, of a position embedding over a square grid, as timm does it: float32
    (1, prefix + N * N, D) to (1, prefix + `grid` ** 2, D). The `num_prefix` rows in front are kept.

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


# The model


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


# Messages


def raise_on_difference(
    missing: Collection[str] = (), surplus: Collection[str] = (), misshapen: Collection[str] = ()
) -> None:
    """Raise a `ValueError` that lists the tensors, if there are any."""
    kinds = {"missing": missing, "not of this model": surplus, "of another shape": misshapen}
    found = [f"{len(names)} {kind}: {preview(sorted(names))}" for kind, names in kinds.items() if names]
    if found:
        raise ValueError(f"The checkpoint's tensors do not match the model; {'; '.join(found)}.")


def preview(names: Iterable[str]) -> str:
    """The first eight names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
