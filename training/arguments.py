"""What `train_hf.py` is told: the flags that TRL has for models, what to train on, and Trainer's own."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .modes import GRADIENT_CHECKPOINTING_KWARGS, MODES


LORA_LEARNING_RATE, LEARNING_RATE = 5e-4, 2e-5
AUGMENTATIONS = ("published", "independent", "none")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class ModelArguments:
    """What is fine-tuned, and which of its parameters."""

    model_name_or_path: str = field(metadata={"help": "Directory or Hub id of a policy, ours or a published one."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Of the weights while training. auto: as they were saved under LoRA, float32 where they "
            "are trained themselves and on a CPU, bfloat16 around 4 and 8 bits. They are saved as those of the base.",
            "choices": DTYPES,
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Of the language model: sdpa, flash_attention_2, eager, ..."}
    )
    head_type: str | None = field(
        default=None,
        metadata={
            "help": "What speaks the actions: tokens, fast, l1, diffusion or flow. This and the next options change "
            "the policy's configuration; by default they are as it has them. Parts that it has not got begin anew."
        },
    )
    attention_mode: str | None = field(default=None, metadata={"help": "causal or bidirectional."})
    chunk_size: int | None = field(default=None, metadata={"help": "Actions per prediction."})
    num_images: int | None = field(default=None, metadata={"help": "Camera pictures per observation."})
    use_proprio: bool | None = field(default=None, metadata={"help": "Whether the robot's state goes in."})
    use_film: bool | None = field(default=None, metadata={"help": "Whether the instruction modulates the towers."})
    use_embodiment_adapter: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the policy is told which robot it drives: each dataset is one, and what the policy has "
            "not got yet begins anew behind those that it has."
        },
    )
    append_stop_token: bool | None = field(
        default=None, metadata={"help": "Whether the end-of-sequence token follows actions of one pass."}
    )
    norm_type: str | None = field(
        default=None, metadata={"help": "How actions and states are normalised: bounds_q99, bounds or normal."}
    )
    fast_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "FAST tokenizer to speak with: a directory or Hub id, of a policy of ours or as "
            "physical-intelligence/fast. By default the policy's own; where it has none, one is fitted on the data."
        },
    )
    fast_scale: float | None = field(
        default=None,
        metadata={"help": "Of a FAST tokenizer that is fitted: higher is finer, and longer; by default 10."},
    )
    fast_vocab_size: int | None = field(
        default=None, metadata={"help": "Tokens of a FAST tokenizer that is fitted, at most; by default 1024."}
    )
    diffusion_steps: int | None = field(default=None, metadata={"help": "Noise levels of a diffusion head."})
    num_inference_steps: int | None = field(
        default=None, metadata={"help": "Passes per prediction of a diffusion or flow head."}
    )
    training_mode: str = field(
        default="full", metadata={"help": "Which weights learn, without --use_peft.", "choices": MODES}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of the weights."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={"help": "The update is scaled by alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "On the input of the adapters."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "all-linear, published, or names of layers."},
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base to 4 bits; with --use_peft."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base to 8 bits; with --use_peft."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantise the scales of 4-bit weights too."})

    def __post_init__(self):
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError("A quantised model is trained through adapters: add --use_peft.")
        if self.use_peft and self.training_mode != "full":
            raise ValueError(f"--use_peft and --training_mode {self.training_mode} exclude each other.")
        for name, value, known in (("dtype", self.dtype, DTYPES), ("training_mode", self.training_mode, MODES)):
            if value not in known:
                raise ValueError(f"--{name} must be one of {list(known)}, got {value!r}.")


@dataclass
class DataArguments:
    """What is trained on."""

    dataset: list[str] | None = field(
        default=None,
        metadata={"help": "Directories, URLs or Hub ids of LeRobot or RLDS datasets, each perhaps with =weight."},
    )
    unnorm_key: str | None = field(
        default=None,
        metadata={"help": "Train on all of --dataset as one, of this name and with one set of statistics."},
    )
    mixture: str | None = field(
        default=None,
        metadata={"help": "Instead of --dataset: a name of robot_data/mixtures.yaml, or a YAML file {name: weight}."},
    )
    data_root: str | None = field(default=None, metadata={"help": "Where the datasets of --mixture lie, by name."})
    dataset_configs: str | None = field(
        default=None, metadata={"help": "YAML file of descriptions by dataset name, as in robot_data/open_x.yaml."}
    )
    statistics: str | None = field(
        default=None,
        metadata={"help": "dataset_statistics.json to normalise by. Without it, they are computed from the datasets."},
    )
    camera: list[str] | None = field(
        default=None,
        metadata={
            "help": "Roles of the pictures that the policy looks at, in its order. By default primary, wrist, "
            "wrist_2, ..., as many as it takes (num_images)."
        },
    )
    image_augmentation: str = field(
        default="published",
        metadata={
            "help": "Random crops and colours. The checkpoint's processor crops the centre accordingly.",
            "choices": AUGMENTATIONS,
        },
    )
    include_tasks: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: only steps whose instruction matches one of them."}
    )
    exclude_tasks: list[str] | None = field(
        default=None, metadata={"help": "Regular expressions: no steps whose instruction matches one of them."}
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Steps that wait in memory to be shuffled."})
    balance: bool = field(default=True, metadata={"help": "Whether weights count per step, as OpenVLA's do."})
    skip_bad_episodes: bool = field(default=False, metadata={"help": "Log damaged episodes and go on."})
    predict_stop_token: bool = field(
        default=True, metadata={"help": "Learn the token after the action, too, where the policy speaks in tokens."}
    )
    validation_episodes: int = field(
        default=16, metadata={"help": "Held out of each dataset, at most a tenth of it; 0: no validation."}
    )
    validation_steps: int = field(default=256, metadata={"help": "Steps of each dataset to validate on, at most."})
    plot_open_loop: bool = field(
        default=False,
        metadata={"help": "Draw predicted beside recorded actions of a held-out episode at each validation."},
    )
    overfit_one_episode: bool = field(
        default=False,
        metadata={"help": "Train and validate on the first episode alone, unchanged: is everything connected?"},
    )

    def __post_init__(self):
        if (self.dataset is None) == (self.mixture is None):
            raise ValueError("Give exactly one of --dataset and --mixture.")
        if self.unnorm_key is not None and self.dataset is None:
            raise ValueError("--unnorm_key goes with --dataset: the datasets of a mixture keep their names.")
        if self.image_augmentation not in AUGMENTATIONS:
            raise ValueError(
                f"--image_augmentation must be one of {list(AUGMENTATIONS)}, got {self.image_augmentation!r}."
            )


@dataclass
class OpenVLATrainingArguments(TrainingArguments):
    """Trainer's arguments, with other defaults."""

    output_dir: str = field(default=None, metadata={"help": "Where the policy and its checkpoints are written."})
    learning_rate: float | None = field(
        default=None, metadata={"help": f"By default {LORA_LEARNING_RATE} for LoRA, {LEARNING_RATE} otherwise."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of linear warm-up; below 1, a fraction of all steps."}
    )
    warmup_ratio: float = field(
        default=0.0, metadata={"help": "The older name of a --warmup_steps below 1, which it takes the place of."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite is an error."})
    eval_strategy: str = field(default="steps", metadata={"help": "When to validate: steps, epoch or no."})
    eval_steps: float | None = field(default=500, metadata={"help": "Steps between two validations."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Steps in a batch of validation."})
    save_steps: float = field(default=500, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, the newest."})
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "Trackers: none, trackio, wandb, tensorboard, all."}
    )
    gradient_checkpointing_kwargs: dict | str | None = field(
        default_factory=lambda: dict(GRADIENT_CHECKPOINTING_KWARGS),
        metadata={"help": "Re-entrant checkpointing would lose gradients of adapters in the towers."},
    )
    bin_smoothing: float = field(
        default=0.0,
        metadata={
            "help": "Width in bins of the labels of action tokens, which neighbouring bins then share; 0: none. A few "
            "bins help where demonstrations repeat some actions to the bin, as scripted ones do."
        },
    )
    run_id: str | None = field(
        default=None, metadata={"help": "Of wandb's run. By default that of the checkpoint, or a new one."}
    )
    logging_dir: str | None = field(
        default=None, metadata={"help": "Where TensorBoard's files are written; by default OUTPUT_DIR/runs."}
    )
    rollout_episodes: int = field(
        default=0,
        metadata={
            "help": "At each save, roll the policy out in the tabletop, so many episodes of each task; 0: none."
        },
    )
    rollout_tasks: list[str] | None = field(default=None, metadata={"help": "By default all tasks of the tabletop."})
    rollout_seed: int = field(
        default=10_000,
        metadata={
            "help": "Of the first episode of each task. The default is far from the one of tools/evaluate_policy.py: "
            "a policy is not to be chosen by the scenes that it is judged by."
        },
    )
    rollout_unnorm_key: str | None = field(
        default=None, metadata={"help": "Dataset whose statistics scale the actions, where there are several."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Steps have no columns."})
    ignore_data_skip: bool = field(default=True, metadata={"help": "The stream itself goes on where it was."})

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("--output_dir is missing.")
        if self.remove_unused_columns or not self.ignore_data_skip:
            raise ValueError("`remove_unused_columns` must stay false and `ignore_data_skip` true: see robot_data.")
        self._check_rollouts()
        if self.bin_smoothing < 0:
            raise ValueError(f"--bin_smoothing must not be negative, got {self.bin_smoothing}.")
        if self.logging_dir is None:
            self.logging_dir = str(Path(self.output_dir) / "runs")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"--warmup_ratio is a fraction below 1; got {self.warmup_ratio}.")
        # transformers 4.57 takes only whole steps here.
        warmup_steps, self.warmup_steps = self.warmup_ratio or self.warmup_steps, 0
        super().__post_init__()
        if warmup_steps < 0 or (warmup_steps >= 1 and warmup_steps != int(warmup_steps)):
            raise ValueError(f"--warmup_steps is a number of steps, or a fraction below 1; got {warmup_steps}.")
        self.warmup_steps = warmup_steps

    def _check_rollouts(self) -> None:
        for name in ("rollout_episodes", "rollout_seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if not self.rollout_episodes and (self.rollout_tasks or self.rollout_unnorm_key):
            raise ValueError(
                "--rollout_tasks and --rollout_unnorm_key need --rollout_episodes, the episodes per task."
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up in so many steps of training."""
        return round(self.warmup_steps if self.warmup_steps >= 1 else self.warmup_steps * num_training_steps)


Arguments = tuple[ModelArguments, DataArguments, OpenVLATrainingArguments]


def parse_arguments(arguments: Sequence[str] | None = None) -> Arguments:
    """
    Arguments of a command line. A YAML or JSON file may come first; flags after it take precedence.

    Args:
        arguments (`Sequence[str]`, *optional*): By default those of this process.

    Raises:
        ValueError: If the file holds an unknown name, or values contradict each other.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    classes = (ModelArguments, DataArguments, OpenVLATrainingArguments)
    parser = HfArgumentParser(classes)
    if arguments and arguments[0].endswith((".yaml", ".yml", ".json")):
        values = read_yaml(arguments.pop(0))
        known = {each.name for each in (part for cls in classes for part in fields(cls)) if each.init}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"The configuration holds unknown arguments {unknown}; see --help.")
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    model, data, training = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    if training.learning_rate is None:
        training.learning_rate = LORA_LEARNING_RATE if model.use_peft else LEARNING_RATE
    training.learning_rate = float(training.learning_rate)
    if data.overfit_one_episode:
        data.image_augmentation = "none"
    return model, data, training


def read_yaml(path: str | Path) -> dict:
    """
    The keys and values of a YAML or JSON file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, got {type(values).__name__}.")
    return values
