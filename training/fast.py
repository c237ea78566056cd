"""The FAST tokenizer that a policy learns to speak with: read from where it was saved, or fitted."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from convert_checkpoint import Source
from load_policy import repository_class
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedModel

from robot_data.mixture import Part

from .arguments import DataArguments, ModelArguments
from .data import sample_chunks
from .processes import in_main_process


logger = logging.getLogger(__name__)

# A tokenizer is fitted on so many chunks at most. Of 25 actions of 14 numbers they take about ten seconds of one core.
MAX_CHUNKS = 10_000
# What a policy's configuration says of a tokenizer that is still to be fitted: the scale of the published one
# (https://arxiv.org/abs/2501.09747), and the vocabulary that its `fit` has by default.
UNFITTED = {"fast_scale": 10.0, "fast_min_token": 0, "fast_vocab_size": 1024}
# A tokenizer's file, and what its scale and offset are called in the processor_config.json beside it.
_LAYOUTS = (
    ("fast_tokenizer.json", ("fast_scale", "fast_min_token")),
    ("tokenizer.json", ("scale", "min_token")),
)


def check_fast_arguments(arguments: ModelArguments, config: PretrainedConfig) -> None:
    """
    Refuse flags of a FAST tokenizer that mean nothing.

    Args:
        arguments ([`ModelArguments`]): As given.
        config (`PretrainedConfig`): Of the policy, as it was saved.

    Raises:
        ValueError: Saying which flag is in the way of what.
    """
    names = ("fast_tokenizer", "fast_scale", "fast_vocab_size")
    given = [f"--{name} {value}" for name in names if (value := getattr(arguments, name)) is not None]
    head_type = arguments.head_type or config.head_type
    if given and head_type != "fast":
        raise ValueError(
            f"{', '.join(given)} is for policies that speak in FAST tokens, not for {head_type!r}: add --head_type "
            "fast, or leave it out."
        )
    if len(given) > 1 and arguments.fast_tokenizer is not None:
        raise ValueError(f"{given[0]} has a scale and a vocabulary of its own: leave out {', '.join(given[1:])}.")
    if given and arguments.fast_tokenizer is None and config.head_type == "fast":
        raise ValueError(
            f"{', '.join(given)} is for fitting a FAST tokenizer, and {arguments.model_name_or_path} has learned to "
            "speak with its own: leave it out, or start from another policy."
        )


def read_fast_tokenizer(location: str) -> Any:
    """
    The [`FastTokenizer`] of a directory or a Hub repository: of a policy of ours or a checkpoint of its training, with
    `fast_tokenizer.json`, or as published (`physical-intelligence/fast`), with `tokenizer.json`.

    Args:
        location (`str`): Directory or Hub id.

    Raises:
        FileNotFoundError: If there is no such directory.
        ValueError: If it, or the repository, has no FAST tokenizer.
    """
    source = Source.locate(location, "main")
    settings = source.read_json("processor_config.json") or {}
    for filename, (scale, min_token) in _LAYOUTS:
        if source.fetch(filename) is not None and None not in (settings.get(scale), settings.get(min_token)):
            return repository_class("FastTokenizer").load(
                source.root, settings[scale], settings[min_token], filename, revision=source.revision
            )
    expected = " or ".join(f"{name} with {list(fields)}" for name, fields in _LAYOUTS)
    raise ValueError(
        f"{location} has no FAST tokenizer, or cannot be reached: {expected} in processor_config.json were expected."
    )


def find_fast_tokenizer(arguments: ModelArguments, checkpoint: Path | None) -> Any | None:
    """
    The [`FastTokenizer`] of the run that is resumed, or the given one; None where there is neither.

    Raises:
        ValueError: If the run that is resumed speaks with another one than is asked for.
    """
    given = None if arguments.fast_tokenizer is None else read_fast_tokenizer(arguments.fast_tokenizer)
    if checkpoint is None:
        return given
    found = read_fast_tokenizer(str(checkpoint))
    if given is not None and (given.bpe.to_str(), given.config_fields) != (found.bpe.to_str(), found.config_fields):
        raise ValueError(f"{checkpoint} has another tokenizer than --fast_tokenizer {arguments.fast_tokenizer}.")
    if arguments.fast_scale not in (None, found.scale):
        raise ValueError(f"{checkpoint} goes on with --fast_scale {found.scale:g}, got {arguments.fast_scale:g}.")
    return found


def choose_fast_tokenizer(
    processor: Any,
    config: PretrainedConfig,
    known: Any | None,
    parts: Sequence[Part],
    arguments: DataArguments,
    seed: int,
) -> Any:
    """
    The [`FastTokenizer`] to speak with: the known one, or one that the main process fits on normalised chunks of the
    training episodes, at most `MAX_CHUNKS`. The log says what it makes of these chunks.

    Args:
        processor: Of the policy, with the statistics that are trained with.
        config (`PretrainedConfig`): Of the policy; of a tokenizer that is fitted it tells the scale, and how many
            tokens there may be.
        known ([`FastTokenizer`], *optional*): Given, or the policy's own.
        parts (`Sequence[Part]`), arguments ([`DataArguments`]), seed (`int`): As for [`sample_chunks`].

    Raises:
        ValueError: If the known one cannot spell every chunk of this length, or the vocabulary of one that is fitted
            is too small for its scale.
    """

    def choose() -> dict[str, Any]:
        if known is not None:
            check_reach(known, config.chunk_size)
        chunks, names = sample_chunks(
            parts, processor.norm_stats, arguments, chunk_size=config.chunk_size, limit=MAX_CHUNKS, seed=seed
        )
        chosen = known
        if known is None:
            chosen = processor.fit_fast_tokenizer(chunks, names, config.fast_scale, config.fast_vocab_size)
        told = describe(chosen, processor.normalize_actions(chunks, names))
        logger.info("FAST tokenizer, %s: %s", "fitted" if known is None else "as it was saved", told)
        return {"text": chosen.bpe.to_str(), "scale": chosen.scale, "min_token": chosen.min_token}

    # Other processes may know the class under another name, and get what it is made of.
    made_of = in_main_process("Choosing the FAST tokenizer", choose)
    bpe = Tokenizer.from_str(made_of["text"])
    return repository_class("FastTokenizer")(bpe, made_of["scale"], made_of["min_token"])


def set_fast_tokenizer(model: PreTrainedModel, processor: Any, tokenizer: Any) -> None:
    """Let model and processor speak with a [`FastTokenizer`], which may have fewer tokens than were allowed."""
    for name, value in tokenizer.config_fields.items():
        setattr(model.config, name, value)
    model.fast_tokenizer = processor.fast_tokenizer = tokenizer


def check_reach(tokenizer: Any, chunk_size: int) -> None:
    """
    Raises:
        ValueError: If there are chunks of this length that the tokenizer cannot spell.
    """
    # No row of the transform gives more than the first one gives of ones.
    tokenizer.encode(np.stack([np.full((chunk_size, 1), value) for value in (-1.0, 1.0)]))


def describe(tokenizer: Any, normalized: np.ndarray) -> str:
    """
    What a tokenizer makes of chunks, in a line.

    Args:
        tokenizer ([`FastTokenizer`]): With `encode` and `decode`.
        normalized (`np.ndarray`): (N, K, D).
    """
    rows = tokenizer.encode(normalized)
    lengths = [len(row) for row in rows]
    error = tokenizer.decode(rows, *normalized.shape[1:]) - np.clip(normalized, -1, 1)
    return (
        f"scale {tokenizer.scale:g}, {tokenizer.vocab_size} tokens; on {len(rows)} chunks of {normalized.shape[1]} "
        f"actions {sum(lengths) / (len(rows) * normalized.shape[1]):.2f} tokens per action, {max(lengths)} for the "
        f"longest chunk; error {np.sqrt((error**2).mean()):.4f} RMS, {np.abs(error).max():.3f} at most, of [-1, 1]"
    )
