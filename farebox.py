"""Farebox from Python: plan and run sweeps, run one trial in this process, open a metered black box, load results.

    import farebox

    plan = farebox.plan("sweep=demo", "methods=taskres")
    rows = farebox.run_trial("methods=taskres", "datasets=icons", "shots=4", "seeds=1", "storage=runs/one")
    results = farebox.load_results("runs/one")

Functions take the `key=value` overrides of the command line (conf/base.yaml lists every key) and raise the errors of
pipeline/errors.py. Imports are made when a function is called, so that `import farebox` and `farebox --help` are quick.
The `farebox` command starts at `main`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from methods.base import FewShotTask
    from pipeline.blackbox.client import MeteredBox
    from pipeline.config.compose import Config
    from pipeline.results.identity import Selection
    from pipeline.results.row import ResultRow
    from pipeline.results.store import ResultStore
    from pipeline.sweep.driver import Outcome
    from pipeline.trials.plan import SweepPlan

__all__ = [
    "compose",
    "few_shot_task",
    "leaderboard",
    "load_results",
    "main",
    "open_box",
    "plan",
    "run",
    "run_trial",
]


def compose(*overrides: str) -> Config:
    """Compose a configuration from files of conf/ and `key=value` overrides.

    Raises:
        ConfigError: a key, a name or a value is wrong.
    """
    from pipeline.config.compose import compose

    return compose(overrides)


def plan(*overrides: str) -> SweepPlan:
    """Plan a sweep: its trials with their ids, allotments and predicted bills. Nothing is queried or written.

    Raises:
        ConfigError, DataError: the configuration or the data cannot be used.
    """
    from pipeline.trials.plan import make_plan

    return make_plan(compose(*overrides))


def run(*overrides: str, echo: Callable[[str], None] = print) -> Outcome:
    """Run the trials of a sweep that are not done yet on Ray, as `farebox run` does, and write its leaderboard.

    `echo` receives each line that the command would print.
    """
    from pipeline.results.mirroring import BackgroundMirror
    from pipeline.results.report import publish
    from pipeline.sweep.driver import run

    config = compose(*overrides)
    mirror = BackgroundMirror(config)
    outcome = run(config, echo, mirror.add)
    mirror.close()
    publish(config, echo)
    return outcome


def run_trial(*overrides: str, echo: Callable[[str], None] = print) -> list[ResultRow]:
    """Run one trial in this process, without Ray, so that a debugger works.

    The overrides name one method, data set, seed, number of shots and budget. The trial is paid from the ledger of its
    storage and its rows are written there. An exception of the method propagates.

    Returns:
        One row for each test set. A trial that is done already is not run again.
    """
    from pipeline.sweep.in_process import run_single

    return run_single(plan(*overrides), echo)


@contextlib.contextmanager
def open_box(*overrides: str) -> Iterator[MeteredBox]:
    """Open a metered black box: the endpoint of `model=` in this process, with a ledger in memory.

    `budget.requests` and `budget.images` limit what can be queried. See `methods.base.BlackBox` for its calls;
    `box.meter.bills` holds the bill by phase. `budget.usd` limits the money of a remote model.

    Raises:
        ConfigError: the overrides name several kinds of answers.
        BudgetExceeded: by a call that would exceed the budget; it is not charged.
    """
    from pipeline.blackbox.client import MeteredBox
    from pipeline.blackbox.local_pool import LocalPool
    from pipeline.config.compose import check_price
    from pipeline.errors import ConfigError
    from pipeline.ledger.ledger import Ledger
    from pipeline.remote.opening import opened_endpoint
    from pipeline.remote.wallet import LedgerWallet
    from pipeline.sweep.money import costs_money

    config = compose(*overrides)
    if len(config.answers) != 1:
        raise ConfigError(f"expected one kind of answers, found {len(config.answers)}: name one, as in answers=topk")
    check_price(config)
    (budget,), (answers,) = config.allotments, config.answers
    with contextlib.closing(Ledger("sqlite://")) as ledger:
        ledger.open_account("box", budget)
        ledger.reserve("memory", "box", ["box"], budget)
        ledger.money.open("memory", "box", config.usd)
        wallet = LedgerWallet(ledger.money, "memory") if costs_money(config) else None
        access = answers.granted(config.model.access)
        with opened_endpoint(config, None, wallet) as endpoint:
            yield MeteredBox(LocalPool(endpoint, ledger), "memory", "box", access, budget, answers=answers)


def few_shot_task(*overrides: str) -> FewShotTask:
    """Return the few-shot task of `datasets=`, `shots=` and `seeds=`, as a method is given it.

    With `local=`, it has the local model as `task.local`.

    Raises:
        ConfigError: the overrides name more than one task.
        DataError: the data, or the weights of the local model, cannot be used.
    """
    from pipeline.errors import ConfigError
    from pipeline.local.encoder import open_encoder
    from pipeline.trials.trial import few_shot_task

    planned = plan("methods=zero_shot", *overrides)
    trials, card = planned.trials, planned.config.local
    if len(trials) != 1:
        raise ConfigError(f"expected one task, found {len(trials)}: name one data set, seed and number of shots")
    task = few_shot_task(trials[0])
    return replace(task, local=open_encoder(card)) if card else task


def load_results(storage: str | os.PathLike[str]) -> pd.DataFrame:
    """Load the results of a storage: one row for each trial and test set, with every column.

    The column `left_out` states why a row is in no mean of the leaderboard; it is empty for all others. Damaged files
    are left out and named in a warning.
    """
    _, selection = _read(storage)
    frame = selection.everything.to_pandas()
    reasons = [selection.left_out.get(key, "") for key in zip(frame["trial_id"], frame["test_set"], strict=True)]
    return frame.assign(left_out=reasons)


def leaderboard(storage: str | os.PathLike[str]) -> pd.DataFrame:
    """Load the leaderboard of a storage: one row for each method in each section, with every column."""
    from pipeline.results.leaderboard import leaderboard
    from pipeline.results.noise_floor import with_floors

    store, selection = _read(storage)
    board = leaderboard(selection.rows, store.reader(selection.rows)).board
    return with_floors(board, selection.floors).to_pandas()


def _read(storage: str | os.PathLike[str]) -> tuple[ResultStore, Selection]:
    from pipeline.errors import ConfigError
    from pipeline.results.report import read_selection
    from pipeline.results.store import ResultStore

    store = ResultStore(Path(storage))
    if not any((store.storage / name).exists() for name in ("storage_id", "results")):
        raise ConfigError(f"no results in {storage}: name the storage of a run, as in load_results('runs/demo')")
    selection = read_selection(store, store.storage.absolute().parent / "features")
    for line in store.damage():
        warnings.warn(line, stacklevel=3)
    return store, selection


def main() -> int:
    """Run the command line; return its exit code.

    A folder named `pipeline` that comes first on the path (for example with PYTHONPATH=.) would be imported instead of
    ours. `pipeline.check_packages` does the same for `methods`.
    """
    ours = Path(__file__).resolve().parent / "pipeline"
    spec = find_spec("pipeline")
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
    if places != [ours]:
        found = ", ".join(map(str, places)) or (spec.origin if spec else None) or "nothing"
        return _refuse(
            f"'pipeline' comes from {found}, not from {ours}: rename that folder, or remove it from PYTHONPATH"
        )
    try:
        from pipeline.cli import main as command_line
    except ImportError as error:
        return _refuse(f"the installation at {ours} is incomplete ({error}): pip install --force-reinstall farebox")
    return command_line()


def _refuse(line: str) -> int:
    print(f"farebox: {line}", file=sys.stderr)
    return 2
