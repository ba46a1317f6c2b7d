"""The money of a run: purses in the ledger, and what its trials may cost by the price table of the model's card."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.compose import Config
from pipeline.errors import BudgetExceeded, ConfigError, LedgerError, dollars
from pipeline.ledger.ledger import Ledger
from pipeline.sweep.run_ledger import sweep_account
from pipeline.trials.plan import SweepPlan, TrialSpec


def costs_money(config: Config) -> bool:
    """Return whether a run pays for HTTP calls: its model's card has a price, and calls are sent."""
    return config.model.http is not None and config.model.http.price is not None and not config.offline


def fund(
    ledger: Ledger, plan: SweepPlan, todo: Sequence[TrialSpec], storage_id: str
) -> tuple[list[TrialSpec], dict[str, str]]:
    """Open the purses of a run, and reserve what its trials cost at most.

    What trials that were begun have paid for answers is left out, since these are recorded.

    Returns:
        The trials that the money pays for, in order, and the reason for each other one by trial id.

    Raises:
        BudgetExceeded: it does not pay for all, and budget.partial is false.
        ConfigError: a limit contradicts what is spent.
    """
    config = plan.config
    if not costs_money(config):
        return list(todo), {}
    from pipeline.trials.physical import SendPlan, Sent, total_sent  # imports torch, as the modules that send do

    _open(ledger, config, storage_id)
    sending = SendPlan(config)
    sent = {spec.trial_id: sending.trial(spec.cell, spec.predicted) for spec in plan.trials}
    begun = {spec.account for spec in todo}
    answered = sum(p.price or 0 for p in ledger.money.payments(storage_id) if p.trial in begun)

    def reserve(parts: Sent) -> None:
        upper = parts + sending.probes(parts.calls)
        ledger.money.reserve(storage_id, max(0, upper.micro_usd - answered))

    funded, unfunded, whole = list[TrialSpec](), dict[str, str](), total_sent([])
    for spec in todo if config.partial else ():
        more = whole + sent[spec.trial_id]
        try:
            reserve(more)
        except BudgetExceeded as error:
            unfunded[spec.trial_id] = str(error)
            continue
        funded.append(spec)
        whole = more
    if not config.partial:
        funded, whole = list(todo), total_sent([sent[spec.trial_id] for spec in todo])
    if funded:
        reserve(whole)
    else:
        ledger.money.reserve(storage_id, 0)
    return funded, unfunded


def _open(ledger: Ledger, config: Config, storage_id: str) -> None:
    account, budget = sweep_account(storage_id), config.global_budget
    if ledger.money.open(storage_id, account, config.usd) != config.usd:
        try:
            ledger.money.set_limit(account, config.usd)
        except LedgerError as error:
            raise ConfigError(f"{error}; raise the limit (budget.usd)") from error
    if not budget.name:
        return
    limit = ledger.money.open(storage_id, budget.name, budget.usd)
    if budget.usd not in (None, limit):
        assert budget.usd is not None
        raise ConfigError(
            f"budget {budget.name!r} is limited to {dollars(limit) if limit is not None else 'no money'}, and this "
            f"sweep states {dollars(budget.usd)}: leave budget.global.usd out to join it, or change it: "
            f"farebox budget set {budget.name} usd={budget.usd / 1e6:g} url=URL"
        )
