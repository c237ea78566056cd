"""
A policy server under load: latency and throughput of 1, 8 and 32 robots on loopback, with batches and without.

    python benchmarks/serving.py --policy .
    python benchmarks/serving.py --policy . --clients 8 --soak_minutes 30

The server is a process of its own. The robots are threads of this one, each on its own websocket with its own
picture; each sends its next observation as soon as it has the last answer, so that the server is as busy as they can
make it. `--soak_minutes` keeps the largest number of them at it and samples the server's resident memory. `--output
FILE` stores the result.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import httpx
import numpy as np
from preprocessing import machine
from websockets.sync.client import connect

from serving.wire import pack, unpack


REPOSITORY = Path(__file__).resolve().parent.parent
SIDE = 224  # of the pictures: what robots send to openvla-7b
WARM_UP_SECONDS = 2.0


@contextmanager
def running_server(policy: str, batch_size: int, device: str, dtype: str):
    """Port of a server process with batches of so many rows at most."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"--policy": policy, "--port": port, "--max_batch_size": batch_size, "--device": device, "--dtype": dtype}
    command = [sys.executable, "-m", "serving", *(str(part) for flag in flags.items() for part in flag)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(process, port)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(process: subprocess.Popen, port: int, seconds: float = 600.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError("The server did not start; `python -m serving` says why.")


def robot(port: int, seed: int, until: float, times: list[tuple[float, float]]) -> None:
    """Ask until then; appends when each answer came, and after how many seconds."""
    rng = np.random.default_rng(seed)
    with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as websocket:
        description = unpack(websocket.recv())
        key, size = next(iter(description["action_dims"].items()))
        picture = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        fields = {"image": picture, "instruction": "pick up the red cube"}
        for index in range(1, description["num_images"]):
            fields[f"wrist_{index}"] = picture
        fields |= {"state": np.full(description["state_dims"][key], 0.1)} if description["use_proprio"] else {}
        frame = pack({**fields, "unnorm_key": key})
        while time.monotonic() < until:
            began = time.monotonic()
            websocket.send(frame)
            if unpack(websocket.recv())["actions"].shape[-1] != size:
                raise RuntimeError("The server answers with something else than an action.")
            now = time.monotonic()
            times.append((now, now - began))


def drive(port: int, clients: int, seconds: float) -> dict[str, float]:
    """Milliseconds per answer and answers per second of so many robots, once they are warm."""
    began = time.monotonic()
    until, times = began + WARM_UP_SECONDS + seconds, [[] for _ in range(clients)]
    threads = [threading.Thread(target=robot, args=(port, seed, until, times[seed])) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = [span for each in times for came, span in each if came > began + WARM_UP_SECONDS]
    if len(spans) < clients:
        raise RuntimeError(f"{clients} robots got {len(spans)} answers; the server's log says why.")
    p50, p99 = np.percentile(spans, [50, 99]) * 1e3
    return {"answers": len(spans), "per_second": len(spans) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


def resident_megabytes(port: int) -> float:
    """Of the server, as it tells Prometheus."""
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text.splitlines()
    name = "process_resident_memory_bytes "
    return next(float(line.removeprefix(name)) for line in lines if line.startswith(name)) / 2**20


def soak(port: int, clients: int, minutes: float) -> dict:
    """Resident memory after each minute under load, the first being warm-up."""
    samples, answers = [], 0
    for _ in range(max(1, round(minutes))):
        answers += drive(port, clients, min(60.0, 60.0 * minutes) - WARM_UP_SECONDS)["answers"]
        samples.append(round(resident_megabytes(port), 1))
    return {"clients": clients, "minutes": minutes, "answers": answers, "resident_megabytes": samples}


def measure(arguments: argparse.Namespace) -> dict:
    rows = []
    for batch_size in (1, arguments.max_batch_size):
        with running_server(arguments.policy, batch_size, arguments.device, arguments.dtype) as port:
            for clients in arguments.clients:
                row = {"clients": clients, "max_batch_size": batch_size, **drive(port, clients, arguments.seconds)}
                print_row(row)
                rows.append(row)
            if arguments.soak_minutes and batch_size == arguments.max_batch_size:
                result = soak(port, max(arguments.clients), arguments.soak_minutes)
                print(f"soak: {result['answers']} answers, MiB after each minute: {result['resident_megabytes']}")
                return {"load": rows, "soak": result}
    return {"load": rows}


def print_row(row: dict) -> None:
    print(
        f"{row['clients']:7} {row['max_batch_size']:10} {row['per_second']:10.1f} {row['p50_ms']:10.1f} "
        f"{row['p99_ms']:10.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(REPOSITORY), help="directory or Hub id")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max_batch_size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--soak_minutes", type=float, default=0.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    print(f"{'clients':>7} {'batches of':>10} {'per second':>10} {'p50 ms':>10} {'p99 ms':>10}")
    settings = {name: getattr(arguments, name) for name in ("device", "dtype", "seconds")}
    result = {"machine": {**machine(), "cores": os.cpu_count()}, **settings, **measure(arguments)}
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
