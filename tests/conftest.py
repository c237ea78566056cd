"""What the tests share: this checkout's classes, the golden checkpoint, and small policies."""

import json
import os
import sys
import tempfile
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
# Random weights, two layers, pictures of 112 pixels: for tests that want some policy, whichever one is shipped.
TINY_POLICY = FIXTURES / "tiny_policy"

# Before the libraries are imported: no network, and a module cache of our own for each test process.
_home = tempfile.TemporaryDirectory(prefix="openvla-tests-")
os.environ.update(HF_HOME=_home.name, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tools"), str(REPOSITORY / "tests")]

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from load_policy import load_policy, repository_class  # noqa: E402
from PIL import Image  # noqa: E402


# How long an example takes says more about the machine than about the code.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

GOLDEN = FIXTURES / "openvla_tiny"
# What travels with every checkpoint.
REMOTE_CODE = sorted([*REPOSITORY.glob("*_openvla.py"), REPOSITORY / "handler.py"])


def golden_towers() -> list[dict]:
    """`tower_configs` of the golden checkpoint, whose config.json cannot express small towers."""
    built = json.loads((GOLDEN / "ckpt" / "tower_sizes.json").read_text())["towers_as_built"]
    return [
        {
            **{name: tower[name] for name in ("embed_dim", "depth", "num_heads", "norm_eps")},
            "mlp_dim": tower["mlp_hidden"],
            "class_token": tower["has_class_token"],
            "num_registers": tower["reg_tokens"],
            "layer_scale": tower["layerscale"] == "LayerScale",
            "attention_pool": name == "fused_featurizer",
        }
        for name, tower in built.items()
    ]


def load_golden(**kwargs):
    model_class = repository_class("OpenVLAForActionPrediction")
    return model_class.from_pretrained(GOLDEN / "ckpt", tower_configs=golden_towers(), **kwargs)


@pytest.fixture(scope="session")
def golden_model():
    """The golden checkpoint in float32. Do not change it."""
    return load_golden(dtype=torch.float32)


@pytest.fixture(scope="session", autouse=True)
def throw_away_the_first_forward(golden_model):
    """
    In about one process of forty, torch 2.13's CPU build computes half of the first cosine of the rotary embedding
    with an error of 1e-4; from the second forward on it is right. Comparisons to the bit start after it.
    """
    with torch.no_grad():
        golden_model(input_ids=torch.arange(1, 40)[None], pixel_values=torch.zeros(1, 6, 224, 224))


@pytest.fixture(scope="session")
def golden_image_processor():
    return repository_class("OpenVLAImageProcessor").from_pretrained(GOLDEN / "ckpt")


@pytest.fixture
def policy():
    """The tiny policy with its processor, in float32, the model fresh for each test."""
    return load_policy(TINY_POLICY, dtype=torch.float32)


@pytest.fixture
def processor():
    """The processor of the tiny policy, fresh for each test."""
    return repository_class("OpenVLAProcessor").from_pretrained(TINY_POLICY)


@pytest.fixture(scope="session")
def camera_image() -> Image.Image:
    """A picture with structure at every scale."""
    y, x = np.mgrid[0:240, 0:320]
    channels = [np.sin(x / 17) * np.cos(y / 23), np.sin((x + y) / 7), np.cos(x * y / 3000)]
    return Image.fromarray(np.uint8(np.stack(channels, axis=-1) * 127 + 128))
