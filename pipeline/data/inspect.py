"""Examine a data set: whether its files are there, whether they can be read, and whether they match its card."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.cards import DatasetCard
from pipeline.data.dataset import missing, reopen
from pipeline.data.images import not_readable, unused_bits
from pipeline.data.indexed_source import FileSource, IndexedSource
from pipeline.data.layouts.class_names import ends, prompt_note
from pipeline.data.layouts.coop import COOP, SplitFile
from pipeline.data.layouts.file_kinds import POINTER_SIZES, is_pointer
from pipeline.data.layouts.listing import SPLITS
from pipeline.data.layouts.skipped import Skipped
from pipeline.data.repeats import repeats
from pipeline.data.source import Source
from pipeline.errors import DataError, one_line

Echo = Callable[[str], None]
EVERY_S = 5.0
"""Seconds between two progress lines."""
NAMED = 5
"""Number of images that a text lists by name."""


@dataclass
class Report:
    """The report on one data set. `findings` are the problems of a data set that can be read, one line each."""

    name: str
    place: str
    url: str
    missing: tuple[str, ...] = ()
    """What is not on this machine; the other fields are empty then."""
    unusable: str = ""
    """Why the files cannot be read; the other fields are empty then."""
    classes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """Number of images by split."""
    balance: dict[str, tuple[int, float, int]] = field(default_factory=dict)
    """Minimum, median and maximum number of images per class, by split."""
    split: str = ""
    """How the split was made."""
    looked_at: int = 0
    """Number of images that were decoded."""
    unreadable: list[str] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """Pairs (test image, train image) with the same content."""
    conflicting: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of images with the same content and different labels."""
    repeated: int = 0
    """Number of images that occur earlier in their split with the same label."""
    order: str = ""
    """How the labels are ordered, and the labels at both ends of the list."""
    skipped: list[Skipped] = field(default_factory=list)
    """Skipped files, by reason."""
    notes: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """One of missing, unusable, findings and fine."""
        return "missing" if self.missing else "unusable" if self.unusable else "findings" if self.findings else "fine"

    def record(self) -> dict[str, Any]:
        """Return all fields for JSON, the state first."""
        return {"name": self.name, "state": self.state, **vars(self), "skipped": [s._asdict() for s in self.skipped]}

    def text(self) -> str:
        """Return the report as text of several lines."""
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


def _some(lines: Iterable[str]) -> list[str]:
    """Return the first lines, and the number of the others."""
    everything = list(lines)
    more = [f"... and {len(everything) - NAMED:,} more (--json lists all)"] if len(everything) > NAMED else []
    return [f"  {line}" for line in everything[:NAMED] + more]


def examine(card: DatasetCard, images: bool, echo: Echo) -> Report:
    """Examine a data set. Problems of the data set are reported, not raised.

    Args:
        card: Its card.
        images: Decode every image.
        echo: Called with progress lines.
    """
    report = None
    for _ in range(2):  # if a file was changed after it was indexed, the second attempt sees its present state
        report = Report(card.name, card.path if card.layout != "parquet" else str(card.file), card.url)
        try:
            report.missing = missing(card)
            if not report.missing:
                _fill(report, card, reopen(card, rebuild=True), images, echo)
            break
        except DataError as error:
            report.unusable = one_line(error)
    assert report is not None
    return report


def _fill(report: Report, card: DatasetCard, source: Source, images: bool, echo: Echo) -> None:
    report.classes = len(source.classnames)
    report.split = _split_text(card, source)
    if report.classes != card.classes:
        report.findings.append(f"{report.classes:,} classes, its card says {card.classes:,}")
    for split, expected in zip(SPLITS, (card.train, card.val, card.test), strict=True):
        labels = source.labels[source.rows_of(split)]
        if len(labels) != expected:
            report.findings.append(f"{len(labels):,} {split} images, its card says {expected:,}")
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
    if note := prompt_note(source.classnames):
        report.notes.append(note)
    if images:
        _read_images(report, source, echo)


def _read_images(report: Report, source: Source, echo: Echo) -> None:
    rows = np.setdiff1d(np.arange(len(source.labels)), _pointers(source))
    report.looked_at = len(rows)
    bad = {}
    for row, size, reason in not_readable(source, rows, _progress(report.name, echo)):
        bad[row] = f"{source.where(row)} ({size:,} bytes, {reason})"
    report.unreadable = list(bad.values())
    if bad:
        report.findings.append(f"{len(bad):,} images cannot be decoded")
    if finding := unused_bits(source, rows):
        report.findings.append(finding)
    repeated = repeats(source, np.setdiff1d(rows, list(bad)))
    report.duplicates = [(source.where(test), source.where(train)) for test, train in repeated.across]
    report.conflicting = [(source.where(one), source.where(other)) for one, other in repeated.conflicting]
    report.repeated = repeated.within
    if repeated.across:
        report.findings.append(f"{len(repeated.across):,} test images are in train too")
    if repeated.conflicting:
        report.findings.append(f"images with another label elsewhere in the set: {len(repeated.conflicting):,}")


def _pointers(source: Source) -> list[int]:
    """Return the rows whose files are Git LFS pointers. The findings of the index report them already."""
    if not isinstance(source, FileSource):
        return []
    index, sizes = source.index, source.index.sizes
    rows = np.flatnonzero((sizes >= POINTER_SIZES.start) & (sizes < POINTER_SIZES.stop)).tolist()
    return [row for row in rows if is_pointer(index.root / index.path(row))]


def _progress(name: str, echo: Echo) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def progress(done: int, n: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last > EVERY_S and done < n:
            last, left = now, (now - started) / done * (n - done)
            echo(f"{name}: {done:,} of {n:,} images read, about {left:,.0f} s left")

    return progress


def _split_text(card: DatasetCard, source: Source) -> str:
    """Describe how the split was made."""
    if isinstance(source, IndexedSource) and source.split_origin:
        return source.split_origin
    reader = COOP.get(card.layout)
    return f"published, {reader.split}" if isinstance(reader, SplitFile) else "as its files have it"
