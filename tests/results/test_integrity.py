"""A damaged file never becomes a number: commands leave it out, name it, and a run recomputes it at no new charge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import pipeline.blackbox.model
import pipeline.results.published
from pipeline.blackbox import architecture, model
from pipeline.blackbox.facts import describe
from pipeline.cards import EMBEDDED
from pipeline.cli import main
from pipeline.commands.leaderboard import Options, leaderboard
from pipeline.config.card_files import model_card
from pipeline.config.compose import compose
from pipeline.data.source import ParquetSource
from pipeline.errors import DamagedFile, DataError
from pipeline.files import DIGESTS, UNSEALED, verified
from pipeline.results import releases
from pipeline.results.published import printed
from pipeline.results.row import ResultRow
from pipeline.results.store import LISTED, ResultStore
from pipeline.sweep.reservations import finished, pending
from pipeline.sweep.storage_id import new_id, read_id, write_id
from tests.support.lab import STORAGE, Lab, outcome
from tests.support.synthetic import write_store

SMALL = {"shots": (16,), "seeds": (1, 2), "budgets": ((8000, None),)}


def flip(path: Path, at: int) -> None:
    """Flip one bit in a new file of the same name: the old one may be mapped, or linked elsewhere."""
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 0x10
    path.unlink()
    path.write_bytes(data)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, list[str]]:
    """Exit code, standard output and the lines on standard error of a command."""
    capsys.readouterr()
    code = main(words)
    text = capsys.readouterr()
    return code, text.out, text.err.splitlines()


# --- rows and predictions -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with rows and predictions of two methods on five data sets."""
    folder = tmp_path_factory.mktemp("swept")
    write_store(folder, methods=("zero_shot", "craft"), **SMALL)
    write_id(folder, new_id(folder))
    return folder


@pytest.fixture
def copy(swept: Path, tmp_path: Path) -> Path:
    """A copy of it to damage; `flip` leaves the original as it is."""
    return Path(shutil.copytree(swept, tmp_path / "copy"))


@pytest.mark.parametrize("part", ["results", "predictions"])
def test_every_flipped_byte_is_found(copy: Path, part: str) -> None:
    store = ResultStore(copy)
    (first, *_) = store.read().to_pylist()
    row = ResultRow(**first)
    path = store.results / f"{row.trial_id}.arrow"
    if part == "predictions":
        path = store.predictions_path(row.trial_id, row.test_set)
    data = path.read_bytes()
    for at in range(0, len(data), 61):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        if part == "results":
            assert store.rows_of(row.trial_id) == []
        else:
            assert not store.intact(row.trial_id, row.test_set, row.predictions_digest)
        assert list(store.damaged) == [path]
    path.write_bytes(data)
    assert store.rows_of(row.trial_id) and store.intact(row.trial_id, row.test_set, row.predictions_digest)
    assert store.damaged == {}


def test_an_intact_file_of_another_kind_is_not_taken_for_rows(copy: Path) -> None:
    store = ResultStore(copy)
    (row, *_) = store.read().to_pylist()
    path = store.results / f"{row['trial_id']}.arrow"
    path.unlink()
    shutil.copy(store.predictions_path(row["trial_id"], row["test_set"]), path)
    assert store.rows_of(row["trial_id"]) == [] and "does not exist in schema" in store.damage()[0]


@pytest.mark.parametrize("form", ["table", "csv", "json", "md", "latex", "html"])
def test_the_leaderboard_leaves_damaged_rows_out_and_names_the_file(
    copy: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ResultStore(copy).read().to_pylist()
    lost = next(r for r in rows if (r["method"], r["dataset"], r["seed"]) == ("craft", "digits", 1))
    path = copy / "results" / f"{lost['trial_id']}.arrow"
    flip(path, 4000)
    code, out, lines = said(capsys, "leaderboard", f"storage={copy}", "--format", form)
    (line,) = [line for line in lines if "damaged" in line]
    assert code == 3 and out
    assert line.startswith(f"farebox: {path} is damaged: its content does not match its checksum")
    assert "`farebox run`" in line and "no new charge" in line and len(line) - len(str(path)) < 250
    if form == "json":
        (cell,) = [r for r in json.loads(out) if r["method"] == "craft" and r["test_set"] == "digits"]
        (kept,) = [r for r in rows if r["method"] == "craft" and r["test_set"] == "digits" and r["seed"] == 2]
        assert (cell["seeds"], cell["accuracy"]) == (1, kept["accuracy"])
    code, out, lines = said(capsys, "leaderboard", f"storage={copy}", "--raw", "--format", "json")
    assert code == 3 and line in lines
    assert [r for r in rows if r["trial_id"] != lost["trial_id"]] and lost["trial_id"] not in out


def board(storage: Path) -> tuple[list[dict[str, object]], list[str]]:
    text, damaged = leaderboard(compose([f"storage={storage}"]), Options("json"))
    return json.loads(text), damaged


def _flipped(path: Path) -> None:
    flip(path, 1200)


def _removed(path: Path) -> None:
    path.unlink()


def _of_another_kind(path: Path) -> None:
    rows = next(path.parents[2].glob("results/*.arrow"))
    path.unlink()
    shutil.copy(rows, path)


def _of_another_trial(path: Path) -> None:
    other = next(p for p in path.parent.parent.glob(f"*/{path.name}") if p.parent != path.parent)
    path.unlink()
    shutil.copy(other, path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flipped, "its content does not match its checksum"),
        (_removed, "the file is missing"),
        (_of_another_kind, "does not exist in schema"),
        (_of_another_trial, "its predictions are not those of the row"),
    ],
)
def test_the_leaderboard_leaves_out_intervals_without_predictions_and_names_the_file(
    copy: Path, damage: Callable[[Path], None], reason: str
) -> None:
    before, none = board(copy)
    assert none == []
    store = ResultStore(copy)
    rows = store.read().to_pylist()
    craft = next(r for r in rows if (r["method"], r["dataset"], r["seed"]) == ("craft", "digits", 1))
    damage(path := store.predictions_path(craft["trial_id"], "digits"))
    after, (line,) = board(copy)
    assert str(path) in line and reason in line and "bootstrap intervals" in line
    for old, new in zip(before, after, strict=True):
        hit = (old["method"], old["test_set"]) == ("craft", "digits")
        lost = {k for k in old if old[k] != new[k]}
        assert lost == ({f"gain_zero_shot_{end}" for end in ("low", "high")} if hit else set())
        assert all(new[k] is None for k in lost)


def test_many_damaged_files_are_counted(copy: Path) -> None:
    shutil.rmtree(copy / "predictions")
    _, lines = board(copy)
    assert len(lines) == LISTED + 1
    assert lines[-1].endswith(f"more files in {copy} are damaged")


@pytest.fixture
def trial(lab: Lab) -> Iterator[tuple[Lab, Path, Path]]:
    """A lab with one finished trial: its rows and its predictions; the ledger's storage id is the lab's."""
    spec = lab.spec("taskres")
    lab.run(spec)
    write_id(lab.folder, replace(new_id(lab.folder), id=STORAGE))
    store = lab.store
    yield lab, store.results / f"{spec.trial_id}.arrow", store.predictions_path(spec.trial_id, "small")


def test_the_ledger_is_not_verified_while_rows_are_damaged(
    trial: tuple[Lab, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    lab, rows, _ = trial
    words = ("ledger", f"storage={lab.folder}")
    code, out, lines = said(capsys, *words)
    assert (code, lines) == (0, []) and "; verified" in out
    flip(rows, 5000)
    code, out, (line,) = said(capsys, *words)
    assert code == 3 and "NOT verified" in out and str(rows) in line
    assert str(rows) in json.loads(said(capsys, *words, "--json")[1])["problems"][0]


def test_status_names_damaged_rows(trial: tuple[Lab, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lab, rows, _ = trial
    assert said(capsys, "status", f"storage={lab.folder}")[0] == 0
    flip(rows, 5000)
    code, out, (line,) = said(capsys, "status", f"storage={lab.folder}")
    assert code == 3 and "finished" not in out and str(rows) in line
    assert str(rows) in json.loads(said(capsys, "status", f"storage={lab.folder}", "--json")[1])["damaged"][0]


@pytest.mark.parametrize("part", ["rows", "predictions", "predictions gone"])
def test_a_run_recomputes_a_damaged_trial_from_replayed_charges(trial: tuple[Lab, Path, Path], part: str) -> None:
    lab, rows, predictions = trial
    plan = lab.plan("methods=[taskres]")
    (spec,) = plan.trials
    before, bills, data = lab.store.rows_of(spec.trial_id), lab.bills(spec), predictions.read_bytes()
    assert pending(plan, lab.store) == ([], {}) and finished(lab.store, spec)
    path = rows if part == "rows" else predictions
    if part == "predictions gone":
        path.unlink()
    else:
        flip(path, 900)
    assert pending(plan, lab.store) == ([spec], {}) and not finished(lab.store, spec)
    (line,) = lab.store.recomputed({spec.trial_id})
    assert str(path) in line and "recomputed" in line and lab.store.recomputed({"another"}) == []
    again = lab.run(spec)
    assert [outcome(r) for r in again] == [outcome(r) for r in before]
    assert predictions.read_bytes() == data and lab.bills(spec) == bills
    assert pending(plan, lab.store) == ([], {}) and lab.store.damage() == []


# --- the mirror -----------------------------------------------------------------------------------------------------


def test_the_mirror_takes_no_damaged_file_and_none_from_outside(copy: Path) -> None:
    store = ResultStore(copy)
    (row, *_) = [ResultRow(**r) for r in store.read().to_pylist() if r["method"] == "craft"]
    path = store.predictions_path(row.trial_id, row.test_set)
    assert store.prediction_files([row]) == [path]
    secret = copy.parent / "secret"
    secret.write_text("not of this storage")
    assert store.prediction_files([replace(row, predictions_file="../secret")]) == [path]
    assert store.prediction_files([replace(row, predictions_digest=None)]) == []
    flip(path, 700)
    assert store.prediction_files([row]) == [] and list(store.damaged) == [path]


# --- what ships with the package ------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [EMBEDDED, pipeline.results.published.FILE.parent], ids=lambda path: path.name)
def test_the_digests_that_ship_are_those_of_every_data_file(folder: Path) -> None:
    listed = json.loads((folder / DIGESTS).read_text())
    data = {p.name for p in folder.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc", ".md")} - {DIGESTS}
    assert data <= set(listed), "add the SHA-256 of a new file to digests.json"
    for name in listed:
        assert verified(folder / name) == folder / name


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the embedded model's files, which the model is loaded from."""
    folder = tmp_path / "embedded"
    folder.mkdir()
    for path in (*EMBEDDED.glob("tiny*"), EMBEDDED / DIGESTS):
        shutil.copy(path, folder)
    monkeypatch.setattr(architecture, "EMBEDDED", folder)
    return folder


def test_embedded_weights_with_a_flipped_byte_are_refused_before_they_are_parsed(package: Path) -> None:
    card = model_card("tiny")
    whole = describe(card).identity
    flip(package / "tiny.safetensors", 5_000_000)
    for use in (describe, model.load):
        with pytest.raises(DataError, match=r"tiny\.safetensors is damaged: .*pip install --force-reinstall farebox"):
            use(card)
    shutil.copy(EMBEDDED / "tiny.safetensors", package)
    assert describe(card).identity == whole
    architecture._tokenizer.cache_clear()  # it was verified when it was loaded
    flip(package / "tiny_bpe.txt.gz", 700)
    with pytest.raises(DataError, match=r"tiny_bpe\.txt\.gz is damaged"):
        model.load(card)


def test_a_damaged_list_of_digests_is_an_error_in_one_line(package: Path) -> None:
    for content in (b"{", b"\xff", b"[]", b'{"tiny.json": 1}', b"1"):
        (package / DIGESTS).write_bytes(content)
        with pytest.raises(DataError, match=rf"{DIGESTS} is damaged: it has no digest of tiny\.safetensors") as error:
            describe(model_card("tiny"))
        assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(package))
    (package / DIGESTS).unlink()
    with pytest.raises(DataError, match="is damaged"):
        describe(model_card("tiny"))


def test_embedded_data_with_a_flipped_byte_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "digits.parquet"
    sha256 = json.loads((EMBEDDED / DIGESTS).read_text())["digits.parquet"]
    shutil.copy(EMBEDDED / "digits.parquet", path)
    flip(path, -7)  # in the footer's length: Arrow would stop at it in its own words
    with pytest.raises(DataError, match=r"the card says .*: restore the file .*pip install --force-reinstall farebox"):
        ParquetSource(str(path), sha256).labels  # noqa: B018


def test_printed_accuracies_with_a_flipped_byte_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("published.csv", DIGESTS):
        shutil.copy(pipeline.results.published.FILE.with_name(name), tmp_path)
    monkeypatch.setattr(pipeline.results.published, "FILE", tmp_path / "published.csv")
    printed.cache_clear()
    flip(tmp_path / "published.csv", 20_000)
    with pytest.raises(DataError, match=r"published\.csv is damaged"):
        printed()


def test_records_of_releases_with_a_flipped_byte_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (releases.FILE.name, DIGESTS):
        shutil.copy(releases.FILE.with_name(name), tmp_path)
    monkeypatch.setattr(releases, "FILE", tmp_path / releases.FILE.name)
    readers = (releases.releases, releases.without_release)
    for cached in (*readers, releases._content):
        cached.cache_clear()
    flip(releases.FILE, 5_000)
    for read in readers:
        with pytest.raises(DataError, match=r"releases\.yaml is damaged"):
            read()


# --- the storage's id -----------------------------------------------------------------------------------------------


def test_a_damaged_storage_id_keeps_its_id_or_stops(tmp_path: Path) -> None:
    wanted = new_id(tmp_path)
    write_id(tmp_path, wanted)
    path = tmp_path / "storage_id"
    data = path.read_bytes()
    for at in range(len(data)):  # the id is stored twice
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert read_id(tmp_path) == wanted
    half = len(data) // 2
    for other in (b"", f"{UNSEALED}\n".encode(), data[: half - 3], data[:9] + b"x" + data[10 : half + 9] + b"x"):
        path.write_bytes(other)
        with pytest.raises(DamagedFile, match="storage_id is damaged"):
            read_id(tmp_path)


def test_the_row_that_is_written_is_the_row_that_is_read(lab: Lab) -> None:
    spec = lab.spec("logit_head")
    assert [asdict(r) for r in lab.run(spec)] == [asdict(r) for r in ResultStore(lab.folder).rows_of(spec.trial_id)]
