"""One trial, which is the science: draw the task, fit the method through the metered box, score it on the test sets.

No Ray here: `run_trial` works from a notebook with a `LocalPool`.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.base import Bill, FewShotTask, LabelledImages, Method
from pipeline import __version__
from pipeline.blackbox.client import Meter, MeteredBox, Pool
from pipeline.budget import Phase, row_columns
from pipeline.data.images import Images
from pipeline.errors import (
    BudgetExceeded,
    CodeMismatch,
    DataError,
    FareboxError,
    LedgerError,
    MethodError,
    StorageError,
    first_line,
)
from pipeline.files import strict_json
from pipeline.results.store import ResultRow, ResultStore
from pipeline.source_code import texts_digest
from pipeline.trials.boundary import Session
from pipeline.trials.checkpoint import Checkpoint
from pipeline.trials.evaluate import metrics, predict, test_labels
from pipeline.trials.isolation import process_state_kept
from pipeline.trials.plan import TrialSpec
from pipeline.trials.protocol import EvalSet
from pipeline.trials.supervisor import Supervisor
from pipeline.trials.watchdog import Watchdog

LARGEST_CURVE = 10_000
"""Test images above which no curve is drawn."""


@dataclass
class State:
    """What a checkpoint holds. Everything that the rest of the trial depends on is in it."""

    method: Method
    meter: Meter
    started: bool = False
    finished: bool = False
    truncated: str | None = None
    steps: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, int, float]] = field(default_factory=list)
    label_reads: Counter[str] = field(default_factory=Counter)
    """How often each test set's labels were read."""


def few_shot_task(spec: TrialSpec) -> FewShotTask:
    """The task that the method is given: no test image is in it."""
    source, card = spec.dataset.source, spec.dataset.card

    def images(split: str, rows: tuple[int, ...]) -> LabelledImages:
        chosen = np.asarray(rows, dtype=np.int64)
        found = Images.plain(source, split, chosen, card.augment)
        return LabelledImages(found, torch.from_numpy(source.labels[chosen]))

    return FewShotTask(
        dataset=card.name,
        classes=spec.tests[0].classes,
        shots=spec.shots,
        train=images("train", spec.split.train),
        val=images("val", spec.split.val),
        views=spec.views,
        fresh_views=spec.fresh_views,
    )


def run_trial(
    spec: TrialSpec,
    pool: Pool,
    storage: str,
    store: ResultStore,
    checkpoint_s: float = 20.0,
    threads: int = 1,
    timeout_s: float = 3600.0,
    dump: Path | None = None,
) -> list[ResultRow]:
    """Run, or continue, a trial to its rows, which are written to the store. Errors of ours become a `failed` row.

    timeout_s: seconds without a return or a call to the box after which the method has failed; 0 for no limit.
    dump: see Watchdog.

    Raises CodeMismatch, LedgerError and StorageError: they concern every trial of the run.
    """
    cls, name = spec.choice.info.cls, spec.choice.name
    checkpoint = Checkpoint(store.storage / "checkpoints", spec.account)
    state = checkpoint.load() or State(spec.choice.build(), Meter())
    box = MeteredBox(pool, storage, spec.account, spec.choice.info.access, spec.allotment, state.meter)
    common = _common(spec, pool, threads)
    try:
        if pool.info.identity != spec.model_identity:
            raise DataError("the weights changed after the run was planned: type the same command again")
        with (
            Watchdog(timeout_s, dump) as watchdog,
            Session(box, name, watchdog) as session,
            process_state_kept(),
            Supervisor(session, cls, spec.seed) as supervisor,
        ):
            _fit(spec, state, supervisor, checkpoint, checkpoint_s)
            rows = [_score(spec, state, supervisor, test, store, common) for test in spec.tests]
    except (CodeMismatch, LedgerError, StorageError):
        raise
    except FareboxError as error:  # the checkpoint stays: the same command goes on from it
        return [write_failure(spec, error, store, common | row_columns(state.meter.bills))]
    store.write(rows)
    checkpoint.clear()
    return rows


def run_recorded(spec: TrialSpec, pool: Pool, storage: str, store: ResultStore, dump: Path, **options: Any) -> None:
    """Run a trial as a worker of a sweep: whatever the method raises becomes a `failed` row.

    dump: file of the watchdog; one with content was left by a worker that had to end itself, and is not tried again.
    options: those of `run_trial`.

    Raises CodeMismatch, LedgerError and StorageError.
    """
    try:
        if dump.exists() and (stacks := dump.read_text(errors="replace")):
            error = MethodError(
                f"{spec.choice.name} neither returned nor called the box for {options.get('timeout_s')} s and could "
                "not be interrupted: its worker was ended (raise trial_timeout_s if the method needs longer)"
            )
            error.add_note(stacks)
            raise error
        run_trial(spec, pool, storage, store, dump=dump, **options)
    except (CodeMismatch, LedgerError, StorageError):
        raise
    except BaseException as error:  # also KeyboardInterrupt: a method's own exceptions must not stop the other trials
        write_failure(spec, error, store, spec_columns(spec))


def _fit(spec: TrialSpec, state: State, supervisor: Supervisor, checkpoint: Checkpoint, every_s: float) -> None:
    method, box = state.method, supervisor.session.method_box
    task = supervisor.task(few_shot_task(spec))
    saved = began = time.monotonic()
    before = state.seconds
    try:
        while not state.finished:
            if not state.started:
                supervisor.call("start", method.start, task, box, np.random.default_rng(spec.seed))
                state.started = True
            else:
                state.steps += 1
                state.finished = not supervisor.call(f"step {state.steps}", method.step, box)
            _mark_curve(spec, state, supervisor)
            state.seconds = before + time.monotonic() - began
            if time.monotonic() - saved >= every_s:
                checkpoint.save(state)
                saved = time.monotonic()
    except BudgetExceeded as error:
        if not state.started:
            raise
        state.truncated, state.finished = str(error), True
    supervisor.check_result(method)
    if state.seconds > every_s:
        checkpoint.save(state)


def _mark_curve(spec: TrialSpec, state: State, supervisor: Supervisor) -> None:
    """Score a copy at `spec.curve` points equally spaced in the predicted bill: a diagnostic, in its own phase."""
    unit = "images" if spec.allotment.requests is None and spec.allotment.images is not None else "requests"
    planned, spent = getattr(spec.predicted, unit), getattr(state.meter.paid, unit)
    if not spec.curve or not planned or spent * spec.curve < planned * (len(state.curve) + 1):
        return
    if spec.dataset.card.test > LARGEST_CURVE:
        return
    test = spec.tests[0]
    logits, _ = predict(state.method, supervisor, test, test.classes, Phase.CURVE)
    accuracy = 100 * float((logits.argmax(1) == test_labels(test, state.label_reads)).double().mean())
    while spent * spec.curve >= planned * (len(state.curve) + 1):
        state.curve.append((state.meter.paid.requests, state.meter.paid.images, accuracy))


def _score(
    spec: TrialSpec, state: State, supervisor: Supervisor, test: EvalSet, store: ResultStore, common: dict[str, Any]
) -> ResultRow:
    before = state.meter.bills[Phase.EVALUATE]
    state.meter.bills[Phase.EVALUATE] = Bill()
    logits, keys = predict(state.method, supervisor, test, spec.tests[0].classes, Phase.EVALUATE)
    bills = dict(state.meter.bills)
    state.meter.bills[Phase.EVALUATE] += before
    labels = test_labels(test, state.label_reads)
    file, digest = store.write_predictions(spec.trial_id, test.name, keys, labels.numpy(), logits.numpy())
    method = state.method
    columns: dict[str, Any] = common | metrics(logits, labels) | row_columns(bills)
    return ResultRow(
        **columns,
        test_set=test.name,
        test_digest=test.digest,
        kind=test.kind,
        status="truncated" if state.truncated else "done",
        error=state.truncated,
        n_test=len(labels),
        n_classes=logits.shape[1],
        papers_count=method.papers_count,
        labels_used=len(spec.split.train) + len(spec.split.val),
        seconds=state.seconds,
        trainable_params=method.trainable_params,
        client_bytes=sum(t.numel() * t.element_size() for t in method.deployed().values()),
        computed_images=state.meter.computed_images,
        computed_prompts=state.meter.computed_prompts,
        cache_hits=state.meter.cache_hits,
        notes=strict_json(method.notes, sort_keys=True),
        curve=strict_json(state.curve),
        test_label_reads=state.label_reads[test.name],
        predictions_file=file,
        predictions_digest=digest,
    )


def write_failure(spec: TrialSpec, error: BaseException, store: ResultStore, columns: dict[str, Any]) -> ResultRow:
    """Write the row of a trial that an error ended: the cause in one line, which names the file of its traceback."""
    file = store.write_traceback(spec.trial_id, spec.name, error)
    row = failed_row(spec, f"{type(error).__name__}: {first_line(error)} (traceback in {file})", columns)
    store.write([row])
    return row


def failed_row(spec: TrialSpec, error: str, common: dict[str, Any], status: str = "failed") -> ResultRow:
    """The row of a trial without a score: its bill is in the ledger."""
    test = spec.tests[0]
    return ResultRow(**common, test_set=test.name, kind=test.kind, status=status, error=error.splitlines()[0])


def _common(spec: TrialSpec, pool: Pool, threads: int) -> dict[str, Any]:
    info = pool.info
    return spec_columns(spec) | {
        "model_digest": info.identity,
        "precision": info.precision,
        "transform": info.transform,
        "device": info.device,
        "threads": threads,
    }


def spec_columns(spec: TrialSpec) -> dict[str, Any]:
    """The columns of a row that the spec and this machine fix."""
    return {
        "trial_id": spec.trial_id,
        "sweep": spec.sweep,
        "method": spec.choice.name,
        "base_method": spec.choice.info.name,
        "method_version": spec.choice.info.version,
        "method_digest": spec.method_digest,
        "code_digest": spec.code_digest,
        "access": spec.choice.info.access.label,
        "model": spec.model.name,
        "model_digest": spec.model_identity,
        "precision": spec.model.precision,
        "transform": spec.transform,
        "dataset": spec.dataset.name,
        "data_digest": spec.data_digest,
        "template": spec.dataset.card.template,
        "templates_digest": texts_digest(spec.dataset.card.templates),
        "classnames_digest": spec.classnames_digest,
        "augment": spec.dataset.card.augment,
        "split_digest": spec.split_digest,
        "shots": spec.shots,
        "seed": spec.seed,
        "views": "fresh" if spec.fresh_views else str(spec.views) if spec.choice.info.uses_views else "",
        "validation": spec.validation,
        "hparams": spec.hparams,
        "budget_requests": spec.allotment.requests,
        "budget_images": spec.allotment.images,
        "config": strict_json(dict(spec.choice.config), sort_keys=True, default=list),
        "cpu": cpu_name(),
        "torch_version": torch.__version__,
        "farebox_version": __version__,
        "python_version": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def cpu_name() -> str:
    """The CPU's model name; bit-identity is claimed per model."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
