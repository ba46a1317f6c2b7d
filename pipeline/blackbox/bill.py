"""The words of the meter: phases, limits, one call's charge, and what the ledger answers.

A `Bill` (methods.base) says what a call costs in requests, images, prompts and outputs. This module says in which phase
it was asked, what may limit it, and under which id it is paid. docs/budget.md explains the units.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal

from methods.base import Bill, Remaining
from pipeline.errors import ConfigError

LARGEST = 2**63 - 1  # of the stores' integers


class Phase(StrEnum):
    """Why a call was made. REPLAY is never asked for: the ledger finds it."""

    ADAPT = "adapt"
    VALIDATE = "validate"
    CURVE = "curve"
    EVALUATE = "evaluate"
    REPLAY = "replay"


PAID = (Phase.ADAPT, Phase.VALIDATE)
"""What a trial's allotment pays for. Curve and evaluate are recorded, and nothing limits them."""
UNITS = tuple(f.name for f in fields(Bill))
LIMITED = ("requests", "images")


@dataclass(frozen=True)
class Limits:
    """The most that may be asked; None is no limit."""

    requests: int | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        for unit in LIMITED:
            limit = getattr(self, unit)
            if limit is not None and not 0 <= limit <= LARGEST:
                raise ConfigError(f"a limit of {limit:,} {unit} was given; wanted 0 to {LARGEST:,}, or none")

    def remaining(self, spent: Bill) -> Remaining:
        """What is left after `spent`, in the form that a method sees."""
        return Remaining(*(float("inf") if lim is None else lim for lim in (self.requests, self.images))).minus(spent)

    @property
    def words(self) -> str:
        """For people: '8,000 requests and 256,000 images'; empty without limits."""
        return " and ".join(f"{n:,} {unit}" for unit in LIMITED if (n := getattr(self, unit)) is not None)

    def passed(self, spent: Bill, asked: Bill) -> str | None:
        """The unit in which `spent + asked` would pass these limits, or None."""
        for unit in LIMITED:
            limit = getattr(self, unit)
            if limit is not None and getattr(spent, unit) + getattr(asked, unit) > limit:
                return unit
        return None

    @property
    def bill(self) -> Bill:
        """The limits as an amount to hold; nothing is held where there is no limit."""
        return Bill(requests=self.requests or 0, images=self.images or 0)


@dataclass(frozen=True)
class Charge:
    """One call's charge. Two charges with equal ids are the same call, paid once."""

    storage: str
    trial: str
    call: int
    digest: str
    phase: Phase
    bill: Bill

    def __post_init__(self) -> None:
        if "/" in self.trial or "/" in self.digest:
            raise ValueError(f"no '/' may stand in a trial or a digest: {self.id}")
        if self.phase is Phase.REPLAY:
            raise ValueError(f"{self.id}: no call is asked in the phase replay, the ledger finds replays itself")
        if not all(0 <= getattr(self.bill, unit) <= LARGEST for unit in UNITS):
            raise ValueError(f"{self.id}: {self.bill} is no bill")

    @property
    def id(self) -> str:
        """What makes a call the same call."""
        return f"{self.storage}/{self.trial}/{self.call}/{self.digest}"


def parse_id(charge_id: str) -> tuple[str, str, int, str]:
    """(storage, trial, call, digest) of a charge's id."""
    try:
        storage, trial, call, digest = charge_id.rsplit("/", 3)
        return storage, trial, int(call), digest
    except ValueError:
        raise ValueError(f"{charge_id!r} is no charge id; wanted storage/trial/call/digest") from None


@dataclass(frozen=True)
class Receipt:
    """The ledger's yes.

    'replayed': this very call was paid before, and is free. 'diverged': its call number was paid before with another
    payload, so that it was billed to `replay`: the trial's row must be marked.
    """

    id: str
    status: Literal["charged", "replayed", "diverged"]


@dataclass(frozen=True)
class AccountRecord:
    """An account as it stands. Committed = reserved + spent; it never passes the limits."""

    name: str
    limits: Limits
    reserved: Bill
    """The whole allotments of its open trials, spent or not."""
    spent: Bill
    """What its settled trials were charged in adapt and validate, and every trial's limited replays."""
    charged: Bill
    """What all of its trials, open ones too, were really charged so far in adapt, validate and limited replays."""
    trials: int

    @property
    def committed(self) -> Bill:
        """What cannot be reserved any more."""
        return self.reserved + self.spent


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the ledger knows it."""

    storage: str
    trial: str
    open: bool
    allotment: Limits
    bills: dict[Phase, Bill]
    accounts: tuple[str, ...]


@dataclass(frozen=True)
class ChargeRecord:
    """One charge as it was accepted; `refunded` ones count nowhere and are kept as a trace."""

    charge: Charge
    diverged: bool
    at: float
    refunded: bool


@dataclass(frozen=True)
class StorageRecord:
    """Where a storage was when its last run opened the ledger."""

    storage: str
    path: str
    host: str
    since: float
    """Start of that run, in seconds since 1970."""


@dataclass(frozen=True)
class Reservation:
    """What the open trials of one storage reserve."""

    storage: str
    place: StorageRecord | None
    """None when no run registered the storage."""
    trials: int
    reserved: dict[str, Bill]
    """By account."""
    last_charge: float | None
    """Time of the last charge of these trials, in seconds since 1970; None before the first."""


def total(bills: Iterable[Bill]) -> Bill:
    """The sum."""
    return sum(bills, Bill())


def paid(bills: Mapping[Phase, Bill]) -> Bill:
    """What counts against the allotment: adapt + validate. A result row's plain bill is this sum."""
    return total(bills[phase] for phase in PAID if phase in bills)


def row_columns(bills: Mapping[Phase, Bill]) -> dict[str, int]:
    """A trial's bill as columns of a result row: `requests` (adapt + validate), ..., then `adapt_requests`, ..."""
    columns = {unit: getattr(paid(bills), unit) for unit in UNITS}
    for phase in Phase:
        columns |= {f"{phase.value}_{unit}": getattr(bills.get(phase, Bill()), unit) for unit in UNITS}
    return columns
