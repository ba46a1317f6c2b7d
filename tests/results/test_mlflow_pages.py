"""What a person sees in MLflow's pages, in a headless Chromium: from the landing page to the comparison of methods."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.cli import main
from pipeline.results.report import write_report
from tests.support.command import free_port
from tests.support.patience import patience
from tests.support.synthetic import report_of, write_store
from tools.browser import Browser

pytestmark = pytest.mark.browser
SCREENSHOTS = os.environ.get("FAREBOX_SCREENSHOTS")
"""Folder for screenshots; docs/img has those of a demo, made with FAREBOX_SCREENSHOTS_OF=runs/demo as well."""


class Served(NamedTuple):
    root: str
    methods: str
    trials: str


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    """Wait until it is true; it may fail while a page is not served yet or another is being loaded."""
    end = time.monotonic() + patience(seconds)
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (OSError, RuntimeError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"not seen in time: {what}")


class Window(Browser):
    """A window on MLflow's pages, which draw themselves after they are loaded."""

    def text(self) -> str:
        return str(self.run("document.body.innerText"))

    def see(self, text: str) -> None:
        """Wait until the page shows a text."""
        try:
            wait_for(lambda: text in self.text(), text)
        except AssertionError as error:
            raise AssertionError(f"{error}; the page shows: {self.text()[:3000]}") from None

    def click(self, text: str) -> None:
        """Follow the first visible link whose text contains `text`, once it is there; stay in this tab.

        The link is clicked again while nothing happens: MLflow draws its links before they react.
        """
        script = (
            "(() => { const found = [...document.querySelectorAll('a')].find("
            f"a => a.textContent.includes({json.dumps(text)}) && a.getClientRects().length);"
            "if (found) { found.removeAttribute('target'); found.click(); } return Boolean(found) })()"
        )
        before = self.run("location.href")

        def followed() -> bool:
            clicked = self.run(script)
            time.sleep(1)
            return bool(clicked) and self.run("location.href") != before

        try:
            wait_for(followed, f"a link {text!r} that leads to a page")
        except AssertionError as error:
            raise AssertionError(f"{error}; the page shows: {self.text()[:3000]}") from None


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get("FAREBOX_SCREENSHOTS_OF"):
        return Path(named)
    storage = tmp_path_factory.mktemp("pages") / "demo"
    store = write_store(storage, shots=(4, 16), seeds=(1, 2), budgets=((8000, None),))
    (storage / "storage_id").write_text('{"id": "abc"}\n')
    write_report(report_of(store.read(), store.read_predictions), storage)
    assert main(["sync", f"storage={storage}"]) == 0
    return storage


@pytest.fixture(scope="module")
def served(storage: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The pages, served by `farebox ui`, whose output is a file: no browser opens."""
    port, said = free_port(), tmp_path_factory.mktemp("served") / "said.txt"
    command = [sys.executable, "-m", "pipeline.cli", "ui", f"storage={storage}", "--port", str(port)]
    with said.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        root = f"http://127.0.0.1:{port}"
        wait_for(lambda: urllib.request.urlopen(f"{root}/health", timeout=5).status == 200, "the server", patience())
        methods, trials = re.findall(r"http://\S+", said.read_text())[:2]
        yield Served(root, methods, trials)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(timeout=patience(60))


@pytest.fixture
def page() -> Iterator[Window]:
    with Window() as page:
        page.look(1500, 950)
        yield page


def shoot(page: Window, name: str) -> None:
    if SCREENSHOTS:
        page.run("document.querySelectorAll('button[aria-label=\"Close\"]').forEach(button => button.click())")
        time.sleep(3)  # the charts are drawn again
        page.picture(Path(SCREENSHOTS) / f"mlflow_{name}.png")


def test_the_methods_are_compared_two_clicks_after_the_landing_page(served: Served, page: Window) -> None:
    page.open(f"{served.root}/")
    page.click("farebox/")
    page.click("compare the methods")
    page.see("Group by: method")
    for chart in ("requests vs. accuracy", "images vs. accuracy"):
        page.see(chart)
    charts = "document.querySelectorAll('.js-plotly-plot').length >= 3"
    wait_for(lambda: page.run(charts), "three charts")
    page.see("craft")
    shoot(page, "methods")


def test_the_printed_address_shows_the_trials_with_their_columns(served: Served, page: Window) -> None:
    page.open(served.trials)
    page.see("matching runs")
    for column in ("accuracy", "images", "requests", "dataset", "method"):
        page.see(column)
    assert "Traces 0" not in page.text()
    shoot(page, "trials")
    page.click("-s1-")
    page.see("Status: done.")
    page.see("split")
    page.see("trial/model")
    shoot(page, "run")
