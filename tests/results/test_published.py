"""Printed accuracies: the file is what was read, rows are matched by name, and nothing printed enters our numbers."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean

import pyarrow as pa
import pytest

from methods import all_methods
from pipeline.commands.leaderboard import Options, leaderboard
from pipeline.config.card_files import dataset_card
from pipeline.config.compose import compose
from pipeline.config.files import names
from pipeline.errors import ConfigError
from pipeline.results.latex_tables import to_latex
from pipeline.results.published import EVIDENCE, FILE, ORIGIN, matches, printed, unmatched
from pipeline.results.published.tables import TITLE, counted, html, with_printed
from pipeline.results.report import page
from pipeline.results.store import ResultStore
from pipeline.results.tables import text_table, to_csv, to_json, to_md
from pipeline.sweep.storage_id import new_id, write_id
from tests.support.synthetic import make, report_of

SHARED = Path(__file__).resolve().parents[3] / "shared" / "published.csv"
FORMATS = {"table": text_table, "csv": to_csv, "json": to_json, "md": to_md, "latex": to_latex}
ROWS = [
    make(
        method=method,
        access=access,
        model="rn50",
        dataset=dataset,
        test_set=test_set,
        seed=seed,
        accuracy=accuracy + seed,
        budget_requests=budget,
    )
    for method, access, dataset, test_set, accuracy, budget in (
        ("zero_shot", "TEXT+SCORES", "oxford_pets", "oxford_pets", 80.0, 8000),
        ("craft", "SOFT+SCORES", "oxford_pets", "oxford_pets", 84.0, 8000),
        ("craft", "SOFT+SCORES", "oxford_pets", "oxford_pets", 83.0, 1000),
        ("bbt", "SOFT+SCORES", "oxford_pets", "oxford_pets", 82.0, 8000),
        ("cbbt", "SOFT+FEATURES", "oxford_pets", "oxford_pets", 86.0, 8000),
        ("taskres", "TEXT+FEATURES", "oxford_pets", "oxford_pets", 85.0, 8000),
        ("taskres", "TEXT+FEATURES", "imagenet", "imagenet_a", 22.0, 8000),
    )
    for seed in ((1, 2) if method != "zero_shot" else (1,))
]


@pytest.fixture(scope="module")
def board() -> pa.Table:
    return report_of(ROWS).board


# --- the file ------------------------------------------------------------------------------------------------------


def test_every_row_is_of_known_names_and_says_how_it_is_known() -> None:
    cards, models = set(names("dataset")), set(names("model"))
    for row in printed():
        assert row.evidence in EVIDENCE and row.origin in ORIGIN, row
        assert row.farebox_method in {"", *all_methods()}, row
        assert 0 < row.accuracy < 100 and row.shots >= 0 and row.source and row.paper, row
        assert row.dataset in cards or row.dataset.lower() not in cards, row
        assert row.backbone in models or row.backbone.lower().replace("-", "_").replace("/", "") not in models, row
        assert (row.shots == 0) == row.farebox_method.startswith("zero_shot") or not row.farebox_method, row
    assert {row.dataset for row in printed() if row.farebox_method} >= {
        card for card in cards if dataset_card(card).layout != "parquet"
    }


def test_no_row_of_cbbt_is_there_and_none_of_taskres_is_its_authors() -> None:
    assert not [row for row in printed() if "cbbt" in f"{row.method}{row.farebox_method}".lower()]
    taskres = [row for row in printed() if "taskres" in row.method.lower()]
    assert taskres and {row.origin for row in taskres} <= {"rerun", "others"}
    assert {row.origin for row in taskres if row.paper.startswith("Homology")} == {"rerun"}


def test_the_readme_counts_what_the_file_holds() -> None:
    said = (FILE.parent / "README.md").read_text()
    counts = Counter(row.evidence for row in printed()) + Counter(row.origin for row in printed())
    assert f"holds {len(printed()):,} " in said
    for word, count in counts.items():
        assert re.search(rf"^\| `{word}` \|.*\| {count:,} \|$", said, re.MULTILINE), word


@pytest.mark.parametrize(
    ("method", "shots", "wanted"), [("zero_shot", 0, 58.77), ("bbt", 16, 65.40), ("craft", 16, 71.22)]
)
def test_means_over_eleven_sets_are_those_of_the_readme(method: str, shots: int, wanted: float) -> None:
    found = {
        row.dataset: row.accuracy
        for row in printed()
        if (row.farebox_method, row.backbone, row.shots, row.paper) == (method, "rn50", shots, "CraFT (exp.log)")
    }
    assert len(found) == 11 and mean(found.values()) == pytest.approx(wanted, abs=0.005)


@pytest.mark.parametrize(
    ("method", "backbone", "dataset", "shots", "accuracy"),
    [
        ("craft", "rn50", "sun397", 1, 66.21),
        ("craft", "rn50", "imagenet", 16, 61.33),
        ("craft", "rn50", "imagenet", 16, 61.17),
        ("craft", "vit_b16", "eurosat", 16, 72.07),
        ("craft", "rn50", "eurosat", 16, 75.30),
    ],
)
def test_the_odd_cells_that_the_readme_names_are_there(
    method: str, backbone: str, dataset: str, shots: int, accuracy: float
) -> None:
    assert any(
        (row.farebox_method, row.backbone, row.dataset, row.shots, row.accuracy)
        == (method, backbone, dataset, shots, accuracy)
        for row in printed()
    )


@pytest.mark.skipif(not SHARED.is_file(), reason="the list that this file was made from is not beside this checkout")
def test_the_file_is_the_list_that_was_read_less_what_are_no_accuracies() -> None:
    with SHARED.open(newline="", encoding="utf-8") as file:
        read = [r for r in csv.DictReader(file) if not re.search(r"\b(gain|gap)\b", r["method"])]
    with FILE.open(newline="", encoding="utf-8") as file:
        ours = list(csv.DictReader(file))
    assert [(r["shots"], r["accuracy"]) for r in ours] == [(r["shots"], r["accuracy"]) for r in read]
    for mine, theirs in zip(ours, read, strict=True):
        assert mine["queries"] == theirs["queries"].split(" ")[0]
        assert (mine["evidence"] == "digitised") == theirs["evidence"].startswith("digitised")
    for key in ("dataset", "backbone"):  # one name of ours for each of theirs
        pairs = {(mine[key], theirs[key]) for mine, theirs in zip(ours, read, strict=True)}
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


# --- beside ours ---------------------------------------------------------------------------------------------------


def test_cells_are_matched_by_method_backbone_data_set_and_shots(board: pa.Table) -> None:
    found = matches(board)
    assert {r["method"] for r in found} == {"zero_shot", "craft", "bbt", "taskres"}, "nothing is printed about cbbt"
    for r in found:
        assert (r["printed_backbone"], r["printed_dataset"]) == (r["model"], r["test_set"])
        assert r["ours_minus_printed"] == pytest.approx(r["accuracy"] - r["printed_accuracy"])
    craft = [r for r in found if r["method"] == "craft" and r["printed_paper"] == "CraFT (exp.log)"]
    assert [(r["budget_requests"], r["accuracy"]) for r in craft] == [(1000, 84.5), (8000, 85.5)]
    assert {r["shots"] for r in found if r["method"] == "zero_shot"} == {0}
    once = Counter((r["printed_paper"], r["printed_accuracy"]) for r in found if r["method"] == "zero_shot")
    assert set(once.values()) == {1}, "however often the leaderboard shows it"
    shift = [r for r in found if r["test_set"] == "imagenet_a"]
    assert shift and {(r["method"], r["dataset"], r["printed_origin"]) for r in shift} == {
        ("taskres", "imagenet", "rerun")
    }
    used = {(r["printed_paper"], r["printed_method"], r["printed_dataset"], r["shots"]) for r in found}
    assert unmatched(found) == len(printed()) - len(used)


def test_no_printed_number_enters_ours(board: pa.Table) -> None:
    for form, render in FORMATS.items():
        plain, both = render(board), with_printed(form, render(board), board)
        if form == "json":
            assert json.loads(both)["leaderboard"] == json.loads(plain)
        elif form == "csv":  # one table, to which printed numbers add columns
            names = plain.splitlines()[0].split(",")
            ours = {tuple(row[name] for name in names) for row in csv.DictReader(io.StringIO(both))}
            assert ours == {tuple(row.values()) for row in csv.DictReader(io.StringIO(plain))}
        else:
            assert both.startswith(plain), form
    assert report_of(ROWS).board.equals(board)


def test_each_format_names_the_printed_number_its_source_and_evidence(board: pa.Table) -> None:
    (craft,) = (
        r for r in matches(board) if r["printed_paper"] == "CraFT (exp.log)" and r["label"] == "craft"
        and r["budget_requests"] == 8000
    )  # fmt: skip
    number = f"{craft['printed_accuracy']:.2f}"
    for form, render in FORMATS.items():
        said = with_printed(form, render(board), board)[len(render(board)) if form != "json" else 0 :]
        for word in (number, "CraFT (exp.log)", craft["printed_source"], "read", "authors", "rerun"):
            shown = word.replace("_", r"\_") if form == "latex" and word not in said else word
            assert shown in said, (form, word)
    text = with_printed("table", text_table(board), board).split(TITLE.upper())[1]
    assert max(len(line) for line in text.splitlines() if "github" not in line and "http" not in line) <= 120
    json.loads(with_printed("json", to_json(board), board))
    rows = list(csv.DictReader(io.StringIO(with_printed("csv", to_csv(board), board))))
    assert sum(row["printed_accuracy"] != "" for row in rows) == len(matches(board))
    assert {row["label"] for row in rows} == set(board["label"].to_pylist())
    assert all(row["seeds"].isdigit() for row in rows), "one table with one header row"


def test_the_comparison_says_what_a_printed_number_was_chosen_on() -> None:
    methods = ("tip_adapter_f", "tip_adapter", "craft")
    board = report_of(
        [make(method=m, access="TEXT+FEATURES", model="rn50", dataset="dtd", accuracy=60.0) for m in methods]
    ).board
    chosen = {(r["method"], r["printed_origin"]): r["printed_selects_on"] for r in matches(board)}
    assert chosen["tip_adapter_f", "authors"] == "test" and chosen["tip_adapter_f", "others"] == ""
    assert (chosen["tip_adapter", "authors"], chosen["craft", "authors"]) == ("validation", "nothing")
    text = with_printed("table", text_table(board), board).split(TITLE.upper())[1]
    (head,) = (line for line in text.splitlines() if "sel." in line.split())
    at = head.index("sel.")
    shown = {line[at : at + 4].strip() for line in text.splitlines() if line.endswith("Tip-Adapter (exp.log)")}
    assert shown == {"test", "val"}
    without = with_printed("csv", "", report_of([make()]).board).splitlines()[0].split(",")
    assert "printed_selects_on" in without, "the columns are those of a table with matches"


def test_the_page_has_a_section_of_its_own() -> None:
    plain, text = page(report_of(ROWS)), page(report_of(ROWS), html(report_of(ROWS).board))
    assert 'id="printed"' not in plain
    section = text.split('<details id="printed">')[1].split("</details>")[0]
    assert text.replace(section, "").count("printed_") == 0
    assert section.count("<td class=printed>") > 8 and "CraFT (exp.log)" in section
    assert section.count("<table>") == section.count("</table>") and "run again by others" in section


def test_a_leaderboard_about_nothing_that_is_printed_says_so() -> None:
    board = report_of([make(accuracy=40.0), make(method="craft", access="SOFT+SCORES", accuracy=50.0)]).board
    assert matches(board) == []
    assert counted([]).startswith(f"None of the {len(printed()):,} printed accuracies matches")
    for form, render in FORMATS.items():
        assert with_printed(form, render(board), board)
    assert json.loads(with_printed("json", to_json(board), board))["published"] == []


def test_the_command_appends_them_in_every_format(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for row in ROWS:
        store.write([row])
    write_id(tmp_path, new_id(tmp_path))
    config = compose([f"storage={tmp_path}"])
    for form in (*FORMATS, "html"):
        (plain, _), (both, _) = (leaderboard(config, Options(form, published=p, every=True)) for p in (False, True))
        assert "CraFT (exp.log)" in both and "CraFT (exp.log)" not in plain, form
    with pytest.raises(ConfigError, match="--raw and --published"):
        leaderboard(config, Options("json", raw=True, published=True))
