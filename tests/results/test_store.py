"""Rows and predictions: the schema is the dataclass, a write is all or nothing, damage is named and survivable."""

from __future__ import annotations

import ast
import inspect
import os
import time
import typing
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import pipeline.files
import pipeline.results.predictions
import pipeline.results.row
from methods.base import Bill
from pipeline.budget import Phase, row_columns
from pipeline.errors import DataError, StorageError
from pipeline.files import sealed_arrow, write_atomic
from pipeline.results.row import SCHEMA, ResultRow, to_rows, to_table
from pipeline.results.snapshot import FILE, SETTLED_NS, read_snapshot
from pipeline.results.store import ResultStore
from tests.support.synthetic import make, sweep


def test_schema_is_the_dataclass() -> None:
    arrow = {"str": pa.string(), "int": pa.int64(), "float": pa.float64()}
    assert SCHEMA.names == [f.name for f in fields(ResultRow)]
    for field in fields(ResultRow):
        kind, _, optional = str(field.type).partition(" | ")
        assert SCHEMA.field(field.name).type == arrow[kind], field.name
        assert SCHEMA.field(field.name).nullable == (optional == "None"), field.name


def test_every_column_says_what_it_is() -> None:
    body = ast.parse(inspect.getsource(pipeline.results.row.ResultRow)).body[0]
    assert isinstance(body, ast.ClassDef)
    for declared, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(declared, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(declared)


def test_rows_survive_arrow() -> None:
    rows = next(sweep(methods=("craft",)))
    assert to_rows(to_table(rows)) == rows
    assert typing.cast(pa.Table, to_table(rows)).schema == SCHEMA


def test_plain_bill_is_adapt_plus_validate() -> None:
    columns = row_columns(
        {Phase.ADAPT: Bill(3, 30, 300, 3000), Phase.VALIDATE: Bill(1, 10), Phase.EVALUATE: Bill(7, 70)}
    )
    assert (columns["requests"], columns["images"], columns["prompts"]) == (4, 40, 300)
    assert columns["evaluate_requests"] == 7 and columns["replay_outputs"] == 0
    make(**columns)
    with pytest.raises(ValueError, match=r"requests is 11, but adapt \+ validate is 4"):
        make(**columns | {"requests": 11})
    with pytest.raises(ValueError, match="status 'ok' is not one of done, budget_exhausted, failed, unfunded"):
        make(status="ok")


def test_a_trial_is_replaced_as_a_whole(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    rows = next(sweep(methods=("craft",)))
    assert [r.test_set for r in rows] == ["icons", "icons_outline"]
    store.write(rows)
    store.write([replace(rows[0], accuracy=1.0)])
    (only,) = to_rows(store.read())
    assert only.accuracy == 1.0
    assert [p.name for p in store.results.iterdir()] == [f"{rows[0].trial_id}.arrow"]


def test_rows_of_two_trials_or_one_test_set_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected rows of one trial"):
        ResultStore(tmp_path).write([make(seed=1), make(seed=2)])
    with pytest.raises(ValueError, match="expected rows of one trial"):
        ResultStore(tmp_path).write([make(), make()])
    with pytest.raises(ValueError, match="expected rows of one trial"):
        ResultStore(tmp_path).write([])


def test_an_interrupted_write_leaves_the_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultStore(tmp_path)
    store.write([make(accuracy=40.0)])

    def die(fd: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pipeline.files.os, "fsync", die)
    with pytest.raises(StorageError, match=r"results/.*\.arrow cannot be written \(disk full\): make room"):
        store.write([make(accuracy=50.0)])
    assert store.read()["accuracy"].to_pylist() == [40.0]
    assert len(list(store.results.iterdir())) == 1


def _halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _renamed(path: Path) -> None:
    path.rename(path.with_name("another.arrow"))


def _of_another_version(path: Path) -> None:
    path.write_bytes(sealed_arrow(pa.ipc.open_file(path.read_bytes()).read_all().drop_columns(["dataset"])))


def _unsealed(path: Path) -> None:
    table = pa.ipc.open_file(path.read_bytes()).read_all().replace_schema_metadata(None)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("damage", [_halved, _emptied, _renamed, _of_another_version, _unsealed])
def test_a_damaged_file_is_named_and_treated_as_absent(tmp_path: Path, damage: typing.Callable[[Path], None]) -> None:
    store = ResultStore(tmp_path)
    store.write([make(seed=1)])
    damage(store.write([make(seed=2)]))
    assert store.read()["seed"].to_pylist() == [1]
    (line,) = store.damage()
    assert str(tmp_path) in line and "its trial counts as not run; run the same `farebox run` command" in line
    assert list(store.finished()) == [make(seed=1).trial_id]


@pytest.mark.parametrize("column", ["curve", "paper_queries"])
def test_rows_with_other_columns_are_refused_by_name(tmp_path: Path, column: str) -> None:
    store = ResultStore(tmp_path)
    path = store.write([make()])
    path.write_bytes(sealed_arrow(pa.ipc.open_file(path.read_bytes()).read_all().drop_columns([column])))
    assert len(store.read()) == 0
    assert f"its columns are those of another Farebox version ({column})" in store.damage()[0]


def test_only_done_and_budget_exhausted_trials_are_finished(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    assert store.finished() == {}
    for seed, status in enumerate(("done", "budget_exhausted", "failed", "unfunded")):
        store.write([make(seed=seed, status=status, trial_id=status, method_digest=f"code{seed}")])
    assert store.finished() == {"done": ("code0", ""), "budget_exhausted": ("code1", "")}


def test_predictions_come_back_and_damage_is_a_data_error(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    keys, labels = ["a", "b", "c"], np.array([0, 1, 1])
    logits = np.array([[2.0, 1.0], [0.5, 0.25], [0.0, 9.0]], dtype=np.float32)
    file, digest = store.write_predictions("t1", "icons/odd name", keys, labels, logits)
    assert (tmp_path / file).exists() and not Path(file).is_absolute()
    found = store.read_predictions("t1", "icons/odd name", digest)
    assert found.image_keys == keys
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.predicted, [0, 0, 1])
    np.testing.assert_array_equal(found.logits_BC, logits)
    assert store.write_predictions("t2", "icons", keys, labels, logits)[1] == digest
    assert store.write_predictions("t2", "icons", keys, labels, logits + 1)[1] != digest
    with pytest.raises(DataError, match="are not those of the row"):
        store.read_predictions("t2", "icons", digest)
    _halved(tmp_path / file)
    with pytest.raises(DataError, match="cannot be read"):
        store.read_predictions("t1", "icons/odd name")
    with pytest.raises(DataError, match="cannot be read"):
        store.read_predictions("never", "icons")


def test_large_predictions_are_halved_without_changing_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.results.predictions, "HALF_ABOVE", 3)
    store = ResultStore(tmp_path)
    logits = np.array([[20.0, 20.001], [1e6, 0.0]], dtype=np.float32)  # equal in float16; beyond float16
    store.write_predictions("t", "near", ["a"] * 2, np.array([1, 0]), logits[:1].repeat(2, 0))
    near = store.read_predictions("t", "near")
    assert near.logits_BC.dtype == np.float16 and near.predicted.tolist() == [1, 1]
    store.write_predictions("t", "far", ["a", "b"], np.array([1, 0]), logits)
    assert store.read_predictions("t", "far").logits_BC.dtype == np.float32


def changed(table: pa.Table, column: str, values: list[typing.Any]) -> pa.Table:
    at = table.schema.get_field_index(column)
    return table.set_column(at, table.schema.field(at), pa.array(values))


def test_a_file_whose_rows_contradict_each_other_is_named_and_left_out(tmp_path: Path) -> None:
    store, rows = ResultStore(tmp_path), next(sweep(methods=("craft",)))
    path = store.write(rows)
    good = to_table(rows)
    for bad, what in (
        (to_table([rows[0], rows[0]]), "two of its rows have the same test set"),
        (to_table([rows[0], replace(rows[1], seed=99)]), "its rows disagree in seed"),
        (to_table([rows[0], replace(rows[1], template="b {}")]), "its rows disagree in template"),
        (changed(good, "kind", ["x", "y"]), "kind 'x' is not one of"),
        (changed(good, "requests", [1, 1]), "requests is 1, but"),
    ):
        write_atomic(path, sealed_arrow(bad))
        assert len(store.read()) == 0 and what in store.damage()[0]


# --- the snapshot --------------------------------------------------------------------------------------------------


def with_snapshot(folder: Path) -> tuple[ResultStore, list[str], pa.Table]:
    """A store of three trials whose files are old enough for the snapshot; their ids, and all rows."""
    store = ResultStore(folder)
    ids = []
    for rows in islice(sweep(methods=("craft",)), 3):
        ids.append(rows[0].trial_id)
        path = store.write(rows)
        os.utime(path, ns=(0, time.time_ns() - 2 * SETTLED_NS))
    table = store.read()
    store.write_snapshot()
    return store, sorted(ids), table


def files_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The row files that are read from now on."""
    names = list[str]()
    read = pipeline.results.store._read_rows

    def noted(path: Path) -> pa.Table:
        names.append(path.stem)
        return read(path)

    monkeypatch.setattr(pipeline.results.store, "_read_rows", noted)
    return names


def test_the_snapshot_gives_the_rows_of_all_files_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ids, table = with_snapshot(tmp_path)
    assert table["trial_id"].to_pylist() == sorted(table["trial_id"].to_pylist())
    read = files_read(monkeypatch)
    assert ResultStore(tmp_path).read().equals(table) and read == []
    os.utime(store.results / f"{ids[1]}.arrow")
    assert ResultStore(tmp_path).read().equals(table) and read == [ids[1]]
    before = (tmp_path / FILE).read_bytes()
    store.write_snapshot()  # the touched file is too young
    assert ids[1] not in read_snapshot(tmp_path).stamps and (tmp_path / FILE).read_bytes() != before


def test_files_that_changed_since_the_snapshot_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ids, _ = with_snapshot(tmp_path)
    (row, *_) = store.rows_of(ids[0])
    store.write([replace(row, accuracy=1.0)])
    (store.results / f"{ids[1]}.arrow").unlink()
    damaged = store.results / f"{ids[2]}.arrow"
    data = bytearray(damaged.read_bytes())
    data[-20] ^= 1
    damaged.write_bytes(data)  # of the same size
    again = ResultStore(tmp_path)
    (only,) = to_rows(again.read())
    assert (only.trial_id, only.accuracy) == (ids[0], 1.0)
    assert list(again.damaged) == [damaged] and "counts as not run" in again.damage()[0]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "older", "removed"])
def test_a_snapshot_that_cannot_be_used_changes_nothing(tmp_path: Path, damage: str) -> None:
    store, ids, table = with_snapshot(tmp_path)
    path = tmp_path / FILE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "older":
        path.write_bytes(sealed_arrow(pa.table({"trial_id": ids, "file_size": [1] * 3, "file_mtime_ns": [1] * 3})))
    elif damage == "removed":
        path.unlink()
    else:
        path.write_bytes({"flipped": bytes(data), "cut": bytes(data[:-9]), "empty": b""}[damage])
    again = ResultStore(tmp_path)
    assert again.read().equals(table) and again.damaged == {}
    store.write_snapshot()
    assert sorted(read_snapshot(tmp_path).stamps) == ids


def test_a_full_disk_leaves_the_snapshot_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ids, _ = with_snapshot(tmp_path)
    (store.results / f"{ids[0]}.arrow").unlink()
    before = (tmp_path / FILE).read_bytes()
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    store.write_snapshot()
    assert (tmp_path / FILE).read_bytes() == before
    assert set(store.read()["trial_id"].to_pylist()) == set(ids[1:])
