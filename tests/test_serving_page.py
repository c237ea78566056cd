"""The status page in a real browser, driven over its debugging protocol; skipped where there is no Chromium."""

import itertools
import json
import shutil
import subprocess
import time
from base64 import b64decode

import httpx
import numpy as np
import pytest
import torch
from conftest import TINY_POLICY
from load_policy import load_policy
from PIL import Image
from policy_server import running
from websockets.sync.client import connect

from serving.app import PAGE, Settings
from serving.engine import Policy


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


class Browser:
    """One tab. `log` has what the page logged, and each request that it made."""

    def __init__(self, websocket):
        self._websocket, self._numbers = websocket, itertools.count(1)
        self.log, self.requests = [], []
        for domain in ("Runtime", "Log", "Network", "Page", "DOM"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        number = next(self._numbers)
        self._websocket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._websocket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.log.append(message["params"])
            if message.get("method") == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])

    def evaluate(self, script: str):
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        deadline = time.monotonic() + 20
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, (condition, self.log)
            time.sleep(0.05)

    def choose_file(self, selector: str, path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BROWSER is None:
        pytest.skip(f"There is none of {BROWSERS}.")
    profile = tmp_path_factory.mktemp("profile")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
    flags += ("--remote-debugging-port=0", f"--user-data-dir={profile}", "--window-size=1100,900", "about:blank")
    process = subprocess.Popen([BROWSER, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (found.exists() and found.read_text().count("\n")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        pages = httpx.get(f"http://127.0.0.1:{found.read_text().splitlines()[0]}/json").json()
        address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
        with connect(address, max_size=None, compression=None) as websocket:
            yield Browser(websocket)
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def tiny():
    return Policy(*load_policy(TINY_POLICY, dtype=torch.float32), "tiny")


def test_the_page_needs_nothing_else():
    text = PAGE.read_text(encoding="utf-8")
    assert "://" not in text
    assert "innerHTML" not in text  # names of policies and datasets stay text


def test_a_picture_becomes_an_action(browser, tiny, camera_image, tmp_path):
    path = tmp_path / "picture.png"
    camera_image.save(path)
    inputs = tiny.processor(instruction="pick up the red cube", images=camera_image)
    expected = tiny.model.predict_action(**inputs, return_dict=True)
    with running(tiny) as server:
        browser.call("Page.navigate", url=server.url)
        browser.until("document.querySelector('[name=image]') !== null")
        assert "tabletop (7 numbers)" in browser.evaluate("document.getElementById('policy').textContent")
        browser.choose_file("[name=image]", path)
        browser.evaluate("document.querySelector('[name=instruction]').value = 'pick up the red cube'; true")
        browser.evaluate("document.querySelector('button').click(); true")
        browser.until("!document.getElementById('action').hidden")
        browser.until("document.getElementById('message').textContent.includes('ms')")
        rows = browser.evaluate(
            "[...document.querySelectorAll('#action tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
        )
        assert [row[0] for row in rows] == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
        np.testing.assert_allclose([float(row[1]) for row in rows], expected.actions, atol=5e-5)
        np.testing.assert_allclose([float(row[2]) for row in rows], expected.entropy[0], atol=5e-3)
        assert "of 5.55 nats" in browser.evaluate("document.getElementById('sure-head').textContent")
        size = browser.evaluate("[document.getElementById('canvas').width, document.getElementById('canvas').height]")
        assert size == [640, 480]  # the picture's 4:3
        browser.until("document.getElementById('summary').textContent.startsWith('The last 1:')")
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        assert not browser.log
        assert all(url.startswith((f"{server.url}/", "blob:", "data:")) for url in browser.requests if url)


def test_errors_are_shown_as_text(browser, tiny, tmp_path):
    path = tmp_path / "small.png"
    Image.new("RGB", (4, 4)).save(path)
    with running(tiny) as server:
        browser.call("Page.navigate", url=server.url)
        browser.until("document.querySelector('[name=image]') !== null")
        browser.choose_file("[name=image]", path)
        browser.evaluate("document.querySelector('[name=instruction]').value = '<b>go</b>'; true")
        browser.evaluate("document.querySelector('button').click(); true")
        browser.until("document.getElementById('message').className === 'error'")
        assert "sides" in browser.evaluate("document.getElementById('message').textContent")
        assert browser.evaluate("document.getElementById('action').hidden")


def test_a_token_is_asked_for(browser, tiny):
    with running(tiny, Settings(token="secret")) as server:
        assert httpx.get(server.url).headers["www-authenticate"].startswith("Basic")
        address = server.url.replace("://", "://robot:secret@")
        browser.call("Page.navigate", url=address)
        browser.until("document.querySelector('[name=image]') !== null")
