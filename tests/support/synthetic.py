"""Rows as a sweep of 12 methods would make them, with effects that are known: nothing here was measured."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from methods.base import Bill
from pipeline.budget import Phase, row_columns
from pipeline.results.identity import Selection, select
from pipeline.results.leaderboard import ReadPredictions
from pipeline.results.report import Report, make_report
from pipeline.results.row import ResultRow, to_table
from pipeline.results.store import ResultStore

METHODS: dict[str, tuple[str, float]] = {
    "zero_shot": ("TEXT+SCORES", 0.0),
    "zero_shot_ensemble": ("TEXT+SCORES", 2.0),
    "pixel_nn": ("", -4.0),
    "logit_head": ("TEXT+SCORES", 14.0),
    "bbt": ("SOFT+SCORES", 4.0),
    "craft": ("SOFT+SCORES", 15.0),
    "cbbt_prompt": ("SOFT+SCORES", 6.0),
    "cbbt": ("SOFT+FEATURES", 17.0),
    "linear_probe": ("FEATURES", 12.0),
    "taskres": ("TEXT+FEATURES", 18.0),
    "tip_adapter": ("TEXT+FEATURES", 10.0),
    "tip_adapter_f": ("TEXT+FEATURES", 19.0),
}
"""Access, and gain over zero-shot at 16 shots."""
DATASETS = {"icons": (37.0, ("icons_outline",)), "digits": (22.0, ()), "emoji": (45.0, ("emoji_mono",))}
"""Zero-shot accuracy, and shift test sets."""
N_TEST = 240


def make(**changes: Any) -> ResultRow:
    """One plausible row; say only what the test is about."""
    plain: dict[str, Any] = {
        "sweep": "synthetic",
        "method": "zero_shot",
        "method_version": 1,
        "method_digest": "m" * 64,
        "access": "TEXT+SCORES",
        "model": "tiny",
        "model_digest": "d" * 64,
        "precision": "fp32",
        "transform": "t" * 64,
        "dataset": "icons",
        "split_digest": "s" * 64,
        "shots": 16,
        "seed": 1,
        "views": "10",
        "validation": "min4",
        "hparams": "default",
        "budget_requests": 8000,
        "budget_images": None,
        "status": "done",
        "created": "2026-11-22T00:00:00+00:00",
    }
    row = plain | changes
    row.setdefault("test_set", row["dataset"])
    row.setdefault("base_method", row["method"])
    row.setdefault("kind", "source" if row["test_set"] == row["dataset"] else "shift")
    spec = [row[k] for k in ("method", "dataset", "shots", "seed", "budget_requests", "budget_images", "views")]
    row.setdefault("trial_id", f"{zlib.crc32(json.dumps([*spec, row.get('config')]).encode()):08x}")
    return ResultRow(**row)


def _bill(method: str, shots: int, budget_requests: int | None, budget_images: int | None) -> Bill:
    rows = 10 * shots
    if method in ("zero_shot", "zero_shot_ensemble", "pixel_nn"):
        return Bill()
    if method in ("logit_head", "linear_probe", "taskres", "tip_adapter", "tip_adapter_f"):
        return Bill(requests=2, images=rows, prompts=10, outputs=rows * 10)
    each = 8 if method.startswith("cbbt") else rows
    n = min(budget_requests or 10**9, (budget_images or 10**9) // each)
    return Bill(requests=n, images=n * each, prompts=10 * n, outputs=n * each * 10)


def sweep(
    shots: tuple[int, ...] = (1, 4, 16),
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5),
    budgets: tuple[tuple[int | None, int | None], ...] = ((1000, None), (8000, None)),
    methods: tuple[str, ...] = tuple(METHODS),
) -> Iterator[list[ResultRow]]:
    """The rows of each trial, the source test set first."""
    for method in methods:
        access, gain = METHODS[method]
        for dataset, (floor, shifts) in DATASETS.items():
            for k in shots:
                for budget in budgets:
                    for seed in seeds:
                        yield _trial(method, access, gain, dataset, floor, shifts, k, budget, seed)


def _trial(
    method: str,
    access: str,
    gain: float,
    dataset: str,
    floor: float,
    shifts: tuple[str, ...],
    shots: int,
    budget: tuple[int | None, int | None],
    seed: int,
) -> list[ResultRow]:
    fitted = method not in ("zero_shot", "zero_shot_ensemble")
    rng = np.random.default_rng(zlib.crc32(f"{method}{dataset}{shots}{budget}{seed}".encode()))
    searched = method in ("bbt", "craft", "cbbt", "cbbt_prompt")
    limit = (budget[0] or 8000) if budget[1] is None else budget[1] / 100
    effect = gain * (0.35 + 0.65 * np.log2(shots) / 4 if fitted else 1) * (np.log10(limit) / 3.9 if searched else 1)
    bill = _bill(method, shots, *budget)
    rows = []
    for test_set in (dataset, *shifts):
        accuracy = floor + effect * (1 if test_set == dataset else 0.4) + (rng.normal(0, 1.2) if fitted else 0)
        right = round(N_TEST * accuracy / 100)
        evaluate = Bill(requests=1 if method != "pixel_nn" else 0, images=N_TEST, prompts=10, outputs=N_TEST * 10)
        rows.append(
            make(
                method=method,
                access=access,
                dataset=dataset,
                test_set=test_set,
                shots=shots,
                seed=seed,
                budget_requests=budget[0],
                budget_images=budget[1],
                accuracy=100 * right / N_TEST,
                macro_accuracy=100 * right / N_TEST,
                nll=2.0 - accuracy / 100,
                ece=7.5,
                n_test=N_TEST,
                n_classes=10,
                labels_used=10 * (shots + min(shots, 4)),
                seconds=12.5 if searched else 0.8,
                trainable_params=5120 if fitted else 0,
                client_bytes=20480 if fitted else 0,
                paper_queries=float(bill.requests),
                config=json.dumps({"popsize": 20, "sigma": 0.5} if searched else {}),
                curve=json.dumps([[100, 1600, accuracy - 5], [1000, 16000, accuracy]] if searched else []),
                **row_columns({Phase.ADAPT: bill, Phase.EVALUATE: evaluate}),
            )
        )
    return rows


def write_store(storage: Path, **which: Any) -> ResultStore:
    """A store with such a sweep, its predictions right on as many images as each row says."""
    store = ResultStore(storage)
    keys, labels = [f"image{i}" for i in range(N_TEST)], np.arange(N_TEST) % 10
    for rows in sweep(**which):
        written = []
        for row in rows:
            rng = np.random.default_rng(zlib.crc32(f"{row.trial_id}{row.test_set}".encode()))
            right = rng.permutation(N_TEST) < round(N_TEST * (row.accuracy or 0) / 100)
            logits = np.eye(10, dtype=np.float32)[np.where(right, labels, (labels + 1) % 10)] * 10
            file, digest = store.write_predictions(row.trial_id, row.test_set, keys, labels, logits)
            written.append(make(**{**vars(row), "predictions_file": file, "predictions_digest": digest}))
        store.write(written)
    return store


def report_of(
    rows: Selection | pa.Table | Sequence[ResultRow], predictions: ReadPredictions | None = None, **options: Any
) -> Report:
    """The report of these rows."""
    if not isinstance(rows, Selection):
        rows = select(rows if isinstance(rows, pa.Table) else to_table(rows))
    return make_report(rows, predictions, **options)


def base_to_new(*methods: str) -> pa.Table:
    """Five seeds of base-to-new trials on two data sets; base 70, new 40 and one point a seed more on each."""
    rows = [
        make(
            **{"trial_id": f"{method}{dataset}{seed}", "method": method, "access": METHODS[method][0]},
            **{"dataset": dataset, "kind": kind, "test_set": f"{dataset}:{kind}", "seed": seed},
            accuracy=start + (seed if method != "zero_shot" else 0),
        )
        for method in methods
        for dataset in ("icons", "digits")
        for seed in range(1, 6)
        for kind, start in (("base", 70.0), ("new", 40.0))
    ]
    return to_table(rows)
