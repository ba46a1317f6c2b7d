"""Run one trial: draw the few-shot task, fit the method through the metered box, score it on the test sets.

This module does not use Ray: `run_trial` works in a notebook, with a `LocalPool`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.base import Bill, FewShotTask, LabelledImages
from pipeline.blackbox.client import Meter, MeteredBox, Pool
from pipeline.budget import Phase, http_columns, row_columns
from pipeline.data.images import Images
from pipeline.errors import ENDS_A_RUN, DataError, FareboxError, MethodError
from pipeline.files import strict_json
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.trials.boundary import Session
from pipeline.trials.checkpoint import Checkpoint
from pipeline.trials.evaluate import eval_labels, metrics, predict
from pipeline.trials.fit import Fit, State
from pipeline.trials.isolation import process_state_kept
from pipeline.trials.local_handle import opened
from pipeline.trials.plan import TrialSpec
from pipeline.trials.protocol import EvalSet
from pipeline.trials.rows import common_columns, spec_columns, write_failure
from pipeline.trials.supervisor import Supervisor
from pipeline.trials.watchdog import Watchdog


def few_shot_task(spec: TrialSpec) -> FewShotTask:
    """Return the task of a trial. It contains train and val images only."""
    source, card = spec.dataset.source, spec.dataset.card

    def images(split: str, rows: tuple[int, ...]) -> LabelledImages:
        chosen = np.asarray(rows, dtype=np.int64)
        labels = torch.from_numpy(source.labels[chosen])
        return LabelledImages(Images.plain(source, split, chosen, card.augment), labels)

    return FewShotTask(
        dataset=card.name,
        classes=spec.eval_sets[0].classes,
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
    """Run a trial, or continue it from its checkpoint, and write its rows to the store.

    Args:
        spec: the planned trial. Its bill must be reserved in the ledger of `pool`.
        pool: sends the requests.
        storage: id of the storage, part of every charge.
        store: receives rows, predictions and checkpoints.
        checkpoint_s: seconds between checkpoints.
        threads: torch threads of the endpoint, recorded in the rows.
        timeout_s: seconds without a return or a call to the box after which the method has failed; 0 for no limit.
        dump: see `Watchdog`.

    Returns:
        One row for each test set. After a `FareboxError` that concerns this trial alone: one row with status "failed".

    Raises:
        CodeMismatch, LedgerError, StorageError: see `pipeline.errors.ENDS_A_RUN`.
        Exception: the method raised it.
    """
    cls, name = spec.choice.info.cls, spec.choice.name
    checkpoint = Checkpoint(store.storage, spec.account)
    state = checkpoint.load() or State(spec.choice.build(), Meter())
    box = MeteredBox(pool, storage, spec.account, spec.choice.info.access, spec.allotment, state.meter, spec.answers)
    columns = common_columns(spec, pool, threads)
    try:
        if pool.info.identity != spec.model_identity:
            raise DataError("the weights changed after the run was planned: type the same command again")
        with (
            Watchdog(timeout_s, dump) as watchdog,
            Session(box, name, watchdog, spec.predicted, spec.choice.info.uses_text_norm) as session,
            opened(session, spec.local) as local,
            process_state_kept(),
            Supervisor(session, cls, spec.seed) as supervisor,
        ):
            task = replace(few_shot_task(spec), local=local)
            fit = Fit(spec, state, task, supervisor, checkpoint, checkpoint_s)
            client_bytes = sum(t.numel() * t.element_size() for t in fit.run().values())
            fit_columns = columns | fit.columns() | {"client_bytes": client_bytes}
            rows = [_score(spec, state, supervisor, test, store, fit_columns) for test in spec.eval_sets]
    except ENDS_A_RUN:
        raise
    except FareboxError as error:  # the checkpoint is kept: the same command continues from it
        spent = row_columns(state.meter.bills) | http_columns(state.meter.http)
        return [write_failure(spec, error, store, columns | spent)]
    store.write(rows)
    checkpoint.clear()
    return rows


def run_recorded(spec: TrialSpec, pool: Pool, storage: str, store: ResultStore, dump: Path, **options: Any) -> None:
    """Run a trial in a worker of a sweep: whatever the method raises becomes a row with status "failed".

    Args:
        spec, pool, storage, store: see `run_trial`.
        dump: file of the watchdog. If it has content, an earlier worker had to end itself: the trial fails at once.
        **options: further arguments of `run_trial`.

    Raises:
        CodeMismatch, LedgerError, StorageError: see `pipeline.errors.ENDS_A_RUN`.
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
    except ENDS_A_RUN:
        raise
    except BaseException as error:  # also a KeyboardInterrupt that the method raised: it must not stop other trials
        write_failure(spec, error, store, spec_columns(spec))


def _score(
    spec: TrialSpec, state: State, supervisor: Supervisor, test: EvalSet, store: ResultStore, common: dict[str, Any]
) -> ResultRow:
    """Predict one test set with the fitted method and return its row."""
    with _own_evaluation_bill(state.meter):
        logits, keys = predict(state.method, supervisor, test, spec.eval_sets[0].classes, Phase.EVALUATE)
        bills = row_columns(state.meter.bills)
    labels = eval_labels(test, state.label_reads)
    file, digest = store.write_predictions(spec.trial_id, test.name, keys, labels.numpy(), logits.numpy())
    method = state.method
    columns: dict[str, Any] = common | metrics(logits, labels) | bills
    return ResultRow(
        **columns,
        test_set=test.name,
        test_digest=test.digest,
        kind=test.kind,
        status="budget_exhausted" if state.truncated else "done",
        error=state.truncated,
        n_test=len(labels),
        n_classes=logits.shape[1],
        paper_queries=method.paper_queries,
        labels_used=len(spec.split.train) + len(spec.split.val),
        seconds=state.seconds,
        trainable_params=method.trainable_params,
        computed_images=state.meter.computed_images,
        computed_prompts=state.meter.computed_prompts,
        cache_hits=state.meter.cache_hits,
        **http_columns(state.meter.http),
        curve=strict_json(state.curve),
        test_label_reads=state.label_reads[test.name],
        predictions_file=file,
        predictions_digest=digest,
    )


@contextlib.contextmanager
def _own_evaluation_bill(meter: Meter) -> Iterator[None]:
    """Let the meter's evaluation bill start at zero in the block; add the bill from before it at the end."""
    before, meter.bills[Phase.EVALUATE] = meter.bills[Phase.EVALUATE], Bill()
    try:
        yield
    finally:
        meter.bills[Phase.EVALUATE] += before
