# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""OpenVLA-OFT: converted checkpoints against the numbers that the reference computed with the same weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, GOLDEN, REPOSITORY, golden_towers
from convert_checkpoint import convert
from load_policy import load_policy
from oft_checkpoint import OFTOptions
from PIL import Image
from safetensors.torch import load_file


OFT = FIXTURES / "oft_tiny"
LIBERO = OFTOptions(platform="libero", num_images=2)
HEAD, PROPRIO = "action_head--latest_checkpoint.pt", "proprio_projector--latest_checkpoint.pt"
FILM = "vision_backbone--latest_checkpoint.pt"
COMPONENTS = {
    "l1": {HEAD: HEAD, PROPRIO: PROPRIO},
    "diffusion": {
        HEAD: f"diffusion/{HEAD}",
        "noisy_action_projector--latest_checkpoint.pt": "diffusion/noisy_action_projector--latest_checkpoint.pt",
        PROPRIO: PROPRIO,
    },
    "film": {HEAD: HEAD, PROPRIO: PROPRIO, FILM: "film_plain_vision_backbone.pt"},
    "film_lora": {HEAD: HEAD, PROPRIO: PROPRIO, FILM: f"film_lora/{FILM}"},
}
ONE_IMAGE = {"num_images": 1, "use_proprio": False, "proprio_dim": None}
TOKENS = {"head_type": "tokens"}
# Name of the reference's run: the converted checkpoint, and what is overridden while loading.
RUNS = {
    "l1_1img": ("l1", ONE_IMAGE),
    "l1_proprio": ("l1", {}),
    "discrete_1img": ("l1", ONE_IMAGE | TOKENS),
    "discrete_proprio": ("l1", TOKENS),
    "film_l1_proprio": ("film", {}),
    "filmlora_l1_proprio": ("film_lora", {}),
}


def make_published(directory: Path, kind: str) -> Path:
    """A repository of OpenVLA-OFT as it lies on the Hub, with towers of this size."""
    directory.mkdir()
    shutil.copy(GOLDEN / "ckpt" / "model.safetensors", directory)
    for name in ("preprocessor_config.json", "generation_config.json"):
        shutil.copy(GOLDEN / "ckpt" / name, directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPOSITORY / name, directory)
    shutil.copy(OFT / "ckpt" / "dataset_statistics.json", directory)
    config = json.loads((GOLDEN / "ckpt" / "config.json").read_text()) | {"tower_configs": golden_towers()}
    (directory / "config.json").write_text(json.dumps(config))
    for name, source in COMPONENTS[kind].items():
        shutil.copy(OFT / "ckpt" / source, directory / name)
    return directory


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Directory of a converted checkpoint in float32, made at its first use."""
    root, made = tmp_path_factory.mktemp("oft"), {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = root / f"{kind}_converted"
            convert(make_published(root / kind, kind), made[kind], dtype="float32", oft=LIBERO)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def golden():
    return json.loads((OFT / "golden_float32.json").read_text()), load_file(OFT / "golden_float32.safetensors")


@pytest.fixture(scope="module")
def pixels(golden_image_processor):
    """(12, 224, 224) of both camera images, and of both in the other order."""
    names = ("img0_320x240", "img2_224x224")
    views = [
        golden_image_processor(Image.open(GOLDEN / "images" / f"{name}.png"))["pixel_values"][0] for name in names
    ]
    return torch.stack([torch.cat(views), torch.cat(views[::-1])])  # (2, 12, 224, 224)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to 2e-5 of the scale of the expected values."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual.float(), expected.float(), atol=2e-5 * scale, rtol=0)


def inputs_of(model, golden, pixels) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": golden[1]["input_ids"], "pixel_values": pixels[:1, : 6 * model.config.num_images]}
    if model.config.use_proprio:
        inputs["proprio"] = golden[1]["proprio_norm"][None].float()
    return inputs


@pytest.mark.parametrize("run", RUNS)
def test_actions(converted, golden, pixels, run):
    """Hidden states of the actions, and the actions in the dataset's units."""
    kind, overrides = RUNS[run]
    model, _ = load_policy(converted(kind), dtype=torch.float32, **overrides)
    seen = {}
    if model.action_head is not None:
        model.action_head.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0][0]))
    inputs = inputs_of(model, golden, pixels)
    output = model.predict_action(**inputs, return_dict=True)
    assert output.actions.shape == (8, 7)
    expected = golden[1][f"{run}.actions"].numpy()
    if model.action_head is None:
        assert_same_where_the_reference_is_valid(output, expected, golden[1][f"{run}.actions_hidden"], model)
        return
    assert_close(seen["hidden"], golden[1][f"{run}.actions_hidden"])
    np.testing.assert_allclose(output.actions, expected, atol=2e-5 * np.abs(expected).max())


def assert_same_where_the_reference_is_valid(output, expected, hidden, model) -> None:
    """The reference takes the best of the whole vocabulary, which in a random model may be no action token."""
    with torch.no_grad():
        best = model.get_output_embeddings()(hidden).argmax(dim=-1)  # (56,)
    valid = (best >= model.config.action_token_begin) & (best < model.config.action_token_end)
    assert (output.token_ids[0][valid] == best[valid]).all()
    where = valid.view(8, 7).numpy()
    assert where.sum() >= 3
    np.testing.assert_allclose(output.actions[where], expected[where], atol=1e-6)
