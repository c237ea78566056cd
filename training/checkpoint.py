"""What a fine-tune writes: a complete repository at the root of its output, and checkpoints to resume from."""

import copy
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from convert_checkpoint import STATISTICS_NAME, Source
from huggingface_hub import ModelCard, save_torch_state_dict, snapshot_download
from load_policy import ACTION_FIELDS, REPOSITORY
from merge_adapter import ACTION_CONFIG_NAME, Adapter, write_merged
from model_card import model_card
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, ProcessorMixin


CHECKPOINT = "checkpoint-"
# Pushing leaves out what begins with an underscore, and so does everyone who looks for checkpoints.
PARTIAL = "_partial"
STREAM_STATE = "data_stream_{rank}.json"
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "numpy")


# Checkpoints to resume from


def find_checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first. One that was cut short while it was written has not got its name yet."""
    found = [path for path in Path(output_dir).glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def locate_checkpoint(resume_from: str | bool | None, output_dir: str | Path) -> Path | None:
    """
    The checkpoint that `--resume_from_checkpoint` means.

    Args:
        resume_from (`str` or `bool`, *optional*): A directory; `True`, also as text: the last one in `output_dir`; a
            Hub id, where `--hub_strategy checkpoint` has pushed the last one; None or `False`: none.
        output_dir (`str` or `Path`): Of the run.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If `output_dir` holds checkpoints and none is to be resumed from.
    """
    own = find_checkpoints(output_dir)
    text = str(resume_from).lower()
    if resume_from is None or text in ("false", "none", ""):
        if own:
            raise ValueError(
                f"{output_dir} holds checkpoints of another run, up to {own[-1].name}: go on from them with "
                "--resume_from_checkpoint True, or choose another --output_dir."
            )
        return None
    if text == "true":
        if not own:
            raise FileNotFoundError(f"{output_dir} holds no complete checkpoint to resume from.")
        return own[-1]
    if Path(resume_from).is_dir():
        return Path(resume_from)
    if str(resume_from).count("/") != 1:
        raise FileNotFoundError(f"--resume_from_checkpoint {resume_from} is neither a directory nor a Hub id.")
    folder = Path(snapshot_download(resume_from, allow_patterns=["last-checkpoint/*"])) / "last-checkpoint"
    if not folder.is_dir():
        raise FileNotFoundError(f"{resume_from} has no folder last-checkpoint; push with --hub_strategy checkpoint.")
    return folder


def save_resume_weights(
    model: PreTrainedModel | PeftModel, processor: ProcessorMixin, directory: Path, state_dict: dict | None
) -> None:
    """
    The weights that a resumed run goes on with, as they are trained: the adapter, or all of them.

    There is no config.json, so that no one takes the directory for a model. The processor, statistics and the fields
    of the configuration that the base may have otherwise lie beside an adapter: `tools/merge_adapter.py` needs no more
    than this directory and the base.

    Args:
        model (`PreTrainedModel` or `PeftModel`): What is trained.
        processor (`ProcessorMixin`): With the statistics that are trained with.
        directory (`Path`): Of the checkpoint.
        state_dict (`dict`, *optional*): In place of the model's own, where it is sharded.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        processor.save_pretrained(directory)
        model.save_pretrained(directory, state_dict=state_dict)
        write_json(directory / STATISTICS_NAME, processor.norm_stats)
        config = model.get_base_model().config
        write_json(directory / ACTION_CONFIG_NAME, {name: getattr(config, name) for name in ACTION_FIELDS})
    else:
        save_torch_state_dict(model.state_dict() if state_dict is None else state_dict, directory)


def publish_checkpoint(partial: Path, final: Path) -> None:
    """Give a complete checkpoint its name."""
    if final.exists():  # an equal one, of a run that went on from an earlier one
        remove(final)
    os.replace(partial, final)


def remove(directory: Path) -> None:
    """Delete a directory. Under its name it is there whole or not at all."""
    doomed = directory.parent / PARTIAL / f"{directory.name}-removed"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(directory, doomed)
    shutil.rmtree(doomed)


@contextmanager
def writing(what: str, output_dir: Path) -> Iterator[None]:
    """
    Say what was being written where, if that fails. The rest of it is removed: on a full disk it is in the way.

    Args:
        what (`str`): What is written.
        output_dir (`Path`): Of the run.

    Raises:
        OSError: If writing fails; torch and safetensors raise errors of their own for that.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # memory that ran out, or another process that was lost: torch's writer raises no kind of its own
        free = shutil.disk_usage(output_dir).free / 2**20
        if PartialState().is_main_process:
            shutil.rmtree(output_dir / PARTIAL, ignore_errors=True)
        found = find_checkpoints(output_dir)
        advice = f"{found[-1].name} is complete: go on with --resume_from_checkpoint True. " if found else ""
        raise OSError(
            f"{what} could not be written into {output_dir}, where {free:.0f} MiB were free. {advice}The cause: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


# The repository


@dataclass
class Repository:
    """
    The complete repository that a fine-tune is.

    Args:
        directory (`Path`): Where it is written.
        base ([`Source`]): What was fine-tuned.
        processor (`ProcessorMixin`): With the statistics that are trained with.
        dtype (`torch.dtype`): Of the weights written.
        repo_id (`str`): What the model card says to load.
        datasets (`list[str]`): What was trained on, as it was given.
        names (`list[str]`): What was trained on, as the statistics have it, which may know more.
        settings (`dict[str, Any]`): Of the training, for the card.
        metrics (`dict[str, float]`): The last ones, for the card.
    """

    directory: Path
    base: Source
    processor: ProcessorMixin
    dtype: torch.dtype
    repo_id: str
    datasets: list[str]
    names: list[str]
    settings: dict[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)

    def write(self, model: PreTrainedModel | PeftModel, state_dict: dict | None) -> None:
        """
        Write the model with everything that it needs. An adapter is merged into the base's own weights, file by file.

        Args:
            model (`PreTrainedModel` or `PeftModel`): What is trained.
            state_dict (`dict`, *optional*): In place of the model's own, where it is sharded.
        """
        with self._replacing() as folder:
            if isinstance(model, PeftModel):
                with tempfile.TemporaryDirectory(dir=folder.parent) as adapter:
                    save_resume_weights(model, self.processor, Path(adapter), state_dict)
                    source = Source.locate(adapter, "main")
                    write_merged(Adapter(source), source, self.base, folder, self.dtype, self.repo_id)
            else:
                self._write_full(model, state_dict, folder)
            config = (model.get_base_model() if isinstance(model, PeftModel) else model).config
            (folder / "README.md").write_text(str(self._card(config.llm_backbone_id)), encoding="utf-8")

    def _write_full(self, model: PreTrainedModel, state_dict: dict | None, folder: Path) -> None:
        state_dict = model.state_dict() if state_dict is None else state_dict
        # Of a model that is trained in float32, the weights are saved as those of the base are: tied ones once.
        cast = {tensor.data_ptr(): tensor.to(self.dtype) for tensor in state_dict.values()}
        tensors = {name: cast[tensor.data_ptr()] for name, tensor in state_dict.items()}
        model.save_pretrained(folder, state_dict=tensors)
        config = copy.deepcopy(model.config)
        config.dtype = str(self.dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @contextmanager
    def _replacing(self) -> Iterator[Path]:
        """A folder whose files take their places in the end, config.json last: without it nothing loads."""
        folder = self.directory / PARTIAL / "repository"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == "config.json", name))
        (self.directory / "config.json").unlink(missing_ok=True)
        for stale in self.directory.glob("model*.safetensors*"):
            if stale.name not in names:
                stale.unlink()
        for name in names:
            os.replace(folder / name, self.directory / name)
        shutil.rmtree(folder.parent)

    def _card(self, llm_backbone_id: str | None) -> ModelCard:
        base_model = None if self.base.is_local else self.base.root
        text = model_card(
            self.repo_id,
            f"{self.base.described}, fine-tuned on {', '.join(f'`{name}`' for name in self.names)}.",
            unnorm_keys=sorted(self.processor.norm_stats),
            base_model=base_model,
            llm_backbone_id=llm_backbone_id,
        )
        card = ModelCard(f"{text}\n{self._training_section()}")
        if base_model is not None:
            card.data.base_model_relation = "finetune"
        on_hub = [name for name in self.datasets if name.count("/") == 1 and not Path(name).exists()]
        card.data.datasets = [name.partition("@")[0] for name in on_hub] or None
        return card

    def _training_section(self) -> str:
        statistics = {name: self.processor.norm_stats[name] for name in self.names}
        sizes = [
            [name, each.get("num_trajectories"), each.get("num_transitions")] for name, each in statistics.items()
        ]
        parts = [
            "## Training",
            _table(["Dataset", "Episodes", "Steps"], sizes),
            _table(["Setting", "Value"], [[f"`{name}`", value] for name, value in self.settings.items()]),
        ]
        if self.metrics:
            rows = [[name, f"{value:.5g}"] for name, value in sorted(self.metrics.items())]
            parts += [
                "### Metrics",
                "Losses are in nats per token; `rollout_success` is the fraction of episodes in the tabletop.",
                _table(["Metric", "Value"], rows),
            ]
        libraries = [[name, version(name)] for name in LIBRARIES]
        if (commit := code_commit()) is not None:
            libraries.append(["this repository's code", commit])
        return "\n\n".join([*parts, "### Versions", _table(["Part", "Version"], libraries)]) + "\n"


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def code_commit() -> str | None:
    """Commit of this checkout, None where it is not one."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
