#!/usr/bin/env python3
# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
r"""
Fine-tune a policy on robot data: LoRA on one small GPU, or all weights on many nodes.

LoRA on one GPU with 24 GB:

    python train_hf.py recipes/openvla_lora.yaml --dataset HuggingFaceVLA/libero --output_dir my_policy \
        --per_device_train_batch_size 1 --gradient_accumulation_steps 16

QLoRA:

    python train_hf.py recipes/openvla_lora.yaml --dataset HuggingFaceVLA/libero --output_dir my_policy \
        --load_in_4bit True --per_device_train_batch_size 4 --gradient_accumulation_steps 4

All weights with FSDP2 on 8 GPUs:

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml train_hf.py recipes/openvla_full.yaml \
        --dataset HuggingFaceVLA/libero --output_dir my_policy

On several nodes, on each of them with its own number:

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_machines 4 --num_processes 32 \
        --machine_rank $NODE --main_process_ip $FIRST_NODE --main_process_port 29500 \
        train_hf.py recipes/openvla_full.yaml --dataset HuggingFaceVLA/libero --output_dir /shared/my_policy

A smoke test on a CPU, with the policy of this repository and data from the simulated tabletop:

    python -m tabletop.record --episodes 12 --image_size 112 --output tabletop_data
    python train_hf.py --model_name_or_path . --dataset tabletop_data --output_dir my_policy --max_steps 20

A YAML or JSON file with the same names can come first; flags after it take precedence. `my_policy` is then a complete
repository that the Auto classes load; its checkpoint-N folders are there to resume from.

Go on after an interruption with the same command and `--resume_from_checkpoint True`. In trackio, wandb and
TensorBoard, named by `--report_to`, it is the same run, which then holds the steps since the last checkpoint twice.
`--rollout_episodes 10` tries each saved policy in the simulated tabletop, while other processes wait: where that takes
long, raise `--ddp_timeout`.
"""

import importlib.util
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


REPOSITORY = Path(__file__).resolve().parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools")]

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils import parse_flag_from_env  # noqa: E402
from convert_checkpoint import STATISTICS_NAME, Source  # noqa: E402
from load_policy import ACTION_FIELDS, load_policy, repository_class  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import (  # noqa: E402
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)

from robot_data.mixture import Part  # noqa: E402
from robot_data.statistics import compute_statistics  # noqa: E402
from training.arguments import (  # noqa: E402
    DataArguments,
    ModelArguments,
    OpenVLATrainingArguments,
    parse_arguments,
)
from training.checkpoint import Repository, locate_checkpoint, write_json  # noqa: E402
from training.data import (  # noqa: E402
    TrainingData,
    choose_cameras,
    make_data,
    measure_widths,
    open_parts,
    read_statistics,
    split_weight,
)
from training.fast import (  # noqa: E402
    UNFITTED,
    check_fast_arguments,
    choose_fast_tokenizer,
    find_fast_tokenizer,
    set_fast_tokenizer,
)
from training.modes import (  # noqa: E402
    add_lora,
    lora_config,
    prepare_quantized,
    quantization_config,
    select_trainable,
)
from training.processes import in_main_process  # noqa: E402
from training.smoothing import SmoothedLoss  # noqa: E402
from training.trackers import continue_trackers  # noqa: E402
from training.trainer import OpenVLATrainer  # noqa: E402


logger = logging.getLogger("train_hf")

# What the model card tells of the settings.
CARD_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "weight_decay", "optim", "seed", "bf16"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_steps", "num_train_epochs"),
)


def read_config(arguments: ModelArguments) -> PretrainedConfig:
    """
    The configuration of the policy as it was saved.

    Raises:
        OSError: If there is no such policy.
    """
    source = arguments.model_name_or_path
    try:
        return repository_class("OpenVLAConfig").from_pretrained(source, revision=arguments.model_revision)
    except OSError as error:
        raise _not_loaded(source, error) from error


def _not_loaded(source: str, error: OSError) -> OSError:
    return OSError(f"--model_name_or_path {source} cannot be loaded: {str(error).splitlines()[0]}")


def asked_changes(arguments: ModelArguments) -> dict[str, Any]:
    """The fields of the policy's configuration that the flags name."""
    given = {name: getattr(arguments, name, None) for name in ACTION_FIELDS}
    return {name: value for name, value in given.items() if value is not None}


def list_embodiments(arguments: ModelArguments, config: PretrainedConfig, names: Sequence[str]) -> list[str] | None:
    """The robots that the policy will tell apart: those that it knows, and behind them new ones of these names."""
    known, is_wanted = config.embodiments or [], arguments.use_embodiment_adapter
    if is_wanted is False or (is_wanted is None and not known):
        return None
    return known + [name for name in names if name not in known]


def complete_changes(
    changes: dict[str, Any], config: PretrainedConfig, action_dim: int, proprio_dim: int | None
) -> dict[str, Any]:
    """
    What changes in the policy's configuration, with the widths that a new head and the state's projector need, and
    what FAST tokens do.

    Args:
        changes (`dict[str, Any]`): From [`asked_changes`], with the fields of a FAST tokenizer that there is already.
        config (`PretrainedConfig`): As it was saved.
        action_dim (`int`), proprio_dim (`int`, *optional*): Of the widest dataset.

    Raises:
        ValueError: If the policy takes the state, and there is none.
    """
    after = {name: getattr(config, name) for name in ACTION_FIELDS} | changes
    widths: dict[str, Any] = {}
    if after["use_proprio"] and proprio_dim is None:
        raise ValueError(
            "The policy takes the robot's state (`use_proprio`), and a dataset has none: say which columns it is "
            "with `state` in the dataset's description (--dataset_configs)."
        )
    if after["head_type"] != "tokens" and config.action_dim is None:
        widths["action_dim"] = action_dim
    if bool(after["use_proprio"]) != config.use_proprio:
        widths["proprio_dim"] = proprio_dim if after["use_proprio"] else None
    # A tokenizer that is still to be fitted will have at most so many tokens.
    fast_fields = UNFITTED if after["head_type"] == "fast" else dict.fromkeys(UNFITTED)
    widths |= {name: value for name, value in fast_fields.items() if value is None or after[name] is None}
    if after["head_type"] not in ("diffusion", "flow"):
        widths["num_inference_steps"] = changes.get("num_inference_steps")
    # The base's statistics, which may know no state, give way to those of the datasets.
    return {**changes, **widths, "norm_stats": {}}


def load_model(
    arguments: ModelArguments, changes: dict[str, Any] | None = None
) -> tuple[PreTrainedModel | PeftModel, ProcessorMixin, torch.dtype]:
    """
    The policy with what is to be trained in it, its processor, and the dtype of its weights on disk.

    Args:
        arguments ([`ModelArguments`]): Which policy, and what of it is trained.
        changes (`dict[str, Any]`, *optional*): Fields of its configuration to change; see [`load_policy`].

    Raises:
        ValueError: If the mode, a LoRA target or the changes do not fit the policy.
        OSError: If there is no such policy.
    """
    source, revision = arguments.model_name_or_path, arguments.model_revision
    quantization = quantization_config(
        arguments.load_in_4bit,
        arguments.load_in_8bit,
        bnb_4bit_quant_type=arguments.bnb_4bit_quant_type,
        use_bnb_nested_quant=arguments.use_bnb_nested_quant,
    )
    options: dict[str, Any] = {"attn_implementation": arguments.attn_implementation}
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": PartialState().device}}
    options = {name: value for name, value in options.items() if value is not None}
    saved_dtype = getattr(torch, str(read_config(arguments).dtype or "float32").removeprefix("torch."))
    dtype = _training_dtype(arguments, saved_dtype)
    try:
        model, processor = load_policy(source, revision=revision, dtype=dtype, changes=changes, **options)
    except OSError as error:
        raise _not_loaded(source, error) from error
    if quantization is not None:
        prepare_quantized(model)
    return select_parameters(model, arguments), processor, saved_dtype


def _training_dtype(arguments: ModelArguments, saved_dtype: torch.dtype) -> torch.dtype:
    if arguments.dtype != "auto":
        return getattr(torch, arguments.dtype)
    if arguments.load_in_4bit or arguments.load_in_8bit:
        return torch.bfloat16
    on_cpu = PartialState().device.type == "cpu"
    return saved_dtype if arguments.use_peft and not on_cpu else torch.float32


def select_parameters(model: PreTrainedModel, arguments: ModelArguments) -> PreTrainedModel | PeftModel:
    """
    The policy with what is to be trained in it, and everything else frozen.

    Raises:
        ValueError: If the mode or a LoRA target does not fit the policy.
    """
    if not arguments.use_peft:
        return select_trainable(model, arguments.training_mode)
    targets = arguments.lora_target_modules
    lora = lora_config(
        model,
        r=arguments.lora_r,
        alpha=arguments.lora_alpha,
        dropout=arguments.lora_dropout,
        target_modules=targets[0] if len(targets) == 1 else targets,
    )
    return add_lora(model, lora)


def prepare_statistics(
    parts: Sequence[Part], arguments: DataArguments, training: OpenVLATrainingArguments, checkpoint: Path | None
) -> dict[str, dict]:
    """
    Statistics of the datasets: the given ones, those of the run that is resumed, or computed now by one process.
    """
    names = [part.source.name for part in parts]
    if arguments.statistics is not None:
        return read_statistics(arguments.statistics, names)
    path = Path(training.output_dir) / STATISTICS_NAME

    def compute() -> dict[str, dict]:
        if checkpoint is None or not path.is_file():
            logger.info("Computing statistics of %s", ", ".join(names))
            write_json(path, {part.source.name: _compute(part, arguments) for part in parts})
        return read_statistics(path, names)

    return in_main_process("Computing statistics", compute)


def _compute(part: Part, arguments: DataArguments) -> dict[str, Any]:
    return compute_statistics(part.source, part.config, skip_bad_episodes=arguments.skip_bad_episodes)


def check_output_dir(output_dir: str) -> None:
    """
    Make the directory, and try to write into it.

    Raises:
        OSError: If that is not possible.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OSError(f"--output_dir {output_dir} cannot be written to: {error}") from error


def check_action_dimensions(model: PreTrainedModel, statistics: dict[str, dict]) -> None:
    """
    Raises:
        ValueError: If the widest of the datasets' actions are of another dimension than those of the policy, or
            datasets that are to be spoken of in FAST tokens differ.
    """
    expected = getattr(model.config, "action_dim", None)
    sizes = {name: len(each["action"]["q01"]) for name, each in statistics.items()}
    if expected is not None and max(sizes.values()) != expected:
        raise ValueError(f"The policy's actions have {expected} dimensions, those of the datasets {sizes}.")
    if getattr(model.config, "head_type", None) == "fast" and len(set(sizes.values())) > 1:
        raise ValueError(f"FAST tokens are learned of actions of one dimension, those of the datasets have {sizes}.")


def check_judging(flag: str, packages: Sequence[str], training: OpenVLATrainingArguments) -> None:
    """
    Raises:
        ValueError: If a flag cannot be followed that has the policy judged while it is trained.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{flag} needs {' and '.join(missing)}: pip install -r requirements-evaluation.txt.")
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    if launched or training.fsdp or training.deepspeed:
        raise ValueError(f"{flag} needs the whole model in one process, which FSDP and DeepSpeed divide.")


def warm_up(model: PreTrainedModel) -> None:
    """
    One forward pass of the decoder on the CPU that is thrown away.

    In about one process of forty, torch 2.13's CPU build computes half of the first cosine of the rotary embedding
    with an error of 1e-4; from the second forward pass on it is right, and a resumed run equal to the bit.
    """
    length, width = 39 + model.config.num_image_tokens, model.config.text_config.hidden_size
    with torch.no_grad():
        model.get_decoder()(inputs_embeds=torch.zeros(1, length, width, dtype=model.dtype))


def train_without_validation(training: OpenVLATrainingArguments) -> None:
    """
    Raises:
        ValueError: If the best checkpoint is asked for, which validation tells.
    """
    if training.load_best_model_at_end:
        raise ValueError("--load_best_model_at_end needs --validation_episodes, and datasets of ten or more.")
    logger.info("No episode is held out: there is no validation.")
    training.eval_strategy, training.do_eval = type(training.eval_strategy)("no"), False
    training.eval_on_start = False


def set_up(
    model_arguments: ModelArguments, data_arguments: DataArguments, training: OpenVLATrainingArguments
) -> tuple[OpenVLATrainer, Path | None]:
    """A trainer that is ready to train, and the checkpoint to resume from, if any."""
    checkpoint = locate_checkpoint(training.resume_from_checkpoint, training.output_dir)
    continue_trackers(training, checkpoint, os.environ)
    if data_arguments.plot_open_loop:
        check_judging("--plot_open_loop", ("matplotlib", "gymnasium"), training)
    if training.rollout_episodes:
        check_judging("--rollout_episodes", ("mujoco", "gymnasium"), training)
    check_output_dir(training.output_dir)
    set_seed(training.seed)
    seed = training.seed if training.data_seed is None else training.data_seed
    config, changes = read_config(model_arguments), asked_changes(model_arguments)
    head_type = changes.get("head_type", config.head_type)
    check_fast_arguments(model_arguments, config)
    if training.bin_smoothing and head_type != "tokens":
        raise ValueError(f"--bin_smoothing is for policies that speak in bins, not for {head_type!r}: leave it out.")
    fast_tokenizer = find_fast_tokenizer(model_arguments, checkpoint) if head_type == "fast" else None
    if fast_tokenizer is not None:
        changes |= fast_tokenizer.config_fields
    parts = open_parts(data_arguments, changes.get("num_images", config.num_images))
    names = [part.source.name for part in parts]
    embodiments = list_embodiments(model_arguments, config, names)
    # Robots that the policy has learned to drive before keep their statistics.
    known = {name: config.norm_stats[name] for name in embodiments or [] if name in config.norm_stats.keys() - names}
    if embodiments != config.embodiments:
        changes["embodiments"] = embodiments
    if changes:
        changes = complete_changes(changes, config, *measure_widths(parts, known))
    model, processor, saved_dtype = load_model(model_arguments, changes)
    if head_type in ("diffusion", "flow") and data_arguments.validation_episodes:
        check_judging(f"Validation of a {head_type!r} head (--validation_episodes)", (), training)
    statistics = prepare_statistics(parts, data_arguments, training, checkpoint)
    base_model = model.get_base_model() if model_arguments.use_peft else model
    base_model.norm_stats = processor.norm_stats = {**known, **statistics}
    check_action_dimensions(model, processor.norm_stats)
    if head_type == "fast":
        if checkpoint is None:
            # A file beside a policy that speaks otherwise is not its own.
            known = (
                processor.fast_tokenizer if config.head_type == "fast" and fast_tokenizer is None else fast_tokenizer
            )
            fast_tokenizer = choose_fast_tokenizer(processor, base_model.config, known, parts, data_arguments, seed)
        set_fast_tokenizer(base_model, processor, fast_tokenizer)
    if training.bin_smoothing:
        base_model.loss_function = SmoothedLoss(base_model.codec, training.bin_smoothing)
    if training.device.type == "cpu":
        warm_up(base_model)
        training.dataloader_pin_memory = False
    if training.ddp_find_unused_parameters is None:
        # The published targets hold layers that never run.
        training.ddp_find_unused_parameters = model_arguments.lora_target_modules == ["published"]
    data = make_data(
        parts,
        statistics,
        processor,
        data_arguments,
        seed=seed,
        rank=training.process_index,
        world_size=training.world_size,
    )
    if not data.held_out:
        train_without_validation(training)
    repository = Repository(
        directory=Path(training.output_dir),
        base=Source.locate(model_arguments.model_name_or_path, model_arguments.model_revision),
        processor=processor,
        dtype=saved_dtype,
        repo_id=training.hub_model_id or Path(training.output_dir).resolve().name,
        datasets=[split_weight(text)[0] for text in data_arguments.dataset or []],
        names=names,
        settings=card_settings(model_arguments, data_arguments, training),
    )
    callbacks, rollouts = make_judges(base_model, processor, data, data_arguments, training)
    return OpenVLATrainer(model, training, data, repository, callbacks, rollouts), checkpoint


def make_judges(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    data: TrainingData,
    arguments: DataArguments,
    training: OpenVLATrainingArguments,
) -> tuple[list[TrainerCallback], Callable[[], dict[str, float]] | None]:
    """What is asked for to judge the policy while it is trained: callbacks, and what is called before each save."""
    if not arguments.plot_open_loop and not training.rollout_episodes:
        return [], None
    from training.judging import OpenLoopCallback, TabletopRollouts

    cameras = choose_cameras(arguments.camera, processor.num_images)
    pictures = OpenLoopCallback(model, processor, data.curves, cameras)
    return (
        [pictures] if arguments.plot_open_loop else [],
        TabletopRollouts(model, processor, training) if training.rollout_episodes else None,
    )


def card_settings(model: ModelArguments, data: DataArguments, training: OpenVLATrainingArguments) -> dict[str, Any]:
    """What the model card tells of the settings."""
    names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "load_in_8bit")
    settings = {name: getattr(model, name) for name in names} if model.use_peft else {"mode": model.training_mode}
    settings |= {name: getattr(data, name) for name in ("image_augmentation", "shuffle_buffer")}
    settings |= {name: getattr(training, name) for name in CARD_SETTINGS}
    return {name: getattr(value, "value", value) for name, value in settings.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command.

    Args:
        arguments (`Sequence[str]`, *optional*): By default those of this process.
    """
    # transformers 5 has other names; 4.57 knows these alone, and peft uses them.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    model_arguments, data_arguments, training = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING)
    for told in (logger, logging.getLogger("load_policy"), logging.getLogger("training.fast")):
        told.setLevel(logging.INFO if training.should_log else logging.WARNING)
    trainer, checkpoint = set_up(model_arguments, data_arguments, training)
    size = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    logger.info("Effective batch size %d", size)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.write_repository()
    push = trainer.push if trainer.is_world_process_zero() else None
    if push is not None and not push.push(training, "End of training"):
        raise OSError(f"The policy is in {training.output_dir}, and pushing it to {push.repo_id} failed.")


if __name__ == "__main__":
    main()
