"""The progress of a run: its counts, its estimate, and what it shows."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest

from methods.base import Bill
from pipeline.budget import Phase
from pipeline.errors import LedgerError
from pipeline.sweep.progress import Progress
from pipeline.sweep.run_state import ENCODING, FITTING, STARTING, State, clock, result
from tests.support.synthetic import make


class FakeLedger:
    """A ledger with the requests charged to some trials, which can be damaged."""

    def __init__(self, **requests: int) -> None:
        self.requests, self.damaged = requests, False

    def trials(self, storage: str) -> list[Any]:
        return [SimpleNamespace(trial=name, bills=self.trial_bill(storage, name)) for name in self.requests]

    def trial_bill(self, storage: str, trial: str) -> dict[Phase, Bill]:
        if self.damaged:
            raise LedgerError("damaged")
        return {Phase.ADAPT: Bill(self.requests.get(trial, 0)), Phase.EVALUATE: Bill(7)}


class FakeImages:
    """The images to encode."""

    total, left = 0, 0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def ended(self, spec: Any) -> None: ...


class Run:
    """The progress of trials a, b, ... with these predicted requests; some were charged before."""

    def __init__(self, *requests: int, **charged: int) -> None:
        self.ledger, self.starts, self.images = FakeLedger(**charged), dict[int, float](), FakeImages()
        self.specs: list[Any] = [
            SimpleNamespace(trial_id=name, account=name, predicted=Bill(n), choice=SimpleNamespace(name="craft"))
            for name, n in zip("abcdefghi", requests, strict=False)
        ]
        ledger: Any = self.ledger
        self.progress = Progress(self.specs, ledger, "s", self.starts)

    def start(self) -> None:
        images: Any = self.images
        self.progress.start_trials(images)

    def state(self) -> State:
        self.progress._next_read = 0.0
        return self.progress.state()


def test_requests_of_ended_and_running_trials_are_counted() -> None:
    run = Run(50, 50)
    run.start()
    run.starts |= {0: 0.0, 1: 0.0}
    run.ledger.requests["b"] = 20
    assert run.state().done_requests == 20
    run.progress.ended(run.specs[0], [])
    del run.starts[0]
    state = run.state()
    assert (state.ended, state.trials, state.done_requests, state.requests) == (1, 2, 70, 100)


def test_requests_of_an_earlier_run_are_done_from_the_start() -> None:
    run = Run(50, 50, a=50, b=30)
    assert run.state().done_requests == 80
    run.start()
    run.starts |= {0: 0.0, 1: 0.0}
    assert (run.state().done_requests, run.state().stage) == (80, FITTING)  # replays change nothing
    run.ledger.requests["b"] = 40
    assert run.state().done_requests == 90
    run.progress.ended(run.specs[0], [])
    run.progress.ended(run.specs[1], [])
    assert run.state().line.startswith("2/2 trials   100/100 requests   ")


def test_a_trial_never_counts_for_more_than_was_predicted() -> None:
    run = Run(50, 50, a=60)
    run.starts[1] = 0.0
    run.ledger.requests["b"] = 70
    assert run.state().done_requests == 100


def test_a_damaged_ledger_leaves_the_last_count() -> None:
    run = Run(50, a=20)
    run.starts[0] = 0.0
    run.ledger.damaged = True
    assert run.state().done_requests == 20


def test_encoding_is_a_stage_with_its_count_until_all_images_are_encoded() -> None:
    run = Run(50)
    assert run.state().stage == STARTING
    run.images.left = None  # not counted yet
    run.start()
    run.starts[0] = 0.0
    assert run.state().line.endswith("   encoding images")
    run.images.total, run.images.left = 2000, 1500
    assert run.state().line.endswith("   encoding images 500/2,000")
    run.ledger.requests["a"] = 10
    assert run.state().stage == ENCODING  # other images are encoded while requests are made
    run.images.left = 0
    state = run.state()
    assert (state.stage, state.images, state.encoded) == (FITTING, 2000, 2000)


def test_images_that_nobody_encodes_for_a_while_do_not_make_it_the_stage() -> None:
    run = Run(50)
    run.start()
    run.starts[0], run.images.total, run.images.left = 0.0, 10, 10
    assert run.state().stage == ENCODING
    run.ledger.requests["a"] = 10
    assert run.state().stage == FITTING


def state(ended: int, left_s: float | None, more: bool = False, **columns: Any) -> State:
    return State(FITTING, 10, ended, 1000, 500, 60.0, left_s=left_s, more=more, **columns)


def test_there_is_no_time_left_without_a_basis() -> None:
    run = Run(50, 50)
    run.start()
    assert run.state().left_s is None and "left" not in run.state().line
    assert "left" not in state(2, None).line
    assert state(2, 60.0).line.endswith("   1:00 gone   about 1:00 left   fitting")
    assert "left" not in state(2, 60.0, more=True).line
    assert state(2, 600.0, more=True).line.endswith("   1:00 gone   more than 10:00 left   fitting")


def test_the_bar_shows_time_if_it_is_known_and_requests_and_trials_if_not() -> None:
    assert state(2, 60.0).share == 0.5
    assert state(2, None).share == state(2, 60.0, more=True).share == pytest.approx(502 / 1010)


def test_a_finished_run_has_nothing_left() -> None:
    run = Run(5)
    run.start()
    run.progress.ended(run.specs[0], [])
    assert run.state().left_s == 0.0
    assert state(10, 0.0).line == "10/10 trials   500/1,000 requests   1:00 gone"


def test_the_last_line_has_all_counts(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(1000, 0)
    beats: list[float | None] = []
    run.progress.beat = beats.append
    with run.progress:
        run.start()
        run.progress.ended(run.specs[0], [])
        run.progress.ended(run.specs[1], [])
    assert capsys.readouterr().err.splitlines()[-1] == "2/2 trials   1,000/1,000 requests   0:00 gone"
    assert beats


def test_a_run_that_does_not_start_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Run(1000).progress:
        pass
    assert capsys.readouterr().err == ""


def test_results_are_lines_and_only_the_last_ones_are_kept() -> None:
    assert result(make(accuracy=57.84, requests=0)) == "zero_shot on icons, 16 shots, seed 1: 57.8%, 0 requests"
    assert result(make(status="failed", shots=1)).endswith("1 shot, seed 1: failed, 0 requests")
    run = Run(*[1] * 9)
    for seed in range(9):
        run.progress.ended(run.specs[seed], [make(seed=seed, accuracy=1.0)])
    results = run.state().results
    assert len(results) == 5 and "seed 8" in results[-1]


def test_a_terminal_shows_stage_bar_and_results_and_keeps_its_cursor() -> None:
    from rich.console import Console

    from pipeline.sweep.live import Live

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=70, height=24, color_system=None)
    live = Live(console)
    live.show(State(FITTING, 4, 2, 100, 50, 61.0, results=("zero_shot on icons, 16 shots, seed 1: 46.4%, 0 requests",)))
    live.close(State(FITTING, 4, 4, 100, 100, 90.0))
    text = out.getvalue()
    assert "zero_shot on icons" in text and "2/4 trials" in text and FITTING in text and "━" in text
    assert text.rstrip().splitlines()[-1].endswith("4/4 trials   100/100 requests   1:30 gone")
    hidden, shown = text.rfind("\x1b[?25l"), text.rfind("\x1b[?25h")
    assert shown > hidden and text.index("\x1b[?25h") < text.index("zero_shot")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (187.9, "3:07"), (3765, "1:02:45")])
def test_seconds_are_shown_as_on_a_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
