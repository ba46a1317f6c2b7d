"""The few-shot draw, as CoOp's data loader makes it: the same seed gives the same images as the published index files.

Source: KaiyangZhou/CoOp and Dassl `generate_fewshot_dataset`: Python's `random` is seeded once, then for the train list
and after it for the val list, classes are taken in order of first appearance and `random.sample` draws from each.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.source import Labelled, Source
from pipeline.errors import DataError


@dataclass(frozen=True)
class Split:
    """Row numbers of a few-shot draw, in drawn order, and the digest that names it."""

    train: tuple[int, ...]
    val: tuple[int, ...]

    def digest(self, source: Source) -> str:
        """SHA-256 over the drawn images' content keys and labels."""
        h = hashlib.sha256()
        for name, rows in (("train", self.train), ("val", self.val)):
            for row, key in zip(rows, source.keys_of(rows), strict=True):
                h.update(f"{name}\t{key}\t{source.labels[row]}\n".encode())
        return h.hexdigest()


def draw(source: Labelled, name: str, shots: int, seed: int, validation: str, short_classes: str = "error") -> Split:
    """`shots` train images a class, then validation images: min(shots, 4) a class (min4), the val split (full) or none.

    A data set without a val split of its own, as ImageNet, has its min4 drawn from what the shots left of train.
    Raises DataError when a class has fewer images than asked, unless `short_classes` is take_all.
    """
    rng, wanted = random.Random(seed), min(shots, 4)
    of_train, of_val = source.rows_of("train"), source.rows_of("val")
    if not len(of_train):
        raise DataError(f"data set {name!r} has no train split (its splits: {', '.join(source.splits)})")
    check_validation(name, validation, len(of_val))
    train = _sample(rng, source, name, "train", of_train, shots, short_classes)
    if validation == "none":
        return Split(train, ())
    if validation == "full":
        return Split(train, tuple(of_val.tolist()))
    rest = of_val if len(of_val) else np.setdiff1d(of_train, train)  # sorted: in listed order
    kind = "val" if len(of_val) else "further train"
    taken = 0 if len(of_val) else shots
    return Split(train, _sample(rng, source, name, kind, rest, wanted, short_classes, taken))


def check_validation(name: str, validation: str, n_val: int) -> None:
    """DataError when the whole val split is asked of a data set without one of its own."""
    if validation == "full" and not n_val:
        raise DataError(f"data set {name!r} has no val split of its own: type validation=min4 or validation=none")


def sample(rng: random.Random, labels: Sequence[int], n: int) -> list[int]:
    """Positions in `labels` of n drawn from each class, all where there are fewer; classes in order of appearance."""
    by_class: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        by_class.setdefault(label, []).append(position)
    return [
        position
        for members in by_class.values()
        for position in (rng.sample(members, n) if len(members) >= n else members)
    ]


def _sample(
    rng: random.Random,
    source: Labelled,
    name: str,
    kind: str,
    rows: np.ndarray,
    n: int,
    short_classes: str,
    taken: int = 0,
) -> tuple[int, ...]:
    labels = source.labels[rows].tolist()
    count = np.bincount(labels, minlength=len(source.classnames))
    if short_classes == "error" and (short := np.flatnonzero(count < n)).size:
        label = int(short[0])
        raise DataError(
            f"{n} {kind} images a class asked of {name!r}, but class {source.classnames[label]!r} has {count[label]}: "
            f"{_advice(kind, int(count.min()), taken)}{f' ({short.size:,} such classes)' if short.size > 1 else ''}"
        )
    return tuple(rows[sample(rng, labels, n)].tolist())


def _advice(kind: str, least: int, taken: int) -> str:
    """Return what to type where the smallest class has `least` images beside the `taken` ones; only what will work."""
    ways = []
    if kind == "further train":  # shots and their validation images, at most 4, come from one split
        least_shots = max((s for s in range(1, taken) if s + min(s, 4) <= least + taken), default=0)
    else:
        least_shots = least
    if least_shots:
        ways.append(f"set shots to {least_shots} or fewer")
    if kind != "train":
        ways.append("validation=none")
    if least:
        ways.append("data.short_classes=take_all")
    return ", or ".join(ways) or f"add {kind} images, or remove the class (farebox data check names all)"
