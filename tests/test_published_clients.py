# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""The published clients get the actions of this process, in the environment that `PUBLISHED_CLIENTS` names."""

import json
import os

import numpy as np
import pytest
from conftest import TINY_POLICY
from test_training_benchmark import load_benchmark


benchmark = load_benchmark("published_clients")


@pytest.mark.slow
@pytest.mark.parametrize("client", benchmark.CLIENTS)
def test_actions_are_those_in_process(client, tmp_path):
    if "PUBLISHED_CLIENTS" not in os.environ:
        pytest.skip("set PUBLISHED_CLIENTS to an interpreter with openpi-client, json-numpy and requests")
    output = tmp_path / "figures.json"
    arguments = ["--python", os.environ["PUBLISHED_CLIENTS"], "--policy", str(TINY_POLICY), "--actions", "12"]
    assert benchmark.main([*arguments, "--clients", client, "--output", str(output)]) == 0
    figures = json.loads(output.read_text())["clients"][client]
    assert (figures["actions"], figures["different"]) == (12, 0)


def test_a_difference_is_seen():
    expected = np.zeros((3, 1, 7))
    actions = expected.copy()
    actions[1, 0, 6] = 1e-12
    assert benchmark.describe(actions, expected, np.ones(3))["different"] == 1
