"""Protocols: the classes that a method is fitted on, and the test sets that it is scored on without fitting again.

all_to_all    Fit on all classes. Score on the data set's test split, its shift sets, and other sets (`transfer`).
base_to_new   CoOp's protocol: draw the shots over all classes, fit on the first half of the classes in label order
              (the larger half), and score on the test images of each half separately.

A shift set contains some or all of the fitted classes: the method's logits are restricted to their columns. Classes
that were not fitted (the new ones of base_to_new, those of a transfer set) are passed to `predict`; only methods that
declare `new_classes` can run then.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from methods.base import Classes
from pipeline.cards import DatasetCard
from pipeline.config.card_files import dataset_card, refuse_same_names
from pipeline.config.compose import Config
from pipeline.config.files import names
from pipeline.data.dataset import Dataset
from pipeline.data.few_shot import Split
from pipeline.data.layouts.class_names import prompt_form
from pipeline.data.source import Source
from pipeline.errors import ConfigError, DataError

TEST_BATCH = 500
"""Number of images in one call of `predict`."""


@dataclass(frozen=True)
class EvalSet:
    """A test set, scored in one result row: all of a data set's test split, or the images of some classes."""

    kind: str
    """source, shift, transfer, base or new."""
    dataset: Dataset
    labels: range
    """Labels of its classes in the data set; in scoring they are 0, 1, ..."""
    columns: Sequence[int] | None
    """Column of each class in the method's logits; None if the classes were not fitted and are passed to `predict`."""

    @property
    def name(self) -> str:
        """Name of the data set, with the half of its classes if it is one: 'icons', 'icons:new'."""
        return f"{self.dataset.name}:{self.kind}" if self.kind in ("base", "new") else self.dataset.name

    @property
    def classes(self) -> Classes:
        """Names of its classes, with the card's templates."""
        classnames, card = self.dataset.source.classnames, self.dataset.card
        return Classes(tuple(classnames[label] for label in self.labels), card.template, card.templates)

    @property
    def digest(self) -> str:
        """Digest of the data and, if the classes were not fitted, of the names and templates given to `predict`."""
        if self.columns is not None:
            return self.dataset.digest
        given = [self.dataset.digest, self.classes.names, self.classes.template, self.classes.templates]
        return hashlib.sha256(json.dumps(given).encode()).hexdigest()

    @property
    def rows(self) -> np.ndarray:
        """Rows [B] of its test images in the data set, in file order."""
        source = self.dataset.source
        rows = source.rows_of("test")
        if len(self.labels) == self.dataset.card.classes:
            return rows
        return rows[np.isin(source.labels[rows], self.labels)]


def fitted(protocol: str, n_classes: int) -> range:
    """Return the labels of the classes to fit on: all, or the first half, rounded up."""
    return range(n_classes if protocol == "all_to_all" else (n_classes + 1) // 2)


def within(split: Split, source: Source, labels: range) -> Split:
    """Return the part of a draw that has these labels, in the order of the draw."""
    train, val = (tuple(r for r in rows if int(source.labels[r]) in labels) for rows in (split.train, split.val))
    return Split(train, val)


def eval_cards(config: Config) -> dict[str, tuple[tuple[str, DatasetCard], ...]]:
    """Return, by fitted data set, the other data sets that a fit is scored on, each as ("shift" or "transfer", card).

    Raises:
        ConfigError: two data sets have one name, or a set is both a shift and a transfer set.
    """
    if config.protocol == "base_to_new":
        refuse_same_names(config.datasets)
        return {card.name: () for card in config.datasets}
    shift_names = names("dataset") if config.eval_shift is True else config.eval_shift or ()
    shifts, others = (
        [dataset_card(name, config.data.root) for name in some] for some in (shift_names, config.transfer)
    )
    fits = {card.name for card in config.datasets}
    shifts = [card for card in shifts if card.shift_of in fits]
    refuse_same_names(config.datasets, shifts, others)
    for other in others:
        if other.name in {shift.name for shift in shifts}:
            raise ConfigError(
                f"transfer: {other.name!r} is a shift set of {other.shift_of!r}, which this run scores as one already: "
                "leave it out of transfer, or set eval_shift=false"
            )
    return {
        card.name: (
            *(("shift", other) for other in shifts if other.shift_of == card.name),
            *(("transfer", other) for other in others if other.name != card.name),
        )
        for card in config.datasets
    }


def eval_sets(protocol: str, dataset: Dataset, others: Sequence[tuple[str, Dataset]]) -> tuple[EvalSet, ...]:
    """Return the test sets on which a fit on this data set is scored, its own first.

    Args:
        protocol: all_to_all or base_to_new.
        dataset: The data set that is fitted.
        others: (shift or transfer, data set) of each other test set.

    Raises:
        DataError: a shift set has a class that is not fitted, or a half of the classes has no test image.
    """
    n_classes = dataset.card.classes
    mine = fitted(protocol, n_classes)
    if protocol == "base_to_new":
        rest = range(len(mine), n_classes)
        return _not_empty(EvalSet("base", dataset, mine, mine)), _not_empty(EvalSet("new", dataset, rest, None))
    sets = [EvalSet("source", dataset, mine, mine)]
    for kind, other in others:
        columns = fitted_columns(dataset, other) if kind == "shift" else None
        sets.append(EvalSet(kind, other, range(other.card.classes), columns))
    return tuple(sets)


def _not_empty(half: EvalSet) -> EvalSet:
    if not len(half.rows):
        raise DataError(f"data set {half.dataset.name!r} has no test image of {half.kind} classes: it cannot be halved")
    return half


def fitted_columns(dataset: Dataset, shift: Dataset) -> Sequence[int]:
    """Return the fitted class that each class of a shift set is.

    Classes are matched by their ids (folders, WordNet ids, names in the files). Where that leaves one unmatched, or
    where ids are numbers that have other names in the two sets, they are matched by the prompt form of their names.

    Raises:
        DataError: a class of the shift set is none of the fitted ones, or ids and names contradict each other.
    """
    fitted_source, shift_source = dataset.source, shift.source
    names, shift_names = ([prompt_form(name) for name in source.classnames] for source in (fitted_source, shift_source))
    by_id, by_name = _places(fitted_source.class_ids, shift_source.class_ids), _places(names, shift_names)
    named_alike = [place is None or names[place] == name for place, name in zip(by_id, shift_names, strict=True)]
    numbered = all(identity.isdecimal() for identity in shift_source.class_ids)
    if None not in by_id and (all(named_alike) or (not numbered and None in by_name)):
        places = by_id
    elif None in by_id or numbered:
        places = by_name
    else:
        places = [place if alike else None for place, alike in zip(by_id, named_alike, strict=True)]
    if None in places:
        label = places.index(None)
        raise DataError(
            f"data set {shift.name!r} has other classes than {dataset.name!r}, which methods are fitted on: "
            f"{_both(shift_source.class_ids[label], shift_source.classnames[label])} is not among them (name it alike: "
            "classnames=FILE)"
        )
    columns = [place for place in places if place is not None]
    if len(set(columns)) < len(columns):
        raise DataError(f"data set {shift.name!r} has two classes that are one class of {dataset.name!r}")
    n_classes = dataset.card.classes
    return range(n_classes) if columns == list(range(n_classes)) else tuple(columns)


def _places(known: Sequence[str], values: Sequence[str]) -> list[int | None]:
    """Return the index of each value among the known ones; None if it is not there, or there twice."""
    count, place_of = Counter(known), {value: label for label, value in enumerate(known)}
    return [place_of[value] if count[value] == 1 else None for value in values]


def _both(identity: str, name: str) -> str:
    return repr(identity) if identity == name else f"{identity!r} ({name!r})"


def check_eval_names(config: Config) -> None:
    """Raise ConfigError if `eval_shift` or `transfer` names a data set that this sweep cannot score."""
    shifts = config.eval_shift if isinstance(config.eval_shift, tuple) else ()
    for key, value in (("eval_shift", shifts), ("transfer", config.transfer)):
        if value and config.protocol == "base_to_new":
            raise ConfigError(f"{key}: protocol=base_to_new scores base and new classes alone; leave {key} out")
    fits = [card.name for card in config.datasets]
    for name in shifts:
        card = dataset_card(name)
        if card.shift_of not in fits:
            remedy = f"datasets={card.shift_of}" if card.shift_of else f"transfer={name}"
            raise ConfigError(f"eval_shift: {name!r} is no shift of {', '.join(fits)}: use {remedy}")


def leave_out(kind: str) -> str:
    """Return the override by which a run scores no test sets of this kind (shift or transfer)."""
    return "eval_shift=false" if kind == "shift" else "transfer=[]"
