"""From a resolved run to frozen trials: each with id, allotment and predicted bill. Nothing is asked here."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from methods.base import Bill, MethodInfo, TaskShape
from pipeline.blackbox import model as models
from pipeline.blackbox.bill import Limits, total
from pipeline.config import Config, DatasetCard, MethodChoice, ModelCard, dataset_card, names
from pipeline.data.images import check_readable
from pipeline.data.source import ParquetSource, Source, opened
from pipeline.data.split import Split, draw
from pipeline.errors import BudgetExceeded, ConfigError, DataError

_RULES = 1
"""Raised when the trial's own protocol changes results (batching of predictions, augmentation, scoring)."""


@dataclass(frozen=True)
class TrialSpec:
    """One trial, resolved: a method on a few-shot task with an allotment, and the test sets to score."""

    trial_id: str
    sweep: str
    choice: MethodChoice
    method_digest: str
    model: ModelCard
    model_identity: str
    dataset: DatasetCard
    shifts: tuple[DatasetCard, ...]
    shots: int
    seed: int
    split: Split = field(repr=False)
    split_digest: str
    allotment: Limits
    views: int
    fresh_views: bool
    validation: str
    settings: str
    curve: int
    predicted: Bill

    @property
    def name(self) -> str:
        """For people: method, data set, shots, seed and budget."""
        return f"{self.choice.name} on {self.dataset.name}, {self.shots} shots, seed {self.seed}, {self.budget_name}"

    @property
    def budget_name(self) -> str:
        """For people: '8,000 requests', '500,000 images' or 'no limit'."""
        return self.allotment.words or "no limit"

    @property
    def account(self) -> str:
        """The trial's name in the ledger and on its checkpoints: a rerun by other code is another payer."""
        return f"{self.trial_id}.{self.method_digest}"

    @property
    def reserved(self) -> Limits:
        """What is set aside on the ceilings before the trial starts: its predicted bill, within its allotment."""
        return Limits(self.predicted.requests, self.predicted.images)


@dataclass(frozen=True)
class Plan:
    """All trials of a run in order, and the methods that the model's grant leaves out."""

    config: Config
    trials: tuple[TrialSpec, ...]
    unable: tuple[tuple[str, str], ...]

    @property
    def total(self) -> Bill:
        """The predicted bill of all trials."""
        return total(t.predicted for t in self.trials)


def source_of(card: DatasetCard) -> Source:
    """The card's images, opened and checked once a process."""
    return opened(ParquetSource(str(card.file), card.sha256))


def check_card(card: DatasetCard, classnames: tuple[str, ...]) -> None:
    """DataError when a test set's file contradicts its card, or has other classes than the one that is fitted on."""
    source = source_of(card)
    test = source.rows_of("test")
    if source.classnames != classnames:
        raise DataError(f"data set {card.name!r} has other classes than {card.shift_of!r}, which methods are fitted on")
    if len(classnames) != card.classes or not set(np.unique(source.labels)) <= set(range(card.classes)):
        raise DataError(f"data set {card.name!r}: its card says {card.classes} classes, {source.place} has others")
    if len(test) != card.test or not len(test):
        found = f"{source.place} has {len(test)}"
        raise DataError(f"data set {card.name!r}: its card says {card.test} test images, {found}")
    check_readable(source, card.name, test)


def make_plan(config: Config) -> Plan:
    """Expand the run into trials. Raises ConfigError or DataError before any query is spent."""
    identity, width = models.identity(config.model), models.feature_dim(config.model)
    shifts = _shift_sets() if config.shift else {}
    for card in config.datasets:
        for tested in (card, *shifts.get(card.name, ())):
            check_card(tested, source_of(card).classnames)
    splits = {
        (card.name, shots, seed): draw(source_of(card), card.name, shots, seed, config.validation)
        for card in config.datasets
        for shots in config.shots
        for seed in config.seeds
    }
    for card in config.datasets:
        drawn = {row for (name, *_), split in splits.items() if name == card.name for row in split.train + split.val}
        check_readable(source_of(card), card.name, sorted(drawn))
    trials, unable = [], {}
    for allotment in config.allotments:
        for name in config.methods:
            for card in config.datasets:
                choice = config.choice(name, card.name)
                if not config.model.access.covers(choice.info.access):
                    unable[name] = (
                        f"needs {choice.info.access.label}, {config.model.name} grants {config.model.access.label}"
                    )
                    continue
                for shots in config.shots:
                    for seed in config.seeds:
                        split = splits[card.name, shots, seed]
                        trials.append(
                            _trial(
                                config,
                                choice,
                                card,
                                shifts.get(card.name, ()),
                                shots,
                                seed,
                                split,
                                allotment,
                                identity,
                                width,
                            )
                        )
    if not trials:
        raise ConfigError("nothing can run: " + "; ".join(f"{k} {v}" for k, v in unable.items()))
    return Plan(config, tuple(trials), tuple(unable.items()))


def _trial(
    config: Config,
    choice: MethodChoice,
    card: DatasetCard,
    shifts: tuple[DatasetCard, ...],
    shots: int,
    seed: int,
    split: Split,
    allotment: Limits,
    identity: str,
    width: int,
) -> TrialSpec:
    fresh = config.views == "fresh"
    views = 1 if fresh else int(config.views)
    shape = TaskShape(
        n_classes=card.classes,
        n_train=len(split.train),
        n_val=len(split.val),
        shots=shots,
        views=views,
        fresh_views=fresh,
        n_templates=max(1, len(card.templates)),
        feature_dim=width,
    )
    split_digest = split.digest(source_of(card))
    resolved = {
        "rules": _RULES,
        "model": [identity, config.model.precision],
        "method": [choice.info.name, choice.info.version, choice.config],
        "dataset": [card.name, card.sha256, card.template, card.templates, card.augment],
        "tests": [(s.name, s.sha256) for s in shifts],
        "split": split_digest,
        "task": [shots, seed, views, fresh, config.validation, config.curve],
        "allotment": [allotment.requests, allotment.images],
    }
    trial_id = hashlib.sha256(json.dumps(resolved, sort_keys=True, default=list).encode()).hexdigest()[:16]
    return TrialSpec(
        trial_id=trial_id,
        sweep=config.sweep,
        choice=choice,
        method_digest=method_digest(choice.info),
        model=config.model,
        model_identity=identity,
        dataset=card,
        shifts=shifts,
        shots=shots,
        seed=seed,
        split=split,
        split_digest=split_digest,
        allotment=allotment,
        views=views,
        fresh_views=fresh,
        validation=config.validation,
        settings=config.settings,
        curve=config.curve,
        predicted=choice.build().bill(shape, allotment.remaining(Bill())),
    )


def refuse_unpayable(plan: Plan, trials: Sequence[TrialSpec]) -> None:
    """Raise BudgetExceeded when the ceilings cannot pay these trials' predicted bills."""
    asked = total(t.predicted for t in trials)
    for account, ceiling in (
        ("the sweep", plan.config.sweep_budget),
        (f"global budget {plan.config.global_budget.name!r}", plan.config.global_budget.limits),
    ):
        unit = ceiling.passed(Bill(), asked)
        if unit:
            raise BudgetExceeded(account, unit, getattr(asked, unit), 0, getattr(ceiling, unit))


def _shift_sets() -> dict[str, tuple[DatasetCard, ...]]:
    found: dict[str, tuple[DatasetCard, ...]] = {}
    for name in names("dataset"):
        card = dataset_card(name)
        if card.shift_of:
            found[card.shift_of] = (*found.get(card.shift_of, ()), card)
    return found


@cache
def method_digest(info: MethodInfo) -> str:
    """Digest of the method's source: its module and the parts of `methods/` that it imports, the interface left out."""
    folder, done, todo = Path(inspect.getfile(info.cls)).parent, set(), [Path(inspect.getfile(info.cls))]
    h = hashlib.sha256()
    while todo:
        path = todo.pop()
        if path in done or not path.is_file():
            continue
        done.add(path)
        source = path.read_text()
        h.update(source.encode())
        todo += [folder / f"{part}.py" for part in sorted(_imported_parts(source) - {"base"})]
    return h.hexdigest()[:16]


def _imported_parts(source: str) -> set[str]:
    """The modules of `methods/` that this source imports, in whichever way."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["methods" if node.level else "", node.module or ""]))
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return {name.split(".")[1] for name in names if name.startswith("methods.")}


def as_json(spec: TrialSpec) -> dict[str, Any]:
    """One line of `farebox plan --json`."""
    return {
        "trial_id": spec.trial_id,
        "method": spec.choice.name,
        "dataset": spec.dataset.name,
        "test_sets": [spec.dataset.name, *(s.name for s in spec.shifts)],
        "shots": spec.shots,
        "seed": spec.seed,
        "budget_requests": spec.allotment.requests,
        "budget_images": spec.allotment.images,
        **{f"predicted_{k}": v for k, v in asdict(spec.predicted).items()},
    }
