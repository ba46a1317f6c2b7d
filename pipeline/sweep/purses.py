"""The money of accounts, as commands print it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.errors import dollars
from pipeline.ledger.records import PurseRecord
from pipeline.sweep.run_ledger import SWEEP_PREFIX

WARNING_SHARE = 0.8
"""Share of a limit from which a warning is printed."""


def money_record(purse: PurseRecord) -> dict[str, Any]:
    """Return the amounts of a purse in dollars, for JSON."""
    amounts = {"settled": purse.settled, "unsettled": purse.unsettled, "reserved": purse.reserved, "limit": purse.limit}
    return {"name": purse.name} | {key: None if n is None else n / 1e6 for key, n in amounts.items()}


def money_lines(purses: Sequence[PurseRecord]) -> list[str]:
    """Return a line for each purse that was used or has a limit, and a warning where little is left."""
    lines = []
    for purse in purses:
        name = f"sweep {purse.name.removeprefix(SWEEP_PREFIX)}" if purse.name.startswith(SWEEP_PREFIX) else purse.name
        if not purse.spent and purse.limit is None:
            continue
        unsettled = f" ({dollars(purse.unsettled)} of it for calls without a known end)" if purse.unsettled else ""
        left = "" if purse.limit is None else f", {dollars(purse.limit - purse.spent)} left of {dollars(purse.limit)}"
        spent = f"{dollars(purse.spent)} spent{unsettled}"
        lines.append(f"money of {name}: {spent}, {dollars(purse.reserved)} reserved{left}")
        if warning := money_warning(purse):
            lines.append(warning)
    return lines


def money_warning(purse: PurseRecord) -> str:
    """Return a line if most of a limit is spent; else an empty text."""
    if not purse.limit or purse.spent < WARNING_SHARE * purse.limit:
        return ""
    return f"warning: {100 * purse.spent / purse.limit:.0f} % of the money of {purse.name} are spent"
