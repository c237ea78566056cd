"""The one loader that every command uses: our repositories and published ones, local or on the Hub."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module


logger = logging.getLogger("load_policy")

REPOSITORY = Path(__file__).resolve().parent.parent

# Fields of the configuration that say how a policy acts, and those of them that the processor has to know, too.
PROCESSOR_FIELDS = (
    *("norm_type", "head_type", "chunk_size", "num_images", "use_proprio", "append_stop_token"),
    *("fast_scale", "fast_min_token", "embodiments", "action_dim", "proprio_dim"),
)
ACTION_FIELDS = (
    *PROCESSOR_FIELDS,
    *("attention_mode", "use_film", "diffusion_steps", "num_inference_steps"),
    *("fast_vocab_size", "embodiment_adapter_dim"),
)

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision")
_FILES = {
    "FastTokenizer": "fast_tokenizer_openvla",
    "OpenVLAConfig": "configuration_openvla",
    "OpenVLAForActionPrediction": "modeling_openvla",
    "OpenVLAImageProcessor": "processing_openvla",
    "OpenVLAProcessor": "processing_openvla",
}


def repository_class(name: str) -> type:
    """
    A class of this checkout's remote code, such as `OpenVLAForActionPrediction`.

    Raises:
        ValueError: Listing the classes there are, if `name` is not one of them.
    """
    if name not in _FILES:
        raise ValueError(f"{name!r} is not a class of the remote code; known: {sorted(_FILES)}.")
    return get_class_from_dynamic_module(f"{_FILES[name]}.{name}", str(REPOSITORY))


def carries_our_code(source: str | Path, **hub_kwargs: Any) -> bool:
    """Whether the `auto_map` of a repository's config.json names this project's files."""
    config, _ = PretrainedConfig.get_config_dict(str(source), **hub_kwargs)
    return "configuration_openvla" in config.get("auto_map", {}).get("AutoConfig", "")


def load_policy(
    source: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype = "auto",
    changes: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """
    Load a policy and its processor.

    Args:
        source (`str` or `Path`): Directory or Hub id.
        trust_remote_code (`bool`, defaults to `False`): Load a repository that carries this project's code by the
            Auto classes, with its own copy of it. Otherwise, and for every other repository, such as a published one,
            this checkout's code is used and the repository's never runs.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`): Of the weights; `"auto"`: as they were saved.
        changes (`Mapping[str, Any]`, *optional*): Fields of the configuration to change, of `ACTION_FIELDS`. Parts
            that the changed policy has and the saved one has not are initialised, and the log says which.
        kwargs: Hub arguments (`revision`, `token`, `cache_dir`, ...), and further arguments of the model's
            `from_pretrained`: `device_map`, `attn_implementation`, `quantization_config`, ...

    Returns:
        `tuple`: Model, in evaluation mode, and processor.

    Raises:
        ValueError: If the checkpoint lacks tensors of the model, or the changes contradict the configuration.
        OSError: If there is no such repository, or its weights are damaged.
    """
    hub_kwargs = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    is_ours = carries_our_code(source, **hub_kwargs)
    if trust_remote_code and is_ours:
        hub_kwargs["trust_remote_code"] = True
        model_class, processor_class = AutoModelForImageTextToText, AutoProcessor
    else:
        model_class = repository_class("OpenVLAForActionPrediction")
        processor_class = repository_class("OpenVLAProcessor")
    changes = dict(changes or {})
    settings = {name: changes[name] for name in PROCESSOR_FIELDS if name in changes}
    processor = processor_class.from_pretrained(str(source), **hub_kwargs, **settings)
    model, info = model_class.from_pretrained(
        str(source), dtype=dtype, output_loading_info=True, **hub_kwargs, **changes, **kwargs
    )
    missing = sorted(info["missing_keys"])
    if missing and changes:
        saved_config = model.config_class.from_pretrained(str(source), **hub_kwargs)
        fresh = set(missing) - tensor_names(type(model), saved_config)
        missing = sorted(set(missing) - fresh)
        logger.info("Initialised anew: %s", ", ".join(describe_parts(fresh)))
    if info["unexpected_keys"] and changes:
        logger.warning("Left behind: %s", ", ".join(describe_parts(info["unexpected_keys"])))
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the model, such as {missing[:3]}; the policy would act on "
            "random weights."
        )
    return model.eval(), processor


def tensor_names(model_class: type[PreTrainedModel], config: PretrainedConfig) -> set[str]:
    """Names of the tensors of a model with this configuration."""
    with torch.device("meta"):
        return set(model_class(config).state_dict())


def describe_parts(names: Iterable[str]) -> list[str]:
    """Parts of a policy that tensors belong to: `action_head`, ..., and `FiLM`."""
    return sorted({"FiLM" if ".film." in name else name.split(".")[0] for name in names})
