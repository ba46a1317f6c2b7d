"""What a sweep would ask and what it lacks, before it runs: exactly where its data is here, else from its cards alone.

Nothing is asked, fetched or loaded. A card states the sizes that bills depend on, so that a sweep can be priced on a
machine without its data; only classes with fewer images than shots make the bill of a draw smaller than its card's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from methods.base import Bill
from pipeline.blackbox import architecture
from pipeline.blackbox.facts import ModelFacts, describe, feature_dim
from pipeline.budget import total
from pipeline.config.compose import Config
from pipeline.data.dataset import missing
from pipeline.data.few_shot import check_validation
from pipeline.errors import DataError
from pipeline.trials.plan import Cell, TrialSpec, cells, make_plan, predicted, shape_of
from pipeline.trials.protocol import check_overrides, leave_out, test_cards


class MissingAsset(NamedTuple):
    """A data set or weights that are not on this machine."""

    kind: str
    """data set or weights."""
    name: str
    what: str
    """What was looked for."""
    published: str
    """Where its authors publish it."""
    fetched: bool = False
    """Whether a run fetches it by itself."""


class TrialEstimate(NamedTuple):
    """A trial and its predicted bill; the id is known once the data is there."""

    cell: Cell
    test_sets: tuple[str, ...]
    bill: Bill
    trial_id: str | None = None

    @staticmethod
    def of(spec: TrialSpec) -> TrialEstimate:
        """A planned trial."""
        return TrialEstimate(spec.cell, tuple(t.name for t in spec.tests), spec.predicted, spec.trial_id)


@dataclass(frozen=True)
class SweepEstimate:
    """All trials of a run in order with their bills, the methods that cannot run, and what is not on this machine."""

    config: Config
    trials: tuple[TrialEstimate, ...]
    unable: tuple[tuple[str, str], ...]
    absent: tuple[MissingAsset, ...]
    model: ModelFacts | None
    """None where its weights are not on this machine and cannot be fetched."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one line each."""

    @property
    def total(self) -> Bill:
        """The predicted bill of all trials."""
        return total(trial.bill for trial in self.trials)

    @property
    def exact(self) -> bool:
        """Whether the few shots were drawn and every file was looked at, so that a run starts from the same."""
        return not blocking(self.absent)

    def records(self) -> list[dict[str, Any]]:
        """`farebox plan --json`: one record for each trial."""
        return [
            {
                "trial_id": trial.trial_id,
                "method": trial.cell.choice.name,
                "dataset": trial.cell.dataset.name,
                "test_sets": list(trial.test_sets),
                "shots": trial.cell.shots,
                "seed": trial.cell.seed,
                "budget_requests": trial.cell.allotment.requests,
                "budget_images": trial.cell.allotment.images,
                **{f"predicted_{k}": v for k, v in asdict(trial.bill).items()},
            }
            for trial in self.trials
        ]


def outline(config: Config) -> SweepEstimate:
    """The run as it would be planned. Raises ConfigError or DataError for what data that is not here cannot mend."""
    check_overrides(config)
    lacking = absent(config)
    if not blocking(lacking):
        plan = make_plan(config)
        return SweepEstimate(
            plan.config, tuple(map(TrialEstimate.of, plan.trials)), plan.unable, lacking, plan.model, plan.notes
        )
    for card in config.datasets:
        check_validation(card.name, config.validation, card.val)
    facts = None
    if not any(thing.kind == "weights" and not thing.fetched for thing in lacking):
        facts = describe(config.model)
        config = replace(config, model=facts.card)
    placed, left_out = cells(config)
    width, tests = facts.feature_dim if facts else feature_dim(config.model), _test_names(config)
    trials = tuple(
        TrialEstimate(
            cell, tests[cell.dataset.name], predicted(cell, shape_of(config, cell.dataset, cell.shots, width))
        )
        for cell in placed
    )
    return SweepEstimate(config, trials, tuple(left_out.items()), lacking, facts)


def absent(config: Config) -> tuple[MissingAsset, ...]:
    """The data sets and weights of a run that are not here: the fitted sets first, then other test sets."""
    return tuple(_absent(config))


def blocking(lacking: Sequence[MissingAsset]) -> list[MissingAsset]:
    """Those that a run cannot fetch by itself."""
    return [thing for thing in lacking if not thing.fetched]


def refuse_absent(config: Config) -> None:
    """DataError when several things are not here: one alone is told by whoever opens it, with what is wrong there."""
    lacking = blocking(absent(config))
    if len(lacking) > 1:
        names = ", ".join(thing.name for thing in lacking)
        raise DataError(
            f"{len(lacking)} things of this sweep are not on this machine ({names}); the first: {lacking[0].what}; "
            "farebox plan with the same words says where each is published"
        )


def _absent(config: Config) -> Iterator[MissingAsset]:
    others = [pair for found in test_cards(config).values() for pair in found]
    seen: set[str] = set()
    for kind, card in (*(("", card) for card in config.datasets), *others):
        lines = missing(card)
        if not lines or card.name in seen:
            continue
        seen.add(card.name)
        what = "; ".join(lines)
        if card.layout != "parquet" and not Path(card.path).is_absolute():
            what = f"no data.root=DIR is set, DIR holding {card.path}/"
        if kind:
            what += f" (or leave it out: {leave_out(kind)})"
        yield MissingAsset("data set", card.name, what, card.url or card.source)
    if weights := architecture.missing(config.model):
        yield MissingAsset("weights", config.model.name, *weights, fetched=architecture.has_tag(config.model))


def _test_names(config: Config) -> dict[str, tuple[str, ...]]:
    """What a fit on each data set is scored on."""
    if config.protocol == "base_to_new":
        return {card.name: (f"{card.name}:base", f"{card.name}:new") for card in config.datasets}
    others = test_cards(config)
    return {card.name: (card.name, *(other.name for _, other in others[card.name])) for card in config.datasets}
