"""Points of methods by their bills, and the cheapest method near the best."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.console import Terminal
from pipeline.results.ladder import bill_of, budgets, cheapest, cheapest_md, compared, is_complete, points, steps
from pipeline.results.overview import conclusions
from pipeline.results.report import FILES, Report
from pipeline.results.row import ResultRow
from pipeline.results.screen import screen
from tests.support.synthetic import make, report_of

ACCESS = {"gda": "TEXT+FEATURES", "taskres": "TEXT+FEATURES", "craft": "SOFT+SCORES", "logit_head": "TEXT+SCORES"}


def row(
    method: str, budget: int | None, requests: int, images: int, accuracy: float, limit: int | None = None, **more: Any
) -> ResultRow:
    """A row with this bill; `limit`: its allotment in images."""
    bill = {"requests": requests, "adapt_requests": requests, "images": images, "adapt_images": images}
    access = ACCESS.get(method, "TEXT+SCORES")
    own = {"budget_requests": budget, "budget_images": limit, "accuracy": accuracy}
    return make(method=method, access=access, **bill | own | more)


LADDER = [
    row("zero_shot", 32000, 0, 0, 40.0),
    row("logit_head", 32000, 10, 1600, 55.0),
    *(row("craft", n, n, 160 * n, accuracy) for n, accuracy in ((100, 41.0), (1000, 56.5), (32000, 55.5))),
    row("gda", 32000, 3, 1640, 60.0),
    row("gda", 32000, 3, 520, 59.5, limit=600),
    row("gda", 32000, 2, 160, 52.0, limit=300),
    row("taskres", 32000, 2, 1600, 58.0),
]


def records(rows: Sequence[ResultRow] = LADDER) -> list[dict[str, Any]]:
    report = report_of(rows)
    return compared(report.board.to_pylist(), report.summary.to_pylist())


def of(name: str, unit: str, some: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(bill, accuracy) of the points of each method of an access class."""
    found = points([r for r in some if r["access_class"] == name], unit)
    return {label: [(r[unit], r["accuracy"]) for r in line] for label, line in found.items()}


def test_of_equal_bills_the_largest_allotments_result_counts() -> None:
    assert of("features", "requests", records())["gda"] == [(2, 52.0), (3, 60.0)]
    assert of("features", "images", records())["gda"] == [(160, 52.0), (520, 59.5), (1640, 60.0)]
    assert of("scores", "requests", records())["craft"] == [(100, 41.0), (1000, 56.5), (32000, 55.5)]
    assert of("features", "images", records())["zero_shot"] == [(0, 40.0)]  # a reference, in every section


def test_a_reference_has_all_its_points_in_every_class_that_shows_it() -> None:
    limited = [row("logit_head", 32000, 3, 480, 50.0, limit=600), row("logit_head", 32000, 1, 160, 45.0, limit=300)]
    some = records([*LADDER, *limited])
    for name in ("scores", "features"):  # under these limits, only references ran among methods that get scores
        assert of(name, "images", some)["logit_head"] == [(160, 45.0), (480, 50.0), (1600, 55.0)]
    assert "gda" not in of("scores", "images", some) and "craft" not in of("features", "images", some)


def test_a_gain_under_a_small_allotment_is_over_the_reference_that_used_most_of_it() -> None:
    limited = [row("logit_head", 32000, 3, 480, 50.0, limit=600), row("logit_head", 32000, 1, 160, 45.0, limit=300)]
    rows = report_of([*LADDER, *limited]).summary.to_pylist()
    gains = {r["budget_requests"]: r["gain_logit_head"] for r in rows if r["label"] == "craft"}
    # its 10 requests without a limit of images are within 100; results under a limit of images are not comparable
    assert gains == {100: pytest.approx(41.0 - 55.0), 1000: pytest.approx(1.5), 32000: pytest.approx(0.5)}


def test_a_method_that_could_spend_as_much_again_and_does_not_is_complete() -> None:
    complete = {(r["label"], r["budget_requests"], r["budget_images"]): is_complete(r) for r in records()}
    assert complete["gda", 32000, None] and complete["logit_head", 32000, None] and complete["zero_shot", 32000, None]
    assert not complete["gda", 32000, 600] and not complete["craft", 32000, None] and not complete["craft", 100, None]
    (free,) = [r for r in records([row("craft", None, 9, 90, 50.0)]) if r["label"] == "craft"]
    assert is_complete(free)  # it had no limit
    assert (bill_of(free).requests, bill_of(free).images) == (9, 90)


def test_budgets_go_from_the_smallest_bill_to_the_largest() -> None:
    assert list(budgets([0, 3, 984])) == [5, 10, 20, 50, 100, 200, 500, 1000]
    assert list(budgets([1, 1])) == [1] and list(budgets([0])) == [] == list(budgets([]))
    assert list(budgets([2.5, 4e6]))[-1] == 5_000_000


def test_the_cheapest_method_within_a_point_of_the_best() -> None:
    def named(name: str, unit: str) -> dict[int, tuple[str, str, float]]:
        some = [r for r in cheapest(records()) if (r["access_class"], r["unit"]) == (name, unit)]
        return {r["budget"]: (r["best"], r["cheapest"], r["cost"]) for r in some}

    features = named("features", "images")
    assert features[200] == ("gda", "gda", 160)
    assert features[1000] == ("gda", "gda", 520)
    assert features[2000] == ("gda", "gda", 520)  # 60.0 with 1,640 rows is not a point better
    assert max(features) == 2000
    by_requests = named("scores", "requests")
    assert by_requests[10] == ("logit_head", "logit_head", 10) == by_requests[500]
    assert by_requests[1000] == ("craft", "craft", 1000)  # 1.5 points above logit_head
    assert by_requests[50000] == ("craft", "logit_head", 10)  # its largest bill, not its best one, is the best


def test_equal_methods_differ_by_what_they_cost_and_the_dearest_is_never_named() -> None:
    rows = [row("craft", 9000, 900, 900, 50.0), row("bbt", 9000, 800, 1000, 49.0), row("zip", 9000, 700, 700, 48.9)]
    found = {(r["unit"], r["budget"]): r["cheapest"] for r in cheapest(records(rows))}
    assert (found["requests", 1000], found["images", 1000]) == ("bbt", "craft")


def test_data_sets_are_apart_and_a_mean_over_fewer_sets_is_left_out() -> None:
    two = [
        row(method, 8000, bill, bill, accuracy, dataset=name)
        for name, add in (("icons", 0.0), ("digits", 10.0))
        for method, bill, accuracy in (("craft", 900, 60 + add), ("bbt", 10, 50 + 3 * add))
    ]
    alone = row("zip", 8000, 1, 1, 99.0, dataset="icons")
    found = {(r["test_set"], r["cheapest"]) for r in steps(cheapest(records([*two, alone])))}
    assert found == {("all", "bbt"), ("digits", "bbt"), ("icons", "zip")}
    only = records([*two[:2], alone])  # one data set has no mean beside it
    assert {r["test_set"] for r in only} == {"icons"}


def test_rows_on_shift_sets_and_rows_without_a_score_are_not_compared() -> None:
    some = [
        row("craft", 8000, 100, 100, 50.0),
        row("craft", 8000, 100, 100, 90.0, test_set="icons_outline", kind="shift"),
        make(method="bbt", access="SOFT+SCORES", status="failed"),
    ]
    assert {(r["label"], r["accuracy"]) for r in records(some)} == {("craft", 50.0)}


def test_the_files_of_a_report_hold_every_budget_and_each_change() -> None:
    report = report_of(LADDER)
    lines = list(csv.DictReader(io.StringIO(FILES["cheapest.csv"](report))))
    assert [float(r["cost"]) for r in lines] == [r["cost"] for r in cheapest(records())]
    text = FILES["cheapest.md"](report)
    assert "|icons|16|features|500 image rows|gda|160|52.0|gda 52.0|" not in text  # nothing changes there
    assert "|icons|16|scores|1,000 requests|craft|1,000|56.5|craft 56.5|" in text
    assert text.count("\n|icons|") == len(steps(cheapest(records())))
    empty = report_of([])
    assert FILES["cheapest.csv"](empty).startswith("model,") and FILES["cheapest.csv"](empty).count("\n") == 1
    assert cheapest_md([]).count("\n") == 1


def by_budget(report: Report) -> dict[str, dict[str, float | None]]:
    """The accuracy of each method in each column of the overview."""
    view = report.overview("budget")
    assert view is not None
    return {
        line.main["label"]: {c: r and r["accuracy"] for c, r in zip(view.columns, line.records, strict=True)}
        for line in view.lines
    }


def test_the_overview_by_budget_shows_a_method_wherever_its_bill_fits() -> None:
    found = by_budget(report_of(LADDER))
    assert found["taskres"] == {
        **dict.fromkeys(("100 requests", "1,000 requests", "32,000 requests"), 58.0),
        **dict.fromkeys(("32,000 req, 300 im", "32,000 req, 600 im"), None),
    }
    assert found["gda"] == {
        **dict.fromkeys(("100 requests", "1,000 requests", "32,000 requests"), 60.0),
        "32,000 req, 300 im": 52.0,
        "32,000 req, 600 im": 59.5,
    }
    assert found["craft"]["100 requests"] == 41.0 and found["craft"]["32,000 req, 600 im"] is None


def test_the_overview_by_budget_names_the_cheapest_methods() -> None:
    view = report_of(LADDER).overview("budget")
    assert view is not None
    told = [text for text in conclusions(view) if text.startswith("Cheapest")]
    assert told == [
        "Cheapest within 1 point of the best: with scores logit_head from 10 requests or 1,600 image rows, "
        "craft from 1,000 requests or 160,000 image rows, logit_head from 32,000 requests or 5,120,000 image rows; "
        "with features taskres from 2 requests, gda from 3 requests; or gda from 160 image rows."
    ]
    text = screen(view, Terminal(120), title="ladder")
    assert "Cheapest within 1 point" in " ".join(text.split())


@pytest.mark.parametrize("axis", ["dataset", "access"])
def test_other_overviews_show_a_method_only_where_it_ran(axis: str) -> None:
    view = report_of(LADDER).overview(axis)
    assert view is not None and not any("Cheapest" in text for text in conclusions(view))
