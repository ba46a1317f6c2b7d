"""Filters, axes and formats of `farebox leaderboard`."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from pipeline.commands.leaderboard import Options, leaderboard, of_words
from pipeline.errors import ConfigError
from pipeline.sweep.storage_id import new_id, write_id
from tests.support.synthetic import write_store
from tests.support.tex import assert_compiles


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("filters")
    write_store(folder, shots=(4, 16), seeds=(1, 2, 3), methods=("zero_shot", "logit_head", "craft", "bbt", "taskres"))
    write_id(folder, new_id(folder))
    return f"storage={folder}"


def board(storage: str, *words: str, **options: object) -> str:
    config, only = of_words([storage, *words])
    return leaderboard(config, Options(**options), only)[0]  # type: ignore[arg-type]


def records(storage: str, *words: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(board(storage, *words, form="json"))
    return found


def test_filters_select_the_records_and_keep_their_gains(storage: str) -> None:
    everything = records(storage)
    some = records(storage, "methods=craft,bbt", "shots=16", "budget.requests=8000")
    assert {(r["method"], r["shots"], r["budget_requests"]) for r in some} == {("craft", 16, 8000), ("bbt", 16, 8000)}
    cell = ("access_class", "label", "test_set", "shots", "budget_requests")
    for record in some:  # of all methods, the gains are the same
        (same,) = (r for r in everything if all(r[k] == record[k] for k in cell))
        assert record["gain_zero_shot"] == same["gain_zero_shot"] is not None
        assert record["gain_logit_head"] == same["gain_logit_head"] is not None


def test_methods_that_fit_into_the_budget_under_other_allotments_are_named(tmp_path: Path) -> None:
    write_store(tmp_path, seeds=(1,), methods=("zero_shot", "logit_head", "craft", "taskres"), budgets=((8000, None),))
    write_store(tmp_path, seeds=(1,), methods=("craft",), budgets=((1000, None),))
    write_id(tmp_path, new_id(tmp_path))
    shown = board(f"storage={tmp_path}", "budget.requests=1000")
    assert "! --by budget also has, within this budget: taskres" in shown.splitlines()
    assert "logit_head (ref)" in shown  # a reference is shown anyway
    assert "within this budget" not in board(f"storage={tmp_path}", "budget.requests=8000")


def test_seeds_data_sets_and_models_filter_too(storage: str) -> None:
    assert {r["seeds"] for r in records(storage, "seeds=2,3")} == {2}
    assert {r["test_set"] for r in records(storage, "datasets=icons")} == {"icons", "icons_outline"}
    assert records(storage, "model=tiny") == records(storage)


def test_raw_rows_are_filtered(storage: str) -> None:
    rows = json.loads(board(storage, "methods=craft", "seeds=1", raw=True, form="json"))
    assert {(r["method"], r["seed"]) for r in rows} == {("craft", 1)}


def test_the_leader_is_one_of_the_methods_shown(storage: str) -> None:
    leaders = {r["method"] for r in records(storage, "methods=craft,bbt") if r["leader"]}
    assert leaders and leaders <= {"craft", "bbt"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["shots=2"], "no results match shots=2; the storage has shots: 4,16"),
        (["methods=crafts"], "no results match methods=crafts; the storage has methods: bbt,craft,"),
        (["budget.images=5"], "the storage has budget.images: null"),
        (["views=2"], "views does not filter a leaderboard"),
        (["seed=2"], "seed does not filter a leaderboard: no filter named 'seed'; did you mean 'seeds'"),
    ],
)
def test_what_selects_nothing_is_an_error_that_says_what_there_is(storage: str, words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        board(storage, *words)


def test_where_data_lies_is_no_filter(storage: str) -> None:
    assert board(storage, "data.root=/data", form="json") == board(storage, form="json")


def test_options_that_contradict_each_other_are_refused(storage: str) -> None:
    for options in ({"by": "seed"}, {"by": "dataset", "raw": True}, {"by": "dataset", "form": "html"}):
        with pytest.raises(ConfigError):
            board(storage, **options)


def test_the_table_for_a_paper_has_bold_winners_a_label_and_fits_the_text_width(storage: str, tmp_path: Path) -> None:
    tex = board(storage, form="latex")
    assert tex == board(storage, by="dataset", form="latex")
    assert "1,000" not in tex and "8,000 requests (largest of 2 allotments)" in tex
    for part in (r"\label{tab:synthetic-dataset}", r"\toprule", r"\caption{", r"\textwidth", r"\textbf{"):
        assert part in tex
    rows = [line for line in tex.splitlines() if line.endswith(r" \\") and "multicolumn" not in line]
    assert {row.count("&") for row in rows} == {8}  # mean, three data sets, two shift sets, requests, images
    assert not re.search(r"(?<![$\w])-\d", tex)
    best: dict[int, tuple[float, bool]] = {}
    for line in [*tex.splitlines(), "multicolumn"]:
        if "multicolumn" in line:  # a group has ended: its best are bold
            assert all(bold for _, bold in best.values())
            best = {}
        elif line in rows and not line.startswith(("Method", "zero")):
            for i, cell in enumerate(line.removesuffix(r" \\").split(" & ")[1:-2]):
                value = float(re.search(r"[\d.]+", cell)[0])  # type: ignore[index]
                best[i] = max(best.get(i, (value, False)), (value, "textbf" in cell))
    md = board(storage, form="md")
    assert md == board(storage, by="dataset", form="md") != board(storage, every=True, form="md")
    assert {line.count("|") for line in md.splitlines() if line.startswith("|")} == {10} and "**" in md
    assert_compiles(tex, tmp_path)


def test_csv_files_load_in_pandas_with_one_header_row(storage: str) -> None:
    for options in ({}, {"published": True}, {"by": "shots"}, {"raw": True}):
        frame = pd.read_csv(io.StringIO(board(storage, form="csv", **options)))
        assert set(frame["method"]) >= {"craft", "taskres", "zero_shot"}, options
        assert frame.select_dtypes("number").shape[1] > 5, options
    by_shots = list(csv.DictReader(io.StringIO(board(storage, by="shots", form="csv"))))
    assert float(by_shots[0]["16 shots accuracy"]) > 0


def test_everything_is_shown_with_all(storage: str) -> None:
    text = board(storage, every=True)
    assert text.count("allotment 1,000 requests") == text.count("allotment 8,000 requests") == 20
    assert "± 95%" not in board(storage, "methods=craft", "shots=4", every=True)


def test_a_filtered_view_has_no_label(tmp_path: Path, storage: str) -> None:
    assert board(storage, "shots=4").splitlines()[0].startswith("synthetic: ")
