"""Results with several kinds of answers: sections, references, figures, overviews, filters, and rows from before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.commands.leaderboard import Options, leaderboard, of_words
from pipeline.files import sealed_arrow
from pipeline.results import noise_floor
from pipeline.results.comparison import answers_order
from pipeline.results.html import html
from pipeline.results.plots import sketch
from pipeline.results.report import make_report, read_selection
from pipeline.results.row import SCHEMA, ResultRow, to_rows, to_table
from pipeline.results.store import ResultStore, check_trial
from pipeline.results.tables import text_table
from pipeline.results.tracking_names import mean_name, name_of, params_of
from pipeline.sweep.storage_id import new_id, write_id
from tests.support.synthetic import make, report_of, sweep

LOSS = {"logits": 0.0, "probabilities": 1.0, "probabilities, 3 digits": 2.0, "top-5": 4.0, "label": 8.0}
LAST = {"zero_shot": 3, "logit_head": 3, "taskres": 1, "craft": 5}
"""Number of kinds of answers, in the order of LOSS, that a method runs with here."""


def rows_of(methods: dict[str, int] = LAST) -> list[ResultRow]:
    rows = []
    for trial in sweep(shots=(16,), seeds=(1, 2, 3), budgets=((8000, None),), methods=tuple(methods)):
        for i, (text, loss) in enumerate(list(LOSS.items())[: methods[trial[0].method]]):
            trial_id = f"{trial[0].trial_id}-{i}"
            rows += [replace(r, answers=text, accuracy=(r.accuracy or 0) - loss, trial_id=trial_id) for r in trial]
    return rows


def test_a_degraded_answer_never_ranks_with_a_full_one() -> None:
    board = report_of(rows_of()).board.to_pylist()
    sections: dict[tuple[str, str, str], set[str]] = {}
    for r in board:
        sections.setdefault((r["access_class"], r["test_set"], r["answers"]), set()).add(r["method"])
    assert sections["scores", "icons", "logits"] == {"zero_shot", "logit_head", "craft"}
    assert sections["scores", "icons", "top-5"] == sections["scores", "icons", "label"] == {"craft"}
    assert {answers for name, _, answers in sections if name == "features"} == {"logits"}
    leaders = [(r["answers"], r["label"]) for r in board if r["leader"] and r["test_set"] == "icons"]
    assert len([answers for answers, _ in leaders if answers == "label"]) == 1


def test_gains_are_over_references_with_the_same_answers() -> None:
    board = report_of(rows_of()).board.to_pylist()
    gains = {r["answers"]: r["gain_zero_shot"] for r in board if r["method"] == "craft" and r["test_set"] == "icons"}
    assert gains["logits"] == pytest.approx(gains["probabilities"]) == pytest.approx(gains["probabilities, 3 digits"])
    assert gains["top-5"] is None and gains["label"] is None
    assert "no gain over" not in " ".join(report_of(rows_of()).notes)  # with top-k and labels there can be none
    notes = " ".join(report_of(rows_of({"logit_head": 2, "zero_shot": 1})).notes)
    assert "no gain over zero_shot for logit_head (digits at 16 shots with probabilities, " in notes


def test_tables_and_the_page_name_answers_that_are_not_full() -> None:
    report = report_of(rows_of())
    text = text_table(report.board)
    assert "icons, 16 shots, allotment 8,000 requests, tiny fp32, resolution" in text
    assert "icons, 16 shots, allotment 8,000 requests, tiny fp32, answers: probabilities, 3 digits, resolution" in text
    page = html(report.board, report.summary, report.selection, {})
    assert "<select name=answers>" in page and 'data-answers="top-5"' in page
    full = [row for row in rows_of() if row.answers == "logits"]
    plain = report_of(full)
    assert "answers" not in text_table(plain.board)
    assert "name=answers" not in html(plain.board, plain.summary, plain.selection, {})
    only = report_of([row for row in rows_of() if row.answers == "label"])
    assert ">answers</th>" in html(only.board, only.summary, only.selection, {})


def test_the_overview_by_answers_has_a_column_for_each_and_others_show_the_fullest() -> None:
    report = report_of(rows_of())
    view = report.overview()
    assert view is not None and view.axis == "answers" and view.columns == tuple(LOSS) and not view.shows_gains
    cells = {line.main["label"]: [r and r["accuracy"] for r in line.records] for line in view.lines}
    full = cells["craft"][0]
    assert full is not None
    assert cells["craft"] == [pytest.approx(full - loss) for loss in LOSS.values()]
    assert cells["taskres"][1:] == [None] * 4
    by_set = report.overview("dataset")
    assert by_set is not None and by_set.facts["answers"] == "answers: logits (first of 5 kinds)"
    assert {r["answers"] for line in by_set.lines for r in line.records if r} == {"logits"}
    plain = report_of([row for row in rows_of() if row.answers == "logits"]).overview()
    assert plain is not None and plain.axis == "dataset" and plain.facts["answers"] == ""


def test_a_figure_shows_accuracy_by_answers_and_the_others_the_fullest_answers() -> None:
    report = report_of(rows_of())
    drawn = sketch(report.board, report.summary, report.selection.rows)
    (ax,) = drawn["accuracy_by_answers"].figure.axes
    assert [label.get_text().replace("\n", " ") for label in ax.get_xticklabels()] == list(LOSS)
    lines = {len(line.get_xdata()) for line in ax.lines if line.get_marker() not in ("None", None, "", "_")}
    assert lines == {5, 3, 1}
    assert all("answers: logits" in one.title for name, one in drawn.items() if name != "accuracy_by_answers")
    plain = report_of([row for row in rows_of() if row.answers == "logits"])
    assert "accuracy_by_answers" not in sketch(plain.board, plain.summary, plain.selection.rows)


def test_answers_are_sorted_from_full_to_label() -> None:
    texts = [
        "logits",
        "logits, 1 digit",
        "probabilities",
        "probabilities, 3 digits",
        "top-5",
        "top-3, noise 0.1",
        "label",
    ]
    shuffled = texts[3:] + texts[:3]
    assert sorted(shuffled, key=answers_order) == texts


def test_rows_from_before_are_full_answers_on_balanced_draws(tmp_path: Path) -> None:
    rows = [make(accuracy=50.0)]
    old = to_table(rows).drop_columns(["answers", "draw", "missing_classes"])
    assert to_rows(check_trial(old)) == rows and check_trial(old).schema == SCHEMA
    store = ResultStore(tmp_path)
    store.results.mkdir()
    (store.results / f"{rows[0].trial_id}.arrow").write_bytes(sealed_arrow(old))
    assert store.rows_of(rows[0].trial_id) == rows and store.damage() == []
    with pytest.raises(ValueError, match="another Farebox version"):
        check_trial(old.drop_columns(["views"]))


def test_mlflow_has_the_answers_in_params_and_in_names_of_runs() -> None:
    full, degraded = make(), make(answers="top-5")
    assert params_of(degraded)["trial/answers"] == "top-5"
    assert name_of(degraded) == f"{name_of(full)}-top-5"
    record = report_of(rows_of()).summary.to_pylist()[0]
    assert mean_name(record | {"answers": "label"}) != mean_name(record | {"answers": "logits"})


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine"
    store = ResultStore(folder)
    trials: dict[str, list[ResultRow]] = {}
    for row in rows_of():
        trials.setdefault(row.trial_id, []).append(row)
    for rows in trials.values():
        store.write(rows)
    write_id(folder, new_id(folder))
    return folder


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("answers=topk", {"top-5"}),
        ("answers=logits,label", {"logits", "label"}),
        ("answers=probabilities, 3 digits", {"probabilities, 3 digits"}),
        ("answers={scores: probabilities, digits: 3}", {"probabilities, 3 digits"}),
    ],
)
def test_answers_filter_a_leaderboard(storage: Path, word: str, kept: set[str]) -> None:
    config, only = of_words([f"storage={storage}", word, "methods=craft"])
    for options in (Options("json"), Options("json", raw=True)):
        records = json.loads(leaderboard(config, options, only)[0])
        assert {r["answers"] for r in records} == kept and {r["method"] for r in records} == {"craft"}


def record_of(largest: float = 0.25, **changes: object) -> noise_floor.Record:
    key = {"model_digest": "d" * 64, "precision": "fp32", "answers": "logits"}
    numbers = {"scores_largest": largest, "scores_mean": 0.01, "changed": 1, "images": 16}
    return {"model": "tiny", "created": "2026-11-27T10:00:00+00:00", **key, **numbers, **changes}


def test_a_stored_noise_floor_is_shown_under_the_table_and_in_json(storage: Path) -> None:
    features = storage.parent / "features"
    noise_floor.write(features, record_of())
    noise_floor.write(features, record_of(model_digest="other"))
    line = (
        "noise floor of tiny, probed 2026-11-27: repeated scores differ by at most 0.25 (mean 0.01); the predicted "
        "class changes for 1 of 16 images"
    )
    config, only = of_words([f"storage={storage}"])
    text = leaderboard(config, Options(every=True), only)[0]
    assert line in " ".join(text.replace("\n  ", " ").split("\n"))
    records = json.loads(leaderboard(config, Options("json"), only)[0])
    assert {(r["answers"], r["noise_floor"]) for r in records} >= {("logits", 0.25), ("label", None)}
    noise_floor.write(features, record_of(0.5))  # a later probe replaces it
    selection = read_selection(ResultStore(storage), features)
    assert [floor["scores_largest"] for floor in selection.floors] == [0.5]
    assert 0.5 in make_report(selection).summary["noise_floor"].to_pylist()


def test_a_damaged_noise_floor_is_left_out_and_said(storage: Path) -> None:
    features = storage.parent / "features"
    path = noise_floor.write(features, record_of())
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.01"))
    selection = read_selection(ResultStore(storage), features)
    assert selection.floors == () and any("does not match its checksum" in note for note in selection.notes)
    assert isinstance(make_report(selection).board, pa.Table)
