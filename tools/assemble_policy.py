"""
Assemble a policy to train from pretrained parts: a language model, vision towers, and a new projector between them.

    python tools/assemble_policy.py HuggingFaceTB/SmolLM2-360M OUT

LANGUAGE_MODEL is a causal language model in the Hugging Face format with its tokenizer: a directory or a Hub id. The
towers are those of a published vision backbone, --vision_backbone_id; their weights come from timm's repositories on
the Hub, or from --vision_weights, one file, directory or Hub id per tower. OUT is a complete repository that
`train_hf.py --model_name_or_path OUT` starts from. The projector is random: until it is trained, the policy cannot
see, and it knows no robot.

The prompt is made as for the published models. The action tokens are the last 256 of the vocabulary in front of its
special tokens. The image stands behind the first token: where a tokenizer puts no special token in front of a text,
its BOS is added there, or, where it has none, the token that ends a text. A tokenizer without a padding token of its
own gets <PAD>. Rows for <PAD> and the image's placeholder are added to the embedding only where it has none to spare.

To start from a whole Prismatic VLM, whose projector is trained, use tools/convert_checkpoint.py instead.
"""

import argparse
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from convert_checkpoint import Source, check_target, push, read_object, replacing
from huggingface_hub import ModelCard
from load_policy import load_policy, repository_class
from model_card import model_card, read_card
from native_checkpoint import (
    build_model,
    load_tokenizer,
    load_vision_weights,
    make_processor,
    preview,
    raise_on_difference,
)
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    set_seed,
)


DEFAULT_VISION_BACKBONE = "dinosiglip-vit-so-224px"
# Where the Hub has a tower's weights, if not in the repository that is named like the tower.
VISION_REPOSITORIES = {
    "vit_so400m_patch14_siglip_224": "timm/ViT-SO400M-14-SigLIP",
    "vit_so400m_patch14_siglip_384": "timm/ViT-SO400M-14-SigLIP-384",
}
VISION_FILES = (
    *("model.safetensors", "open_clip_model.safetensors"),
    *("pytorch_model.bin", "open_clip_pytorch_model.bin"),
)
PAD_TO_MULTIPLE_OF = 64
EXAMPLE = "pick up the red block"


def assemble(
    language_model: str | Path,
    out: str | Path,
    *,
    vision_backbone_id: str = DEFAULT_VISION_BACKBONE,
    vision_weights: Sequence[str | Path] = (),
    dtype: str = "auto",
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    repo_id: str | None = None,
) -> None:
    """
    Write a complete repository.

    Args:
        language_model (`str` or `Path`): Directory or Hub id of a causal language model with its tokenizer.
        out (`str` or `Path`): Directory to write. It appears whole, or not at all.
        vision_backbone_id (`str`, defaults to `"dinosiglip-vit-so-224px"`): A published vision backbone.
        vision_weights (`Sequence[str]`): timm's weights, a file, directory or Hub id for each tower, in their order.
            Default: those on the Hub.
        dtype (`str`, defaults to `"auto"`): Of the weights written; `"auto"`: that of the language model, whose
            weights stay as they are to the bit.
        seed (`int`, defaults to 0): Of the projector, and of rows that are added to the embedding.
        overrides (`Mapping`, *optional*): Fields of `OpenVLAConfig` other than those of the language model.
        max_shard_size (`str`, defaults to `"5GB"`): Of a weights file.
        overwrite (`bool`, defaults to `False`): Replace `out`, if it is a repository.
        repo_id (`str`, *optional*): Hub repository to push `out` to; it is created where need be.

    Raises:
        FileNotFoundError: If a part, or a file of it, does not exist.
        ValueError: If `out` is in the way, or the parts make no policy.
    """
    out, source = Path(out).resolve(), Source.locate(str(language_model), "main")
    fields = {"vision_backbone_id": vision_backbone_id, **(overrides or {})}
    check_fields(fields)
    towers = locate_towers(fields["vision_backbone_id"], vision_weights)
    for part in (source, *towers):
        check_target(out, part, overwrite)

    set_seed(seed)
    text_model = load_language_model(source, dtype)
    tokenizer = load_tokenizer(source.root, None)
    start_with_special_token(tokenizer)
    make_room(text_model, tokenizer)
    config = make_config(fields, text_model.config, tokenizer)
    processor = make_processor(config, tokenizer, rounded=False)
    check_prompt(processor, config)
    files = [str(vision_file(tower)) for tower in towers]
    tensors = load_vision_weights(files, config) | make_projector(config)
    tensors |= {f"language_model.{name}": tensor for name, tensor in text_model.state_dict().items()}
    model = build_model(config, tensors, text_model.dtype)
    model.language_model.tie_weights()  # loading parts them
    model.config.text_config.dtype = model.dtype  # transformers 5 notes that of the model without weights

    with replacing(out) as directory:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
        processor.save_pretrained(directory)
        check_repository(directory, text_model)
        card = assembled_card(repo_id or out.name, source, dict(zip(config.timm_model_ids, towers, strict=True)))
        (directory / "README.md").write_text(card, encoding="utf-8")
    print(f"{out}: written, {model.num_parameters():,} parameters in {model.dtype}, the projector's random")
    if repo_id is not None:
        push(out, repo_id)


# The parts


def check_fields(fields: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: On fields that are not of the configuration, or follow from the language model.
    """
    known = inspect.signature(repository_class("OpenVLAConfig").__init__).parameters.keys()
    following = {"self", "kwargs", "llm_backbone_id", "text_config"}
    if unknown := sorted(fields.keys() - (known - following)):
        raise ValueError(
            f"{unknown} are not fields of OpenVLAConfig that can be set here; these are {sorted(known - following)}."
        )


def locate_towers(vision_backbone_id: str, weights: Sequence[str | Path]) -> list[Source]:
    """
    Where the weights of each tower are.

    Raises:
        ValueError: If there is no such vision backbone, or it has another number of towers.
    """
    names = repository_class("OpenVLAConfig")(vision_backbone_id=vision_backbone_id).timm_model_ids
    weights = weights or [VISION_REPOSITORIES.get(name, f"timm/{name}") for name in names]
    if len(weights) != len(names):
        raise ValueError(
            f"{vision_backbone_id} has {len(names)} towers, and weights for {len(weights)} were given: pass one file, "
            f"directory or Hub id for each of {', '.join(names)}, in this order."
        )
    return [Source.locate(str(each), "main") for each in weights]


def vision_file(source: Source) -> Path:
    """
    The file with a tower's weights.

    Raises:
        FileNotFoundError: If there is none; lists what was looked for.
    """
    names = VISION_FILES if source.checkpoint is None else (source.checkpoint,)
    path = next((path for path in map(source.fetch, names) if path is not None), None)
    if path is None:
        raise FileNotFoundError(f"{source.root} has no weights of a vision tower: none of {', '.join(names)}.")
    return path


def load_language_model(source: Source, dtype: str) -> PreTrainedModel:
    """
    The language model, with every tensor that it has and no others.

    Raises:
        ValueError: If it is quantised, needs code of its own, lacks tensors, or cannot be driven by embeddings.
    """
    config = AutoConfig.from_pretrained(source.root, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{source.root} is quantised, and a policy is trained in full precision: give the original.")
    # Not by `model.to(dtype)`, which would round the frequencies of the positions as well.
    model, info = AutoModelForCausalLM.from_pretrained(
        source.root,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        trust_remote_code=False,
        output_loading_info=True,
    )
    raise_on_difference(
        missing=info["missing_keys"],
        surplus=info["unexpected_keys"],
        misshapen=[str(each) for each in info["mismatched_keys"]],
    )
    # Where transformers 4.57 and 5 both look for it; other names only one of them knows.
    if getattr(model, "model", None) is None or model.get_decoder() is not model.model:
        raise ValueError(
            f"{source.root} is a {type(model).__name__}, which keeps its decoder elsewhere than in `model`, where "
            "Llama, SmolLM, Qwen, Mistral, Phi and their like have it; a policy cannot drive it."
        )
    return model.eval()


def start_with_special_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Let every text begin with a special token, behind which the image stands: BOS, or what ends a text.

    Raises:
        ValueError: If the tokenizer has neither, or no token that ends an action.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token, which ends an action.")
    first = tokenizer("In:")["input_ids"][0]
    if first in tokenizer.all_special_ids:
        return
    start = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.bos_token = start
    token_id, backend = tokenizer.bos_token_id, tokenizer.backend_tokenizer
    template = processors.TemplateProcessing(
        single=[start, "$A"], pair=[start, "$A", "$B:1"], special_tokens=[(start, token_id)]
    )
    own = backend.post_processor
    backend.post_processor = template if own is None else processors.Sequence([own, template])
    print(f"texts begin with {start} (id {token_id}), which the tokenizer alone does not put there")


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Add rows to the embedding where there are none for a padding token that was added, and for the image's placeholder.

    Raises:
        ValueError: If the tokenizer is not the model's.
    """
    rows = model.get_input_embeddings().num_embeddings
    used = max(tokenizer.get_vocab().values()) + 1
    added = int(tokenizer.pad_token_id == used - 1)
    if used - added > rows:
        raise ValueError(
            f"The tokenizer's ids go up to {used - added - 1}, and the language model has {rows} embeddings: it "
            "belongs to another language model."
        )
    if used < rows:
        return
    padded = math.ceil((used + 1) / PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF
    model.resize_token_embeddings(padded)
    print(f"{padded - rows} rows added to the {rows} of the embedding")


def make_config(
    fields: Mapping[str, Any], text_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> PretrainedConfig:
    """
    The policy's configuration, with `text_config` changed and part of it.

    Raises:
        ValueError: If special tokens would be actions.
    """
    text_config._name_or_path = ""  # would tell a local path
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text_config, name, getattr(tokenizer, name))
    closing = tokenizer.convert_tokens_to_ids("▁")
    found = {
        "text_config": text_config,
        "pad_token_id": tokenizer.pad_token_id,
        "pad_to_multiple_of": PAD_TO_MULTIPLE_OF,
        "action_token_end": end_of_text_tokens(tokenizer),
        "closing_token_id": None if closing == tokenizer.unk_token_id else closing,
        "llm_max_length": min(2048, getattr(text_config, "max_position_embeddings", 2048)),
    }
    config = repository_class("OpenVLAConfig")(**(found | {"llm_backbone_id": None} | dict(fields)))
    special, action_tokens = special_ids(tokenizer), range(config.action_token_begin, config.action_token_end)
    if taken := [tokenizer.convert_ids_to_tokens(each) for each in action_tokens if each in special]:
        raise ValueError(
            f"The {config.n_action_bins} tokens before id {config.action_token_end} are to be actions, and the "
            f"tokenizer's special tokens {preview(taken)} are among them; set `action_token_end` with --config."
        )
    tokenizer.model_max_length = config.llm_max_length
    return config


def end_of_text_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """One past the last token of the vocabulary that is not a special one."""
    return max(set(tokenizer.get_vocab().values()) - special_ids(tokenizer)) + 1


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Special tokens, and others that were added to the vocabulary."""
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def check_prompt(processor: ProcessorMixin, config: PretrainedConfig) -> None:
    """
    Raises:
        ValueError: If the tokenizer does not keep the prompt, spells it with action tokens, or the language model
            cannot read that far.
    """
    tokenizer, prompt = processor.tokenizer, processor.render_prompt(EXAMPLE)
    token_ids = processor(instruction=EXAMPLE)["input_ids"][0].tolist()
    read = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    end = token_ids[-1] if config.closing_token_id is None else token_ids[-2]
    if read.strip() != prompt or end in tokenizer.all_special_ids:
        kept = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
        raise ValueError(f"The tokenizer does not keep the prompt {prompt!r}, but makes {kept!r} of it.")
    action_tokens = range(config.action_token_begin, config.action_token_end)
    if spoken := [tokenizer.convert_ids_to_tokens(each) for each in token_ids if each in action_tokens]:
        raise ValueError(
            f"The vocabulary is too small: the last {config.n_action_bins} of its {config.action_token_end} tokens "
            f"are to be actions, and {preview(spoken)} of them spell the prompt."
        )
    longest = getattr(config.text_config, "max_position_embeddings", None)
    length = len(token_ids) + config.num_image_tokens
    if longest is not None and length >= longest:
        raise ValueError(
            f"The language model reads {longest} tokens, and an image with a short prompt has {length}: choose "
            "another one, or a vision backbone with fewer patches."
        )


def make_projector(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The tensors of a random projector, as the model initialises it."""
    with torch.device("meta"):
        model = repository_class("OpenVLAForActionPrediction")(config)
    projector = model.projector.to_empty(device="cpu").apply(model._init_weights)
    return {f"projector.{name}": tensor for name, tensor in projector.state_dict().items()}


def check_repository(directory: Path, text_model: PreTrainedModel) -> None:
    """
    Open what was written, and compare its logits for a text with those of the language model by itself.

    Raises:
        ValueError: If they differ.
    """
    policy, processor = load_policy(directory)
    token_ids = processor(instruction=EXAMPLE)["input_ids"]
    with torch.no_grad():
        expected = text_model(input_ids=token_ids).logits.float()
        logits = policy(input_ids=token_ids).logits.float()
    # A wide margin for the order of sums; caps and scales, of Gemma 2 or Granite, are far beyond it.
    error = (logits - expected).abs().max() / expected.abs().max()
    if not error <= 1e-2:
        raise ValueError(
            f"In the policy the logits of {type(text_model).__name__} differ by {error:.1%} from its own: it does "
            "more to them than its output layer (a cap or a scale), which a policy leaves out."
        )


# The card


def assembled_card(repo_id: str, language_model: Source, towers: Mapping[str, Source]) -> str:
    """Text of a README.md that tells the parts and their licences."""
    parts = {"language model and tokenizer": language_model} | {
        f"vision tower `{name}`": source for name, source in towers.items()
    }
    licences = {name: read_licence(source) for name, source in parts.items()}
    rows = [f"| {name} | {source.described} | {licences[name]} |" for name, source in parts.items()]
    origin = (
        "Assembled from pretrained parts. The projector between them is random: this is a start for training, and not "
        "of use before.\n\n| Part | Source | Licence |\n| --- | --- | --- |\n" + "\n".join(rows)
    )
    card = ModelCard(model_card(repo_id, origin))
    card.data.base_model = [source.root for source in parts.values() if not source.is_local] or None
    if set(licences.values()) == {"apache-2.0"}:  # what the code has as well
        card.data.license = "apache-2.0"
    return str(card)


def read_licence(source: Source) -> str:
    """What the card of a part says of its licence."""
    path = source.fetch("README.md")
    metadata = {} if path is None else read_card(path)[0]
    names = [metadata[name] for name in ("license", "license_name") if metadata.get(name)]
    return ", ".join(map(str, names)) or "not stated"


# The command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language_model", help="directory or Hub id of a causal language model with its tokenizer")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--vision_backbone_id", default=DEFAULT_VISION_BACKBONE, help="default: %(default)s")
    parser.add_argument(
        "--vision_weights",
        metavar="SOURCE",
        nargs="+",
        default=(),
        help="timm's weights, one file, directory or Hub id per tower; default: those on the Hub",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of the weights written; default: that of the language model; float32 keeps the towers to the bit, too",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the projector and of new embeddings")
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with fields of OpenVLAConfig to override")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, if it is a model repository")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload OUT to this Hub repository")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error becomes one line and exit status 1."""
    options = parse_arguments(arguments)
    try:
        assemble(
            options.language_model,
            options.out,
            vision_backbone_id=options.vision_backbone_id,
            vision_weights=options.vision_weights,
            dtype=options.dtype,
            seed=options.seed,
            overrides={} if options.config is None else read_object(options.config),
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            repo_id=options.push_to_hub,
        )
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
