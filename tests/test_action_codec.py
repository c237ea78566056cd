"""Bins, statistics and normalisation."""

import json

import numpy as np
import pytest
from conftest import GOLDEN, TINY_POLICY
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from load_policy import repository_class


ACTION_IDS = range(31744, 32000)


@pytest.fixture(scope="module")
def codec(golden_model):
    return golden_model.codec


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "action_tokenizer.npz")


def test_bins(codec, golden):
    np.testing.assert_array_equal(codec.edges, golden["bins"])
    np.testing.assert_array_equal(codec.centers, golden["bin_centers"])


@pytest.mark.parametrize(
    "group", ["edges", "edges_nextup", "edges_nextdown", "centers", "specials", "uniform", "normal"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_encode_and_decode_as_the_reference(codec, golden, group, dtype):
    actions = golden[f"{group}_{dtype}_actions"]
    known = ~np.isnan(actions)
    ids = codec.encode(actions[known])
    np.testing.assert_array_equal(ids, golden[f"{group}_{dtype}_ids"][known])
    np.testing.assert_array_equal(codec.decode(ids), golden[f"{group}_{dtype}_decoded"][known])


def test_decode_any(codec, golden):
    """The reference decodes every id; ours decodes action tokens alike and refuses the rest."""
    ids, actions = golden["decode_any_ids"], golden["decode_any_actions"]
    valid = np.isin(ids, ACTION_IDS)
    assert set(ids[valid]) == set(ACTION_IDS)
    np.testing.assert_array_equal(codec.decode(ids[valid]), actions[valid])
    for token_id in ids[~valid]:
        with pytest.raises(ValueError, match=r"no action tokens; these are 31744\.\.31999"):
            codec.decode(np.array([token_id]))


def test_encode_refuses_nan(codec):
    with pytest.raises(ValueError, match="NaN"):
        codec.encode(np.array([0.0, np.nan]))


@given(arrays(np.float64, 7, elements=st.floats(-1, 1)))
def test_round_trip_within_half_a_bin(codec, actions):
    decoded = codec.decode(codec.encode(actions))
    assert np.abs(decoded - actions).max() <= 1 / 255 + 1e-12
    np.testing.assert_array_equal(codec.decode(codec.encode(decoded)), decoded)


def test_bin_centers_ascend_over_the_ids(codec):
    np.testing.assert_array_equal(codec.decode(np.array(ACTION_IDS)[::-1]), codec.bin_centers)
    assert (np.diff(codec.bin_centers)[:-1] > 0).all()
    assert codec.bin_centers[-1] == codec.bin_centers[-2]


@pytest.fixture(scope="module")
def bridge():
    return json.loads((GOLDEN / "ckpt" / "dataset_statistics.json").read_text())["bridge_orig"]


@pytest.fixture(scope="module")
def bridge_processor(bridge):
    processor = repository_class("OpenVLAProcessor").from_pretrained(TINY_POLICY)
    processor.norm_stats = {"bridge_orig": bridge}
    return processor


@given(values=arrays(np.float64, 7, elements=st.floats(0, 1)))
def test_normalize_inverts_unnormalize(bridge_processor, bridge, values):
    low, high = (np.array(bridge["action"][name]) for name in ("q01", "q99"))
    actions = low + values * (high - low)
    restored = bridge_processor.decode_actions(bridge_processor.encode_actions(actions))
    # Half a bin in normalised units; the gripper, outside the mask, is not scaled.
    span = np.where(bridge["action"]["mask"], high - low, 2.0)
    assert (np.abs(restored - actions) <= span / 2 / 255 + 1e-8).all()


def test_gripper_is_not_scaled(bridge_processor, bridge):
    actions = bridge_processor.decode_actions(np.full(7, bridge_processor.action_token_end - 1))
    assert actions[-1] == pytest.approx(-254 / 255)
    assert actions[0] == pytest.approx(bridge["action"]["q01"][0], abs=1e-3)


def test_constant_dimensions_become_zero(processor):
    block = {"q01": [0.5, -1.0], "q99": [0.5, 1.0], "min": [0.5, -1.0], "max": [0.5, 1.0], "mask": [True, True]}
    processor.norm_stats = {"toy": {"action": block}}
    ids = processor.encode_actions([0.5, 1.0])
    assert processor.codec.decode(ids)[0] == 0.0
    np.testing.assert_allclose(processor.decode_actions(ids), [0.5, 254 / 255], atol=1e-6)


@pytest.mark.parametrize("norm_type, expected", [("bounds", [3.0, 0.0]), ("normal", [1.5, 0.25])])
def test_norm_types(norm_type, expected, processor):
    action = {"q01": [0.0, -1.0], "q99": [2.0, 1.0], "min": [-1.0, -4.0], "max": [3.0, 4.0]}
    action |= {"mean": [1.0, 0.0], "std": [0.5, 0.25]}
    processor.norm_stats = {"toy": {"action": action}}
    processor.norm_type = norm_type
    ids = processor.encode_actions(expected)
    normalized = processor.codec.decode(ids)
    np.testing.assert_allclose(normalized, [1.0, 0.0] if norm_type == "bounds" else [1.0, 1.0], atol=1 / 255)
    np.testing.assert_allclose(processor.decode_actions(ids), expected, atol=4 / 255)


def test_missing_bounds_are_named(processor):
    processor.norm_stats = {"toy": {"action": {"q01": [0.0], "q99": [1.0]}}}
    processor.norm_type = "bounds"
    with pytest.raises(ValueError, match=r"needs \['min', 'max'\]"):
        processor.decode_actions([processor.action_token_end - 1])


@pytest.mark.parametrize(
    "norm_stats, message",
    [
        ({"toy": {}}, "'toy' has no `action` statistics"),
        ({"toy": {"action": {"q01": [0.0]}}}, "`q01` and `q99`"),
        ({"toy": {"action": {"q01": [0.0], "q99": [1.0, 2.0]}}}, "different lengths"),
        (["toy"], "expected a dictionary"),
    ],
)
def test_malformed_statistics(policy, norm_stats, message):
    model, processor = policy
    for owner in (model, processor):
        with pytest.raises(ValueError, match=message):
            owner.norm_stats = norm_stats
