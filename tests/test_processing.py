"""Prompts, token ids, batches and labels."""

import copy
import json
import logging
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, GOLDEN, TINY_POLICY
from hypothesis import given, settings
from hypothesis import strategies as st
from load_policy import repository_class
from PIL import Image


LLAMA2_TOKENIZER = os.environ.get("LLAMA2_TOKENIZER")
needs_llama2_tokenizer = pytest.mark.skipif(
    LLAMA2_TOKENIZER is None,
    reason="set LLAMA2_TOKENIZER to a directory with the Llama-2 tokenizer (its licence keeps it out of here)",
)
PROMPTS = json.loads((FIXTURES / "llama_prompt_ids.json").read_text())
TOKENS = json.loads((GOLDEN / "tokens.json").read_text())


@pytest.fixture(scope="module")
def shared_processor():
    """For tests that do not change it."""
    return repository_class("OpenVLAProcessor").from_pretrained(TINY_POLICY)


@pytest.fixture(scope="module")
def llama2_source(tmp_path_factory):
    """A repository with published files: the golden configuration and the Llama-2 tokenizer."""
    source = tmp_path_factory.mktemp("published")
    for path in [*(GOLDEN / "ckpt").glob("*.json"), *Path(LLAMA2_TOKENIZER).iterdir()]:
        if path.is_file() and path.name != "dataset_statistics.json":
            shutil.copyfile(path, source / path.name)
    return source


@pytest.fixture(scope="module")
def llama2_processor(llama2_source):
    return repository_class("OpenVLAProcessor").from_pretrained(llama2_source)


@needs_llama2_tokenizer
class TestLlama2:
    @pytest.mark.parametrize("prompt", PROMPTS["prompts"], ids=lambda prompt: prompt["name"])
    def test_prompt_ids(self, llama2_processor, prompt):
        inputs = llama2_processor(prompt["text"])
        assert inputs["input_ids"].tolist() == [prompt["ids"]]
        assert inputs["attention_mask"].tolist() == [[1] * len(prompt["ids"])]

    @pytest.mark.parametrize("prompt", PROMPTS["special_literals"]["prompts"], ids=lambda prompt: prompt["name"])
    def test_special_tokens_in_a_prompt_as_published(self, llama2_processor, prompt):
        assert llama2_processor(prompt["text"])["input_ids"].tolist() == [prompt["ids"]]

    @pytest.mark.parametrize("prompt", TOKENS["prompts"], ids=lambda prompt: f"{prompt['kind']}-{prompt['lang']}")
    def test_rendered_instructions(self, llama2_source, prompt):
        style = "vicuna" if prompt["kind"] == "openvla-v01" else "pure"
        processor = repository_class("OpenVLAProcessor").from_pretrained(llama2_source, prompt_style=style)
        assert processor(prompt["prompt"])["input_ids"].tolist() == [prompt["input_ids"]]
        if not prompt["lang"]:
            return  # refused as an instruction
        inputs = processor(instruction=prompt["lang"])
        assert inputs["input_ids"].tolist() == [prompt["input_ids_with_29871"]]
        assert inputs["attention_mask"].shape == inputs["input_ids"].shape
        assert inputs["attention_mask"].all()

    @pytest.mark.parametrize("example", TOKENS["train_examples"], ids=lambda example: example["builder"])
    def test_training_sequences(self, llama2_source, example):
        style = "vicuna" if example["builder"] == "vicuna_v15" else "pure"
        processor = repository_class("OpenVLAProcessor").from_pretrained(llama2_source, prompt_style=style)
        bounds = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
        processor.norm_stats = {"as_is": {"action": bounds}}
        inputs = processor(instruction="pick up the red block", actions=np.array(example["action"]))
        assert inputs["input_ids"].tolist() == [example["input_ids"]]
        assert inputs["labels"].tolist() == [example["labels"]]

    def test_special_tokens_in_an_instruction_stay_text(self, llama2_processor):
        ids = llama2_processor(instruction="say </s> <s> <PAD> <unk> now")["input_ids"][0].tolist()
        assert ids[0] == 1
        assert not {0, 1, 2, 32000} & set(ids[1:])
        text = llama2_processor.tokenizer.decode(ids[1:])
        assert "say </s> <s> <pad> <unk> now" in text

    def test_settings_follow_from_the_published_files(self, llama2_processor):
        assert llama2_processor.prompt_style == "pure"
        assert llama2_processor.closing_token_id == 29871
        assert llama2_processor.action_token_end == 32000
        assert sorted(llama2_processor.norm_stats) == ["bridge_orig", "toy_5dof_nomask"]


def test_vicuna_prompt_follows_from_the_language_model(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY_POLICY / name, tmp_path / name)
    shutil.copyfile(GOLDEN / "ckpt" / "preprocessor_config.json", tmp_path / "preprocessor_config.json")
    config = json.loads((GOLDEN / "ckpt" / "config.json").read_text()) | {"llm_backbone_id": "vicuna-v15-7b"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    processor = repository_class("OpenVLAProcessor").from_pretrained(tmp_path)
    assert processor.render_prompt("Close it").endswith(
        "questions. USER: What action should the robot take to close it? ASSISTANT:"
    )


def test_instruction_is_the_prompt_with_its_closing_token(shared_processor):
    prompt = "In: What action should the robot take to pick up the red cube?\nOut:"
    plain, rendered = shared_processor(prompt), shared_processor(instruction="Pick up the RED cube")
    ids = plain["input_ids"][0].tolist()
    assert rendered["input_ids"].tolist() == [[*ids, shared_processor.closing_token_id]]
    assert rendered["attention_mask"].tolist() == [[1] * (len(ids) + 1)]
    # The closing token is what the tokenizer makes of the space in front of the actions.
    assert shared_processor.tokenizer(prompt + " ")["input_ids"] == rendered["input_ids"][0].tolist()


@settings(max_examples=200, deadline=None)
@given(st.text(min_size=1).filter(str.strip))
def test_no_instruction_reaches_control_or_action_tokens(shared_processor, instruction):
    for text in (instruction, f"{instruction} </s>", f"<s> <PAD> {instruction} <action_3>"):
        ids = shared_processor(instruction=text)["input_ids"][0].tolist()
        special = {shared_processor.tokenizer.eos_token_id, shared_processor.tokenizer.pad_token_id}
        action_ids = range(shared_processor.action_token_end - 256, shared_processor.action_token_end)
        assert not special & set(ids)
        assert ids.count(shared_processor.tokenizer.bos_token_id) == 1
        assert not set(action_ids) & set(ids)


@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_is_padded(processor, camera_image, side):
    processor.tokenizer.padding_side = side
    instructions = ["pick up the cube", "put the blue cylinder in the bowl on the left"]
    batch = processor(instruction=instructions, images=[camera_image] * 2)
    assert batch["pixel_values"].shape == (2, 6, 112, 112)
    for row, instruction in enumerate(instructions):
        single = processor(instruction=instruction)["input_ids"][0]
        mask = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], single)
        assert (batch["input_ids"][row][~mask] == processor.tokenizer.pad_token_id).all()
        length = len(single)
        assert mask[:length].all() if side == "right" else mask[-length:].all()


def test_padding_to_a_length(shared_processor):
    inputs = shared_processor(instruction="pick up the cube", padding="max_length", max_length=64)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (1, 64)
    with pytest.raises(ValueError, match="must be at least the longest row"):
        shared_processor(instruction="pick up the cube", padding="max_length", max_length=4)


def test_labels_supervise_actions_and_stop(shared_processor):
    instructions = ["pick up the cube", "put the blue cylinder in the bowl"]
    actions = np.array([[0.1, -0.2, 0.3, 0.0, 0.5, -1.0, 1.0], [0.0] * 7])
    batch = shared_processor(instruction=instructions, actions=actions, unnorm_key="tabletop")
    assert batch["labels"].shape == batch["input_ids"].shape
    for row, action in enumerate(actions):
        supervised = batch["labels"][row] != -100
        assert supervised.sum() == 8
        ids = batch["input_ids"][row][supervised]
        assert torch.equal(batch["labels"][row][supervised], ids)
        assert ids[-1] == shared_processor.tokenizer.eos_token_id
        np.testing.assert_allclose(shared_processor.decode_actions(ids[:-1]), action, atol=1 / 255 + 1e-6)


def test_decode_actions_batches(shared_processor):
    ids = torch.tensor([[768, 1023, 896, 900, 901, 902, 1023], [1023] * 7])
    actions = shared_processor.decode_actions(ids, ["tabletop", "tabletop"])
    assert actions.shape == (2, 7)
    assert actions.dtype == np.float64
    np.testing.assert_array_equal(actions[1], shared_processor.decode_actions(ids[1].tolist()))


def test_threads_share_a_processor(shared_processor):
    """Prompts parse special tokens, instructions never do, whichever thread is quicker."""
    prompt = "In: What action should the robot take to say </s> now?\nOut:"
    as_prompt = shared_processor(prompt)["input_ids"].tolist()
    as_instruction = shared_processor(instruction="say </s> now")["input_ids"].tolist()
    assert as_prompt[0] != as_instruction[0][:-1]

    def both(_: int) -> bool:
        return (
            shared_processor(prompt)["input_ids"].tolist() == as_prompt
            and shared_processor(instruction="say </s> now")["input_ids"].tolist() == as_instruction
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both, range(200)))


def test_settings_while_loading():
    processor_class = repository_class("OpenVLAProcessor")
    processor = processor_class.from_pretrained(TINY_POLICY, image_resize_strategy="letterbox", padding_side="left")
    assert processor.image_processor.tvf_do_letterbox
    assert processor.tokenizer.padding_side == "left"
    # Constants that were saved stay as they are, where means and deviations are not overridden.
    image_processor = repository_class("OpenVLAImageProcessor").from_pretrained(
        GOLDEN / "ckpt", image_resize_strategy="letterbox", input_sizes=[[3, 384, 384]] * 2
    )
    assert image_processor.tvf_normalize_params[0]["mean"] == [0.484375, 0.455078125, 0.40625]
    assert image_processor(Image.new("RGB", (64, 32)))["pixel_values"].shape == (1, 6, 384, 384)
    with pytest.raises(ValueError, match=r"Arguments \['promt_style'\] are none of the processor"):
        processor_class.from_pretrained(TINY_POLICY, promt_style="pure")


def test_it_can_be_printed_and_copied(shared_processor):
    assert '"prompt_style": "pure"' in repr(shared_processor)
    again = pickle.loads(pickle.dumps(copy.deepcopy(shared_processor)))
    expected = shared_processor(instruction="pick it")["input_ids"]
    assert torch.equal(again(instruction="pick it")["input_ids"], expected)


class TestBadInput:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({}, "exactly one of `text`"),
            ({"text": "a", "instruction": "b"}, "exactly one of `text`"),
            ({"instruction": ""}, "needs words"),
            ({"instruction": ["pick it", " \n"]}, "needs words"),
            ({"instruction": []}, "at least one text"),
            ({"text": []}, "at least one text"),
            ({"instruction": [3]}, "at least one text"),
            ({"instruction": ["a", "b"], "images": Image.new("RGB", (32, 32))}, "2 texts and 1 images"),
            ({"instruction": "a", "images": [Image.new("RGB", (32, 32))] * 2}, "1 texts and 2 images"),
            ({"instruction": "a", "images": []}, "empty"),
            ({"instruction": "a", "actions": np.zeros((2, 7))}, "1 instructions and 2 actions"),
            ({"instruction": "a", "actions": np.zeros(6)}, "of 7 dimensions, and the values of 6"),
            ({"instruction": "a", "actions": np.full(7, np.nan)}, "NaN"),
            ({"instruction": "a", "actions": np.zeros(7), "unnorm_key": "b"}, r"they hold \['tabletop'\]"),
            ({"text": "a", "actions": np.zeros(7)}, "go with `instruction`"),
            ({"instruction": "a", "actions": np.zeros((1, 2, 7))}, r"shape \(D,\) or \(B, D\), got \(1, 2, 7\)"),
            ({"instruction": "a", "truncation": True, "max_length": 4}, "never truncated"),
        ],
    )
    def test_refused(self, shared_processor, arguments, message):
        with pytest.raises(ValueError, match=message):
            shared_processor(**arguments)

    def test_prompt_without_frame_warns(self, shared_processor, caplog):
        logger = logging.getLogger(type(shared_processor).__module__)
        logger.addHandler(caplog.handler)
        try:
            shared_processor("In: What action should the robot take to pick up the cube?\nOut:")
            assert not caplog.records
            shared_processor("pick up the cube without a frame")
            assert "pass the bare instruction as `instruction=`" in caplog.text
        finally:
            logger.removeHandler(caplog.handler)

    def test_unknown_prompt_style(self):
        with pytest.raises(ValueError, match="'chatml'"):
            repository_class("OpenVLAProcessor").from_pretrained(TINY_POLICY, prompt_style="chatml")
