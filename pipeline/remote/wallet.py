"""Who pays for HTTP calls in money. Amounts are whole numbers of micro-dollars."""

from __future__ import annotations

import asyncio
from typing import Protocol

from pipeline.ledger.money import Money, refused_as_stop
from pipeline.ledger.records import Charge


class Wallet(Protocol):
    """Pays for each HTTP call: its upper bound before the call is sent, its price when it has been answered."""

    async def pay(self, charge: Charge | None, call_id: str, micro_usd: int) -> None:
        """Take the upper bound of a call's price. The same call id again takes nothing.

        Args:
            charge: of the request that the call is sent for; None for the probes of a run.
            call_id: unique for each HTTP call that is sent; a repeated call has another id.
            micro_usd: the upper bound.

        Raises:
            EndpointStopped: `budget.usd` does not allow it; the call is not sent, and the run ends.
        """
        ...

    async def settle(self, call_id: str, micro_usd: int) -> None:
        """Replace the upper bound of a call by what it cost, which is at most as much."""
        ...


class LedgerWallet:
    """The money of a storage in a ledger of this process. The ledger is used in other threads."""

    def __init__(self, money: Money, storage: str) -> None:
        self.money, self.storage = money, storage

    async def pay(self, charge: Charge | None, call_id: str, micro_usd: int) -> None:
        """See Wallet.pay."""
        trial = charge.trial if charge else ""
        with refused_as_stop():
            await asyncio.to_thread(self.money.pay, self.storage, trial, call_id, micro_usd)

    async def settle(self, call_id: str, micro_usd: int) -> None:
        """See Wallet.settle."""
        await asyncio.to_thread(self.money.settle, self.storage, call_id, micro_usd)


class NoWallet:
    """The wallet of a run whose card has no price."""

    async def pay(self, charge: Charge | None, call_id: str, micro_usd: int) -> None:
        """See Wallet.pay."""

    async def settle(self, call_id: str, micro_usd: int) -> None:
        """See Wallet.settle."""
