# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""OpenVLA: vision towers and projector in front of a causal language model that speaks robot actions."""

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import cached_file, logging

from .action_codec_openvla import (
    ActionCodec,
    action_dim,
    embodiment_rows,
    resolve_row_keys,
    select_row_statistics,
    select_statistics,
    unnormalize,
)
from .action_heads_openvla import (
    EmbodimentAdapter,
    EmbodimentEmbedding,
    FiLM,
    HeadLinear,
    InputProjector,
    ZeroLinear,
    make_action_head,
)
from .configuration_openvla import (
    HUB_LOAD_ARGUMENTS,
    HUB_PUSH_ARGUMENTS,
    OpenVLAConfig,
    TowerConfig,
    check_statistics,
    copy_remote_code,
)
from .decoding_openvla import (
    ActionGraph,
    RecordedActions,
    SamplingParams,
    action_logits_function,
    bidirectional_arguments,
    check_attention,
    check_finite,
    count_right,
    decode_action_tokens,
    decode_fast_tokens,
    guess_tokens,
    has_hooks,
    left_pad,
    positions_of,
    why_not_static,
)
from .fast_tokenizer_openvla import FastTokenizer, ids_to_tokens


if TYPE_CHECKING:
    # Never run: transformers fetches the files that a line like these names, so that a checkpoint is saved with them.
    from .handler import EndpointHandler  # noqa: F401
    from .pipeline_openvla import OpenVLAPipeline  # noqa: F401

logger = logging.get_logger(__name__)

# Left in full precision by default when a checkpoint is loaded in 4 or 8 bits: together they are an eighth of
# openvla-7b, carry the precision of the action, and bitsandbytes cannot run every shape of the towers.
UNQUANTIZED_MODULES = [
    "vision_backbone",
    "projector",
    "lm_head",
    "action_head",
    "proprio_projector",
    "noisy_action_projector",
    "embodiment_adapter",
]


@dataclass
class OpenVLAOutput(ModelOutput):
    """
    Output of [`OpenVLAForActionPrediction.forward`].

    Args:
        loss (`torch.Tensor`): With `labels`: mean cross-entropy over the supervised tokens, or the head's own loss.
        logits (`torch.Tensor`): (B, T, V), T including the image positions; with `labels` and no `logits_to_keep`
            (B, A, V), the logits that predict the supervised tokens, right-aligned.
        past_key_values (`Cache`): With `use_cache`.
        hidden_states, attentions (`tuple[torch.Tensor]`): Of the language model, when asked for.
        projector_features (`torch.Tensor`): (B, P, H), with `output_projector_features`.
        head_predictions (`torch.Tensor`): (B, K, D), with `labels` and a head on the hidden states: the normalised
            actions (`l1`), the noise (`diffusion`) or the velocity (`flow`) that it predicts.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    projector_features: torch.FloatTensor | None = None
    head_predictions: torch.FloatTensor | None = None


@dataclass
class OpenVLAActionOutput(ModelOutput):
    """
    Output of [`OpenVLAForActionPrediction.predict_action`] with `return_dict=True`.

    Args:
        actions (`np.ndarray`): float64 (D,) or (B, D), with chunks (K, D) or (B, K, D), in the units of the dataset.
        normalized_actions (`np.ndarray`): The same in [-1, 1], which heads on the hidden states may leave a little.
        token_ids (`torch.Tensor`): (B, K * D), of FAST tokens (B, S) with the stop token behind the shorter rows. This
            and the following: `None` where a head gives the actions.
        probabilities (`torch.Tensor`): float32 (B, K * D, n_action_bins), over the bins in ascending order of their
            value; of the model itself, before temperature, top-k and top-p. Of FAST tokens (B, S, fast_vocab_size), in
            the order of the tokens, before the grammar, too; 0 behind a row's end.
        entropy (`torch.Tensor`): float32, the shape of `token_ids`, of `probabilities`, in nats: 0 where the model is
            sure, log(n_action_bins) where it knows nothing.
        accepted_tokens (`torch.Tensor`): (B,), with a draft: how many of each row's first tokens were right in it.
    """

    actions: np.ndarray | None = None
    normalized_actions: np.ndarray | None = None
    token_ids: torch.LongTensor | None = None
    probabilities: torch.FloatTensor | None = None
    entropy: torch.FloatTensor | None = None
    accepted_tokens: torch.LongTensor | None = None


class PackedLinear(nn.Linear):
    """
    A linear layer with copies of its weight in the order in which MKL multiplies so many rows with it on a CPU.

    Without one each product brings the weight in this order anew, which takes about a fifth of its time where the rows
    are those of one picture. Copies serve inference in float32, with just these numbers of rows; everything else is
    multiplied without.

    Whether the weight has changed since is seen by its address, its version, and some hundred of its numbers: what
    writes through `.data`, as adapters that are merged, leaves no version, and may write to few places unseen.

    Args:
        layer (`nn.Linear`): To stand in for, with all that is set on it; nothing is packed yet.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        vars(self).update(vars(layer))
        vars(self).pop("forward", None)  # the layer's own, which hooks leave behind that were removed
        self.unpack()

    def pack(self, numbers_of_rows: Iterable[int]) -> None:
        """Hold copies for these numbers of rows, (B, N, D) having B * N; [`why_not_packed`] has nothing to say."""
        weight = self.weight.detach()
        # Both are derived from the weight, never saved, and of no use on another device: no buffers.
        self._source = (weight.data_ptr(), self.weight._version, self._some_numbers().clone())
        # What torch.compile makes of such products with constant weights; private to it.
        pack = torch.ops.mkl._mkl_reorder_linear_weight
        self._packed = {number: pack(weight, number) for number in numbers_of_rows}

    def unpack(self) -> None:
        """Let go of the copies."""
        self._packed: dict[int, torch.Tensor] = {}

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        # The packed product has no gradient, and does not look at the width of what it is given.
        is_inference = not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if is_traced or not is_inference or values.shape[-1] != self.in_features:
            return super().forward(values)
        num_rows = values.shape[:-1].numel()
        packed = self._packed.get(num_rows)
        if packed is None:
            return super().forward(values)
        if self._has_changed():
            logger.warning_once("Weights were changed or moved: call `warm_up` again. They are multiplied without it.")
            self.unpack()
            return super().forward(values)
        return torch.ops.mkl._mkl_linear(values, packed, self.weight, self.bias, num_rows)

    def _has_changed(self) -> bool:
        (address, version, numbers), weight = self._source, self.weight
        if weight.data_ptr() != address or weight.is_inference() or weight._version != version:
            return True
        return not torch.equal(self._some_numbers(), numbers)

    def _some_numbers(self) -> torch.Tensor:
        """Between 170 and 512 numbers of the weight, or all of fewer, spread over rows and columns."""
        flat = self.weight.detach().reshape(-1)
        return flat[:: len(flat) // 256 | 1]  # an odd step: it takes no column for another time soon

    def __getstate__(self) -> dict:
        """Without copies of the weight: no file can hold them, and those of a copied layer are its own."""
        return {**self.__dict__, "_packed": {}}


def why_not_packed(layer: nn.Module) -> str | None:
    """What keeps a layer from [`PackedLinear`]; `None`: nothing does."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")):
        return "this build of PyTorch has no MKL"
    weight = layer.weight
    if type(layer) not in (nn.Linear, PackedLinear) or type(weight) is not nn.Parameter or weight.is_inference():
        return "layers are quantised, or were made in inference mode"
    if (weight.device.type, weight.dtype) != ("cpu", torch.float32):
        return f"weights are {weight.dtype} on {weight.device.type!r} and not torch.float32 on 'cpu'"
    if layer.training:
        return "the model is in training: call `eval()`"
    if has_hooks(layer):
        return "layers have hooks (as with offloading), or are compiled"
    return None


# Parameters and modules of the towers carry timm's names: published checkpoints and adapters use them.


class QuickGELU(nn.Module):
    """Sigmoid approximation of GELU, the activation of OpenAI's CLIP."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.sigmoid(1.702 * hidden)


class LayerScale(nn.Module):
    """Learned scale per channel. The parameter's name is the published one; timm says `gamma`."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.scale_factor


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, heads, D / heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D / heads)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, hidden_act: str = "gelu"):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = QuickGELU() if hidden_act == "quick_gelu" else nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class VisionBlock(GradientCheckpointingLayer):
    def __init__(self, config: TowerConfig, film_dim: int | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config.embed_dim, config.num_heads)
        self.ls1 = LayerScale(config.embed_dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config.embed_dim, config.mlp_dim, config.hidden_act)
        self.ls2 = LayerScale(config.embed_dim) if config.layer_scale else nn.Identity()
        self.film = None if film_dim is None else FiLM(config.embed_dim, film_dim)

    def forward(self, hidden: torch.Tensor, instruction: torch.Tensor | None = None) -> torch.Tensor:
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
        if self.film is not None:
            hidden = self.film(hidden, instruction)
        return hidden + self.ls2(self.mlp(self.norm2(hidden)))


class PatchEmbed(nn.Module):
    def __init__(self, config: TowerConfig):
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(3, config.embed_dim, kernel_size=size, stride=size, bias=not config.pre_norm)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.proj(pixel_values).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, P, D)


class AttentionPool(nn.Module):
    """Tensors of SigLIP's pooling head. It has no forward: the policy reads patches, never the pooled vector."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        dim = config.embed_dim
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = MLP(dim, config.mlp_dim)


class VisionTower(nn.Module):
    """A vision transformer that returns the patch tokens of one of its blocks, without the final norm."""

    def __init__(self, config: TowerConfig, film_dim: int | None = None):
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, dim)) if config.num_registers else None
        num_positions = config.num_patches + (config.num_prefix_tokens if config.embed_class_token else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList([VisionBlock(config, film_dim) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps) if config.final_norm else nn.Identity()
        self.attn_pool = AttentionPool(config) if config.attention_pool else nn.Identity()
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Take what never runs out of training: DDP would wait for its gradients, weight decay would move it."""
        for module in self.unused_modules():
            module.requires_grad_(False)

    def unused_modules(self) -> list[nn.Module]:
        """What is held for other runtimes and never runs."""
        return [*self.blocks[self.config.num_used_blocks :], self.norm, self.attn_pool]

    def forward(self, pixel_values: torch.Tensor, instruction: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.patch_embed(pixel_values)  # (B, P, D)
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = [token.expand(len(hidden), -1, -1) for token in tokens]
        if self.config.embed_class_token:
            hidden = torch.cat([*prefix, hidden], dim=1) + self.pos_embed
        else:
            hidden = torch.cat([*prefix, hidden + self.pos_embed], dim=1)  # (B, prefix + P, D)
        hidden = self.norm_pre(hidden)
        for block in self.blocks[: self.config.num_used_blocks]:
            hidden = block(hidden) if instruction is None else block(hidden, instruction)
        return hidden[:, self.config.num_prefix_tokens :]  # (B, P, D)


class VisionBackbone(nn.Module):
    """
    One or two towers over the same image, their features side by side; several images one after the other.

    Args:
        towers (`Sequence[TowerConfig]`): One or two.
        num_images (`int`, defaults to 1): Images per observation.
        film_dim (`int`, *optional*): Width of the instruction's embedding that modulates the towers, if one does.
    """

    def __init__(self, towers: Sequence[TowerConfig], num_images: int = 1, film_dim: int | None = None):
        super().__init__()
        self.featurizer = VisionTower(towers[0], film_dim)
        self.fused_featurizer = VisionTower(towers[1], film_dim) if len(towers) == 2 else None
        self.embed_dim = sum(tower.embed_dim for tower in towers)
        self.num_images = num_images

    @property
    def towers(self) -> list[VisionTower]:
        return [tower for tower in (self.featurizer, self.fused_featurizer) if tower is not None]

    def forward(self, pixel_values: torch.Tensor, instruction: torch.Tensor | None = None) -> torch.Tensor:
        """Features (B, images * P, embed_dim) of `pixel_values` (B, images * towers * 3, S, S)."""
        pixel_values = pixel_values.unflatten(1, (self.num_images, -1)).flatten(0, 1)  # (B * images, towers * 3, S, S)
        if instruction is not None:
            instruction = instruction.repeat_interleave(self.num_images, dim=0)  # (B * images, H)
        images = pixel_values.split(3, dim=1)  # one (B * images, 3, S, S) per tower
        features = [tower(image, instruction) for tower, image in zip(self.towers, images, strict=True)]
        features = torch.cat(features, dim=-1)  # (B * images, P, embed_dim)
        return features.unflatten(0, (-1, self.num_images)).flatten(1, 2)


class Projector(nn.Module):
    """From vision features to embeddings of the language model."""

    def __init__(self, vision_dim: int, text_dim: int, fused: bool):
        super().__init__()
        hidden_dim = 4 * vision_dim if fused else text_dim
        self.fc1 = nn.Linear(vision_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, text_dim)
        self.fc3 = nn.Linear(text_dim, text_dim) if fused else None
        self.act = nn.GELU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.fc2(self.act(self.fc1(features)))
        return hidden if self.fc3 is None else self.fc3(self.act(hidden))


class OpenVLAPreTrainedModel(PreTrainedModel):
    config_class = OpenVLAConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["VisionTower", "Projector"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = None
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # It is the language model's. transformers guesses from the source code, and takes the towers' for it.
        return True

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.text_config.initializer_range
        # The language model, a PreTrainedModel itself, brings its own.
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            if isinstance(module, ZeroLinear):
                nn.init.zeros_(module.weight)
            elif isinstance(module, HeadLinear):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5)
            else:
                nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.ones_(module.scale_factor)
        elif isinstance(module, EmbodimentEmbedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, (VisionTower, AttentionPool)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, mean=0.0, std=std)


class OpenVLAForActionPrediction(OpenVLAPreTrainedModel, GenerationMixin):
    """
    Vision-language-action policy: images and an instruction in, a robot action, or a chunk of them, out.

    Token ids come in the form of the published processor, without image placeholders, and are expanded to one
    placeholder per patch behind the first token (BOS), and one for the robot's state and for the noise level where the
    configuration has them; ids that hold placeholders already are taken as they are.

    With `attention_mode="bidirectional"` (OpenVLA-OFT) the positions of all actions follow the prompt, as zeros or as
    noisy actions, and behind them the stop token. One pass gives all actions; as in training with the next token as
    target, each is read from the position in front of its own.
    """

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        text_dim = config.text_config.hidden_size
        self.vision_backbone = VisionBackbone(config.towers, config.num_images, text_dim if config.use_film else None)
        self.projector = Projector(self.vision_backbone.embed_dim, text_dim, config.use_fused_vision_backbone)
        self.proprio_projector = InputProjector(config.proprio_dim, text_dim) if config.use_proprio else None
        self.noisy_action_projector = InputProjector(1, text_dim) if config.is_denoising else None
        self.action_head = make_action_head(config)
        self.embodiment_adapter = None
        if config.embodiments is not None:
            size = config.embodiment_adapter_dim
            self.embodiment_adapter = EmbodimentAdapter(text_dim, size, len(config.embodiments))
        # The default dtype is the one asked of `from_pretrained`; text_config may carry another.
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.codec = ActionCodec.from_config(config)
        self._fast_tokenizer: FastTokenizer | None = None
        self.num_image_tokens = config.num_image_tokens
        self._checked_attention: str | None = None
        self._recorded: RecordedActions | None = None
        # FSDP on transformers 4.57 asks the top model alone what not to split.
        self._no_split_modules = [*self._no_split_modules, *(self.language_model._no_split_modules or ())]
        self.post_init()
        self.freeze_unused()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path | None, *model_args, **kwargs):
        """
        As [`PreTrainedModel.from_pretrained`], from our repositories and from published ones, whose own code is never
        used. `load_in_4bit` and `load_in_8bit` are short for a `BitsAndBytesConfig`; unless it lists
        `llm_int8_skip_modules`, towers, projector and output head stay unquantised.
        """
        try:
            result = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, **_with_unquantized_modules(kwargs)
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} cannot be read: {error}. A safetensors file is "
                "damaged or its download was cut off; remove it and fetch it again."
            ) from error
        model = result[0] if isinstance(result, tuple) else result
        # transformers 5 puts new parameters in the place of those that were frozen.
        model.freeze_unused()
        if model.config.head_type == "fast" and pretrained_model_name_or_path is not None:
            hub_kwargs = {name: kwargs[name] for name in HUB_LOAD_ARGUMENTS if kwargs.get(name) is not None}
            model._load_fast_tokenizer(pretrained_model_name_or_path, hub_kwargs)
        return result

    def _load_fast_tokenizer(self, source: str | Path, hub_kwargs: dict) -> None:
        """Take the tokenizer beside the weights; a policy that is to learn FAST tokens need not have one yet."""
        config = self.config
        try:
            tokenizer = FastTokenizer.load(source, config.fast_scale, config.fast_min_token, **hub_kwargs)
        except FileNotFoundError:
            return  # said by the first action
        # The file knows neither scale nor offset. A processor of another training may have been saved over it.
        path = cached_file(source, "processor_config.json", _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        processor = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        file = {name: processor.get(name, own) for name, own in tokenizer.config_fields.items()}
        file["fast_vocab_size"] = tokenizer.vocab_size
        expected = {name: getattr(config, name) for name in file}
        if file == expected:
            self.fast_tokenizer = tokenizer
        else:
            logger.warning(
                f"The FAST tokenizer of {source} has {file}, with what processor_config.json says, and the policy's "
                f"configuration {expected}: assign another to `model.fast_tokenizer` before the first action, or save "
                "the processor that was trained with the policy."
            )

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, *, push_to_hub: bool = False, **kwargs
    ) -> None:
        """
        As [`PreTrainedModel.save_pretrained`], with `dataset_statistics.json`, `fast_tokenizer.json` where there is a
        FAST tokenizer, and the code beside the weights.

        Raises:
            ValueError: If bitsandbytes has repacked 4-bit weights, which it does at the first prediction on some CPUs
                and then saves wrong ones.
        """
        if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in self.parameters()):
            raise ValueError(
                "bitsandbytes has repacked the 4-bit weights for this CPU and would save wrong ones: save before the "
                "first prediction, or load the checkpoint again."
            )
        if push_to_hub and {"state_dict", "variant"} & kwargs.keys():
            raise ValueError(
                "`push_to_hub` does not go with `state_dict` or `variant`: save, then upload the directory."
            )
        hub_kwargs = {name: kwargs.pop(name) for name in HUB_PUSH_ARGUMENTS if name in kwargs}
        if not is_main_process:
            # transformers 4.57 copies the code of a class that came through an Auto class in every process.
            self._auto_class = None
            super().save_pretrained(save_directory, is_main_process=False, **kwargs)
            del self._auto_class
            return
        super().save_pretrained(save_directory, **kwargs)
        copy_remote_code(__file__, save_directory)
        if self.fast_tokenizer is not None:
            self.fast_tokenizer.save(save_directory)
        if push_to_hub:
            hub_kwargs |= {name: kwargs[name] for name in ("max_shard_size",) if name in kwargs}
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_kwargs})

    def unused_linear_names(self) -> list[str]:
        """
        Names of the linear and convolution layers that never run, for `LoraConfig(exclude_modules=...)`: an adapter
        there would never get a gradient, which DDP waits for.
        """
        unused = {id(part) for root in self.unused_modules() for part in root.modules()}
        kinds = (nn.Linear, nn.Conv2d)
        return [name for name, module in self.named_modules() if id(module) in unused and isinstance(module, kinds)]

    def unused_modules(self) -> list[nn.Module]:
        """What is held for other runtimes and never runs, the language model's head behind another head included."""
        unused = [module for tower in self.vision_backbone.towers for module in tower.unused_modules()]
        if self.action_head is not None and not self.config.text_config.tie_word_embeddings:
            unused.append(self.get_output_embeddings())
        return unused

    def freeze_unused(self) -> None:
        """Take what never runs out of training: DDP would wait for its gradients, weight decay would move it."""
        for module in self.unused_modules():
            module.requires_grad_(False)

    @property
    def norm_stats(self) -> dict[str, dict]:
        """Statistics by dataset name; they can be assigned, and are saved with the model."""
        return self.config.norm_stats

    @norm_stats.setter
    def norm_stats(self, norm_stats: dict[str, dict]) -> None:
        norm_stats = check_statistics(norm_stats)
        self.config.check_norm_stats(norm_stats)
        self.config.norm_stats = norm_stats

    @property
    def fast_tokenizer(self) -> FastTokenizer | None:
        """With `head_type="fast"`, what decodes the tokens; it can be assigned, and is saved with the model."""
        return self._fast_tokenizer

    @fast_tokenizer.setter
    def fast_tokenizer(self, tokenizer: FastTokenizer) -> None:
        expected = {name: getattr(self.config, name) for name in tokenizer.config_fields}
        if self.config.head_type != "fast" or tokenizer.config_fields != expected:
            raise ValueError(
                f"The FAST tokenizer has {tokenizer.config_fields}, and the policy's configuration {expected} with "
                f"`head_type={self.config.head_type!r}`: make it with the tokenizer's `config_fields`."
            )
        self._fast_tokenizer = tokenizer

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.language_model.set_decoder(decoder)

    def get_image_features(self, pixel_values: torch.Tensor, instruction: torch.Tensor | None = None) -> torch.Tensor:
        """
        Embeddings of the image patches, in the space of the language model.

        Args:
            pixel_values (`torch.Tensor`): (B, images * towers * 3, S, S), as the processor makes them.
            instruction (`torch.Tensor`, *optional*): (B, H), with `use_film` the mean embedding of the text.

        Returns:
            `torch.Tensor`: (B, images * P, H).

        Raises:
            ValueError: If there is an instruction and no FiLM, or the other way round.
        """
        if (instruction is not None) != self.config.use_film:
            raise ValueError(
                f"`use_film={self.config.use_film}`: the towers {'need' if self.config.use_film else 'take no'} "
                "`instruction`, the mean embedding of the text."
            )
        dtype = self.vision_backbone.featurizer.patch_embed.proj.weight.dtype
        if instruction is not None:
            instruction = instruction.to(dtype)
        return self.projector(self.vision_backbone(pixel_values.to(dtype), instruction))

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_projector_features: bool | None = None,
        return_dict: bool | None = None,
        proprio: torch.FloatTensor | None = None,
        actions: torch.FloatTensor | None = None,
        action_is_pad: torch.BoolTensor | None = None,
        noise: torch.FloatTensor | None = None,
        time: torch.FloatTensor | None = None,
        embodiment: torch.LongTensor | None = None,
        action_dims: torch.LongTensor | None = None,
        **kwargs,
    ) -> OpenVLAOutput | tuple:
        """
        Logits and loss of a prompt, with or without images.

        Args:
            input_ids (`torch.LongTensor`): (B, L), or (B, T) with placeholders.
            attention_mask (`torch.Tensor`): The same shape, 0 at padding. Default with an image: at `pad_token_id`.
            pixel_values (`torch.FloatTensor`): (B, images * towers * 3, S, S).
            labels (`torch.LongTensor`): The shape of `input_ids`; -100 where nothing is to be predicted.
            inputs_embeds (`torch.FloatTensor`): (B, T, H) instead of `input_ids`, image included.
            logits_to_keep (`int` or `torch.Tensor`): The last positions, or the positions, whose logits are returned;
                0: all. Without it: the supervised positions if there are labels, else all.
            proprio (`torch.FloatTensor`): (B, proprio_dim), the normalised state, with `use_proprio`.
            embodiment (`torch.LongTensor`): (B,), each row's place in `config.embodiments`, if it has any.
            actions (`torch.FloatTensor`): (B, K, D), the normalised actions that a head on the hidden states learns.
                Their tokens are in `labels` all the same, to say where they are.
            action_is_pad (`torch.BoolTensor`): (B, K), what counts neither in the loss nor as items; FAST tokens do.
            action_dims (`torch.LongTensor`): (B,), numbers in each row's actions; what pads them counts neither.
            noise, time (`torch.FloatTensor`): (B, K, D) and (B,), of the `diffusion` and `flow` heads. Default: drawn.

        Returns:
            [`OpenVLAOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: On missing or contradicting inputs, naming their shapes.
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        self._check_forms(input_ids, inputs_embeds, pixel_values, position_ids)
        if pixel_values is not None:
            input_ids, attention_mask, labels = self._expand_image(input_ids, pixel_values, attention_mask, labels)
        is_action, learned = self._action_positions(labels), self._without_padding(labels, action_is_pad, action_dims)
        noisy, target, time = self._head_inputs(actions, is_action, noise, time, action_dims)
        features = self._observe(input_ids, attention_mask, is_action, pixel_values, proprio, embodiment)
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, self._with_time(features, time))
        inputs_embeds = self._place_actions(inputs_embeds, is_action, noisy)
        config = self.config
        outputs = self._decode(
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values=past_key_values,
            use_cache=False if use_cache is None and self.training else use_cache,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            **kwargs,
        )
        hidden, logits, predictions = outputs.last_hidden_state, None, None
        if target is None:
            loss, logits = self._logits_and_loss(hidden, labels, learned, logits_to_keep, num_items_in_batch)
        else:
            predictions = self.action_head(_in_front_of(hidden, is_action))  # (B, K, D)
            loss = self._head_loss(predictions, target, action_is_pad, action_dims, learned, num_items_in_batch)
        kept = {name: outputs.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
        kept["projector_features"] = features if output_projector_features or config.output_projector_states else None
        output = OpenVLAOutput(loss=loss, logits=logits, head_predictions=predictions, **kept)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.LongTensor,
        unnorm_key: str | Sequence[str] | None = None,
        *,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        proprio: torch.FloatTensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        num_inference_steps: int | None = None,
        noise: torch.FloatTensor | None = None,
        draft_token_ids: torch.LongTensor | None = None,
        return_dict: bool = False,
    ) -> np.ndarray | OpenVLAActionOutput:
        """
        Robot actions for a batch of observations.

        The prompt's closing token and its mask are completed where they are missing. Every decoded token is one of
        the action tokens; FAST tokens spell whole chunks, whatever the model would say.

        Args:
            input_ids (`torch.LongTensor`): (B, L), padded on either side.
            unnorm_key (`str` or `list[str]`, *optional*): Dataset whose statistics scale the action and whose robot
                is driven (`embodiments`), one for all rows or one per row. May be left out where there is only one.
                The actions of all rows must be of one dimension.
            pixel_values (`torch.FloatTensor`): (B, images * towers * 3, S, S).
            attention_mask (`torch.Tensor`, *optional*): (B, L). By default, everything but the padding token.
            proprio (`torch.FloatTensor`): (B, proprio_dim), the normalised state, with `use_proprio`.
            do_sample (`bool`, defaults to `False`): Draw the tokens instead of taking the most probable ones.
            temperature, top_k, top_p, generator (*optional*): With `do_sample`; see [`SamplingParams`]. The generator
                also draws the noise that the `diffusion` and `flow` heads begin with.
            num_inference_steps (`int`, *optional*): Passes of these heads; the configuration's by default.
            noise (`torch.FloatTensor`, *optional*): (B, K, D), what they begin with, instead of a drawn one.
            draft_token_ids (`torch.LongTensor`, *optional*): (B, K * D), tokens that may be right, such as the
                previous action's `token_ids`. They are verified with the prompt, and save passes where they are
                right; the result is that of greedy decoding without them. What is no action token, as -1, is guessed.
            return_dict (`bool`, defaults to `False`): Return probabilities and entropy as well.

        Returns:
            `np.ndarray`: float64 actions in the units of the dataset, (D,) for one observation, else (B, D); with
            `chunk_size` above 1 (K, D) and (B, K, D). Or an [`OpenVLAActionOutput`].

        Raises:
            ValueError: On an unknown `unnorm_key`, rows that differ in action dimension, an empty batch, pixel values
                or a state that are not finite, a FAST tokenizer that is not there, or a draft where tokens are not
                decoded greedily one by one.
            FloatingPointError: If the logits, or the actions of a head, are not finite.
        """
        sampling = SamplingParams(do_sample, temperature, top_k, top_p, generator)
        self._check_options(do_sample, num_inference_steps, noise)
        input_ids, attention_mask = self._complete_prompt(input_ids, attention_mask)
        statistics = select_row_statistics(self.norm_stats, unnorm_key, len(input_ids))
        size = self._action_dim(statistics[0])
        embodiment = self._embodiments_of(unnorm_key, len(input_ids))
        draft = self._checked_draft(draft_token_ids, input_ids, self.config.chunk_size * size, do_sample)
        self._check_ready(pixel_values=pixel_values, proprio=proprio)
        token_ids = logits = None
        if self.config.attention_mode == "causal":
            observation = (input_ids, attention_mask, pixel_values, proprio, embodiment)
            token_ids, logits = self._predict_one_by_one(*observation, self.config.chunk_size * size, sampling, draft)
        else:
            self._check_attention_once()
            width = size if self.action_head is None else self.config.action_dim
            inputs = self._parallel_inputs(input_ids, attention_mask, pixel_values, proprio, embodiment, width)
            if self.action_head is None:
                token_ids, logits = self._predict_tokens(inputs, sampling)
            else:
                normalized = self._predict_with_head(inputs, size, num_inference_steps, noise, generator)
        if self.config.head_type == "fast":
            normalized = self._decode_fast_ids(token_ids, size)
        elif token_ids is not None:
            normalized = self.codec.decode(token_ids.cpu().numpy())  # (B, K * D)
        output = self._action_output(normalized, statistics, token_ids, logits, return_dict)
        if return_dict and draft is not None:
            output["accepted_tokens"] = count_right(draft_token_ids.to(token_ids.device), token_ids)
        return output

    @torch.no_grad()
    def warm_up(
        self,
        batch_sizes: Sequence[int] = (1,),
        text_lengths: Sequence[int] = (32, 64),
        min_packed_size: int = 2**18,
    ) -> int:
        """
        Prepare this model for fast actions, with what its device has for that. Prepared is what the model is now: call
        this again when it was moved, or its weights were replaced or changed; until then actions are computed as
        without it, as they are under autocast. Copies of the model have nothing of it, nor have saved ones. No other
        thread may predict meanwhile.

        On a CPU, in float32, layers of towers and projector hold their weights a second time, in the order in which
        MKL multiplies the rows of so many pictures: see [`PackedLinear`], which takes their place, and what it does
        not see. That is about as much memory again as their weights take, for each batch size. Actions are those
        without it, but for the rounding of products.

        On CUDA, greedy actions are recorded as CUDA graphs, from pictures to tokens, for `predict_action` to replay:
        without them the host takes longer to launch an action's kernels than the device to run them. A prompt takes
        the shortest graph that it fits in, a longer one none. Weights may be changed in place; hooks that are
        registered later are not called. Each graph holds the memory of an action. Experimental: it has never run on a
        GPU, and is tested without the recording.

        Args:
            batch_sizes (`Sequence[int]`, defaults to `(1,)`): Batches to come; none takes back what was prepared.
            text_lengths (`Sequence[int]`, defaults to `(32, 64)`): Tokens of text up to which there is a graph.
            min_packed_size (`int`, defaults to 2**18): Numbers that a weight must have to be packed: what is saved of
                the product with a smaller one is lost by looking whether it has changed.

        Returns:
            `int`: How many graphs were recorded, or layers packed. Where none can be, the log says why.

        Raises:
            ValueError: If a batch has no row.
        """
        if min(batch_sizes, default=1) < 1:
            raise ValueError(f"Batches have a row at least, got batch_sizes={list(batch_sizes)}.")
        self._recorded = None
        for module in self.modules():
            if isinstance(module, PackedLinear):
                module.unpack()
        if self.device.type == "cpu":
            return self._pack_weights(batch_sizes, min_packed_size)
        reason = self._why_no_graphs()
        if reason is not None:
            logger.warning(f"No action is recorded, since {reason}: actions are decoded as without `warm_up`.")
            return 0
        lengths = [text_length + self.num_image_tokens for text_length in text_lengths]
        graphs = [self._make_graph(batch_size, length) for batch_size in batch_sizes for length in lengths]
        try:
            for graph in graphs:
                graph.record()
        except RuntimeError as error:
            logger.warning(f"No action is recorded, since the device refuses one: {error}")
            return 0
        self._recorded = RecordedActions(self, graphs)
        return len(graphs)

    def _pack_weights(self, batch_sizes: Sequence[int], min_size: int) -> int:
        """Number of layers of towers and projector that are packed now, for the rows of such batches alone."""
        parts = [*self.vision_backbone.modules(), *self.projector.modules()]
        layers = [part for part in parts if isinstance(part, nn.Linear) and not isinstance(part, ZeroLinear)]
        reasons = {why_not_packed(layer) for layer in layers} - {None} if layers else {"its layers are quantised"}
        layers = [layer for layer in layers if layer.weight.numel() >= min_size]
        if not layers:
            reasons = reasons or {f"none has {min_size} numbers, and smaller ones gain nothing"}
        if reasons:
            logger.warning(f"No weight is packed, since {min(reasons)}: actions are computed as without `warm_up`.")
            return 0
        numbers_of_rows: dict[nn.Module, set[int]] = {}  # of the layers that run

        def see(layer: nn.Module, arguments: tuple[torch.Tensor]) -> None:
            numbers_of_rows.setdefault(layer, set()).add(arguments[0].shape[:-1].numel())

        hooks = [layer.register_forward_pre_hook(see) for layer in layers]
        try:
            for batch_size in batch_sizes:
                instruction = torch.zeros(batch_size, self.config.text_config.hidden_size)
                self.get_image_features(self._blank_pixels(batch_size), instruction if self.config.use_film else None)
        finally:
            for hook in hooks:
                hook.remove()
        packed = {layer: layer if type(layer) is PackedLinear else PackedLinear(layer) for layer in numbers_of_rows}
        for part in parts:
            for name, layer in list(part._modules.items()):  # `named_children` tells one of several names
                if layer in packed:
                    setattr(part, name, packed[layer])
        for layer, rows in numbers_of_rows.items():
            packed[layer].pack(rows)
        return len(packed)

    def _blank_pixels(self, batch_size: int) -> torch.Tensor:
        """`pixel_values` of the shape that a batch has, all zero."""
        config = self.config
        side, channels = config.image_sizes[0], 3 * len(config.image_sizes) * config.num_images
        return torch.zeros(batch_size, channels, side, side, dtype=self.dtype, device=self.device)

    def _why_no_graphs(self) -> str | None:
        """What keeps this model from [`warm_up`]; `None`: nothing does."""
        config = self.config
        if config.attention_mode != "causal" or config.head_type != "tokens":
            return f"it is for action tokens one by one, not {config.attention_mode!r} {config.head_type!r}"
        if config.embodiments is not None:
            return "the policy looks at its robot's number"
        if len({action_dim(statistics) for statistics in self.norm_stats.values()}) != 1:
            return "the actions of its datasets differ in dimension"
        if any(type(parameter) is not nn.Parameter for parameter in self.parameters()):
            return "its weights are quantised"
        if any(hasattr(module, "base_layer") for module in self.modules()):
            return "it has adapters, which can be merged or turned off later: merge them before"
        if self.device.type != "cuda":
            return f"the model is on {self.device.type!r} and not on 'cuda'"
        return why_not_static(self.get_decoder(), self.device)

    def _make_graph(self, batch_size: int, length: int) -> ActionGraph:
        """An action of fixed shapes, not recorded yet, for prompts of up to `length` positions with the image."""
        config, device = self.config, self.device
        shape = (batch_size, length)
        ids = torch.full(shape, config.image_token_id, device=device)
        ids[:, self.num_image_tokens :] = 0
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones(shape, dtype=torch.long, device=device),
            "pixel_values": self._blank_pixels(batch_size),
        }
        if config.use_proprio:
            inputs["proprio"] = torch.zeros(batch_size, config.proprio_dim, dtype=self.dtype, device=device)

        def embed(given: dict[str, torch.Tensor]) -> torch.Tensor:
            images, proprio = given["pixel_values"], given.get("proprio")
            features = self._observe(given["input_ids"], given["attention_mask"], None, images, proprio, None)
            return self._embed(given["input_ids"], features)

        num_tokens = config.chunk_size * self.get_action_dim(next(iter(self.norm_stats)))
        return ActionGraph(self.language_model, config, embed, inputs, num_tokens)

    def _find_graph(self, batch_size: int, length: int, num_tokens: int) -> ActionGraph | None:
        """The shortest recorded action for such prompts, if what was recorded is still there."""
        recorded = self._recorded  # another thread may replace it
        if recorded is None or torch.is_autocast_enabled(self.device.type):
            return None
        if not recorded.are_of(self):
            logger.warning("The model was moved or changed: call `warm_up` again. Actions are decoded without it.")
            self._recorded = None
            return None
        return recorded.find(batch_size, length, num_tokens)

    def __getstate__(self) -> dict:
        """Without recorded actions: a copy of the model has other weights, and no file can hold a CUDA graph."""
        return {**self.__dict__, "_recorded": None}

    def check_attention(self) -> None:
        """
        Verify that the language model's attention is what `attention_mode` says, by changing a late token and seeing
        which positions change. A bidirectional policy does this by itself before its first action: a causal mask
        instead would cost it half of its successes without a word.

        Raises:
            RuntimeError: If it is not.
        """
        begin = self.config.action_token_begin
        ids = torch.linspace(0, begin - 1, 9, device=self.get_input_embeddings().weight.device).long()
        embeddings = self.get_input_embeddings()(ids).detach()

        @torch.no_grad()
        def decode(inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self._decode(inputs_embeds, attention_mask, use_cache=False).last_hidden_state

        check_attention(decode, embeddings, self.config.attention_mode)

    def _check_attention_once(self) -> None:
        implementation = self.language_model.config._attn_implementation
        if self._checked_attention == implementation or self.training:  # dropout would change every position
            return
        self.check_attention()
        self._checked_attention = implementation

    def _predict_one_by_one(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.FloatTensor,
        proprio: torch.FloatTensor | None,
        embodiment: torch.LongTensor | None,
        num_values: int,
        sampling: SamplingParams,
        draft: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, `num_values`), or of FAST tokens (B, S), and the logits they were chosen from."""
        is_fast = self.config.head_type == "fast"
        if is_fast and self.fast_tokenizer is None:
            raise ValueError("The policy speaks in FAST tokens and has no tokenizer: assign `model.fast_tokenizer`.")
        input_ids, attention_mask, _ = self._expand_image(input_ids, pixel_values, attention_mask)
        graph = self._find_graph(*input_ids.shape, num_values)
        if graph is not None and not sampling.do_sample and (proprio is not None) == self.config.use_proprio:
            guess = guess_tokens(self.config, len(input_ids), num_values, input_ids.device)
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
            if proprio is not None:
                _check_shape("proprio", proprio, (len(input_ids), self.config.proprio_dim))
                given["proprio"] = proprio
            return graph(given, guess if draft is None else draft)
        features = self._observe(input_ids, attention_mask, None, pixel_values, proprio, embodiment)
        inputs_embeds = self._embed(input_ids, features)
        prompt = (self.language_model, self.config, inputs_embeds, attention_mask)
        if is_fast:
            return decode_fast_tokens(*prompt, self.fast_tokenizer.grammar, num_symbols=num_values, sampling=sampling)
        return decode_action_tokens(*prompt, num_tokens=num_values, sampling=sampling, draft=draft)

    def _check_options(
        self, do_sample: bool, num_inference_steps: int | None, noise: torch.FloatTensor | None
    ) -> None:
        """Refuse what another kind of head would need."""
        head_type = self.config.head_type
        if do_sample and self.config.is_continuous:
            raise ValueError(f"`do_sample` draws tokens, and a {head_type!r} head speaks of none.")
        if not self.config.is_denoising and (num_inference_steps is not None or noise is not None):
            raise ValueError(f"`num_inference_steps` and `noise` mean nothing to a {head_type!r} head.")

    def _check_ready(self, **observation: torch.Tensor | None) -> None:
        """Refuse to act without a cache, or on what no camera or sensor sees."""
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError("`predict_action` needs a cache, which gradient checkpointing turns off: call `eval()`.")
        for name, values in observation.items():
            # A sum is not finite where a value is not, and takes a twentieth of the time of looking at each.
            if values is None or torch.isfinite(values.sum(dtype=torch.float32)):
                continue
            if not torch.isfinite(values).all():  # and not the sum alone, which large values may overflow
                raise ValueError(f"`{name}` hold NaN or infinite values; the camera or the sensor is broken.")

    def _checked_draft(
        self, draft: torch.LongTensor | None, input_ids: torch.LongTensor, num_tokens: int, do_sample: bool
    ) -> torch.LongTensor | None:
        """`draft` (B, `num_tokens`) beside the ids, with a guess where there is no action token."""
        if draft is None:
            return None
        config = self.config
        if do_sample or config.attention_mode != "causal" or config.head_type != "tokens":
            raise ValueError(
                "`draft_token_ids` are for greedy decoding of action tokens one by one; got "
                f"`do_sample={do_sample}`, `attention_mode={config.attention_mode!r}`, "
                f"`head_type={config.head_type!r}`."
            )
        _check_shape("draft_token_ids", draft, (len(input_ids), num_tokens))
        draft = draft.to(input_ids.device, torch.long)
        is_action = (draft >= config.action_token_begin) & (draft < config.action_token_end)
        return draft.where(is_action, guess_tokens(config, len(draft), num_tokens, draft.device))

    def _decode_fast_ids(self, token_ids: torch.Tensor, action_dim: int) -> np.ndarray:
        """Normalised actions (B, K * D) of FAST tokens (B, S)."""
        config = self.config
        rows = [ids_to_tokens(row, config.action_token_end, config.stop_token_id) for row in token_ids.tolist()]
        return self.fast_tokenizer.decode(rows, config.chunk_size, action_dim).reshape(len(rows), -1)

    def _parallel_inputs(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        pixel_values: torch.FloatTensor,
        proprio: torch.FloatTensor | None,
        embodiment: torch.LongTensor | None,
        action_dim: int,
    ) -> dict[str, torch.Tensor]:
        """What one pass over the prompt, all actions and the stop token needs; see `_parallel_hidden`."""
        config = self.config
        action = [config.action_token_begin] * (config.chunk_size * action_dim)
        stop = [config.stop_token_id] if config.append_stop_token else []
        tail = torch.tensor(action + stop, device=input_ids.device).expand(len(input_ids), -1)
        labels = torch.cat([torch.full_like(input_ids, -100), tail], dim=1)
        mask = torch.cat([attention_mask, torch.ones_like(tail, dtype=attention_mask.dtype)], dim=1)
        ids, mask, labels = self._expand_image(torch.cat([input_ids, tail], dim=1), pixel_values, mask, labels)
        is_action = self._action_positions(labels)
        features = self._observe(ids, mask, is_action, pixel_values, proprio, embodiment)
        return {"input_ids": ids, "attention_mask": mask, "is_action": is_action, "features": features}

    def _parallel_hidden(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor,
        is_action: torch.Tensor,
        features: torch.Tensor,
        noisy: torch.Tensor | None = None,
        time: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states (B, K * D, H) of all actions in one pass, from their noisy values or from nothing."""
        inputs_embeds = self._embed(input_ids, self._with_time(features, time))
        inputs_embeds = self._place_actions(inputs_embeds, is_action, noisy)
        hidden = self._decode(inputs_embeds, attention_mask, use_cache=False).last_hidden_state
        return _in_front_of(hidden, is_action)

    def _predict_tokens(
        self, inputs: dict[str, torch.Tensor], sampling: SamplingParams
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, K * D), each chosen by itself, and their logits (B, K * D, n_action_bins)."""
        hidden = self._parallel_hidden(**inputs)
        to_action_logits = action_logits_function(self.get_output_embeddings(), self.config)
        logits = to_action_logits(hidden.flatten(0, 1))  # (B * K * D, n_action_bins)
        check_finite(logits)
        token_ids = sampling.select(logits) + self.config.action_token_begin  # (B * K * D,)
        return token_ids.view(hidden.shape[:2]), logits.unflatten(0, hidden.shape[:2])

    def _predict_with_head(
        self,
        inputs: dict[str, torch.Tensor],
        action_dim: int,
        num_inference_steps: int | None,
        noise: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> np.ndarray:
        """Normalised actions of so many numbers, float64 (B, K * action_dim)."""
        config, head = self.config, self.action_head
        device = inputs["features"].device
        if not config.is_denoising:
            sample = head(self._parallel_hidden(**inputs))  # (B, K, D)
        else:
            shape = (len(inputs["input_ids"]), config.chunk_size, config.action_dim)
            if noise is None:
                noise = torch.randn(shape, generator=generator, device=generator.device if generator else device)
            _check_shape("noise", noise, shape)
            sample = noise.to(device, torch.float32)
            is_own = torch.arange(config.action_dim, device=device) < action_dim  # (D,)
            default = config.diffusion_steps if config.head_type == "diffusion" else 10
            steps = (num_inference_steps, config.num_inference_steps, default)
            num_steps = next(number for number in steps if number is not None)
            for time, next_time in head.schedule(num_steps):
                level = torch.full((len(sample),), time, device=device)
                prediction = head(self._parallel_hidden(**inputs, noisy=sample * is_own, time=level))
                sample = head.step(prediction, sample, time, next_time)
        sample = sample[..., :action_dim]
        check_finite(sample, "actions")
        return sample.flatten(1).double().cpu().numpy()

    def _action_output(
        self,
        normalized: np.ndarray,
        statistics: list[dict],
        token_ids: torch.Tensor | None,
        logits: torch.Tensor | None,
        return_dict: bool,
    ) -> np.ndarray | OpenVLAActionOutput:
        """Scale the actions (B, K * D), and leave out the axes that have one entry."""
        num_actions, norm_type = self.config.chunk_size, self.config.norm_type
        normalized = normalized.reshape(len(normalized), num_actions, -1)  # (B, K, D)
        rows = [unnormalize(row, s["action"], norm_type) for row, s in zip(normalized, statistics, strict=True)]
        actions = np.stack(rows)  # (B, K, D)
        if num_actions == 1:
            actions, normalized = actions[:, 0], normalized[:, 0]
        if len(actions) == 1:
            actions, normalized = actions[0], normalized[0]
        if not return_dict:
            return actions
        if logits is None:
            return OpenVLAActionOutput(actions, normalized)
        log_probabilities = logits.float().flip(-1).log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities).sum(dim=-1)
        if self.config.head_type == "fast":
            has_ended = token_ids == self.config.stop_token_id
            probabilities = probabilities.masked_fill(has_ended[..., None], 0.0)
            entropy = entropy.masked_fill(has_ended, 0.0)
        return OpenVLAActionOutput(actions, normalized, token_ids, probabilities, entropy)

    def _action_dim(self, statistics: dict) -> int:
        """Numbers of this dataset's actions, which may be fewer than the policy's if those of another are as many."""
        size, expected = action_dim(statistics), self.config.action_dim
        is_known = any(action_dim(each) == expected for each in self.norm_stats.values())
        if expected is not None and (size > expected or not is_known):
            raise ValueError(
                f"The policy's actions are of {expected} numbers (`action_dim`), the statistics of {size}. Those of a "
                f"robot with fewer are padded where the statistics hold a robot with {expected}, too."
            )
        return size

    def _embodiments_of(self, unnorm_key: str | Sequence[str] | None, batch_size: int) -> torch.LongTensor | None:
        """Number of each row's robot, (B,); `None` without the adapter."""
        if self.config.embodiments is None:
            return None
        keys = resolve_row_keys(self.norm_stats, unnorm_key, batch_size)
        return torch.tensor(embodiment_rows(self.config.embodiments, keys))

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        **kwargs,
    ):
        """
        As [`GenerationMixin.generate`]: text, or action tokens that nothing restricts to the action bins. Takes
        `pixel_values` beside `input_ids`, padded on either side. The ids returned hold no image placeholders and are
        padded on the left; lengths count text alone.
        """
        if self.config.attention_mode != "causal":
            raise ValueError("A bidirectional policy does not generate token after token; use `predict_action`.")
        kwargs["generation_config"] = copy.deepcopy(generation_config)
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is None:
            return super().generate(logits_processor=logits_processor, **kwargs)
        pixel_values = kwargs.pop("pixel_values", None)
        attention_mask = self._default_mask(input_ids, kwargs.pop("attention_mask", None))
        input_ids, attention_mask = left_pad(input_ids, attention_mask)
        num_text_tokens = input_ids.shape[1]
        if pixel_values is not None:
            input_ids, attention_mask, _ = self._expand_image(input_ids, pixel_values, attention_mask)
            _lengthen(kwargs, input_ids.shape[1] - num_text_tokens)
        # A placeholder is an input alone; one that was drawn would ask for another image.
        never = SuppressTokensLogitsProcessor([self.config.image_token_id], device=input_ids.device)
        outputs = super().generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            logits_processor=LogitsProcessorList([*(logits_processor or []), never]),
            **kwargs,
        )
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        prompt, new = sequences.tensor_split([input_ids.shape[1]], dim=1)
        is_text = prompt != self.config.image_token_id
        sequences = torch.cat([prompt[is_text].view(len(prompt), num_text_tokens), new], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        proprio: torch.FloatTensor | None = None,
        embodiment: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> dict:
        # The number of cached positions decides, not whether there is a cache: since transformers 4.54 the first
        # step gets an empty one, and a model that takes it for a later step never sees the image.
        is_prefill = past_key_values is None or past_key_values.get_seq_length() == 0
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs
        )
        if is_prefill:
            model_inputs["pixel_values"] = pixel_values
            model_inputs["proprio"] = proprio
            model_inputs["embodiment"] = embodiment
        return model_inputs

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Number of action dimensions of a dataset."""
        return action_dim(select_statistics(self.norm_stats, unnorm_key))

    def get_action_stats(self, unnorm_key: str | None = None) -> dict:
        """Action statistics of a dataset."""
        return select_statistics(self.norm_stats, unnorm_key)["action"]

    def _default_mask(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"`input_ids` must be of shape (batch, length), neither 0, got {tuple(input_ids.shape)}.")
        if attention_mask is None:
            pad_token_id = self.config.pad_token_id
            return torch.ones_like(input_ids) if pad_token_id is None else input_ids.ne(pad_token_id).long()
        _check_same_shape(input_ids, attention_mask=attention_mask)
        if not attention_mask.any(dim=1).all():
            raise ValueError(f"`attention_mask` leaves rows without any token: {attention_mask.tolist()}.")
        return attention_mask

    def _complete_prompt(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.LongTensor, torch.Tensor]:
        """Left-pad, and append the closing token to the rows that do not end in it."""
        attention_mask = self._default_mask(input_ids, attention_mask)
        input_ids, attention_mask = left_pad(input_ids, attention_mask)
        closing_token_id = self.config.closing_token_id
        if closing_token_id is None:
            return input_ids, attention_mask
        missing = input_ids[:, -1:] != closing_token_id  # (B, 1)
        if not missing.any():
            return input_ids, attention_mask
        input_ids = torch.cat([input_ids, torch.full_like(missing, closing_token_id, dtype=input_ids.dtype)], dim=1)
        return left_pad(input_ids, torch.cat([attention_mask, missing.to(attention_mask.dtype)], dim=1))

    def _mask_where_padded(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The mask that was given, or one that is needed; `None` where every token counts."""
        if attention_mask is None and (input_ids == self.config.pad_token_id).any():
            return self._default_mask(input_ids, None)
        return attention_mask

    def _expand_image(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor | None, torch.LongTensor | None]:
        """Insert the placeholders behind the first attended token of each row: (B, L) -> (B, L + P)."""
        attention_mask = self._mask_where_padded(input_ids, attention_mask)
        side, channels = self.config.image_sizes[0], 3 * len(self.config.image_sizes) * self.config.num_images
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (channels, side, side):
            raise ValueError(
                f"`pixel_values` must be of shape (batch, {channels}, {side}, {side}), got "
                f"{tuple(pixel_values.shape)}; this policy looks at {self.config.num_images} image(s)."
            )
        if len(pixel_values) != len(input_ids):
            raise ValueError(
                f"Each text needs its image: {len(input_ids)} texts and {len(pixel_values)} images were given."
            )
        image_token_id, num_patches = self.config.image_token_id, self.num_image_tokens
        num_placeholders = (input_ids == image_token_id).sum(dim=1)
        if num_placeholders.any():
            if (num_placeholders != num_patches).any():
                raise ValueError(
                    f"Each row needs {num_patches} image placeholders (id {image_token_id}), got "
                    f"{num_placeholders.tolist()}."
                )
            return input_ids, attention_mask, labels

        _check_same_shape(input_ids, attention_mask=attention_mask, labels=labels)
        batch_size, length = input_ids.shape
        first = input_ids.new_zeros(batch_size, 1)
        if attention_mask is not None:
            first = attention_mask.ne(0).to(torch.uint8).argmax(dim=1, keepdim=True)  # (B, 1)
        slot = torch.arange(length + num_patches, device=input_ids.device)[None]  # (1, L + P)
        is_image = (slot > first) & (slot <= first + num_patches)  # (B, L + P)
        source = torch.where(slot > first, slot - num_patches, slot).clamp(min=0)

        def expand(tensor: torch.Tensor | None, fill: int) -> torch.Tensor | None:
            return None if tensor is None else tensor.gather(1, source).masked_fill(is_image, fill)

        return expand(input_ids, image_token_id), expand(attention_mask, 1), expand(labels, -100)

    def _check_forms(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> None:
        """Refuse inputs of `forward` that contradict each other."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if pixel_values is None:
            return
        if input_ids is None:
            raise ValueError("`pixel_values` need `input_ids`; `inputs_embeds` must hold the image already.")
        if position_ids is not None and not (input_ids == self.config.image_token_id).any():
            raise ValueError("`position_ids` need `input_ids` with image placeholders.")

    def _observe(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        is_action: torch.Tensor | None,
        pixel_values: torch.FloatTensor | None,
        proprio: torch.FloatTensor | None,
        embodiment: torch.LongTensor | None,
    ) -> torch.Tensor | None:
        """Embeddings of the images and, behind them, of the state, (B, images * P [+ 1], H); `None` without images."""
        if pixel_values is None:
            if embodiment is not None:
                raise ValueError("`embodiment` is of what the robot sees: it goes with `pixel_values`.")
            return None
        instruction = None
        if self.config.use_film:
            is_text = input_ids != self.config.image_token_id
            if attention_mask is not None:
                is_text &= attention_mask.bool()
            if is_action is not None:
                is_text &= ~is_action
            weights = is_text / is_text.sum(dim=1, keepdim=True)  # (B, T)
            embeddings = self.get_input_embeddings()(input_ids)  # (B, T, H)
            instruction = torch.einsum("bt,bth->bh", weights, embeddings.float())
        features = self._with_state(self.get_image_features(pixel_values, instruction), proprio)
        return self._for_embodiment(features, embodiment)

    def _with_state(self, features: torch.Tensor, proprio: torch.FloatTensor | None) -> torch.Tensor:
        """`features` (B, P, H) with the embedding of the state behind them, for the policies that take one."""
        if not self.config.use_proprio:
            if proprio is not None:
                raise ValueError("`proprio` was given to a policy with `use_proprio=False`.")
            return features
        if proprio is None:
            raise ValueError("The policy needs `proprio`: pass `state=` to the processor.")
        _check_shape("proprio", proprio, (len(features), self.config.proprio_dim))
        state = self.proprio_projector(proprio.to(features.device))[:, None]  # (B, 1, H)
        return torch.cat([features, state.to(features.dtype)], dim=1)

    def _for_embodiment(self, features: torch.Tensor, embodiment: torch.LongTensor | None) -> torch.Tensor:
        """`features` (B, P, H) as the adapter makes them for each row's robot."""
        if self.embodiment_adapter is None:
            if embodiment is not None:
                raise ValueError("`embodiment` was given to a policy that tells no robots apart (`embodiments=None`).")
            return features
        names = self.config.embodiments
        if embodiment is None:
            raise ValueError(f"The policy needs `embodiment`, the place of each row's robot in {names}.")
        _check_shape("embodiment", embodiment, (len(features),))
        if ((embodiment < 0) | (embodiment >= len(names))).any():
            raise ValueError(f"`embodiment` must hold places in {names}, got {embodiment.tolist()}.")
        return self.embodiment_adapter(features, embodiment)

    def _with_time(self, features: torch.Tensor | None, time: torch.Tensor | None) -> torch.Tensor | None:
        """`features` with the embedding of the noise level behind them, for the heads that have one."""
        if features is None or not self.config.is_denoising:
            return features
        if time is None:
            raise ValueError(
                f"`forward` of a policy with a {self.config.head_type!r} head needs `labels` and `actions`."
            )
        level = self.action_head.embed_time(time.to(features.device), features.shape[-1])[:, None]  # (B, 1, H)
        return torch.cat([features, level.to(features.dtype)], dim=1)

    def _action_positions(self, labels: torch.LongTensor | None) -> torch.Tensor | None:
        """Where the actions are that one pass predicts, (B, T); `None` where there are no such."""
        if labels is None or self.config.attention_mode == "causal":
            return None
        return self._labelled_actions(labels)

    def _labelled_actions(self, labels: torch.LongTensor) -> torch.Tensor:
        """Where the tokens of a chunk of actions are, bool (B, T)."""
        is_action = (labels >= self.config.action_token_begin) & (labels < self.config.action_token_end)
        counts, action_dim = is_action.sum(dim=1), self.config.action_dim
        if (counts % self.config.chunk_size).any() or (counts == 0).any():
            raise ValueError(
                f"Each row needs the action tokens of {self.config.chunk_size} action(s), got {counts.tolist()}."
            )
        if action_dim is None:
            return is_action
        expected = self.config.chunk_size * action_dim
        # Tokens are as many as the robot has numbers; in front of a head its padding has places, too.
        if (counts > expected).any() or (self.config.is_continuous and (counts < expected).any()):
            raise ValueError(
                f"Each row needs {self.config.chunk_size} action(s) of {action_dim} tokens, got {counts.tolist()}."
            )
        return is_action

    def _without_padding(
        self,
        labels: torch.LongTensor | None,
        action_is_pad: torch.Tensor | None,
        action_dims: torch.LongTensor | None,
    ) -> torch.LongTensor | None:
        """
        What is learned of `labels` (B, T): -100 at the tokens of padded actions, and of padded numbers, too. FAST
        tokens, which are of the whole chunk, are all learned.
        """
        is_given = action_is_pad is not None or action_dims is not None
        if labels is None or not is_given or self.config.head_type == "fast":
            return labels
        is_action = self._labelled_actions(labels)
        tokens_per_action = is_action.sum(dim=1, keepdim=True) // self.config.chunk_size  # (B, 1)
        place = (is_action.cumsum(dim=1) - 1).clamp(min=0)  # (B, T), of a token among those of its row
        if action_is_pad is not None:
            _check_shape("action_is_pad", action_is_pad, (len(labels), self.config.chunk_size))
            is_pad = action_is_pad.to(labels.device).gather(1, place // tokens_per_action)  # (B, T)
            labels = labels.masked_fill(is_action & is_pad, -100)
        if action_dims is not None:
            is_pad = place % tokens_per_action >= self._checked_dims(action_dims, labels)[:, None]
            labels = labels.masked_fill(is_action & is_pad, -100)
        return labels

    def _checked_dims(self, action_dims: torch.LongTensor, rows: torch.Tensor) -> torch.LongTensor:
        """`action_dims` (B,), where `rows` are."""
        _check_shape("action_dims", action_dims, (len(rows),))
        if not self.config.is_continuous or not ((action_dims >= 1) & (action_dims <= self.config.action_dim)).all():
            raise ValueError(
                f"`action_dims` are for a head on the hidden states and at most `action_dim`; got "
                f"{action_dims.tolist()} with `head_type={self.config.head_type!r}` and "
                f"`action_dim={self.config.action_dim}`."
            )
        return action_dims.to(rows.device)

    def _head_inputs(
        self,
        actions: torch.Tensor | None,
        is_action: torch.Tensor | None,
        noise: torch.Tensor | None,
        time: torch.Tensor | None,
        action_dims: torch.LongTensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Noisy actions, the head's target and the noise level, each `None` where there is no such."""
        if self.action_head is None or (actions is None and is_action is None):
            return None, None, None
        if actions is None or is_action is None:
            raise ValueError(f"A {self.config.head_type!r} head learns from `actions` and `labels` together.")
        _check_shape("actions", actions, (len(is_action), self.config.chunk_size, self.config.action_dim))
        actions = actions.to(is_action.device)
        if not self.config.is_denoising:
            return None, actions, None
        noise = torch.randn_like(actions, dtype=torch.float32) if noise is None else noise
        time = self.action_head.draw_time(len(actions), actions.device) if time is None else time
        noisy, target = self.action_head.corrupt(actions, noise, time)
        if action_dims is not None:  # noise that no one learns to remove would be in the way
            noisy = noisy * self._own_numbers(action_dims, noisy)
        return noisy, target, time

    def _own_numbers(self, action_dims: torch.LongTensor, actions: torch.Tensor) -> torch.Tensor:
        """Which numbers of `actions` (B, K, D) are no padding, bool (B, 1, D)."""
        index = torch.arange(self.config.action_dim, device=actions.device)  # (D,)
        return index < action_dims.to(actions.device)[:, None, None]

    def _place_actions(
        self, inputs_embeds: torch.Tensor, is_action: torch.Tensor | None, noisy: torch.Tensor | None
    ) -> torch.Tensor:
        """`inputs_embeds` (B, T, H) with zeros, or the `noisy` actions (B, K, D), at the positions of the actions."""
        if is_action is None:
            return inputs_embeds
        positions = is_action[..., None].to(inputs_embeds.device)  # (B, T, 1)
        if noisy is None:
            return inputs_embeds.masked_fill(positions, 0.0)
        embeddings = self.noisy_action_projector(noisy.flatten(1)[..., None])  # (B, K * D, H)
        return inputs_embeds.masked_scatter(positions, embeddings.to(inputs_embeds.device, inputs_embeds.dtype))

    def _decode(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> ModelOutput:
        """The language model without its head."""
        if position_ids is None and attention_mask is not None and attention_mask.shape == inputs_embeds.shape[:2]:
            position_ids = positions_of(attention_mask)
        if self.config.attention_mode == "causal":
            kwargs["attention_mask"] = attention_mask
        else:
            if attention_mask is None:
                attention_mask = inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.long)
            implementation = self.language_model.config._attn_implementation
            kwargs |= bidirectional_arguments(attention_mask, inputs_embeds.dtype, implementation)
            kwargs["use_cache"] = False
        return self.get_decoder()(inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs)

    def _embed(self, input_ids: torch.LongTensor, features: torch.Tensor | None) -> torch.Tensor:
        """Embeddings of the ids, with `features` (B, P, H) at the placeholders, (B, T, H)."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if features is None:
            return inputs_embeds
        is_image = (input_ids == self.config.image_token_id)[..., None].to(inputs_embeds.device)  # (B, T, 1)
        return inputs_embeds.masked_scatter(is_image, features.to(inputs_embeds.device, inputs_embeds.dtype))

    def _logits_and_loss(
        self,
        hidden: torch.Tensor,
        labels: torch.LongTensor | None,
        learned: torch.LongTensor | None,
        logits_to_keep: int | torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The head runs on the positions of the labels alone, unless more is asked for; not all need be learned."""
        head = self.get_output_embeddings()
        loss = logits = None
        if labels is not None:
            targets = learned[:, 1:].to(hidden.device)  # (B, T - 1), position t predicts token t + 1
            supervised = labels[:, 1:].to(hidden.device) != -100
            count = max(int(supervised.sum(dim=1).max()), 1)
            # A stable sort moves the supervised positions of each row to its end, in their order.
            kept = supervised.to(torch.uint8).argsort(dim=1, stable=True)[:, -count:]  # (B, A)
            logits = head(hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1])))  # (B, A, V)
            loss = self.loss_function(
                logits=logits,
                labels=None,
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=targets.gather(1, kept).to(logits.device),
            )
            if not (targets != -100).any():
                logger.warning_once("`labels` supervise no token of this batch: its loss is 0.")
                loss = logits.sum() * 0.0  # not the mean of nothing, which is NaN
        if labels is None or logits_to_keep is not None:
            if not isinstance(logits_to_keep, torch.Tensor):
                logits_to_keep = slice(-(logits_to_keep or 0), None)
            logits = head(hidden[:, logits_to_keep])
        return loss, logits

    def _head_loss(
        self,
        predictions: torch.Tensor,
        target: torch.Tensor,
        action_is_pad: torch.Tensor | None,
        action_dims: torch.LongTensor | None,
        learned: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """The head's loss, times this batch's share of the tokens that the `Trainer` accumulates over."""
        target = target.to(predictions.device)
        if action_dims is not None:
            kept = self._own_numbers(action_dims, predictions).expand_as(predictions)  # (B, K, D)
            if action_is_pad is not None:
                kept = kept & ~action_is_pad.to(predictions.device)[..., None]
            predictions, target = predictions[kept], target[kept]
        elif action_is_pad is not None:
            kept = ~action_is_pad.to(predictions.device)  # (B, K)
            predictions, target = predictions[kept], target[kept]
        loss = self.action_head.loss(predictions, target)
        if num_items_in_batch is None:
            return loss
        return loss * ((learned != -100).sum() / num_items_in_batch).to(loss.device)


def _in_front_of(hidden: torch.Tensor, is_action: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, A, H) of the positions that predict the actions: each one in front of its action."""
    count = int(is_action[0].sum())
    first = is_action.to(torch.uint8).argmax(dim=1, keepdim=True)  # (B, 1)
    index = first - 1 + torch.arange(count, device=is_action.device)  # (B, A)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]).to(hidden.device))


def _with_unquantized_modules(arguments: dict) -> dict:
    """Arguments of `from_pretrained` in which a `BitsAndBytesConfig` lists what stays unquantised."""
    arguments = dict(arguments)
    flags = {name: arguments.pop(name) for name in ("load_in_4bit", "load_in_8bit") if name in arguments}
    config = copy.deepcopy(arguments.get("quantization_config"))
    if any(flags.values()):
        if config is not None:
            raise ValueError(f"Pass either `quantization_config` or {sorted(flags)}, not both.")
        config = flags
    if isinstance(config, dict) and {"load_in_4bit", "load_in_8bit"} & config.keys():
        config = BitsAndBytesConfig(**config)
    if isinstance(config, BitsAndBytesConfig):
        if config.llm_int8_skip_modules is None:
            config.llm_int8_skip_modules = list(UNQUANTIZED_MODULES)
        arguments["quantization_config"] = config
    return arguments


def _check_shape(name: str, values: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(values.shape) != shape:
        raise ValueError(f"`{name}` must be of shape {shape}, got {tuple(values.shape)}.")


def _check_same_shape(input_ids: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` {tuple(tensor.shape)} and `input_ids` {tuple(input_ids.shape)} differ in shape."
            )


def _lengthen(arguments: dict, num_tokens: int) -> None:
    """Add the image to the lengths that a user of `generate` gave for the text."""
    settings = arguments["generation_config"]
    default = GenerationConfig()
    for name in ("max_length", "min_length"):
        if arguments.get(name) is not None:
            arguments[name] += num_tokens
        elif settings is not None and getattr(settings, name) not in (None, getattr(default, name)):
            setattr(settings, name, getattr(settings, name) + num_tokens)


__all__ = ["OpenVLAForActionPrediction", "OpenVLAPreTrainedModel"]
