# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Two replicas behind one address, by Ray Serve. Runs where `ray[serve]` is installed."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import load_policy

from serving.client import PolicyClient, PolicyServerError


ray = pytest.importorskip("ray", reason="Ray is not installed")
deployment = pytest.importorskip("serving.ray_deployment")

# Of a machine that has other work: Ray gives up on a proxy after seconds, and runs its workers when nobody else does.
PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
INSTRUCTIONS = ["pick up the red cube", "push the blue brick to the left"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def place():
    """Where two replicas of the tiny policy listen."""
    port = free_port()
    options = deployment.Options(str(TINY_POLICY), replicas=2, cpus=0.5, token="secret", dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENCE.items():
            patch.setenv(name, value)
        try:
            deployment.start(options, port)
            yield f"127.0.0.1:{port}"
        finally:
            deployment.serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="module")
def observations():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (6, 112, 112, 3), dtype=np.uint8)
    return [{"image": image, "instruction": INSTRUCTIONS[row % 2]} for row, image in enumerate(pictures)]


def replicas() -> list[dict]:
    return [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "SERVE_REPLICA" in actor["name"]]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "ws"])
def test_actions_are_those_in_process(place, observations, protocol):
    model, processor = load_policy(TINY_POLICY, dtype=torch.float32)

    def ask(observation):
        with PolicyClient(f"{protocol}://{place}", token="secret", timeout=60.0) as client:
            return client.infer(observation).actions[0]

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(ask, observations))
    for observation, answer in zip(observations, answers, strict=True):
        inputs = processor(instruction=observation["instruction"], images=observation["image"])
        np.testing.assert_allclose(answer, model.predict_action(**inputs), rtol=0, atol=1e-9)
    assert len(replicas()) == 2


@pytest.mark.slow
def test_token(place, observations):
    for protocol in ("http", "ws"):
        with PolicyClient(f"{protocol}://{place}", token="wrong") as client, pytest.raises(PolicyServerError):
            client.infer(observations[0])


@pytest.mark.slow
def test_replica_that_dies_is_replaced(place, observations):
    victim = replicas()[0]
    ray.kill(ray.get_actor(victim["name"], namespace=victim["namespace"]))
    with PolicyClient(f"http://{place}", token="secret", timeout=60.0) as client:
        for observation in observations:
            assert client.infer(observation).actions.shape == (1, 7)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (len(replicas()) < 2 or victim in replicas()):
        time.sleep(0.5)
    assert len(replicas()) == 2
    assert victim not in replicas()


@pytest.mark.parametrize("options", [{"replicas": 0}, {"gpus": -1.0}, {"cpus": 0.0}])
def test_options(options):
    with pytest.raises(ValueError, match="At least one replica with a share of a processor"):
        deployment.Options("policy", **options)


def test_batches_to_prepare_for(monkeypatch):
    with pytest.raises(ValueError, match="batches have 1 to 8 rows"):
        deployment.Options("policy", warm_up=(9,))
    assert deployment.parse_arguments(["--policy", ".", "--warm_up", "1", "2"])[0].warm_up == [1, 2]
    prepared = []

    async def warm_up(_, batch_sizes):
        prepared.append(batch_sizes)

    monkeypatch.setattr("serving.service.Service.warm_up", warm_up)
    app = deployment._build_app(deployment.Options(str(TINY_POLICY), dtype="float32", warm_up=(1, 8)))
    app.state.service.close()
    assert prepared == [(1, 8)]


def test_nobody_else_without_a_token(capsys, monkeypatch):
    monkeypatch.delenv("OPENVLA_TOKEN", raising=False)
    for token, message in (([], "say --token"), (["--token", ""], "must be ASCII text")):
        with pytest.raises(SystemExit):
            deployment.parse_arguments(["--policy", ".", "--host", "0.0.0.0", *token])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="lets others in"):
        deployment.Options("policy", host="0.0.0.0")
    with pytest.raises(ValueError, match="`token` is missing"):
        deployment.application({"policy": "policy"})
