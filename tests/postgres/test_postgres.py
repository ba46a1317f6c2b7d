"""A sweep whose ledger is a PostgreSQL server ends as on SQLite, through a killed driver: `make test-postgres`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sqlalchemy as sa

from pipeline.ledger.schema import metadata
from tests.faults.test_kills import rows_of, undisturbed, words
from tests.support.command import Running, farebox, ledger_record

__all__ = ["undisturbed", "words"]

SERVER = os.environ.get("FAREBOX_TEST_LEDGER", "")

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not SERVER, reason="FAREBOX_TEST_LEDGER names no PostgreSQL server"),
]


def test_a_sweep_on_a_server_ends_alike_through_a_killed_driver(
    words: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    url = sa.make_url(SERVER)
    engine = sa.create_engine(url)
    metadata.drop_all(engine)
    ledger = f"budget.global.url={SERVER}"
    words = (*words, f"storage={tmp_path}", "replicas=2", "concurrency=2", ledger)
    run = Running(*words)
    run.wait_for(lambda: list((tmp_path / "checkpoints").glob("*.ckpt")), "a checkpoint")
    run.kill()
    before = ledger_record(tmp_path, ledger)
    said = farebox(*words).stdout
    after = ledger_record(tmp_path, ledger)

    quiet = ledger_record(undisturbed)
    assert before["open_trials"] > 0 and before["phases"] != quiet["phases"]  # it was struck in mid-work
    assert rows_of(tmp_path) == rows_of(undisturbed)
    assert [after[k] for k in ("phases", "trials", "open_trials")] == [
        quiet[k] for k in ("phases", "trials", "open_trials")
    ]
    assert not (tmp_path / "ledger.db").exists()
    with engine.connect() as db:
        assert db.execute(sa.text("select count(*) from ledger_charge")).scalar_one() > 0
    engine.dispose()
    written = [said, *(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())]
    assert url.password and not [text for text in written if url.password in text]
