# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""`pipeline(model=repository, trust_remote_code=True)` gives the actions of `predict_action`."""

import base64
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REMOTE_CODE, REPOSITORY, TINY_POLICY
from hub_server import HubServer
from load_policy import load_policy, repository_class
from torch.utils.data import Dataset
from transformers import pipeline


INSTRUCTIONS = ["pick up the red cube", "push the blue brick to the left of the table", "put it in the bowl"]

# What a user runs who has the repository alone: from its id, and from what a pipeline saves.
ALONE = """
import json, sys
import numpy as np
from transformers import pipeline

source, directory = sys.argv[1:]
image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)

def act(source):
    policy = pipeline(model=source, trust_remote_code=True, device="cpu")
    return policy, policy(image, "pick up the cube")["actions"].tolist()

policy, action = act(source)
policy.save_pretrained(directory)
assert act(directory)[1] == action
if "/" in source and not source.startswith("/"):
    policy.push_to_hub("me/again")
    assert act("me/again")[1] == action
print(json.dumps([policy.task, action]))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The tiny policy as it is saved, code included."""
    directory = tmp_path_factory.mktemp("repository") / "tiny"
    for part in load_policy(TINY_POLICY, dtype=torch.float32):
        part.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def policy_pipeline(repository):
    return pipeline(model=str(repository), trust_remote_code=True, device="cpu")


def expected(images, instructions) -> np.ndarray:
    """float64 (B, 7), by `predict_action`."""
    model, processor = load_policy(TINY_POLICY, dtype=torch.float32)
    inputs = processor(instruction=instructions, images=images)
    return np.reshape(model.predict_action(**inputs, unnorm_key="tabletop"), (len(instructions), -1))


def test_one_observation(policy_pipeline, camera_image, tmp_path):
    assert policy_pipeline.task == "robotics"
    action = expected([camera_image], INSTRUCTIONS[:1])[0]
    path = tmp_path / "camera.png"
    camera_image.save(path)
    encoded = base64.b64encode(path.read_bytes()).decode()
    for image in (camera_image, np.asarray(camera_image), path, str(path), encoded):
        output = policy_pipeline(image, INSTRUCTIONS[0])
        assert output.keys() == {"actions"}
        assert output["actions"].dtype == np.float64
        np.testing.assert_array_equal(output["actions"], action)
    np.testing.assert_array_equal(
        policy_pipeline({"images": camera_image, "instruction": INSTRUCTIONS[0], "unnorm_key": "tabletop"})["actions"],
        action,
    )


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batch(policy_pipeline, camera_image, batch_size):
    """Instructions of different lengths, and a last batch that is not full."""
    images = [camera_image, camera_image.rotate(90), camera_image.rotate(180)]
    outputs = policy_pipeline(images, INSTRUCTIONS, batch_size=batch_size, return_uncertainty=True)
    np.testing.assert_allclose(
        [output["actions"] for output in outputs], expected(images, INSTRUCTIONS), rtol=0, atol=1e-12
    )
    assert all(output["entropy"].shape == (7,) for output in outputs)
    assert all(output["entropy"].dtype == np.float32 for output in outputs)


def test_stream(policy_pipeline, camera_image):
    class Observations(Dataset):
        def __len__(self):
            return len(INSTRUCTIONS)

        def __getitem__(self, index):
            return {"images": camera_image, "instruction": INSTRUCTIONS[index]}

    actions = expected([camera_image] * 3, INSTRUCTIONS)
    for observations in (Observations(), (Observations()[index] for index in range(3))):
        outputs = policy_pipeline(observations, batch_size=2)
        np.testing.assert_allclose([output["actions"] for output in outputs], actions, rtol=0, atol=1e-12)


def test_settings_of_the_pipeline_hold_for_all_calls(repository, camera_image):
    policy = pipeline("robotics", model=str(repository), trust_remote_code=True, device="cpu", return_uncertainty=True)
    assert policy(camera_image, INSTRUCTIONS[0]).keys() == {"actions", "entropy"}
    assert policy(camera_image, INSTRUCTIONS[0], return_uncertainty=False).keys() == {"actions"}
    draws = [
        policy(camera_image, INSTRUCTIONS[0], do_sample=True, generator=torch.Generator().manual_seed(seed))["actions"]
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_chunks_and_states(tmp_path, camera_image):
    """A policy that looks at two pictures, takes the state, and gives chunks by a head."""
    options = {"head_type": "l1", "chunk_size": 3, "num_images": 2, "use_proprio": True, "action_dim": 7}
    options |= {"proprio_dim": 8, "attention_mode": "bidirectional"}
    model, processor = load_policy(TINY_POLICY, dtype=torch.float32, changes=options)
    bounds = {"q01": [-1.0] * 8, "q99": [1.0] * 8}
    model.norm_stats = {"tabletop": {**model.norm_stats["tabletop"], "proprio": bounds}}
    processor.norm_stats = model.norm_stats
    for part in (model, processor):
        part.save_pretrained(tmp_path / "chunked")
    policy = pipeline(model=str(tmp_path / "chunked"), trust_remote_code=True, device="cpu")
    images, states = [camera_image, camera_image.rotate(90)], np.full((2, 8), 0.02)
    assert policy(images, INSTRUCTIONS[0], state=states[0])["actions"].shape == (3, 7)
    outputs = policy([images, images], INSTRUCTIONS[:2], state=states, batch_size=2)
    inputs = processor(instruction=INSTRUCTIONS[:2], images=[images, images], state=states)
    actions = model.predict_action(**inputs)
    np.testing.assert_allclose([output["actions"] for output in outputs], actions, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="`head_type='l1'` does not say"):
        policy(images, INSTRUCTIONS[0], state=states[0], return_uncertainty=True)


class TestErrors:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            ({"images": "IMAGE"}, "An observation is an image with an `instruction`, or a dictionary"),
            ({"images": {"images": "IMAGE", "instruction": "go", "prompt": "go"}}, r"\['prompt'\] are unknown"),
            ({"images": "IMAGE", "state": [1.0]}, "`state` goes with `instruction`"),
            ({"images": ["IMAGE"], "instruction": ["go", "stop"]}, "2 instructions, 1 images and 2 states"),
            ({"images": "nowhere.png", "instruction": "go"}, "nowhere.png"),
            ({"images": "IMAGE", "instruction": " "}, "Every instruction needs words"),
            ({"images": "IMAGE", "instruction": "go", "unnorm_key": "x"}, r"they hold \['tabletop'\]"),
            ({"images": "IMAGE", "instruction": "go", "num_beams": 3}, r"Arguments \['num_beams'\] are unknown"),
        ],
    )
    def test_says_what_is_wrong(self, policy_pipeline, camera_image, call, message):
        def fill(value):
            if isinstance(value, dict):
                return {name: fill(each) for name, each in value.items()}
            return [fill(each) for each in value] if isinstance(value, list) else _picture(value)

        def _picture(value):
            return camera_image if value == "IMAGE" else value

        with pytest.raises(ValueError, match=message):
            policy_pipeline(**fill(call))


def test_configuration_is_saved_after_a_pipeline_was_made(repository, policy_pipeline, tmp_path):
    """`pipeline` puts classes in the place of the names in the configuration, which JSON does not hold."""
    entry = {"impl": "pipeline_openvla.OpenVLAPipeline", "pt": ["AutoModelForImageTextToText"], "type": "multimodal"}
    policy_pipeline.model.config.save_pretrained(tmp_path)
    for directory in (REPOSITORY, repository, tmp_path):
        assert json.loads((directory / "config.json").read_text())["custom_pipelines"] == {"robotics": entry}
    config_class = repository_class("OpenVLAConfig")
    first, second = config_class(), config_class()
    first.custom_pipelines["robotics"]["pt"] = ()
    assert second.custom_pipelines == {"robotics": entry}


@pytest.mark.slow
class TestAlone:
    """In fresh processes with an empty module cache."""

    def run(self, *arguments, environment, cwd) -> list:
        result = subprocess.run(
            [sys.executable, "-c", ALONE, *map(str, arguments)],
            env=environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.strip().splitlines()[-1])

    def test_directory(self, repository, tmp_path):
        moved = tmp_path / "moved"
        shutil.copytree(repository, moved)
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        task, action = self.run(moved, tmp_path / "saved", environment=environment, cwd=tmp_path)
        assert (task, len(action)) == ("robotics", 7)
        assert {path.name for path in (tmp_path / "saved").glob("*.py")} == {path.name for path in REMOTE_CODE}

    def test_hub(self, repository, tmp_path):
        with HubServer() as server:
            server.create_repo("me/tiny", {path.name: path.read_bytes() for path in repository.iterdir()})
            environment = {**server.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
            task, _ = self.run("me/tiny", tmp_path / "saved", environment=environment, cwd=tmp_path)
            assert task == "robotics"
            assert server.files("me/again").keys() >= {path.name for path in REMOTE_CODE}
