"""The policy server over sockets on loopback: protocols, limits, hostile clients, and how it stops."""

import asyncio
import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager, suppress

import httpx
import msgpack
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY_POLICY
from load_policy import load_policy
from PIL import Image
from policy_server import PICTURE, StubPolicy, observation, running
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from serving import __main__ as command
from serving import guard
from serving import server as serving_server
from serving.app import Settings
from serving.engine import Policy, Prediction
from serving.wire import dump_json, load_json, pack, unpack


JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def tiny():
    return Policy(*load_policy(TINY_POLICY, dtype=torch.float32), "tiny")


@pytest.fixture(scope="module")
def server(tiny):
    with running(tiny) as made:
        yield made


@pytest.fixture
def stub():
    made = StubPolicy()
    yield made
    made.gate.set()


def post(server, content, headers=JSON, **options) -> httpx.Response:
    if isinstance(content, dict):
        content = dump_json(content)
    return httpx.post(f"{server.url}/act", content=content, headers=headers, timeout=20, **options)


def open_websocket(server, **options):
    return connect(f"ws://{server.address}", compression=None, max_size=None, **options)


def png(picture) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def expected(policy, picture, instruction) -> np.ndarray:
    """What `predict_action` says without a server."""
    inputs = policy.processor(instruction=instruction, images=picture)
    return policy.model.predict_action(**inputs)


def pictures(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for _ in range(count)]


# REST


def test_published_clients_get_what_they_know(server, tiny):
    """The array of json_numpy, written as Starlette's JSON; double-encoded, the text of `json_numpy.dumps`."""
    for picture in pictures(3):
        action = expected(tiny, picture, "pick up the red cube")
        form = {"__numpy__": base64.b64encode(action.tobytes()).decode(), "dtype": "<f8", "shape": [7]}
        request = {"image": picture, "instruction": "pick up the red cube"}
        plain = post(server, {**request, "unnorm_key": "tabletop"})
        assert (plain.status_code, plain.headers["content-type"]) == (200, "application/json")
        assert plain.text == json.dumps(form, separators=(",", ":"))
        encoded = post(server, {"encoded": dump_json(request)})
        assert encoded.text == json.dumps(json.dumps(form))
        np.testing.assert_array_equal(load_json(encoded.json()), action)


def test_oft_clients_get_a_list(server, tiny):
    (picture,) = pictures(1)
    action = expected(tiny, picture, "go")
    request = {"full_image": picture, "left_wrist": picture, "state": np.zeros(8), "instruction": "go"}
    (answer,) = load_json(post(server, request).content)
    np.testing.assert_array_equal(answer, action)
    (answer,) = load_json(post(server, {"encoded": dump_json(request)}).json())
    np.testing.assert_array_equal(answer, action)


def test_compressed_pictures_get_plain_numbers(server, tiny):
    (picture,) = pictures(1)
    action, content = expected(tiny, picture, "go"), png(picture)
    as_text = post(server, {"image": base64.b64encode(content).decode(), "instruction": "go", "uncertainty": True})
    as_form = httpx.post(
        f"{server.url}/act",
        files={"image": ("../../etc/passwd", content, "image/png")},
        data={"instruction": "go", "state": "[0, 1]", "unnorm_key": "tabletop", "uncertainty": "true"},
    )
    for response in (as_text, as_form):
        assert response.status_code == 200, response.text
        answer = response.json()
        np.testing.assert_array_equal(answer["actions"], [action])
        assert np.shape(answer["entropy"]) == (1, 7)
        assert answer["timing_ms"]["total"] >= answer["timing_ms"]["inference"] > 0
        assert re.fullmatch(r"prepare;dur=[\d.]+, .*total;dur=[\d.]+", response.headers["server-timing"])
    empty = httpx.post(f"{server.url}/act", files={"image": b""}, data={"instruction": "go"})
    assert empty.status_code == 422


def test_uncertainty_in_arrays(server):
    answer = load_json(post(server, {**observation(), "uncertainty": True}).content)
    assert (answer["actions"].shape, answer["entropy"].shape) == ((7,), (1, 7))


BAD_BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xff", 400),
    (b"[]", 422),
    (b"{}", 422),
    (b'"error"', 422),
    (b"[" * 5000, 400),
    ({"instruction": "go"}, 422),
    ({"image": PICTURE}, 422),
    ({"image": PICTURE, "instruction": ""}, 422),
    ({"image": PICTURE, "instruction": "go", "unnorm_key": "nothing"}, 422),
    ({"image": np.zeros((2, 2, 3), np.uint8), "instruction": "go"}, 422),
    ({"image": np.full((16, 16, 3), np.nan), "instruction": "go"}, 422),
    ({"image": "/etc/passwd", "instruction": "go"}, 422),
    ({"encoded": "{", "instruction": "go"}, 400),
    ({"encoded": "{"}, 400),
    ({"encoded": 3}, 400),
    (b'{"instruction": "\\ud800", "image": "\\ud800"}', 422),
    (b'{"image": {"__numpy__": "gASVAAAA", "dtype": "|O", "shape": [1]}, "instruction": "go"}', 400),
]


@pytest.mark.parametrize(("body", "status"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bad_bodies(server, body, status):
    response = post(server, body)
    assert response.status_code == status, response.text
    assert response.json()["detail"]
    assert not re.search(r'Traceback|File "|\.py|site-packages', response.text)


def test_other_content_types(server):
    assert post(server, b"<xml/>", {"Content-Type": "text/xml"}).status_code == 415
    assert post(server, observation(), {"Content-Type": "application/problem+json; charset=utf-8"}).status_code == 200
    assert post(server, observation(), {}).status_code == 200
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=x"):
        assert post(server, b"--y\r\n\r\n", {"Content-Type": content_type}).status_code in (400, 422)
    many = {f"field{index}": "x" for index in range(100)}
    assert httpx.post(f"{server.url}/act", data=many, files={"image": b"x"}).status_code == 400


def test_legacy_errors(stub):
    with running(stub, Settings(legacy_errors=True)) as server:
        for body in ({}, b"{", {"image": PICTURE, "instruction": "fail"}):
            response = post(server, body)
            assert (response.status_code, response.text) == (200, '"error"')
        np.testing.assert_array_equal(load_json(post(server, observation(3)).content), [3.0] * 7)
        assert httpx.post(f"{server.url}/reset", content=b"{").status_code == 400


def test_failures_keep_their_reasons_to_themselves(stub):
    with running(stub) as server:
        response = post(server, {"image": PICTURE, "instruction": "fail"})
        assert response.status_code == 500
        assert "secret" not in response.text
        with open_websocket(server) as websocket:
            websocket.recv()
            websocket.send(pack({"image": PICTURE, "instruction": "fail"}))
            assert "secret" not in websocket.recv(timeout=10)
        for _ in range(2):
            post(server, {"image": PICTURE, "instruction": "fail"})
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        assert post(server, observation()).status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 200


# openpi's websocket


def test_websocket_speaks_openpi(server, tiny):
    """The server begins; the frames are those of openpi's own packer."""
    with open_websocket(server) as websocket:
        metadata = msgpack.unpackb(websocket.recv())
        assert metadata["action_dims"] == {"tabletop": 7}
        for number, picture in enumerate(pictures(3)):
            request = {"observation/image": picture, "observation/wrist_image": picture, "prompt": "pick up the cube"}
            websocket.send(pack(request))
            frame = websocket.recv()
            answer = unpack(frame)
            np.testing.assert_array_equal(answer["actions"], [expected(tiny, picture, "pick up the cube")])
            raw = msgpack.unpackb(frame)["actions"]
            assert raw == {
                b"__ndarray__": True,
                b"data": answer["actions"].tobytes(),
                b"dtype": "<f8",
                b"shape": [1, 7],
            }
            assert set(answer["server_timing"]) == {"infer_ms", *(["prev_total_ms"] if number else [])}
            assert answer["policy_timing"]["infer_ms"] <= answer["server_timing"]["infer_ms"]
    response = httpx.get(f"{server.url}/healthz")
    assert (response.status_code, response.text) == (200, "OK\n")


def test_frames_may_be_compressed_pictures(server, tiny):
    (picture,) = pictures(1)
    with open_websocket(server) as websocket:
        websocket.recv()
        websocket.send(pack({"image": png(picture), "instruction": "go", "uncertainty": True}))
        answer = unpack(websocket.recv())
    np.testing.assert_array_equal(answer["actions"], [expected(tiny, picture, "go")])
    assert answer["entropy"].shape == (1, 7)


@pytest.mark.parametrize(
    ("frame", "code", "message"),
    [
        (b"\xc1", 1007, "not msgpack"),
        (b"", 1007, "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", 1007, "not msgpack"),
        (pack({}), 1007, "no instruction"),
        (pack({"prompt": "go", "image": PICTURE, "unnorm_key": "x"}), 1007, "not in the statistics"),
        ("text", 1003, "binary"),
    ],
)
def test_bad_frames_are_told_and_close(server, frame, code, message):
    with open_websocket(server) as websocket:
        websocket.recv()
        websocket.send(frame)
        assert message in websocket.recv(timeout=10)
        with pytest.raises(ConnectionClosed):
            websocket.recv(timeout=10)
        assert websocket.close_code == code


def test_large_frames_close(stub):
    with running(stub, Settings(max_body=10_000)) as server, open_websocket(server) as websocket:
        websocket.recv()
        with pytest.raises(ConnectionClosed):
            websocket.send(bytes(20_000))
            websocket.recv(timeout=10)
        assert websocket.close_code == 1009
        assert post(server, observation()).status_code == 200


def test_answers_come_in_the_order_of_the_frames(stub):
    with running(stub) as server, open_websocket(server) as websocket:
        websocket.recv()
        for number in range(12):
            websocket.send(pack(observation(number)))
        answers = [unpack(websocket.recv(timeout=10)) for _ in range(12)]
        assert [answer["actions"][0, 0] for answer in answers] == list(range(12))


# Sessions


def occupy(server, stub) -> concurrent.futures.Future:
    """Have the policy busy with an observation until the gate is opened."""
    stub.gate.clear()
    stub.entered.clear()
    future = concurrent.futures.ThreadPoolExecutor(1).submit(post, server, observation(100))
    assert stub.entered.wait(10)
    return future


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_newest_observation_wins(stub):
    with running(stub) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = occupy(server, stub)
        old = pool.submit(post, server, observation(1, session_id="robot"))
        until(lambda: server.service.batcher.num_waiting == 1)
        with open_websocket(server) as websocket:
            websocket.recv()
            websocket.send(pack(observation(2, session_id="robot")))
            assert old.result(10).status_code == 409
            websocket.send(pack(observation(3, session_id="robot")))
            websocket.send(pack(observation(4, session_id="other")))
            assert unpack(websocket.recv(timeout=10))["superseded"] is True
            until(lambda: server.service.batcher.num_waiting == 2)
            stub.gate.set()
            assert [unpack(websocket.recv(timeout=10))["actions"][0, 0] for _ in range(2)] == [3, 4]
        assert first.result(10).status_code == 200


def test_reset(stub):
    with running(stub) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = occupy(server, stub)
        waiting = pool.submit(post, server, observation(1, session_id="robot"))
        until(lambda: server.service.batcher.num_waiting == 1)
        response = httpx.post(f"{server.url}/reset", json={"session_id": "robot"})
        assert response.json() == {"dropped": 1}
        assert waiting.result(10).status_code == 409
        with open_websocket(server) as websocket:
            websocket.recv()
            websocket.send(pack({"endpoint": "reset", "session_id": "robot"}))
            assert unpack(websocket.recv(timeout=10)) == {"status": "reset successful", "dropped": 0}
        for body in (b"{", b"[]", b'{"session_id": 3}', b'{"session_id": ""}'):
            assert httpx.post(f"{server.url}/reset", content=body).status_code in (400, 422)
        stub.gate.set()
        assert first.result(10).status_code == 200


# Load


def test_clients_share_batches_and_get_their_own(stub):
    with running(stub, max_batch_size=8, batch_wait=0.5) as server:

        def ask(client: int) -> None:
            with httpx.Client(timeout=60) as http:
                for number in range(10 * client, 10 * client + 10):
                    response = http.post(f"{server.url}/act", content=dump_json(observation(number)), headers=JSON)
                    assert load_json(response.content)[0] == number

        first = occupy(server, stub)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask, client) for client in range(8)]
            until(lambda: server.service.batcher.num_waiting == 8)
            stub.gate.set()
            [future.result() for future in asking]
        assert first.result(10).status_code == 200
        metrics = httpx.get(f"{server.url}/metrics").text
    assert sum(map(len, stub.batches)) == 81
    assert len(stub.batches) < 40
    assert 'openvla_requests_total{outcome="ok",protocol="rest"} 81.0' in metrics
    assert f"openvla_batch_size_count {len(stub.batches)}.0" in metrics
    assert 'openvla_stage_seconds_count{stage="inference"} 81.0' in metrics
    assert "openvla_queue_length 0.0" in metrics


def test_too_many_are_told_to_come_later(stub):
    with running(stub, max_open=3) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = occupy(server, stub)
        waiting = [pool.submit(post, server, observation(number)) for number in (1, 2)]
        until(lambda: server.service.num_open == 3)
        refused = post(server, observation(3))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        with open_websocket(server) as websocket:
            websocket.recv()
            websocket.send(pack(observation(4)))
            assert "come back later" in websocket.recv(timeout=10)
            with pytest.raises(ConnectionClosed):
                websocket.recv(timeout=10)
            assert websocket.close_code == 1013
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        stub.gate.set()
        assert {future.result(10).status_code for future in (first, *waiting)} == {200}
        assert post(server, observation(5)).status_code == 200


def test_no_answer_in_time(stub):
    with running(stub, timeout=0.2) as server:
        first = occupy(server, stub)
        assert post(server, observation(1)).status_code == 504
        assert first.result(10).status_code == 504
        stub.gate.set()
        until(lambda: post(server, observation(2)).status_code == 200)
        assert ["go 1"] not in stub.batches


# Clients that behave badly


def raw(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def request_head(server, length: int | str, path: str = "/act") -> bytes:
    framing = f"Content-Length: {length}" if isinstance(length, int) else f"Transfer-Encoding: {length}"
    head = f"POST {path} HTTP/1.1\r\nHost: {server.address}\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
    return head.encode()


def test_large_bodies_are_not_kept(stub):
    """100 MB, told beforehand and in chunks: refused with a status that the client gets to read."""
    settings = Settings(max_body=2**20)
    chunk = b" " * 2**20
    with running(stub, settings) as server:
        for length, framed in ((100 * 2**20, chunk), ("chunked", b"100000\r\n" + chunk + b"\r\n")):
            with closing(raw(server)) as client:
                client.sendall(request_head(server, length))
                for _ in range(100):
                    client.sendall(framed)
                if length == "chunked":
                    client.sendall(b"0\r\n\r\n")
                assert client.recv(100).startswith(b"HTTP/1.1 413")
        form = httpx.post(f"{server.url}/act", files={"image": bytes(2 * 2**20)}, data={"instruction": "go"})
        assert form.status_code == 413
        assert httpx.post(f"{server.url}/reset", content=bytes(2 * 2**20)).status_code == 413
        assert post(server, observation()).status_code == 200


def test_many_bodies_at_once_are_not_kept(stub, monkeypatch):
    """Each within its limit, and together beyond that of all: the one too many is refused, the others go on."""
    monkeypatch.setattr(guard, "MAX_BODIES", 2)

    def status(client) -> bytes:
        try:
            client.sendall(b" ")
            return client.recv(12)[-3:]
        except OSError:  # closed before all of the body was read
            return b"429"

    with running(stub, Settings(max_body=2**20)) as server, ExitStack() as stack:
        clients = [stack.enter_context(closing(raw(server))) for _ in range(3)]
        for client in clients:
            with suppress(OSError):
                client.sendall(request_head(server, 2**20) + b" " * (2**20 - 1))
        assert sorted(map(status, clients)) == [b"400", b"400", b"429"]
        assert post(server, observation()).status_code == 200


def test_many_websockets_at_once_are_refused(stub, monkeypatch):
    monkeypatch.setattr(guard, "MAX_WEBSOCKETS", 1)
    with running(stub) as server:
        with open_websocket(server) as websocket:
            websocket.recv()
            with pytest.raises(InvalidStatus) as refusal:
                open_websocket(server)
            assert refusal.value.response.status_code == 429
        until(lambda: "openvla_websocket_connections 0.0" in httpx.get(f"{server.url}/metrics").text)
        with open_websocket(server) as websocket:
            assert unpack(websocket.recv())["policy"] == "stub"


def test_half_sent_bodies_keep_nobody_waiting(stub):
    with running(stub, Settings(body_timeout=0.5), max_open=2) as server:
        clients = [raw(server) for _ in range(20)]
        for client in clients:
            client.sendall(request_head(server, 1000) + b'{"image":')
        assert post(server, observation()).status_code == 200
        assert all(client.recv(100).startswith(b"HTTP/1.1 408") for client in clients)
        for client in clients:
            client.close()


def test_killed_clients_keep_nobody_waiting(stub):
    with running(stub, max_open=4) as server:
        first = occupy(server, stub)
        body = dump_json(observation(1)).encode()
        for _ in range(3):
            client = raw(server)
            client.sendall(request_head(server, len(body)) + body)
            until(lambda: server.service.num_open == 2)
            with open_websocket(server) as websocket:
                websocket.recv()
                websocket.send(pack(observation(2)))
                until(lambda: server.service.num_open == 3)
                client.close()
                websocket.socket.shutdown(socket.SHUT_RDWR)
                until(lambda: server.service.num_open == 1)
        half = raw(server)
        half.sendall(request_head(server, 1000) + b"{")
        half.close()
        stub.gate.set()
        assert first.result(10).status_code == 200
        assert post(server, observation(3)).status_code == 200
        assert stub.batches == [["go 100"], ["go 3"]]


@contextmanager
def slow_reader(server):
    """A client that asks for answers of a megabyte each, and never reads one."""
    with closing(raw(server)) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        key = base64.b64encode(bytes(16)).decode()
        client.sendall(
            f"GET / HTTP/1.1\r\nHost: {server.address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        assert client.recv(1000).startswith(b"HTTP/1.1 101")
        payload = pack(observation())
        frame = bytes([0x82, 0x80 | 126]) + len(payload).to_bytes(2, "big") + bytes(4) + payload  # masked with zeros
        client.settimeout(1.0)
        with suppress(OSError):  # the server stops reading, too, and then goes
            client.sendall(frame * 30)
        until(lambda: server.service.metrics.outcomes.get("ok", 0) > 2)
        yield


@pytest.fixture
def megabytes(stub, monkeypatch):
    monkeypatch.setattr(stub, "predict", lambda rows: [Prediction(np.zeros((20_000, 7))) for _ in rows])
    return stub


def test_slow_readers_are_left(megabytes, monkeypatch):
    """Once their answers find no room, and their connections with them."""
    monkeypatch.setattr(serving_server, "CLOSE_SECONDS", 0.2)
    with running(megabytes, Settings(send_timeout=0.3)) as server, slow_reader(server):
        until(lambda: "openvla_websocket_connections 0.0" in httpx.get(f"{server.url}/metrics").text)
        assert server.service.num_unsent == 0
        assert post(server, observation()).status_code == 200
        until(lambda: not any(each.transport.is_closing() for each in list(server.server.server_state.connections)))


def test_slow_readers_do_not_delay_the_end(megabytes, monkeypatch):
    monkeypatch.setattr(serving_server, "CLOSE_SECONDS", 0.2)
    with ExitStack() as stack:
        with running(megabytes, Settings(send_timeout=0.3)) as server:
            stack.enter_context(slow_reader(server))
            began = time.monotonic()
        assert time.monotonic() - began < 10  # within the 31 s that uvicorn would wait


def test_nonsense_in_place_of_http(stub):
    with running(stub) as server:
        for nonsense in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST /act HTTP/9.9\r\n\r\n", os.urandom(2000)):
            with closing(raw(server)) as client:
                client.sendall(nonsense + b"\r\n\r\n")
                client.recv(1000)
        assert post(server, observation()).status_code == 200


# Who may ask


def test_names_and_origins(stub):
    with running(stub) as server:
        status, headers = f"{server.url}/status", {"Host": "attacker.example"}
        assert httpx.get(status, headers=headers).status_code == 403
        assert httpx.get(status, headers={"Host": f"localhost:{server.port}"}).status_code == 200
        assert httpx.get(f"{server.url}/healthz", headers=headers).status_code == 200
        for origin in ("http://attacker.example", "null", f"http://localhost:{server.port}"):
            assert post(server, observation(), {**JSON, "Origin": origin}).status_code == 403
            with pytest.raises(InvalidStatus) as refusal:
                open_websocket(server, origin=origin)
            assert refusal.value.response.status_code == 403
        assert post(server, observation(), {**JSON, "Origin": server.url}).status_code == 200


def test_the_token_is_asked_for(stub):
    token = "correct horse"
    with running(stub, Settings(token=token)) as server:
        basic = base64.b64encode(f"robot:{token}".encode()).decode()
        wrong = [{}, {"Authorization": "Bearer"}, {"Authorization": "Bearer correct"}, {"Authorization": "Basic ?"}]
        ways = (("Bearer", token), ("Api-Key", token), ("Basic", basic))
        right = [{"Authorization": f"{kind} {value}"} for kind, value in ways]
        with httpx.Client(base_url=server.url) as http:
            for path in ("/", "/status", "/metrics", "/openapi.json", "/act", "/nowhere"):
                for headers in wrong:
                    response = http.get(path, headers=headers)
                    assert (response.status_code, response.headers["www-authenticate"][:5]) == (401, "Basic")
                assert all(http.get(path, headers=each).status_code != 401 for each in right)
        for path in ("/healthz", "/readyz"):
            assert httpx.get(f"{server.url}{path}").status_code == 200
        for headers in wrong:
            with pytest.raises(InvalidStatus) as refusal:
                open_websocket(server, additional_headers=headers)
            assert refusal.value.response.status_code == 401
        for headers in right:
            assert post(server, observation(), {**JSON, **headers, "Host": "robots.example"}).status_code == 200
            with open_websocket(server, additional_headers=headers) as websocket:
                assert unpack(websocket.recv())["policy"] == "stub"


def test_the_command_lets_nobody_in_by_mistake(monkeypatch, capsys):
    monkeypatch.delenv("OPENVLA_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        assert command.parse_arguments(["--policy", ".", "--host", host]).token is None
    for host in ("0.0.0.0", "::", "192.168.1.2", "robots.example"):
        with pytest.raises(SystemExit):
            command.parse_arguments(["--policy", ".", "--host", host])
        assert "--token" in capsys.readouterr().err
        assert command.parse_arguments(["--policy", ".", "--host", host, "--token", "t"]).token == "t"
    for token in ("", " x", "é"):
        with pytest.raises(SystemExit):
            command.parse_arguments(["--policy", ".", "--token", token])
    monkeypatch.setenv("OPENVLA_TOKEN", "from the environment")
    assert command.parse_arguments(["--policy", ".", "--host", "0.0.0.0"]).token == "from the environment"


def test_the_command_prepares_for_batches_that_there_are(capsys):
    assert command.parse_arguments(["--policy", ".", "--warm_up", "1", "8"]).warm_up == [1, 8]
    assert command.parse_arguments(["--policy", "."]).warm_up == []
    for sizes in (["0"], ["1", "9"]):
        with pytest.raises(SystemExit):
            command.parse_arguments(["--policy", ".", "--warm_up", *sizes])
        assert "batches have 1 to --max_batch_size (8) rows" in capsys.readouterr().err


# Stopping


def test_shutdown_finishes_what_runs(stub):
    """A request, a frame and one that waits are answered; who comes meanwhile is sent elsewhere."""
    with running(stub) as server, concurrent.futures.ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        first = occupy(server, stub)
        waiting = pool.submit(post, server, observation(1))
        websocket, idle = (stack.enter_context(open_websocket(server)) for _ in range(2))
        assert websocket.recv() == idle.recv()
        websocket.send(pack(observation(2)))
        until(lambda: server.service.num_open == 3)
        server.server.should_exit = True
        until(lambda: server.service.is_draining)
        assert post(server, observation(3)).status_code == 503
        assert httpx.get(f"{server.url}/readyz").status_code == 503
        stub.gate.set()
        assert {future.result(10).status_code for future in (first, waiting)} == {200}
        assert unpack(websocket.recv(timeout=10))["actions"][0, 0] == 2
        for each in (websocket, idle):
            with pytest.raises(ConnectionClosed):
                each.recv(timeout=10)
            assert each.close_code == 1012


def test_a_second_interrupt_ends_it_at_once(stub):
    with running(stub) as server:
        occupy(server, stub)
        server.server.should_exit = True
        until(lambda: server.service.is_draining)
        server.server.force_exit = True
        until(lambda: not server.server.servers[0].is_serving())


@pytest.mark.slow
def test_the_command(tmp_path):
    """As users start it, and as a supervisor stops it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ("--policy", TINY_POLICY, "--port", port, "--dtype", "float32")
    process = subprocess.Popen(
        [sys.executable, "-m", "serving", *map(str, arguments)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    try:
        until_ready(f"http://127.0.0.1:{port}/readyz")
        response = httpx.post(
            f"http://127.0.0.1:{port}/act", content=dump_json(observation()), headers=JSON, timeout=20
        )
        assert load_json(response.content).shape == (7,)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def until_ready(address: str) -> None:
    deadline = time.monotonic() + 180
    with httpx.Client() as http:
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if http.get(address).status_code == 200:
                    return
            time.sleep(0.25)
    raise AssertionError("The server does not come up.")


@pytest.mark.slow
def test_a_thousand_actions(tiny, server):
    """Over each protocol, from four clients at once, every action is `predict_action`'s."""
    shown = pictures(20)
    wanted = [expected(tiny, picture, "pick up the red cube") for picture in shown]

    def over_rest(client: int) -> None:
        with httpx.Client(timeout=60) as http:
            for number in range(125):
                index = (client + number) % 20
                request = {"image": shown[index], "instruction": "pick up the red cube"}
                response = http.post(f"{server.url}/act", content=dump_json(request), headers=JSON)
                np.testing.assert_array_equal(load_json(response.content), wanted[index])

    def over_websocket(client: int) -> None:
        with open_websocket(server) as websocket:
            websocket.recv()
            for number in range(125):
                index = (client + number) % 20
                websocket.send(pack({"observation/image": shown[index], "prompt": "pick up the red cube"}))
                np.testing.assert_array_equal(unpack(websocket.recv())["actions"][0], wanted[index])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(ask, client) for client in range(4) for ask in (over_rest, over_websocket)]
        [future.result() for future in futures]


def test_status(server):
    post(server, observation())
    status = httpx.get(f"{server.url}/status").json()
    assert status["policy"]["action_dims"] == {"tabletop": 7}
    assert status["dimensions"]["tabletop"][-1] == "gripper"
    assert status["recent"][-1]["total"] >= status["recent"][-1]["inference"]


def test_warm_up_takes_its_time(tiny):
    """The first action of a large policy may take longer than any other, and is nobody's."""
    with running(tiny, timeout=1e-6) as server:
        asyncio.run(server.service.warm_up())
        assert server.service.metrics.outcomes == {}
        assert server.service.metrics.render().count(b"openvla_batch_size_count 1.0") == 1


def test_warm_up_prepares_the_model(tiny, monkeypatch):
    prepared = []
    monkeypatch.setattr(tiny.model, "warm_up", prepared.append)
    with running(tiny) as server:
        asyncio.run(server.service.warm_up())
        assert prepared == []
        asyncio.run(server.service.warm_up([1, 4]))
    assert prepared == [[1, 4]]


def test_the_command_prepares_the_model_before_it_serves():
    class Recorder:
        def __init__(self):
            self.calls = []

        async def warm_up(self, batch_sizes):
            self.calls.append(batch_sizes)

        async def serve(self):
            self.calls.append("served")

    recorder = Recorder()
    asyncio.run(command.serve(recorder, recorder, [1, 8]))
    assert recorder.calls == [[1, 8], "served"]
