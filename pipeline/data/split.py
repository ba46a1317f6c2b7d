"""The few-shot draw, as CoOp's data loader makes it: the same seed gives the same images as the published index files.

Source: KaiyangZhou/CoOp and Dassl `generate_fewshot_dataset`: Python's `random` is seeded once, then for the train list
and after it for the val list, classes are taken in order of first appearance and `random.sample` draws from each.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data.source import Source
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


def draw(source: Source, name: str, shots: int, seed: int, validation: str) -> Split:
    """`shots` train images a class, and min(shots, 4) val images a class unless validation is 'none'.

    Raises DataError when a class has fewer images than asked.
    """
    rng = random.Random(seed)
    train = _sample(rng, source, name, "train", shots)
    val = _sample(rng, source, name, "val", min(shots, 4)) if validation == "min4" else ()
    return Split(train, val)


def sample(rng: random.Random, labels: Sequence[int], n: int) -> list[int]:
    """Positions in `labels` of n drawn from each class, the classes in order of first appearance."""
    by_class: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        by_class.setdefault(label, []).append(position)
    return [position for members in by_class.values() for position in rng.sample(members, n)]


def _sample(rng: random.Random, source: Source, name: str, split: str, n: int) -> tuple[int, ...]:
    rows = source.rows_of(split)
    if not len(rows):
        raise DataError(f"data set {name!r} has no {split} split (its splits: {', '.join(source.splits)})")
    labels = source.labels[rows].tolist()
    for label, found in Counter(labels).items():
        if found < n:
            raise DataError(
                f"{n} {split} images a class asked of {name!r}, but class {source.classnames[label]!r} has {found}: "
                f"set shots to {found} or fewer"
            )
    return tuple(rows[sample(rng, labels, n)].tolist())
