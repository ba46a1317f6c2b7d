"""A headless Chromium, driven through chromedriver's WebDriver protocol with the standard library alone."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.patience import SCALE


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def request(url: str, body: Any = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(call, timeout=120 * SCALE) as answer:
        return json.loads(answer.read() or b"null")


def wait_for(condition: Any, what: str, seconds: float = 60) -> Any:
    end = time.monotonic() + seconds * SCALE
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except (OSError, urllib.error.HTTPError):  # not served yet, or an element that was drawn again
            pass
        time.sleep(0.3)
    raise AssertionError(f"not seen in time: {what}")


class Browser:
    """One window."""

    def __init__(self, session: str) -> None:
        self.session = session

    def open(self, url: str) -> None:
        request(f"{self.session}/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        return request(f"{self.session}/execute/sync", {"script": script, "args": arguments})["value"]

    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def see(self, text: str, seconds: float = 60) -> None:
        """Wait until the page shows a text."""
        try:
            wait_for(lambda: text in self.text(), text, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; the page shows: {self.text()[:3000]}") from None

    def click(self, text: str) -> None:
        """Click on the first visible link whose text contains `text`, once it is there; stay in this tab."""
        script = (
            "const found = [...document.querySelectorAll('a')].find("
            "a => a.textContent.includes(arguments[0]) && a.getClientRects().length);"
            "if (found) { found.removeAttribute('target'); found.click(); } return Boolean(found)"
        )
        try:
            wait_for(lambda: self.run(script, text), f"a link {text!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the page shows: {self.text()[:3000]}") from None

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(request(f"{self.session}/screenshot")["value"]))


@contextmanager
def browser(width: int = 1500, height: int = 950) -> Iterator[Browser]:
    """Open a window; both programs end with the block."""
    port = free_port()
    driver = subprocess.Popen(
        [str(shutil.which("chromedriver")), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    root = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: request(f"{root}/status")["value"]["ready"], "chromedriver")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options = {"args": [*flags, f"--window-size={width},{height}"]}
        wanted = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        session = f"{root}/session/{request(f'{root}/session', wanted)['value']['sessionId']}"
        try:
            yield Browser(session)
        finally:
            request(session, method="DELETE")
    finally:
        driver.terminate()
        driver.wait(timeout=30)
