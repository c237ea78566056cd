# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""The FAST tokenizer: its transform beside scipy's, its files, its bounds, and sequences that are no chunks."""

import copy
import json
import pickle

import numpy as np
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from load_policy import repository_class
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast


FastTokenizer = repository_class("FastTokenizer")
PUBLISHED = {"scale": 10, "min_token": -354}
K, D = 8, 7


def smooth_chunks(count: int, seed: int, length: int = K) -> np.ndarray:
    """(count, length, D) in [-1, 1], each a path that begins anywhere."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 0.1, (count, length, D))
    return np.clip(rng.uniform(-0.8, 0.8, (count, 1, D)) + np.cumsum(steps, axis=1), -1, 1)


def published_texts(chunks: np.ndarray) -> list[str]:
    """What the published tokenizer writes for chunks, with scipy's transform."""
    quantized = np.around(scipy.fft.dct(chunks, axis=1, norm="ortho") * PUBLISHED["scale"])
    return ["".join(chr(int(value) - PUBLISHED["min_token"]) for value in chunk.flatten()) for chunk in quantized]


@pytest.fixture(scope="module")
def fitted():
    return FastTokenizer.fit(smooth_chunks(2000, 0), vocab_size=512)


@pytest.fixture(scope="module")
def published_bpe() -> Tokenizer:
    """Trained as the published one was: over bytes, words divided, the alphabet a range of code points."""
    bpe = ByteLevelBPETokenizer()
    trainer = BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=[chr(point) for point in range(700)],
        max_token_length=10000,
    )
    bpe._tokenizer.train_from_iterator(published_texts(smooth_chunks(2000, 0)), trainer=trainer)
    return bpe._tokenizer


@pytest.fixture(scope="module")
def published(published_bpe, tmp_path_factory):
    """Read from a file as it lies in the published repository."""
    directory = tmp_path_factory.mktemp("published")
    published_bpe.save(str(directory / "tokenizer.json"))
    return FastTokenizer.load(directory, **PUBLISHED, filename="tokenizer.json")


@pytest.fixture(scope="module", params=["fitted", "published"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


class TestTransform:
    @pytest.mark.parametrize("size", [1, 2, 3, 8, 16, 50])
    def test_scipy(self, size):
        """At a scale at which rounding to whole numbers does not matter."""
        chunks = np.random.default_rng(size).uniform(-1, 1, (3, size, D))
        fine = FastTokenizer.fit(chunks, scale=2000 / size**0.5, vocab_size=5000)
        expected = scipy.fft.dct(chunks, axis=1, norm="ortho")
        spelled = np.stack([fine._spell(row, size * D) for row in fine.encode(chunks)]) + fine.min_token
        np.testing.assert_allclose(spelled.reshape(3, size, D) / fine.scale, expected, atol=0.51 / fine.scale)
        rounded = np.around(expected * fine.scale) / fine.scale
        inverse = np.clip(scipy.fft.idct(rounded, axis=1, norm="ortho"), -1, 1)
        np.testing.assert_allclose(fine.decode(fine.encode(chunks), size, D), inverse, atol=1e-12)

    def test_order_rounding_and_offset(self, published):
        """Low frequencies first, each with all dimensions; halves to even; code points from -354 on."""
        single = np.array([[[0.25, -0.25, 0.35, 0.05, 1.0]]])  # of one action the transform is the action itself
        spelled = published._spell(published.encode(single)[0], 5)
        assert (spelled - 354).tolist() == [2, -2, 4, 0, 10]
        chunk = np.zeros((1, 4, 2))
        chunk[0, :, 0], chunk[0, :, 1] = 0.5, [0.4, 0.4, -0.4, -0.4]
        spelled = published._spell(published.encode(chunk)[0], 8) - 354
        expected = np.around(scipy.fft.dct(chunk[0], axis=0, norm="ortho") * 10).astype(int)
        assert spelled.tolist() == [10, 0, 0, *expected[1:, 1:].flatten().tolist()[:1], 0, 0, 0, expected[3, 1]]

    def test_ids_and_values_as_published(self, published, published_bpe):
        chunks = smooth_chunks(500, 1)
        exact = scipy.fft.dct(chunks, axis=1, norm="ortho") * 10
        assert np.abs(exact % 1 - 0.5).min() > 1e-9  # no ties, which the last bit would decide
        rows = published.encode(chunks)
        assert rows == [published_bpe.encode(text).ids for text in published_texts(chunks)]
        texts = published_bpe.decode_batch(rows)
        quantized = np.array([[ord(character) - 354 for character in text] for text in texts]).reshape(-1, K, D)
        expected = np.clip(scipy.fft.idct(quantized / 10, axis=1, norm="ortho"), -1, 1)
        np.testing.assert_allclose(published.decode(rows, K, D), expected, atol=1e-12)


class TestBounds:
    @settings(deadline=None)
    @given(arrays(np.float64, (2, K, D), elements=st.floats(-1, 1)))
    def test_reconstruction(self, fitted, chunks):
        """Every chunk in [-1, 1] has its tokens, and comes back within the stated bounds."""
        decoded = fitted.decode(fitted.encode(chunks), K, D)
        assert np.abs(decoded).max() <= 1
        assert np.sqrt(((decoded - chunks) ** 2).mean(axis=1)).max() <= 0.5 / fitted.scale + 1e-9
        assert np.abs(decoded - chunks).max() <= (K / 4) ** 0.5 / fitted.scale + 1e-9

    @pytest.mark.parametrize("length", [1, 3, 8, 16])
    def test_extreme_chunks_have_characters(self, length):
        """Those that have the largest coefficients: full scale with the signs of a frequency."""
        tokenizer = FastTokenizer.fit(np.zeros((1, length, 1)), vocab_size=100)
        signs = np.sign(scipy.fft.idct(np.eye(length), axis=1, norm="ortho"))[..., None]
        chunks = np.concatenate([signs, -signs])  # (2 * length, length, 1)
        decoded = tokenizer.decode(tokenizer.encode(chunks), length, 1)
        assert np.sqrt(((decoded - chunks) ** 2).mean(axis=1)).max() <= 0.05 + 1e-9

    def test_values_beyond_are_clipped(self, fitted):
        chunks = smooth_chunks(3, 2)
        beyond = np.where(chunks > 0.2, chunks * 10, chunks)
        assert fitted.encode(beyond) == fitted.encode(np.clip(beyond, -1, 1))

    def test_a_higher_scale_is_finer(self):
        chunks, errors, lengths = smooth_chunks(300, 3), [], []
        for scale in (5, 20, 80):
            tokenizer = FastTokenizer.fit(smooth_chunks(1000, 4), scale=scale, vocab_size=1024)
            rows = tokenizer.encode(chunks)
            errors.append(np.abs(tokenizer.decode(rows, K, D) - chunks).max())
            lengths.append(sum(map(len, rows)))
        assert errors == sorted(errors, reverse=True)
        assert lengths == sorted(lengths)

    def test_it_shortens(self, tokenizer):
        """Chunks like those it was fitted to; one token per number would be 56."""
        assert np.mean([len(row) for row in tokenizer.encode(smooth_chunks(500, 5))]) < 28


class TestFiles:
    def test_round_trip(self, tokenizer, tmp_path):
        chunks = smooth_chunks(50, 6)
        assert tokenizer.save(tmp_path) == tmp_path / "fast_tokenizer.json"
        again = FastTokenizer.load(tmp_path, tokenizer.scale, tokenizer.min_token)
        assert again.config_fields == tokenizer.config_fields
        assert again.encode(chunks) == tokenizer.encode(chunks)
        assert json.loads((tmp_path / "fast_tokenizer.json").read_text()) == json.loads(tokenizer.bpe.to_str())

    def test_read_as_a_published_tokenizer_is(self, fitted, tmp_path):
        """The published code reads its tokenizer.json with this class."""
        reader = PreTrainedTokenizerFast(tokenizer_file=str(fitted.save(tmp_path)), clean_up_tokenization_spaces=False)
        for row in fitted.encode(smooth_chunks(50, 7)):
            text = reader.decode(row)
            assert [ord(character) for character in text] == fitted._spell(row, K * D).tolist()
            assert reader(text)["input_ids"] == row

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
    def test_copies(self, tokenizer, duplicate):
        chunks = smooth_chunks(5, 8)
        assert duplicate(tokenizer).encode(chunks) == tokenizer.encode(chunks)

    def test_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"has no fast_tokenizer\.json"):
            FastTokenizer.load(tmp_path, **PUBLISHED)
        (tmp_path / "fast_tokenizer.json").write_text('{"model": 3')
        with pytest.raises(ValueError, match=r"fast_tokenizer\.json of .* is no tokenizer"):
            FastTokenizer.load(tmp_path, **PUBLISHED)
        with pytest.raises(ValueError, match="byte pair encoding without a normalizer, got WordLevel"):
            FastTokenizer(Tokenizer(models.WordLevel({"a": 0})), **PUBLISHED)
        with pytest.raises(ValueError, match="have gaps"):
            FastTokenizer(Tokenizer(models.BPE({"a": 0, "b": 2}, [])), **PUBLISHED)


class TestRefused:
    @pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf")])
    def test_scale(self, fitted, scale):
        for make in (
            lambda: FastTokenizer(fitted.bpe, scale, 0),
            lambda: FastTokenizer.fit(smooth_chunks(1, 0), scale),
        ):
            with pytest.raises(ValueError, match="`scale` must be a positive number"):
                make()

    def test_alphabet_beyond_the_vocabulary(self):
        with pytest.raises(
            ValueError, match=r"at scale 10.0 have 59 different coefficients, more than `vocab_size` 58"
        ):
            FastTokenizer.fit(smooth_chunks(1, 0), vocab_size=58)
        with pytest.raises(ValueError, match="more than `vocab_size`"):
            FastTokenizer.fit(smooth_chunks(1, 0), scale=1e5, vocab_size=10**9)

    @pytest.mark.parametrize("shape", [(K, D), (0, K, D), (1, 0, D), (1, K, 0), (1, 1, K, D)])
    def test_shapes(self, fitted, shape):
        for function in (fitted.encode, FastTokenizer.fit):
            with pytest.raises(ValueError, match=r"must be of shape \(B, K, D\)"):
                function(np.zeros(shape))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values(self, fitted, value):
        for function in (fitted.encode, FastTokenizer.fit):
            with pytest.raises(ValueError, match="NaN or infinite"):
                function(np.full((1, K, D), value))

    def test_coefficients_without_a_character(self, fitted):
        with pytest.raises(ValueError, match=r"spells coefficients of -29\.\.29, and the chunks have 0\.\.40"):
            fitted.encode(np.ones((1, 16, D)))


class TestMalformed:
    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda row: row[:-1], "coefficients, and the chunk has 56"),
            (lambda row: [*row, 5], "coefficients, and the chunk has 56"),
            (lambda row: [], "spell 0 coefficients, and the chunk has 56"),
            (lambda row: [*row, -1], r"Tokens \[-1\] are not among the 512 FAST tokens"),
            (lambda row: [512, *row], r"Tokens \[512\] are not among the 512 FAST tokens"),
        ],
    )
    def test_raises(self, fitted, change, message):
        row = fitted.encode(smooth_chunks(1, 9))[0]
        with pytest.raises(ValueError, match=message) as caught:
            fitted.decode([row, change(row)], K, D)
        assert type(caught.value).__name__ == "MalformedActionError"

    def test_half_a_character(self, published):
        lead = published._token_bytes.index(b"\xc5")
        with pytest.raises(ValueError, match="hold half a character"):
            published.decode([[lead]], K, D)

    def test_no_sequence_gives_anything_else(self, tokenizer):
        assert fuzz(tokenizer, 5000) > 100

    @pytest.mark.slow
    def test_a_million_sequences(self, fitted, published):
        assert fuzz(fitted, 500_000) > 10_000
        assert fuzz(published, 500_000) > 10_000


def fuzz(tokenizer, count: int) -> int:
    """Decode random and mutated sequences; how many were chunks, all others having raised the documented error."""
    rng = np.random.default_rng(count)
    valid = tokenizer.encode(smooth_chunks(500, 10))
    decoded = 0
    for index in range(count):
        row = list(valid[rng.integers(len(valid))])
        kind = index % 4
        if kind == 0:
            row = rng.integers(-2, tokenizer.vocab_size + 2, rng.integers(0, 60)).tolist()
        elif kind == 1:
            row[rng.integers(len(row))] = int(rng.integers(tokenizer.vocab_size))
        elif kind == 2:
            first, second = rng.integers(len(row), size=2)
            row[first], row[second] = row[second], row[first]
        else:
            row[rng.integers(len(row)) :] = valid[rng.integers(len(valid))][rng.integers(10) :]
        try:
            chunk = tokenizer.decode([row], K, D)
        except ValueError as error:
            assert type(error).__name__ == "MalformedActionError", row
            continue
        assert chunk.shape == (1, K, D)
        assert np.abs(chunk).max() <= 1, row
        decoded += 1
    return decoded


class TestGrammar:
    def test_every_path_ends_in_a_chunk(self, tokenizer):
        """Whatever is drawn among what fits: no dead end, and exactly the symbols of a chunk."""
        costs, next_states = tokenizer.grammar
        rng = np.random.default_rng(0)
        reached = set()
        for _ in range(300):
            state, missing, row = 0, 6, []
            while missing:
                allowed = np.flatnonzero(costs[state] + (next_states[state] > 0) <= missing)
                token = int(rng.choice(allowed))
                row.append(token)
                missing, state = missing - costs[state, token], next_states[state, token]
                reached.add(int(state))
            assert state == 0
            assert tokenizer.decode([row], 3, 2).shape == (1, 3, 2)
        assert (len(reached) > 1) == (tokenizer.min_token == -354)  # characters in two halves, over bytes alone

    def test_what_is_encoded_is_allowed(self, tokenizer):
        costs, next_states = tokenizer.grammar
        for row in tokenizer.encode(np.random.default_rng(1).uniform(-1, 1, (300, K, D))):
            state, missing = 0, K * D
            for token in row:
                assert costs[state, token] + (next_states[state, token] > 0) <= missing
                missing, state = missing - costs[state, token], next_states[state, token]
            assert (missing, state) == (0, 0)

    def test_costs_are_what_decoding_counts(self, fitted):
        costs, next_states = fitted.grammar
        assert costs.shape == next_states.shape == (1, 512)
        assert costs[0].tolist() == [len(fitted.bpe.decode([token])) for token in range(512)]

    def test_refused_without_single_characters(self):
        tokenizer = FastTokenizer(Tokenizer(models.BPE({"ab": 0}, [])), **PUBLISHED)
        with pytest.raises(ValueError, match="no token of a single character"):
            _ = tokenizer.grammar
