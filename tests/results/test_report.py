"""The report: computed once, written in every format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import pipeline.results.report as report_module
from pipeline.commands.leaderboard import Options, leaderboard
from pipeline.config.compose import compose
from pipeline.errors import ConfigError
from pipeline.results.predictions import Predictions
from pipeline.results.report import FILES, FORMATS, report_files, write_report
from pipeline.sweep.storage_id import new_id, write_id
from tests.support.synthetic import make, report_of, write_store

SMALL = {"methods": ("zero_shot", "craft"), "shots": (16,), "seeds": (1, 2), "budgets": ((8000, None),)}


def test_board_and_summary_are_computed_once_and_predictions_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls, reads = write_store(tmp_path, **SMALL), Counter[str](), Counter[tuple[str, str]]()
    compute = report_module.leaderboard

    def counted(*arguments: object) -> object:
        calls["leaderboard"] += 1
        return compute(*arguments)  # type: ignore[arg-type]

    def read(trial_id: str, test_set: str) -> Predictions:
        reads[trial_id, test_set] += 1
        return store.read_predictions(trial_id, test_set)

    monkeypatch.setattr(report_module, "leaderboard", counted)
    report = report_of(store.read(), read)
    report_files(report)
    for form in FORMATS:
        FORMATS[form](report)
    assert calls == {"leaderboard": 1} and reads and set(reads.values()) == {1}


def test_every_format_and_file_has_every_method(tmp_path: Path) -> None:
    report = report_of([make(accuracy=40.0), make(method="craft", access="SOFT+SCORES", accuracy=50.0)])
    assert all("craft" in FORMATS[form](report) for form in FORMATS)
    folder = write_report(report, tmp_path)
    without_bill = {"cheapest.csv", "cheapest.md"}  # nothing was billed
    assert {name for name in FILES if "craft" not in (folder / name).read_text()} == without_bill


def test_an_unknown_format_is_an_error_before_rows_are_read(tmp_path: Path) -> None:
    write_id(tmp_path, new_id(tmp_path))
    config = compose([f"storage={tmp_path}"])
    with pytest.raises(ConfigError, match=r"no format named 'markdown'.*known: csv, html, json, latex, md, table"):
        leaderboard(config, Options("markdown"))
    with pytest.raises(ConfigError, match="--raw --format latex: expected json or csv"):
        leaderboard(config, Options("latex", raw=True))


def test_statuses_are_shown_as_text() -> None:
    failed = [make(seed=1, status="unfunded"), make(seed=2, status="budget_exhausted", accuracy=30.0)]
    text = FORMATS["table"](report_of(failed))
    assert "1 budget exhausted (30.0), 1 unfunded (no budget)" in text
