"""What is known of a data set without asking a model: is it there, is it whole, is it what its card says?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.cards import DatasetCard
from pipeline.data import card as cards
from pipeline.data.class_names import ends, same_prompt
from pipeline.data.coop import COOP, SplitFile
from pipeline.data.images import not_readable, unused_bits
from pipeline.data.indexed import IndexedSource
from pipeline.data.listing import SPLITS
from pipeline.data.repeats import repeats
from pipeline.data.skipped import Skipped
from pipeline.data.source import Source
from pipeline.errors import DataError, one_line
from pipeline.untrusted import LFS_POINTER

Say = Callable[[str], None]
EVERY_S = 5.0
"""Seconds between two lines about progress."""
NAMED = 5
"""Images that a text names before it counts the rest."""


@dataclass
class Report:
    """One data set. `findings` is what is wrong with a set that can be read, one line each."""

    name: str
    place: str
    url: str
    missing: tuple[str, ...] = ()
    """What is not on this machine; the rest is empty then."""
    unusable: str = ""
    """Why it cannot be read, though it is there; the rest is empty then."""
    classes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """Images by split."""
    balance: dict[str, tuple[int, float, int]] = field(default_factory=dict)
    """Images a class by split: least, median, most."""
    split: str = ""
    """How it was made."""
    looked_at: int = 0
    """Images that were opened."""
    unreadable: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """(test image, train image) of the same content."""
    conflicting: list[tuple[str, str]] = field(default_factory=list)
    """(image, image) of the same content and different labels."""
    repeated: int = 0
    """Images that their split holds before, with the same label."""
    order: str = ""
    """What decides the order of the labels, and the labels at both ends."""
    skipped: list[Skipped] = field(default_factory=list)
    """Files that are not used, by reason."""
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """missing, unusable, findings or fine."""
        return "missing" if self.missing else "unusable" if self.unusable else "findings" if self.findings else "fine"

    def record(self) -> dict[str, Any]:
        """For JSON: every field, the state first."""
        return {"name": self.name, "state": self.state, **vars(self), "skipped": [s._asdict() for s in self.skipped]}

    def text(self) -> str:
        """For people, several lines."""
        lines = [f"{self.name}: {self.state.replace('missing', 'not here')}"]
        if self.missing:
            lines += [*self.missing, *([f"published at {self.url}"] if self.url else [])]
        elif self.unusable:
            lines.append(self.unusable)
        else:
            lines += [f"at {self.place}", f"{self.classes:,} classes; split {self.split}"]
            lines += [f"labels: {self.order}"] if self.order else []
            for split, count in self.counts.items():
                least, median, most = self.balance[split]
                lines.append(f"{split:<5} {count:>9,} images; a class has {least:,} to {most:,}, median {median:,g}")
            if self.looked_at:
                lines.append(f"{self.looked_at:,} images looked at")
            if self.repeated:
                lines.append(f"images that occur more than once in their split: {self.repeated:,}")
            lines += [*(f"skipped: {skipped}" for skipped in self.skipped), *(f"note: {note}" for note in self.notes)]
        for finding in self.findings:
            lines.append(f"! {finding}")
        lines += _some(f"unreadable: {one}" for one in self.unreadable)
        lines += _some(f"the same image: {test} (test) and {train} (train)" for test, train in self.duplicates)
        lines += _some(f"the same image under two labels: {one} and {other}" for one, other in self.conflicting)
        return "\n  ".join(lines)


def _some(lines: Any) -> list[str]:
    found = list(lines)
    more = [f"... and {len(found) - NAMED:,} more (--json lists all)"] if len(found) > NAMED else []
    return [f"  {line}" for line in found[:NAMED] + more]


def look(card: DatasetCard, images: bool, say: Say) -> Report:
    """Examine a data set; with `images`, every image of it is read. Raises nothing that is the data set's fault."""
    report = None
    for _ in range(2):  # where a file was changed since it was indexed, the second look sees it as it is now
        report = Report(card.name, card.path if card.layout != "parquet" else str(card.file), card.url)
        try:
            report.missing = cards.missing(card)
            if not report.missing:
                _fill(report, card, cards.source_anew(card, listed_anew=True), images, say)
            break
        except DataError as error:
            report.unusable = one_line(error)
    assert report is not None
    return report


def _fill(report: Report, card: DatasetCard, source: Source, images: bool, say: Say) -> None:
    report.classes = len(source.classnames)
    report.split = how_split(card, source)
    if report.classes != card.classes:
        report.findings.append(f"{report.classes:,} classes, its card says {card.classes:,}")
    for split, said in zip(SPLITS, (card.train, card.val, card.test), strict=True):
        labels = source.labels[source.rows_of(split)]
        if len(labels) != said:
            report.findings.append(f"{len(labels):,} {split} images, its card says {said:,}")
        if not len(labels):
            continue
        of_class = np.bincount(labels, minlength=report.classes)
        report.counts[split] = len(labels)
        report.balance[split] = int(of_class.min()), float(np.median(of_class)), int(of_class.max())
        if len(empty := np.flatnonzero(of_class == 0)):
            first = source.classnames[empty[0]]
            report.findings.append(f"{len(empty):,} classes have no {split} image, the first is {first!r}")
    if isinstance(source, IndexedSource):
        index = source.index
        report.order = f"{index.order}: {ends(index.class_ids, source.classnames)}"
        report.skipped, report.notes = list(index.contents.skipped), list(index.contents.notes)
        report.findings += index.contents.findings
    if pairs := same_prompt(source.classnames):
        first, later = (source.classnames[label] for label in pairs[0])
        report.notes.append(f"pairs of classes with one prompt: {len(pairs):,}, the first is {first!r} and {later!r}")
    if images:
        _read_images(report, source, say)


def _read_images(report: Report, source: Source, say: Say) -> None:
    rows = np.array([row for row in range(len(source.labels)) if not _is_pointer(source, row)], np.int64)
    report.looked_at = len(rows)
    bad = {}
    for row, size, reason in not_readable(source, rows, _progress(report.name, say)):
        bad[row] = f"{source.where(row)} ({size:,} bytes, {reason})"
    report.unreadable = list(bad.values())
    if bad:
        report.findings.append(f"{len(bad):,} images cannot be decoded")
    if finding := unused_bits(source, rows):
        report.findings.append(finding)
    found = repeats(source, np.setdiff1d(rows, list(bad)))
    report.duplicates = [(source.where(test), source.where(train)) for test, train in found.across]
    report.conflicting = [(source.where(one), source.where(other)) for one, other in found.conflicting]
    report.repeated = found.within
    if found.across:
        report.findings.append(f"{len(found.across):,} test images are in train too")
    if found.conflicting:
        report.findings.append(f"images with another label elsewhere in the set: {len(found.conflicting):,}")


def _is_pointer(source: Source, row: int) -> bool:
    """Return True for a Git LFS pointer, which the account of the folder reports already."""
    has_pointers = isinstance(source, IndexedSource) and source.index.contents.findings
    return bool(has_pointers) and source.image_bytes(row).startswith(LFS_POINTER)


def _progress(name: str, say: Say) -> Callable[[int, int], None]:
    began = said = time.monotonic()

    def seen(done: int, n: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said > EVERY_S and done < n:
            said, left = now, (now - began) / done * (n - done)
            say(f"{name}: {done:,} of {n:,} images read, about {left:,.0f} s left")

    return seen


def how_split(card: DatasetCard, source: Source) -> str:
    """For people: how train, val and test came about."""
    if isinstance(source, IndexedSource) and source.made:
        return source.made
    reader = COOP.get(card.layout)
    return f"published, {reader.split}" if isinstance(reader, SplitFile) else "as its files have it"
