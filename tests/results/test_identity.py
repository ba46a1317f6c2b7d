"""Which rows stand side by side: never two that differ in what affects a number, and what is left out is named."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.leaderboard import Options, leaderboard
from pipeline.config.compose import compose
from pipeline.errors import DamagedFile
from pipeline.results.comparison import missing_references
from pipeline.results.identity import IDENTITY, SHARED, select
from pipeline.results.row import ResultRow, to_table
from pipeline.results.runs import RunRecord, add_run, read_runs
from pipeline.results.tables import raw_records, text_table
from pipeline.sweep import driver as sweep
from tests.support.lab import Lab
from tests.support.synthetic import METHODS, make, report_of

OLD, NEW = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"


def trial(method: str, seed: int = 1, **changes: Any) -> ResultRow:
    """One row, whose trial id tells it from all others."""
    changes = {"access": METHODS[method][0], "accuracy": 50.0, "created": OLD} | changes
    row = make(method=method, seed=seed, **changes)
    return replace(row, trial_id=hashlib.sha256(repr(row).encode()).hexdigest()[:16])


def record(rows: list[ResultRow], runs: RunRecord | None = None, **where: Any) -> dict[str, Any]:
    """The one record of a leaderboard."""
    found = report_of(select(to_table(rows), runs)).board.to_pylist()
    (one,) = [r for r in found if all(r[key] == value for key, value in where.items())]
    return one


# --- what is left out ----------------------------------------------------------------------------------------------


def test_rows_of_one_identity_are_all_shown_and_nothing_is_said() -> None:
    rows = [trial(m, seed) for m in ("zero_shot", "craft") for seed in (1, 2)]
    selection = select(to_table(rows))
    assert selection.rows.num_rows == 4 and not selection.left_out and not selection.notes


@pytest.mark.parametrize("column", [column.name for column in IDENTITY])
def test_a_row_that_differs_in_what_affects_a_number_is_neither_averaged_nor_paired(column: str) -> None:
    first, other = (1, 2) if column == "method_version" else ("one {}", "another {}")
    old = [trial(m, 1, accuracy=a, **{column: first}) for m, a in (("craft", 90.0), ("zero_shot", 80.0))]
    new = [trial("craft", 2, accuracy=50.0, created=NEW, **{column: other})]
    rows, selection = [*old, *new], select(to_table([*old, *new]))
    craft = record(rows, method="craft")
    assert (craft["seeds"], craft["accuracy"], craft["gain_logit_head"]) == (1, 50.0, None)
    assert old[0].trial_id in {trial_id for trial_id, _ in selection.left_out}
    if column in (*SHARED, "local_digest"):  # the method's own code and version are not shared with its reference
        assert craft["gain_zero_shot"] is None
        assert "left out: 2 rows of icons (craft, zero_shot): different" in selection.notes[0]
        assert "2 of them have no current result: run the same command" in selection.notes[0]
        assert "no gain over zero_shot for craft" in missing_references(report_of(selection).board)[0]
    else:
        assert craft["gain_zero_shot"] == -30.0
    text = next(c.text for c in IDENTITY if c.name == column)
    assert text in selection.notes[0]
    assert selection.notes[0] in text_table(report_of(selection).summary, selection.notes).replace("\n  ", " ")
    marks = {r["trial_id"]: r["left_out"] for r in raw_records(selection)}
    assert marks[old[0].trial_id] and not marks[new[0].trial_id]


def test_a_template_is_shown_as_it_was_and_as_it_is() -> None:
    rows = [trial("craft", template="an icon of a {}"), trial("craft", 2, template="a drawing of a {}", created=NEW)]
    (note,) = select(to_table(rows)).notes
    assert "different template ('an icon of a {}', now 'a drawing of a {}')" in note


def test_rows_of_an_older_farebox_are_not_mixed_with_rows_that_state_their_data() -> None:
    rows = [trial("craft"), trial("craft", 2, data_digest="d", code_digest="c", created=NEW)]
    (note,) = select(to_table(rows)).notes
    assert "not recorded: Farebox code, data" in note
    assert record(rows)["seeds"] == 1


def number(values: dict[str, Any]) -> float:
    """An accuracy that belongs to these values."""
    return float(zlib.crc32(json.dumps(sorted(values.items())).encode()) % 97)


@pytest.mark.parametrize("seed", range(20))
def test_no_mean_and_no_pair_mixes_identities_whatever_a_storage_holds(seed: int) -> None:
    """Accuracy is a function of the identity here, so that a mean has no spread and a gain is 0, or they mix."""
    rng, rows = random.Random(seed), []
    names = [c.name for c in IDENTITY if c.name not in ("method_version", "method_digest")]
    for i in range(120):
        varied = {name: rng.choice("ab") for name in rng.sample(names, 2)}
        code = {"method_version": rng.choice((1, 2)), "views": rng.choice(("5", "10")), "validation": rng.choice("xy")}
        method = rng.choice(("zero_shot", "logit_head", "craft", "bbt"))
        settings = code if method not in ("zero_shot",) else {}
        measured = {"accuracy": number(varied), "macro_accuracy": number(varied | settings)}
        dataset, kind = rng.choice((("icons", "source"), ("digits", "source"), ("icons", "base")))
        rows.append(
            trial(
                method,
                rng.randrange(5),
                **varied | settings | measured | {"dataset": dataset, "kind": kind, "test_set": f"{dataset}{kind}"},
                created=f"2026-01-01T00:{i // 60:02d}:{i % 60:02d}+00:00",
            )
        )
    runs = RunRecord(3, False, {row.trial_id: rng.randrange(4) for row in rows})
    for selected in (select(to_table(rows)), select(to_table(rows), runs)):
        assert selected.rows.num_rows + len(selected.left_out) == len(rows)
        for board in (report_of(selected).board, report_of(selected).summary):
            for r in board.to_pylist():
                if r["dataset"] != "all":
                    assert not r["accuracy_ci95"] and r["macro_accuracy"] in {None, *(x.macro_accuracy for x in rows)}
                assert r["gain_zero_shot"] in (None, 0.0) or r["dataset"] == "all"
                assert r["gain_logit_head"] in (None, 0.0) or r["dataset"] == "all"


def test_a_trial_without_a_score_is_counted_although_it_states_no_preprocessing() -> None:
    rows = [trial("craft"), trial("craft", 2, status="failed", accuracy=None, transform="", created=NEW, error="lost")]
    assert (record(rows)["seeds"], record(rows)["failed"]) == (1, 1) and not select(to_table(rows)).notes


def test_of_one_cell_the_newest_trial_counts_and_the_other_is_named() -> None:
    rows = [trial("craft", accuracy=1.0), trial("craft", accuracy=2.0, created=NEW)]
    assert record(rows)["accuracy"] == 2.0
    assert select(to_table(rows)).notes == (
        "left out: 1 row of icons (craft): replaced by a newer trial of the same cell",
    )


def test_base_to_new_has_other_class_names_than_a_fit_on_all_classes() -> None:
    rows = [
        trial("bbt", kind="source", classnames_digest="all"),
        trial("bbt", kind="base", test_set="icons:base", classnames_digest="half", created=NEW),
    ]
    assert not select(to_table(rows)).left_out


def test_mixed_machines_are_mentioned_in_one_line_and_not_left_out() -> None:
    rows = [trial("craft", cpu="A", torch_version="2.1"), trial("craft", 2, cpu="B", torch_version="2.2")]
    (note,) = select(to_table(rows)).notes
    assert note.startswith("mixed environments") and "CPU A (1 row), B (1 row); torch 2.1 (1 row), 2.2 (1 row)" in note
    assert record(rows)["seeds"] == 2


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_restored_card_makes_the_earlier_rows_current_again() -> None:
    a = [trial(m, template="A {}", accuracy=x) for m, x in (("zero_shot", 10.0), ("craft", 20.0))]
    b = [trial(m, template="B {}", accuracy=x, created=NEW) for m, x in (("zero_shot", 30.0), ("craft", 70.0))]
    first, second = [row.trial_id for row in a], [row.trial_id for row in b]
    edited = RunRecord(2, False, dict.fromkeys(first, 1) | dict.fromkeys(second, 2))
    assert record([*a, *b], edited, method="craft")["gain_zero_shot"] == 40.0
    restored = RunRecord(3, False, dict.fromkeys(first, 3) | dict.fromkeys(second, 2))
    assert record([*a, *b], restored, method="craft")["gain_zero_shot"] == 10.0
    (note,) = select(to_table([*a, *b]), restored).notes
    assert note == "left out: 2 rows of icons (craft, zero_shot): different template ('B {}', now 'A {}')"


def test_runs_with_other_methods_leave_each_others_rows_current() -> None:
    rows = [trial("zero_shot", accuracy=40.0), trial("craft", accuracy=60.0, created=NEW)]
    runs = RunRecord(2, False, {rows[0].trial_id: 1, rows[1].trial_id: 2})
    assert record(rows, runs, method="craft")["gain_zero_shot"] == 20.0


def test_results_that_a_run_kept_are_shown_and_marked_but_not_paired_with_the_present_code() -> None:
    rows = [
        trial("zero_shot", code_digest="old"),
        trial("craft", 1, code_digest="old", method_digest="old", accuracy=60.0),
        trial("craft", 2, code_digest="new", accuracy=70.0, created=NEW),
    ]
    ids = [row.trial_id for row in rows]
    kept = record(rows, RunRecord(2, True, dict.fromkeys(ids, 2)), method="craft")
    assert (kept["seeds"], kept["sources"], kept["gain_zero_shot"], kept["gain_zero_shot_pairs"]) == (2, 2, 10.0, 1)
    text = text_table(report_of(select(to_table(rows), RunRecord(2, True, dict.fromkeys(ids, 2)))).board)
    assert "! craft: 2 code versions, over zero_shot: 1 of 2 seeds" in text
    rerun = record(rows, RunRecord(3, False, dict.fromkeys(ids, 3)), method="craft")
    assert (rerun["seeds"], rerun["sources"], rerun["gain_zero_shot"]) == (1, 1, None)


def test_trials_of_the_last_run_without_a_result_are_counted() -> None:
    row = trial("craft")
    (note,) = select(to_table([row]), RunRecord(2, False, {row.trial_id: 2, "b": 2, "c": 1})).notes
    assert note == "1 trial of the last run has no result yet: run the same command again"


def test_the_record_of_runs_grows_and_its_damage_is_named(tmp_path: Path) -> None:
    lines: list[str] = []
    assert read_runs(tmp_path) == RunRecord()
    add_run(tmp_path, ["a", "b"], False, lines.append)
    add_run(tmp_path, ["b", "c"], True, lines.append)
    assert read_runs(tmp_path) == RunRecord(2, True, {"a": 1, "b": 2, "c": 2})
    assert read_runs(tmp_path).last == ["b", "c"] and not lines
    path = tmp_path / "plan.json"
    content = path.read_bytes()
    for damaged in (content[:-9], content.replace(b'"a": 1', b'"a": 2'), b"", b"{}", b"\xff" * 9):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=r"plan\.json is damaged: .*run the farebox run command"):
            read_runs(tmp_path)
    add_run(tmp_path, ["b"], False, lines.append)
    assert read_runs(tmp_path).trials == {"b": 1} and "was damaged" in lines[0]


def test_a_card_edited_and_restored_shows_the_numbers_of_the_card_that_stands_there(lab: Lab) -> None:
    first = lab.card.read_text()

    def measure() -> dict[str, Any]:
        """Run what is missing, then the sweep, which finds nothing to run and needs no Ray."""
        for spec in lab.plan("methods=[zero_shot]", "views=2").trials:
            if not lab.store.rows_of(spec.trial_id):
                lab.run(spec)
        config = compose([*lab.words, "methods=[zero_shot]", "views=2"])
        sweep.run(config, lambda line: None, lambda rows: None)
        notes: list[str] = []
        text, _ = leaderboard(config, Options("json"), log=notes.append)
        (board,) = json.loads(text)
        return board | {"notes": notes}

    try:
        original = measure()
        lab.card.write_text(first.replace("an icon of a {}.", "{} {}".format("zzz", "{}"), 1))
        edited = measure()
        lab.card.write_text(first)
        restored = measure()
    finally:
        lab.card.write_text(first)
    assert edited["accuracy"] != original["accuracy"] == restored["accuracy"]
    assert (
        not original["notes"]
        and "different template" in edited["notes"][0]
        and "different template" in restored["notes"][0]
    )


# --- settings of a run ---------------------------------------------------------------------------------------------


def test_a_second_number_of_views_does_not_split_what_uses_none() -> None:
    rows = [trial("zero_shot", views=v, accuracy=40.0) for v in ("", "10", "5")]
    for views, head in (("5", 50.0), ("10", 52.0)):
        rows += [trial("logit_head", views=views, accuracy=head), trial("craft", views=views, accuracy=head + 1)]
    rows += [trial("linear_probe", views="", accuracy=60.0, access="TEXT+SCORES")]
    for views in ("5", "10"):
        craft = record(rows, label=f"craft views={views}")
        assert (craft["gain_zero_shot_pairs"], craft["gain_logit_head"]) == (1, 1.0)
    board = report_of(rows).board
    assert [r["label"] for r in board.to_pylist() if r["method"] == "zero_shot"] == ["zero_shot"]
    assert record(rows, method="linear_probe")["gain_zero_shot"] == 20.0
    assert record(rows, method="linear_probe")["gain_logit_head"] is not None


def test_a_reference_of_another_validation_rule_or_draw_is_no_partner() -> None:
    craft = trial("craft", validation="none", accuracy=60.0)
    assert record([craft, trial("logit_head")], method="craft")["gain_logit_head"] is None
    assert record([craft, trial("zero_shot")], method="craft")["gain_zero_shot"] == 10.0
    other_draw = [trial("craft", accuracy=60.0), trial("logit_head", split_digest="x")]
    assert record(other_draw, method="craft")["gain_logit_head"] is None


def test_imbalanced_rows_are_named_and_neither_averaged_nor_paired_with_balanced_ones() -> None:
    other = {"draw": "imbalanced", "split_digest": "x"}
    alone = [trial("zero_shot", accuracy=40.0), trial("craft", accuracy=60.0, **other)]
    assert record(alone, label="craft imbalanced")["gain_zero_shot"] == 20.0
    both = [*alone, trial("craft", accuracy=70.0), trial("logit_head", accuracy=50.0)]
    found = {r["label"]: (r["accuracy"], r["gain_logit_head"]) for r in report_of(both).board.to_pylist()}
    assert found["craft imbalanced"] == (60.0, None)
    assert found["craft"] == (70.0, 20.0)
    paired = [*both, trial("logit_head", accuracy=55.0, **other)]
    assert record(paired, label="craft imbalanced")["gain_logit_head"] == 5.0


def test_a_mean_over_data_sets_holds_one_configuration_or_says_so() -> None:
    def craft(dataset: str, popsize: int, hparams: str) -> ResultRow:
        return trial("craft", dataset=dataset, hparams=hparams, config=json.dumps({"popsize": popsize}))

    changed = [craft("icons", 20, "default"), craft("digits", 40, "default")]
    assert {r["label"]: r["datasets"] for r in report_of(changed).summary.to_pylist()} == {
        "craft popsize=20": 1,
        "craft popsize=40": 1,
    }
    paper = [craft("icons", 20, "paper"), craft("digits", 40, "paper")]  # settings of each data set
    assert {r["label"]: r["datasets"] for r in report_of(paper).summary.to_pylist()} == {"craft": 2}


def test_methods_that_use_no_views_have_one_trial_whatever_views_is(lab: Lab) -> None:
    for method in ("zero_shot", "zero_shot_ensemble", "pixel_nn", "linear_probe"):
        specs = [lab.spec(method, f"views={views}") for views in ("2", "5", "fresh", "0")]
        assert len({spec.trial_id for spec in specs}) == 1 and {spec.views for spec in specs} == {0}
    assert lab.spec("logit_head", "views=2").trial_id != lab.spec("logit_head", "views=5").trial_id
    (row,) = lab.run(lab.spec("pixel_nn", "views=fresh"))
    assert row.views == ""
