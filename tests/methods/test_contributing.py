"""The recipe in CONTRIBUTING.md is the whole of what it takes: its very file, dropped in, is listed, proved and run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.patience import patience

ROOT = Path(__file__).resolve().parents[2]


def recipe() -> str:
    """The one Python block of CONTRIBUTING.md."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    for part in ("methods", "pipeline", "conf", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "methods" / "nearest_mean.py").write_text(recipe())
    return folder


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=patience()
    )


def test_the_recipe_has_forty_lines_of_code() -> None:
    assert sum(bool(line.strip()) for line in recipe().splitlines()) <= 40


def test_the_dropped_in_method_is_listed(copy: Path) -> None:
    listed = python(copy, "pipeline.cli", "methods", "--json")
    assert listed.returncode == 0, listed.stderr
    assert {"nearest_mean"} <= {record["method"] for record in json.loads(listed.stdout)}


def test_the_dropped_in_method_passes_the_contract(copy: Path) -> None:
    proved = python(
        copy, "pytest", "-q", "tests/methods/test_contracts.py", "-k", "nearest_mean", "-p", "no:cacheprovider"
    )
    assert proved.returncode == 0, proved.stdout
    assert " passed" in proved.stdout and "failed" not in proved.stdout


@pytest.mark.ray
def test_the_dropped_in_method_runs(copy: Path, tmp_path: Path) -> None:
    words = ("sweep=smoke", "model=tiny", "methods=[nearest_mean]", "seeds=[1]", f"storage={tmp_path / 'runs'}")
    ran = python(copy, "pipeline.cli", "run", *words)
    assert ran.returncode == 0, ran.stderr
    board = python(copy, "pipeline.cli", "leaderboard", "--raw", "--format", "json", *words)
    (record,) = json.loads(board.stdout)
    assert record["method"] == "nearest_mean" and record["status"] == "done"
    assert record["accuracy"] > 100 / 10  # better than chance on the ten digits
