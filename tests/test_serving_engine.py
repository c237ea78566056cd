"""The inference thread: batches, the newest observation, failures; and that a batch is its rows."""

import threading
import time

import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import load_policy
from policy_server import StubPolicy

from serving.engine import Batcher, Policy, Row, SupersededError
from serving.observations import MAX_CHARACTERS, Observation, ObservationError


def row(number, action_dim: int = 7) -> Row:
    return Row({}, f"go {number}" if isinstance(number, int) else number, "narrow", action_dim)


def value(future) -> float:
    return future.result(10).actions[0, 0]


@pytest.fixture
def stub():
    return StubPolicy()


@pytest.fixture
def batcher(stub):
    made = Batcher(stub.predict, max_batch_size=4, batch_wait=0.2)
    yield made
    stub.gate.set()
    made.close(10)


@pytest.fixture
def occupied(stub, batcher):
    """A batcher that predicts row 100 until the gate is opened."""
    stub.gate.clear()
    first = batcher.submit(row(100))
    assert stub.entered.wait(10)
    return first


def test_what_waits_is_one_batch(stub, batcher, occupied):
    futures = [batcher.submit(row(number)) for number in range(6)]
    assert batcher.num_waiting == 6
    stub.gate.set()
    assert [value(future) for future in futures] == list(range(6))
    assert stub.batches == [["go 100"], ["go 0", "go 1", "go 2", "go 3"], ["go 4", "go 5"]]
    assert futures[0].result().batch_size == 4
    assert futures[0].result().queue_seconds > 0
    assert value(occupied) == 100


@pytest.fixture
def patient(stub):
    """A batcher that would wait for longer than a busy machine takes for anything."""
    made = Batcher(stub.predict, max_batch_size=4, batch_wait=30)
    yield made
    stub.gate.set()
    made.close(10)


def test_a_robot_alone_does_not_wait(patient):
    for number in range(20):
        assert value(patient.submit(row(number))) == number


def test_robots_that_come_together_are_awaited(stub, patient):
    stub.gate.clear()
    futures = [patient.submit(row(0))]
    assert stub.entered.wait(10)
    futures += [patient.submit(row(number)) for number in (1, 2, 3)]
    stub.gate.set()
    [value(future) for future in futures]
    late = [patient.submit(row(4))]
    time.sleep(0.03)
    late += [patient.submit(row(number)) for number in (5, 6)]
    assert [value(future) for future in late] == [4, 5, 6]  # three had come: no need to wait until the end
    assert stub.batches == [["go 0"], ["go 1", "go 2", "go 3"], ["go 4", "go 5", "go 6"]]


def test_nobody_is_awaited_for_longer_than_agreed(stub, batcher, occupied):
    futures = [batcher.submit(row(number)) for number in (1, 2, 3)]
    stub.gate.set()
    [value(future) for future in futures]
    assert batcher.submit(row(7)).result(10).queue_seconds > 0.15  # the others do not come: it waits, and goes
    assert batcher.submit(row(8)).result(10).batch_size == 1


def test_rows_of_one_dimension_share_a_batch(stub, batcher, occupied):
    futures = [batcher.submit(row(number, 7 + number % 2)) for number in range(6)]
    stub.gate.set()
    assert [value(future) for future in futures] == list(range(6))
    assert stub.batches[1:] == [["go 0", "go 2", "go 4"], ["go 1", "go 3", "go 5"]]


def test_the_newest_observation_of_a_session_wins(stub, batcher, occupied):
    old = [batcher.submit(row(number), "robot", number) for number in (1, 2)]
    other = batcher.submit(row(3), "other", 3)
    newest = batcher.submit(row(5), "robot", 5)
    late = batcher.submit(row(4), "robot", 4)  # was longer on its way to here
    for future in (*old, late):
        with pytest.raises(SupersededError, match="newer"):
            future.result(1)
    stub.gate.set()
    assert (value(newest), value(other)) == (5, 3)
    assert stub.batches[1] == ["go 3", "go 5"]


def test_a_reset_forgets_what_waits_and_what_runs(stub, batcher):
    stub.gate.clear()
    running = batcher.submit(row(1), "robot", 1)
    assert stub.entered.wait(10)
    waiting = batcher.submit(row(2), "robot", 2)
    assert batcher.reset("robot", 3) == 2
    for future in (running, waiting, batcher.submit(row(0), "robot", 0)):
        with pytest.raises(SupersededError):
            future.result(1)
    stub.gate.set()
    assert value(batcher.submit(row(4), "robot", 4)) == 4
    assert batcher.reset("nobody", 5) == 0


def test_a_row_that_fails_spoils_no_batch(stub, batcher, occupied):
    futures = [batcher.submit(row(each)) for each in (1, "fail", 2)]
    stub.gate.set()
    assert (value(futures[0]), value(futures[2])) == (1, 2)
    with pytest.raises(FloatingPointError):
        futures[1].result(10)
    assert batcher.is_healthy
    for _ in range(3):
        with pytest.raises(FloatingPointError):
            batcher.submit(row("fail")).result(10)
    assert not batcher.is_healthy
    assert value(batcher.submit(row(3))) == 3
    assert batcher.is_healthy


def test_nobody_computes_for_who_has_gone(stub, batcher, occupied):
    futures = [batcher.submit(row(number)) for number in (1, 2)]
    futures[0].cancel()
    stub.gate.set()
    assert value(futures[1]) == 2
    assert stub.batches[1] == ["go 2"]


def test_closing_finishes_what_waits(stub, batcher, occupied):
    futures = [batcher.submit(row(number)) for number in range(3)]
    closing = threading.Thread(target=batcher.close)
    closing.start()
    stub.gate.set()
    closing.join(10)
    assert [value(future) for future in futures] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(row(1))
    assert not batcher.is_healthy


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="expected 1 and 0"):
        Batcher(StubPolicy().predict, max_batch_size=0)


def observations(rng, count: int) -> list[Observation]:
    """Random pictures, and instructions of different lengths."""
    words = ("pick", "up", "the", "red", "cube", "gently", "and", "put", "it", "down")
    return [
        Observation(" ".join(rng.choice(words, 1 + number % 9)), (rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),))
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def served():
    return Policy(*load_policy(TINY_POLICY, dtype=torch.float32), "tiny")


def test_a_batch_is_its_rows(served):
    """In float32 the tokens are the same, and the entropy differs by rounding."""
    rows = [served.prepare(each) for each in observations(np.random.default_rng(0), 12)]
    for begin in range(0, 12, 6):
        batch = served.predict(rows[begin : begin + 6])
        for each, together in zip(rows[begin : begin + 6], batch, strict=True):
            alone = served.predict([each])[0]
            np.testing.assert_array_equal(together.actions, alone.actions)
            np.testing.assert_allclose(together.entropy, alone.entropy, atol=1e-4)


def test_a_row_is_the_processor_s(served):
    """Of one observation, prepared in two steps and by the processor at once."""
    for each in observations(np.random.default_rng(1), 4):
        inputs = served.processor(instruction=each.instruction, images=each.images[0])
        expected = served.model.predict_action(**inputs, return_dict=True)
        prediction = served.predict([served.prepare(each)])[0]
        np.testing.assert_array_equal(prediction.actions[0], expected.actions)
        np.testing.assert_array_equal(prediction.entropy[0], expected.entropy[0].numpy())


@pytest.mark.parametrize("attention_mode", ["causal", "bidirectional"])
def test_chunks_pictures_and_states(attention_mode):
    """Two cameras, a state, and an L1 head for bidirectional attention."""
    changes = {"num_images": 2, "use_proprio": True, "chunk_size": 2}
    changes |= {"attention_mode": attention_mode, "action_dim": 7, "proprio_dim": 8}
    changes |= {"head_type": "l1"} if attention_mode == "bidirectional" else {}
    model, processor = load_policy(TINY_POLICY, dtype=torch.float32, changes=changes)
    for statistics in (model.norm_stats, processor.norm_stats):
        for name in ("q99", "max"):
            statistics["tabletop"]["proprio"][name] = [1.0] * 8
    policy, rng = Policy(model, processor, "tiny"), np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(4)]
    rows, singles = [], []
    for number, instruction in enumerate(("go", "pick up the cube")):
        images, state = pictures[2 * number : 2 * number + 2], rng.uniform(0, 1, 8)
        rows.append(policy.prepare(Observation(instruction, tuple(images), state)))
        inputs = processor(instruction=instruction, images=[images], state=state)
        singles.append(model.predict_action(**inputs))
    for prediction, expected in zip(policy.predict(rows), singles, strict=True):
        assert prediction.actions.shape == expected.shape == (2, 7)
        np.testing.assert_allclose(prediction.actions, expected, atol=1e-5)
        assert (prediction.entropy is None) == (attention_mode == "bidirectional")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": (np.zeros((4, 4, 3), np.uint8),)}, "sides"),
        ({"images": (np.full((16, 16, 3), 2.0),)}, "floating-point image"),
        ({"images": (np.zeros((16, 16, 3), np.int64),)}, "uint8"),
        ({"unnorm_key": "elsewhere"}, "elsewhere"),
        ({"instruction": "\U0001f916" * MAX_CHARACTERS}, "tokens"),
        ({"state": np.zeros(8)}, "state"),
    ],
)
def test_what_the_processor_refuses_never_reaches_a_batch(served, changes, message):
    good = {"instruction": "go", "images": (np.zeros((16, 16, 3), np.uint8),)}
    with pytest.raises(ObservationError, match=message):
        served.prepare(Observation(**(good | changes)))


def test_threads_share_the_tokenizer(served):
    """A fast tokenizer whose options two threads change at once fails with `Already borrowed`."""
    failures = []

    def prepare(seed: int) -> None:
        try:
            for each in observations(np.random.default_rng(seed), 20):
                served.prepare(each)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=prepare, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    served.predict([served.prepare(each) for each in observations(np.random.default_rng(9), 3)])
    [thread.join() for thread in threads]
    assert not failures
