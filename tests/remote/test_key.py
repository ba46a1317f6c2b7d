"""The key of a remote model goes to the server only, also when a server repeats it in an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.results.store import ResultStore
from tests.support.command import here
from tests.support.peer import KEY, peer, write_peer_card
from tests.support.without_ray import without_ray


def test_a_trial_that_fails_with_a_message_that_repeats_the_key_stores_it_nowhere(
    tmp_path: Path, card: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "sweep"
    monkeypatch.setenv("PEER_KEY", KEY)
    with peer() as served:
        served.expects_key = served.repeats_key = True
        served.faults.extend(["fine", "fine", 503, 503])
        own = {"retry": {"first_s": 0.01, "most_s": 0.02, "tries": 2}, "rate": {"at_once": 1}}
        api = write_peer_card(tmp_path, served.url, auth={"env": "PEER_KEY"}, **own)
        words = ("sweep=smoke", f"datasets=[{card}]", "methods=[zero_shot,score_ridge]", "shots=1", "seeds=1")
        with without_ray():
            said = here("run", *words, f"model={api}", f"storage={storage}", "eval_shift=false", expect=3)
    rows = ResultStore(storage).read().to_pylist()
    assert sorted(row["status"] for row in rows) == ["done", "failed"]
    assert "Bearer ***" in next(row["error"] for row in rows if row["status"] == "failed")
    assert all(call["headers"]["Authorization"] == f"Bearer {KEY}" for call in served.calls)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert storage / "mlflow.db" in files
    assert not [path for path, content in files.items() if KEY.encode() in content]
    shown = [here(verb, f"storage={storage}", "--json") for verb in ("status", "ledger")]
    assert not [text for text in (said, *capsys.readouterr(), *shown) if KEY in text]
