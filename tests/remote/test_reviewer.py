"""A reviewer repeats a paid sweep in an empty folder, from an archive alone: no key, no server, equal bits."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.errors import DataError
from pipeline.remote.archive import verify
from pipeline.remote.call_log import total_of
from pipeline.results.store import ResultStore
from tests.support.command import here
from tests.support.lab import run_here
from tests.support.peer import KEY, peer, write_peer_card

METHODS = "methods=[zero_shot,gda,score_ridge]"


def results(storage: Path) -> list[tuple[Any, ...]]:
    names = ("trial_id", "status", "accuracy", "nll", "predictions_digest", "requests", "images", "prompts", "outputs")
    return sorted(tuple(row[name] for name in names) for row in ResultStore(storage).read().to_pylist())


def test_an_archive_is_enough_to_repeat_a_sweep(
    tmp_path: Path, card: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ("sweep=smoke", f"datasets=[{card}]", METHODS, "views=2", "shots=4", "seeds=1,2", "eval_shift=false")
    author, reviewer = tmp_path / "author", tmp_path / "reviewer"
    for folder in (author, reviewer):
        folder.mkdir()
    monkeypatch.setenv("PEER_KEY", KEY)
    with peer() as served:
        served.expects_key = True
        api = write_peer_card(author, served.url, auth={"env": "PEER_KEY"})
        run_here(*sweep, f"model={api}", f"storage={author / 'runs' / 'mine'}")
    storage, archive = f"storage={author / 'runs' / 'mine'}", reviewer / "records.tar"
    assert main(["records", "pack", storage, "model=tiny", f"to={archive}"]) == 2 and not archive.exists()
    assert "model=tiny: no row of" in capsys.readouterr().err
    said = here("records", "pack", storage, f"model={api}", f"to={archive}")
    assert "run the same command with model=records/peer.yaml offline=true" in said

    monkeypatch.delenv("PEER_KEY")
    monkeypatch.chdir(reviewer)
    assert "every file matches its digest" in here("records", "verify", "records.tar")
    with tarfile.open("records.tar") as tar:
        tar.extractall("runs", filter="data")
    run_here(*sweep, "model=runs/records/peer.yaml", "storage=runs/review", "offline=true")
    assert results(reviewer / "runs" / "review") == results(author / "runs" / "mine")
    assert {row[1] for row in results(reviewer / "runs" / "review")} == {"done"}
    assert total_of(reviewer / "runs" / "review").calls == 0
    assert KEY.encode() not in archive.read_bytes()


def test_a_changed_card_in_an_archive_is_named(tmp_path: Path, card: Path) -> None:
    with peer() as served:
        api = write_peer_card(tmp_path, served.url)
        words = ("sweep=smoke", f"datasets=[{card}]", "methods=[zero_shot]", "shots=1", "seeds=1", "eval_shift=false")
        run_here(*words, f"model={api}", f"storage={tmp_path / 'mine'}")
    archive = tmp_path / "records.tar"
    here("records", "pack", f"storage={tmp_path / 'mine'}", f"model={api}", f"to={archive}")
    archive.write_bytes(archive.read_bytes().replace(b"logit_scale: 20.0", b"logit_scale: 30.0"))
    with pytest.raises(DataError, match=r"records/peer\.yaml is damaged"):
        verify(archive)
