"""
The published clients against our server: openpi's, and what published OpenVLA snippets do with `requests` and
`json_numpy`, plain and double-encoded. Every action must be the one that `predict_action` gives in this process.

    python -m venv published-clients
    published-clients/bin/pip install openpi-client typing_extensions json-numpy requests
    python benchmarks/published_clients.py --python published-clients/bin/python --output OUT.json

The clients run with `--python`, in an environment of their own: openpi's needs numpy below 2 (and, without saying so,
typing_extensions). Observations are noise of the size of a camera picture, with states within the dataset's bounds; a
difference anywhere ends the command with status 1.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from load_policy import load_policy
from preprocessing import machine

from serving.client import PolicyClient


REPOSITORY = Path(__file__).resolve().parent.parent
INSTRUCTIONS = ("pick up the red cube", "push the blue brick to the left", "put the green cylinder in the bowl")

# What every client does: read observations, ask for actions, write them with the seconds of each.
_EXCHANGE = """
import sys, time
import numpy as np

place, observations, output = sys.argv[1:]
given = np.load(observations)
{connect}
actions, seconds = [], []
for image, state, instruction in zip(given["images"], given["states"], given["instructions"]):
    began = time.perf_counter()
    action = infer(image, state, str(instruction))
    seconds.append(time.perf_counter() - began)
    actions.append(np.atleast_2d(action))
np.savez(output, actions=np.array(actions), seconds=np.array(seconds))
"""
_OPENPI = """
from openpi_client.websocket_client_policy import WebsocketClientPolicy

host, port = place.split(":")
client = WebsocketClientPolicy(host, int(port))

def infer(image, state, instruction):
    fields = {"observation/image": image, "observation/wrist_image": image, "observation/state": state}
    return client.infer({**fields, "prompt": instruction})["actions"]
"""
_OPENVLA = """
import json
import json_numpy
import requests

json_numpy.patch()

def infer(image, state, instruction):
    observation = {"image": image, "instruction": instruction, "state": state}
    return requests.post(f"http://{place}/act", json=observation).json()
"""
_ENCODED = """
import json
import json_numpy
import requests

json_numpy.patch()

def infer(image, state, instruction):
    observation = {"image": image, "instruction": instruction, "state": state}
    return json.loads(requests.post(f"http://{place}/act", json={"encoded": json.dumps(observation)}).json())
"""
CLIENTS = {"openpi-client": _OPENPI, "json_numpy": _OPENVLA, "json_numpy, double-encoded": _ENCODED}


@contextmanager
def serve(policy: str, port: int) -> Iterator[str]:
    """`python -m serving` in a process of its own, until the end; where it listens."""
    command = [sys.executable, "-m", "serving", "--policy", policy, "--port", str(port)]
    process = subprocess.Popen(command, cwd=REPOSITORY)
    try:
        with PolicyClient(f"ws://127.0.0.1:{port}", timeout=120.0) as client:
            client.metadata()
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def make_observations(processor: Any, number: int, path: Path) -> None:
    """Write `images` (N, 224, 224, 3), `states` (N, P) and `instructions` (N,)."""
    rng = np.random.default_rng(0)
    bounds = next(iter(processor.norm_stats.values())).get("proprio", {"q01": [0.0], "q99": [1.0]})
    low, high = np.array(bounds["q01"]), np.array(bounds["q99"])
    np.savez(
        path,
        images=rng.integers(0, 256, (number, 224, 224, 3), dtype=np.uint8),
        states=rng.uniform(low, high, (number, len(low))),
        instructions=np.array([INSTRUCTIONS[index % len(INSTRUCTIONS)] for index in range(number)]),
    )


def predict(model: Any, processor: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Actions (N, K, D) in this process, and the seconds of each."""
    given, actions, seconds = np.load(path), [], []
    for image, state, instruction in zip(given["images"], given["states"], given["instructions"], strict=True):
        began = time.perf_counter()
        options = {"state": state} if processor.use_proprio else {}
        inputs = processor(instruction=str(instruction), images=image, **options)
        actions.append(np.atleast_2d(model.predict_action(**inputs.to(model.device, dtype=model.dtype))))
        seconds.append(time.perf_counter() - began)
    return np.array(actions), np.array(seconds)


def exchange(python: str, client: str, place: str, observations: Path) -> tuple[np.ndarray, np.ndarray]:
    """Actions (N, K, D) that a published client gets, and the seconds of each."""
    output = observations.with_name("answers.npz")
    code = _EXCHANGE.format(connect=CLIENTS[client])
    subprocess.run([python, "-c", code, place, str(observations), str(output)], check=True)
    answers = np.load(output)
    return answers["actions"], answers["seconds"]


def describe(actions: np.ndarray, expected: np.ndarray, seconds: np.ndarray) -> dict[str, Any]:
    differing = np.any(actions != expected, axis=(1, 2))
    return {
        "actions": len(actions),
        "different": int(differing.sum()),
        "p50_ms": round(1e3 * float(np.median(seconds)), 2),
        "p99_ms": round(1e3 * float(np.percentile(seconds, 99)), 2),
    }


def compare(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Figures of `predict_action` itself, and of each client."""
    model, processor = load_policy(arguments.policy)
    with tempfile.TemporaryDirectory() as folder:
        observations = Path(folder, "observations.npz")
        make_observations(processor, arguments.actions, observations)
        expected, seconds = predict(model, processor, observations)
        yield "predict_action", describe(expected, expected, seconds)
        with serve(arguments.policy, arguments.port) as place:
            for client in arguments.clients:
                answers, seconds = exchange(arguments.python, client, place, observations)
                yield client, describe(answers, expected, seconds)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter with openpi-client, json-numpy and requests")
    parser.add_argument("--policy", default=str(REPOSITORY), help="directory or Hub id")
    parser.add_argument("--actions", type=int, default=1000, help="of each client")
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    figures = {}
    for client, row in compare(arguments):
        figures[client] = row
        print(f"{client:28}", *(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
    if arguments.output:
        result = {"machine": machine(), "clients": figures}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(any(row["different"] for row in figures.values()))


if __name__ == "__main__":
    sys.exit(main())
