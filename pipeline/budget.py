"""Phases, units and limits of the query budget, and sums of bills.

A `Bill` (methods.base) is the cost of a call in requests, images, prompts and outputs; see docs/budget.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from methods.base import Bill, Remaining
from pipeline.errors import ConfigError

LARGEST = 2**63 - 1
"""Largest integer that the ledger's databases store."""


class Phase(StrEnum):
    """Purpose of a call. A caller never states REPLAY: the ledger assigns it (see `ledger.records.Receipt`)."""

    ADAPT = "adapt"
    VALIDATE = "validate"
    TUNE = "tune"
    CURVE = "curve"
    EVALUATE = "evaluate"
    REPLAY = "replay"


BUDGETED_PHASES = (Phase.ADAPT, Phase.VALIDATE, Phase.TUNE)
"""Phases that a trial's allotment pays for. Calls of curve and evaluate are recorded without a limit."""
UNITS = tuple(f.name for f in fields(Bill))
LIMITED_UNITS = ("requests", "images")


@dataclass(frozen=True)
class Limits:
    """Maximum number of requests and of images; None for no limit."""

    requests: int | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        for unit in LIMITED_UNITS:
            limit = getattr(self, unit)
            if limit is not None and not 0 <= limit <= LARGEST:
                raise ConfigError(f"invalid limit of {limit:,} {unit}: expected 0 to {LARGEST:,}, or none")

    def remaining(self, spent: Bill) -> Remaining:
        """Return what is left after `spent`, in the form that a method sees."""
        return Remaining(*(float("inf") if lim is None else lim for lim in (self.requests, self.images))).minus(spent)

    @property
    def text(self) -> str:
        """The limits for people, such as '8,000 requests and 256,000 images'; empty without limits."""
        return " and ".join(f"{n:,} {unit}" for unit in LIMITED_UNITS if (n := getattr(self, unit)) is not None)

    @property
    def size(self) -> tuple[float, float]:
        """Sort key from small to large; no limit is the largest."""
        requests, images = (float("inf") if n is None else float(n) for n in (self.requests, self.images))
        return requests, images

    def exceeded_unit(self, spent: Bill, bill: Bill) -> str | None:
        """Return the first unit in which `spent + bill` exceeds the limits, or None."""
        for unit in LIMITED_UNITS:
            limit = getattr(self, unit)
            if limit is not None and getattr(spent, unit) + getattr(bill, unit) > limit:
                return unit
        return None

    @property
    def bill(self) -> Bill:
        """The limits as an amount to reserve; 0 in a unit without a limit."""
        return Bill(requests=self.requests or 0, images=self.images or 0)


@dataclass(frozen=True)
class HttpBill:
    """What was sent to a remote endpoint, which never changes the bill in `UNITS`."""

    calls: int = 0
    """HTTP calls that were sent, repeated ones included."""
    images: int = 0
    texts: int = 0
    bytes: int = 0
    """Size of the bodies that were sent."""
    tokens: int = 0
    """As the endpoint reports them."""
    retries: int = 0
    """Calls that repeat another one."""
    rate_limited: int = 0
    """Responses with status 429."""
    waited_s: float = 0.0
    """Seconds waited before a call was repeated."""
    uncertain: int = 0
    """Calls whose outcome is unknown: the connection broke, and the endpoint may have computed and billed them."""
    micro_usd: int = 0
    """Price by the card's table, in micro-dollars; an uncertain call counts with its upper bound."""

    def __add__(self, other: HttpBill) -> HttpBill:
        return HttpBill(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


NOTHING_SENT = HttpBill()


def http_columns(bill: HttpBill) -> dict[str, Any]:
    """Return a bill of HTTP calls as columns of a result row."""
    columns = {
        f"http_{name}": getattr(bill, name)
        for name in ("calls", "images", "texts", "bytes", "tokens", "retries", "rate_limited", "waited_s")
    }
    return columns | {"uncertain_calls": bill.uncertain, "usd": bill.micro_usd / 1_000_000}


def total(bills: Iterable[Bill]) -> Bill:
    """Return the sum of bills."""
    return sum(bills, Bill())


def paid(bills: Mapping[Phase, Bill]) -> Bill:
    """Return the bill of `BUDGETED_PHASES`, which counts against the allotment and is the bill of a result row."""
    return total(bills[phase] for phase in BUDGETED_PHASES if phase in bills)


def row_columns(bills: Mapping[Phase, Bill]) -> dict[str, int]:
    """Return the bill as columns of a result row: `requests` (all that is paid for), ..., then `adapt_requests`, ..."""
    columns = {unit: getattr(paid(bills), unit) for unit in UNITS}
    for phase in Phase:
        columns |= {f"{phase.value}_{unit}": getattr(bills.get(phase, Bill()), unit) for unit in UNITS}
    return columns
