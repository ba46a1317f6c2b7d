"""Protocols: which classes a fit is given, and which test sets it is scored on without fitting again.

all_to_all    all classes; scored on the data set's own test split, on its shift sets and on other sets (`transfer`)
base_to_new   CoOp's: the shots are drawn over all classes, then the first half of the classes (in label order, the
              larger one) is fitted on; scored on the test images of those alone and of the others alone

A shift set has classes that were fitted, all or some: the method's logits are restricted to their columns. Classes that
were not fitted (base_to_new's new ones, those of a transfer set) are given to `predict`, by methods that declare so.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from methods.base import Classes, MethodInfo
from pipeline.config import Config, DatasetCard, dataset_card, names, refuse_same_names
from pipeline.data.card import source_of
from pipeline.data.class_names import prompt_form
from pipeline.data.source import Source
from pipeline.data.split import Split
from pipeline.errors import ConfigError, DataError


@dataclass(frozen=True)
class TestSet:
    """The part of a data set's test split that makes one result row, and where its classes are in a method's logits."""

    kind: str
    """source, shift, transfer, base or new."""
    card: DatasetCard
    labels: range
    """Labels in the data set's own numbering; scored as 0, 1, ..."""
    columns: Sequence[int] | None
    """The fitted class that each of them is; None: they were not fitted, `predict` is given their names."""

    @property
    def name(self) -> str:
        """The data set's name, with the half that is meant: 'icons', 'icons:new'."""
        return f"{self.card.name}:{self.kind}" if self.kind in ("base", "new") else self.card.name

    @property
    def classes(self) -> Classes:
        """Names of its classes, with the card's templates."""
        found = source_of(self.card).classnames
        return Classes(tuple(found[label] for label in self.labels), self.card.template, self.card.templates)

    @property
    def digest(self) -> str:
        """Digest of the data; for classes that were not fitted, also of the names and templates given to `predict`."""
        data = source_of(self.card).digest
        if self.columns is not None:
            return data
        given = [data, self.classes.names, self.classes.template, self.classes.templates]
        return hashlib.sha256(json.dumps(given).encode()).hexdigest()

    @property
    def rows(self) -> np.ndarray:
        """Rows of its test images in file order; a half of the classes has its own images only."""
        source = source_of(self.card)
        rows = source.rows_of("test")
        if len(self.labels) == self.card.classes:
            return rows
        return rows[np.isin(source.labels[rows], self.labels)]


def fitted(protocol: str, n_classes: int) -> range:
    """The labels of the classes that a fit is given: all, or the first half, rounded up."""
    return range(n_classes if protocol == "all_to_all" else (n_classes + 1) // 2)


def within(split: Split, source: Source, labels: range) -> Split:
    """The drawn images of these classes, in drawn order."""
    train, val = (tuple(r for r in rows if int(source.labels[r]) in labels) for rows in (split.train, split.val))
    return Split(train, val)


def unable(config: Config, info: MethodInfo) -> str | None:
    """Why a method cannot run under this model and protocol; None when it can."""
    if not config.model.access.covers(info.access):
        return f"needs {info.access.label}, {config.model.name} grants {config.model.access.label}"
    if not info.new_classes and (config.protocol == "base_to_new" or config.transfer):
        asked = "transfer" if config.transfer else "protocol=base_to_new"
        return f"cannot predict classes that it was not fitted on, which {asked} asks for"
    return None


def test_cards(config: Config) -> dict[str, tuple[tuple[str, DatasetCard], ...]]:
    """By fitted data set, what a fit is scored on beside its own test split: (shift or transfer, card)."""
    if config.protocol == "base_to_new":
        refuse_same_names(config.datasets)
        return {card.name: () for card in config.datasets}
    asked = names("dataset") if config.shift is True else config.shift or ()
    shifts, others = ([dataset_card(name, config.data.root) for name in some] for some in (asked, config.transfer))
    fits = {card.name for card in config.datasets}
    shifts = [card for card in shifts if card.shift_of in fits]
    refuse_same_names(config.datasets, shifts, others)
    for other in others:
        if other.name in {shift.name for shift in shifts}:
            raise ConfigError(
                f"transfer: {other.name!r} is a shift set of {other.shift_of!r}, which this run scores as one already: "
                "leave it out of transfer, or set shift=false"
            )
    return {
        card.name: (
            *(("shift", other) for other in shifts if other.shift_of == card.name),
            *(("transfer", other) for other in others if other.name != card.name),
        )
        for card in config.datasets
    }


def test_sets(protocol: str, card: DatasetCard, others: Sequence[tuple[str, DatasetCard]]) -> tuple[TestSet, ...]:
    """All that a fit on this data set is scored on, its own test images first. Opens the files."""
    mine = fitted(protocol, card.classes)
    if protocol == "base_to_new":
        rest = range(len(mine), card.classes)
        return _not_empty(TestSet("base", card, mine, mine)), _not_empty(TestSet("new", card, rest, None))
    found = [TestSet("source", card, mine, mine)]
    for kind, other in others:
        columns = fitted_columns(card, other) if kind == "shift" else None
        found.append(TestSet(kind, other, range(other.classes), columns))
    return tuple(found)


def _not_empty(half: TestSet) -> TestSet:
    if not len(half.rows):
        raise DataError(f"data set {half.card.name!r} has no test image of {half.kind} classes: it cannot be halved")
    return half


def fitted_columns(card: DatasetCard, shift: DatasetCard) -> Sequence[int]:
    """Return the fitted class that each class of a shift set is.

    Classes are matched by their ids (folders, WordNet ids, names in the files). Where that leaves one unmatched, or
    where ids are numbers that have other names in the two sets, they are matched by the prompt form of their names.

    Raises:
        DataError: a class of the shift set is none of the fitted ones, or ids and names contradict each other.
    """
    fitted_source, shift_source = source_of(card), source_of(shift)
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
            f"data set {shift.name!r} has other classes than {card.name!r}, which methods are fitted on: "
            f"{_both(shift_source.class_ids[label], shift_source.classnames[label])} is not among them (name it alike: "
            "classnames=FILE)"
        )
    columns = [place for place in places if place is not None]
    if len(set(columns)) < len(columns):
        raise DataError(f"data set {shift.name!r} has two classes that are one class of {card.name!r}")
    same = columns == list(range(card.classes))
    return range(card.classes) if same else tuple(columns)


def _places(known: Sequence[str], wanted: Sequence[str]) -> list[int | None]:
    """Return where each wanted value is among the known ones, None where it is not or is there twice."""
    count, place_of = Counter(known), {value: label for label, value in enumerate(known)}
    return [place_of[value] if count[value] == 1 else None for value in wanted]


def _both(identity: str, name: str) -> str:
    return repr(identity) if identity == name else f"{identity!r} ({name!r})"


def check_words(config: Config) -> None:
    """ConfigError when `shift` or `transfer` names what this run cannot score."""
    listed = {"shift": config.shift if isinstance(config.shift, tuple) else (), "transfer": config.transfer}
    for word, asked in listed.items():
        if asked and config.protocol == "base_to_new":
            raise ConfigError(f"{word}: protocol=base_to_new scores base and new classes alone; leave {word} out")
    fits = [card.name for card in config.datasets]
    for name in listed["shift"]:
        card = dataset_card(name)
        if card.shift_of not in fits:
            wanted = f"datasets=[{card.shift_of}]" if card.shift_of else f"transfer=[{name}]"
            raise ConfigError(f"shift: {name!r} is no shift of {', '.join(fits)}: use {wanted}")
