"""What Prometheus and the status page are told."""

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest


SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64)
REMEMBERED_ANSWERS = 200
STAGES = ("prepare", "queue", "inference", "total")


class Metrics:
    """
    Counters of one server, in a registry of their own.

    Args:
        num_waiting (`Callable`): Rows that wait for the policy.
        num_open (`Callable`): Requests that are taken and not answered yet.
    """

    def __init__(self, num_waiting: Callable[[], int], num_open: Callable[[], int]):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory and processor time, where the system tells them
        self._requests = Counter(
            "openvla_requests",
            "Observations, by how they were answered.",
            ("protocol", "outcome"),
            registry=self.registry,
        )
        self._stages = Histogram(
            "openvla_stage_seconds",
            "Time of an action, by stage.",
            ("stage",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self._batches = Histogram("openvla_batch_size", "Rows of a batch.", buckets=ROWS, registry=self.registry)
        self._batch_seconds = Histogram(
            "openvla_batch_seconds", "Time of a batch in the policy.", buckets=SECONDS, registry=self.registry
        )
        self.connections = Gauge("openvla_websocket_connections", "Open websockets.", registry=self.registry)
        for name, text, function in (
            ("openvla_queue_length", "Rows that wait for the policy.", num_waiting),
            ("openvla_open_requests", "Observations that are taken and not answered yet.", num_open),
        ):
            Gauge(name, text, registry=self.registry).set_function(function)
        self.began = time.time()
        self.outcomes: dict[str, int] = {}
        self.recent: deque[dict[str, float]] = deque(maxlen=REMEMBERED_ANSWERS)

    def count(self, protocol: str, outcome: str) -> None:
        self._requests.labels(protocol, outcome).inc()
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def batch(self, size: int, seconds: float) -> None:
        self._batches.observe(size)
        self._batch_seconds.observe(seconds)

    def answered(self, batch_size: int, **seconds: float) -> None:
        """Times of one answer, by the names of `STAGES`."""
        for stage in STAGES:
            self._stages.labels(stage).observe(seconds[stage])
        milliseconds = {stage: round(1000 * seconds[stage], 3) for stage in STAGES}
        self.recent.append({"time": time.time(), "batch_size": batch_size, **milliseconds})

    def render(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
