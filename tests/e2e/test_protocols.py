"""Base to new and domain generalisation on the toy model, in one process: run, billed, verified, in every table."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.results.stats import harmonic, mean_ci95
from tests.support.command import here, ledger_record, records
from tests.support.lab import run_here

SMALL = ("model=fake", "datasets=[icons]", "views=2", "seeds=[1,2,3]", "shots=[2]", "budget.requests=40", "replicas=1")
ABLE = ("zero_shot", "cbbt_prompt", "cbbt")


@pytest.fixture(scope="module")
def base_to_new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods that can, and one that cannot."""
    storage = tmp_path_factory.mktemp("base_to_new")
    words = ("sweep=base_to_new", *SMALL, f"methods=[{','.join(ABLE)},craft]", f"storage={storage}")
    printed = run_here(*words)
    assert any("not run: craft cannot predict classes that it was not fitted on" in line for line in printed)
    return storage


def board(storage: Path, form: str) -> str:
    every = ["--all"] if form in ("table", "md", "latex") else []
    return here("leaderboard", f"storage={storage}", "--format", form, *every)


def test_each_fit_has_a_row_for_base_and_one_for_new(base_to_new: Path) -> None:
    rows = records(base_to_new)
    assert {(r["kind"], r["test_set"], r["status"]) for r in rows} == {
        ("base", "icons:base", "done"),
        ("new", "icons:new", "done"),
    }
    assert len(rows) == 3 * 2 * len(ABLE) and {r["test_label_reads"] for r in rows} == {1}
    base = [r for r in rows if r["kind"] == "base"]
    said = ledger_record(base_to_new)
    assert said["phases"]["adapt"]["requests"] + said["phases"]["validate"]["requests"] == sum(
        r["requests"] for r in base
    )
    assert said["phases"]["evaluate"]["requests"] == sum(r["evaluate_requests"] for r in rows)


def test_the_harmonic_mean_is_taken_for_each_seed_and_then_averaged(base_to_new: Path) -> None:
    rows, found = records(base_to_new), json.loads(board(base_to_new, "json"))
    for method in ABLE:
        halves = {(r["kind"], r["seed"]): r["accuracy"] for r in rows if r["method"] == method}
        wanted = mean_ci95(harmonic(halves["base", s], halves["new", s]) for s in (1, 2, 3))
        (record,) = {
            (r["accuracy"], r["accuracy_ci95"]) for r in found if r["method"] == method and r["kind"] == "harmonic"
        }
        assert record == pytest.approx(wanted)
    assert {r["kind"] for r in found} == {"base", "new", "harmonic"}


def test_every_format_shows_base_new_and_their_harmonic_mean(base_to_new: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    for r in json.loads(board(base_to_new, "json")):
        if r["method"] == "cbbt":
            found[r["kind"]] = r
    shown = [f"{found[kind]['accuracy']:.1f}" for kind in ("base", "new", "harmonic")]
    read = list(csv.DictReader(io.StringIO(board(base_to_new, "csv"))))
    assert [float(r["accuracy"]) for r in read if r["method"] == "cbbt"] == [found[k]["accuracy"] for k in found]
    for form in ("table", "md", "latex"):
        text = board(base_to_new, form)
        assert "icons, base-to-new, 2 shots" in text, form
        lines = [line for line in text.splitlines() if "cbbt" in line and "cbbt_prompt" not in line]
        assert any(all(f"{number} " in line for number in shown) for line in lines), form
    assert max(map(len, board(base_to_new, "table").splitlines())) <= 120
    page = board(base_to_new, "html")
    assert "<svg" in page and "base-to-new" in page and all(number in page for number in shown)


def test_domain_generalisation_is_one_fit_scored_on_several_test_sets(tmp_path: Path) -> None:
    words = ("sweep=domain_generalization", *SMALL, "eval_shift=[icons_outline]", "methods=[zero_shot,logit_head]")
    run_here(*words, f"storage={tmp_path}")
    rows = records(tmp_path)
    assert [(r["kind"], r["test_set"]) for r in rows] == [("source", "icons"), ("shift", "icons_outline")] * 6
    assert len({r["trial_id"] for r in rows}) == 6 == ledger_record(tmp_path)["trials"]
    assert "icons_outline (shift" in board(tmp_path, "html")
    for form in ("table", "md", "latex"):
        text = board(tmp_path, form).replace(r"$\to$", "->").replace(r"\_", "_")
        assert "icons -> icons_outline (shift), 2 shots" in text, form
    assert {r["kind"] for r in json.loads(board(tmp_path, "json"))} == {"source", "shift"}
