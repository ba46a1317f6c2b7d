"""`farebox run` in this process: all of the command except Ray, whose place a loop over the trials takes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest

from pipeline.blackbox.local_pool import LocalPool
from pipeline.config.compose import Config
from pipeline.console import Echo
from pipeline.ledger.ledger import Ledger
from pipeline.remote.opening import opened_endpoint
from pipeline.remote.wallet import LedgerWallet
from pipeline.results.mirroring import MirrorRows
from pipeline.results.store import ResultStore
from pipeline.sweep.event_log import EventLog
from pipeline.sweep.money import costs_money
from pipeline.trials.plan import TrialSpec
from pipeline.trials.trial import run_trial


def run_in_turn(
    config: Config,
    funded: Sequence[TrialSpec],
    storage_id: str,
    store: ResultStore,
    ledger: Ledger,
    echo: Echo,
    mirror: MirrorRows,
    log: EventLog,
) -> dict[str, str]:
    """Run the trials one after another, in place of `pipeline.sweep.on_ray.run_on_ray`."""
    wallet = LedgerWallet(ledger.money, storage_id) if costs_money(config) else None
    with opened_endpoint(config, config.storage, wallet) as endpoint:
        pool = LocalPool(endpoint, ledger)
        for spec in funded:
            log.trial("trial started", spec.trial_id)
            rows = run_trial(spec, pool, storage_id, store, config.checkpoint_s)
            log.ended(rows)
            mirror(rows)
    return {}


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Until the block ends, sweeps of this process run their trials in turn, and Ray cannot be started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pipeline.sweep.on_ray", SimpleNamespace(run_on_ray=run_in_turn))
        yield
