# Copyright 2026 The OpenVLA repository authors. Licensed under the Apache License, Version 2.0.
"""The client of policy servers: both protocols, errors, time, and connections that come back."""

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import msgpack
import numpy as np
import pytest
from conftest import REPOSITORY
from policy_server import StubPolicy, observation, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve
from websockets.utils import accept_key

from serving.app import Settings
from serving.client import AsyncPolicyClient, Backoff, PolicyClient, PolicyServerError


QUICK = Backoff(first=0.01, longest=0.05)
PROTOCOLS = ("http", "ws")


@pytest.fixture(scope="module")
def stub():
    return StubPolicy()


@pytest.fixture(scope="module")
def server(stub):
    with running(stub) as server:
        yield server


class Asked:
    """Either client, with the calls of the synchronous one."""

    def __init__(self, kind: str, *arguments, **keywords):
        self._loop = asyncio.new_event_loop()
        if kind == "sync":
            self.client = PolicyClient(*arguments, **keywords)
        else:
            self.client = self._run(self._make(*arguments, **keywords))

    async def _make(self, *arguments, **keywords):
        return AsyncPolicyClient(*arguments, **keywords)

    def _run(self, result):
        return self._loop.run_until_complete(result) if asyncio.iscoroutine(result) else result

    def infer(self, fields):
        return self._run(self.client.infer(fields))

    def metadata(self):
        return self._run(self.client.metadata())

    def close(self):
        self._run(self.client.close())
        self._loop.close()


@pytest.fixture
def ask():
    """Makes clients, and closes them."""
    made = []

    def make(kind, url, **keywords):
        made.append(Asked(kind, url, **{"backoff": QUICK, **keywords}))
        return made[-1]

    yield make
    for client in made:
        client.close()


both_kinds = pytest.mark.parametrize("kind", ["sync", "async"])
both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS)


@both_kinds
@both_protocols
class TestAnswers:
    def test_actions(self, server, ask, kind, protocol):
        client = ask(kind, f"{protocol}://{server.address}")
        for number in (3, 4):
            answer = client.infer(observation(number))
            np.testing.assert_array_equal(answer.actions, np.full((1, 7), number))
            assert answer.actions.dtype == np.float64
            assert 0 < answer.seconds < 5
        assert client.metadata()["action_dims"] == {"narrow": 7, "wide": 8}

    def test_fields_of_every_observation(self, server, ask, kind, protocol):
        client = ask(kind, f"{protocol}://{server.address}", unnorm_key="wide")
        assert client.infer(observation(1)).actions.shape == (1, 8)

    def test_refusals(self, server, ask, kind, protocol):
        client = ask(kind, f"{protocol}://{server.address}")
        with pytest.raises(PolicyServerError, match="no instruction"):
            client.infer({"image": observation()["image"]})
        with pytest.raises(PolicyServerError, match="The policy failed") as raised:
            client.infer({**observation(), "instruction": "fail"})
        assert raised.value.code in (500, 1011)
        assert client.infer(observation(5)).actions[0, 0] == 5

    def test_token(self, ask, kind, protocol):
        with running(StubPolicy(), Settings(token="secret")) as server:
            url = f"{protocol}://{server.address}"
            assert ask(kind, url, token="secret").infer(observation(2)).actions[0, 0] == 2
            with pytest.raises(PolicyServerError, match="token is missing or wrong") as raised:
                ask(kind, url, token="wrong").infer(observation(2))
            assert raised.value.code == 401

    def test_late_answer_is_not_taken_for_the_next(self, server, stub, ask, kind, protocol):
        client = ask(kind, f"{protocol}://{server.address}", timeout=0.3)
        client.infer(observation(0))
        stub.gate.clear()
        with pytest.raises(TimeoutError, match=r"has not answered within 0\.3 s"):
            client.infer(observation(1))
        stub.gate.set()
        getattr(client.client, "_client", client.client).timeout = 5.0
        assert client.infer(observation(2)).actions[0, 0] == 2

    def test_busy_server_is_asked_again(self, ask, kind, protocol):
        stub = StubPolicy()
        with running(stub, max_open=1) as server:
            stub.gate.clear()
            occupied = threading.Thread(target=PolicyClient(server.url).infer, args=(observation(0),))
            occupied.start()
            assert stub.entered.wait(5)

            def open_once_refused():
                while "busy" not in server.service.metrics.outcomes:
                    time.sleep(0.005)
                stub.gate.set()

            opener = threading.Thread(target=open_once_refused, daemon=True)
            opener.start()
            answer = ask(kind, f"{protocol}://{server.address}", timeout=10.0).infer(observation(7))
            assert answer.actions[0, 0] == 7
            occupied.join()
            opener.join()

    def test_nobody_there(self, ask, kind, protocol):
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"within 0\.2 s; the last attempt: "):
            ask(kind, f"{protocol}://127.0.0.1:9", timeout=0.2).infer(observation())
        assert time.monotonic() - began < 2


def test_errors_of_published_servers():
    """The text "error", with status 200."""
    with running(StubPolicy(), Settings(legacy_errors=True)) as server, PolicyClient(server.url) as client:
        with pytest.raises(PolicyServerError, match="The server answers 'error'"):
            client.infer({**observation(), "instruction": "fail"})
        assert client.infer(observation(1)).actions[0, 0] == 1


@contextmanager
def openpi_server(handle, port: int = 0):
    """A server written from openpi's protocol alone; `handle` gets the connection behind the metadata."""

    def converse(connection):
        connection.send(msgpack.packb({"name": "other"}))
        handle(connection)

    with serve(converse, "127.0.0.1", port, compression=None, close_timeout=0.2) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join()


def reply(connection, value: float = 1.0) -> None:
    """Answer one observation, in openpi's bytes."""
    fields = msgpack.unpackb(connection.recv(), strict_map_key=False)
    image = fields["image"]
    assert set(image) == {b"__ndarray__", b"data", b"dtype", b"shape"}
    assert (image[b"dtype"], image[b"shape"]) == ("|u1", [32, 32, 3])
    actions = np.full((2, 7), value)
    packed = {b"__ndarray__": True, b"data": actions.tobytes(), b"dtype": "<f8", b"shape": actions.shape}
    connection.send(msgpack.packb({"actions": packed, "server_timing": {"infer_ms": 1.5}}))


@both_kinds
class TestWebsocket:
    def test_answer_of_another_server(self, ask, kind):
        with openpi_server(reply) as port:
            client = ask(kind, f"ws://127.0.0.1:{port}")
            answer = client.infer(observation())
            assert client.metadata() == {"name": "other"}
            np.testing.assert_array_equal(answer.actions, np.ones((2, 7)))
            assert answer.details == {"server_timing": {"infer_ms": 1.5}}

    def test_server_that_comes_back(self, ask, kind):
        with openpi_server(reply) as port:
            client = ask(kind, f"ws://127.0.0.1:{port}", timeout=10.0)
            client.infer(observation())
        with openpi_server(lambda connection: reply(connection, 2.0), port):
            assert client.infer(observation()).actions[0, 0] == 2

    def test_connection_that_breaks_off(self, ask, kind):
        attempts = []

        def handle(connection):
            attempts.append(connection.recv())
            if len(attempts) == 1:
                connection.socket.close()
            elif len(attempts) == 2:
                connection.send("come back later")
                connection.close(1013)
            else:
                packed = {b"__ndarray__": True, b"data": np.zeros(7).tobytes(), b"dtype": "<f8", b"shape": [1, 7]}
                connection.send(msgpack.packb({"actions": packed}))

        with openpi_server(handle) as port:
            assert ask(kind, f"ws://127.0.0.1:{port}").infer(observation()).actions.shape == (1, 7)
        assert len(attempts) == 3

    @pytest.mark.parametrize(
        ("frame", "message"),
        [
            ("Traceback: it broke", r"it broke \(1011\)"),
            (b"\xc1", "speaks another protocol"),
            (msgpack.packb({"action_plan": 1}), "must be finite numbers"),
            (msgpack.packb({"superseded": True}), "newer observation"),
        ],
    )
    def test_frames_without_actions(self, ask, kind, frame, message):
        def handle(connection):
            connection.recv()
            connection.send(frame)
            connection.close(1011)

        with openpi_server(handle) as port, pytest.raises(PolicyServerError, match=message):
            ask(kind, f"ws://127.0.0.1:{port}").infer(observation())

    def test_silent_server(self, ask, kind):
        def handle(connection):
            connection.recv()
            with pytest.raises(ConnectionClosed):
                connection.recv(timeout=5)

        with openpi_server(handle) as port, pytest.raises(TimeoutError, match=r"within 0\.2 s"):
            ask(kind, f"ws://127.0.0.1:{port}", timeout=0.2).infer(observation())


@contextmanager
def raw_server(serve_one):
    """`serve_one` gets a bare socket, and an event that is set at the end."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def accept():
            with suppress(OSError), listener.accept()[0] as connection:
                serve_one(connection, ended)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            thread.join()


def read_nothing(connection, ended) -> None:
    """Speak openpi's protocol until the metadata are sent."""
    key = re.search(rb"Sec-WebSocket-Key: (\S+)", connection.recv(4096))[1].decode()
    head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    connection.sendall(f"{head}Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n".encode() + b"\x82\x01\x80")
    ended.wait(20)


def answer_byte_by_byte(connection, ended) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not ended.wait(0.05):
        connection.sendall(b" ")


@both_kinds
@pytest.mark.parametrize(("protocol", "serve_one"), [("ws", read_nothing), ("http", answer_byte_by_byte)])
def test_no_call_outlasts_its_timeout(ask, kind, protocol, serve_one):
    """Neither where a large frame finds no room, nor where each byte of an answer comes in time."""
    with raw_server(serve_one) as port:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            ask(kind, f"{protocol}://127.0.0.1:{port}", timeout=1.0).infer({"image": np.zeros(3 * 10**7, np.uint8)})
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://robot", "http://", "ws:///act"])
def test_addresses(url):
    with pytest.raises(ValueError, match="must begin with http://"):
        PolicyClient(url)


def test_paths():
    assert PolicyClient("http://robot:1/").url == "http://robot:1/act"
    assert PolicyClient("https://robot/arm/act").url == "https://robot/arm/act"
    assert PolicyClient("ws://robot:1").url == "ws://robot:1/"


def test_pauses_grow():
    pauses = Backoff(first=1.0, factor=3.0, longest=5.0).pauses()
    for longest in (1.0, 3.0, 5.0, 5.0):
        assert longest / 2 <= next(pauses) <= longest


def test_a_robots_computer_needs_little():
    """Neither the model's libraries, nor those of the server."""
    code = (
        "import sys\nimport serving.broker, serving.client, serving.robot_loop\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = set(eval(result.stdout))
    assert {"numpy", "httpx", "websockets", "msgpack"} <= loaded
    assert not {"torch", "transformers", "PIL", "fastapi", "starlette", "uvicorn", "robot_data", "tabletop"} & loaded
