# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""Rollouts through a policy server are those of the model in this process."""

import json

import evaluate_policy
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY_POLICY
from load_policy import load_policy
from policy_server import StubPolicy, running

from evaluation.environments import Environment
from evaluation.policies import ModelPolicy
from evaluation.rollout import Job, rollout
from serving.app import Settings
from serving.engine import Policy
from serving.remote_policy import RemotePolicy


def run(*arguments) -> int:
    return evaluate_policy.main([str(argument) for argument in arguments])


def results(directory) -> dict:
    """Of every episode, all but the time."""
    return json.loads((directory / "results.json").read_text())["episodes"]


@pytest.fixture(scope="module")
def tiny():
    return load_policy(TINY_POLICY, dtype=torch.float32)


@pytest.fixture(scope="module")
def server(tiny):
    with running(Policy(*tiny, "tiny")) as server:
        yield server


@pytest.mark.parametrize("protocol", ["http", "ws"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_actions_are_those_in_process(server, tiny, protocol, num_envs):
    make_env = Environment(arguments={"cameras": ("image",), "image_size": 112, "max_steps": 4}).make
    jobs = [Job(task, seed) for task, seed in (("pick", 1), ("push", 2), ("pick", 3))]
    remote = RemotePolicy(f"{protocol}://{server.address}")
    assert (remote.image_size, remote.action_dim, remote.cameras) == (112, 7, ("image",))
    local = rollout(ModelPolicy(*tiny), jobs, make_env, num_envs=num_envs)
    try:
        through_server = rollout(remote, jobs, make_env, num_envs=num_envs)
    finally:
        remote.close()
    for here, there in zip(local, through_server, strict=True):
        np.testing.assert_allclose(there.actions, here.actions, rtol=0, atol=0 if num_envs == 1 else 1e-9)


def test_command(server, tmp_path, monkeypatch):
    """The token comes in the environment, and goes into no results."""
    flags = ("--episodes", 2, "--tasks", "pick", "--num_envs", 1, "--max_steps", 5)
    assert run("--policy", TINY_POLICY, *flags, "--output_dir", tmp_path / "here") == 0
    tiny = load_policy(TINY_POLICY, dtype=torch.float32)
    monkeypatch.setenv("OPENVLA_TOKEN", "very secret")
    with running(Policy(*tiny, "tiny"), Settings(token="very secret")) as guarded:
        assert run("--policy", f"ws://{guarded.address}", *flags, "--output_dir", tmp_path / "there") == 0
    assert results(tmp_path / "here") == results(tmp_path / "there")
    assert "secret" not in (tmp_path / "there" / "results.json").read_text()


def test_what_cannot_be_evaluated(server, capsys):
    policy = ("--policy", server.url)
    for flags, message in (
        (("--open_loop", "demonstrations"), "`--open_loop` needs the model itself"),
        (("--device", "cuda"), "--device would be ignored: the server has loaded its policy"),
        (("--unnorm_key", "x"), "`unnorm_key='x'` is not one of the server's datasets ['tabletop']"),
        (("--actions_per_chunk", 2), "the policy's chunks have 1 action(s)"),
    ):
        assert run(*policy, *flags) == 1
        assert message in capsys.readouterr().err
    with running(StubPolicy(), Settings(token="secret")) as guarded:
        assert run("--policy", guarded.url) == 1
    assert "The policy server cannot be used: The token is missing or wrong" in capsys.readouterr().err


class FailingPolicy(StubPolicy):
    def predict(self, rows):
        raise FloatingPointError("The logits are not finite.")


def test_server_that_fails_in_a_rollout(capsys):
    """One line, and no stack trace."""
    with running(FailingPolicy()) as failing:
        assert run("--policy", failing.url, "--unnorm_key", "narrow", "--episodes", 1, "--tasks", "pick") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.endswith("(500)")


@pytest.mark.slow
def test_shipped_policy_succeeds_alike(tmp_path):
    """Episode by episode, the same outcome after as many steps."""
    flags = ("--episodes", 1, "--seed", 600000, "--num_envs", 1, "--max_steps", 60)
    flags += ("--env_arguments", '{"hold_out": ["purple", "ball"]}')
    assert run("--policy", REPOSITORY, *flags, "--output_dir", tmp_path / "here") == 0
    with running(Policy(*load_policy(REPOSITORY), "small")) as server:
        for protocol in ("http", "ws"):
            directory = tmp_path / protocol
            assert run("--policy", f"{protocol}://{server.address}", *flags, "--output_dir", directory) == 0
            assert results(directory) == results(tmp_path / "here")
