# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""
FAST: chunks of normalised actions <-> short sequences of tokens (https://arxiv.org/abs/2501.09747).

A chunk is transformed along time by the orthonormal DCT-II; its coefficients are scaled, rounded and written as one
character each, all dimensions of the lowest frequency first; byte pair encoding makes tokens of the characters.
"""

import codecs
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, trainers  # transformers requires tokenizers
from transformers.utils import cached_file


FAST_TOKENIZER_NAME = "fast_tokenizer.json"

# The cost of a token that cannot come: more symbols than any chunk has.
_NEVER = 2**30
# UTF-16's surrogates begin here; no character stands for them.
_MAX_ALPHABET = 0xD800


class MalformedActionError(ValueError):
    """A sequence of tokens that is no chunk of actions."""


class FastTokenizer:
    """
    Chunks of normalised actions as tokens, and back.

    The character of a coefficient `c` is the code point `round(c * scale) - min_token`, halves rounded to even, and
    the sequence is in the order of the frequencies, each with all dimensions, as published. The rounding moves a
    coefficient by at most `0.5 / scale`. The transform keeps lengths, so that the root mean square of what decoding
    misses is at most that, too, in each dimension; a single number is missed by less than `sqrt(K / 4) / scale`.

    Args:
        bpe (`tokenizers.Tokenizer`): Byte pair encoding of the characters, over themselves or, as published, over
            their bytes (`ByteLevel`).
        scale (`float`): Factor of the coefficients before they are rounded; 10 in the published tokenizer.
        min_token (`int`): The coefficient, scaled and rounded, that code point 0 stands for; -354 in the published
            tokenizer.

    Raises:
        ValueError: If this is another kind of tokenizer, or `scale` is not positive.
    """

    def __init__(self, bpe: Tokenizer, scale: float, min_token: int):
        _check_scale(scale)
        if not isinstance(bpe.model, models.BPE) or bpe.normalizer is not None:
            raise ValueError(
                f"FAST is a byte pair encoding without a normalizer, got {type(bpe.model).__name__} with "
                f"`normalizer={bpe.normalizer!r}`."
            )
        self.bpe = bpe
        self.scale = float(scale)
        self.min_token = int(min_token)
        self._token_bytes = _token_bytes(bpe)

    @classmethod
    def fit(cls, chunks: np.ndarray, scale: float = 10.0, vocab_size: int = 1024) -> "FastTokenizer":
        """
        Learn the tokens that shorten these chunks most.

        The alphabet holds every coefficient that chunks of this length can have, seen or not.

        Args:
            chunks (`np.ndarray`): (N, K, D), normalised; values outside [-1, 1] are clipped.
            scale (`float`, defaults to 10): Higher is finer, and longer.
            vocab_size (`int`, defaults to 1024): Tokens at most; few chunks may give fewer.

        Raises:
            ValueError: If the alphabet alone does not fit into `vocab_size`, or the chunks are no finite (N, K, D).
        """
        _check_scale(scale)
        quantized = _quantize(chunks, scale)  # (N, K, D)
        # A row of the transform has length 1, and a chunk in [-1, 1] at most sqrt(K).
        reach = int(np.ceil(scale * quantized.shape[1] ** 0.5))
        if 2 * reach + 1 > min(vocab_size, _MAX_ALPHABET):
            raise ValueError(
                f"Chunks of {quantized.shape[1]} actions at scale {scale} have {2 * reach + 1} different "
                f"coefficients, more than `vocab_size` {vocab_size}: raise it, or lower the scale or the chunk length."
            )
        alphabet = [chr(point) for point in range(2 * reach + 1)]
        bpe = Tokenizer(models.BPE())
        bpe.decoder = decoders.Fuse()  # or other readers would put spaces between the tokens
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        bpe.train_from_iterator(_to_texts(quantized + reach), trainer=trainer)
        return cls(bpe, scale, -reach)

    @classmethod
    def load(
        cls,
        source: str | Path,
        scale: float,
        min_token: int,
        filename: str = FAST_TOKENIZER_NAME,
        **hub_kwargs: Any,
    ) -> "FastTokenizer":
        """
        Read a tokenizer of a local directory or a Hub repository.

        Args:
            source (`str` or `Path`): Directory or Hub id.
            scale (`float`), min_token (`int`): What the file does not hold; a policy's config.json has them as
                `fast_scale` and `fast_min_token`, a published tokenizer's processor_config.json as `scale` and
                `min_token`.
            filename (`str`, defaults to `"fast_tokenizer.json"`): `tokenizer.json` for a published FAST tokenizer,
                such as `physical-intelligence/fast` (scale 10, minimum -354).
            hub_kwargs: `revision`, `token`, `cache_dir`, ... of `from_pretrained`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no tokenizer.
        """
        path = cached_file(str(source), filename, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if path is None:
            raise FileNotFoundError(f"{source} has no {filename}, the file of a FAST tokenizer.")
        try:
            bpe = Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises no narrower kind
            raise ValueError(f"{filename} of {source} is no tokenizer: {error}") from error
        return cls(bpe, scale, min_token)

    def save(self, directory: str | Path) -> Path:
        """Write `fast_tokenizer.json`, in the format of the published `tokenizer.json`; see `config_fields`."""
        path = Path(directory) / FAST_TOKENIZER_NAME
        path.write_text(self.bpe.to_str(pretty=True) + "\n", encoding="utf-8")
        return path

    @property
    def vocab_size(self) -> int:
        return len(self._token_bytes)

    @property
    def config_fields(self) -> dict[str, float | int]:
        """What a policy's configuration says of its tokenizer."""
        return {"fast_scale": self.scale, "fast_min_token": self.min_token, "fast_vocab_size": self.vocab_size}

    def encode(self, chunks: np.ndarray) -> list[list[int]]:
        """
        Tokens of chunks.

        Args:
            chunks (`np.ndarray`): (B, K, D), normalised; values outside [-1, 1] are clipped.

        Returns:
            `list[list[int]]`: One sequence for each chunk, of any length.

        Raises:
            ValueError: If the chunks are no finite (B, K, D), or the tokenizer has no character for a coefficient.
        """
        symbols = _quantize(chunks, self.scale) - self.min_token  # (B, K, D)
        if symbols.min() < 0 or symbols.max() > self._max_symbol:
            raise ValueError(
                f"The tokenizer spells coefficients of {self.min_token}..{self.min_token + self._max_symbol}, and the "
                f"chunks have {symbols.min() + self.min_token}..{symbols.max() + self.min_token}: fit it to chunks of "
                f"{symbols.shape[1]} actions."
            )
        return [encoding.ids for encoding in self.bpe.encode_batch(_to_texts(symbols), add_special_tokens=False)]

    def decode(self, rows: Sequence[Sequence[int]], chunk_size: int, action_dim: int) -> np.ndarray:
        """
        Chunks of tokens.

        Args:
            rows (`Sequence[Sequence[int]]`): B sequences.
            chunk_size (`int`), action_dim (`int`): K and D.

        Returns:
            `np.ndarray`: float64 (B, K, D), in [-1, 1]: where the rounding leads beyond, it is clipped.

        Raises:
            MalformedActionError: If a sequence holds anything but tokens, or spells another number of coefficients.
        """
        symbols = np.stack([self._spell(row, chunk_size * action_dim) for row in rows])  # (B, K * D)
        coefficients = (symbols + self.min_token) / self.scale
        coefficients = coefficients.reshape(len(symbols), chunk_size, action_dim)  # (B, K, D)
        return np.clip(dct_matrix(chunk_size).T @ coefficients, -1.0, 1.0)

    @cached_property
    def grammar(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Which tokens may follow, and what they add, for decoding that cannot go wrong.

        A state is what is left of a character: nothing (state 0), or the first byte of one, in tokenizers over bytes.
        Characters of more than two bytes are never begun; no coefficient below `2048 + min_token` needs them.

        Returns:
            `tuple`: Characters that a token completes in a state, more than any chunk has where it may not come, and
            the state behind it; int64 (S, V) each. From every state that is led to, one token completes one character
            and leads to state 0.

        Raises:
            ValueError: If the vocabulary has no single character.
        """
        states, rows = [b""], []
        for state in states:  # grows
            steps = [_step(state, token) for token in self._token_bytes]
            states += sorted({rest for count, rest in steps if count != _NEVER} - set(states))
            rows.append(steps)
        ends = [any(step == (1, b"") for step in steps) for steps in rows]
        if not ends[0]:
            raise ValueError("The tokenizer has no token of a single character, which every chunk can end with.")
        costs = [[count if count == _NEVER or ends[states.index(rest)] else _NEVER for count, rest in s] for s in rows]
        next_states = [[states.index(rest) for _, rest in steps] for steps in rows]
        return np.array(costs, dtype=np.int64), np.array(next_states, dtype=np.int64)

    @cached_property
    def _max_symbol(self) -> int:
        """The last code point up to which every character can be written."""
        tokens = set(self._token_bytes)
        if isinstance(self.bpe.decoder, decoders.ByteLevel):
            known = [all(bytes([byte]) in tokens for byte in chr(point).encode()) for point in range(0x800)]
        else:
            known = [chr(point).encode() in tokens for point in range(min(self.vocab_size, _MAX_ALPHABET))]
        return [*known, False].index(False) - 1

    def _spell(self, row: Sequence[int], num_symbols: int) -> np.ndarray:
        """Code points of a sequence of tokens, (num_symbols,)."""
        if wrong := [token for token in row if not 0 <= token < self.vocab_size]:
            raise MalformedActionError(f"Tokens {wrong[:8]} are not among the {self.vocab_size} FAST tokens.")
        try:
            text = b"".join([self._token_bytes[token] for token in row]).decode()
        except UnicodeDecodeError as error:
            raise MalformedActionError(f"The tokens {list(row)} hold half a character.") from error
        if len(text) != num_symbols:
            raise MalformedActionError(f"The tokens spell {len(text)} coefficients, and the chunk has {num_symbols}.")
        return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)


def tokens_to_ids(tokens: Sequence[int], token_end: int) -> list[int]:
    """Ids in the language model's vocabulary: token 0 is the last one before `token_end`."""
    return [token_end - 1 - token for token in tokens]


def ids_to_tokens(ids: Sequence[int], token_end: int, stop_token_id: int) -> list[int]:
    """Tokens of ids, up to the first stop token; ids that are no FAST tokens give numbers that `decode` refuses."""
    ids = list(ids)
    spoken = ids[: ids.index(stop_token_id)] if stop_token_id in ids else ids
    return [token_end - 1 - token_id for token_id in spoken]


def dct_matrix(size: int) -> np.ndarray:
    """
    The orthonormal DCT-II as a matrix, float64 (size, size): row `f` is
    `sqrt((2 - (f == 0)) / size) * cos(pi * f * (2 * t + 1) / (2 * size))`. Its inverse is its transpose.
    """
    frequency, time = np.arange(size)[:, None], np.arange(size)[None]
    scale = np.sqrt(np.where(frequency == 0, 1.0, 2.0) / size)
    return scale * np.cos(np.pi * frequency * (2 * time + 1) / (2 * size))


def _check_scale(scale: float) -> None:
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"`scale` must be a positive number, got {scale!r}.")


def _quantize(chunks: np.ndarray, scale: float) -> np.ndarray:
    """Coefficients, scaled and rounded to even, int64 (B, K, D)."""
    chunks = np.asarray(chunks, dtype=np.float64)
    if chunks.ndim != 3 or 0 in chunks.shape:
        raise ValueError(f"Chunks of actions must be of shape (B, K, D), got {chunks.shape}.")
    if not np.isfinite(chunks).all():
        raise ValueError("Chunks of actions to encode hold NaN or infinite values.")
    return np.around(dct_matrix(chunks.shape[1]) @ np.clip(chunks, -1.0, 1.0) * scale).astype(np.int64)


def _to_texts(symbols: np.ndarray) -> list[str]:
    """(B, K, D) code points as B texts, all dimensions of a frequency together."""
    return ["".join(map(chr, row)) for row in symbols.reshape(len(symbols), -1).tolist()]


def _token_bytes(bpe: Tokenizer) -> list[bytes]:
    """The UTF-8 bytes of each token, by its number."""
    vocabulary = bpe.get_vocab()
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError("The numbers of the FAST tokens have gaps.")
    tokens = sorted(vocabulary, key=vocabulary.get)
    if not isinstance(bpe.decoder, decoders.ByteLevel):
        return [token.encode() for token in tokens]
    # GPT-2 writes bytes that are printable in Latin-1 as themselves, and the others, in order, from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return [bytes(map(table.get, token)) if set(token) <= table.keys() else token.encode() for token in tokens]


def _step(state: bytes, token: bytes) -> tuple[int, bytes]:
    """Characters that a token completes behind `state`, and the byte of another that it begins."""
    reader = codecs.getincrementaldecoder("utf-8")()
    try:
        count = len(reader.decode(state + token))
    except UnicodeDecodeError:
        return _NEVER, b""
    rest = reader.getstate()[0]
    if not token or len(rest) > 1 or rest > b"\xdf":  # the first byte of three or four
        return _NEVER, b""
    return count, rest
