"""The examples of docs/notebook.md run in order, and print what the page shows.

Their sweep runs without Ray; tests/e2e/test_installed.py calls `farebox.run` after a run with it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT
from tests.support.patience import patience

RUNNER = """
import contextlib, io, json, os, sys
from tests.support.without_ray import without_ray
outputs, names = [], {"__name__": "__main__"}
for block in json.load(open("blocks.json")):
    text = io.StringIO()
    if block.startswith("# mine.py"):
        open("mine.py", "w").write(block)
    else:
        with contextlib.redirect_stdout(text), without_ray():
            exec(compile(block, "docs/notebook.md", "exec"), names)
    outputs.append(text.getvalue())
json.dump(outputs, open("outputs.json", "w"))
"""


def blocks(kind: str) -> list[str]:
    """The fenced blocks of the page with this language."""
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "docs/notebook.md").read_text(), re.DOTALL)


def shape(text: str) -> str:
    """Text with every number replaced by # and single spaces: accuracies may differ by CPU."""
    return " ".join(re.sub(r"-?\d[\d,]*(\.\d+)?|\bNaN\b", "#", text).split())


@pytest.mark.slow
def test_the_examples_of_the_notebook_page_run_and_print_what_it_shows(tmp_path: Path) -> None:
    (tmp_path / "blocks.json").write_text(json.dumps(blocks("python")))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONBREAKPOINT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=patience()
    )
    assert done.returncode == 0, done.stderr
    printed = [text for text in json.loads((tmp_path / "outputs.json").read_text()) if text]
    assert [shape(text) for text in printed] == [shape(text) for text in blocks("text")]
