# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""What a control loop does with the chunks of a server, and how it is driven by them."""

import json
import logging
import threading
import time
from functools import partial

import numpy as np
import pytest
from policy_server import StubPolicy, running

from evaluation.chunks import ChunkQueue, TemporalEnsemble
from serving import robot_loop
from serving.broker import ChunkBroker, LatencyMonitor, PrefetchingBroker
from serving.client import Answer
from serving.robot_loop import DryRobot, Limits, control


class ChunkedServer:
    """
    Answers the observation of tick t with the chunk t, t + 0.01, ..., (K, 1): the action of tick n is n from whichever
    observation, rounded. Waits for `gate` before it answers.
    """

    def __init__(self, size: int = 4, width: int = 1):
        self.size, self.width = size, width
        self.gate = threading.Event()
        self.gate.set()
        self.asked, self.failures = [], []

    def infer(self, observation):
        self.asked.append(observation["tick"])
        assert self.gate.wait(10)
        if self.failures:
            raise self.failures.pop()
        ticks = observation["tick"] + np.arange(self.size)
        return Answer(np.repeat(ticks[:, None] + self.asked[-1] * 1e-3, self.width, axis=1), seconds=0.25)


def planned(action: np.ndarray) -> tuple[int, int]:
    """The tick that an action was planned for, and the one of the observation behind it."""
    return int(action[0]), round(action[0] % 1 * 1e3)


def settle(broker: PrefetchingBroker) -> None:
    """Until the answer that is on its way is there."""
    deadline = time.monotonic() + 10
    while broker._request is not None and not broker._request.answer.done() and time.monotonic() < deadline:
        time.sleep(0.001)


class TestChunkBroker:
    def test_open_loop(self):
        server, monitor = ChunkedServer(), LatencyMonitor(0.1)
        broker = ChunkBroker(server.infer, partial(ChunkQueue, 3), monitor)
        plans = [planned(broker.act({"tick": tick})) for tick in range(7)]
        assert plans == [(0, 0), (1, 0), (2, 0), (3, 3), (4, 3), (5, 3), (6, 6)]
        assert server.asked == [0, 3, 6]
        assert monitor.summary()["answers"] == 3
        broker.reset()
        assert planned(broker.act({"tick": 20})) == (20, 20)

    def test_temporal_ensemble(self):
        server, ensemble = ChunkedServer(), TemporalEnsemble(0.5)
        broker = ChunkBroker(server.infer, lambda: ensemble)
        actions = [broker.act({"tick": tick}) for tick in range(6)]
        assert server.asked == list(range(6))
        weights = np.exp(-0.5 * np.arange(4))
        np.testing.assert_allclose(actions[5], 5 + 1e-3 * np.average([2, 3, 4, 5], weights=weights))

    def test_age_counts_from_the_observation(self):
        broker = ChunkBroker(ChunkedServer().infer)
        broker.act({"tick": 0})
        time.sleep(0.05)
        broker.act({"tick": 1})
        assert 0.05 <= broker.age < 5


class TestPrefetchingBroker:
    @pytest.fixture
    def server(self):
        return ChunkedServer()

    @pytest.fixture
    def make(self, server):
        made = []

        def make(*arguments, **keywords):
            made.append(PrefetchingBroker(server.infer, *arguments, **keywords))
            return made[-1]

        yield make
        server.gate.set()
        for broker in made:
            broker.close()

    def test_actions_are_those_of_their_ticks(self, server, make):
        """The next chunk is asked for two actions before the end, and arrives one tick later."""
        broker, plans = make(2), []
        for tick in range(9):
            plans.append(planned(broker.act({"tick": tick})))
            settle(broker)
        assert [plan for plan, _ in plans] == list(range(9))
        assert server.asked == [0, 2, 4, 6, 8]
        assert broker.stalls == 0
        # Of the chunk that was asked for at tick 2 the first action is passed over: at 2 it was not there yet.
        assert [seen for _, seen in plans] == [0, 0, 0, 2, 2, 4, 4, 6, 6]

    def test_late_chunk(self, server, make):
        """It stalls the robot, and what is acted on is still planned for the tick."""
        broker = make(2)
        assert planned(broker.act({"tick": 0})) == (0, 0)
        server.gate.clear()
        for tick in (1, 2, 3):
            assert planned(broker.act({"tick": tick})) == (tick, 0)
        threading.Timer(0.1, server.gate.set).start()
        assert planned(broker.act({"tick": 4})) == (4, 2)
        assert broker.stalls == 1

    def test_chunk_that_is_spent_when_it_arrives(self, server, make):
        broker = make(1, num_actions=2)
        assert planned(broker.act({"tick": 0})) == (0, 0)
        server.gate.clear()
        assert planned(broker.act({"tick": 1})) == (1, 0)  # asked for here, and still away
        server.size = 1
        threading.Timer(0.1, server.gate.set).start()
        assert planned(broker.act({"tick": 2})) == (2, 2)
        assert server.asked == [0, 1, 2]

    def test_failure_counts_when_nothing_is_left(self, server, make, caplog):
        broker = make(3)
        broker.act({"tick": 0})
        server.failures = [TimeoutError("late"), TimeoutError("late again"), TimeoutError("late once more")]
        with caplog.at_level(logging.WARNING):
            for tick in (1, 2, 3):
                assert planned(broker.act({"tick": tick})) == (tick, 0)
                settle(broker)
        assert "will be asked again" in caplog.text
        with pytest.raises(TimeoutError, match="late"):
            while True:
                broker.act({"tick": 4})
                server.failures = [TimeoutError("late")]
                settle(broker)

    def test_reset_forgets_what_is_on_its_way(self, server, make):
        broker = make(3)
        broker.act({"tick": 0})
        broker.act({"tick": 1})
        broker.reset()
        assert planned(broker.act({"tick": 50})) == (50, 50)

    def test_refuses(self, server):
        for prefetch_below, num_actions in ((-1, None), (3, 3)):
            with pytest.raises(ValueError, match="expected 0 or more, and fewer than there are"):
                PrefetchingBroker(server.infer, prefetch_below, num_actions)


def test_latency_beside_the_control_period():
    monitor = LatencyMonitor(0.2, window=100)
    assert monitor.summary() == {"answers": 0}
    for seconds in [9.0] * 5 + [0.1] * 90 + [0.5] * 10:
        monitor.add(seconds)
    summary = monitor.summary()
    assert summary["answers"] == 100
    assert summary["within_period"] == 0.9
    np.testing.assert_allclose([summary["p50_ms"], summary["p99_ms"], summary["max_ms"]], [100, 500, 500])
    assert summary["actions_per_answer"] == 3
    with pytest.raises(ValueError, match="above 0 seconds"):
        LatencyMonitor(0)


class Clock:
    """Time that passes by sleeping, and by acting."""

    def __init__(self):
        self.now, self.sleeps = 100.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


class Ticking(ChunkedServer):
    """Actions of 7 numbers; the action of a tick is the number of those that were asked for."""

    def infer(self, observation):
        return super().infer({"tick": len(self.asked)})


class TestControl:
    def test_rate(self):
        clock, robot = Clock(), DryRobot(image_size=8)
        act = robot.act

        def slow_act(action):
            clock.now += 0.5 if len(robot.actions) == 1 else 0.05
            act(action)

        robot.act = slow_act
        broker = ChunkBroker(Ticking(size=1, width=7).infer)
        outcome = control(robot, broker, "go", rate=5.0, steps=4, clock=clock, sleep=clock.sleep)
        assert (outcome.steps, outcome.reason, outcome.late) == (4, "done", 1)
        np.testing.assert_allclose(clock.sleeps, [0.15, 0.15, 0.15])  # what is late is not made up for
        assert robot.is_stopped

    def test_limits(self):
        limited = Limits(0.1, 0.5).apply(np.array([3.0, 0.0, 4.0, 0.1, 0.0, 0.0, 1.7]))
        np.testing.assert_allclose(limited, [0.06, 0.0, 0.08, 0.1, 0.0, 0.0, 1.0])
        for action in (np.zeros(6), np.full(7, np.nan), np.zeros((1, 7))):
            with pytest.raises(ValueError, match="must be 7 finite numbers"):
                Limits().apply(action)

    @pytest.mark.parametrize(
        ("answer", "limits", "reason"),
        [
            (Answer(np.zeros((1, 7)), 0.0), Limits(age=-1.0), "stale"),
            (Answer(np.zeros((1, 6)), 0.0), Limits(), "invalid"),
            (TimeoutError("nobody"), Limits(), "no answer"),
        ],
    )
    def test_what_ends_it(self, answer, limits, reason):
        def infer(observation):
            assert observation["instruction"] == "go"
            if isinstance(answer, Exception):
                raise answer
            return answer

        robot = DryRobot(image_size=8)
        outcome = control(robot, ChunkBroker(infer), "go", rate=1000.0, steps=3, limits=limits)
        assert (outcome.reason, outcome.steps) == (reason, 0)
        assert robot.is_stopped
        assert not robot.actions

    def test_robot_is_stopped_whatever_happens(self):
        def infer(observation):
            raise RuntimeError("the cable")

        robot = DryRobot(image_size=8)
        with pytest.raises(RuntimeError, match="the cable"):
            control(robot, ChunkBroker(infer), "go")
        assert robot.is_stopped


@pytest.fixture(scope="module")
def policy_server():
    with running(StubPolicy()) as server:
        yield server


class TestCommand:
    @pytest.mark.parametrize("protocol", ["http", "ws"])
    @pytest.mark.parametrize("flags", [(), ("--prefetch_below", "0"), ("--temporal_ensemble", "0.01")])
    def test_dry_run(self, policy_server, capsys, protocol, flags):
        arguments = ("--dry_run", "--instruction", "go 0", "--unnorm_key", "narrow", "--rate", "100", "--steps", "6")
        assert robot_loop.main(["--url", f"{protocol}://{policy_server.address}", *arguments, *flags]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert (printed["steps"], printed["reason"]) == (6, "done")
        assert printed["latency"]["answers"] >= 6

    def test_what_cannot_run(self, policy_server, capsys, caplog):
        url = ("--url", policy_server.url)
        for arguments in (url, (*url, "--dry_run", "--rate", "0"), (*url, "--dry_run", "--temporal_ensemble", "0")):
            if "--temporal_ensemble" in arguments:
                arguments += ("--prefetch_below", "1")
            with pytest.raises(SystemExit):
                robot_loop.main(list(arguments))
        assert "This command moves no real arm" in capsys.readouterr().err
        assert robot_loop.main(["--url", "http://127.0.0.1:9", "--dry_run", "--timeout", "0.1"]) == 1
        assert "has not answered within 0.1 s" in caplog.text
        assert robot_loop.main([*url, "--dry_run", "--instruction", "fail"]) == 1
        assert "The policy failed" in caplog.text
