"""A sweep against `farebox serve`: numbers of a local run, faults, an interrupt on Ray, a repetition for nothing.

The key of the service is in nothing that the run on Ray prints, writes, stores or shows in a process title.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.serve import TOKEN
from pipeline.remote.call_log import total_of
from pipeline.results.store import ResultStore
from tests.support.command import Running, here, processes
from tests.support.lab import run_here, small_data
from tests.support.service import call, serving
from tests.support.without_ray import without_ray

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KEY = "token-of-a-test-5f2c"
SWEEP = ("sweep=smoke", "views=2", "shots=4", "seeds=[1,2]", "methods=[zero_shot,logit_head,gda,score_ridge]")
FAULTS = ("fault.every_429=6", "fault.drop_every=9", "fault.truncate_every=11", "fault.after=3")


def numbers(storage: Path) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What must not depend on where the model runs."""
    keys = ("status", "accuracy", "nll", "predictions_digest", "requests", "images", "prompts", "outputs")
    rows = ResultStore(storage).read().to_pylist()
    return {(row["method"], row["seed"]): tuple(row[key] for key in keys) for row in rows}


class Watch:
    """What a run on Ray shows while it runs, looked at once a second."""

    def __init__(self, ray_folder: Path) -> None:
        self.folder, self.last = ray_folder, 0.0
        self.titles, self.logs = set[str](), dict[Path, bytes]()

    def look(self) -> None:
        if time.monotonic() - self.last < 1:
            return
        self.titles |= {title for _, title in processes().values()}
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # it was removed meanwhile
                if path.is_file() and not path.is_symlink():
                    self.logs[path] = path.read_bytes()
        self.last = time.monotonic()


def test_a_served_model_gives_the_numbers_of_a_local_one_through_faults_and_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data(tmp_path)
    words = (*SWEEP, f"datasets=[{data}]", "concurrency=1")
    run_here(*words, "model=tiny", f"storage={tmp_path / 'local'}")
    local = numbers(tmp_path / "local")
    monkeypatch.setenv(TOKEN, KEY)
    monkeypatch.setenv("FAREBOX_API_KEY", KEY)
    with serving("model=tiny", *FAULTS) as url:
        headers = {"Authorization": f"Bearer {KEY}"}
        info = call(f"{url}/v1/info", headers=headers)[1]
        card = tmp_path / "served.yaml"
        card.write_text(
            f"kind: http\nurl: {url}\nadapter: farebox\ngrant: {info['grant']}\nidentity: {{model: tiny}}\n"
            f"image: {{size: {info['image_size']}}}\nfeature_dim: {info['feature_dim']}\n"
            f"logit_scale: {info['logit_scale']!r}\ntext_norm: {info['text_norm']!r}\nbatch: {{images: 4}}\n"
            "auth: {env: FAREBOX_API_KEY}\nretry: {first_s: 0.02, most_s: 2, tries: 12}\n"
        )
        remote = (*words, f"model={card}", f"storage={tmp_path / 'remote'}")
        done, state = tmp_path / "remote" / "results", tmp_path / "state.txt"

        def two_have_ended() -> bool:
            watch.look()
            return done.is_dir() and len(list(done.iterdir())) >= 2

        with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            watch = Watch(Path(folder))
            program = (sys.executable, "-m", "tests.remote.ray_state", str(state))
            env = os.environ | {"RAY_TMPDIR": folder}
            interrupted = Running("run", *remote, program=program, env=env)
            interrupted.wait_for(two_have_ended, "two trials have ended")
            interrupted.process.send_signal(signal.SIGINT)  # Ctrl-C
            code, out, err = interrupted.end()
        assert any("ray::Replica" in title for title in watch.titles), "the run was seen"
        assert any("worker" in path.name for path in watch.logs) and b"Replica" in state.read_bytes()
        texts = [out, err, *watch.titles, *(log.decode(errors="replace") for log in watch.logs.values())]
        assert not [text[:200] for text in texts if KEY in text]
        assert code == 130 and "Traceback" not in err
        assert err.strip().splitlines()[-1].startswith("farebox: interrupted")
        with without_ray():
            here("run", *remote)
        assert numbers(tmp_path / "remote") == local
        bill = total_of(tmp_path / "remote")
        assert bill.retries and bill.rate_limited and bill.uncertain
        text = here("status", f"storage={tmp_path / 'remote'}")
        assert f"sent: {bill.calls:,} HTTP calls with {bill.images:,} images" in text
        assert f"sent: {bill.calls:,} HTTP calls" in here("ledger", f"storage={tmp_path / 'remote'}")
        packed = here("records", "pack", f"storage={tmp_path / 'remote'}", f"to={tmp_path / 'records.tar'}")
        assert "answers in" in packed and "every file matches" in here(
            "records", "verify", str(tmp_path / "records.tar")
        )
    monkeypatch.delenv("FAREBOX_API_KEY")
    run_here(*words, f"model={card}", f"storage={tmp_path / 'offline'}", "offline=true")
    assert numbers(tmp_path / "offline") == local, "the server is gone, and nothing was asked"
    assert total_of(tmp_path / "offline").calls == 0
    assert (tmp_path / "remote" / "mlflow.db").is_file()
    shown = [here(verb, f"storage={tmp_path / 'remote'}", "--json") for verb in ("status", "ledger")]
    assert not [text[:200] for text in shown if KEY in text]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
