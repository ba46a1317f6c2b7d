"""Determine the split of each table file from its name, and check that the files of a split form one table.

Accepted names are SPLIT.parquet, SPLIT-N.parquet and SPLIT-N-of-M.parquet (or .arrow), and any one such name inside a
folder called SPLIT. Other files that begin with the name of a split, as train_unlabeled.parquet, are rejected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.data.layouts.file_kinds import TABLES, ends_in
from pipeline.data.layouts.image_folder import NAMES_OF_SPLITS
from pipeline.data.layouts.skipped import walk
from pipeline.errors import DataError

_SHARD = re.compile(r"(?P<stem>.*?)(?:(?:^|[-_.])(?P<number>\d+)(?:-of-(?P<total>\d+)(?:-[0-9a-f]{16})?)?)?")
_SPARK = re.compile(r"part-(\d+)-[0-9a-f]{8}-.*")


class Shard(NamedTuple):
    """The parts of a file name. Shards that differ only in their number are parts of one table."""

    folder: Path
    stem: str
    ending: str
    total: int | None
    number: int | None


def tables_below(where: Path) -> list[Path]:
    """Return the tables below a folder, sorted by path, without the cache files of Hugging Face's `map`."""
    return sorted(
        path
        for path, reason in walk(where)
        if not reason and ends_in(path.name, TABLES) and not path.name.startswith("cache-")
    )


def shard_of(path: Path) -> Shard:
    """Parse a file name."""
    stem = path.stem.lower()
    if match := _SPARK.fullmatch(stem):
        return Shard(path.parent, "part", path.suffix.lower(), None, int(match[1]))
    match = _SHARD.fullmatch(stem)
    assert match is not None  # every part of the pattern is optional
    number, total = (int(match[part]) if match[part] else None for part in ("number", "total"))
    return Shard(path.parent, match["stem"], path.suffix.lower(), total, number)


def split_of(path: Path, root: Path, has_column: bool) -> str | None:
    """Return the split that the name of a file or of its nearest folder means; None if neither means one.

    Raises:
        DataError: A name begins with the name of a split but is longer, and the file has no split column.
    """
    for name in (shard_of(path).stem, *(parent.name.lower() for parent in path.relative_to(root).parents)):
        if name in NAMES_OF_SPLITS:
            return NAMES_OF_SPLITS[name]
        if (word := re.split(r"[^a-z]", name)[0]) in NAMES_OF_SPLITS and not has_column:
            raise DataError(
                f"{path}: {name!r} is not the name of a split: rename it to {word}-0{path.suffix} (or {word}/) if it "
                f"is one, or move it out of {root}"
            )
    return None


def check_shards(root: Path, split_of_path: Mapping[Path, str | None]) -> None:
    """Check that the files of each split are the parts of one table, and that no part is missing.

    Raises:
        DataError: Naming two tables of one split, or the missing part.
    """
    by_split: dict[str | None, list[Path]] = {}
    for path, split in split_of_path.items():
        by_split.setdefault(split, []).append(path)
    if None in by_split and len(by_split) > 1:
        named = next(paths[0] for split, paths in by_split.items() if split)
        raise DataError(
            f"{by_split[None][0]} has a column `split`, {named} is named by its split: move one of them out of {root}"
        )
    for split, paths in by_split.items():
        _check_split(root, f"mean the {split} split" if split else "have a column `split`", paths)


def _check_split(root: Path, meaning: str, paths: Sequence[Path]) -> None:
    shards = {path: shard_of(path) for path in paths}
    first = shards[paths[0]]
    seen: dict[int | None, Path] = {}
    for path, shard in shards.items():
        other = seen.setdefault(shard.number, path)
        if shard[:4] != first[:4] or (shard.number is None) != (first.number is None):
            other = paths[0]
        if other != path:
            raise DataError(
                f"{other.relative_to(root)} and {path.relative_to(root)} in {root} both {meaning}: move one of them "
                "out, or use the path of one of them"
            )
    if first.total is not None:
        numbers = {number for number in seen if number is not None}
        start = 1 if first.total in numbers else 0
        missing = sorted(set(range(start, start + first.total)) - numbers)
        if missing or len(seen) != first.total:
            raise DataError(
                f"{paths[0].relative_to(root)} in {root} says {first.total} parts, {len(seen)} are there"
                + (f" (part {missing[0]} is missing)" if missing else "")
                + ": restore the others"
            )
