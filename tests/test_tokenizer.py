# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""The small policy's tokenizer: the layout of its ids, what text can reach, and the script that trains it."""

import json
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast


ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "train_tokenizer.py"
FILES = ("tokenizer.json", "tokenizer_config.json")

SPACE = "▁"
BASE_SIZE = 1024
FIRST_ACTION = BASE_SIZE - 256
FIRST_PIECE = 3 + 256
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<PAD>": BASE_SIZE}

PLAIN_PROMPT = "In: What action should the robot take to {}?\nOut:"
CHAT_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What action should the robot take to {}? ASSISTANT:"
)

# Words of the prompts and spellings of the tokens that text must not reach, between arbitrary characters.
FRAGMENTS = (
    *SPECIAL,
    *("<action_0>", "<action_7>", "<action_255>", "<action_", "<0x0A>", "<0xFF>"),
    *("In: ", "Out:", " ", "  ", "\n", SPACE, "red cube", "é", "日本", "👩‍🚀", "\0", "\ufeff", "\U0010ffff"),
)
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=8).map("".join)


@pytest.fixture(scope="module")
def raw() -> Tokenizer:
    """The tokenizer as the `tokenizers` library reads it, with special tokens in a text left as text."""
    tokenizer = Tokenizer.from_file(str(ROOT / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it from its two files alone."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return AutoTokenizer.from_pretrained(folder)


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the training script."""
    environment = {**os.environ, "PYTHONUTF8": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=False)


def test_sizes(raw: Tokenizer, fast: PreTrainedTokenizerFast) -> None:
    assert raw.get_vocab_size(with_added_tokens=False) == fast.vocab_size == BASE_SIZE
    assert raw.get_vocab_size() == len(fast) == BASE_SIZE + 1
    assert sorted(raw.get_vocab().values()) == list(range(BASE_SIZE + 1))


def test_special_tokens_and_bytes_have_the_ids_of_llama(raw: Tokenizer) -> None:
    assert {token: raw.token_to_id(token) for token in SPECIAL} == SPECIAL
    assert [raw.id_to_token(3 + byte) for byte in range(256)] == [f"<0x{byte:02X}>" for byte in range(256)]


def test_bin_d_of_openvla_has_id_v_minus_d(raw: Tokenizer) -> None:
    names = [raw.id_to_token(BASE_SIZE - bin_number) for bin_number in range(1, 257)]
    assert names == [f"<action_{bin_number - 1}>" for bin_number in range(1, 257)]
    assert raw.token_to_id("<action_255>") == FIRST_ACTION


def test_only_the_special_tokens_are_added(raw: Tokenizer) -> None:
    added = raw.get_added_tokens_decoder()
    assert {token.content: index for index, token in added.items()} == SPECIAL
    assert all(token.special and not token.normalized for token in added.values())


def test_merges_build_pieces_only(raw: Tokenizer) -> None:
    merges = json.loads(raw.to_str())["model"]["merges"]
    products = {raw.token_to_id(left + right) for left, right in merges}
    characters = {raw.token_to_id(character) for character in (*string.printable.strip(), SPACE)}
    assert products | characters == set(range(FIRST_PIECE, FIRST_ACTION))
    assert not products & characters


def test_pieces_have_a_space_only_in_front(raw: Tokenizer) -> None:
    # The reason why no pre-tokenizer is needed: no merge crosses the start of a word.
    pieces = [raw.id_to_token(index) for index in range(FIRST_PIECE, FIRST_ACTION)]
    assert not [piece for piece in pieces if SPACE in piece[1:]]
    assert not [piece for piece in pieces if len(piece) > 1 and not piece.lstrip(SPACE).isalpha()]
    assert raw.pre_tokenizer is None


@pytest.mark.parametrize("character", string.ascii_letters + string.digits + string.punctuation)
def test_common_characters_are_pieces(raw: Tokenizer, character: str) -> None:
    assert FIRST_PIECE <= raw.token_to_id(character) < FIRST_ACTION


@given(text=TEXTS)
@example(text=" ".join(FRAGMENTS))
@example(text="".join(f"<action_{bin_index}>" for bin_index in range(256)))
@settings(max_examples=300, deadline=None)
def test_text_reaches_no_action_and_no_special_token(raw: Tokenizer, text: str) -> None:
    ids = raw.encode(text, add_special_tokens=False).ids
    assert all(3 <= index < FIRST_ACTION for index in ids)


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_text_reaches_no_action_when_special_tokens_are_read(fast: PreTrainedTokenizerFast, text: str) -> None:
    assert not set(fast(text).input_ids) & set(range(FIRST_ACTION, BASE_SIZE))


@given(text=TEXTS)
@example(text=" ".join(FRAGMENTS))
@settings(max_examples=300, deadline=None)
def test_round_trip_of_any_text(raw: Tokenizer, text: str) -> None:
    # "▁" itself stands for a space, as in Llama's tokenizer, and comes back as one.
    assert raw.decode(raw.encode(text).ids) == text.replace(SPACE, " ")


@given(text=TEXTS)
@settings(max_examples=200, deadline=None)
def test_splitting_at_spaces_first_changes_nothing(raw: Tokenizer, text: str) -> None:
    spaces_apart = text.replace(SPACE, " ").split(" ")
    apart = [raw.encode(word, add_special_tokens=False).tokens or [SPACE] for word in spaces_apart]
    expected = [token for tokens in apart for token in tokens] if text else []
    assert raw.encode(text, add_special_tokens=False).tokens == expected


@pytest.mark.parametrize("text", ["In: x?\nOut:", "ASSISTANT:", "pick up", "  ", "é", "\n"])
def test_a_space_at_the_end_is_one_closing_token(raw: Tokenizer, text: str) -> None:
    # The token that OpenVLA puts after a prompt, whichever text comes before.
    assert raw.encode(text + " ").tokens == [*raw.encode(text).tokens, SPACE]


def test_plain_prompt(raw: Tokenizer) -> None:
    tokens = "<s> ▁In : ▁What ▁action ▁should ▁the ▁robot ▁take ▁to ▁pick ▁up ▁the ▁red ▁cube ? <0x0A> Out : ▁"
    assert raw.encode(PLAIN_PROMPT.format("pick up the red cube") + " ").tokens == tokens.split()


def test_chat_prompt_is_a_token_for_each_word_and_mark(raw: Tokenizer) -> None:
    text = CHAT_PROMPT.format("open the top drawer")
    words_and_marks = re.findall(r"\w+|[^\w\s]", text)
    assert [token.lstrip(SPACE) for token in raw.encode(text, add_special_tokens=False).tokens] == words_and_marks


@pytest.mark.parametrize(
    "instruction",
    ["pick up the red cube", "put the blue cylinder in the bowl", "push the green ball to the left"],
)
def test_common_instructions_are_a_token_a_word(raw: Tokenizer, instruction: str) -> None:
    assert len(raw.encode(instruction, add_special_tokens=False)) == len(instruction.split())


@pytest.mark.parametrize("literal", ["</s>", "<PAD>", "<s>", "<unk>"])
def test_split_special_tokens_keeps_literals_as_text(fast: PreTrainedTokenizerFast, literal: str) -> None:
    text = PLAIN_PROMPT.format(f"push {literal} away")
    ids = fast(text, split_special_tokens=True).input_ids
    assert not set(ids[1:]) & set(SPECIAL.values())
    assert fast.decode(ids, skip_special_tokens=True) == text
    assert SPECIAL[literal] in fast(text).input_ids[1:]


def test_settings_in_transformers(fast: PreTrainedTokenizerFast) -> None:
    assert (fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2)
    assert (fast.pad_token_id, fast.padding_side, fast.model_max_length) == (BASE_SIZE, "right", 2048)
    assert fast.model_input_names == ["input_ids", "attention_mask"]


def test_padding_is_on_the_right(fast: PreTrainedTokenizerFast) -> None:
    batch = fast(["red", "red cube"], padding=True)
    assert batch["input_ids"][0] == [*fast("red").input_ids, BASE_SIZE]
    assert batch["attention_mask"] == [[1, 1, 0], [1, 1, 1]]


@given(text=TEXTS)
@settings(max_examples=100, deadline=None)
def test_transformers_gives_the_ids_of_the_library(raw: Tokenizer, fast: PreTrainedTokenizerFast, text: str) -> None:
    assert fast(text, split_special_tokens=True).input_ids == raw.encode(text).ids


def test_the_script_reproduces_the_committed_files(tmp_path: Path) -> None:
    assert train("--output_dir", str(tmp_path)).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (ROOT / name).read_bytes(), name


def test_the_script_lays_out_another_size(tmp_path: Path) -> None:
    assert train("--output_dir", str(tmp_path), "--vocab_size", "700").returncode == 0
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in ("<action_255>", "<action_0>", "<PAD>")]
    assert ids == [700 - 256, 699, 700]


@pytest.mark.parametrize(("size", "reason"), [("609", "at least 610"), ("100000", "the corpus gives")])
def test_the_script_refuses_sizes_it_cannot_fill(tmp_path: Path, size: str, reason: str) -> None:
    result = train("--output_dir", str(tmp_path), "--vocab_size", size)
    assert result.returncode == 2
    assert reason in result.stderr
    assert not list(tmp_path.iterdir())
