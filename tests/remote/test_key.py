"""The key of a remote model is in nothing that a run on Ray prints, writes, stores or shows in a process title."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipeline.results.store import ResultStore
from tests.support.command import ROOT, here, processes
from tests.support.patience import patience
from tests.support.peer import KEY, peer, write_peer_card

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_key_is_only_in_the_header_that_the_server_gets(tmp_path: Path, card: Path) -> None:
    """A trial fails with a message of the server that repeats the key, and another one is done."""
    state, storage = tmp_path / "state.txt", tmp_path / "sweep"
    with peer() as served, tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        served.expects_key = served.repeats_key = True
        served.faults.extend(["fine", "fine", 503, 503])
        own = {"retry": {"first_s": 0.01, "most_s": 0.02, "tries": 2}, "rate": {"at_once": 1}}
        api = write_peer_card(tmp_path, served.url, auth={"env": "PEER_KEY"}, **own)
        words = ["sweep=smoke", f"datasets=[{card}]", "methods=[zero_shot,score_ridge]", "shots=1", "seeds=1"]
        words += [f"model={api}", f"storage={storage}", "concurrency=1", "eval_shift=false"]
        run = subprocess.Popen(
            [sys.executable, "-m", "tests.remote.ray_state", state, "run", *words],
            cwd=ROOT,
            env=os.environ | {"PEER_KEY": KEY, "RAY_TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        titles, logs, until = set[str](), dict[Path, bytes](), time.monotonic() + patience()
        while run.poll() is None and time.monotonic() < until:
            titles |= {title for _, title in processes().values()}
            for path in Path(folder).rglob("*"):
                with contextlib.suppress(OSError):  # it was removed meanwhile
                    if path.is_file() and not path.is_symlink():
                        logs[path] = path.read_bytes()
            time.sleep(1.0)
        said = run.communicate(timeout=patience())[0]
    assert run.returncode == 3, said
    rows = ResultStore(storage).read().to_pylist()
    assert sorted(row["status"] for row in rows) == ["done", "failed"]
    assert "Bearer ***" in next(row["error"] for row in rows if row["status"] == "failed")
    assert all(call["headers"]["Authorization"] == f"Bearer {KEY}" for call in served.calls)

    shown = [here(verb, f"storage={storage}", "--json") for verb in ("status", "ledger")]
    texts = [said, *shown, *titles, *(log.decode(errors="replace") for log in logs.values())]
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [text[:200] for text in texts if KEY in text]
    assert not [path for path, content in files.items() if KEY.encode() in content]
    assert any("ray::Replica" in title for title in titles), "the run was seen"
    assert any("worker" in path.name for path in logs) and any(path.name == "mlflow.db" for path in files)
    assert state in files and b"Replica" in files[state], "Ray's state was seen"
