"""Result rows of trials: the columns that the plan and the machine determine, and rows of failed trials."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.errors import first_line
from pipeline.files import strict_json
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.source_code import texts_digest
from pipeline.trials.plan import TrialSpec

if TYPE_CHECKING:
    from pipeline.blackbox.client import Pool  # imports torch


def write_failure(spec: TrialSpec, error: BaseException, store: ResultStore, columns: dict[str, Any]) -> ResultRow:
    """Write and return the row of a trial that an error ended. The traceback goes to a file that the row names."""
    file = store.write_traceback(spec.trial_id, spec.name, error)
    row = failed_row(spec, f"{type(error).__name__}: {first_line(error)} (traceback in {file})", columns)
    store.write([row])
    return row


def failed_row(spec: TrialSpec, error: str, common: dict[str, Any], status: str = "failed") -> ResultRow:
    """Return a row without a score, for the first test set. `common`: columns from `spec_columns`, and more."""
    test = spec.eval_sets[0]
    return ResultRow(**common, test_set=test.name, kind=test.kind, status=status, error=error.splitlines()[0])


def common_columns(spec: TrialSpec, pool: Pool, threads: int) -> dict[str, Any]:
    """Return the columns that all rows of a trial share."""
    info = pool.info
    return spec_columns(spec) | {
        "model_digest": info.identity,
        "precision": info.precision,
        "transform": info.transform,
        "device": info.device,
        "threads": threads,
    }


def spec_columns(spec: TrialSpec) -> dict[str, Any]:
    """Return the columns of a row that depend on the spec and this machine only."""
    import torch  # a run with nothing to do makes no row

    drawn = set(spec.dataset.source.labels[list(spec.split.train)].tolist())
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
        "local_model": spec.local.card.name if spec.local else "",
        "local_digest": spec.local.digest if spec.local else "",
        "local_params": spec.local.params if spec.local else None,
        "dataset": spec.dataset.name,
        "data_digest": spec.data_digest,
        "template": spec.dataset.card.template,
        "templates_digest": texts_digest(spec.dataset.card.templates),
        "classnames_digest": spec.classnames_digest,
        "augment": spec.dataset.card.augment,
        "split_digest": spec.split_digest,
        "draw": spec.draw,
        "missing_classes": len(spec.eval_sets[0].labels) - len(drawn),
        "shots": spec.shots,
        "seed": spec.seed,
        "views": "fresh" if spec.fresh_views else str(spec.views) if spec.choice.info.uses_views else "",
        "validation": spec.validation,
        "hparams": spec.hparams,
        "budget_requests": spec.allotment.requests,
        "budget_images": spec.allotment.images,
        "answers": spec.answers.text,
        "config": strict_json(_config(spec), sort_keys=True, default=list),
        "cpu": cpu_name(),
        "torch_version": torch.__version__,
        "farebox_version": __version__,
        "python_version": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _config(spec: TrialSpec) -> dict[str, Any]:
    """Return the hyperparameters of a trial, and of a tuned method how it tunes them."""
    tuning = spec.choice.tuning
    return dict(spec.choice.config) | ({} if tuning is None else {"tune": asdict(tuning)})


@cache
def cpu_name() -> str:
    """Return the model name of the CPU. Results are bit-identical on equal models only."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
