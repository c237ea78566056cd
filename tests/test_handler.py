# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""The handler of an Inference Endpoint, called as the endpoint does: with the decoded body of a request."""

import base64
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import load_policy
from PIL import Image

from handler import MAX_BATCH_SIZE, EndpointHandler


# What an endpoint does with a repository: it puts its directory on the path and imports `handler`.
DEPLOY = """
import json, sys
sys.path.insert(0, sys.argv[1])
from handler import EndpointHandler

print(json.dumps(EndpointHandler(sys.argv[1])(json.loads(sys.stdin.read()))))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    directory = tmp_path_factory.mktemp("repository") / "deployed"
    for part in load_policy(TINY_POLICY, dtype=torch.float32):
        part.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def endpoint(repository):
    return EndpointHandler(str(repository), device="cpu")


def encoded(image: Image.Image, format: str = "PNG") -> str:
    stream = io.BytesIO()
    image.save(stream, format)
    return base64.b64encode(stream.getvalue()).decode()


@pytest.fixture(scope="module")
def observation(camera_image):
    return {"image": encoded(camera_image), "instruction": "pick up the red cube"}


@pytest.fixture(scope="module")
def action(camera_image):
    model, processor = load_policy(TINY_POLICY, dtype=torch.float32)
    inputs = processor(instruction="pick up the red cube", images=camera_image)
    return model.predict_action(**inputs, unnorm_key="tabletop").tolist()


def test_one_observation(endpoint, observation, action):
    assert endpoint({"inputs": observation}) == {"actions": action}
    url = {**observation, "image": f"data:image/png;base64,{observation['image']}", "unnorm_key": "tabletop"}
    answer = endpoint({"inputs": url, "parameters": {"return_uncertainty": True, "unnorm_key": "tabletop"}})
    assert json.loads(json.dumps(answer))["actions"] == action
    assert len(answer["entropy"]) == 7


def test_batch(endpoint, observation, action, camera_image):
    other = {"images": [encoded(camera_image.rotate(90), "JPEG")], "instruction": "push the blue brick to the left"}
    answers = endpoint({"inputs": [observation, other]})
    np.testing.assert_allclose(answers[0]["actions"], action, rtol=0, atol=1e-12)
    assert len(answers) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "Send JSON with `inputs`"),
        ({"inputs": "pick up the red cube"}, "got str"),
        ({"inputs": []}, "1 to 32 observations, got 0"),
        ({"inputs": [{}] * (MAX_BATCH_SIZE + 1)}, "got 33"),
        ({"inputs": {"instruction": "go"}}, "either an `image` or a list of `images`"),
        ({"inputs": {"image": "aGk=", "instruction": ["go"]}}, r"needs an `instruction` in words, got \['go'\]"),
        ({"inputs": {"image": "aGk=", "instruction": "go"}}, "4 characters is not the base64 of a PNG or JPEG"),
        ({"inputs": {"image": "/etc/passwd", "instruction": "go"}}, "is not the base64"),
        ({"inputs": {"image": "http://127.0.0.1/a.png", "instruction": "go"}}, "is not the base64"),
        ({"inputs": {"image": 3, "instruction": "go"}}, "got int"),
        ({"inputs": {"images": "aGk=", "instruction": "go"}}, "`images` must be a list of base64 strings, got str"),
        ({"inputs": {"image": "aGk=", "text": "go"}}, r"unknown fields \['text'\]"),
        ({"inputs": {}, "parameters": {"timeout": 1}}, r"`parameters` has unknown fields \['timeout'\]"),
        ({"inputs": {}, "parameters": [1]}, "`parameters` must be an object, got list"),
    ],
)
def test_bodies_that_cannot_be_used(endpoint, data, message):
    """An endpoint answers a `ValueError` with its message and status 400."""
    with pytest.raises(ValueError, match=message):
        endpoint(data)


def test_pictures_that_cannot_be_used(endpoint, observation):
    for image in (
        observation["image"][:400],
        encoded(Image.new("RGB", (9000, 8))),
        encoded(Image.new("F", (9, 9)), "TIFF"),
    ):
        with pytest.raises(ValueError, match=r"cannot be decoded|both sides|is not the base64"):
            endpoint({"inputs": {**observation, "image": image}})
    with pytest.raises(ValueError, match="takes none"):
        endpoint({"inputs": {**observation, "state": [0.0] * 8}})


@pytest.mark.slow
def test_deployed_from_what_is_saved(repository, observation, action, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", DEPLOY, str(repository)],
        input=json.dumps({"inputs": observation}),
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.strip().splitlines()[-1]) == {"actions": action}
