"""Merging storages: what is taken once, what contradicts itself, and what a merged storage refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.results.row import ResultRow
from pipeline.results.runs import add_run
from pipeline.results.store import ResultStore
from pipeline.sweep.storage_id import new_id, write_id
from tests.support.command import here, records
from tests.support.synthetic import write_store

SWEEP: dict[str, Any] = {"shots": (16,), "budgets": ((8000, None),), "methods": ("zero_shot", "craft")}


@pytest.fixture
def sources(tmp_path: Path) -> tuple[ResultStore, ResultStore]:
    """Two storages: seeds 1 and 2 in the first, 2 and 3 in the second."""
    stores = []
    for name, seeds in (("a", (1, 2)), ("b", (2, 3))):
        store = write_store(tmp_path / name, seeds=seeds, **SWEEP)
        write_id(tmp_path / name, new_id(tmp_path / name))
        add_run(tmp_path / name, list(store.trials()), False, print)
        stores.append(store)
    return stores[0], stores[1]


def merge(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str, expect: int = 0) -> str:
    """Merge both storages and return what was printed."""
    words = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path / "both"), *options]
    assert main(words) == expect
    said = capsys.readouterr()
    return said.out + said.err


def change(store: ResultStore, rows: list[ResultRow], wrong: int, **values: Any) -> None:
    """Write rows again with other values, and with other predictions for so many images of the source test set."""
    first = rows[0]
    old = store.read_predictions(first.trial_id, first.test_set)
    logits = old.logits_BC.astype(np.float32)
    logits[:wrong] = np.roll(logits[:wrong], 3, axis=1)
    file, digest = store.write_predictions(first.trial_id, first.test_set, old.image_keys, old.labels, logits)
    changed = replace(first, predictions_file=file, predictions_digest=digest, **values)
    store.write([changed, *(replace(row, **values) for row in rows[1:])])


def shared(store: ResultStore) -> list[ResultRow]:
    """Rows of the trial that both storages have: craft on icons, seed 2."""
    return next(r for r in store.trials().values() if (r[0].method, r[0].dataset, r[0].seed) == ("craft", "icons", 2))


def test_a_trial_of_both_is_taken_once_and_all_numbers_are_kept(
    sources: tuple[ResultStore, ResultStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = merge(tmp_path, capsys)
    every = {(r["trial_id"], r["test_set"]): r for store in ("a", "b") for r in records(tmp_path / store)}
    merged = {(r["trial_id"], r["test_set"]): r for r in records(tmp_path / "both")}
    assert merged == every and len(merged) == len(records(tmp_path / "a")) * 3 / 2
    assert "12 trials taken" in said and "18 trials; 6 are in several storages, with equal results" in said
    assert "3 seeds" in here("leaderboard", f"storage={tmp_path / 'both'}")


def test_the_leaderboard_shows_several_storages_and_writes_nothing(
    sources: tuple[ResultStore, ResultStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(tmp_path, capsys)
    before = sorted(tmp_path.rglob("*"))
    words = ("leaderboard", "--format", "csv")
    assert here(*words, f"storage={tmp_path / 'a'},{tmp_path / 'b'}") == here(*words, f"storage={tmp_path / 'both'}")
    assert f"storage={tmp_path / 'a'},{tmp_path / 'b'} --all" in here(
        "leaderboard", f"storage={tmp_path / 'a'},{tmp_path / 'b'}"
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("wrong", "values", "reason"),
    [
        (2, {}, "0.8% of the predictions differ"),
        (40, {"cpu": "another"}, "16.7% of the predictions differ"),
        (0, {"requests": 7, "adapt_requests": 7, "validate_requests": 0}, "requests in "),
    ],
)
def test_results_that_contradict_each_other_are_left_out_and_named(
    sources: tuple[ResultStore, ResultStore],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    wrong: int,
    values: dict[str, Any],
    reason: str,
) -> None:
    rows = shared(sources[1])
    change(sources[1], rows, wrong, **values)
    said = merge(tmp_path, capsys, expect=3)
    (line,) = [line for line in said.splitlines() if "left out" in line]
    assert f"craft on icons, 16 shots, seed 2 ({rows[0].trial_id[:12]})" in line and reason in line
    assert rows[0].trial_id not in ResultStore(tmp_path / "both").trials()


def test_rounding_between_machines_is_counted_and_the_first_source_counts(
    sources: tuple[ResultStore, ResultStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shared(sources[1])
    change(sources[1], rows, 2, cpu="another")
    assert "1 differ by rounding between machines" in merge(tmp_path, capsys)
    assert ResultStore(tmp_path / "both").rows_of(rows[0].trial_id) == sources[0].rows_of(rows[0].trial_id)


def test_a_failed_trial_gives_way_to_a_finished_one(
    sources: tuple[ResultStore, ResultStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = shared(sources[0])
    (sources[0].results / f"{rows[0].trial_id}.arrow").unlink()
    sources[0].write([replace(rows[0], status="failed", accuracy=None, predictions_digest=None, error="no memory")])
    merge(tmp_path, capsys)
    assert ResultStore(tmp_path / "both").rows_of(rows[0].trial_id) == sources[1].rows_of(rows[0].trial_id)


def test_other_code_is_left_out_or_kept_and_marked(
    sources: tuple[ResultStore, ResultStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rows in list(sources[1].trials().values()):
        if rows[0].seed == 2:
            shutil.rmtree(tmp_path / "b/predictions" / rows[0].trial_id)
            (sources[1].results / f"{rows[0].trial_id}.arrow").unlink()
        else:
            sources[1].write([replace(row, code_digest="new", created="2099") for row in rows])
    for rows in list(sources[0].trials().values()):
        sources[0].write([replace(row, code_digest="old") for row in rows])
    merge(tmp_path, capsys)
    both = f"storage={tmp_path / 'both'}"
    assert {r["seed"] for r in records(tmp_path / "both") if not r["left_out"]} == {3}
    here("leaderboard", both, "--raw")
    assert "different Farebox code" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "both")
    merge(tmp_path, capsys, "--keep-code")
    assert {r["seed"] for r in records(tmp_path / "both") if not r["left_out"]} == {1, 2, 3}


def test_a_damaged_source_is_named_and_its_trial_left_out(
    sources: tuple[ResultStore, ResultStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = next(i for i, rows in sources[0].trials().items() if rows[0].seed == 1)
    path = sources[0].results / f"{trial}.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert f"{path} is damaged" in merge(tmp_path, capsys, expect=3)
    assert trial not in ResultStore(tmp_path / "both").trials()


def test_a_merged_storage_has_no_ledger_and_continues_no_run(
    sources: tuple[ResultStore, ResultStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(tmp_path, capsys)
    for words in (["ledger"], ["run", "sweep=smoke", "model=fake"]):
        assert main([*words, f"storage={tmp_path / 'both'}"]) == 2
        assert "was merged from" in capsys.readouterr().err
    assert not (tmp_path / "both/ledger.db").exists()


def test_wrong_arguments_are_refused_in_one_line(
    sources: tuple[ResultStore, ResultStore], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, new = str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "new")
    for words, reason in (
        ([a, "--to", new], "expected two or more storages"),
        ([a, a, "--to", new], "are one storage or a copy of it"),
        ([a, str(tmp_path), "--to", new], "no sweep at"),
        ([a, b, "--to", b], "it exists: name a new folder"),
    ):
        assert main(["merge", *words]) == 2
        said = capsys.readouterr().err
        assert reason in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()
