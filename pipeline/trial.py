"""One trial, which is the science: draw the task, fit the method through the metered box, score it on the test sets.

No Ray here: `run_trial` works from a notebook with a `LocalPool`.
"""

from __future__ import annotations

import copy
import json
import platform
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softmax

from methods.base import Bill, Classes, FewShotTask, LabelledImages, Method
from pipeline import __version__
from pipeline.blackbox.bill import Phase, row_columns
from pipeline.blackbox.client import Meter, MeteredBox, Pool
from pipeline.checkpoint import Checkpoint
from pipeline.config import DatasetCard
from pipeline.data.images import Images
from pipeline.errors import BudgetExceeded, FareboxError
from pipeline.plan import TrialSpec, source_of
from pipeline.results import ResultRow, Store

TEST_BATCH = 500
"""Images in one prediction call: a method sees them shuffled, without labels."""
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
    seconds: float = 0.0
    curve: list[tuple[int, int, float]] = field(default_factory=list)


def few_shot_task(spec: TrialSpec) -> FewShotTask:
    """The task that the method is given: no test image is in it."""
    source, card = source_of(spec.dataset), spec.dataset

    def images(split: str, rows: tuple[int, ...]) -> LabelledImages:
        found = Images.plain(source, split, np.asarray(rows, dtype=np.int64), card.augment)
        return LabelledImages(found, found.labels)

    return FewShotTask(
        dataset=card.name,
        classes=Classes(source.classnames, card.template, card.templates),
        shots=spec.shots,
        train=images("train", spec.split.train),
        val=images("val", spec.split.val),
        views=spec.views,
        fresh_views=spec.fresh_views,
    )


def run_trial(
    spec: TrialSpec, pool: Pool, storage: str, store: Store, checkpoint_s: float = 20.0, threads: int = 1
) -> list[ResultRow]:
    """Run, or continue, a trial to its rows, which are written to the store. Errors of ours become a `failed` row."""
    checkpoint = Checkpoint(store.storage / "checkpoints", spec.account)
    state = checkpoint.load() or State(spec.choice.build(), Meter())
    box = MeteredBox(pool, storage, spec.account, spec.choice.info.access, spec.allotment, state.meter)
    common = _common(spec, pool, threads)
    try:
        _fit(spec, state, box, checkpoint, checkpoint_s)
        rows = [_score(spec, state, box, card, store, common) for card in (spec.dataset, *spec.shifts)]
    except FareboxError as error:
        rows = [failed_row(spec, f"{type(error).__name__}: {error}", common | row_columns(state.meter.bills))]
        store.write(rows)  # the checkpoint stays: the same command goes on from it
        return rows
    store.write(rows)
    checkpoint.clear()
    return rows


def _fit(spec: TrialSpec, state: State, box: MeteredBox, checkpoint: Checkpoint, every_s: float) -> None:
    method, task = state.method, few_shot_task(spec)
    saved = began = time.monotonic()
    before = state.seconds
    try:
        while not state.finished:
            if not state.started:
                method.start(task, box, np.random.default_rng(spec.seed))
                state.started = True
            else:
                state.finished = not method.step(box)
            _mark_curve(spec, state, box)
            state.seconds = before + time.monotonic() - began
            if time.monotonic() - saved >= every_s:
                checkpoint.save(state)
                saved = time.monotonic()
    except BudgetExceeded as error:
        if not state.started:
            raise
        state.truncated, state.finished = str(error), True
    if state.seconds > every_s:
        checkpoint.save(state)


def _mark_curve(spec: TrialSpec, state: State, box: MeteredBox) -> None:
    """Score a copy at `spec.curve` points equally spaced in the predicted bill: a diagnostic, in its own phase."""
    unit = "images" if spec.allotment.requests is None and spec.allotment.images is not None else "requests"
    planned, spent = getattr(spec.predicted, unit), getattr(state.meter.paid, unit)
    if not spec.curve or not planned or spent * spec.curve < planned * (len(state.curve) + 1):
        return
    if spec.dataset.test > LARGEST_CURVE:
        return
    box.phase = Phase.CURVE
    labels, logits, _ = predict(state.method, box, spec.dataset, spec.seed)
    box.phase = Phase.ADAPT
    accuracy = 100 * float((logits.argmax(1) == labels).double().mean())
    while spent * spec.curve >= planned * (len(state.curve) + 1):
        state.curve.append((state.meter.paid.requests, state.meter.paid.images, accuracy))


def predict(method: Method, box: MeteredBox, card: DatasetCard, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Labels [B], logits [B, C] and keys of a test set, in file order: predicted by a copy, in shuffled batches."""
    source = source_of(card)
    images = Images.plain(source, "test", source.rows_of("test"), card.augment)
    order = np.random.default_rng(seed).permutation(len(images))
    subject = copy.deepcopy(method)
    shuffled = torch.cat(
        [
            subject.predict(images[torch.from_numpy(order[i : i + TEST_BATCH])], box)
            for i in range(0, len(images), TEST_BATCH)
        ]
    )
    logits = torch.empty_like(shuffled)
    logits[torch.from_numpy(order)] = shuffled
    return images.labels, logits, images.keys


def metrics(logits_BC: Tensor, labels_B: Tensor) -> dict[str, float]:
    """Accuracy, mean of class accuracies (both 0 to 100), negative log-likelihood (nats), 15-bin ECE (0 to 100)."""
    logits_BC = logits_BC.double()
    hit_B = (logits_BC.argmax(1) == labels_B).double()
    confidence_B = softmax(logits_BC, 1).amax(1)
    member_BC = one_hot(labels_B, logits_BC.shape[1]).double()
    present_C = member_BC.sum(0) > 0
    by_class_C = (hit_B @ member_BC)[present_C] / member_BC.sum(0)[present_C]
    bins_B = (confidence_B * 15).long().clamp(max=14)
    gaps = [
        abs(float(hit_B[bins_B == b].sum() - confidence_B[bins_B == b].sum())) for b in range(15) if (bins_B == b).any()
    ]
    return {
        "accuracy": 100 * float(hit_B.mean()),
        "macro_accuracy": 100 * float(by_class_C.mean()),
        "nll": float(cross_entropy(logits_BC, labels_B)),
        "ece": 100 * sum(gaps) / len(labels_B),
    }


def _score(
    spec: TrialSpec, state: State, box: MeteredBox, card: DatasetCard, store: Store, common: dict[str, Any]
) -> ResultRow:
    box.phase = Phase.EVALUATE
    before = state.meter.bills[Phase.EVALUATE]
    state.meter.bills[Phase.EVALUATE] = Bill()
    labels, logits, keys = predict(state.method, box, card, spec.seed)
    bills = dict(state.meter.bills)
    state.meter.bills[Phase.EVALUATE] += before
    file, digest = store.write_predictions(spec.trial_id, card.name, keys, labels.numpy(), logits.numpy())
    method = state.method
    columns: dict[str, Any] = common | metrics(logits, labels) | row_columns(bills)
    return ResultRow(
        **columns,
        test_set=card.name,
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
        notes=json.dumps(method.notes, sort_keys=True),
        curve=json.dumps(state.curve),
        test_label_reads=1 + (len(state.curve) if card is spec.dataset else 0),
        predictions_file=file,
        predictions_digest=digest,
    )


def failed_row(spec: TrialSpec, error: str, common: dict[str, Any], status: str = "failed") -> ResultRow:
    """The row of a trial without a score: its bill is in the ledger."""
    return ResultRow(**common, test_set=spec.dataset.name, status=status, error=error.splitlines()[0])


def _common(spec: TrialSpec, pool: Pool, threads: int) -> dict[str, Any]:
    info = pool.info
    return spec_columns(spec) | {
        "model_digest": info.identity,
        "precision": info.precision,
        "transform": info.transform,
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
        "access": spec.choice.info.access.label,
        "model": spec.model.name,
        "model_digest": spec.model_identity,
        "precision": spec.model.precision,
        "transform": "",
        "dataset": spec.dataset.name,
        "split_digest": spec.split_digest,
        "shots": spec.shots,
        "seed": spec.seed,
        "views": "fresh" if spec.fresh_views else str(spec.views),
        "validation": spec.validation,
        "settings": spec.settings,
        "budget_requests": spec.allotment.requests,
        "budget_images": spec.allotment.images,
        "config": json.dumps(dict(spec.choice.config), sort_keys=True, default=list),
        "cpu": cpu_name(),
        "torch_version": torch.__version__,
        "farebox_version": __version__,
        "python_version": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_name() -> str:
    """The CPU's model name; bit-identity is claimed per model."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
