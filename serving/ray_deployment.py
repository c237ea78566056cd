"""
Several replicas of the server behind one address, on the GPUs of one or more machines, by Ray Serve.

    pip install -r requirements-ray.txt
    python -m serving.ray_deployment --policy . --replicas 2 --port 8000

Each replica is the application of `python -m serving` with a policy of its own; Ray starts them, sends requests to the
one with the least to do, and replaces those that fail. `--gpus 1` gives each a GPU. On a cluster (`ray start`), run it
on one of the machines with `--address auto`, with the checkout, and the policy if it is a directory, at the same place
on all of them. On Kubernetes, KubeRay's `import_path` is `serving.ray_deployment:application`, and its `args` are the
fields of [`Options`].

A websocket stays with the replica that it reached, and so do the observations of its session. Over REST those of one
session may meet different replicas: the newest wins among those that meet the same one. `/metrics` and `/status` speak
of one replica, whichever answers.
"""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions

from .guard import is_loopback


REPOSITORY = Path(__file__).resolve().parent.parent
# Requests that wait for a replica; those beyond are answered with 503.
MAX_QUEUED = 64
# Of one replica: an open websocket counts as a request for as long as it lives.
MAX_ONGOING = 256


@dataclass(frozen=True)
class Options:
    """
    Args:
        policy (`str`): Directory, the same on every machine, or Hub id.
        replicas (`int`): How many.
        gpus (`float`): Of each replica; below 1 replicas share one.
        cpus (`float`): Of each replica.
        token (`str`, *optional*): Of the server.
        host (`str`): That robots ask for, where there is no token; see [`Guard`].
        dtype (`str`), trust_remote_code (`bool`): See `load_policy`.
        warm_up (`Sequence[int]`): Batch sizes that the model is prepared for; see [`Service.warm_up`].
        max_batch_size (`int`), batch_wait (`float`), max_open (`int`), timeout (`float`): See [`Service`].
    """

    policy: str
    replicas: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    token: str | None = None
    host: str = "127.0.0.1"
    dtype: str = "auto"
    trust_remote_code: bool = False
    warm_up: Sequence[int] = ()
    max_batch_size: int = 8
    batch_wait: float = 0.01
    max_open: int = 64
    timeout: float = 30.0

    def __post_init__(self):
        if self.replicas < 1 or self.gpus < 0 or self.cpus <= 0:
            raise ValueError(
                f"At least one replica with a share of a processor is needed, got replicas={self.replicas}, "
                f"gpus={self.gpus}, cpus={self.cpus}."
            )
        if not all(1 <= size <= self.max_batch_size for size in self.warm_up):
            raise ValueError(f"warm_up={self.warm_up}: batches have 1 to {self.max_batch_size} rows.")
        if self.token is None and not is_loopback(self.host):
            raise ValueError(f"host={self.host!r} lets others in: that needs a `token`.")


class Replica:
    """What Ray asks of a replica beside its answers; `app` comes from [`make_application`]."""

    app: FastAPI

    def check_health(self) -> None:
        """
        Raises:
            RuntimeError: If the policy has failed several times in a row: Ray then puts a new replica in its place.
        """
        if not self.app.state.service.is_ready:
            raise RuntimeError("The policy does not answer any more.")


def make_application(options: Options) -> serve.Application:
    """The replicas, as `serve.run` takes them. Each loads the policy where it starts."""

    def build() -> FastAPI:
        return _build_app(options)

    deployment = serve.deployment(serve.ingress(build)(Replica), name="policy")
    return deployment.options(
        num_replicas=options.replicas,
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=MAX_QUEUED,
        graceful_shutdown_timeout_s=options.timeout,
    ).bind()


def application(arguments: dict[str, Any]) -> serve.Application:
    """
    For `serve run` and `serve deploy`, whose configuration says where Ray listens.

    Args:
        arguments (`dict`): Fields of [`Options`]; `token` may come in the environment variable OPENVLA_TOKEN.

    Raises:
        ValueError: If there is no token: nothing here knows whom Ray lets in.
    """
    options = Options(**{"token": os.environ.get("OPENVLA_TOKEN"), **arguments})
    if not options.token:
        raise ValueError("`token` is missing, or OPENVLA_TOKEN in the environment.")
    return make_application(options)


def _build_app(options: Options) -> FastAPI:
    """The application of one replica, in whose process this runs."""
    sys.path.insert(0, str(REPOSITORY / "tools"))
    from load_policy import load_policy

    from .app import Settings, create_app
    from .engine import Policy
    from .service import Service

    model, processor = load_policy(options.policy, trust_remote_code=options.trust_remote_code, dtype=options.dtype)
    service = Service(
        Policy(model.to("cuda" if options.gpus else "cpu"), processor, options.policy),
        max_batch_size=options.max_batch_size,
        batch_wait=options.batch_wait,
        max_open=options.max_open,
        timeout=options.timeout,
    )
    # In a loop of its own: that of the replica is the one that waits here.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, service.warm_up(options.warm_up)).result()
    app = create_app(service, Settings(host=options.host, token=options.token))
    app.state.service = service
    return app


def start(options: Options, port: int, address: str | None = None) -> None:
    """
    Start Ray, or join a cluster, and the replicas; returns when they answer.

    Args:
        options (`Options`): Of the replicas.
        port (`int`): To listen on, at `options.host`.
        address (`str`, *optional*): Of a cluster that runs, `auto` for this machine's. By default Ray starts here and
            ends with this process.
    """
    environment = {"PYTHONPATH": str(REPOSITORY)}
    alone = {"include_dashboard": False} if address is None else {}
    ray.init(address=address, runtime_env={"env_vars": environment}, log_to_driver=False, **alone)
    serve.start(http_options=HTTPOptions(host=options.host, port=port))
    serve.run(make_application(options), name="policy", route_prefix="/")


def parse_arguments(arguments: list[str] | None = None) -> tuple[Options, argparse.Namespace]:
    from .__main__ import check_token

    parser = argparse.ArgumentParser(
        prog="python -m serving.ray_deployment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--policy", required=True, help="directory or Hub id")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0.0, help="of each replica; below 1 they share one")
    parser.add_argument("--cpus", type=float, default=1.0, help="of each replica")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token", default=os.environ.get("OPENVLA_TOKEN"), help="required where others reach --host")
    parser.add_argument("--dtype", default="auto", help="of the weights; auto: as they are saved")
    parser.add_argument("--warm_up", type=int, nargs="+", default=(), help="batch sizes to prepare the models for")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the policy's own copy of the code")
    parser.add_argument("--address", help="of a Ray cluster, such as auto; by default Ray starts on this machine")
    parsed = parser.parse_args(arguments)
    check_token(parser, parsed)
    policy = str(Path(parsed.policy).resolve()) if Path(parsed.policy).is_dir() else parsed.policy
    names = ("replicas", "gpus", "cpus", "token", "host", "dtype", "trust_remote_code", "warm_up")
    return Options(policy, **{name: getattr(parsed, name) for name in names}), parsed


def main(arguments: list[str] | None = None) -> int:
    options, parsed = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    start(options, parsed.port, parsed.address)
    logging.getLogger(__name__).info("%d replicas answer on %s:%d", options.replicas, options.host, parsed.port)
    try:
        while True:
            asyncio.run(asyncio.sleep(3600))
    except KeyboardInterrupt:
        serve.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
