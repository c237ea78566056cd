"""
OpenVLA-OFT checkpoints: the parts that lie beside the weights, and the configuration that they and the user make.

A repository of OpenVLA-OFT holds a checkpoint in the Hugging Face format and, in files of their own, a head
(`action_head--*.pt`), the projectors of state and noisy actions (`proprio_projector--*.pt`,
`noisy_action_projector--*.pt`), and for FiLM the towers again (`vision_backbone--*.pt`), with a LoRA adapter that is
not merged. Its config.json knows nothing of them. What the shapes of the tensors tell is read from them; chunk length,
number of images and normalisation are the user's to say.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from native_checkpoint import preview, raise_on_difference, read_torch_file
from transformers import PreTrainedModel


COMPONENTS = ("action_head", "proprio_projector", "noisy_action_projector", "vision_backbone")
OFT_FILES = re.compile(rf"({'|'.join(COMPONENTS)})--.*\.pt")

# The constants that published training picks by the robot.
PLATFORMS = {
    "libero": {"chunk_size": 8, "action_dim": 7, "proprio_dim": 8, "norm_type": "bounds_q99"},
    "aloha": {"chunk_size": 25, "action_dim": 14, "proprio_dim": 14, "norm_type": "bounds"},
    "bridge": {"chunk_size": 5, "action_dim": 7, "proprio_dim": 7, "norm_type": "bounds_q99"},
}


@dataclass(frozen=True)
class OFTOptions:
    """
    What an OpenVLA-OFT checkpoint does not say by itself.

    Args:
        platform (`str`, *optional*): One of `PLATFORMS`.
        num_images (`int`, *optional*): Camera images per observation.
        chunk_size (`int`, *optional*), norm_type (`str`, *optional*): Instead of the platform's, or without one.
        stop_token (`bool`, defaults to `True`): Whether the end-of-sequence token follows the actions; one dialect of
            reinforcement-learning checkpoints was trained without it.
    """

    platform: str | None = None
    num_images: int | None = None
    chunk_size: int | None = None
    norm_type: str | None = None
    stop_token: bool = True


def component_files(names: list[str]) -> dict[str, str]:
    """
    File of each component among the files of a repository.

    Raises:
        ValueError: If there are several files of one.
    """
    files: dict[str, str] = {}
    for name in sorted(names):
        if match := OFT_FILES.fullmatch(name):
            if match[1] in files:
                raise ValueError(f"Both {files[match[1]]} and {name} are there; keep the one to convert.")
            files[match[1]] = name
    return files


def read_component(path: Path, lora_alpha: float | None = None) -> dict[str, torch.Tensor]:
    """
    Tensors of a component, named as in the file without what DDP puts in front, LoRA merged.

    Args:
        path (`Path`): A file of tensors.
        lora_alpha (`float`, *optional*): Of the adapter in it. Default: as published training sets it, the rank and at
            most 16.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in read_torch_file(path).items()}
    if others := [name for name, tensor in tensors.items() if not isinstance(tensor, torch.Tensor)]:
        raise ValueError(f"{path}: {preview(others)} are not tensors.")
    return merge_lora(tensors, lora_alpha)


def merge_lora(tensors: Mapping[str, torch.Tensor], lora_alpha: float | None) -> dict[str, torch.Tensor]:
    """
    Tensors in which each `base_layer` has its adapter added: W + alpha / r B A, in float32.

    Raises:
        ValueError: If half of an adapter is missing, or belongs to no layer, or it is of another kind than LoRA.
    """
    pairs = {name.removesuffix(".base_layer.weight") for name in tensors if name.endswith(".base_layer.weight")}
    needed = {f"{layer}.lora_{part}.default.weight" for layer in pairs for part in "AB"}
    if wrong := needed ^ {name for name in tensors if ".lora_" in name}:
        raise ValueError(f"The adapter is not whole, or not plain LoRA: {preview(sorted(wrong))}.")
    merged = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if name.endswith(".base_layer.weight"):
            down, up = (tensors[name.replace("base_layer", f"lora_{part}.default")].float() for part in "AB")
            scale = (min(len(down), 16) if lora_alpha is None else lora_alpha) / len(down)
            update = up.flatten(1) @ down.flatten(1)  # (out, in), of convolutions (out, in * height * width)
            tensor = tensor.float() + scale * update.view(tensor.shape)
        merged[plain] = tensor
    return merged


def model_tensors(components: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of all components under the names of the model."""
    tensors = {}
    for component, own in components.items():
        for name, tensor in own.items():
            name = f"{component}.{name.removeprefix('vision_backbone.')}"
            name = re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", name)
            tensors[re.sub(r"(\.blocks\.\d+)\.(scale|shift)\.", r"\1.film.\2.", name)] = tensor
    return tensors


def oft_fields(components: Mapping[str, Mapping[str, torch.Tensor]], options: OFTOptions) -> dict[str, Any]:
    """
    Fields of the configuration.

    Args:
        components (`Mapping`): Tensors by component, as in their files.
        options ([`OFTOptions`]): What these do not say.

    Raises:
        ValueError: If something is left unsaid, or said in two ways.
    """
    if options.platform is not None and options.platform not in PLATFORMS:
        raise ValueError(f"The platform {options.platform!r} is not known; known: {sorted(PLATFORMS)}.")
    platform = PLATFORMS.get(options.platform, {})
    chunk_size = options.chunk_size or platform.get("chunk_size")
    if options.num_images is None or chunk_size is None:
        raise ValueError(
            "an OpenVLA-OFT checkpoint does not say how many images it looks at, or how many actions it predicts: "
            f"give --num_images, and --chunk_size or --platform ({', '.join(PLATFORMS)})."
        )
    norm_type = options.norm_type or platform.get("norm_type")
    if norm_type is None:
        raise ValueError(
            "an OpenVLA-OFT checkpoint does not say how its actions were scaled: give --norm_type or --platform "
            f"({', '.join(PLATFORMS)})."
        )
    fields = {
        "attention_mode": "bidirectional",
        "head_type": _head_type(components.get("action_head")),
        "chunk_size": chunk_size,
        "num_images": options.num_images,
        "norm_type": norm_type,
        "use_film": "vision_backbone" in components,
        "use_proprio": "proprio_projector" in components,
        "append_stop_token": options.stop_token,
        "action_dim": platform.get("action_dim"),
    }
    found = {}
    if "action_head" in components:
        found["action_dim"] = next(
            len(t) for name, t in components["action_head"].items() if name.endswith("fc2.bias")
        )
    if fields["use_proprio"]:
        found["proprio_dim"] = components["proprio_projector"]["fc1.weight"].shape[1]
    if wrong := {name: size for name, size in found.items() if platform.get(name, size) != size}:
        raise ValueError(f"The checkpoint has {wrong}, other than the platform {options.platform!r}: {platform}.")
    return fields | found


def _head_type(tensors: Mapping[str, torch.Tensor] | None) -> str:
    if tensors is None:
        return "tokens"
    kinds = {name.partition(".")[0] for name in tensors}
    known = {"model": "l1", "noise_predictor": "diffusion"}
    if len(kinds) != 1 or not kinds <= known.keys():
        raise ValueError(f"The action head is of an unknown kind; its tensors: {preview(sorted(tensors))}.")
    return known[kinds.pop()]


def fill_components(
    model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], missing: set[str], surplus: set[str]
) -> None:
    """
    Put the components' tensors into a model that was loaded without them.

    Args:
        model ([`OpenVLAForActionPrediction`]): Changed in place.
        tensors (`Mapping`): By the names of the model.
        missing, surplus (`set[str]`): What the checkpoint lacks of the model, and the model of the checkpoint.

    Raises:
        ValueError: Listing tensors that are missing, left over or of another shape.
    """
    state = model.state_dict()
    raise_on_difference(
        missing=missing - tensors.keys(),
        surplus=surplus | (tensors.keys() - state.keys()),
        misshapen=[
            f"{name} {tuple(tensor.shape)} instead of {tuple(state[name].shape)}"
            for name, tensor in tensors.items()
            if name in state and state[name].shape != tensor.shape
        ],
    )
    model.load_state_dict({name: tensor.to(state[name].dtype) for name, tensor in tensors.items()}, strict=False)
