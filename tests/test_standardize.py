"""Descriptions of datasets: rules, pieces, the registry, filters."""

import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import yaml
from conftest import FIXTURES
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from robot_data import action_rules, standardize
from robot_data.episode import BadEpisodeError, RawEpisode
from robot_data.files import Files
from robot_data.filters import Filters, Subset, moving_steps
from robot_data.rlds import RLDSSource
from robot_data.standardize import (
    DatasetConfig,
    Piece,
    config_for,
    default_cameras,
    registry,
    registry_name,
    required_columns,
    required_images,
)


TEXT = "observation/natural_language_instruction"
STEPS = 9
MIXTURES = yaml.safe_load(standardize.REGISTRY.with_name("mixtures.yaml").read_text())

gripper_values = st.floats(-1.5, 1.5, width=32)
grippers = hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 2)), elements=gripper_values)


def column(*values):
    return np.array(values, np.float32)[:, None]


def make_raw(columns, images=(), instructions=None, **fields) -> RawEpisode:
    steps = len(next(iter(columns.values())))
    pictures = {key: [f"{key} {step}".encode() for step in range(steps)] for key in images}
    return RawEpisode(
        dataset=fields.pop("dataset", "some_dataset"),
        file="some.file",
        index=fields.pop("index", 3),
        columns=columns,
        instructions=["stack the cups"] * steps if instructions is None else instructions,
        images=pictures,
        **fields,
    )


def make_config(**entry) -> DatasetConfig:
    return DatasetConfig.from_dict({"cameras": {}, "action": "action", **entry}, "some_dataset")


# Rules


def slow_binarize(values):
    result, carry = [], values[-1]
    for value in reversed(values):
        carry = 1.0 if value > 0.95 else 0.0 if value < 0.05 else carry
        result.append(carry)
    return result[::-1]


def slow_relative_to_absolute(values):
    events = [-1 if value > 0.1 else 1 if value < -0.1 else 0 for value in values]
    state = -next((event for event in events if event), -1)
    result = []
    for event in events:
        state = event or state
        result.append((state + 1) / 2)
    return result


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("binarize", [1.0, 0.5, 0.0, 0.3, 0.99], [1, 0, 0, 1, 1]),
        ("binarize", [0.96, 0.95, 0.05, 0.04], [1, 0, 0, 0]),  # the limits themselves are in between
        ("binarize", [0.95, 1.0, 0.05, 1.0, 0.95, 0.0, 0.05], [1, 1, 1, 1, 0, 0, np.float32(0.05)]),
        ("binarize", [1.0, 0.4, 0.6], [1, 0.6, 0.6]),  # a trail takes the last raw value
        ("binarize", [0.5], [0.5]),
        ("relative_to_absolute", [0, 0, 1, 0, -1, 0], [1, 1, 0, 0, 1, 1]),
        ("relative_to_absolute", [0, -1, 0, 1], [0, 1, 1, 0]),  # first opens, so it was closed
        ("relative_to_absolute", [0, 0, 0], [1, 1, 1]),
        ("relative_to_absolute", [0.1, 0.11, -0.1, -0.11], [1, 0, 0, 1]),  # the thresholds themselves hold
        ("invert", [0, 0.25, 1], [1, 0.75, 0]),
        ("clip", [-1, 0.25, 2], [0, 0.25, 1]),
    ],
)
def test_gripper_rules_by_hand(rule, values, expected):
    result = action_rules.RULES[rule](column(*values))
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, column(*expected))


@given(grippers)
def test_gripper_rules_follow_their_definitions(gripper):
    for rule, oracle in (
        (action_rules.binarize, slow_binarize),
        (action_rules.relative_to_absolute, slow_relative_to_absolute),
    ):
        expected = np.stack([oracle(values) for values in gripper.T], axis=1)
        np.testing.assert_array_equal(rule(gripper), expected)
    assert set(np.unique(action_rules.relative_to_absolute(gripper))) <= {0, 1}


@given(hnp.arrays(np.float32, (5, 1), elements=st.sampled_from(np.linspace(0, 1, 257, dtype=np.float32))))
def test_inverting_twice_changes_nothing(gripper):
    np.testing.assert_array_equal(action_rules.invert(action_rules.invert(gripper)), gripper)


def rotation_matrix(roll, pitch, yaw):
    def about(axis, angle):
        matrix, (i, j) = np.eye(3), [(1, 2), (2, 0), (0, 1)][axis]
        matrix[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        return matrix

    return about(2, yaw) @ about(1, pitch) @ about(0, roll)


def quaternion_matrix(quaternion):
    """By rotating the axes: v -> q v q*."""
    *axis, w = quaternion
    axis = np.array(axis)
    vectors = np.eye(3)
    turned = [v + 2 * w * np.cross(axis, v) + 2 * np.cross(axis, np.cross(axis, v)) for v in vectors]
    return np.stack(turned, axis=1)


@settings(max_examples=200)
@given(hnp.arrays(np.float64, 4, elements=st.floats(-1, 1)).filter(lambda q: np.linalg.norm(q) > 1e-2))
def test_euler_angles_give_the_rotation_of_the_quaternion(quaternion):
    quaternion /= np.linalg.norm(quaternion)
    roll, pitch, yaw = action_rules.quaternion_to_euler(quaternion[None])[0]
    assert abs(pitch) <= np.pi / 2 and max(abs(roll), abs(yaw)) <= np.pi
    # Within 1e-6 of gimbal lock in the sine of the pitch, which is 1.5e-3 in the angle, the lock is assumed.
    np.testing.assert_allclose(rotation_matrix(roll, pitch, yaw), quaternion_matrix(quaternion), atol=3e-3)
    if abs(quaternion_matrix(quaternion)[2, 0]) < 1 - 2e-6:
        np.testing.assert_allclose(rotation_matrix(roll, pitch, yaw), quaternion_matrix(quaternion), atol=1e-7)


@pytest.mark.parametrize(
    ("quaternion", "angles"),
    [
        ([0, 0, 0, 1], [0, 0, 0]),
        ([np.sin(0.2), 0, 0, np.cos(0.2)], [0.4, 0, 0]),  # x first, w last
        ([0, np.sin(-0.3), 0, np.cos(-0.3)], [0, -0.6, 0]),
        ([0, 0, 1, 0], [0, 0, np.pi]),
        ([0, np.sqrt(0.5), 0, np.sqrt(0.5)], [0, np.pi / 2, 0]),
        ([-0.5, 0.5, 0.5, 0.5], [-np.pi / 2, np.pi / 2, 0]),  # gimbal lock: yaw is 0
    ],
)
def test_euler_angles_by_hand(quaternion, angles):
    result = action_rules.quaternion_to_euler(np.array([quaternion], np.float32))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, [angles], atol=1e-6)


def test_displacement_is_the_plain_difference_to_the_next_state():
    states = np.array([[1, 3.1], [4, -3.1], [4.5, -3.0]], np.float32)
    result = action_rules.displacement(states)
    np.testing.assert_allclose(result[:-1], [[3, -6.2], [0.5, 0.1]], rtol=1e-5)
    assert np.isnan(result[-1]).all()


def test_zlib_columns():
    rows = np.arange(6, dtype="<f4").reshape(2, 3)
    values = np.array([zlib.compress(row.tobytes()) for row in rows], object)
    np.testing.assert_array_equal(action_rules.zlib_float32(values), rows)
    assert action_rules.zlib_float32(rows) is rows
    config = make_config(action="action", state="state | zlib_float32")
    for damaged in (b"", b"no zlib", zlib.compress(b"abc"), zlib.compress(b"abcd" * 2), "text"):
        values[1] = damaged
        with pytest.raises(BadEpisodeError, match=r"episode 3: `state \| zlib_float32`: "):
            standardize.standardize(make_raw({"action": np.zeros((2, 7)), "state": values}), config)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8), min_size=1))
def test_code_points_decode_to_their_text(texts):
    codes = np.zeros((len(texts), 9), np.int32)
    for row, text in zip(codes, texts, strict=True):
        row[: len(text)] = [ord(character) for character in text]
        row[len(text) + 1 :] = 77  # whatever follows the first 0
    assert action_rules.decode_code_points(codes) == texts
    assert action_rules.decode_code_points(codes[:, :0]) == [""] * len(texts)


@pytest.mark.parametrize("code", [-1, 0xD800, 0x110000])
def test_numbers_that_are_no_code_points_are_bad(code):
    columns = {"action": np.zeros((2, 7)), "words": np.array([[104, 105, 0], [104, code, 0]])}
    with pytest.raises(BadEpisodeError, match="episode 3: the instruction 'words' cannot be decoded"):
        standardize.standardize(make_raw(columns), make_config(instruction="words"))


# Pieces


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("action", [0, 1, 2, 3, 4]),
        ("action[:2]", [0, 1]),
        ("action[2:4]", [2, 3]),
        ("action[-3:]", [2, 3, 4]),
        ("action[:-1]", [0, 1, 2, 3]),
        ("action[-4:-2]", [1, 2]),
        ("action[3]", [3]),
        ("action[-1]", [4]),
        ("action[-5]", [0]),
        ("action[1] | invert", [0]),
        ("action[3:] | clip | invert", [0, 0]),
        ("zeros(3)", [0, 0, 0]),
        ("ones(1)", [1]),
        ("scalar", [0]),
        ("scalar[0]", [0]),
    ],
)
def test_pieces_select_as_python_does(text, expected):
    columns = {"action": np.arange(5)[None] + np.zeros((2, 1), int), "scalar": np.array([False, True])}
    values = Piece.parse(text).read(make_raw(columns), 0, 2)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values[0], expected)


@pytest.mark.parametrize("text", ["action[6]", "action[-6]", "action[:6]", "action[-6:]", "action[4:2]", "scalar[1]"])
def test_pieces_that_reach_beyond_their_column(text):
    raw = make_raw({"action": np.zeros((2, 5)), "scalar": np.zeros(2)})
    with pytest.raises(ValueError, match=r"is not within column '(action|scalar)', which is [51] wide"):
        standardize.standardize(raw, make_config(action=text))


@pytest.mark.parametrize("text", ["", "action[", "action[]", "action[a]", "action[1:-]", "action[::2]", "twos(3)"])
def test_what_cannot_be_read_as_a_piece(text):
    with pytest.raises(ValueError, match="some_dataset: cannot read"):
        make_config(action=["zeros(1)", text])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"action": "action | flip"}, r"unknown rules \['flip'\]; known: \['binarize'"),
        ({"actions": "action"}, r"unknown keys \['actions'\]; known: \['cameras', 'action'"),
        ({"action": []}, "`action` has no pieces"),
        ({"action": 7}, "`action` is a string or a list of strings, got 7"),
        ({"cameras": "image"}, "`cameras` gives a key for each role, got 'image'"),
        ({"cameras": {"primary": 1}}, "`cameras.primary` is a string or a list of strings, got 1"),
        ({"drop_first": -1}, "`drop_first` is a whole number from 0 on, got -1"),
        ({"drop_last": True}, "`drop_last` is a whole number from 0 on, got True"),
        ({"action_dim": 0}, "`action_dim` is a whole number from 1 on, got 0"),
        ({"text": 5}, "`text` is text, got 5"),
        ({"action": "state | displacement"}, "`displacement` needs `drop_last: 1`"),
        ({"instruction": "task", "text": "go"}, "give one of them"),
        ({"filters": {"noops": True}}, r"unknown filters \['noops'\]; known: \['no_ops'"),
        ({"filters": {"no_ops": "yes"}}, "`no_ops` is true or false, got 'yes'"),
        ({"filters": {"exclude_tasks": "("}}, r"pattern '\(' is no regular expression"),
        ({"filters": {"include_tasks": [1]}}, "`include_tasks` is a string or a list of strings"),
        ({"filters": {"zero_motion": {"q01": [1.0]}}}, "`zero_motion` takes `q01` and `q99`"),
    ],
)
def test_descriptions_that_are_wrong(entry, message):
    with pytest.raises(ValueError, match=f"^some_dataset: .*{message}"):
        make_config(**entry)


def test_a_description_needs_cameras_and_action():
    with pytest.raises(ValueError, match=r"some_dataset: \['action', 'cameras'\] missing"):
        DatasetConfig.from_dict({}, "some_dataset")


# The registry

# Width of each column, 0 for one number per step; what a registered dataset's files hold of what is read.
POSE = {"action/world_vector": 3, "action/rotation_delta": 3}
SEVEN = {"action": 7, "observation/state": 8}
COLUMNS = {
    "fractal20220817_data": {
        **POSE,
        "action/gripper_closedness_action": 1,
        "observation/base_pose_tool_reached": 7,
        "observation/gripper_closed": 1,
    },
    "kuka": {
        **POSE,
        "action/gripper_closedness_action": 1,
        "observation/clip_function_input/base_pose_tool_reached": 7,
        "observation/gripper_closed": 1,
    },
    "bridge_orig": {"action": 7, "observation/state": 7},
    "bridge_dataset": {"action": 7, "observation/state": 7},
    "bridge_oxe": {"action/open_gripper": 0, "observation/state": 7},
    "bc_z": {
        "action/future/xyz_residual": 30,
        "action/future/axis_angle_residual": 30,
        "action/future/target_close": 10,
        "observation/present/xyz": 3,
        "observation/present/axis_angle": 3,
        "observation/present/sensed_close": 1,
    },
    "droid": {
        "action_dict/cartesian_velocity": 6,
        "action_dict/gripper_position": 1,
        "observation/cartesian_position": 6,
        "observation/gripper_position": 1,
    },
    "language_table": {"action": 2, "observation/effector_translation": 2, "observation/instruction": 512},
    "fmb_dataset": {"action": 7, "observation/eef_pose": 7, "observation/state_gripper_pose": 0},
    "dobbe": {"action": 7, "observation/state": 7},
    "taco_play": {"action/rel_actions_world": 7, "observation/robot_obs": 15},
    "jaco_play": {
        "action/world_vector": 3,
        "action/gripper_closedness_action": 1,
        "observation/end_effector_cartesian_pos": 7,
    },
    "berkeley_cable_routing": {**POSE, "observation/robot_state": 7},
    "roboturk": {**POSE, "action/gripper_closedness_action": 1},
    "viola": {
        **POSE,
        "action/gripper_closedness_action": 0,
        "observation/joint_states": 7,
        "observation/gripper_states": 1,
    },
    "berkeley_autolab_ur5": {**POSE, "action/gripper_closedness_action": 0, "observation/robot_state": 15},
    "toto": {**POSE, "action/open_gripper": 0, "observation/state": 7},
    "stanford_hydra_dataset_converted_externally_to_rlds": {"action": 7, "observation/state": 27},
    "austin_buds_dataset_converted_externally_to_rlds": {"action": 7, "observation/state": 24},
    "nyu_franka_play_dataset_converted_externally_to_rlds": {"action": 15, "observation/state": 13},
    "furniture_bench_dataset_converted_externally_to_rlds": {"action": 8, "observation/state": 35},
    "ucsd_kitchen_dataset_converted_externally_to_rlds": {"action": 8, "observation/state": 21},
    "austin_sailor_dataset_converted_externally_to_rlds": SEVEN,
    "austin_sirius_dataset_converted_externally_to_rlds": SEVEN,
    "dlr_edan_shared_control_converted_externally_to_rlds": {"action": 7, "observation/state": 7},
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": {"action": 8, "observation/state": 20},
    "utaustin_mutex": {"action": 7, "observation/state": 24},
    "berkeley_fanuc_manipulation": {"action": 6, "observation/state": 13},
    "cmu_stretch": {"action": 8, "observation/state": 4},
    **dict.fromkeys([name for name in registry() if name.startswith("libero_")], SEVEN),
}
LABELLED_BY_OBSERVATION = {
    *("fractal20220817_data", "kuka", "taco_play", "jaco_play", "berkeley_cable_routing", "roboturk", "viola"),
    *("berkeley_autolab_ur5", "toto", "bc_z", "bridge_oxe"),
}


def hold(gripper):
    return np.array(slow_relative_to_absolute(gripper.reshape(-1)))


def shut(gripper):
    return 1 - np.clip(gripper.reshape(-1), 0, 1)


def euler(quaternions):
    matrices = [quaternion_matrix(quaternion) for quaternion in quaternions]
    return np.array(
        [[np.arctan2(m[2, 1], m[2, 2]), np.arcsin(-m[2, 0]), np.arctan2(m[1, 0], m[0, 0])] for m in matrices]
    )


def relabelled(c, gripper):
    state = c["observation/state"][1:, :6]
    return [state[1:] - state[:-1], gripper[:-1]]


def world(c):
    return [c["action/world_vector"], c["action/rotation_delta"]]


def seven(c, gripper):
    return [c["action"][:, :6], gripper(c["action"][:, -1])]


# The action of each dataset as OpenVLA computes it, put down apart from the table.
ACTIONS = {
    "fractal20220817_data": lambda c: [*world(c), hold(c["action/gripper_closedness_action"])],
    "kuka": lambda c: [*world(c), hold(c["action/gripper_closedness_action"])],
    "bridge_orig": lambda c: relabelled(c, np.array(slow_binarize(c["action"][1:, 6]))),
    "bridge_dataset": lambda c: relabelled(c, np.array(slow_binarize(c["action"][1:, 6]))),
    "bridge_oxe": lambda c: relabelled(c, c["action/open_gripper"][1:]),
    "bc_z": lambda c: [
        c["action/future/xyz_residual"][:, :3],
        c["action/future/axis_angle_residual"][:, :3],
        1 - c["action/future/target_close"][:, 0],
    ],
    "droid": lambda c: [c["action_dict/cartesian_velocity"], 1 - c["action_dict/gripper_position"]],
    "language_table": lambda c: [c["action"], np.zeros((STEPS, 4)), np.ones((STEPS, 1))],
    "fmb_dataset": lambda c: [c["action"]],
    "dobbe": lambda c: [c["action"]],
    "taco_play": lambda c: [
        c["action/rel_actions_world"][:, :6],
        np.clip(c["action/rel_actions_world"][:, 6], 0, 1),
    ],
    "jaco_play": lambda c: [
        c["action/world_vector"],
        np.zeros((STEPS, 3)),
        hold(c["action/gripper_closedness_action"]),
    ],
    "berkeley_cable_routing": lambda c: [*world(c), np.zeros((STEPS, 1))],
    "roboturk": lambda c: [*world(c), shut(c["action/gripper_closedness_action"])],
    "viola": lambda c: [*world(c), shut(c["action/gripper_closedness_action"])],
    "berkeley_autolab_ur5": lambda c: [*world(c), hold(c["action/gripper_closedness_action"])],
    "toto": lambda c: [*world(c), c["action/open_gripper"]],
    "stanford_hydra_dataset_converted_externally_to_rlds": lambda c: seven(c, action_rules.invert),
    "austin_buds_dataset_converted_externally_to_rlds": lambda c: seven(c, shut),
    "nyu_franka_play_dataset_converted_externally_to_rlds": lambda c: [
        c["action"][:, 7:13],
        np.clip(c["action"][:, 13], 0, 1),
    ],
    "furniture_bench_dataset_converted_externally_to_rlds": lambda c: [
        c["action"][:, :3],
        euler(c["action"][:, 3:7]),
        shut(c["action"][:, 7]),
    ],
    "ucsd_kitchen_dataset_converted_externally_to_rlds": lambda c: [c["action"][:, :7]],
    "austin_sailor_dataset_converted_externally_to_rlds": lambda c: seven(c, shut),
    "austin_sirius_dataset_converted_externally_to_rlds": lambda c: seven(c, shut),
    "dlr_edan_shared_control_converted_externally_to_rlds": lambda c: seven(c, action_rules.invert),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": lambda c: [
        c["action"][:, :3],
        euler(c["action"][:, 3:7]),
        c["action"][:, 7],
    ],
    "utaustin_mutex": lambda c: seven(c, shut),
    "berkeley_fanuc_manipulation": lambda c: [c["action"], 1 - c["observation/state"][:, 6]],
    "cmu_stretch": lambda c: [c["action"][:, :7]],
    **dict.fromkeys([name for name in registry() if name.startswith("libero_")], lambda c: seven(c, shut)),
}


def padding(width):
    return np.zeros((STEPS, width))


# The state of each dataset, likewise; `s` is the column that most of them have.
STATES = {
    "fractal20220817_data": lambda c, s: [c["observation/base_pose_tool_reached"], c["observation/gripper_closed"]],
    "kuka": lambda c, s: [
        c["observation/clip_function_input/base_pose_tool_reached"],
        c["observation/gripper_closed"],
    ],
    **dict.fromkeys(
        ["bridge_orig", "bridge_dataset", "bridge_oxe"],
        lambda c, s: [s[1:-1, :6], padding(1)[1:-1], s[1:-1, 6]],
    ),
    "bc_z": lambda c, s: [
        c["observation/present/xyz"],
        c["observation/present/axis_angle"],
        padding(1),
        c["observation/present/sensed_close"],
    ],
    "droid": lambda c, s: [c["observation/cartesian_position"], c["observation/gripper_position"]],
    "language_table": lambda c, s: [c["observation/effector_translation"], padding(6)],
    "fmb_dataset": lambda c, s: [c["observation/eef_pose"], c["observation/state_gripper_pose"]],
    "dobbe": lambda c, s: [s],
    "taco_play": lambda c, s: [c["observation/robot_obs"][:, :6], padding(1), c["observation/robot_obs"][:, 7]],
    "jaco_play": lambda c, s: [
        c["observation/end_effector_cartesian_pos"][:, :6],
        padding(1),
        c["observation/end_effector_cartesian_pos"][:, 6],
    ],
    "berkeley_cable_routing": lambda c, s: [c["observation/robot_state"], padding(1)],
    "viola": lambda c, s: [c["observation/joint_states"], c["observation/gripper_states"]],
    "berkeley_autolab_ur5": lambda c, s: [c["observation/robot_state"][:, 6:14]],
    "toto": lambda c, s: [s, padding(1)],
    "stanford_hydra_dataset_converted_externally_to_rlds": lambda c, s: [
        s[:, :3],
        s[:, 7:10],
        padding(1),
        s[:, 24],
    ],
    "austin_buds_dataset_converted_externally_to_rlds": lambda c, s: [s[:, :8]],
    "nyu_franka_play_dataset_converted_externally_to_rlds": lambda c, s: [s[:, 7:], padding(2)],
    "furniture_bench_dataset_converted_externally_to_rlds": lambda c, s: [s[:, :7], s[:, 34]],
    "ucsd_kitchen_dataset_converted_externally_to_rlds": lambda c, s: [s[:, :7], padding(1)],
    "austin_sailor_dataset_converted_externally_to_rlds": lambda c, s: [s],
    "austin_sirius_dataset_converted_externally_to_rlds": lambda c, s: [s],
    "dlr_edan_shared_control_converted_externally_to_rlds": lambda c, s: [s, padding(1)],
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": lambda c, s: [s[:, :8]],
    "utaustin_mutex": lambda c, s: [s[:, :8]],
    "berkeley_fanuc_manipulation": lambda c, s: [s[:, :6], padding(1), s[:, 6]],
    "cmu_stretch": lambda c, s: [s[:, :3], padding(4), s[:, 3]],
    **dict.fromkeys([name for name in registry() if name.startswith("libero_")], lambda c, s: [s]),
}


def side_by_side(parts):
    parts = [np.asarray(part, float) for part in parts]
    return np.concatenate([part if part.ndim == 2 else part[:, None] for part in parts], axis=1)


def registered_raw(name: str) -> RawEpisode:
    rng = np.random.default_rng(5)
    columns = {
        key: rng.uniform(-1.2, 1.2, (STEPS, width) if width else STEPS).astype(np.float32)
        for key, width in COLUMNS[name].items()
    }
    if name in LABELLED_BY_OBSERVATION:
        columns[TEXT] = np.array([f"do {step}".encode() for step in range(STEPS)], object)
    if name == "language_table":
        columns["observation/instruction"] = np.zeros((STEPS, 512), np.int32)
        columns["observation/instruction"][:, 0] = ord("0") + np.arange(STEPS)
    for key in ("action/open_gripper", "action/future/target_close"):
        if key in columns:
            columns[key] = columns[key] > 0
    for key, values in columns.items():
        if key == "action" and values.shape[1] == 8:
            values[:, 3:7] /= np.linalg.norm(values[:, 3:7], axis=1, keepdims=True)
    images = required_images(DatasetConfig.from_dict(registry()[name], name))
    return make_raw(columns, images, dataset=name, metadata={"success": True})


@pytest.mark.parametrize("name", registry())
def test_every_entry_gives_what_openvla_trained_on(name):
    raw = registered_raw(name)
    config = config_for(name, raw.columns, raw.images)
    episode = standardize.standardize(raw, config)
    first = int(name.startswith("bridge"))
    assert episode.actions.dtype == np.float32 and episode.actions.shape == (STEPS - 2 * first, 7)
    np.testing.assert_allclose(episode.actions, side_by_side(ACTIONS[name](raw.columns)), atol=2e-6)
    assert next(iter(episode.images)) == "primary"
    for pictures in episode.images.values():
        assert [picture.rpartition(b" ")[2] for picture in pictures] == [
            str(step).encode() for step in range(first, STEPS - first)
        ]
    if name in LABELLED_BY_OBSERVATION:
        assert episode.instructions == [f"do {step}" for step in range(first, STEPS - first)]
    elif name == "language_table":
        assert episode.instructions == [str(step) for step in range(STEPS)]
    else:
        assert episode.instructions == ["stack the cups"] * len(episode)
    if name == "roboturk":
        assert episode.states is None
    else:
        states = STATES[name](raw.columns, raw.columns.get("observation/state"))
        assert episode.states.dtype == np.float32
        np.testing.assert_array_equal(episode.states, side_by_side(states).astype(np.float32))
    assert sorted(required_columns(config)) == sorted(raw.columns)


def test_bridge_takes_its_actions_from_the_states():
    states = np.zeros((5, 7), np.float32)
    states[:, 0] = [9.0, 0.0, 0.1, 0.3, 0.6]
    states[:, 5] = [0.0, 3.1, -3.1, -3.0, -3.0]
    states[:, 6] = [0.1, 0.2, 0.3, 0.4, 0.5]
    actions = np.full((5, 7), 7.0, np.float32)
    actions[:, 6] = [0.0, 1.0, 0.5, 0.0, 1.0]
    images = {"observation/image_0": list("abcde"), "observation/image_1": list("vwxyz")}
    raw = replace(make_raw({"action": actions, "observation/state": states}), images=images)
    raw.instructions = ["one", "two", "three", "four", "five"]
    episode = standardize.standardize(raw, config_for("bridge_orig", raw.columns, raw.images))
    expected = [[0.1, 0, 0, 0, 0, -6.2, 1], [0.2, 0, 0, 0, 0, 0.1, 0], [0.3, 0, 0, 0, 0, 0, 0]]
    np.testing.assert_allclose(episode.actions, expected, atol=1e-6)
    np.testing.assert_allclose(
        episode.states[:, [0, 5, 6, 7]], [[0, 3.1, 0, 0.2], [0.1, -3.1, 0, 0.3], [0.3, -3, 0, 0.4]]
    )
    assert list(episode.images["primary"]) == ["b", "c", "d"]
    assert list(episode.images["secondary"]) == ["w", "x", "y"]
    assert episode.instructions == ["two", "three", "four"]
    with pytest.raises(BadEpisodeError, match="it has 2 steps, of which the description drops 1 at the start and 1"):
        standardize.standardize(make_raw({"action": actions[:2]}), make_config(drop_first=1, drop_last=1))


def test_libero_as_it_lies_on_disk():
    source = RLDSSource(Files(str(FIXTURES / "rlds" / "mini_libero_no_noops" / "1.0.0")))
    truth = json.loads((FIXTURES / "rlds" / "mini_libero_no_noops_truth.json").read_text())["train"]
    config = config_for(
        source.name,
        ["action", "observation/state"],
        ["observation/image", "observation/wrist_image"],
        {"like": "libero_spatial_no_noops"},
    )
    for unit, expected in enumerate(truth):
        (raw,) = source.read(unit, required_columns(config), required_images(config))
        episode = standardize.standardize(raw, config)
        actions = np.array([step["action"] for step in expected["steps"]])
        np.testing.assert_allclose(episode.actions[:, :6], actions[:, :6], atol=1e-7)
        np.testing.assert_array_equal(episode.actions[:, 6], np.float32(1) - np.clip(actions[:, 6], 0, 1))
        assert episode.instructions == [step["language_instruction"] for step in expected["steps"]]
        assert list(episode.images) == ["primary", "wrist"]


def test_kuka_state_may_be_compressed():
    raw = registered_raw("kuka")
    config = config_for("kuka", raw.columns, raw.images)
    plain = standardize.standardize(raw, config).states
    for key in ("observation/clip_function_input/base_pose_tool_reached", "observation/gripper_closed"):
        rows = [zlib.compress(row.astype("<f4").tobytes()) for row in raw.columns[key]]
        raw.columns[key] = np.array(rows, object)
    np.testing.assert_array_equal(standardize.standardize(raw, config).states, plain)


def test_droid_changes_its_outer_cameras_from_episode_to_episode():
    raw = registered_raw("droid")
    config = config_for("droid", raw.columns, raw.images, {"cameras": ["primary"]})
    assert set(required_images(config)) == {"observation/exterior_image_1_left", "observation/exterior_image_2_left"}
    both = config_for("droid", raw.columns, raw.images)
    chosen = []
    for index in range(200):
        episode = standardize.standardize(replace(raw, index=index), both)
        assert episode.images["primary"][0] != episode.images["secondary"][0]
        again = standardize.standardize(replace(raw, index=index), config)
        assert again.images["primary"][0] == episode.images["primary"][0]
        chosen.append(b"_1_left" in episode.images["primary"][0])
    assert 70 < sum(chosen) < 130


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("austin_buds", "austin_buds_dataset_converted_externally_to_rlds"),
        ("dlr_edan_shared_control", "dlr_edan_shared_control_converted_externally_to_rlds"),
        ("bridge_orig", "bridge_orig"),
        ("taco_play_dataset_converted_externally_to_rlds", "taco_play"),
        ("taco_play_converted_externally_to_rlds", "taco_play"),
        ("my_robot", None),
    ],
)
def test_long_and_short_names_are_the_same_dataset(name, known):
    assert registry_name(name) == known


# Mixtures

# Steps of each dataset in the published statistics of openvla-7b, and its share of the mixture in percent.
SHARES = {
    "fractal20220817_data": (3786400, 25.63),
    "bridge_orig": (2135463, 14.46),
    "kuka": (2455879, 13.87),
    "bc_z": (6015535, 8.14),
    "fmb_dataset": (1137459, 7.70),
    "stanford_hydra_dataset_converted_externally_to_rlds": (358234, 4.85),
    "taco_play": (237798, 3.22),
    "furniture_bench_dataset_converted_externally_to_rlds": (3948057, 2.67),
    "roboturk": (187507, 2.54),
    "utaustin_mutex": (361883, 2.45),
    "austin_sailor_dataset_converted_externally_to_rlds": (353094, 2.39),
    "toto": (325699, 2.20),
    "austin_sirius_dataset_converted_externally_to_rlds": (279939, 1.90),
    "dobbe": (1139911, 1.54),
    "berkeley_autolab_ur5": (97939, 1.33),
    "viola": (76324, 1.03),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": (146241, 0.99),
    "nyu_franka_play_dataset_converted_externally_to_rlds": (44875, 0.91),
    "berkeley_fanuc_manipulation": (62613, 0.85),
    "jaco_play": (77965, 0.53),
    "berkeley_cable_routing": (42328, 0.29),
    "austin_buds_dataset_converted_externally_to_rlds": (34112, 0.23),
    "cmu_stretch": (25016, 0.17),
    "dlr_edan_shared_control_converted_externally_to_rlds": (8928, 0.06),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": (3970, 0.05),
}


def test_shares_of_the_published_mixture():
    weights = MIXTURES["oxe_magic_soup_plus_minus"]
    assert set(weights) == set(SHARES)
    products = {name: weight * SHARES[name][0] for name, weight in weights.items()}
    total = sum(products.values())
    assert total == pytest.approx(14.77e6, rel=5e-4)
    for name, (_, share) in SHARES.items():
        assert 100 * products[name] / total == pytest.approx(share, abs=0.01)


def test_mixtures_and_registry_agree():
    assert {len(MIXTURES[f"oxe_magic_soup{ending}"]) for ending in ("", "_plus", "_plus_minus")} == {23, 27, 25}
    for weights in MIXTURES.values():
        assert set(weights) <= set(registry())
        assert all(isinstance(weight, float) and weight > 0 for weight in weights.values())
    plus_, minus = MIXTURES["oxe_magic_soup_plus"], MIXTURES["oxe_magic_soup_plus_minus"]
    changed = {name for name in plus_.keys() | minus.keys() if plus_.get(name) != minus.get(name)}
    assert changed == {"fractal20220817_data", "language_table", "droid"}
    assert (plus_["fractal20220817_data"], plus_["language_table"], plus_["droid"]) == (0.54087122203, 0.1, 0.06)
    assert set(plus_) - set(MIXTURES["oxe_magic_soup"]) == {"bc_z", "fmb_dataset", "dobbe", "droid"}


# Anyone's datasets


def test_recorded_datasets_need_no_description():
    columns = ["observation.state", "action", "timestamp", "task_index"]
    config = config_for("my_table", columns, ["observation.images.wrist", "observation.images.front"])
    assert config.cameras == {"primary": ("observation.images.front",), "wrist": ("observation.images.wrist",)}
    assert required_columns(config) == ["action", "observation.state"]
    assert required_images(config) == ["observation.images.front", "observation.images.wrist"]
    raw = make_raw(
        {"action": np.ones((4, 7), np.float64), "observation.state": np.ones((4, 8))}, required_images(config)
    )
    episode = standardize.standardize(raw, config)
    assert (episode.actions.shape, episode.states.shape) == ((4, 7), (4, 8))
    assert episode.images["wrist"] is raw.images["observation.images.wrist"]
    assert episode.instructions == raw.instructions


@pytest.mark.parametrize(
    ("keys", "roles"),
    [
        (["image"], {"primary": "image"}),
        (["observation.images.left", "observation.images.front"], {"primary": 1, "secondary": 0}),
        (["observation/wrist_image", "observation/image"], {"primary": 1, "wrist": 0}),
        (["observation/hand_image"], {"primary": 0}),
        (["cam_left_wrist", "cam_right_wrist", "cam_high"], {"primary": 2, "wrist": 0, "wrist_2": 1}),
        (["a", "b", "c"], {"primary": 0, "secondary": 1, "secondary_2": 2}),
        (["observation.images.front", "observation.images.front_depth"], {"primary": 0}),
        ([], {}),
    ],
)
def test_roles_of_cameras_by_their_names(keys, roles):
    expected = {role: key if isinstance(key, str) else keys[key] for role, key in roles.items()}
    assert list(default_cameras(keys).items()) == list(expected.items())


def test_overrides():
    columns, images = ["action", "observation.state"], ["observation.images.front", "observation.images.wrist"]
    entry = {
        "cameras": ["primary"],
        "action": ["action[:6]", "action[6] | invert"],
        "state": None,
        "text": "pick up the cube",
        "filters": {"no_ops": True, "exclude_tasks": "drawer"},
    }
    config = config_for("my_table", columns, images, entry)
    assert required_images(config) == ["observation.images.front"]
    assert config.filters == Filters(no_ops=True, exclude_tasks=("drawer",))
    raw = make_raw({"action": np.full((2, 7), 0.25)}, required_images(config))
    episode = standardize.standardize(raw, config)
    np.testing.assert_array_equal(episode.actions[0], [0.25] * 6 + [0.75])
    assert episode.states is None and episode.instructions == ["pick up the cube"] * 2

    registered = registered_raw("kuka")
    changed = config_for("kuka", registered.columns, registered.images, {"filters": {"no_ops": True}, "text": "grasp"})
    assert changed.filters == Filters(no_ops=True, success_metadata="success")
    assert changed.instruction is None and TEXT not in required_columns(changed)
    other = config_for("my_robot", [*SEVEN], ["observation/image", "observation/wrist_image"], {"like": "libero_90"})
    assert other.action == config_for("libero_90", [*SEVEN], ["observation/image", "observation/wrist_image"]).action


@pytest.mark.parametrize(
    ("name", "columns", "images", "entry", "message"),
    [
        ("mine", ["actions"], [], {}, r"no column 'action'; say which it is with `action`, out of \['actions'\]"),
        (
            "mine",
            ["action"],
            ["front"],
            {"like": "nothing"},
            "`like: nothing` is not in the registry; it has .*'kuka'",
        ),
        ("mine", ["action"], ["front"], {"cameras": ["wrist"]}, r"no cameras \['wrist'\]; it has .*'front'"),
        ("mine", ["action"], ["front"], {"cameras": {"primary": "top"}}, r"no cameras \['top'\]; it has \['front'\]"),
        ("mine", ["action"], [], {"state": "joints"}, r"no columns \['joints'\]; it has \['action'\]"),
        ("mine", ["action"], [], {"colour": 1}, r"unknown keys \['colour'\]"),
        ("viola", ["action"], [], {}, r"has no columns \['action/world_vector'.*`like: null` starts from the columns"),
    ],
)
def test_descriptions_that_do_not_fit(name, columns, images, entry, message):
    with pytest.raises(ValueError, match=message):
        config_for(name, columns, images, entry)


def test_like_nothing_starts_from_the_columns():
    assert config_for("viola", ["action"], ["front"], {"like": None}).cameras == {"primary": ("front",)}


# Faults


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rule", ["", " | clip", " | binarize", " | relative_to_absolute"])
def test_numbers_that_are_not_finite(value, rule):
    actions = np.zeros((6, 7))
    actions[4, 2] = value
    config = make_config(action=f"action{rule}", drop_first=1, drop_last=1)
    with pytest.raises(BadEpisodeError, match=r"some_dataset, some.file, episode 3: .* at frame 4, dimension 2"):
        standardize.standardize(make_raw({"action": actions}), config)
    actions[4, 2], actions[[0, 5], 3] = 0, value  # in the steps that are dropped
    assert len(standardize.standardize(make_raw({"action": actions}), make_config(drop_first=1, drop_last=1))) == 4


def test_a_rule_that_looks_ahead_does_not_take_a_nan_from_the_steps_that_are_dropped():
    raw = make_raw({"action": column(0.0, 0.5, np.nan)})
    with pytest.raises(BadEpisodeError, match="nan at frame 1"):
        standardize.standardize(raw, make_config(action="action | binarize", drop_last=1))


def test_faults_of_an_episode():
    raw = make_raw({"action": np.zeros((4, 7)), "state": np.zeros((3, 2))}, ["front"])
    raw.images["front"].pop()
    with pytest.raises(BadEpisodeError, match="episode 3: column 'state' has 3 values for 4 steps"):
        standardize.standardize(raw, make_config(state="state"))
    with pytest.raises(BadEpisodeError, match="episode 3: camera 'front' has 3 pictures for 4 steps"):
        standardize.standardize(raw, make_config(cameras={"primary": "front"}))
    raw.columns["words"] = np.array([b"fine", b"\xff", b"fine", b"fine"], object)
    with pytest.raises(BadEpisodeError, match=r"episode 3: the instruction 'words' cannot be decoded: .*utf-8"):
        standardize.standardize(raw, make_config(instruction="words"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"cameras": {"primary": "top"}}, r"some_dataset has no camera 'top'; it has \['front', 'wrist'\]"),
        ({"action": "actions"}, r"some_dataset has no column 'actions'; it has \['action', 'map', 'words'\]"),
        ({"action_dim": 8}, "the action is 7 wide, the description says 8"),
        ({"action": "action | quaternion_to_euler"}, "a quaternion has 4 columns .* these are 7"),
        ({"state": "words"}, "`words` gives text or bytes"),
        ({"state": "map"}, "column 'map' is 2-D at each step"),
        ({"instruction": "action"}, "'action' is no instruction: expected text or code points"),
    ],
)
def test_descriptions_that_do_not_fit_the_episode_are_no_fault_of_the_episode(entry, message):
    columns = {"action": np.zeros((2, 7)), "words": np.array(["a", "b"], object), "map": np.zeros((2, 3, 3))}
    with pytest.raises(ValueError, match=message) as caught:
        standardize.standardize(make_raw(columns, ["front", "wrist"]), make_config(**entry))
    assert not isinstance(caught.value, BadEpisodeError)


# Filters


class Tape:
    """Pictures that can only be played from the start."""

    def __init__(self, length):
        self.length, self.plays = length, []

    def __len__(self):
        return self.length

    def __iter__(self):
        self.plays.append(0)
        for frame in range(self.length):
            self.plays[-1] += 1
            yield f"frame {frame}"


@given(st.integers(0, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(n - 1, 0))))))
def test_a_subset_is_what_indexing_gives(drawn):
    length, chosen = drawn
    indices = sorted(index for index in chosen if index < length)
    items = [f"frame {number}" for number in range(length)]
    subset = Subset(items, indices)
    assert [*subset] == [items[index] for index in indices] == [subset[number] for number in range(len(subset))]
    assert [*subset[1:]] == [*subset][1:]
    tape = Tape(length)
    assert [*Subset(tape, indices)] == [*subset]
    assert tape.plays == ([indices[-1] + 1] if indices else [])
    assert [*Subset(Subset(tape, indices), range(0, len(indices), 2))] == [*subset][::2]
    assert len(tape.plays) <= 2


def step(pose, gripper):
    return [pose, 0, 0, 0, 0, 0, gripper]


@pytest.mark.parametrize(
    ("actions", "kept"),
    [
        ([step(0, 1), step(0, 1), step(1, 1), step(0, 1)], [2]),  # until one is kept, the norm alone decides
        ([step(1, 1), step(0, 0), step(0, 0), step(0, 1)], [0, 1, 3]),
        ([step(1, 1), step(0, 1), step(0, 0)], [0, 2]),  # compared with the last one kept, not the one before
        ([step(1, 1), step(9e-5, 1), step(1e-4, 1)], [0, 2]),
        ([step(1, 0), step(0, 1), step(0, 0)], [0, 1, 2]),
        ([step(0, 1)], []),
    ],
)
def test_no_ops_by_hand(actions, kept):
    assert np.flatnonzero(moving_steps(np.array(actions))).tolist() == kept


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 20), st.just(7)), elements=st.sampled_from([0.0, 5e-5, 1.0])))
def test_no_ops_follow_their_definition(actions):
    kept, previous = [], None
    for number, action in enumerate(actions):
        if not (np.linalg.norm(action[:6]) < 1e-4 and (previous is None or action[6] == previous)):
            kept.append(number)
            previous = action[6]
    assert np.flatnonzero(moving_steps(actions)).tolist() == kept


def filtered(filters, actions=None, columns=(), **fields):
    actions = np.array([step(1, 1)] * 4 if actions is None else actions, np.float32)
    raw = make_raw({"action": actions, "state": actions[:, :2], **dict(columns)}, ["front"], **fields)
    config = make_config(cameras={"primary": "front"}, state="state", filters=filters)
    return config.filters.apply(standardize.standardize(raw, config), raw)


def test_rows_are_removed_from_everything():
    actions = [step(1, 1), step(0, 1), step(2, 1), step(0, 0)]
    episode, removed = filtered({"no_ops": True}, actions, instructions=["a", "b", "c", "d"])
    assert removed == {"no_op": 1}
    np.testing.assert_array_equal(episode.actions[:, [0, 6]], [[1, 1], [2, 1], [0, 0]])
    np.testing.assert_array_equal(episode.states[:, 0], [1, 2, 0])
    assert episode.instructions == ["a", "c", "d"]
    assert [*episode.images["primary"]] == [b"front 0", b"front 2", b"front 3"]
    assert (episode.index, len(episode)) == (3, 3)


@pytest.mark.parametrize(
    ("filters", "fields", "left", "removed"),
    [
        ({}, {}, 4, {}),
        ({}, {"instructions": [""] * 4}, None, {"unlabeled": 4}),
        ({}, {"instructions": [" "] * 4}, None, {"unlabeled": 4}),
        ({}, {"instructions": ["", " ", "go", ""]}, 4, {}),
        ({"unlabeled_steps": True}, {"instructions": ["", " ", "go", ""]}, 1, {"unlabeled": 3}),
        ({"unlabeled_episodes": False}, {"instructions": [""] * 4}, 4, {}),
        ({"include_tasks": "CUP"}, {"instructions": ["cup", "Cups", "bowl", "a cup"]}, 3, {"task": 1}),
        ({"exclude_tasks": ["^cup", "bowl$"]}, {"instructions": ["cup", "Cups", "bowl", "a cup"]}, 1, {"task": 3}),
        ({"include_tasks": "drawer"}, {}, None, {"task": 4}),
        (
            {"unlabeled_steps": True, "include_tasks": "cup"},  # a step counts under the first reason
            {"instructions": ["", "bowl", "cup", "cup"]},
            2,
            {"unlabeled": 1, "task": 1},
        ),
        ({"include_robots": ["panda", "ur5"]}, {"metadata": {"robot_type": "UR5e"}}, 4, {}),
        ({"include_robots": "panda"}, {"metadata": {"robot_type": "UR5e"}}, None, {"robot": 4}),
        ({"success_metadata": "success"}, {"metadata": {"success": True}}, 4, {}),
        ({"success_metadata": "success"}, {"metadata": {"success": False}}, None, {"failed": 4}),
        ({"success_column": "done"}, {"columns": {"done": np.array([True, True, True, False])}}, None, {"failed": 4}),
        ({"success_column": "reward"}, {"columns": {"reward": column(0, 0, 0, 0.5)}}, 4, {}),
        ({"no_ops": True}, {"actions": [step(0, 1)] * 3}, None, {"no_op": 3}),
        (
            {"no_ops": True, "exclude_tasks": "x"},  # the first step is gone before no-ops are looked for
            {"actions": [step(1, 0), step(0, 1), step(1, 1), step(0, 1)], "instructions": ["x", "a", "a", "a"]},
            1,
            {"task": 1, "no_op": 2},
        ),
    ],
)
def test_what_filters_remove_is_counted(filters, fields, left, removed):
    episode, counts = filtered(filters, **fields)
    assert (None if episode is None else len(episode)) == left
    assert counts == removed


def test_droid_leaves_out_steps_without_any_motion():
    limits = Filters.from_dict(registry()["droid"]["filters"]).zero_motion
    span = np.subtract(limits["q99"], limits["q01"])
    # Two of the scaled units are the span; 1e-5 of one is the limit, taken half and twice.
    actions = [step(0, 1), [*(span * 0.25e-5), 0], [0, 0, 0, 0, 0, span[5] * 1e-5, 1], [*(-span * 1e-5), 1]]
    episode, removed = filtered(registry()["droid"]["filters"], actions)
    assert removed == {"zero_motion": 2}
    np.testing.assert_array_equal(episode.actions, np.array(actions[2:], np.float32))

    # OpenVLA compares normalised actions with the normalised zero.
    rng = np.random.default_rng(0)
    actions = rng.choice([0, 2e-6, 8e-6, 0.1, 2.0], (300, 7), p=[0.6, 0.2, 0.1, 0.05, 0.05])
    low, scale = np.array(limits["q01"]), span + 1e-8
    normalized = np.clip(2 * (actions[:, :6] - low) / scale - 1, -1, 1)
    expected = (np.abs(normalized - (2 * (0 - low) / scale - 1)) > 1e-5).any(axis=1)
    episode, removed = filtered(registry()["droid"]["filters"], actions)
    assert removed["zero_motion"] == (~expected).sum() > 10
    np.testing.assert_array_equal(episode.actions, actions[expected].astype(np.float32))


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"include_robots": "panda"}, "`include_robots` needs 'robot_type', which some_dataset does not say"),
        ({"success_metadata": "success"}, r"`success_metadata` needs 'success', .* it says \[\]"),
        ({"success_column": "done"}, "no column 'done', which the filter `success_column` names"),
    ],
)
def test_filters_that_cannot_be_decided(filters, message):
    with pytest.raises(ValueError, match=message):
        filtered(filters)


def test_filters_say_which_columns_they_read():
    columns = ["action", "next.success"]
    config = config_for("mine", columns, [], {"filters": {"success_column": "next.success"}})
    assert required_columns(config) == columns
