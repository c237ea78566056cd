"""
Turn an OpenVLA checkpoint into a complete repository with this project's code, which the Auto classes load.

    python tools/convert_checkpoint.py SOURCE OUT [--push_to_hub REPO]

What SOURCE is follows from its config.json:

- a checkpoint in the Hugging Face format, published or ours: a directory or a Hub id. The code that comes with it is
  never run; this checkout's code replaces it.
- the same with the files of OpenVLA-OFT beside it (action_head--*.pt, ...), which become part of the repository. How
  many images and actions they are for, and how these were scaled, they do not say: --num_images, and --platform or
  --chunk_size and --norm_type. With these options a checkpoint without such files becomes one that decodes its action
  tokens in one pass.
- a native Prismatic checkpoint of a VLA: a run directory with config.json, dataset_statistics.json and checkpoints/,
  a .pt file in there, or a Hub id with these files. Its language model's tokenizer is given with --tokenizer.
- a native Prismatic checkpoint of a plain VLM, to start a training from. Its vision towers were frozen and are
  usually not in the file; --vision_weights gives timm's checkpoints of them, in the order of the towers.

tools/native_checkpoint.py tells how a native checkpoint is read, and where the published conversion, which is
followed, departs from native training.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from load_policy import PROCESSOR_FIELDS, repository_class
from model_card import model_card
from native_checkpoint import NativeOptions, choose_checkpoint, load_native, native_kind, preview
from oft_checkpoint import (
    PLATFORMS,
    OFTOptions,
    component_files,
    fill_components,
    model_tensors,
    oft_fields,
    read_component,
)
from transformers import PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file


STATISTICS_NAME = "dataset_statistics.json"


@dataclass(frozen=True)
class Source:
    """
    A directory or a Hub repository with a checkpoint.

    Args:
        root (`str`): The directory or the Hub id.
        revision (`str`, defaults to `"main"`): On the Hub.
        checkpoint (`str`, *optional*): The .pt file that was asked for, relative to `root`.
    """

    root: str
    revision: str = "main"
    checkpoint: str | None = None

    @classmethod
    def locate(cls, source: str, revision: str) -> "Source":
        """The source behind a command-line argument: a directory, a .pt file or a Hub id."""
        path = Path(source)
        if path.is_file():
            root = path.parent.parent if path.parent.name == "checkpoints" else path.parent
            return cls(str(root), revision, path.relative_to(root).as_posix())
        if not path.is_dir() and (path.suffix == ".pt" or path.is_absolute() or source.count("/") > 1):
            raise FileNotFoundError(f"{source} is neither a directory, nor a .pt file, nor a Hub id.")
        return cls(source, revision)

    @property
    def is_local(self) -> bool:
        return Path(self.root).is_dir()

    @property
    def described(self) -> str:
        """The source in a model card, which tells no local paths."""
        if self.is_local:
            return f"`{Path(self.root).resolve().name}`"
        return f"[{self.root}](https://huggingface.co/{self.root})"

    def files(self) -> list[str]:
        """Names of the files: on the Hub all of them, in a directory those at its root and in `checkpoints`."""
        if not self.is_local:
            return HfApi().list_repo_files(self.root, revision=self.revision)
        root = Path(self.root)
        return [path.relative_to(root).as_posix() for path in (*root.glob("*"), *root.glob("checkpoints/*"))]

    def fetch(self, name: str) -> Path | None:
        """Path of a file, downloaded where need be; `None` where there is none."""
        path = cached_file(self.root, name, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        return None if path is None else Path(path)

    def read_json(self, name: str) -> dict | None:
        """The object in a JSON file; `None` where there is no file."""
        path = self.fetch(name)
        return None if path is None else read_object(path)

    def native_checkpoint(self) -> Path:
        """The .pt file that was asked for, or the newest one in `checkpoints`."""
        name = self.checkpoint or choose_checkpoint(self.files())
        path = self.fetch(name)
        if path is None:
            raise FileNotFoundError(f"{self.root} has no {name}; is it a broken link?")
        return path


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object and holds a {type(content).__name__}.")
    return content


def convert(
    source: str | Path,
    out: str | Path,
    *,
    revision: str = "main",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    repo_id: str | None = None,
    native: NativeOptions | None = None,
    oft: OFTOptions | None = None,
) -> None:
    """
    Write a complete repository.

    Args:
        source (`str` or `Path`): Directory, .pt file or Hub id.
        out (`str` or `Path`): Directory to write. It appears whole, or not at all.
        revision (`str`, defaults to `"main"`): Of `source`, on the Hub.
        dtype (`str`, *optional*): Of the weights written. Default: as they are, and `bfloat16` for native checkpoints.
        max_shard_size (`str`, defaults to `"5GB"`): Of a weights file.
        overwrite (`bool`, defaults to `False`): Replace `out`, if it is a repository.
        repo_id (`str`, *optional*): Hub repository to push `out` to; it is created where need be.
        native ([`NativeOptions`], *optional*): For native checkpoints only.
        oft ([`OFTOptions`], *optional*): For checkpoints of OpenVLA-OFT only.

    Raises:
        FileNotFoundError: If `source`, or a file it needs, does not exist.
        ValueError: If `out` is in the way, or the source cannot be converted completely.
    """
    out, located = Path(out).resolve(), Source.locate(str(source), revision)
    check_target(out, located, overwrite)
    model, processor, origin = load_source(located, dtype, native or NativeOptions(), oft or OFTOptions())
    card = model_card(
        repo_id or out.name,
        origin,
        unnorm_keys=sorted(model.norm_stats),
        base_model=None if located.is_local else located.root,
        llm_backbone_id=model.config.llm_backbone_id,
    )
    with replacing(out) as directory:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        processor.save_pretrained(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: written, {model.num_parameters():,} parameters in {model.dtype}")
    if repo_id is not None:
        push(out, repo_id)


# Reading the source

# Model, processor, and a sentence on where they come from.
Loaded = tuple[PreTrainedModel, ProcessorMixin, str]


def load_source(source: Source, dtype: str | None, options: NativeOptions, oft: OFTOptions) -> Loaded:
    """Load what the config.json of the source says it is."""
    config = source.read_json("config.json")
    if config is None:
        raise FileNotFoundError(f"{source.root} has no config.json.")
    if config.get("model_type") in ("openvla", "prismatic"):
        if options != NativeOptions():
            raise ValueError(f"{source.root} is not native; options for native checkpoints do not apply.")
        return load_published(source, config, dtype or "auto", oft)
    if native_kind(config) is not None:
        if oft != OFTOptions():
            raise ValueError(f"{source.root} is native; options for OpenVLA-OFT do not apply.")
        return load_native_run(source, config, dtype or "bfloat16", options)
    raise ValueError(
        f"config.json of {source.root} is neither that of an OpenVLA in the Hugging Face format (`model_type` "
        f"openvla) nor of a native run (`vla` or `model`); it has {preview(sorted(config))}."
    )


def load_published(source: Source, config: dict, dtype: str, oft: OFTOptions) -> Loaded:
    """
    Load a checkpoint in the Hugging Face format with the components of OpenVLA-OFT beside it, which together must hold
    the model's tensors, all of them and no others.
    """
    print(f"{source.root}: a checkpoint in the Hugging Face format")
    if source.checkpoint is not None:
        raise ValueError(f"Give the directory {source.root}, not its file {source.checkpoint}.")
    components = read_components(source)
    fields = {} if not components and oft == OFTOptions() else fields_of_oft(source, components, oft)
    report_statistics(config.get("norm_stats") or {}, source.read_json(STATISTICS_NAME))
    # Not `load_policy`: where a source carries our code, that runs the source's copy of it.
    processor = repository_class("OpenVLAProcessor").from_pretrained(
        source.root, revision=source.revision, **{name: fields[name] for name in PROCESSOR_FIELDS if name in fields}
    )
    model, info = repository_class("OpenVLAForActionPrediction").from_pretrained(
        source.root, dtype=dtype, output_loading_info=True, revision=source.revision, **fields
    )
    fill_components(model, model_tensors(components), set(info["missing_keys"]), set(info["unexpected_keys"]))
    origin = f"Converted from {source.described}, a checkpoint in the Hugging Face format."
    if source.fetch("README.md") is not None:
        origin += " Its own model card describes the code that it came with, and is not repeated here."
    return model, processor, origin


def read_components(source: Source) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of OpenVLA-OFT's components by their names; none for other checkpoints."""
    adapter = source.read_json("lora_adapter/adapter_config.json") or {}
    components = {}
    for component, name in component_files(source.files()).items():
        components[component] = read_component(source.fetch(name), adapter.get("lora_alpha"))
        print(f"{name}: {len(components[component])} tensors")
    return components


def fields_of_oft(source: Source, components: dict, options: OFTOptions) -> dict[str, Any]:
    """As `oft_fields`; errors name the source."""
    try:
        return oft_fields(components, options)
    except ValueError as error:
        raise ValueError(f"{source.root} is an OpenVLA-OFT checkpoint: {error}") from error


def report_statistics(in_config: dict, statistics: dict | None) -> None:
    """Say which datasets' statistics are used, and which are stale."""
    if statistics is None:
        print(f"statistics of config.json, used: {preview(sorted(in_config)) or 'none'}")
        return
    if in_config and in_config != statistics:
        print(f"statistics of config.json, stale and not used: {preview(sorted(in_config))}")
    print(f"statistics of {STATISTICS_NAME}, used: {preview(sorted(statistics))}")


def load_native_run(source: Source, config: dict, dtype: str, options: NativeOptions) -> Loaded:
    """Load a native checkpoint with the files of its run."""
    if dtype == "auto":
        raise ValueError("A native checkpoint has no dtype of its own: give bfloat16, float16 or float32.")
    kind, path, statistics = native_kind(config), source.native_checkpoint(), source.read_json(STATISTICS_NAME)
    print(f"{source.root}: a native {kind}, {path.name}")
    if kind == "VLA" and statistics is None:
        raise FileNotFoundError(f"{source.root} has no {STATISTICS_NAME}: a VLA's actions have no scale without it.")
    print(f"statistics: {preview(sorted(statistics or {})) or 'none'}")
    model, processor = load_native(path, config, statistics, getattr(torch, dtype), options)
    return model, processor, f"Converted from {source.described}, a native Prismatic {kind} (`{path.name}`)."


# Writing the target


def check_target(out: Path, source: Source, overwrite: bool) -> None:
    """Refuse to write where something would be lost."""
    if source.is_local and Path(source.root).resolve().is_relative_to(out):
        raise ValueError(f"{out} is or contains the source; choose another directory.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{out} exists and is not empty; --overwrite replaces it.")
    if not (out / "config.json").is_file():
        raise ValueError(f"{out} holds no config.json: it is not a model repository and is not replaced.")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, which takes its place when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        yield new
        if out.exists():
            out.rename(Path(temporary) / "old")
        new.rename(out)


def push(directory: Path, repo_id: str) -> None:
    """Upload a directory to the Hub."""
    api = HfApi()
    url = api.create_repo(repo_id, exist_ok=True)
    api.upload_folder(folder_path=directory, repo_id=url.repo_id, commit_message="Upload OpenVLA checkpoint")
    print(f"{url}: pushed")


# The command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="directory, native .pt file, or Hub id")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload OUT to this Hub repository")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a model repository")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a SOURCE on the Hub")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of the weights written; default: bfloat16 for native checkpoints, else as they are",
    )
    parser.add_argument("--max_shard_size", default="5GB")
    native = parser.add_argument_group("native checkpoints")
    native.add_argument("--tokenizer", metavar="DIR_OR_ID", help="tokenizer of the language model")
    native.add_argument("--vision_weights", metavar="FILE", nargs="+", default=(), help="timm's, one file per tower")
    native.add_argument("--vision_backbone_id", help="instead of what the run's config.json names")
    native.add_argument("--llm_backbone_id", help="instead of what the run's config.json names")
    native.add_argument(
        "--rms_norm_eps",
        type=float,
        default=NativeOptions.rms_norm_eps,
        help="of the language model; default: %(default)s, as published; native training used 1e-5",
    )
    native.add_argument("--config", type=Path, metavar="FILE", help="JSON with fields of OpenVLAConfig to override")
    oft = parser.add_argument_group("checkpoints of OpenVLA-OFT")
    oft.add_argument("--platform", choices=tuple(PLATFORMS), help="whose chunk length and normalisation to take")
    oft.add_argument("--num_images", type=int, metavar="N", help="camera images per observation")
    oft.add_argument("--chunk_size", type=int, metavar="K", help="actions per prediction")
    oft.add_argument("--norm_type", choices=("bounds_q99", "bounds", "normal"), help="how actions were scaled")
    oft.add_argument("--no_stop_token", action="store_true", help="no end-of-sequence token behind the actions")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error becomes one line and exit status 1."""
    options = parse_arguments(arguments)
    try:
        native = NativeOptions(
            tokenizer=options.tokenizer,
            vision_weights=options.vision_weights,
            vision_backbone_id=options.vision_backbone_id,
            llm_backbone_id=options.llm_backbone_id,
            rms_norm_eps=options.rms_norm_eps,
            overrides={} if options.config is None else read_object(options.config),
        )
        convert(
            options.source,
            options.out,
            revision=options.revision,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            repo_id=options.push_to_hub,
            native=native,
            oft=OFTOptions(
                platform=options.platform,
                num_images=options.num_images,
                chunk_size=options.chunk_size,
                norm_type=options.norm_type,
                stop_token=not options.no_stop_token,
            ),
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
