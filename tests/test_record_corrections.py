"""What the expert would have done where a policy went: episodes, labels and the dataset around them."""

import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import record_corrections as module
from conftest import TINY_POLICY
from record_corrections import record_corrections

from tabletop.environment import TabletopEnv
from tabletop.expert import Expert
from tabletop.record import Recording


RECORDING = Recording(episodes=5, seed=4, image_size=16, cameras=("image",))


class Upwards:
    """A policy that knows one motion."""

    def next_actions(self, observations: dict[int, dict], begun: list[int]) -> np.ndarray:
        assert set(begun) <= set(observations)
        assert all({"instruction", "image", "state"} <= set(each) for each in observations.values())
        return np.tile([0.0, 0.0, 0.04, 0.0, 0.0, 0.0, 1.0], (len(observations), 1))


def read(dataset) -> tuple[list[dict], list[dict]]:
    rows = pq.read_table(dataset / "data/chunk-000/file-000.parquet").to_pylist()
    return rows, [json.loads(line) for line in (dataset / "meta/tabletop.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def corrections(tmp_path_factory):
    output = tmp_path_factory.mktemp("corrections") / "dataset"
    outcomes = record_corrections(Upwards(), RECORDING, output, expert_share=0.0, max_steps=3, num_envs=2)
    return output, outcomes


def test_what_was_done_and_what_was_right(corrections):
    """Played again from the recorded seeds, every label is the expert's in that very state."""
    rows, stories = read(corrections[0])
    assert [story["episode_index"] for story in stories] == list(range(5))
    env = TabletopEnv(cameras=())
    for story in stories:
        env.reset(seed=story["seed"], options=story["options"])
        assert env.instruction == story["instruction"]
        for row in [row for row in rows if row["episode_index"] == story["episode_index"]]:
            np.testing.assert_array_equal(row["action"], np.float32([0, 0, 0.04, 0, 0, 0, 1]))
            np.testing.assert_array_equal(row["expert_action"], Expert(env).action())
            env.step(np.array(row["action"]))


def test_failures_are_kept(corrections):
    rows, stories = read(corrections[0])
    assert corrections[1] == {"timeout": 5}
    assert [(story["outcome"], story["length"]) for story in stories] == [("timeout", 3)] * 5
    assert len(rows) == 15


def test_expert_takes_its_share(tmp_path):
    record_corrections(Upwards(), RECORDING, tmp_path / "dataset", expert_share=0.5, max_steps=20, num_envs=5)
    rows, _ = read(tmp_path / "dataset")
    by_expert = [row["action"] == row["expert_action"] for row in rows]
    assert 0.3 < np.mean(by_expert) < 0.7


def test_dataset_does_not_depend_on_the_environments_side_by_side(corrections, tmp_path):
    record_corrections(Upwards(), RECORDING, tmp_path / "dataset", expert_share=0.0, max_steps=3, num_envs=4)
    assert read(tmp_path / "dataset") == read(corrections[0])


def test_output_is_never_overwritten(corrections):
    with pytest.raises(FileExistsError, match="choose another output"):
        record_corrections(Upwards(), RECORDING, corrections[0])


def test_command(tmp_path, monkeypatch, capsys):
    arguments = ["--policy", str(TINY_POLICY), "--episodes", "2", "--max_steps", "2", "--hold_out", "ball"]
    monkeypatch.setattr(sys, "argv", ["record_corrections.py", *arguments, "--output", str(tmp_path / "new")])
    module.main()
    assert "2 timeout" in capsys.readouterr().out
    rows, stories = read(tmp_path / "new")
    assert len(rows) == 4
    assert not any("ball" in story["options"]["target"] for story in stories)


def test_unknown_object_is_a_message(tmp_path, monkeypatch, capsys):
    arguments = [
        "--policy",
        str(TINY_POLICY),
        "--episodes",
        "2",
        "--output",
        str(tmp_path / "new"),
        "--hold_out",
        "hat",
    ]
    monkeypatch.setattr(sys, "argv", ["record_corrections.py", *arguments])
    with pytest.raises(SystemExit):
        module.main()
    assert "`hold_out` takes a list of colours" in capsys.readouterr().err
