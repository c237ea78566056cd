"""Trainer, fed by a stream that resumes exactly, and writing a repository instead of bare weights."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from robot_data.loader import StepLoader

from .arguments import OpenVLATrainingArguments
from .callbacks import EpochCallback, PushCallback
from .checkpoint import (
    CHECKPOINT,
    PARTIAL,
    STREAM_STATE,
    Repository,
    find_checkpoints,
    publish_checkpoint,
    remove,
    save_resume_weights,
    write_json,
    writing,
)
from .data import NamedBatch, TrainingData
from .metrics import (
    IGNORE_INDEX,
    TOKEN_HEADS,
    ActionMetrics,
    ActionTokens,
    count_correct,
    predicted_tokens,
    without_padding,
)
from .processes import in_main_process
from .randomness import own_random_numbers
from .trackers import save_tracker_run


class OpenVLATrainer(Trainer):
    """
    [`Trainer`] for a policy.

    - Batches come from a [`StepLoader`] of this process, whose place in the stream is saved with each checkpoint.
    - Beside Trainer's figures the log holds `action_accuracy` (of the main process, on the batches of training, where
      the policy speaks in tokens) and `data_wait`, the fraction of the time that was spent waiting for data.
    - Padded actions count in no loss and in no figure, but for those that FAST tokens spell. What is drawn at a
      validation, noise of the `diffusion` and `flow` heads, is the same at each, and disturbs no random numbers of
      training.
    - A checkpoint is written under another name and renamed once it is complete. After it, and at the end, the merged
      model is written to the root of the output directory, once.

    Args:
        model (`PreTrainedModel` or `PeftModel`): What is trained.
        args ([`OpenVLATrainingArguments`]): How.
        data ([`TrainingData`]): On what.
        repository ([`Repository`]): What is written.
        callbacks (`list[TrainerCallback]`, *optional*): As in [`Trainer`].
        rollouts (`Callable`, *optional*): Called by the main process before each save; gives figures for the log.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: OpenVLATrainingArguments,
        data: TrainingData,
        repository: Repository,
        callbacks: list[TrainerCallback] | None = None,
        rollouts: Callable[[], dict[str, float]] | None = None,
    ):
        steps = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        updates_per_epoch = max(data.num_steps // steps, 1)
        self.repository, self.rollouts = repository, rollouts
        self.head_type = repository.processor.head_type
        self.action_tokens = ActionTokens.of(repository.processor)
        self.loader = StepLoader(
            data.stream,
            args.per_device_train_batch_size,
            NamedBatch(data.collator),
            num_workers=args.dataloader_num_workers,
            num_batches=updates_per_epoch * args.gradient_accumulation_steps,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        self._partial: Path | None = None  # while a checkpoint is written, where
        self._correct = torch.zeros(2)
        self._unlogged_loss = torch.zeros(())  # sum since the last line of the log
        self._resumed: dict[str, Any] | None = None  # until the first step, what the checkpoint had not logged yet
        self._waited, self._logged_at = 0.0, time.perf_counter()
        self._written_at: int | None = None  # step of which the repository holds the weights
        metrics = ActionMetrics(repository.processor, [step.dataset for step in data.held_out])
        super().__init__(
            model,
            args,
            data_collator=data.plain_collator,
            eval_dataset=data.held_out or None,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=predicted_tokens if self.head_type in TOKEN_HEADS else None,
            callbacks=[EpochCallback(updates_per_epoch), *(callbacks or [])],
        )
        # Trainer does not find the name behind an adapter.
        self.label_names = metrics.label_names
        self.push: PushCallback | None = None
        if args.push_to_hub:
            self.push = PushCallback(self.hub_model_id)
            self.add_callback(self.push)
            repository.repo_id = self.hub_model_id

    # Steps

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs) -> Any:
        """As [`Trainer.train`], from a directory; the stream goes on where it was."""
        if resume_from_checkpoint is not None:
            path = Path(resume_from_checkpoint) / STREAM_STATE.format(rank=self.args.process_index)
            if not path.is_file():
                raise FileNotFoundError(
                    f"{resume_from_checkpoint} has no {path.name}: it was not written by this script, or by fewer "
                    f"processes than the {self.args.world_size} of now."
                )
            state = json.loads(path.read_text(encoding="utf-8"))
            self.loader.load_state_dict(state["stream"])
            self._resumed = state["unlogged"]
            resume_from_checkpoint = str(resume_from_checkpoint)
        if self.args.should_save:  # what an interrupted run left
            shutil.rmtree(Path(self.args.output_dir) / PARTIAL, ignore_errors=True)
        self._logged_at = time.perf_counter()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> StepLoader:
        """The loader of this process, which needs no preparation by `accelerate`."""
        return self.loader

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, Any]:
        """As [`Trainer.get_batch_samples`], against the clock; nothing where a resumed run has ended already."""
        if 0 < self.state.max_steps <= self.state.global_step:  # Trainer would take one more step
            self.control.should_training_stop = True
            return [], None
        start = time.perf_counter()
        try:
            return super().get_batch_samples(*args, **kwargs)
        finally:
            self._waited += time.perf_counter() - start

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> torch.Tensor | int | None:
        counted = [
            {
                "labels": without_padding(
                    batch["labels"], batch["action_is_pad"], self.action_tokens, batch.get("action_dims")
                )
            }
            for batch in batch_samples
        ]
        return super()._get_num_items_in_batch(counted, device)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """As [`Trainer.get_decay_parameter_names`]; the embedding of a robot that rests stays as it is."""
        embeddings = "embodiment_adapter.embeddings."
        return [name for name in super().get_decay_parameter_names(model) if embeddings not in name]

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As [`Trainer.training_step`]; the first line of the log after a resume covers the steps before it, too."""
        loss = super().training_step(*args, **kwargs)
        if self._resumed is not None:
            resumed, self._resumed = self._resumed, None
            loss = resumed["loss"] + loss  # in this order the sum is that of a run that never stopped, to the bit
            self._correct += torch.tensor(resumed["correct"], device=self._correct.device)
            self._globalstep_last_logged = resumed["last_logged_step"]
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args, **kwargs) -> None:
        self._unlogged_loss = tr_loss
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """
        As [`Trainer.compute_loss`]; the model computes logits at the supervised positions alone.

        Raises:
            FloatingPointError: If the loss is not finite, naming the step and what its batch is made of.
        """
        inputs = {**inputs, "use_cache": False}
        names = inputs.pop("names", None)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of step {self.state.global_step + 1} is {loss.item()}. Its batch: {', '.join(names)}."
                )
            if self.head_type in TOKEN_HEADS:
                predicted = predicted_tokens(outputs["logits"].detach(), inputs["labels"])
                counts = count_correct(predicted, inputs["labels"], inputs["action_is_pad"], self.action_tokens)
                self._correct = self._correct.to(counts.device) + counts
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As [`Trainer.evaluate`], off the clock, and with the same random numbers each time."""
        with self._off_the_clock(), own_random_numbers(self.args.seed, self.args.device):
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """As [`Trainer.prediction_step`]; of a head that removes noise, the actions that it makes of noise alone."""
        loss, predictions, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.head_type in ("diffusion", "flow") and not prediction_loss_only:
            predictions = self._sample_actions(model, self._prepare_inputs(inputs))
        return loss, predictions, labels

    def _sample_actions(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Normalised actions (B, K, D) for the prompts of a batch, without the actions behind them."""
        policy = self.accelerator.unwrap_model(model)
        policy = policy.get_base_model() if isinstance(policy, PeftModel) else policy
        is_prompt = (inputs["labels"] != IGNORE_INDEX).cumsum(dim=1) == 0  # (B, L)
        prompts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"] * is_prompt}
        prompts |= {name: inputs[name] for name in ("pixel_values", "proprio") if name in inputs}
        actions = torch.zeros_like(inputs["actions"], dtype=torch.float64)
        keys = row_keys(policy, inputs)
        for size in sorted({policy.get_action_dim(key) for key in keys}):
            rows = [row for row, key in enumerate(keys) if policy.get_action_dim(key) == size]
            with self.compute_loss_context_manager():
                output = policy.predict_action(
                    **{name: values[rows] for name, values in prompts.items()},
                    unnorm_key=[keys[row] for row in rows],
                    return_dict=True,
                )
            normalized = torch.as_tensor(output.normalized_actions, device=actions.device)
            actions[rows, :, :size] = normalized.view(len(rows), -1, size)
        return actions

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._logged_at += time.perf_counter() - start

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As [`Trainer.log`], with the figures of this class."""
        if "loss" in logs:
            now = time.perf_counter()
            correct, total = self._correct.tolist()
            if self.head_type in TOKEN_HEADS:
                logs["action_accuracy"] = correct / max(total, 1)
            logs["data_wait"] = self._waited / (now - self._logged_at)
            if skipped := sum(self.loader.skipped.values()):
                logs["skipped_episodes"] = skipped
            self._correct, self._waited, self._logged_at = torch.zeros_like(self._correct), 0.0, now
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        policy.freeze_unused()  # PEFT has all that lies beside an adapter learn again

    # Saving

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        root, name = Path(self.args.output_dir), f"{CHECKPOINT}{self.state.global_step}"
        with self._off_the_clock():
            if self.rollouts is not None:
                self.log(in_main_process("Rolling the policy out", self.rollouts))
            self._finish_upload()
            with writing(name, root):
                self._partial = root / PARTIAL
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self._partial = None
                self._complete_checkpoint(root / PARTIAL / name)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    publish_checkpoint(root / PARTIAL / name, root / name)
                    self._rotate()
            self.write_repository()

    def _complete_checkpoint(self, directory: Path) -> None:
        unlogged = {
            "loss": self._unlogged_loss.item(),
            "correct": self._correct.tolist(),
            "last_logged_step": self._globalstep_last_logged,
        }
        state = {"stream": self.loader.state_dict(), "unlogged": unlogged}
        write_json(directory / STREAM_STATE.format(rank=self.args.process_index), state)
        if (best := self.state.best_model_checkpoint) is not None:  # where every process will load it from
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / Path(best).name)
        if self.args.should_save:
            # However the weights are saved: sharded ones pass `_save` by.
            self.repository.processor.save_pretrained(directory)
            save_tracker_run(self.args, directory)
            self.state.save_to_json(str(directory / TRAINER_STATE_NAME))

    def write_repository(self) -> None:
        """Write the complete repository to the root of the output directory, unless it is there already."""
        best, step = self.state.best_model_checkpoint, self.state.global_step
        if best is not None and self.args.load_best_model_at_end and not self.is_in_train:
            step = int(Path(best).name.removeprefix(CHECKPOINT))
        if step != self._written_at:
            self._finish_upload()
            self.repository.metrics = card_metrics(self.state.log_history, step)
            with writing("the repository", Path(self.args.output_dir)):
                self.save_model()
            self._written_at = step
        self.accelerator.wait_for_everyone()

    def _finish_upload(self) -> None:
        """Replace nothing that is being uploaded: what arrives would be of two steps."""
        if self.push is not None:
            self.push.finish()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`Trainer.save_model`]; without `output_dir`, and into that of the run, the complete repository."""
        output_dir = output_dir or self.args.output_dir
        if self.is_fsdp_enabled and output_dir == self.args.output_dir:
            # Trainer would write no weights where the checkpoints are sharded.
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call=True)

    def _rotate(self) -> None:
        """Remove what `save_total_limit` leaves no place for, never the best nor the newest."""
        limit, found = self.args.save_total_limit, find_checkpoints(self.args.output_dir)
        best = self.state.best_model_checkpoint
        kept = found[-limit:] if limit else found
        if best is not None and limit:
            kept = [*found[-max(limit - 1, 1) :], Path(best)]
        for checkpoint in found:
            if checkpoint not in kept:
                remove(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        directory = Path(output_dir or self.args.output_dir)
        if directory == Path(self.args.output_dir):
            self.repository.write(model, state_dict)
        else:
            save_resume_weights(model, self.repository.processor, directory, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: [`PushCallback`] uploads what is complete."""


def row_keys(policy: torch.nn.Module, inputs: dict[str, Any]) -> list[str]:
    """For each row of a batch a dataset with its robot and action dimension; the units are not looked at."""
    if "embodiment" in inputs:
        return [policy.config.embodiments[row] for row in inputs["embodiment"].tolist()]
    sizes = {policy.get_action_dim(key): key for key in policy.norm_stats}
    if "action_dims" in inputs:
        return [sizes[size] for size in inputs["action_dims"].tolist()]
    return [sizes[policy.config.action_dim]] * len(inputs["input_ids"])


def card_metrics(history: list[dict[str, float]], step: int) -> dict[str, float]:
    """
    What the model card tells of a run: the last loss, figures of validation and of rollouts.

    Args:
        history (`list[dict[str, float]]`): The log.
        step (`int`): Of the weights; what was measured later is not told.
    """
    known = [entry for entry in history if entry["step"] <= step]
    return {
        name: value
        for entry in known
        for name, value in entry.items()
        if name == "loss"
        or name.startswith("rollout_")
        or (name.startswith("eval_") and not name.endswith(("_runtime", "_per_second")))
    }
