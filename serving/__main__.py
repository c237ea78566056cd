"""
Serve a policy to robots: REST (`POST /act`) and openpi's websocket protocol on one port.

    python -m serving --policy . --port 8000

Only this machine may ask, unless `--host` and a token say otherwise. The token may also come in the environment
variable OPENVLA_TOKEN, where no list of processes shows it.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path


# The checkout comes first: `python -m serving` runs in it, and tools/ holds the loader that every command uses.
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tools")]

from load_policy import load_policy  # noqa: E402

from serving.app import Settings  # noqa: E402
from serving.engine import Policy  # noqa: E402
from serving.guard import is_loopback  # noqa: E402
from serving.server import Server, make_server  # noqa: E402
from serving.service import Service  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", required=True, help="directory or Hub id")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the policy's own copy of the code")
    parser.add_argument("--device", default="cpu", help="such as cuda or cuda:1")
    parser.add_argument("--dtype", default="auto", help="of the weights; auto: as they are saved")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token", default=os.environ.get("OPENVLA_TOKEN"), help="required where others reach --host")
    parser.add_argument("--max_batch_size", type=int, default=8)
    parser.add_argument("--warm_up", type=int, nargs="+", default=[], help="batch sizes to prepare the model for")
    parser.add_argument("--batch_wait", type=float, default=0.01, help="seconds that an observation waits for others")
    parser.add_argument("--max_open", type=int, default=64, help="observations in work; further ones get 429")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds for one answer")
    parser.add_argument("--max_body_mb", type=float, default=16.0, help="of a request or a frame")
    parser.add_argument("--legacy_errors", action="store_true", help='failures of /act are "error" with status 200')
    parsed = parser.parse_args(arguments)
    check_token(parser, parsed)
    if not all(1 <= size <= parsed.max_batch_size for size in parsed.warm_up):
        parser.error(f"--warm_up {parsed.warm_up}: batches have 1 to --max_batch_size ({parsed.max_batch_size}) rows.")
    return parsed


def check_token(parser: argparse.ArgumentParser, parsed: argparse.Namespace) -> None:
    """
    Raises:
        SystemExit: If the server would be open to everyone, or the token cannot be sent.
    """
    if parsed.token is not None and not (parsed.token.isascii() and parsed.token.strip() == parsed.token != ""):
        parser.error("--token must be ASCII text without blanks around it.")
    if parsed.token is None and not is_loopback(parsed.host):
        parser.error(f"--host {parsed.host} lets others in: say --token, or OPENVLA_TOKEN in the environment.")


async def serve(service: Service, server: Server, batch_sizes: Sequence[int]) -> None:
    await service.warm_up(batch_sizes)
    await server.serve()


def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    model, processor = load_policy(parsed.policy, trust_remote_code=parsed.trust_remote_code, dtype=parsed.dtype)
    service = Service(
        Policy(model.to(parsed.device), processor, parsed.policy),
        max_batch_size=parsed.max_batch_size,
        batch_wait=parsed.batch_wait,
        max_open=parsed.max_open,
        timeout=parsed.timeout,
    )
    settings = Settings(
        host=parsed.host,
        token=parsed.token,
        max_body=int(parsed.max_body_mb * 2**20),
        legacy_errors=parsed.legacy_errors,
    )
    with contextlib.suppress(KeyboardInterrupt):  # raised again once the server has shut down
        asyncio.run(serve(service, make_server(service, settings, parsed.port), parsed.warm_up))
    return 0


if __name__ == "__main__":
    sys.exit(main())
