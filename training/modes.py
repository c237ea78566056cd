"""Which parameters a fine-tune trains: all, parts of the model, or LoRA adapters over full or quantised weights."""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel


MODES = ("full", "frozen_vision", "last_layer", "sandwich", "head_only")

PUBLISHED_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    *("fc1", "fc2", "fc3", "qkv", "proj", "q", "kv"),
)

# For `TrainingArguments(gradient_checkpointing_kwargs=...)`. Re-entrant checkpointing, the default of 4.57, silently
# drops the gradients of adapters in the towers, because the pixels that enter a tower have none.
GRADIENT_CHECKPOINTING_KWARGS = {"use_reentrant": False}

# What every OpenVLA has. Whatever else a model holds is a head or a projector that a fine-tune brought along, ...
_PUBLISHED_PARTS = ("vision_backbone", "projector", "language_model")
# ... or, by its name, lies within: FiLM in the blocks of the towers.
_FILM = "film"


def select_trainable(model: PreTrainedModel, mode: str) -> PreTrainedModel:
    """
    Freeze everything but the parameters of a mode.

    | mode | vision | projector | language model |
    |---|---|---|---|
    | `full` | x | x | x |
    | `frozen_vision` | | x | x |
    | `last_layer` | | | token embeddings, last decoder layer, output head |
    | `sandwich` | x | x | token embeddings, last decoder layer, output head |
    | `head_only` | | | |

    The first four are the stages of the published `vla-scripts/train.py`. What a policy has beside the parts of the
    published one learns in every mode: a head on the hidden states, projectors of the state and of noisy actions, FiLM
    in the towers. What the forward pass never runs (last blocks, final norms and pooling heads of the towers)
    learns in none: DDP would wait for its gradients, and weight decay would move it.

    Args:
        model ([`OpenVLAForActionPrediction`]): Changed in place.
        mode (`str`): One of `MODES`.

    Returns:
        [`OpenVLAForActionPrediction`]: `model`.

    Raises:
        ValueError: If there is no such mode, or the model is quantised, or has nothing that the mode trains.
    """
    if mode not in MODES:
        raise ValueError(f"`mode={mode!r}` is not known; known are {list(MODES)}.")
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"Mode {mode!r} trains the weights themselves, and those of this model are quantised: train LoRA adapters "
            "over them (`lora_config`), or load the model without a quantisation."
        )
    modules = _trained_modules(model)[mode]
    if not modules:
        raise ValueError(
            f"Mode {mode!r} trains what a model has beside {list(_PUBLISHED_PARTS)}, and this one has nothing: its "
            f"actions are tokens of the language model. Use one of {[other for other in MODES if other != mode]}."
        )
    model.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    model.freeze_unused()
    return model


def _trained_modules(model: PreTrainedModel) -> dict[str, list[nn.Module]]:
    heads = [model.get_submodule(name) for name in added_modules(model)]
    last_layer = [model.get_input_embeddings(), model.get_decoder().layers[-1], model.get_output_embeddings()]
    return {
        "full": [model],
        "frozen_vision": [model.projector, model.language_model, *heads],
        "last_layer": [*last_layer, *heads],
        "sandwich": [model.vision_backbone, model.projector, *last_layer, *heads],
        "head_only": heads,
    }


def added_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that a policy has beside the parts of the published one."""
    heads = [name for name, _ in model.named_children() if name not in _PUBLISHED_PARTS]
    return heads + [name for name, _ in model.named_modules() if name.rpartition(".")[2] == _FILM]


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """
    The model with adapters. What the configuration trains beside them, as `modules_to_save`, becomes float32, as PEFT
    has its adapters: in 16 bits small steps are lost.

    Args:
        model ([`OpenVLAForActionPrediction`]): Changed in place.
        config (`LoraConfig`): From [`lora_config`].
    """
    adapted = get_peft_model(model, config, low_cpu_mem_usage=model.device.type == "meta")
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            module.modules_to_save.float()
    model.freeze_unused()
    return adapted


def lora_config(
    model: PreTrainedModel,
    r: int = 32,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    **kwargs: Any,
) -> LoraConfig:
    """
    LoRA for a model, with the published rank, scale and initialisation (A Gaussian, B zero) as defaults. What the
    model has beside the parts of the published one (heads, projectors of the state and of noisy actions, FiLM) is
    trained itself, beside the adapters, as OpenVLA-OFT does.

    `target_modules`:
    - `"all-linear"`: the linear layers of language model, projector and towers that run, without the output head, as
      PEFT has it today. An adapted head makes PEFT store a copy of the whole head with every adapter (263 MB for
      openvla-7b). 107,862,016 parameters on openvla-7b at rank 32.
    - `"published"`: what the published `vla-scripts/finetune.py` adapts, by name; to continue from, or to compare
      with, a published adapter. That is also the output head, the patch convolutions, and the layers that never run,
      whose 1,701,888 parameters never get a gradient: DDP needs `ddp_find_unused_parameters=True`. 110,828,288
      parameters on openvla-7b at rank 32.
    - names of layers, or ends of names, such as `["q_proj", "attn.qkv"]`. Layers that never run are left out.

    Args:
        model ([`OpenVLAForActionPrediction`]): Read, not changed.
        r (`int`, defaults to 32): Rank.
        alpha (`int`, defaults to 16): The update is scaled by alpha / r.
        dropout (`float`, defaults to 0.0): On the input of the adapters.
        target_modules (`str` or `Sequence[str]`, defaults to `"all-linear"`): See above.
        kwargs: Further arguments of `LoraConfig`: `use_rslora`, `bias`, ...; `modules_to_save` adds modules.

    Returns:
        `LoraConfig`: For `get_peft_model`.

    Raises:
        ValueError: If a name is that of no layer that runs; the names there are are listed.
    """
    whole = [*added_modules(model), *kwargs.pop("modules_to_save", [])]
    layers = _adaptable_layers(model)
    added = {name for name in layers if any(f"{name}.".startswith(f"{part}.") for part in added_modules(model))}
    runs = layers.keys() - set(model.unused_linear_names())
    if target_modules == "all-linear":
        head = model.get_output_embeddings()
        chosen = {name for name in runs - added if isinstance(layers[name], nn.Linear) and layers[name] is not head}
        targets = {name.rpartition(".")[2] for name in chosen}
    elif target_modules == "published":
        targets = {target for target in PUBLISHED_TARGETS if _matching(layers.keys() - added, [target])}
        chosen = _matching(layers.keys() - added, targets)
    else:
        targets = {target_modules} if isinstance(target_modules, str) else set(target_modules)
        _check_targets(targets, runs - added)
        chosen = _matching(runs - added, targets)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(targets),
        # Names of a few layers to leave out keep adapter_config.json legible; those of all layers to adapt do not.
        exclude_modules=sorted(_matching(layers, targets) - chosen) or None,
        modules_to_save=whole or None,
        init_lora_weights="gaussian",
        # Without it PEFT notes a module of the code's cache in the adapter, which no other machine has.
        task_type="CAUSAL_LM",
        **kwargs,
    )


def _adaptable_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def _matching(names: Sequence[str] | set[str] | dict[str, Any], targets: Sequence[str] | set[str]) -> set[str]:
    """The names that PEFT takes for one of the targets."""
    return {name for name in names if any(f".{name}".endswith(f".{target}") for target in targets)}


def _check_targets(targets: set[str], names: set[str]) -> None:
    unknown = sorted(target for target in targets if not _matching(names, [target]))
    if not targets or unknown:
        known = sorted({name.rpartition(".")[2] for name in names})
        close = [match for target in unknown for match in difflib.get_close_matches(target, known)]
        ordered = list(dict.fromkeys([*close, *known]))
        raise ValueError(
            f"`target_modules` must name layers that run, or be 'all-linear' or 'published'; got {unknown}. "
            f"There are {', '.join(ordered)}, and longer ends of their names, such as {min(names)}."
        )


def quantization_config(
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    bnb_4bit_quant_type: str = "nf4",
    bnb_4bit_compute_dtype: torch.dtype = torch.bfloat16,
    use_bnb_nested_quant: bool = False,
) -> BitsAndBytesConfig | None:
    """
    For `from_pretrained(quantization_config=...)`, which leaves towers, projector and output head unquantised. Load
    with `dtype=torch.bfloat16`: transformers 4.57 makes float16 of what is not quantised otherwise.

    Args:
        load_in_4bit, load_in_8bit (`bool`, defaults to `False`): At most one of them.
        bnb_4bit_quant_type (`str`, defaults to `"nf4"`): `"nf4"` or `"fp4"`.
        bnb_4bit_compute_dtype (`torch.dtype`, defaults to `torch.bfloat16`): In which 4-bit layers are multiplied.
        use_bnb_nested_quant (`bool`, defaults to `False`): Quantise the scales of 4-bit weights as well, which saves
            0.4 bits per weight. The published recipe does not.

    Returns:
        `BitsAndBytesConfig` or `None`: `None` without a quantisation.

    Raises:
        ValueError: If both are asked for, or there is no such `bnb_4bit_quant_type`.
    """
    if load_in_4bit and load_in_8bit:
        raise ValueError("`load_in_4bit` and `load_in_8bit` exclude each other.")
    if bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ValueError(f"`bnb_4bit_quant_type` must be 'nf4' or 'fp4', got {bnb_4bit_quant_type!r}.")
    if load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=bnb_4bit_compute_dtype,
            bnb_4bit_use_double_quant=use_bnb_nested_quant,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if load_in_8bit else None


def prepare_quantized(model: PreTrainedModel) -> PreTrainedModel:
    """
    Make a quantised model ready for adapters: after `from_pretrained`, before `get_peft_model`.

    Unlike `peft.prepare_model_for_kbit_training` this leaves the unquantised weights in bfloat16. They are frozen, the
    norms compute in float32 by themselves, and the policy acts in bfloat16 later on; in float32 towers, projector,
    embeddings and head take 2.1 GB more on openvla-7b. PEFT makes the adapters themselves float32. Against a model of
    the same rounded weights in float32, the adapters' gradients are off by 1.4% of their norm, by 1.1% the other way,
    both under autocast.

    Non-re-entrant checkpointing (`GRADIENT_CHECKPOINTING_KWARGS`) needs no `enable_input_require_grads`.

    Args:
        model ([`OpenVLAForActionPrediction`]): Changed in place.

    Returns:
        [`OpenVLAForActionPrediction`]: `model`.

    Raises:
        ValueError: If the model is not quantised, is partly float16, or has lost its gradients to a prediction.
    """
    if not getattr(model, "is_quantized", False):
        raise ValueError("The model is not quantised; load it with `quantization_config=quantization_config(...)`.")
    check_not_repacked(model)
    half = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{len(half)} tensors, such as {half[0]}, are float16, whose gradients overflow: load the model with "
            "`dtype=torch.bfloat16`."
        )
    for module in model.modules():
        # bitsandbytes' switch for repacking, per layer. Without it a prediction between two steps does no harm; it
        # takes as long as a training step's forward pass.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def check_not_repacked(model: nn.Module) -> None:
    """
    Raise where gradients would be lost without a word.

    On CPUs with AVX512-BF16, bitsandbytes rearranges the weights of a 4-bit layer when it first runs in evaluation
    mode, and such a layer passes no gradient to what lies before it, not even back in training mode. Adapters still
    get gradients along the residual connections, but wrong ones, so that the gradients themselves do not tell.

    Raises:
        ValueError: If a layer has been rearranged.
    """
    packed = [
        name
        for name, parameter in model.named_parameters()
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False)
    ]
    if packed:
        raise ValueError(
            f"bitsandbytes has repacked {len(packed)} 4-bit weights for this CPU at a prediction, such as "
            f"{packed[0]}, and no gradient passes through them: load the model again, and call `prepare_quantized` "
            "before it predicts anything."
        )
