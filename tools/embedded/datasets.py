"""Builds the datasets: classes, near-duplicates out, group-wise splits, jitter, Parquet."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

from tools.embedded import classes, dedupe
from tools.embedded.corpus import split_style
from tools.embedded.drawings import Drawing, Drawings
from tools.embedded.jitter import jittered_png
from tools.embedded.settings import JITTER_SEED, LEAST, MOST, NEAR, SIZE, SPLIT_SEED

DIGITS_TEST = 100  # images a class; there are enough
GENDERS = {"man", "woman", "person", "men", "women", "people", "mx", "mrs", "prince", "princess"}


@dataclass
class Dataset:
    """Rows of a dataset before the jitter; ``rows`` point into ``drawings``."""

    name: str
    drawings: Drawings
    note: str
    classes: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    removed: int = 0  # near-duplicates taken out, of one another or of the corpus
    known: int = 0  # of these, near the corpus

    def add(self, row: int, label: int, split: str, group: str) -> None:
        self.rows.append(row)
        self.labels.append(label)
        self.splits.append(split)
        self.groups.append(group)

    def counts(self, split: str) -> list[int]:
        """Images of every class in a split."""
        labels = [y for y, s in zip(self.labels, self.splits, strict=True) if s == split]
        return [labels.count(label) for label in range(len(self.classes))]

    def thumbs(self, *splits: str) -> np.ndarray:
        rows = [r for r, s in zip(self.rows, self.splits, strict=True) if s in splits]
        return dedupe.thumbnails(self.drawings.pixels[rows])


def one_colour(drawing: Drawing) -> bool:
    """Glyphs, and Fluent's high-contrast style, are black on nothing."""
    return drawing.is_glyph or drawing.source == "fluent-high-contrast"


def icon_group(drawing: Drawing) -> str:
    """The icon's name without its style: ``bell`` and ``bell-outline`` stay together."""
    return split_style(drawing.names[0], "")[0]


def emoji_group(drawing: Drawing) -> str:
    """The concept without the gender: man, woman and person surfing stay together."""
    words = [w for w in drawing.names[0].replace(",", "").split() if w not in GENDERS]
    return " ".join(words) or drawing.names[0]


def build(held_out: Drawings, corpus: Drawings) -> dict[str, Dataset]:
    """All datasets, by name, in the order in which they ship."""
    seen = dedupe.thumbnails(corpus.pixels)
    return {d.name: d for d in (*_icons(held_out, seen), *_emoji(held_out, seen), _digits(seen))}


def _icons(held_out: Drawings, seen: np.ndarray) -> tuple[Dataset, Dataset]:
    fit = Dataset("icons", held_out, "Material Design Icons; a class is a thing and holds its variants")
    shift = Dataset("icons_outline", held_out, "The classes of icons, drawn by Tabler in thin outline")
    ours = _distinct({c.name: _of_icon(held_out, "mdi", c.mdi) for c in classes.ICONS}, icon_group, fit, seen)
    theirs = _distinct({c.name: _of_icon(held_out, "tabler", c.tabler) for c in classes.ICONS}, icon_group, shift, seen)
    theirs = _apart(theirs, ours, shift)
    for name in ours:
        split = _split(ours[name], lambda row: icon_group(held_out.records[row]), len(fit.classes))
        if split is not None and len(theirs[name]) >= LEAST["test"]:
            _add_class(fit, name, split, icon_group)
            _add_class(shift, name, {"test": _at_most(theirs[name], MOST["test"], len(shift.classes))}, icon_group)
    return fit, shift


def _of_icon(held_out: Drawings, source: str, words: Sequence[str]) -> list[int]:
    def belongs(drawing: Drawing) -> bool:
        return drawing.source == source and any(f"{drawing.names[0]} ".startswith(f"{w} ") for w in words)

    return [i for i, drawing in enumerate(held_out.records) if belongs(drawing)]


def _emoji(held_out: Drawings, seen: np.ndarray) -> tuple[Dataset, Dataset]:
    fit = Dataset("emoji", held_out, "Fluent emoji, flat and 3D; a class is one or more Unicode subgroups")
    shift = Dataset("emoji_contrast", held_out, "The test concepts of emoji in Fluent's high-contrast style")

    def of_style(contrast: bool) -> dict[str, list[int]]:
        wanted = [(i, r) for i, r in enumerate(held_out.records) if r.source.startswith("fluent")]
        wanted = [(i, r) for i, r in wanted if (r.source == "fluent-high-contrast") == contrast]
        return {name: [i for i, r in wanted if r.subgroup in subs] for name, subs in classes.EMOJI.items()}

    def group_of(row: int) -> str:
        return emoji_group(held_out.records[row])

    ours = _distinct(of_style(False), emoji_group, fit, seen)
    theirs = _apart(_distinct(of_style(True), emoji_group, shift, seen), ours, shift)
    for name in ours:
        shown = Counter(group_of(row) for row in theirs[name])

        # The shift set shows the test concepts only, so the test split needs enough of them.
        def enough(groups: Sequence[str], shown: Counter[str] = shown) -> bool:
            return sum(shown[g] for g in groups) >= LEAST["test"]

        split = _split(ours[name], group_of, len(fit.classes), enough)
        if split is None:
            continue
        tested = {group_of(row) for row in split["test"]}
        kept = [row for row in theirs[name] if group_of(row) in tested]
        if len(kept) >= LEAST["test"]:
            _add_class(fit, name, split, emoji_group)
            _add_class(shift, name, {"test": _at_most(kept, MOST["test"], len(shift.classes))}, emoji_group)
    return fit, shift


def _digits(seen: np.ndarray) -> Dataset:
    """Handwritten digits, 8x8 in the source. Writers are not named there, so every image is its own group."""
    raw = load_digits()
    pixels = np.zeros((len(raw.images), SIZE, SIZE, 4), np.uint8)
    for row, image in enumerate(raw.images):
        ink = Image.fromarray(np.rint(image * 255 / 16).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
        pixels[row, 8:56, 8:56, 3] = np.asarray(ink)
    records = [Drawing("digits", f"image {i}", (classes.DIGIT_CLASSES[y],)) for i, y in enumerate(raw.target)]
    drawings = Drawings(records, pixels)
    dataset = Dataset("digits", drawings, "Handwritten digits (8x8, enlarged); writers are not kept apart")
    of_class = {name: np.flatnonzero(raw.target == y).tolist() for y, name in enumerate(classes.DIGIT_CLASSES)}
    for label, (name, rows) in enumerate(_distinct(of_class, lambda d: d.concept, dataset, seen).items()):
        split = _split(rows, lambda row: records[row].concept, label, most_test=DIGITS_TEST)
        if split is None:
            raise SystemExit(f"digits: too few distinct images of {name}")
        _add_class(dataset, name, split, lambda d: d.concept)
    return dataset


def _thumbs(drawings: Drawings, rows: list[int]) -> np.ndarray:
    return dedupe.thumbnails(drawings.pixels[rows])


def _distinct(
    of_class: dict[str, list[int]], group: Callable[[Drawing], str], into: Dataset, seen: np.ndarray
) -> dict[str, list[int]]:
    """The classes' rows without near-duplicates over groups or of the corpus; the dataset counts what goes."""
    rows = [row for members in of_class.values() for row in members]
    groups = [f"{name}/{group(into.drawings.records[row])}" for name, members in of_class.items() for row in members]
    thumbs = _thumbs(into.drawings, rows)
    known = dedupe.rows_near(thumbs, seen, NEAR)
    kept = {rows[i] for i in dedupe.keep_distinct(thumbs, groups, NEAR) if i not in known}
    into.known += len(known)
    into.removed += len(rows) - len(kept)
    return {name: [row for row in members if row in kept] for name, members in of_class.items()}


def _apart(theirs: dict[str, list[int]], ours: dict[str, list[int]], shift: Dataset) -> dict[str, list[int]]:
    """A shift set's rows that are no near-duplicate of anything in the fit dataset."""
    fit_rows = [row for members in ours.values() for row in members]
    rows = [row for members in theirs.values() for row in members]
    near = dedupe.rows_near(_thumbs(shift.drawings, rows), _thumbs(shift.drawings, fit_rows), NEAR)
    gone = {rows[i] for i in near}
    shift.removed += len(gone)
    return {name: [row for row in members if row not in gone] for name, members in theirs.items()}


def _at_most(rows: list[int], most: int, salt: int) -> list[int]:
    order = np.random.default_rng([SPLIT_SEED, salt, 1]).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(order)]


def _split(
    rows: list[int],
    group_of: Callable[[int], str],
    salt: int,
    enough: Callable[[Sequence[str]], bool] = lambda groups: True,
    most_test: int = MOST["test"],
) -> dict[str, list[int]] | None:
    """Whole groups to test, then val, then train; None when a split stays below its least."""
    members: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        members[group_of(row)].append(row)
    names = sorted(members)
    names = [names[i] for i in np.random.default_rng([SPLIT_SEED, salt]).permutation(len(names))]
    val = MOST["val"] if len(rows) >= sum(LEAST.values()) + MOST["val"] else LEAST["val"]
    test = max(LEAST["test"], min(most_test, len(rows) - val - MOST["train"]))
    chosen: dict[str, list[int]] = {"test": [], "val": [], "train": []}
    tested: list[str] = []
    for name in names:
        if len(chosen["test"]) < test or not enough(tested):
            chosen["test"] += members[name]
            tested.append(name)
        elif len(chosen["val"]) < val:
            chosen["val"] += members[name]
        else:
            chosen["train"] += members[name]
    most = {**MOST, "test": most_test}
    chosen = {k: _at_most(v, most[k], salt) for k, v in chosen.items()}
    return chosen if all(len(v) >= LEAST[k] for k, v in chosen.items()) else None


def _add_class(dataset: Dataset, name: str, split: dict[str, list[int]], group: Callable[[Drawing], str]) -> None:
    label = len(dataset.classes)
    dataset.classes.append(name)
    for part in ("train", "val", "test"):
        for row in split.get(part, []):
            dataset.add(row, label, part, f"{name}/{group(dataset.drawings.records[row])}")


def images(dataset: Dataset) -> list[bytes]:
    """The dataset's images as they ship, jittered."""
    records, pixels = dataset.drawings.records, dataset.drawings.pixels
    return [jittered_png(pixels[r], one_colour(records[r]), JITTER_SEED, place) for place, r in enumerate(dataset.rows)]


def write(dataset: Dataset, path: Path) -> None:
    """The dataset as Parquet; the seed of the jitter is in the file's metadata."""
    table = pa.table(
        {
            "image": pa.array(images(dataset), pa.binary()),
            "label": pa.array(dataset.labels, pa.int32()),
            "split": pa.array(dataset.splits, pa.string()),
            "group": pa.array(dataset.groups, pa.string()),
        }
    )
    metadata = {"classes": json.dumps(dataset.classes), "name": dataset.name}
    metadata |= {"jitter_seed": str(JITTER_SEED), "note": dataset.note}
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")
