"""What the ledger takes and returns: charges, receipts, and records of accounts, trials, charges and storages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from methods.base import Bill
from pipeline.budget import LARGEST, UNITS, Limits, Phase


@dataclass(frozen=True)
class Charge:
    """The charge of one call. Charges with equal ids are the same call, which is paid once."""

    storage: str
    trial: str
    call: int
    """Number of the call in its trial."""
    digest: str
    """Of the call's content (see `request.call_digest`)."""
    phase: Phase
    bill: Bill

    def __post_init__(self) -> None:
        if "/" in self.trial or "/" in self.digest:
            raise ValueError(f"charge {self.id!r}: a trial and a digest cannot contain '/'")
        if self.phase is Phase.REPLAY:
            raise ValueError(f"charge {self.id!r}: the phase replay is assigned by the ledger only")
        if not all(0 <= getattr(self.bill, unit) <= LARGEST for unit in UNITS):
            raise ValueError(f"charge {self.id!r}: {self.bill} has a number outside 0 to {LARGEST:,}")

    @property
    def id(self) -> str:
        """storage/trial/call/digest."""
        return f"{self.storage}/{self.trial}/{self.call}/{self.digest}"


def parse_id(charge_id: str) -> tuple[str, str, int, str]:
    """Split the id of a charge into (storage, trial, call, digest). Raises ValueError for another text."""
    try:
        storage, trial, call, digest = charge_id.rsplit("/", 3)
        return storage, trial, int(call), digest
    except ValueError:
        raise ValueError(f"invalid charge id {charge_id!r}: expected storage/trial/call/digest") from None


@dataclass(frozen=True)
class Receipt:
    """An accepted charge."""

    id: str
    status: Literal["charged", "replayed", "diverged"]
    """replayed: this call was paid before and is free. diverged: its call number was paid before with another digest,
    so it was billed to `replay`, and the trial's rows are marked."""


@dataclass(frozen=True)
class AccountRecord:
    """An account. What is committed, `reserved + spent`, never exceeds the limits."""

    name: str
    limits: Limits
    reserved: Bill
    """Whole allotments of its open trials, spent or not."""
    spent: Bill
    """Bills of its closed trials in adapt and validate, and limited replays of all its trials."""
    charged: Bill
    """Bills of all its trials so far, open ones included, in adapt, validate and limited replays."""
    trials: int

    @property
    def committed(self) -> Bill:
        """What cannot be reserved again."""
        return self.reserved + self.spent


@dataclass(frozen=True)
class TrialRecord:
    """A trial."""

    storage: str
    trial: str
    open: bool
    allotment: Limits
    bills: dict[Phase, Bill]
    accounts: tuple[str, ...]


@dataclass(frozen=True)
class ChargeRecord:
    """An accepted charge. A refunded one is kept, and counts in no total."""

    charge: Charge
    diverged: bool
    at: float
    """Time of the charge, in seconds since 1970."""
    refunded: bool


@dataclass(frozen=True)
class StorageRecord:
    """Where a storage was when its latest run opened the ledger."""

    storage: str
    path: str
    host: str
    since: float
    """Start of that run, in seconds since 1970."""


@dataclass(frozen=True)
class Reservation:
    """What the open trials of a storage reserve."""

    storage: str
    place: StorageRecord | None
    """None when no run registered the storage."""
    trials: int
    reserved: dict[str, Bill]
    """By account."""
    last_charge: float | None
    """Time of the latest charge of these trials, in seconds since 1970; None before the first."""


@dataclass(frozen=True)
class PaymentRecord:
    """The payment of one HTTP call, in micro-dollars."""

    call_id: str
    trial: str
    """The trial's name in the ledger; empty for calls of no trial."""
    upper: int
    """Upper bound, which was paid before the call was sent."""
    price: int | None
    """What it cost; None while the call has no known end. The upper bound counts then."""
    at: float
    """Time of the payment, in seconds since 1970."""
    settled_at: float | None


@dataclass(frozen=True)
class PurseRecord:
    """The money of an account, in micro-dollars. `spent + reserved` never exceeds the limit."""

    name: str
    limit: int | None
    settled: int
    """Prices of the calls whose price is known."""
    unsettled: int
    """Upper bounds of the other calls."""
    reserved: int
    """What runs have reserved and not spent."""

    @property
    def spent(self) -> int:
        """What calls cost, or may have cost."""
        return self.settled + self.unsettled
