"""benchmarks/few_shot.py and benchmarks/heads.py: what they ask the commands of this repository to do."""

import json
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY_POLICY


sys.path.append(str(REPOSITORY / "benchmarks"))  # behind the packages, which some scripts share a name with

import evaluate_policy
import few_shot
import heads

import tabletop.record
from tabletop.scene import HELD_OUT
from training.arguments import parse_arguments


FIGURES = {"success_rate": 0.5, "wilson_95": [0.3, 0.7], "trials": 4}


class Commands:
    """Takes the place of `run`: every command is parsed as by its program, and leaves what the next looks for."""

    def __init__(self):
        self.recorded, self.trained, self.evaluated = [], [], []

    def __call__(self, command: list) -> None:
        program, *flags = map(str, command[1:] if command[0] == "-m" else command)
        if program == "tabletop.record":
            parsed = tabletop.record.parse_arguments(flags)
            self.recorded.append(parsed)
            self.leave(Path(parsed.output) / "meta" / "info.json", {})
        elif program == "train_hf.py":
            arguments = parse_arguments(flags)
            self.trained.append(arguments)
            Path(arguments[2].output_dir).mkdir()
        else:
            parser = evaluate_policy.make_parser()
            parsed = parser.parse_args(flags)
            evaluate_policy.check_arguments(parsed, vars(parser.parse_args(["--policy", parsed.policy])))
            self.evaluated.append(parsed)
            results = {"tasks": dict.fromkeys(parsed.tasks or ("pick", "push"), FIGURES), "all": FIGURES}
            self.leave(parsed.output_dir / "results.json", results)

    @staticmethod
    def leave(path: Path, content: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


@pytest.fixture
def commands(monkeypatch):
    commands = Commands()
    for module in (few_shot, heads):
        monkeypatch.setattr(module, "run", commands)
    monkeypatch.chdir(REPOSITORY)
    return commands


def test_few_shot(tmp_path, monkeypatch, commands):
    output = tmp_path / "few_shot.json"
    flags = ["--policy", str(TINY_POLICY), "--folder", str(tmp_path / "runs"), "--output", str(output)]
    flags += ["--demonstrations", "0", "10", "--rollouts", "4", "--max_steps", "3"]
    monkeypatch.setattr(sys, "argv", ["few_shot.py", *flags])
    few_shot.main()
    known, new = commands.recorded
    assert (new.objects, known.objects, known.hold_out) == (list(HELD_OUT), None, list(HELD_OUT))
    assert {(each.episodes, each.image_size, each.nudges) for each in (known, new)} == {(10, 112, 0.25)}
    assert known.seed != new.seed
    ((model, data, training),) = commands.trained
    assert model.use_peft
    assert training.max_steps == 3
    assert data.dataset == [known.output, new.output]
    assert Path(data.statistics) == TINY_POLICY / "dataset_statistics.json"
    targets = [parsed.env_arguments for parsed in commands.evaluated]
    assert targets == [{"hold_out": list(HELD_OUT)}, {"objects": list(HELD_OUT)}] * 2
    assert {parsed.seed for parsed in commands.evaluated} == {few_shot.FIRST_SEED}
    assert {Path(parsed.policy) for parsed in commands.evaluated} == {TINY_POLICY, Path(training.output_dir)}
    runs = json.loads(output.read_text())["runs"]
    assert runs["10"]["held_out"]["pick"] == FIGURES
    assert runs["0"]["training_seconds"] == 0.0
    assert output.with_suffix(".png").stat().st_size
    few_shot.main()  # nothing is made again
    assert (len(commands.recorded), len(commands.trained)) == (2, 1)
    monkeypatch.setattr(sys, "argv", ["few_shot.py", *flags[:-1], "4"])
    with pytest.raises(ValueError, match="choose another --folder"):
        few_shot.main()


@pytest.mark.parametrize("cameras", [["image"], ["image", "wrist_image"]])
def test_heads(tmp_path, monkeypatch, commands, cameras):
    def time_predictions(policies, repetitions):
        return {name: {"prediction_ms": 8.0, "action_ms": 1.0, "actions_per_prediction": 8} for name in policies}

    monkeypatch.setattr(heads, "time_predictions", time_predictions)
    output = tmp_path / "heads.json"
    flags = ["--policy", str(TINY_POLICY), "--folder", str(tmp_path / "runs"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["heads.py", *flags, "--num_images", str(len(cameras)), "--max_steps", "3"])
    heads.main()
    (recorded,) = commands.recorded
    assert (recorded.hold_out, recorded.cameras) == (list(HELD_OUT), cameras)
    assert {model.num_images for model, _, _ in commands.trained} == {len(cameras)}
    assert [model.head_type for model, _, _ in commands.trained] == [
        each.get("head_type") for each in heads.HEADS.values()
    ]
    assert {(training.max_steps, training.seed) for _, _, training in commands.trained} == {(3, 42)}
    assert {tuple(data.dataset) for _, data, _ in commands.trained} == {(recorded.output,)}
    assert [Path(parsed.policy) for parsed in commands.evaluated] == [
        Path(training.output_dir) for _, _, training in commands.trained
    ]
    assert len({(parsed.seed, parsed.episodes) for parsed in commands.evaluated}) == 1
    assert json.loads(output.read_text())["runs"].keys() == heads.HEADS.keys()


def test_predictions_are_timed():
    found = heads.time_predictions({"tokens": TINY_POLICY}, repetitions=2)["tokens"]
    assert found["prediction_ms"] == found["action_ms"] > 0
    assert found["actions_per_prediction"] == 1
