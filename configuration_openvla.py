# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Configuration of OpenVLA: the published fields, the vision towers and the language models that they name."""

import copy
import inspect
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.utils import cached_file, logging
from transformers.utils.hub import try_to_load_from_cache


logger = logging.get_logger(__name__)

STATISTICS_NAME = "dataset_statistics.json"
# Statistics that scale a number, by `norm_type`: bounds, or mean and standard deviation.
STATISTICS_BOUNDS = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max"), "normal": ("mean", "std")}
HUB_LOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
HUB_PUSH_ARGUMENTS = (
    "repo_id",
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "tags",
)

AUTO_MAP = {
    "AutoConfig": "configuration_openvla.OpenVLAConfig",
    "AutoModel": "modeling_openvla.OpenVLAForActionPrediction",
    "AutoModelForCausalLM": "modeling_openvla.OpenVLAForActionPrediction",
    "AutoModelForImageTextToText": "modeling_openvla.OpenVLAForActionPrediction",
    "AutoModelForVision2Seq": "modeling_openvla.OpenVLAForActionPrediction",
}

# What `pipeline(model=...)` makes of a policy.
CUSTOM_PIPELINES = {
    "robotics": {
        "impl": "pipeline_openvla.OpenVLAPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


@dataclass(frozen=True)
class TowerConfig:
    """
    Sizes and options of one vision tower, a timm `VisionTransformer`.

    Args:
        embed_dim, depth, num_heads, mlp_dim (`int`): Width, blocks, attention heads and hidden width of the MLPs.
        patch_size, image_size (`int`): Side of a patch and of the square image, in pixels.
        hidden_act (`str`): `gelu` (exact, erf) or `quick_gelu` (OpenAI's CLIP).
        norm_eps (`float`): Epsilon of every LayerNorm.
        class_token (`bool`), num_registers (`int`): Tokens in front of the patches.
        embed_class_token (`bool`): Whether the position embedding has a row for the class token.
        pre_norm (`bool`): A LayerNorm before the first block, and no bias in the patch embedding (CLIP).
        layer_scale (`bool`): A learned scale at the end of both residual branches (DINOv2).
        final_norm, attention_pool (`bool`): Hold the tensors of the final norm and of SigLIP's pooling head. The
            model never runs them; they are there so that a published checkpoint stays complete.
        output_block (`int`): Index of the block whose output is used, without the final norm; -2 in every published
            model. Blocks after it are held, frozen, and never run.
    """

    embed_dim: int = 1152
    depth: int = 27
    num_heads: int = 16
    mlp_dim: int = 4304
    patch_size: int = 14
    image_size: int = 224
    hidden_act: str = "gelu"
    norm_eps: float = 1e-6
    class_token: bool = False
    num_registers: int = 0
    embed_class_token: bool = False
    pre_norm: bool = False
    layer_scale: bool = False
    final_norm: bool = True
    attention_pool: bool = False
    output_block: int = -2

    def __post_init__(self):
        if self.embed_dim % self.num_heads:
            raise ValueError(f"`embed_dim` {self.embed_dim} is not a multiple of `num_heads` {self.num_heads}.")
        if self.hidden_act not in ("gelu", "quick_gelu"):
            raise ValueError(f"`hidden_act` must be 'gelu' or 'quick_gelu', got {self.hidden_act!r}.")
        if not -self.depth <= self.output_block < self.depth:
            raise ValueError(f"`output_block` {self.output_block} does not exist in a tower of depth {self.depth}.")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.class_token) + self.num_registers

    @property
    def num_used_blocks(self) -> int:
        return self.output_block % self.depth + 1


_VIT_L = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}
_CLIP = {
    **_VIT_L,
    "hidden_act": "quick_gelu",
    "norm_eps": 1e-5,
    "class_token": True,
    "embed_class_token": True,
    "pre_norm": True,
}
_DINOV2 = {**_VIT_L, "class_token": True, "num_registers": 4, "layer_scale": True}
_IN1K = {**_VIT_L, "patch_size": 16, "class_token": True, "embed_class_token": True}
_SIGLIP = {"embed_dim": 1152, "depth": 27, "num_heads": 16, "mlp_dim": 4304, "attention_pool": True}

_CLIP_224_ID, _CLIP_336_ID = "vit_large_patch14_clip_224.openai", "vit_large_patch14_clip_336.openai"
_DINOV2_ID, _IN1K_ID = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_large_patch16_224.augreg_in21k_ft_in1k"
_SIGLIP_224_ID, _SIGLIP_384_ID = "vit_so400m_patch14_siglip_224", "vit_so400m_patch14_siglip_384"

# Published vision backbones: image side in pixels and, per tower, the timm name and the sizes behind it.
VISION_BACKBONES = {
    "clip-vit-l": (224, [(_CLIP_224_ID, _CLIP)]),
    "clip-vit-l-336px": (336, [(_CLIP_336_ID, _CLIP)]),
    "dinov2-vit-l": (224, [(_DINOV2_ID, _DINOV2)]),
    "in1k-vit-l": (224, [(_IN1K_ID, _IN1K)]),
    "siglip-vit-so400m": (224, [(_SIGLIP_224_ID, _SIGLIP)]),
    "siglip-vit-so400m-384px": (384, [(_SIGLIP_384_ID, _SIGLIP)]),
    "dinoclip-vit-l-336px": (336, [(_DINOV2_ID, _DINOV2), (_CLIP_336_ID, _CLIP)]),
    "dinosiglip-vit-so-224px": (224, [(_DINOV2_ID, _DINOV2), (_SIGLIP_224_ID, _SIGLIP)]),
    "dinosiglip-vit-so-384px": (384, [(_DINOV2_ID, _DINOV2), (_SIGLIP_384_ID, _SIGLIP)]),
}

_LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_PHI_2 = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "vocab_size": 51200,
}

# Published language models: Hub id, model type, sizes where they differ from the type's defaults, and the id of the
# lone "▁" piece that closes the prompt (None where the tokenizer has no such piece).
LANGUAGE_MODELS = {
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", "llama", {}, 29871),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", "llama", _LLAMA_13B, 29871),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", "llama", {}, 29871),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", "llama", _LLAMA_13B, 29871),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", "llama", {}, 29871),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", "llama", _LLAMA_13B, 29871),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", "mistral", {}, 28705),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", "mistral", {}, 28705),
    "phi-2-3b": ("microsoft/phi-2", "phi", _PHI_2, None),
}

_CONTINUOUS_HEADS = ("l1", "diffusion", "flow")

# Fields of a published config.json that follow from the two ids; they are written, and recomputed when read.
_DERIVED_FIELDS = ("timm_model_ids", "timm_override_act_layers", "image_sizes", "hf_llm_id")


def copy_remote_code(source_file: str, save_directory: str | Path) -> None:
    """Copy the `*_openvla.py` files and `handler.py` that lie beside `source_file` into `save_directory`."""
    source = Path(source_file).resolve().parent
    target = Path(save_directory).resolve()
    for path in [*source.glob("*_openvla.py"), *source.glob("handler.py")]:
        if source != target:
            shutil.copyfile(path, target / path.name)


def load_statistics(source: str | Path, **hub_kwargs: Any) -> dict[str, dict] | None:
    """
    Read `dataset_statistics.json` of a local directory or a Hub repository.

    Args:
        source (`str` or `Path`): Directory, Hub id, or the path of a file in the directory.
        hub_kwargs: `revision`, `token`, `cache_dir`, ... of `from_pretrained`.

    Returns:
        `dict` or `None`: Statistics by dataset name; `None` where there is no such file.
    """
    if Path(source).is_file():
        source = Path(source).parent
    path = cached_file(str(source), STATISTICS_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if path is None:
        _warn_where_absence_is_unknown(str(source), hub_kwargs)
        return None
    try:
        return check_statistics(json.loads(Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{STATISTICS_NAME} of {source} cannot be used: {error}") from error


def _warn_where_absence_is_unknown(source: str, hub_kwargs: dict[str, Any]) -> None:
    """Offline, a file that was never looked up seems to be missing."""
    if Path(source).is_dir():
        return
    lookup = {name: hub_kwargs[name] for name in ("cache_dir", "revision") if name in hub_kwargs}
    if try_to_load_from_cache(source, STATISTICS_NAME, **lookup) is None:
        logger.warning(
            f"Offline it is unknown whether {source} has a {STATISTICS_NAME}. If it has, the statistics of its "
            "config.json are stale: load it once online, or assign `norm_stats`."
        )


def check_statistics(norm_stats: dict[str, dict]) -> dict[str, dict]:
    """
    A copy of `norm_stats` in plain lists, if it has the form
    `{dataset: {"action": {"q01": [...], "q99": [...], "mask": [...], ...}, ...}}`.

    Raises:
        ValueError: Naming the dataset and what is wrong there.
    """
    if not isinstance(norm_stats, dict):
        raise ValueError(f"expected a dictionary by dataset name, got {type(norm_stats).__name__}.")
    checked = {}
    for name, statistics in norm_stats.items():
        action = statistics.get("action") if isinstance(statistics, dict) else None
        if not isinstance(action, dict) or not {"q01", "q99"} <= action.keys():
            raise ValueError(f"dataset {name!r} has no `action` statistics with `q01` and `q99`.")
        checked[name] = {
            key: _check_block(name, key, block) if isinstance(block, dict) else block
            for key, block in statistics.items()
        }
    return checked


def state_dims(norm_stats: dict[str, dict]) -> set[int]:
    """How many numbers the states of the datasets have, of those that have one."""
    blocks = [statistics.get("proprio") for statistics in norm_stats.values()]
    return {len(values) for block in blocks if isinstance(block, dict) for values in block.values()}


def _check_block(dataset: str, name: str, block: dict[str, Any]) -> dict[str, list]:
    """One of `action` and `proprio`: a list of numbers, or of booleans for the mask, per statistic."""
    block = {key: np.asarray(value).tolist() for key, value in block.items() if value is not None}
    for key, values in block.items():
        kinds = bool if key == "mask" else (int, float)
        if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
            raise ValueError(f"dataset {dataset!r}: `{name}.{key}` must be a list of numbers, got {values!r}.")
        if not np.isfinite(values).all():
            raise ValueError(f"dataset {dataset!r}: `{name}.{key}` must be finite, got {values}.")
    lengths = {key: len(values) for key, values in block.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"dataset {dataset!r} has {name} statistics of different lengths: {lengths}.")
    return block


class OpenVLAConfig(PretrainedConfig):
    """
    Configuration of [`OpenVLAForActionPrediction`]. The defaults are those of openvla-7b.

    Args:
        vision_backbone_id (`str`, *optional*, defaults to `"dinosiglip-vit-so-224px"`): One of `VISION_BACKBONES`, or
            `None` with `tower_configs`.
        llm_backbone_id (`str`, *optional*, defaults to `"llama2-7b-pure"`): One of `LANGUAGE_MODELS`, or `None` with
            `text_config`.
        arch_specifier (`str`, *optional*): Kept for other runtimes; follows from the number of towers.
        use_fused_vision_backbone (`bool`, *optional*): Whether there are two towers; follows from the backbone.
        image_resize_strategy (`str`, defaults to `"resize-naive"`): Kept for other runtimes; the image processor's
            own setting decides.
        text_config (`dict` or `PretrainedConfig`, *optional*): Language model. What it leaves out comes from
            `llm_backbone_id` and then from the defaults of its model type, as in the published checkpoints (whose
            `rms_norm_eps` is 1e-6 for that reason).
        tower_configs (`list[dict]`, *optional*): Fields of [`TowerConfig`] for one or two towers, in the order of the
            channels in `pixel_values`; overrides `vision_backbone_id`.
        norm_stats (`dict`, *optional*): Statistics by dataset name. A `dataset_statistics.json` beside the
            configuration replaces them.
        norm_type (`str`, defaults to `"bounds_q99"`): How actions were normalised: `bounds_q99` (q01 to q99),
            `bounds` (minimum to maximum) or `normal` (mean and standard deviation).
        n_action_bins (`int`, defaults to 256): Number of action tokens.
        action_token_end (`int`, *optional*): One past the last action token. Default: the vocabulary without its
            padding, `text_config.vocab_size - pad_to_multiple_of`.
        closing_token_id (`int`, `None` or `"auto"`, defaults to `"auto"`): Token that ends the prompt, in front of the
            actions; `None`: no such token; `"auto"`: the "▁" piece of the language model's tokenizer.
        image_token_id (`int`, *optional*): Placeholder of an image patch. Default: the last, padding row.
        head_type (`str`, defaults to `"tokens"`): What speaks the actions: the language model in `tokens`, one per
            number, or in `fast` ones, one for many (FAST); or a head on its hidden states: `l1` (regression),
            `diffusion` or `flow` (flow matching).
        attention_mode (`str`, defaults to `"causal"`): `causal`: action tokens one by one. `bidirectional`: every
            token sees every other, and all actions come out of one pass (OpenVLA-OFT).
        chunk_size (`int`, defaults to 1): Actions per prediction, one after the other in time.
        action_dim (`int`, *optional*): Numbers per action, those of the robot with the most. Default: as many as the
            statistics have; the heads on hidden states need it, and are padded for robots with fewer.
        use_proprio (`bool`, defaults to `False`), proprio_dim (`int`, *optional*): Whether the robot's state goes in,
            as one position behind the images, and of how many numbers it is.
        num_images (`int`, defaults to 1): Camera images per observation, the third-person view first.
        use_film (`bool`, defaults to `False`): Whether the instruction modulates every block of the vision towers.
        embodiments (`list[str]`, *optional*): Robots that an adapter tells apart, by the names of their datasets
            (`unnorm_key`), in the order of their embeddings: another robot is another name at the end. Default: no
            adapter.
        embodiment_adapter_dim (`int`, defaults to 64): Width of the adapter's bottleneck.
        append_stop_token (`bool`, defaults to `True`): Whether the end-of-sequence token follows the actions that are
            predicted in one pass.
        fast_scale (`float`), fast_min_token (`int`), fast_vocab_size (`int`, all *optional*): With `head_type="fast"`,
            the [`FastTokenizer`] that lies beside the configuration as `fast_tokenizer.json`: its factor and offset of
            the coefficients, and its number of tokens, which are the last ones before `action_token_end`.
        diffusion_steps (`int`, defaults to 50): Noise levels that a `diffusion` head was trained with.
        num_inference_steps (`int`, *optional*): Passes per prediction of the `diffusion` and `flow` heads. Default:
            `diffusion_steps`, and 10.
        pad_token_id (`int`, defaults to 32000), pad_to_multiple_of (`int`, defaults to 64), llm_max_length (`int`,
            defaults to 2048), output_projector_states (`bool`, defaults to `False`): As published.
    """

    model_type = "openvla"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vision_backbone_id: str | None = "dinosiglip-vit-so-224px",
        llm_backbone_id: str | None = "llama2-7b-pure",
        arch_specifier: str | None = None,
        use_fused_vision_backbone: bool | None = None,
        image_resize_strategy: str = "resize-naive",
        text_config: dict | PretrainedConfig | None = None,
        tower_configs: list[dict] | None = None,
        norm_stats: dict[str, dict] | None = None,
        norm_type: str = "bounds_q99",
        n_action_bins: int = 256,
        action_token_end: int | None = None,
        closing_token_id: int | str | None = "auto",
        image_token_id: int | None = None,
        head_type: str = "tokens",
        attention_mode: str = "causal",
        chunk_size: int = 1,
        action_dim: int | None = None,
        use_proprio: bool = False,
        proprio_dim: int | None = None,
        num_images: int = 1,
        use_film: bool = False,
        embodiments: list[str] | None = None,
        embodiment_adapter_dim: int = 64,
        append_stop_token: bool = True,
        fast_scale: float | None = None,
        fast_min_token: int | None = None,
        fast_vocab_size: int | None = None,
        diffusion_steps: int = 50,
        num_inference_steps: int | None = None,
        pad_token_id: int | None = 32000,
        pad_to_multiple_of: int = 64,
        llm_max_length: int = 2048,
        output_projector_states: bool = False,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        for name in _DERIVED_FIELDS:
            kwargs.pop(name, None)
        self.vision_backbone_id = vision_backbone_id
        self.llm_backbone_id = llm_backbone_id
        self.tower_configs = tower_configs
        self._set_vision_fields(arch_specifier, use_fused_vision_backbone)
        self.image_resize_strategy = image_resize_strategy

        self.text_config = self._make_text_config(text_config)
        self.norm_stats = check_statistics(norm_stats or {})
        self.norm_type = norm_type
        self.n_action_bins = n_action_bins
        self.head_type = head_type
        self.attention_mode = attention_mode
        self.chunk_size = chunk_size
        self.action_dim = action_dim
        self.use_proprio, self.proprio_dim = use_proprio, proprio_dim
        self.num_images = num_images
        self.use_film = use_film
        self.embodiments, self.embodiment_adapter_dim = embodiments, embodiment_adapter_dim
        self.append_stop_token = append_stop_token
        self.fast_scale, self.fast_min_token, self.fast_vocab_size = fast_scale, fast_min_token, fast_vocab_size
        self.diffusion_steps, self.num_inference_steps = diffusion_steps, num_inference_steps
        self.pad_to_multiple_of = pad_to_multiple_of
        self.llm_max_length = llm_max_length
        self.output_projector_states = output_projector_states
        vocab_size = self.text_config.vocab_size
        self.action_token_end = vocab_size - pad_to_multiple_of if action_token_end is None else action_token_end
        self.image_token_id = vocab_size - 1 if image_token_id is None else image_token_id
        self.closing_token_id = self._default_closing_token() if closing_token_id == "auto" else closing_token_id

        auto_map = kwargs.pop("auto_map", None) or {}
        # A copy, since `pipeline` puts classes in the place of their names.
        self.custom_pipelines = copy.deepcopy(kwargs.pop("custom_pipelines", None) or CUSTOM_PIPELINES)
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        # A map that names other code (the published one) is not followed.
        self.auto_map = auto_map if "configuration_openvla" in auto_map.get("AutoConfig", "") else dict(AUTO_MAP)
        self._check_head()
        self._check_tokens()
        self.check_norm_stats(self.norm_stats)

    @property
    def towers(self) -> list[TowerConfig]:
        """The vision towers, in the order of the channels in `pixel_values`."""
        if self.tower_configs is None:
            image_size, towers = _look_up("vision_backbone_id", self.vision_backbone_id, VISION_BACKBONES)
            return [TowerConfig(**sizes, image_size=image_size) for _, sizes in towers]
        known = {field.name for field in fields(TowerConfig)}
        for tower in self.tower_configs:
            if unknown := sorted(tower.keys() - known):
                raise ValueError(f"`tower_configs` has unknown fields {unknown}; known: {sorted(known)}.")
        return [TowerConfig(**tower) for tower in self.tower_configs]

    @property
    def num_image_tokens(self) -> int:
        """Positions that the observation takes in front of the text: patches, the state, and the noise level."""
        return self.num_images * self.towers[0].num_patches + self.use_proprio + self.is_denoising

    @property
    def stop_token_id(self) -> int | None:
        """The end-of-sequence token of the language model."""
        return self.text_config.eos_token_id

    @property
    def is_continuous(self) -> bool:
        """Whether a head on the hidden states gives the actions, instead of the language model's tokens."""
        return self.head_type in _CONTINUOUS_HEADS

    @property
    def is_denoising(self) -> bool:
        """Whether the actions are made out of noise in several passes."""
        return self.head_type in ("diffusion", "flow")

    @property
    def num_action_tokens(self) -> int:
        """Tokens of the language model that speak of actions: bins, or FAST tokens."""
        return self.fast_vocab_size if self.head_type == "fast" else self.n_action_bins

    @property
    def action_token_begin(self) -> int:
        """The first action token."""
        return self.action_token_end - self.num_action_tokens

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """
        As [`PretrainedConfig.from_pretrained`]. A `dataset_statistics.json` beside the configuration replaces
        `norm_stats` whole: fine-tuned checkpoints carry the base model's statistics in their config.json.
        """
        hub_kwargs = {name: kwargs[name] for name in HUB_LOAD_ARGUMENTS if kwargs.get(name) is not None}
        statistics = load_statistics(pretrained_model_name_or_path, **hub_kwargs)
        if statistics is not None:
            kwargs.setdefault("norm_stats", statistics)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As [`PretrainedConfig.from_dict`]; overrides are checked, and what follows from them is derived again."""
        config_dict = dict(config_dict)
        arguments = inspect.signature(cls.__init__).parameters.keys() - {"self", "kwargs"}
        overrides = {name: kwargs.pop(name) for name in arguments & kwargs.keys()}
        stale = config_dict.get("norm_stats")
        if stale and overrides.get("norm_stats", stale) != stale:
            logger.info(f"The statistics of {sorted(overrides['norm_stats'])} replace `norm_stats` of config.json.")
        if {"vision_backbone_id", "tower_configs"} & overrides.keys():
            for name in ("use_fused_vision_backbone", "arch_specifier"):
                config_dict.pop(name, None)
        if isinstance(overrides.get("text_config"), dict):
            overrides["text_config"] = {**config_dict.get("text_config", {}), **overrides["text_config"]}
        return super().from_dict(config_dict | overrides, **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> None:
        """
        As [`PretrainedConfig.save_pretrained`], with `dataset_statistics.json` and the code that `auto_map` names.
        """
        self.auto_map = {**self.auto_map, **AUTO_MAP}
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_PUSH_ARGUMENTS if name in kwargs}
        super().save_pretrained(save_directory, **kwargs)
        copy_remote_code(__file__, save_directory)
        statistics = Path(save_directory) / STATISTICS_NAME
        if self.norm_stats:
            statistics.write_text(json.dumps(self.norm_stats, indent=2) + "\n", encoding="utf-8")
        else:
            statistics.unlink(missing_ok=True)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_kwargs})

    def to_dict(self) -> dict[str, Any]:
        """As [`PretrainedConfig.to_dict`], readable by every supported version of transformers."""
        output = super().to_dict()
        output["custom_pipelines"] = {
            task: _with_class_names(entry) for task, entry in output["custom_pipelines"].items()
        }
        # transformers 5 writes the settings of the rotary embedding here only, where 4.57 does not look.
        rope = dict(output["text_config"].get("rope_parameters") or {})
        for name in ("rope_theta", "partial_rotary_factor"):
            if name in rope:
                output["text_config"][name] = rope.pop(name)
        if rope.get("rope_type", "default") != "default":
            output["text_config"]["rope_scaling"] = rope
        return output

    def _set_vision_fields(self, arch_specifier: str | None, use_fused_vision_backbone: bool | None) -> None:
        towers = self.towers
        if len(towers) not in (1, 2):
            raise ValueError(f"An OpenVLA has one or two vision towers, got {len(towers)}.")
        if len({(tower.image_size, tower.num_patches) for tower in towers}) > 1:
            raise ValueError(f"Both towers need the same image size and number of patches, got {towers}.")
        fused = len(towers) == 2
        if use_fused_vision_backbone not in (None, fused):
            raise ValueError(f"`use_fused_vision_backbone={use_fused_vision_backbone}` with {len(towers)} tower(s).")
        self.use_fused_vision_backbone = fused
        self.arch_specifier = arch_specifier or ("no-align+fused-gelu-mlp" if fused else "no-align+gelu-mlp")
        _, published = VISION_BACKBONES.get(self.vision_backbone_id, (None, []))
        self.timm_model_ids = [name for name, _ in published]
        self.timm_override_act_layers = ["quick_gelu" if "clip_" in name else None for name, _ in published]
        self.image_sizes = [tower.image_size for tower in towers]

    def _make_text_config(self, text_config: dict | PretrainedConfig | None) -> PretrainedConfig:
        self.hf_llm_id, sizes, default_type = None, {}, "llama"
        if self.llm_backbone_id is not None:
            self.hf_llm_id, default_type, sizes, _ = _look_up("llm_backbone_id", self.llm_backbone_id, LANGUAGE_MODELS)
        if isinstance(text_config, PretrainedConfig):
            return text_config
        text_config = dict(text_config or {})
        if self.llm_backbone_id is not None:
            # The published checkpoints pad the vocabulary by 64 rows, the first of which is <PAD>.
            text_config = {"vocab_size": 32064, "pad_token_id": 32000, **sizes, **text_config}
        return CONFIG_MAPPING[text_config.pop("model_type", default_type)](**text_config)

    def _default_closing_token(self) -> int | None:
        if self.llm_backbone_id is None:
            raise ValueError("`closing_token_id` must be given (an id, or None) where `llm_backbone_id` is None.")
        return LANGUAGE_MODELS[self.llm_backbone_id][3]

    def _check_tokens(self) -> None:
        vocab_size = self.text_config.vocab_size
        if not 0 < self.num_action_tokens <= self.action_token_end <= vocab_size:
            raise ValueError(
                f"The {self.num_action_tokens} action tokens before id {self.action_token_end} do not fit into a "
                f"vocabulary of {vocab_size}."
            )
        if not 0 <= self.image_token_id < vocab_size or self.image_token_id == self.pad_token_id:
            raise ValueError(
                f"`image_token_id` {self.image_token_id} must be a row of the vocabulary ({vocab_size}) and not the "
                f"padding token {self.pad_token_id}."
            )
        if self.action_token_begin <= self.image_token_id < self.action_token_end:
            raise ValueError(f"`image_token_id` {self.image_token_id} is an action token.")
        if self.head_type == "fast":
            self._check_special_tokens()
        if self.norm_type not in STATISTICS_BOUNDS:
            raise ValueError(f"`norm_type` must be one of {list(STATISTICS_BOUNDS)}, got {self.norm_type!r}.")

    def _check_special_tokens(self) -> None:
        """A FAST vocabulary is of any size, and may reach down to tokens that have another meaning."""
        special = {"closing_token_id": self.closing_token_id, "pad_token_id": self.pad_token_id}
        special |= {"eos_token_id": self.stop_token_id, "bos_token_id": self.text_config.bos_token_id}
        tokens = range(self.action_token_begin, self.action_token_end)
        if taken := {name: token_id for name, token_id in special.items() if token_id in tokens}:
            raise ValueError(
                f"The {self.fast_vocab_size} FAST tokens {tokens.start}..{tokens.stop - 1} would take the place of "
                f"{taken}: fit a tokenizer with fewer tokens (`fast_vocab_size`)."
            )

    def _check_head(self) -> None:
        """Refuse combinations that have no meaning."""
        if self.head_type not in ("tokens", "fast", *_CONTINUOUS_HEADS):
            raise ValueError(
                f"`head_type` must be 'tokens', 'fast' or one of {_CONTINUOUS_HEADS}, got {self.head_type!r}."
            )
        if self.attention_mode not in ("causal", "bidirectional"):
            raise ValueError(f"`attention_mode` must be 'causal' or 'bidirectional', got {self.attention_mode!r}.")
        self._check_counts()
        if self.head_type == "fast":
            self._check_fast()
        if self.is_continuous and self.action_dim is None:
            raise ValueError(f"`head_type={self.head_type!r}` needs `action_dim`.")
        if self.attention_mode == "causal":
            self._check_causal()
        elif self.append_stop_token and not isinstance(self.stop_token_id, int):
            raise ValueError(
                f"`append_stop_token=True` needs one `eos_token_id` in `text_config`, got {self.stop_token_id!r}."
            )
        if self.num_inference_steps is not None and not self.is_denoising:
            raise ValueError(f"`num_inference_steps` is for the 'diffusion' and 'flow' heads, not {self.head_type!r}.")
        if self.head_type == "diffusion" and (self.num_inference_steps or 1) > self.diffusion_steps:
            raise ValueError(
                f"`num_inference_steps` {self.num_inference_steps} exceeds the {self.diffusion_steps} noise levels "
                "that the head was trained with (`diffusion_steps`)."
            )
        if self.use_proprio != (self.proprio_dim is not None):
            raise ValueError(
                "`use_proprio=True` and `proprio_dim` go together, got "
                f"`use_proprio={self.use_proprio}` and `proprio_dim={self.proprio_dim}`."
            )
        self._check_embodiments()

    def check_norm_stats(self, norm_stats: dict[str, dict]) -> None:
        """
        Refuse statistics of which none can be of the robot that the policy drives.

        Raises:
            ValueError: If there are some, and for no dataset what `norm_type` scales by, `action_dim` numbers, or a
                state of `proprio_dim`.
        """
        if not norm_stats:
            return
        names, actions = sorted(norm_stats), [each["action"] for each in norm_stats.values()]
        needed = STATISTICS_BOUNDS[self.norm_type]
        if not any(set(needed) <= action.keys() for action in actions):
            raise ValueError(
                f"`norm_type={self.norm_type!r}` scales by {needed}, which no statistics of {names} hold."
            )
        sizes = {len(action["q01"]) for action in actions}
        if self.action_dim is not None and self.action_dim not in sizes:
            raise ValueError(
                f"`action_dim` is {self.action_dim}, and the actions of {names} have {sorted(sizes)}: give the "
                "statistics of the policy's robot, too (`norm_stats`)."
            )
        sizes = state_dims(norm_stats)
        if self.use_proprio and not sizes:
            raise ValueError(f"`use_proprio=True` needs `proprio` statistics, and those of {names} have none.")
        if self.use_proprio and self.proprio_dim not in sizes:
            raise ValueError(
                f"`proprio_dim` is {self.proprio_dim}, and the states of {names} have {sorted(sizes)}: give the "
                "statistics of the policy's robot, too (`norm_stats`)."
            )

    def _check_embodiments(self) -> None:
        names = self.embodiments
        if names is None:
            return
        are_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not names or not are_names or len(set(names)) < len(names):
            raise ValueError(f"`embodiments` must be a list of different names of datasets, or None; got {names!r}.")

    def _check_counts(self) -> None:
        required = ("chunk_size", "num_images", "diffusion_steps", "embodiment_adapter_dim")
        for name in (*required, "action_dim", "proprio_dim", "num_inference_steps", "fast_vocab_size"):
            value = getattr(self, name)
            if (value is not None or name in required) and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")

    def _check_fast(self) -> None:
        """What chunks spoken in FAST tokens need."""
        if self.chunk_size == 1:
            raise ValueError("`head_type='fast'` shortens chunks along time, and `chunk_size` is 1: use 'tokens'.")
        if self.attention_mode != "causal":
            raise ValueError("`head_type='fast'` decodes token after token: set `attention_mode='causal'`.")
        if self.norm_type == "normal":
            raise ValueError("`head_type='fast'` needs actions in [-1, 1]: `norm_type` 'bounds_q99' or 'bounds'.")
        needed = ("action_dim", "fast_scale", "fast_min_token", "fast_vocab_size")
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"`head_type='fast'` needs {missing}; `FastTokenizer.config_fields` has its own.")
        if not self.fast_scale > 0:
            raise ValueError(f"`fast_scale` must be positive, got {self.fast_scale!r}.")
        if not isinstance(self.stop_token_id, int):
            raise ValueError(
                f"`head_type='fast'` needs one `eos_token_id` in `text_config`, got {self.stop_token_id!r}."
            )

    def _check_causal(self) -> None:
        """What only one pass over all actions can do."""
        if self.is_continuous:
            raise ValueError(
                f"`head_type={self.head_type!r}` reads all actions of one pass: set `attention_mode='bidirectional'`."
            )
        if self.use_film:
            raise ValueError(
                "`use_film=True` averages the instruction and the stop token behind the actions, which a causal "
                "model does not know yet: set `attention_mode='bidirectional'`."
            )
        if not self.append_stop_token:
            raise ValueError("`append_stop_token=False` means nothing where action tokens are decoded one by one.")


def _with_class_names(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of `custom_pipelines` as JSON holds it: a pipeline that was made of it has left classes there."""
    lists = {key: value for key, value in entry.items() if isinstance(value, (list, tuple))}
    names = {
        key: [each.__name__ if isinstance(each, type) else each for each in value] for key, value in lists.items()
    }
    return {**entry, **names}


def _look_up(field: str, name: str | None, table: dict[str, Any]) -> Any:
    if name not in table:
        raise ValueError(f"`{field}={name!r}` is not known; known are {sorted(table)}.")
    return table[name]


__all__ = ["OpenVLAConfig", "TowerConfig"]
