"""Run trials in this process, one after another and without Ray: for debuggers, notebooks and tests.

They are paid from the same ledger, and their rows are written to the same storage, as in a sweep on Ray.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pipeline.blackbox.local_pool import LocalPool
from pipeline.config.compose import check_price
from pipeline.errors import ConfigError
from pipeline.remote.opening import opened_endpoint
from pipeline.remote.permission import refuse_unconfirmed
from pipeline.remote.wallet import LedgerWallet
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.sweep import reservations
from pipeline.sweep.money import costs_money
from pipeline.sweep.preflight import refuse_network_sqlite
from pipeline.sweep.run_ledger import open_ledger
from pipeline.sweep.storage import alone, check_writable
from pipeline.trials.isolation import torch_threads
from pipeline.trials.plan import SweepPlan, announcements
from pipeline.trials.trial import run_trial


def run_single(plan: SweepPlan, echo: Callable[[str], None]) -> list[ResultRow]:
    """Run the only trial of a plan, or continue it from its checkpoint.

    An exception of the method propagates, so that a debugger stops where it was raised; the calls made so far stay
    paid, and the next run replays them. A trial with a finished result is not run again.

    Returns:
        One row for each test set.

    Raises:
        ConfigError: the plan has more than one trial, or the storage cannot be used.
        FareboxError: the ledger or the storage failed.
    """
    if len(plan.trials) != 1:
        names = ", ".join(trial.name for trial in plan.trials[:3])
        raise ConfigError(
            f"expected one trial, found {len(plan.trials)} ({names}, ...): name one method, data set, seed, number of "
            "shots and budget"
        )
    run_all(plan, echo)
    return ResultStore(plan.config.storage).rows_of(plan.trials[0].trial_id)


def run_all(plan: SweepPlan, echo: Callable[[str], None]) -> None:
    """Run the trials of a plan that have no result, in its order. The budget must pay for all of them.

    Raises:
        BudgetExceeded, ConfigError: the predicted bill of a trial cannot be reserved, or the storage cannot be used.
        FareboxError: the ledger or the storage failed.
    """
    config, store = plan.config, ResultStore(plan.config.storage)
    refuse_network_sqlite({"budget.global.url": config.ledger_url, "mlflow": config.mlflow})
    check_writable("storage", config.storage)
    check_writable("features", config.features)
    if config.model.http is not None:
        check_writable("records", config.records)
    with alone(config.storage):
        todo, _ = reservations.pending(plan, store)
        for line in announcements(plan):
            echo(line)
        if todo:
            check_price(config)
            refuse_unconfirmed(config)
        ledger, storage = open_ledger(config, echo)
        with contextlib.closing(ledger):
            funded, unfunded = reservations.begin(ledger, plan, todo, storage.id, echo)
            wallet = LedgerWallet(ledger.money, storage.id) if costs_money(config) else None
            try:
                if unfunded:
                    raise ConfigError(next(iter(unfunded.values())))
                if funded:
                    with torch_threads(config.threads), opened_endpoint(config, config.storage, wallet) as endpoint:
                        pool = LocalPool(endpoint, ledger)
                        for trial in funded:
                            run_trial(trial, pool, storage.id, store, config.checkpoint_s, config.threads, timeout_s=0)
            finally:
                reservations.release(ledger, storage.id, funded)
                ledger.money.release(storage.id)
            reservations.remove_checkpoints(store, plan.trials)
