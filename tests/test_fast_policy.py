# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Policies that speak of chunks in FAST tokens: configuration, labels, decoding, learning, saving."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from hub_server import HubServer
from load_policy import load_policy, repository_class
from test_action_heads import KEY, make_config, make_policy, noise_image
from test_fast_tokenizer import published_bpe  # noqa: F401  (a fixture)
from test_saving import run

from evaluation.policies import ModelPolicy


FastTokenizer = repository_class("FastTokenizer")
CHUNK, DIM, END, STOP = 4, 7, 1024, 2
INSTRUCTIONS = ["pick up the cube", "put the blue cylinder into the bowl on the left", "push it"]
IMAGES = [noise_image(row) for row in range(3)]


def chunks(count: int, seed: int) -> np.ndarray:
    """(count, CHUNK, DIM) in the units of the dataset, inside its bounds."""
    statistics = make_config().norm_stats[KEY]["action"]
    low, high = np.array(statistics["q01"]), np.array(statistics["q99"])
    rng = np.random.default_rng(seed)
    paths = np.clip(rng.uniform(-0.8, 0.8, (count, 1, DIM)) + rng.normal(0, 0.1, (count, CHUNK, DIM)), -1, 1)
    mask = np.array(statistics["mask"])
    return np.where(mask, (paths + 1) / 2 * (high - low) + low, (paths > 0).astype(float))


def fields(tokenizer) -> dict:
    return {"head_type": "fast", "chunk_size": CHUNK, "action_dim": DIM, **tokenizer.config_fields}


@pytest.fixture(scope="module")
def fitted():
    return FastTokenizer.fit(np.random.default_rng(0).uniform(-1, 1, (2000, CHUNK, DIM)), vocab_size=200)


@pytest.fixture(scope="module")
def over_bytes(published_bpe):  # noqa: F811
    return FastTokenizer(published_bpe, 10, -354)


def speaking(tokenizer, **overrides):
    """A policy with large random weights, and its processor."""
    end = {} if tokenizer.vocab_size < 900 else {"action_token_end": 1060, "pad_token_id": 1061, "closing_token_id": 3}
    model, processor = make_policy(**fields(tokenizer) | end | overrides)
    for name, value in end.items():
        if name != "pad_token_id":
            setattr(processor, name, value)
    model.fast_tokenizer = processor.fast_tokenizer = tokenizer
    return model, processor


@pytest.fixture(scope="module")
def policy(fitted):
    return speaking(fitted)


def observations(processor, rows=slice(None), **kwargs):
    return processor(instruction=INSTRUCTIONS[rows], images=IMAGES[rows], **kwargs)


class TestConfiguration:
    NEEDED = {"head_type": "fast", "chunk_size": 8, "action_dim": 7}
    NEEDED |= {"fast_scale": 10.0, "fast_min_token": -29, "fast_vocab_size": 200}

    def test_tokens(self):
        config = make_config(**self.NEEDED)
        assert (config.num_action_tokens, config.action_token_begin, config.action_token_end) == (200, 824, 1024)

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"chunk_size": 1}, "shortens chunks along time, and `chunk_size` is 1"),
            ({"attention_mode": "bidirectional"}, "decodes token after token: set `attention_mode='causal'`"),
            ({"norm_type": "normal"}, r"needs actions in \[-1, 1\]"),
            ({"action_dim": None}, r"needs \['action_dim'\]"),
            ({"fast_scale": None, "fast_min_token": None}, r"needs \['fast_scale', 'fast_min_token'\]"),
            ({"fast_vocab_size": None}, r"needs \['fast_vocab_size'\]"),
            ({"fast_scale": -1.0}, "`fast_scale` must be positive, got -1.0"),
            ({"fast_vocab_size": 0}, "`fast_vocab_size` must be a positive integer, got 0"),
            ({"fast_vocab_size": 1025, "closing_token_id": None}, "The 1025 action tokens before id 1024 do not fit"),
            ({"fast_vocab_size": 1022}, r"The 1022 FAST tokens 2\.\.1023 would take the place of .*'eos_token_id': 2"),
            ({"closing_token_id": 900}, "would take the place of {'closing_token_id': 900}"),
            ({"image_token_id": 900}, "`image_token_id` 900 is an action token"),
            ({"use_film": True}, "`use_film=True` averages"),
            ({"append_stop_token": False}, "`append_stop_token=False` means nothing"),
            ({"num_inference_steps": 5}, "is for the 'diffusion' and 'flow' heads, not 'fast'"),
        ],
    )
    def test_refused(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            make_config(**self.NEEDED | overrides)

    def test_several_stop_tokens(self):
        with pytest.raises(ValueError, match=r"needs one `eos_token_id` in `text_config`, got \[2, 5\]"):
            repository_class("OpenVLAConfig")(text_config={"eos_token_id": [2, 5]}, **self.NEEDED)

    def test_llama(self):
        """The published vocabulary in Llama's: the last 2048 tokens, none of them special."""
        config = repository_class("OpenVLAConfig")(**self.NEEDED | {"fast_vocab_size": 2048})
        assert (config.action_token_begin, config.action_token_end) == (29952, 32000)
        with pytest.raises(ValueError, match=r"\{'closing_token_id': 29871\}"):
            repository_class("OpenVLAConfig")(**self.NEEDED | {"fast_vocab_size": 2129})


class TestLabels:
    def test_tokens_behind_the_prompt(self, policy, fitted):
        _, processor = policy
        actions = chunks(3, 1)
        inputs = observations(processor, actions=actions, unnorm_key=[KEY] * 3)
        prompts = observations(processor)
        rows = processor.encode_actions(actions)
        assert len({len(row) for row in rows}) > 1
        for row in range(3):
            labels, ids = (inputs[name][row][inputs["attention_mask"][row] == 1] for name in ("labels", "input_ids"))
            target = [*rows[row], STOP]
            prompt = prompts["input_ids"][row][prompts["attention_mask"][row] == 1].tolist()
            assert ids.tolist() == prompt + target
            assert labels.tolist() == [-100] * len(prompt) + target
            assert min(rows[row]) >= END - fitted.vocab_size
            # Token t is id END - 1 - t.
            normalized = processor.normalize_actions(actions[row], KEY)
            assert [END - 1 - token_id for token_id in rows[row]] == fitted.encode(normalized)[0]
        assert "actions" not in inputs

    def test_there_and_back(self, policy):
        _, processor = policy
        actions = chunks(5, 2)
        rows = processor.encode_actions(actions)
        decoded = processor.decode_actions(rows)
        statistics = processor.norm_stats[KEY]["action"]
        span = np.where(statistics["mask"], np.subtract(statistics["q99"], statistics["q01"]) / 2, 1)
        error = np.sqrt((((decoded - actions) / span) ** 2).mean(axis=1))  # (5, DIM), normalised
        assert error.max() <= 0.05 + 1e-9
        np.testing.assert_array_equal(processor.decode_actions(rows[0]), decoded[0])
        padded = torch.full((5, max(map(len, rows)) + 1), STOP)
        for row, ids in enumerate(rows):
            padded[row, : len(ids)] = torch.tensor(ids)
        np.testing.assert_array_equal(processor.decode_actions(padded), decoded)
        assert processor.encode_actions(actions[0]) == rows[0]

    def test_malformed(self, policy):
        _, processor = policy
        good, hold = processor.encode_actions(chunks(1, 3)[0]), np.zeros((CHUNK, DIM))
        for bad in (good[1:], [], [*good, 5], [*good[:2], STOP, *good[2:]]):
            with pytest.raises(ValueError, match=r"coefficients, and the chunk has 28|not among the 200 FAST tokens"):
                processor.decode_actions([good, bad])
            decoded = processor.decode_actions([good, bad], fallback=hold)
            np.testing.assert_array_equal(decoded[0], processor.decode_actions(good))
            np.testing.assert_array_equal(decoded[1], hold)
        with pytest.raises(ValueError, match=r"`fallback` must be of shape \(4, 7\), got \(7,\)"):
            processor.decode_actions(good, fallback=np.zeros(DIM))

    def test_refused(self, fitted):
        _, processor = make_policy(**fields(fitted))
        with pytest.raises(ValueError, match="has no FAST tokenizer: call `fit_fast_tokenizer`"):
            observations(processor, actions=chunks(3, 1))
        processor.fast_tokenizer = fitted
        with pytest.raises(ValueError, match="Chunks of 4 actions are learned, got 3"):
            observations(processor, actions=chunks(3, 1)[:, :3])
        processor.action_token_end = 100
        with pytest.raises(ValueError, match="200 FAST tokens do not fit in front of id 100"):
            processor.fast_tokenizer = fitted
        _, processor = make_policy()
        with pytest.raises(ValueError, match="to a processor with `head_type='tokens'`"):
            processor.fast_tokenizer = fitted
        with pytest.raises(ValueError, match="`fallback` is for FAST tokens"):
            processor.decode_actions(np.full(7, 1000), fallback=np.zeros(7))

    def test_fit(self, fitted):
        _, processor = make_policy(**fields(fitted))
        tokenizer = processor.fit_fast_tokenizer(chunks(200, 4), KEY, scale=20, vocab_size=300)
        assert tokenizer is processor.fast_tokenizer
        assert (processor.fast_scale, processor.fast_min_token) == (20, -40)
        assert tokenizer.vocab_size == 300
        assert processor.decode_actions(processor.encode_actions(chunks(2, 5))).shape == (2, CHUNK, DIM)
        with pytest.raises(ValueError, match="Chunks of 4 actions are learned, got 5"):
            processor.fit_fast_tokenizer(np.zeros((2, 5, DIM)))


def follow_slowly(model, inputs) -> list[int]:
    """Ids of one row, greedy: a whole forward without a cache for each token, and what fits counted by hand."""
    tokenizer, ids = model.fast_tokenizer, inputs["input_ids"]
    begin, end = model.config.action_token_begin, model.config.action_token_end
    spoken: list[int] = []
    while True:
        row = torch.cat([ids, torch.tensor([spoken], dtype=torch.long)], dim=1)
        with torch.no_grad():
            logits = model(input_ids=row, pixel_values=inputs["pixel_values"]).logits[0, -1, begin:end]
        for index in logits.argsort(descending=True).tolist():
            tried = [*spoken, begin + index]
            text = b"".join(tokenizer._token_bytes[end - 1 - token_id] for token_id in tried)
            if len(text.decode(errors="ignore")) + (not is_whole(text)) <= CHUNK * DIM and is_possible(text):
                break
        spoken = tried
        if is_whole(text) and len(text.decode()) == CHUNK * DIM:
            return spoken


def is_whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_possible(text: bytes) -> bool:
    """Whether it is UTF-8, perhaps with the first byte of a character of two at its end."""
    return is_whole(text) or (0xC2 <= text[-1] <= 0xDF and is_whole(text[:-1]))


class TestPrediction:
    @pytest.mark.parametrize("kind", ["fitted", "over_bytes"])
    def test_greedy_follows_the_model(self, request, kind):
        model, processor = speaking(request.getfixturevalue(kind))
        output = model.predict_action(**observations(processor), return_dict=True)
        assert output.actions.shape == output.normalized_actions.shape == (3, CHUNK, DIM)
        lengths = []
        for row in range(3):
            expected = follow_slowly(model, observations(processor, slice(row, row + 1)))
            ids = output.token_ids[row].tolist()
            assert ids == expected + [model.config.stop_token_id] * (len(ids) - len(expected))
            lengths.append(len(expected))
        assert len(set(lengths)) > 1  # rows that end at different steps
        assert output.token_ids.shape[1] == max(lengths)
        np.testing.assert_allclose(processor.decode_actions(output.token_ids), output.actions, atol=1e-12)

    def test_one_row(self, policy):
        model, processor = policy
        batch = model.predict_action(**observations(processor))
        for row in range(3):
            single = model.predict_action(**observations(processor, slice(row, row + 1)))
            assert single.shape == (CHUNK, DIM)
            np.testing.assert_allclose(single, batch[row], atol=1e-12)

    def test_padding_on_the_right(self, policy):
        model, processor = policy
        inputs = observations(processor)
        lengths = inputs["attention_mask"].sum(dim=1)
        rows = [ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        assert len(set(lengths.tolist())) > 1
        pad = torch.nn.utils.rnn.pad_sequence
        right = {
            "input_ids": pad(rows, batch_first=True, padding_value=model.config.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
        }
        np.testing.assert_array_equal(
            model.predict_action(**right, pixel_values=inputs["pixel_values"]), model.predict_action(**inputs)
        )

    @pytest.mark.parametrize("kind", ["fitted", "over_bytes"])
    def test_sampled_chunks_are_whole(self, request, kind):
        model, processor = speaking(request.getfixturevalue(kind))
        inputs = observations(processor)
        statistics = processor.norm_stats[KEY]["action"]
        seen = set()
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            sampling = {"do_sample": True, "temperature": 2.0, "top_k": 150, "generator": generator}
            output = model.predict_action(**inputs, **sampling, return_dict=True)
            assert np.abs(output.normalized_actions).max() <= 1
            assert (output.actions >= np.minimum(statistics["q01"], -1) - 1e-9).all()
            seen.add(output.actions.tobytes())
        assert len(seen) == 10
        again = model.predict_action(**inputs, **sampling | {"generator": torch.Generator().manual_seed(9)})
        np.testing.assert_array_equal(again, output.actions)

    def test_probabilities(self, policy, fitted):
        """Of the token that was spoken, as one forward over the whole sequence has them; none behind the end."""
        model, processor = policy
        inputs = observations(processor)
        output = model.predict_action(**inputs, return_dict=True)
        steps = output.token_ids.shape[1]
        assert output.probabilities.shape == (3, steps, fitted.vocab_size)
        is_spoken = output.token_ids != STOP
        assert not is_spoken.all()
        assert not output.probabilities[~is_spoken].any()
        assert not output.entropy[~is_spoken].any()
        for row in range(3):
            spoken = output.token_ids[row][is_spoken[row]]
            ids = torch.cat([inputs["input_ids"][row][inputs["attention_mask"][row] == 1], spoken])
            with torch.no_grad():
                logits = model(input_ids=ids[None], pixel_values=inputs["pixel_values"][row : row + 1]).logits[0]
            expected = logits[-len(spoken) - 1 : -1, END - 200 : END].flip(-1).softmax(dim=-1)
            torch.testing.assert_close(output.probabilities[row][is_spoken[row]], expected, atol=1e-5, rtol=1e-3)
            entropy = torch.special.entr(expected).sum(dim=-1)
            torch.testing.assert_close(output.entropy[row][is_spoken[row]], entropy, atol=1e-4, rtol=1e-3)

    def test_judged_by_bins_as_any_policy(self, policy):
        model, processor = policy
        actions = chunks(1, 8)[0]
        _, of_bins = make_policy(chunk_size=CHUNK)
        expected = np.minimum(END - of_bins.encode_actions(actions), 255)
        np.testing.assert_array_equal(ModelPolicy(model, processor).bins(actions), expected)

    def test_broken_weights(self, fitted):
        model, processor = speaking(fitted)
        torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
        for sampling in ({}, {"do_sample": True}):
            with pytest.raises(FloatingPointError, match="logits are NaN or infinite"):
                model.predict_action(**observations(processor), **sampling)

    def test_without_a_tokenizer(self, fitted):
        model, processor = make_policy(**fields(fitted))
        with pytest.raises(ValueError, match=r"has no tokenizer: assign `model\.fast_tokenizer`"):
            model.predict_action(**observations(processor))
        with pytest.raises(ValueError, match="make it with the tokenizer's `config_fields`"):
            model.fast_tokenizer = FastTokenizer(fitted.bpe, fitted.scale, fitted.min_token + 1)
        other, _ = make_policy()
        with pytest.raises(ValueError, match="with `head_type='tokens'`"):
            other.fast_tokenizer = fitted


def test_it_learns(fitted):
    """Three chunks by heart: what is taught is what is spoken, and comes back as actions."""
    model, processor = speaking(fitted)
    actions = chunks(3, 6)
    inputs = observations(processor, actions=actions)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        loss = model.train()(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    output = model.eval().predict_action(**observations(processor), return_dict=True)
    spoken = [[token_id for token_id in row if token_id != STOP] for row in output.token_ids.tolist()]
    assert spoken == processor.encode_actions(actions)
    np.testing.assert_allclose(output.actions, processor.decode_actions(processor.encode_actions(actions)), atol=1e-9)


PREDICT = """
import json, sys
import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto").eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
inputs = processor(instruction="pick up the cube", images=image)
print(json.dumps([model.predict_action(**inputs).tolist(), processor.encode_actions(np.zeros((4, 7)))]))
"""
PUSH = """
import sys
from transformers import AutoModelForImageTextToText, AutoProcessor

source, target, way = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
(model.push_to_hub if way == "model" else processor.push_to_hub)(target)
print("done")
"""


@pytest.fixture(scope="module")
def saved(policy, tmp_path_factory):
    model, processor = policy
    directory = tmp_path_factory.mktemp("saved") / "policy"
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


class TestSaving:
    def test_round_trip(self, policy, saved):
        model, processor = policy
        again, loaded = load_policy(saved)
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.encode_actions(chunks(3, 7)) == processor.encode_actions(chunks(3, 7))
        inputs = observations(loaded)
        np.testing.assert_array_equal(again.predict_action(**inputs), model.predict_action(**inputs))

    @pytest.mark.parametrize("part", [0, 1])
    def test_model_and_processor_each_write_it(self, policy, saved, tmp_path, part):
        policy[part].save_pretrained(tmp_path)
        name = "fast_tokenizer.json"
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()

    def test_processor_without_a_model(self, policy, tmp_path):
        """Beside an adapter there is no config.json."""
        _, processor = policy
        processor.save_pretrained(tmp_path)
        loaded = repository_class("OpenVLAProcessor").from_pretrained(tmp_path)
        loaded.norm_stats = processor.norm_stats
        assert loaded.encode_actions(chunks(3, 7)) == processor.encode_actions(chunks(3, 7))

    def test_another_tokenizer_can_take_its_place(self, saved):
        """A policy of FAST tokens is the start of one with others."""
        other = FastTokenizer.fit(np.zeros((1, CHUNK, DIM)), vocab_size=150)
        model_class = repository_class("OpenVLAForActionPrediction")
        model = model_class.from_pretrained(saved, **other.config_fields)
        assert model.fast_tokenizer is None
        model.fast_tokenizer = other
        processor = repository_class("OpenVLAProcessor").from_pretrained(saved)
        assert model.predict_action(**observations(processor)).shape == (3, CHUNK, DIM)

    def test_processor_of_another_training(self, saved, tmp_path):
        """Its tokens are as many, and mean something else: nothing is decoded by chance."""
        shutil.copytree(saved, tmp_path / "policy")
        processor = repository_class("OpenVLAProcessor").from_pretrained(saved)
        config = processor.fast_tokenizer.config_fields
        other = FastTokenizer.fit(chunks(400, 3), vocab_size=config["fast_vocab_size"], scale=2 * config["fast_scale"])
        assert other.vocab_size == config["fast_vocab_size"]
        processor.fast_tokenizer = other
        processor.save_pretrained(tmp_path / "policy")
        model = repository_class("OpenVLAForActionPrediction").from_pretrained(tmp_path / "policy")
        assert model.fast_tokenizer is None
        with pytest.raises(ValueError, match="has no tokenizer"):
            model.predict_action(**observations(processor))

    def test_a_base_model_without_one(self, saved, tmp_path):
        for path in saved.iterdir():
            if path.name != "fast_tokenizer.json":
                (tmp_path / path.name).write_bytes(path.read_bytes())
        model, processor = load_policy(tmp_path)
        assert model.fast_tokenizer is processor.fast_tokenizer is None

    def test_a_damaged_file(self, saved, tmp_path):
        for path in saved.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "fast_tokenizer.json").write_text("{")
        for name in ("OpenVLAForActionPrediction", "OpenVLAProcessor"):
            with pytest.raises(ValueError, match=r"fast_tokenizer\.json of .* is no tokenizer"):
                repository_class(name).from_pretrained(tmp_path)

    @pytest.mark.slow
    def test_fresh_process_and_hub(self, policy, saved, tmp_path):
        model, processor = policy
        image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        expected = model.predict_action(**processor(instruction="pick up the cube", images=image))
        ids = processor.encode_actions(np.zeros((CHUNK, DIM)))
        home = tmp_path / "home"
        home.mkdir()
        actions, encoded = json.loads(run(PREDICT, saved, environment={**os.environ, "HF_HOME": str(home)}))
        # The first forward of a process may be off by 1e-4: see conftest.
        np.testing.assert_allclose(actions, expected, atol=1e-3)
        assert encoded == ids
        with HubServer() as server:
            environment = {**server.environment(home), "HF_HUB_OFFLINE": "0"}
            for way in ("model", "processor"):
                run(PUSH, saved, f"me/{way}", way, environment=environment)
                name = "fast_tokenizer.json"
                assert server.files(f"me/{way}")[name] == (saved / name).read_bytes()
            run(PUSH, saved, "me/model", "processor", environment=environment)
            fresh = tmp_path / "fresh"
            fresh.mkdir()
            environment = {**server.environment(fresh), "HF_HUB_OFFLINE": "0"}
            actions, encoded = json.loads(run(PREDICT, "me/model", environment=environment))
            np.testing.assert_allclose(actions, expected, atol=1e-3)
            assert encoded == ids
