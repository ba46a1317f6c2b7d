"""What people and scripts are shown: it fits, it adds up, it says what is missing."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.results.identity import select
from pipeline.results.latex_tables import to_latex
from pipeline.results.palette import COLOURS, colour
from pipeline.results.report import page, report_files
from pipeline.results.row import to_table
from pipeline.results.tables import raw_records, text_table, to_csv, to_json, to_md
from tests.support.synthetic import METHODS, base_to_new, make, report_of, sweep, write_store

FIRST_COLUMNS = [
    *("trial_id", "method", "dataset", "shots", "seed", "model", "status", "test_set", "accuracy", "requests"),
    *("images", "prompts", "outputs", "evaluate_requests", "seconds", "trainable_params", "client_bytes"),
]


@pytest.fixture(scope="module")
def rows() -> pa.Table:
    return to_table([row for trial in sweep() for row in trial])


@pytest.fixture(scope="module")
def small() -> pa.Table:
    return to_table([r for t in sweep(shots=(16,), budgets=((8000, None),), methods=("zero_shot", "craft")) for r in t])


def test_text_fits_120_columns_and_heads_each_access_class(rows: pa.Table) -> None:
    for table in (report_of(rows).board, report_of(rows).summary):
        text = text_table(table)
        assert max(map(len, text.splitlines())) <= 120
        assert [line for line in text.splitlines() if line.startswith(("SCORES", "FEATURES"))] == [
            "SCORES  (SOFT+SCORES)",
            "FEATURES  (FEATURES, SOFT+FEATURES, TEXT+FEATURES)",
        ]
    assert "mean of 3 data sets, 16 shots, allotment 8,000 requests, tiny fp32" in text


def test_text_shows_gain_interval_bill_and_aligned_columns(small: pa.Table) -> None:
    lines = text_table(report_of(small).summary).splitlines()
    head = next(i for i, line in enumerate(lines) if line.lstrip().startswith("method"))
    craft = lines[head + 1]
    record = next(r for r in report_of(small).summary.to_pylist() if r["method"] == "craft" and r["kind"] == "source")
    assert f"+{record['gain_zero_shot']:.1f} ± {record['gain_zero_shot_ci95']:.1f}" in craft
    assert craft.endswith("1,280,000") and "8,000" in craft
    for name in ("accuracy", "requests", "images"):
        end = lines[head].index(name) + len(name)
        assert craft[end - 1] != " " and (len(craft) == end or craft[end] == " ")


def test_text_says_what_did_not_finish_and_cuts_long_names() -> None:
    long = "a_method_with_a_name_that_no_table_should_have_to_hold_but_some_variant_will"
    mine = [make(seed=s, method=long, access="SOFT+SCORES", accuracy=50.0) for s in (1, 2, 3)]
    mine += [make(seed=4, method=long, access="SOFT+SCORES", accuracy=30.0, status="budget_exhausted")]
    mine += [make(seed=5, method=long, access="SOFT+SCORES", status="failed", error="lost")]
    text = text_table(report_of([make(accuracy=40.0), *mine]).board)
    assert f"! {long}: 1 budget exhausted (30.0), 1 failed\n" in text and "…" in text
    assert max(map(len, text.splitlines())) <= 120
    assert text_table(report_of([]).board) == "no finished trials\n"
    assert "-" in text_table(report_of([make(status="unfunded")]).board)


def test_csv_and_json_hold_every_column_at_full_precision(rows: pa.Table) -> None:
    table = report_of(rows).board
    read = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(read) == table.num_rows and list(read[0]) == table.column_names
    assert float(read[0]["accuracy"]) == table["accuracy"][0].as_py()
    assert json.loads(to_json(table)) == table.to_pylist()
    assert to_csv([]).startswith("trial_id,") and json.loads(to_json([])) == []


def test_markdown_and_latex_are_tables(small: pa.Table) -> None:
    md = to_md(report_of(small).summary)
    assert md.count("|method|") == 2 and "|---|---:|" in md and "|zero_shot (ref)|" in md
    widths = {line.count("|") for line in md.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    tex = to_latex(report_of(small).summary)
    assert tex.count(r"\begin{tabular}{lrrrrrrl}") == tex.count(r"\bottomrule") == 2
    assert r"zero\_shot" in tex and "±" not in tex


def test_raw_has_one_record_for_each_trial_and_test_set_the_source_first(rows: pa.Table) -> None:
    records = raw_records(select(rows))
    assert len(records) == rows.num_rows and list(records[0])[: len(FIRST_COLUMNS)] == FIRST_COLUMNS
    assert len({(r["trial_id"], r["test_set"]) for r in records}) == len(records)
    seen: set[str] = set()
    for r in records:
        assert (r["trial_id"] in seen) == (r["test_set"] != r["dataset"])
        seen.add(r["trial_id"])
    assert raw_records(select(rows.take(np.random.default_rng(0).permutation(rows.num_rows)))) == records


def test_base_to_new_is_one_table_with_base_new_and_their_harmonic_mean() -> None:
    rows = base_to_new("zero_shot", "bbt", "cbbt")
    for table, where in (
        (report_of(rows).board, "icons, base-to-new"),
        (report_of(rows).summary, "mean of 2 data sets, base-to-new"),
    ):
        text = text_table(table)
        assert f"{where}, 16 shots" in text and "H is the harmonic\nmean" in text
        assert max(map(len, text.splitlines())) <= 120
        line = next(line for line in text.splitlines() if line.lstrip().startswith("bbt"))
        assert " ".join(line.split()[1:]) == "5 73.0 ± 2.0 43.0 ± 2.0 54.1 ± 2.1 +3.0 ± 2.0 +3.2 ± 2.1 0 0"
        assert r"bbt & 5 & 73.0 $\pm$ 2.0 & 43.0 $\pm$ 2.0 & 54.1 $\pm$ 2.1 &" in to_latex(table)
        assert "|bbt|5|73.0 ± 2.0|43.0 ± 2.0|54.1 ± 2.1|" in to_md(table)
        assert {r["kind"] for r in json.loads(to_json(table))} == {"base", "new", "harmonic"}
    text = page(report_of(rows))
    for head in ("base", "base gain", "new", "new gain", "H", "H gain"):
        assert f">{head}</th>" in text
    assert '">54.1 ± 2.1</td>' in text and "accuracy</th>" not in text
    assert set(report_of(rows).figures) == {"main_gain_over_zero_shot", "gain_over_zero_shot", "average_ranks"}
    assert "H is the harmonic" not in text_table(report_of([make(accuracy=1.0)]).board)


def test_a_base_to_new_trial_without_new_classes_has_a_line_all_the_same() -> None:
    lost = [make(kind="base", test_set="icons:base", status="failed", error="lost")]
    assert "! zero_shot (ref): 1 failed" in text_table(report_of(lost).board)
    assert "1 failed" in page(report_of(lost))


def test_a_method_has_one_colour_of_its_own_everywhere() -> None:
    assert set(COLOURS) == set(METHODS) and len(set(COLOURS.values())) == len(COLOURS)
    assert colour("mine") == colour("mine") and colour("mine") not in COLOURS.values()


def test_a_report_is_all_its_files_with_intervals_from_predictions(tmp_path: Path) -> None:
    store = write_store(tmp_path, methods=("zero_shot", "craft"), shots=(16,), seeds=(1, 2), budgets=((8000, None),))
    files = report_files(report_of(store.read(), store.read_predictions, title="Demo"))
    assert {"leaderboard.html", "leaderboard.csv", "leaderboard.json", "trials.csv", "summary.csv"} <= set(files)
    assert {name for name in files if name.startswith("figures/")} >= {"figures/gain_over_zero_shot.png"}
    crafts = [r for r in json.loads(files["leaderboard.json"]) if r["method"] == "craft"]
    for r in crafts:
        assert r["gain_zero_shot_low"] < r["gain_zero_shot"] < r["gain_zero_shot_high"]
    empty = report_files(report_of([]))
    assert b"0 trials (none)" in empty["leaderboard.html"]
