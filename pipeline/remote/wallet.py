"""Who pays for HTTP calls in money. Amounts are whole numbers of micro-dollars."""

from __future__ import annotations

from typing import Protocol

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
            BudgetExceeded: `budget.usd` does not allow it; the call is not sent.
        """
        ...

    async def settle(self, call_id: str, micro_usd: int) -> None:
        """Replace the upper bound of a call by what it cost, which is at most as much."""
        ...


class NoWallet:
    """The wallet of a run whose card has no price, or that sets no `budget.usd`."""

    async def pay(self, charge: Charge | None, call_id: str, micro_usd: int) -> None:
        """See Wallet.pay."""

    async def settle(self, call_id: str, micro_usd: int) -> None:
        """See Wallet.settle."""
