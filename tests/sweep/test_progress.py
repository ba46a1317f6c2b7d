"""The progress of a run: its counts, its estimate, and what it shows."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from methods.base import Bill
from pipeline.errors import LedgerError
from pipeline.sweep.progress import Progress
from pipeline.sweep.run_state import ENCODING, FITTING, STARTING, State, clock, result
from tests.support.synthetic import make


class FakeLedger:
    """A ledger with one account, which can be damaged."""

    requests, damaged = 100, False

    def accounts(self) -> list[Any]:
        if self.damaged:
            raise LedgerError("damaged")
        return [SimpleNamespace(name="other", charged=Bill(7)), SimpleNamespace(name="a", charged=Bill(self.requests))]


def progress(*requests: int) -> tuple[Progress, Any]:
    ledger: Any = FakeLedger()
    return Progress(requests, ledger, "a"), ledger


def reread(run: Progress) -> State:
    run._next_read = 0.0
    return run.state()


def test_counts_begin_at_the_start_of_the_run() -> None:
    run, ledger = progress(50, 50)
    ledger.requests = 130
    run.ended(20, [])
    state = reread(run)
    assert (state.ended, state.trials, state.done_requests, state.requests) == (1, 2, 30, 100)


def test_replayed_requests_count_as_done() -> None:
    run, _ = progress(50, 50)  # the calls of both were charged by an earlier run
    run.ended(50, [])
    run.ended(50, [])
    assert reread(run).line.startswith("2/2 trials   100/100 requests   ")


def test_a_damaged_ledger_leaves_the_last_count() -> None:
    run, ledger = progress(50)
    ledger.damaged = True
    assert reread(run).done_requests == 0


def test_the_first_charge_or_result_ends_the_stage_of_encoding() -> None:
    run, ledger = progress(50)
    assert run.state().stage == STARTING
    run.start_trials()
    assert reread(run).stage == ENCODING
    ledger.requests += 1
    assert reread(run).stage == FITTING


def state(ended: int, done: int, elapsed: float = 60.0) -> State:
    return State(FITTING, 10, ended, 1000, done, elapsed, elapsed)


def test_there_is_no_estimate_before_some_trials_and_a_part_of_the_work_are_done() -> None:
    assert state(0, 900).left_s is None and state(2, 900).left_s is None
    assert State(FITTING, 1000, 3, 10**6, 20, 60.0, 60.0).left_s is None
    assert state(5, 500).left_s == pytest.approx(60.0)  # half of the requests and of the trials
    assert "left" not in state(2, 900).line and "   about 1:00 left   fitting" in state(5, 500).line


def test_a_finished_run_has_nothing_left() -> None:
    assert state(10, 1000).left_s == 0.0
    assert state(10, 1000).line == "10/10 trials   1,000/1,000 requests   1:00 gone"


def test_the_last_line_has_all_counts(capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = progress(1000, 0)
    beats: list[float | None] = []
    run.beat = beats.append
    with run:
        run.start_trials()
        run.ended(1000, [])
        run.ended(0, [])
    assert capsys.readouterr().err.splitlines()[-1] == "2/2 trials   1,000/1,000 requests   0:00 gone"
    assert beats


def test_a_run_that_does_not_start_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1000)[0]:
        pass
    assert capsys.readouterr().err == ""


def test_results_are_lines_and_only_the_last_ones_are_kept() -> None:
    assert result(make(accuracy=57.84, requests=0)) == "zero_shot on icons, 16 shots, seed 1: 57.8%, 0 requests"
    assert result(make(status="failed", shots=1)).endswith("1 shot, seed 1: failed, 0 requests")
    run, _ = progress(*[1] * 9)
    for seed in range(9):
        run.ended(1, [make(seed=seed, accuracy=1.0)])
    results = run.state().results
    assert len(results) == 5 and "seed 8" in results[-1]


def test_a_terminal_shows_stage_bar_and_results_and_keeps_its_cursor() -> None:
    from rich.console import Console

    from pipeline.sweep.live import Live

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=70, height=24, color_system=None)
    live = Live(console)
    live.show(State(FITTING, 4, 2, 100, 50, 61.0, 60.0, ("zero_shot on icons, 16 shots, seed 1: 46.4%, 0 requests",)))
    live.close(State(FITTING, 4, 4, 100, 100, 90.0, 89.0))
    text = out.getvalue()
    assert "zero_shot on icons" in text and "2/4 trials" in text and FITTING in text and "━" in text
    assert text.rstrip().splitlines()[-1].endswith("4/4 trials   100/100 requests   1:30 gone")
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert shown > hidden and text.index("\x1b[?25h") < text.index("zero_shot")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (187.9, "3:07"), (3765, "1:02:45")])
def test_seconds_are_shown_as_on_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
