"""`farebox audit`: what the released code of each paper chooses settings on, and what one fit costs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.errors import ConfigError, did_you_mean
from pipeline.results.escape import markdown
from pipeline.results.releases import EVIDENCE, SELECTS_ON, Release, release_of, releases, without_release

WIDTH = 120
SHAPE = "16 shots of EuroSAT: 160 training images, 10 classes"
LEGEND = (
    f"Requests and image rows: one fit with the schedule of the release ({SHAPE}), without the images that it chooses "
    "on. Per set: origin of settings that differ from data set to data set. Evidence: of the selection, and of the "
    "cost. `farebox audit NAME` prints the full record."
)


def select(words: Sequence[str]) -> list[Release]:
    """Return the releases that the arguments name, or all of them.

    Args:
        words: Methods, titles or papers, in any case.

    Raises:
        ConfigError: there is no release of this name.
    """
    if not words:
        return list(releases().values())
    return list(dict.fromkeys(release for word in words for release in _named(word)))


def _named(word: str) -> list[Release]:
    found = [release for release in releases().values() if _key(word) in _keys(release)]
    if found:
        return found
    reason = without_release().get(word)
    if reason is not None:
        raise ConfigError(f"{word} has no released code to audit: {reason}")
    release = _of_registered(word)
    if release is None:
        known = {name for r in releases().values() for name in (r.name, *r.methods)}
        raise ConfigError(did_you_mean("release", word, known))
    return [release]


def _keys(release: Release) -> set[str]:
    """Return the names of a release. A method that has a release of its own is not a name of another one."""
    own = [method for method in release.methods if release_of(method) is release]
    return {_key(name) for name in (release.name, release.title, release.paper, release.paper.split(":")[-1], *own)}


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.casefold())


def _of_registered(name: str) -> Release | None:
    """Return the release of a registered method or variant, by its base method or its paper."""
    from methods import all_methods  # loads torch, which the named releases do not need
    from pipeline.config.files import load, names

    base = load("method", name).get("method", name) if name in names("method") else name
    info = all_methods().get(base)
    return release_of(base) or next((r for r in releases().values() if info and r.paper == info.paper), None)


def cells(release: Release) -> dict[str, str]:
    """Return one line of the table."""
    cost, settings = release.cost, release.per_dataset
    return {
        "release": release.name,
        "selects on": release.chosen_on,
        "validation": release.validation,
        "seeds": release.seeds,
        "requests": _number(cost.requests),
        "image rows": _number(cost.images),
        "per set": ("not stated" if settings.origin.startswith("not stated") else "stated") if settings else "",
        "evidence": f"{release.evidence}, {cost.evidence}",
    }


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def table(chosen: Sequence[Release]) -> str:
    """Return an aligned table of at most WIDTH characters a line, with its legend."""
    rows = [cells(release) for release in chosen]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = []
    for row in [{name: name for name in widths}, *rows]:
        aligned = (
            row[name].rjust(width) if name in ("requests", "image rows") else row[name].ljust(width)
            for name, width in widths.items()
        )
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([*lines, "", textwrap.fill(LEGEND, WIDTH), *explained(chosen)])


def explained(chosen: Iterable[Release]) -> list[str]:
    """Return one line per level of evidence that occurs."""
    chosen = list(chosen)
    used = {level for release in chosen for level in (release.evidence, release.cost.evidence)}
    return [textwrap.fill(f"{level}: {EVIDENCE[level]}", WIDTH) for level in EVIDENCE if level in used]


def fields(release: Release) -> list[tuple[str, str]]:
    """Return the full record as pairs of a name and a text."""
    cost, settings = release.cost, release.per_dataset
    commit = release.commit if release.commit == "none" else f"commit {release.commit}"
    pairs = [
        ("paper", release.paper),
        ("methods here", ", ".join(release.methods) or "those of the same name or paper"),
        ("code", f"{release.repository}, {commit}, {release.file}"),
        ("command", release.command),
        ("licence", release.licence),
        ("selects on", f"{release.chosen_on}. {release.selection} ({release.evidence})"),
        ("validation", release.validation),
        ("seeds", release.seeds),
        ("few-shot sets", release.sampler),
        ("own count", release.own_count),
        (
            "cost",
            f"requests {_number(cost.requests)}, image rows {_number(cost.images)}, further images chosen on "
            f"{_number(cost.selection_images)} ({SHAPE}; {cost.evidence}): {cost.formula}",
        ),
        (
            "per data set",
            f"{settings.what}; origin {settings.origin} ({settings.evidence}, {settings.file})" if settings else "none",
        ),
    ]
    return pairs + [("note", f"{note.what} ({note.evidence}, {note.file})") for note in release.notes]


def record(release: Release) -> str:
    """Return the full record as text."""
    lines = [f"{release.title} ({release.name})"]
    for name, text in fields(release):
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16, break_on_hyphens=False
        )
    return "\n".join(lines)


def records(chosen: Sequence[Release]) -> list[dict[str, Any]]:
    """Return one JSON record per release."""
    return [
        release._asdict()
        | {
            "cost": release.cost._asdict() | {"dataset": "eurosat", "shots": 16},
            "per_dataset": release.per_dataset._asdict() if release.per_dataset else None,
            "notes": [note._asdict() for note in release.notes],
        }
        for release in chosen
    ]


def page(chosen: Sequence[Release]) -> str:
    """Return the generated part of docs/audit.md: levels, table and records."""
    rows = [cells(release) for release in chosen]
    lines = ["| selects on | meaning |", "|---|---|", *(f"| {k} | {v} |" for k, v in SELECTS_ON.items()), ""]
    lines += ["| evidence | meaning |", "|---|---|", *(f"| {k} | {v} |" for k, v in EVIDENCE.items()), ""]
    lines += ["## The table", "", f"| {' | '.join(rows[0])} |", "|---|---|---|---|--:|--:|---|---|"]
    for release, row in zip(chosen, rows, strict=True):
        name = f"[`{release.name}`](#{release.name})"
        lines.append(f"| {' | '.join([name, *map(markdown, list(row.values())[1:])])} |")
    lines += ["", "## The records"]
    for release in chosen:
        lines += ["", f"### {release.name}", "", f"{release.title}.", ""]
        lines += [f"- **{name}**: {markdown(text)}" for name, text in fields(release)]
    return "\n".join(lines) + "\n"
