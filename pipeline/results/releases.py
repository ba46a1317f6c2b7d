"""What the released code of each paper chooses settings on, and what one fit costs: published/releases.yaml.

Nothing here is computed from results. docs/audit.md explains the fields.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.plain_yaml import read_file
from pipeline.files import verified

FILE = Path(__file__).parent / "published" / "releases.yaml"
SELECTS_ON = {
    "nothing": "settings are fixed, and the last epoch or step is kept",
    "training": "the training images",
    "validation": "validation images",
    "test": "the test set",
    "unknown": "not released, or not read",
}
EVIDENCE = {
    "code": "read in the released code, its configuration, documentation or issues",
    "copy": "read in a copy of the code that belongs to another project",
    "plan": "the bill that Farebox plans for its own method with the schedule of the release; a test compares them",
    "derived": "computed from numbers that were read in the code",
    "unverified": "nothing could be read",
    "none": "not stated",
}
COST_EVIDENCE = ("plan", "derived", "unverified", "none")
BY_AUTHORS = ("authors", "quoted")
"""Origins of printed accuracies that come from the method's own authors, and so from their code."""
IMAGENET = ("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
"""Data sets whose accuracies are those of a method that was fitted on ImageNet."""


class Cost(NamedTuple):
    """Cost of one fit in Farebox's units, with 16 shots of EuroSAT (160 training images, 10 classes)."""

    requests: int | None
    images: int | None
    """Image rows of the training images; None: not stated."""
    selection_images: int | None
    """Number of images that the release chooses on besides the training images; None: not stated."""
    evidence: str
    """One of COST_EVIDENCE."""
    formula: str
    """What is counted."""
    method: str = ""
    """With evidence "plan": the method of Farebox whose plan this is."""


class Settings(NamedTuple):
    """Settings that differ from data set to data set."""

    what: str
    origin: str
    """Where the release says that they come from."""
    file: str
    evidence: str


class Note(NamedTuple):
    """A known problem of the release, or what to know before its numbers are compared."""

    what: str
    file: str
    evidence: str


class Release(NamedTuple):
    """The released code of one method."""

    name: str
    title: str
    paper: str
    methods: tuple[str, ...]
    """Methods of Farebox that follow it."""
    repository: str
    commit: str
    """Commit that was read; "none" if there is no code."""
    file: str
    command: str
    licence: str
    selects_on: str
    """A key of SELECTS_ON."""
    selection: str
    """How settings, epoch or step are chosen."""
    validation: str
    """Images that the release reads as its validation set."""
    seeds: str
    sampler: str
    """How few-shot sets are drawn."""
    evidence: str
    """A key of EVIDENCE; it holds for the selection, validation, seeds and sampler."""
    own_count: str
    """The paper's or the release's own count of its queries."""
    cost: Cost
    per_dataset: Settings | None
    notes: tuple[Note, ...]
    selects_on_imagenet: str = ""
    """What is chosen on on ImageNet, if it differs."""

    @property
    def chosen_on(self) -> str:
        """What is chosen on, with ImageNet's exception."""
        return self.selects_on + (f" (ImageNet: {self.selects_on_imagenet})" if self.selects_on_imagenet else "")


@cache
def releases() -> dict[str, Release]:
    """Return all releases by name. Raises DataError if the file is damaged."""
    return {name: _typed(name, entry) for name, entry in _content()["releases"].items()}


@cache
def without_release() -> dict[str, str]:
    """Return the methods of Farebox that have no released code to audit, with the reason."""
    return dict(_content()["without_release"])


@cache
def _content() -> dict[str, Any]:
    content: dict[str, Any] = read_file(verified(FILE))
    return content


def _typed(name: str, entry: dict[str, Any]) -> Release:
    typed = {
        "methods": tuple(entry["methods"]),
        "cost": Cost(**entry["cost"]),
        "per_dataset": Settings(**entry["per_dataset"]) if entry["per_dataset"] else None,
        "notes": tuple(Note(**note) for note in entry["notes"]),
    }
    return Release(name=name, **entry | typed)


def release_of(method: str) -> Release | None:
    """Return the release that a method follows: that of its name, or the one that lists it."""
    listed = (release for release in releases().values() if method in release.methods)
    return releases().get(method) or next(listed, None)


def printed_selection(method: str, dataset: str, origin: str) -> str:
    """Return what a printed accuracy was chosen on, according to the release; empty if that is not known.

    It is known only of numbers that come from the method's own authors: others may have run it in another way.

    Args:
        method: A method of Farebox.
        dataset: The data set whose accuracy is printed.
        origin: A key of `published.ORIGIN`.
    """
    release = release_of(method)
    if release is None or release.selects_on == "unknown" or origin not in BY_AUTHORS:
        return ""
    return (dataset in IMAGENET and release.selects_on_imagenet) or release.selects_on
