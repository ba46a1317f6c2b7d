"""Find images that occur more than once in a data set: in train and test, with two labels, or twice in a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.data.source import Source


class Repeats(NamedTuple):
    """Pairs of rows whose images have the same bytes."""

    across: list[tuple[int, int]]
    """Pairs (test row, train row), one for each test image that is in train too."""
    conflicting: list[tuple[int, int]]
    """Pairs (first row, later row) of images with different labels."""
    within: int
    """Number of images that occur earlier in their split with the same label."""


def repeats(source: Source, rows: Sequence[int] | np.ndarray) -> Repeats:
    """Find repeated images among these rows by their content keys."""
    rows = np.asarray(rows, np.int64)
    split_of = {int(row): split for split in source.splits for row in source.rows_of(split)}
    labels = source.labels
    rows_of_key: dict[str, list[int]] = {}
    for row, key in zip(rows.tolist(), source.keys_of(rows), strict=True):
        rows_of_key.setdefault(key, []).append(row)
    result = Repeats([], [], sum(_within(same, split_of, labels) for same in rows_of_key.values()))
    for same in rows_of_key.values():
        in_train = [row for row in same if split_of[row] == "train"]
        result.across.extend((row, in_train[-1]) for row in same if in_train and split_of[row] == "test")
        result.conflicting.extend((same[0], row) for row in same[1:] if labels[row] != labels[same[0]])
    return result


def _within(same: Sequence[int], split_of: dict[int, str], labels: np.ndarray) -> int:
    return len(same) - len({(split_of[row], int(labels[row])) for row in same})
