"""`farebox ledger`: the bill of a sweep, by phase and account, and its verification."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

from pipeline.budget import HttpBill, Phase, total
from pipeline.config.compose import Config
from pipeline.errors import LedgerError
from pipeline.files import strict_json
from pipeline.ledger.records import AccountRecord, PurseRecord
from pipeline.remote.call_log import sent_line, total_of
from pipeline.sweep.purses import money_lines, money_record
from pipeline.sweep.run_ledger import audit, existing_ledger, trials_of
from pipeline.sweep.storage import open_store
from pipeline.sweep.storage_id import read_id


def ledger(config: Config, as_json: bool) -> tuple[str, list[str]]:
    """Return the statement of a sweep's ledger, and its problems. A damaged ledger has no statement."""
    store = open_store(config)
    rows = store.read()
    storage = read_id(config.storage)
    with contextlib.closing(existing_ledger(config)) as books:
        problems = [*audit(books, rows, storage), *store.damage()]
        try:
            accounts, trials = books.accounts(), trials_of(books, rows, storage)
            purses = books.money.purses()
        except LedgerError as error:
            problems = problems or [str(error)]
            no_figures = "the ledger is damaged: none of its figures is printed"
            return strict_json({"problems": problems}, indent=1) if as_json else no_figures, problems
    phases = {phase: total(t.bills.get(phase, total([])) for t in trials) for phase in Phase}
    record = {
        "accounts": [
            {"name": a.name, "limits": asdict(a.limits), "reserved": asdict(a.reserved), "spent": asdict(a.spent)}
            for a in accounts
        ],
        "money": [money_record(purse) for purse in purses],
        "phases": {phase.value: asdict(bill) for phase, bill in phases.items()},
        "trials": len(trials),
        "copied_trials": sum(t.storage != storage.id for t in trials),
        "open_trials": sum(t.open for t in trials),
        "http": asdict(total_of(config.storage)),
        "problems": problems,
    }
    return strict_json(record, indent=1) if as_json else _text(record, accounts, purses), problems


def _text(record: dict[str, Any], accounts: list[AccountRecord], purses: list[PurseRecord]) -> str:
    lines = [f"{'phase':<10}{'requests':>14}{'images':>18}{'prompts':>16}{'outputs':>20}"]
    for phase, bill in record["phases"].items():
        numbers = (f"{bill['requests']:>14,}", f"{bill['images']:>18,}", f"{bill['prompts']:>16,}")
        lines.append(f"{phase:<10}{''.join(numbers)}{bill['outputs']:>20,}")
    for a in accounts:
        lines.append(
            f"account {a.name}: {a.spent.requests:,} requests and {a.spent.images:,} images spent, "
            f"{a.reserved.requests:,} and {a.reserved.images:,} reserved; ceiling {a.limits.text or 'none'}"
        )
    lines += sent_line(HttpBill(**record["http"]))
    lines += money_lines(purses)
    copied = record["copied_trials"]
    inherited = f", {copied} of them billed to the storage that this one was copied from" if copied else ""
    verified = "verified: charges add up, match the rows, and are within all limits"
    verdict = "NOT verified" if record["problems"] else verified
    lines.append(f"{record['trials']} trials, {record['open_trials']} of them open{inherited}; {verdict}")
    return "\n".join(lines)
