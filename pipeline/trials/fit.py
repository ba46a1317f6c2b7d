"""Fit the method of a trial in steps, with checkpoints; that of a tuned method after a search of its settings."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from methods.base import Bill, FewShotTask, Method, TaskShape
from pipeline.blackbox.client import Meter
from pipeline.budget import Phase
from pipeline.data.images import as_images
from pipeline.errors import BudgetExceeded, NonFiniteError, first_line
from pipeline.files import strict_json
from pipeline.trials.checkpoint import Checkpoint
from pipeline.trials.evaluate import eval_labels, predict, predict_images
from pipeline.trials.plan import TrialSpec
from pipeline.trials.supervisor import Supervisor
from pipeline.trials.tuning import Scored, Search, search_bill

LARGEST_CURVE = 10_000
"""Number of test images above which no curve is recorded."""


@dataclass
class State:
    """The state of a trial, as checkpoints store it. The rest of the trial depends on nothing else."""

    method: Method
    meter: Meter
    started: bool = False
    finished: bool = False
    truncated: str | None = None
    steps: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, int, float]] = field(default_factory=list)
    label_reads: Counter[str] = field(default_factory=Counter)
    """Number of times that the labels of each test set were read."""
    scored: list[Scored] = field(default_factory=list)
    """Attempts of the search that are finished; `method` is fitted in the next one, or in the final fit."""

    def restart(self, method: Method) -> None:
        """Fit another method from its start."""
        self.method, self.started, self.finished, self.steps = method, False, False, 0


class Fit:
    """Fits the method of a trial from `state` to its end.

    Args:
        spec: the trial.
        state: changed as the fit proceeds.
        task: the few-shot task.
        supervisor: makes the calls of the method.
        checkpoint: receives the state between two steps.
        every_s: seconds between checkpoints.
    """

    def __init__(
        self,
        spec: TrialSpec,
        state: State,
        task: FewShotTask,
        supervisor: Supervisor,
        checkpoint: Checkpoint,
        every_s: float,
    ) -> None:
        self.spec, self.state, self.task, self.supervisor = spec, state, task, supervisor
        self.checkpoint, self.every_s, self.box = checkpoint, every_s, supervisor.session.box
        self.saved = self.began = time.monotonic()
        self.before = state.seconds
        self.shape = TaskShape.of(task, self.box.feature_dim, self.box.top_k)
        tuned = spec.choice.tuning is not None
        self.search = Search(spec.choice, self.shape, spec.allotment, spec.seed) if tuned else None
        self.searched, self.final = Bill(), spec.predicted
        """Bill of the search, and predicted bill of the fit after it."""

    def run(self) -> dict[str, Tensor]:
        """Fit to the end; return the tensors that the method deploys.

        Raises:
            BudgetExceeded: `start` could not be paid. In a step, the trial is truncated instead.
            FareboxError, Exception: see `Supervisor.call`.
        """
        state = self.state
        if self.search is not None:
            self._choose(self.search)
        try:
            self._fit(curve=True)
        except BudgetExceeded as error:
            if not state.started:
                raise
            state.truncated, state.finished = str(error), True
        deployed = self.supervisor.check_result(state.method)
        if state.seconds > self.every_s:
            self.checkpoint.save(state)
        return deployed

    def columns(self) -> dict[str, Any]:
        """Return what the fit adds to the row: the method's notes, and of a tuned method what it tried and chose."""
        notes, scored = dict[str, Any](self.state.method.notes), self.state.scored
        if self.search is None:
            return {"notes": strict_json(notes, sort_keys=True)}
        notes |= self.search.notes(scored)
        chosen = self.search.settings[self.search.chosen(scored)]
        return {
            "notes": strict_json(notes, sort_keys=True),
            "tune_trials": len(self.search.settings),
            "chosen": strict_json(chosen, sort_keys=True),
        }

    def _fit(self, curve: bool = False) -> None:
        """Fit `state.method` on a task of its own."""
        state, session = self.state, self.supervisor.session
        task = self.supervisor.task(self.task)
        while not state.finished:
            if not state.started:
                rng = np.random.default_rng(self.spec.seed)
                self.supervisor.call("start", state.method.begin, task, session.method_box, rng)
                state.started = True
            else:
                state.steps += 1
                more = self.supervisor.call(f"step {state.steps}", state.method.step, session.method_box)
                state.finished = not more
            if curve:
                self._record_curve()
            state.seconds = self.before + time.monotonic() - self.began
            if time.monotonic() - self.saved >= self.every_s:
                self.checkpoint.save(state)
                self.saved = time.monotonic()

    def _choose(self, search: Search) -> None:
        """Fit and score the candidates, one after another; then make the chosen one `state.method`, not started."""
        state, box, session = self.state, self.box, self.supervisor.session
        box.tuning = True
        while (attempt := search.next(state.scored)) is not None:  # the first is the method that the state starts with
            spent = search_bill(state.scored)
            box.allotment = search.limits(attempt, spent)
            session.predicted = spent + search.method(attempt.candidate).bill(
                self.shape, box.allotment.remaining(spent)
            )
            hits_M, problem = (False,) * self.shape.n_val, ""
            try:
                self._fit()
                box.allotment = self.spec.allotment
                hits_M = self._hits()
            except (FloatingPointError, NonFiniteError) as error:  # it diverged: another candidate may not
                session.failure, problem = None, f"{type(error).__name__}: {first_line(error)}"
            state.scored.append(Scored(attempt, box.meter.paid + spent * -1, hits_M, problem))
            following = search.next(state.scored)
            state.restart(search.method(following.candidate if following else search.chosen(state.scored)))
        box.tuning, box.allotment = False, self.spec.allotment
        self.searched = search_bill(state.scored)
        chosen = search.method(search.chosen(state.scored))
        self.final = chosen.bill(self.shape, self.spec.allotment.remaining(self.searched))
        session.predicted = self.searched + self.final

    def _hits(self) -> tuple[bool, ...]:
        """Return whether each validation image is classified correctly, from one pass in phase tune."""
        val, classes = self.task.val, self.task.classes
        images, most_sets = as_images(val.images), max(1, len(classes.templates))
        logits_MC = predict_images(self.state.method, self.supervisor, images, len(classes), Phase.TUNE, most_sets)
        return tuple((logits_MC.argmax(1) == val.labels).tolist())

    def _record_curve(self) -> None:
        """Score a copy of the method at `spec.curve` points equally spaced in the fit's predicted bill.

        It is charged to a phase of its own.
        """
        spec, state, paid = self.spec, self.state, self.state.meter.paid
        unit = "images" if spec.allotment.requests is None and spec.allotment.images is not None else "requests"
        planned, spent = getattr(self.final, unit), getattr(paid, unit) - getattr(self.searched, unit)
        if not spec.curve or not planned or spent * spec.curve < planned * (len(state.curve) + 1):
            return
        if spec.dataset.card.test > LARGEST_CURVE:
            return
        test = spec.eval_sets[0]
        logits, _ = predict(state.method, self.supervisor, test, test.classes, Phase.CURVE)
        accuracy = 100 * float((logits.argmax(1) == eval_labels(test, state.label_reads)).double().mean())
        while spent * spec.curve >= planned * (len(state.curve) + 1):
            state.curve.append((paid.requests, paid.images, accuracy))
