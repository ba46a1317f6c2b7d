"""The ledger of a run: open it, register the storage in it, and compare it with the rows of the storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.budget import row_columns
from pipeline.config.compose import Config
from pipeline.console import Echo
from pipeline.errors import ConfigError, LedgerError
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import TrialRecord
from pipeline.ledger.sqlite_file import sqlite_file
from pipeline.results.merge import sources_of
from pipeline.results.row import account_name
from pipeline.sweep.storage_id import FILE, StorageId, is_copy, moved_here, new_id, read_id, write_id
from pipeline.trials.checkpoint import stored_checkpoints

SWEEP_PREFIX = "sweep:"
"""Prefix of the accounts that hold the ceiling of one sweep."""
LONGEST_NAME = 60
"""Characters in the name of a global budget."""
_KEY_COLUMNS = ["trial_id", "method_digest", "code_digest"]
"""Columns of a row from which the ledger key of its trial is made."""


def sweep_account(storage_id: str) -> str:
    """Return the name of the account that holds the ceiling of the sweep in this storage."""
    return f"{SWEEP_PREFIX}{storage_id}"


def check_name(name: str) -> None:
    """Validate the name of a global budget.

    Raises:
        ConfigError: the name has the prefix of sweep accounts, is too long, or has characters that cannot be printed.
    """
    if name.startswith(SWEEP_PREFIX):
        raise ConfigError(
            f"budget name {name[:60]!r}: names that begin with {SWEEP_PREFIX!r} are those of single sweeps"
        )
    if not name.isprintable() or not name.strip() or len(name) > LONGEST_NAME:
        raise ConfigError(f"budget name {name[:60]!r}: expected 1 to {LONGEST_NAME} printable characters")


def open_ledger(config: Config, echo: Echo) -> tuple[Ledger, StorageId]:
    """Open the ledger of a run and register the storage in it. The caller must hold the storage's lock.

    A storage that is a copy of another gets an id of its own. If the ledger is inside the storage, it was copied too,
    and its entries are renamed to the new id. In a shared ledger the entries stay with the original: the checkpoints of
    the copy's unfinished trials are removed, and these trials start again.

    Raises:
        ConfigError: the ledger cannot be used, is in memory, or is damaged; or the storage was merged from others.
    """
    _refuse_merged(config, "run in one of its sources, or in a new storage=DIR, and merge again")
    try:
        ledger = Ledger(config.ledger_url)
        try:
            _refuse_memory(ledger)
            storage = _identify(config, ledger, echo)
            if config.global_budget.url is None:
                for earlier in storage.copied_from:
                    ledger.rename_storage(earlier, storage.id, {sweep_account(earlier): sweep_account(storage.id)})
            if config.global_budget.name and config.global_budget.url is None:
                echo(
                    f"budget {config.global_budget.name!r} is in this storage's own ledger, which no other sweep uses; "
                    "to share it, give every sweep the same ledger with budget.global.url=URL"
                )
            ledger.check(storage.id)
            ledger.register(storage.id, storage.path, storage.host)
        except BaseException:
            ledger.close()
            raise
    except LedgerError as error:
        raise ConfigError(str(error)) from error
    return ledger, storage


def existing_ledger(config: Config) -> Ledger:
    """Open the ledger of a sweep without creating one.

    Raises:
        ConfigError: there is no ledger, its server does not answer, or it is in memory; or the storage was merged.
        LedgerError: the file cannot be read.
    """
    _refuse_merged(config, "use the ledgers of its sources")
    file = sqlite_file(config.ledger_url)
    if file is not None and not file.is_file():
        raise ConfigError(f"no ledger at {file}: name the one that the sweep used with budget.global.url=URL")
    try:
        ledger = Ledger(config.ledger_url)
    except LedgerError as error:
        if file is None:
            raise ConfigError(str(error)) from error
        raise
    _refuse_memory(ledger)
    return ledger


def _refuse_merged(config: Config, instead: str) -> None:
    """Raise ConfigError for a storage that `farebox merge` made: its charges are in the ledgers of its sources."""
    if sources := sources_of(config.storage):
        named = ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
        raise ConfigError(f"{config.storage} was merged from {named} and holds results only: {instead}")


def _refuse_memory(ledger: Ledger) -> None:
    if ledger.in_memory:
        ledger.close()
        raise ConfigError(
            f"budget.global.url={ledger.name} is a ledger in memory: expected sqlite:///PATH or postgresql://..."
        )


def _identify(config: Config, ledger: Ledger, echo: Echo) -> StorageId:
    """Read the identity of the storage, or make one for a new storage or a copy; write it if it changed."""
    folder, shared = config.storage, config.global_budget.url is not None
    if not (folder / FILE).exists():
        storage = new_id(folder)
        write_id(folder, storage)
        return storage
    old = read_id(folder)
    places = {(old.path, old.host)}
    if shared and (record := ledger.storage(old.id)) is not None:
        places.add((record.path, record.host))
    originals = sorted(place for place in places if is_copy(folder, old, *place))
    if originals:
        path, host = originals[0]
        storage = new_id(folder, (old.id, *old.copied_from))
        checkpoints = stored_checkpoints(folder) if shared else []  # their calls were charged under the original's id
        for checkpoint in checkpoints:
            checkpoint.clear()
        removed = f"; the checkpoints of {len(checkpoints)} unfinished trials are removed: these trials start again"
        echo(
            f"{folder} is a copy of the storage {old.id} at {path} on {host}: its id is now {storage.id}"
            f"{removed if checkpoints else ''}"
        )
    else:
        storage = moved_here(folder, old)
        if (storage.path, storage.host) != (old.path, old.host):
            echo(f"{folder} was moved: it was {old.path} on {old.host}")
    if storage != old:
        write_id(folder, storage)
    return storage


def audit(ledger: Ledger, rows: pa.Table, storage: StorageId, whole: bool = True) -> list[str]:
    """Verify the ledger and compare it with the rows of a storage.

    Args:
        ledger: the ledger that the storage uses.
        rows: all rows of the storage.
        storage: the identity of the storage.
        whole: verify the charges of other storages too.

    Returns:
        One line for each problem.
    """
    columns = [*_KEY_COLUMNS, "status", *row_columns({})]
    bills = [row | {"trial_id": _ledger_key(row)} for row in rows.select(columns).to_pylist()]
    return ledger.verify(bills, storage.id, storage.copied_from, whole)


def trials_of(ledger: Ledger, rows: pa.Table, storage: StorageId) -> list[TrialRecord]:
    """Return the trials of a storage, with those of its rows that were charged to the storages it was copied from."""
    trials = {t.trial: t for t in ledger.trials(storage.id)}
    keys = {_ledger_key(row) for row in rows.select(_KEY_COLUMNS).to_pylist()}
    for earlier in storage.copied_from:
        for trial in ledger.trials(earlier):
            if trial.trial in keys:
                trials.setdefault(trial.trial, trial)
    return list(trials.values())


def _ledger_key(row: Mapping[str, Any]) -> str:
    return account_name(*(row[column] for column in _KEY_COLUMNS))
