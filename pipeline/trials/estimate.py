"""Estimate the bills of a sweep and list the files that it misses, before it runs.

No request is sent, nothing is downloaded, and no weights are loaded. If all data is on this machine, the bills are
exact. Otherwise they are computed from the cards, which state all the sizes that a bill depends on; such a bill is too
large only if a class has fewer images than shots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from methods.base import Bill
from pipeline.blackbox.model_facts import ModelFacts
from pipeline.budget import total
from pipeline.config.compose import Config
from pipeline.data.dataset import missing
from pipeline.data.few_shot import check_validation
from pipeline.errors import DataError
from pipeline.remote.facts import describe, feature_dim
from pipeline.remote.facts import missing as missing_weights
from pipeline.trials.cells import Cell, cells, local_of, tuning_notes
from pipeline.trials.plan import TrialSpec, make_plan, predicted, shape_of
from pipeline.trials.protocol import check_eval_names, eval_cards, leave_out


class MissingAsset(NamedTuple):
    """A data set or weights that are not on this machine."""

    kind: str
    """data set or weights."""
    name: str
    what: str
    """What was looked for and where."""
    published: str
    """Where its authors publish it."""
    fetched: bool = False
    """Whether a run downloads it."""


class TrialEstimate(NamedTuple):
    """A trial and its predicted bill."""

    cell: Cell
    test_sets: tuple[str, ...]
    bill: Bill
    trial_id: str | None = None
    """None while data of the sweep is missing."""

    @staticmethod
    def of(spec: TrialSpec) -> TrialEstimate:
        """Return the estimate of a planned trial, which is exact."""
        return TrialEstimate(spec.cell, tuple(t.name for t in spec.eval_sets), spec.predicted, spec.trial_id)


@dataclass(frozen=True)
class SweepEstimate:
    """All trials of a sweep in order, with their predicted bills."""

    config: Config
    trials: tuple[TrialEstimate, ...]
    unable: tuple[tuple[str, str], ...]
    """Methods that cannot run, each with the reason."""
    missing: tuple[MissingAsset, ...]
    """Data sets and weights that are not on this machine."""
    model: ModelFacts | None
    """None if the weights are not on this machine and cannot be downloaded."""
    notes: tuple[str, ...] = ()
    """Remarks for the user, one line each."""

    @property
    def total(self) -> Bill:
        """Sum of the predicted bills."""
        return total(trial.bill for trial in self.trials)

    @property
    def exact(self) -> bool:
        """Whether the bills were computed from the data itself, so that a run has the same ones."""
        return not blocking(self.missing)

    def records(self) -> list[dict[str, Any]]:
        """Return one record for each trial, the JSON of `farebox plan --json`."""
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
                "answers": trial.cell.answers.text,
                "hparams": trial.cell.hparams,
                **{f"predicted_{k}": v for k, v in asdict(trial.bill).items()},
            }
            for trial in self.trials
        ]


def estimate(config: Config) -> SweepEstimate:
    """Estimate the bills of a sweep.

    Raises:
        ConfigError, DataError: the sweep could not run even with all data on this machine.
    """
    check_eval_names(config)
    lacking = missing_assets(config)
    if not blocking(lacking):
        plan = make_plan(config)
        return SweepEstimate(
            plan.config, tuple(map(TrialEstimate.of, plan.trials)), plan.unable, lacking, plan.model, plan.notes
        )
    for card in config.datasets:
        check_validation(card.name, config.validation, card.val)
    facts = None
    if not any(asset.kind == "weights" and not asset.fetched for asset in lacking):
        facts = describe(config.model)
        config = replace(config, model=facts.card)
    to_run, left_out = cells(config, facts.withheld if facts else ())
    width, eval_names = facts.feature_dim if facts else feature_dim(config.model), _eval_names(config)
    trials = tuple(
        TrialEstimate(
            cell, eval_names[cell.dataset.name], predicted(cell, shape_of(config, cell.dataset, cell.shots, width))
        )
        for cell in to_run
    )
    locals_ = dict.fromkeys(local.note for cell in to_run if (local := local_of(config.local, cell.choice.info)))
    notes = (*locals_, *tuning_notes(to_run))
    return SweepEstimate(config, trials, tuple(left_out.items()), lacking, facts, notes)


def missing_assets(config: Config) -> tuple[MissingAsset, ...]:
    """Return the data sets of a sweep (fitted ones first) and the weights that are not on this machine."""
    return tuple(_missing_assets(config))


def blocking(lacking: Sequence[MissingAsset]) -> list[MissingAsset]:
    """Return the assets that a run does not download."""
    return [asset for asset in lacking if not asset.fetched]


def refuse_missing(config: Config) -> None:
    """Raise DataError if several assets are missing. A single one is reported, in more detail, when it is opened."""
    lacking = blocking(missing_assets(config))
    if len(lacking) > 1:
        names = ", ".join(asset.name for asset in lacking)
        raise DataError(
            f"{len(lacking)} data sets or weights of this sweep are not on this machine ({names}); the first: "
            f"{lacking[0].what}; farebox plan with the same arguments tells where each is published"
        )


def _missing_assets(config: Config) -> Iterator[MissingAsset]:
    others = [pair for cards in eval_cards(config).values() for pair in cards]
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
    if weights := missing_weights(config.model):
        from pipeline.blackbox import architecture  # imports torch

        yield MissingAsset("weights", config.model.name, *weights, fetched=architecture.has_tag(config.model))


def _eval_names(config: Config) -> dict[str, tuple[str, ...]]:
    """Return the names of the test sets that a fit on each data set is scored on."""
    if config.protocol == "base_to_new":
        return {card.name: (f"{card.name}:base", f"{card.name}:new") for card in config.datasets}
    others = eval_cards(config)
    return {card.name: (card.name, *(other.name for _, other in others[card.name])) for card in config.datasets}
