"""The built wheel in an environment of its own: a sweep on image files, a plug-in, a method of a file, the Python API.

The command is typed inside a clone with other code: it uses the installed code, listens on loopback only, and leaves no
secret.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.results.store import ResultStore
from tests.support import miniature
from tests.support.command import ROOT, below, processes
from tests.support.lab import Lab, outcome
from tests.support.patience import patience
from tests.support.plugin import MEAN_METHOD

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as /proc/net/tcp and tcp6 write them."""
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
words, said = sys.argv[1:], []
(row,) = farebox.run_trial(*words, "methods=[mean.py]", "storage=one", echo=lambda line: None)
assert "ray" not in sys.modules and "mlflow" not in sys.modules
outcome = farebox.run(*words, "mlflow=sqlite:///m.db", echo=said.append)
assert (outcome.ran, outcome.kept, outcome.problems) == (0, 4, ()), outcome
results, board = farebox.load_results("sweep"), farebox.leaderboard("sweep")
print(json.dumps({
    "alone": [row.method, row.accuracy],
    "said": said,
    "results": results[["method", "accuracy", "left_out"]].values.tolist(),
    "board": sorted(board["method"]),
}))
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's sessions with a short path: the paths of sockets are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        yield Path(folder)


def environ(**more: str) -> dict[str, str]:
    """Variables of this process without those that show Python other code than the installed."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")} | more


def run(command: list[str | Path], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=environ(), capture_output=True, text=True, timeout=patience())
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def another_clone(folder: Path) -> Path:
    """Copy both packages, with a method that answers the opposite, beside a module that breaks the standard library."""
    for package in ("methods", "pipeline"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "embedded"))
    method = folder / "methods/zero_shot.py"
    changed = method.read_text().replace("return box.scores(", "return -box.scores(")
    assert changed != method.read_text()
    method.write_text(changed)
    (folder / "uuid.py").write_text("raise ImportError('this is not the standard library')\n")
    return folder


def listening(pids: list[int]) -> set[str]:
    """Addresses on which these processes listen, in hexadecimal."""
    sockets = set[str]()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(str(handle.readlink()))
            except OSError:  # it was closed meanwhile
                continue
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in sockets}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a virtual environment with the wheel and a plug-in; its dependencies are those of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    plug_in = folder / "plug_in" / "other_methods"
    plug_in.mkdir(parents=True)
    (plug_in.parent / "pyproject.toml").write_text(PLUG_IN)
    (plug_in / "__init__.py").write_text("")
    renamed = MEAN_METHOD.replace("feature_mean", "installed_mean").replace("FeatureMean", "InstalledMean")
    (plug_in / "mean.py").write_text(renamed)
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", ".git", ".venv*", "runs", "build", "dist", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder / "wheels", source, plug_in.parent], folder)
    run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], folder)
    python = folder / "env" / "bin" / "python"
    wheels = sorted((folder / "wheels").glob("*.whl"))
    assert len(wheels) == 2
    run([*pip, "--python", python, "install", "--no-deps", "--no-index", *wheels], folder)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def test_the_command_lists_what_is_installed(environment: Path, tmp_path: Path) -> None:
    listed = json.loads(run([environment / "farebox", "methods", "--json"], tmp_path))
    assert {"craft", "taskres", "installed_mean"} <= {record["method"] for record in listed}
    assert "icons" in run([environment / "farebox", "datasets"], tmp_path)


def test_a_sweep_inside_another_clone_uses_the_installed_code_with_a_plug_in_and_a_file(
    environment: Path, lab: Lab, tmp_path: Path, ray_folder: Path
) -> None:
    clone = another_clone(tmp_path / "clone")
    (clone / "mean.py").write_text(MEAN_METHOD)
    miniature.make(tmp_path / "data", "dtd")
    card = miniature.card(tmp_path / "data", "dtd", tmp_path / "dtd.yaml")
    data = (f"datasets=[{card}]", f"data.root={tmp_path}/data", "shots=2")
    storage, secret = clone / "sweep", "hunter2"
    words = [*lab.words[2:], "sweep=smoke", *data, "storage=sweep", "replicas=1", "concurrency=1"]
    words += ["methods=[zero_shot,taskres,mean.py,installed_mean]"]
    env = environ(FAREBOX_MLFLOW=f"http://me:{secret}@127.0.0.1:9", RAY_TMPDIR=str(ray_folder))
    sweep = subprocess.Popen(
        [environment / "farebox", "run", *words, "mlflow=${oc.env:FAREBOX_MLFLOW}"],
        cwd=clone,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    addresses, titles, until = set[str](), set[str](), time.monotonic() + patience()
    while sweep.poll() is None and time.monotonic() < until:
        pids, table = below({sweep.pid}), processes()
        addresses |= listening([sweep.pid, *pids])
        titles |= {table[pid][1] for pid in pids if pid in table}
        time.sleep(0.5)
    said, _ = sweep.communicate(timeout=patience())
    assert sweep.returncode == 0, said

    for spec in lab.plan(*data, "methods=[zero_shot,taskres]").trials:
        (row,) = ResultStore(storage).rows_of(spec.trial_id)
        assert row.n_test == 4
        assert outcome(row) == outcome(lab.run(spec)[0]) | {"sweep": row.sweep}
    assert any(title.startswith("ray::Replica") for title in titles), "it was seen while it ran"
    assert addresses and addresses <= LOOPBACK
    assert "not mirrored to MLflow" in said and secret not in said
    assert not [title for title in titles if secret in title]
    files = [path for path in storage.rglob("*") if path.is_file()]
    assert files and not [path for path in files if secret.encode() in path.read_bytes()]
    assert not list(ray_folder.rglob("session_*"))
    page = (storage / "leaderboard" / "leaderboard.html").read_text()
    assert "<script>" in page and ":root {" in page  # page.js and page.css are in the wheel

    out = json.loads(run([environment / "python", "-P", "-c", SCRIPT, *words], clone).splitlines()[-1])
    assert "nothing to run: all 4 trials of this sweep are done" in "\n".join(out["said"])
    assert out["alone"][0] == "feature_mean"
    accuracies = {method: accuracy for method, accuracy, left_out in out["results"] if not left_out}
    assert accuracies["feature_mean"] == accuracies["installed_mean"] == out["alone"][1]
    assert set(out["board"]) == {"feature_mean", "installed_mean", "taskres", "zero_shot"} == set(accuracies)
