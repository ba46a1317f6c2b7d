"""The estimate of the time left, on recorded and computed sequences of events."""

from __future__ import annotations

import pytest

from pipeline.sweep.time_left import TimeLeft, Work


class Run:
    """Trials that run `at_once` at a time: each takes `beside` seconds, and one second for each `rate` requests."""

    def __init__(self, works: list[Work], at_once: int, rate: float, beside: float, images: int = 0) -> None:
        self.works, self.at_once, self.rate, self.beside = works, at_once, rate, beside
        self.images, self.image_rate, self.now = images, 10, 0.0
        self.estimate = TimeLeft(works, 0.0)
        self.waiting, self.starts = list(range(len(works))), dict[int, float]()
        self.done = [float(work.charged) for work in works]
        self.closing = [beside for _ in works]

    def second(self) -> None:
        """Let a second pass: all trials wait while images are encoded."""
        while self.waiting and len(self.starts) < self.at_once:
            self.starts[self.waiting.pop(0)] = self.now
        self.now += 1.0
        if self.images:
            self.images = max(0, self.images - self.image_rate)
        else:
            for i in list(self.starts):
                if self.done[i] < self.works[i].requests:
                    self.done[i] += self.rate
                elif self.closing[i] > 1:
                    self.closing[i] -= 1
                else:
                    self.estimate.ended(i, self.starts[i], self.now)
                    del self.starts[i]
        charged = {i: int(self.done[i]) for i in self.starts}
        self.estimate.observe(self.now, self.starts, charged, self.images)

    def seconds(self, n: int) -> None:
        for _ in range(n):
            self.second()


def test_nothing_is_estimated_before_there_is_a_rate() -> None:
    run = Run([Work("craft", 1000)] * 4, at_once=2, rate=10, beside=5)
    assert run.estimate.left() == (None, False)
    run.seconds(3)
    assert run.estimate.left() == (None, False)
    run.seconds(7)
    seconds, whole = run.estimate.left()
    assert whole and seconds == pytest.approx(190, abs=5)  # two rounds of 100 s; their evaluation was not seen yet


def test_requests_of_an_earlier_run_take_no_time() -> None:
    run = Run([Work("craft", 1000, 900), Work("craft", 1000, 900)], at_once=2, rate=10, beside=1)
    run.seconds(8)
    seconds, whole = run.estimate.left()
    assert whole and seconds == pytest.approx(2, abs=1)


def test_a_replay_is_not_part_of_the_rate() -> None:
    estimate = TimeLeft([Work("craft", 1000, 500)], 0.0)
    for second in range(1, 61):  # it starts again from its first call: a minute without a new charge
        estimate.observe(float(second), {0: 0.0}, {0: 500}, 0)
    assert estimate.left() == (None, False)
    for second in range(61, 71):
        estimate.observe(float(second), {0: 0.0}, {0: 500 + 10 * (second - 60)}, 0)
    seconds, whole = estimate.left()
    assert whole and seconds == pytest.approx(40, abs=5)


def test_a_method_without_a_basis_makes_the_estimate_a_lower_bound() -> None:
    run = Run([Work("taskres", 100), Work("craft", 1000)], at_once=1, rate=10, beside=1)
    run.seconds(8)
    seconds, whole = run.estimate.left()
    assert not whole and seconds == pytest.approx(2, abs=1)
    run.seconds(10)
    assert run.estimate.left().whole


def test_short_trials_are_a_basis_for_trials_like_them_and_not_for_far_larger_ones() -> None:
    works = [Work("zero_shot", 0)] * 20
    run = Run(works, at_once=2, rate=1, beside=2)
    run.seconds(4)
    assert run.estimate.left() == (None, False)  # the first ones have started the workers
    run.seconds(4)
    seconds, whole = run.estimate.left()
    assert whole and seconds == pytest.approx(12, abs=3)
    larger = Run([*[Work("craft", 1)] * 8, Work("craft", 32_000)], at_once=2, rate=1, beside=1)
    larger.seconds(8)
    assert not larger.estimate.left().whole


def test_time_in_which_images_are_encoded_counts_for_images_only() -> None:
    run = Run([Work("craft", 100)] * 6, at_once=1, rate=10, beside=1, images=600)
    run.seconds(30)
    assert run.estimate.left() == (None, False)  # no trial has made a request yet
    run.seconds(30)
    assert run.images == 0
    run.seconds(9)
    seconds, whole = run.estimate.left()
    assert whole and seconds == pytest.approx(55, abs=8)  # without images: five and a tenth trials of 11 s
    waiting = TimeLeft([Work("craft", 1000)], 0.0)
    for second in range(1, 12):
        waiting.observe(float(second), {0: 0.0}, {0: 10 * second}, 5000)
    assert not waiting.left().whole  # 5,000 images are left, and how long one takes is not known
    waiting.observe(31.0, {0: 0.0}, {0: 110}, 4800)
    assert waiting.left().seconds == pytest.approx(89 + 4800 * 20 / 200, rel=0.1) and waiting.left().whole


def test_the_estimate_of_a_whole_run_is_close_from_an_early_point_on() -> None:
    """Four budgets of one method and many short trials, as in a sweep over budgets: 4 at a time."""
    works = [Work("zero_shot", 0)] * 12 + [Work("craft", n) for n in (100, 100, 100, 100, 1000, 1000, 4000, 4000)]
    run, estimates = Run(works, at_once=4, rate=5, beside=2, images=200), list[tuple[float, float]]()
    while len(run.starts) + len(run.waiting) or run.now == 0:
        run.second()
        left = run.estimate.left()
        if left.whole and left.seconds is not None:
            estimates.append((run.now, left.seconds))
    assert run.estimate.left() == (0.0, True)
    assert estimates[0][0] < run.now / 4
    for now, seconds in estimates:
        assert seconds == pytest.approx(run.now - now, rel=0.1, abs=5), now


def test_a_trial_that_lost_its_workers_is_left_no_more() -> None:
    run = Run([Work("craft", 100)] * 2, at_once=2, rate=10, beside=1)
    run.seconds(8)
    del run.starts[0]
    run.estimate.observe(9.0, run.starts, {}, 0)
    run.estimate.ended(0, 0.0, 9.0)  # reported late
    run.seconds(5)
    assert run.estimate.left() == (0.0, True)
