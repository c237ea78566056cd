"""Experiment trackers that go on with their run when training resumes."""

import json
import secrets
from collections.abc import MutableMapping
from pathlib import Path

from .arguments import OpenVLATrainingArguments
from .checkpoint import write_json


TRACKER_RUN = "tracker_run.json"


def continue_trackers(
    args: OpenVLATrainingArguments, checkpoint: Path | None, environment: MutableMapping[str, str]
) -> None:
    """
    Name the run of the trackers: as that of the checkpoint, or anew.

    Trainer hands the name to trackio, which goes on with a run of that name. wandb and, from transformers 5 on,
    TensorBoard read their environment: `WANDB_RUN_ID` with `WANDB_RESUME`, and `TENSORBOARD_LOGGING_DIR`.

    Args:
        args ([`OpenVLATrainingArguments`]): Receive `run_id` and `run_name`, where they are not given.
        checkpoint (`Path`, *optional*): That is resumed from.
        environment (`MutableMapping[str, str]`): Of this process, before the trainer is made. What is set in it stays.
    """
    path = None if checkpoint is None else checkpoint / TRACKER_RUN
    saved = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    args.run_id = environment.get("WANDB_RUN_ID") or args.run_id or saved.get("run_id") or secrets.token_hex(4)
    args.run_name = args.run_name or saved.get("run_name") or f"{Path(args.output_dir).resolve().name}-{args.run_id}"
    if "wandb" in args.report_to:
        environment.setdefault("WANDB_RUN_ID", args.run_id)
        environment.setdefault("WANDB_RESUME", "allow")
    if "tensorboard" in args.report_to:
        environment.setdefault("TENSORBOARD_LOGGING_DIR", args.logging_dir)


def save_tracker_run(args: OpenVLATrainingArguments, checkpoint: Path) -> None:
    """Write what [`continue_trackers`] reads into a checkpoint."""
    write_json(checkpoint / TRACKER_RUN, {"run_id": args.run_id, "run_name": args.run_name})
