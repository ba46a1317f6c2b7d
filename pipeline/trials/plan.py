"""Expand a configuration into trials, each with an id, an allotment and a predicted bill. No request is sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace

from methods.base import Bill, TaskShape
from pipeline.blackbox.model_facts import ModelFacts
from pipeline.budget import Limits, total
from pipeline.cards import FULL_ANSWERS, Answers, DatasetCard, ModelCard
from pipeline.config.compose import Config
from pipeline.config.method_choice import MethodChoice
from pipeline.data.dataset import Dataset, check_card
from pipeline.data.few_shot import Split, draw
from pipeline.data.images import check_readable
from pipeline.errors import BudgetExceeded, ConfigError, DataError
from pipeline.local.facts import LocalFacts
from pipeline.remote.facts import describe
from pipeline.results.row import account_name
from pipeline.source_code import code_digest, method_digest, texts_digest
from pipeline.trials.cells import Cell, cells, local_of, trial_name, tuning_notes
from pipeline.trials.prompts import check_prompts
from pipeline.trials.protocol import (
    EvalSet,
    check_eval_names,
    eval_cards,
    eval_sets,
    fitted,
    leave_out,
    within,
)
from pipeline.trials.tuning import Search

_RULES = 1
"""Version of the evaluation protocol (batches of predictions, augmentation, scoring); part of the trial id."""


@dataclass(frozen=True)
class TrialSpec:
    """One trial: a method, a few-shot task, an allotment and the test sets to score. It depends on no other file."""

    trial_id: str
    sweep: str
    choice: MethodChoice
    method_digest: str
    code_digest: str
    model: ModelCard
    model_identity: str
    transform: str
    dataset: Dataset
    data_digest: str
    classnames_digest: str
    protocol: str
    eval_sets: tuple[EvalSet, ...]
    """Test sets to score, the one of the fitted data set first."""
    shots: int
    seed: int
    draw: str
    split: Split = field(repr=False)
    split_digest: str
    allotment: Limits
    answers: Answers
    views: int
    fresh_views: bool
    validation: str
    hparams: str
    curve: int
    predicted: Bill
    local: LocalFacts | None
    """The local model, for methods that use one."""

    @property
    def name(self) -> str:
        """See `cells.trial_name`."""
        task = self.dataset.name, self.shots, self.seed
        return trial_name(self.choice.name, *task, self.allotment, self.hparams, self.answers.text)

    @property
    def cell(self) -> Cell:
        """The trial's cell in the table of the sweep."""
        return Cell(self.choice, self.dataset.card, self.allotment, self.shots, self.seed, self.answers, self.hparams)

    @property
    def account(self) -> str:
        """The trial's name in the ledger and on its checkpoints, which includes the digests of the code."""
        return account_name(self.trial_id, self.method_digest, self.code_digest)

    @property
    def reserved(self) -> Limits:
        """Amount reserved on the ceilings before the trial starts: its predicted bill."""
        return Limits(self.predicted.requests, self.predicted.images)


@dataclass(frozen=True)
class SweepPlan:
    """All trials of a sweep in order."""

    config: Config
    trials: tuple[TrialSpec, ...]
    unable: tuple[tuple[str, str], ...]
    """Methods that cannot run, each with the reason."""
    model: ModelFacts
    notes: tuple[str, ...] = ()
    """Remarks for the user, one line each."""

    @property
    def total(self) -> Bill:
        """Sum of the predicted bills."""
        return total(t.predicted for t in self.trials)


def shape_of(config: Config, card: DatasetCard, shots: int, feature_dim: int, split: Split | None = None) -> TaskShape:
    """Return the sizes that a bill depends on, from a few-shot draw or, without one, from the card."""
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
    """Return the bill of fitting, as the method predicts it; of a tuned method, an upper bound with its search.

    Raises:
        ConfigError: a search cannot be paid, or has no validation images.
    """
    shape = replace(shape, top_k=cell.answers.k)
    if cell.choice.tuning is None:
        return cell.choice.build().bill(shape, cell.allotment.remaining(Bill()))
    where = f"{cell.choice.name} on {cell.dataset.name}, {cell.shots} shots, {cell.budget_name}"
    return Search(cell.choice, shape, cell.allotment, cell.seed).bound(where)


def make_plan(config: Config, fetch: bool = False) -> SweepPlan:
    """Expand a configuration into trials.

    Args:
        config: the composed configuration.
        fetch: download the tokenizer if it is not on this machine, and a tag's weights if replicas run here only.

    Raises:
        ConfigError, DataError: a trial could not run.
    """
    check_eval_names(config)
    facts = describe(config.model, fetch and config.address is None)
    config = replace(config, model=facts.card)
    to_run, left_out = cells(config, facts.withheld)
    tests = _eval_sets(config)
    if note := check_prompts(facts, tests, {cell.choice for cell in to_run}, fetch):
        facts = replace(facts, notes=(*facts.notes, note))
    draws = {name: _draws(config, sets[0].dataset, sets[0].labels) for name, sets in tests.items()}
    trials = [
        _trial(config, cell, tests[cell.dataset.name], draws[cell.dataset.name][cell.shots, cell.seed], facts)
        for cell in to_run
    ]
    datasets = {test.dataset.name: test.dataset for sets in tests.values() for test in sets}
    locals_ = dict.fromkeys(trial.local.note for trial in trials if trial.local)
    notes = (*locals_, *tuning_notes(to_run), *_same_data(datasets.values()))
    return SweepPlan(config, tuple(trials), tuple(left_out.items()), facts, notes)


def _eval_sets(config: Config) -> dict[str, tuple[EvalSet, ...]]:
    """Return the test sets of each fitted data set. Each data set is opened and checked once."""
    checked: dict[DatasetCard, Dataset] = {}

    def dataset_of(card: DatasetCard) -> Dataset:
        if card not in checked:
            checked[card] = check_card(card)
        return checked[card]

    tests, others = {}, eval_cards(config)
    for card in config.datasets:
        dataset, opened = dataset_of(card), []
        for kind, other in others[card.name]:
            try:
                opened.append((kind, dataset_of(other)))
            except DataError as error:
                raise DataError(f"{error} (or leave it out: {leave_out(kind)})") from error
        tests[card.name] = eval_sets(config.protocol, dataset, opened)
    return tests


def announcements(plan: SweepPlan) -> list[str]:
    """Return the lines that a run prints first: the model's input rule and notes, and the methods that cannot run."""
    facts, name = plan.model, plan.config.model.name
    lines = [facts.rule] if facts.rule and plan.config.model.kind in ("open_clip", "http") else []
    return [
        *(f"model {name}: {line}" for line in (*lines, *facts.notes)),
        *plan.notes,
        *(f"not run: {method} {why}" for method, why in plan.unable),
    ]


def _same_data(datasets: Iterable[Dataset]) -> Iterator[str]:
    """Yield a line for each group of data sets that have different names and the same content."""
    names: dict[str, list[str]] = {}
    for dataset in datasets:
        names.setdefault(dataset.digest, []).append(repr(dataset.name))
    for group in names.values():
        if len(group) > 1:
            yield f"note: data sets {' and '.join(group)} have the same content under different names"


def _draws(config: Config, dataset: Dataset, labels: range) -> dict[tuple[int, int], tuple[Split, str]]:
    """Return the few-shot draw of these classes and its digest, by (shots, seed). As in CoOp, draw over all classes."""
    source, draws = dataset.source, {}
    for shots in config.shots:
        for seed in config.seeds:
            balanced, small_classes = config.draw == "balanced", config.data.small_classes
            split = draw(source, dataset.name, shots, seed, config.validation, small_classes, balanced)
            split = within(split, source, labels)
            draws[shots, seed] = split, split.digest(source)
    rows = sorted({row for split, _ in draws.values() for row in split.train + split.val})
    check_readable(source, dataset.name, rows)
    return draws


def _trial(
    config: Config, cell: Cell, tests: tuple[EvalSet, ...], drawn: tuple[Split, str], facts: ModelFacts
) -> TrialSpec:
    choice, dataset, shots, seed = cell.choice, tests[0].dataset, cell.shots, cell.seed
    card = dataset.card
    split, split_digest = drawn
    shape = shape_of(config, card, shots, facts.feature_dim, split)
    if not choice.info.uses_views:
        shape = replace(shape, views=0, fresh_views=False)  # one trial, whatever `views` is
    resolved = {
        "rules": _RULES,
        "model": [facts.identity, config.model.precision, facts.transform],
        "method": [choice.info.name, choice.info.version, choice.config],
        "dataset": [card.name, dataset.digest, card.template, card.templates, card.augment],
        "tests": [(t.dataset.name, t.dataset.digest) for t in tests if t.kind == "shift"],
        "split": split_digest,
        "task": [shots, seed, shape.views, shape.fresh_views, config.validation, config.curve],
        "allotment": [cell.allotment.requests, cell.allotment.images],
    }
    if cell.answers != FULL_ANSWERS:
        resolved["answers"] = asdict(cell.answers)
    if choice.tuning is not None:
        resolved["tune"] = asdict(choice.tuning)
    if choice.info.uses_text_norm:
        resolved["text_norm"] = config.model.text_norm  # None: measured by a rule that code_digest covers
    if local := local_of(config.local, choice.info):
        resolved["local"] = local.digest
    if config.protocol != "all_to_all":
        resolved["protocol"] = config.protocol
    if config.draw != "balanced":
        resolved["draw"] = config.draw
    if config.transfer:
        others = [t.dataset for t in tests if t.kind == "transfer"]
        resolved["transfer"] = [(o.name, o.digest, o.card.template, o.card.templates) for o in others]
    trial_id = hashlib.sha256(json.dumps(resolved, sort_keys=True, default=list).encode()).hexdigest()[:16]
    return TrialSpec(
        trial_id=trial_id,
        sweep=config.sweep,
        choice=choice,
        method_digest=method_digest(choice.info),
        code_digest=code_digest(),
        model=config.model,
        model_identity=facts.identity,
        transform=facts.transform,
        dataset=dataset,
        data_digest=dataset.digest,
        classnames_digest=texts_digest(tests[0].classes.names),
        protocol=config.protocol,
        eval_sets=tests,
        shots=shots,
        seed=seed,
        draw=config.draw,
        split=split,
        split_digest=split_digest,
        allotment=cell.allotment,
        answers=cell.answers,
        views=shape.views,
        fresh_views=shape.fresh_views,
        validation=config.validation,
        hparams=cell.hparams,
        curve=config.curve,
        predicted=predicted(cell, shape),
        local=local,
    )


def refuse_nameless(config: Config) -> None:
    """Raise ConfigError if a global budget has limits and no name: they would limit nothing."""
    budget = config.global_budget
    if budget.name is None and (budget.limits != Limits() or budget.usd is not None):
        limits = budget.limits.text or "the money"
        raise ConfigError(f"budget.global limits {limits} of a budget without a name: add budget.global.name")


def refuse_unpayable(config: Config, bill: Bill) -> None:
    """Raise BudgetExceeded if a bill, the sum over all trials, exceeds a ceiling of the configuration."""
    refuse_nameless(config)
    for account, ceiling in (
        ("the sweep", config.sweep_budget),
        (f"global budget {config.global_budget.name!r}", config.global_budget.limits),
    ):
        unit = ceiling.exceeded_unit(Bill(), bill)
        if unit:
            raise BudgetExceeded(account, unit, getattr(bill, unit), 0, getattr(ceiling, unit))
