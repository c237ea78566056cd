# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Train the tokenizer of the small policy: a byte-fallback BPE over robot instructions, laid out like Llama's.

    python tools/train_tokenizer.py [--output_dir DIR] [--vocab_size N]

writes `tokenizer.json` and `tokenizer_config.json`. With V the size of the base vocabulary (1024 by default), the
ids are:

    0, 1, 2         <unk>, <s>, </s>
    3 .. 258        <0x00> .. <0xFF>, the bytes that spell every character without a piece of its own
    259 .. V-257    the pieces: "!" .. "~", then "▁" (a space), then the learned ones in the order of their merges
    V-256 .. V-1    <action_255> .. <action_0>
    V               <PAD>, the only id outside the base vocabulary

`<action_n>` has id V - 1 - n. OpenVLA numbers the bins of an action from 1 (`numpy.digitize`) and sends bin d to id
V - d, so n = d - 1: it is the bin counted from 0, and `<action_0>` holds the lowest actions. No merge builds these
tokens and they are not added tokens, hence no text reaches them: "<action_7>" in a prompt is ordinary characters.

The files depend on nothing but this script: the corpus comes from the grammar below and a fixed seed.
"""

import argparse
import json
import random
import re
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers


UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<PAD>"
SPACE = "▁"
NUM_ACTIONS = 256
DEFAULT_VOCAB_SIZE = 1024
MAX_LENGTH = 2048

SEED = 0
NUM_INSTRUCTIONS = 24_000

PLAIN_PROMPT = "In: What action should the robot take to {}?\nOut:"
CHAT_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What action should the robot take to {}? ASSISTANT:"
)
# About the smallest share of chat prompts that leaves each of their words in one piece. More of them would only put
# their long words before the words of the instructions.
CHAT_PROMPT_EVERY = 32

# What training may merge: a run of letters with the space before it. Everything else (digits, punctuation, newline)
# stays a character or a byte. As no piece then has a space anywhere but in front, merging over a whole text gives the
# same result as merging word by word, and the tokenizer needs no pre-tokenizer.
WORD = re.compile(f"{SPACE}?[A-Za-z]+")

# Each symbol stands for one of its wordings, and {name} in a wording for the symbol of that name.
GRAMMAR = MappingProxyType(
    {
        "instruction": (
            "{task}",
            "{task}",
            "{task}",
            "{task}",
            "{task} {adverb}",
            "{adverb} {task}",
            "{task} and {task}",
            "{task}, then {task}",
        ),
        "task": (
            "{grasp} {thing}",
            "{grasp} {thing} from {place}",
            "{grasp} {thing} and {put} it {goal}",
            "{put} {thing} {goal}",
            "{put} {thing} {goal}",
            "{put} {thing} {goal}",
            "{move} {thing} {direction}",
            "{move} {thing} {goal}",
            "{move} {thing} {relation} {landmark}",
            "{rotate} {thing} {turn}",
            "{operate} {furniture}",
            "{put} {thing} in {furniture}",
            "{switch} the {appliance}",
            "stack {thing} on top of {thing}",
            "{household}",
        ),
        "household": (
            "wipe {place} with the {cleaner}",
            "clean {place} with the {cleaner}",
            "sweep {thing} into {container}",
            "fold the {cloth} in half",
            "unfold the {cloth}",
            "pour the {food} into {container}",
            "stir the pot with the {tool}",
            "cover {container} with the lid",
            "remove the lid from {container}",
            "press the {colour} button",
            "touch {thing} with the gripper",
            "knock {thing} over",
            "sort the {shape}s by colour",
            "throw {thing} away",
            "move the arm {direction}",
            "open the gripper",
            "close the gripper",
        ),
        "grasp": ("pick up", "pick up", "pick up", "grasp", "grab", "lift", "take", "hold", "get"),
        "put": ("put", "put", "place", "place", "set", "drop", "lay"),
        "move": ("move", "move", "push", "push", "pull", "slide", "drag", "bring"),
        "rotate": ("rotate", "rotate", "turn", "flip", "tilt"),
        "turn": ("clockwise", "to the left", "to the right", "upright", "upside down", "by {angle} degrees"),
        "angle": ("30", "45", "90", "180"),
        "operate": ("open", "open", "close", "close", "shut"),
        "switch": ("turn on", "turn off"),
        "adverb": ("slowly", "gently", "carefully"),
        "thing": (
            "the {object}",
            "the {object}",
            "the {object}",
            "the {shape}",
            "the {colour} {object}",
            "the {colour} {shape}",
            "the {colour} {shape}",
            "the {size} {object}",
            "the {size} {colour} {shape}",
            "the {object} {relation} {landmark}",
            "{object}",
        ),
        "colour": (
            "red",
            "green",
            "blue",
            "yellow",
            "orange",
            "purple",
            "pink",
            "brown",
            "black",
            "white",
            "gray",
        ),
        "size": ("small", "large", "big", "tall", "long"),
        "shape": ("cube", "cube", "block", "block", "cylinder", "ball", "cone", "ring", "star"),
        "object": ("{dish}", "{dish}", "{food}", "{food}", "{food}", "{tool}", "{item}", "{item}", "{cloth}"),
        "dish": ("cup", "mug", "bowl", "plate", "pan", "pot", "bottle", "can", "jar", "lid", "kettle"),
        "food": (
            "apple",
            "banana",
            "carrot",
            "corn",
            "potato",
            "tomato",
            "lemon",
            "eggplant",
            "mushroom",
            "bread",
            "egg",
            "cheese",
            "butter",
            "milk",
            "soup",
            "rice",
        ),
        "tool": ("spoon", "fork", "knife", "spatula", "whisk", "hammer"),
        "item": ("toy", "book", "pen", "box", "bag", "key", "phone", "paper", "tape", "brush", "shoe", "object"),
        "cloth": ("towel", "cloth", "shirt", "napkin"),
        "cleaner": ("sponge", "cloth", "towel", "brush"),
        "goal": (
            "in {container}",
            "into {container}",
            "on {place}",
            "on {place}",
            "onto {place}",
            "on top of {landmark}",
            "{relation} {landmark}",
            "{relation} {landmark}",
            "{relation} {landmark}",
            "between {landmark} and {landmark}",
        ),
        "relation": (
            "near",
            "next to",
            "beside",
            "behind",
            "in front of",
            "under",
            "above",
            "inside",
            "on",
            "in",
            "to the left of",
            "to the right of",
            "away from",
            "over",
        ),
        "landmark": ("the {object}", "the {colour} {shape}", "{container}", "{place}", "the {furniture_name}"),
        "container": (
            "the {dish}",
            "the {dish}",
            "the box",
            "the basket",
            "the bin",
            "the sink",
            "the tray",
            "the drawer",
            "the {colour} bowl",
        ),
        "place": (
            "the table",
            "the table",
            "the counter",
            "the plate",
            "the shelf",
            "the stove",
            "the {colour} {cloth}",
            "the {colour} plate",
            "the {side} of the table",
        ),
        "side": ("left side", "right side", "edge", "corner", "center", "middle", "front", "back"),
        "direction": (
            "to the left",
            "to the left",
            "to the right",
            "to the right",
            "left",
            "right",
            "forward",
            "backward",
            "up",
            "down",
            "toward the robot",
            "to the {side} of the table",
            "across the table",
        ),
        "furniture": ("the {furniture_name}", "the {level} drawer", "the {level} drawer of the cabinet"),
        "furniture_name": ("drawer", "drawer", "cabinet", "microwave", "fridge", "oven", "door"),
        "level": ("top", "middle", "bottom", "left", "right"),
        "appliance": ("stove", "oven", "faucet", "light", "microwave"),
    }
)


def byte_tokens() -> list[str]:
    """The tokens of the 256 bytes, in the spelling that byte fallback looks up."""
    return [f"<0x{byte:02X}>" for byte in range(256)]


def action_tokens() -> list[str]:
    """The action tokens in the order of their ids: the highest bin comes first."""
    return [f"<action_{bin_index}>" for bin_index in reversed(range(NUM_ACTIONS))]


def alphabet() -> list[str]:
    """The characters that are pieces whether or not the corpus has them."""
    return [*string.ascii_letters, *string.digits, *string.punctuation, SPACE]


def expand(symbol: str, rng: random.Random) -> str:
    """A random sentence of the grammar from `symbol` on."""
    wordings = GRAMMAR[symbol]
    # Of the methods of `Random` only `random()` promises the same sequence in every version of Python.
    wording = wordings[int(rng.random() * len(wordings))]
    return re.sub(r"\{(\w+)\}", lambda match: expand(match[1], rng), wording)


def corpus(count: int = NUM_INSTRUCTIONS, seed: int = SEED) -> Iterator[str]:
    """Yield `count` robot instructions, each in one of the two prompts."""
    rng = random.Random(seed)
    for index in range(count):
        prompt = PLAIN_PROMPT if index % CHAT_PROMPT_EVERY else CHAT_PROMPT
        yield prompt.format(expand("instruction", rng))


def words(texts: Iterable[str]) -> Iterator[str]:
    """Yield the words of normalized texts, each with the space in front of it."""
    for text in texts:
        yield from WORD.findall(SPACE + text.replace(" ", SPACE))


def learn_pieces(texts: Iterable[str], num_pieces: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Train BPE on `texts`; return the pieces (characters first) and the merges in order of rank."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=num_pieces, initial_alphabet=alphabet(), show_progress=False)
    tokenizer.train_from_iterator(words(texts), trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) != num_pieces:
        raise ValueError(f"{num_pieces} pieces asked for, but the corpus gives {len(vocabulary)}")
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return sorted(vocabulary, key=vocabulary.__getitem__), [(left, right) for left, right in merges]


def build_model(vocab_size: int) -> models.BPE:
    """Train the pieces and number the base vocabulary of `vocab_size` tokens."""
    head, tail = [UNK, BOS, EOS, *byte_tokens()], action_tokens()
    num_pieces = vocab_size - len(head) - len(tail)
    if num_pieces < len(alphabet()):
        raise ValueError(f"the vocabulary needs at least {len(head) + len(alphabet()) + len(tail)} tokens")
    pieces, merges = learn_pieces(corpus(), num_pieces)
    vocabulary = {token: index for index, token in enumerate([*head, *pieces, *tail])}
    return models.BPE(vocab=vocabulary, merges=merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)


def build_tokenizer(vocab_size: int = DEFAULT_VOCAB_SIZE) -> Tokenizer:
    """Train the tokenizer with a base vocabulary of `vocab_size` tokens."""
    tokenizer = Tokenizer(build_model(vocab_size))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )
    # <PAD> is not in the model's vocabulary, so it gets the next free id; the other three keep theirs.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (UNK, BOS, EOS, PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """The settings that transformers reads beside `tokenizer.json`."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in (UNK, BOS, EOS, PAD)}
    return {
        "added_tokens_decoder": added,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
        "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": UNK,
    }


def write_text(path: Path, text: str) -> None:
    """Write `text` with the same bytes on every platform."""
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline="\n")


def save(tokenizer: Tokenizer, output_dir: Path) -> None:
    """Write the two files of the tokenizer to `output_dir`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(output_dir / "tokenizer_config.json", json.dumps(tokenizer_config(tokenizer), indent=2))


def summary(tokenizer: Tokenizer) -> str:
    """A few lines about the layout and the cost of a prompt."""
    base, action = tokenizer.get_vocab_size(with_added_tokens=False), action_tokens()
    ids = {name: tokenizer.token_to_id(token) for name, token in (("first", action[0]), ("last", action[-1]))}
    lines = [
        f"base vocabulary: {base}, with added tokens: {tokenizer.get_vocab_size()}",
        f"actions: {ids['first']}..{ids['last']}, {PAD}: {tokenizer.token_to_id(PAD)}, "
        f"{SPACE}: {tokenizer.token_to_id(SPACE)}",
    ]
    for prompt in (PLAIN_PROMPT, CHAT_PROMPT):
        tokens = tokenizer.encode(prompt.format("pick up the red cube")).tokens
        lines.append(f"{len(tokens)} tokens: {' '.join(tokens)}")
    return "\n".join(lines)


def main() -> None:
    """Command line: train the tokenizer and write its files."""
    parser = argparse.ArgumentParser(description="Train the tokenizer of the small policy.")
    repository = Path(__file__).resolve().parent.parent
    parser.add_argument("--output_dir", type=Path, default=repository, help="default: the root of the repository")
    parser.add_argument("--vocab_size", type=int, default=DEFAULT_VOCAB_SIZE, help="tokens without <PAD>")
    arguments = parser.parse_args()
    try:
        tokenizer = build_tokenizer(arguments.vocab_size)
    except ValueError as error:
        parser.error(str(error))
    save(tokenizer, arguments.output_dir)
    print(summary(tokenizer))


if __name__ == "__main__":
    main()
