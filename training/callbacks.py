"""What happens beside the steps of training: the count of passes over the data, and uploads."""

import logging
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from .checkpoint import PARTIAL, find_checkpoints


logger = logging.getLogger(__name__)


class EpochCallback(TrainerCallback):
    """
    Counts passes over the data from the number of steps; Trainer itself begins anew when it resumes within one.

    Args:
        updates_per_epoch (`int`): Optimizer steps in one pass.
    """

    def __init__(self, updates_per_epoch: int):
        self.updates_per_epoch = updates_per_epoch

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        state.epoch = state.global_step / self.updates_per_epoch


class PushCallback(TrainerCallback):
    """
    Uploads the repository at every save and at the end, as `hub_strategy` says. A failure is logged and training goes
    on; the next save tries again. Who replaces files that are uploaded calls `finish` first.

    Args:
        repo_id (`str`, *optional*): On the Hub; it exists. The main process alone knows it.
    """

    def __init__(self, repo_id: str | None):
        self.repo_id = repo_id
        self._upload: Future | None = None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero and args.hub_strategy != HubStrategy.END:
            self._start(args, f"Training in progress, step {state.global_step}")

    def push(self, args: TrainingArguments, message: str) -> bool:
        """Upload and wait. Whether it succeeded."""
        self.finish()
        self._start(args, message)
        return self.finish()

    def finish(self) -> bool:
        """Wait for the upload that runs, if there is one. Whether it succeeded."""
        upload, self._upload = self._upload, None
        try:
            if upload is not None:
                upload.result()
        except Exception as error:
            logger.warning("Pushing to %s failed, training goes on: %s", self.repo_id, error)
            return False
        return True

    def _start(self, args: TrainingArguments, message: str) -> None:
        api = HfApi(token=args.hub_token)
        options = {"repo_id": self.repo_id, "commit_message": message, "revision": args.hub_revision}
        with_checkpoint = args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        checkpoint = find_checkpoints(args.output_dir)[-1:] if with_checkpoint else []

        def upload() -> None:
            api.upload_folder(folder_path=args.output_dir, ignore_patterns=["checkpoint-*", f"{PARTIAL}*"], **options)
            for folder in checkpoint:
                name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
                api.upload_folder(folder_path=Path(folder), path_in_repo=name, **options)

        self._upload = api.run_as_future(upload)
