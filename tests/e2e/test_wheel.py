"""The built wheel in an environment of its own: the command, a plug-in, a method of a file, and the Python API."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.command import ROOT
from tests.support.patience import patience
from tests.support.plugin import MEAN_METHOD

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLUG_IN = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "other-methods"
version = "1.0"
[project.entry-points."farebox.methods"]
mean = "other_methods.mean"
"""
SCRIPT = """
import json, sys
import farebox, methods, pipeline
assert all("site-packages" in str(module.__file__) for module in (farebox, methods, pipeline))
overrides = ["model=fake", "datasets=[icons]", "eval_shift=false", "shots=1", "seeds=1", "views=1", "storage=one"]
(row,) = farebox.run_trial(f"methods=[{sys.argv[1]}]", *overrides, echo=lambda line: None)
assert "ray" not in sys.modules and "mlflow" not in sys.modules
outcome = farebox.run("methods=[feature_mean,zero_shot]", *overrides[:-1], "storage=two", echo=lambda line: None)
assert outcome.problems == (), outcome.problems
page = open("two/leaderboard/leaderboard.html").read()
assert "<script>" in page and ":root {" in page  # page.js and page.css are in the wheel
results, board = farebox.load_results("two"), farebox.leaderboard("two")
print(json.dumps({
    "alone": [row.method, row.accuracy],
    "results": results[["method", "accuracy", "left_out"]].values.tolist(),
    "board": sorted(board["method"]),
}))
"""


def run(command: list[str | Path], folder: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=patience())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and a plug-in; dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    plug_in = folder / "plug_in" / "other_methods"
    plug_in.mkdir(parents=True)
    (plug_in.parent / "pyproject.toml").write_text(PLUG_IN)
    (plug_in / "__init__.py").write_text("")
    renamed = MEAN_METHOD.replace("feature_mean", "installed_mean").replace("FeatureMean", "InstalledMean")
    (plug_in / "mean.py").write_text(renamed)
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".git", ".venv", "runs", "build", "dist", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "wheels", source, plug_in.parent], folder)
    run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], folder)
    python = folder / "env" / "bin" / "python"
    wheels = sorted((folder / "wheels").glob("*.whl"))
    assert len(wheels) == 2
    run([*pip, "--python", python, "install", "--no-deps", "--no-index", *wheels], folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def test_the_command_lists_what_is_installed(environment: Path) -> None:
    listed = json.loads(run([environment / "env/bin/farebox", "methods", "--json"], environment))
    assert {"craft", "taskres", "installed_mean"} <= {record["method"] for record in listed}
    assert "icons" in run([environment / "env/bin/farebox", "datasets"], environment)


def test_a_plug_in_and_a_file_run_and_their_rows_are_read_from_python(environment: Path) -> None:
    (environment / "mean.py").write_text(MEAN_METHOD)
    script = SCRIPT.replace('"methods=[feature_mean,', '"methods=[mean.py,installed_mean,')
    out = json.loads(run([environment / "env/bin/python", "-c", script, "mean.py"], environment).splitlines()[-1])
    assert out["alone"][0] == "feature_mean"
    accuracies = {method: accuracy for method, accuracy, left_out in out["results"] if not left_out}
    assert accuracies["feature_mean"] == accuracies["installed_mean"] == out["alone"][1]
    assert set(out["board"]) == {"feature_mean", "installed_mean", "zero_shot"} == set(accuracies)
