"""A sweep on image files, typed inside another clone: it uses the installed code, listens on loopback only, and leaves
no secret."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.results.store import ResultStore
from tests.support import miniature
from tests.support.command import ROOT, below, here, processes
from tests.support.lab import Lab, outcome
from tests.support.patience import patience

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as /proc/net/tcp and tcp6 write them."""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's sessions with a short path: the paths of sockets are limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        yield Path(folder)


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


def test_a_sweep_on_image_files_in_the_folder_of_another_clone_uses_the_installed_code(
    lab: Lab, tmp_path: Path, ray_folder: Path
) -> None:
    clone = another_clone(tmp_path / "clone")
    miniature.make(tmp_path / "data", "dtd")
    card = miniature.card(tmp_path / "data", "dtd", tmp_path / "dtd.yaml")
    data = (f"datasets=[{card}]", f"data.root={tmp_path}/data", "shots=2", "methods=[zero_shot,taskres]")
    storage, secret = tmp_path / "sweep", "hunter2"
    words = [*lab.words[2:], "sweep=smoke", *data, f"storage={storage}", "replicas=1", "concurrency=1"]
    env = os.environ | {"FAREBOX_MLFLOW": f"http://me:{secret}@127.0.0.1:9", "RAY_TMPDIR": str(ray_folder)}
    run = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipeline.cli", "run", *words, "mlflow=${oc.env:FAREBOX_MLFLOW}"],
        cwd=clone,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    addresses, titles, until = set[str](), set[str](), time.monotonic() + patience()
    while run.poll() is None and time.monotonic() < until:
        pids, table = below({run.pid}), processes()
        addresses |= listening([run.pid, *pids])
        titles |= {table[pid][1] for pid in pids if pid in table}
        time.sleep(0.2)
    said, _ = run.communicate(timeout=patience())
    assert run.returncode == 0, said

    assert "nothing to run: all 2 trials of this sweep are done" in here(
        "run", *words, f"mlflow=sqlite:///{tmp_path}/m"
    )
    for spec in lab.plan(*data).trials:
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
