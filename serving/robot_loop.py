"""
The loop that drives an arm by a policy server, at a fixed rate and within limits.

    python -m serving.robot_loop --url ws://127.0.0.1:8000 --instruction "pick up the red cube" --dry_run

`--dry_run` puts a robot without a body in the place of yours: its camera sees noise, and its hand goes where it is
told. For a real arm write a class with the three methods of [`Robot`] and hand it to [`control`]; keep the limits of
its own controller: those here are a second line.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from evaluation.chunks import ChunkQueue, TemporalEnsemble

from .broker import ChunkBroker, LatencyMonitor, PrefetchingBroker
from .client import PolicyClient, PolicyServerError


logger = logging.getLogger("serving.robot_loop")


class Robot(Protocol):
    """An arm whose actions are displacements of its hand in its base frame, and the opening of its gripper."""

    def observe(self) -> dict[str, Any]:
        """`image`, uint8 (H, W, 3), more cameras under names with `wrist`; `state`, (P,), if the policy takes one."""

    def act(self, action: np.ndarray) -> None:
        """Begin to move by (x, y, z, roll, pitch, yaw) in metres and radians; gripper 1 is open. Returns at once."""

    def stop(self) -> None:
        """Hold still. Called at the end, however it came about."""


@dataclass(frozen=True)
class Limits:
    """
    What a single action may do; one that is not finite ends the loop.

    Args:
        translation (`float`), rotation (`float`): Longest displacement, in metres and radians; a longer one keeps its
            direction.
        age (`float`): In seconds, of the observation that an action follows from; an older one ends the loop.
    """

    translation: float = 0.1
    rotation: float = 0.5
    age: float = 2.0

    def apply(self, action: np.ndarray) -> np.ndarray:
        """
        The action (7,) within the limits.

        Raises:
            ValueError: If it is of another shape, or not finite.
        """
        action = np.array(action, dtype=np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"An action must be 7 finite numbers, got {action.tolist()}.")
        action[:3] = _shortened(action[:3], self.translation)
        action[3:6] = _shortened(action[3:6], self.rotation)
        action[6] = np.clip(action[6], 0.0, 1.0)
        return action


def _shortened(vector: np.ndarray, longest: float) -> np.ndarray:
    length = float(np.linalg.norm(vector))
    return vector if length <= longest else vector * (longest / length)


@dataclass
class Outcome:
    """
    Args:
        steps (`int`): Actions that were taken.
        reason (`str`): Why the loop ended: `done`, `stale`, `invalid` (an action) or `no answer`.
        late (`int`): Ticks that began later than half a period behind their time.
        limited (`int`): Actions that the limits changed.
    """

    steps: int = 0
    reason: str = "done"
    late: int = 0
    limited: int = 0


def control(
    robot: Robot,
    broker: ChunkBroker | PrefetchingBroker,
    instruction: str,
    *,
    rate: float = 5.0,
    steps: int = 100,
    limits: Limits | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome:
    """
    Drive a robot; it is stopped at the end in any case.

    Args:
        robot (`Robot`): To drive.
        broker ([`ChunkBroker`] or [`PrefetchingBroker`]): Gives the actions.
        instruction (`str`): What the robot should do.
        rate (`float`, defaults to 5.0): Actions per second, those of the policy's training. A tick that comes late
            begins the rhythm anew: none is made up for.
        steps (`int`, defaults to 100): Most actions.
        limits (`Limits`, *optional*): Of every action.
        clock, sleep (`Callable`): Of the time, in seconds.

    Raises:
        PolicyServerError: If the server refuses. The robot stands still by then.
    """
    limits, outcome, period = limits or Limits(), Outcome(), 1.0 / rate
    broker.reset()
    due = clock()
    try:
        for _ in range(steps):
            action = broker.act({**robot.observe(), "instruction": instruction})
            if broker.age > limits.age:
                outcome.reason = "stale"
                break
            limited = limits.apply(action)
            robot.act(limited)
            outcome.steps += 1
            outcome.limited += not np.array_equal(limited, action)
            due += period
            late = clock() - due
            outcome.late += late > period / 2
            if late > 0:
                due += late
            else:
                sleep(-late)
    except ValueError as error:
        logger.error("Stopped: %s", error)
        outcome.reason = "invalid"
    except TimeoutError as error:
        logger.error("Stopped: %s", error)
        outcome.reason = "no answer"
    finally:
        robot.stop()
    return outcome


@dataclass
class DryRobot:
    """
    A robot without a body.

    Args:
        image_size (`int`): Side of its camera's pictures.
        num_images (`int`): Cameras.
        hand (`np.ndarray`): Its position and rotation, (6,).
        actions (`list`): Those that it was given.
        is_stopped (`bool`): Whether it was told to stop.
    """

    image_size: int = 224
    num_images: int = 1
    hand: np.ndarray = field(default_factory=lambda: np.array([0.5, 0.0, 0.25, 0.0, 0.0, 0.0]))
    actions: list[np.ndarray] = field(default_factory=list)
    is_stopped: bool = False

    def observe(self) -> dict[str, Any]:
        rng = np.random.default_rng(len(self.actions))
        shape = (self.num_images, self.image_size, self.image_size, 3)
        front, *wrists = rng.integers(0, 256, shape, dtype=np.uint8)
        finger = 0.02 if not self.actions else 0.04 * float(self.actions[-1][6])
        cameras = {"image": front, **{f"wrist_image_{index}": image for index, image in enumerate(wrists)}}
        return {**cameras, "state": np.array([*self.hand, finger, finger])}

    def act(self, action: np.ndarray) -> None:
        self.hand = self.hand + action[:6]
        self.actions.append(action)

    def stop(self) -> None:
        self.is_stopped = True


def make_broker(
    arguments: argparse.Namespace, client: PolicyClient, monitor: LatencyMonitor
) -> ChunkBroker | PrefetchingBroker:
    """How the command line says that chunks are spent."""
    if arguments.prefetch_below is not None:
        return PrefetchingBroker(client.infer, arguments.prefetch_below, arguments.actions_per_chunk, monitor)
    if arguments.temporal_ensemble is not None:
        return ChunkBroker(client.infer, partial(TemporalEnsemble, arguments.temporal_ensemble), monitor)
    return ChunkBroker(client.infer, partial(ChunkQueue, arguments.actions_per_chunk), monitor)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m serving.robot_loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="http://HOST:PORT or ws://HOST:PORT")
    parser.add_argument("--instruction", default="pick up the red cube")
    parser.add_argument("--dry_run", action="store_true", help="a robot without a body, the only one there is here")
    parser.add_argument("--token", default=os.environ.get("OPENVLA_TOKEN"), help="or OPENVLA_TOKEN in the environment")
    parser.add_argument("--unnorm_key", help="dataset whose statistics scale the actions")
    parser.add_argument("--rate", type=float, default=5.0, help="actions per second")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds for an answer, reconnecting included")
    parser.add_argument("--max_age", type=float, default=2.0, help="seconds; of the observation behind an action")
    parser.add_argument("--max_translation", type=float, default=0.1, help="metres per action")
    parser.add_argument("--max_rotation", type=float, default=0.5, help="radians per action")
    parser.add_argument("--actions_per_chunk", type=int, help="actions to take of each chunk; all by default")
    parser.add_argument("--temporal_ensemble", type=float, help="decay; average what all chunks say of a tick")
    parser.add_argument("--prefetch_below", type=int, help="ask for the next chunk when so many actions are left")
    parsed = parser.parse_args(arguments)
    if not parsed.dry_run:
        parser.error("This command moves no real arm: add --dry_run, or call `control` with your own robot.")
    if parsed.temporal_ensemble is not None and (parsed.prefetch_below, parsed.actions_per_chunk) != (None, None):
        parser.error("--temporal_ensemble asks at every tick: without --prefetch_below and --actions_per_chunk.")
    if not parsed.rate > 0 or parsed.steps < 1:
        parser.error(f"--rate {parsed.rate} and --steps {parsed.steps} must be above 0.")
    return parsed


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every action otherwise
    fields = {} if parsed.unnorm_key is None else {"unnorm_key": parsed.unnorm_key}
    limits = Limits(parsed.max_translation, parsed.max_rotation, parsed.max_age)
    monitor = LatencyMonitor(1.0 / parsed.rate)
    try:
        with PolicyClient(parsed.url, token=parsed.token, timeout=parsed.timeout, **fields) as client:
            description = client.metadata()
            robot = DryRobot(description.get("image_size", 224), description.get("num_images", 1))
            broker = make_broker(parsed, client, monitor)
            try:
                outcome = control(
                    robot, broker, parsed.instruction, rate=parsed.rate, steps=parsed.steps, limits=limits
                )
            finally:
                broker.close()
    except (PolicyServerError, TimeoutError, ValueError) as error:
        logger.error("%s", error)
        return 1
    sys.stdout.write(json.dumps({**vars(outcome), "latency": monitor.summary()}, indent=2) + "\n")
    return 0 if outcome.reason == "done" else 1


if __name__ == "__main__":
    sys.exit(main())
