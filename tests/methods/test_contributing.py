"""The method in CONTRIBUTING.md, saved as a file of `methods/`, is listed, passes the contract tests and runs."""

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
    for file in ("pyproject.toml", "farebox.py"):
        shutil.copy(ROOT / file, folder)
    (folder / "methods" / "nearest_mean.py").write_text(recipe())
    return folder


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=patience()
    )


def test_the_recipe_has_forty_lines_of_code() -> None:
    assert sum(bool(line.strip()) for line in recipe().splitlines()) <= 40


def test_the_saved_method_passes_the_contract_tests(copy: Path) -> None:
    tested = python(
        copy, "-m", "pytest", "-q", "tests/methods/test_contracts.py", "-k", "nearest_mean", "-p", "no:cacheprovider"
    )
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout and "failed" not in tested.stdout


RUN = """
import sys
import farebox
from pipeline import cli
cli.main(["methods", "--json"])
overrides = ("sweep=smoke", "model=fake", "methods=[nearest_mean]", "datasets=[digits]", "eval_shift=false")
(row,) = farebox.run_trial(*overrides, "shots=[4]", "seeds=[1]", f"storage={sys.argv[1]}", echo=lambda line: None)
print(row.method, row.status, row.accuracy)
"""


def test_the_saved_method_is_listed_and_runs(copy: Path, tmp_path: Path) -> None:
    ran = python(copy, "-c", RUN, str(tmp_path / "runs"))
    assert ran.returncode == 0, ran.stderr
    listed, _, outcome = ran.stdout.strip().rpartition("\n")
    assert "nearest_mean" in {record["method"] for record in json.loads(listed)}
    method, status, accuracy = outcome.split()
    assert (method, status) == ("nearest_mean", "done")
    assert float(accuracy) > 100 / 10  # better than chance on the ten digits
