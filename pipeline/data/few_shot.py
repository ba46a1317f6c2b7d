"""Few-shot sampling as in CoOp's data loader: a seed gives the same images as the published index files.

Source: KaiyangZhou/CoOp and Dassl `generate_fewshot_dataset`: Python's `random` is seeded once, then for the train list
and then for the val list, `random.sample` draws from each class, in the order of first appearance.

An imbalanced draw has as many training images, in unequal numbers for the classes, and none for some: see
`_imbalanced`. Protocol: Silva-Rodriguez et al., arXiv:2506.17500, whose medical data sets are imbalanced themselves.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.source import LabelledRows, Source
from pipeline.errors import DataError


@dataclass(frozen=True)
class Split:
    """Row numbers of a few-shot draw, in drawn order."""

    train: tuple[int, ...]
    val: tuple[int, ...]

    def digest(self, source: Source) -> str:
        """Return the SHA-256 of the drawn images' content keys and labels."""
        h = hashlib.sha256()
        for name, rows in (("train", self.train), ("val", self.val)):
            for row, key in zip(rows, source.keys_of(rows), strict=True):
                h.update(f"{name}\t{key}\t{source.labels[row]}\n".encode())
        return h.hexdigest()


def draw(
    source: LabelledRows,
    name: str,
    shots: int,
    seed: int,
    validation: str,
    small_classes: str = "error",
    balanced: bool = True,
) -> Split:
    """Draw training and validation images.

    Args:
        source: The rows to draw from.
        name: Name of the data set, for messages.
        shots: Number of training images per class; in an imbalanced draw, their mean over the classes.
        seed: Seed of the draw.
        validation: min4: min(shots, 4) images per class; full: the whole val split; none. If a data set has no val
            split, such as ImageNet, min4 draws from the remaining training images.
        small_classes: error, or take_all to use all images of classes with too few.
        balanced: Draw as many training images from each class; otherwise as `_imbalanced` does.

    Raises:
        DataError: A class has too few images, or the data set has no such split.
    """
    rng, n_val = random.Random(seed), min(shots, 4)
    of_train, of_val = source.rows_of("train"), source.rows_of("val")
    if not len(of_train):
        raise DataError(f"data set {name!r} has no train split (its splits: {', '.join(source.splits)})")
    check_validation(name, validation, len(of_val))
    if balanced:
        train = _sample(rng, source, name, "train", of_train, shots, small_classes)
    else:
        train = _imbalanced(rng, source, name, of_train, shots, small_classes)
    if validation == "none":
        return Split(train, ())
    if validation == "full":
        return Split(train, tuple(of_val.tolist()))
    rest = of_val if len(of_val) else np.setdiff1d(of_train, train)  # sorted: in listed order
    kind = "val" if len(of_val) else "further train"
    taken = shots if balanced and not len(of_val) else 0
    return Split(train, _sample(rng, source, name, kind, rest, n_val, small_classes, taken))


def check_validation(name: str, validation: str, n_val: int) -> None:
    """Raise DataError for validation=full when a data set has no val split."""
    if validation == "full" and not n_val:
        raise DataError(f"data set {name!r} has no val split: type validation=min4 or validation=none")


def sample(rng: random.Random, labels: Sequence[int], n: int) -> list[int]:
    """Return positions in `labels` of n items drawn from each class, in the order in which classes first appear.

    A class with fewer than n items contributes all of them, without a draw.
    """
    return [
        position
        for members in _by_class(labels).values()
        for position in (rng.sample(members, n) if len(members) >= n else members)
    ]


def _by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    """Return the positions of each class in `labels`."""
    members: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        members.setdefault(label, []).append(position)
    return members


def _imbalanced(
    rng: random.Random, source: LabelledRows, name: str, rows: np.ndarray, shots: int, small_classes: str
) -> tuple[int, ...]:
    """Draw as many images as a balanced draw has, with unequal shares of the classes.

    The shares are uniform on the simplex, Dirichlet(1, ..., 1). Then images are drawn one after another without
    replacement: a class by its share, among those with images left, and one of its images.
    """
    n = shots * len(source.classnames)
    if len(rows) < n and small_classes == "error":
        most = len(rows) // len(source.classnames)
        advice = f"set shots to {most} or fewer, or data.small_classes=take_all" if most else "add train images"
        raise DataError(f"{n:,} train images requested from {name!r}, but it has {len(rows):,}: {advice}")
    left = {label: rng.sample(some, len(some)) for label, some in _by_class(source.labels[rows].tolist()).items()}
    share = {label: rng.expovariate(1) for label in left}  # up to a common factor
    drawn: list[int] = []
    while left and len(drawn) < n:
        for label in rng.choices(list(left), [share[label] for label in left], k=n - len(drawn)):
            if left[label]:
                drawn.append(int(rows[left[label].pop()]))
        left = {label: some for label, some in left.items() if some}
    return tuple(drawn)


def _sample(
    rng: random.Random,
    source: LabelledRows,
    name: str,
    kind: str,
    rows: np.ndarray,
    n: int,
    small_classes: str,
    taken: int = 0,
) -> tuple[int, ...]:
    labels = source.labels[rows].tolist()
    count = np.bincount(labels, minlength=len(source.classnames))
    if small_classes == "error" and (short := np.flatnonzero(count < n)).size:
        label = int(short[0])
        raise DataError(
            f"{n} {kind} images a class requested from {name!r}, but "
            f"class {source.classnames[label]!r} has {count[label]}: "
            f"{_advice(kind, int(count.min()), taken)}{f' ({short.size:,} such classes)' if short.size > 1 else ''}"
        )
    return tuple(rows[sample(rng, labels, n)].tolist())


def _advice(kind: str, least: int, taken: int) -> str:
    """Return what to type when the smallest class has `least` images besides the `taken` ones."""
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
        ways.append("data.small_classes=take_all")
    return ", or ".join(ways) or f"add {kind} images, or remove the class (farebox data check names all)"
