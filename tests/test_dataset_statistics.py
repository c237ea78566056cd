"""Dataset statistics: equal to the reference's, to NumPy's and to the fixtures' truth, without reading pictures."""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compute_statistics import describe, main, split_name
from conftest import FIXTURES, REPOSITORY, repository_class
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from robot_data import statistics as statistics_module
from robot_data.episode import BadEpisodeError
from robot_data.sources import open_source
from robot_data.standardize import config_for
from robot_data.statistics import compute_statistics, find_weaknesses


LEROBOT, RLDS = FIXTURES / "lerobot", FIXTURES / "rlds"
DATA = "data/chunk-000/file-000.parquet"
GRIPPER_MASK = [True] * 6 + [False]
KEYS = ["mean", "std", "max", "min", "q01", "q99"]


def lerobot_truth(fixture: str) -> dict[str, np.ndarray]:
    frames = json.loads((LEROBOT / f"{fixture}.truth.json").read_text())["frames"]
    keys = {"action": "action", "proprio": "state"}
    return {block: np.array([frame[key] for frame in frames], np.float32) for block, key in keys.items()}


def rlds_truth(*splits: str) -> dict[str, np.ndarray]:
    truth = json.loads((RLDS / "mini_libero_no_noops_truth.json").read_text())
    steps = [step for split in splits for episode in truth[split] for step in episode["steps"]]
    return {
        "action": np.array([step["action"] for step in steps], np.float32),
        "proprio": np.array([step["observation"]["state"] for step in steps], np.float32),
    }


def assert_equals_numpy(block: dict[str, list], values: np.ndarray) -> None:
    """Bounds and quantiles to the bit, moments to 1e-9."""
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    for key, expected in {"min": values.min(0), "max": values.max(0), "q01": q01, "q99": q99}.items():
        assert block[key] == expected.tolist(), key
    wide = values.astype(np.float64)
    scale = np.abs(wide).max(0)
    np.testing.assert_array_less(np.abs(block["mean"] - wide.mean(0)), 1e-9 * scale + 1e-300)
    np.testing.assert_array_less(np.abs(block["std"] - wide.std(0)), 1e-9 * scale + 1e-300)


def make_source(*episodes: dict) -> tuple:
    """A source of such episodes, and its description."""
    source = open_source([{"task": "move", **episode} for episode in episodes], name="made")
    columns = [key for key in episodes[0] if key != "task"]
    return source, config_for("made", columns, [], {"cameras": {}})


def compute(*episodes: dict, **options) -> dict:
    source, config = make_source(*episodes)
    return compute_statistics(source, config, **options)


def random_actions(steps: int, width: int = 7, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, width)).astype(np.float32)


def copy_fixture(name: str, destination: Path) -> Path:
    return Path(shutil.copytree(FIXTURES / name, destination / Path(name).name))


def set_action(dataset: Path, row: int, value: float) -> None:
    path = dataset / DATA
    table = pq.read_table(path)
    actions = np.stack(table["action"].to_numpy(zero_copy_only=False))
    actions[row, 2] = value
    place, field = table.column_names.index("action"), table.schema.field("action")
    pq.write_table(table.set_column(place, field, pa.array(list(actions), field.type)), path)


# The numbers


@pytest.mark.parametrize("fixture", ["v30_images", "v30_video", "v21_video"])
def test_lerobot_fixtures_have_their_true_statistics(fixture):
    source = open_source(LEROBOT / fixture)
    computed = compute_statistics(source, config_for(source.name, source.columns, source.images))
    assert (computed["num_transitions"], computed["num_trajectories"]) == (88, 5)
    assert list(computed["action"]) == [*KEYS, "mask"]
    assert list(computed["proprio"]) == KEYS
    assert computed["action"]["mask"] == GRIPPER_MASK
    for block, values in lerobot_truth(fixture).items():
        assert_equals_numpy(computed[block], values)
    exact = json.loads((LEROBOT / f"{fixture}.truth.json").read_text())["exact_stats"]
    for block, key in (("action", "action"), ("proprio", "observation.state")):
        for name in KEYS:
            np.testing.assert_allclose(computed[block][name], exact[key][name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("split", "splits", "episodes"), [("all", ("train", "val"), 6), ("train", ("train",), 4), ("val", ("val",), 2)]
)
def test_rlds_fixture_has_its_true_statistics(split, splits, episodes):
    """Its episode without an instruction counts as well: training drops it, statistics do not."""
    source = open_source(RLDS / "mini_libero_no_noops", split=split)
    computed = compute_statistics(source, config_for(source.name, source.columns, source.images))
    truth = rlds_truth(*splits)
    assert (computed["num_transitions"], computed["num_trajectories"]) == (len(truth["action"]), episodes)
    for block, values in truth.items():
        assert_equals_numpy(computed[block], values)


def test_quantiles_are_those_of_the_reference():
    """
    Golden numbers of OpenVLA's call, `np.quantile(actions, 0.01, axis=0)` on float32 with NumPy 1.26.4. NumPy 2 rounds
    the same call to float32, and differs from the tenth digit on.
    """
    actions = np.array([[i * i * k % 1009 / 997 for k in (37, 53, 11)] for i in range(1, 89)], np.float32)
    computed = compute({"action": actions[:50]}, {"action": actions[50:]})["action"]
    assert computed["q01"] == [0.0038816449628211558, 0.018014042023569345, 0.035466398410499096]
    assert computed["q99"] == [1.0055365896224975, 0.9433801233768462, 0.9821163636445999]


@given(
    values=npst.arrays(
        np.float32,
        st.tuples(st.integers(1, 300), st.integers(1, 3)),
        elements=st.floats(-1e6, 1e6, width=32),
    ),
    cuts=st.lists(st.integers(1, 299), max_size=4),
    memory_bytes=st.sampled_from([1, 64, statistics_module.MEMORY_BYTES]),
    block=st.sampled_from([7, statistics_module.BLOCK]),
)
def test_statistics_equal_numpys_however_they_are_stored(values, cuts, memory_bytes, block):
    parts = [part for part in np.split(values, sorted({cut for cut in cuts if cut < len(values)})) if len(part)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics_module, "MEMORY_BYTES", memory_bytes)
        patch.setattr(statistics_module, "BLOCK", block)
        computed = compute(*({"action": part, "observation.state": part[:, ::-1]} for part in parts))
    assert (computed["num_transitions"], computed["num_trajectories"]) == (len(values), len(parts))
    assert_equals_numpy(computed["action"], values)
    assert_equals_numpy(computed["proprio"], values[:, ::-1])


def test_numbers_beyond_the_memory_lie_in_files(monkeypatch):
    rolled = []

    class Spy(tempfile.SpooledTemporaryFile):
        def rollover(self):
            rolled.append(self)
            super().rollover()

    monkeypatch.setattr(statistics_module, "SpooledTemporaryFile", Spy)
    actions = random_actions(1000)
    in_memory = compute({"action": actions})
    assert not rolled
    monkeypatch.setattr(statistics_module, "MEMORY_BYTES", 1024)
    assert compute({"action": actions}) == in_memory
    assert len(rolled) == 7
    assert all(file.closed for file in rolled)


def test_small_deviations_from_a_large_mean_are_not_lost():
    """Sums of squares in one pass would give a standard deviation of zero, or of a negative number."""
    actions = np.tile(np.float32([[1e6], [1e6 + 0.25]]), (5000, 1))
    computed = compute({"action": actions})["action"]
    assert computed["mean"] == [1e6 + 0.125]
    assert computed["std"] == [0.125]


def test_a_dataset_without_a_state_has_no_proprio():
    assert "proprio" not in compute({"action": random_actions(5)})


def test_the_configuration_takes_the_result():
    computed = compute({"action": random_actions(200), "observation.state": random_actions(200, 8)})
    config = repository_class("OpenVLAConfig")(norm_stats={"made": computed})
    assert config.norm_stats == {"made": computed}


# What is counted


def test_filters_of_training_are_not_applied_and_others_are():
    moving, still = random_actions(20), np.zeros((10, 7), np.float32)
    source, config = make_source({"action": moving}, {"action": still, "task": ""})
    zero_motion = {"q01": [-1.0] * 6, "q99": [1.0] * 6}
    filters = replace(config.filters, zero_motion=zero_motion)
    computed = compute_statistics(source, replace(config, filters=filters))
    assert (computed["num_transitions"], computed["num_trajectories"]) == (30, 2)
    filters = replace(config.filters, no_ops=True)
    computed = compute_statistics(source, replace(config, filters=filters))
    assert (computed["num_transitions"], computed["num_trajectories"]) == (20, 1)
    filters = replace(config.filters, unlabeled_steps=True)
    assert compute_statistics(source, replace(config, filters=filters))["num_transitions"] == 20


def test_statistics_are_of_the_standardised_actions():
    source, config = make_source({"action": random_actions(50)})
    config = config_for(
        "made", ["action"], [], {"cameras": {}, "action": ["action[:6]", "action[6] | invert"], "drop_first": 10}
    )
    computed = compute_statistics(source, config)
    expected = random_actions(50)[10:]
    expected[:, 6] = 1 - expected[:, 6]
    assert computed["num_transitions"] == 40
    assert_equals_numpy(computed["action"], expected)


def test_no_picture_is_asked_for(tmp_path):
    """The videos are gone, and pictures in parquet files are not even requested."""
    dataset = copy_fixture("lerobot/v30_video", tmp_path)
    shutil.rmtree(dataset / "videos")
    source = open_source(dataset)
    config = config_for(source.name, source.columns, source.images)
    assert compute_statistics(source, config)["num_transitions"] == 88

    source, requests = open_source(LEROBOT / "v30_images"), []

    class Watched:
        name, num_units = source.name, source.num_units

        def read(self, unit, columns=None, images=None):
            requests.append((tuple(columns), tuple(images)))
            return source.read(unit, columns, images)

    compute_statistics(Watched(), config_for(source.name, source.columns, source.images))
    assert requests == [(("action", "observation.state"), ())] * 5


def test_each_episode_is_told_of():
    lengths = []
    compute({"action": random_actions(3)}, {"action": random_actions(5)}, on_episode=lambda e: lengths.append(len(e)))
    assert lengths == [3, 5]


# Faults


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_not_finite_names_its_episode(tmp_path, caplog, value):
    dataset = copy_fixture("lerobot/v30_images", tmp_path)
    set_action(dataset, 40, value)  # of episode 2
    source = open_source(dataset)
    config = config_for(source.name, source.columns, source.images)
    with pytest.raises(BadEpisodeError, match=r"file-\d+.parquet, episode 2: .*(nan|inf) at frame 3, dimension 2"):
        compute_statistics(source, config)
    computed = compute_statistics(source, config, skip_bad_episodes=True)
    kept = np.r_[0:37, 54:88]
    assert (computed["num_transitions"], computed["num_trajectories"]) == (71, 4)
    assert_equals_numpy(computed["action"], lerobot_truth("v30_images")["action"][kept])
    assert "Skipped" in caplog.text and "episode 2" in caplog.text


@pytest.mark.parametrize("key", ["action", "observation.state"])
def test_an_episode_of_another_width_is_bad(key):
    episodes = [{"action": random_actions(4), "observation.state": random_actions(4)} for _ in range(3)]
    episodes[1][key] = random_actions(4, 6)
    with pytest.raises(BadEpisodeError, match=r"episode 1: its .* is 6 wide, in the episodes before 7"):
        compute(*episodes)
    computed = compute(*episodes, skip_bad_episodes=True)
    assert (computed["num_transitions"], computed["num_trajectories"]) == (8, 2)
    assert_equals_numpy(computed["proprio"], np.tile(random_actions(4), (2, 1)))


def test_nothing_left_is_an_error():
    source, config = make_source({"action": np.zeros((3, 7), np.float32)})
    with pytest.raises(ValueError, match="made has no steps"):
        compute_statistics(source, replace(config, filters=replace(config.filters, no_ops=True)))


# Masks


def test_a_mask_that_is_given_is_kept(caplog):
    mask = [True, False] * 7
    actions = {"action": random_actions(5, 14)}
    assert compute(actions, mask=mask)["action"]["mask"] == mask
    assert "gripper" not in caplog.text
    with pytest.raises(ValueError, match="mask has 14 dimensions, and the action of made 7"):
        compute({"action": random_actions(5)}, mask=mask)


def test_the_last_dimension_of_another_robot_is_the_gripper_with_a_warning(caplog):
    assert compute({"action": random_actions(5, 14)})["action"]["mask"] == [True] * 13 + [False]
    assert "the last of 14 dimensions of the action is taken for the gripper" in caplog.text
    caplog.clear()
    compute({"action": random_actions(5)})
    assert not caplog.text


# Weak dimensions


@pytest.mark.parametrize(
    ("column", "note"),
    [
        (lambda values: values, None),
        (lambda values: np.full_like(values, 0.25), "constant: always 0.25"),
        (lambda values: values * 1e-5, "almost constant"),
        (lambda values: np.where(np.arange(len(values)) == 7, 5000, values), "almost constant but for outliers"),
        (lambda values: np.where(np.arange(len(values)) == 7, 50, values), None),
    ],
)
def test_weak_dimensions_are_named(caplog, column, note):
    actions = random_actions(1000)
    actions[:, 3] = column(actions[:, 3])
    with caplog.at_level(logging.WARNING):
        found = find_weaknesses(compute({"action": actions}))
    if note is None:
        assert not found and not caplog.text
    else:
        ((block, dimension, text),) = found
        assert (block, dimension) == ("action", 3) and text.startswith(note)
        assert f"made: dimension 3 of the action is {note}" in caplog.text


def test_a_gripper_is_weak_only_where_it_is_cut_off_or_constant():
    """Its quantiles do not matter."""
    actions = random_actions(1000)
    actions[:, 6] = np.arange(1000) == 7
    assert not find_weaknesses(compute({"action": actions}))
    actions[:, 6] *= 80
    ((block, dimension, note),) = find_weaknesses(compute({"action": actions}))
    assert (block, dimension) == ("action", 6) and "cut off outside [-1, 1]: 0 to 80" in note


# The command


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_several_datasets_go_into_one_file(tmp_path, capsys):
    output = tmp_path / "new" / "dataset_statistics.json"
    status, text, _ = run(
        capsys, LEROBOT / "v30_images", f"libero={RLDS / 'mini_libero_no_noops'}", "--output", output
    )
    assert status == 0
    written = json.loads(output.read_text())
    assert list(written) == ["v30_images", "libero"]
    assert repository_class("OpenVLAConfig")(norm_stats=written).norm_stats == written
    assert_equals_numpy(written["libero"]["action"], rlds_truth("train", "val")["action"])
    assert "libero: 31 steps, 6 episodes" in text
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_an_existing_file_is_kept_updated_or_replaced(tmp_path, capsys):
    output = tmp_path / "dataset_statistics.json"
    before = {"other": {"action": {"q01": [0.0], "q99": [1.0]}}, "v30_images": {}}
    output.write_text(json.dumps(before))
    status, _, errors = run(capsys, LEROBOT / "v30_images", "--output", output)
    assert status == 1 and "--update adds to it" in errors and json.loads(output.read_text()) == before
    assert run(capsys, LEROBOT / "v30_images", "--output", output, "--update")[0] == 0
    written = json.loads(output.read_text())
    assert written["other"] == before["other"] and written["v30_images"]["num_transitions"] == 88
    assert run(capsys, LEROBOT / "v30_images", "--output", output, "--overwrite")[0] == 0
    assert list(json.loads(output.read_text())) == ["v30_images"]


def test_a_dataset_is_described_in_yaml(tmp_path, capsys):
    description, output = tmp_path / "datasets.yaml", tmp_path / "out.json"
    description.write_text("v30_images: {action: ['action[:2]', 'action[6] | invert'], state: null}\n")
    arguments = ("--config", description, "--mask", "0,1,1", "--output", output)
    assert run(capsys, LEROBOT / "v30_images", *arguments)[0] == 0
    (computed,) = json.loads(output.read_text()).values()
    actions = lerobot_truth("v30_images")["action"][:, [0, 1, 6]]
    actions[:, 2] = 1 - actions[:, 2]
    assert_equals_numpy(computed["action"], actions)
    assert computed["action"]["mask"] == [False, True, True] and "proprio" not in computed


def test_the_table_says_which_dimension_is_weak(tmp_path, capsys):
    description, output = tmp_path / "datasets.yaml", tmp_path / "out.json"
    description.write_text("v30_images: {action: ['action[:2]', zeros(1), 'action[3:]']}\n")
    _, text, _ = run(capsys, LEROBOT / "v30_images", "--config", description, "--output", output)
    assert [line.split()[0] for line in text.splitlines() if "constant: always 0" in line] == ["z"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no folder nowhere"),
        (["=nowhere"], "Expected SOURCE or name=SOURCE"),
        ([LEROBOT / "v30_images", f"v30_images={LEROBOT / 'v30_video'}"], "Two datasets are called 'v30_images'"),
        ([LEROBOT / "v30_images", "--split", "test"], "no split 'test'"),
        ([LEROBOT / "v30_images", "--mask", "1,0"], "The mask has 2 dimensions"),
        ([LEROBOT / "v30_images", "--config", "YAML:wrong: {action: action}"], "describes ['wrong']"),
        ([LEROBOT / "v30_images", "--config", "YAML:[1, 2]"], "must give a description for each dataset"),
        ([LEROBOT / "v30_images", "--config", "YAML:{"], "is not YAML"),
        ([LEROBOT / "v30_images", "--config", "YAML:v30_images: {actions: action}"], "unknown keys ['actions']"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(tmp_path, capsys, arguments, message):
    if "--config" in arguments:
        path = tmp_path / "datasets.yaml"
        path.write_text(arguments[-1].removeprefix("YAML:"))
        arguments = [*arguments[:-1], path]
    status, _, errors = run(capsys, *arguments, "--output", tmp_path / "out.json")
    assert status == 1
    assert errors.startswith("error: ") and message in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


def test_a_damaged_episode_stops_the_command_unless_it_is_skipped(tmp_path, capsys):
    dataset, output = copy_fixture("lerobot/v30_images", tmp_path), tmp_path / "out.json"
    set_action(dataset, 0, np.nan)
    status, _, errors = run(capsys, dataset, "--output", output)
    assert status == 1 and "file-000.parquet, episode 0" in errors and not output.exists()
    assert run(capsys, dataset, "--output", output, "--skip_bad_episodes")[0] == 0
    assert json.loads(output.read_text())["v30_images"]["num_trajectories"] == 4


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a=b/c", ("a", "b/c")),
        ("owner/data", (None, "owner/data")),
        ("gs://bucket/key=1", (None, "gs://bucket/key=1")),
        ("a=gs://bucket/key=1", ("a", "gs://bucket/key=1")),
    ],
)
def test_names_of_sources(source, expected):
    assert split_name(source) == expected


def test_a_known_dataset_keeps_its_recipe_under_another_name():
    columns = ["action", "observation/state", "language_instruction"]
    source = SimpleNamespace(
        name="bridge_orig", columns=columns, images=["observation/image_0", "observation/image_1"]
    )
    assert describe("mine", source, None).drop_first == 1
    source.name = "folder"
    assert describe("bridge_orig", source, None).drop_first == 1
    assert describe("mine", source, None).drop_first == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux tells it")
def test_a_million_steps_take_seconds_and_little_memory(tmp_path):
    """Files of 100 episodes, each a row group of 200 steps, as LeRobot writes them."""
    write_million_steps(tmp_path / "million")
    command = [sys.executable, "-c", MEASURED, tmp_path / "million", "--output", tmp_path / "out.json"]
    tools = {"PYTHONPATH": str(REPOSITORY / "tools")}
    measured = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | tools).stdout
    assert json.loads((tmp_path / "out.json").read_text())["million"]["num_transitions"] == 1_000_000
    seconds, kibibytes = map(float, measured.splitlines()[-1].split())
    assert seconds < 10
    assert kibibytes < 500 * 1024


# Time of the processor, to which other work on the machine does not count, and the peak of memory.
MEASURED = """
import re, sys, time
from pathlib import Path
from compute_statistics import main
assert main(sys.argv[1:]) == 0
print(time.process_time(), re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def write_million_steps(folder: Path, episodes: int = 5000, length: int = 200, per_file: int = 100) -> None:
    shutil.copytree(LEROBOT / "v30_images" / "meta", folder / "meta")
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"] = {key: value for key, value in info["features"].items() if value["dtype"] != "image"}
    info["splits"] = {"train": f"0:{episodes}"}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for file in range(episodes // per_file):
        tables = []
        for episode in range(file * per_file, (file + 1) * per_file):
            start = episode * length
            numbers = {key: rng.standard_normal(length * size) for key, size in SIZES.items()}
            vectors = {
                key: pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float32)), SIZES[key])
                for key, values in numbers.items()
            }
            integers = {"episode_index": episode, "task_index": 0}
            columns = {key: pa.array(np.full(length, value)) for key, value in integers.items()}
            tables.append(pa.table({**vectors, **columns, "index": np.arange(start, start + length)}))
            span = {"dataset_from_index": start, "dataset_to_index": start + length, "length": length}
            rows.append({"episode_index": episode, "data/chunk_index": 0, "data/file_index": file, **span})
        with pq.ParquetWriter(folder / "data" / "chunk-000" / f"file-{file:03d}.parquet", tables[0].schema) as writer:
            for table in tables:
                writer.write_table(table)
    shutil.rmtree(folder / "meta" / "episodes")
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")


SIZES = {"action": 7, "observation.state": 8}
