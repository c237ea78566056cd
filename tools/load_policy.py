"""The one loader that every command uses: our repositories and published ones, local or on the Hub."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module


REPOSITORY = Path(__file__).resolve().parent.parent

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
        kwargs: Hub arguments (`revision`, `token`, `cache_dir`, ...), and further arguments of the model's
            `from_pretrained`: `device_map`, `attn_implementation`, `quantization_config`, ...

    Returns:
        `tuple`: Model, in evaluation mode, and processor.

    Raises:
        ValueError: If the checkpoint lacks tensors of the model.
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
    processor = processor_class.from_pretrained(str(source), **hub_kwargs)
    model, info = model_class.from_pretrained(
        str(source), dtype=dtype, output_loading_info=True, **hub_kwargs, **kwargs
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source} lacks {len(missing)} tensors of the model, such as {missing[:3]}; the policy would act on "
            "random weights."
        )
    return model.eval(), processor
