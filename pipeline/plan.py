"""From a resolved run to frozen trials: each with id, allotment and predicted bill. Nothing is asked here."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from methods.base import Bill, MethodInfo, TaskShape
from pipeline.blackbox import model as models
from pipeline.blackbox.bill import Limits, total
from pipeline.config import Config, DatasetCard, MethodChoice, ModelCard
from pipeline.data.card import check_card, source_of
from pipeline.data.images import check_readable
from pipeline.data.split import Split, draw
from pipeline.errors import BudgetExceeded, ConfigError, DataError
from pipeline.protocol import TestSet, check_words, fitted, test_cards, test_sets, unable, within

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
    data_digest: str
    classnames_digest: str
    protocol: str
    tests: tuple[TestSet, ...]
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
        return (
            f"{self.choice.name} on {self.dataset.name}, {self.shots} shots, seed {self.seed}, {self.cell.budget_name}"
        )

    @property
    def cell(self) -> Cell:
        """Its place in the table."""
        return Cell(self.choice, self.dataset, self.allotment, self.shots, self.seed)

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


class Cell(NamedTuple):
    """A trial's place in the table: what the configuration alone says of it."""

    choice: MethodChoice
    dataset: DatasetCard
    allotment: Limits
    shots: int
    seed: int

    @property
    def budget_name(self) -> str:
        """For people: '8,000 requests', '500,000 images' or 'no limit'."""
        return self.allotment.words or "no limit"


def cells(config: Config) -> tuple[list[Cell], dict[str, str]]:
    """Every combination that can run, in the order of the plan; and the methods that cannot, with the reason."""
    found, left_out = [], {}
    for allotment in config.allotments:
        for name in config.methods:
            for card in config.datasets:
                choice = config.choice(name, card.name)
                if reason := unable(config, choice.info):
                    left_out[name] = reason
                    continue
                found += [Cell(choice, card, allotment, k, seed) for k in config.shots for seed in config.seeds]
    if not found:
        raise ConfigError("nothing can run: " + "; ".join(f"{k} {v}" for k, v in left_out.items()))
    return found, left_out


def shape_of(config: Config, card: DatasetCard, shots: int, feature_dim: int, split: Split | None = None) -> TaskShape:
    """The sizes that a bill depends on: of a draw, or (without one) of the draw that the card alone promises."""
    fresh, classes = config.views == "fresh", len(fitted(config.protocol, card.classes))
    val = {"none": 0, "min4": min(shots, 4) * classes, "full": card.val * classes // card.classes}[config.validation]
    return TaskShape(
        n_classes=classes,
        n_train=len(split.train) if split else shots * classes,
        n_val=len(split.val) if split else val,
        shots=shots,
        views=1 if fresh else int(config.views),
        fresh_views=fresh,
        n_templates=max(1, len(card.templates)),
        feature_dim=feature_dim,
    )


def predicted(cell: Cell, shape: TaskShape) -> Bill:
    """What fitting will be charged."""
    return cell.choice.build().bill(shape, cell.allotment.remaining(Bill()))


def make_plan(config: Config) -> Plan:
    """Expand the run into trials. Raises ConfigError or DataError before any query is spent."""
    check_words(config)
    placed, left_out = cells(config)
    identity, width = models.identity(config.model), models.feature_dim(config.model)
    tests, others = {}, test_cards(config)
    for card in config.datasets:
        check_card(card)
        for kind, other in others[card.name]:
            try:
                check_card(other)
            except DataError as error:
                raise DataError(f"{error} (or leave it out: {kind}={'false' if kind == 'shift' else '[]'})") from error
        tests[card.name] = test_sets(config.protocol, card, others[card.name])
    draws = {card.name: _draws(config, card, tests[card.name][0].labels) for card in config.datasets}
    trials = [
        _trial(config, cell, tests[cell.dataset.name], draws[cell.dataset.name][cell.shots, cell.seed], identity, width)
        for cell in placed
    ]
    return Plan(config, tuple(trials), tuple(left_out.items()))


def _draws(config: Config, card: DatasetCard, labels: range) -> dict[tuple[int, int], tuple[Split, str]]:
    """The few-shot draw of these classes, and its digest, by (shots, seed). Drawn over all classes, as CoOp does."""
    source, found = source_of(card), {}
    for shots in config.shots:
        for seed in config.seeds:
            split = draw(source, card.name, shots, seed, config.validation, config.data.short_classes)
            split = within(split, source, labels)
            found[shots, seed] = split, split.digest(source)
    check_readable(source, card.name, sorted({row for split, _ in found.values() for row in split.train + split.val}))
    return found


def _trial(
    config: Config,
    cell: Cell,
    tests: tuple[TestSet, ...],
    drawn: tuple[Split, str],
    identity: str,
    width: int,
) -> TrialSpec:
    choice, card, shots, seed = cell.choice, cell.dataset, cell.shots, cell.seed
    split, split_digest = drawn
    shape = shape_of(config, card, shots, width, split)
    resolved = {
        "rules": _RULES,
        "model": [identity, config.model.precision],
        "method": [choice.info.name, choice.info.version, choice.config],
        "dataset": [card.name, source_of(card).digest, card.template, card.templates, card.augment],
        "tests": [(t.card.name, source_of(t.card).digest) for t in tests if t.kind == "shift"],
        "split": split_digest,
        "task": [shots, seed, shape.views, shape.fresh_views, config.validation, config.curve],
        "allotment": [cell.allotment.requests, cell.allotment.images],
    }
    if config.protocol != "all_to_all":
        resolved["protocol"] = config.protocol
    if config.transfer:
        others = [t.card for t in tests if t.kind == "transfer"]
        resolved["transfer"] = [(o.name, source_of(o).digest, o.template, o.templates) for o in others]
    trial_id = hashlib.sha256(json.dumps(resolved, sort_keys=True, default=list).encode()).hexdigest()[:16]
    return TrialSpec(
        trial_id=trial_id,
        sweep=config.sweep,
        choice=choice,
        method_digest=method_digest(choice.info),
        model=config.model,
        model_identity=identity,
        dataset=card,
        data_digest=source_of(card).digest,
        classnames_digest=texts_digest(tests[0].classes.names),
        protocol=config.protocol,
        tests=tests,
        shots=shots,
        seed=seed,
        split=split,
        split_digest=split_digest,
        allotment=cell.allotment,
        views=shape.views,
        fresh_views=shape.fresh_views,
        validation=config.validation,
        settings=config.settings,
        curve=config.curve,
        predicted=predicted(cell, shape),
    )


def refuse_nameless(config: Config) -> None:
    """Raise ConfigError for limits of a global budget without its name, which would limit nothing."""
    budget = config.global_budget
    if budget.name is None and budget.limits != Limits():
        raise ConfigError(
            f"budget.global limits {budget.limits.words} of a budget without a name: add budget.global.name"
        )


def refuse_unpayable(config: Config, asked: Bill) -> None:
    """Raise BudgetExceeded when the ceilings cannot pay what trials are predicted to ask."""
    refuse_nameless(config)
    for account, ceiling in (
        ("the sweep", config.sweep_budget),
        (f"global budget {config.global_budget.name!r}", config.global_budget.limits),
    ):
        unit = ceiling.passed(Bill(), asked)
        if unit:
            raise BudgetExceeded(account, unit, getattr(asked, unit), 0, getattr(ceiling, unit))


def texts_digest(texts: Sequence[str]) -> str:
    """Digest of a sequence of texts; empty for none."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16] if texts else ""


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
