"""What is shown beside a mean: an interval for three or more seeds, the range for two, nothing for one."""

from __future__ import annotations

import pytest

from pipeline.results.spread import Spread, estimate, excludes_zero, spread
from pipeline.results.stats import mean_ci95
from tests.support.synthetic import make, report_of


def record(*accuracies: float) -> dict[str, object]:
    """The record of a method with these accuracies, one per seed, on the leaderboard; zero-shot has 40."""
    rows = [make(accuracy=40.0)]
    rows += [make(method="craft", access="SOFT+SCORES", seed=i + 1, accuracy=a) for i, a in enumerate(accuracies)]
    return next(r for r in report_of(rows).board.to_pylist() if r["method"] == "craft")


def test_two_seeds_have_their_range_and_three_an_interval() -> None:
    two, three = spread(record(50.0, 58.0), "accuracy"), spread(record(50.0, 58.0, 54.0), "accuracy")
    assert two is not None and (two.low, two.high) == pytest.approx((50.0, 58.0)) and not two.is_interval
    half_width = mean_ci95([50.0, 58.0, 54.0])[1]
    assert three == Spread(pytest.approx(54.0 - half_width), pytest.approx(54.0 + half_width), True)
    assert spread(record(50.0), "accuracy") is None


def test_a_range_is_read_from_the_columns_that_hold_it() -> None:
    known = {"seeds": 2, "accuracy": 54.0, "accuracy_ci95": None, "accuracy_min": 50.0, "accuracy_max": 58.0}
    assert spread(known, "accuracy") == Spread(50.0, 58.0, False)


def test_estimates_as_text() -> None:
    assert estimate(record(50.0, 58.0), "accuracy") == "54.0 (50.0 to 58.0)"
    assert estimate(record(50.0, 50.0), "accuracy") == "50.0" == estimate(record(50.0), "accuracy")
    assert estimate(record(50.0, 58.0), "gain_zero_shot", "+") == "+14.0 (+10.0 to +18.0)"
    assert estimate(record(50.0, 51.0, 52.0), "accuracy").startswith("51.0 ± 2.")
    assert estimate({}, "accuracy") == "-"


def test_only_an_interval_can_exclude_zero() -> None:
    assert not excludes_zero(record(50.0, 50.1), "gain_zero_shot")
    assert excludes_zero(record(50.0, 50.1, 50.2), "gain_zero_shot")
    assert not excludes_zero(record(30.0, 50.1, 45.2), "gain_zero_shot")
    assert excludes_zero(record(30.0, 30.1, 30.2), "gain_zero_shot")
