"""The leaderboard's numbers against worked values, and its rules about what may be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats as reference

from methods.base import Bill
from pipeline.budget import Phase, row_columns
from pipeline.errors import DataError
from pipeline.results.comparison import access_class
from pipeline.results.leaderboard import SCHEMA
from pipeline.results.predictions import Predictions
from pipeline.results.row import ResultRow, to_table
from pipeline.results.stats import harmonic, mean_ci95, ranks, resampled_means
from tests.support.synthetic import DATASETS, METHODS, make, report_of, sweep

ZERO, HEAD, CRAFT = [40.0] * 5, [51.0, 52.0, 53.0, 54.0, 55.0], [50.0, 52.0, 54.0, 56.0, 58.0]
ACCESS = {name: access for name, (access, _) in METHODS.items()}


def seeds(method: str, accuracies: Sequence[float], **changes: Any) -> list[ResultRow]:
    named = {"method": method, "access": ACCESS.get(method, "SOFT+SCORES")} | changes
    return [make(seed=i, accuracy=a, **named) for i, a in enumerate(accuracies, 1)]


def trio(**changes: Any) -> list[ResultRow]:
    return [
        row for m, a in (("zero_shot", ZERO), ("logit_head", HEAD), ("craft", CRAFT)) for row in seeds(m, a, **changes)
    ]


def record(table: pa.Table, **where: Any) -> dict[str, Any]:
    found = [r for r in table.to_pylist() if all(r[k] == v for k, v in where.items())]
    assert len(found) == 1, [{k: r[k] for k in where} for r in table.to_pylist()]
    return found[0]


def test_mean_and_interval_against_tables_and_scipy() -> None:
    assert mean_ci95([]) == (None, None)
    assert mean_ci95([3.0]) == (3.0, None)
    assert mean_ci95(CRAFT) == (54.0, pytest.approx(2.776445 * 10**0.5 / 5**0.5, rel=1e-6))  # t(4, 0.975), sd, n
    x = np.random.default_rng(1).normal(size=17)
    low, high = reference.t.interval(0.95, 16, x.mean(), reference.sem(x))
    assert mean_ci95(x)[1] == pytest.approx((high - low) / 2)


def test_ranks_share_ties() -> None:
    assert ranks([10.0, 30.0, 30.0, 20.0]).tolist() == [4.0, 1.5, 1.5, 3.0]


def test_resampled_means_are_those_of_the_plain_bootstrap() -> None:
    d = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], p=[0.1, 0.5, 0.4], size=400)
    plain = d[np.random.default_rng(3).integers(0, 400, size=(20000, 400))].mean(1)
    ours = resampled_means(d, 20000)
    for q in (0.025, 0.5, 0.975):
        assert np.quantile(ours, q) == pytest.approx(np.quantile(plain, q), abs=0.004)
    assert ours.std() == pytest.approx(d.std() / 20, rel=0.03)
    assert resampled_means(np.full(7, 2.5)).tolist() == [2.5] * 1000


def test_means_intervals_and_paired_gains() -> None:
    table = report_of(trio()).board
    assert table.schema == SCHEMA
    craft = record(table, method="craft")
    assert craft["accuracy"] == 54.0 and craft["accuracy_ci95"] == pytest.approx(3.926486, abs=1e-5)
    assert craft["gain_zero_shot"] == 14.0 and craft["gain_zero_shot_ci95"] == pytest.approx(3.926486, abs=1e-5)
    # -1, 0, 1, 2, 3: sd sqrt(2.5), so half = 2.776445 * sqrt(2.5 / 5)
    assert craft["gain_logit_head"] == 1.0 and craft["gain_logit_head_ci95"] == pytest.approx(1.963243, abs=1e-5)
    assert craft["gain_logit_head_pairs"] == 5 and craft["gain_zero_shot_low"] is None
    zero = record(table, method="zero_shot")
    assert zero["gain_zero_shot"] is None and zero["gain_logit_head"] == -13.0 and zero["accuracy_ci95"] == 0.0
    assert [r["method"] for r in table.to_pylist()] == ["craft", "logit_head", "zero_shot"]


def test_gains_pair_by_seed_and_use_the_seeds_that_both_have() -> None:
    rows = [*seeds("zero_shot", ZERO), *seeds("logit_head", HEAD)[:2], *seeds("craft", CRAFT)]
    craft = record(report_of(rows).board, method="craft")
    assert (craft["gain_logit_head"], craft["gain_logit_head_pairs"]) == (-0.5, 2)
    assert craft["seeds"] == 5


def test_one_zero_shot_row_serves_every_seed_shots_and_budget() -> None:
    rows = [make(accuracy=40.0, budget_requests=None, shots=1), *seeds("craft", CRAFT)]
    table = report_of(rows).board
    assert record(table, method="craft")["gain_zero_shot_pairs"] == 5
    assert {(r["shots"], r["budget_requests"]) for r in table.to_pylist()} == {(16, 8000)}  # no section of its own
    varied = [make(accuracy=40.0), make(accuracy=41.0, seed=2), *seeds("craft", CRAFT)]
    assert record(report_of(varied).board, method="craft")["gain_zero_shot_pairs"] == 2


def test_logit_head_is_taken_at_the_same_budget_first_then_where_its_bill_fits() -> None:
    def head(accuracy: float, budget: int, requests: int) -> ResultRow:
        bill = row_columns({Phase.ADAPT: Bill(requests=requests)})
        return make(method="logit_head", budget_requests=budget, accuracy=accuracy, **bill)

    craft = make(method="craft", access="SOFT+SCORES", accuracy=55.0, budget_requests=1000)
    others = [head(53.0, 8000, 8000), head(52.0, 500, 400)]
    assert record(report_of([craft, *others]).board, method="craft", budget_requests=1000)["gain_logit_head"] == 3
    same = [head(51.0, 1000, 2)]
    table = report_of([craft, *others, *same]).board
    assert record(table, method="craft", budget_requests=1000)["gain_logit_head"] == 4
    elsewhere = replace(craft, trial_id="x", shots=4)
    assert record(report_of([elsewhere, *same]).board, method="craft")["gain_logit_head"] is None  # other shots


def test_features_do_not_rank_against_scores_and_both_see_the_references() -> None:
    rows = [*trio(), *seeds("taskres", [60.0] * 5), *seeds("cbbt", [61.0] * 5)]
    table = report_of(rows).board
    features = [r for r in table.to_pylist() if r["access_class"] == "features"]
    assert [(r["method"], r["reference"], r["rank"], r["ranked"]) for r in features] == [
        ("cbbt", False, 1.0, True),
        ("taskres", False, 2.0, True),
        ("logit_head", True, None, False),
        ("zero_shot", True, None, False),
    ]
    scores = [r for r in table.to_pylist() if r["access_class"] == "scores"]
    assert [(r["method"], r["rank"]) for r in scores] == [("craft", 1.0), ("logit_head", 2.0), ("zero_shot", 3.0)]
    assert access_class("TEXT+SCORES") == access_class("") == "scores" and access_class("GRADIENTS") == "white box"


def test_labels_and_top_k_have_sections_of_their_own() -> None:
    assert (access_class("TEXT+LABELS"), access_class("TEXT+TOPK")) == ("labels", "top-k")
    rows = [*trio()]
    for method, access, accuracy in (("vote", "TEXT+LABELS", 40.0), ("label_map_topk", "TEXT+TOPK", 45.0)):
        rows += [replace(row, access=access) for row in seeds(method, [accuracy] * 5)]
    board = report_of(rows).board.to_pylist()
    native = [(r["access_class"], r["method"]) for r in board if not r["reference"]]
    assert native == [("labels", "vote"), ("top-k", "label_map_topk"), ("scores", "craft")]


def test_rank_is_the_average_over_data_sets_and_wants_five_seeds_on_each() -> None:
    rows = [
        *trio(),
        *[replace(r, accuracy=(r.accuracy or 0) / (2 if r.method == "craft" else 1)) for r in trio(dataset="digits")],
    ]
    table = report_of(rows).board
    assert {r["rank"] for r in table.to_pylist() if r["method"] == "craft"} == {2.0}  # first on one, third on the other
    assert {r["rank"] for r in table.to_pylist() if r["method"] == "logit_head"} == {1.5}
    four = [r for r in rows if not (r.method == "craft" and r.dataset == "digits" and r.seed == 5)]
    table = report_of(four).board
    crafts = [r for r in table.to_pylist() if r["method"] == "craft"]
    assert [(r["rank"], r["ranked"]) for r in crafts] == [(None, False)] * 2
    assert {r["ranked_among"] for r in table.to_pylist()} == {2, None}
    two = [r for r in rows if r.seed < 3]
    assert set(report_of(two).board["rank"].to_pylist()) == {None}


def test_exhausted_and_failed_are_counted_and_kept_out_of_means() -> None:
    rows = trio()
    rows[-1] = replace(rows[-1], status="budget_exhausted", accuracy=90.0)
    rows[-2] = replace(rows[-2], status="failed", accuracy=None, error="EndpointLost: gone")
    rows.append(make(method="craft", access="SOFT+SCORES", seed=6, status="unfunded"))
    craft = record(report_of(rows).board, method="craft")
    assert (craft["seeds"], craft["budget_exhausted"], craft["failed"], craft["unfunded"]) == (3, 1, 1, 1)
    assert craft["accuracy"] == 52.0 and craft["budget_exhausted_accuracy"] == 90.0 and not craft["ranked"]
    alone = [make(status="failed"), make(method="craft", access="SOFT+SCORES", status="unfunded")]
    assert report_of(alone).board["accuracy"].to_pylist() == [None, None]


def test_settings_are_never_mixed_and_the_difference_is_the_label() -> None:
    few, many = (json.dumps({"popsize": p, "sigma": 0.5}) for p in (20, 40))
    rows = [*seeds("craft", CRAFT, config=few), *seeds("craft", [60.0] * 5, config=many), *seeds("zero_shot", ZERO)]
    table = report_of(rows).board
    assert {r["label"]: r["accuracy"] for r in table.to_pylist()} == {
        "craft popsize=20": 54.0,
        "craft popsize=40": 60.0,
        "zero_shot": 40.0,
    }


def test_of_two_trials_of_one_cell_and_seed_the_later_counts() -> None:
    old = make(trial_id="old", accuracy=10.0, created="2026-01-01T00:00:00+00:00")
    new = make(trial_id="new", accuracy=20.0, created="2026-01-02T00:00:00+00:00", method_version=2)
    for rows in ([old, new], [new, old]):
        assert record(report_of(rows).board, method="zero_shot")["accuracy"] == 20.0


def predictions(right: dict[tuple[str, int], np.ndarray], rows: Sequence[ResultRow]) -> Any:
    by_id = {row.trial_id: right[row.method, row.seed] for row in rows}

    def read(trial_id: str, test_set: str) -> Predictions:
        if trial_id not in by_id:
            raise DataError("no such file")
        correct = by_id[trial_id]
        labels = np.zeros(len(correct), dtype=np.int64)
        keys = [f"{i}" for i in range(len(correct))]
        return Predictions(keys, labels, np.where(correct, 0, 1), np.zeros((len(correct), 2)))

    return read


def test_bootstrap_is_over_images_of_the_mean_difference_over_seeds() -> None:
    n = 1000
    zero = np.arange(n) < 400
    one, two = np.arange(n) < 600, np.arange(n) >= 300  # gains 20 and 30 points over images that overlap
    rows = [make(seed=s, accuracy=40.0) for s in (1, 2)]
    rows += [make(method="craft", access="SOFT+SCORES", seed=s, accuracy=a) for s, a in ((1, 60.0), (2, 70.0))]
    right = {("zero_shot", 1): zero, ("zero_shot", 2): zero, ("craft", 1): one, ("craft", 2): two}
    craft = record(report_of(to_table(rows), predictions(right, rows)).board, method="craft")
    d = 50.0 * (one.astype(float) + two - 2 * zero)
    assert craft["gain_zero_shot"] == pytest.approx(d.mean()) == 25.0
    spread = 1.96 * d.std() / n**0.5
    assert craft["gain_zero_shot_low"] == pytest.approx(25 - spread, abs=0.4)
    assert craft["gain_zero_shot_high"] == pytest.approx(25 + spread, abs=0.4)
    missing = record(report_of(to_table(rows), predictions(right, rows[1:])).board, method="craft")
    assert missing["gain_zero_shot_low"] is None and missing["gain_zero_shot"] == 25.0


def test_summary_averages_data_sets_within_a_seed_first() -> None:
    other = [replace(r, accuracy=20.0 + 10.0 * r.seed * (r.method == "craft")) for r in trio(dataset="digits")]
    shift = [replace(r, kind="shift", test_set="icons_outline", accuracy=(r.accuracy or 0) - 5) for r in trio()]
    table = report_of([*trio(), *other, *shift]).summary
    craft = record(table, method="craft", kind="source")
    # icons 50..58 and digits 30..70, by seed: 40, 46, 52, 58, 64; the references' mean is 30 for every seed
    assert (craft["datasets"], craft["accuracy"], craft["gain_zero_shot"]) == (2, 52.0, 22.0)
    assert craft["gain_zero_shot_ci95"] == pytest.approx(2.776445 * 90**0.5 / 5**0.5, rel=1e-5)
    assert record(table, method="craft", kind="shift")["accuracy"] == 49.0
    assert set(table["dataset"].to_pylist()) == {"all"}


def test_summary_uses_seeds_finished_on_every_data_set() -> None:
    rows = [*trio(), *[r for r in trio(dataset="digits") if r.seed != 2]]
    assert record(report_of(rows).summary, method="craft")["seeds"] == 4


def test_a_whole_sweep_recovers_the_effects_it_was_made_with() -> None:
    rows = [row for trial in sweep() for row in trial]
    assert len(rows) == 12 * 5 * 3 * 5 * 2
    table = report_of(rows).board
    assert len(table) == (12 + 4) * 5 * 3 * 2  # every cell, and four references in the features sections
    taskres = record(report_of(rows).summary, method="taskres", kind="source", shots=16, budget_requests=8000)
    assert taskres["gain_zero_shot"] == pytest.approx(18.0, abs=1.5) and taskres["datasets"] == len(DATASETS)
    assert set(table["budget_unit"].to_pylist()) == {"requests"}
    both = report_of([r for t in sweep(shots=(4,), budgets=((None, 10**6), (8000, 10**6))) for r in t]).board
    assert set(both["budget_unit"].to_pylist()) == {"images", "requests+images"}


def halves(method: str, base: Sequence[float], new: Sequence[float], **changes: Any) -> list[ResultRow]:
    """The two rows of each base-to-new trial."""
    named = {"trial_id": "", "dataset": "icons"} | changes
    return [
        replace(row, trial_id=f"{method}{row.dataset}{row.seed}", kind=kind, test_set=f"{row.dataset}:{kind}")
        for kind, accuracies in (("base", base), ("new", new))
        for row in seeds(method, accuracies, **named)
    ]


def test_base_to_new_has_the_harmonic_mean_of_each_seed_and_gains_paired_by_seed() -> None:
    rows = [*halves("zero_shot", [60.0] * 2, [40.0] * 2), *halves("bbt", [80.0, 60.0], [20.0, 60.0])]
    table = report_of(rows).board
    zero, bbt = (record(table, method=m, kind="harmonic") for m in ("zero_shot", "bbt"))
    assert zero["accuracy"] == 48.0  # 2 * 60 * 40 / 100
    assert bbt["accuracy"] == 46.0  # of 32 and 60, not the 53.8 of the two means
    ends = bbt["gain_zero_shot_min"], bbt["gain_zero_shot_max"]
    assert (bbt["gain_zero_shot"], bbt["gain_zero_shot_ci95"], ends) == (-2.0, None, (-16.0, 12.0))  # two seeds
    assert record(table, method="bbt", kind="base")["gain_zero_shot"] == 10.0
    assert record(table, method="bbt", kind="new")["gain_zero_shot"] == 0.0
    assert (bbt["test_set"], bbt["requests"], bbt["nll"], bbt["gain_zero_shot_low"]) == (
        "icons:harmonic",
        0,
        None,
        None,
    )
    assert harmonic(0.0, 50.0) == harmonic(0.0, 0.0) == 0.0 and harmonic(50.0, 50.0) == 50.0


def test_base_to_new_is_averaged_over_data_sets_by_seed_and_mixes_with_no_other_protocol() -> None:
    rows = [*halves("bbt", [80.0, 60.0], [20.0, 60.0]), *halves("bbt", [50.0] * 2, [50.0] * 2, dataset="digits")]
    table = report_of([*rows, *seeds("bbt", [99.0] * 2)]).summary
    assert {(r["kind"], r["datasets"]): r["accuracy"] for r in table.to_pylist()} == {
        ("source", 1): 99.0,
        ("base", 2): 60.0,
        ("new", 2): 45.0,
        ("harmonic", 2): 48.0,  # of 41 and 55
    }


def test_a_base_to_new_trial_that_failed_is_counted_and_has_no_harmonic_mean() -> None:
    rows = halves("bbt", [80.0, 60.0], [20.0, 60.0])
    lost = replace(rows[0], status="failed", accuracy=None, error="lost")  # one row: it never got to the new classes
    table = report_of([lost, rows[1], rows[3]]).board
    bbt = record(table, method="bbt", kind="harmonic")
    assert (bbt["seeds"], bbt["failed"], bbt["accuracy"]) == (1, 1, 60.0)
    alone = record(report_of([lost]).board, method="bbt", kind="harmonic")
    assert (alone["seeds"], alone["failed"], alone["accuracy"]) == (0, 1, None)


def test_no_rows_make_an_empty_table() -> None:
    assert report_of([]).board.num_rows == report_of([]).summary.num_rows == 0


# --- methods with a local model ------------------------------------------------------------------------------------


def with_local(local: str = "tiny_local", **changes: Any) -> list[ResultRow]:
    """A probe and a method with a local model."""
    return [
        *seeds("local_probe", [30.0] * 5, access="TEXT", local_model=local, local_digest=local, **changes),
        *seeds("ares", [35.0] * 5, access="TEXT+SCORES", local_model=local, local_digest=local, **changes),
    ]


def test_methods_with_a_local_model_are_ranked_apart_beside_their_probe() -> None:
    board = report_of([*trio(), *with_local()]).board.to_pylist()
    native = {r["label"]: r["access_class"] for r in board if r["ranked"]}
    assert native["ares"] == native["local_probe"] == "scores + local model"
    assert native["craft"] == "scores"
    apart = [r for r in board if r["access_class"] == "scores + local model"]
    assert {r["label"] for r in apart} == {"ares", "local_probe", "zero_shot", "logit_head"}
    assert {r["ranked_among"] for r in apart if r["ranked"]} == {2}
    assert [r["label"] for r in apart if r["leader"]] == ["ares"]
    (ares,) = [r for r in apart if r["label"] == "ares"]
    assert (ares["local_model"], ares["gain_zero_shot"], ares["gain_logit_head"]) == ("tiny_local", -5.0, -18.0)
    assert not any(r["label"] == "local_probe" for r in board if r["access_class"] == "scores")
    (craft,) = [r for r in board if r["label"] == "craft"]
    assert craft["leader"] and craft["local_model"] == ""


def test_the_probe_serves_budgets_in_which_it_did_not_run() -> None:
    rows = [*trio(), *(r for r in with_local() if r.method == "local_probe")]
    rows += [r for r in with_local(budget_requests=100) if r.method == "ares"]
    apart = [r for r in report_of(rows).board.to_pylist() if r["budget_requests"] == 100]
    assert {r["label"] for r in apart} == {"ares", "local_probe", "zero_shot", "logit_head"}


def test_two_local_models_are_told_apart_and_changed_weights_are_left_out() -> None:
    board = report_of([*with_local(), *with_local("other")]).board.to_pylist()
    labels = {r["label"] for r in board if r["access_class"] == "scores + local model"}
    assert labels == {f"{m} local_model={n}" for m in ("ares", "local_probe") for n in ("tiny_local", "other")}
    old = [replace(r, local_digest="before", trial_id=f"{r.trial_id}0", created="2026-01-01") for r in with_local()]
    report = report_of([*old, *with_local()])
    assert {r["seeds"] for r in report.board.to_pylist()} == {5}
    assert any("local model" in note for note in report.notes)
