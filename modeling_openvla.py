# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""OpenVLA: vision towers and projector in front of a causal language model that speaks robot actions."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from transformers.utils import logging

from .action_codec_openvla import ActionCodec, action_dim, select_row_statistics, select_statistics, unnormalize
from .configuration_openvla import (
    HUB_PUSH_ARGUMENTS,
    OpenVLAConfig,
    TowerConfig,
    check_statistics,
    copy_remote_code,
)
from .decoding_openvla import SamplingParams, decode_action_tokens, left_pad, positions_of


logger = logging.get_logger(__name__)

# Left in full precision by default when a checkpoint is loaded in 4 or 8 bits: together they are an eighth of
# openvla-7b, carry the precision of the action, and bitsandbytes cannot run every shape of the towers.
UNQUANTIZED_MODULES = ["vision_backbone", "projector", "lm_head"]


@dataclass
class OpenVLAOutput(ModelOutput):
    """
    Output of [`OpenVLAForActionPrediction.forward`].

    Args:
        loss (`torch.Tensor`): Mean cross-entropy over the supervised tokens; with `labels`.
        logits (`torch.Tensor`): (B, T, V), T including the image positions; with `labels` and no `logits_to_keep`
            (B, A, V), the logits that predict the supervised tokens, right-aligned.
        past_key_values (`Cache`): With `use_cache`.
        hidden_states, attentions (`tuple[torch.Tensor]`): Of the language model, when asked for.
        projector_features (`torch.Tensor`): (B, P, H), with `output_projector_features`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    projector_features: torch.FloatTensor | None = None


@dataclass
class OpenVLAActionOutput(ModelOutput):
    """
    Output of [`OpenVLAForActionPrediction.predict_action`] with `return_dict=True`.

    Args:
        actions (`np.ndarray`): float64 (D,) or (B, D), in the units of the dataset.
        normalized_actions (`np.ndarray`): The same in [-1, 1].
        token_ids (`torch.Tensor`): (B, D).
        probabilities (`torch.Tensor`): float32 (B, D, n_action_bins), over the bins in ascending order of their value;
            of the model itself, before temperature, top-k and top-p.
        entropy (`torch.Tensor`): float32 (B, D), of `probabilities`, in nats: 0 where the model is sure,
            log(n_action_bins) where it knows nothing.
    """

    actions: np.ndarray | None = None
    normalized_actions: np.ndarray | None = None
    token_ids: torch.LongTensor | None = None
    probabilities: torch.FloatTensor | None = None
    entropy: torch.FloatTensor | None = None


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
    def __init__(self, config: TowerConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = Attention(config.embed_dim, config.num_heads)
        self.ls1 = LayerScale(config.embed_dim) if config.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = MLP(config.embed_dim, config.mlp_dim, config.hidden_act)
        self.ls2 = LayerScale(config.embed_dim) if config.layer_scale else nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
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

    def __init__(self, config: TowerConfig):
        super().__init__()
        dim = config.embed_dim
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if config.class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, config.num_registers, dim)) if config.num_registers else None
        num_positions = config.num_patches + (config.num_prefix_tokens if config.embed_class_token else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_positions, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.depth)])
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

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.patch_embed(pixel_values)  # (B, P, D)
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = [token.expand(len(hidden), -1, -1) for token in tokens]
        if self.config.embed_class_token:
            hidden = torch.cat([*prefix, hidden], dim=1) + self.pos_embed
        else:
            hidden = torch.cat([*prefix, hidden + self.pos_embed], dim=1)  # (B, prefix + P, D)
        hidden = self.norm_pre(hidden)
        for block in self.blocks[: self.config.num_used_blocks]:
            hidden = block(hidden)
        return hidden[:, self.config.num_prefix_tokens :]  # (B, P, D)


class VisionBackbone(nn.Module):
    """One or two towers over the same image, their features side by side."""

    def __init__(self, towers: Sequence[TowerConfig]):
        super().__init__()
        self.featurizer = VisionTower(towers[0])
        self.fused_featurizer = VisionTower(towers[1]) if len(towers) == 2 else None
        self.embed_dim = sum(tower.embed_dim for tower in towers)

    @property
    def towers(self) -> list[VisionTower]:
        return [tower for tower in (self.featurizer, self.fused_featurizer) if tower is not None]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        images = pixel_values.split(3, dim=1)  # one (B, 3, S, S) per tower
        features = [tower(image) for tower, image in zip(self.towers, images, strict=True)]
        return torch.cat(features, dim=-1)  # (B, P, embed_dim)


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
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.ones_(module.scale_factor)
        elif isinstance(module, (VisionTower, AttentionPool)):
            for parameter in module.parameters(recurse=False):
                nn.init.normal_(parameter, mean=0.0, std=std)


class OpenVLAForActionPrediction(OpenVLAPreTrainedModel, GenerationMixin):
    """
    Vision-language-action policy: an image and an instruction in, a robot action out.

    Token ids come in the form of the published processor, without image placeholders, and are expanded to one
    placeholder per patch behind the first token (BOS); ids that hold placeholders already are taken as they are.
    """

    def __init__(self, config: OpenVLAConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.vision_backbone = VisionBackbone(config.towers)
        self.projector = Projector(
            self.vision_backbone.embed_dim, config.text_config.hidden_size, config.use_fused_vision_backbone
        )
        # The default dtype is the one asked of `from_pretrained`; text_config may carry another.
        self.language_model = AutoModelForCausalLM.from_config(config.text_config, dtype=torch.get_default_dtype())
        self.codec = ActionCodec.from_config(config)
        self.num_image_tokens = config.num_image_tokens
        # FSDP on transformers 4.57 asks the top model alone what not to split.
        self._no_split_modules = [*self._no_split_modules, *(self.language_model._no_split_modules or ())]
        self.post_init()

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
        # transformers 5 puts new parameters in the place of those that were frozen.
        for tower in (result[0] if isinstance(result, tuple) else result).vision_backbone.towers:
            tower.freeze_unused()
        return result

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, *, push_to_hub: bool = False, **kwargs
    ) -> None:
        """
        As [`PreTrainedModel.save_pretrained`], with `dataset_statistics.json` and the code beside the weights.

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
        if push_to_hub:
            hub_kwargs |= {name: kwargs[name] for name in ("max_shard_size",) if name in kwargs}
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **hub_kwargs})

    def unused_linear_names(self) -> list[str]:
        """
        Names of the linear and convolution layers that never run, for `LoraConfig(exclude_modules=...)`: an adapter
        there would never get a gradient, which DDP waits for.
        """
        unused = {
            id(part)
            for tower in self.vision_backbone.towers
            for root in tower.unused_modules()
            for part in root.modules()
        }
        kinds = (nn.Linear, nn.Conv2d)
        return [name for name, module in self.named_modules() if id(module) in unused and isinstance(module, kinds)]

    @property
    def norm_stats(self) -> dict[str, dict]:
        """Statistics by dataset name; they can be assigned, and are saved with the model."""
        return self.config.norm_stats

    @norm_stats.setter
    def norm_stats(self, norm_stats: dict[str, dict]) -> None:
        self.config.norm_stats = check_statistics(norm_stats)

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

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Embeddings of the image patches, in the space of the language model.

        Args:
            pixel_values (`torch.Tensor`): (B, 3 * towers, S, S), as the image processor makes them.

        Returns:
            `torch.Tensor`: (B, P, H).
        """
        weight = self.vision_backbone.featurizer.patch_embed.proj.weight
        return self.projector(self.vision_backbone(pixel_values.to(weight.dtype)))

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
        **kwargs,
    ) -> OpenVLAOutput | tuple:
        """
        Logits and loss of a prompt, with or without an image.

        Args:
            input_ids (`torch.LongTensor`): (B, L), or (B, T) with placeholders.
            attention_mask (`torch.Tensor`): The same shape, 0 at padding on either side. By default, with an image,
                everything but the padding token.
            pixel_values (`torch.FloatTensor`): (B, 3 * towers, S, S).
            labels (`torch.LongTensor`): The shape of `input_ids`; -100 where nothing is to be predicted.
            inputs_embeds (`torch.FloatTensor`): (B, T, H) instead of `input_ids`, image included.
            logits_to_keep (`int` or `torch.Tensor`): The last positions, or the positions, whose logits are returned;
                0: all. Without it: the supervised positions if there are labels, else all.

        Returns:
            [`OpenVLAOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError: On missing or contradicting inputs, naming their shapes.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        features = None
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("`pixel_values` need `input_ids`; `inputs_embeds` must hold the image already.")
            if position_ids is not None and not (input_ids == self.config.image_token_id).any():
                raise ValueError("`position_ids` need `input_ids` with image placeholders.")
            if attention_mask is None and (input_ids == self.config.pad_token_id).any():
                attention_mask = self._default_mask(input_ids, None)
            input_ids, attention_mask, labels = self._expand_image(input_ids, pixel_values, attention_mask, labels)
            features = self.get_image_features(pixel_values)
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, features)
        if position_ids is None and attention_mask is not None and attention_mask.shape == inputs_embeds.shape[:2]:
            position_ids = positions_of(attention_mask)

        config = self.config
        if use_cache is None and self.training:
            use_cache = False
        outputs = self.get_decoder()(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            **kwargs,
        )
        loss, logits = self._logits_and_loss(outputs.last_hidden_state, labels, logits_to_keep, num_items_in_batch)
        output = OpenVLAOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            projector_features=features if output_projector_features or config.output_projector_states else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: torch.LongTensor,
        unnorm_key: str | Sequence[str] | None = None,
        *,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = False,
    ) -> np.ndarray | OpenVLAActionOutput:
        """
        Robot actions for a batch of observations.

        The prompt's closing token and its mask are completed where they are missing. Every decoded token is one of
        the action tokens.

        Args:
            input_ids (`torch.LongTensor`): (B, L), padded on either side.
            unnorm_key (`str` or `list[str]`, *optional*): Dataset whose statistics scale the action, one for all rows
                or one per row. May be left out where there is only one.
            pixel_values (`torch.FloatTensor`): (B, 3 * towers, S, S).
            attention_mask (`torch.Tensor`, *optional*): (B, L). By default, everything but the padding token.
            do_sample (`bool`, defaults to `False`): Draw the tokens instead of taking the most probable ones.
            temperature, top_k, top_p, generator (*optional*): With `do_sample`; see [`SamplingParams`].
            return_dict (`bool`, defaults to `False`): Return probabilities and entropy as well.

        Returns:
            `np.ndarray`: float64 actions in the units of the dataset, (D,) for one observation, else (B, D);
            or an [`OpenVLAActionOutput`].

        Raises:
            ValueError: On an unknown `unnorm_key`, an empty batch, or pixel values that are not finite.
            FloatingPointError: If the logits are not finite.
        """
        sampling = SamplingParams(do_sample, temperature, top_k, top_p, generator)
        input_ids, attention_mask = self._complete_prompt(input_ids, attention_mask)
        statistics = select_row_statistics(self.norm_stats, unnorm_key, len(input_ids))
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError("`predict_action` needs a cache, which gradient checkpointing turns off: call `eval()`.")
        input_ids, attention_mask, _ = self._expand_image(input_ids, pixel_values, attention_mask)
        if not torch.isfinite(pixel_values).all():
            raise ValueError("`pixel_values` hold NaN or infinite values; the camera image is broken.")
        inputs_embeds = self._embed(input_ids, self.get_image_features(pixel_values))
        token_ids, logits = decode_action_tokens(
            self.language_model,
            self.config,
            inputs_embeds,
            attention_mask,
            num_tokens=action_dim(statistics[0]),
            sampling=sampling,
        )
        normalized = self.codec.decode(token_ids.cpu().numpy())  # (B, D)
        norm_type = self.config.norm_type
        rows = [unnormalize(row, s["action"], norm_type) for row, s in zip(normalized, statistics, strict=True)]
        actions = np.stack(rows)  # (B, D)
        if len(actions) == 1:
            actions, normalized = actions[0], normalized[0]
        if not return_dict:
            return actions
        log_probabilities = logits.float().flip(-1).log_softmax(dim=-1)
        probabilities = log_probabilities.exp()
        entropy = -(probabilities * log_probabilities).sum(dim=-1)
        return OpenVLAActionOutput(actions, normalized, token_ids, probabilities, entropy)

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

    def _expand_image(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.FloatTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
    ) -> tuple[torch.LongTensor, torch.Tensor | None, torch.LongTensor | None]:
        """Insert the placeholders behind the first attended token of each row: (B, L) -> (B, L + P)."""
        side, channels = self.config.image_sizes[0], 3 * len(self.config.image_sizes)
        if pixel_values.ndim != 4 or pixel_values.shape[1:] != (channels, side, side):
            raise ValueError(
                f"`pixel_values` must be of shape (batch, {channels}, {side}, {side}), got "
                f"{tuple(pixel_values.shape)}."
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
        logits_to_keep: int | torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The head runs on the supervised positions alone, unless more is asked for."""
        head = self.get_output_embeddings()
        loss = logits = None
        if labels is not None:
            targets = labels[:, 1:].to(hidden.device)  # (B, T - 1), position t predicts token t + 1
            supervised = targets != -100
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
            if not supervised.any():
                logger.warning_once("`labels` supervise no token of this batch: its loss is 0.")
                loss = logits.sum() * 0.0  # not the mean of nothing, which is NaN
        if labels is None or logits_to_keep is not None:
            if not isinstance(logits_to_keep, torch.Tensor):
                logits_to_keep = slice(-(logits_to_keep or 0), None)
            logits = head(hidden[:, logits_to_keep])
        return loss, logits


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
